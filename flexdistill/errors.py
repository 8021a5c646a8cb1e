"""Errors that a user can act on: each message names the cause and the remedy."""


class FlexdistillError(Exception):
    """Bad input or a run that cannot go on; the command line prints it in one line and exits with code 2."""


class NonFiniteLossError(FlexdistillError):
    """A loss or gradient became NaN or infinite; nothing after the named step was kept."""
