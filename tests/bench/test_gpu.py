"""`bench gpu` below the command line, walked on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subjects import double, subject, wrong_where
from torch import Tensor

from rewire.bench import gpu, kernels, table
from rewire.bench.check import Subject
from rewire.bench.gpu_report import markdown
from rewire.kernels import tuned
from rewire.kernels.dispatch import Operation, interpreting
from rewire.kernels.errors import InputError

pytestmark = pytest.mark.usefixtures("small_cache")


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
