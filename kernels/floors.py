"""FLOPs and bytes of operations and phases: pure arithmetic on shapes, counted in this one place.

A multiply-add is two FLOPs. Bytes are what must move once between memory and the chip, however clever the caches.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The least that an operation does: floating-point operations, and bytes read and written."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


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


def factor_cost(d: int) -> Cost:
    """Cholesky in fp64: the fp32 matrix read, the fp64 factor written."""
    return Cost(d**3 // 3, 12 * d * d)


def eigenbasis_cost(d: int) -> Cost:
    """Eigenvectors of a symmetric [d, d] in fp64: to tridiagonal form, and back from there; what is between is less."""
    return Cost(10 * d**3 // 3, 12 * d * d)


def woodbury_cost(d: int, n: int) -> Cost:
    """n right-hand sides on a kept fp64 factor: two triangular solves, and the n by n system."""
    return Cost(2 * n * d * d + 4 * n * n * d + n**3 // 3, 8 * (2 * d * d + 3 * n * d))


def dense_solve_cost(d: int, n: int) -> Cost:
    """The d by d system of n keys formed, factored and solved for n right-hand sides, in fp64."""
    return Cost(d * d * n + d**3 // 3 + 2 * n * d * d, 8 * (3 * d * d + 2 * n * d))


def push_through_cost(d: int, rank: int, n: int) -> Cost:
    """AlphaEdit's update in a basis of `rank` columns: keys projected, their n by n system, in fp64."""
    return Cost(4 * n * d * rank + 4 * n * n * d + n**3 // 3, 8 * (d * rank + 3 * n * d))


@dataclass(frozen=True)
class ModelShape:
    """What a forward costs.

    layers: decoder blocks; block_weights: numbers in the matrices of one block; attention_width: heads x head width
    d_model: width of the residual stream; d_in: of the MLP output projection's input; vocab: rows of the head
    """

    layers: int
    block_weights: int
    attention_width: int
    d_model: int
    d_in: int
    vocab: int

    def blocks(self, count: int, rows: int, tokens: int) -> int:
        """Forward of `count` blocks over [rows, tokens], every query against every key."""
        return count * rows * tokens * (2 * self.block_weights + 4 * tokens * self.attention_width)

    def head(self, positions: int) -> int:
        return 2 * positions * self.d_model * self.vocab


@dataclass(frozen=True)
class Reach:
    """How far a truncated forward goes.

    blocks: that run whole; weights: numbers in the matrices of the next one that run; attention: so does its attention
    """

    blocks: int
    weights: int
    attention: bool = True


def up_to_projection(shape: ModelShape, layer: int) -> Reach:
    """As far as the input of that layer's MLP output projection."""
    return Reach(layer, shape.block_weights - shape.d_in * shape.d_model)


def truncated_forward_cost(shape: ModelShape, reach: Reach, lengths: Iterable[int], itemsize: int) -> Cost:
    """A forward over documents of these lengths that stops there: no padding, each query against itself and what is
    before it in its document; the weights read once, the embedding's rows, and nothing in between."""
    tokens = pairs = 0
    for length in lengths:
        tokens += length
        pairs += length * (length + 1) // 2
    weights = reach.blocks * shape.block_weights + reach.weights
    attention = 4 * shape.attention_width * (reach.blocks + reach.attention)
    return Cost(2 * tokens * weights + pairs * attention, (weights + tokens * shape.d_model) * itemsize)


@dataclass(frozen=True)
class StatisticsCost:
    """forward: of the model, in its dtype; gram: of the products, in whatever the keys are multiplied in."""

    forward: Cost
    gram: Cost

    @property
    def total(self) -> Cost:
        return self.forward + self.gram


def statistics_cost(
    shape: ModelShape, reach: Reach, widths: Iterable[int], lengths: Sequence[int], itemsize: int
) -> StatisticsCost:
    """Second moments of modules with inputs of `widths`, over documents of `lengths` tokens, in one pass.

    reach: of the last of them (`up_to_projection`, `engine.outline.reach_of`); itemsize: bytes of a weight and of a key
    """
    tokens, gram = sum(lengths), Cost(0, 0)
    for width in widths:
        gram += gram_cost(tokens, width, itemsize)
    return StatisticsCost(truncated_forward_cost(shape, reach, lengths, itemsize), gram)


def published_statistics_flops(
    shape: ModelShape, widths: Mapping[int, int], batches: Sequence[tuple[int, int]], tokens: int
) -> int:
    """The published structure: a pass for each layer (layer -> width of its keys) that stops behind its MLP output
    projection, over padded batches [rows, T], every query against every key, and dense products of `tokens` keys."""
    passes = sum(shape.blocks(layer + 1, rows, length) for layer in widths for rows, length in batches)
    return passes + sum(2 * tokens * width * width for width in widths.values())


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


def value_flops(
    shape: ModelShape, z_layer: int, rows: int, kl_rows: int, tokens: int, active: int, labels: int, steps: int
) -> int:
    """Values of facts with `rows` rows of `tokens` tokens together, in `steps` steps, each made in full.

    Once: the blocks up to the z-layer over all tokens, those above over the ones before the subject. Each step: the
    blocks above over the `active` ones from the subject on, forward and (not the last step) backward, and the head at
    `labels` positions a row and one a KL row.
    """
    above = shape.layers - z_layer - 1
    once = shape.blocks(z_layer + 1, rows, tokens) + shape.blocks(above, rows, tokens - active)
    linear = above * rows * active * 2 * shape.block_weights
    attention = above * rows * active * 4 * tokens * shape.attention_width
    head = target_nll_cost((rows - kl_rows) * labels + kl_rows, kl_rows, shape.d_model, shape.vocab, 4).flops
    return once + steps * (linear + attention + head) + (steps - 1) * (linear + attention * 5 // 2)
