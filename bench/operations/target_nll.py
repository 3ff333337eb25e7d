"""target_nll: negative log-likelihood and KL of hidden rows behind a frozen head, and the gradient of both."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from ...kernels import target_nll
from ...kernels.errors import InputError
from ...kernels.floors import Cost, target_nll_cost
from ...kernels.target_nll import reference
from ..check import Inputs, Outputs, Shape, Subject


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    """rows, of which the last `kl` are KL rows, of facts in no order. Some labels are likely."""
    rows, d, vocab = shape["rows"], shape["d"], shape["vocab"]
    m = rows - min(rows, shape.get("kl", 0))
    facts = max(1, rows // 3)
    head = torch.randn(vocab, d, generator=seed) * (3 / d**0.5)
    labels = torch.randint(vocab, (m,), generator=seed)
    hidden = torch.randn(rows, d, generator=seed)
    hidden[:m] += torch.rand(m, 1, generator=seed) * head[labels]
    first = hidden[m:] + 0.3 * torch.randn(rows - m, d, generator=seed)
    fact = torch.randint(facts, (rows,), generator=seed)
    weight = torch.rand(rows, generator=seed)
    bias = torch.randn(vocab, generator=seed).to(device, dtype) if shape.get("bias") else None
    return (
        hidden.to(device, dtype),
        head.to(device, dtype),
        labels.to(device),
        fact.to(device),
        weight.to(device),
        facts,
        first.to(device, dtype),
        bias,
        float(shape["softcap"]) if shape.get("softcap") else None,
    )


def _with_gradient(inputs: Inputs, loss: Callable[[Tensor], tuple[Tensor, ...]]) -> Outputs:
    """nll, KL and the gradient of a sum of them in which each fact counts differently.

    Not the count of missed labels: where two logits are all but equal, rounding decides.
    """
    hidden, facts = inputs[0].detach().requires_grad_(), inputs[5]
    nll, kl = loss(hidden)[:2]
    share = torch.linspace(0.5, 1.5, facts, device=nll.device)
    (gradient,) = torch.autograd.grad((nll * share).sum() + (kl * share.flip(0)).sum(), hidden)
    return nll.detach(), kl.detach(), gradient


def run(inputs: Inputs, impl: str) -> Outputs:
    _, head, labels, fact, weight, facts, first, bias, softcap = inputs
    options = {"first": first, "bias": bias, "softcap": softcap, "impl": impl}
    return _with_gradient(
        inputs, lambda hidden: target_nll.target_nll(hidden, head, labels, fact, weight, facts, **options)
    )


def exact(inputs: Inputs) -> Outputs:
    double: Inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return _with_gradient(double, lambda hidden: reference.target_nll(hidden, *double[1:]))


def plain(inputs: Inputs) -> Outputs:
    """As a model computes it: logits in its dtype, fp32 from there on."""
    head, labels, (first, bias, softcap) = inputs[1], inputs[2], inputs[6:]
    m = len(labels)

    def log_probabilities(rows: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(rows, head, bias).float()
        return (logits if softcap is None else torch.tanh(logits / softcap) * softcap).log_softmax(-1)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        now = log_probabilities(hidden)
        of_kl = (now[m:].exp() * (now[m:] - log_probabilities(first))).sum(-1)
        return _per_fact(inputs, torch.cat([-now[:m].gather(1, labels[:, None])[:, 0], of_kl]))

    return _with_gradient(inputs, loss)


def _per_fact(inputs: Inputs, loss: Tensor) -> tuple[Tensor, Tensor]:
    labels, fact, weight, facts = inputs[2:6]
    m, weighted, zero = len(labels), loss * weight, loss.new_zeros(facts)
    return zero.index_add(0, fact[:m], weighted[:m]), zero.index_add(0, fact[m:], weighted[m:])


def linear_cross_entropy(inputs: Inputs, reduction: str = "none") -> Outputs:
    """In chunks on a GPU. Its loss is rounded to the inputs' dtype: in 16 bits the gradient alone is compared."""
    call = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if call is None:
        raise InputError(f"torch {torch.__version__} has no linear_cross_entropy")
    _, head, labels, *_, bias, softcap = inputs
    if softcap is not None:
        raise InputError("it has no soft cap")
    options = {"linear_bias": bias, "options": torch.nn.LinearCrossEntropyOptions() if head.is_cuda else None}
    found = _by_library(inputs, reduction, lambda hidden: call(hidden, head, labels, reduction=reduction, **options))
    return found if head.dtype is torch.float32 else found[2:]


def liger(inputs: Inputs, reduction: str = "none") -> Outputs:
    try:
        call = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    except ImportError:
        raise InputError("liger-kernel is not installed") from None
    _, head, labels, *_, bias, softcap = inputs
    if not head.is_cuda:
        raise InputError("liger-kernel needs a GPU")
    options = {"bias": bias, "softcap": softcap, "reduction": reduction}
    return _by_library(inputs, reduction, lambda hidden: call(hidden, head, labels, **options))


def _by_library(inputs: Inputs, reduction: str, loss: Callable[[Tensor], Tensor]) -> Outputs:
    if len(inputs[2]) < len(inputs[0]):
        raise InputError("it has no KL of stored rows")
    if reduction == "none":
        return _with_gradient(inputs, lambda hidden: _per_fact(inputs, loss(hidden).float()))
    hidden = inputs[0].detach().requires_grad_()
    return torch.autograd.grad(loss(hidden), hidden)


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    kl = min(shape["rows"], shape.get("kl", 0))
    return target_nll_cost(shape["rows"], kl, shape["d"], shape["vocab"], dtype.itemsize)


SUBJECTS = (
    Subject(
        operation=target_nll.operation,
        make=make,
        run=run,
        exact=exact,
        plain=plain,
        cost=cost,
        odd=(
            {"rows": 70, "d": 50, "vocab": 300, "kl": 9},
            {"rows": 1, "d": 33, "vocab": 5000},
            {"rows": 24, "d": 20, "vocab": 777, "kl": 24, "bias": 1, "softcap": 5},
            {"rows": 30, "d": 300, "vocab": 8193, "kl": 12, "softcap": 30},
            {"rows": 25, "d": 64, "vocab": 17000, "kl": 10, "bias": 1},
            {"rows": 0, "d": 4, "vocab": 5},
            {"rows": 7, "d": 1, "vocab": 1, "kl": 2},
        ),
        # a CPU's group of rows; with all of a vocabulary the CPU's product in fp16 would take minutes
        small=({"rows": 110, "d": 768, "vocab": 8192}, {"rows": 126, "d": 256, "vocab": 4096, "kl": 16}),
        # Llama-3-8B without and with KL rows, GPT-J, Gemma 2
        large=(
            {"rows": 4096, "d": 4096, "vocab": 128256},
            {"rows": 3500, "d": 4096, "vocab": 128256, "kl": 350},
            {"rows": 4096, "d": 4096, "vocab": 50400, "bias": 1},
            {"rows": 2048, "d": 3584, "vocab": 256000, "kl": 200, "softcap": 30},
        ),
        library={"linear_cross_entropy": linear_cross_entropy, "liger": liger},
        # without weights, so that the gradient can be found with the loss
        beside={
            "linear_cross_entropy, sum": partial(linear_cross_entropy, reduction="sum"),
            "liger, sum": partial(liger, reduction="sum"),
        },
    ),
)
