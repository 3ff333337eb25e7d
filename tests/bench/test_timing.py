"""Times and ceilings."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subjects import CPU, broken, double
from torch import Tensor

from rewire.bench import timing
from rewire.bench.ceilings import TINY, Ceilings, ceilings_of, measure_factors, measure_products
from rewire.kernels.floors import Cost

pytestmark = pytest.mark.usefixtures("small_cache")


# timing


def test_variants_are_interleaved_and_inputs_rotated() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: (lambda copy, name=name: seen.append((name, copy))) for name in "ab"}
    timings, failures = timing.measure(calls, range(3), CPU, seconds=0.0, warm=0.0, least=4)
    assert not failures
    assert [timings[name].samples for name in "ab"] == [4, 4]
    assert [copy for _, copy in seen] == [number % 3 for number in range(len(seen))]
    timed = "".join(name for name, _ in seen)[4:]  # two calls of warm-up each
    rounds = len(timed) // 4
    assert timed == "".join(timed[number * rounds : (number + 1) * rounds] for number in range(4))
    assert timed[:rounds].rstrip("b").strip("a") == ""  # all of a's calls of a round, then b's


def test_a_failing_variant_leaves_the_others() -> None:
    timings, failures = timing.measure({"good": double, "bad": broken}, [torch.ones(3)], CPU, 0.0, 0.0)
    assert list(timings) == ["good"]
    assert str(failures["bad"]).startswith("no such kernel")


def test_the_host_is_let_ahead_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a clock of our own: no GPU here. Each call takes 3 ms there, some 1 ms to launch here."""
    now, spins, queue = [0.0], [], [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = queue[0]

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.at - self.at)

    def launch(inputs: Any) -> None:
        now[0] += 1e-3
        queue[0] += 3e-3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.append(now.pop() + 3e-3))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    timings, failures = timing.measure({"a": launch, "b": launch}, [None], torch.device("cuda"), 0.0, 0.0, least=3)
    assert not failures
    assert [timings[name].p50 for name in "ab"] == [pytest.approx(3e-3)] * 2
    assert spins == [0, *[pytest.approx(1.2 * 2e-3 * 2e9, abs=1)] * 2]  # as long as the launches of a round


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 100, "most": 0}
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(most=held["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["most"])
    assert timing.peak_bytes(lambda: held.update(most=350), cuda) == 250
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40_000, 80_000))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4000))
    inputs = (torch.ones(1000),)
    assert len(timing.rotation(inputs, cuda)) == 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16_000, 80_000))
    assert len(timing.rotation(inputs, cuda)) == 2  # a quarter of what is free


def test_percentiles() -> None:
    found = timing._percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (found.p20, found.p50, found.p80, found.samples) == (2.0, 3.5, 5.0, 6)


def test_copies_keep_their_layout_and_pass_the_cache() -> None:
    base = torch.arange(600.0).view(20, 30)
    inputs = (base[:, 3:7], {"w": [base[0]]}, None, 3)
    copies = timing.rotation(inputs, CPU, cache=10_000)
    assert len(copies) == math.ceil(30_000 / (2 * 2400))
    assert copies[0] is inputs
    for copy in copies[1:]:
        assert copy[0].stride() == (30, 1)
        assert torch.equal(copy[0], inputs[0])
        assert copy[0].data_ptr() != inputs[0].data_ptr()
    assert len(timing.rotation((torch.ones(1),), CPU, cache=2**20)) == timing.MOST_COPIES
    assert len(timing.rotation((torch.ones(4000),), CPU, cache=4000)) == 1


def test_peak_memory_of_a_call() -> None:
    x = torch.ones(1000)

    def call() -> Tensor:
        y = x + 1  # 4000
        view = y[::2]
        del y
        z = view.double()  # 4000 beside them
        del view
        return z.sum() + 1

    assert timing.peak_bytes(call, CPU) == pytest.approx(8000, abs=50)
    assert timing.peak_bytes(lambda: x.view(10, 100), CPU) == 0


# ceilings


def test_the_floor_is_the_larger_of_both() -> None:
    found = Ceilings({torch.float32: 100.0, torch.bfloat16: 400.0}, 10.0)
    assert found.floor(Cost(1000, 10), torch.float32, CPU) == 10
    assert found.floor(Cost(10, 1000), torch.float32, CPU) == 100
    assert found.floor(Cost(4000, 1), torch.bfloat16, torch.device("cuda")) == 10
    assert found.floor(Cost(4000, 1), torch.float16, CPU) == 40  # converted first
    assert found.floor(Cost(4000, 1), torch.float16, torch.device("cuda")) is None


def test_ceilings() -> None:
    products = list(measure_products(TINY, CPU))
    factors = list(measure_factors(TINY, CPU))
    for row in products + factors:
        assert row["status"] == "measured", row
        assert row["error"] <= row["bound"]
        assert row["seconds"] > 0
    assert [row["name"] for row in factors] == ["potrf", "trsm"] * 2 + ["eigh"] * 4
    found = ceilings_of(products)
    assert found.products.keys() == TINY.products.keys()
    assert found.copy > 0


def test_eigh_that_would_take_too_long() -> None:
    *_, small, smaller, last, again = measure_factors(replace(TINY, patience=1e-9), CPU)
    assert small["status"] == smaller["status"] == "measured"
    assert last["status"] == again["status"] == "not measured"
    assert "would take some" in last["note"]


def test_a_wrong_product_is_no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.Tensor.__matmul__

    def tf32(a: Tensor, b: Tensor) -> Tensor:
        rounded = (x.bfloat16().float() if x.dtype is torch.float32 else x for x in (a, b))
        return own(*rounded)

    monkeypatch.setattr(torch.Tensor, "__matmul__", tf32)
    rows = list(measure_products(replace(TINY, products={torch.float32: 256, torch.float64: 64}), CPU))
    assert [row["status"] for row in rows] == ["wrong", "measured", "measured"]
    assert torch.float32 not in ceilings_of(rows).products
