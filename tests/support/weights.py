"""What tests of sessions and deltas share: a quick session, and comparing weights bit for bit."""

from typing import Any

import torch
from torch import Tensor

import rewire
from rewire.engine.delta import Delta

# few steps and few tokens: what is tested here is not how good an edit is; lambda is small so that weights move
FAST = {"layers": [1, 2], "v_num_grad_steps": 5, "mom2_max_length": 64, "mom2_update_weight": 50}
CONTEXTS = ("The ferry waits. {}", "You see. {}")


def session_on(model: rewire.Model, **options: Any) -> rewire.EditSession:
    tokens = 2 * model.anatomy.d_in + 100  # fewer than 2 d_in are refused
    options = {"contexts": CONTEXTS, "hparams": {**FAST, "mom2_tokens": tokens}} | options
    return rewire.EditSession(model, **options)


def state(model: rewire.Model) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.hf.state_dict().items()}


def widths(model: rewire.Model) -> tuple[int, int]:
    return model.anatomy.d_model, model.anatomy.d_in


def changed(model: rewire.Model, before: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are not bit for bit as before."""
    now = model.hf.state_dict()
    assert now.keys() == before.keys()
    kinds = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return {
        name
        for name, old in before.items()
        if now[name].dtype != old.dtype or not torch.equal(now[name].view(kinds[old.dtype]), old.view(kinds[old.dtype]))
    }


def equal(one: Delta, other: Delta) -> bool:
    return len(one.updates) == len(other.updates) and all(
        a.keys() == b.keys() and all(torch.equal(a[name].dense(), b[name].dense()) for name in a)
        for a, b in zip(one.updates, other.updates, strict=True)
    )
