"""zsRE as MEND and MEMIT measure it (arXiv 2110.11309, 2210.07229): teacher-forced accuracy, token by token.

Accuracy is the share of an answer's tokens that are the most probable one at the position before, the answer's own
tokens standing before that. A record's prompts are averaged first, then the records.

Of locality there are two numbers. `locality_accuracy` is MEMIT's: accuracy on the probes' own answers, which an edit
can also raise. `locality` asks whether the edit moved anything: the share of the same positions whose most probable
token is still that of the unedited model, right or wrong.
Portability is accuracy on what follows from the edit: of each test in `ripple.PORTABILITY` its first question, with the
first of the answers that are right.
"""

from collections.abc import Sequence
from typing import Any

from ...kernels.errors import InputError
from ..asked import Asked, mean
from ..facts import Fact
from ..phases import Tick
from .registry import Protocol
from .ripple import PORTABILITY


def measure(
    asked: Asked, facts: Sequence[Fact], progress: Tick, *, unedited: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    unedited: what this function gave of the unedited model on the same facts; without it `locality` is None

    metrics: those of `METRICS`, shares in [0, 1]; None where no fact has what they need
    facts: a record a fact: {"id", each metric, "output": [most probable ids of each locality answer]}
    Raises `InputError` where `unedited` is of other facts.
    """
    earlier = None if unedited is None else {record["id"]: record.get("output", []) for record in unedited["facts"]}
    questions = [_questions(fact) for fact in facts]
    wanted = [(number, *pair) for number, of in enumerate(questions) for pairs in of.values() for pair in pairs]
    answers = iter(asked.answers(wanted, progress))
    records: list[dict[str, Any]] = []
    for fact, of in zip(facts, questions, strict=True):
        found = {kind: [next(answers) for _ in pairs] for kind, pairs in of.items()}
        output = [list(answer.best) for answer in found["locality_accuracy"]]
        shares = {kind: mean(answer.share_right for answer in each) for kind, each in found.items()}
        kept = None if earlier is None else _kept(fact, output, earlier.get(fact.id, []))
        records.append({"id": fact.id, **shares, "locality": kept, "output": output})
    return {"metrics": {name: mean(record[name] for record in records) for name in METRICS}, "facts": records}


def _questions(fact: Fact) -> dict[str, list[tuple[str, str]]]:
    return {
        "reliability": [(fact.question, fact.target_new)],
        "generalization": [(prompt, fact.target_new) for prompt in fact.paraphrases],
        "locality_accuracy": [(probe.prompt, probe.target) for probe in fact.locality],
        "portability": [(test.prompt, test.targets[0]) for test in fact.ripples if test.category in PORTABILITY],
    }


def _kept(fact: Fact, now: list[list[int]], then: list[list[int]]) -> float | None:
    """Share of the positions whose most probable token stayed, mean over the probes."""
    if [len(tokens) for tokens in now] != [len(tokens) for tokens in then]:
        raise InputError(
            f"fact {fact.id}: what is given as the unedited model's evaluation has other locality probes, or none; "
            "evaluate the unedited model on the same facts"
        )
    return mean(
        sum(a == b for a, b in zip(*tokens, strict=True)) / len(tokens[0]) for tokens in zip(now, then, strict=True)
    )


METRICS = {
    "reliability": "share of the new object's tokens that are the most probable one behind the edit's prompt",
    "generalization": "reliability, behind the paraphrases",
    "locality_accuracy": "share of the tokens of the locality probes' own answers that are the most probable one",
    "locality": "share of the positions of these answers whose most probable token is that of the unedited model",
    "portability": "share of the tokens of what follows from the edit that are the most probable one",
}

PROTOCOL = Protocol("zsre", measure, METRICS, against=True)
