"""Deltas: what is refused, what the file holds, and what rounding and orientation do to a weight."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rewire
from rewire.engine.delta import Delta, EditedWeights, Factors
from rewire.engine.facts import Fact
from rewire.engine.model import demo_file
from rewire.kernels.errors import InputError
from weights import changed, equal, session_on, state, widths


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=5)


# deltas that are refused


def small_delta(model: rewire.Model, **changes: Any) -> Delta:
    generator = torch.Generator().manual_seed(0)
    weight = model.projection(1).weight
    left = torch.randn(weight.shape[0], 2, generator=generator)
    right = torch.randn(2, weight.shape[1], generator=generator)
    update = {model.anatomy.weight_name(1): Factors(left, right)}
    values = {"model": model.name, "fingerprint": model.fingerprint, "edits": [{"id": "a"}], "updates": [update]}
    return Delta(**(values | changes))


def test_another_model_is_refused(demo: rewire.Model) -> None:
    delta = small_delta(demo)
    hf = copy.deepcopy(demo.hf)
    with torch.no_grad():
        hf.get_submodule(demo.anatomy.norm).weight[0] += 1
    other = rewire.wrap(hf, demo.tokenizer, "other")
    before = state(other)
    with pytest.raises(InputError, match=f"{demo.fingerprint}, in .*; other has other weights"):
        delta.apply(other)
    assert changed(other, before) == set()


def test_weights_that_are_not_there_are_refused(demo: rewire.Model) -> None:
    before = state(demo)
    (update,) = small_delta(demo).updates
    (factors,) = update.values()
    for name in ("model.layers.9.mlp.down_proj.weight", "model.layers.1.mlp.weight"):
        with pytest.raises(InputError, match=f"the delta changes {name}, which rewire/demo does not have"):
            small_delta(demo, updates=[{**update, name: factors}]).apply(demo)
    (name,) = update
    turned = Factors(factors.right.T.contiguous(), factors.left.T.contiguous())
    for wrong in (turned, Factors(turned.dense(), None)):
        asked, found = map(re.escape, (str(widths(demo)[::-1]), str(widths(demo))))
        with pytest.raises(InputError, match=rf"as {asked} \(out, in\); the model's weight is {found}"):
            small_delta(demo, updates=[{name: wrong}]).apply(demo)
    assert changed(demo, before) == set()


def test_a_delta_is_applied_whole_or_not_at_all(demo: rewire.Model) -> None:
    before = state(demo)
    delta = small_delta(demo)
    (update,) = delta.updates
    ((name, factors),) = update.items()
    broken = {name: Factors(factors.left * torch.inf, factors.right)}
    with pytest.raises(InputError, match="NaN or infinity"):
        small_delta(demo, edits=[{}, {}, {}], updates=[update, update, broken]).apply(demo)
    assert changed(demo, before) == set()
    delta.apply(demo)
    assert changed(demo, before) == {name}


def test_files_that_are_no_delta(demo: rewire.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no delta.safetensors there; expected the --out folder of an edit"):
        Delta.load(tmp_path)
    with pytest.raises(InputError, match="nonesuch: no delta"):
        Delta.load(tmp_path / "nonesuch")
    path = small_delta(demo).save(tmp_path / "good")
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cannot be read as a delta \(.*\); was it cut off\?"):
            Delta.load(path)
    for metadata in (None, {"format": "pt"}, {"format": "rewire-delta-9"}):
        save_file({"a": torch.ones(2)}, path, metadata)
        with pytest.raises(InputError, match=r"format .* found, expected 'rewire-delta-1'"):
            Delta.load(path)
    about = {"format": "rewire-delta-1", "model": "demo", "fingerprint": "x", "edits": "[{}]"}
    for name, metadata in (
        ("a", about),
        ("1/a/left", about),
        ("x/a/left", about),
        ("0/a/left", {"format": "rewire-delta-1"}),
        ("0/a/left", {**about, "edits": "[{"}),
        ("0/a/left", {**about, "edits": "5"}),
    ):
        save_file({name: torch.ones(2, 2)}, path, metadata)
        with pytest.raises(InputError, match="says that it is a delta, but does not hold one"):
            Delta.load(path)


def test_a_delta_that_cannot_be_written_leaves_the_old_one(
    demo: rewire.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_delta(demo).save(tmp_path)
    before = path.read_bytes()

    def half(tensors: Any, place: Path, metadata: Any) -> None:
        place.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("rewire.engine.delta.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        small_delta(demo, edits=[{}], updates=[{}]).save(tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_holds_what_the_format_says(demo: rewire.Model, tmp_path: Path) -> None:
    d_out, d_in = widths(demo)
    dense = Factors(torch.ones(d_out, d_in), None)
    delta = small_delta(demo)
    path = small_delta(demo, edits=[{}, {}], updates=[*delta.updates, {"model.layers.0.x.weight": dense}]).save(
        tmp_path
    )
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "0/model.layers.1.mlp.down_proj.weight/left": (d_out, 2),
        "0/model.layers.1.mlp.down_proj.weight/right": (2, d_in),
        "1/model.layers.0.x.weight/left": (d_out, d_in),
    }
    assert equal(Delta.load(path), small_delta(demo, updates=[*delta.updates, {"model.layers.0.x.weight": dense}]))


# weights


def test_factors_become_dense_where_that_is_smaller() -> None:
    left, right = torch.randn(6, 4), torch.randn(4, 12)
    assert Factors(left, right).compact().right is right  # 4 (6 + 12) = 72 numbers = 6 * 12
    wide = Factors(torch.randn(6, 5), torch.randn(5, 12))
    dense = wide.compact()
    assert dense.right is None
    assert torch.equal(dense.dense(), wide.left @ wide.right)
    assert dense.compact() is dense


def test_bfloat16_says_what_rounding_lost(facts: list[Fact]) -> None:
    model = rewire.load("demo", dtype="bfloat16")
    before = state(model)
    session = session_on(model)
    edit = session.edit(facts[:3], evaluate=False)
    (update,) = session.delta.updates
    lost = session.weights.lost_to_rounding()
    assert lost.keys() == update.keys() == changed(model, before)
    for layer in edit.report["layers"]:
        name, asked = layer["weight"], update[layer["weight"]].dense()
        written = model.hf.state_dict()[name]
        assert written.dtype == torch.bfloat16
        assert torch.equal(written, (before[name].float() + asked).bfloat16())
        share = float((written.float() - before[name].float() - asked).norm() / asked.norm())
        assert 1e-3 < share < 1
        assert layer["lost_to_rounding"] == pytest.approx(share, rel=1e-3)
        assert lost[name] == pytest.approx(share, rel=1e-3)
    session.undo(edit.id)
    assert changed(model, before) == set()


def test_small_updates_add_up_before_they_are_rounded() -> None:
    model = rewire.load("demo", dtype="bfloat16")
    name = model.anatomy.weight_name(1)
    before = state(model)
    step = (
        before[name].float().abs().mean() * 1e-3 * torch.ones_like(before[name].float())
    )  # less than half a bfloat16 step of most
    weights = EditedWeights(model)
    for _ in range(64):
        with weights.provisional() as put:
            put(name, Factors(step, None))
    moved = model.hf.state_dict()[name].float() - before[name].float()
    assert float(moved.mean() / (64 * step).mean()) == pytest.approx(1, rel=0.02)
    for _ in range(64):
        weights.undo_last()
    assert changed(model, before) == set()


def test_an_update_of_nothing_loses_nothing(demo: rewire.Model) -> None:
    weights = EditedWeights(demo)
    name = demo.anatomy.weight_name(1)
    with weights.provisional() as put:
        assert put(name, Factors(torch.zeros(widths(demo)), None)) == 0
    assert weights.lost_to_rounding() == {name: 0}


def test_conv1d_deltas_are_out_by_in(shared: Path, load: Callable[..., rewire.Model]) -> None:
    model = load(shared / "models" / "cf-gpt2")
    d_model, d_in = model.anatomy.d_model, model.anatomy.d_in
    before = state(model)
    known = rewire.read_facts(shared / "data" / "mcf_subset_1.json", limit=2)
    session = session_on(model)
    session.edit(known, evaluate=False)
    (update,) = session.delta.updates
    assert changed(model, before) == set(update) == {f"transformer.h.{i}.mlp.c_proj.weight" for i in (1, 2)}
    for name, factors in update.items():
        assert (factors.left.shape, factors.right.shape) == ((d_model, 2), (2, d_in))
        assert before[name].shape == (d_in, d_model)  # Conv1D stores it the other way round
        assert torch.equal(model.hf.state_dict()[name], before[name] + (factors.left @ factors.right).T)
    fresh = load(shared / "models" / "cf-gpt2")
    session.delta.apply(fresh)
    assert changed(fresh, state(model)) == set()


def test_a_square_conv1d_is_known_by_its_type(demo: rewire.Model) -> None:
    from transformers.pytorch_utils import Conv1D

    from rewire.engine.delta import oriented

    change = torch.arange(9.0).view(3, 3)
    assert torch.equal(oriented(Conv1D(3, 3), change), change.T)
    assert torch.equal(oriented(nn.Linear(3, 3), change), change)
