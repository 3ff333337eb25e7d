"""FLOPs of the phases: pure arithmetic on shapes, counted in this one place (a multiply-add is two)."""

from dataclasses import dataclass


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
