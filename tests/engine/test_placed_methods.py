"""Methods whose variables sit inside a block, and those that take turns, on a model over two devices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from second_device import placed, two_devices
from small_models import CONTEXTS, FACTS, make
from torch import Tensor

import rewire
from rewire.engine.delta import EditedWeights
from rewire.engine.editors import rome
from rewire.engine.editors.pmet import PmetHparams
from rewire.engine.editors.registry import Job, Method
from rewire.engine.editors.rome import RomeHparams
from rewire.engine.objective import ATTENTION, MLP, Objective
from rewire.engine.phases import Phases
from rewire.engine.values import optimise_values

QUICK: dict[str, Any] = {"v_num_grad_steps": 4, "v_lr": 0.5, "mom2_update_weight": 2.0}
PLACES = ({2}, {1, 2}, {0, 1}, {2, 3})


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).norm() / wanted.norm())


def edited(model: rewire.Model, method: Method, hparams: Any) -> dict[str, Tensor]:
    """The update of each weight, by a method that reads no second moments: LAPACK knows no second device."""
    nothing: Callable[..., Any] = lambda *_: None  # noqa: E731
    objective = Objective(method.site, getattr(hparams, "nll_loss_factor", None))
    with EditedWeights(model).provisional() as put:
        method.edit(Job(model, FACTS, CONTEXTS, hparams, objective, nothing, nothing, nothing, put, Phases()))
        put.settle()
    return {name: factors.dense().cpu() for name, factors in put.update.items()}


@pytest.mark.parametrize("away", PLACES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_sweep(averaged: bool, family: str, away: set[int]) -> None:
    hparams = RomeHparams(**QUICK | {"layers": [2], "mom2_adjustment": False})
    method = replace(rome.METHOD, edit=lambda job: rome.edit(job, averaged))
    exact = edited(make(family), method, hparams)
    with two_devices():
        found = edited(placed(make(family), away), method, hparams)
    for name, change in exact.items():
        assert relative(found[name], change) < 1e-4


@pytest.mark.parametrize("away", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2"])
def test_values_inside_a_block(family: str, away: set[int]) -> None:
    """The block below the z-layer lies elsewhere, or the one above, or neither."""
    hparams = PmetHparams(**QUICK | {"layers": [1, 2]})
    objective = Objective((MLP, ATTENTION), 1.0)
    exact = optimise_values(make(family), FACTS, CONTEXTS, hparams, objective=objective)
    with two_devices():
        model = placed(make(family), away)
        found = optimise_values(model, FACTS, CONTEXTS, hparams, objective=objective)
        assert relative(found.Z, exact.Z) < 1e-4
        assert relative(found.h0, exact.h0) < 1e-5
