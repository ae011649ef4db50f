"""How the demo model is made: the tokenizer, and a course for each of its three networks."""
