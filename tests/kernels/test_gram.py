"""gram_ and mirror_ by torch, and how an implementation is chosen."""

import logging

import pytest
import torch

from rewire.kernels import gram
from rewire.kernels.dispatch import interpreting
from rewire.kernels.errors import InputError
from rewire.kernels.gram import gram_, mirror_

SHAPES = [(70, 300), (1, 300), (64, 1), (1, 1), (5000, 33), (128, 512), (9, 257)]


def data(T: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.Generator().manual_seed(1000 * T + d)
    return torch.randn(d, d, generator=seed), torch.randn(T, d, generator=seed).to(dtype)


@pytest.mark.parametrize(("T", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_triangle(T, d, dtype, assert_gram):
    C, X = data(T, d, dtype)
    got = C.clone()
    gram_(got, X, impl="torch")
    assert_gram(got, C, X)


def test_no_tokens_changes_nothing():
    C, X = data(0, 300)
    got = C.clone()
    gram_(got, X)
    assert torch.equal(got, C)


def test_no_width():
    gram_(torch.zeros(0, 0), torch.zeros(5, 0))


def test_accumulates(assert_gram):
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
def test_layouts_of_keys(layout, assert_gram):
    X = LAYOUTS[layout](data(140, 300)[1])
    C = torch.randn(400, 400)[: X.shape[1], : X.shape[1]]  # a view too
    before = C.clone()
    gram_(C, X)
    assert_gram(C, before, X)


def test_gradients_are_not_recorded():
    C, X = data(5, 7)
    gram_(C, X.requires_grad_())
    assert not C.requires_grad


def test_twice_the_same_bits():
    C, X = data(700, 300, torch.bfloat16)
    first, second = C.clone(), C.clone()
    gram_(first, X)
    gram_(second, X)
    assert torch.equal(first.tril(), second.tril())


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
    exact = gram.reference.gram(torch.zeros(300, 300, dtype=torch.float64), X.double())
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


@pytest.mark.skipif(interpreting(), reason="the interpreter serves CPU tensors")
def test_explicit_triton_on_cpu_says_why_not():
    with pytest.raises(InputError, match="triton cannot serve this call: the tensors are on cpu"):
        gram_(*data(5, 3), impl="triton")


def test_explicit_triton_without_triton_says_so(monkeypatch):
    monkeypatch.setattr("rewire.kernels.dispatch.find_spec", lambda name: None)
    with pytest.raises(InputError, match="Triton is not installed"):
        gram_(*data(5, 3), impl="triton")


def test_bf16_is_refused_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="the interpreter cannot compute bfloat16"):
        gram_(*data(5, 3, torch.bfloat16), impl="triton")


def test_unknown_impl_is_named():
    with pytest.raises(InputError, match="impl='cuda' is not one of auto, triton, torch"):
        gram_(*data(5, 3), impl="cuda")


@pytest.mark.skipif(interpreting(), reason="the interpreter serves CPU tensors")
def test_auto_falls_back_counts_and_says_why_once(monkeypatch, caplog):
    monkeypatch.setattr(gram.operation, "_said", set())
    before = gram.operation.calls["torch"]
    with caplog.at_level(logging.INFO, logger="rewire.kernels.dispatch"):
        gram_(*data(5, 3))
        gram_(*data(6, 3))
    assert gram.operation.calls["torch"] == before + 2
    (said,) = [record.message for record in caplog.records if "triton cannot serve this call" in record.message]
    assert "the tensors are on cpu, no CUDA device" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "d"), [*SHAPES, (2048, 1024)])
def test_on_a_gpu(T, d, dtype, impl, assert_gram):
    C, X = (tensor.cuda() for tensor in data(T, d, dtype))
    got, again = C.clone(), C.clone()
    gram_(got, X, impl=impl)
    gram_(again, X, impl=impl)
    assert_gram(got, C, X)
    assert torch.equal(got.tril(), again.tril())
