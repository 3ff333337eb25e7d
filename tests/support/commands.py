"""Running `rewire` in a test, and what it said."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rewire.engine.model import demo_file

FACTS = str(demo_file("facts.jsonl"))


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document without NaN and nothing else."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


Command = Callable[..., Run]


def start(*words: object) -> subprocess.Popen[str]:
    """The installed script, in a process of its own."""
    script = Path(sys.executable).with_name("rewire")
    return subprocess.Popen(
        [str(script), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def installed(*words: object) -> Run:
    process = start(*words)
    out, err = process.communicate(timeout=120)
    return Run(process.returncode, out, err)


def complaint(done: Run) -> str:
    """What is said about wrong input: one line on stderr, nothing on stdout, status 2."""
    assert done.status == 2, done
    assert done.out == ""
    assert done.err.startswith("rewire: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    return done.err.removeprefix("rewire: ").rstrip("\n")
