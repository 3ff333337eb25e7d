"""Second moments in one pass against the published structure, over the same documents, in one run, checked first."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from ..engine.model import Model, demo_file, wrap
from ..engine.passes import forward_bytes, tokens_that_fit
from ..engine.phases import Tick
from ..engine.statistics import encode, floor_seconds
from ..engine.streams import can_pack, linear_widths, stream_inputs
from ..kernels.floors import Cost
from ..stats import Corpus, Moment
from ..stats.collect import Budget, Means, collect
from ..stats.memory import choose_place
from ..stats.tokens import TokenRows
from .about import device_name
from .ceilings import Ceilings, quick
from .serial_stats import published_moments
from .timing import peak_bytes, single
from .watch import hand_back, held_bytes, most_held

REPEATS = 3  # of everything, in turn
LONGEST = 1024  # tokens of a document, at most, on both sides
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of what `differences` finds
RANDOM = "a GPT-2-small shape with random weights"
RANDOM_LAYERS = (3, 4, 5)


class Tokenised(TokenRows):
    """Documents that are token rows already, all in memory."""

    def __init__(self, rows: Sequence[np.ndarray], source: str) -> None:
        self.source = source
        self.held = list(rows)

    @property
    def total(self) -> int:
        return len(self.held)

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        return self.held[start:stop]


def random_gpt2(device: str = "cpu") -> Model:
    """GPT-2 small by its shape, in float32."""
    return random_model(GPT2Config(), RANDOM, device)


def random_model(config: Any, name: str, device: str, dtype: torch.dtype = torch.float32) -> Model:
    """Random weights, made on the device, and the demo's tokenizer."""
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return wrap(hf.eval(), AutoTokenizer.from_pretrained(demo_file(".")), name)


def random_rows(tokens: int, longest: int, vocab: int) -> Tokenised:
    """Documents of a third of `longest` to `longest` tokens, until they hold `tokens`; the last one may be shorter."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(longest // 3, longest + 1, size=3 * tokens // longest + 1)
    ends = np.minimum(lengths.cumsum(), tokens)
    rows = np.split(generator.integers(vocab, size=tokens, dtype=np.int32), ends)
    return Tokenised([row for row in rows if len(row)], "random tokens")


def take_rows(corpus: Corpus, model: Model, tokens: int) -> Tokenised:
    """Documents spread over the corpus, at most `LONGEST` tokens of each, until they hold `tokens`, or it is over."""
    found: list[np.ndarray] = []
    rows = TokenRows(corpus, lambda texts: encode(model, texts))
    longest, held = min(LONGEST, model.max_length), 0
    while held < tokens and (more := rows.rows(len(found), len(found) + 1)):
        found.append(more[0][:longest])
        held += len(found[-1])
    return Tokenised([row for row in found if len(row)], corpus.source)


def collected(model: Model, names: Sequence[str], rows: Tokenised) -> dict[str, Moment]:
    """As an edit has them collected: of each named linear map."""
    widths = linear_widths(model, names)
    packed = can_pack(model, names)
    means = Means(
        tokens_that_fit(model, forward_bytes(model)),
        packed,
        choose_place(widths, model.device),
        device=str(model.device),
    )
    return collect(
        lambda batch, sink: stream_inputs(model, batch, names, sink, packed),
        rows,
        widths,
        Budget(None, documents=rows.total),
        means,
    )


def bench_stats(
    model: Model,
    rows: Tokenised,
    names: Sequence[str],
    dtypes: Sequence[torch.dtype] = tuple(BOUNDS),
    ceilings: Ceilings | None = None,
    progress: Tick = lambda done, total: None,
) -> dict[str, Any]:
    """{"check", "errors", "rows", ...}: a row for each dtype of the forward, with its ratio to the published structure.

    model: in float32; the baseline runs on it, in float32, whatever `dtypes` are
    names: paths of linear maps, such as "transformer.h.3.mlp.c_proj"
    rows: cut already
    ceilings: of the device; None: measured now, which takes a second or two

    The first round is checked against the baseline's moments: in float32 every element to 1e-5 of sqrt(C_ii C_jj), in
    bfloat16 within 2 % (relative Frobenius norm). What fails has no row. All are then run in turn; the
    times are medians, memory is measured in a run of its own.
    """
    device, widths = model.device, linear_widths(model, names)
    longest = min(LONGEST, model.max_length)
    models = {dtype: model if dtype is torch.float32 else cast(model, dtype) for dtype in dtypes}
    calls: dict[torch.dtype | None, Callable[[Tokenised], Any]] = {
        None: lambda taken: published_moments(model, taken.held, widths, longest)
    }
    calls |= {dtype: partial(collected, models[dtype], names) for dtype in dtypes}
    few = Tokenised(_until(rows.held, 2 * max(widths.values())), rows.source)
    for call in calls.values():
        call(few)  # warm
    ceilings = ceilings or quick(device, dict.fromkeys((*dtypes, torch.float32)), seconds=0.5)

    def floor(cost: Cost, dtype: torch.dtype) -> float | None:
        return ceilings.floor(cost, dtype, device)

    seconds: dict[torch.dtype | None, list[float]] = {key: [] for key in calls}
    errors: dict[torch.dtype, float] = {}
    floors: dict[torch.dtype, float | None] = {}
    done, total = 0, (REPEATS + 1) * len(calls)
    wanted: dict[str, Tensor] = {}
    for turn in range(REPEATS):
        for key, call in list(calls.items()):
            passed, found = _timed(lambda: call(rows), device)  # noqa: B023
            seconds[key].append(passed)
            done += 1
            progress(done, total)
            if turn == 0 and key is None:
                wanted = found
            elif turn == 0 and key is not None:
                of_each = [difference(found[name].sum, wanted[name], key) for name in names]
                errors[key] = float(torch.tensor(of_each, dtype=torch.float64).max())  # NaN where one is
                floors[key] = floor_seconds(models[key], names, list(map(len, rows.held)), floor)
                if not errors[key] <= BOUNDS[key]:  # NaN too
                    del calls[key]
            found = None  # before the next one comes
        wanted = {}
    peaks = {}
    for key, call in calls.items():
        peaks[key] = peak_growth(lambda: call(rows), device)  # noqa: B023
        done += 1
        progress(done, total)

    baseline, tokens = median(seconds[None]), sum(map(len, rows.held))
    shape = {"modules": len(names), "d": max(widths.values()), "tokens": tokens, "documents": rows.total}

    def row(dtype: torch.dtype) -> dict[str, Any]:
        own, least = median(seconds[dtype]), floors[dtype]
        return {
            "name": "statistics",
            "dtype": _name(dtype),
            "shape": shape,
            "seconds": own,
            "baseline_seconds": baseline,
            "ratio": baseline / own,
            "peak_bytes": peaks[dtype],
            "baseline_peak_bytes": peaks[None],
            "tokens_per_second": tokens / own,
            "floor_seconds": least,
            "floor_fraction": None if least is None else least / own,
            "error": errors[dtype],
            "bf16_instructions": bf16_instructions(device),
        }

    return {
        "check": "passed" if len(calls) == len(models) + 1 else "failed",
        "device": device_name(device),
        "model": model.name,
        "corpus": rows.source,
        "modules": list(names),
        "errors": {_name(dtype): error if math.isfinite(error) else None for dtype, error in errors.items()},
        "rows": [row(dtype) for dtype in calls if dtype is not None],
    }


def cast(model: Model, dtype: torch.dtype) -> Model:
    """A copy with its weights in that dtype; buffers (rotary frequencies) stay, as where a model is loaded so."""
    hf = copy.deepcopy(model.hf)
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(dtype)
    return Model(hf, model.tokenizer, model.name)


def difference(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """Of two sums [d, d]: in float32 the worst element by sqrt(C_ii C_jj), else the relative Frobenius norm."""
    found, wanted = found.double(), wanted.double().cpu()
    if dtype is not torch.float32:
        return float((found - wanted).norm() / wanted.norm())
    scale = wanted.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    return float(((found - wanted) * scale[:, None] * scale).abs().max())


def bf16_instructions(device: torch.device) -> bool | None:
    """Whether the device multiplies bfloat16 numbers by itself; None where torch does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    ask = getattr(torch.cpu, "get_capabilities", None)
    return None if ask is None else any(ask().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def peak_growth(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds beyond what was there before: of the allocator on a GPU, else resident memory.

    Memory that earlier calls have freed, and the C library has kept, is handed back first, so that it counts too.
    """
    if device.type == "cuda":
        return peak_bytes(call, device)
    hand_back()
    before = held_bytes(device)
    with most_held(device) as most:
        kept = call()
    del kept
    return most() - before


def _until(rows: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The first of them that hold so many tokens together."""
    ends = np.cumsum([len(row) for row in rows])
    return list(rows[: int(np.searchsorted(ends, tokens)) + 1])


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    found = []
    return single(lambda: found.append(call()), device).p50, found[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
