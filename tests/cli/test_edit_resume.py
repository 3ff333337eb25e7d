"""`rewire edit` that is interrupted, started again, or run by several processes at once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from commands import FACTS, Command, complaint, start
from rewire import cli

STEPS = ("--set", "v_num_grad_steps=8", "--set", "v_lr=0.3")


def report(out: Path) -> Any:
    (edit,) = json.loads((out / "report.json").read_text())["edits"]
    return edit


def updates(out: Path) -> dict[str, torch.Tensor]:
    (update,) = rewire.Delta.load(out).updates
    return {name: factors.dense() for name, factors in update.items()}


def test_the_values_come_from_the_cache(edit: Command, tmp_path: Path) -> None:
    first = edit("--no-evaluate", "--json")
    assert first.status == 0, first.err
    values = first.json["values"]
    assert (values["facts"], values["optimised"], values["cached"], values["capacity"]) == (3, 3, 0, 3)
    assert values["facts_per_second"] == pytest.approx(3 / values["seconds"], rel=1e-2)
    assert report(tmp_path / "out")["values"] == values
    assert not any(fact["cached"] for fact in report(tmp_path / "out")["facts"])

    # another lambda and another method ask for the same values; another learning rate does not
    for number, (words, cached) in enumerate(
        [
            (("--set", "mom2_update_weight=99"), 3),
            (("--method", "alphaedit", "--set", "nullspace_threshold=0.01"), 3),
            (("--set", "v_lr=0.2"), 0),
        ]
    ):
        out = tmp_path / f"again{number}"
        again = edit("--no-evaluate", *words, "--out", out)
        assert again.status == 0, again.err
        assert report(out)["values"]["cached"] == cached
        assert ("values: all 3 from the cache" in again.out) == bool(cached), again.out
        assert sum(fact["cached"] for fact in report(out)["facts"]) == cached


def test_an_edited_model_has_values_of_its_own(demo: rewire.Model) -> None:
    facts = rewire.read_facts(FACTS, limit=2)
    settings = {"layers": [1, 2], "v_num_grad_steps": 4, "mom2_tokens": 1600}
    session = rewire.EditSession(demo, hparams=settings, contexts=("The end. {}",))
    cached = []
    for _ in range(2):
        cached.append(session.edit(facts, evaluate=False).report["values"]["cached"])
    session.undo(session.edits[-1].id)
    cached.append(session.edit(facts, evaluate=False).report["values"]["cached"])
    assert cached == [0, 0, 2], "an edit changed the weights, its undoing brought them back"


def test_killed_and_started_again(
    tmp_path: Path, preset: Path, contexts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delta is that of an edit that was never killed; Ctrl-C says how much is there, also in a round."""
    cache = Path(os.environ["REWIRE_CACHE"]) / "values"
    words = ("edit", "demo", FACTS, "--preset", preset, "--contexts", contexts, "--limit", 40, "--no-evaluate", *STEPS)
    words = (*words, "--batch-size", 8, "--out")
    for send, status in ((signal.SIGKILL, -9), (signal.SIGINT, 3)):
        process = start(*words, tmp_path / "often")
        before, end = set(cache.rglob("*.safetensors")), time.monotonic() + 60
        while set(cache.rglob("*.safetensors")) <= before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(send)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert not (tmp_path / "often").exists()
    *_, there, said = err.splitlines()
    assert said == f"rewire: {cli.INTERRUPTED}"
    assert re.fullmatch(r"rewire: \d+ of 40 values are on disk, and how far others are", there)
    assert "goes on" in cli.INTERRUPTED
    process = start(*words, tmp_path / "often")
    assert process.wait(timeout=100) == 0
    assert 16 <= report(tmp_path / "often")["values"]["cached"] < 40
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "other"))
    process = start(*words, tmp_path / "once")
    assert process.wait(timeout=100) == 0
    assert report(tmp_path / "once")["values"]["cached"] == 0
    once, often = updates(tmp_path / "once"), updates(tmp_path / "often")
    for name, change in once.items():  # the rows of a round that was interrupted have others beside them now
        assert float((often[name] - change).norm() / change.norm()) < 1e-4


def test_two_processes(tmp_path: Path, preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun, with everything that an edit does; contexts are sampled, statistics collected."""
    script = Path(sys.executable).with_name("rewire")
    words = ["edit", "demo", FACTS, "--preset", preset, "--limit", 5, *STEPS, "--json", "--out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", script]
    command = [sys.executable, *launch, *words, tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["facts"] == 5
    assert said["after"] is not None
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "delta.safetensors", "ledger.jsonl", "report.json",
    ]  # fmt: skip
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "other"))
    process = start(*words, tmp_path / "one")
    assert process.wait(timeout=100) == 0
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    assert one["contexts"] == two["contexts"]
    assert [fact["steps"] for fact in one["facts"]] == [fact["steps"] for fact in two["facts"]]
    alone, shared = updates(tmp_path / "one"), updates(tmp_path / "two")
    for name, change in alone.items():
        assert float((shared[name] - change).norm() / change.norm()) < 1e-3
    assert two["after"] == pytest.approx(one["after"], abs=1e-3)


@pytest.mark.parametrize("size", ["0", "-3", "many", "2.5", ""])
def test_a_batch_size_that_is_none(edit: Command, size: str, tmp_path: Path) -> None:
    said = complaint(edit(f"--batch-size={size}"))
    assert said == f"--batch-size {size}: expected auto, or a whole number of facts from 1 on"
    assert not (tmp_path / "out").exists()


def test_a_batch_size_of_auto(edit: Command) -> None:
    done = edit("--no-evaluate", "--json", "--batch-size", "auto")
    assert done.json["values"]["capacity"] == 3, "as many as there are"
