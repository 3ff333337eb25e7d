"""`rewire bench` through the entry point."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands import FACTS, Command, complaint
from rewire.bench import compare, gpu, kernels, shapes, table, throughput
from rewire.bench import stats as statistics
from rewire.bench.ceilings import TINY, Ceilings

SMALL = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1536, "n_positions": 128}
SETTINGS = {"layers": [0, 1], "v_lr": 0.1, "mom2_update_weight": 20.0}
QUICK = ("--seconds", "0.01", "--device", "cpu", "--dtype", "float32", "--only", "small_solve")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", TINY)


def test_kernels_csv_and_plot(run: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    csv, out = tmp_path / "k.csv", tmp_path / "pictures"
    done = run("bench", "kernels", *QUICK, "--csv", csv, "--json")
    assert done.status == 0, done.err
    report = done.json
    assert report["check"] == "passed"
    for row in report["rows"]:
        assert row.keys() >= {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}
        assert (row["name"], row["dtype"]) == ("small_solve", "float32")
    assert {row["provider"] for row in report["rows"]} >= {"torch", "plain"}
    assert len(table.read(csv)) == len(report["rows"])

    shown = run("bench", "kernels", *QUICK, "--csv", csv)
    assert shown.status == 0, shown.err
    assert "check passed" in shown.out
    assert "small_solve" in shown.out
    assert "not measured: small_solve by triton: " in shown.out
    assert len(table.read(csv)) == len(report["rows"])

    plotted = run("bench", "plot", csv, "--out", out)
    assert plotted.status == 0, plotted.err
    assert [Path(line) for line in plotted.out.splitlines()] == sorted(out.iterdir(), reverse=True)
    assert run("bench", "plot", csv, "--out", out, "--json").json["written"] == plotted.out.split("\n")[:-1]


def test_a_failed_check_is_status_1(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gate", lambda *args: "error 1.0e+00, plain torch 1.0e-07")
    done = run("bench", "kernels", *QUICK)
    assert done.status == 1
    assert "check failed" in done.out
    assert "wrong: small_solve by torch: at batch 5, n 7, k 3: error 1.0e+00" in done.out


def test_solve(run: Command) -> None:
    done = run("bench", "solve", "--d", "128", "--n", "8", "--device", "cpu", "--json")
    assert done.status == 0, done.err
    assert done.json["check"] == "passed"
    assert len(done.json["rows"]) == 3
    shown = run("bench", "solve", "--d", "128", "--n", "8", "--device", "cpu")
    assert "check passed: condition at least" in shown.out
    assert "alphaedit: push-through" in shown.out
    wrong = run("bench", "solve", "--d", "128", "--n", "32")
    assert complaint(wrong) == "--n 32: expected fewer than a quarter of --d 128; more are solved as one dense system"


def test_stats(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "REPEATS", 1)
    quick = ("bench", "stats", "demo", "--layers", "1,2", "--tokens", "1600", "--device", "cpu")
    done = run(*quick, "--json")
    assert done.status == 0, done.err
    report = done.json
    assert report["check"] == "passed"
    assert report["modules"] == ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    for row in report["rows"]:
        assert row.keys() >= {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}
    monkeypatch.setitem(statistics.BOUNDS, torch.float32, 1e-12)
    shown = run(*quick, "--dtype", "float32")
    assert shown.status == 1
    assert "check failed" in shown.out
    assert "float32: furthest from the published structure by " in shown.out


def test_stats_of_wrong_input(run: Command) -> None:
    assert complaint(run("bench", "stats", "demo", "--dtype", "float16")) == (
        "--dtype float16: expected float32 or bfloat16"
    )
    assert complaint(run("bench", "stats", "demo", "--layers", "3,x")).startswith("--layers 3,x: expected numbers")
    assert complaint(run("bench", "stats", "demo", "--layers", "7")) == "layer 7: the model has layers 0 to 4"
    assert "no such corpus" in complaint(run("bench", "stats", "demo", "--corpus", "nonesuch.txt"))
    said = complaint(run("bench", "stats", "demo", "--tokens", "100", "--layers", "1"))
    assert "width 736 needs at least 1472" in said


def test_throughput(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(throughput, "quick", lambda *args, **kwargs: Ceilings({torch.float32: 1e11}, 1e10))
    monkeypatch.setitem(shapes.SHAPES, "gpt2", replace(shapes.SHAPES["gpt2"], sizes=SMALL, settings=SETTINGS))
    quick = ("bench", "throughput", "--facts", "3", "--serial", "2", "--steps", "3", "--device", "cpu")
    done = run(*quick, "--config", "gpt2", "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    report = done.json
    assert report["check"] == "passed"
    assert (report["facts"], report["serial_facts"], report["layers"]) == (3, 2, [0, 1])
    assert report["steps"] == 2.0  # of three forwards the last one is only looked at
    for row in report["rows"]:
        assert row.keys() >= {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}
    assert json.loads((tmp_path / "out" / "throughput.json").read_text()) == report
    assert (tmp_path / "out" / "throughput.png").is_file()

    table = run(*quick, "demo")
    assert table.status == 0, table.err
    assert "statistics" in table.out
    assert "given: synthetic" in table.out
    assert "facts/s" in table.out

    monkeypatch.setitem(compare.BOUNDS, torch.float32, compare.Bounds(*[1e-12] * 5))
    shown = run(*quick, "--data", FACTS)
    assert shown.status == 1
    assert "gpt2 by its shape, random weights: check failed" in shown.out
    assert "update: furthest from the serial baseline by " in shown.out
    assert "facts/s" not in shown.out
    assert "near-tie" not in shown.out
    monkeypatch.setitem(compare.NEAR_TIE, torch.float32, 1e3)
    shown = run(*quick, "demo")
    assert shown.status == 1
    assert "every sampled fact is a near-tie of the stop: no value was compared; try --serial, " in shown.out


def test_throughput_of_wrong_input(run: Command, tmp_path: Path) -> None:
    for words, said in (
        (("--config", "lama-3-8b"), "--config lama-3-8b: no such shape; did you mean 'llama-3-8b'?"),
        (("--config", "zzz"), "--config zzz: no such shape; there are gpt2, gpt2-xl, gpt-j-6b, llama-3-8b, qwen2.5-7b"),
        (("--method", "memitt"), "unknown method 'memitt'; did you mean 'memit'?"),
        (("--method", "alphaedit"), "--method alphaedit: expected memit: the serial baseline is MEMIT's"),
        (("demo", "--config", "gpt2"), "MODEL demo and --config gpt2: expected one of them"),
        (("demo", "--dtype", "float16"), "--dtype float16: expected float32 or bfloat16"),
        (("demo", "--facts", "9999"), "--facts 9999: 7887 can be made; name a file of more by --data"),
    ):
        assert complaint(run("bench", "throughput", *words)) == said
    (tmp_path / "file").write_text("")
    assert "a file; expected a folder" in complaint(run("bench", "throughput", "demo", "--out", tmp_path / "file"))


def test_gpu_rehearsal(run: Command, tmp_path: Path) -> None:
    done = run("bench", "gpu", "--rehearse", "--only", "small_solve", "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    assert done.json == json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert done.json["rehearsal"]
    assert " s  gates " in done.err  # what it is doing
    shown = run("bench", "gpu", "--rehearse", "--only", "small_solve", "--out", tmp_path / "out", "--budget", "1e-9")
    assert shown.status == 0, shown.err
    assert shown.out.startswith(f"# {done.json['about']['device']}\n")
    assert gpu.LATE in shown.out
    assert "export REWIRE_TUNED=" in shown.out


def test_wrong_input(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = complaint(run("bench", "gpu", "--out", tmp_path / "out"))
    assert said.startswith("no GPU: torch ")
    assert "rewire bench kernels" in said
    assert not (tmp_path / "out").exists()
    assert "no operation 'gramm_'; expected one of " in complaint(run("bench", "kernels", "--only", "gramm_"))
    assert complaint(run("bench", "kernels", "--dtype", "int8")).startswith("dtype 'int8'; expected one of ")
    assert complaint(run("bench", "kernels", "--device", "tpu")).startswith("device 'tpu'; expected auto, cpu")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert complaint(run("bench", "kernels", "--csv", other)).startswith(f"{other}: no column 'operation'")
    assert complaint(run("bench", "plot", other, "--out", tmp_path)).startswith(f"{other}: no column 'operation'")
    assert "No such file" in complaint(run("bench", "plot", tmp_path / "absent.csv", "--out", tmp_path))


@pytest.mark.parametrize("verb", ["throughput", "stats", "kernels", "gpu", "plot"])
def test_help_has_an_example(run: Command, verb: str) -> None:
    done = run("bench", verb, "--help")
    assert done.status == 0
    assert f"Example: rewire bench {verb} " in " ".join(done.out.split())
