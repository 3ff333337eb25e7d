"""zsRE (MEND's form): a question, its answers, a rephrasing, and a question about something else.

The same file is edited in two ways that have nothing in common, so one of them is named (`CONVENTIONS`): MEMIT and
UnderEdit teach the right answer, EasyEdit another one (`alt`). The question about something else (`loc`) stands in the
files without its "?", and with "nq question: " in front, which stays.
"""

from collections.abc import Mapping
from typing import Any

from ...kernels.errors import InputError
from .ripple import answers as texts
from .ripple import ripple

CONVENTIONS = {
    "zsre": "the new object is answers[0]: MEMIT, UnderEdit",
    "zsre-alt": "the new object is alt, the true one answers[0]: EasyEdit",
}


def is_zsre(record: Mapping[str, Any]) -> bool:
    return "src" in record and "answers" in record


def from_zsre(record: Mapping[str, Any], convention: str, position: int) -> dict[str, Any]:
    """One record, the `position`-th of its file: records have no id. Raises `InputError` for one without a new object.

    With `zsre` there is no true object: published code compares with "<|endoftext|>", which says nothing. With
    `zsre-alt` there is none where the new object is itself one of the answers.
    `portability` (EasyEdit's file) asks on from `alt` ("where is the maker of X based"), so only `zsre-alt` has it, as
    a test of RippleEdits' Compositionality_I; with `zsre` its answer would be that to a fact which nobody taught.
    """
    if not isinstance(record["answers"], list):
        raise TypeError("answers is no list")
    answers = [answer.strip() for answer in record["answers"]]
    if not any(answers[:1]):
        raise InputError("answers has no first one")
    target_new, target_true, tests = record["answers"][0], None, []
    if convention == "zsre-alt":
        target_new = record["alt"]
        if not target_new.strip():
            raise InputError("alt is empty")
        target_true = None if target_new.strip() in answers else answers[0]
        beyond = record.get("portability") or {}
        tests = [ripple("Compositionality_I", beyond.get("New Question"), texts(beyond.get("New Answer")))]
    return {
        "id": position,
        "subject": record["subject"],
        "prompt": record["src"],
        "target_new": target_new,
        "target_true": target_true,
        "paraphrases": record["rephrase"],
        "locality": [{"prompt": record["loc"].removesuffix("?") + "?", "target": record["loc_ans"]}],
        "ripples": [test for test in tests if test],
    }
