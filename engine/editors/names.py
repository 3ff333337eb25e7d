"""The methods' names, which nothing heavy is imported for."""

import difflib

from ...kernels.errors import InputError

METHODS = ("rome", "r-rome", "memit", "memit-history", "pmet", "emmet", "alphaedit")


def known_method(name: str) -> str:
    """The name itself. Raises `InputError` with the nearest one for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}"
        raise InputError(f"unknown method {name!r}; {hint}")
    return name
