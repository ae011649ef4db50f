"""What can be told to the person who started the service."""


class CannotStart(Exception):
    """One sentence that says what is wrong and, where it is known, what to do."""
