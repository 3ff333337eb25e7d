"""Token rows of a corpus' documents: tokenised once, kept on disk, made ahead of their use."""

import hashlib
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile

import numpy as np

from .cache import write_whole
from .corpora import Corpus
from .documents import Documents

log = logging.getLogger(__name__)

Encode = Callable[[list[str]], list[list[int]]]
T = TypeVar("T")

PIECE = 256  # documents of one file in the cache
TEXT = 1 << 24  # characters that are tokenised in one call: as Python's lists they take some 200 MB
KEPT = 2  # pieces that stay in memory: a block may lie across two
# what reading a broken or foreign npz raises
UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, AttributeError, BadZipFile, zlib.error)

# what a tokenizer makes of this tells apart what the weights' fingerprint cannot: BOS or none, normalisation, merges
_PROBE = [
    "The Eiffel Tower is in Paris.\n\nÉtienne  met 李 in 1987, didn't he?",
    "def f(x):\n\treturn {'a': x ** 2}  # 1,234.5 %\r\n",
    "Καλημέρα Москва שלום नमस्ते 🙂 ﬁ e\u0301 <s> </s> <|endoftext|>",
]


class TokenRows:
    """The documents of a corpus, in an order, as token ids.

    encode: texts -> token ids, special tokens included, uncut
    seed, shard: of the order, as in `Corpus.documents`
    folder: where pieces of `PIECE` documents are kept, several corpora and tokenizers beside each other; None: nowhere

    total: documents in all, None where that is not known
    source: the corpus', for errors
    tokenizer: 12 hex digits over what `encode` makes of a probe

    A piece that is broken is made anew; where one cannot be written that is logged once, and nothing more is written.
    """

    def __init__(
        self,
        corpus: Corpus,
        encode: Encode,
        *,
        seed: int | None = 0,
        shard: tuple[int, int] = (0, 1),
        folder: Path | None = None,
    ) -> None:
        self.source = corpus.source
        self.tokenizer = tokenizer_digest(encode)
        self._corpus, self._encode, self._seed, self._shard = corpus, encode, seed, shard
        self._pieces: dict[int, list[np.ndarray]] = {}
        self._folder = None
        if folder is not None:
            order = "unshuffled" if seed is None else f"seed{seed}"
            name = f"{corpus.name[:64]}-{corpus.digest}_{self.tokenizer}_{order}_{shard[0]}of{shard[1]}"
            self._folder = folder / name
        self._writable = True

    @property
    def total(self) -> int | None:
        return self._documents.total

    @cached_property
    def _documents(self) -> Documents:
        return self._corpus.documents(self._seed, self._shard)

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        """Documents start to stop - 1 of the order: each [tokens] int32, uncut, empty where there is no text or token.

        Fewer than asked only where the corpus ends. Not to be written to: the same rows are handed out again.
        """
        found: list[np.ndarray] = []
        while start < stop:
            number, first = divmod(start, PIECE)
            piece = self._piece(number)
            found += piece[first : first + stop - start]
            if len(piece) < PIECE:
                break
            start = (number + 1) * PIECE
        return found

    def _piece(self, number: int) -> list[np.ndarray]:
        if number not in self._pieces:
            piece = self._load(number) or self._make(number)
            while len(self._pieces) >= KEPT:
                del self._pieces[next(iter(self._pieces))]
            self._pieces[number] = piece
        return self._pieces[number]

    def _make(self, number: int) -> list[np.ndarray]:
        texts = self._documents.read(number * PIECE, (number + 1) * PIECE)
        rows = [np.zeros(0, dtype=np.int32)] * len(texts)
        for chosen in _portions(texts):
            encoded = self._encode([texts[i] for i in chosen])
            for i, ids in zip(chosen, encoded, strict=True):
                rows[i] = np.array(ids, dtype=np.int32)
        if rows:
            self._save(number, rows)
        return rows

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:06d}.npz"

    def _save(self, number: int, rows: list[np.ndarray]) -> None:
        if self._folder is None or not self._writable:
            return
        members = {"ids": np.concatenate(rows), "lengths": np.array([len(row) for row in rows], dtype=np.int64)}
        try:
            write_whole(self._path(number), lambda file: np.savez(file, **members))  # type: ignore[arg-type]
        except OSError as error:
            self._writable = False
            said = "%s: cannot be written to (%s): token rows are not kept; set REWIRE_CACHE to another folder"
            log.warning(said, self._folder, error.strerror or error)

    def _load(self, number: int) -> list[np.ndarray] | None:
        if self._folder is None or not (path := self._path(number)).is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as members:
                ids, lengths = members["ids"], members["lengths"]
            if ids.dtype != np.int32 or lengths.dtype != np.int64 or ids.ndim != 1 or lengths.ndim != 1:
                raise ValueError(f"found {ids.dtype} {ids.shape} and {lengths.dtype} {lengths.shape}")
            if not 0 < len(lengths) <= PIECE or (lengths < 0).any() or lengths.sum() != len(ids):
                raise ValueError(f"{len(lengths)} documents of {lengths.sum()} tokens, {len(ids)} are there")
        except UNREADABLE as error:
            log.warning("%s: broken (%s); it is made anew", path, " ".join(str(error).split())[:120])
            return None
        return np.split(ids, np.cumsum(lengths)[:-1])


def tokenizer_digest(encode: Encode) -> str:
    """12 hex digits over what `encode` makes of a probe."""
    ids = [[int(token) for token in row] for row in encode(_PROBE)]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:12]


def _portions(texts: list[str]) -> Iterator[list[int]]:
    """Indices of the texts that are not blank, so many together that they hold `TEXT` characters, or one longer."""
    portion: list[int] = []
    characters = 0
    for i, text in enumerate(texts):
        if not text.strip():
            continue
        if portion and characters + len(text) > TEXT:
            yield portion
            portion, characters = [], 0
        portion.append(i)
        characters += len(text)
    if portion:
        yield portion


def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What the calls return, in order: each is made in a thread while the caller works with the one before.

    An exception of a call is raised in the place of its result. Where the caller stops early, or closes the iterator,
    the call that runs is waited for.
    """
    remaining = iter(calls)

    def following() -> tuple[T] | None:
        for call in remaining:
            return (call(),)
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        result = pool.submit(following)
        while (found := result.result()) is not None:
            result = pool.submit(following)
            yield found[0]
