"""Edits of several passes: whole or not at all, undone as one, and the same bits from disk."""

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from rewire.engine.delta import Factors, Provisional
from rewire.engine.edits import Iteration
from rewire.engine.entry import gate
from rewire.engine.model import demo_file
from rewire.engine.objective import ATTENTION, MLP
from rewire.engine.session import EditSession
from rewire.engine.value_turns import values_in_turn
from rewire.engine.values import optimise_values
from rewire.stats import cache_root

METHODS = ("memit", "memit-history", "alphaedit", "pmet", "emmet", "rome", "r-rome")
QUICK: dict[str, Any] = {"v_num_grad_steps": 4, "mom2_tokens": 4000}
CONTEXTS = ("The end. {}",)


@pytest.fixture
def facts() -> list[rewire.Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=4)


def started(model: rewire.Model, method: str = "memit", **options: Any) -> EditSession:
    return EditSession(model, method, hparams=QUICK | options.pop("hparams", {}), contexts=CONTEXTS, **options)


def weights_of(model: rewire.Model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.hf.named_parameters()}


def assert_same_bits(model: rewire.Model, wanted: dict[str, torch.Tensor]) -> None:
    for name, weight in model.hf.named_parameters():
        assert torch.equal(weight, wanted[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_undone_and_applied_again(
    method: str, facts: list[rewire.Fact], load: Callable[[str], rewire.Model], tmp_path: Path
) -> None:
    """Two edits of several passes; the saved delta gives the session's bits, undoing gives back the earlier ones."""
    model = load("demo")
    session = started(model, method)
    before = weights_of(model)
    session.edit(facts[:2], evaluate=False, iterations=3)
    between = weights_of(model)
    second = session.edit(facts[2:], evaluate=False, iterations=2)
    assert [row["number"] for row in second.report["iterations"]] == [1, 2]
    session.save(tmp_path / "out")
    other = load("demo")
    rewire.Delta.load(tmp_path / "out").apply(other)
    assert_same_bits(other, weights_of(model))
    session.undo(second.id)
    assert_same_bits(model, between)
    session.undo(session.edits[0].id)
    assert_same_bits(model, before)


def test_one_pass_is_what_it_was(facts: list[rewire.Fact], load: Callable[[str], rewire.Model]) -> None:
    one, two = load("demo"), load("demo")
    first = started(one).edit(facts, evaluate=False)
    seen: list[dict[str, torch.Tensor]] = []
    started(two).edit(facts, evaluate=False, iterations=2, watch=lambda _: seen.append(weights_of(two)))
    assert_same_bits(one, seen[0])
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert first.report["iterations"][0]["optimization"] < first.report["iterations"][0]["initial"]


def test_perplexities_go_on_from_pass_to_pass(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    """SPREAD of a pass, read by a forward, is what the values of the next one begin with."""
    seen: list[Iteration] = []
    edit = started(demo).edit(facts, evaluate=False, iterations=3, watch=seen.append)
    for one, following in pairwise(seen):
        for fact, later in zip(one.facts, following.facts, strict=True):
            assert fact["spread_ppl"] == pytest.approx(later["init_ppl"], rel=1e-4)
        assert following.initial < one.initial
    told = edit.report["iterations"]
    assert [row["spread"] for row in told] == [one.spread for one in seen]
    for one in seen:
        for name, mean in (("init_ppl", one.initial), ("opt_ppl", one.optimization), ("spread_ppl", one.spread)):
            assert mean == pytest.approx(sum(fact[name] for fact in one.facts) / len(facts))
    assert all(row["seconds"]["values"] > 0 for row in told)


def test_ends_once_both_stages_agree(facts: list[rewire.Fact], load: Callable[[str], rewire.Model]) -> None:
    def passes(gap: float | None) -> list[dict[str, Any]]:
        edit = started(load("demo")).edit(facts, evaluate=False, iterations=4, stop_gap=gap)
        rows: list[dict[str, Any]] = edit.report["iterations"]
        return rows

    gaps = [abs(row["spread"] - row["optimization"]) for row in passes(None)]
    assert len(gaps) == 4
    second = next(number for number, gap in enumerate(gaps) if gap < gaps[0])  # the first that is nearer than the first
    assert len(passes(gaps[second])) == second + 1
    assert len(passes(1e9)) == 1
    assert len(passes(0.0)) == 4


@pytest.mark.parametrize("method", ["alphaedit", "rome"])
def test_whole_or_not_at_all(method: str, facts: list[rewire.Fact], demo: rewire.Model) -> None:
    """What goes wrong in the second pass takes the first one back, and the method's memory of it."""
    session = started(demo, method)
    session.edit(facts[:2], evaluate=False)
    before, state = weights_of(demo), copy.deepcopy(session._state)

    def fail(iteration: Iteration) -> None:
        if iteration.number == 2:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        session.edit(facts[2:], evaluate=False, iterations=3, watch=fail)
    assert_same_bits(demo, before)
    assert len(session.edits) == len(session.weights.updates) == 1
    if state is not None:
        assert all(torch.equal(session._state[name].X, state[name].X) for name in state)
    session.undo(session.edits[0].id)


@pytest.mark.parametrize(("compat", "counted"), [(False, 1), (True, 3)])
def test_a_batch_counts_once(compat: bool, counted: int, facts: list[rewire.Fact], demo: rewire.Model) -> None:
    """Keys of a batch that is edited three times stand once among the earlier ones; as published three times."""
    session = started(demo, "alphaedit", compat=compat)
    session.edit(facts[:1], evaluate=False)
    edit = session.edit(facts[1:], evaluate=False, iterations=3)
    assert {len(system.X) for system in session._state.values()} == {1 + 3 * counted}
    session.undo(edit.id)
    assert {len(system.X) for system in session._state.values()} == {1}


def test_neighbours_must_be_there(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    with pytest.raises(rewire.InputError, match=r"4 of 4 facts have no edit_neighbors \(first: .*rewire neighbors"):
        started(demo, neighbors=True).edit(facts, evaluate=False)


def test_wrong_number_of_passes(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    with pytest.raises(rewire.InputError, match="iterations is 0"):
        started(demo).edit(facts, iterations=0)


def test_turns_are_found_again(facts: list[rewire.Fact], load: Callable[[str], rewire.Model]) -> None:
    """ROME's values are on disk for the same facts in the same order, and for no other order."""

    def cached(chosen: list[rewire.Fact], **hparams: Any) -> tuple[list[bool], dict[str, torch.Tensor]]:
        model = load("demo")
        edit = started(model, "rome", hparams=hparams).edit(chosen, evaluate=False)
        return [row["cached"] for row in edit.report["facts"]], weights_of(model)

    nothing, whole = cached(facts)
    assert not any(nothing)
    everything, again = cached(facts)
    assert all(everything)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert cached([*facts[:2], facts[3], facts[2]])[0] == [True, True, False, False]
    assert cached(facts[1:])[0] == [False, False, False]
    assert cached(facts, mom2_adjustment=False)[0] == [False] * 4, "another update was written behind the first value"


def test_an_interrupted_sweep_goes_on(
    facts: list[rewire.Fact], load: Callable[[str], rewire.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there when it was interrupted is on disk, the weights are as they were, and the rest is done once."""
    exact, model = load("demo"), load("demo")
    started(exact, "rome").edit(facts, evaluate=False)
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "another"))

    def interrupt(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("values", 3):
            raise KeyboardInterrupt

    before = weights_of(model)
    with pytest.raises(KeyboardInterrupt):
        started(model, "rome", listener=interrupt).edit(facts, evaluate=False)
    assert_same_bits(model, before)
    edit = started(model, "rome").edit(facts, evaluate=False)
    assert [row["cached"] for row in edit.report["facts"]] == [True, True, True, False]
    assert_same_bits(model, weights_of(exact))


def test_what_is_told_of_a_sweep(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    """The loss to rounding, also of a single fact; values' seconds of their own pass; one file of values."""
    session = started(demo, "rome")
    alone = session.edit(facts[:1], evaluate=False)
    assert alone.report["layers"][0]["lost_to_rounding"] < 1e-5
    edit = session.edit(facts[1:], evaluate=False, iterations=3)
    assert edit.report["layers"][0]["lost_to_rounding"] < 1e-5
    for row in edit.report["iterations"]:
        assert row["values"]["seconds"] == pytest.approx(row["seconds"]["values"], abs=1e-3)


def test_the_model_is_left_as_it_was(
    facts: list[rewire.Fact], demo: rewire.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while somebody holds the error that ended a sweep, and what was optimised is on disk, in one file."""
    demo.hf.train()
    hooks = sum(len(module._forward_hooks) for module in demo.hf.modules())
    session = started(demo, "rome")
    own = Provisional.__call__

    def fail(put: Provisional, name: str, factors: Factors) -> float:
        if len(put.parts.get(name, ())) == 2:
            raise RuntimeError("no room")
        return own(put, name, factors)

    monkeypatch.setattr(Provisional, "__call__", fail)
    monkeypatch.setattr("rewire.engine.value_turns.SAVE_SECONDS", -1)
    try:
        session.edit(facts, evaluate=False)
    except RuntimeError as error:
        held = error
    assert str(held) == "no room"
    assert demo.hf.training
    assert all(weight.requires_grad for weight in demo.hf.parameters())
    assert sum(len(module._forward_hooks) for module in demo.hf.modules()) == hooks
    assert len(list(cache_root().glob("values/*/*.safetensors"))) == 1


def test_a_model_that_collapsed_still_has_a_perplexity(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    with torch.no_grad():
        demo.hf.get_output_embeddings().weight.mul_(1e4)  # type: ignore[operator]
    edit = started(demo).edit(facts, evaluate=False)
    assert edit.report["iterations"][0]["initial"] > 1e200
    json.dumps(edit.report, allow_nan=False)


def test_a_loss_that_is_no_number(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    session = started(demo, "rome", hparams={"v_lr": 1e38, "clamp_norm_factor": 1e30})
    before = weights_of(demo)
    with pytest.raises(rewire.InputError, match="not a number; no weight was changed"):
        session.edit(facts, evaluate=False)
    assert_same_bits(demo, before)


def test_values_in_turn_are_those_of_a_batch_of_one(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    """With nothing written between them, each is what `optimise_values` gives."""
    session = started(demo, "rome")
    asked = (demo, facts, CONTEXTS, session.hparams)
    together = optimise_values(*asked, objective=session.objective)
    for number, one in enumerate(values_in_turn(*asked, session.objective)):
        assert torch.allclose(one.Z[0], together.Z[number], rtol=1e-4, atol=1e-5)
        assert int(one.steps) == int(together.steps[number])
    assert number == len(facts) - 1


def test_variables_inside_a_block_know_their_thread(demo: rewire.Model) -> None:
    """Groups run side by side: they share the projections' hooks, and not what is put through them."""
    x = torch.ones(1, 1, demo.anatomy.d_in)
    plain = demo.projection(1)(x)
    with gate(demo, 1, (MLP, ATTENTION)) as opened, ThreadPoolExecutor(1) as other:
        assert opened is not None
        opened.rows.now = {MLP: (None, torch.full((1, demo.anatomy.d_model), 3.0))}
        assert torch.equal(demo.projection(1)(x), plain + 3)
        assert torch.equal(other.submit(demo.projection(1), x).result(), plain)
    assert torch.equal(demo.projection(1)(x), plain)


def test_without_covariance_nothing_is_collected(facts: list[rewire.Fact], demo: rewire.Model) -> None:
    edit = started(demo, "rome", hparams={"mom2_adjustment": False}).edit(facts[:1], evaluate=False)
    assert edit.report["statistics"] == {}
    assert "statistics" not in edit.report["seconds"]
