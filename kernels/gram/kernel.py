"""Triton: the lower triangle of tiles of C += XᵀX. One program owns a tile and walks all tokens: no atomics."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Config:
    """block x block elements of C per program, block_t tokens per step."""

    block: int
    block_t: int
    num_warps: int
    num_stages: int


# By bytes per element; the first is launched, the others wait for a GPU to tune on. The first stays under 99 KiB of
# shared memory, which is what consumer cards (sm_86, 89, 120) have.
CONFIGS = {
    2: (Config(128, 64, 8, 3), Config(128, 32, 8, 4), Config(64, 64, 4, 4)),
    4: (Config(64, 32, 4, 3), Config(128, 16, 8, 3), Config(32, 32, 4, 3)),
}
# Rows that are not aligned to 16 elements are loaded element by element; tiles of 128 then spill registers.
RAGGED = {2: Config(64, 64, 4, 4), 4: Config(64, 32, 4, 3)}


@triton.jit
def lower_tile(tile):  # type: ignore[no-untyped-def]
    """(row, col), col <= row, of a tile counted row by row: row is the largest with row (row + 1) / 2 <= tile."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the fp32 root may be one off either way
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit(do_not_specialize=["tokens"])
def gram_lower_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [tokens, width], last dimension contiguous
    c_ptr,  # [width, width] fp32, last dimension contiguous
    tokens,
    width,
    x_stride,
    c_stride,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row, col = lower_tile(tl.program_id(0))
    i = row * BLOCK + tl.arange(0, BLOCK)
    j = col * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    # int64: tokens * width and width² both pass 2^31 on models of today
    # left is addressed as its transpose: behind tl.trans, sm_80 loads it without the asynchronous pipeline
    left_ptr = x_ptr + i[:, None] + t.to(tl.int64)[None, :] * x_stride
    right_ptr = x_ptr + t.to(tl.int64)[:, None] * x_stride + j[None, :]
    step = tl.full((), BLOCK_T, tl.int64) * x_stride
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        live = tokens - start
        left = tl.load(left_ptr, mask=(i[:, None] < width) & (t[None, :] < live), other=0.0)
        right = tl.load(right_ptr, mask=(t[:, None] < live) & (j[None, :] < width), other=0.0)
        # ieee: the default rounds fp32 inputs to tf32 (1e-3 per element); 16-bit inputs use tensor cores either way
        acc = tl.dot(left, right, acc, input_precision="ieee")
        left_ptr += step
        right_ptr += step

    c_tile = c_ptr + i.to(tl.int64)[:, None] * c_stride + j[None, :]
    inside = (i[:, None] < width) & (j[None, :] < width)
    tl.store(c_tile, tl.load(c_tile, mask=inside) + acc, mask=inside)


def gram_lower_(C: torch.Tensor, X: torch.Tensor, config: Config | None = None) -> None:
    """Launch on ``C: [d, d] fp32`` and ``X: [T, d]`` fp32, fp16 or bf16, last dimensions contiguous, d >= 1."""
    tokens, width = X.shape
    aligned = all(n % 16 == 0 for n in (width, X.stride(0), C.stride(0), X.data_ptr(), C.data_ptr()))
    config = config or (CONFIGS[X.itemsize][0] if aligned else RAGGED[X.itemsize])
    rows = triton.cdiv(width, config.block)
    with torch.cuda.device_of(X):  # Triton launches on the current device, whatever the tensors say; no-op on the CPU
        gram_lower_kernel[(rows * (rows + 1) // 2,)](
            X,
            C,
            tokens,
            width,
            X.stride(0),
            C.stride(0),
            BLOCK=config.block,
            BLOCK_T=config.block_t,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
