"""The loss of values: negative log-likelihood and KL divergence behind a frozen head, its gradient, and misses."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import TORCH, TRITON, WIDE, Implementation, Operation
from ..errors import InputError

CHUNK = 256  # rows whose logits the torch implementation has at once; with fewer a product waits for the head


def target_nll(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    fact: Tensor,
    weight: Tensor,
    facts: int,
    *,
    first: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each fact's rows (nll, KL, missed), each [facts] fp32: weighted sums in nats, and a count of label rows.

    hidden: [m + k, d] fp32, fp16, bf16 or fp64, behind the final norm: m rows that predict a label, then k KL rows
    head: [V, d] as hidden, frozen
    labels: [m] int64, in 0 .. V - 1
    fact: [m + k] int64, the fact of each row, in 0 .. facts - 1, in any order
    weight: [m + k] fp32, of each row
    first: [k, d] as hidden, what the KL rows were before; needed where there are any (k = 0: may be None)
    bias: [V] as hidden, of the head
    softcap: the logits are softcap * tanh((head hidden + bias) / softcap), softcap > 0
    impl: "triton" (CUDA of compute capability >= 8.0, or the interpreter), "torch", or "auto": triton where it serves

    ``nll[f] = sum weight (-log p[label])`` and ``KL[f] = sum weight sum_j p_j (log p_j - log q_j)``, q of `first`.
    ``missed[f]``: rows whose label is not the most probable token, whatever their weight; a label that shares the
    maximum is a hit, a row whose loss is NaN a miss. nll and KL can be differentiated, in `hidden` alone.
    A fact without rows gets 0; a row that is NaN leaves other facts alone. The logits of all rows never exist at once.
    As the head is frozen and the loss linear in the weights, the gradient is found with the loss: two products with the
    head a row, one where no gradient is wanted; one or two more a row of `first`. It can be differentiated once.

    Triton keeps logits of 16-bit inputs as the fp32 sums that they are, torch rounds them to the inputs' dtype (so that
    more labels share the maximum). What follows is fp32; for the product with the head exp(logit - maximum) is rounded
    to its dtype (torch: the gradient of the logits). Two runs of one implementation agree bit for bit.

    Raises InputError: dtype, shape or device is not as above, an index is out of range, or ``impl`` cannot serve these
    arguments. Indices are looked at on a CPU alone, where it costs no wait; on CUDA a label out of range gives NaN.
    """
    _check(hidden, head, labels, fact, weight, facts, first, bias, softcap)
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    with torch.set_grad_enabled(wanted):
        nll, kl, missed = _Loss.apply(hidden, head, labels, fact, weight, facts, first, bias, softcap, wanted, impl)
    return nll, kl, missed


class _Loss(torch.autograd.Function):
    """The operation's rows, summed over facts."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        head, labels, fact, weight, facts, first, bias, softcap, wanted, impl = rest
        loss, of_label, gradient = operation(hidden, head, labels, first, bias, softcap, wanted, impl=impl)
        ctx.save_for_backward(fact, weight, gradient)
        ctx.labels = m = len(labels)
        loss *= weight
        # of the ways to add at indices, the one that is deterministic on CUDA
        nll, kl, missed = (loss.new_zeros(facts) for _ in range(3))
        nll.index_put_((fact[:m],), loss[:m], accumulate=True)
        kl.index_put_((fact[m:],), loss[m:], accumulate=True)
        missed.index_put_((fact[:m],), of_label, accumulate=True)
        ctx.mark_non_differentiable(missed)
        return nll, kl, missed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_nll: Tensor, of_kl: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        fact, weight, gradient = ctx.saved_tensors
        m = ctx.labels
        scale = torch.cat([of_nll[fact[:m]], of_kl[fact[m:]]]) * weight
        # in fp32, rounded once
        return torch.mul(gradient, scale[:, None], out=torch.empty_like(gradient)), *[None] * 10


def _check(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    fact: Tensor,
    weight: Tensor,
    facts: int,
    first: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    if hidden.ndim != 2 or hidden.dtype not in WIDE:
        raise InputError(f"target_nll: hidden is {_name(hidden)}; expected [rows, d] in float16 to float64 or bfloat16")
    rows, d = hidden.shape
    if head.ndim != 2 or head.shape[1] != d or not len(head):
        raise InputError(f"target_nll: head is {_name(head)}; expected [V, {d}], V >= 1, for hidden {_name(hidden)}")
    if labels.ndim != 1 or len(labels) > rows:
        raise InputError(f"target_nll: labels are {_name(labels)}; expected [m], m <= {rows}, int64")
    k = rows - len(labels)
    if first is None and k:
        raise InputError(f"target_nll: first is missing; expected [{k}, {d}] for the {k} rows without a label")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "head": (head, (len(head), d), hidden.dtype),
        "labels": (labels, (len(labels),), torch.int64),
        "fact": (fact, (rows,), torch.int64),
        "weight": (weight, (rows,), torch.float32),
        "first": (first, (k, d), hidden.dtype),
        "bias": (bias, (len(head),), hidden.dtype),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != hidden.device:
            raise InputError(
                f"target_nll: {name} is {_name(tensor)} on {tensor.device}; "
                f"expected {list(shape)} {_dtype(dtype)} on {hidden.device}"
            )
    if softcap is not None and not softcap > 0:
        raise InputError(f"target_nll: softcap is {softcap}; expected a positive number or None")
    for name, index, end in (("labels", labels, len(head)), ("fact", fact, facts)):
        if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < end:
            raise InputError(f"target_nll: {name} go from {index.min()} to {index.max()}; expected 0 to {end - 1}")


def _name(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {_dtype(tensor.dtype)}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    first: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of each row, [rows] fp32, whether its label is missed, [m] fp32, and the gradient, [rows, d] as hidden."""
    rows, m = len(hidden), len(labels)
    loss, missed = (hidden.new_empty(count, dtype=torch.float32) for count in (rows, m))
    gradient = hidden.new_empty(hidden.shape) if wanted else None
    start = 0
    while start < rows:
        a = min(CHUNK, max(0, m - start))
        b = min((CHUNK - a) // 2, rows - start - a)
        chunk = slice(start, start + a + b)
        read = hidden[chunk]
        if b:  # one product for all: short ones wait for the head
            assert first is not None
            at = start + a - m
            read = torch.cat([read, first[at : at + b]])
        loss[chunk], missed[start : start + a], of_logits = _step(
            read, head, labels[start : start + a], bias, softcap, wanted
        )
        if gradient is not None and of_logits is not None:
            torch.mm(of_logits, head, out=gradient[chunk])
        start += a + b
    return loss, missed, gradient


def _step(
    hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, which labels are missed and, where wanted, the gradient of the logits in the head's dtype.

    hidden: rows with a label, then KL rows, then as many of `first`
    """
    a = len(labels)
    n = (a + len(hidden)) // 2
    logits = torch.nn.functional.linear(hidden, head, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    slope = None
    if softcap is not None:
        share = logits.div_(softcap).tanh_()
        slope = 1 - share[: n if wanted else 0] ** 2
        share *= softcap
    p = torch.softmax(logits, 1)
    # log sum exp in two parts, which are then subtracted each for itself: rounding is that of the differences
    top, log_total = logits.amax(1), -p.amax(1).log()
    known = (labels >= 0) & (labels < len(head))
    at = torch.where(known, labels, 0)[:, None]
    picked = torch.where(known, logits[:a].gather(1, at)[:, 0], torch.nan)
    of_label = (top[:a] - picked) + log_total[:a]
    missed = (picked != top[:a]) | of_label.isnan()

    gap = logits[a:n].sub_(logits[n:])
    mean = torch.linalg.vecdot(p[a:n], gap)
    of_kl = mean - ((top[a:n] - top[n:]) + (log_total[a:n] - log_total[n:]))  # sum p (log p - log q)
    loss = torch.cat([of_label, of_kl])
    if not wanted:
        return loss, missed, None
    p[:a].scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
    p[a:n] *= gap.sub_(mean[:, None])  # p ((log p - log q) - KL)
    if slope is not None:
        p[:n] *= slope
    return loss, missed, p[:n].to(head.dtype)


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    from . import kernel  # here, so that the room imports where Triton is missing

    return kernel.rows(*args)


operation = Operation(
    "target_nll",
    triton=Implementation(_triton, TRITON),
    torch=Implementation(_torch, TORCH),
)
