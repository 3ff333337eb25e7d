"""The baseline is honest: it computes what the published structure costs, no more."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire.bench.serial import serial_spread, serial_value
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file
from rewire.engine.outline import model_shape
from rewire.engine.passes import frozen
from rewire.engine.session import EditSession
from rewire.kernels.floors import published_value_step

CONTEXTS = ("The harbour is near the gate. {}", "Because the lamp was out. {}")
HPARAMS = Hparams(layers=(1, 2), v_num_grad_steps=4, v_lr=0.01)


@pytest.fixture
def facts() -> list[rewire.Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=6)


def test_flops_are_the_published_count(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    """Within 5 %; weights frozen, so no weight gradients are in it."""
    with frozen(demo), FlopCounterMode(display=False) as counter:
        value = serial_value(demo, facts[0], CONTEXTS, HPARAMS)
    assert value.updates == HPARAMS.v_num_grad_steps - 1
    shape = model_shape(demo)
    rows = len(CONTEXTS) + 2
    steps = [update < value.updates for update in range(value.updates + 1)]
    closed = sum(published_value_step(shape, 2, rows, 1, value.tokens, update) for update in steps)
    assert counter.get_total_flops() == pytest.approx(closed, rel=0.05)


def test_spread_is_the_engines(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    """The oracle's LU and full passes give the update of the engine's Cholesky and truncated ones."""
    session = EditSession(demo, hparams={"layers": [1, 2], "v_num_grad_steps": 4}, contexts=CONTEXTS)
    with frozen(demo):
        Z = torch.stack([serial_value(demo, fact, CONTEXTS, session.hparams).z for fact in facts])
    before = [p.clone() for p in demo.hf.parameters()]
    edit = session.edit(facts, evaluate=False)
    moments = {layer: session.held.moments[demo.anatomy.layer_name(layer)] for layer in (1, 2)}
    update = session.weights.updates[0]
    session.undo(edit.id)
    assert all(torch.equal(a, b) for a, b in zip(before, demo.hf.parameters(), strict=True))
    serial = serial_spread(demo, facts, CONTEXTS, session.hparams, Z, moments)
    for name, change in serial.items():
        assert float((update[name].dense() - change).norm() / change.norm()) < 1e-3, name
