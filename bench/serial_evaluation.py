"""Evaluation as published, written plainly: one prompt at a time, whole forwards, nothing kept between tokens.

The oracle of the tests and the baseline of `bench evaluation`. It shares nothing with the fast way but the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.model import Model


@torch.no_grad()
def published_ids(model: Model, prompt: str, limit: int = 50) -> tuple[int, ...]:
    """What is said behind one prompt: greedy, no cache, until a token that holds "." or a line break, or the end of the
    text (arXiv 2502.11177), by transformers' own `generate` and stop strings."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]], device=model.device)
    room = min(limit, model.max_length - ids.shape[1])
    said: Tensor = model.hf.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=room, use_cache=False,
        stop_strings=[".", "\n", model.tokenizer.eos_token], tokenizer=model.tokenizer,
        pad_token_id=model.tokenizer.eos_token_id,
    )  # fmt: skip
    return tuple(said[0, ids.shape[1] :].tolist())


@torch.no_grad()
def gap_at(model: Model, prompt: str, said: Sequence[int]) -> float:
    """How far the two best logits are apart behind a prompt and what was said so far: a tie goes either way."""
    ids = torch.tensor([[*model.tokenizer(prompt)["input_ids"], *said]], device=model.device)
    top = model.hf(input_ids=ids, use_cache=False).logits[0, -1].float().topk(2).values
    return float(top[0] - top[1])


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two answers part; None where they are the same."""
    if tuple(a) == tuple(b):
        return None
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def plain_logprobs(model: Model, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Of each (prompt, object) (mean log-probability of the object's tokens, whether each is the most probable), in
    one padded forward with its mask and all logits: batched as anybody would."""
    tokenizer: Any = model.tokenizer
    coded = [tokenizer(f"{prompt.rstrip()} {target}")["input_ids"] for prompt, target in pairs]
    starts = [len(tokenizer(prompt.rstrip())["input_ids"]) for prompt, _ in pairs]
    longest = max(map(len, coded))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in coded], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in coded], device=model.device)
    logp = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    found = []
    for row, (tokens, start) in enumerate(zip(coded, starts, strict=True)):
        places = range(start, len(tokens))
        values = [float(logp[row, at - 1, tokens[at]]) for at in places]
        best = all(int(logp[row, at - 1].argmax()) == tokens[at] for at in places)
        found.append((sum(values) / len(values), best))
    return found
