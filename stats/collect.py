"""Second moments of many layers in one pass over a corpus. Knows no model: it is handed a function that runs one.

The documents of a corpus come in an order. A block is so many consecutive ones; blocks are dealt to the ranks in turn.
A block is always computed in the same way, whoever does it and whenever, and sums of blocks are float64: so the result
does not depend on the number of ranks, nor on how often the work was interrupted.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..kernels.errors import InputError
from .checkpoint import Checkpoint, Position
from .moments import Moment, SecondMoment, choose_place, to_triangle
from .ranks import ALONE, Ranks
from .tokens import TokenRows, ahead
from .tolerance import GROWTH, HELD_DOCUMENTS, HELD_KEYS, Settling

log = logging.getLogger(__name__)

Rows = list[np.ndarray]  # token ids of one document each, int32
Sink = Callable[[str, Tensor], None]
Run = Callable[[Rows, Sink], None]
Progress = Callable[[int, int], None]

BLOCK = 32768  # tokens of a block, about
LOOK = 24  # looks at a tolerance come at multiples of so many blocks: 1, 2, 3, 4, 6, 8 and 12 processes look alike
PROBE = 64  # documents whose lengths say how many make a block
CHECKPOINT_SECONDS = 60.0  # between two checkpoints, about, where no number of tokens is asked for


@dataclass(frozen=True)
class Budget:
    """Documents are taken in the order until there are `documents` of them or they hold `tokens` tokens, whichever is
    first, the last one whole; or until C has settled to `tolerance`, or the corpus is over. None: no such bound.

    max_length: tokens that are kept of a document's start, special tokens counted; None keeps all
    """

    max_length: int | None
    documents: int | None = None
    tokens: int | None = None
    tolerance: float | None = None

    def check(self, widths: Mapping[str, int]) -> None:
        """Raises `InputError` for what cannot give a C."""
        widest = max(widths, key=lambda layer: widths[layer])
        least = 2 * widths[widest]
        for what, asked in (("documents", self.documents), ("tokens a document", self.max_length)):
            if asked is not None and asked < 1:
                raise InputError(f"a budget of {asked} {what}; expected at least 1")
        if self.tokens is not None and self.tokens < least:
            raise InputError(
                f"a budget of {self.tokens} tokens; layer {widest} of width {least // 2} needs at least {least}"
            )
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise InputError(f"a tolerance of {self.tolerance}; expected a number between 0 and 1, such as 0.01")


@dataclass(frozen=True)
class Means:
    """How the work is done: nothing of it changes the result by more than rounding.

    batch_tokens: tokens of a forward at most, padding counted (a longer document goes alone)
    packed: a forward takes documents one after another; else in rows, padded on the right
    place: of the float64 sums: "device", "cpu" or "disk"; None: the first that they fit into
    checkpoint_tokens: between two checkpoints; None: about a minute's worth
    device: where keys are, for a rank that never gets any
    """

    batch_tokens: int = 8192
    packed: bool = True
    place: str | None = None
    checkpoint_tokens: int | None = None
    device: str = "cpu"


def default_tokens(widths: Mapping[str, int]) -> int:
    """The budget where none is asked for: 20 tokens a column of the widest layer."""
    return 20 * max(widths.values())


def collect(
    run: Run,
    rows: TokenRows,
    widths: Mapping[str, int],
    budget: Budget,
    means: Means = Means(),
    *,
    ranks: Ranks = ALONE,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Moment]:
    """The second moments of all layers in `widths` (name -> d_in), over the same tokens, on the CPU.

    run: runs the model on a batch of documents (longest first) and calls sink(layer, X) with the keys X [tokens of the
        batch, d_in] of each layer, padding dropped; layers that are not in `widths` are ignored
    rows: the token rows of the documents, in their order
    ranks: the processes that share the work; the first one has the result, the others' is empty
    checkpoint: a folder of this very request: what is found there is continued, from where it stood
    progress: called on the first rank after each batch with (tokens done, tokens in all: an estimate at times)

    Raises `InputError` for NaN or Inf among the keys, and for fewer than 2 d_in tokens of the widest layer.
    """
    return dict(collect_each(run, rows, widths, budget, means, ranks=ranks, checkpoint=checkpoint, progress=progress))


def collect_each(
    run: Run,
    rows: TokenRows,
    widths: Mapping[str, int],
    budget: Budget,
    means: Means = Means(),
    *,
    ranks: Ranks = ALONE,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Moment]]:
    """As `collect`, layer by layer: whoever puts each away before the next holds one at a time."""
    if budget.documents is None and budget.tokens is None and budget.tolerance is None:
        budget = replace(budget, tokens=default_tokens(widths))
    budget.check(widths)
    yield from _Collection(run, rows, widths, budget, means, ranks, checkpoint, progress).finish()


class _Collection:
    """One pass: what `collect` keeps between blocks."""

    def __init__(
        self,
        run: Run,
        rows: TokenRows,
        widths: Mapping[str, int],
        budget: Budget,
        means: Means,
        ranks: Ranks,
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self.run, self.rows, self.widths, self.budget, self.means = run, rows, widths, budget, means
        self.ranks, self.progress = ranks, progress
        self.moments: dict[str, SecondMoment] = {}
        self.checkpoint = None if folder is None else Checkpoint(folder, ranks)
        self.first = HELD_DOCUMENTS if budget.tolerance else 0
        found = self.checkpoint.load() if self.checkpoint else None
        self.saved: dict[str, Tensor] = {}
        # another version of transformers may pack where this one cannot; an earlier start may have had a layer in files
        if found and ranks.same(found[0].packed == means.packed and widths.keys() <= found[1].keys()):
            self.position, self.saved = found
            asked = ranks.same(means.place)
            if asked not in (None, self.position.place):
                log.warning("going on with sums on the %s: last digits may differ from an unbroken run's", asked)
                self.position = replace(self.position, place=asked)
        else:
            # the first rank looks while the others wait: what has to be unpacked is unpacked once
            per_block = ranks.same(self._documents_per_block() if ranks.first else 0)
            place = means.place or choose_place(widths, torch.device(means.device))
            self.position = Position(
                0, 0, 0, per_block, *ranks.same((means.batch_tokens, means.packed, place)),
                next_check=4 * max(widths.values()),
            )  # fmt: skip
        self.started = time.perf_counter() - self.position.seconds
        self.settling = self._settling() if budget.tolerance else None
        self.change = math.inf  # of the worst layer, at the last look

    def finish(self) -> Iterator[tuple[str, Moment]]:
        self._stream()
        self._check_enough()
        if self.settling and self.change > self.settling.tolerance and self.ranks.first:
            last = "at no look" if self.change == math.inf else f"the last change was {self.change:.2g}"
            log.warning("not settled to %g within the budget: %s", self.settling.tolerance, last)
        at = self.position
        for layer in self.widths:
            triangle = self._whole(layer)
            del self.moments[layer]
            if triangle is not None:
                yield layer, Moment(triangle, at.tokens, at.documents, seconds=at.seconds)

    def _stream(self) -> None:
        written, clock = self.position.tokens, time.perf_counter()
        for rows in ahead(self._own_blocks()):
            more = self._round(rows)
            if not more or self._settled():
                break
            if self.checkpoint and self.ranks.same(self._due(written, clock)):
                self.checkpoint.save(self.position, self._tensors())
                written, clock = self.position.tokens, time.perf_counter()

    def _whole(self, layer: str) -> Tensor | None:
        """The layer's triangle over all ranks, on the first; the others hand in their sums."""
        total = self.ranks.sum(self._moment(layer).sums)
        return to_triangle(total, self.widths[layer]) if self.ranks.first else None

    def _own_blocks(self) -> Iterator[Callable[[], Rows]]:
        """This rank's blocks from the present position on, without end."""
        size, block = self.position.per_block, self.position.block + self.ranks.rank

        def read(start: int) -> Callable[[], Rows]:
            return lambda: self.rows.rows(start, start + size)

        while True:
            yield read(self.first + block * size)
            block += self.ranks.world

    def _round(self, rows: Rows) -> bool:
        """One block on each rank. False where it was the last: the budget is reached, or the corpus over."""
        cut = [row[: self.budget.max_length] for row in rows]
        at, more, own = self.position, True, 0
        for rank, lengths in enumerate(self.ranks.gather([len(row) for row in cut])):
            take = 0
            for length in lengths:
                if self._reached(at):
                    break
                take += 1
                if length:
                    at = replace(at, tokens=at.tokens + length, documents=at.documents + 1)
            if rank == self.ranks.rank:
                own = take
            more = more and not self._reached(at) and len(lengths) == self.position.per_block
        self._block([row for row in cut[:own] if len(row)], at)
        seconds = time.perf_counter() - self.started
        self.position = replace(at, block=at.block + self.ranks.world, seconds=seconds)
        return more

    def _reached(self, at: Position) -> bool:
        documents, tokens = self.budget.documents, self.budget.tokens
        return (documents is not None and at.documents >= documents) or (tokens is not None and at.tokens >= tokens)

    def _block(self, rows: Rows, after: Position) -> None:
        done = self.position.tokens
        own = sum(map(len, rows))
        share = (after.tokens - done) / own if own else 0  # of the other ranks' blocks, which run at the same time
        ready = 0
        for batch in self._batches(rows):
            self.run(batch, self._sink)
            ready += sum(map(len, batch))
            if self.progress is not None and self.ranks.first:
                now = done + int(ready * share)
                self.progress(now, max(now, self._total(after)))
        for layer in self.widths:
            moment = self._moment(layer) if rows else self.moments.get(layer)
            if moment is not None:
                moment.fold()

    def _batches(self, rows: Rows) -> Iterator[Rows]:
        for chosen in batches([len(row) for row in rows], self.position.batch_tokens, self.position.packed):
            yield [rows[i] for i in chosen]

    def _total(self, at: Position) -> int:
        """Tokens that the whole will have: known, or estimated from the documents so far."""
        mean = at.tokens / max(1, at.documents)
        documents = [n for n in (self.budget.documents, self.rows.total) if n is not None]
        bounds = [int(min(documents) * mean)] if documents else []
        if self.budget.tokens is not None:
            bounds.append(self.budget.tokens)
        return max(at.tokens, min(bounds)) if bounds else at.tokens

    def _sink(self, layer: str, X: Tensor) -> None:
        if layer in self.widths:
            self._moment(layer, X.device).add(X)

    def _moment(self, layer: str, device: torch.device | None = None) -> SecondMoment:
        """The layer's sums; begun, or taken over from the checkpoint, when the first keys say where they are."""
        if layer not in self.moments:
            d, place = self.widths[layer], self.position.place
            device = device or torch.device(self.means.device)
            shared = None
            if place != "device":  # few bytes are free: one chunk for all layers of this width on this device
                same = [m for m in self.moments.values() if m.d == d and m.chunk.device == device]
                shared = same[0].chunk if same else torch.zeros(d, d, device=device)
            moment = SecondMoment(d, device, layer, place, shared, self._spill() if place == "disk" else None)
            if layer in self.saved:
                moment.sums.copy_(self.saved.pop(layer))
                moment.count = int(self.saved.pop(f"{layer} tokens"))
            self.moments[layer] = moment
        return self.moments[layer]

    def _spill(self) -> Path | None:
        """A folder for sums: that of the checkpoints, as the usual place for such files may be memory itself."""
        folder = self.checkpoint.folder if self.checkpoint else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _due(self, written: int, clock: float) -> bool:
        if not self.position.tokens:  # blank documents so far: where a layer's keys are is not known
            return False
        if self.means.checkpoint_tokens is not None:
            return self.position.tokens - written >= self.means.checkpoint_tokens
        return time.perf_counter() - clock >= CHECKPOINT_SECONDS

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for layer in self.widths:
            moment = self._moment(layer)
            tensors |= {layer: moment.sums, f"{layer} tokens": torch.tensor(moment.count)}
        if self.settling:
            tensors |= {f"{layer} settling": state for layer, state in self.settling.state.items()}
        return tensors

    def _documents_per_block(self) -> int:
        lengths = [len(row[: self.budget.max_length]) for row in self.rows.rows(0, PROBE)]
        mean = max(1.0, sum(lengths) / max(1, len(lengths)))
        tokens = BLOCK if self.budget.tokens is None else min(BLOCK, max(BLOCK // 8, self.budget.tokens // 32))
        if self.budget.tolerance is not None:
            tokens = BLOCK // 8  # so that looks, every `LOOK` blocks, do not lie far apart
        documents = max(1, round(tokens / mean))
        return documents if self.budget.documents is None else min(documents, self.budget.documents)

    def _settling(self) -> Settling:
        """With keys of held-out documents, the first of the order."""
        assert self.budget.tolerance is not None
        found: dict[str, list[Tensor]] = {layer: [] for layer in self.widths}
        rows = [row[: self.budget.max_length] for row in self.rows.rows(0, HELD_DOCUMENTS)]
        for batch in self._batches([row for row in rows if len(row)]):
            self.run(batch, lambda layer, X: found[layer].append(X.float()) if layer in found else None)
        held = {}
        for layer, parts in found.items():
            if not parts:
                raise InputError(
                    f"{self.rows.source}: its first {HELD_DOCUMENTS} documents are blank; nothing to hold out"
                )
            X = torch.cat(parts)
            held[layer] = X[:: -(-len(X) // HELD_KEYS)].clone()  # a view would keep all of them
            if not torch.isfinite(held[layer]).all():
                raise InputError(
                    f"{layer}: NaN or Inf among the keys of the first {HELD_DOCUMENTS} documents; expected finite "
                    "values: check the model's weights, or load it in bfloat16 or float32"
                )
        state = {layer: self.saved.pop(f"{layer} settling") for layer in held if f"{layer} settling" in self.saved}
        return Settling(self.budget.tolerance, held, state)

    def _settled(self) -> bool:
        at = self.position
        if self.settling is None or at.tokens < at.next_check or at.block % LOOK:
            return False
        self.position = replace(at, next_check=int(GROWTH * at.tokens))
        changes = []
        for layer in self.widths:  # one triangle at a time
            if (triangle := self._whole(layer)) is not None:
                changes.append(self.settling.look(layer, Moment(triangle, at.tokens)))
        self.change = self.ranks.same(max(changes, default=math.inf))
        return self.change <= self.settling.tolerance

    def _check_enough(self) -> None:
        widest = max(self.widths, key=lambda layer: self.widths[layer])
        least, done = 2 * self.widths[widest], self.position.tokens
        if done < least:
            raise InputError(
                f"{self.rows.source}: gave {done} tokens in {self.position.documents} documents, layer {widest} of "
                f"width {least // 2} needs at least {least}; use a longer corpus, or raise the budget of documents or "
                "the cap of tokens a document"
            )
        counts = {layer: sum(self.ranks.gather(self._moment(layer).count)) for layer in self.widths}
        for layer, count in counts.items():
            if count != done:
                raise RuntimeError(f"run gave {count} keys for layer {layer} where it was handed {done} tokens")


def batches(lengths: Sequence[int], tokens: int, packed: bool = False) -> list[list[int]]:
    """Indices, longest first, in batches of at most `tokens` tokens (at least one row each), padding counted unless
    `packed`."""
    result: list[list[int]] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # rows come longest first, so the first of a batch is its width
        size = lengths[index if packed or not result else result[-1][0]]
        if result and held + size <= tokens:
            result[-1].append(index)
            held += size
        else:
            result.append([index])
            held = lengths[index]
    return result
