"""FLOPs and bytes of operations and phases: pure arithmetic on shapes, counted in this one place.

A multiply-add is two FLOPs. Bytes are what must move once between memory and the chip, however clever the caches.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The least that an operation does: floating-point operations, and bytes read and written."""

    flops: int
    bytes: int


def gram_cost(T: int, d: int, itemsize: int) -> Cost:
    """Lower triangle of C += XᵀX: X read once, the fp32 triangle read and written."""
    return Cost(T * d * (d + 1), T * d * itemsize + 4 * d * (d + 1))


def gather_mean_cost(rows: int, n: int, d: int, itemsize: int) -> Cost:
    """K += w X at one token of each row: those vectors read once, the fp32 [n, d] read and written."""
    return Cost(2 * rows * d, rows * d * itemsize + 8 * n * d)


def scatter_add_cost(rows: int, T: int, n: int, d: int, itemsize: int) -> Cost:
    """[rows, T, d] read and written, with an fp32 [n, d] added at one token of each row."""
    return Cost(rows * d, 2 * rows * T * d * itemsize + 4 * n * d)


def requantize_add_cost(d_out: int, d_in: int, rank: int, itemsize: int) -> Cost:
    """round(W + left @ right): W read and written, the fp32 factors read once."""
    return Cost(d_out * d_in * (2 * rank + 1), 2 * d_out * d_in * itemsize + 4 * rank * (d_out + d_in))


def requantize_add_4bit_cost(d_out: int, d_in: int, rank: int, blocksize: int = 64) -> Cost:
    """4-bit codes and an fp32 absmax of each block read and written, the fp32 factors read once."""
    stored = d_out * d_in // 2 + 4 * (d_out * d_in // blocksize)
    return Cost(d_out * d_in * (2 * rank + 3), 2 * stored + 4 * rank * (d_out + d_in))


def requantize_add_int8_cost(d_out: int, d_in: int, rank: int) -> Cost:
    """int8 codes and an fp32 scale of each row read and written, the fp32 factors read once."""
    return Cost(d_out * d_in * (2 * rank + 3), 2 * (d_out * d_in + 4 * d_out) + 4 * rank * (d_out + d_in))


def small_solve_cost(batch: int, n: int, k: int, itemsize: int) -> Cost:
    """Factor and solve `batch` systems of n unknowns with k right-hand sides; A read, L written, B read, X written."""
    return Cost(batch * (n**3 // 3 + 2 * n * n * k), batch * 2 * (n * n + n * k) * itemsize)


def add_delta_cost(
    tokens: int, d_in: int, d_out: int, deltas: int, r: int, itemsize: int, factor_itemsize: int
) -> Cost:
    """y += x rightᵀ leftᵀ: x and the factors of `deltas` deltas read once, y read and written."""
    width = d_in + d_out
    return Cost(2 * tokens * r * width, tokens * (width + d_out) * itemsize + deltas * r * width * factor_itemsize)


def delta_linear_cost(
    tokens: int, d_in: int, d_out: int, deltas: int, r: int, itemsize: int, factor_itemsize: int
) -> Cost:
    """y = x weightᵀ and the deltas, were they one: x, weight and factors read once, y written once."""
    width = d_in + d_out
    flops = 2 * tokens * (d_in * d_out + r * width)
    return Cost(flops, (tokens * width + d_in * d_out) * itemsize + deltas * r * width * factor_itemsize)


def target_nll_cost(rows: int, kl: int, d: int, vocab: int, itemsize: int) -> Cost:
    """Logits of `rows` rows, `kl` of them KL rows with as many of their first, and the gradient: the head read once."""
    flops = 2 * d * vocab * (2 * rows + kl)
    return Cost(flops, (d * vocab + d * (2 * rows + kl)) * itemsize)


@dataclass(frozen=True)
class ModelShape:
    """What a forward costs.

    layers: decoder blocks; block_weights: numbers in the matrices of one block; attention_width: heads x head width
    d_model: width of the residual stream; vocab: rows of the head
    """

    layers: int
    block_weights: int
    attention_width: int
    d_model: int
    vocab: int

    def blocks(self, count: int, rows: int, tokens: int) -> int:
        """Forward of `count` blocks over [rows, tokens], every query against every key."""
        return count * rows * tokens * (2 * self.block_weights + 4 * tokens * self.attention_width)

    def head(self, positions: int) -> int:
        return 2 * positions * self.d_model * self.vocab


def published_value_step(shape: ModelShape, z_layer: int, rows: int, kl_rows: int, tokens: int, update: bool) -> int:
    """One step of MEMIT's value optimisation as published, for one fact: [rows, tokens] padded, frozen weights.

    The whole model with its head runs over all positions, the rewriting rows pass the head a second time; backward
    (where the step updates) goes through both heads and the blocks above the z-layer: one product a linear, four for
    attention's two (their inputs and the recomputed scores).
    """
    heads = shape.head(rows * tokens) + shape.head((rows - kl_rows) * tokens)
    forward = shape.blocks(shape.layers, rows, tokens) + heads
    if not update:
        return forward
    above = shape.layers - z_layer - 1
    linear = above * rows * tokens * 2 * shape.block_weights
    attention = above * rows * tokens * 4 * tokens * shape.attention_width
    return forward + heads + linear + attention * 5 // 2
