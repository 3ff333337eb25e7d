"""What passes are run in: weights frozen, a GELU in one operation, and all as it was afterwards."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

import rewire
from rewire.engine.passes import fused


class Tanh(TorchFunctionMode):
    """Counts calls of torch.tanh, which a GELU in one operation does not make."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.tanh
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["gelu_new", "gelu_fast", "gelu", "quick_gelu"])
def model(request: pytest.FixtureRequest, demo: rewire.Model) -> rewire.Model:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": demo.anatomy.vocab, "resid_pdrop": 0.5}
    config = GPT2Config(**sizes, activation_function=request.param)
    return rewire.wrap(GPT2LMHeadModel(config).double(), demo.tokenizer)


def test_fused(model: rewire.Model) -> None:
    """The same in float64; nothing is left of it, neither behind an error."""
    ids = torch.arange(12).view(2, 6)
    kinds = [type(module) for module in model.hf.modules()]
    state = {name: (p.requires_grad, p.clone()) for name, p in model.hf.named_parameters()}
    model.hf.eval()
    with torch.no_grad(), Tanh() as plain:
        own = model.hf(ids).logits
    model.hf.train()
    spelled_out = model.hf.config.activation_function in ("gelu_new", "gelu_fast")
    assert plain.calls == 2 * spelled_out
    with contextlib.suppress(KeyError), fused(model), fused(model), Tanh() as found:
        assert not model.hf.training
        torch.testing.assert_close(model.hf(ids).logits, own, rtol=1e-12, atol=1e-12)
        assert found.calls == 0
        assert sum(type(module) is nn.GELU for module in model.hf.modules()) == 2 * spelled_out
        raise KeyError
    assert [type(module) for module in model.hf.modules()] == kinds
    assert model.hf.training
    for name, parameter in model.hf.named_parameters():
        assert parameter.requires_grad == state[name][0]
        assert torch.equal(parameter, state[name][1])
