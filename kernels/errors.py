"""The one exception that speaks to a person. It lives in the lowest room, so that every room can raise it."""


class InputError(ValueError):
    """What the user handed in is wrong: the message names the file, line or field, what was found and what was expected.

    The command line prints it as one line and exits with status 2.
    """
