"""WILD (arXiv 2502.11177): the model answers by itself, greedily, stops by itself; a judge says whether it is right.

An answer ends behind the first token that holds a "." or a line break anywhere, at the end of the text, or at 50
tokens; of the text one trailing ".", one line break and one end mark are taken off, in this order, and nothing else.
"""

from collections.abc import Sequence
from typing import Any

from ...kernels.errors import InputError
from ..asked import Asked, mean
from ..decoding import LIMIT, Said
from ..endings import end_ids
from ..facts import Fact
from ..judges import Claim, ExactMatch, Judge
from ..model import Model
from ..phases import Tick
from ..prompts import answer_rows
from .contexts import INSTRUCTION, in_context
from .registry import Protocol
from .ripple import PORTABILITY
from .things import ask, kept_things, same_facts

STOPS = (".", "\n")
NATURAL, GOLD = "natural", "gold"  # how answers are cut

METRICS = {
    "reliability": "share of facts whose generated answer to the edit's prompt the judge finds right",
    "generalization": "share of paraphrases whose generated answer the judge finds right, averaged over each fact's",
    "locality": "share of questions about other things whose generated token ids are those of the unedited model, all",
    "portability": "share of questions about what follows from the facts whose answer the judge finds right",
    "reliability_match": "share of the new object's tokens generated in their place (answers cut at its length)",
    "stopped": "share of answers to the edit's prompt that ended by themselves within the limit",
    "answer_tokens": "mean number of tokens of an answer to the edit's prompt",
}


def measure(
    asked: Asked,
    facts: Sequence[Fact],
    progress: Tick = lambda done, total: None,
    *,
    unedited: dict[str, Any] | None = None,
    context: str = INSTRUCTION,
    judge: Judge | None = None,
    truncation: str = NATURAL,
    limit: int = LIMIT,
    locality: int = 1,
) -> dict[str, Any]:
    """Metrics are means over the facts that have what they need, else None; `locality` needs `unedited`.

    context: a name of `contexts.CONTEXTS`, around every question (published: "question-only" by default, "qa_inst" in
        the paper's tables)
    judge: None: exact match
    truncation: "natural", or "gold": each answer has as many tokens as its object, whatever they are
    locality: how many of a fact's questions about other things are asked: its `locality`, then held-out neighbours
        (published: the first)
    records: {"id", "rewrite", "rephrase", "portability", "locality": [{"prompt", "answer", "ids", "right" or "same"}]}
    Also returns "judge": what judged.
    """
    if truncation not in (NATURAL, GOLD):
        raise InputError(f"truncation {truncation!r} found; expected {NATURAL} or {GOLD}")
    if unedited is not None and unedited.get("context", context) != context:
        raise InputError(f"the unedited model was asked in context {unedited['context']!r}, now {context!r}; ask alike")
    judge = judge or ExactMatch()
    things = kept_things(facts, locality)
    earlier = same_facts(unedited, facts, "locality", things)
    wanted: list[list[tuple[str, str, tuple[str, ...]]]] = []  # of each fact: (kind, prompt, accepted answers)
    for fact, others in zip(facts, things, strict=True):
        of: list[tuple[str, str, tuple[str, ...]]] = [("rewrite", fact.question, (fact.target_new,))]
        of += [("rephrase", text, (fact.target_new,)) for text in fact.paraphrases]
        follows = [ripple for ripple in fact.ripples if ripple.category in PORTABILITY]
        of += [("portability", ripple.prompt, ripple.targets) for ripple in follows]
        wanted.append(of + [("locality", prompt, (target,)) for prompt, target in others])
    total = sum(map(len, wanted))
    lengths: dict[tuple[str, str], int] = {}

    def answers(flat: list[tuple[int, str, tuple[str, ...]]]) -> list[Said]:
        texts = [in_context(asked.model, prompt, context) for _, prompt, _ in flat]
        if truncation == NATURAL:
            return asked.continuations(
                [(number, text) for (number, *_), text in zip(flat, texts, strict=True)],
                STOPS, limit, lambda done, of: progress(done, of),
            )  # fmt: skip
        pairs = [(text, gold[0]) for (_, _, gold), text in zip(flat, texts, strict=True)]
        lengths.update(
            (pair, len(row.labels)) for pair, row in zip(pairs, answer_rows(asked.model.tokenizer, pairs), strict=True)
        )
        found: dict[int, Said] = {}
        for length in sorted(set(lengths.values())):
            places = [place for place, pair in enumerate(pairs) if lengths[pair] == length]
            said = asked.continuations([(flat[place][0], texts[place]) for place in places], (), length)
            found.update(zip(places, said, strict=True))
            progress(len(found), total)
        return [found[place] for place in range(len(flat))]

    said = ask(wanted, answers)
    claims: list[Claim] = []
    records: list[dict[str, Any]] = []
    for fact, of, found in zip(facts, wanted, said, strict=True):
        record: dict[str, Any] = {"id": fact.id, "rewrite": [], "rephrase": [], "portability": [], "locality": []}
        for (kind, prompt, gold), (_, answer) in zip(of, found, strict=True):
            text = trimmed(asked.model, asked.text(answer)) if truncation == NATURAL else asked.text(answer, False)
            record[kind].append({"prompt": prompt, "answer": text, "ids": list(answer.ids), "ended": answer.ended})
            if truncation == GOLD and kind == "rewrite":
                record["match"] = _match(asked.model, in_context(asked.model, prompt, context), gold[0], answer)
            if kind != "locality":
                claims.append(Claim(prompt, gold, text))
        records.append(record)
    verdicts = iter(judge.verdicts(claims, lambda done, of: progress(total, total)))
    for record in records:
        for kind in ("rewrite", "rephrase", "portability"):
            for answered in record[kind]:
                answered["right"] = next(verdicts)
        if earlier is not None:
            for answered, then in zip(record["locality"], earlier[record["id"]], strict=True):
                answered["same"] = answered["ids"] == then["ids"]
    return {"metrics": _metrics(records, truncation), "facts": records, "judge": judge.describe(), "context": context}


def _metrics(records: Sequence[dict[str, Any]], truncation: str) -> dict[str, float | None]:
    def share(kind: str, key: str) -> float | None:
        return mean([mean([float(answered[key]) for answered in of[kind] if key in answered]) for of in records])

    first = [record["rewrite"][0] for record in records]
    natural = truncation == NATURAL
    return {
        "reliability": share("rewrite", "right"),
        "generalization": share("rephrase", "right"),
        "locality": share("locality", "same"),
        "portability": share("portability", "right"),
        "reliability_match": None if natural else mean([record["match"] for record in records]),
        "stopped": mean([float(answer["ended"] == "stop") for answer in first]) if natural else None,
        "answer_tokens": mean([float(len(answer["ids"])) for answer in first]),
    }


def trimmed(model: Model, text: str) -> str:
    """Without one trailing ".", one line break and one end mark, each where it is last at its turn (published; any of
    a chat model's end marks)."""
    for mark in STOPS:
        text = text.removesuffix(mark)
    marks = (model.tokenizer.decode([i], skip_special_tokens=False) for i in end_ids(model))
    return text.removesuffix(next((mark for mark in marks if mark and text.endswith(mark)), ""))


def _match(model: Model, prompt: str, target: str, said: Said) -> float:
    """Share of the object's tokens that were generated in their place."""
    (row,) = answer_rows(model.tokenizer, [(prompt, target)])
    return sum(a == b for a, b in zip(row.labels, said.ids, strict=False)) / len(row.labels)


PROTOCOL = Protocol(
    "wild", measure, METRICS, against=True, options=("context", "judge", "truncation", "limit", "locality")
)
