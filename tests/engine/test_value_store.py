"""Values on disk: a run that was killed ends at the same bits, nothing is done twice, and no file is trusted."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rewire
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file
from rewire.engine.value_store import ENTERS, ValueStore, value_folder
from rewire.engine.values import Values, _Run, optimise_values
from rewire.kernels.errors import InputError

CHANGES = {"v_num_grad_steps": 20, "v_lr": 0.15, "clamp_norm_factor": 20.0, "kl_factor": 0.02, "v_weight_decay": 0.0}
HPARAMS = Hparams(layers=(1, 2), **CHANGES)  # facts stop early, each at its own step
CONTEXTS = ("The end. {}",)

# every start works through the same facts, and says so when a fact that is on disk is worked on
WORK = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import rewire
from safetensors.torch import save_file
from rewire.engine import values as module
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file

model = rewire.load("demo")
facts = rewire.read_facts(demo_file("facts.jsonl"), limit=100)
hparams = Hparams(layers=(1, 2), **CHANGES)
own = module._Run._round

def watched(self, chosen, leave, calls):
    done, states = self.store.read([self.keys[fact] for fact in chosen])
    assert not done, "optimised again"
    assert set(states) == {self.keys[fact] for fact in chosen if fact in self.flying}, "its state was not taken"
    return own(self, chosen, leave, calls)

def work(cache, out):
    module._Run._round = watched
    found = module.optimise_values(model, facts, ("The end. {}",), hparams, 16, cache=Path(cache))
    save_file({"Z": found.Z, "losses": found.losses, "steps": found.steps, "cached": found.cached}, out)
"""


def test_killed_many_times(tmp_path: Path) -> None:
    """`kill -9` at random moments; the run that ends at last has the values of one that was never killed."""
    body = f"""
    folder = {str(tmp_path)!r}
    chance, kills = random.Random(3), 0
    while True:
        child = os.fork()
        if child == 0:
            work(folder + "/killed", folder + "/often")
            os._exit(0)
        if kills < 5:
            there = len(list(Path(folder, "killed").glob("*")))
            while kills and len(list(Path(folder, "killed").glob("*"))) == there:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.01, 0.3))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        assert status == 0, status
        break
    work(folder + "/whole", folder + "/once")
    print(kills)
    """
    path = tmp_path / "work.py"
    path.write_text(WORK.replace("CHANGES", repr(CHANGES)) + textwrap.dedent(body))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 5
    once, often = load_file(tmp_path / "once"), load_file(tmp_path / "often")
    assert not once["cached"].any()
    assert 0 < int(often["cached"].sum()) < len(often["cached"]), "some came from disk, some from the last run"
    for name in ("Z", "steps", "losses"):
        assert torch.equal(once[name].nan_to_num(-1), often[name].nan_to_num(-1)), name
    assert len(list((tmp_path / "killed").iterdir())) == 1, "the rounds' files are made one"


@pytest.fixture
def facts() -> list[rewire.Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=20)


def values(model: rewire.Model, facts: list[rewire.Fact], cache: Path | None, size: int | None = 4) -> Values:
    return optimise_values(model, facts, CONTEXTS, HPARAMS, size, cache=cache)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many facts came with a state, and without, in each round."""
    own, seen = _Run._round, []

    def watched(self: _Run, chosen: list[int], leave: int, calls: Any) -> Any:
        carried = sum(fact in self.flying for fact in chosen)
        seen.append([carried, len(chosen) - carried])
        return own(self, chosen, leave, calls)

    monkeypatch.setattr(_Run, "_round", watched)
    return seen


def test_a_second_run_makes_nothing(
    demo: rewire.Model, facts: list[rewire.Fact], rounds: list[list[int]], tmp_path: Path
) -> None:
    first = values(demo, facts, tmp_path)
    assert not first.cached.any()
    made = len(rounds)
    said: list[tuple[int, int]] = []
    again = optimise_values(
        demo, facts[::-1], CONTEXTS, HPARAMS, progress=lambda *now: said.append(now), cache=tmp_path
    )
    assert len(rounds) == made
    assert again.cached.all()
    assert (again.capacity, said) == (0, [(20, 20)])
    assert torch.equal(again.Z.flip(0), first.Z)
    some = values(demo, [*facts[5:8], rewire.Fact("Ann", "{} lives in", "Rome")], tmp_path)
    assert some.cached.tolist() == [True] * 3 + [False]
    assert torch.equal(some.Z[:3], first.Z[5:8])


def test_what_goes_on_over_rounds_is_carried(
    demo: rewire.Model, facts: list[rewire.Fact], rounds: list[list[int]], tmp_path: Path
) -> None:
    found = values(demo, facts, tmp_path, size=8)
    assert any(carried for carried, _ in rounds), "no fact was left at the end of a round, or this shows nothing"
    alone = values(demo, facts, None, size=1)
    assert torch.equal(found.steps, alone.steps)
    error = (found.Z - alone.Z).norm(dim=1) / alone.Z.norm(dim=1)
    assert float(error.max()) < 1e-3
    assert torch.allclose(found.losses, alone.losses, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_the_folder_is_everything_that_a_value_depends_on(demo: rewire.Model) -> None:
    def folder(model: rewire.Model = demo, contexts: tuple[str, ...] = CONTEXTS, **changes: Any) -> str:
        return value_folder(model, contexts, HPARAMS.model_copy(update=changes))

    one = folder()
    assert folder() == folder(layers=(0, 2)) == folder(mom2_update_weight=3.0) == one
    changed = {"v_num_grad_steps": 9, "v_lr": 0.7, "v_weight_decay": 0.1, "clamp_norm_factor": 2.0, "kl_factor": 1.0}
    assert changed.keys() | {"fact_token"} == set(ENTERS)
    others = [folder(layers=(1,)), folder(contexts=()), *(folder(**{name: it}) for name, it in changed.items())]
    with torch.no_grad():  # one number of one weight, between those that the fingerprint reads
        demo.projection(4).weight[1, 3] += 1e-6  # type: ignore[index]
    others.append(folder())
    with torch.no_grad():  # what a row's or a column's numbers are, in another order
        weight = demo.projection(4).weight
        for columns in (slice(None), slice(1, 2)):
            weight[:, columns] = weight[:, columns].roll(1, dims=0)  # type: ignore[index, operator]
            others.append(folder())
        weight[2] = weight[2].roll(1)  # type: ignore[index, operator]
        others.append(folder())
    demo.hf.config.rope_theta = demo.hf.config.layer_norm_epsilon = 0.5  # whichever the family has
    others.append(folder())
    demo.hf.bfloat16()
    others.append(folder())
    assert len({one, *others}) == len(others) + 1


def file_of(folder: Path, name: str, **parts: tuple[list[str], dict[str, torch.Tensor]]) -> None:
    tensors = {f"{part}/{column}": of for part, (_, table) in parts.items() for column, of in table.items()}
    about = {"format": "1", "keys": json.dumps({part: keys for part, (keys, _) in parts.items()})}
    save_file(tensors, folder / name, about)


def states(*steps: int) -> dict[str, torch.Tensor]:
    """Facts at some steps, each with that number everywhere."""
    rows = torch.tensor(steps, dtype=torch.float32)
    wide = {name: rows[:, None].repeat(1, 6) for name in ("delta", "m", "v", "h0", "first")}
    state = {**wide, "step": torch.tensor(steps), "certain": torch.zeros(len(steps), dtype=torch.bool)}
    return state | {"first_nll": rows, "losses": rows[:, None].repeat(1, 9)}


def test_the_furthest_state_counts_and_stays(tmp_path: Path) -> None:
    """Whichever file is read first; also once they are merged into one, and where the fact is done by now."""
    file_of(tmp_path, "round-a.safetensors", state=(["one", "two", "three"], states(2, 5, 1)))
    file_of(tmp_path, "round-b.safetensors", state=(["one", "two"], states(5, 2)))
    done = {"Z": torch.ones(1, 6), "h0": torch.ones(1, 6), "losses": torch.ones(1, 9), "steps": torch.tensor([7])}
    done |= {name: torch.ones(1) for name in ("first_nll", "last_nll", "loss")}
    file_of(tmp_path, "round-c.safetensors", done=(["three"], done))
    abandoned, fresh = tmp_path / "round-d.safetensors.1.2.tmp", tmp_path / "round-e.safetensors.1.2.tmp"
    for path in (abandoned, fresh):
        path.write_text("half of it")
    os.utime(abandoned, (0, 0))
    store = ValueStore(tmp_path, 6, 9)
    for _ in range(2):
        finished, going = store.read(["one", "two", "three", "four"])
        assert set(finished) == {"three"}
        assert {key: int(row["step"]) for key, row in going.items()} == {"one": 5, "two": 5}
        assert all(torch.equal(row["delta"], torch.full((1, 6), 5.0)) for row in going.values())
        store.merge()
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert fresh.exists()
    assert not abandoned.exists()


def test_another_run_merges_while_this_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, step in (("a", 3), ("b", 4)):
        file_of(tmp_path, f"round-{name}.safetensors", state=([name], states(step)))
    store, own = ValueStore(tmp_path, 6, 9), ValueStore._rows
    merged = False

    def rows(self: ValueStore, path: Path, wanted: set[str] | None) -> Any:
        nonlocal merged
        if not merged:
            merged = True
            ValueStore(tmp_path, 6, 9).merge()
        return own(self, path, wanted)

    monkeypatch.setattr(ValueStore, "_rows", rows)
    assert set(store.read(["a", "b"])[1]) == {"a", "b"}


def damage(path: Path, kind: str) -> None:
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        if kind == "NaN":
            tensors["done/Z"][0] = torch.nan
        elif kind == "fewer rows":
            tensors["done/Z"] = tensors["done/Z"][1:].clone()
        else:
            del tensors["done/losses"]
        save_file(tensors, path, about)


@pytest.mark.parametrize("kind", ["cut off", "empty", "NaN", "fewer rows", "a column less"])
def test_a_broken_file_is_named_and_ignored(
    demo: rewire.Model, facts: list[rewire.Fact], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    first = values(demo, facts[:4], tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path, kind)
    again = values(demo, facts[:4], tmp_path)
    assert len([record for record in caplog.records if "broken" in record.getMessage()]) == 1
    assert path.name in caplog.text
    assert not again.cached.any()
    assert torch.equal(again.Z, first.Z)
    assert path.exists(), "it is somebody's"
    assert values(demo, facts[:4], tmp_path).cached.all()


def test_where_nothing_can_be_written_it_goes_on(
    demo: rewire.Model, facts: list[rewire.Fact], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found = values(demo, facts[:6], tmp_path / "file" / "values", size=2)
    assert caplog.text.count("cannot be written to") == 1
    assert torch.equal(found.Z, values(demo, facts[:6], None, size=2).Z)


def test_a_disk_that_fills_up(
    demo: rewire.Model,
    facts: list[rewire.Fact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from rewire.engine import value_store

    own, written = value_store.write_whole, 0

    def full(path: Path, fill: Callable[..., Any]) -> None:
        nonlocal written
        written += 1
        if written > 1:
            raise OSError(28, "No space left on device")
        own(path, fill)

    monkeypatch.setattr(value_store, "write_whole", full)
    found = values(demo, facts[:6], tmp_path, size=2)
    assert caplog.text.count("No space left on device") == 1
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    again = values(demo, facts[:6], tmp_path, size=2)
    assert int(again.cached.sum()) == 2
    assert torch.equal(found.Z, again.Z)


def test_what_is_no_number_is_not_kept(demo: rewire.Model, facts: list[rewire.Fact], tmp_path: Path) -> None:
    """A fact with a token that the model breaks on stops the edit; the others are there already."""
    broken = rewire.Fact("Zzyzx", facts[0].prompt, facts[0].target_new, id="bad")
    token = demo.tokenizer(" Zz", add_special_tokens=False)["input_ids"][-1]
    others = [fact for fact in facts if token not in demo.tokenizer(fact.question + " " + fact.target_new)["input_ids"]]
    with torch.no_grad():
        demo.hf.lm_head.weight = torch.nn.Parameter(demo.head.weight.clone())  # type: ignore[operator, union-attr]
        demo.hf.get_input_embeddings().weight[token] = torch.nan  # type: ignore[operator]
    with pytest.raises(InputError, match=r"the loss of facts bad is not a number"):
        values(demo, [*others[:3], broken], tmp_path)
    found = values(demo, others[:3], tmp_path)
    assert found.cached.all()
    with pytest.raises(InputError, match="bad"):
        values(demo, [broken], tmp_path)
