"""Answers on disk: an evaluation that was killed goes on, with the same result, and nothing is asked twice."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from rewire.engine import answer_store
from rewire.engine.answer_store import AnswerStore
from rewire.engine.delta import Factors
from rewire.engine.evaluation import evaluate
from rewire.engine.model import demo_file

# a process that evaluates as a user's, puts each answer on disk at once, and takes its time
EVALUATION = """
import sys, time, torch, rewire
from rewire.engine import answer_store
from rewire.engine.model import demo_file
torch.set_num_threads(1)
answer_store.FLUSH = -1.0
model = rewire.load("demo")
facts = rewire.read_facts(demo_file("facts.jsonl"), limit=int(sys.argv[2]))
def tick(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[3]))
with answer_store.AnswerStore.of(model) as store:
    rewire.evaluate(model, facts, sys.argv[1], batch_size=2, store=store, progress=tick)
"""


def run(protocol: str, facts: int, seconds: float) -> "subprocess.Popen[str]":
    """seconds: that it waits behind each batch"""
    return subprocess.Popen(
        [sys.executable, "-c", EVALUATION, protocol, str(facts), str(seconds)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def folders() -> list[Path]:
    return sorted(Path(os.environ["REWIRE_CACHE"]).glob("answers/*"))


def lines(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            key, value = json.loads(line)
            found[key] = value
    return found


@pytest.fixture
def facts() -> list[rewire.Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=12)


class Counted:
    """What the model is really asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        for name in ("token_scores", "continue_each"):
            real = getattr(rewire.engine.asked, name)
            monkeypatch.setattr(rewire.engine.asked, name, lambda *a, real=real, **o: self.count(real, *a, **o))

    def count(self, real: Any, model: rewire.Model, asked: Sequence[Any], *args: Any, **options: Any) -> Any:
        self.rows += len(asked)
        return real(model, asked, *args, **options)


def test_goes_on_after_kill(demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = "wild"
    counted = Counted(monkeypatch)
    whole = evaluate(demo, facts, protocol, batch_size=2)
    total = counted.rows
    process = run(protocol, 12, 0.05)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= total // 3:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (folder,) = folders()
    kept = len(lines(folder))
    assert 0 < kept < total
    counted.rows = 0
    with AnswerStore.of(demo) as store:
        assert store.folder == folder
        assert len(store.known) == kept
        again = evaluate(demo, facts, protocol, batch_size=2, store=store)
    assert counted.rows == total - kept
    assert again["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)
    assert len(list(folder.iterdir())) == 1
    assert len(lines(folder)) == total
    counted.rows = 0
    with AnswerStore.of(demo) as store:
        third = evaluate(demo, facts, protocol, store=store)
    assert counted.rows == 0
    assert third == again  # to the last bit: from the disk, or as it came


def test_broken_lines_are_no_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    good = json.dumps(["a", [1, "stop"]])
    torn = ['["b", [2, "st', '["b"', "12", "null", '"text"', "[[1], 2]", "[1]", "[1, 2, 3]", "", "\0\0\0\0"]
    (folder / "part-1.jsonl").write_bytes("\n".join([good, *torn]).encode())
    (folder / "part-2.jsonl").write_bytes(b'["c", 3]\n["d", \xff\xfe')
    (folder / "part-3.jsonl.0a.17.tmp").write_bytes(b'["e", 5]\n')  # of a process that was killed as it wrote
    with AnswerStore(folder) as store:
        assert {key: store.get(key) for key in "abcde" if store.get(key)} == {"a": [1, "stop"], "c": 3}
        store.add({"b": "é\u2028\u0085\n"})
    assert AnswerStore(folder).known | {} == {"a": [1, "stop"], "b": "é\u2028\u0085\n", "c": 3}
    assert len(list(folder.glob("*.jsonl"))) == 1


def test_a_folder_that_cannot_be_written_to_is_said_once(
    demo: rewire.Model, facts: list[rewire.Fact], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted = evaluate(demo, facts[:2])
    monkeypatch.setattr(answer_store, "FLUSH", -1.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "file"))
    with AnswerStore.of(demo) as store:
        assert evaluate(demo, facts[:2], store=store, batch_size=1)["metrics"] == pytest.approx(wanted["metrics"])
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith(f"{tmp_path / 'file'}")
    assert "answers are not kept; set REWIRE_CACHE" in said


def test_a_disk_that_fills_up_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two earlier runs left stays, and is not put together."""
    for name in ("a", "b"):
        store = AnswerStore(tmp_path / "x")
        store.add({name: 1})
        with pytest.raises(RuntimeError), store:
            raise RuntimeError
    before = lines(tmp_path / "x")
    assert before == {"a": 1, "b": 1}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answer_store, "write_whole", full)
    for keep in (True, False):
        caplog.clear()
        with AnswerStore(tmp_path / "x", keep) as store:
            store.add({"c": 1})
            store.flush()
            store.add({"d": 1})
            store.flush()
            assert {key: store.get(key) for key in "abcde" if store.get(key)} == {"a": 1, "b": 1, "c": 1, "d": 1}
        assert len(caplog.records) == 1
        assert lines(tmp_path / "x") == before


def test_what_nobody_asks_again_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    store = AnswerStore(folder, keep=False)
    store.add({"a": 1})
    with pytest.raises(KeyboardInterrupt), store:
        raise KeyboardInterrupt
    assert lines(folder) == {"a": 1}  # of one that was interrupted it stays
    with AnswerStore(folder, keep=False) as store:
        assert store.get("a") == 1
        store.add({"b": 2})
    assert not folder.exists()
    with AnswerStore(folder, keep=False) as store:
        store.add({"a": 1})
    assert not folder.exists()


def test_what_another_evaluation_was_interrupted_with_stays(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    store = AnswerStore(folder, keep=False)
    store.add({"a": 1, "b": 2})
    with pytest.raises(KeyboardInterrupt), store:
        raise KeyboardInterrupt
    with AnswerStore(folder, keep=False) as store:
        assert (store.get("b"), store.get("c")) == (2, None)
        store.add({"c": 3})
    assert lines(folder) == {"a": 1}


def test_another_model_has_another_folder(demo: rewire.Model) -> None:
    first = AnswerStore.of(demo).folder
    assert AnswerStore.of(rewire.load("demo")).folder == first
    found = {first}

    def other() -> None:
        folder = AnswerStore.of(demo).folder
        assert folder not in found
        found.add(folder)

    hf: Any = demo.hf
    weight = hf.get_parameter(demo.anatomy.weight_name(3))
    with torch.no_grad():
        weight[5, 7] += 1e-3
        other()
        weight[5, 7] -= 1e-3
    hf.generation_config.eos_token_id = [0, 9]  # where answers end
    other()
    hf.to(torch.bfloat16)
    other()


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each began before the other put anything on disk; each puts its files together at its end."""
    folder = tmp_path / "x"
    one, other = AnswerStore(folder), AnswerStore(folder)
    for store, names in ((one, "ab"), (other, "cd")):
        for name in names:
            store.add({name: name})
            store.flush()
    with one:
        one.add({"e": "e"})
    assert lines(folder) == {name: name for name in "abcde"}
    with other:
        other.add({"f": "f"})
    assert lines(folder) == {name: name for name in "abcdef"}
    assert len(list(folder.iterdir())) == 1


def test_two_processes_at_once(demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_store, "FLUSH", -1.0)
    with AnswerStore.of(demo) as store:
        process = run("synthetic", 4, 0.01)
        assert process.stdout is not None
        assert next(process.stdout)  # it is at it
        evaluate(demo, facts[:4], "zsre", store=store, batch_size=2)
        process.communicate(timeout=120)
    assert process.returncode == 0
    counted = Counted(monkeypatch)
    with AnswerStore.of(demo) as store:
        for protocol in ("synthetic", "zsre"):
            evaluate(demo, facts[:4], protocol, store=store)
    assert counted.rows == 0
    (folder,) = folders()
    assert not list(folder.glob("*.tmp"))


def test_answers_are_flushed_as_time_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = AnswerStore(tmp_path / "x")
    store.add({"a": 1})
    assert not (tmp_path / "x").exists()
    now[0] += answer_store.FLUSH + 1
    store.add({"b": 1})
    assert lines(tmp_path / "x") == {"a": 1, "b": 1}
    now[0] += 1
    store.add({"c": 1})
    assert len(lines(tmp_path / "x")) == 2


def test_deltas_are_asked_for_themselves(
    demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder of the weights; what a fact's own delta says has keys of its own."""
    counted = Counted(monkeypatch)
    weight = demo.anatomy.weight_name(2)
    shape = demo.hf.get_parameter(weight).shape
    chosen = torch.Generator().manual_seed(0)
    deltas = [
        {weight: Factors(torch.randn(shape[0], 1, generator=chosen) * 0.2, torch.randn(1, shape[1], generator=chosen))}
        for _ in range(2)
    ]
    two = facts[:2]
    plain, under = evaluate(demo, two), evaluate(demo, two, deltas=deltas)
    asked = counted.rows
    assert plain["facts"] != under["facts"]
    with AnswerStore.of(demo) as store:
        assert evaluate(demo, two, store=store)["facts"] == plain["facts"]
        assert evaluate(demo, two, deltas=deltas, store=store)["facts"] == under["facts"]
    assert counted.rows == 2 * asked
    with AnswerStore.of(demo) as store:
        assert evaluate(demo, two, deltas=deltas, store=store)["facts"] == under["facts"]
        evaluate(demo, two, deltas=deltas[::-1], store=store)
    assert counted.rows > 2 * asked  # the other way round they are other questions
