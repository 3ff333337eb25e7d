"""Second moments as published, written plainly: a pass for each module over padded batches, dense float32 products.

The baseline of `rewire bench stats`, and an oracle. It shares nothing with the fast way but the model and the token
rows.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.model import Model

GROUP = 100  # documents that are sorted by length together
ROOM = 3  # padded tokens of a batch, at most, in longest rows


class _Stop(Exception):
    pass


def published_batches(rows: Sequence[np.ndarray], max_length: int) -> Iterator[list[np.ndarray]]:
    """Rows cut to `max_length` tokens, longest first within groups of 100, at most 3 max_length padded tokens each."""
    for start in range(0, len(rows), GROUP):
        batch: list[np.ndarray] = []
        cut = [row[:max_length] for row in rows[start : start + GROUP]]
        for row in sorted(cut, key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > ROOM * max_length:
                yield batch
                batch = []
            batch.append(row)
        yield batch


@torch.no_grad()
def published_moments(
    model: Model, rows: Sequence[np.ndarray], modules: Mapping[str, int], max_length: int
) -> dict[str, Tensor]:
    """Name -> sum of k kᵀ over all tokens, [d_in, d_in] float32 on the model's device. No row may be empty.

    modules: paths of linear maps -> d_in; each pass stops behind its one
    """
    sums = {}
    for name, width in modules.items():
        total = torch.zeros(width, width, device=model.device)
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any, kept: list[Tensor] = kept) -> None:
            kept.append(args[0])
            raise _Stop

        handle = model.hf.get_submodule(name).register_forward_hook(keep)
        try:
            for batch in published_batches(rows, max_length):
                ids, mask, positions = _padded(batch, model.device)
                with contextlib.suppress(_Stop):
                    model.hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
                keys = kept.pop()[mask.bool()].float()
                total += keys.T @ keys
        finally:
            handle.remove()
        sums[name] = total
    return sums


def _padded(batch: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids padded on the right with 0, mask and positions, [rows, T] each."""
    longest = max(map(len, batch))
    ids, mask, positions = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(3))
    for line, row in enumerate(batch):
        ids[line, : len(row)] = torch.as_tensor(row)
        mask[line, : len(row)] = 1
        positions[line, : len(row)] = torch.arange(len(row))
    return ids.to(device), mask.to(device), positions.to(device)
