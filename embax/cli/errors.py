"""An error that the command line shows as one line."""


class CommandError(Exception):
    """What the user asked for cannot be done; the text says why and what can."""
