"""Inside the z-layer's block: variables at the outputs of its attention and MLP projections, at one token of each row.

What attention gives at the subject's token does not depend on a variable that is added behind it, so the block is run
for that token alone, with what attention gave there put in its place: whatever the family does between its two
projections (norms, parallel or sequential) is done by the block itself.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .model import Model
from .objective import ATTENTION, BLOCK, MLP
from .passes import Call, Stop, forward, fused, hidden_of, hooks


def runs_inside(anatomy: Anatomy, site: Sequence[str]) -> bool:
    """Whether variables there need the block itself: what the MLP's projection gives mostly goes to the block's output
    as it is, and so does what is added to it."""
    return ATTENTION in site or (MLP in site and anatomy.post_norm is not None)


@dataclass(frozen=True)
class Seen:
    """What a layer's block is at each token of some rows; in the model's dtype.

    output: [rows, T, d_model], its output; read: [rows, T, d_model], what it reads
    given: part -> [rows, T, d_model], what its projection gives (of the asked parts)
    """

    output: Tensor
    read: Tensor
    given: dict[str, Tensor]


@torch.no_grad()
def see(model: Model, ids: Tensor, layer: int, parts: Sequence[str]) -> Seen:
    """Runs token ids [rows, T] up to the layer's block."""
    kept: dict[str, Tensor] = {}

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["read"] = args[0] if args else kwargs["hidden_states"]

    def give(part: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            kept[part] = output

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        kept["output"] = hidden_of(output)
        raise Stop

    block = model.block(layer)
    asked = [model.projection(layer, part).register_forward_hook(give(part)) for part in parts if part != BLOCK]
    reading, ending = block.register_forward_pre_hook(read, with_kwargs=True), block.register_forward_hook(end)
    with fused(model), hooks(reading, ending, *asked):
        forward(model, ids)
    return Seen(kept.pop("output"), kept.pop("read"), kept)


@dataclass
class Gate:
    """The hooks of one layer's projections; each thread's own rows pass, none while nothing is set."""

    site: tuple[str, ...]
    rows: threading.local = field(default_factory=threading.local)

    def pass_through(self, part: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            found: dict[str, tuple[Tensor | None, Tensor | None]] | None = getattr(self.rows, "now", None)
            if found is None or part not in found:
                return None
            instead, added = found[part]
            if instead is not None:
                output = instead.to(output.device)[:, None]
            return output if added is None else output + added.to(output.device, output.dtype)[:, None]

        return hook


@contextmanager
def gate(model: Model, layer: int, site: tuple[str, ...]) -> Iterator[Gate | None]:
    """The layer's projections take variables inside; None where the site needs none of it."""
    if not runs_inside(model.anatomy, site):
        yield None
        return
    found = Gate(site)
    parts = (MLP, ATTENTION)
    with hooks(*(model.projection(layer, p).register_forward_hook(found.pass_through(p)) for p in parts)):
        yield found


@dataclass(frozen=True)
class Entry:
    """The block of some rows' subjects as a function of what is added inside.

    read: [rows, d_model], what the block reads; attended: [rows, d_model], what attention's projection gives
    call: what the block is called with, for one token a row
    """

    model: Model
    layer: int
    gate: Gate
    read: Tensor
    attended: Tensor
    call: Call

    def only(self, kept: Tensor, call: Call) -> "Entry":
        return replace(self, read=self.read[kept], attended=self.attended[kept], call=call)

    def __call__(self, delta: Tensor, fact: Tensor) -> Tensor:
        """[rows, d_model], the block's output; delta: [n, parts * d_model], fact: [rows] int64."""
        added = dict(zip(self.gate.site, delta[fact].chunk(len(self.gate.site), 1), strict=True))
        self.gate.rows.now = {ATTENTION: (self.attended, added.get(ATTENTION)), MLP: (None, added.get(MLP))}
        try:
            args, kwargs = self.call
            return hidden_of(self.model.block(self.layer)(self.read[:, None], *args, **kwargs))[:, 0]
        finally:
            self.gate.rows.now = None
