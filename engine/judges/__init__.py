"""Who says whether a generated answer is right: exact match, or a language model."""

import difflib
import logging
import os
from typing import Any

from ...kernels.errors import InputError
from .claims import Claim, Judge
from .exact import ExactMatch, normalise
from .llm import KEY_VARIABLE, LLMJudge

log = logging.getLogger("rewire")

__all__ = ["Claim", "ExactMatch", "Judge", "LLMJudge", "find_judge", "normalise"]

NAMES = ("auto", "exact", "llm")


def find_judge(name: str | None = None, **options: Any) -> Judge:
    """name: "exact", "llm", or "auto" (also None): a language model where its key is set, else exact match, aloud.

    options: of `LLMJudge`; None stands for its default. Where "auto" comes to exact match they count for nothing.
    Raises `InputError` for an unknown name, with the nearest one, and for options where exact match was asked for.
    """
    name = "auto" if name is None else name
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NAMES)}"
        raise InputError(f"unknown judge {name!r}; {hint}")
    options = {option: value for option, value in options.items() if value is not None}
    if name == "exact":
        if options:
            raise InputError(f"{', '.join(options)}: exact match takes no such option; leave it out, or judge by 'llm'")
        return ExactMatch()
    variable = options.get("key_variable", KEY_VARIABLE)
    if name == "auto" and not os.environ.get(variable, "").strip():
        log.warning("exact match judges the answers: %s is not set, so no language model can be asked", variable)
        return ExactMatch()
    return LLMJudge(**options)
