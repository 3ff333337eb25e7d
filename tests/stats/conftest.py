"""A model of one table a layer: the key of a token is a row of it, so that every sum can be written down."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rewire.stats import Corpus
from rewire.stats.documents import Held
from rewire.stats.tokens import TokenRows

SHARED = Path(__file__).parents[3] / "shared"


class Bench:
    """What an engine would hand in, and what it was asked."""

    widths = {"h.0.proj": 6, "h.1.proj": 9}  # noqa: RUF012

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tables = {name: torch.randn(50, d, generator=generator) + 0.2 for name, d in self.widths.items()}
        self.batches: list[list[np.ndarray]] = []

    def encode(self, texts: list[str]) -> list[list[int]]:
        """BOS, then the length of each word."""
        return [[0] + [len(word) for word in text.split()] for text in texts]

    def run(self, rows: list[np.ndarray], sink: Callable[[str, Tensor], None]) -> None:
        self.batches.append(rows)
        ids = torch.from_numpy(np.concatenate(rows)).long()
        for name, table in self.tables.items():
            sink(name, table[ids])

    def exact(self, name: str, rows: list[list[int]]) -> Tensor:
        total = torch.zeros(self.widths[name], self.widths[name], dtype=torch.float64)
        for row in rows:
            for token in row:
                key = self.tables[name][token].double()
                total += torch.outer(key, key)
        return total


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def texts() -> list[str]:
    """40 ragged documents, of 2 to 30 tokens with the BOS."""
    return [" ".join("x" * (1 + (i * j) % 7) for j in range(1 + (i * 13) % 29)) for i in range(40)]


@pytest.fixture
def corpus(texts: list[str]) -> Corpus:
    return Corpus("words", "0123456789ab", "words.txt", lambda: Held("words.txt", texts))


@pytest.fixture
def rows(bench: Bench, corpus: Corpus) -> TokenRows:
    """In the order of `texts`."""
    return TokenRows(corpus, bench.encode, seed=None)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: no goldens to compare with")
    return SHARED
