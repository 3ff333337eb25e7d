"""add_delta_ and delta_linear: layouts, what is left alone, errors, and kernels broken on purpose."""

from dataclasses import replace

import pytest
import torch

from rewire.bench.check import check, inputs_of
from rewire.bench.operations.delta_linear import SUBJECTS
from rewire.kernels import registry
from rewire.kernels.delta_linear import add_delta_, add_operation, delta_linear, reference
from rewire.kernels.dispatch import interpreting
from rewire.kernels.errors import InputError

ADD, LINEAR = SUBJECTS
in_interpreter = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
compilable = pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled")
impls = pytest.mark.parametrize(
    "impl", ["torch", pytest.param("triton", marks=[pytest.mark.interpreter, in_interpreter])]
)


def data(rows=3, T=5, d_in=20, d_out=12, G=2, r=2, dtype=torch.float32):
    """y, x, left, right, group; the last row has no delta."""
    seed = torch.Generator().manual_seed(0)
    y, x = torch.randn(rows, T, d_out, generator=seed), torch.randn(rows, T, d_in, generator=seed)
    left, right = torch.randn(G, d_out, r, generator=seed), torch.randn(G, r, d_in, generator=seed)
    group = torch.arange(rows) % G
    group[-1] = -1
    return y.to(dtype), x.to(dtype), left.to(dtype), right.to(dtype), group


def close(y, exact):
    return (y.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


def exact_of(y, x, left, right, group):
    return reference.add_delta(y.double(), x.double(), left.double(), right.double(), group)


# layouts, and what is left alone


@impls
@pytest.mark.parametrize("r", [2, 6])
def test_nothing_outside_is_read_or_written(impl, r):
    """Views into larger memory: NaN around what is read, unchanged around what is written."""
    inputs = data(r=r)
    room, views = [], []
    for each, pads in zip(inputs[:4], [(1, 3, 9), (1, 3, 9), (1, 9, 3), (1, 3, 9)], strict=True):
        size = [n + 2 * pad for n, pad in zip(each.shape, pads, strict=True)]
        room.append(torch.full(size, torch.nan if room else 7.0))
        views.append(room[-1][tuple(slice(pad, -pad) for pad in pads)])
        views[-1].copy_(each)
    add_delta_(*views, inputs[4], impl=impl)
    assert close(views[0], exact_of(*inputs))
    views[0].fill_(7.0)
    assert (room[0] == 7.0).all()


@impls
def test_a_row_without_a_delta_keeps_its_bits(impl):
    y, x, left, right, group = data()
    x[-1], left[1] = torch.nan, torch.nan
    group[1] = 0
    got = y.clone()
    add_delta_(got, x, left, right, group, impl=impl)
    assert torch.equal(got[-1], y[-1])
    assert torch.isfinite(got).all()
    assert not torch.equal(got[0], y[0])


@impls
def test_layouts(impl):
    y, x, left, right, group = data(rows=4)
    exact = exact_of(y, x, left, right, group)
    for turned in (
        (y.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT, left, right, group),
        (y.clone(), x.transpose(0, 1).contiguous().transpose(0, 1), left.mT.contiguous().mT, right, group),
        (y.clone(), x, left, right.mT.contiguous().mT, group.repeat_interleave(2)[::2]),
    ):
        add_delta_(*turned, impl=impl)
        assert close(turned[0], exact)
    one = [y.clone(), x[:, :1].expand_as(x), left[:1].expand_as(left), right[:1].expand_as(right), group]
    exact = exact_of(*one)
    add_delta_(*one, impl=impl)
    assert close(one[0], exact)


@impls
def test_ranks_above_64_are_several_passes(impl):
    y, x, left, right, group = data(rows=2, T=2, r=130)
    exact = exact_of(y, x, left, right, group)
    add_delta_(y, x, left, right, group, impl=impl)
    assert close(y, exact)
    refusal = add_operation.refusal("triton", y, x, left, right, group)
    if interpreting():
        assert str(refusal) == "rank is 130; expected 1 to 64"


def test_the_weight_of_a_conv1d_is_not_copied():
    _, x, left, right, group = data()
    weight = torch.randn(20, 12)
    y = delta_linear(x, weight.T, left, right, group)
    exact = reference.delta_linear(x.double(), weight.T.double(), left.double(), right.double(), group)
    assert close(y, exact)
    assert y.is_contiguous()


def test_a_weight_that_learns_is_taken_without_gradient():
    _, x, left, right, group = data()
    linear = torch.nn.Linear(20, 12)
    with pytest.raises(InputError, match=r"delta_linear has no gradient, and one is asked for.*no_grad"):
        delta_linear(x, linear.weight, left, right, group, linear.bias)
    with torch.no_grad():
        y = delta_linear(x, linear.weight, left, right, group, linear.bias)
        assert torch.allclose(y, exact_of(linear(x), x, left, right, group).float(), atol=1e-5)
    with pytest.raises(InputError, match="add_delta_ has no gradient"):
        add_delta_(y, x.requires_grad_(), left, right, group)


def test_16_bits_are_summed_in_fp32():
    """What the sum of many products that cancel is off by: their rounding to 16 bits would show."""
    for dtype in (torch.float16, torch.bfloat16):
        y, x, left, right, group = data(rows=2, T=20, d_in=2000, dtype=dtype)
        y.zero_()
        exact = exact_of(y, x, left, right, group)
        add_delta_(y, x, left, right, group, impl="torch")
        assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.abs().max()


# errors


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (1, lambda x: x.int(), r"x is \[3, 5, 20\] int32; expected \[rows, T, d_in\] or \[rows, d_in\]"),
        (1, lambda x: x[0, 0], r"x is \[20\] float32"),
        (0, lambda y: y.half(), r"y is \[3, 5, 12\] float16 on cpu; expected \[3, 5, 12\] float32 on cpu"),
        (0, lambda y: y[:, :4], r"y is \[3, 4, 12\] float32"),
        (0, lambda y: y.mT.contiguous().mT, r"y has strides \(60, 1, 5\); expected rows that do not overlap"),
        (0, lambda y: y[:, :1].expand(-1, 5, -1), "strides"),
        (2, lambda left: left.half(), r"left is \[2, 12, 2\] float16 on cpu; expected \[G, d_out, r\] float32 on cpu"),
        (2, lambda left: left[0], r"left is \[12, 2\] float32"),
        (2, lambda left: left.to("meta"), "left is .* on meta"),
        (3, lambda right: right[:, :, :19], r"right is \[2, 2, 19\] float32 on cpu; expected \[2, 2, 20\] float32"),
        (3, lambda right: right[:1], r"expected \[2, 2, 20\]"),
        (3, lambda right: right.half(), r"right is \[2, 2, 20\] float16"),
        (4, lambda group: group.int(), r"group is \[3\] int32 on cpu; expected \[3\] int64 on cpu, the delta of each"),
        (4, lambda group: group[:2], r"group is \[2\] int64"),
        (4, lambda group: group + 2, r"group holds 3; expected less than 2, the deltas of left"),
    ],
)
def test_wrong_input_is_named(place, change, says):
    inputs = list(data())
    inputs[place] = change(inputs[place])
    with pytest.raises(InputError, match=says):
        add_delta_(*inputs)


def test_a_wrong_weight_or_bias_is_named():
    _, x, left, right, group = data()
    weight = torch.randn(12, 20)
    for wrong, says in (
        ((weight.T, left, right, group), r"weight is \[20, 12\] float32 on cpu; expected \[12, 20\] float32"),
        ((weight.half(), left, right, group), r"weight is \[12, 20\] float16"),
        ((weight, left, right, group, torch.zeros(13)), r"bias is \[13\] float32 on cpu; expected \[12\] float32"),
        ((weight, left, right, group - 5, torch.zeros(12, 1)), "bias is"),
        ((weight, left, right, group[:2]), "delta_linear: group is"),
    ):
        with pytest.raises(InputError, match=says):
            delta_linear(x, *wrong)


@pytest.mark.skipif(interpreting(), reason="the interpreter serves CPU tensors")
def test_explicit_triton_on_a_cpu_says_why_not():
    with pytest.raises(InputError, match=r"add_delta_: triton cannot serve this call: device is cpu; expected cuda"):
        add_delta_(*data(), impl="triton")


# kernels broken on purpose

SHORT = {"rows": 5, "T": 18, "d_in": 300, "d_out": 70, "G": 3, "r": 1, "plain": 2}
RANK_6 = {"rows": 3, "T": 4, "d_in": 70, "d_out": 33, "G": 2, "r": 6, "plain": 1}
TWO_SPANS = {"rows": 2, "T": 3, "d_in": 4100, "d_out": 5, "G": 2, "r": 1}
BEHIND_T = "    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)\n"
MUTANTS = {
    "columns of the next span too": ("last = tl.minimum(first + SPAN, d_in)", "last = d_in", TWO_SPANS),
    "one span only": ("for split in range(splits)", "for split in range(1)", TWO_SPANS),
    "the last step only": ("sums += x", "sums = x", {**SHORT, "d_in": 257}),
    "one output column unwritten": ("(n[None, :] < d_out)", "(n[None, :] < d_out - 1)", SHORT),
    "last token unwritten": ("inside = (t[:, None] < tokens) & (n", "inside = (t[:, None] < tokens - 1) & (n", SHORT),
    "a tile of s unwritten": ("tl.store(s_tile, tl.sum(sums, axis=2), mask=inside)",
        "tl.store(s_tile, tl.sum(sums, axis=2), mask=inside & (t[:, None] < BLOCK_T))", SHORT),
    "a rank unwritten": ("tl.store(s_tile, acc, mask=inside)",
        "tl.store(s_tile, acc, mask=inside & (r[None, :] < rank - 1))", RANK_6),
    "a rank left out": ("for _ in range(rank)", "for _ in range(1)", RANK_6),
    "the first rank always": ("        s_row += 1\n", "", RANK_6),
    "rows of y by the wrong stride": ("row * y_row", "row * y_token", SHORT),
    "rows of x by the wrong stride": ("row * x_row", "row * x_token", SHORT),
    "factors by row, not by group": ("right_ptr += group * right_group", "right_ptr += row % groups * right_group",
        SHORT),
    "tokens of the first block always": (BEHIND_T + "    n", "    t = tl.arange(0, BLOCK_T)\n    n", SHORT),
    "s of another row": ("(row * tokens + t", "(row * blocks + t", SHORT),
    "rows without a delta get one": ("        return\n" + BEHIND_T + "    n", "        group = group * 0\n" + BEHIND_T
        + "    n", SHORT),
    "y overwritten": ("y.to(tl.float32) + acc", "acc", SHORT),
    "y not read where a mask ends": ("tl.load(y_tile, mask=inside, other=0.0)",
        "tl.load(y_tile, mask=inside & (n[None, :] < 64), other=0.0)", SHORT),
}  # fmt: skip


@pytest.mark.interpreter
@in_interpreter
@pytest.mark.parametrize("mutant", MUTANTS)
def test_gate_a_finds(mutant, mutate):
    old, new, shape = MUTANTS[mutant]
    inputs = inputs_of(ADD, shape, torch.float32, "cpu")
    assert check(ADD, inputs, "triton").passed
    mutate("delta_linear", old, new)
    assert not check(ADD, inputs, "triton").passed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("(t[:, None, None] < tokens) & (d < last)", "(t[:, None, None] < tokens) & (d <= last)", id="x"),
        pytest.param("(r[None, :, None] < rank) & (d < last)", "(r[None, :, None] < rank) & (d <= last)", id="right"),
        pytest.param("ty), mask=inside", "ty), mask=(n <= d_out)[None, :] & (t[:, None] < tokens)", id="y"),
    ],
)  # fmt: skip
@pytest.mark.interpreter
@in_interpreter
def test_masks_that_are_one_too_wide_are_found(old, new, mutate):
    mutate("delta_linear", old, new)
    with pytest.raises(AssertionError):
        test_nothing_outside_is_read_or_written("triton", 2)


@pytest.mark.interpreter
@in_interpreter
def test_a_group_that_is_not_there_becomes_nan():
    """A GPU is not waited for to find it: the kernel must not read behind the factors, and say so in the numbers."""
    from rewire.kernels.delta_linear import kernel

    y, x, left, right, group = data()
    group[0] = 2
    got = y.clone()
    s = kernel.partial_sums(x, right)
    kernel.shrink(s, x, right, group)
    kernel.expand_(got, s, left, group)
    assert torch.isnan(got[0]).all()
    assert close(got[1:], exact_of(y[1:], x[1:], left, right, group[1:]))


def variant(name):
    (found,) = [each for each in registry.variants() if each.name == name]
    return found


@pytest.mark.parametrize(
    ("name", "constants", "says"),
    [
        ("delta-shrink-r64-bf16-fp32-aligned", {"BLOCK_D": 256}, "shared memory"),
        ("delta-expand-bf16-fp32-aligned", {"BLOCK_T": 128}, "spills"),
    ],
    ids=["shared", "spills"],
)
@pytest.mark.compile
@compilable
def test_gate_b_finds(name, constants, says, tmp_path):
    gate_b = pytest.importorskip("gate_b")
    good = variant(name)
    broken = replace(good, constants={**good.constants, **constants})
    complaints = gate_b.complaints(broken, 80, gate_b.compile_variant(broken, 80, tmp_path))
    assert any(complaint.startswith(says) for complaint in complaints)


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.compile
@compilable
def test_products_of_16_bits_use_tensor_cores(chip, tmp_path):
    """16 tokens are too few for wgmma; the registers' mma serves both chips."""
    gate_b = pytest.importorskip("gate_b")
    for name in ("delta-shrink-r16-bf16-fp32-aligned", "delta-shrink-r64-fp16-fp16-aligned"):
        assert "mma.sync" in gate_b.compile_variant(variant(name), chip, tmp_path).ptx
    assert "mma" not in gate_b.compile_variant(variant("delta-shrink-r16-fp32-fp32-aligned"), chip, tmp_path).ptx
