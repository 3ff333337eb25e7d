"""RippleEdits (arXiv 2307.12976): an edit, and six categories of tests of what follows from it.

Read in the form of its authors, also with labels added (`subject_label`, ...), and flat, as EMSEdit evaluates on it.
Each answer to a test's question is right here, by any of its names. The authors' code wants all of a question's objects
in thirty characters, which fails questions with several ways to say the same among them ("no", "false", "is dead").
"""

import re
from collections.abc import Mapping
from typing import Any

from ...kernels.errors import InputError
from ..facts import RIPPLES
from .marking import mark_subject

_MISSPELT = {"Relation_Specificity": "Relation_Specifity"}  # as the authors' own example has it
_VERB = re.compile(r" (?:is followed by|follows|is|are)(?= )")
_CLAUSES = tuple(  # where the subject stands in an authors' phrase that does not end in "... of <subject>"
    re.compile(clause)
    for clause in (
        r"which (?P<subject>.+) (?:is|plays) [a-z ]+$",
        r"held by (?P<subject>.+)$",
        r"(?:currency|performed) in (?P<subject>.+)$",
        r"award (?P<subject>.+) won$",
        r"children (?P<subject>.+) has$",
    )
)


def is_original(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("edit"), Mapping) and any(_tests(record, name) is not None for name in RIPPLES)


def from_original(record: Mapping[str, Any], position: int) -> dict[str, Any]:
    """One record of the authors' files, the `position`-th: records have no id of their own.

    Its statement ("The name of the author of X is Y.") is taken apart: at the verb, the last one that the statement of
    the true object shares; the subject by the relation's phrase. Files with labels say both, and those are taken.

    Raises `InputError` where either cannot be told, or the statement lacks it (labels that were never found).
    """
    edit = record["edit"]
    before = edit.get("original_fact") or edit.get("previous_fact")
    statement = edit["prompt"].strip()
    beginning, target = _cut(statement, before["prompt"].strip() if before else None)
    target = _label(edit, "target") or target
    if not target:
        raise InputError(f"statement {statement!r} names no object")
    named = _label(edit, "subject")
    prompt, subject = mark_subject(beginning, named) if named else _find_subject(beginning, edit.get("relation", ""))
    true = (_label(before, "target") or _cut(before["prompt"].strip(), statement)[1]) if before else None
    cases = [(name, case) for name in RIPPLES for case in _tests(record, name) or ()]
    return {
        "id": position,
        "subject": subject,
        "prompt": prompt,
        "target_new": target,
        "target_true": true or None,
        "ripples": [test for name, case in cases if (test := _case(name, case))],
    }


def is_flat(record: Mapping[str, Any]) -> bool:
    return {"prompt", "target_new", "subject"} <= set(record) and any(
        _tests(record, name) is not None for name in RIPPLES
    )


def from_flat(record: Mapping[str, Any], position: int) -> dict[str, Any]:
    """One record of EMSEdit's `ripple_effect_eval.json`, the `position`-th: one question a test, and no conditions."""
    prompt, subject = mark_subject(record["prompt"], record["subject"])
    tests = [
        ripple(name, test.get("prompt"), answers(test.get("targets")))
        for name in RIPPLES
        for test in _tests(record, name) or ()
    ]
    return {
        "id": position,
        "subject": subject,
        "prompt": prompt,
        "target_new": record["target_new"],
        "target_true": first(record.get("ground_truth")),
        "paraphrases": record.get("rephrase_prompt") or [],
        "ripples": [test for test in tests if test],
    }


def ripple(category: str, prompt: Any, targets: list[str], **more: Any) -> dict[str, Any] | None:
    """A test as `facts.Ripple` has it; None where there is no question, or no answer that could be looked for."""
    text = first(prompt)
    return {"category": category, "prompt": text, "targets": targets, **more} if text and targets else None


def answers(value: Any) -> list[str]:
    """Every text in it, lists within lists too, each once.

    Single letters are left out, as by the authors: they are in every answer. Numbers are texts of digits.
    """
    texts = [text for text in _texts(value) if len(text) > 1 or text.isdigit()]
    return list(dict.fromkeys(texts))


def first(value: Any) -> str | None:
    """The first text in it that is not blank."""
    return next(iter(_texts(value)), None)


def _texts(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in _texts(each)]
    text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    return [text] if text else []


def _tests(record: Mapping[str, Any], category: str) -> Any:
    return record.get(category, record.get(_MISSPELT.get(category, "")))


def _case(category: str, case: Mapping[str, Any]) -> dict[str, Any] | None:
    """One test: of its questions one (OR), or all (AND), have to be answered right."""
    asked = [query for each in case["test_queries"] if (query := _query(each))]
    needs_all = case.get("test_condition", "OR") == "AND"
    if not asked or (needs_all and len(asked) < len(case["test_queries"])):
        return None  # what has no answer cannot be answered right
    conditions = [query for each in case.get("condition_queries") or () if (query := _query(each))]
    found = asked[0]
    return ripple(
        category, found["prompt"], found["targets"], conditions=conditions, others=asked[1:], needs_all=needs_all
    )


def _query(query: Mapping[str, Any]) -> dict[str, Any] | None:
    prompt = first(query.get("prompt")) or first(query.get("phrase"))
    names = answers([[answer.get("value"), answer.get("aliases")] for answer in query.get("answers") or ()])
    return {"prompt": prompt, "targets": names} if prompt and names else None


def _label(edit: Mapping[str, Any], name: str) -> str | None:
    return first(edit.get(f"{name}_label")) or first(edit.get(name))


def _cut(statement: str, other: str | None) -> tuple[str, str]:
    """(up to the verb, the object) of a statement; of its verbs the last one that `other` has at the same place."""
    whole = statement.removesuffix(".") + " "  # an object that was never found leaves nothing behind the verb
    shared = whole if other is None else other.removesuffix(".") + " "
    ends = [match.end() for match in _VERB.finditer(whole) if shared.startswith(whole[: match.end() + 1])]
    if not ends:
        raise InputError(f"statement {statement!r} has no is, are, follows or is followed by to split it at")
    return whole[: ends[-1]], whole[ends[-1] :].strip()


def _find_subject(beginning: str, relation: str) -> tuple[str, str]:
    """(prompt with `{}`, subject) of "The name of the author of X is": by the relation's name, or by the phrase."""
    verb = list(_VERB.finditer(beginning + " "))[-1]
    clause = beginning[: verb.start()]
    if verb.group() in (" follows", " is followed by"):
        span = (0, len(clause))
    else:
        named = re.search(rf"\b{re.escape(relation.replace('_', ' '))} of (?P<subject>.+)$", clause, re.IGNORECASE)
        found = (named if relation else None) or next(filter(None, (form.search(clause) for form in _CLAUSES)), None)
        span = found.span("subject") if found else _behind_of(clause)
    subject = clause[slice(*span)]
    if not subject.strip():
        raise InputError(f"{beginning!r}: no subject in it")
    return f"{beginning[: span[0]]}{{}}{beginning[span[1] :]}", subject


def _behind_of(clause: str) -> tuple[int, int]:
    """Behind the first " of " that a name follows (no small letter), else the last one."""
    ends = [match.end() for match in re.finditer(" of ", clause)]
    if not ends:
        raise InputError(f"{clause!r}: the subject cannot be told, and no subject is given beside it")
    return next((end for end in ends if end < len(clause) and not clause[end].islower()), ends[-1]), len(clause)
