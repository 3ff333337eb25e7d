"""`rewire plan` through the entry point."""

from pathlib import Path

import pytest

from commands import FACTS, Command, complaint
from rewire.bench import ceilings
from rewire.bench.ceilings import Ceilings


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # tables as wide as they are
    own = ceilings.quick
    monkeypatch.setattr(ceilings, "quick", lambda device, dtypes: own(device, dtypes, seconds=0.01))


def test_json(run: Command) -> None:
    done = run("plan", "demo", FACTS, "--device", "cpu", "--tokens", 5000, "--set", "layers=[2, 3]", "--json")
    assert done.status == 0, done.err
    report = done.json
    assert [phase["name"] for phase in report["phases"]] == ["model", "statistics", "values", "keys", "solve", "apply"]
    assert (report["model"], report["layers"], report["tokens"], report["device"]) == (
        "rewire/demo",
        [2, 3],
        5000,
        "cpu",
    )
    assert report["facts"] == len(Path(FACTS).read_text().splitlines())
    assert report["fits"]
    assert report["need"]["cpu"] < report["free"]["cpu"]
    assert report["need"]["device"] == 0
    assert all(phase["seconds"] > 0 for phase in report["phases"][1:])
    assert report["rates"].keys() == {"product float32", "product float64", "copy uint8"}
    model, *others = report["phases"]
    assert report["need"]["cpu"] == model["cpu_bytes"] + max(phase["cpu_bytes"] for phase in others)


def test_table(run: Command) -> None:
    shown = run("plan", "demo", "--facts", 7, "--method", "alphaedit", "--device", "cpu")
    assert shown.status == 0, shown.err
    assert shown.out.startswith("rewire/demo on cpu: alphaedit, layers [1, 2, 3], hparams/alphaedit/demo.yaml")
    for said in ("7 facts", "eigenvectors", "needed at once", "float64 on the cpu", "about half a second", "it fits"):
        assert said in shown.out, said
    assert "device" not in shown.out.replace("--device", "")  # all of it is on the CPU
    assert "all of it for one pass without neighbours; evaluation is not in it" in shown.out


def test_iterations(run: Command) -> None:
    done = run("plan", "demo", "--facts", 7, "--iterations", 3, "--device", "cpu", "--json")
    assert done.json["iterations"] == 3
    shown = run("plan", "demo", "--facts", 7, "--iterations", 3, "--device", "cpu")
    assert "all of it for 3 passes without neighbours" in shown.out
    assert "--iterations" in complaint(run("plan", "demo", "--iterations", 0))


def test_what_does_not_fit_is_said(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewire.engine import plan

    monkeypatch.setattr(plan, "free_bytes", lambda device: 10**7)
    shown = run("plan", "demo", "--device", "cpu")
    assert shown.status == 0, shown.err
    assert "it does not fit; what helps:\n  cpu: " in shown.out
    assert "--dtype bfloat16: " in shown.out
    assert run("plan", "demo", "--device", "cpu", "--json").json["fits"] is False


def test_without_rates(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "quick", lambda device, dtypes: Ceilings())
    assert run("plan", "demo", "--device", "cpu", "--json").json["phases"][1]["seconds"] is None
    assert run("plan", "demo", "--device", "cpu").status == 0


def test_wrong_input(run: Command, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert complaint(run("plan", absent)).startswith(f"{absent}: no model there")
    assert "layers [9] out of range" in complaint(run("plan", "demo", "--set", "layers=[9]"))
    assert "unknown method 'menit'; did you mean 'memit'?" in complaint(run("plan", "demo", "--method", "menit"))
    assert f"{absent}.jsonl" in complaint(run("plan", "demo", f"{absent}.jsonl"))
    assert complaint(run("plan", "demo", "--quantize", "q4")).startswith("quantize 'q4' is unknown; expected nf4")
    assert complaint(run("plan", "demo", "--dtype", "int4")).startswith("dtype 'int4' is unknown")
    assert "unknown hyper-parameter 'laers'; did you mean 'layers'?" in complaint(
        run("plan", "demo", "--set", "laers=1")
    )


def test_nothing_is_loaded(run: Command, tmp_path: Path) -> None:
    """A config alone is enough."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 48, "n_embd": 1600, "n_head": 25}'
    )
    done = run("plan", tmp_path, "--preset", "gpt2-xl", "--device", "cpu", "--json")
    assert done.status == 0, done.err
    assert done.json["phases"][0]["what"] == "1,558 M parameters in float32"


def test_help_has_an_example(run: Command) -> None:
    assert "Example: rewire plan " in run("plan", "--help").out
