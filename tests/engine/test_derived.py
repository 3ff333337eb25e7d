"""What a session works C into is there for the next one: nothing is factored twice, and no bit is another."""

import copy
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewire
from rewire.engine.delta import Delta
from rewire.engine.facts import Fact
from rewire.engine.model import demo_file
from rewire.engine.statistics import second_moments
from rewire.stats import Moment, derived
from weights import CONTEXTS, FAST, changed, equal, state

MADE = {"memit": "regular_factor", "alphaedit": "eigenbasis"}


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=5)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "stats"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was made and not read."""
    calls: list[str] = []

    def count(name: str, real: Callable[[Tensor], object]) -> None:
        def counted(C: Tensor) -> object:
            calls.append(name)
            return real(C)

        monkeypatch.setattr(derived, name, counted)

    for name in MADE.values():
        count(name, getattr(derived, name))
    return calls


def session_on(model: rewire.Model, method: str, more_tokens: int = 0, **options: object) -> rewire.EditSession:
    hparams = {**FAST, "mom2_tokens": 2 * model.anatomy.d_in + 100 + more_tokens}
    return rewire.EditSession(
        copy.deepcopy(model), method, hparams=hparams, contexts=CONTEXTS, **options  # type: ignore[arg-type]
    )  # fmt: skip


def run(session: rewire.EditSession, facts: list[Fact]) -> Delta:
    """Two edits: the second has what the first made in memory."""
    session.edit(facts[:3], evaluate=False)
    session.edit(facts[3:], evaluate=False)
    return session.delta


@pytest.mark.parametrize("method", MADE)
def test_a_second_session_solves_at_once(
    demo: rewire.Model, facts: list[Fact], cache: Path, made: list[str], method: str
) -> None:
    first = run(session_on(demo, method), facts)
    assert made == [MADE[method]] * 2  # a layer each
    assert len(list((cache / "derived").glob("*/*.safetensors"))) == 2
    second = run(session_on(demo, method), facts)
    assert len(made) == 2
    assert equal(first, second)
    # statistics over more tokens are others
    run(session_on(demo, method, 300), facts)
    assert len(made) == 4
    # and what is gone is made again
    shutil.rmtree(cache / "derived")
    assert equal(run(session_on(demo, method), facts), first)
    assert len(made) == 6


def test_another_threshold_needs_no_other_eigenbasis(
    demo: rewire.Model, facts: list[Fact], cache: Path, made: list[str]
) -> None:
    run(session_on(demo, "alphaedit"), facts)
    other = session_on(demo, "alphaedit")
    other.hparams = other.hparams.model_copy(update={"nullspace_threshold": 1e-3})
    run(other, facts)
    assert made == ["eigenbasis"] * 2
    ranks = [other.held.space("model.layers.1.mlp.down_proj", threshold).rank for threshold in (1e-3, 2e-2)]
    assert 0 < ranks[0] < ranks[1]


def test_without_memory_everything_comes_from_disk(
    demo: rewire.Model, facts: list[Fact], made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = run(session_on(demo, "memit"), facts)
    monkeypatch.setattr("rewire.engine.held.free_bytes", lambda device: 0)
    poor = session_on(demo, "memit")
    assert equal(run(poor, facts), plenty)
    assert poor.held._kept == {}
    assert len(made) == 2


def test_triangles_go_as_means_come(demo: rewire.Model, facts: list[Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of both would be twice what the edit keeps."""
    refs: list[weakref.ref[Moment]] = []
    alive = []

    class Watched(Moment):
        @property
        def mean(self) -> Tensor:
            alive.append(sum(ref() is not None for ref in refs))
            return super().mean

    def watched(*args: Any, **options: Any) -> dict[str, Moment]:
        found: dict[str, Moment] = {
            name: Watched(**vars(moment)) for name, moment in second_moments(*args, **options).items()
        }
        refs.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr("rewire.engine.held.second_moments", watched)
    session_on(demo, "memit").edit(facts[:2], evaluate=False)
    assert alive == [2, 1]


def test_a_users_folder_is_only_read(
    demo: rewire.Model, facts: list[Fact], cache: Path, tmp_path: Path, made: list[str]
) -> None:
    first = run(session_on(demo, "memit"), facts)
    (collected,) = (folder for folder in cache.iterdir() if folder.name == demo.fingerprint)
    shutil.copytree(collected, tmp_path / "mine")
    before = contents(tmp_path / "mine")
    shutil.rmtree(cache)
    assert equal(run(session_on(demo, "memit", stats=tmp_path / "mine"), facts), first)
    assert len(made) == 4
    assert contents(tmp_path / "mine") == before
    assert len(list((cache / "derived").glob("*/*.safetensors"))) == 2


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_cache_that_cannot_be_written_to_costs_time_only(
    demo: rewire.Model, facts: list[Fact], cache: Path, made: list[str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    want = run(session_on(demo, "alphaedit"), facts)
    shutil.rmtree(cache / "derived")
    (cache / "derived").touch()
    monkeypatch.setattr(logging.getLogger("rewire"), "propagate", True)
    assert equal(run(session_on(demo, "alphaedit"), facts), want)
    assert len(made) == 4  # once a layer: the second edit has it from memory
    (message,) = (record.getMessage() for record in caplog.records if "cannot be written to" in record.getMessage())
    assert message.startswith(f"{cache / 'derived'}: ")


def test_units_that_never_fire_are_edited_around(
    demo: rewire.Model, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in models with ReLU: C has zeros on its diagonal. The ridge is in the report, and said once a layer."""
    dead = [3, 17]
    with torch.no_grad():
        demo.hf.get_submodule("model.layers.1.mlp.up_proj").weight[dead] = 0  # type: ignore[operator, index]
    before = state(demo)
    monkeypatch.setattr(logging.getLogger("rewire"), "propagate", True)
    session = session_on(demo, "memit")
    delta = run(session, facts)
    for edit in session.edits:
        with_dead, whole = edit.report["layers"]
        ridge = 1e-6 * float(session.held.moments["model.layers.1.mlp.down_proj"].diagonal().mean())
        assert with_dead["ridge"] == pytest.approx(ridge)
        assert whole["ridge"] == 0
        assert with_dead["residual"] < 1e-6
        assert all(fact["achieved"] > 0.3 for fact in edit.report["facts"])
    (message,) = (record.getMessage() for record in caplog.records if "rank" in record.getMessage())
    assert message.startswith("model.layers.1.mlp.down_proj: its second moment has no full rank")
    assert "2 of" in message
    name = "model.layers.1.mlp.down_proj.weight"
    assert changed(session.model, before) == {name, name.replace("1", "2")}
    for update in delta.updates:
        assert not update[name].dense()[:, dead].any()  # their keys are zero: nothing to write there
