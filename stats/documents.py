"""Documents by number, and the order in which a sample of them is taken."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np

from ..kernels.errors import InputError


class Texts(Protocol):
    """Documents that can be read by number, 0 to len - 1."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]:
        """All of them, each read when it is asked for."""

    def take(self, numbers: Sequence[int]) -> list[str]:
        """Those with these numbers, as they are asked for. Raises `InputError`, as iterating does."""


@runtime_checkable
class Stream(Protocol):
    """Documents that come one after the other, the same ones at each start."""

    def start(self, seed: int | None) -> Iterator[str]:
        """From the first one, shuffled as well as a stream can be; None: in its own order."""


class Documents(Protocol):
    """The documents of a corpus in an order; total: how many, None where that is not known."""

    total: int | None

    def read(self, start: int, stop: int) -> list[str]:
        """Documents start to stop - 1 of the order, blank ones as they are; fewer only where the corpus ends."""


class Held:
    """Items of a JSON list, in memory; `source` names it in errors."""

    def __init__(self, source: str, items: Sequence[object]) -> None:
        self._source = source
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        return (self._text(number) for number in range(len(self)))

    def take(self, numbers: Sequence[int]) -> list[str]:
        return [self._text(number) for number in numbers]

    def _text(self, number: int) -> str:
        return text_of(self._items[number], lambda: f"{self._source}, item {number}")


class Drawn:
    """A corpus that can be read by number, in its own order (seed None) or in the permutation of a seed.

    shard: (i, n): the positions i, i + n, i + 2 n ... of that order
    """

    def __init__(self, texts: Texts, source: str, seed: int | None, shard: tuple[int, int]) -> None:
        self._texts = texts
        self._seed = seed
        self._first, self._step = shard
        if not len(texts):
            raise no_text(source)
        self.total: int | None = len(range(self._first, len(texts), self._step))

    def read(self, start: int, stop: int) -> list[str]:
        order = range(self._first, len(self._texts), self._step)[start:stop]
        if self._seed is None:
            return clean(self._texts.take(order))
        return clean(self._texts.take(permuted(np.array(order, dtype=np.int64), len(self._texts), self._seed).tolist()))


class Streamed:
    """A corpus that can only be read forward; an earlier start reads it from the beginning. Parameters as `Drawn`'s."""

    total: int | None = None

    def __init__(self, stream: Stream, source: str, seed: int | None, shard: tuple[int, int]) -> None:
        self._stream = stream
        self._source = source
        self._seed = seed
        self._shard = shard
        self._running: Iterator[str] | None = None
        self._position = 0

    def read(self, start: int, stop: int) -> list[str]:
        if stop <= start:
            return []
        running, self._running = self._running, None  # a stream that fails is dead: the next call begins anew
        if running is None or start < self._position:
            first, step = self._shard
            running, self._position = islice(self._stream.start(self._seed), first, None, step), 0
        texts = list(islice(running, start - self._position, stop - self._position))
        if not texts and start == self._shard[0] == 0:
            raise no_text(self._source)
        self._running, self._position = running, stop
        return clean(texts)


def permuted(positions: np.ndarray, total: int, seed: int) -> np.ndarray:
    """The document at each of these positions of the permutation of 0 .. total - 1 that belongs to `seed`.

    positions: [n] int64, below `total`; the result is the same type. Made of arithmetic alone: costs no memory however
    large the corpus, and is the same with any version of NumPy, as caches on disk rely on it.
    """
    half = np.uint64(max(1, ((total - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.sha256(str(seed).encode()).digest(), dtype="<u4").astype(np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():  # a Feistel network permutes 0 .. 4^half - 1; what falls outside walks on until it is inside
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + (key << np.uint64(32))) & mask)
        values[outside] = left << half | right
        outside[outside] = values[outside] >= total
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, each bit of the result hanging on each bit of the argument (the splitmix64 finaliser)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def text_of(item: object, where: Callable[[], str]) -> str:
    """The text of one entry: a string, or an object with a string as `text`; `where` is asked for the error only."""
    found = item.get("text") if isinstance(item, dict) else item
    if not isinstance(found, str):
        what = f"an object with {', '.join(map(str, item))}" if isinstance(item, dict) else type(item).__name__
        raise InputError(f"{where()}: found {what}, expected a string or an object with a string as `text`")
    return found


def clean(texts: list[str]) -> list[str]:
    """JSON may hold lone surrogates, tokenizers refuse them."""
    return [text.encode(errors="replace").decode() for text in texts]


def no_text(source: str) -> InputError:
    return InputError(f"{source}: no document with text in it; expected at least one")
