"""Target values of large models on a GPU, against the floor and the serial baseline: a section of `rewire bench gpu`.

Needs transformers, which most of that command does not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .ceilings import Ceilings, Found, reason_of
from .timing import single

LATE = "not measured (budget)"


@dataclass(frozen=True)
class Load:
    """config: a name of `shapes.SHAPES`; sizes: of its config, instead of the published ones, for a rehearsal
    facts: optimised together, in `steps` forwards each, `steps` - 1 Adam updates; few: of them, through the serial
    baseline
    """

    config: str
    facts: int
    steps: int
    few: int
    sizes: Mapping[str, Any] | None = None


LARGE = tuple(Load(name, facts=1000, steps=25, few=16) for name in ("llama-3-8b", "gpt-j-6b"))
TINY = (
    Load(
        "llama-3-8b", facts=4, steps=3, few=2,
        sizes={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 10, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 1536, "max_position_embeddings": 64,
        },
    ),
    Load(
        "gpt-j-6b", facts=4, steps=3, few=2,
        sizes={"n_embd": 64, "n_layer": 10, "n_head": 4, "rotary_dim": 8, "vocab_size": 1536, "n_positions": 64},
    ),
)  # fmt: skip
BOUND = 5e-2  # of the median relative difference of the last losses; that of the movement is `compare.BOUNDS`'s


def unmeasured(load: Load, note: str, status: str = "not measured") -> Found:
    shape = {"facts": load.facts, "steps": load.steps}
    return {
        "name": "values",
        "config": load.config,
        "dtype": "bfloat16",
        "shape": shape,
        "status": status,
        "note": note,
    }


def measure_values(load: Load, device: torch.device, ceilings: Ceilings, late: Callable[[], bool]) -> Found:
    """A row: "status" is "measured", "wrong" (then without figures) or "not measured", with the reason in "note".

    late: whether the budget is used up; asked before the long part

    A few of the facts run first, and through the serial baseline on the same weights, all in bfloat16: the last losses
    are compared and, as random weights hardly move them, the deltas of a gentle run of both sides (`compare.movement`),
    by their medians; the seconds of a fact give the ratio. Steps are those that were made: random weights rarely reach
    the loss that stops.
    """
    if late():
        return unmeasured(load, LATE)
    try:
        from . import compare, costs, shapes
    except ImportError as missing:
        return unmeasured(load, f"needs {missing.name or 'transformers'}")
    try:
        return unmeasured(load, "") | _measured((compare, costs, shapes), load, device, ceilings, late)
    except torch.OutOfMemoryError as failure:
        return unmeasured(load, reason_of(failure))
    except Exception as failure:  # a bug here must not cost the sections that follow
        return unmeasured(load, reason_of(failure), "wrong")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(
    rooms: tuple[Any, Any, Any], load: Load, device: torch.device, ceilings: Ceilings, late: Callable[[], bool]
) -> Found:
    compare, costs, shapes = rooms
    model = shapes.shaped_model(load.config, str(device), torch.bfloat16, load.sizes)
    hparams = shapes.shaped_hparams(load.config, model, {"v_num_grad_steps": load.steps, "v_loss_layer": None})
    facts = shapes.made_facts(load.facts)
    sample = [facts[number] for number in compare.spread_over(len(facts), load.few)]
    found: list[Any] = []

    def ours(chosen: list[Any]) -> float:
        call = lambda: found.append(compare.optimise_values(model, chosen, shapes.CONTEXTS, hparams))  # noqa: E731
        return float(single(call, device).p50)

    with compare.frozen(model):
        ours(sample)  # warm
        serial: list[Any] = []
        compare.serial_value(model, sample[0], shapes.CONTEXTS, hparams)
        seconds = 0.0
        for fact in sample:
            one = lambda: serial.append(compare.serial_value(model, fact, shapes.CONTEXTS, hparams))  # noqa: B023, E731
            seconds += single(one, device).p50
        apart = [abs(a - b.loss) / b.loss for a, b in zip(found[0].loss.tolist(), serial, strict=True)]
        moved = compare.movement(model, sample, shapes.CONTEXTS, hparams, serial)
        if not moved:
            return {"status": "wrong", "note": "no fact had to move: nothing was compared"}
        errors = {
            name: median(each if math.isfinite(each) else math.inf for each in column)
            for name, column in (("losses", apart), ("movement", moved))
        }
        bounds = {"losses": BOUND, "movement": compare.BOUNDS[torch.bfloat16].movement}
        for name, error in errors.items():
            if not error <= bounds[name]:
                return {"status": "wrong", "note": f"{name} apart by {error:.1e}, at most {bounds[name]:.2g} expected"}
        baseline = seconds / len(sample)
        if late():
            return {"note": LATE}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        whole = ours(facts)
    steps = found[-1].steps.tolist()
    cost = costs.Costs(model, shapes.CONTEXTS, hparams.layers).values(facts, steps)
    least = ceilings.floor(cost, torch.bfloat16, device)
    return {
        "status": "measured",
        "errors": errors,
        "bounds": bounds,
        "steps": sum(steps) / len(steps),
        "seconds": whole,
        "facts_per_second": len(facts) / whole,
        "baseline_seconds_per_fact": baseline,
        "ratio": baseline * len(facts) / whole,
        "flops": cost.flops,
        "floor_seconds": least,
        "floor_fraction": least and least / whole,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
