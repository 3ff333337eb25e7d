"""What the optimisation computes, counted by torch, against the least that it could be (`kernels.floors`)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file
from rewire.engine.outline import model_shape
from rewire.engine.prompts import PLAIN, fact_rows, kl_rows
from rewire.engine.suffix import record_calls
from rewire.engine.value_groups import lay_out
from rewire.engine.values import optimise_values
from rewire.kernels.floors import ValueRow, value_cost

CONTEXTS = tuple(  # ten tokens each, about
    f"{text} {{}}"
    for text in (
        "The ferry waits at the old harbour gate.",
        "Therefore the lamp was out all night.",
        "Because of the rain nobody came by.",
        "I was born in a small town there.",
        "You see the mill behind the hills.",
    )
)


def check(model: rewire.Model, facts: list[rewire.Fact], steps: int, size: int | None, v_lr: float) -> None:
    """Within 15 % of the floor, and at most a third of full forwards and backwards of the same rows."""
    hparams = Hparams(layers=(1, 2), v_num_grad_steps=steps, v_lr=v_lr, clamp_norm_factor=4.0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        values = optimise_values(model, facts, CONTEXTS, hparams, size)
    rewriting = fact_rows(model.tokenizer, facts, (PLAIN, *CONTEXTS), model.max_length)
    shape, rows, full = model_shape(model), [], 0
    for made, group, kl in zip(values.steps.tolist(), rewriting, kl_rows(model.tokenizer, facts), strict=True):
        for row in (*group, kl):
            rows.append(ValueRow(len(row.ids), row.position, len(row.labels), made + 1, made))
            length = len(row.ids)
            full += (made + 1) * (shape.blocks(shape.layers, 1, length) + shape.head(length))
            full += made * (shape.blocks(shape.layers - 3, 1, length) + shape.head(length))  # backward to the z-layer
    assert counter.get_total_flops() == pytest.approx(value_cost(shape, 2, rows, 4).flops, rel=0.15)
    assert 3 * counter.get_total_flops() < full


@pytest.mark.parametrize(
    ("facts", "steps", "size"),
    [pytest.param(48, 12, None, id="one round"), pytest.param(48, 12, 16, id="several rounds")],
)
def test_demo_facts(demo: rewire.Model, facts: int, steps: int, size: int | None) -> None:
    check(demo, rewire.read_facts(demo_file("facts.jsonl"), limit=facts), steps, size, 0.1)


def test_facts_that_stop_early(demo: rewire.Model) -> None:
    """Some are carried from round to round, and the backward of the step that stops a fact is for nothing."""
    check(demo, rewire.read_facts(demo_file("facts.jsonl"), limit=60), 12, 16, 0.3)


def test_counterfact_rows(shared: Path, load: Callable[[Path], rewire.Model]) -> None:
    from rewire.engine.datasets import read_facts

    facts = read_facts(shared / "data" / "counterfact-edit.json", 24)
    check(load(shared / "models" / "cf-gpt2"), facts, 12, None, 0.5)


def test_a_forward_from_the_subject_on(shared: Path, load: Callable[[Path], rewire.Model]) -> None:
    """Like against like, without backward: at most a third of full forwards of the same CounterFact rows."""
    from rewire.engine.datasets import read_facts

    model = load(shared / "models" / "cf-gpt2")
    facts = read_facts(shared / "data" / "counterfact-edit.json", 24)
    rewriting = fact_rows(model.tokenizer, facts, (PLAIN, *CONTEXTS), model.max_length)
    kl = kl_rows(model.tokenizer, facts)
    rows = [row for group in (*rewriting, kl) for row in group]
    longest = max(len(row.ids) for row in rows)
    z_layer = 3  # of the shipped preset
    groups, h0 = lay_out(model, z_layer, rewriting, kl, record_calls(model, z_layer, longest), longest, 512)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as suffix:
            for group in groups:
                read = torch.cat([group.label_row, group.kl_row])
                at = torch.cat([group.label_at, group.suffix.start[group.kl_row]])
                model.logits(group.suffix(torch.zeros_like(h0), group.fact, (read, at)))
        with FlopCounterMode(display=False) as full:
            for row in rows:
                model.hf(torch.tensor([row.ids]), use_cache=False)
    assert 3 * suffix.get_total_flops() < full.get_total_flops()
