import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewire.kernels.errors import InputError
from rewire.stats import Corpus, read_corpus
from rewire.stats.documents import Documents, Held, permuted
from rewire.stats.sources import Hub


def held(count: int) -> Corpus:
    texts = [f"document {i}" for i in range(count)]
    return Corpus("numbers", "0123456789ab", "numbers.json", lambda: Held("numbers.json", texts))


class Rows:
    """A streamed data set of `datasets`, as far as it is used; `given` counts what was fetched of all of them."""

    given = 0

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def shuffle(self, seed: int, buffer_size: int) -> "Rows":
        assert buffer_size == 10_000
        return Rows(random.Random(seed).sample(self.texts, len(self.texts)))

    def __iter__(self) -> Iterator[dict[str, str]]:
        for text in self.texts:
            Rows.given += 1
            yield {"text": text}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set holds the numbers up to 300."""
    Rows.given = 0
    rows = Rows([f"row {i}" for i in range(300)])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))


@given(st.integers(1, 5000), st.integers(-(2**70), 2**70))
def test_every_document_exactly_once(total: int, seed: int) -> None:
    assert sorted(permuted(np.arange(total), total, seed).tolist()) == list(range(total))


def test_the_order_is_the_one_that_caches_were_made_in() -> None:
    """Token rows on disk are found by seed and position: a change of the order would mix two of them."""
    assert permuted(np.arange(10), 10, 0).tolist() == [7, 3, 0, 2, 8, 6, 4, 9, 1, 5]
    assert permuted(np.arange(10), 10, -1).tolist() != permuted(np.arange(10), 10, 1).tolist()
    assert permuted(np.arange(4), 10**12, 7).tolist() == [40938802647, 131376846833, 47734866187, 846694441103]


@pytest.mark.parametrize("total", [1000, 4096, 4097, 10**6, 10**10])
def test_a_sample_is_spread_over_the_whole(total: int) -> None:
    """Tenths of the corpus hold a tenth of any sample each, neighbours in the order are strangers, seeds differ."""
    size = min(2000, total // 2)
    samples = np.stack([permuted(np.arange(size), total, seed) for seed in range(20)])
    shares = np.stack([np.bincount(sample * 10 // total, minlength=10) for sample in samples]) / size
    assert np.abs(shares - 0.1).max() < 5 * (0.09 / size) ** 0.5
    assert np.abs(shares.mean(0) - 0.1).max() < 5 * (0.09 / size / 20) ** 0.5
    for sample in samples:
        assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 5 / size**0.5
    assert abs(np.corrcoef(samples) - np.eye(20)).max() < 5 / size**0.5


def test_a_permutation_costs_no_memory() -> None:
    assert len(permuted(np.arange(2**40, 2**40 + 50), 2**41, 1)) == 50


CORPORA = {"held": lambda: held(300), "hub": lambda: read_corpus("some/set")}


@pytest.mark.parametrize("kind", CORPORA)
@settings(deadline=None, max_examples=50)
@given(
    seed=st.sampled_from([None, 0, 1]),
    shard=st.sampled_from([(0, 1), (0, 2), (2, 3), (6, 7)]),
    spans=st.lists(st.tuples(st.integers(0, 350), st.integers(0, 350)), max_size=6),
)
def test_any_pieces_are_those_of_the_whole(
    kind: str, seed: int | None, shard: tuple[int, int], spans: list[tuple[int, int]]
) -> None:
    """Forward, backward, overlapping, empty and past the end, by one reader."""
    corpus = CORPORA[kind]()
    whole = corpus.documents(seed).read(0, 1000)
    assert len(set(whole)) == 300
    part = whole[shard[0] :: shard[1]]
    documents = corpus.documents(seed, shard)
    assert documents.total == (None if kind == "hub" else len(part))
    for start, stop in spans:
        assert documents.read(start, stop) == part[start:stop]


@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.parametrize("seed", [None, 3])
def test_shards_are_the_whole(kind: str, seed: int | None) -> None:
    corpus = CORPORA[kind]()
    parts = [corpus.documents(seed, (i, 4)).read(0, 1000) for i in range(4)]
    together = [text for texts in itertools.zip_longest(*parts) for text in texts if text is not None]
    assert together == corpus.documents(seed).read(0, 1000)


@pytest.mark.parametrize("kind", CORPORA)
def test_seeds(kind: str) -> None:
    corpus = CORPORA[kind]()
    own, one, two = (corpus.documents(seed).read(0, 300) for seed in (None, 1, 2))
    assert own == list(corpus)
    assert sorted(own) == sorted(one) == sorted(two)
    assert len({tuple(own), tuple(one), tuple(two)}) == 3
    assert CORPORA[kind]().documents(1).read(0, 300) == one, "the order is the corpus', not the object's"


def test_a_stream_is_read_no_further_than_asked_and_once() -> None:
    documents = read_corpus("some/set").documents(None)
    assert Rows.given == 0
    for start in range(0, 100, 10):
        documents.read(start, start + 10)
    assert Rows.given == 100
    documents.read(120, 130)
    assert Rows.given == 130
    documents.read(500, 510)
    documents.read(510, 520)
    assert Rows.given == 300, "what lies past the end is not looked for twice"
    documents.read(5, 6)
    assert Rows.given == 306


def test_a_stream_that_fails_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the same reader gives the same documents, none lost and none twice."""
    fails = iter([True, False])
    real = Hub.start

    def start(self: Hub, seed: int | None) -> Iterator[str]:
        broken = next(fails)
        for i, text in enumerate(real(self, seed)):
            if broken and i == 15:
                raise InputError("no network")
            yield text

    monkeypatch.setattr(Hub, "start", start)
    documents = read_corpus("some/set").documents(None)
    assert documents.read(0, 10) == [f"row {i}" for i in range(10)]
    with pytest.raises(InputError, match="no network"):
        documents.read(10, 20)
    assert documents.read(10, 20) == [f"row {i}" for i in range(10, 20)]


def test_blank_documents_hold_their_place_and_surrogates_go(tmp_path: Path) -> None:
    texts = ["one", "", "  \n", "a\ud800b"]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "c.json").write_text(json.dumps(texts))
    for name in ("c.jsonl", "c.json"):
        corpus = read_corpus(tmp_path / name)
        assert [text.strip() for text in corpus.documents(None).read(0, 9)] == ["one", "", "", "a?b"]
        assert list(corpus) == ["one", "a?b"]


def test_a_broken_line_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('"one"\n{broken\n"three"\n')
    documents = read_corpus(path).documents(None)
    assert documents.total == 3
    assert documents.read(0, 1) + documents.read(2, 3) == ["one", "three"]
    with pytest.raises(InputError, match="line 2: broken JSON"):
        documents.read(0, 3)


def test_nothing_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.txt").write_text(" \n\n")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: Rows([])))

    def first(corpus: Corpus, **arguments: Any) -> list[str]:
        documents: Documents = corpus.documents(0, **arguments)
        return documents.read(0, 1)

    for corpus in (read_corpus(tmp_path / "c.txt"), held(0), read_corpus("some/set")):
        with pytest.raises(InputError, match="no document with text in it; expected at least one"):
            first(corpus)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: Rows(["a", "b"])))
    for corpus in (held(2), read_corpus("some/set")):
        assert first(corpus, shard=(2, 3)) == [], "a shard may be empty"
    with pytest.raises(ValueError, match="shard 3 of 3, expected 0 to 2"):
        held(9).documents(0, (3, 3))
