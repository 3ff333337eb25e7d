"""CounterFact (arXiv 2202.05262): efficacy, paraphrase and neighbourhood success and magnitude, their harmonic mean.

A prompt succeeds when the mean token log-probability of the new object is strictly above the true one's; for
neighbours, strictly below. Magnitude is exp(mean log-probability of the wanted object) - exp(that of the other).
A record's prompts are averaged first, then the records. Every forward is batched over all records, and a
(prompt, object) pair that stands on several records runs once.

Where facts have `generation_prompts`, the model goes on from them: what it writes has an n-gram entropy and, where
there are `references`, a score of how much it is about the new object's kind (`fluency`).
"""

import math
from collections.abc import Sequence
from typing import Any

from ..asked import Asked, mean
from ..facts import Fact, held_out
from ..phases import Tick
from .fluency import fluency
from .registry import Protocol

KINDS = ("efficacy", "paraphrase", "neighborhood")


def measure(asked: Asked, facts: Sequence[Fact], progress: Tick) -> dict[str, Any]:
    """Metrics are shares in [0, 1], or None where no fact has what they need.

    `*_success`, `*_magnitude` need `target_true`; `*_accuracy` needs it for neighbours only. A neighbour that any of
    these facts has for its edit does not count. `ngram_entropy` is in bits, `reference_score` a cosine in [0, 1].
    """
    questions = [_questions(fact, neighbors) for fact, neighbors in zip(facts, held_out(facts), strict=True)]
    wanted = [
        (number, prompt, target)
        for number, (fact, of) in enumerate(zip(facts, questions, strict=True))
        for prompts in of.values()
        for prompt in prompts
        for target in (fact.target_new, fact.target_true)
        if target is not None
    ]
    owned = bool(asked.deltas)  # then two facts that ask the same ask it twice
    texts = len({(number * owned, prompt) for number, fact in enumerate(facts) for prompt in fact.generation_prompts})
    pairs = len({(number * owned, *pair) for number, *pair in wanted})
    answers = asked.answers(wanted, lambda done, _: progress(done, pairs + texts))
    found = dict(zip(wanted, answers, strict=True))
    written = fluency(asked, facts, lambda done, _: progress(pairs + done, pairs + texts))

    def judge(number: int, kind: str, prompts: Sequence[str]) -> dict[str, Any]:
        fact = facts[number]
        new = [found[number, prompt, fact.target_new] for prompt in prompts]
        true = [found[number, prompt, fact.target_true] for prompt in prompts] if fact.target_true is not None else []
        wanted, other = (true, new) if kind == "neighborhood" else (new, true)
        result: dict[str, Any] = {
            "new_logprob": [answer.mean_logprob for answer in new],
            "true_logprob": [answer.mean_logprob for answer in true],
        }
        if wanted:
            result["accuracy"] = mean(float(answer.exact) for answer in wanted)
        if wanted and other:
            lps = [(a.mean_logprob, b.mean_logprob) for a, b in zip(wanted, other, strict=True)]
            result["success"] = mean(float(a > b) for a, b in lps)
            result["magnitude"] = mean(math.exp(a) - math.exp(b) for a, b in lps)
        return result

    records: list[dict[str, Any]] = [
        {"id": fact.id} | {kind: judge(number, kind, prompts) for kind, prompts in of.items() if prompts}
        for number, (fact, of) in enumerate(zip(facts, questions, strict=True))
    ]
    records = [record | more for record, more in zip(records, written, strict=True)]
    metrics: dict[str, float | None] = {}
    for kind in KINDS:
        for name in ("success", "magnitude", "accuracy"):
            metrics[f"{kind}_{name}"] = mean(record.get(kind, {}).get(name) for record in records)
    metrics["score"] = harmonic_mean([metrics[f"{kind}_success"] for kind in KINDS])
    for name in ("ngram_entropy", "reference_score"):
        metrics[name] = mean(record.get(name) for record in records)
    return {"metrics": metrics, "facts": records}


def harmonic_mean(rates: Sequence[float | None]) -> float | None:
    """None where a rate is missing; 0 where one is 0 (a zero is not dropped)."""
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates):
        return None
    return 0.0 if 0 in known else len(known) / sum(1 / rate for rate in known)


def _questions(fact: Fact, neighbors: Sequence[str]) -> dict[str, Sequence[str]]:
    return {"efficacy": [fact.question], "paraphrase": fact.paraphrases, "neighborhood": neighbors}


_ASKED = {"efficacy": "the edit's prompt", "paraphrase": "its paraphrases", "neighborhood": "held-out neighbours"}
_WANTED = {"neighborhood": ("true", "new")}
METRICS = {
    f"{kind}_{name}": what.format(prompts, *_WANTED.get(kind, ("new", "true")))
    for kind, prompts in _ASKED.items()
    for name, what in {
        "success": "share of {0} where the mean log-probability of the {1} object's tokens is above the {2} one's",
        "magnitude": "mean over {0} of exp(mean log-probability of the {1} object) - exp(that of the {2} one)",
        "accuracy": "share of {0} where every token of the {1} object is the most probable one, teacher-forced",
    }.items()
} | {
    "score": "harmonic mean of the three success rates; 0 where one is 0",
    "ngram_entropy": "bits: mean of 2/3 of the entropy of the bigrams and 4/3 of the trigrams of each generated text",
    "reference_score": "cosine of the tf-idf vectors of the generated texts and of the references",
}

PROTOCOL = Protocol("counterfact", measure, METRICS)
