"""Keys K and hidden states H: what the edited projections read, and what the z-layer gives, at each subject.

K and H of a layer are those of a model whose lower edited layers are updated already and whose own is not. The layers
are walked upwards once: between two of them each row stands where the lower one's projection adds to its block's
output; once that weight is written only the projection is run again, and the blocks up to the next one's.

Where the memory does not suffice, the rows that found none are halved, and so is what may be kept between two layers.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..kernels.gather_mean import gather_mean_
from ..stats.collect import batches
from ..stats.memory import free_bytes
from .anatomy import widths
from .model import Model
from .objective import ATTENTION, BLOCK, MLP
from .passes import Call, forward_bytes, fused, out_of_memory, tokens_that_fit
from .prompts import Row, pad
from .walk import Parted, calls_until, cut_calls, embed, part, run_blocks

log = logging.getLogger("rewire")

_Made = TypeVar("_Made")

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


def flat_weights(generated: int) -> Tensor:
    """ROME's weights of a fact's rows: all alike."""
    return torch.full((1 + generated,), 1 / (1 + generated))


@dataclass(frozen=True)
class Measured:
    """What the solve of one layer starts from, float32.

    K: [n, d_in], one key a fact: of its plain row and its context rows, weighted; on the layer's device
    H: [n, parts of the site * d_model], what is there in the z-layer at the subject of the plain row: of BLOCK its
        output, else what the projection gives; on the z-layer's device
    given: [n, d_model], what the projection gives there, where BLOCK is asked for in families that have a norm behind
        it; else None; as K
    attention: as K, what attention's projection reads, where the site has it
    """

    K: Tensor
    H: Tensor
    given: Tensor | None
    attention: Tensor | None = None


@dataclass(eq=False)
class _Batch:
    """Rows that are run together, plain ones or context rows, and where they stand.

    ids: [rows, T] on the CPU; position, fact: [rows] int64; weight: [rows] float32, all on the device of token ids
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

    def halves(self) -> list["_Batch"]:
        """The longer and the shorter rows, with nothing kept."""
        middle, end = len(self.ids) // 2, len(self.ids)
        return [self._some(rows) for rows in (slice(0, middle), slice(middle, end))]

    def _some(self, rows: slice) -> "_Batch":
        position = self.position[rows]
        ids = self.ids[rows, : int(position.max()) + 1]  # nothing behind it is read
        return _Batch(ids, position, self.fact[rows], self.weight[rows], self.plain)


class KeyWalk:
    """K and H of each edited layer, ascending; its weight is written before the next is asked for.

    rows: for each fact its plain row and its context rows, cut behind the subject
    layers: the edited ones, ascending; the last is the z-layer
    batch_tokens: padded tokens of a forward; None: from the free memory
    room: bytes that may be kept between two layers; None: from the free memory. A row that finds no room is run again
        from the block's input, or from the embeddings: slower, the same keys.
    site: what H is of, and with ATTENTION in it also keys of that projection, whose weights are written too
    weigh: generated contexts of a fact -> weights of its rows in its key
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[Sequence[Row]],
        layers: Sequence[int],
        batch_tokens: int | None = None,
        room: int | None = None,
        *,
        site: tuple[str, ...] = (BLOCK,),
        weigh: Callable[[int], Tensor] = key_weights,
    ) -> None:
        self.model = model
        self.site = site
        self.layers = list(layers)
        self.facts = len(rows)
        self.done = 0  # rows, over all layers
        self.total = len(self.layers) * sum(map(len, rows))
        self._tokens = batch_tokens or tokens_that_fit(model, forward_bytes(model))
        both = (_batches(model, rows, weigh, self._tokens, plain) for plain in (True, False))
        self._batches = [batch for batches in both for batch in batches]
        places = {self._place(layer) for layer in self.layers}
        self._room = min(kept_bytes(place, free_bytes(place)) for place in places) if room is None else room
        self._give_room()
        self._said = False  # that there is too little memory
        self._longest = max(batch.ids.shape[1] for batch in self._batches)
        self._calls: list[Call] = []  # for the longest rows; recorded with the first batch
        self._at_subject: list[tuple[Tensor, Parted]] = []  # (facts, the z-layer's two parts), of plain rows

    def _place(self, layer: int) -> torch.device:
        weight = self.model.projection(layer).weight
        assert isinstance(weight, Tensor)
        return weight.device

    def _give_room(self) -> None:
        """First for what a block reads, of all rows, then for two parts: there a byte saves more work.

        What stands where there is no room for it any more is given up.
        """
        room = self._room
        anatomy = self.model.anatomy
        item = next(self.model.hf.parameters()).element_size()
        before, parted = item * anatomy.d_model, item * (anatomy.d_model + anatomy.d_in)
        rest = before * sum(batch.ids.numel() for batch in self._batches)
        for batch in self._batches:
            tokens = batch.ids.numel()
            rest -= before * tokens
            batch.keeps = "nothing"
            if parted * tokens + rest <= room and ATTENTION not in self.site:  # attention's part of it is to change
                batch.keeps = "parted"
                room -= parted * tokens
            elif before * tokens <= room:
                batch.keeps = "input"
                room -= before * tokens
            if batch.keeps == "nothing" or (batch.keeps == "input" and isinstance(batch.stands, Parted)):
                batch.stands = None

    @torch.no_grad()
    def measure(self, layer: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Measured:
        """K and H with the weights as they are; progress: rows, over all layers.

        Raises `InputError` where the memory does not hold a single row.
        """
        while (found := _that_fits(lambda: self._nothing_yet(layer))) is None:
            self._less(None)
        at = 0
        with fused(self.model):
            while at < len(self._batches):
                batch = self._batches[at]
                if batch.stands is None and len(batch.ids) > 1 and batch.ids.numel() > self._tokens:
                    self._batches[at : at + 1] = batch.halves()  # by the batches before, too large
                elif _that_fits(lambda: self._run(batch, layer, found)):  # noqa: B023
                    at += 1
                    self.done += len(batch.ids)
                    progress(self.done, self.total)
                else:
                    self._less(batch)
        return found

    def _nothing_yet(self, layer: int) -> Measured:
        anatomy, here = self.model.anatomy, self._place(layer)
        behind = anatomy.post_norm is not None and BLOCK in self.site
        return Measured(
            torch.zeros(self.facts, anatomy.d_in, device=here),
            self._no_hidden(),
            torch.zeros(self.facts, anatomy.d_model, device=here) if behind else None,
            torch.zeros(self.facts, widths(self.model.projection(layer, ATTENTION))[0], device=here)
            if ATTENTION in self.site
            else None,
        )

    def _no_hidden(self) -> Tensor:
        width = len(self.site) * self.model.anatomy.d_model
        return torch.zeros(self.facts, width, device=self._place(self.layers[-1]))

    def _run(self, batch: _Batch, layer: int, found: Measured) -> bool:
        """Adds a batch to what was found. Where it ends for want of memory, nothing is added to K: H and `given` are
        only set, so that it may be run again."""
        calls = self._calls_of(batch)
        hidden = self._input_of(batch, layer, calls)
        parted = part(self.model, hidden, calls, layer, ATTENTION in self.site)
        subject = self._plain(batch, parted, calls, found) if batch.plain else None
        here = parted.read.device
        position, fact, weight = (side.to(here) for side in (batch.position, batch.fact, batch.weight))
        adds = [(found.K, parted.read)]
        if found.attention is not None and parted.attended is not None:
            adds.append((found.attention, parted.attended.to(here)))
        for K, read in adds:  # behind all that wants memory
            gather_mean_(K, read, position, fact, weight)
        if layer == self.layers[-1] and ATTENTION not in self.site:
            if subject is not None:
                self._at_subject.append((batch.fact.to(found.H.device), subject))
        elif batch.keeps != "nothing":
            batch.stands = parted if batch.keeps == "parted" else (layer, hidden)
        return True

    def _less(self, batch: _Batch | None) -> None:
        """Half the memory, after a batch found too little (None: what comes before the batches).

        Raises `InputError` where there is nothing to halve.
        """
        halves = [] if batch is None or len(batch.ids) == 1 else batch.halves()
        if not halves and all(one.stands is None for one in self._batches):
            raise InputError(
                f"out of memory while the keys of {self.facts} facts are read, a single token row at once; expected "
                "room for it: try fewer facts, --dtype bfloat16, shorter context templates (--contexts), or a device "
                "with more memory"
            )
        said = log.info if self._said else log.warning
        said("out of memory while keys are read: going on with half as many rows at once, and less kept of them")
        self._said = True
        if batch is not None and halves:
            self._tokens, self._room = max(half.ids.numel() for half in halves), self._room // 2
            at = self._batches.index(batch)
            self._batches[at : at + 1] = halves
        else:
            self._room = 0
        self._give_room()

    @torch.no_grad()
    def hidden(self) -> Tensor:
        """H, as of `measure`, float32, with all weights as they are: after the z-layer was measured."""
        H, z_layer = self._no_hidden(), self.layers[-1]
        with fused(self.model):
            if ATTENTION in self.site:  # what stands beside the MLP has changed as well
                for batch in self._batches:
                    if batch.plain:
                        calls = self._calls_of(batch)
                        hidden = self._input_of(batch, z_layer, calls)
                        parted = part(self.model, hidden, calls, z_layer, attention=True).at(batch.position)
                        H[batch.fact.to(H.device)] = self._there(parted)
            for fact, parted in self._at_subject:
                H[fact] = self._there(parted)
        return H

    def _there(self, subject: Parted) -> Tensor:
        """[rows, parts * d_model] float32, of the z-layer's two parts at the subject."""
        found = [
            subject.join(self.model)
            if what == BLOCK
            else subject.given(self.model)
            if what == MLP
            else subject.attention(self.model)
            for what in self.site
        ]
        return torch.cat([each.float() for each in found], 1)

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

    def _plain(self, batch: _Batch, parted: Parted, calls: list[Call], found: Measured) -> Parted:
        """Plain rows go on to the z-layer, with this layer's weight as it was: its two parts, at the subject."""
        layer, z_layer = parted.layer, self.layers[-1]
        subject = parted.at(batch.position)
        if found.given is not None:
            found.given[batch.fact.to(found.given.device)] = subject.given(self.model).float()
        if layer != z_layer:
            hidden = run_blocks(self.model, parted.join(self.model), calls, layer + 1, z_layer)
            subject = part(self.model, hidden, calls, z_layer, ATTENTION in self.site).at(batch.position)
        found.H[batch.fact.to(found.H.device)] = self._there(subject).to(found.H.device)
        return subject


def _that_fits(make: Callable[[], _Made]) -> _Made | None:
    """What it gives, or None where there was too little memory."""
    try:
        return make()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # here, as the error held what was on the device
    return None


def _batches(
    model: Model, rows: Sequence[Sequence[Row]], weigh: Callable[[int], Tensor], tokens: int, plain: bool
) -> list[_Batch]:
    """Batches of all plain rows, or of all context rows, longest first."""
    chosen = [(row, fact) for fact, group in enumerate(rows) for row in (group[:1] if plain else group[1:])]
    shares = [weigh(len(group) - 1) for group in rows]
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
