"""gather_mean_ and scatter_add: errors, layouts, gradients, what must not be touched; broken kernels are found.

Their numbers at odd shapes, in every dtype, are in test_operations.py.
"""

import importlib.util
from dataclasses import replace

import gate_b
import pytest
import torch

from rewire.bench.check import check, inputs_of, relative_error
from rewire.bench.operations.gather_mean import SUBJECTS
from rewire.kernels.dispatch import interpreting, recording, using
from rewire.kernels.errors import InputError
from rewire.kernels.gather_mean import gather_mean_, reference, scatter_add

GATHER, SCATTER = SUBJECTS
interpreter = pytest.mark.interpreter
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
each_impl = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=[interpreter, needs_interpreter])])


def data(rows=12, T=6, d=40, n=5, seed=0):
    seed = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, T, d, generator=seed)
    return X, torch.randint(T, (rows,), generator=seed), torch.randint(n, (rows,), generator=seed)


@each_impl
def test_means_in_as_many_calls_as_it_takes(impl):
    """However the rows are cut into calls, a sum is made in their order: the same bits."""
    X, position, group = data()
    weight = torch.rand(12)
    weight /= torch.zeros(5).index_add_(0, group, weight).clamp_min(1e-3)[group]
    whole, parts = torch.zeros(5, 40), torch.zeros(5, 40)
    gather_mean_(whole, X, position, group, weight, impl=impl)
    for rows in torch.arange(12).split(5):
        gather_mean_(parts, X[rows], position[rows], group[rows], weight[rows], impl=impl)
    assert torch.equal(whole, parts)
    exact = reference.gather_mean(torch.zeros(5, 40).double(), X.double(), position, group, weight.double())
    assert relative_error(whole, exact) < 1e-6


@each_impl
def test_nothing_else_is_read_or_written(impl):
    X, position, group = data()
    poisoned = torch.full_like(X, torch.nan)
    poisoned[torch.arange(12), position] = X[torch.arange(12), position]
    room = torch.full((9, 60), 7.0)
    K = room[2:7, 10:50].zero_()
    gather_mean_(K, poisoned, position, group, impl=impl)
    assert relative_error(K, reference.gather_mean(torch.zeros(5, 40), X, position, group)) < 1e-6
    K.fill_(7.0)
    assert (room == 7).all()


@each_impl
def test_a_group_without_rows_keeps_what_it_holds(impl):
    X, position, _ = data()
    K = torch.full((3, 40), torch.inf)
    gather_mean_(K, X, position, torch.ones(12, dtype=torch.long), impl=impl)
    assert (K[[0, 2]] == torch.inf).all()


LAYOUTS = {
    "every second row": lambda X: X[::2],
    "part of the width": lambda X: X[:, :, 3:20],
    "tokens first": lambda X: X.transpose(0, 1).contiguous().transpose(0, 1),
    "width not innermost": lambda X: X.transpose(1, 2).contiguous().transpose(1, 2),
    "one row repeated": lambda X: X[:1].expand(12, -1, -1),
}


@each_impl
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, impl):
    X, position, group = data()
    X = LAYOUTS[layout](X)
    rows, _, d = X.shape
    position, group = position.repeat(2)[::2][:rows], group.repeat(2)[::2][:rows]
    K = torch.zeros(5, d)
    gather_mean_(K, X, position, group, impl=impl)
    assert relative_error(K, reference.gather_mean(torch.zeros(5, d), X, position, group)) < 1e-6
    delta = torch.randn(5, 2 * d)[:, ::2]
    got = scatter_add(X, position, group, delta, impl=impl)
    assert torch.equal(got, reference.scatter_add(X, position, group, delta))
    assert got.is_contiguous()


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_tokens_keep_their_bits(impl, dtype):
    H, position, group = data()
    H = H.to(dtype)
    H[:, ::2, ::3] = torch.tensor([-0.0, torch.nan, torch.inf], dtype=dtype).repeat(14)[:14]
    before = H.clone()
    got = scatter_add(H, position, group, torch.randn(5, 40), impl=impl)
    assert got.data_ptr() != H.data_ptr()
    there = torch.arange(6) == position[:, None]
    bits = {torch.float32: torch.int32, torch.float16: torch.int16}[dtype]
    assert torch.equal(got.view(bits)[~there], before.view(bits)[~there])
    assert torch.equal(H.view(bits), before.view(bits))


@each_impl
def test_a_16_bit_sum_is_rounded_once(impl):
    """1 + 2⁻¹⁰ is the next number of fp16 behind 1: what is added may not be rounded, or lost, on its way."""
    H = torch.ones(1, 1, 2, dtype=torch.float16)
    delta = torch.tensor([[2.0**-11 * 1.0003, 2.0**-11 * 0.9997]])
    zero = torch.zeros(1, dtype=torch.long)
    assert scatter_add(H, zero, zero, delta, impl=impl).tolist() == [[[1 + 2.0**-10, 1.0]]]


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients(impl, dtype):
    H, position, group = data()
    H = H.to(dtype).requires_grad_()
    delta = torch.randn(5, 40, requires_grad=True)
    cotangent = torch.randn(12, 6, 40).to(dtype)
    got = torch.autograd.grad(scatter_add(H, position, group, delta, impl=impl), (H, delta), cotangent)
    exact = [tensor.detach().double().requires_grad_() for tensor in (H, delta)]
    out = reference.scatter_add(exact[0], position, group, exact[1])
    of_H, of_delta = torch.autograd.grad(out, exact, cotangent.double())
    assert torch.equal(got[0].double(), of_H)
    assert got[1].dtype is torch.float32
    assert relative_error(got[1], of_delta) < 1e-6


@each_impl
def test_gradient_of_a_sum(impl):
    """It comes as one number seen as a whole tensor."""
    H, position, group = data()
    delta = torch.zeros(5, 40, requires_grad=True)
    scatter_add(H, position, group, delta, impl=impl).sum().backward()
    assert torch.equal(delta.grad, torch.bincount(group, minlength=5)[:, None].expand(5, 40).float())


@each_impl
def test_no_rows(impl):
    empty = torch.zeros(0, dtype=torch.long)
    K, delta = torch.ones(3, 8), torch.ones(3, 8, requires_grad=True)
    gather_mean_(K, torch.zeros(0, 4, 8), empty, empty, impl=impl)
    assert (K == 1).all()
    out = scatter_add(torch.zeros(0, 4, 8), empty, empty, delta, impl=impl)
    assert out.shape == (0, 4, 8)
    out.sum().backward()
    assert not delta.grad.any()


def test_no_second_gradient():
    H, position, group = data()
    delta = torch.zeros(5, 40, requires_grad=True)
    out = scatter_add(H, position, group, delta).square().sum()
    (gradient,) = torch.autograd.grad(out, delta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gathering_records_no_gradient():
    X, position, group = data()
    K = torch.zeros(5, 40)
    gather_mean_(K, X.requires_grad_(), position, group)
    assert not K.requires_grad


@interpreter
@needs_interpreter
def test_what_served_forward_serves_backward():
    """Where backward runs nobody asks for torch any more, and triton is preferred."""
    H, position, group = data()
    delta = torch.zeros(5, 40, requires_grad=True)
    with using("torch"), recording() as forward:
        out = scatter_add(H, position, group, delta)
    with recording() as backward:
        out.sum().backward()
    assert dict(forward) == {("scatter_add", "torch"): 1}
    assert dict(backward) == {("gather_mean_", "torch"): 1}


def wrong(**changed):
    X, position, group = data()
    return {"K": torch.zeros(5, 40), "X": X, "position": position, "group": group} | changed


LONG = torch.zeros(12, dtype=torch.long)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"X": torch.zeros(12, 40)}, r"X is \[12, 40\] float32; expected \[rows, T, d\]"),
        ({"X": torch.zeros(12, 6, 40, dtype=torch.int32)}, r"X is \[12, 6, 40\] int32"),
        ({"K": torch.zeros(5, 41)}, r"K is \[5, 41\] float32; expected \[n, 40\] float32"),
        ({"K": torch.zeros(5, 40, dtype=torch.float16)}, r"K is \[5, 40\] float16"),
        ({"K": torch.zeros(40, 5).T}, r"K has strides \(1, 5\); expected rows that do not overlap"),
        ({"K": torch.zeros(1, 40).expand(5, 40)}, "K has strides"),
        ({"K": torch.zeros(5, 40, device="meta")}, "K is on meta, X on cpu"),
        ({"position": LONG[1:]}, r"position is \[11\] int64 on cpu; expected \[12\] int64 on cpu"),
        ({"position": LONG.int()}, r"position is \[12\] int32"),
        ({"position": LONG + 6}, "position goes from 6 to 6; expected 0 to 5"),
        ({"position": LONG - 1}, "position goes from -1 to -1; expected 0 to 5"),
        ({"group": LONG.to("meta")}, r"group is \[12\] int64 on meta; expected \[12\] int64 on cpu"),
        ({"group": LONG + 5}, "group goes from 5 to 5; expected 0 to 4"),
        ({"weight": torch.ones(11)}, r"weight is \[11\] float32 on cpu; expected \[12\] float32 on cpu"),
        ({"weight": torch.ones(12).double()}, r"weight is \[12\] float64"),
    ],
)
def test_wrong_input_of_the_gather_is_named(changed, says):
    with pytest.raises(InputError, match=f"gather_mean_: {says}"):
        gather_mean_(**wrong(**changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"X": torch.zeros(12, 40)}, r"H is \[12, 40\] float32; expected \[rows, T, d\]"),
        ({"X": torch.zeros(12, 6, 40).int()}, r"H is \[12, 6, 40\] int32"),
        ({"K": torch.zeros(5, 41)}, r"delta is \[5, 41\] float32; expected \[n, 40\] float32"),
        ({"K": torch.zeros(5, 40, dtype=torch.float16)}, r"delta is \[5, 40\] float16"),
        ({"K": torch.zeros(5, 40, device="meta")}, "delta is on meta, H on cpu"),
        ({"position": LONG + 6}, "position goes from 6 to 6; expected 0 to 5"),
        ({"group": LONG + 5}, "group goes from 5 to 5; expected 0 to 4"),
    ],
)
def test_wrong_input_of_the_scatter_is_named(changed, says):
    given = wrong(**changed)
    with pytest.raises(InputError, match=f"scatter_add: {says}"):
        scatter_add(given["X"], given["position"], given["group"], given["K"])


@pytest.mark.skipif(interpreting(), reason="the interpreter serves CPU tensors")
def test_explicit_triton_on_the_cpu_says_why_not():
    given = wrong()
    with pytest.raises(InputError, match="gather_mean_: triton cannot serve this call"):
        gather_mean_(**given, impl="triton")
    with pytest.raises(InputError, match="scatter_add: triton cannot serve this call"):
        scatter_add(given["X"], given["position"], given["group"], given["K"], impl="triton")


@interpreter
@needs_interpreter
def test_wrong_indices_touch_nothing_and_are_seen():
    """On CUDA nobody has looked at them."""
    from rewire.kernels.gather_mean import kernel

    X, position, group = data()
    K = torch.zeros(5, 40)
    position[0], position[1], group[2:5] = 6, -1, torch.tensor([5, -1, 1 << 40])
    group[:2] = 0
    kernel.gather_mean_(K, X, position, group)
    assert K[0].isnan().all()
    assert K[1:].isfinite().all()
    out = kernel.scatter_add(X, position, group, torch.randn(5, 40))
    assert torch.equal(out[:2], X[:2])
    changed = out[torch.arange(2, 5), position[2:5]]
    assert changed.isnan().all()
    assert out.isnan().sum() == changed.numel()


@interpreter
@needs_interpreter
def test_nothing_is_written_around_the_result(monkeypatch):
    H, position, group = data(rows=3, T=3, d=33)
    room = torch.full((1000 + H.numel(),), 7.0)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: room[500 : 500 + H.numel()].view(shape))
    out = scatter_add(H, position, group, torch.randn(5, 33), impl="triton")
    assert out.data_ptr() == room[500:].data_ptr()
    assert (room[:500] == 7).all()
    assert (room[500 + H.numel() :] == 7).all()


@interpreter
@needs_interpreter
def test_rows_further_than_int32_reaches():
    far = torch.empty((1 << 31) + 16, dtype=torch.float16).as_strided((3, 2, 8), (1 << 30, 8, 1))
    far.copy_(torch.arange(48.0).view(3, 2, 8))
    at, own = torch.tensor([1, 0, 1]), torch.arange(3)
    K = torch.zeros(3, 8)
    gather_mean_(K, far, at, own, impl="triton")
    assert torch.equal(K, far[own, at].float())
    assert torch.equal(
        scatter_add(far, at, own, torch.ones(3, 8), impl="triton"),
        scatter_add(far.contiguous(), at, own, torch.ones(3, 8), impl="torch"),
    )


@interpreter
@needs_interpreter
def test_configurations_agree_bit_for_bit():
    from rewire.kernels.gather_mean import kernel

    X, position, group = data(d=1100)
    sums = [torch.zeros(5, 1100) for _ in kernel.GATHER]
    for K, config in zip(sums, kernel.GATHER, strict=True):
        kernel.gather_mean_(K, X, position, group, torch.linspace(0, 1, 12), config)
    moved = [kernel.scatter_add(X, position, group, sums[0], config) for config in kernel.SCATTER]
    assert all(torch.equal(K, sums[0]) for K in sums)
    assert all(torch.equal(out, reference.scatter_add(X, position, group, sums[0])) for out in moved)


GATHER_MUTANTS = {
    "a column short": ("inside = column < width", "inside = column < width - 1"),
    "a column too many": ("inside = column < width", "inside = column < width + 1"),
    "the first of a group only": ("range(first, end)", "range(first, first + 1)"),
    "every row's program adds": ("if (end != before) &", "if (end > 0) &"),
    "neighbours must agree": ("(end != before)", "(end != before + 1)"),
    "tokens side by side": ("position * x_token", "position * width"),
    "rows of K side by side": ("group * k_row", "group * width"),
    "rows by their place": ("row = tl.load(order_ptr + line)", "row = line"),
    "weights by their place": ("weight_ptr + row", "weight_ptr + line"),
    "weights forgotten": ("x *= tl.load(weight_ptr + row)", "x *= 1.0"),
    "what K held forgotten": ("acc = tl.load(k_line, mask=inside)", "acc = tl.zeros((BLOCK,), tl.float32)"),
    "positions forgotten": ("position = tl.load(position_ptr + row)\n", "position = row * 0\n"),
    "the last block of columns missing": (
        "tl.store(k_line, acc, mask=inside)",
        "tl.store(k_line, acc, mask=inside & (column < BLOCK))",
    ),
}
SCATTER_MUTANTS = {
    "a column short": ("& (column < width)", "& (column < width - 1)"),
    "the last line missing": ("live = line < lines", "live = line < lines - 1"),
    "the token before": ("== token)", "== token + 1)"),
    "tokens side by side": ("token * h_token", "token * width"),
    "lines over one another": ("line[:, None] * width", "row[:, None] * width"),
    "added everywhere": ("tl.where(changed[:, None], moved, h)", "moved"),
    "never added": ("tl.where(changed[:, None], moved, h)", "h"),
    "groups forgotten": ("group = tl.load(group_ptr + row, mask=changed, other=0)", "group = row * 0"),
    "groups by line": ("group_ptr + row, mask=changed", "group_ptr + line % (lines // tokens), mask=changed"),
}


@interpreter
@needs_interpreter
@pytest.mark.parametrize(
    ("subject", "old", "new"),
    [
        pytest.param(subject, *change, id=f"{subject.name}-{name}")
        for subject, mutants in ((GATHER, GATHER_MUTANTS), (SCATTER, SCATTER_MUTANTS))
        for name, change in mutants.items()
    ],
)
def test_gate_a_finds_mutants(subject, old, new, mutate):
    # one is strided, one has more columns than a block
    cases = [inputs_of(subject, shape, torch.float32, "cpu") for shape in subject.odd[:3]]
    mutate("gather_mean", old, new)
    assert not all(check(subject, inputs, "triton").passed for inputs in cases)


@pytest.mark.compile
@pytest.mark.skipif(interpreting() or importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")
@pytest.mark.parametrize("chip", [80, 90])
def test_gate_b_finds_tiles_that_spill(chip, tmp_path):
    from rewire.kernels.gather_mean import kernel

    variant = next(each for each in kernel.variants() if each.name == "scatter_add-fp32-4x512-w4-ragged")
    variant = replace(variant, constants={"LINES": 16, "BLOCK": 512}, num_warps=1)
    (said,) = gate_b.complaints(variant, chip, gate_b.compile_variant(variant, chip, tmp_path))
    assert said.startswith("spills")
