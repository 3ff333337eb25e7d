"""RippleEdits (arXiv 2307.12976): does what follows from an edit follow, and does the rest stay; six kinds of tests.

A question is answered right when the greedy continuation of the prompt, `LIMIT` tokens at most and up to the end of the
text, holds an accepted answer as whole words. Both are brought to Unicode's NFKC, case-folded, and white space is one
space; "as whole words" means that no letter, digit or underscore stands at either end of where it is found. (The
published code looks for the bare letters, in the prompt as well, so that "no" is found in "know", and an answer that
the prompt names is always right.)

One of a test's questions answered right passes it, with `needs_all` only all of them. A test counts only where the
unedited model answers all of its `conditions` right; one without conditions always counts. What is left out is counted.
A category's accuracy is the share of a record's tests that pass, averaged over the records that have one that counts.
The published averages leave out records whose edit failed; `portability_edited` and `locality_edited` do so here.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ...kernels.errors import InputError
from ..asked import NOBODY, Asked, mean
from ..facts import RIPPLES, Fact, Query
from ..phases import Tick
from .registry import Protocol

PORTABILITY, LOCALITY = RIPPLES[:4], RIPPLES[4:]
LIMIT = 20  # tokens of an answer
Said = dict[tuple[int, str], str]  # (number of the fact, prompt) -> what is said behind it


def measure(
    asked: Asked,
    facts: Sequence[Fact],
    progress: Tick,
    *,
    unedited: dict[str, Any] | None = None,
    compat: bool = False,
) -> dict[str, Any]:
    """
    unedited: what this function gave of the unedited model on the same facts: it knows which conditions hold. Without
        it they are asked of the weights as they are, which are then taken for the unedited ones (under deltas beside
        the weights they are)
    compat: as EMSEdit measures on this data: see `_published`

    metrics: those of `METRICS`; None where no fact has what they need, or all of its tests are left out
    facts: a record a fact: {"id", "reliability", "answer": what is said behind the edit's prompt, accuracy of each
        category it has tests of, "portability", "locality", "ripples": [{"category", "held": whether its conditions
        do, "passed", "answers": [of each question]}]}
    Raises `InputError` where `unedited` is of other facts.
    """
    if compat:
        return _published(asked, facts, progress)
    earlier = None if unedited is None else {record["id"]: record.get("ripples", []) for record in unedited["facts"]}
    wanted = [(number, fact.question) for number, fact in enumerate(facts)]
    for number, fact in enumerate(facts):
        for test in fact.ripples:
            wanted += [(number, query.prompt) for query in test.queries]
            wanted += [(NOBODY, query.prompt) for query in test.conditions if earlier is None]
    found = asked.continuations(wanted, limit=LIMIT, progress=progress)
    said = {key: asked.text(each, special=False) for key, each in zip(wanted, found, strict=True)}
    records = []
    for number, fact in enumerate(facts):
        if earlier is None:
            held = [all(_right(said[NOBODY, each.prompt], each) for each in test.conditions) for test in fact.ripples]
        else:
            held = _held(fact, earlier.get(fact.id, []))
        records.append(_judge(number, fact, held, said))
    return {"metrics": _metrics(records), "facts": records}


def holds(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text as whole words (see above)."""
    plain = _plain(text)
    there = [answer for answer in map(_plain, answers) if answer in plain]
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", plain) for answer in there)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _right(text: str, query: Query) -> bool:
    return holds(text, query.targets)


def _held(fact: Fact, earlier: list[dict[str, Any]]) -> list[bool]:
    if [test["category"] for test in earlier] != [test.category for test in fact.ripples]:
        raise InputError(
            f"fact {fact.id}: what is given as the unedited model's evaluation has other ripples, or none; "
            "evaluate the unedited model on the same facts"
        )
    return [test["held"] for test in earlier]


def _judge(number: int, fact: Fact, held: Sequence[bool], said: Said) -> dict[str, Any]:
    tests: list[dict[str, Any]] = []
    for test, counts in zip(fact.ripples, held, strict=True):
        right = [_right(said[number, query.prompt], query) for query in test.queries]
        passed = all(right) if test.needs_all else any(right)
        answers = [said[number, query.prompt] for query in test.queries]
        tests.append({"category": test.category, "held": counts, "passed": passed, "answers": answers})
    answer = said[number, fact.question]
    record: dict[str, Any] = {"id": fact.id, "reliability": float(holds(answer, [fact.target_new])), "answer": answer}
    for category in RIPPLES:
        own = [test for test in tests if test["category"] == category]
        if own:
            record[category] = mean(float(test["passed"]) for test in own if test["held"])
    for name, categories in (("portability", PORTABILITY), ("locality", LOCALITY)):
        record[name] = mean(record.get(category) for category in categories)
    return record | {"ripples": tests}


def _metrics(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    def accuracy(category: str, of: Sequence[dict[str, Any]]) -> float | None:
        return mean(record.get(category) for record in of)

    metrics = {"reliability": mean(record["reliability"] for record in records)}
    edited = [record for record in records if record["reliability"]]
    for suffix, of in (("", records), ("_edited", edited)):
        metrics[f"portability{suffix}"] = mean(accuracy(category, of) for category in PORTABILITY)
        metrics[f"locality{suffix}"] = mean(accuracy(category, of) for category in LOCALITY)
    for category in RIPPLES:
        metrics[category] = accuracy(category, records)
        held = [test["held"] for record in records for test in record["ripples"] if test["category"] == category]
        metrics[f"{category}_count"] = sum(held)
        metrics[f"{category}_left_out_count"] = len(held) - sum(held)
    return metrics


def _published(asked: Asked, facts: Sequence[Fact], progress: Tick) -> dict[str, Any]:
    """EMSEdit's numbers: teacher-forced share of the tokens that are the most probable one, mean over the facts.

    reliability: the new object behind the edit's prompt
    generalization: the new object behind the first Subject_Aliasing test's prompt, whose own answers count for nothing;
        behind the edit's prompt where there is none
    locality: the first answer to the first Relation_Specificity test; the new object behind the edit's prompt, as if
        it were something else, where there is none
    No other test is asked, and no condition.
    """
    names = ("reliability", "generalization", "locality")
    wanted = []
    for number, fact in enumerate(facts):
        first = {test.category: test for test in reversed(fact.ripples)}
        alias, other = first.get("Subject_Aliasing"), first.get("Relation_Specificity")
        own = (fact.question, fact.target_new)
        wanted += [
            (number, *own),
            (number, alias.prompt if alias else fact.question, fact.target_new),
            (number, *((other.prompt, other.targets[0]) if other else own)),
        ]
    answers = iter(asked.answers(wanted, progress))
    records: list[dict[str, Any]] = [
        {"id": fact.id} | {name: next(answers).share_right for name in names} for fact in facts
    ]
    return {"metrics": {name: mean(record[name] for record in records) for name in names}, "facts": records}


METRICS = {
    "reliability": "share of facts whose new object the model says behind the edit's prompt",
    "generalization": "compat only: share of the new object's tokens that are most probable behind an alias' prompt",
    "portability": f"mean accuracy of {', '.join(PORTABILITY)}",
    "locality": f"mean accuracy of {', '.join(LOCALITY)}",
    "portability_edited": "portability over the facts whose new object the model says, as published",
    "locality_edited": "locality over the facts whose new object the model says, as published",
} | {
    f"{category}{suffix}": what
    for category in RIPPLES
    for suffix, what in {
        "": "share of its tests where an accepted answer is said, of those whose conditions the unedited model met",
        "_count": "its tests that count",
        "_left_out_count": "its tests that are left out: the unedited model did not meet their conditions",
    }.items()
}

PROTOCOL = Protocol("ripple", measure, METRICS, against=True, options=("compat",))
