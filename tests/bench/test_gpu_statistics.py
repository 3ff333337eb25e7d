"""The section "statistics" of `bench gpu`, walked on the CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewire.bench import gpu, gpu_statistics, stats, targets
from rewire.bench.ceilings import Ceilings
from rewire.bench.gpu_report import markdown
from rewire.bench.gpu_statistics import LLAMA3_8B, PROJECTED, TINY, measure_statistics
from rewire.engine.outline import model_shape
from rewire.kernels.floors import ModelShape

CPU = torch.device("cpu")
KNOWN = Ceilings({torch.float32: 1e11, torch.bfloat16: 1e11}, 1e10)


def test_a_row_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Run, "ceilings", lambda run: setattr(run.bench, "ceilings", KNOWN))
    report = gpu.bench_gpu(tmp_path, only=["statistics"], rehearse=True)
    assert (report["check"], report["finished"], report["rows"], report["gates"]) == ("passed", True, [], [])
    row = report["statistics"]
    assert row["status"] == "measured"
    assert row["shape"] == {"d": 96, "layers": 2, "tokens": TINY.tokens}
    assert row["tokens_per_second"] == pytest.approx(TINY.tokens / row["seconds"])
    assert row["floor_fraction"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    each = row["floor_seconds"] / TINY.tokens / row["streaming_fraction"]
    assert row["projected_seconds"] == pytest.approx(row["seconds"] + each * (PROJECTED - TINY.tokens))
    assert 0 < row["error"] < row["bound"]
    page = (tmp_path / "gpu.md").read_text()
    assert page == markdown(report)
    assert "random weights, 2 of 4 blocks" in page
    assert "seconds for 44 M tokens (projected)" in page
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    assert [(t["name"], t["result"]) for t in report["targets"]] == [("statistics", "not measured")]


def test_what_is_wrong_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "difference", lambda *args: float("nan"))
    row = measure_statistics(TINY, CPU, KNOWN)
    assert row["status"] == "wrong"
    assert "seconds" not in row
    monkeypatch.setattr(gpu, "measure_statistics", lambda *args: row)
    report = gpu.bench_gpu(tmp_path, only=["statistics"], rehearse=True)
    assert report["check"] == "failed"
    assert "wrong: error nan, at most 2e-02 expected" in (tmp_path / "gpu.md").read_text()


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

    monkeypatch.setattr(stats, "collected", broken)
    row = measure_statistics(TINY, CPU, KNOWN)
    assert (row["status"], row["note"]) == (status, note)


def test_what_does_not_fit_the_budget_is_said(tmp_path: Path) -> None:
    report = gpu.bench_gpu(tmp_path, only=["statistics"], rehearse=True, budget=1e-9)
    assert report["statistics"]["note"] == gpu.LATE
    assert gpu.LATE in (tmp_path / "gpu.md").read_text()


def test_without_transformers() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch; from rewire.bench.gpu_statistics import *\n"
        "row = measure_statistics(TINY, torch.device('cpu'), Ceilings()); print(row['status'], row['note'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.stdout == "not measured needs transformers\n", done.stderr


def test_the_target() -> None:
    row = {"shape": dict(targets.STATISTICS), "status": "measured", "floor_fraction": 0.71}
    assert targets.judge_statistics(None) == []
    for changes, result in (
        ({}, "met"), ({"floor_fraction": 0.69}, "missed"), ({"floor_fraction": None}, "not measured"),
        ({"status": "wrong"}, "not measured"), ({"shape": {"d": 96}}, "not measured"),
    ):  # fmt: skip
        (entry,) = targets.judge_statistics(row | changes)
        assert entry["result"] == result, changes
    assert targets.judge_statistics({"status": "not measured", "note": gpu.LATE})[0]["result"] == "not measured"


def test_the_large_load_is_llama_3_8b() -> None:
    """Its blocks, and those layers and tokens that the target is about."""
    from transformers import LlamaConfig

    model = stats.random_model(LlamaConfig(**LLAMA3_8B.config), "llama", "meta", torch.bfloat16)
    block = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert model_shape(model) == ModelShape(9, block, 4096, 4096, 14336, 128256)
    assert {"d": 14336, "layers": len(LLAMA3_8B.layers), "tokens": LLAMA3_8B.tokens} == targets.STATISTICS
    assert LLAMA3_8B.layers[-1] == 9 - 1
    rows = stats.random_rows(LLAMA3_8B.tokens, LLAMA3_8B.longest, 1000)
    lengths = [len(row) for row in rows.held]
    assert sum(lengths) == LLAMA3_8B.tokens
    assert sum(lengths) / len(lengths) == pytest.approx(440, rel=0.02)
    few = len(lengths) * LLAMA3_8B.few // LLAMA3_8B.tokens
    assert sum(lengths[:few]) >= 2 * 14336  # fewer are refused
    assert gpu_statistics.PROJECTED == 44_000_000
