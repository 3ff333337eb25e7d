"""`bench stats`: the baseline is the published structure and no more, and what is not right is not timed."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire.bench import stats
from rewire.bench.ceilings import Ceilings
from rewire.bench.serial_stats import GROUP, ROOM, published_batches, published_moments
from rewire.engine.model import demo_file
from rewire.engine.outline import model_shape
from rewire.kernels.floors import published_statistics_flops
from rewire.stats import read_corpus

LAYERS = (1, 2)
CPU = torch.device("cpu")
KNOWN = Ceilings({torch.float32: 1e11, torch.bfloat16: 2e11}, 1e10)


@pytest.fixture
def names(demo: rewire.Model) -> list[str]:
    return [demo.anatomy.layer_name(layer) for layer in LAYERS]


@pytest.fixture
def rows(demo: rewire.Model) -> stats.Tokenised:
    return stats.take_rows(read_corpus(demo_file("corpus.txt")), demo, 2 * demo.anatomy.d_in)


# the baseline


def test_flops_are_the_published_count(demo: rewire.Model, names: list[str], rows: stats.Tokenised) -> None:
    """Within 5 %: a pass for each layer over padded rows, every query against every key, whole products."""
    demo.hf.set_attn_implementation("eager")  # whose products torch counts
    widths = dict.fromkeys(names, demo.anatomy.d_in)
    with FlopCounterMode(display=False) as counter:
        published_moments(demo, rows.held, widths, 64)
    shapes = [(len(batch), len(batch[0])) for batch in published_batches(rows.held, 64)]
    tokens = sum(min(64, len(row)) for row in rows.held)
    closed = published_statistics_flops(model_shape(demo), dict.fromkeys(LAYERS, demo.anatomy.d_in), shapes, tokens)
    assert counter.get_total_flops() == pytest.approx(closed, rel=0.05)


def test_the_baseline_is_a_plain_sum(demo: rewire.Model, names: list[str], rows: stats.Tokenised) -> None:
    """A float64 sum over documents that are run alone and whole."""
    few = rows.held[:6]
    found = published_moments(demo, few, dict.fromkeys(names, demo.anatomy.d_in), 64)
    keys: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    handles = [
        demo.projection(layer).register_forward_pre_hook(lambda module, args, layer=layer: keys[layer].append(args[0]))
        for layer in LAYERS
    ]
    for row in few:
        demo.hf(input_ids=torch.as_tensor(row[:64], dtype=torch.long)[None])
    for handle in handles:
        handle.remove()
    for layer, name in zip(LAYERS, names, strict=True):
        K = torch.cat([part[0] for part in keys[layer]]).detach().double()
        assert stats.difference(found[name], K.T @ K, torch.float32) < 1e-5


@given(
    st.lists(st.integers(1, 50), max_size=250).map(lambda lengths: [[i] * n for i, n in enumerate(lengths)]),
    st.integers(1, 40),
)
def test_batches_are_the_published_ones(rows: list[list[int]], longest: int) -> None:
    seen = []
    for batch in published_batches(rows, longest):
        lengths = [len(row) for row in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert len(batch) * lengths[0] <= ROOM * longest
        groups = {row[0] // GROUP for row in batch}
        assert len(groups) == 1
        seen += [(row[0], len(row)) for row in batch]
    assert sorted(seen) == [(i, min(len(row), longest)) for i, row in enumerate(rows)]


# what is compared


def test_rows_and_their_check(demo: rewire.Model, names: list[str], rows: stats.Tokenised) -> None:
    seen: list[tuple[int, int]] = []
    result = stats.bench_stats(demo, rows, names, ceilings=KNOWN, progress=lambda *at: seen.append(at))
    assert result["check"] == "passed"
    assert [row["dtype"] for row in result["rows"]] == ["float32", "bfloat16"]
    tokens = sum(map(len, rows.held))
    for row in result["rows"]:
        assert row.keys() >= {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}
        assert row["shape"] == {"modules": 2, "d": 736, "tokens": tokens, "documents": len(rows.held)}
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert row["floor_fraction"] == row["floor_seconds"] / row["seconds"]
        assert 0 < row["error"] <= stats.BOUNDS[getattr(torch, row["dtype"])]
        # the sums of the layers, each in float32 and float64, at least
        assert row["peak_bytes"] > 2 * 2 * 4 * 736**2 / 2
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_what_is_wrong_is_not_timed(
    demo: rewire.Model, names: list[str], rows: stats.Tokenised, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    right: Callable[..., Any] = stats.collect
    calls: list[torch.dtype] = []

    def wrong(run: Any, taken: Any, *args: Any) -> Any:
        found = right(run, taken, *args)
        kinds: list[torch.dtype] = []
        run(taken.held[:1], lambda name, X: kinds.append(X.dtype))
        calls.append(kinds[0])
        if kinds[0] is torch.float32:
            found[names[1]] = SimpleNamespace(sum=found[names[1]].sum * factor, count=1, documents=1, width=736)
        return found

    monkeypatch.setattr(stats, "collect", wrong)
    monkeypatch.setattr(stats, "REPEATS", 1)
    result = stats.bench_stats(demo, rows, names, ceilings=KNOWN)
    assert result["check"] == "failed"
    assert [row["dtype"] for row in result["rows"]] == ["bfloat16"]
    assert calls.count(torch.float32) == 2  # to warm up, and to be found wrong


def test_half_of_float32_is_told_from_float32() -> None:
    C = torch.randn(50, 20, dtype=torch.float64)
    C = C.T @ C
    assert stats.difference(C, C.float(), torch.float32) < 1e-6
    assert stats.difference(C.bfloat16(), C, torch.float32) > 1e-5
    assert 1e-4 < stats.difference(C.bfloat16(), C, torch.bfloat16) < 2e-2
    C[3] = C[:, 3] = 0  # a unit that never fires
    assert stats.difference(C, C, torch.float32) == 0


def test_a_cast_model_is_one_that_was_loaded_so(demo: rewire.Model) -> None:
    """Rotary frequencies in bfloat16 would turn late positions into others."""
    ids = torch.arange(200)[None] % 100
    loaded = rewire.load("demo", dtype="bfloat16")
    assert torch.equal(stats.cast(demo, torch.bfloat16).hf(ids).logits, loaded.hf(ids).logits)
    assert next(demo.hf.parameters()).dtype is torch.float32


def test_rows_are_taken_from_all_over_the_corpus(demo: rewire.Model) -> None:
    corpus = read_corpus(demo_file("corpus.txt"))
    few, more = (stats.take_rows(corpus, demo, tokens) for tokens in (500, 1000))
    lengths = [len(row) for row in few.held]
    assert sum(lengths[:-1]) < 500 <= sum(lengths)
    assert all(np.array_equal(a, b) for a, b in zip(few.held, more.held, strict=False))
    assert demo.tokenizer.decode(few.held[0]) != demo.tokenizer.decode(demo.tokenizer.encode(next(iter(corpus))))
    whole = stats.take_rows(corpus, demo, 10**9)
    assert whole.total == len(list(corpus))
    assert whole.rows(0, 10**9) == whole.held


# memory


def test_peak_memory_is_what_comes_on_top() -> None:
    size = 2**26
    kept = torch.ones(size // 4)
    assert size <= stats.peak_growth(lambda: torch.ones(size // 4), CPU) < 1.3 * size
    assert stats.peak_growth(lambda: kept.sum(), CPU) < 0.1 * size


def test_memory_that_was_freed_before_counts_again() -> None:
    """Small blocks go back to the C library, not to the system."""

    def many() -> list[torch.Tensor]:
        return [torch.ones(4096) for _ in range(3000)]

    first = stats.peak_growth(many, CPU)
    assert first > 3000 * 4096 * 4 * 0.9
    assert stats.peak_growth(many, CPU) > 0.7 * first
