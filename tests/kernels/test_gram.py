"""gram_ and mirror_ by torch: layouts, accumulation, weights, and what wrong input is told."""

import pytest
import torch

from rewire.bench.check import verdict
from rewire.kernels.dispatch import interpreting
from rewire.kernels.errors import InputError
from rewire.kernels.gram import gram_, mirror_, reference


def data(T: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.Generator().manual_seed(1000 * T + d)
    return torch.randn(d, d, generator=seed), torch.randn(T, d, generator=seed).to(dtype)


def assert_gram(got, C, X, weight=None):
    """The rule of the house, on the lower triangle."""
    exact = reference.gram(C.double(), X.double(), None if weight is None else weight.double()).tril()
    plain = reference.gram(C, X.float(), None if weight is None else weight.float()).tril()
    found = verdict((got.tril(),), (exact,), (plain,))
    assert found.passed, found


def test_no_tokens_changes_nothing():
    C, X = data(0, 300)
    got = C.clone()
    gram_(got, X)
    assert torch.equal(got, C)


def test_no_width():
    gram_(torch.zeros(0, 0), torch.zeros(5, 0))


def test_accumulates():
    C, X = data(700, 300)
    got = C.clone()
    for rows in X.split(199):
        gram_(got, rows)
    assert_gram(got, C, X)


LAYOUTS = {
    "every second row": lambda X: X[::2],
    "part of a row": lambda X: X[:, 17:90],
    "transposed": lambda X: X.T,
    "one row repeated": lambda X: X[:1].expand(50, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_keys(layout):
    X = LAYOUTS[layout](data(140, 300)[1])
    C = torch.randn(400, 400)[: X.shape[1], : X.shape[1]]  # a view too
    before = C.clone()
    gram_(C, X)
    assert_gram(C, before, X)


def test_gradients_are_not_recorded():
    C, X = data(5, 7)
    gram_(C, X.requires_grad_())
    assert not C.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_many_rows(dtype):
    C, X = data(5000, 33, dtype)
    weight = torch.rand(10000, generator=torch.Generator().manual_seed(0))[::2]
    got = C.clone()
    gram_(got, X, weight, impl="torch")
    assert_gram(got, C, X, weight)


def test_rows_of_weight_zero_are_nothing_and_of_one_are_whole():
    X = data(70, 50, torch.float16)[1]
    mask = torch.rand(70, generator=torch.Generator().manual_seed(0)) < 0.5
    zeroed = torch.where(mask[:, None], X, 0)
    X[~mask] = 6e4
    masked, expected = torch.zeros(50, 50), torch.zeros(50, 50)
    gram_(masked, X, mask, impl="torch")
    gram_(expected, zeroed, impl="torch")
    assert torch.equal(masked.tril(), expected.tril())


@pytest.mark.parametrize("d", [0, 1, 255, 256, 257, 600])
def test_mirror_is_exactly_symmetric_whatever_was_above(d):
    lower = torch.randn(d, d)
    C = lower.clone()
    C[torch.ones(d, d, dtype=torch.bool).triu(1)] = torch.nan
    mirror_(C)
    assert torch.equal(C, C.T)
    assert torch.equal(C.tril(), lower.tril())


def test_gram_then_mirror_is_the_reference():
    _, X = data(70, 300)
    C = torch.zeros(300, 300)
    gram_(C, X)
    mirror_(C)
    exact = reference.gram(torch.zeros(300, 300, dtype=torch.float64), X.double())
    assert (C - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize(
    ("C", "X", "says"),
    [
        (
            torch.zeros(3, 3, dtype=torch.float64),
            torch.zeros(5, 3),
            r"C is \[3, 3\] float64; expected \[3, 3\] float32",
        ),
        (torch.zeros(3, 4), torch.zeros(5, 3), r"C is \[3, 4\]"),
        (torch.zeros(4, 4), torch.zeros(5, 3), r"expected \[3, 3\]"),
        (torch.zeros(3, 3), torch.zeros(5, 3, dtype=torch.float64), r"X is \[5, 3\] float64"),
        (torch.zeros(3, 3), torch.zeros(5, 3, dtype=torch.int32), "X is .* int32"),
        (torch.zeros(3, 3), torch.zeros(2, 5, 3), r"X is \[2, 5, 3\]"),
        (torch.zeros(5, 3).T[:, :3], torch.zeros(5, 3), "strides"),
        (torch.zeros(1, 3).expand(3, 3), torch.zeros(5, 3), "strides"),
        (torch.zeros(3, 3, device="meta"), torch.zeros(5, 3), "C is on meta, X on cpu"),
    ],
)
def test_wrong_input_is_named(C, X, says):
    with pytest.raises(InputError, match=says):
        gram_(C, X)


def test_mirror_refuses_what_is_not_square():
    with pytest.raises(InputError, match=r"\[3, 4\]"):
        mirror_(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.ones(4), r"weight is \[4\] float32 on cpu; expected \[5\] float32 or bool on cpu"),
        (torch.ones(5, 1), r"weight is \[5, 1\]"),
        (torch.ones(5, dtype=torch.float64), "weight is .* float64"),
        (torch.ones(5, device="meta"), "on meta"),
    ],
)
def test_wrong_weights_are_named(weight, says):
    with pytest.raises(InputError, match=says):
        gram_(torch.zeros(3, 3), torch.zeros(5, 3), weight)


@pytest.mark.skipif(interpreting(), reason="the interpreter serves CPU tensors")
def test_explicit_triton_on_cpu_says_why_not():
    with pytest.raises(InputError, match="gram_: triton cannot serve this call: device is cpu; expected cuda"):
        gram_(*data(5, 3), impl="triton")


def test_unknown_impl_is_named():
    with pytest.raises(InputError, match="gram_: impl='cuda' is not one of auto, torch, triton"):
        gram_(*data(5, 3), impl="cuda")
