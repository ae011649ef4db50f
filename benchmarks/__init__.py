"""Each figure that the documentation quotes, with the command that prints it."""
