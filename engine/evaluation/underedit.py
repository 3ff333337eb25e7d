"""UnderEdit and OverEdit (arXiv 2503.11895): accuracy and success of edit, paraphrases and neighbours, perplexities.

All of it is teacher-forced and comes from one run over the distinct (prompt, object) pairs of all records.

acc: share of the object's tokens that are the most probable one at the position before. Of neighbours: 1 where all
    most probable tokens at the true object's positions are those of the unedited model, else 0 (stability, whether
    right or wrong).
success: whether the mean token log-probability of the wanted object is strictly above the other's. Wanted is the new
    object, the other one the true; for neighbours the reverse.
efficacy is asked on the edit's prompt, generalization on the paraphrases, specificity on the neighbours that are held
    out (`facts.held_out`). A record's prompts are averaged first, then the records.
score: harmonic mean of the three averages.
rewrite_ppl: exp of the mean negative log-probability of the new object's tokens behind the edit's prompt; rephrase_ppl
    over the tokens of all paraphrases together. Means over records.

A locality probe (zsRE has these instead of neighbours) is a question with an answer of its own. The published code asks
it anew for each token of the answer, with the tokens before it glued to the prompt, and averages the prompts; one row
with the whole answer is the same question, so the acc of a probe is the share of its answer's positions whose most
probable token stays. Its success: the own answer's mean log-probability is above the new object's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...kernels.errors import InputError
from ..asked import Asked, mean
from ..facts import Fact, held_out
from ..phases import Tick
from ..prompts import answer_rows
from ..scores import Answer, perplexity
from .counterfact import harmonic_mean
from .perplexity import perplexities, refuse_deltas
from .registry import Protocol

KINDS = ("efficacy", "generalization", "specificity")


Scored = dict[tuple[str, str], Answer]  # of one record, (prompt, object) -> its answer


class Question(NamedTuple):
    """The answer that is wanted to a prompt, and the one it is held against; None: nothing to hold it against."""

    prompt: str
    wanted: str
    other: str | None


class Questions(NamedTuple):
    """What one record is asked."""

    efficacy: list[Question]
    generalization: list[Question]
    neighbors: list[Question]
    probes: list[Question]

    @property
    def all(self) -> list[Question]:
        return [question for kind in self for question in kind]


def measure(
    asked: Asked,
    facts: Sequence[Fact],
    progress: Tick = lambda done, total: None,
    *,
    unedited: dict[str, Any] | None = None,
    texts: Sequence[str] = (),
    compat: bool = False,
) -> dict[str, Any]:
    """
    unedited: what this function gave of the unedited model on the same facts; without it `specificity_acc` and
        `score_acc` are None, and records have no specificity acc
    texts: whose mean perplexity is `me_ppl`
    compat: as published: `me_ppl` divides by N tokens (see `perplexities`), scores leave zeros out, and GPT-2's rows
        are shifted by the padding of their batch

    metrics: {efficacy, generalization, specificity, score}_{acc, success}, rewrite_ppl, rephrase_ppl, me_ppl; None
        where no fact has what they need (`target_true`; paraphrases; neighbours)
    records: {"id", "efficacy": {"acc", "success"}, "generalization": {...}, "specificity": {"output", "success",
        "acc"}, "rewrite_ppl", "rephrase_ppl"}; lists with a number a prompt, success is empty where nothing is known to
        hold an answer against; output: the most probable token ids, neighbours first, then probes
    Raises `InputError` for a prompt longer than the model's longest row, or an `unedited` of other facts.
    """
    if texts:
        refuse_deltas("underedit", asked)
    questions = [_questions(fact, held) for fact, held in zip(facts, held_out(facts), strict=True)]
    earlier = None
    if unedited is not None:
        earlier = {record["id"]: record["specificity"]["output"] for record in unedited["facts"]}
    wanted = [
        (number, prompt, target)
        for number, of in enumerate(questions)
        for prompt, *targets in of.all
        for target in targets
        if target is not None
    ]
    total = len({(asked.owner(number), *pair) for number, *pair in wanted}) + len(texts)
    found = asked.answers(wanted, lambda done, _: progress(done, total))
    scored: list[Scored] = [{} for _ in facts]
    for (number, *pair), answer in zip(wanted, found, strict=True):
        scored[number][pair[0], pair[1]] = answer
    shifted = _as_published(asked, questions) if compat and asked.model.anatomy.model_type == "gpt2" else scored
    records = [
        _judge(fact, of, moved, answered, None if earlier is None else earlier.get(fact.id, []))
        for fact, of, moved, answered in zip(facts, questions, shifted, scored, strict=True)
    ]
    metrics: dict[str, float | None] = {}
    for name in ("acc", "success"):
        for kind in KINDS:
            metrics[f"{kind}_{name}"] = mean([mean(record[kind].get(name, [])) for record in records])
        metrics[f"score_{name}"] = score([metrics[f"{kind}_{name}"] for kind in KINDS], compat)
    for name in ("rewrite_ppl", "rephrase_ppl"):
        metrics[name] = mean([record[name] for record in records])
    of_texts = perplexities(asked, texts, compat, lambda done, _: progress(total - len(texts) + done, total))
    metrics["me_ppl"] = mean(of_texts)
    return {"metrics": metrics, "facts": records}


def score(rates: Sequence[float | None], compat: bool) -> float | None:
    """Harmonic mean: None where a rate is missing, 0 where one is 0.

    compat: zeros are left out, as in the published tables, and only where nothing else is there the score is 0
    """
    if not compat or None in rates:
        return harmonic_mean(rates)
    above = [rate for rate in rates if rate]
    return harmonic_mean(above) if above else 0.0


def _questions(fact: Fact, neighbors: Sequence[str]) -> Questions:
    new, true = fact.target_new, fact.target_true
    return Questions(
        efficacy=[Question(fact.question, new, true)],
        generalization=[Question(prompt, new, true) for prompt in fact.paraphrases],
        neighbors=[] if true is None else [Question(prompt, true, new) for prompt in neighbors],
        probes=[Question(probe.prompt, probe.target, new) for probe in fact.locality],
    )


def _as_published(asked: Asked, questions: Sequence[Questions]) -> list[Scored]:
    """Of each record its answers as published of GPT-2: a kind's prompts, with one object, are a batch padded on the
    left without positions, so that each row's begin at its padding. (A probe's prompts are left as they are.)"""
    wanted: list[tuple[int, str, str]] = []
    begins: list[int] = []
    for number, of in enumerate(questions):
        for kind in (of.efficacy, of.generalization, of.neighbors):
            for side in (1, 2):
                pairs = [(question.prompt, target) for question in kind if (target := question[side]) is not None]
                rows = answer_rows(asked.model.tokenizer, pairs)
                longest = max((len(row.ids) for row in rows), default=0)
                wanted += [(number, *pair) for pair in pairs]
                begins += [longest - len(row.ids) for row in rows]
        for probe in of.probes:
            wanted += [(number, probe.prompt, target) for target in probe[1:] if target is not None]
        begins += [0] * (len(wanted) - len(begins))
    scored: list[Scored] = [{} for _ in questions]
    for (number, *pair), answer in zip(wanted, asked.answers(wanted, begins=begins), strict=True):
        scored[number][pair[0], pair[1]] = answer
    return scored


def _judge(
    fact: Fact, questions: Questions, scored: Scored, unmoved: Scored, earlier: list[list[int]] | None
) -> dict[str, Any]:
    """unmoved: answers at their true positions, which perplexities are of"""

    def wanted(kind: Sequence[Question]) -> list[Answer]:
        return [scored[question.prompt, question.wanted] for question in kind]

    def success(kind: Sequence[Question]) -> list[float]:
        return [
            float(scored[prompt, target].mean_logprob > scored[prompt, other].mean_logprob)
            for prompt, target, other in kind
            if other is not None
        ]

    kept = [*questions.neighbors, *questions.probes]
    output = [list(answer.best) for answer in wanted(kept)]
    record: dict[str, Any] = {
        "id": fact.id,
        "efficacy": {"acc": [], "success": []},
        "generalization": {"acc": [], "success": []},
        "specificity": {"output": output, "success": success(kept)},
    }
    for kind, asked in (("efficacy", questions.efficacy), ("generalization", questions.generalization)):
        record[kind] = {"acc": [answer.share_right for answer in wanted(asked)], "success": success(asked)}
    if earlier is not None:
        if [len(tokens) for tokens in output] != [len(tokens) for tokens in earlier]:
            raise InputError(
                f"fact {fact.id}: what is given as the unedited model's evaluation has other neighbours, or none; "
                "evaluate the unedited model on the same facts"
            )
        same = [[a == b for a, b in zip(now, then, strict=True)] for now, then in zip(output, earlier, strict=True)]
        whole = len(questions.neighbors)
        record["specificity"]["acc"] = [float(all(tokens)) for tokens in same[:whole]]
        record["specificity"]["acc"] += [sum(tokens) / len(tokens) for tokens in same[whole:]]
    for name, asked in (("rewrite_ppl", questions.efficacy), ("rephrase_ppl", questions.generalization)):
        record[name] = _perplexity([unmoved[question.prompt, question.wanted] for question in asked])
    return record


def _perplexity(of: Sequence[Answer]) -> float | None:
    """Of all their tokens together."""
    logprobs = [value for answer in of for value in answer.logprobs]
    return perplexity(-sum(logprobs) / len(logprobs)) if logprobs else None


METRICS = {
    "efficacy_acc": "share of the new object's tokens that are the most probable one behind the edit's prompt",
    "efficacy_success": "share of facts whose new object is more probable than the true one behind the edit's prompt",
    "generalization_acc": "efficacy_acc, behind the paraphrases",
    "generalization_success": "efficacy_success, behind the paraphrases",
    "specificity_acc": "share of held-out neighbours whose most probable tokens stay those of the unedited model",
    "specificity_success": "share of held-out neighbours whose true object is more probable than the new one",
    "score_acc": "harmonic mean of the three acc",
    "score_success": "harmonic mean of the three success rates",
    "rewrite_ppl": "perplexity of the new object behind the edit's prompt, mean over facts",
    "rephrase_ppl": "perplexity of the new object behind the paraphrases, mean over facts",
    "me_ppl": "mean perplexity of plain texts",
}

PROTOCOL = Protocol("underedit", measure, METRICS, against=True, options=("texts", "compat"))
