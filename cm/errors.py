"""The error for a mistake of the user, which every command reports as one message."""


class UserError(ValueError):
    """A mistake of the user, shown as one message with its remedy and without a traceback."""
