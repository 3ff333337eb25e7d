"""Interrupted collections: killed at any moment and started again, they end at the same bits."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from rewire.stats.checkpoint import Checkpoint, Position
from rewire.stats.collect import Budget, Means, collect
from rewire.stats.ranks import ALONE

# what every process here computes: a table of keys, documents of ragged lengths, and a little time for each batch
WORK = """
import sys, time
from pathlib import Path
import numpy as np, torch
from rewire.stats import collect as module
from rewire.stats.collect import Budget, Means, collect
from rewire.stats.ranks import join
from rewire.stats.tokens import TokenRows
from rewire.stats import Corpus, read_corpus
from safetensors.torch import save_file

module.BLOCK = 400
widths = {"h.0": 40, "h.1": 300}
tables = {name: torch.randn(97, d, generator=torch.Generator().manual_seed(d)) for name, d in widths.items()}

def encode(texts):
    return [[len(word) for word in text.split()] for text in texts]

def run(rows, sink):
    ids = torch.from_numpy(np.concatenate(rows)).long()
    for name, table in tables.items():
        sink(name, table[ids])
    time.sleep(PAUSE)

def work(corpus, cache, checkpoint, out, ranks=None, **budget):
    rows = TokenRows(read_corpus(corpus), encode, seed=3, folder=Path(cache))
    found = collect(run, rows, widths, Budget(50, **budget), Means(128, True, PLACE, checkpoint_tokens=1),
                    ranks=ranks or module.ALONE, checkpoint=checkpoint and Path(checkpoint))
    if ranks is None or ranks.first:
        counts = {name + " count": torch.tensor([m.count, m.documents]) for name, m in found.items()}
        save_file({name: m.triangle for name, m in found.items()} | counts, out + ".tmp")
        Path(out + ".tmp").rename(out)
    else:
        assert found == {}, "memory for nothing"
"""


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.json"
    documents = [" ".join("x" * (1 + (i * j) % 96) for j in range(1 + (i * 13) % 61)) for i in range(300)]
    documents[5] = ""
    path.write_text(json.dumps(documents))
    return path


def script(tmp_path: Path, body: str, pause: float = 0.0, place: str = "device") -> Path:
    path = tmp_path / "work.py"
    head = WORK.replace("PAUSE", str(pause)).replace("PLACE", repr(place))
    path.write_text(head + textwrap.dedent(body))
    return path


def run(path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, str(path), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("place", "budget"), [("device", {}), ("disk", {"tokens": 7000}), ("cpu", {"documents": 290, "tolerance": 0.05})]
)
def test_killed_twenty_times(tmp_path: Path, words: Path, place: str, budget: dict[str, Any]) -> None:
    """`kill -9` at random moments; every start goes on where the last checkpoint stood."""
    budget = budget or {"documents": 280}
    body = f"""
    import os, random, signal
    budget = {budget!r}
    folder = {str(tmp_path)!r}
    # no torch work in this process before it forks
    chance, kills = random.Random(7), 0
    while True:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            work({str(words)!r}, folder + "/tokens", folder + "/rest", folder + "/killed", **budget)
            os._exit(0)
        if kills < 20:
            time.sleep(chance.uniform(0.02, 0.12))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        assert status == 0, status
        break
    print(kills)
    """
    killed = run(script(tmp_path, body, 0.01, place))
    assert int(killed.stdout) == 20, "the work was over before it could be killed so often"
    body = f"""
    torch.set_num_threads(1)
    work({str(words)!r}, {str(tmp_path / "other")!r}, None, {str(tmp_path / "whole")!r}, **{budget!r})
    """
    run(script(tmp_path, body, 0.0, place))
    once, often = load(tmp_path / "whole"), load(tmp_path / "killed")
    assert once.keys() == often.keys()
    if "tolerance" in budget:
        assert 20 < once["h.1 count"][1] < 250, "it settled, some looks after the first"
    for name, wanted in once.items():
        assert torch.equal(often[name], wanted), name


@pytest.mark.parametrize("budget", [{"tokens": 7000}, {"tolerance": 0.05}])
def test_one_two_and_three_processes(tmp_path: Path, words: Path, budget: dict[str, Any]) -> None:
    body = f"""
    import os
    torch.set_num_threads(1)
    ranks = join()
    assert ranks.world == int(os.environ.get("WORLD_SIZE", "1"))
    work({str(words)!r}, {str(tmp_path / "tokens")!r}, None, sys.argv[1], ranks=ranks, **{budget!r})
    """
    path = script(tmp_path, body)
    run(path, tmp_path / "1")
    for world in (2, 3):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        done = subprocess.run([*launch, str(path), str(tmp_path / str(world))], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one = load(tmp_path / "1")
    assert one["h.1 count"][0] >= 600
    if "tolerance" in budget:
        assert one["h.1 count"][1] < 250, "it settled: where, does not depend on the processes either"
    for world in (2, 3):
        for name, found in load(tmp_path / str(world)).items():
            wanted = one[name].double()
            assert float((found.double() - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max()), (world, name)


def test_ranks_that_are_killed_go_on(tmp_path: Path, words: Path) -> None:
    """Two processes, both killed when the first checkpoint is whole: the same two end at the same bits."""
    body = f"""
    import os
    torch.set_num_threads(1)
    if sys.argv[2] == "die":
        from rewire.stats import checkpoint
        save = checkpoint.Checkpoint.save
        def once(self, *args):
            save(self, *args)
            self.ranks.gather(0)
            os._exit(1)
        checkpoint.Checkpoint.save = once
    ranks = join()
    work({str(words)!r}, {str(tmp_path / "tokens")!r}, sys.argv[3], sys.argv[1], ranks=ranks, documents=280)
    """
    path = script(tmp_path, body)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
    rest = tmp_path / "rest"
    died = subprocess.run([*launch, str(tmp_path / "a"), "die", str(rest)], capture_output=True, text=True)
    assert died.returncode != 0
    assert sorted(path.name.split("-")[0] for path in rest.iterdir()) == ["rank0of2", "rank1of2"]
    for out, folder in (("a", rest), ("b", tmp_path / "none")):
        done = subprocess.run([*launch, str(tmp_path / out), "live", str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name, wanted in load(tmp_path / "b").items():
        assert torch.equal(load(tmp_path / "a")[name], wanted), name


def position(block: int) -> Position:
    return Position(block, 10 * block, block, 4, 128, True, "device")


def test_a_generation_counts_once_it_is_whole(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, ALONE)
    assert kept.load() is None
    assert kept.save(position(1), {"a": torch.arange(3.0)})
    assert kept.save(position(2), {"a": torch.arange(4.0)})
    assert [path.name for path in tmp_path.iterdir()] == ["rank0of1-2.safetensors"]
    (tmp_path / "rank0of1-3.safetensors").write_bytes((tmp_path / "rank0of1-2.safetensors").read_bytes()[:-5])
    found = kept.load()
    assert found is not None
    assert found[0] == position(2)
    assert torch.equal(found[1]["a"], torch.arange(4.0))


def test_temporary_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    dead, alive = (tmp_path / f"rank0of1-1.safetensors.{pid}.tmp" for pid in (process.pid, os.getpid()))
    for path in (dead, alive):
        path.write_text("")
    Checkpoint(tmp_path, ALONE).load()
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoint(tmp_path, ALONE)
    assert kept.save(position(1), {"a": torch.zeros(4)})

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rewire.stats.checkpoint.save_file", full)
    assert not kept.save(position(2), {"a": torch.ones(4)})
    assert "No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["rank0of1-1.safetensors"]
    found = kept.load()
    assert found is not None
    assert found[0].block == 1


def test_the_keyboards_interrupt_leaves_the_checkpoint(
    bench: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 60)
    batches = 0

    def interrupted(batch: Any, sink: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == 6:
            os.kill(os.getpid(), signal.SIGINT)
        bench.run(batch, sink)

    budget, means = Budget(None, documents=40), Means(20, checkpoint_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        collect(interrupted, rows, bench.widths, budget, means, checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    bench.batches.clear()
    found = collect(bench.run, rows, bench.widths, budget, means, checkpoint=tmp_path)
    ran = sum(len(row) for batch in bench.batches for row in batch)
    assert ran < found["h.0.proj"].count, "the rest only"
    whole = collect(bench.run, rows, bench.widths, budget, means)
    for layer, moment in found.items():
        assert torch.equal(moment.triangle, whole[layer].triangle)
