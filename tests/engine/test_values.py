"""The batched value optimisation against the serial one: same steps, same stops, same values, fact by fact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rewire
from rewire.bench.serial import serial_value
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file
from rewire.engine.passes import frozen
from rewire.engine.values import STOP_LOSS, optimise_values
from rewire.kernels.dispatch import interpreting, recording, using
from rewire.kernels.errors import InputError
from rewire.kernels.target_nll import target_nll

CONTEXTS = ("The harbour is near the gate. {}", "Because the lamp was out. {}")


@pytest.fixture
def facts() -> list[rewire.Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=12)


def quick(**changes: object) -> Hparams:
    values: dict[str, object] = {"layers": (1, 2), "v_num_grad_steps": 12, "v_lr": 0.1, "clamp_norm_factor": 3.0}
    return Hparams(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="some stop early"),
        pytest.param({"v_num_grad_steps": 1}, id="one forward"),
        pytest.param({"clamp_norm_factor": 0.3}, id="clamped"),
        pytest.param({"kl_factor": 2.0, "v_weight_decay": 5.0}, id="KL and decay heavy"),
        pytest.param({"layers": (0,)}, id="z at the first block"),
        pytest.param({"layers": (3,)}, id="one block above"),
    ],
)
def test_equals_serial(demo: rewire.Model, facts: list[rewire.Fact], changes: dict[str, object]) -> None:
    hparams = quick(**changes)
    found = optimise_values(demo, facts, CONTEXTS, hparams)
    with frozen(demo):
        serial = [serial_value(demo, fact, CONTEXTS, hparams) for fact in facts]
    for i, one in enumerate(serial):
        if abs(one.loss - STOP_LOSS) < 1e-3:
            continue  # rounding decides about one step more
        assert int(found.steps[i]) == one.updates
        assert float((found.Z[i] - one.z).norm() / one.z.norm()) < 1e-3
        assert float((found.h0[i] - one.h0).norm() / one.h0.norm()) < 1e-5
        assert float(found.loss[i]) == pytest.approx(one.loss, rel=1e-3, abs=1e-4)
    if not changes:
        stops = {one.updates for one in serial}
        assert min(stops) < max(stops) == hparams.v_num_grad_steps - 1, "some must stop early, others go on"


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_batch_does_not_matter(demo: rewire.Model, facts: list[rewire.Fact], size: int) -> None:
    together = optimise_values(demo, facts, CONTEXTS, quick())
    split = optimise_values(demo, facts, CONTEXTS, quick(), batch_size=size)
    assert torch.equal(together.steps, split.steps)
    assert torch.allclose(together.Z, split.Z, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
def test_by_the_kernels(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    few = quick(v_num_grad_steps=4)
    with using("torch"):
        expected = optimise_values(demo, facts[:2], CONTEXTS, few)
    with using("triton"), recording() as served:
        found = optimise_values(demo, facts[:2], CONTEXTS, few)
    assert served["target_nll", "triton"] == 4
    assert ("target_nll", "torch") not in served
    assert torch.allclose(found.Z, expected.Z, rtol=1e-4, atol=1e-4)


def test_nothing_as_wide_as_the_vocabulary_is_kept(
    demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the KL is measured from is kept as hidden states, and goes with its fact."""
    seen = []

    def look(*args: Any, first: torch.Tensor, **options: Any) -> Any:
        seen.append((args[5], len(args[0]) - len(args[2]), first))
        return target_nll(*args, first=first, **options)

    monkeypatch.setattr("rewire.engine.value_steps.target_nll", look)
    found = optimise_values(demo, facts, CONTEXTS, quick())
    assert all(first.shape == (kl, demo.anatomy.d_model) for _, kl, first in seen)
    assert {facts for facts, *_ in seen} == {12}
    assert min(kl for _, kl, _ in seen) < max(kl for _, kl, _ in seen), "no fact stopped early, or its rows stay"
    assert len(found.steps.unique()) > 1


def test_a_head_that_is_no_linear_is_refused(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.weight = head.weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.weight.T / 2

    demo.hf.set_output_embeddings(Scaled(demo.head))  # type: ignore[operator]
    with pytest.raises(InputError, match="the head is a Scaled, expected Linear"):
        optimise_values(demo, facts[:1], (), quick())


def test_no_contexts(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    found = optimise_values(demo, facts[:2], (), quick())
    with frozen(demo):
        one = serial_value(demo, facts[0], (), quick())
    assert float((found.Z[0] - one.z).norm() / one.z.norm()) < 1e-3


def test_clamp_holds(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    found = optimise_values(demo, facts, CONTEXTS, quick(clamp_norm_factor=0.3))
    ratio = (found.Z - found.h0).norm(dim=1) / found.h0.norm(dim=1)
    assert float(ratio.max()) <= 0.3 * (1 + 1e-5)
    assert float(ratio.max()) > 0.29, "no fact reached the clamp, or this shows nothing"


def test_training_state_is_left_alone(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    demo.hf.train()
    demo.hf.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    before = [parameter.requires_grad for parameter in demo.hf.parameters()]
    optimise_values(demo, facts[:1], (), quick(v_num_grad_steps=2))
    assert demo.hf.training
    assert [parameter.requires_grad for parameter in demo.hf.parameters()] == before


def test_a_broken_model_is_named(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    with torch.no_grad():
        demo.projection(4).weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.raises(InputError, match=f"{facts[0].id}.*not a number"):
        optimise_values(demo, facts[:1], CONTEXTS, quick())


def test_bfloat16_stays_near(load: Callable[[str], rewire.Model], facts: list[rewire.Fact]) -> None:
    """Deltas and losses are float32, so only the model's own rounding is seen: the way is the same."""
    model, hparams = load("demo"), quick(v_num_grad_steps=8)
    full = optimise_values(model, facts, CONTEXTS, hparams)
    model.hf.bfloat16()
    half = optimise_values(model, facts, CONTEXTS, hparams)
    assert half.Z.dtype == torch.float32
    assert torch.allclose(half.first_nll, full.first_nll, rtol=0.1, atol=0.1)
    assert float((full.first_nll - full.last_nll).min()) > 0.5, "all have moved"
    assert torch.allclose(half.first_nll - half.last_nll, full.first_nll - full.last_nll, rtol=0.1, atol=0.1)
    moved, exact = half.Z - half.h0, full.Z - full.h0
    assert float(torch.cosine_similarity(moved, exact).min()) > 0.98
