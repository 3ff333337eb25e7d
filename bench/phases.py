"""The phases of an edit at a small shape, each beside its serial or plain counterpart: `make bench` times them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from ..engine.delta import EditedWeights, Factors
from ..engine.evaluation import evaluate
from ..engine.facts import Fact
from ..engine.hparams import Hparams
from ..engine.keys import KeyWalk
from ..engine.model import Model, demo_file
from ..engine.passes import frozen
from ..engine.prompts import PLAIN, subject_rows
from ..engine.solve import memit_update
from ..engine.values import optimise_values
from ..kernels.spd_solve import regular_factor
from ..stats import read_corpus
from .edits import synthetic_moment
from .serial import serial_hidden, serial_keys, serial_value
from .serial_stats import published_moments
from .shapes import CONTEXTS, made_facts
from .stats import collected, difference, random_model, take_rows
from .timing import single

LEAST, MOST, SECONDS = 3, 200, 2.0  # rounds, both sides in turn: until so many seconds are over


@dataclass(frozen=True)
class Size:
    """Of what is timed, or run once: config: of a GPT-2; tokens: of the statistics; steps: of a value."""

    config: Mapping[str, int]
    facts: int
    tokens: int
    steps: int


CPU = torch.device("cpu")
TIMED = Size({"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 256}, 16, 8192, 6)
ONCE = Size({"n_layer": 3, "n_embd": 32, "n_head": 2, "vocab_size": 1536, "n_positions": 256}, 2, 300, 3)


@dataclass(frozen=True)
class Phase:
    """ours, plain: both sides; error: what lies between what they give; bound: at most that."""

    ours: Callable[[], Any]
    plain: Callable[[], Any]
    error: Callable[[Any, Any], float]
    bound: float


def phases(size: Size) -> dict[str, Callable[[], Phase]]:
    """Name -> what makes it."""
    made: list[Bench] = []

    def bench() -> Bench:
        if not made:
            made.append(Bench(size))
        return made[0]

    names = ("statistics", "values", "keys", "solve", "apply", "evaluation")
    return {name: lambda name=name: getattr(bench(), name)() for name in names}  # type: ignore[misc]


class Bench:
    """A small model with random weights, facts and second moments."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.model: Model = random_model(GPT2Config(**size.config), "a small GPT-2", "cpu")
        self.facts: list[Fact] = made_facts(size.facts)
        settings: dict[str, Any] = {"v_num_grad_steps": size.steps, "v_lr": 0.1, "mom2_update_weight": 20}
        self.hparams = Hparams(layers=(0, 1), **settings)
        self.layer = 1

    def statistics(self) -> Phase:
        """Both layers in one pass, against a padded pass for each."""
        model = self.model
        rows = take_rows(read_corpus(demo_file("corpus.txt")), model, self.size.tokens)
        names = [model.anatomy.layer_name(layer) for layer in self.hparams.layers]
        widths = dict.fromkeys(names, model.anatomy.d_in)
        return Phase(
            lambda: collected(model, names, rows),
            lambda: published_moments(model, rows.held, widths, model.max_length),
            lambda a, b: max(difference(a[name].sum, b[name], torch.float32) for name in names),
            1e-5,
        )

    def values(self) -> Phase:
        """All facts in one batch, against one by one."""
        model = self.model

        def plain() -> Tensor:
            with frozen(model):
                found = [serial_value(model, fact, CONTEXTS, self.hparams).z for fact in self.facts]
            return torch.stack(found)

        return Phase(lambda: optimise_values(model, self.facts, CONTEXTS, self.hparams).Z, plain, _rows_apart, 1e-3)

    def keys(self) -> Phase:
        """K and H of both layers, weights as they are: one walk, against full forwards."""
        model, layers = self.model, self.hparams.layers
        rows = subject_rows(model.tokenizer, self.facts, (PLAIN, *CONTEXTS), model.max_length)

        def ours() -> Tensor:
            walk = KeyWalk(model, rows, layers)
            found = [walk.measure(layer) for layer in layers]
            return torch.cat([part for each in found for part in (each.K, each.H)], 1)

        def plain() -> Tensor:
            found = [
                (serial_keys(model, self.facts, CONTEXTS, layer), serial_hidden(model, self.facts, layers[-1]))
                for layer in layers
            ]
            return torch.cat([part for each in found for part in each], 1)

        return Phase(ours, plain, _rows_apart, 1e-4)

    def solve(self) -> Phase:
        """With a kept factor of C, against the dense system by LU."""
        C, K, R, weight = self._system()
        factor = regular_factor(C)

        def plain() -> Tensor:
            K64 = K.double().T
            A = torch.linalg.solve(weight * C.double() + K64 @ K64.T, K64)
            return R.double().T @ A.T

        return Phase(
            lambda: memit_update(K, R, C, weight, lambda: factor)[0],
            plain,
            lambda a, b: float((a.dense() - b).norm() / b.norm()),
            1e-4,
        )

    def apply(self) -> Phase:
        """Written with its checks, and taken back, against a plain sum and a copy."""
        model, name = self.model, self.model.anatomy.weight_name(self.layer)
        weight = model.projection(self.layer).weight
        assert isinstance(weight, Tensor)
        n = self.size.facts
        factors = Factors(torch.randn(model.anatomy.d_model, n) / n, torch.randn(n, model.anatomy.d_in) / n)

        def ours() -> Tensor:
            weights = EditedWeights(model)
            with weights.provisional() as put:
                put(name, factors)
            written = weight.detach().clone()
            weights.undo_last()
            return written

        def plain() -> Tensor:
            original = weight.detach().clone()
            with torch.no_grad():
                weight.add_(factors.dense().T)  # a Conv1D
                written = weight.detach().clone()
                weight.copy_(original)
            return written

        return Phase(ours, plain, lambda a, b: float((a - b).norm() / b.norm()), 1e-6)

    def evaluation(self) -> Phase:
        """Batched over all records, the head at the objects' tokens, against one sequence at a time."""
        model = self.model
        return Phase(
            lambda: _logprobs(evaluate(model, self.facts)),
            lambda: torch.cat([_one_by_one(model, fact) for fact in self.facts]),
            lambda a, b: float((a - b).abs().max()),
            1e-3,
        )

    def _system(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """C, K [n, d_in], R [n, d_model], lambda."""
        C = synthetic_moment(self.model, self.facts[:2], CONTEXTS, self.layer)
        K = serial_keys(self.model, self.facts, CONTEXTS, self.layer)
        return C, K, torch.randn(len(K), self.model.anatomy.d_model), self.hparams.mom2_update_weight


def timed(phase: Phase) -> tuple[float, float]:
    """Seconds of both sides, in turn, medians. Each was run before."""
    ours: list[float] = []
    plain: list[float] = []
    start = time.perf_counter()
    while len(ours) < LEAST or (len(ours) < MOST and time.perf_counter() - start < SECONDS):
        ours.append(single(phase.ours, CPU).p50)
        plain.append(single(phase.plain, CPU).p50)
    return median(ours), median(plain)


def _rows_apart(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def _logprobs(report: Mapping[str, Any]) -> Tensor:
    """Of all sequences, fact by fact: of a prompt's new object, then of its true one."""
    found: list[float] = []
    for record in report["facts"]:
        for kind in ("efficacy", "paraphrase", "neighborhood"):
            of_kind = record.get(kind, {"new_logprob": [], "true_logprob": []})
            for pair in zip(of_kind["new_logprob"], of_kind["true_logprob"], strict=True):
                found += pair
    return torch.tensor(found)


@torch.no_grad()
def _one_by_one(model: Model, fact: Fact) -> Tensor:
    assert fact.target_true is not None
    found = []
    for prompt in (fact.question, *fact.paraphrases, *fact.neighbors):
        for target in (fact.target_new, fact.target_true):
            ids = model.tokenizer(f"{prompt} {target}", return_tensors="pt").input_ids
            count = len(model.tokenizer.encode(" " + target, add_special_tokens=False))
            logp = model.hf(input_ids=ids[:, :-1]).logits[0, -count:].log_softmax(-1)
            found.append(logp.gather(1, ids[0, -count:, None]).mean())
    return torch.stack(found)
