"""The command in this process, and small things to hand it."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rewire
from commands import FACTS, Command, Run
from rewire import cli


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """run("edit", "demo", ...) in this process, by the function that the installed script calls."""
    log = logging.getLogger("rewire")
    handlers, propagate, threads = log.handlers, log.propagate, torch.get_num_threads()
    monkeypatch.delenv("COLUMNS", raising=False)  # of the shell that the tests run in
    torch.set_num_threads(1)  # many small models: on a busy machine threads spend most of their time waiting

    def run(*words: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["rewire", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Run(left.value.code, out, err)

    yield run
    log.handlers, log.propagate = handlers, propagate
    torch.set_num_threads(threads)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """Few steps on few tokens; small lambda, so that weights move."""
    path = tmp_path / "fast.yaml"
    path.write_text(
        "layers: [1, 2]\nv_num_grad_steps: 5\nmom2_tokens: 1600\nmom2_max_length: 64\nmom2_update_weight: 50\n"
    )
    return path


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    path = tmp_path / "contexts.json"
    path.write_text('["The ferry waits. {}", "You see. {}"]')
    return path


@pytest.fixture
def edit(run: Command, preset: Path, contexts: Path, tmp_path: Path) -> Command:
    """`rewire edit demo FACTS --out tmp/out` with options; `model` and `facts` may be others."""

    def edit(*options: object, model: object = "demo", facts: object = FACTS, limit: int = 3) -> Run:
        fast = ("--preset", preset, "--contexts", contexts, "--limit", limit)
        return run("edit", model, facts, *fast, "--out", tmp_path / "out", *options)

    return edit


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model directory with the demo's shape and other weights."""
    model = rewire.load("demo")
    with torch.no_grad():
        model.hf.get_submodule(model.anatomy.norm).weight.mul_(1.5)
    model.hf.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"
