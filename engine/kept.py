"""What attention keeps of the tokens that were read: keys and values of rows that are continued together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 16  # columns that are added together


class _Layer(DynamicLayer):
    """One layer's keys and values [rows, heads, columns, width], with room behind them: a step copies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, stop = self.columns, self.columns + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (with_room(t[:, :, :0], stop) for t in (key_states, value_states))
        elif stop > self.keys.shape[2]:
            self.keys, self.values = (with_room(t[:, :, :start], stop + ROOM) for t in (self.keys, self.values))
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states
        self.columns = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.columns

    def hold(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """These tensors, of which the first columns are filled."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.columns = keys, values, columns


def with_room(held: Tensor, columns: int) -> Tensor:
    made = held.new_zeros(*held.shape[:2], columns, held.shape[3])
    made[:, :, : held.shape[2]] = held
    return made


class Kept(Cache):
    """What attention keeps of the tokens that were read, layer by layer."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @property
    def columns(self) -> int:
        return self.layers[0].columns if self.layers else 0

    def each(self, change: Callable[[Tensor], Tensor], columns: int) -> "Kept":
        """With every layer's buffers changed; columns: how many are filled then."""
        made = Kept()
        for layer in self.layers:
            made.layers.append(_Layer())
            made.layers[-1].hold(change(layer.keys), change(layer.values), columns)
        return made


def joined(parts: Sequence[Kept], columns: int) -> Kept:
    """One below the other, all ending in column `columns`, with room for a few steps behind it."""
    made = Kept()
    for layers in zip(*(part.layers for part in parts), strict=True):
        made.layers.append(_Layer())
        sides = [
            torch.cat([_ending_at(getattr(layer, side), layer.columns, columns) for layer in layers])
            for side in ("keys", "values")
        ]
        made.layers[-1].hold(*sides, columns)
    return made


def _ending_at(held: Tensor, filled: int, columns: int) -> Tensor:
    return nn.functional.pad(held[:, :, :filled], (0, 0, columns - filled, ROOM))


def taken(held: Tensor, place: Tensor) -> Tensor:
    """[rows, heads, columns, width]: of each row the columns at these places [rows, columns]."""
    index = place.to(held.device)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    return nn.functional.pad(held.gather(2, index), (0, 0, 0, ROOM))
