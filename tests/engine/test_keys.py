"""Keys and hidden states: averaged on the way, whatever batches a fact's rows lie in; the same by the kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rewire
from rewire.engine.keys import key_weights, measure_hidden, measure_keys
from rewire.engine.model import demo_file
from rewire.engine.passes import blocks_until, read_at
from rewire.engine.prompts import Row, pad, subject_rows
from rewire.engine.suffix import Suffix, record_calls
from rewire.kernels.dispatch import interpreting, recording, using

CONTEXTS = ("The harbour is near the gate. {}", "Because the lamp was out. {}", "Then {}")


def rows_of(model: rewire.Model, facts: int) -> list[list[Row]]:
    found: list[list[Row]] = subject_rows(
        model.tokenizer, rewire.read_facts(demo_file("facts.jsonl"), limit=facts), ("{}", *CONTEXTS), model.max_length
    )
    return found


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("batch_tokens", [1, 40, 10000])
def test_means_over_rows_of_different_batches(demo: rewire.Model, batch_tokens: int) -> None:
    rows = rows_of(demo, 7)
    flat = [row for group in rows for row in group]
    each = read_at(demo, flat, inputs=[1, 2], outputs=[3])
    group = torch.arange(len(flat)) // 4
    weight = torch.rand(len(flat), generator=torch.Generator().manual_seed(0))
    got = read_at(demo, flat, inputs=[1, 2], outputs=[3], group=group, weight=weight, batch_tokens=batch_tokens)
    assert set(got) == set(each)
    for key, one_by_one in each.items():
        assert relative(got[key], (one_by_one * weight[:, None]).view(7, 4, -1).sum(1)) < 1e-5


def test_facts_may_have_different_numbers_of_rows(demo: rewire.Model) -> None:
    rows = [group[:count] for group, count in zip(rows_of(demo, 3), (1, 4, 2), strict=True)]
    got = measure_keys(demo, rows, 2)
    for key, group in zip(got, rows, strict=True):
        each = read_at(demo, group, inputs=[2])["in", 2]
        assert relative(key, key_weights(len(group) - 1) @ each) < 1e-5


def test_what_a_16_bit_model_holds_is_read_as_it_is(load: Callable[[str], rewire.Model]) -> None:
    model = load("demo")
    model.hf.bfloat16()
    plain = [group[0] for group in rows_of(model, 5)]
    H = measure_hidden(model, plain, 2)
    assert H.dtype is torch.float32
    for row, h in zip(plain, H, strict=True):
        (alone,) = read_at(model, [row], outputs=[2])["out", 2]
        assert torch.equal(alone, alone.bfloat16().float())
        assert torch.equal(h, h.bfloat16().float())
        assert relative(h, alone) < 2e-2


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
def test_the_kernels_serve_keys_and_values(demo: rewire.Model) -> None:
    rows = rows_of(demo, 3)
    plain = [group[0] for group in rows]
    hidden = blocks_until(demo, pad(plain, "cpu"), 2)
    start = torch.tensor([row.position for row in plain])
    width = max(len(row.ids) - row.position for row in plain)
    suffix = Suffix.of(demo, record_calls(demo, 2, hidden.shape[1]), hidden, start, width)
    generator = torch.Generator().manual_seed(0)
    added = torch.randn(len(plain), hidden.shape[2], generator=generator)

    def everything(impl: str) -> list[Tensor]:
        moved = added.clone().requires_grad_()
        with using(impl):
            out = suffix(moved, torch.arange(3), (torch.arange(3), start))
            out.square().sum().backward()
            return [measure_keys(demo, rows, 1), measure_hidden(demo, plain, 2), out.detach(), moved.grad]

    with recording() as served:
        by_kernels = everything("triton")
    assert {name for name, _ in served} >= {"gather_mean_", "scatter_add"}
    assert {impl for name, impl in served if name in ("gather_mean_", "scatter_add")} == {"triton"}
    for got, exact in zip(by_kernels, everything("torch"), strict=True):
        assert relative(got, exact) < 1e-6
