import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewire.kernels.errors import InputError
from rewire.stats import moments as moments_module
from rewire.stats import read_corpus
from rewire.stats.collect import Budget, Means, batches, collect
from rewire.stats.tokens import TokenRows


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = wanted.double().diagonal().sqrt()
    return float(((found.double() - wanted.double()).abs() / scale[:, None] / scale).max())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cap", [None, 5, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_equals_a_float64_loop(
    bench: Any, texts: list[str], rows: TokenRows, cap: int | None, batch_tokens: int, packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(moments_module, "FOLD", 50)
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 150)
    result = collect(bench.run, rows, bench.widths, Budget(cap, documents=33), Means(batch_tokens, packed))
    wanted = [row[:cap] for row in bench.encode(texts[:33])]
    assert list(result) == list(bench.widths)
    for name, moment in result.items():
        assert relative(moment.sum, bench.exact(name, wanted)) < 1e-6
        assert moment.count == sum(map(len, wanted))
        assert moment.documents == 33
    for batch in bench.batches:
        size = sum(map(len, batch)) if packed else len(batch) * max(map(len, batch))
        assert len(batch) == 1 or size <= batch_tokens


@given(st.lists(st.integers(1, 60), min_size=1), st.integers(1, 200), st.booleans())
def test_batches_hold_every_row_once(lengths: list[int], tokens: int, packed: bool) -> None:
    cut = batches(lengths, tokens, packed)
    flat = [i for batch in cut for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    sizes = [sum(lengths[i] for i in b) if packed else len(b) * lengths[b[0]] for b in cut]
    assert all(len(batch) == 1 or size <= tokens for batch, size in zip(cut, sizes, strict=True))
    for batch, after, size in zip(cut, cut[1:], sizes, strict=False):
        assert size + (lengths[after[0]] if packed else lengths[batch[0]]) > tokens, "no batch is closed too early"


def test_padding_stays_small() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 300).tolist()
    cut = batches(lengths, 1000)
    assert sum(len(batch) * lengths[batch[0]] for batch in cut) < 1.1 * sum(lengths)


def taken(bench: Any, rows: TokenRows, cap: int | None = None, **budget: Any) -> tuple[int, int]:
    """(documents, tokens), every one of them seen by the run."""
    bench.batches.clear()
    moment = collect(bench.run, rows, {"h.0.proj": 6}, Budget(cap, **budget), Means(30))["h.0.proj"]
    assert sum(len(row) for batch in bench.batches for row in batch) == moment.count
    assert sum(len(batch) for batch in bench.batches) == moment.documents
    return moment.documents or 0, moment.count


@pytest.mark.parametrize("block", [15, 70, 10_000])
def test_budget(bench: Any, texts: list[str], rows: TokenRows, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order; the document that reaches the budget of tokens is taken whole, none after it."""
    monkeypatch.setattr("rewire.stats.collect.BLOCK", block)
    lengths = [len(row) for row in bench.encode(texts)]
    sums = np.cumsum(lengths).tolist()
    assert taken(bench, rows, documents=9) == (9, sums[8])
    assert taken(bench, rows, documents=99) == (40, sums[-1]), "the corpus is over"
    assert taken(bench, rows, tokens=sums[4]) == (5, sums[4])
    assert taken(bench, rows, tokens=sums[4] + 1) == (6, sums[5])
    assert taken(bench, rows, tokens=sums[4] + 1, documents=3) == (3, sums[2])
    short = np.cumsum(np.minimum(lengths, 3)).tolist()
    last = next(i for i, n in enumerate(short) if n >= 30)
    assert taken(bench, rows, 3, tokens=30) == (last + 1, short[last])
    assert taken(bench, rows) == (next(i for i, n in enumerate(sums) if n >= 120) + 1, min(n for n in sums if n >= 120))


def test_documents_without_tokens_are_not_counted(bench: Any, corpus: Any) -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [[] if i % 2 else row for i, row in enumerate(bench.encode(texts))]

    rows = TokenRows(corpus, encode, seed=None, folder=None)
    assert taken(bench, rows, documents=10)[0] == 10


def test_only_what_is_taken_is_encoded(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('"a b c d e f g h i j k l m n o p q r"\n' * 600 + "{broken")
    rows = TokenRows(read_corpus(path), bench.encode, seed=None, folder=None)
    assert collect(bench.run, rows, {"h.1.proj": 9}, Budget(None, documents=3))["h.1.proj"].count == 57
    with pytest.raises(InputError, match="line 601"):
        collect(bench.run, rows, {"h.1.proj": 9}, Budget(None, documents=601))


def test_a_longer_sample_begins_with_the_shorter_one(bench: Any, corpus: Any) -> None:
    def seen(documents: int) -> list[bytes]:
        bench.batches.clear()
        rows = TokenRows(corpus, bench.encode, seed=5, folder=None)
        collect(bench.run, rows, bench.widths, Budget(None, documents=documents))
        return sorted(np.asarray(row).tobytes() for batch in bench.batches for row in batch)

    short, long = seen(10), seen(30)
    for row in short:
        long.remove(row)
    assert len(long) == 20


def test_progress_reaches_its_total(bench: Any, rows: TokenRows) -> None:
    for budget in ({"documents": 40}, {"tokens": 300}, {"documents": 10, "tokens": 5000}, {"tolerance": 0.5}):
        seen: list[tuple[int, int]] = []
        moment = collect(
            bench.run, rows, bench.widths, Budget(None, **budget), Means(40),
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )["h.0.proj"]  # fmt: skip
        assert len(seen) > 2
        assert all(done <= total for done, total in seen)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == moment.count


def test_a_tolerance_stops_when_the_moments_have_settled(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out documents are in no sum; a looser tolerance needs fewer tokens; one that is out of reach needs all."""
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 200)
    path = tmp_path / "long.json"
    generator = np.random.default_rng(0)
    path.write_text(json.dumps([" ".join("x" * n for n in generator.integers(1, 49, 30)) for _ in range(3000)]))
    rows = TokenRows(read_corpus(path), bench.encode, seed=0, folder=None)
    counts = {}
    for tolerance in (0.2, 0.02, 1e-9):
        moment = collect(bench.run, rows, bench.widths, Budget(None, tolerance=tolerance), Means(500))["h.0.proj"]
        counts[tolerance] = moment.count
    assert counts[0.2] < counts[0.02] < counts[1e-9]
    assert counts[1e-9] == (3000 - 16) * 31
    exact = collect(bench.run, rows, bench.widths, Budget(None, documents=3000), Means(500))["h.0.proj"]
    settled = collect(bench.run, rows, bench.widths, Budget(None, tolerance=0.02), Means(500))["h.0.proj"]
    error = (settled.mean.diagonal() / exact.mean.diagonal() - 1).square().mean().sqrt()
    assert float(error) < 0.06


def test_a_unit_that_never_fires_settles_too(bench: Any, rows: TokenRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """C has no full rank then, however long one goes on."""
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 60)
    monkeypatch.setattr("rewire.stats.collect.LOOK", 1)
    bench.tables["h.0.proj"][:, 2] = 0
    few = collect(bench.run, rows, {"h.0.proj": 6}, Budget(None, tolerance=0.3))["h.0.proj"]
    assert few.documents is not None
    assert few.documents < 20


def test_held_out_keys(bench: Any, rows: TokenRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many at most, spread over the documents, and nothing else is kept for their sake."""
    held: dict[str, torch.Tensor] = {}

    def look(settling: Any, layer: str, moment: Any) -> float:
        held[layer] = settling.held[layer]
        return 0.0

    monkeypatch.setattr("rewire.stats.collect.HELD_KEYS", 100)
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 60)
    monkeypatch.setattr("rewire.stats.collect.LOOK", 1)
    monkeypatch.setattr("rewire.stats.tolerance.Settling.look", look)
    collect(bench.run, rows, bench.widths, Budget(None, tolerance=0.3))
    assert held.keys() == bench.widths.keys()
    for X in held.values():
        assert 50 < len(X) <= 100
        assert X.untyped_storage().nbytes() == 4 * X.numel()
    bench.tables["h.1.proj"][0, 3] = float("inf")  # of the BOS, which is in every document
    with pytest.raises(InputError, match=r"^h\.1\.proj: NaN or Inf among the keys of the first 16 documents"):
        collect(bench.run, rows, bench.widths, Budget(None, tolerance=0.3))


def test_wrong_budgets(bench: Any, rows: TokenRows) -> None:
    with pytest.raises(InputError) as caught:
        collect(bench.run, rows, bench.widths, Budget(None, documents=1))
    assert str(caught.value) == (
        "words.txt: gave 2 tokens in 1 documents, layer h.1.proj of width 9 needs at least 18; "
        "use a longer corpus, or raise the budget of documents or the cap of tokens a document"
    )
    with pytest.raises(InputError, match=r"a budget of 17 tokens; layer h\.1\.proj of width 9 needs at least 18"):
        collect(bench.run, rows, bench.widths, Budget(None, tokens=17))
    with pytest.raises(InputError, match="a budget of 0 documents; expected at least 1"):
        collect(bench.run, rows, bench.widths, Budget(None, documents=0))
    with pytest.raises(InputError, match="a budget of -1 tokens a document"):
        collect(bench.run, rows, bench.widths, Budget(-1))
    with pytest.raises(InputError, match=r"a tolerance of 2; expected a number between 0 and 1"):
        collect(bench.run, rows, bench.widths, Budget(None, tolerance=2))


def test_nan_names_the_layer(bench: Any, rows: TokenRows) -> None:
    bench.tables["h.1.proj"][3] = float("nan")
    with pytest.raises(InputError, match=r"^h\.1\.proj: NaN or Inf"):
        collect(bench.run, rows, bench.widths, Budget(None))


def test_padding_that_comes_through_is_noticed(bench: Any, rows: TokenRows) -> None:
    def padded(batch: list[np.ndarray], sink: Any) -> None:
        bench.run([np.pad(row, (0, len(batch[0]) - len(row))) for row in batch], sink)

    with pytest.raises(RuntimeError, match=r"keys for layer h\.0\.proj where it was handed"):
        collect(padded, rows, bench.widths, Budget(None))
    with pytest.raises(RuntimeError, match=r"run gave 0 keys for layer h\.2\.proj"):
        collect(bench.run, rows, {"h.2.proj": 4}, Budget(None))
