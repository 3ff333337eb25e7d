"""What an edit takes, said before anything is loaded: memory and time of each phase, from the model's config alone.

The model is built without weights (on the meta device), so parameters are counted exactly. Seconds are floors: the
FLOPs and bytes of `kernels.floors` at the rates that whoever asks has measured.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kernels.floors import (
    Cost,
    ModelShape,
    ValueRow,
    dense_solve_cost,
    eigenbasis_cost,
    factor_cost,
    keys_cost,
    push_through_cost,
    requantize_add_cost,
    statistics_cost,
    up_to_projection,
    value_cost,
    woodbury_cost,
)
from ..kernels.spd_solve import fast_dtype
from ..stats import cache_root
from ..stats.collect import default_tokens
from ..stats.memory import free_bytes, place_for
from ..stats.moments import STRIP
from .facts import Fact
from .hparams import Hparams
from .keys import kept_bytes
from .outline import Outline, model_shape
from .passes import CPU_TOKENS, GPU_TOKENS, MEMORY_SHARE, forward_bytes
from .statistics import Floor
from .value_groups import fact_bytes, size_within, token_bytes

DOCUMENT = 440  # tokens of a document: the mean of the English Wikipedia's
CHARACTERS = 4  # of a token
IN_TURN = ("rome", "r-rome")  # one fact after the other
PLACES = ("device", "cpu", "disk")
SMALLER = (  # what a user may ask for, if it is less
    ("--dtype bfloat16", torch.bfloat16, None),
    ("--quantize nf4 (for statistics and evaluation: such a model is not edited)", torch.bfloat16, "nf4"),
)


@dataclass(frozen=True)
class Texts:
    """The facts of an edit, counted; lengths are tokens, estimated from characters.

    facts: how many; prompt: tokens of a prompt; subject: of them, the subject's; behind: those behind it;
    target: of a new object (means); longest: of the longest prompt with its object
    """

    facts: int
    prompt: int = 10
    subject: int = 3
    behind: int = 4
    target: int = 2
    longest: int = 20

    @classmethod
    def of(cls, facts: Sequence[Fact]) -> "Texts":
        rows = []
        for fact in facts:
            behind = len(fact.prompt) - fact.prompt.index("{}") - 2
            texts = (len(fact.question), len(fact.subject), behind, len(fact.target_new))
            rows.append([math.ceil(n / CHARACTERS) for n in texts])
        prompt, subject, behind, target = (math.ceil(sum(column) / len(rows)) for column in zip(*rows, strict=True))
        return cls(len(facts), prompt, subject, behind, target, max(row[0] + row[3] for row in rows))


@dataclass(frozen=True)
class Phase:
    """Bytes that a phase holds beside the model's weights, by place, and the seconds that it takes at least.

    device: 0 where the model is on the CPU: all is there then
    seconds: None where no rate is known; what: in words
    """

    name: str
    device: int
    cpu: int
    disk: int
    seconds: float | None
    what: str


@dataclass(frozen=True)
class Plan:
    """phases: in order; the weights of the first stay during all others
    tokens: that statistics are collected over
    chunks, sums: where their running float32 and float64 sums will live: "device", "cpu" or "disk"
    need: the most bytes that are held at once, by place; free: what is free now
    advice: what to do where it does not fit
    """

    phases: tuple[Phase, ...]
    tokens: int
    chunks: str
    sums: str
    need: Mapping[str, int]
    free: Mapping[str, int]
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(self.need[place] <= self.free[place] for place in PLACES)

    def report(self) -> dict[str, Any]:
        """What `rewire plan --json` says of it."""
        phases = [
            {"name": phase.name}
            | {f"{place}_bytes": getattr(phase, place) for place in PLACES}
            | {"seconds": phase.seconds, "what": phase.what}
            for phase in self.phases
        ]
        return {
            "tokens": self.tokens,
            "phases": phases,
            "seconds": sum(phase.seconds or 0.0 for phase in self.phases),
            "accumulators": {"float32": self.chunks, "float64": self.sums},
            "need": dict(self.need),
            "free": dict(self.free),
            "fits": self.fits,
            "advice": list(self.advice),
        }


def rated_dtypes(model: Outline) -> list[torch.dtype]:
    """Those that a plan for the model asks rates of."""
    return list(dict.fromkeys((model.dtype, torch.float32, fast_dtype(model.device))))


def plan(model: Outline, hparams: Hparams, method: str, texts: Texts, floor: Floor, tokens: int | None = None) -> Plan:
    """What editing those facts takes, statistics included; evaluation is not in it.

    method: its name; tokens: of the statistics, None: what the hyper-parameters say
    """
    layers = dict.fromkeys((model.anatomy.layer_name(layer) for layer in hparams.layers), model.anatomy.d_in)
    length = min(DOCUMENT, hparams.mom2_max_length, model.max_length)
    tokens = tokens or min(hparams.mom2_tokens or default_tokens(layers), hparams.mom2_n_samples * length)
    free = {
        "device": 0 if model.device.type == "cpu" else free_bytes(model.device),
        "cpu": free_bytes(torch.device("cpu")),
        "disk": shutil.disk_usage(next(p for p in (cache_root(), *cache_root().parents) if p.exists())).free,
    }
    weights = model.weight_bytes(model.dtype, model.quantize)
    own = "cpu" if model.device.type == "cpu" else "device"
    left = max(0, free[own] - weights)
    sums = place_for(layers, model.device, left, left if own == "cpu" else free["cpu"])
    work = _Work(model, model_shape(model), hparams, method, texts, floor, weights, left)
    phases = [work.load(), *([work.statistics(tokens, length, sums)] if work.reads_moments else [])]
    if not model.quantize:  # which can be read, but not edited
        phases += [work.values(), work.keys(), work.solve(), work.apply()]
    if model.device.type == "cpu":
        phases = [replace(phase, device=0, cpu=phase.device + phase.cpu) for phase in phases]
    first, *rest = phases
    need = {
        "device": first.device + max(phase.device for phase in rest),
        # weights for a device are read on the CPU, and leave it
        "cpu": max(first.cpu, (0 if first.device else first.cpu) + max(phase.cpu for phase in rest)),
        "disk": sum(phase.disk for phase in phases),
    }
    sums = own if sums == "device" else sums
    return Plan(tuple(phases), tokens, own, sums, need, free, tuple(_advice(model, need, free)))


@dataclass(frozen=True)
class _Work:
    """What each phase is worked out from. In device, cpu, disk: a CPU that is the device is counted as the device."""

    model: Outline
    shape: ModelShape
    hparams: Hparams
    method: str
    texts: Texts
    floor: Floor
    weights: int  # bytes
    left: int  # bytes where the model lies, once the weights are there

    @property
    def room(self) -> int:
        """Bytes that batches are made for."""
        return int(MEMORY_SHARE * self.left)

    @property
    def itemsize(self) -> int:
        return self.model.dtype.itemsize

    @property
    def d(self) -> int:
        return self.shape.d_in

    @property
    def reads_moments(self) -> bool:
        """ROME may do without."""
        return bool(getattr(self.hparams, "mom2_adjustment", True))

    @property
    def contexts(self) -> list[int]:
        """Tokens of each sampled context."""
        return [tokens for tokens, count in self.hparams.context_template_length_params for _ in range(count)]

    @property
    def moments(self) -> int:
        """C of all layers in float32, which an edit keeps on the CPU."""
        return 4 * self.d**2 * len(self.hparams.layers) * self.reads_moments

    @property
    def z_layer(self) -> int:
        return self.hparams.layers[-1]

    def forward(self, tokens: int) -> int:
        """Bytes of a batch of a pass without gradients."""
        cap = GPU_TOKENS if self.model.device.type == "cuda" else CPU_TOKENS
        token = int(forward_bytes(self.model))
        return max(token, min(min(tokens, cap) * token, self.room))

    def load(self) -> Phase:
        stored = self.model.quantize or str(self.model.dtype).removeprefix("torch.")
        count = sum(parameter.numel() for parameter in self.model.hf.parameters())
        cpu = (
            0 if self.model.device.type == "cpu" or self.model.quantize else self.weights
        )  # quantised while it is read
        return Phase("model", self.weights, cpu, 0, None, f"{count / 1e6:,.0f} M parameters in {stored}")

    def statistics(self, tokens: int, length: int, place: str) -> Phase:
        d, L, model = self.d, len(self.hparams.layers), self.model
        # strips of the triangle, each as wide as its last row
        sums = 8 * sum(min(STRIP, d - start) * min(start + STRIP, d) for start in range(0, d, STRIP))
        held = {"device": 4 * d * d * L, "cpu": 4 * d * d, "disk": 4 * d * d}  # chunks: elsewhere all layers share one
        device = held[place] + sums * L * (place == "device") + self.forward(tokens)
        # each layer's sums become a packed triangle, and then its mean
        cpu = sums * L * (place == "cpu") + self.moments + 3 * 4 * d * d
        disk = 2 * self.moments + sums * L * (place == "disk")  # the result and a checkpoint
        lengths = [length] * max(1, tokens // length)
        widths = [d] * L
        cost = statistics_cost(self.shape, up_to_projection(self.shape, self.z_layer), widths, lengths, self.itemsize)
        # on a CPU keys are multiplied in float32, on a GPU in their own dtype
        keys = torch.float32 if model.device.type == "cpu" else model.dtype
        what = f"{tokens:,} tokens, in documents of {length}; C of {L} layers, width {d}"
        seconds = _sum(self.floor(cost.forward, model.dtype), self.floor(cost.gram, keys))
        return Phase("statistics", device, cpu, disk, seconds, what)

    def _subjects(self) -> list[int]:
        """Tokens up to the subject's last one in each row of a fact, the plain one first."""
        plain = max(1, self.texts.prompt - self.texts.behind)
        return [plain, *(plain + context for context in self.contexts)]

    def values(self) -> Phase:
        shape, texts, model = self.shape, self.texts, self.model
        n, steps = texts.facts, self.hparams.v_num_grad_steps
        rows = n * (len(self.contexts) + 2)
        behind, passes = texts.behind + texts.target - 1, (steps, steps - 1)
        each = [ValueRow(until + behind, until - 1, texts.target, *passes) for until in self._subjects()]
        each.append(ValueRow(texts.subject, texts.subject - 1, 0, *passes))
        cost = value_cost(shape, self.z_layer, each, self.itemsize)
        cost = Cost(n * cost.flops, cost.bytes)  # the weights once a pass, were all facts in one batch
        config: Any = model.hf.config.get_text_config()  # type: ignore[union-attr, operator]
        longest = texts.longest + max(self.contexts, default=0)
        fact = fact_bytes(model.anatomy, config, self.z_layer, len(self.contexts) + 2, longest, self.itemsize)
        token = token_bytes(model.anatomy, self.z_layer, self.itemsize)
        size = size_within(self.room, model.device, fact, token)
        flying = 1 if self.method in IN_TURN else min(n, size.facts)
        group = min(rows * longest, size.tokens)
        device = flying * fact + group * token + 8 * n * shape.d_model
        disk = 8 * n * shape.d_model  # Z and what was there, kept
        tokens = sum(row.length for row in each)
        what = f"{n:,} facts, {flying} at once, {tokens} tokens each, up to {steps} steps"
        return Phase("values", device, self.moments, disk, self.floor(cost, model.dtype), what)

    def keys(self) -> Phase:
        """Of each layer, measured with the lower ones updated, and each time what is left to do at the z-layer."""
        texts, model = self.texts, self.model
        plain, *contexts = self._subjects()
        cost = keys_cost(self.shape, self.hparams.layers, [plain], contexts, self.itemsize)
        cost = Cost(texts.facts * cost.flops, cost.bytes)
        rows = texts.facts * (plain + sum(contexts))
        parted = rows * (self.d + self.shape.d_model) * self.itemsize if len(self.hparams.layers) > 1 else 0
        kept = min(parted, kept_bytes(model.device, self.left))
        device = self.forward(rows) + kept + 4 * texts.facts * (self.d + 2 * self.shape.d_model)
        what = f"{texts.facts:,} keys of each layer"
        return Phase("keys", device, self.moments, 0, self.floor(cost, model.dtype), what)

    def solve(self) -> Phase:
        d, n, L = self.d, self.texts.facts, len(self.hparams.layers)
        if not self.reads_moments:
            return Phase("solve", 8 * n * d, 0, 0, 0.0, "the keys themselves")
        if self.method == "alphaedit":
            # at most half of the directions: the smaller of null space and complement is kept
            cost, name = eigenbasis_cost(d) + push_through_cost(d, d // 2, n), "eigenvectors"
            device, disk = 36 * d * d + 8 * (4 * n * d + 2 * n * n), 8 * d * d  # C, its copy, vectors, LAPACK's room
        elif 4 * n < d:
            cost, name = factor_cost(d) + woodbury_cost(d, n), "Cholesky factor of C"
            device, disk = 20 * d * d + 8 * (5 * n * d + 2 * n * n), 4 * d * d  # C, the factor and what it is made of
        else:
            cost, name = dense_solve_cost(d, n), "dense system"
            device, disk = 20 * d * d + 8 * 3 * n * d, 0
        seconds = self.floor(Cost(cost.flops * L, cost.bytes * L), fast_dtype(self.model.device))
        kept = 8 * d * d * L if disk else 0  # while memory is plentiful
        return Phase(
            "solve", device, self.moments + kept, disk * L, seconds, f"{name}, {n:,} right-hand sides, a layer"
        )

    def apply(self) -> Phase:
        d, d_out, n, L = self.d, self.shape.d_model, self.texts.facts, len(self.hparams.layers)
        weight = d * d_out
        cost = requantize_add_cost(d_out, d, n, self.itemsize)
        factors = 4 * min(n * (d + d_out), weight)
        # the original and the sum in float32 stay; one update is dense for a moment
        device = L * (weight * (self.itemsize + 4) + factors) + 8 * weight
        seconds = self.floor(Cost(cost.flops * L, cost.bytes * L), torch.float32)
        return Phase("apply", device, self.moments, factors * L, seconds, f"{L} weights of {d_out} x {d}")


def _sum(*seconds: float | None) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def _advice(model: Outline, need: Mapping[str, int], free: Mapping[str, int]) -> list[str]:
    """What would help where too little is free, each with what it would leave."""
    found = []
    weights = model.weight_bytes(model.dtype, model.quantize)
    for place in PLACES:
        short = need[place] - free[place]
        if short <= 0:
            continue
        said = f"{place}: {short / 2**30:.1f} GiB are missing"
        if place == "disk":
            found.append(f"{said}: set REWIRE_CACHE to a folder with more room")
            continue
        found.append(said)
        holds = place == ("cpu" if model.device.type == "cpu" else "device")
        for option, dtype, quantize in SMALLER if holds and not model.quantize else ():
            less = weights - model.weight_bytes(dtype, quantize)
            if less > 0:
                enough = "" if less >= short else ", which is not enough by itself"
                found.append(f"{option}: {less / 2**30:.1f} GiB less{enough}")
        found.append("--set layers=[...]: fewer layers; their sums, C and factors take the rest")
    return found
