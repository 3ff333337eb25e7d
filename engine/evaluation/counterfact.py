"""CounterFact (arXiv 2202.05262): efficacy, paraphrase and neighbourhood success and magnitude, their harmonic mean.

A prompt succeeds when the mean token log-probability of the new object is strictly above the true one's; for
neighbours, strictly below. Magnitude is exp(mean log-probability of the wanted object) - exp(that of the other).
A record's prompts are averaged first, then the records. Every forward is batched over all records, and a
(prompt, object) pair that stands on several records runs once.
"""

import math
from collections.abc import Sequence
from typing import Any

from ...kernels.errors import InputError
from ..facts import Fact, held_out
from ..model import Model
from ..phases import Tick
from ..prompts import answer_rows
from ..scores import score

KINDS = ("efficacy", "paraphrase", "neighborhood")


def evaluate(model: Model, facts: Sequence[Fact], batch_tokens: int | None, progress: Tick) -> dict[str, Any]:
    """Metrics are shares in [0, 1], or None where no fact has what they need.

    `*_success`, `*_magnitude` need `target_true`; `*_accuracy` (every token of the wanted object is the most probable
    one, teacher-forced) needs it for neighbours only. `score` is the harmonic mean of the three success rates.
    A neighbour that any of these facts has for its edit does not count.
    """
    pairs: dict[tuple[str, str], int] = {}
    asked = [_questions(fact, neighbors) for fact, neighbors in zip(facts, held_out(facts), strict=True)]
    for fact, questions in zip(facts, asked, strict=True):
        for prompts in questions.values():
            for prompt in prompts:
                for target in (fact.target_new, fact.target_true):
                    if target is not None:
                        pairs.setdefault((prompt, target), len(pairs))
    rows = answer_rows(model.tokenizer, list(pairs))
    for (prompt, _), row in zip(pairs, rows, strict=True):
        if len(row.ids) > model.max_length:
            raise InputError(f"prompt {prompt[:60]!r}... has {len(row.ids)} tokens, the model takes {model.max_length}")
    logprob, exact = score(model, rows, batch_tokens, progress)

    def judge(fact: Fact, kind: str, prompts: Sequence[str]) -> dict[str, Any]:
        new = [pairs[prompt, fact.target_new] for prompt in prompts]
        true = [pairs[prompt, fact.target_true] for prompt in prompts] if fact.target_true is not None else []
        wanted, other = (true, new) if kind == "neighborhood" else (new, true)
        result: dict[str, Any] = {
            "new_logprob": [float(logprob[i]) for i in new],
            "true_logprob": [float(logprob[i]) for i in true],
        }
        if wanted:
            result["accuracy"] = _mean([float(exact[i]) for i in wanted])
        if wanted and other:
            lps = [(float(logprob[a]), float(logprob[b])) for a, b in zip(wanted, other, strict=True)]
            result["success"] = _mean([float(a > b) for a, b in lps])
            result["magnitude"] = _mean([math.exp(a) - math.exp(b) for a, b in lps])
        return result

    records: list[dict[str, Any]] = [
        {"id": fact.id} | {kind: judge(fact, kind, prompts) for kind, prompts in questions.items() if prompts}
        for fact, questions in zip(facts, asked, strict=True)
    ]
    metrics: dict[str, float | None] = {}
    for kind in KINDS:
        for name in ("success", "magnitude", "accuracy"):
            found = [record[kind][name] for record in records if name in record.get(kind, {})]
            metrics[f"{kind}_{name}"] = _mean(found) if found else None
    metrics["score"] = harmonic_mean([metrics[f"{kind}_success"] for kind in KINDS])
    return {"protocol": "counterfact", "metrics": metrics, "facts": records}


def harmonic_mean(rates: Sequence[float | None]) -> float | None:
    """None where a rate is missing; 0 where one is 0 (a zero is not dropped)."""
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates):
        return None
    return 0.0 if 0 in known else len(known) / sum(1 / rate for rate in known)


def _questions(fact: Fact, neighbors: Sequence[str]) -> dict[str, Sequence[str]]:
    return {"efficacy": [fact.question], "paraphrase": fact.paraphrases, "neighborhood": neighbors}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
