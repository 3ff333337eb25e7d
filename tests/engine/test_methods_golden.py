"""Every method against what the published implementations produced (../shared/goldens), in float32.

MEMIT and AlphaEdit are in test_goldens.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rewire

CLOSE = 2e-2  # relative Frobenius


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def a_session(known: rewire.Model, golden: dict[str, Any], method: str, **hparams: Any) -> rewire.EditSession:
    return rewire.EditSession(
        known, method, stats=golden["stats"], contexts=tuple(golden["context_templates"][1]), hparams=hparams
    )


def direction(vector: Tensor, like: Tensor) -> Tensor:
    """Of length 1, and to the same side: a factor of rank one has no scale of its own."""
    vector = vector.double().flatten() / vector.double().norm()
    return vector if float(vector @ like.double()) > 0 else -vector


@pytest.mark.parametrize(
    ("kind", "method", "covariance"),
    [("rome", "rome", True), ("rome_nocov", "rome", False), ("r_rome", "r-rome", True)],
)
def test_rank_one(kind: str, method: str, covariance: bool, known: rewire.Model, golden: dict[str, Any]) -> None:
    """Each fact alone, on the unedited model: taking one back leaves nothing for the next."""
    asked = golden["rome"]
    session = a_session(
        known,
        golden,
        method,
        layers=[asked["layer"]],
        clamp_norm_factor=asked["clamp_norm_factor"],
        v_lr=golden["hparams"]["v_lr"],
        v_num_grad_steps=golden["hparams"]["v_num_grad_steps"],
        mom2_adjustment=covariance,
    )
    name = known.anatomy.weight_name(asked["layer"])
    for i, fact in enumerate(golden["facts"][:4]):
        u, v = golden["tensors"][f"{kind}.{i}.u"], golden["tensors"][f"{kind}.{i}.v"]
        edit = session.edit([fact], evaluate=False)
        (update,) = session.weights.updates
        assert update.keys() == {name}
        left, right = update[name].left, update[name].right
        assert right is not None
        assert left.shape[1] == right.shape[0] == 1
        assert relative(left @ right, torch.outer(v, u)) < CLOSE, fact.subject
        assert relative(direction(right, u), u / u.norm()) < CLOSE, fact.subject
        assert relative(direction(left, v), v.double() / v.double().norm()) < CLOSE, fact.subject
        session.undo(edit.id)


def test_the_kinds_of_rank_one_differ(known: rewire.Model, golden: dict[str, Any]) -> None:
    """Or a session that takes one for another would pass."""
    for i in range(4):
        outer = {
            kind: torch.outer(golden["tensors"][f"{kind}.{i}.v"], golden["tensors"][f"{kind}.{i}.u"])
            for kind in ("rome", "rome_nocov", "r_rome")
        }
        assert relative(outer["rome"], outer["r_rome"]) > 2 * CLOSE
        assert relative(outer["rome"], outer["rome_nocov"]) > 2 * CLOSE


def test_pmet(known: rewire.Model, golden: dict[str, Any]) -> None:
    """Both targets are found together, the MLP's alone is written."""
    asked = {key: golden["pmet"][key] for key in ("clamp_norm_factor", "kl_factor", "nll_loss_factor")}
    session = a_session(known, golden, "pmet", **asked)
    session.edit(golden["facts"], evaluate=False)
    (update,) = session.weights.updates
    layers = golden["hparams"]["layers"]
    assert update.keys() == {known.anatomy.weight_name(layer) for layer in layers}
    for name, factors in update.items():
        assert relative(factors.dense(), golden["tensors"][f"pmet.delta.{name}"]) < CLOSE, name


def test_emmet(known: rewire.Model, golden: dict[str, Any]) -> None:
    asked = golden["emmet"]
    ridges = {key: asked[key] for key in ("emmet_lambda", "update_norm_lambda")}
    session = a_session(known, golden, "emmet", layers=[asked["layer"]], **ridges)
    session.edit(golden["facts"], evaluate=False)
    (update,) = session.weights.updates
    name = known.anatomy.weight_name(asked["layer"])
    assert update.keys() == {name}
    wanted = golden["tensors"][f"emmet.delta.{name}"]
    assert relative(update[name].dense(), wanted) < CLOSE


@pytest.mark.parametrize("method", ["rome", "r-rome", "pmet", "emmet"])
def test_the_shipped_preset_is_the_golden_one(method: str, known: rewire.Model, golden: dict[str, Any]) -> None:
    """So no override is needed to be where the published figures are."""
    shipped = rewire.EditSession(known, method).hparams.model_dump(mode="json")
    wanted = golden["hparams"] | golden[method.replace("-", "_")]
    if "layer" in wanted:
        wanted["layers"] = [wanted["layer"]]
    if method in ("rome", "r-rome"):
        wanted["clamp_norm_factor"] = golden["rome"]["clamp_norm_factor"]
    same = set(shipped) & set(wanted) - {"mom2_dataset"}
    assert {"layers", "clamp_norm_factor", "v_lr", "v_num_grad_steps", "kl_factor", "mom2_update_weight"} <= same
    assert {key: shipped[key] for key in same} == {key: wanted[key] for key in same}
