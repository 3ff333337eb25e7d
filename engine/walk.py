"""Blocks run one after the other, over rows of tokens that stand in between: from the embeddings to a block, on from
there, and with a block's MLP output projection put off until its weight is settled.

What the model calls a block with beside the hidden states (masks, rotary angles, positions) is recorded once, from one
row: rows begin at column 0, so it serves any number of rows, and cut to their length also shorter ones. They are padded
on the right: under causal attention no real token sees the padding.

A model may be placed on several devices: what a block gives is on the block's own, and accelerate's hooks bring there
what the next one is called with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..kernels.errors import InputError
from .model import Model
from .objective import ATTENTION
from .passes import Call, Stop, blocks_until, forward, frozen, hidden_of, hooks, run_until
from .suffix import unknown_family

TRIAL = (2, 8)  # rows and tokens that `verify_walk` runs

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Parted:
    """A block's output but for what its projection gives: the rest needs nothing but the weight.

    base: [..., d_model], the block's output without the projection's share
    read: [..., d_in], what the projection reads
    attended: [..., d_in of attention's projection], what that reads, where it was asked for
    """

    layer: int
    base: Tensor
    read: Tensor
    attended: Tensor | None = None

    def at(self, position: Tensor) -> "Parted":
        """One token of each row; position: [rows] int64, on any device. base and read become [rows, d]."""
        position = position.to(self.base.device)
        rows = torch.arange(len(position), device=position.device)
        attended = self.attended
        there = None if attended is None else attended[rows.to(attended.device), position.to(attended.device)]
        return Parted(self.layer, self.base[rows, position], self.read[rows, position], there)

    def attention(self, model: Model) -> Tensor:
        """[..., d_model], what attention's projection gives, with its weight as it is."""
        found: Tensor = model.projection(self.layer, ATTENTION)(self.attended)
        return found

    def given(self, model: Model) -> Tensor:
        """[..., d_model], what the projection gives, with the weight as it is."""
        found: Tensor = model.projection(self.layer)(self.read)
        return found

    def join(self, model: Model) -> Tensor:
        """[..., d_model], the block's output, with the weight as it is."""
        norm, given = model.post_norm(self.layer), self.given(model)
        return self.base + (given if norm is None else norm(given))


def embed(model: Model, ids: Tensor) -> Tensor:
    """[rows, T, d_model], what block 0 reads for token ids [rows, T]."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise Stop

    with hooks(model.block(0).register_forward_pre_hook(keep, with_kwargs=True)):
        forward(model, ids)
    return seen[0]


def calls_until(model: Model, layer: int, length: int) -> list[Call]:
    """What the model calls each block up to and with `layer` with, for rows of `length` tokens."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    blocks = [model.block(i) for i in range(layer + 1)]
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    with hooks(*(block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks)):
        run_until(model, ids, blocks[-1])  # its hook stands behind the recording one
    return calls


def cut_calls(value: _Value, longer: int, length: int) -> _Value:
    """Recorded calls, or a part of one, for rows of `length` tokens, from those of `longer` ones."""
    found: Any = value
    if isinstance(value, (tuple, list)):
        found = type(value)(cut_calls(inner, longer, length) for inner in value)
    elif isinstance(value, dict):
        found = {key: cut_calls(inner, longer, length) for key, inner in value.items()}
    elif isinstance(value, Tensor) and length < longer:
        if value.ndim == 4 and value.shape[2:] == (longer, longer):  # a mask
            found = value[:, :, :length, :length]
        elif value.shape[:2] == (1, longer):
            found = value[:, :length]
        elif value.shape == (longer,):
            found = value[:length]
        else:
            raise InputError(f"blocks take a tensor of shape {tuple(value.shape)}: this family cannot be edited yet")
    return cast(_Value, found)


def run_blocks(model: Model, hidden: Tensor, calls: Sequence[Call], first: int, last: int) -> Tensor:
    """[rows, T, d_model], what block `last` reads where block `first` reads `hidden`; calls: of `calls_until`."""
    for layer in range(first, last):
        args, kwargs = calls[layer]
        hidden = hidden_of(model.block(layer)(hidden, *args, **kwargs))
    return hidden


def part(model: Model, hidden: Tensor, calls: Sequence[Call], layer: int, attention: bool = False) -> Parted:
    """Block `layer` reads `hidden` [rows, T, d_model]: all of it is run but the projection.

    attention: also what attention's projection reads is kept
    """
    read: list[Tensor] = []
    attended: list[Tensor] = []

    def skip(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        read.append(args[0])
        return (args[0][:1, :1],)  # one token: what it gives is put aside below

    def nothing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.new_zeros(*hidden.shape[:2], output.shape[-1])

    projection = model.projection(layer)
    giver = model.post_norm(layer) or projection
    more = []
    if attention:
        keep = lambda module, args: attended.append(args[0])  # noqa: E731
        more = [model.projection(layer, ATTENTION).register_forward_pre_hook(keep)]
    with hooks(projection.register_forward_pre_hook(skip), giver.register_forward_hook(nothing), *more):
        base = run_blocks(model, hidden, calls, layer, layer + 1)
    return Parted(layer, base, read[0], *attended)


@torch.no_grad()
def verify_walk(model: Model, layers: Sequence[int]) -> None:
    """Runs two short rows block by block, each of `layers` in two parts: raises `InputError` where that is not what the
    model's own forward gives."""
    kind = model.anatomy.model_type
    rows, length = TRIAL
    ids = torch.arange(1, rows * length + 1, device=model.device).view(rows, length) % model.anatomy.vocab
    own = blocks_until(model, ids, layers[-1])
    with frozen(model), unknown_family(model):
        calls = cut_calls(calls_until(model, layers[-1], length + 1), length + 1, length)
        hidden, at = embed(model, ids), 0
        for layer in layers:
            hidden = part(model, run_blocks(model, hidden, calls, at, layer), calls, layer).join(model)
            at = layer + 1
    tolerance = (1e-3 if own.dtype.itemsize > 2 else 5e-2) * float(own.abs().max())
    if not torch.allclose(hidden.float(), own.float(), atol=tolerance, rtol=0):
        raise InputError(
            f"{kind}: its blocks run one by one give something else than the model: it cannot be edited yet"
        )
