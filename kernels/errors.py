"""The one exception that speaks to a person. It lives in the lowest room, so that every room can raise it."""


class InputError(ValueError):
    """The user's input is wrong: the message names the file, line or field, what was found, what was expected.

    The command line prints it as one line and exits with status 2.
    """
