"""The error of a person's mistake, which every command reports in one message."""


class UserError(ValueError):
    """A mistake of the person who started the program: shown as one message with its remedy, without a traceback."""
