"""Keys K and hidden states H: what the edited projections read, and what the z-layer gives, at each subject."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .model import Model
from .passes import read_at
from .prompts import Row


def key_weights(generated: int) -> Tensor:
    """MEMIT's weights of a fact's rows: half for the plain prompt, half shared by the generated contexts."""
    if generated == 0:
        return torch.ones(1)
    return torch.tensor([0.5] + [0.5 / generated] * generated)


def measure_keys(model: Model, rows: Sequence[Sequence[Row]], layer: int) -> Tensor:
    """K: [n, d_in] float32, one key a fact at `layer`, of its plain row and its context rows, weights as they are."""
    flat = [row for group in rows for row in group]
    fact = torch.tensor([number for number, group in enumerate(rows) for _ in group])
    share = torch.cat([key_weights(len(group) - 1) for group in rows])
    return read_at(model, flat, inputs=[layer], group=fact, weight=share)["in", layer]


def measure_hidden(model: Model, plain: Sequence[Row], layer: int) -> Tensor:
    """H: [n, d_model] float32, the output of block `layer` on the plain prompt, weights as they are."""
    return read_at(model, plain, outputs=[layer])["out", layer]
