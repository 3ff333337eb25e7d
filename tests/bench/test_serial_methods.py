"""The oracle of the methods: against the published implementations' figures, and row by row by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CONTEXTS, FACTS, make, tokenizer
from torch import Tensor, nn

import rewire
from rewire.bench.serial import serial_value
from rewire.bench.serial_methods import serial_rome, serial_target
from rewire.engine.facts import EditNeighbor
from rewire.engine.hparams import Hparams
from rewire.engine.passes import frozen

HPARAMS = Hparams(layers=(1, 2), v_num_grad_steps=6, v_lr=0.5, clamp_norm_factor=2)
NEIGHBORS = (
    EditNeighbor("Danielle Darrieux", "{} worked in the area of", "English"),
    EditNeighbor("Aracataca", "The mother tongue of {} is", "physics, you and I know the capital"),
)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def nll(model: rewire.Model, text: str, target: str) -> tuple[float, int]:
    """(sum of the target's negative log-likelihoods behind the text, number of its tokens), in a forward of its own."""
    labels = tokenizer().encode(" " + target, add_special_tokens=False)
    ids = torch.tensor([tokenizer().encode(text) + labels])
    with torch.no_grad():
        logp = model.hf(input_ids=ids).logits[0].log_softmax(-1)
    return -float(logp[-len(labels) - 1 : -1].gather(1, ids[0, -len(labels) :, None]).sum()), len(labels)


@pytest.mark.parametrize("kind", ["rome", "rome_nocov", "r_rome"])
def test_rank_one_as_published(kind: str, known: rewire.Model, golden: dict[str, Any]) -> None:
    layer = golden["rome"]["layer"]
    name = known.anatomy.layer_name(layer)
    with np.load(golden["stats"] / f"{name}_float32_mom2_300.npz") as stored:
        C = torch.from_numpy(stored["mom2.mom2"]).double() / int(stored["mom2.count"])
    shared = {key: golden["hparams"][key] for key in ("v_weight_decay", "kl_factor", "v_num_grad_steps", "v_lr")}
    hparams = Hparams(layers=(layer,), clamp_norm_factor=golden["rome"]["clamp_norm_factor"], **shared)
    with frozen(known):
        found = serial_rome(
            known, golden["facts"][:1], golden["context_templates"][1], hparams,
            None if kind == "rome_nocov" else C, averaged=kind == "r_rome",
        )[0]  # fmt: skip
    assert relative(found.u, golden["tensors"][f"{kind}.0.u"]) < 1e-4
    assert relative(found.r, golden["tensors"][f"{kind}.0.v"]) < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_at_the_block_it_is_memits_value(family: str) -> None:
    model = make(family)
    for fact in FACTS:
        wanted = serial_value(model, fact, CONTEXTS, HPARAMS)
        found = serial_target(model, fact, CONTEXTS, HPARAMS, [f"{model.anatomy.blocks}.2"])
        assert found.updates == wanted.updates
        assert relative(found.at(f"{model.anatomy.blocks}.2"), wanted.z) < 1e-6
        assert found.loss == pytest.approx(wanted.loss, rel=1e-6)


@pytest.mark.parametrize("compat", [False, True])
def test_neighbours_rows_count(compat: bool) -> None:
    """At the first step the loss is the mean over all rows, each by itself in a plain forward."""
    model = make("llama")
    fact, site = replace(FACTS[0], edit_neighbors=NEIGHBORS), model.anatomy.layer_name(2)
    sums = [nll(model, context.replace("{}", fact.question), fact.target_new) for context in ("{}", *CONTEXTS)]
    new = sums[0][1]
    for neighbor in NEIGHBORS:
        question = neighbor.prompt.replace("{}", neighbor.subject)
        sums.append(nll(model, CONTEXTS[0].replace("{}", question), neighbor.target))
    assert all(count != new for _, count in sums[-2:]), "the divisors must differ, or this shows nothing"
    once = HPARAMS.model_copy(update={"v_num_grad_steps": 1})
    found = serial_target(model, fact, CONTEXTS, once, [site], neighbors=True, compat=compat)
    wanted = sum(total / (new if compat else count) for total, count in sums) / len(sums)
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    alone = serial_target(model, fact, CONTEXTS, once, [site])
    assert alone.loss == pytest.approx(sum(total for total, _ in sums[:3]) / new / 3, rel=1e-5)


def test_neighbours_get_the_variable_at_their_own_subject() -> None:
    """A neighbour that asks the fact's own question, with another answer, pulls the other way."""
    model = make("llama")
    fact, site = FACTS[1], model.anatomy.layer_name(2)
    against = replace(fact, edit_neighbors=(EditNeighbor(fact.subject, fact.prompt, "French"),))
    at = len(tokenizer().encode(fact.subject)) - 1
    left = []
    for target in (
        serial_target(model, against, (), HPARAMS, [site], neighbors=True),
        serial_target(model, fact, (), HPARAMS, [site]),
    ):

        def add(module: nn.Module, args: Any, output: Tensor, delta: Tensor = target.delta[site]) -> Tensor:
            output = output.clone()
            output[0, at] += delta
            return output

        handle = model.hf.get_submodule(site).register_forward_hook(add)
        left.append(nll(model, fact.question, "French")[0])
        handle.remove()
    assert left[0] < left[1] - 0.1


def test_pmet_stops_where_the_target_is_certain() -> None:
    """What is the likeliest already needs no step by PMET's rule, unsure as it is; without the rule steps are made."""
    model = make("llama")
    fact = FACTS[1]
    (target,) = tokenizer().encode(" " + fact.target_new, add_special_tokens=False)
    kept: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1]))
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([tokenizer().encode(fact.question)])).logits[0, -1]
        weight = model.head.weight
        assert isinstance(weight, Tensor)
        weight[target] = (logits.max() + 0.5) * kept[0] / kept[0].norm() ** 2  # the likeliest by a little
    handle.remove()
    assert nll(model, fact.question, fact.target_new)[0] > 1
    sites = [model.anatomy.layer_name(2), f"{model.anatomy.blocks}.2.self_attn.o_proj"]
    assert serial_target(model, fact, (), HPARAMS, sites, nll_loss_factor=1.0).updates == 0
    free = serial_target(model, fact, (), HPARAMS, sites)
    assert free.updates == HPARAMS.v_num_grad_steps - 1
    assert all(float(delta.norm()) > 0 for delta in free.delta.values())
