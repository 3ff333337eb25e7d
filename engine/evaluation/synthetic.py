"""The synthetic evaluation (EasyEdit's; arXiv 2502.11177 §3): the right tokens are fed, the next one is looked at.

Flattering: a model is asked for a token at a time, with the answer so far and its length given. `wild` asks as users
do.
"""

from collections.abc import Sequence
from typing import Any

from ..asked import Asked, mean
from ..facts import Fact
from ..phases import Tick
from ..scores import Answer
from .contexts import QUESTION, in_context
from .registry import Protocol
from .ripple import PORTABILITY
from .things import ask, kept_things, same_facts

METRICS = {
    "reliability": "share of the new object's tokens that are the most probable one behind the edit's prompt, each "
    "with the right ones before it given",
    "generalization": "the same behind the paraphrases, averaged over each fact's",
    "locality": "share of positions of answers about other things whose most probable token is the unedited model's",
    "portability": "as reliability, of what follows from the facts (first accepted answer), averaged over each fact's",
}


def measure(
    asked: Asked,
    facts: Sequence[Fact],
    progress: Tick = lambda done, total: None,
    *,
    unedited: dict[str, Any] | None = None,
    context: str = QUESTION,
    locality: int = 1,
) -> dict[str, Any]:
    """Metrics are means over the facts that have what they need, else None; `locality` needs `unedited`.

    context: a name of `contexts.CONTEXTS`, what stands around the edit's prompt and the paraphrases; other things are
        asked as they stand, as published
    locality: how many of a fact's questions about other things are asked: its `locality`, then held-out neighbours with
        the true object (published: the first)
    records: {"id", "rewrite_acc", "rephrase_acc", "portability_acc": [a number a prompt], "locality_output": [[most
        probable token ids]], "locality_acc": [a number a question], with `unedited`}
    """
    things = kept_things(facts, locality)
    earlier = same_facts(unedited, facts, "locality_output", things)
    wanted: list[list[tuple[str, str, str]]] = []  # of each fact: (kind, prompt, object)
    for fact, others in zip(facts, things, strict=True):
        questions = [("rewrite", fact.question), *(("rephrase", text) for text in fact.paraphrases)]
        of = [(kind, in_context(asked.model, text, context), fact.target_new) for kind, text in questions]
        follows = [ripple for ripple in fact.ripples if ripple.category in PORTABILITY]
        of += [("portability", in_context(asked.model, r.prompt, context), r.targets[0]) for r in follows]
        wanted.append(of + [("locality", prompt, target) for prompt, target in others])
    found: list[list[tuple[str, Answer]]] = ask(wanted, lambda flat: asked.answers(flat, progress))
    records = []
    for fact, of_fact in zip(facts, found, strict=True):
        record: dict[str, Any] = {"id": fact.id}
        for kind in ("rewrite", "rephrase", "portability"):
            record[f"{kind}_acc"] = [answer.share_right for name, answer in of_fact if name == kind]
        output = [list(answer.best) for name, answer in of_fact if name == "locality"]
        record["locality_output"] = output
        if earlier is not None:
            record["locality_acc"] = [
                sum(a == b for a, b in zip(now, then, strict=True)) / len(now)
                for now, then in zip(output, earlier[fact.id], strict=True)
            ]
        records.append(record)
    named = {
        "reliability": "rewrite_acc",
        "generalization": "rephrase_acc",
        "locality": "locality_acc",
        "portability": "portability_acc",
    }
    metrics = {name: mean([mean(record.get(key, [])) for record in records]) for name, key in named.items()}
    return {"metrics": metrics, "facts": records}


PROTOCOL = Protocol("synthetic", measure, METRICS, against=True, options=("context", "locality"))
