"""`bench kernels` and `bench gpu` below the command line: nothing wrong is timed, nothing unmeasured is passed over."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewire.bench import gpu, kernels, table, targets, timing
from rewire.bench.about import find_device
from rewire.bench.ceilings import TINY, Ceilings, ceilings_of, measure_factors, measure_products
from rewire.bench.check import Subject
from rewire.bench.gpu_report import markdown
from rewire.bench.plots import plot
from rewire.kernels import tuned
from rewire.kernels.dispatch import TORCH, TRITON, Implementation, Operation, interpreting
from rewire.kernels.errors import InputError
from rewire.kernels.floors import Cost

CPU = torch.device("cpu")
COPIES = 2**16  # bytes of a cache that tests rotate past


def double(x: Tensor) -> Tensor:
    return x * 2


def make(shape: Any, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(shape["n"], generator=seed).to(device, dtype),)


def subject(
    torch_: Callable[[Tensor], Tensor] = double, triton_: Callable[[Tensor], Tensor] | None = None, **changes: Any
) -> Subject:
    """An operation that doubles; `torch_` and `triton_` compute it, both on the CPU."""
    kinds = {"triton": triton_, "torch": torch_}
    operation = Operation("double", **{name: Implementation(run, TORCH) for name, run in kinds.items() if run})
    usual: dict[str, Any] = {
        "operation": operation,
        "make": make,
        "run": lambda inputs, impl: (operation(*inputs, impl=impl),),
        "exact": lambda inputs: (double(inputs[0].double()),),
        "plain": lambda inputs: (double(inputs[0]),),
        "cost": lambda shape, dtype: Cost(shape["n"], 2 * shape["n"] * dtype.itemsize),
        "odd": ({"n": 7}, {"n": 0}),
        "small": ({"n": 1000},),
        "large": ({"n": 1000},),
        "dtypes": (torch.float32,),
    }
    return Subject(**usual | changes)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_CACHE", COPIES)


def bench(*subjects: Subject, **options: Any) -> dict[str, Any]:
    return kernels.bench_kernels("cpu", seconds=0.005, found=subjects, sizes=TINY, **options)


def rows_of(result: dict[str, Any]) -> dict[str, Any]:
    return {row["provider"]: row for row in result["rows"]}


# rows


def test_a_row_holds_what_scripts_rely_on() -> None:
    result = bench(subject(library={"add": lambda inputs: (inputs[0] + inputs[0],)}))
    assert result["check"] == "passed"
    found = rows_of(result)
    assert list(found) == ["torch", "plain", "add"]
    row = found["torch"]
    assert row.keys() >= {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}
    assert (row["name"], row["dtype"], row["shape"]) == ("double", "float32", {"n": 1000})
    assert row["ratio"] == pytest.approx(found["plain"]["seconds"] / row["seconds"])
    assert row["baseline_seconds"] == pytest.approx(found["plain"]["seconds"])
    assert found["plain"]["ratio"] == 1
    assert row["p20"] <= row["seconds"] <= row["p80"]
    assert row["peak_bytes"] == 4000
    assert row["copies"] == math.ceil(3 * COPIES / 4000)
    assert row["tflops"] == pytest.approx(1000 / row["seconds"] / 1e12)
    assert row["gbs"] == pytest.approx(8000 / row["seconds"] / 1e9)
    assert 0 < row["floor_fraction"] < math.inf
    assert row["verified"] == "the timed shape"
    assert json.loads(json.dumps(result, allow_nan=False))


def unwritten(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:-1] = 2 * x[:-1]
    return y


def wrong_where(condition: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    return lambda x: double(x) + (1.0 if condition(x) else 0.0)


def at_random(x: Tensor) -> Tensor:
    y = double(x)
    at_random.calls = getattr(at_random, "calls", 0) + 1  # type: ignore[attr-defined]
    return y * (1 + 1e-7 * (at_random.calls % 2))  # type: ignore[attr-defined]


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nsecond line")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (wrong_where(lambda x: True), "at n 7: error"),
        (wrong_where(lambda x: len(x) == 7), "at n 7: error"),
        (wrong_where(lambda x: len(x) == 1000), "error"),
        (unwritten, "at n 7: error nan"),
        (lambda x: double(x)[:-1] if len(x) else x, "at n 7: error inf"),
        (at_random, "two runs differ"),
        (broken, "at n 7: RuntimeError: no such kernel"),
    ],
)
def test_what_is_wrong_is_not_timed(run: Callable[[Tensor], Tensor], said: str) -> None:
    timed: list[object] = []
    result = bench(subject(run, timed={"torch": timed.append}), subject(operation=Operation("none")))
    assert result["check"] == "failed"
    assert not timed
    assert "torch" not in rows_of(result)
    (wrong,) = result["wrong"]
    assert (wrong["name"], wrong["provider"]) == ("double", "torch")
    assert wrong["note"].startswith(said) or said in wrong["note"]
    assert "\n" not in wrong["note"]
    assert "plain" in rows_of(result)  # the rest goes on


def test_a_poor_library_call_is_not_ours_to_answer_for() -> None:
    timed: list[object] = []
    poor = subject(
        library={
            "half": lambda inputs: (double(inputs[0].half()).float(),),
            "absent": lambda inputs: broken(inputs[0]),
        },
        timed={"half": timed.append},
    )
    result = bench(poor)
    assert result["check"] == "passed"
    assert list(rows_of(result)) == ["torch", "plain"]
    assert not timed
    notes = {row["provider"]: row["note"] for row in result["not_measured"]}
    assert notes["half"].startswith("error ")
    assert notes["absent"] == "RuntimeError: no such kernel"


def test_a_library_call_may_give_fewer_outputs() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return (double(x), x - 1)

    two = subject(
        run=lambda inputs, impl: both(inputs[0]),
        exact=lambda inputs: both(inputs[0].double()),
        plain=lambda inputs: both(inputs[0]),
        library={
            "first": lambda inputs: both(inputs[0])[:1],
            "second": lambda inputs: both(inputs[0])[1:],
            "neither": lambda inputs: (inputs[0],),
            "swapped": lambda inputs: both(inputs[0])[::-1],
        },
    )
    result = bench(two)
    assert set(rows_of(result)) == {"torch", "plain", "first", "second"}
    assert {row["provider"] for row in result["not_measured"]} == {"neither", "swapped"}


def test_out_of_memory_is_a_row_and_the_rest_goes_on() -> None:
    def hungry(x: Tensor) -> Tensor:
        if len(x) == 1000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return double(x)

    shapes = ({"n": 1000}, {"n": 50})
    result = bench(subject(hungry, small=shapes))
    assert result["check"] == "passed"
    (row,) = result["not_measured"]
    assert (row["provider"], row["shape"]) == ("torch", {"n": 1000})
    assert row["note"].startswith("out of memory: ")
    assert [row["shape"]["n"] for row in result["rows"] if row["provider"] == "torch"] == [50]


def test_inputs_that_do_not_fit_are_said_for_every_provider() -> None:
    def huge(shape: Any, *rest: Any) -> tuple[Tensor]:
        if shape["n"] == 1000:
            raise torch.OutOfMemoryError("too much")
        return make(shape, *rest)

    result = bench(subject(make=huge, small=({"n": 1000}, {"n": 50})))
    assert [(row["provider"], row["note"]) for row in result["not_measured"]] == [
        ("torch", "out of memory: too much"),
        ("plain", "out of memory: too much"),
    ]
    assert [row["provider"] for row in result["rows"]] == ["torch", "plain"]


def test_a_refusal_is_no_failure() -> None:
    operation = Operation("double", triton=Implementation(double, TRITON), torch=Implementation(double, TORCH))
    refused = subject(operation=operation, run=lambda inputs, impl: (operation(*inputs, impl=impl),))
    result = bench(refused)
    assert result["check"] == "passed"
    (row,) = result["not_measured"]
    assert row["provider"] == "triton"
    assert "cuda" in row["note"]


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = bench(subject(triton_=double))
    assert list(rows_of(result)) == ["torch", "plain"]
    assert "interpreted" in result["not_measured"][0]["note"]


def test_what_is_timed_may_do_less_than_what_is_checked() -> None:
    calls = {"torch": 0, "product": 0}

    def count(name: str) -> Callable[[Any], None]:
        def call(inputs: Any) -> None:
            calls[name] += 1

        return call

    result = bench(subject(timed={"torch": count("torch")}, beside={"product": count("product")}))
    assert min(calls.values()) > 5
    beside = rows_of(result)["product"]
    assert (beside["ratio"], beside["floor_fraction"], beside["verified"]) == (None, None, None)


def test_verified_at_a_smaller_shape_where_float64_is_too_slow() -> None:
    seen: list[int] = []

    def exact(inputs: Any) -> tuple[Tensor]:
        seen.append(len(inputs[0]))
        return (double(inputs[0].double()),)

    slow = Ceilings({torch.float64: 1000 / kernels.PATIENCE / 4, torch.float32: 1e9}, 1e9)
    run = kernels.Bench(CPU, slow, 0.005)
    rows = run.group(subject(exact=exact), {"n": 1000}, torch.float32)
    assert seen == [7, 0, 250]
    assert {row["verified"] for row in rows} == {"n 250"}


def test_gates_are_run_once() -> None:
    runs: list[int] = []

    def counted(x: Tensor) -> Tensor:
        runs.append(len(x))
        return double(x)

    bench(subject(counted, small=({"n": 1000}, {"n": 500})))
    assert runs.count(7) == 3  # checked, and twice to see that two runs agree


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": ["duoble"]}, "no operation 'duoble'; expected one of double"),
        ({"dtypes": ["fp32"]}, "dtype 'fp32'; expected one of bfloat16"),
    ],
)
def test_wrong_input(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        bench(subject(), **options)


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:99"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(InputError, match=f"device '{name}'"):
        find_device(name)


def test_only_and_dtypes() -> None:
    kinds = (torch.float32, torch.float64)
    other = replace(subject(dtypes=kinds), operation=Operation("other", torch=Implementation(double, TORCH)))
    result = bench(subject(dtypes=kinds), other, only=["other"], dtypes=["float64"])
    assert {(row["name"], row["dtype"]) for row in result["rows"]} == {("other", "float64")}


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


# the CSV


def row(**changes: Any) -> dict[str, Any]:
    usual = {"operation": "gram_", "provider": "torch", "dtype": "float32", "shape": {"d": 4, "T": 2}, "device": "a, b"}
    return {**usual, "status": "measured", "p50_ms": 1.5, "ratio": 2.0, "floor_fraction": 0.25, "note": ""} | changes


def test_upsert_keeps_one_row_a_key(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "k.csv"
    table.upsert(path, [row(), row(provider="plain", p50_ms=3.0)])
    table.upsert(path, [row(shape={"T": 2, "d": 4}, p50_ms=1.25, peak_bytes=822083584), row(device="other")])
    found = table.read(path)
    assert [(r["provider"], r["device"], r["p50_ms"]) for r in found] == [
        ("torch", "a, b", 1.25),
        ("plain", "a, b", 3.0),
        ("torch", "other", 1.5),
    ]
    assert found[0]["shape"] == {"T": 2, "d": 4}
    assert found[0]["peak_bytes"] == 822083584
    before = path.read_text()
    table.upsert(path, [])
    assert path.read_text() == before  # reading and writing changes nothing
    assert [p.name for p in path.parent.iterdir()] == ["k.csv"]
    assert next(csv.reader(before.splitlines())) == list(table.COLUMNS)


@pytest.mark.parametrize("key", table.KEY)
def test_every_part_of_the_key_counts(tmp_path: Path, key: str) -> None:
    table.upsert(tmp_path / "k.csv", [row(), row(**{key: {"n": 1} if key == "shape" else "x"})])
    assert len(table.read(tmp_path / "k.csv")) == 2


def test_what_replaces_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "k.csv"
    table.upsert(path, [row(), row(provider="new", status="refused"), row(provider="full", status="not measured")])
    table.upsert(path, [row(status="not measured", p50_ms=None, note="out of memory")])
    assert [(r["provider"], r["status"], r["p50_ms"]) for r in table.read(path)] == [
        ("torch", "measured", 1.5),
        ("full", "not measured", 1.5),
    ]
    table.upsert(path, [row(status="wrong", p50_ms=None)])
    assert (table.read(path)[0]["status"], table.read(path)[0]["p50_ms"]) == ("wrong", None)


def test_an_interrupted_write_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k.csv"
    table.upsert(path, [row()])
    before = path.read_text()

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        table.upsert(path, [row(p50_ms=9.0)])
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "no column 'operation'"),
        ("", "no column 'operation'"),
        (",".join(table.COLUMNS) + "\n" + ",".join(["x"] * len(table.COLUMNS)) + "\n", ":2: "),
        (",".join(table.COLUMNS) + "\nx\n", ":2: "),
        ("\xff\xfe\x00".encode("latin-1"), "k.csv: "),
    ],
)
def test_another_csv_is_refused(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "k.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said):
        bench(subject(), csv=path)
    with pytest.raises(InputError, match=said):
        plot(path, tmp_path / "out")


def test_bench_writes_its_rows(tmp_path: Path) -> None:
    bench(subject(triton_=wrong_where(lambda x: True)), csv=tmp_path / "k.csv")
    found = {r["provider"]: r for r in table.read(tmp_path / "k.csv")}
    assert {name: r["status"] for name, r in found.items()} == {
        "triton": "wrong",
        "torch": "measured",
        "plain": "measured",
    }
    assert found["triton"]["p50_ms"] is None
    good = found["torch"]
    assert all(good[name] for name in ("torch", "triton", "timestamp", "device"))
    assert good["p20_ms"] <= good["p50_ms"] <= good["p80_ms"]


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    providers = ("triton", "torch", "plain", "addmm", "two bmm")
    table.upsert(tmp_path / "k.csv", [row(provider=name, shape={"d": d}) for name in providers for d in (1, 2)])
    written = plot(tmp_path / "k.csv", tmp_path / "out")
    assert [path.name for path in written] == ["a-b-ratio.png", "a-b-floor.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert sorted(tmp_path.joinpath("out").iterdir()) == sorted(written)
    table.upsert(tmp_path / "empty.csv", [])
    with pytest.raises(InputError, match="no measured row"):
        plot(tmp_path / "empty.csv", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'rewire\[plot\]'"):
        plot(tmp_path / "k.csv", tmp_path / "out")


# targets


def test_targets() -> None:
    shape = {"T": 32768, "d": 14336}
    usual = {"dtype": "bfloat16", "status": "measured"}
    gram = [
        row(provider="triton", shape=shape, **usual | {"p50_ms": 10.0, "tflops": 673.0}),
        row(provider="addmm", shape=shape, **usual | {"p50_ms": 14.0}),
    ]
    delta = [
        row(operation="delta_linear", provider=name, shape={"rows": 512, "r": r}, **usual | {"p50_ms": ms})
        for r, name, ms in ((1, "triton", 1.04), (1, "product", 1.0), (16, "triton", 2.0), (16, "product", 1.0))
    ]
    head = row(
        operation="target_nll", provider="triton", shape=dict(targets.HEAD), peak_bytes=2**28, tflops=500.0, **usual
    )
    names = ["gram_", "delta_linear", "target_nll", "other"]
    found = targets.judge([*gram, *delta, head], names)
    assert [(t["name"], t["result"]) for t in found] == [
        ("gram_", "missed"),
        ("gram_", "met"),
        ("delta_linear", "met"),
        ("target_nll", "missed"),
        ("target_nll", "missed"),
    ]
    assert [round(t["found"], 3) for t in found] == [1.4, 673.0, 0.04, 500.0, round(2**28 / (4096 * 128256 * 2), 3)]
    assert found[2]["shape"] == {"rows": 512, "r": 1}
    assert {t["result"] for t in targets.judge([], names)} == {"not measured"}
    assert targets.judge([], ["other"]) == []
    # the wrong dtype, one that failed, and no baseline
    assert targets.judge([r | {"dtype": "float16"} for r in gram], ["gram_"])[0]["result"] == "not measured"
    assert targets.judge([r | {"status": "wrong"} for r in gram], ["gram_"])[0]["result"] == "not measured"
    assert [t["result"] for t in targets.judge(gram[:1], ["gram_"])] == ["not measured", "met"]


def test_targets_name_operations_that_exist() -> None:
    from rewire.bench.operations import subjects

    there = {each.name: each for each in subjects()}
    for name, wanted in targets.TARGETS.items():
        for target in wanted if name in there else ():
            fits = [s for s in there[name].large if all(s.get(key) == value for key, value in target.shape.items())]
            assert fits, (name, target)


# the GPU's command, walked on the CPU


def rehearse(out: Path, *subjects: Subject, **options: Any) -> dict[str, Any]:
    return gpu.bench_gpu(out, found=subjects or None, rehearse=True, **options)


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no GPU: torch .* sees .*`rewire bench kernels` measures the CPU"):
        gpu.bench_gpu(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_out_and_budget(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file; expected a folder"):
        rehearse(tmp_path / "file", subject())
    with pytest.raises(InputError, match="budget 0 s"):
        rehearse(tmp_path / "out", subject(), budget=0)
    with pytest.raises(InputError, match="no operation 'x'"):
        rehearse(tmp_path / "out", subject(), only=["x"])
    assert not (tmp_path / "out").exists()


def test_rehearsal(tmp_path: Path) -> None:
    (good, bad) = subject(triton_=double), subject(triton_=wrong_where(lambda x: len(x) == 7))
    bad = replace(bad, operation=Operation("bad", **bad.operation.implementations))
    out = tmp_path / "out"
    report = rehearse(out, good, bad)
    assert (report["finished"], report["rehearsal"], report["check"]) == (True, True, "failed")
    assert {(g["name"], g["impl"]): g["result"] for g in report["gates"]} == {
        ("double", "triton"): "passed",
        ("double", "torch"): "passed",
        ("bad", "triton"): "wrong",
        ("bad", "torch"): "passed",
    }
    assert {(r["name"], r["provider"]) for r in report["wrong"]} == {("bad", "triton")}
    assert {(r["name"], r["provider"]) for r in report["rows"]} == {
        *((name, provider) for name in ("double", "bad") for provider in ("torch", "plain")),
        ("double", "triton"),
    }
    assert {r["name"] for r in report["ceilings"]} == {"product", "copy", "potrf", "trsm", "eigh"}
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.md", "kernels.csv", "tuned.json"]
    assert json.loads((out / "gpu.json").read_text()) == report
    page = (out / "gpu.md").read_text()
    assert page.startswith(f"# {report['about']['device']}\n")
    assert "rehearsal" in page
    assert page == markdown(report)
    assert {r["status"] for r in table.read(out / "kernels.csv")} == {"measured", "wrong"}
    again = rehearse(out, good)  # into the same folder: the CSV is added to
    assert again["check"] == "passed"
    assert {r["operation"] for r in table.read(out / "kernels.csv")} == {"double", "bad"}


def test_what_does_not_fit_the_budget_is_listed(tmp_path: Path) -> None:
    both = subject(triton_=double, library={"add": lambda inputs: (inputs[0] + inputs[0],)})
    report = rehearse(tmp_path, both, budget=1e-9)
    assert report["finished"]
    assert report["rows"] == []
    assert {g["note"] for g in report["gates"]} == {gpu.LATE}
    assert {(r["provider"], r["note"]) for r in report["not_measured"]} == {
        (name, gpu.LATE) for name in ("triton", "torch", "plain", "add")
    }
    late = {r["name"] for r in report["ceilings"] if r["note"] == gpu.LATE}
    assert late == {"potrf", "trsm", "eigh"}
    assert (tmp_path / "gpu.md").read_text().count(gpu.LATE) >= 5


def test_a_killed_run_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels.Bench, "group", killed)
    with pytest.raises(KeyboardInterrupt):
        rehearse(tmp_path, subject())
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["finished"]
    assert {g["result"] for g in report["gates"]} == {"passed"}
    assert len(report["ceilings"]) > 5
    assert "Unfinished" in (tmp_path / "gpu.md").read_text()


def test_a_fault_of_the_gpu_ends_the_run_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = gpu.Run._alive
    calls: list[int] = []

    def fault(self: gpu.Run) -> None:
        calls.append(1)
        if len(calls) == 3:  # in the section of kernels
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        own(self)

    monkeypatch.setattr(gpu.Run, "_alive", fault)
    report = rehearse(tmp_path, subject())
    assert report["check"] == "failed"
    assert report["broken"].startswith("kernels: RuntimeError: CUDA error: an illegal memory access was encountered;")
    assert report["broken"] in (tmp_path / "gpu.md").read_text()
    assert report["rows"] or report["not_measured"] or report["ceilings"]


@dataclass(frozen=True)
class Config:
    block: int


def test_tuning_takes_the_fastest_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel does: `pick` names the configuration, by the name in its module."""
    configs = (Config(1), Config(2), Config(3), Config(4), Config(5))
    module = SimpleNamespace(pick=tuned.pick)

    def kernel(x: Tensor) -> Tensor:
        config = module.pick("double", f"n{len(x)}", configs)
        if config == configs[3]:
            raise RuntimeError("out of resource: shared memory")
        if config == configs[4] and len(x) == 0:
            raise AssertionError  # of the odd shapes
        for _ in range({1: 200, 2: 0, 3: 0}.get(config.block, 0)):
            x.sum()
        return double(x) + (config == configs[2])

    monkeypatch.setattr(gpu, "tunable", lambda subject: module)
    report = rehearse(tmp_path, subject(triton_=kernel, odd=({"n": 900}, {"n": 0}, {"n": 7})))
    assert module.pick is tuned.pick
    entry = report["tuning"][0]
    assert entry["shape"] == {"n": 900}
    assert [c["result"] for c in entry["configs"]] == ["passed", "passed", "wrong", "not measured", "not measured"]
    assert entry["best"] == 1
    assert ["seconds" in c for c in entry["configs"]] == [True, True, False, False, False]
    assert report["check"] == "failed"  # a configuration that is wrong is a bug
    written = json.loads((tmp_path / "tuned.json").read_text())
    assert written["cpu"]["double"]["n900"] == asdict(configs[1])
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tuned, "device_name", lambda: "cpu")
    assert tuned.pick("double", "n900", configs) == configs[1]
    assert "block=2" in (tmp_path / "gpu.md").read_text()


def test_forced_gives_the_place_in_every_list() -> None:
    module = SimpleNamespace(pick=tuned.pick)
    with gpu.forced(module, 1) as asked:  # type: ignore[arg-type]
        assert (module.pick("a", "x", "abc"), module.pick("a", "y", "d")) == ("b", "d")
    assert asked == {("a", "x"): ("a", "b", "c"), ("a", "y"): ("d",)}
    assert module.pick is tuned.pick


def test_kernels_that_pick_are_found() -> None:
    pytest.importorskip("triton")
    from rewire.bench.operations import subjects

    there = {each.name: each for each in subjects()}
    module = gpu.tunable(there["gram_"])
    assert module is not None
    assert module.__name__ == "rewire.kernels.gram.kernel"
    assert gpu.tunable(subject()) is None


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
def test_a_real_kernel_is_tuned(tmp_path: Path) -> None:
    from rewire.bench.operations import subjects
    from rewire.kernels.gram import kernel

    (gram,) = (each for each in subjects() if each.name == "gram_")
    few = replace(gram, odd=({"T": 40, "d": 32}, {"T": 5, "d": 33}), dtypes=(torch.float32,))
    report = rehearse(tmp_path, few)
    assert report["check"] == "passed"
    for entry, lists in zip(report["tuning"], ("fp32", "fp32-ragged"), strict=True):
        assert [c["result"] for c in entry["configs"]] == ["passed"] * len(kernel.CONFIGS[lists])
        assert all("seconds" in c for c in entry["configs"])
    assert report["tuned"]["cpu"]["gram"].keys() == {"fp32-32", "fp32-ragged-64"}


BLOCKED = ("typer", "rich", "transformers", "pydantic", "matplotlib", "yaml", "psutil", "safetensors", "bitsandbytes")


def test_needs_torch_triton_and_numpy_only(tmp_path: Path) -> None:
    program = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
from rewire.bench import gpu, operations, plots
operations.subjects()
sys.exit(gpu.main(["--out", {str(tmp_path)!r}, "--rehearse", "--only", "gram_"]))
"""
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", env=own)
    assert done.returncode == 0, done.stderr
    assert "rehearsal" in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"]


def test_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    for check, status in (("passed", 0), ("failed", 1)):
        monkeypatch.setattr(gpu, "bench_gpu", lambda *args, check=check: {"check": check})
        monkeypatch.setattr(gpu, "markdown", lambda report: "page")

        assert gpu.main(["--out", "x"]) == status
