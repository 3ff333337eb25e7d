"""`rewire run --mode` through the entry point: the lines, the document, a file of keys, what is wrong, interrupted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rewire
from commands import FACTS, Command, complaint
from rewire.cli import common
from rewire.engine.experiment import run as experiment

FAST = ("layers=[1, 2]", "v_num_grad_steps=3", "mom2_tokens=1600", "mom2_max_length=64", "mom2_update_weight=20")
SETTINGS = [word for setting in FAST for word in ("--set", setting)]
FOLDER = "MEMIT/demo/facts/N_3/S_0"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def words(tmp_path: Path, contexts: Path) -> list[object]:
    made = ["run", "--model", "demo", "--data", FACTS, "--num-edits", 3, *SETTINGS, "--contexts", contexts]
    return [*made, "--out", tmp_path / "out"]


def test_for_people(run: Command, words: list[object], tmp_path: Path) -> None:
    asked = (*words, "--mode", "sequential", "--checkpoints", 2, "--protocol", "counterfact")
    done = run(*asked)
    assert (done.status, done.err) == (0, "")
    *rows, took, last = done.out.splitlines()
    assert [line.partition(":")[0] for line in rows] == ["3 facts unedited", "2 facts edited", "3 facts edited"]
    names = [label for _, label in common.METRICS["counterfact"]]
    folder = tmp_path / "out" / FOLDER / "sequential-2" / "counterfact"
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert [part.rpartition(" %")[0].rpartition(" ")[0] for part in rows[2].partition(": ")[2].split(", ")[:2]] == [
        *names[:2]
    ]
    assert f"efficacy {common.percent(metrics['efficacy_success'])}, " in rows[2]
    assert "magnitude" not in rows[2]
    assert took.startswith("edited in ")
    assert last == f"written to {folder}; rewire report {folder} makes a page of it"
    page = run("report", folder, "--json")
    assert page.status == 0, page.err
    assert "retention" in (folder / "report.html").read_text()
    again = run(*asked)  # finished: the same lines, nothing measured
    assert (again.status, again.out) == (0, done.out)


def test_for_machines_and_from_a_file(run: Command, words: list[object], tmp_path: Path) -> None:
    done = run(*words, "--mode", "single", "--protocol", "wild", "--context", "question-only", "--json")
    assert done.status == 0
    assert done.err.count("\n") == 1  # who judges
    said = done.json
    assert said.keys() == {"out", "iterations", "seconds"}
    folder = tmp_path / "out" / FOLDER / "single" / "wild-question-only"
    assert said["out"] == str(folder)
    unedited, edited = said["iterations"]
    assert [(row["number"], row["facts"]) for row in (unedited, edited)] == [(0, 3), (1, 3)]
    assert unedited["metrics"]["locality"] is None
    assert edited["metrics"]["locality"] is not None
    assert edited["seconds"].keys() == {"edit", "evaluate"}
    again = run("run", folder / "experiment.yaml", "--json")  # its own record of itself
    assert again.json["iterations"] == said["iterations"]


def test_what_is_wrong(run: Command, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before the model is loaded and before anything is written."""

    def load(*_: Any) -> rewire.Model:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(common, "load", load)
    file = tmp_path / "mode.yaml"
    file.write_text("mode: singles\nprotocol: wild\n")
    wrong: list[tuple[list[object], str]] = [
        ([*words, "--mode", "single"], "mode single: say which protocol: wild, synthetic, counterfact, zsre or ripple"),
        ([*words, "--protocol", "wild"], "protocol wild is of a mode; say mode: single, sequential or batch"),
        ([*words, "--mode", "singel"], "--mode: 'singel' found, expected 'single', 'sequential' or 'batch'"),
        ([*words, "--mode", "batch", "--protocol", "wild", "--context", "qa"], "unknown context 'qa'; "),
        ([*words, "--mode", "batch", "--protocol", "zsre", "--only-wrong"], "only_wrong needs generated answers"),
        ([*words, "--mode", "batch", "--protocol", "zsre", "--judge", "llm"], "judge is of generated answers"),
        ([*words, "--mode", "single", "--protocol", "zsre", "--summarize"], "mode single is summed up as it runs"),
        ([*words, "--mode", "single", "--protocol", "wild", "--checkpoints", 2], "single edits never meet each other"),
        ([*words[:1], file, *words[1:]], f"{file}: mode: 'singles' found, expected 'single', 'sequential' or 'batch'"),
    ]
    for asked, said in wrong:
        assert said in complaint(run(*asked))
    assert not (tmp_path / "out").exists()


def test_interrupted(run: Command, words: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a checkpoint: what is measured is said, and the same command goes on."""
    asked = (*words, "--mode", "batch", "--batch", 1, "--checkpoints", 1, "--protocol", "synthetic")
    begun: Callable[..., Path] = experiment.run

    def run_some(wanted: Any, listener: Any, tell: Callable[[Any], None], load: Any) -> Path:
        def told(row: Any) -> None:
            tell(row)
            if row["number"] == 1:
                raise KeyboardInterrupt

        return begun(wanted, listener, told, load)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", run_some)
        done = run(*asked)
    assert done.status == 3
    assert [line.partition(":")[0] for line in done.out.splitlines()] == ["3 facts unedited", "1 fact edited"]
    assert done.err == "rewire: interrupted, 1 step measured; given again, the same command goes on\n"
    again = run(*asked)
    assert again.status == 0, again.err
    assert [line.partition(":")[0] for line in again.out.splitlines()[:-2]] == [
        *("3 facts unedited", "1 fact edited", "2 facts edited", "3 facts edited")
    ]
    assert again.out.splitlines()[:2] == done.out.splitlines()[:2]
