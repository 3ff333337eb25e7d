"""Several processes share the facts; every one of them has all values in the end, or all end at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SETUP = """
import sys, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
import rewire
from safetensors.torch import save_file
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file
from rewire.engine import values as module
from rewire.engine.values import optimise_values
from rewire.stats.ranks import join

out, ranks = Path(sys.argv[1]), join()
model = rewire.load("demo")
facts = rewire.read_facts(demo_file("facts.jsonl"), limit=9)
facts += [replace(facts[4], id="again")]
hparams = Hparams(layers=(1, 2), v_num_grad_steps=6, v_lr=0.3, clamp_norm_factor=3.0)

def values(facts, cache=None):
    return optimise_values(model, facts, ("The end. {}",), hparams, 4, cache=cache, ranks=ranks)

"""
WORK = """
def save(name, found):
    columns = {key: value for key, value in vars(found).items() if key != "capacity"}
    save_file(columns, out / f"{name}-{ranks.rank}of{ranks.world}")

save("all", values(facts))
save("two", values(facts[:2]))  # three processes are more than that
save("kept", values(facts, out / "cache"))
save("found", values(facts[2:], out / "cache"))
"""


BROKEN = """
values(facts, out / "cache")
with torch.no_grad():
    model.projection(4).weight.fill_(float("nan"))
slow = module._Run._round

def waits(self, *words):
    time.sleep(600 * (ranks.rank == 1))
    return slow(self, *words)

module._Run._round = waits
values(facts)
"""


def launch(script: Path, out: Path, world: int, work: str) -> "subprocess.CompletedProcess[str]":
    script.write_text(work)
    out.mkdir()
    processes = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *processes, str(script), str(out)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> the folder with what each of them had."""
    script = tmp_path_factory.mktemp("ranks") / "work.py"
    found = {world: script.parent / str(world) for world in (1, 2, 3)}
    for world, out in found.items():
        done = launch(script, out, world, SETUP + WORK)
        assert done.returncode == 0, done.stderr
    return found


def of(worlds: dict[int, Path], name: str, world: int, rank: int) -> dict[str, torch.Tensor]:
    return load_file(worlds[world] / f"{name}-{rank}of{world}")


@pytest.mark.parametrize("name", ["all", "two", "kept"])
def test_one_two_and_three_processes(worlds: dict[int, Path], name: str) -> None:
    one = of(worlds, name, 1, 0)
    assert not one["cached"].any()
    for world in (2, 3):
        first = of(worlds, name, world, 0)
        assert torch.equal(first["steps"], one["steps"])
        assert torch.allclose(first["Z"], one["Z"], rtol=1e-4, atol=1e-4)
        for rank in range(1, world):
            other = of(worlds, name, world, rank)
            assert all(torch.equal(other[key].nan_to_num(), first[key].nan_to_num()) for key in one)


def test_facts_that_ask_for_the_same_have_one_value(worlds: dict[int, Path]) -> None:
    for column in of(worlds, "all", 1, 0).values():
        assert torch.equal(column[4].nan_to_num(), column[9].nan_to_num())


def test_what_all_ranks_wrote_is_found(worlds: dict[int, Path]) -> None:
    for world, folder in worlds.items():
        kept = of(worlds, "kept", world, 0)
        for rank in range(world):
            found = of(worlds, "found", world, rank)
            assert found["cached"].all()
            assert torch.equal(found["Z"], kept["Z"][2:])
        assert [path.name.split("-")[0] for path in (folder / "cache").iterdir()] == ["values"]


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """One rank's error ends all of them, while the other is ten minutes from its end; rounds are on disk."""
    done = launch(tmp_path / "work.py", tmp_path / "out", 2, SETUP + BROKEN)
    assert done.returncode != 0
    assert "not a number; no weight was changed" in done.stderr
    assert list((tmp_path / "out" / "cache").glob("*.safetensors"))
