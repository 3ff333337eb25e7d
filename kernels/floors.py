"""FLOPs and bytes of operations and phases: pure arithmetic on shapes, counted in this one place.

A multiply-add is two FLOPs. Bytes are what must move once between memory and the chip, however clever the caches.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


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


@dataclass(frozen=True)
class ValueRow:
    """A token row of the value optimisation.

    length: tokens; start: place of the subject's last one; labels: positions that the head reads, 0 for a KL row (one)
    forwards, backwards: passes over it
    """

    length: int
    start: int
    labels: int
    forwards: int
    backwards: int


def value_cost(shape: ModelShape, z_layer: int, rows: Sequence[ValueRow], itemsize: int) -> Cost:
    """Target values with nothing done twice.

    Once: the blocks up to the z-layer over all tokens, and those above over the ones before the subject (of the last
    block only their keys and values are of use: not counted). Each step: the blocks above over the tokens from the
    subject on, each query against itself and what is before it, the head at labels and KL rows, and the same backward
    to the hidden states, weights frozen: two products for each of attention's, one for each of the others. Bytes: the
    weights once a pass, were all rows in one batch; the embedding's rows.
    """
    above = shape.layers - z_layer - 1
    cost = truncated_forward_cost(shape, Reach(z_layer + 1, 0, False), [row.length for row in rows], itemsize)
    if above:
        cost += _above(shape, Reach(above - 1, 0, False), [row.start for row in rows], itemsize)
    flops, vector = 0, shape.head(1)
    for row in rows:
        pairs = (row.length * (row.length + 1) - row.start * (row.start + 1)) // 2
        linear = above * 2 * (row.length - row.start) * shape.block_weights
        attention = above * 4 * pairs * shape.attention_width
        heads = max(row.labels, 1) * vector
        flops += row.forwards * (linear + attention + heads) + row.backwards * (linear + 2 * attention + heads)
        flops += 0 if row.labels else vector  # what a KL row is held to
    passes = max((row.forwards for row in rows), default=0) + max((row.backwards for row in rows), default=0)
    weights = above * shape.block_weights + shape.d_model * shape.vocab
    return cost + Cost(flops, passes * weights * itemsize)


def keys_cost(
    shape: ModelShape, layers: Sequence[int], plain: Sequence[int], contexts: Sequence[int], itemsize: int
) -> Cost:
    """Keys of all edited layers and the z-layer's hidden states, each with the lower layers updated.

    plain, contexts: lengths of the rows, up to the subject's last token. All rows run once to the first edited
    projection; behind each update from that projection on to the next one. Plain rows go on to the z-layer each time,
    and once more behind the last update.
    """
    first, z = layers[0], layers[-1]
    rows = [*plain, *contexts]
    cost = truncated_forward_cost(shape, up_to_projection(shape, first), rows, itemsize)
    projection = shape.d_in * shape.d_model
    for before, layer in pairwise(layers):
        cost += _above(shape, Reach(layer - before, 0, False), rows, itemsize)
    for layer in layers:
        cost += _above(shape, Reach(z - layer, projection, False), plain, itemsize)
    return cost + _above(shape, Reach(0, projection, False), plain, itemsize)


def _above(shape: ModelShape, reach: Reach, lengths: Sequence[int], itemsize: int) -> Cost:
    """A forward that goes on from hidden states: no embedding is read."""
    cost = truncated_forward_cost(shape, reach, lengths, itemsize)
    return Cost(cost.flops, cost.bytes - sum(lengths) * shape.d_model * itemsize)
