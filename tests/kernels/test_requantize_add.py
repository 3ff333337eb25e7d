"""requantize_add: rounding bit by bit, bitsandbytes' layouts against bitsandbytes, kernels broken on purpose."""

import copy
import math
from dataclasses import replace

import gate_b
import pytest
import torch
from torch import nn

from rewire.bench.check import check, inputs_of
from rewire.bench.operations import requantize_add as bench
from rewire.kernels import requantize_add as room
from rewire.kernels.dispatch import interpreting, recording, using
from rewire.kernels.errors import InputError
from rewire.kernels.requantize_add import (
    FourBit,
    reference,
    requantize_add,
    requantize_add_4bit,
    requantize_add_bitsandbytes_,
    requantize_add_int8,
)

DENSE, FOUR_BIT, INT8 = bench.SUBJECTS
HALVES = [torch.float16, torch.bfloat16]
INTERPRETED = [pytest.mark.interpreter, pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")]
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
EVERYWHERE = pytest.mark.parametrize(
    ("impl", "device"),
    [
        ("torch", "cpu"),
        pytest.param("triton", "cpu", marks=INTERPRETED),
        pytest.param("torch", "cuda", marks=CUDA),
        pytest.param("triton", "cuda", marks=CUDA),
    ],
)


def random(*shape, seed=0, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def no_update(W):
    return torch.zeros(W.shape[0], 0, device=W.device), torch.zeros(0, W.shape[1], device=W.device)


# dense: rounding


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [s for s in DENSE.odd if not s.get("stochastic")], ids=str)
def test_nearest_is_the_cast_of_the_sum_bit_for_bit(shape, dtype, impl, device):
    W, left, right, base, _ = inputs_of(DENSE, shape, dtype, device)
    written = requantize_add(W, left, right, base, keep_total=True, impl=impl)
    assert torch.equal(written.weight, written.total.to(dtype))
    assert not shape.get("turned") or written.weight.stride() == W.stride()
    change = bench.product(left, right).double()
    exact = (W if base is None else base).double() + change
    assert torch.allclose(written.total.double(), exact, rtol=0, atol=1e-6)
    missed = ((written.weight.double() - W.double()) - change).norm()
    assert written.lost == pytest.approx(float(missed / change.norm()) if change.norm() else 0, rel=1e-3, abs=1e-6)


@EVERYWHERE
@pytest.mark.parametrize("dtype", HALVES)
def test_nearest_where_it_is_hard(dtype, impl, device):
    values = hard_values(dtype).to(device)[None]
    W = torch.zeros(values.shape, dtype=dtype, device=device)
    found = requantize_add(W, *no_update(W), values, impl=impl).weight
    assert torch.equal(found.view(torch.int16), (values + 0).to(dtype).view(torch.int16))  # -0 + 0 is 0
    nan = torch.full_like(values, math.nan).view(torch.int32).bitwise_or(1).view(torch.float32)
    assert requantize_add(W, *no_update(W), nan, impl=impl).weight.isnan().all()


def hard_values(dtype):
    """fp32 around ties, subnormals, the largest number and zero, of both signs."""
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal
    step = torch.finfo(dtype).eps
    near = torch.cat([torch.arange(64.0) * step / 8 + 1, torch.arange(64.0) * tiny * step / 8, random(64)])
    ends = torch.tensor(
        [0.0, largest, largest * (1 + step / 8), largest * (1 + step / 3.9), math.inf, tiny * 0.999, 3e-39]
    )
    values = torch.cat([near, ends])
    return torch.cat([values, -values])


@EVERYWHERE
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_gives_a_neighbour_and_keeps_what_is_exact(dtype, impl, device):
    values = hard_values(dtype).to(device).repeat(50, 1)
    W = torch.zeros(values.shape, dtype=dtype, device=device)
    found = requantize_add(W, *no_update(W), values, rounding="stochastic", seed=3, impl=impl).weight
    nearest = values.to(dtype)
    exact = nearest.float() == values
    assert torch.equal(found[exact], nearest[exact])
    # one ulp: what lies strictly between the found number and the value is nothing that the dtype has
    bits, close = (each.view(torch.int16).int() & 0x7FFF for each in (found, nearest))
    toward = torch.where(nearest.abs().float() > values.abs(), close - 1, close)
    assert ((bits == toward) | ((bits == toward + 1) & ~exact)).all()
    assert torch.equal(found.isinf(), nearest.isinf())
    assert (found.sign() * values.sign() >= 0).all()


@EVERYWHERE
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_is_unbiased(dtype, impl, device):
    """The mean of 3072 elements, over 4 seeds, is within 5 standard errors of the value, for each of 20 values."""
    tiny, step = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps
    shares = torch.tensor([1 / 256, 0.1, 0.5, 0.75, 0.99])
    values = torch.cat(
        [1 + shares * step, -0.37 * (1 + shares * step), 1000 * (1 + shares * step), 4 + 4 * shares * step]
    )
    if dtype is torch.float16:
        values[-5:] = (shares + 5) * -tiny * step  # subnormals
    rows = values.to(device).repeat(3)[:, None].expand(-1, 256)
    W = torch.zeros(rows.shape, dtype=dtype, device=device)
    drawn = [requantize_add(W, *no_update(W), rows, "stochastic", seed, impl=impl).weight for seed in range(4)]
    found = torch.cat([each.view(3, 20, 256) for each in drawn]).double().cpu().transpose(0, 1).reshape(20, -1)
    low, high = found.amin(1), found.amax(1)
    exact = values.double()
    share = (exact - low) / (high - low)
    assert ((low < exact) & (exact < high)).all()
    error = (high - low) * (share * (1 - share) / found.shape[1]).sqrt()
    assert ((found.mean(1) - exact).abs() < 5 * error).all()
    middle = found[2] > exact[2]  # half up, half down, whatever the neighbour does
    assert abs(float((middle[1:] == middle[:-1]).float().mean()) - 0.5) < 2.5 / found.shape[1] ** 0.5


@EVERYWHERE
def test_stochastic_is_of_its_seed(impl, device):
    W, left, right, base, rounding = inputs_of(
        DENSE, {"d_out": 90, "d_in": 70, "r": 3, "stochastic": 1}, HALVES[0], device
    )
    first, again, other = (
        requantize_add(W, left, right, base, rounding, seed, impl=impl).weight for seed in (2**40, 2**40, 2**40 + 1)
    )
    assert torch.equal(first, again)
    assert 0.05 < (first != other).float().mean() < 0.5
    fp32 = requantize_add(W.float(), left, right, rounding="stochastic", impl=impl)
    assert torch.equal(fp32.weight, requantize_add(W.float(), left, right, impl=impl).weight)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", HALVES)
def test_random_numbers_are_an_elements_own(dtype):
    """Neither the tiles nor the orientation of the weight change what an element is rounded to."""
    from rewire.kernels.requantize_add import kernel

    W, base = random(70, 90).to(dtype), random(70, 90, seed=1)
    bits = W.view(torch.int16) if dtype is torch.bfloat16 else W
    found = [kernel.requantize_add(bits, base, *no_update(W), 5, False, config)[0] for config in kernel.DENSE]
    turned = kernel.requantize_add(bits.T.contiguous().T, base, *no_update(W), 5, False)[0]
    assert all(torch.equal(found[0], each) for each in (*found, turned))


# dense: layouts and errors

LAYOUTS = {
    "every second row": lambda W: W[::2],
    "part of a row": lambda W: W[:, 17:60],
    "every third column": lambda W: W[:, ::3],
    "Conv1D": lambda W: W.T,
    "part of a Conv1D": lambda W: W.T[3:50, 2:33],
}


@EVERYWHERE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, impl, device):
    whole = torch.full((72, 80), math.nan, device=device)
    LAYOUTS[layout](whole).copy_(random(*LAYOUTS[layout](whole).shape))  # NaN lies around what is read
    W = LAYOUTS[layout](whole)
    base = LAYOUTS[layout](whole + 0).T.contiguous().T
    left, right = (random(*shape).to(device) for shape in ((W.shape[0], 9), (9, W.shape[1])))
    before = whole.clone()
    written = requantize_add(W, left.T.contiguous().T, right.T.contiguous().T, base, keep_total=True, impl=impl)
    assert torch.allclose(written.weight, base + left @ right, rtol=0, atol=2e-5)
    assert torch.equal(whole.nan_to_num(7), before.nan_to_num(7))
    dense = requantize_add(W, (left @ right).T.contiguous().T, None, impl=impl)
    assert torch.equal(dense.weight, W + left @ right)


def test_nothing_of_fp32_settings_reaches_the_sum():
    W, left, right = random(40, 50), random(40, 3), random(3, 50)
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = requantize_add(W, left, right, impl="torch").weight
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(asked)
    assert torch.equal(found, W + left @ right)


def test_row_blocks_do_not_change_the_result(monkeypatch):
    W, left, right = random(300, 64), random(300, 5), random(5, 64)
    weights = [requantize_add(W.to(dtype), left, right, impl="torch") for dtype in (torch.float32, *HALVES)]
    four, eight = (
        inputs_of(FOUR_BIT, {"d_out": 300, "d_in": 96, "r": 3}, torch.float32, "cpu"),
        (W * 0 + 3).to(torch.int8),
    )
    before = (
        requantize_add_4bit(*four, impl="torch"),
        requantize_add_int8(eight, W[:, 0].abs(), left, right, impl="torch"),
    )
    monkeypatch.setattr("rewire.kernels.requantize_add.common._ELEMENTS", 1)
    for whole, dtype in zip(weights, (torch.float32, *HALVES), strict=True):
        parts = requantize_add(W.to(dtype), left, right, impl="torch")
        assert torch.equal(parts.weight, whole.weight)
        assert parts.lost == pytest.approx(whole.lost)
    after = (
        requantize_add_4bit(*four, impl="torch"),
        requantize_add_int8(eight, W[:, 0].abs(), left, right, impl="torch"),
    )
    assert torch.equal(before[0][0].packed, after[0][0].packed)
    assert torch.equal(before[0][0].absmax, after[0][0].absmax)
    assert before[0][1] == pytest.approx(after[0][1])
    assert torch.equal(before[1][0], after[1][0])
    assert before[1][2] == pytest.approx(after[1][2])


def test_gradients_are_not_recorded():
    W = random(5, 7).requires_grad_()
    assert not requantize_add(W, random(5, 2), random(2, 7)).weight.requires_grad


ZERO = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((ZERO(5), ZERO(5, 1), ZERO(1, 5)), r"W is \[5\] float32; expected \[d_out, d_in\] in float16 to float64"),
        ((ZERO(5, 4).int(), ZERO(5, 1), ZERO(1, 4)), r"W is \[5, 4\] int32"),
        (
            (ZERO(5, 4), ZERO(4, 1), ZERO(1, 5)),
            r"left and right are \[4, 1\] .*; expected \[5, 1\] and \[1, 4\] float32",
        ),
        ((ZERO(5, 4), ZERO(5, 2), ZERO(3, 4)), r"\[2, 4\]|expected \[5, 2\] and \[2, 4\]"),
        ((ZERO(5, 4), ZERO(4, 5), None), r"left is \[4, 5\] float32 on cpu; expected \[5, 4\] float32 on cpu"),
        ((ZERO(5, 4), ZERO(5, 2).half(), ZERO(2, 4)), r"left and right are \[5, 2\] float16"),
        ((ZERO(5, 4), ZERO(5, 2, device="meta"), ZERO(2, 4)), r"on meta and .* on cpu; expected .* on cpu"),
        (
            (ZERO(5, 4), ZERO(5, 2), ZERO(2, 4), ZERO(4, 5)),
            r"base is \[4, 5\] float32 on cpu; expected \[5, 4\] float32",
        ),
        ((ZERO(5, 4), ZERO(5, 2), ZERO(2, 4), None, "up"), "rounding='up' is not one of nearest, stochastic"),
        ((ZERO(5, 4), ZERO(5, 2), ZERO(2, 4), None, "nearest", -1), "seed is -1; expected 0 <= seed"),
    ],
)
def test_wrong_dense_input_is_named(arguments, says):
    with pytest.raises(InputError, match=f"^requantize_add: .*({says})"):
        requantize_add(*arguments)


# quantised: the rule, by whatever implementation


def four_bit(shape, **more):
    return inputs_of(FOUR_BIT, shape | more, torch.float32, "cpu")


def far_from_nearest(values, scales, levels, exact):
    """How much farther from `exact` than the nearest of levels * scales, in units of the scale; [n, m] each."""
    grid = levels.double() * scales.double()[:, None, None]
    best = (grid - exact[..., None]).abs().amin(-1)
    return (((values.double() - exact).abs() - best) / scales.double()[:, None].clamp_min(1e-30)).amax()


def strictly_nearest_4bit(inputs, impl):
    weight, left, right = inputs
    new, share = requantize_add_4bit(weight, left, right, impl=impl)
    old, change = weight.dequantize(), bench.product(left, right).double()
    exact = reference.in_blocks((old.double() + change).view(-1), weight.blocksize)
    codes = reference.code_bounds(weight.quant_type, exact.device)[0]
    plain = replace(new, absmax=exact.abs().amax(1).float(), nested=None)
    if weight.nested is None:
        assert torch.allclose(new.absmax, plain.absmax, rtol=1e-6, atol=0)
    else:  # codes were chosen by the statistics before those were quantised
        assert (new.statistics() - plain.absmax).abs().max() < 0.02 * plain.absmax.max()
    values = reference.in_blocks(plain.dequantize().view(-1), weight.blocksize)
    assert far_from_nearest(values, plain.absmax, codes, exact) < 1e-5
    assert share == pytest.approx(float(bench.lost(new.dequantize(), old, change)[1]), rel=1e-4, abs=1e-6)


def strictly_nearest_int8(inputs, impl):
    codes, scales, left, right = inputs
    new, new_scales, share = requantize_add_int8(codes, scales, left, right, impl=impl)
    old, change = reference.dequantize_int8(codes, scales), bench.product(left, right).double()
    exact = old.double() + change
    assert torch.allclose(new_scales, exact.abs().amax(1).float(), rtol=1e-6, atol=0)
    values = reference.dequantize_int8(new, new_scales)
    levels = torch.arange(-127, 128, device=codes.device) / 127
    assert far_from_nearest(values, new_scales, levels, exact) < 1e-5
    assert share == pytest.approx(float(bench.lost(values, old, change)[1]), rel=1e-4, abs=1e-6)


@EVERYWHERE
@pytest.mark.parametrize("shape", [s for s in FOUR_BIT.odd if s["d_out"] > 5 and s["r"]], ids=str)
def test_every_4bit_code_is_the_nearest(shape, impl, device):
    strictly_nearest_4bit(inputs_of(FOUR_BIT, shape, torch.float32, device), impl)


@EVERYWHERE
@pytest.mark.parametrize("shape", [s for s in INT8.odd if s["d_out"] * s["d_in"]], ids=str)
def test_every_int8_code_is_the_nearest(shape, impl, device):
    strictly_nearest_int8(inputs_of(INT8, shape, torch.float32, device), impl)


@EVERYWHERE
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_without_an_update_no_code_changes(quant_type, impl, device):
    weight, *_ = inputs_of(
        FOUR_BIT, {"d_out": 40, "d_in": 128, "r": 1, "fp4": quant_type == "fp4"}, torch.float32, device
    )
    new, share = requantize_add_4bit(weight, *no_update(weight.dequantize()), impl=impl)
    assert share == 0
    assert torch.equal(new.packed, weight.packed)
    assert torch.equal(new.absmax, weight.absmax)
    codes, scales, *_ = inputs_of(INT8, {"d_out": 40, "d_in": 100, "r": 1}, torch.float32, device)
    again, new_scales, share = requantize_add_int8(codes, scales, *no_update(codes), impl=impl)
    assert torch.equal(again, codes)
    assert torch.allclose(new_scales, scales, rtol=3e-7, atol=0)


@EVERYWHERE
def test_a_block_and_a_row_of_zeros(impl, device):
    zeros = torch.zeros(3, 64, device=device)
    packed = torch.full((96,), 0x77, dtype=torch.uint8, device=device)
    weight = FourBit(packed, torch.zeros(3, device=device), (3, 64))
    new, share = requantize_add_4bit(weight, zeros, None, impl=impl)
    assert (share, new.absmax.tolist(), bool((new.packed == packed).all())) == (0, [0, 0, 0], True)
    codes, scales, share = requantize_add_int8(zeros.to(torch.int8), zeros[:, 0].contiguous(), zeros, None, impl=impl)
    assert (share, scales.tolist(), int(codes.abs().sum())) == (0, [0, 0, 0], 0)


def test_rows_that_are_not_whole_blocks():
    inputs = four_bit({"d_out": 7, "d_in": 100, "r": 2})  # the last block of 60
    strictly_nearest_4bit(inputs, "torch")
    strictly_nearest_4bit(four_bit({"d_out": 7, "d_in": 100, "r": 2, "nested": 1, "blocksize": 32}), "torch")


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
def test_what_the_4bit_kernel_leaves_to_torch():
    with pytest.raises(InputError, match="the part of a row past its last whole block is 36; expected 0 to 0"):
        requantize_add_4bit(*four_bit({"d_out": 8, "d_in": 100, "r": 2}), impl="triton")
    with pytest.raises(InputError, match="blocksize is 512; expected 32 to 256"):
        requantize_add_4bit(*four_bit({"d_out": 8, "d_in": 512, "r": 2, "blocksize": 512}), impl="triton")


GOOD = FourBit(torch.zeros(64, dtype=torch.uint8), torch.zeros(2), (2, 64))
NESTED = room.Nested(ZERO(1), torch.linspace(-1, 1, 256), ZERO(()))


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (replace(GOOD, shape=(2, 64, 1)), r"shape is \[2, 64, 1\]; expected \[d_out, d_in\]"),
        (replace(GOOD, shape=(3, 43)), r"shape is \[3, 43\]; .* even number"),
        (replace(GOOD, shape=(2, 66)), r"packed is \[64\] uint8; expected 66 uint8 for shape \[2, 66\]"),
        (replace(GOOD, packed=ZERO(64)), r"packed is \[64\] float32"),
        (replace(GOOD, quant_type="int4"), "quant_type='int4' is not one of nf4, fp4"),
        (replace(GOOD, blocksize=48), "blocksize is 48; expected a power of two"),
        (replace(GOOD, blocksize=16), "blocksize is 16"),
        (replace(GOOD, absmax=ZERO(3)), r"absmax is \[3\] float32; expected \[2\] float32"),
        (replace(GOOD, absmax=ZERO(2).half()), r"absmax is \[2\] float16"),
        (replace(GOOD, nested=NESTED), r"absmax is \[2\] float32; expected \[2\] uint8 with nested"),
        (
            replace(GOOD, absmax=ZERO(2).byte(), nested=replace(NESTED, absmax=ZERO(2))),
            r"nested absmax is \[2\] float32; expected \[1\]",
        ),
        (
            replace(GOOD, absmax=ZERO(2).byte(), nested=replace(NESTED, code=NESTED.code.flip(0))),
            "nested code is not ascending",
        ),
    ],
)
def test_wrong_4bit_layouts_are_named(weight, says):
    with pytest.raises(InputError, match=f"^requantize_add_4bit: {says}"):
        requantize_add_4bit(weight, ZERO(2, 1), ZERO(1, 64))


@pytest.mark.parametrize(
    ("codes", "scales", "says"),
    [
        (ZERO(2, 5), ZERO(2), r"codes is \[2, 5\] float32; expected \[d_out, d_in\] int8"),
        (ZERO(2, 5).char(), ZERO(5), r"scales is \[5\] float32 on cpu; expected \[2\] float32 on cpu"),
        (ZERO(2, 5).char(), ZERO(2).half(), r"scales is \[2\] float16"),
        (ZERO(2, 6).char(), ZERO(2), r"left and right are .* expected \[2, 1\] and \[1, 6\]"),
    ],
)
def test_wrong_int8_rows_are_named(codes, scales, says):
    with pytest.raises(InputError, match=f"^requantize_add_int8: {says}"):
        requantize_add_int8(codes, scales, ZERO(2, 1), ZERO(1, 5))


# quantised: bitsandbytes itself


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def module_of(bnb, kind, d_out=96, d_in=128, **options):
    options["bias"] = False
    made = {
        "nf4": lambda: bnb.nn.Linear4bit(d_in, d_out, quant_type="nf4", compress_statistics=False, **options),
        "fp4": lambda: bnb.nn.Linear4bit(d_in, d_out, quant_type="fp4", compress_statistics=False, **options),
        "nested nf4": lambda: bnb.nn.Linear4bit(d_in, d_out, quant_type="nf4", compress_statistics=True, **options),
        "nested fp4": lambda: bnb.nn.Linear4bit(d_in, d_out, quant_type="fp4", compress_statistics=True, **options),
        "int8": lambda: bnb.nn.Linear8bitLt(d_in, d_out, has_fp16_weights=False, **options),
    }[kind]()
    made.weight.data.copy_(random(d_out, d_in, size=0.02))
    return made.to("cpu")


def read(bnb, module):
    """The weight in fp32 as bitsandbytes reads it."""
    weight = module.weight
    if not hasattr(weight, "quant_state"):
        holder = weight if weight.SCB is not None else module.state
        return bnb.functional.int8_vectorwise_dequant(weight.data, holder.SCB)
    state = copy.deepcopy(weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(weight.data, state)


def quantised_again(bnb, module, values):
    """What bitsandbytes makes of an fp32 matrix, as it reads it."""
    if not hasattr(module.weight, "quant_state"):
        return bnb.functional.int8_vectorwise_dequant(*bnb.functional.int8_vectorwise_quant(values)[:2])
    state = module.weight.quant_state
    stored = bnb.functional.quantize_4bit(
        values, blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type
    )
    return bnb.functional.dequantize_4bit(*stored)


KINDS = ["nf4", "fp4", "nested nf4", "nested fp4", "int8"]


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_reads_what_it_would_have_written(bnb, kind):
    """Of 12288 values none may differ but those on a tie, to rounding: a whole code off, and few."""
    module = module_of(bnb, kind)
    before = read(bnb, module)
    left, right = random(96, 3, size=0.01), random(3, 128, seed=1)
    share = requantize_add_bitsandbytes_(module, left, right)
    after = read(bnb, module)
    expected = quantised_again(bnb, module, before + left @ right)
    differ = (after - expected).abs() > 1e-6 * expected.abs().max()
    assert int(differ.sum()) <= (after.numel() // 1000 if "nested" in kind else 2)
    missed = ((after - before) - left @ right).norm() / (left @ right).norm()
    assert share == pytest.approx(float(missed), rel=1e-4)
    assert 0.01 < share < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_modules_without_an_update_keep_their_codes(bnb, kind):
    module = module_of(bnb, kind)
    before, values = module.weight.data.clone(), read(bnb, module)
    requantize_add_bitsandbytes_(module, torch.zeros(96, 1), torch.zeros(1, 128))
    if "fp4" in kind:  # bitsandbytes writes either zero, this one
        before = torch.where(before >> 4 == 8, before & 15, before)
        before = torch.where(before & 15 == 8, before & 0xF0, before)
    assert torch.equal(module.weight.data, before)
    assert torch.allclose(read(bnb, module), values, rtol=0.02 if "nested" in kind else 1e-6, atol=0)


def test_dequantize_is_bitsandbytes_own(bnb):
    for kind in KINDS[:4]:
        module = module_of(bnb, kind)
        state = module.weight.quant_state
        inner = state.state2
        nested = inner and room.Nested(inner.absmax, inner.code, state.offset, inner.blocksize)
        weight = FourBit(module.weight.data, state.absmax, tuple(state.shape), state.quant_type, 64, nested)
        assert torch.equal(weight.dequantize(), read(bnb, module))
    for quant_type, codes in reference.CODES.items():
        assert torch.equal(torch.tensor(codes), bnb.functional.get_4bit_type(quant_type, device="cpu"))


def test_other_storage_and_other_blocks(bnb):
    module = module_of(bnb, "nested nf4", quant_storage=torch.bfloat16)
    data, before = module.weight.data, read(bnb, module)
    left, right = random(96, 3, size=0.01), random(3, 128, seed=1)
    requantize_add_bitsandbytes_(module, left, right)
    assert (module.weight.data.shape, module.weight.dtype) == (data.shape, torch.bfloat16)
    assert (read(bnb, module) - before - left @ right).norm() < 0.5 * (left @ right).norm()
    assert module.weight.quant_state is module.quant_state


def test_int8_before_and_after_a_forward(bnb):
    left, right = random(96, 3, size=0.01), random(3, 128, seed=1)
    x = random(4, 128, seed=2)
    early, late = module_of(bnb, "int8"), module_of(bnb, "int8")
    requantize_add_bitsandbytes_(early, left, right)
    unedited = late(x)
    assert late.weight.SCB is None
    requantize_add_bitsandbytes_(late, left, right)
    assert torch.equal(read(bnb, early), read(bnb, late))
    assert torch.equal(early(x), late(x))
    assert not torch.equal(unedited, late(x))
    assert torch.equal(late.state_dict()["SCB"], early.state_dict()["SCB"])


def snapshot(module):
    state = getattr(module.weight, "quant_state", None)
    parts = [state.absmax, state.state2.absmax, state.offset] if state is not None else [module.weight.SCB]
    return [each.clone() for each in (module.weight.data, *parts)]


@pytest.mark.parametrize("kind", ["nested nf4", "int8"])
def test_a_module_is_changed_whole_or_not_at_all(bnb, kind, monkeypatch):
    module = module_of(bnb, kind)
    before = snapshot(module)
    with pytest.raises(InputError, match="holds NaN or infinity; the weight was not changed"):
        requantize_add_bitsandbytes_(module, torch.full((96, 1), math.nan), torch.zeros(1, 128))
    with pytest.raises(InputError, match=r"expected \[96, 1\] and \[1, 128\]"):
        requantize_add_bitsandbytes_(module, torch.zeros(128, 1), torch.zeros(1, 96))
    monkeypatch.setattr(reference, "share_lost", None)
    for place in ("quantized", "common"):
        monkeypatch.setattr(f"rewire.kernels.requantize_add.{place}.share_lost", None)
    with pytest.raises(TypeError):  # the last thing that is computed
        requantize_add_bitsandbytes_(module, random(96, 1), random(1, 128))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))


def test_modules_that_are_not_understood(bnb):
    update = torch.zeros(96, 1), torch.zeros(1, 128)
    with pytest.raises(InputError, match="module is Linear with a Parameter; expected bitsandbytes"):
        requantize_add_bitsandbytes_(nn.Linear(128, 96), *update)
    with pytest.raises(InputError, match="not quantised yet"):
        requantize_add_bitsandbytes_(bnb.nn.Linear4bit(128, 96), *update)
    with pytest.raises(InputError, match=r"\[96, 128\] float32; expected int8 rows with their SCB"):
        requantize_add_bitsandbytes_(bnb.nn.Linear8bitLt(128, 96), *update)
    module = module_of(bnb, "nf4")
    module.weight.quant_state.code = module.weight.quant_state.code.flip(0)
    with pytest.raises(InputError, match="code 'nf4' is not bitsandbytes' NF4 or FP4"):
        requantize_add_bitsandbytes_(module, *update)
    module = module_of(bnb, "nf4")
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="a forward on the CPU repacked the 4-bit weight"):
        requantize_add_bitsandbytes_(module, *update)


# the engine


class Tiny:
    """As much of a model as EditedWeights looks at."""

    def __init__(self, dtype):
        from transformers.pytorch_utils import Conv1D

        self.hf = nn.Module()
        self.hf.linear, self.hf.conv = nn.Linear(48, 40), Conv1D(40, 48)
        for module in (self.hf.linear, self.hf.conv):
            module.weight.data = module.weight.data.normal_(generator=torch.Generator().manual_seed(1)).to(dtype)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_edited_weights_under_an_implementation(dtype, impl, device):
    from rewire.engine.delta import EditedWeights, Factors

    model = Tiny(dtype)
    model.hf.to(device)
    names = ["linear.weight", "conv.weight"]
    weights = EditedWeights(model)
    states = []
    with using(impl), recording() as served:
        for step in range(3):
            states.append({name: model.hf.get_parameter(name).detach().clone() for name in names})
            with weights.provisional() as put:
                for name in names:
                    factors = Factors(random(40, 3, seed=step).to(device), random(3, 48, seed=9).to(device))
                    assert 0 < put(name, factors if step else Factors(factors.dense(), None)) < 1
        for name in names:
            asked = sum(random(40, 3, seed=step) @ random(3, 48, seed=9) for step in range(3))
            found = model.hf.get_parameter(name).detach().float() - states[0][name].float()
            assert (found.cpu() - (asked.T if "conv" in name else asked)).abs().max() < 0.1
            assert torch.equal(model.hf.get_parameter(name), weights.sums[name].to(dtype))
        for state in reversed(states):
            weights.undo_last()
            assert all(torch.equal(model.hf.get_parameter(name), state[name]) for name in names)
    assert set(served) == {("requantize_add", impl)}


def test_an_update_that_overflows_is_put_back():
    from rewire.engine.delta import EditedWeights, Factors

    model = Tiny(torch.float16)
    before = model.hf.linear.weight.detach().clone()
    with (
        pytest.raises(InputError, match=r"linear.weight: .* infinity in float16; nothing was changed"),
        EditedWeights(model).provisional() as put,
    ):
        put("linear.weight", Factors(torch.full((40, 48), 1e5), None))
    assert torch.equal(model.hf.linear.weight, before)


# broken on purpose

# none reads or writes outside of memory: that could end the process instead of failing
MUTANTS = {
    "the last row is masked": ("mask=(i[:, None] < rows) &", "mask=(i[:, None] < rows - 1) &", DENSE),
    "the rank is cut": ("range(0, rank, BLOCK_R)", "range(0, rank - 1, BLOCK_R)", DENSE),
    "the rank is transposed": ("right_j + k[:, None] * right_row", "right_j + k[:, None] * right_col", DENSE),
    "a row is not written": (
        "tl.store(new_ptr + out, new, mask=inside)",
        "tl.store(new_ptr + out, new, mask=inside & (i[:, None] > 0))",
        DENSE,
    ),
    "a wrong stride": ("weight_ptr + i64 * weight_row", "weight_ptr + i64 * cols", DENSE),
    "the running sum is not read": ("if base_ptr is None", "if True", DENSE),
    "no sum of what was missed": ("missed = (written - old) - change", "missed = written - old", DENSE),
    "nibbles are swapped": ("((code_0 << 4) | code_1)", "((code_1 << 4) | code_0)", FOUR_BIT),
    "a bound is left out": ("tl.static_range(15)", "tl.static_range(14)", FOUR_BIT),
    "the absmax is of one half": ("tl.max(tl.abs(value_1), 1)", "tl.max(tl.abs(value_0), 1)", FOUR_BIT),
    "an absmax is not written": (
        "tl.store(new_absmax_ptr + block, largest, mask=live)",
        "tl.store(new_absmax_ptr + block, largest, mask=live & (i > 0))",
        FOUR_BIT,
    ),
    "blocks are counted by column": ("i.to(tl.int64) * blocks + column", "column * rows + i.to(tl.int64)", FOUR_BIT),
    "int8 is cut off": (
        "((old + change) * inverse + 12582912.0) - 12582912.0",
        "((old + change) * inverse).to(tl.int32).to(tl.float32)",
        INT8,
    ),
    "the scale is of the first tile": (
        "largest = tl.maximum(largest, tl.max(",
        "largest = tl.where(largest > 0, largest, tl.max(",
        INT8,
    ),
    "the last columns are not written": (
        "mask=inside)\n        error",
        "mask=inside & (j[None, :] < cols - 1))\n        error",
        INT8,
    ),
}


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_does_not_pass_gate_a(name, mutate):
    old, new, subject = MUTANTS[name]
    mutate("requantize_add", old, new)
    shapes = [s for s in subject.odd if s["d_out"] * s["d_in"] and not s.get("stochastic")]
    strict = {FOUR_BIT.name: strictly_nearest_4bit, INT8.name: strictly_nearest_int8}.get(subject.name)
    dtypes = subject.dtypes[:2]
    assert not all(passes(subject, inputs_of(subject, s, dtype, "cpu"), strict) for dtype in dtypes for s in shapes)


def passes(subject, inputs, strict):
    if not check(subject, inputs, "triton").passed:
        return False
    try:
        if strict:
            strict(inputs, "triton")
    except AssertionError:
        return False
    return True


ROUNDING_MUTANTS = {
    "bf16 is truncated": ("rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "rounded = bits >> 16"),
    "ties go up": ("bits + 0x7FFF + ((bits >> 16) & 1)", "bits + 0x8000"),
}


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", ROUNDING_MUTANTS)
def test_broken_rounding_does_not_pass(name, mutate):
    mutate("requantize_add", *ROUNDING_MUTANTS[name])
    with pytest.raises(AssertionError):
        test_nearest_where_it_is_hard(torch.bfloat16, "triton", "cpu")


CHANCE_MUTANTS = {
    "bf16: one random number for all": ("tl.randint(seed, index)", "tl.randint(seed, index * 0)", torch.bfloat16),
    "bf16: biased": ("up = (bits + (random >> 16)) >> 16", "up = (bits + (random >> 17)) >> 16", torch.bfloat16),
    "fp16: biased": ("uniform * (above - below) < size - below", "uniform * (above - below) < size", torch.float16),
    "fp16: away from zero only": ("bits - 1, bits).to(tl.int16)", "bits, bits).to(tl.int16)", torch.float16),
}


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", CHANCE_MUTANTS)
def test_broken_chance_does_not_pass(name, mutate):
    old, new, dtype = CHANCE_MUTANTS[name]
    mutate("requantize_add", old, new)
    with pytest.raises(AssertionError):
        test_stochastic_is_unbiased(dtype, "triton", "cpu")


@pytest.mark.compile
@pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled")
def test_a_config_that_does_not_fit_does_not_pass_gate_b(tmp_path):
    kernel = pytest.importorskip("rewire.kernels.requantize_add.kernel")
    good = next(v for v in kernel.variants() if "fp32-nearest-running" in v.name)
    spills = replace(good, num_warps=1)
    assert "spills" in str(gate_b.complaints(spills, 90, gate_b.compile_variant(spills, 90, tmp_path)))
    wide = replace(good, num_stages=24)
    assert "shared memory" in str(gate_b.complaints(wide, 80, gate_b.compile_variant(wide, 80, tmp_path)))
