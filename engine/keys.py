"""Keys K and hidden states H: what the edited projections read, and what the z-layer gives, at each subject.

K and H of a layer are those of a model whose lower edited layers are updated already and whose own is not. The layers
are walked upwards once: between two of them each row stands where the lower one's projection adds to its block's
output; once that weight is written only the projection is run again, and the blocks up to the next one's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.gather_mean import gather_mean_
from ..stats.collect import batches
from ..stats.memory import free_bytes
from .model import Model
from .passes import forward_bytes, fused, tokens_that_fit
from .prompts import Row, pad
from .suffix import Call
from .walk import Parted, calls_until, cut_calls, embed, part, run_blocks

KEPT_SHARE = 0.3  # of the free memory that rows may take between two layers
CPU_KEPT = 2**30  # bytes; and on a CPU no more than that
CPU_ENOUGH = 256  # tokens that keep it busy
GPU_ENOUGH = 8192
MOST_PADDED = 0.9  # of a batch's width: shorter rows begin a new batch once it has enough tokens


def key_weights(generated: int) -> Tensor:
    """MEMIT's weights of a fact's rows: half for the plain prompt, half shared by the generated contexts."""
    if generated == 0:
        return torch.ones(1)
    return torch.tensor([0.5] + [0.5 / generated] * generated)


@dataclass(frozen=True)
class Measured:
    """What the solve of one layer starts from, float32, on the model's device.

    K: [n, d_in], one key a fact: of its plain row and its context rows, weighted
    H: [n, d_model], the z-layer's output at the subject of the plain row
    given: [n, d_model], what the projection gives there, in families that have a norm behind it; else None
    """

    K: Tensor
    H: Tensor
    given: Tensor | None


@dataclass
class _Batch:
    """Rows that are run together, plain ones or context rows, and where they stand.

    ids: [rows, T] on the CPU; position, fact: [rows] int64; weight: [rows] float32, all on the model's device
    keeps: what stays between two layers: the lower one's block in two parts, what that block reads, or nothing
    stands: that, while it is there; what a block reads comes with its layer
    """

    ids: Tensor
    position: Tensor
    fact: Tensor
    weight: Tensor
    plain: bool
    keeps: Literal["parted", "input", "nothing"] = "nothing"
    stands: Parted | tuple[int, Tensor] | None = None


class KeyWalk:
    """K and H of each edited layer, ascending; its weight is written before the next is asked for.

    rows: for each fact its plain row and its context rows, cut behind the subject
    layers: the edited ones, ascending; the last is the z-layer
    batch_tokens: padded tokens of a forward; None: from the free memory
    room: bytes that may be kept between two layers; None: from the free memory. A row that finds no room is run again
        from the block's input, or from the embeddings: slower, the same keys.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[Sequence[Row]],
        layers: Sequence[int],
        batch_tokens: int | None = None,
        room: int | None = None,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.facts = len(rows)
        self.done = 0  # rows, over all layers
        self.total = len(self.layers) * sum(map(len, rows))
        budget = batch_tokens or tokens_that_fit(model, forward_bytes(model))
        self._batches = [batch for plain in (True, False) for batch in _batches(model, rows, budget, plain)]
        self._give_room(kept_bytes(model.device, free_bytes(model.device)) if room is None else room)
        self._longest = max(batch.ids.shape[1] for batch in self._batches)
        self._calls: list[Call] = []  # for the longest rows; recorded with the first batch
        self._at_subject: list[tuple[Tensor, Parted]] = []  # (facts, the z-layer's two parts), of plain rows

    def _give_room(self, room: int) -> None:
        """First for what a block reads, of all rows, then for two parts: there a byte saves more work."""
        anatomy = self.model.anatomy
        item = next(self.model.hf.parameters()).element_size()
        before, parted = item * anatomy.d_model, item * (anatomy.d_model + anatomy.d_in)
        rest = before * sum(batch.ids.numel() for batch in self._batches)
        for batch in self._batches:
            tokens = batch.ids.numel()
            rest -= before * tokens
            if parted * tokens + rest <= room:
                batch.keeps = "parted"
                room -= parted * tokens
            elif before * tokens <= room:
                batch.keeps = "input"
                room -= before * tokens

    @torch.no_grad()
    def measure(self, layer: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Measured:
        """K and H with the weights as they are; progress: rows, over all layers."""
        model, z_layer = self.model, self.layers[-1]
        anatomy, device = model.anatomy, model.device
        K = torch.zeros(self.facts, anatomy.d_in, device=device)
        H = torch.zeros(self.facts, anatomy.d_model, device=device)
        given = None if anatomy.post_norm is None else torch.zeros_like(H)
        with fused(model):
            for batch in self._batches:
                calls = self._calls_of(batch)
                hidden = self._input_of(batch, layer, calls)
                parted = part(model, hidden, calls, layer)
                gather_mean_(K, parted.read, batch.position, batch.fact, batch.weight)
                if layer != z_layer and batch.keeps != "nothing":
                    batch.stands = parted if batch.keeps == "parted" else (layer, hidden)
                if batch.plain:
                    self._plain(batch, parted, calls, H, given)
                self.done += len(batch.ids)
                progress(self.done, self.total)
        return Measured(K, H, given)

    @torch.no_grad()
    def hidden(self) -> Tensor:
        """H, [n, d_model] float32, with all weights as they are: after the z-layer was measured."""
        H = torch.zeros(self.facts, self.model.anatomy.d_model, device=self.model.device)
        with fused(self.model):
            for fact, parted in self._at_subject:
                H[fact] = parted.join(self.model).float()
        return H

    def _calls_of(self, batch: _Batch) -> list[Call]:
        if not self._calls:
            self._calls = calls_until(self.model, self.layers[-1], self._longest)
        return cut_calls(self._calls, self._longest, batch.ids.shape[1])

    def _input_of(self, batch: _Batch, layer: int, calls: list[Call]) -> Tensor:
        """[rows, T, d_model], what block `layer` reads; what the batch kept is given up."""
        stands, batch.stands = batch.stands, None
        if isinstance(stands, Parted):
            first, hidden = stands.layer + 1, stands.join(self.model)
        else:
            first, hidden = stands or (0, embed(self.model, batch.ids.to(self.model.device)))
        del stands  # its memory is the blocks'
        return run_blocks(self.model, hidden, calls, first, layer)

    def _plain(self, batch: _Batch, parted: Parted, calls: list[Call], H: Tensor, given: Tensor | None) -> None:
        """Plain rows go on to the z-layer, with this layer's weight as it was."""
        layer, z_layer = parted.layer, self.layers[-1]
        subject = parted.at(batch.position)
        if given is not None:
            given[batch.fact] = subject.given(self.model).float()
        if layer == z_layer:
            self._at_subject.append((batch.fact, subject))
        else:
            hidden = run_blocks(self.model, parted.join(self.model), calls, layer + 1, z_layer)
            subject = part(self.model, hidden, calls, z_layer).at(batch.position)
        H[batch.fact] = subject.join(self.model).float()


def _batches(model: Model, rows: Sequence[Sequence[Row]], tokens: int, plain: bool) -> list[_Batch]:
    """Batches of all plain rows, or of all context rows, longest first."""
    chosen = [(row, fact) for fact, group in enumerate(rows) for row in (group[:1] if plain else group[1:])]
    shares = [key_weights(len(group) - 1) for group in rows]
    weight = torch.cat([share[:1] if plain else share[1:] for share in shares])
    fact = torch.tensor([fact for _, fact in chosen], dtype=torch.long)
    position = torch.tensor([row.position for row, _ in chosen], dtype=torch.long)
    found = []
    enough = GPU_ENOUGH if model.device.type == "cuda" else CPU_ENOUGH
    for batch in _even([len(row.ids) for row, _ in chosen], tokens, enough):
        ids = pad([chosen[i][0] for i in batch], "cpu")
        at, of, share = (side[batch].to(model.device) for side in (position, fact, weight))
        found.append(_Batch(ids, at, of, share, plain))
    return found


def _even(lengths: Sequence[int], tokens: int, enough: int) -> list[list[int]]:
    """Indices in batches of at most `tokens` padded tokens; one of `enough` takes no row that it would pad much."""
    result: list[list[int]] = []
    for batch in batches(lengths, tokens):
        start = 0
        for end, index in enumerate(batch):
            width = lengths[batch[start]]
            if (end - start) * width >= enough and lengths[index] < MOST_PADDED * width:
                result.append(batch[start:end])
                start = end
        result.append(batch[start:])
    return result


def kept_bytes(device: torch.device, free: int) -> int:
    """What rows may take between two layers, of so many free bytes."""
    kept = int(KEPT_SHARE * free)
    return min(kept, CPU_KEPT) if device.type == "cpu" else kept
