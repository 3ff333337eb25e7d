"""What a module of a model holds at each row's position, in a full forward of the row alone: the plainest way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rewire
from rewire.engine.prompts import Row


@torch.no_grad()
def read_alone(model: rewire.Model, module: nn.Module, rows: Sequence[Row], entering: bool = False) -> Tensor:
    """[rows, d] float32: what the module gives, or with `entering` what it is given."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(args[0] if entering else output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    for row in rows:
        model.hf(input_ids=torch.tensor([row.ids], device=model.device))
    handle.remove()
    return torch.stack([hidden[0, row.position] for hidden, row in zip(found, rows, strict=True)]).float()
