"""What the phases of an edit cost at least, counted from the true token rows by `kernels.floors`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.facts import Fact
from ..engine.model import Model
from ..engine.outline import model_shape
from ..engine.prompts import PLAIN, answer_rows, fact_rows, kl_rows, subject_rows
from ..kernels.floors import (
    Cost,
    Reach,
    ValueRow,
    dense_solve_cost,
    factor_cost,
    keys_cost,
    requantize_add_cost,
    truncated_forward_cost,
    value_cost,
    woodbury_cost,
)


@dataclass(frozen=True)
class Costs:
    """Of an edit of some facts into a model.

    layers: edited ones, the last is the z-layer; contexts: without the plain one
    """

    model: Model
    contexts: Sequence[str]
    layers: Sequence[int]

    @property
    def itemsize(self) -> int:
        return next(self.model.hf.parameters()).element_size()

    def values(self, facts: Sequence[Fact], updates: Sequence[int]) -> Cost:
        """updates: Adam steps that each fact took; each has one forward more, which is only looked at."""
        tokenizer = self.model.tokenizer
        rewriting = fact_rows(tokenizer, facts, (PLAIN, *self.contexts), self.model.max_length)
        rows = [
            ValueRow(len(row.ids), row.position, len(row.labels), steps + 1, steps)
            for group, kl, steps in zip(rewriting, kl_rows(tokenizer, facts), updates, strict=True)
            for row in (*group, kl)
        ]
        return value_cost(model_shape(self.model), self.layers[-1], rows, self.itemsize)

    def keys(self, facts: Sequence[Fact]) -> Cost:
        rows = subject_rows(self.model.tokenizer, facts, (PLAIN, *self.contexts), self.model.max_length)
        plain = [len(group[0].ids) for group in rows]
        contexts = [len(row.ids) for group in rows for row in group[1:]]
        return keys_cost(model_shape(self.model), self.layers, plain, contexts, self.itemsize)

    def solve(self, count: int) -> Cost:
        """With the factor of C, which is made once."""
        d = self.model.anatomy.d_in
        each = factor_cost(d) + woodbury_cost(d, count) if 4 * count < d else dense_solve_cost(d, count)
        return Cost(each.flops * len(self.layers), each.bytes * len(self.layers))

    def write(self, count: int) -> Cost:
        anatomy = self.model.anatomy
        each = requantize_add_cost(anatomy.d_model, anatomy.d_in, count, self.itemsize)
        return Cost(each.flops * len(self.layers), each.bytes * len(self.layers))

    def evaluate(self, facts: Sequence[Fact]) -> Cost:
        """Each (prompt, object) once through the whole model, the head at the object's tokens."""
        pairs = {
            (prompt, target): None
            for fact in facts
            for prompt in (fact.question, *fact.paraphrases, *fact.neighbors)
            for target in (fact.target_new, fact.target_true)
            if target is not None
        }
        rows = answer_rows(self.model.tokenizer, list(pairs))
        shape = model_shape(self.model)
        whole = Reach(shape.layers, 0, False)
        forward = truncated_forward_cost(shape, whole, [len(row.ids) for row in rows], self.itemsize)
        head = shape.head(sum(len(row.labels) for row in rows))
        return forward + Cost(head, shape.d_model * shape.vocab * self.itemsize)
