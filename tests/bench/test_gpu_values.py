"""The section "values" of `bench gpu`, walked on the CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rewire.bench import compare, gpu, gpu_values, targets
from rewire.bench.ceilings import Ceilings
from rewire.bench.gpu_report import markdown
from rewire.bench.gpu_values import LARGE, LATE, TINY, Load, measure_values

CPU = torch.device("cpu")
KNOWN = Ceilings({torch.float32: 1e11, torch.bfloat16: 1e11}, 1e10)


def in_time() -> bool:
    return False


def test_rows_and_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Run, "ceilings", lambda run: setattr(run.bench, "ceilings", KNOWN))
    report = gpu.bench_gpu(tmp_path, only=["values"], rehearse=True)
    assert (report["check"], report["finished"], report["rows"], report["gates"]) == ("passed", True, [], [])
    assert report["statistics"] is None
    assert [row["config"] for row in report["values"]] == ["llama-3-8b", "gpt-j-6b"]
    for row, load in zip(report["values"], TINY, strict=True):
        assert row["status"] == "measured", row["note"]
        assert row["shape"] == {"facts": load.facts, "steps": load.steps}
        assert row["steps"] == load.steps - 1  # nothing stopped
        assert row["facts_per_second"] == pytest.approx(load.facts / row["seconds"])
        assert row["ratio"] == pytest.approx(row["baseline_seconds_per_fact"] * row["facts_per_second"])
        assert row["floor_fraction"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        assert row["errors"].keys() == row["bounds"].keys() == {"losses", "movement"}
        assert all(error <= row["bounds"][name] for name, error in row["errors"].items())
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    page = (tmp_path / "gpu.md").read_text()
    assert page == markdown(report)
    assert "## Values" in page
    assert "| gpt-j-6b | facts=4 steps=3 | 2.0 |" in page
    assert [(t["name"], t["result"]) for t in report["targets"]] == [
        ("values, llama-3-8b", "not measured"), ("values, gpt-j-6b", "not measured"),
    ]  # fmt: skip


def test_what_is_wrong_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compare.serial_value
    monkeypatch.setattr(compare, "serial_value", lambda *args: replace(right(*args), loss=float("nan")))
    row = measure_values(TINY[0], CPU, KNOWN, in_time)
    assert (row["status"], row["note"]) == ("wrong", "losses apart by inf, at most 0.05 expected")
    assert "seconds" not in row
    monkeypatch.setattr(gpu, "measure_values", lambda *args: row)
    report = gpu.bench_gpu(tmp_path, only=["values"], rehearse=True)
    assert report["check"] == "failed"
    assert "wrong: losses apart by inf" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5], ids=["dead", "wrong sign", "half the rate"])
@pytest.mark.parametrize("load", TINY, ids=lambda load: load.config)
def test_a_wrong_optimiser_is_seen(monkeypatch: pytest.MonkeyPatch, load: Load, factor: float) -> None:
    """The last losses of random weights do not tell."""
    right = compare.optimise_values
    monkeypatch.setattr(
        compare,
        "optimise_values",
        lambda model, facts, contexts, hparams, *rest: right(
            model, facts, contexts, hparams.model_copy(update={"v_lr": factor * hparams.v_lr}), *rest
        ),
    )
    monkeypatch.setattr(gpu_values, "BOUND", 1.0)
    row = measure_values(load, CPU, KNOWN, in_time)
    assert row["status"] == "wrong"
    assert row["note"].startswith("movement apart by ")


def test_nothing_to_compare_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "movement", lambda *args: [])
    row = measure_values(TINY[0], CPU, KNOWN, in_time)
    assert (row["status"], row["note"]) == ("wrong", "no fact had to move: nothing was compared")


@pytest.mark.parametrize(
    ("failure", "status", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "not measured", "out of memory: CUDA out of memory"),
        (RuntimeError("unheard of\nmore"), "wrong", "RuntimeError: unheard of"),
    ],
)
def test_a_failure_is_said(monkeypatch: pytest.MonkeyPatch, failure: Exception, status: str, note: str) -> None:
    def broken(*args: Any) -> None:
        raise failure

    monkeypatch.setattr(compare, "optimise_values", broken)
    row = measure_values(TINY[0], CPU, KNOWN, in_time)
    assert (row["status"], row["note"]) == (status, note)


def test_what_does_not_fit_the_budget_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = gpu.bench_gpu(tmp_path, only=["values"], rehearse=True, budget=1e-9)
    assert [row["note"] for row in report["values"]] == [LATE, LATE]
    assert LATE in (tmp_path / "gpu.md").read_text()
    times = iter([False, True])  # over once the sample has been run
    row = measure_values(TINY[0], CPU, KNOWN, lambda: next(times))
    assert (row["status"], row["note"]) == ("not measured", LATE)


def test_without_transformers() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch; from rewire.bench.gpu_values import *\n"
        "row = measure_values(TINY[0], torch.device('cpu'), Ceilings(), lambda: False)\n"
        "print(row['status'], row['note'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.stdout.startswith("not measured needs transformers"), done.stderr


def test_the_target() -> None:
    row = gpu_values.unmeasured(LARGE[0], "") | {"status": "measured", "facts_per_second": 16.1}
    assert targets.judge_values([]) == []
    for changes, result in (
        ({}, "met"), ({"facts_per_second": 15.9}, "missed"), ({"status": "wrong"}, "not measured"),
        ({"shape": {"facts": 4, "steps": 25}}, "not measured"),
    ):  # fmt: skip
        (entry,) = targets.judge_values([row | changes])
        assert entry["result"] == result, changes
    assert [load.config for load in LARGE] == ["llama-3-8b", "gpt-j-6b"]
    assert all({"facts": load.facts, "steps": load.steps} == targets.VALUES and load.few == 16 for load in LARGE)
    assert all(load.sizes is None for load in LARGE)  # the published ones
