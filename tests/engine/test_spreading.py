"""Spreading over layers with gaps: the update of the published procedure, through a norm too; what is told; where."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import read_alone
from second_device import SECOND, placed, two_devices
from small_models import CONTEXTS, FACTS, NORMED, WIDTH, make
from torch import Tensor

import rewire
from rewire.bench.serial import serial_hidden, serial_keys, serial_spread
from rewire.engine.delta import EditedWeights, Factors, oriented
from rewire.engine.editors import spreading
from rewire.engine.editors.registry import Job
from rewire.engine.editors.spreading import norm_of, spread
from rewire.engine.hparams import Hparams
from rewire.engine.objective import MEMIT
from rewire.engine.phases import Phases, silent
from rewire.engine.prompts import subject_rows
from rewire.engine.solve import memit_update, through_norm
from rewire.engine.suffix import verify
from rewire.engine.walk import verify_walk

LAYERS = (0, 1, 3)
HPARAMS = Hparams(layers=LAYERS, v_num_grad_steps=2, v_lr=0.5, mom2_update_weight=2.0)


def moments(model: rewire.Model) -> dict[int, Tensor]:
    d = model.anatomy.d_in
    draws = {layer: torch.randn(3 * d, d, generator=torch.Generator().manual_seed(layer)) for layer in LAYERS}
    return {layer: X.T @ X / len(X) for layer, X in draws.items()}


def target(model: rewire.Model) -> Tensor:
    H = serial_hidden(model, FACTS, LAYERS[-1])
    return H + 0.3 * H.norm(dim=1, keepdim=True) / WIDTH**0.5 * torch.randn(H.shape, generator=torch.manual_seed(0))


def run(
    model: rewire.Model, Z: Tensor, listener: Callable[[str, int, int], None] = silent
) -> tuple[dict[str, Tensor], list[dict[str, float]], Tensor, Tensor]:
    """(the update of each weight, reports, residuals before and after) by the engine; the model is as it was."""
    C = moments(model)
    rows = subject_rows(model.tokenizer, FACTS, ("{}", *CONTEXTS), 96)
    weights = EditedWeights(model)
    with weights.provisional() as put:
        job = Job(
            model,
            FACTS,
            CONTEXTS,
            HPARAMS,
            MEMIT,
            lambda _: {},
            lambda *_: None,
            lambda *_: None,
            put,
            Phases(listener),
        )
        update, reports, asked, left = spread(
            job, rows, Z, lambda name, K, R: memit_update(K, R, C[layer_of(name)], 2.0)
        )
        after = serial_hidden(model, FACTS, LAYERS[-1])
        assert torch.allclose(left, (Z - after).norm(dim=1), rtol=1e-4)
    weights.undo_last()
    return {name: factors.dense() for name, factors in update.items()}, reports, asked, left


def layer_of(name: str) -> int:
    """The number in the path of a projection."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "phi"])
def test_as_the_serial_one(family: str) -> None:
    model = make(family)
    Z = target(model)
    update, _, asked, _ = run(model, Z)
    assert relative(asked, (Z - serial_hidden(model, FACTS, LAYERS[-1])).norm(dim=1)) < 1e-5
    exact = serial_spread(model, FACTS, CONTEXTS, HPARAMS, Z, moments(model))
    assert update.keys() == exact.keys()
    for name, change in exact.items():
        assert relative(update[name], change) < 1e-4


@pytest.mark.parametrize("family", NORMED)
@torch.no_grad()
def test_through_a_norm_as_by_full_forwards(family: str) -> None:
    """Everything measured anew for each layer by passes of whole models."""
    model = make(family)
    Z = target(model)
    update, _, _, _ = run(model, Z)
    C = moments(model)
    plain = [group[0] for group in subject_rows(model.tokenizer, FACTS, ["{}"], 96)]
    for done, layer in enumerate(LAYERS):
        share = (Z - serial_hidden(model, FACTS, LAYERS[-1])) / (len(LAYERS) - done)
        given = read_alone(model, model.projection(layer), plain)
        part = through_norm(model.post_norm(layer), given, share)
        factors, _ = memit_update(serial_keys(model, FACTS, CONTEXTS, layer), part, C[layer], 2.0)
        assert relative(update[model.anatomy.weight_name(layer)], factors.dense()) < 1e-4
        projection = model.projection(layer)
        projection.weight.add_(oriented(projection, factors.dense()))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("away", [{2, 3}, {0, 1}])
@torch.no_grad()
def test_on_several_devices(family: str, away: set[int]) -> None:
    """Each layer is solved where its weight is."""
    model = make(family)
    Z, C = target(model), moments(model)
    exact, _, asked, left = run(model, Z)
    rows = subject_rows(model.tokenizer, FACTS, ("{}", *CONTEXTS), 96)
    where = {}

    def solve(name: str, K: Tensor, R: Tensor) -> Any:
        assert K.device == R.device
        layer = layer_of(name)
        where[layer] = K.device
        return memit_update(K.cpu(), R.cpu(), C[layer], 2.0)  # LAPACK knows no second device

    with two_devices():
        model = placed(make(family), away)
        verify(model, LAYERS[-1])
        verify_walk(model, LAYERS)
        with EditedWeights(model).provisional() as put:
            job = Job(model, FACTS, CONTEXTS, HPARAMS, MEMIT, Any, Any, Any, put, Phases(silent))
            update, _, found_asked, found_left = spread(job, rows, Z, solve)
        assert relative(found_asked.cpu(), asked) < 1e-5
        assert relative(found_left.cpu(), left) < 1e-4
        for name, change in exact.items():
            assert relative(update[name].dense(), change) < 1e-4
    assert where == {layer: SECOND if layer in away else torch.device("cpu") for layer in LAYERS}


def test_rows_of_keys_are_not_held_while_values_are_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made behind the values, and counted to the keys."""
    phases = Phases(silent)

    def rows(*_: Any) -> Any:
        assert set(phases.seconds) == {"values"}
        raise LookupError

    monkeypatch.setattr(spreading, "optimise_values", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(spreading, "subject_rows", rows)
    job = Job(make("gpt2"), FACTS, CONTEXTS, HPARAMS, MEMIT, lambda _: {}, Any, Any, Any, phases)
    with pytest.raises(LookupError):
        spreading.edit(job, Any)
    assert set(phases.seconds) == {"values", "keys"}


def test_what_is_told() -> None:
    """Keys by rows, over all layers; the size of each change."""
    model = make("llama")
    seen: list[tuple[str, int, int]] = []
    update, reports, _, _ = run(model, target(model), lambda *said: seen.append(said))
    rows = len(FACTS) * (1 + len(CONTEXTS)) * len(LAYERS)
    keys = [(done, total) for phase, done, total in seen if phase == "keys"]
    assert {total for _, total in keys} == {rows}
    assert keys == sorted(keys)
    assert keys[-1][0] == rows
    assert [(done, total) for phase, done, total in seen if phase == "solve"] == [(1, 3), (2, 3), (3, 3)]
    for report in reports:
        weight = model.hf.get_parameter(report["weight"]).detach()
        assert report["relative_change"] == pytest.approx(float(update[report["weight"]].norm() / weight.norm()))


@pytest.mark.parametrize(("d_out", "rank", "d_in"), [(9, 1, 20), (9, 5, 20), (9, 30, 20)])
def test_norm_of_factors(d_out: int, rank: int, d_in: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    exact = float((left.double() @ right.double()).norm())
    assert norm_of(Factors(left, right)) == pytest.approx(exact, rel=1e-9)
    assert norm_of(Factors(left @ right, None)) == pytest.approx(exact, rel=1e-5)


def test_norm_of_factors_that_nearly_cancel() -> None:
    """Large factors of a small change: what float32 products would lose."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 3, generator=generator), torch.randn(3, 12, generator=generator)
    twice = Factors(torch.cat([left, -left], 1), torch.cat([right, right * (1 + 1e-3)], 0))
    exact = float((twice.left.double() @ twice.right.double()).norm())  # type: ignore[union-attr]
    assert norm_of(twice) == pytest.approx(exact, rel=1e-6)
    assert norm_of(Factors(torch.zeros(8, 3), right)) == 0
