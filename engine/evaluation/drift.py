"""How far an edit moved the model elsewhere: next-token distributions of the edited against the unedited one.

Of each text of N tokens (BOS included) there are N - 1 positions that predict a token; at each of them p is the
distribution of the unedited model and q that of the edited one:

kl_unedited_edited: sum p (log p - log q), nats; kl_edited_unedited: sum q (log q - log p)
total_variation: half of sum |p - q|; top1_agreement: whether the most probable token is the same

Both are computed side by side: of a group of rows the hidden states behind the final norm are read under the edited and
under the unedited weights, and the head, which no edit changes, runs on a portion of both at once. Distributions are
float64: two that are nearly the same differ by less than float32 tells.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import InputError
from ..answer_store import Questions, question_key
from ..asked import Asked, mean
from ..delta import EditedWeights
from ..facts import Fact, held_out
from ..model import Model
from ..passes import final_hidden, forward_bytes, tokens_that_fit
from ..phases import Tick
from ..prompts import Row, prompt_ids, stem
from ..scores import HEAD_ROWS, perplexity
from .perplexity import check_texts, refuse_deltas, text_rows
from .registry import Protocol

GROUP = 16384  # positions whose hidden states are held on both sides at once
PER_POSITION = ("kl_unedited_edited", "kl_edited_unedited", "total_variation", "top1_agreement")
SIDES = ("perplexity_unedited", "perplexity_edited")


def measure(
    asked: Asked,
    facts: Sequence[Fact],
    progress: Tick,
    *,
    texts: Sequence[str] = (),
    weights: EditedWeights | None = None,
) -> dict[str, Any]:
    """
    texts: what is read; may be left out where the facts have prompts about other things
    weights: what `Delta.apply` gave of this model: its originals are put in place in between, and what was there after
        it, bit for bit, also where anything fails

    metrics: the mean of each number above over the positions of all texts; perplexities as the protocol `perplexity`
        has them; `locality_kl`, the mean over the facts of their mean of kl_unedited_edited at the last position of
        their locality probes' and held-out neighbours' prompts. None where nothing has what they need.
    facts: a record a text, {"id": "text 1", ..., "token_count", its own means}, then one a fact, {"id", "locality_kl"}
    Raises `InputError` without `weights`, or anything to read, and for texts as `perplexity.text_rows`.
    """
    refuse_deltas("drift", asked)
    if weights is None or weights.model is not asked.model:
        given = "nothing" if weights is None else "another model's"
        raise InputError(f"protocol drift: {given} given as weights; expected what Delta.apply gave of this model")
    prompts = [
        [probe.prompt for probe in fact.locality] + list(others)
        for fact, others in zip(facts, held_out(facts), strict=True)
    ]
    if texts or not any(prompts):
        check_texts("drift", asked, texts)
    distinct = list(dict.fromkeys(chain(*prompts)))
    rows = [*text_rows(asked.model, texts), *_last_rows(asked.model, distinct)]
    compared = _compare(asked, weights, rows, progress)
    of_texts = compared[: len(texts)]
    at_prompts = {
        prompt: float(numbers[0, 0]) for prompt, numbers in zip(distinct, compared[len(texts) :], strict=True)
    }
    records = [_record(number, numbers) for number, numbers in enumerate(of_texts, 1)]
    whole = _means(torch.cat(of_texts)) if of_texts else dict.fromkeys(PER_POSITION)
    metrics: dict[str, float | None] = {**whole} | {name: mean(record[name] for record in records) for name in SIDES}
    kept = [mean(at_prompts[prompt] for prompt in own) for own in prompts]
    metrics["locality_kl"] = mean(kept)
    records += [{"id": fact.id, "locality_kl": value} for fact, value in zip(facts, kept, strict=True)]
    return {"metrics": metrics, "facts": records}


def _last_rows(model: Model, prompts: Sequence[str]) -> list[Row]:
    """Rows of which the last position alone is compared; no token is predicted there, so the label says nothing."""
    coded = prompt_ids(model.tokenizer, [stem(prompt) for prompt in prompts])
    for prompt, ids in zip(prompts, coded, strict=True):
        if not 0 < len(ids) <= model.max_length:
            said = f"prompt {prompt[:60]!r} has {len(ids)} tokens"
            raise InputError(f"{said}, expected 1 to {model.max_length}, which the model takes")
    return [Row(tuple(ids), labels=(0,)) for ids in coded]


@torch.no_grad()
def _compare(asked: Asked, weights: EditedWeights, rows: Sequence[Row], progress: Tick) -> list[Tensor]:
    """Of each row [labels, 6] float64: `PER_POSITION`, then -log p and -log q of the label."""
    keyed = [(question_key("drift", row.ids, row.labels), row) for row in rows]
    questions = Questions(asked.store, keyed, lambda value: torch.tensor(value, dtype=torch.float64), _listed, progress)
    names, left = list(questions.left), list(questions.left.values())
    for group in _groups(left):
        chosen = [left[i] for i in group]
        edited = _hidden(asked, chosen)
        with weights.originals_in_place():
            unedited = _hidden(asked, chosen)
        labels = torch.tensor([label for row in chosen for label in row.labels])
        parts = zip(unedited.split(HEAD_ROWS), edited.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True)
        numbers = torch.cat([_numbers(asked.model, *part) for part in parts])
        of_rows = numbers.split([len(row.labels) for row in chosen])
        questions.take({names[i]: of_row for i, of_row in zip(group, of_rows, strict=True)})
    return questions.replies()


def _listed(numbers: Tensor) -> list[list[float]]:
    listed: list[list[float]] = numbers.tolist()
    return listed


def _groups(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Numbers of the rows, the longest first, `GROUP` positions or one row at a time."""
    group: list[int] = []
    positions = 0
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        if group and positions + len(rows[i].labels) > GROUP:
            yield group
            group, positions = [], 0
        group.append(i)
        positions += len(rows[i].labels)
    if group:
        yield group


def _hidden(asked: Asked, rows: Sequence[Row]) -> Tensor:
    """Behind the final norm at the rows' label positions: [positions, d_model], rows in order."""
    model = asked.model
    budget = asked.batch_tokens or tokens_that_fit(model, forward_bytes(model))
    size = asked.batch_rows or len(rows)
    places = [range(len(row.ids) - len(row.labels), len(row.ids)) for row in rows]
    starts = range(0, len(rows), size)
    return torch.cat([final_hidden(model, rows[at : at + size], places[at : at + size], budget) for at in starts])


def _numbers(model: Model, unedited: Tensor, edited: Tensor, labels: Tensor) -> Tensor:
    """[positions, d_model] twice, [positions] -> what `_compare` gives, on the CPU."""
    p, q = _logprobs(model, unedited), _logprobs(model, edited)
    labels = labels.to(p.device)[:, None]
    columns = [
        (p.exp() * (p - q)).sum(-1),
        (q.exp() * (q - p)).sum(-1),
        (p.exp() - q.exp()).abs().sum(-1) / 2,
        (p.argmax(-1) == q.argmax(-1)).double(),
        -p.gather(1, labels)[:, 0],
        -q.gather(1, labels)[:, 0],
    ]
    return torch.stack(columns, 1).cpu()


def _logprobs(model: Model, hidden: Tensor) -> Tensor:
    """[positions, vocab] float64; the head runs in the model's dtype."""
    logits = model.head(hidden).double()
    cap = model.anatomy.softcap
    return (logits if cap is None else torch.tanh(logits / cap) * cap).log_softmax(-1)


def _means(numbers: Tensor) -> dict[str, float]:
    return dict(zip(PER_POSITION, numbers.mean(0).tolist(), strict=False))


def _record(number: int, numbers: Tensor) -> dict[str, Any]:
    nll = numbers[:, len(PER_POSITION) :].mean(0).tolist()
    record: dict[str, Any] = {"id": f"text {number}", "token_count": len(numbers), **_means(numbers)}
    return record | {name: perplexity(value) for name, value in zip(SIDES, nll, strict=True)}


METRICS = {
    "kl_unedited_edited": "KL(unedited || edited) of the next token, nats, mean over the tokens of the texts",
    "kl_edited_unedited": "KL(edited || unedited) of the next token, nats, mean over the tokens of the texts",
    "total_variation": "total variation of the two distributions of the next token, mean over the tokens of the texts",
    "top1_agreement": "share of the tokens of the texts before which both models find the same one most probable",
    "perplexity_unedited": "mean perplexity of the texts, of the unedited model",
    "perplexity_edited": "mean perplexity of the texts, of the edited model",
    "locality_kl": "KL(unedited || edited), nats, behind the prompts about other things, mean over the facts",
}

PROTOCOL = Protocol("drift", measure, METRICS, options=("texts", "weights"))
