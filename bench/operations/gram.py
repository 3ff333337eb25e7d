"""gram_: the second moment of [T, d] keys, lower triangle."""

from functools import partial

import torch

from ...kernels import gram
from ...kernels.floors import Cost, gram_cost
from ...kernels.gram import reference
from ..check import Inputs, Outputs, Shape, Subject


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    T, d = shape["T"], shape["d"]
    # keys of real layers are heavy-tailed, their columns of very different sizes
    X = torch.randn(T, d, generator=seed) * torch.rand(d, generator=seed).mul(4).exp()
    w = torch.rand(T, generator=seed) if shape.get("weighted") else None
    return X.to(device, dtype), None if w is None else w.to(device)


def run(inputs: Inputs, impl: str) -> Outputs:
    X, w = inputs
    C = torch.zeros(X.shape[1], X.shape[1], device=X.device)
    gram.gram_(C, X, w, impl=impl)
    return (C.tril_(),)


def exact(inputs: Inputs) -> Outputs:
    X, w = inputs
    zero = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    return (reference.gram(zero, X.double(), None if w is None else w.double()).tril(),)


def add_whole_(C: torch.Tensor, X: torch.Tensor, w: torch.Tensor | None) -> None:
    """The whole product: 16-bit keys by fp32 sums, on CUDA without a copy in fp32."""
    right = X if w is None else X * w[:, None].to(X.dtype)
    if X.is_cuda and X.dtype is not torch.float32:
        torch.addmm(C, X.T, right, out_dtype=torch.float32, out=C)
    else:
        C.addmm_(X.float().T, right.float())


def plain(inputs: Inputs) -> Outputs:
    X, w = inputs
    C = torch.zeros(X.shape[1], X.shape[1], device=X.device)
    add_whole_(C, X, w)
    return (C.tril_(),)


def add_timed(inputs: Inputs, impl: str | None) -> None:
    """The sum alone, into whatever is there: no zeros made, no triangle cut out."""
    X, w = inputs
    C = torch.empty(X.shape[1], X.shape[1], device=X.device)
    if impl is None:
        add_whole_(C, X, w)
    else:
        gram.gram_(C, X, w, impl=impl)


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    return gram_cost(shape["T"], shape["d"], dtype.itemsize)


SUBJECTS = (
    Subject(
        operation=gram.operation,
        make=make,
        run=run,
        exact=exact,
        plain=plain,
        cost=cost,
        library={"addmm": plain},
        timed={
            **{impl: partial(add_timed, impl=impl) for impl in ("torch", "triton")},
            **{name: partial(add_timed, impl=None) for name in ("plain", "addmm")},
        },
        odd=(
            {"T": 70, "d": 50},
            {"T": 64, "d": 64},
            {"T": 1, "d": 33},
            {"T": 0, "d": 20},
            {"T": 17, "d": 1},
            {"T": 33, "d": 100, "weighted": 1},
            {"T": 70, "d": 300, "weighted": 1},
            {"T": 600, "d": 144},
        ),
        small=({"T": 4096, "d": 1024}, {"T": 4096, "d": 3072}),
        large=({"T": 32768, "d": 14336}, {"T": 32768, "d": 16384}),
    ),
)
