"""Errors whose message is all that a user needs; the command line prints them as one line."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no fault of its input: the message says what is kept and how to continue."""
