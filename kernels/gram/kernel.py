"""Triton: the lower triangle of tiles of C += XᵀX. One program owns a tile and walks all tokens: no atomics."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import interpreting
from ..tuned import pick
from ..variants import Variant


@dataclass(frozen=True)
class Config:
    """block_m x block_n elements of C per program, block_t tokens per step: powers of two.

    group: rows of super-tiles in a strip
    descriptors: X is read by the copy engine of sm_90, else by asynchronous copies through pointers
    """

    block_m: int
    block_n: int
    block_t: int
    group: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# What a launch may use, by kind; the first is launched untuned. On a GPU all of it is unmeasured. Without descriptors
# the first fits the 99 KiB of shared memory of consumer cards (sm_86, 89, 120).
CONFIGS = {
    # 128 x 256 asks the L2 cache for 3/4 of the bytes of 128 x 128: 24 waves of 132 programs at d = 14336
    "16bit-tma": (
        Config(128, 256, 64, 8, 8, 4, True),
        Config(128, 256, 64, 8, 8, 3, True),
        Config(128, 256, 64, 4, 8, 4, True),
        Config(128, 256, 64, 16, 8, 4, True),
        Config(256, 128, 64, 8, 8, 4, True),
        Config(128, 128, 64, 16, 8, 4, True),
        Config(128, 128, 64, 16, 4, 3, True),
    ),
    # up to 4096 wide: two waves or fewer of large tiles
    "16bit-tma-narrow": (
        Config(128, 128, 64, 16, 8, 4, True),
        Config(128, 128, 64, 16, 4, 3, True),
        Config(64, 128, 64, 16, 4, 4, True),
        Config(128, 256, 64, 8, 8, 4, True),
    ),
    "16bit": (
        Config(128, 128, 64, 8, 8, 3),
        Config(128, 128, 32, 8, 8, 4),
        Config(128, 256, 32, 8, 8, 3),
        Config(64, 64, 64, 16, 4, 4),
    ),
    # rows not aligned to 16 elements are loaded element by element
    "16bit-ragged": (Config(64, 64, 64, 16, 4, 4), Config(128, 128, 32, 8, 8, 3)),
    "fp32-tma": (Config(128, 128, 32, 8, 8, 3, True), Config(128, 128, 32, 8, 8, 2, True)),
    "fp32": (Config(64, 128, 32, 8, 8, 3), Config(64, 64, 32, 16, 4, 3)),
    "fp32-ragged": (Config(64, 64, 32, 16, 4, 3), Config(64, 64, 16, 16, 4, 4)),
}
NARROW = 4096
# Tensor cores cut off what they add up instead of rounding it: a bias of some 2e-8 per 16 tokens (calculated), bounded.
CHUNK = 32768
# fp32 as hi + lo of bf16: hi·hi + hi·lo + lo·hi. The missing lo·lo is random where i is not j; on the diagonal it is
# positive and adds up to 3e-6: diagonal tiles take six products of three parts, and so do few tokens, whose random
# errors have not averaged out (measured: the three are within the tolerance of fp32 from 512 tokens on).
FEW = 512


@triton.jit
def lower_tile(tile):  # type: ignore[no-untyped-def]
    """(row, col), col <= row, of a tile counted row by row: row is the largest with row (row + 1) / 2 <= tile."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the fp32 root may be one off either way
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def grouped_tile(tile, rows, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, col), col <= row < rows, strip by strip of GROUP rows: programs that run together share columns of X in L2.

    As when counted row by row, a strip comes after all tiles of the rows above it: that count names the strip. Each is
    a rectangle, walked column by column, and the triangle on the diagonal.
    """
    row, col = lower_tile(tile)
    top = row // GROUP * GROUP
    height = tl.minimum(rows - top, GROUP)
    within = tile - top * (top + 1) // 2
    beyond = within - top * height
    row, col = lower_tile(tl.maximum(beyond, 0))
    row = tl.where(beyond < 0, within % height, row)
    col = tl.where(beyond < 0, within // height, top + col)
    return top + row, col


@triton.jit
def tile_of_gram(  # type: ignore[no-untyped-def]
    left_x,
    right_x,
    w_ptr,
    tokens,
    width,
    x_stride,
    i0,
    j0,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32: the sum over all tokens, from column i0 on the left and j0 on the right."""
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    if not DESCRIPTORS:
        # left is addressed as its transpose: behind tl.trans, sm_80 loads it without the asynchronous pipeline
        left_ptr = left_x + i[:, None] + t.to(tl.int64)[None, :] * x_stride
        right_ptr = right_x + t.to(tl.int64)[:, None] * x_stride + j[None, :]
        step = tl.full((), BLOCK_T, tl.int64) * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        live = tokens - start
        if DESCRIPTORS:  # what is out of bounds reads as zero
            left = left_x.load([start, i0]).T
            right = right_x.load([start, j0])
        else:
            left = tl.load(left_ptr, mask=(i[:, None] < width) & (t[None, :] < live), other=0.0)
            right = tl.load(right_ptr, mask=(t[:, None] < live) & (j[None, :] < width), other=0.0)
            left_ptr += step
            right_ptr += step
        if WEIGHTED:
            w = tl.load(w_ptr + start + t, mask=t < live, other=0.0)
            left = (left.to(tl.float32) * w[None, :]).to(left.dtype)
        # 16-bit products are exact in fp32 whatever PRECISION says; Triton adds those of split fp32 to acc by ordinary
        # fp32 additions, once a step
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_tile(c_ptr, c_stride, width, i, j, tile):  # type: ignore[no-untyped-def]
    at = c_ptr + i.to(tl.int64)[:, None] * c_stride + j[None, :]
    inside = (i[:, None] < width) & (j[None, :] < width)
    tl.store(at, tl.load(at, mask=inside) + tile, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def gram_lower_kernel(  # type: ignore[no-untyped-def]
    left_x,  # [tokens, width], last dimension contiguous: pointer, or descriptor of [BLOCK_T, BLOCK_M]
    right_x,  # the same X: pointer, or descriptor of [BLOCK_T, BLOCK_N]
    w_ptr,  # [tokens] fp32, or None
    c_ptr,  # [width, width] fp32, last dimension contiguous
    tokens,
    width,
    x_stride,
    c_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products: "ieee", "bf16x3" (six on the diagonal) or "bf16x6"
):
    # square super-tiles lie on the triangle, rectangular tiles in them
    SUPER: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N
    ACROSS: tl.constexpr = SUPER // BLOCK_N
    PARTS: tl.constexpr = SUPER // BLOCK_M * ACROSS
    WEIGHTED: tl.constexpr = w_ptr is not None
    row, col = grouped_tile(tl.program_id(0) // PARTS, tl.cdiv(width, SUPER), GROUP)
    part = tl.program_id(0) % PARTS
    i0 = row * SUPER + part // ACROSS * BLOCK_M
    j0 = col * SUPER + part % ACROSS * BLOCK_N
    # fmt: off
    if PRECISION == "bf16x3":
        if row == col:
            acc = tile_of_gram(left_x, right_x, w_ptr, tokens, width, x_stride, i0, j0,
                               BLOCK_M, BLOCK_N, BLOCK_T, DESCRIPTORS, WEIGHTED, "bf16x6")
        else:
            acc = tile_of_gram(left_x, right_x, w_ptr, tokens, width, x_stride, i0, j0,
                               BLOCK_M, BLOCK_N, BLOCK_T, DESCRIPTORS, WEIGHTED, "bf16x3")
    else:
        acc = tile_of_gram(left_x, right_x, w_ptr, tokens, width, x_stride, i0, j0,
                           BLOCK_M, BLOCK_N, BLOCK_T, DESCRIPTORS, WEIGHTED, PRECISION)
    # fmt: on

    # by halves: C in registers beside the whole of acc spills
    HALF: tl.constexpr = BLOCK_N // 2
    first, second = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, HALF)
    add_tile(c_ptr, c_stride, width, i, j, first)
    add_tile(c_ptr, c_stride, width, i, j + HALF, second)


def candidates(C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[str, tuple[Config, ...]]:
    """The key of these arguments in a table of `tuned`, and the configurations that can serve them."""
    width, stride = X.shape[1], X.stride(0)
    kind = "fp32" if X.dtype is torch.float32 else "16bit"
    if any(n % 16 for n in (width, stride, C.stride(0), X.data_ptr(), C.data_ptr())):
        kind += "-ragged"
    elif X.is_cuda and torch.cuda.get_device_capability(X.device) == (9, 0) and stride >= width:
        kind += "-tma"
        if kind == "16bit-tma" and width <= NARROW:
            kind += "-narrow"
    return f"{kind}-{triton.next_power_of_2(width)}", CONFIGS[kind]


def precision(X: torch.Tensor) -> str:
    """Of the products of X: fp32 is split into bf16, except by the interpreter, which has none."""
    if X.dtype is not torch.float32 or interpreting():
        return "ieee"
    return "bf16x3" if len(X) >= FEW else "bf16x6"


def gram_lower_(
    C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None = None, config: Config | None = None
) -> None:
    """Launch on ``C: [d, d] fp32``, ``X: [T, d]`` fp32, fp16 or bf16, last dimensions contiguous, T and d >= 1.

    weight: [T] fp32, contiguous
    config: instead of the one that `tuned.pick` takes
    """
    tokens, width = X.shape
    with torch.cuda.device_of(X):  # Triton launches on the current device, whatever the tensors say; no-op on the CPU
        config = config or pick("gram", *candidates(C, X, weight))
        side = triton.cdiv(width, max(config.block_m, config.block_n))
        parts = max(config.block_m, config.block_n) ** 2 // (config.block_m * config.block_n)
        chunk = triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, CHUNK)), 64) * 64  # even ones, aligned as X is
        for start in range(0, tokens, chunk):
            rows = X[start : start + chunk]
            left, right = rows, rows
            if config.descriptors:
                left = TensorDescriptor.from_tensor(rows, [config.block_t, config.block_m])
                right = TensorDescriptor.from_tensor(rows, [config.block_t, config.block_n])
            gram_lower_kernel[(side * (side + 1) // 2 * parts,)](
                left,
                right,
                None if weight is None else weight[start : start + chunk],
                C,
                len(rows),
                width,
                X.stride(0),
                C.stride(0),
                **_constants(config, precision(X)),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )


def _constants(config: Config, precision: str) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_T": config.block_t,
        "GROUP": config.group,
        "DESCRIPTORS": config.descriptors,
        "PRECISION": precision,
    }


def variants() -> list[Variant]:
    """What gate B compiles: every configuration, also with weights; the first of a kind also for fp16 or few tokens.

    Of each first one a form or two are enough by default.
    """
    found = []
    for kind, configs in CONFIGS.items():
        fp32 = kind.startswith("fp32")
        usual, other = (("fp32", "bf16x3"), ("fp32", "bf16x6")) if fp32 else (("bf16", "ieee"), ("fp16", "ieee"))
        for config in configs:
            first = config is configs[0]
            found.append(_variant(kind, config, *usual, weighted=False, default=first))
            found.append(_variant(kind, config, *usual, weighted=True, default=first and not fp32))
        found.append(_variant(kind, configs[0], *other, weighted=False, default=False))
    return found


def _variant(kind: str, config: Config, dtype: str, precision: str, weighted: bool, default: bool) -> Variant:
    c = config
    tile = f"{c.block_m}x{c.block_n}x{c.block_t}-g{c.group}-w{c.num_warps}-s{c.num_stages}"
    types = {"left_x": f"*{dtype}", "right_x": f"*{dtype}", "w_ptr": "*fp32", "c_ptr": "*fp32"}
    aligned = {"left_x", "right_x", "w_ptr", "c_ptr", "width", "x_stride", "c_stride"}
    constants = _constants(config, precision)
    if config.descriptors:
        blocks = {"left_x": c.block_m, "right_x": c.block_n}
        types |= {name: f"tensordesc<{dtype}[{c.block_t}, {block}]>" for name, block in blocks.items()}
        aligned -= {"left_x", "right_x"}
    if kind.endswith("ragged"):
        aligned -= {"width", "x_stride", "c_stride"}
    if not weighted:
        constants["w_ptr"] = None
        aligned.discard("w_ptr")
    return Variant(
        name=f"gram-{kind}-{dtype}-{precision}-{tile}{'-weighted' if weighted else ''}",
        kernel=gram_lower_kernel,
        types=types,
        constants=constants,
        aligned=tuple(sorted(aligned)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=True,
        pipelined=not kind.endswith("ragged"),
        default=default,
        chips=(90,) if config.descriptors else (80, 90),
    )
