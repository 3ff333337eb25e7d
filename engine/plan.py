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
from .anatomy import widths
from .facts import Fact
from .hparams import Hparams
from .keys import kept_bytes
from .objective import ATTENTION, MLP
from .outline import Outline, model_shape
from .passes import CPU_TOKENS, GPU_TOKENS, MEMORY_SHARE, forward_bytes
from .statistics import Floor
from .value_groups import fact_bytes, size_within, token_bytes

DOCUMENT = 440  # tokens of a document: the mean of the English Wikipedia's
CHARACTERS = 4  # of a token
IN_TURN = ("rome", "r-rome")  # one fact after the other
NOTHING = Cost(0, 0)
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
    iterations: passes that they are for, without neighbours
    tokens: that statistics are collected over
    chunks, sums: where their running float32 and float64 sums will live: "device", "cpu" or "disk"
    need: the most bytes that are held at once, by place; free: what is free now
    advice: what to do where it does not fit
    """

    phases: tuple[Phase, ...]
    iterations: int
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
            "iterations": self.iterations,
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


def plan(
    model: Outline,
    hparams: Hparams,
    method: str,
    texts: Texts,
    floor: Floor,
    tokens: int | None = None,
    iterations: int = 1,
) -> Plan:
    """What editing those facts takes, statistics included; neighbours and evaluation are not in it.

    method: its name; tokens: of the statistics, None: what the hyper-parameters say; iterations: passes of the edit
    """
    parts = _written(model, hparams)
    layers = {model.anatomy.layer_name(layer, part): d for layer in hparams.layers for part, d in parts.items()}
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
    sides = tuple(parts.values())
    work = _Work(model, model_shape(model), hparams, method, texts, floor, weights, left, sides, iterations)
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
    return Plan(tuple(phases), iterations, tokens, own, sums, need, free, tuple(_advice(model, need, free)))


def _written(model: Outline, hparams: Hparams) -> dict[str, int]:
    """Which projections of a layer are written -> their d_in: the MLP's, and PMET's by their published names."""
    named = getattr(hparams, "rewrite_module_tmps", None) or ()
    parts = [part for part in (MLP, ATTENTION) if part == MLP or model.anatomy.attention]
    chosen = [part for part in parts if model.anatomy.layer_name(0, part).replace(".0.", ".{}.", 1) in named]
    return {part: widths(model.projection(0, part))[0] for part in chosen or [MLP]}


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
    sides: tuple[int, ...]  # d_in of what is written of a layer
    passes: int  # of the edit

    @property
    def room(self) -> int:
        """Bytes that batches are made for."""
        return int(MEMORY_SHARE * self.left)

    @property
    def itemsize(self) -> int:
        return self.model.dtype.itemsize

    @property
    def written(self) -> list[int]:
        """d_in of each weight that is written."""
        return [d for _ in self.hparams.layers for d in self.sides]

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
        return 4 * sum(d * d for d in self.written) * self.reads_moments

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
        # quantised while it is read
        cpu = 0 if self.model.device.type == "cpu" or self.model.quantize else self.weights
        return Phase("model", self.weights, cpu, 0, None, f"{count / 1e6:,.0f} M parameters in {stored}")

    def statistics(self, tokens: int, length: int, place: str) -> Phase:
        model, written, widest = self.model, self.written, max(self.sides)
        # strips of the triangle, each as wide as its last row
        sums = 8 * sum(min(STRIP, d - start) * min(start + STRIP, d) for d in written for start in range(0, d, STRIP))
        # chunks: elsewhere all layers share one
        held = {"device": 4 * sum(d * d for d in written), "cpu": 4 * widest**2, "disk": 4 * widest**2}
        device = held[place] + sums * (place == "device") + self.forward(tokens)
        # each layer's sums become a packed triangle, and then its mean
        cpu = sums * (place == "cpu") + self.moments + 3 * 4 * widest**2
        disk = 2 * self.moments + sums * (place == "disk")  # the result and a checkpoint
        lengths = [length] * max(1, tokens // length)
        cost = statistics_cost(self.shape, up_to_projection(self.shape, self.z_layer), written, lengths, self.itemsize)
        # on a CPU keys are multiplied in float32, on a GPU in their own dtype
        keys = torch.float32 if model.device.type == "cpu" else model.dtype
        what = f"{tokens:,} tokens, in documents of {length}; C of {_count(len(self.hparams.layers), 'layer')}, "
        what += f"width {' and '.join(map(str, self.sides))}"
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
        one = value_cost(shape, self.z_layer, each, self.itemsize)
        # the weights once a forward or backward, were all facts in one batch
        cost = Cost(self.passes * n * one.flops, self.passes * one.bytes)
        config: Any = model.hf.config.get_text_config()  # type: ignore[union-attr, operator]
        longest = texts.longest + max(self.contexts, default=0)
        fact = fact_bytes(model.anatomy, config, self.z_layer, len(self.contexts) + 2, longest, self.itemsize)
        token = token_bytes(model.anatomy, self.z_layer, self.itemsize)
        size = size_within(self.room, model.device, fact, token)
        flying = 1 if self.method in IN_TURN else min(n, size.facts)
        group = min(rows * longest, size.tokens)
        kept = 8 * n * shape.d_model * (2 if self.method == "pmet" else 1)  # Z and what was there, of each variable
        device = flying * fact + group * token + kept
        tokens = sum(row.length for row in each)
        what = f"{_count(n, 'fact')}, {flying} at once, {tokens} tokens each, up to {_count(steps, 'step')}"
        return Phase("values", device, self.moments, self.passes * kept, self.floor(cost, model.dtype), what)

    def keys(self) -> Phase:
        """Of each layer, measured with the lower ones updated, and each time what is left to do at the z-layer."""
        texts, model = self.texts, self.model
        plain, *contexts = self._subjects()
        one = keys_cost(self.shape, self.hparams.layers, [plain], contexts, self.itemsize)
        rows = texts.facts * (plain + sum(contexts))
        parted = rows * (self.shape.d_in + self.shape.d_model) * self.itemsize if len(self.hparams.layers) > 1 else 0
        kept = min(parted, kept_bytes(model.device, self.left))
        found = sum(self.sides) + 2 * len(self.sides) * self.shape.d_model  # K, H and R
        device = self.forward(rows) + kept + 4 * texts.facts * found
        what = f"{_count(texts.facts, 'key')} of each {'layer' if len(self.sides) == 1 else 'weight'}"
        cost = Cost(self.passes * texts.facts * one.flops, self.passes * one.bytes)
        return Phase("keys", device, self.moments, 0, self.floor(cost, model.dtype), what)

    def solve(self) -> Phase:
        n, fast = self.texts.facts, fast_dtype(self.model.device)
        if not self.reads_moments:
            return Phase("solve", 8 * n * self.shape.d_in, 0, 0, 0.0, "the keys themselves")
        names, made, costs, device, disk = zip(*map(self._solve, self.written), strict=True)
        seconds = self.floor(sum((*made, *(_times(self.passes, each) for each in costs)), NOTHING), fast)
        kept = sum(8 * d * d for d, of in zip(self.written, disk, strict=True) if of)  # while memory is plentiful
        what = f"{' or '.join(dict.fromkeys(names))}, {_count(n, 'right-hand side')}, a weight"
        return Phase("solve", max(device), self.moments + kept, sum(disk), seconds, what)

    def _solve(self, d: int) -> tuple[str, Cost, Cost, int, int]:
        """Of one weight: by what, what is made of C once, a pass' solve; bytes on the device, and on the disk."""
        n = self.texts.facts
        if self.method == "alphaedit":
            # at most half of the directions: the smaller of null space and complement is kept
            device = 36 * d * d + 8 * (4 * n * d + 2 * n * n)  # C, its copy, vectors, LAPACK's room
            return "eigenvectors", eigenbasis_cost(d), push_through_cost(d, d // 2, n), device, 8 * d * d
        by, made, disk = "Cholesky factor of C", factor_cost(d), 4 * d * d
        device = 20 * d * d + 8 * 3 * n * d  # C, the factor or the system, and what that is made of
        if self.method in IN_TURN:  # of each key by itself, however many there are
            cost = Cost(2 * n * d * d, 8 * (2 * d * d + 2 * n * d))
        elif (n if self.method == "memit-history" else 4 * n) < d:
            cost, device = woodbury_cost(d, n), device + 8 * (2 * n * d + 2 * n * n)
        else:
            by, cost = "dense system", dense_solve_cost(d, n)
            if self.method == "memit-history":  # of keys that the factor whitened
                device += 8 * d * d
        return by, made, cost, device, disk

    def apply(self) -> Phase:
        d_out, n, item, written = self.shape.d_model, self.texts.facts, self.itemsize, self.written
        costs = [requantize_add_cost(d_out, d, n, item) for d in written]
        if self.method in IN_TURN:  # rank one, and the whole weight each time; of several once more, by their sum
            costs = [_times(n, requantize_add_cost(d_out, d, 1, item)) for d in written] + (costs if n > 1 else [])
        seconds = self.floor(_times(self.passes, sum(costs, NOTHING)), torch.float32)
        factors = sum(4 * min(self.passes * n * (d + d_out), d * d_out) for d in written)
        # the original and the sum in float32 stay; one update is dense for a moment
        device = sum(d * d_out for d in written) * (item + 4) + factors + 8 * max(written) * d_out
        what = f"{_count(len(written), 'weight')} of {' and '.join(f'{d_out} x {d}' for d in self.sides)}"
        often = f", {_count(n, 'time')}" if self.method in IN_TURN else ""
        return Phase("apply", device, self.moments, factors, seconds, what + often)


def _times(often: int, cost: Cost) -> Cost:
    return Cost(often * cost.flops, often * cost.bytes)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


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
