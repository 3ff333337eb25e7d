"""add_delta_ and delta_linear: rows of tokens through one projection, each row with its own low-rank delta."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import delta_linear as operations
from ...kernels.delta_linear import reference
from ...kernels.floors import Cost, add_delta_cost, delta_linear_cost
from ..check import Inputs, Outputs, Shape, Subject


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    """x, left, right, group. T = 0: x is [rows, d_in]; "plain": rows without a delta; "fp32": factors in fp32."""
    rows, T, d_in, d_out, G, r = (shape[name] for name in ("rows", "T", "d_in", "d_out", "G", "r"))
    x = torch.randn(rows, max(T, 1), d_in, generator=seed)
    left = torch.randn(G, d_out, r, generator=seed)
    right = torch.randn(G, r, d_in, generator=seed) / max(1, d_in) ** 0.5
    group = torch.randint(G, (rows,), generator=seed)
    if shape.get("plain"):
        group[torch.randperm(rows, generator=seed)[: shape["plain"]]] = -1
    factors = torch.float32 if shape.get("fp32") else dtype
    x = x.to(device, dtype) if T else x[:, 0].to(device, dtype)
    return x, left.to(device, factors), right.to(device, factors), group.to(device)


def make_add(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    x, left, right, group = make(shape, dtype, device, seed)
    y = torch.randn(*x.shape[:-1], shape["d_out"], generator=seed)
    return y.to(device, dtype), x, left, right, group


def make_linear(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    x, left, right, group = make(shape, dtype, device, seed)
    d_in, d_out = shape["d_in"], shape["d_out"]
    weight = torch.randn(d_in, d_out, generator=seed) / max(1, d_in) ** 0.5
    bias = torch.randn(d_out, generator=seed).to(device, dtype) if shape.get("bias") else None
    weight = weight.to(device, dtype).T if shape.get("conv1d") else weight.T.contiguous().to(device, dtype)
    return x, weight, left, right, group, bias


def run_add(inputs: Inputs, impl: str) -> Outputs:
    y, *rest = inputs
    y = y.clone()
    add_in_place((y, *rest), impl)
    return (y,)


def add_in_place(inputs: Inputs, impl: str) -> None:
    y, x, left, right, group = inputs
    operations.add_delta_(y, x, left, right, group, impl=impl)


def run_linear(inputs: Inputs, impl: str) -> Outputs:
    x, weight, left, right, group, bias = inputs
    return (operations.delta_linear(x, weight, left, right, group, bias, impl=impl),)


def exact_add(inputs: Inputs) -> Outputs:
    y, x, left, right, group = inputs
    return (reference.add_delta(y.double(), x.double(), left.double(), right.double(), group),)


def exact_linear(inputs: Inputs) -> Outputs:
    x, weight, left, right, group, bias = inputs
    bias = None if bias is None else bias.double()
    return (reference.delta_linear(x.double(), weight.double(), left.double(), right.double(), group, bias),)


def plain_add(inputs: Inputs) -> Outputs:
    """Two batched products in the dtype of the activations, and the sum."""
    y, x, left, right, group = inputs
    if not len(left):
        return (y,)
    x, deltas = (x if x.ndim == 3 else x[:, None]), group.clamp_min(0)
    delta = torch.bmm(torch.bmm(x, right[deltas].to(x.dtype).mT), left[deltas].to(x.dtype).mT)
    return (y + torch.where(group[:, None, None] >= 0, delta, 0).view(y.shape),)


def plain_linear(inputs: Inputs) -> Outputs:
    x, _, left, right, group, _ = inputs
    return plain_add((product(inputs), x, left, right, group))


def product(inputs: Inputs) -> Tensor:
    """The plain linear map without deltas: what delta_linear may cost 5 % more than, at rank 1."""
    x, weight, *_, bias = inputs
    return F.linear(x, weight, bias)


def two_bmm(inputs: Inputs) -> Outputs:
    y, *rest = inputs
    y = y.clone()
    two_bmm_in_place((y, *rest))
    return (y,)


def two_bmm_in_place(inputs: Inputs) -> None:
    """Every row has a delta in the shapes that are timed."""
    y, x, left, right, group = inputs
    s = torch.bmm(x, right[group].to(x.dtype).mT)
    y.baddbmm_(s, left[group].to(x.dtype).mT)


def linear_and_two_bmm(inputs: Inputs) -> Outputs:
    x, weight, left, right, group, bias = inputs
    y = F.linear(x, weight, bias)
    two_bmm_in_place((y, x, left, right, group))
    return (y,)


def cost_add(shape: Shape, dtype: torch.dtype) -> Cost:
    return add_delta_cost(*_sizes(shape), dtype.itemsize, 4 if shape.get("fp32") else dtype.itemsize)


def cost_linear(shape: Shape, dtype: torch.dtype) -> Cost:
    return delta_linear_cost(*_sizes(shape), dtype.itemsize, 4 if shape.get("fp32") else dtype.itemsize)


def _sizes(shape: Shape) -> tuple[int, int, int, int, int]:
    return shape["rows"] * max(shape["T"], 1), shape["d_in"], shape["d_out"], min(shape["G"], shape["rows"]), shape["r"]


ODD: tuple[Shape, ...] = (
    {"rows": 5, "T": 7, "d_in": 300, "d_out": 70, "G": 3, "r": 1, "plain": 2},
    {"rows": 3, "T": 20, "d_in": 64, "d_out": 33, "G": 4, "r": 3, "fp32": 1},
    {"rows": 4, "T": 17, "d_in": 130, "d_out": 300, "G": 2, "r": 5, "plain": 1, "bias": 1, "conv1d": 1},
    {"rows": 2, "T": 17, "d_in": 50, "d_out": 20, "G": 2, "r": 17, "fp32": 1, "conv1d": 1},
    {"rows": 2, "T": 3, "d_in": 40, "d_out": 60, "G": 2, "r": 70, "plain": 1},  # two passes
    {"rows": 1, "T": 3, "d_in": 4100, "d_out": 5, "G": 1, "r": 2},  # two spans of columns
    {"rows": 6, "T": 0, "d_in": 70, "d_out": 40, "G": 3, "r": 2, "plain": 2, "bias": 1},
    {"rows": 1, "T": 1, "d_in": 1, "d_out": 1, "G": 1, "r": 1},
    {"rows": 3, "T": 4, "d_in": 20, "d_out": 10, "G": 2, "r": 1, "plain": 3},
    {"rows": 0, "T": 5, "d_in": 20, "d_out": 10, "G": 2, "r": 1},
    {"rows": 3, "T": 5, "d_in": 20, "d_out": 10, "G": 2, "r": 0},
)
SMALL: tuple[Shape, ...] = tuple(
    {"rows": 64, "T": 20, "d_in": d_in, "d_out": d_out, "G": 64, "r": r}
    for d_in, d_out in ((1024, 256), (3072, 768))
    for r in (1, 16)
)
# Llama-3-8B and GPT-J-6B: 16,384 tokens
LARGE: tuple[Shape, ...] = tuple(
    {"rows": 512, "T": 32, "d_in": d_in, "d_out": 4096, "G": 512, "r": r} for d_in in (14336, 16384) for r in (1, 16)
)

SUBJECTS = (
    Subject(
        operation=operations.add_operation,
        make=make_add,
        run=run_add,
        exact=exact_add,
        plain=plain_add,
        cost=cost_add,
        odd=ODD,
        small=SMALL,
        large=LARGE,
        library={"two bmm": two_bmm},
        timed={
            "torch": partial(add_in_place, impl="torch"),
            "triton": partial(add_in_place, impl="triton"),
            "two bmm": two_bmm_in_place,
        },
    ),
    Subject(
        operation=operations.operation,
        make=make_linear,
        run=run_linear,
        exact=exact_linear,
        plain=plain_linear,
        cost=cost_linear,
        odd=ODD,
        small=SMALL,
        large=LARGE,
        library={"linear and two bmm": linear_and_two_bmm},
        beside={"product": product},
    ),
)
