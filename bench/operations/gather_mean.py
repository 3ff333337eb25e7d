"""gather_mean_: weighted sums of rows' vectors at one token; scatter_add: a vector added there."""

import torch
from torch import Tensor

from ...kernels import gather_mean
from ...kernels.floors import Cost, gather_mean_cost, scatter_add_cost
from ...kernels.gather_mean import reference
from ..check import Inputs, Outputs, Shape, Subject


def _rows(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, position and group of each row; strided: a window of a larger tensor."""
    rows, T, d, n = (shape[key] for key in ("rows", "T", "d", "n"))
    more = 3 if shape.get("strided") else 0
    X = torch.randn(rows, T + more, d + more, generator=seed)
    position = torch.randint(T, (rows,), generator=seed)
    group = torch.randint(n, (rows,), generator=seed)  # in no order, some groups without a row
    return X.to(device, dtype)[:, more:, more:], position.to(device), group.to(device)


def make_gather(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    rows = _rows(shape, dtype, device, seed)
    more = 5 if shape.get("strided") else 0
    K = torch.randn(shape["n"], shape["d"] + more, generator=seed).to(device)[:, more:]
    weight = torch.rand(shape["rows"], generator=seed).to(device) if shape.get("weighted") else None
    return (K, *rows, weight)


def run_gather(inputs: Inputs, impl: str) -> Outputs:
    K, X, position, group, weight = inputs
    found = torch.empty_strided(K.shape, K.stride(), device=K.device).copy_(K)
    gather_mean.gather_mean_(found, X, position, group, weight, impl=impl)
    return (found,)


def exact_gather(inputs: Inputs) -> Outputs:
    K, X, position, group, weight = inputs
    weight = None if weight is None else weight.double()
    return (reference.gather_mean(K.double(), X.double(), position, group, weight),)


def plain_gather(inputs: Inputs) -> Outputs:
    K, X, position, group, weight = inputs
    found = X[torch.arange(len(X), device=X.device), position].float()  # fp32 is what is summed in
    return (K.index_add(0, group, found if weight is None else found * weight[:, None]),)


def gather_floor(shape: Shape, dtype: torch.dtype) -> Cost:
    return gather_mean_cost(shape["rows"], shape["n"], shape["d"], dtype.itemsize)


def make_scatter(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    rows = _rows(shape, dtype, device, seed)
    return (*rows, torch.randn(shape["n"], shape["d"], generator=seed).to(device))


def run_scatter(inputs: Inputs, impl: str) -> Outputs:
    H, position, group, delta = inputs
    return (gather_mean.scatter_add(H, position, group, delta, impl=impl),)


def exact_scatter(inputs: Inputs) -> Outputs:
    H, position, group, delta = inputs
    return (reference.scatter_add(H.double(), position, group, delta.double()),)


def plain_scatter(inputs: Inputs) -> Outputs:
    H, position, group, delta = inputs
    return (reference.scatter_add(H.float(), position, group, delta).to(H.dtype),)


def index_put(inputs: Inputs) -> Outputs:
    H, position, group, delta = inputs
    rows = torch.arange(len(H), device=H.device)
    return (H.index_put((rows, position), delta[group].to(H.dtype), accumulate=True),)


def scatter_floor(shape: Shape, dtype: torch.dtype) -> Cost:
    return scatter_add_cost(shape["rows"], shape["T"], shape["n"], shape["d"], dtype.itemsize)


ODD: tuple[Shape, ...] = (
    {"rows": 13, "T": 7, "d": 300, "n": 5, "weighted": 1},
    {"rows": 6, "T": 9, "d": 33, "n": 9, "strided": 1, "weighted": 1},
    {"rows": 9, "T": 5, "d": 1100, "n": 3},
    {"rows": 1, "T": 1, "d": 64, "n": 1},
    {"rows": 10, "T": 3, "d": 1, "n": 4, "strided": 1},
    {"rows": 0, "T": 4, "d": 20, "n": 2, "weighted": 1},
)

SUBJECTS = (
    Subject(
        operation=gather_mean.gather_operation,
        make=make_gather,
        run=run_gather,
        exact=exact_gather,
        plain=plain_gather,
        cost=gather_floor,
        odd=ODD,
        small=({"rows": 66, "T": 15, "d": 3072, "n": 11, "weighted": 1},),  # one CPU batch of rows of GPT-2 small
        large=(
            {"rows": 2048, "T": 32, "d": 14336, "n": 342, "weighted": 1},
            {"rows": 2048, "T": 32, "d": 16384, "n": 342, "weighted": 1},
        ),
        library={"index_add": plain_gather},
    ),
    Subject(
        operation=gather_mean.scatter_operation,
        make=make_scatter,
        run=run_scatter,
        exact=exact_scatter,
        plain=plain_scatter,
        cost=scatter_floor,
        odd=ODD,
        small=({"rows": 128, "T": 16, "d": 256, "n": 128}, {"rows": 64, "T": 16, "d": 768, "n": 64}),
        large=({"rows": 1024, "T": 48, "d": 4096, "n": 171},),
        library={"index_put": index_put},
    ),
)
