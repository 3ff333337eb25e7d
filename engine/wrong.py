"""What pydantic finds wrong, in our words: what was found, and what was expected."""

from collections.abc import Mapping
from typing import Any

_WHOLE, _NUMBER, _LIST = "a whole number", "a number", "a list"
EXPECTED = {  # of the common types; any other is said as pydantic says it
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), _WHOLE),
    **dict.fromkeys(("float_type", "float_parsing"), _NUMBER),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "path_type": "a path",
    "dict_type": "a mapping",
    **dict.fromkeys(("tuple_type", "list_type"), _LIST),
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of at most {max_length}",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "literal_error": "{expected}",
}
_LONGEST = 60  # characters that are quoted of what was found


def in_words(error: Mapping[str, Any]) -> str:
    """Of one of `ValidationError.errors()`: "'many' found, expected a whole number"."""
    if error["type"] == "missing":
        return "missing"
    found = repr(error["input"])
    if error["type"] in EXPECTED:
        reason = "expected " + EXPECTED[error["type"]].format(**error.get("ctx", {}))
    else:
        reason = error["msg"].removeprefix("Value error, ")
    return f"{found if len(found) <= _LONGEST else found[:_LONGEST] + '...'} found, {reason}"
