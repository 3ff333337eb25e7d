"""Blocks run one by one are the model's own forward: resumed at any block, and with a projection put off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from second_device import SECOND, placed, two_devices
from small_models import FAMILIES, GROUPED, LAYERS, VOCAB, build, make, tokenizer
from torch import Tensor

import rewire
from rewire.engine.passes import blocks_until, fused, hidden_of, hooks
from rewire.engine.prompts import Row, pad
from rewire.engine.walk import calls_until, cut_calls, embed, part, run_blocks, verify_walk

LENGTHS = (11, 4, 9, 7)  # past the sliding windows of 8
families = pytest.mark.parametrize("family", FAMILIES)


def token_rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pad(
        [Row(tuple(torch.randint(2, VOCAB, (length,), generator=generator).tolist())) for length in LENGTHS], "cpu"
    )


def real(hidden: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(hidden, LENGTHS, strict=True)])


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@torch.no_grad()
def inputs_of_blocks(model: rewire.Model, ids: Tensor) -> list[Tensor]:
    """What each block reads in a forward of the model's own, and behind them what the last one gives."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [model.block(i).register_forward_hook(keep, with_kwargs=True) for i in range(LAYERS)]
    with hooks(*handles):
        model.hf(input_ids=ids, use_cache=False)
    return [*seen, blocks_until(model, ids, LAYERS - 1)]


@families
@torch.no_grad()
def test_resumed_at_a_block(family: str) -> None:
    """Bit for bit, from every block to every later one."""
    model, ids = make(family), token_rows()
    with fused(model):
        own = inputs_of_blocks(model, ids)
        calls = calls_until(model, LAYERS - 1, ids.shape[1])
        assert torch.equal(embed(model, ids), own[0])
        for first in range(LAYERS + 1):
            for last in range(first, LAYERS + 1):
                assert torch.equal(run_blocks(model, own[first], calls, first, last), own[last])


@families
@torch.no_grad()
def test_calls_of_longer_rows_serve_shorter_ones(family: str) -> None:
    """Also where only the longer rows need a mask, for their sliding windows."""
    model, ids = make(family), token_rows()
    with fused(model):
        calls = calls_until(model, LAYERS - 1, 20)
        for length in (11, 7, 1):
            short = ids[:, :length]
            own = inputs_of_blocks(model, short)
            cut = cut_calls(calls, 20, length)
            assert relative(run_blocks(model, own[0], cut, 0, LAYERS), own[-1]) < 1e-6


def test_calls_that_cannot_be_cut() -> None:
    with pytest.raises(rewire.InputError, match=r"shape \(3, 9\)"):
        cut_calls([((), {"bias": (torch.ones(3, 9),)})], 9, 8)


@families
@torch.no_grad()
def test_a_projection_put_off(family: str) -> None:
    """With the weight as it was, and as it is when the parts are joined; the weight does not enter before."""
    model, ids = make(family), token_rows()
    with fused(model):
        own = inputs_of_blocks(model, ids)
        calls = calls_until(model, LAYERS - 1, ids.shape[1])
        for layer in range(LAYERS):
            weight = model.projection(layer).weight
            before = weight.clone()
            weight.fill_(torch.nan)
            parted = part(model, own[layer], calls, layer)
            weight.copy_(before)
            assert relative(real(parted.join(model)), real(own[layer + 1])) < 1e-6
            position = torch.tensor(LENGTHS) - 1
            at_end = torch.stack([row[at] for row, at in zip(own[layer + 1], position, strict=True)])
            assert relative(parted.at(position).join(model), at_end) < 1e-6
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            changed = hidden_of(run_blocks(model, own[layer], calls, layer, layer + 1))
            assert relative(changed, own[layer + 1]) > 1e-3
            assert relative(real(parted.join(model)), real(changed)) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@torch.no_grad()
def test_placed_on_several_devices(family: str) -> None:
    """From one device to the other and back, in two parts on each, read at tokens that are named on the other."""
    ids = token_rows()
    position = torch.tensor(LENGTHS) - 1
    exact = real(blocks_until(make(family), ids, LAYERS - 1))
    with two_devices():
        model = placed(make(family), {1, 3})
        verify_walk(model, [0, 1, 3])
        with fused(model):
            calls, hidden = calls_until(model, LAYERS - 1, ids.shape[1]), embed(model, ids)
            for layer in range(LAYERS):
                parted = part(model, hidden, calls, layer)
                hidden, at_end = parted.join(model), parted.at(position.to(ids.device)).join(model)
                assert at_end.device == hidden.device == (SECOND if layer in (1, 3) else ids.device)
                found = hidden.cpu()[torch.arange(len(position)), position]
                assert relative(at_end.cpu(), found) < 1e-6
        assert relative(real(hidden.cpu()), exact) < 1e-6


@families
@torch.no_grad()
def test_in_16_bits_no_more_is_lost_than_by_the_model(family: str) -> None:
    ids = token_rows()
    exact = blocks_until(make(family), ids, LAYERS - 1)
    model = make(family)
    model.hf.bfloat16()
    with fused(model):
        calls = calls_until(model, LAYERS - 1, ids.shape[1])
        hidden = embed(model, ids)
        for layer in range(LAYERS):
            hidden = part(model, hidden, calls, layer).join(model)
    assert hidden.dtype is torch.bfloat16
    lost = relative(real(blocks_until(model, ids, LAYERS - 1)), real(exact))
    assert relative(real(hidden), real(exact)) < 1.25 * lost


@families
def test_families_pass_the_trial(family: str) -> None:
    model = make(family)
    verify_walk(model, [0, 1, 3])
    model.hf.bfloat16()
    verify_walk(model, [1, 2])


def test_what_runs_otherwise_is_refused() -> None:
    """A rescaled projection, something that differs from row to row, and something that passes the blocks by."""
    granite = rewire.wrap(build("GraniteForCausalLM", GROUPED | {"residual_multiplier": 0.5}), tokenizer())
    bloom = rewire.wrap(build("BloomForCausalLM", GROUPED | {"n_layer": LAYERS, "n_head": 4}), tokenizer())
    for model in (granite, bloom):
        with pytest.raises(rewire.InputError, match="cannot be edited yet"):
            verify_walk(model, [1, 2])


def test_something_that_depends_on_the_tokens_is_refused() -> None:
    """A family that hands its blocks the embeddings too: recorded ones are other rows'."""
    model = make("llama")
    seen: list[Tensor] = []

    def with_embeddings(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, first: Tensor, **kwargs: Any) -> Any:
            return forward(hidden + 0.5 * first, *args, **kwargs)

        return run

    def hand(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        kwargs.setdefault("first", seen[-1])
        return args, kwargs

    model.hf.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    model.block(1).forward = with_embeddings(model.block(1).forward)
    model.block(1).register_forward_pre_hook(hand, with_kwargs=True)
    with pytest.raises(rewire.InputError, match="one by one give something else"):
        verify_walk(model, [1, 2])
