"""`bench kernels` below the command line: nothing wrong is timed, nothing unmeasured is passed over."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from subjects import COPIES, CPU, bench, broken, double, make, rows_of, subject, wrong_where
from torch import Tensor

from rewire.bench import kernels
from rewire.bench.about import find_device
from rewire.bench.ceilings import Ceilings
from rewire.kernels.dispatch import TORCH, TRITON, Implementation, Operation
from rewire.kernels.errors import InputError

pytestmark = pytest.mark.usefixtures("small_cache")


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


def at_random(x: Tensor) -> Tensor:
    y = double(x)
    at_random.calls = getattr(at_random, "calls", 0) + 1  # type: ignore[attr-defined]
    return y * (1 + 1e-7 * (at_random.calls % 2))  # type: ignore[attr-defined]


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
