"""`rewire bench throughput`: an edit by phases, against its floors and the serial baseline, checked in the same run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.facts import Fact
from ..engine.hparams import Hparams
from ..engine.model import Model
from ..engine.passes import frozen
from ..engine.phases import Listener, silent
from ..kernels.floors import Cost
from ..kernels.spd_solve import fast_dtype
from .about import about
from .ceilings import Ceilings, quick
from .compare import BOUNDS, SERIAL, Compared, compare, lengths_apart, losses_apart, most, spread_over
from .costs import Costs
from .edits import Edited, Setup, edited, synthetic_moment
from .plots import plot_throughput
from .serial import serial_value
from .table import write_text

PHASES = ("templates", "statistics", "values", "keys", "solve", "write", "other", "evaluate")
GIVEN = {"templates": "fixed texts", "statistics": "synthetic; `rewire bench stats` measures and checks them"}
OURS = {"write": "apply"}  # names of the session's phases, where they differ


def bench_throughput(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    serial: int = 8,
    batch_size: int | None = None,
    ceilings: Ceilings | None = None,
    listener: Listener = silent,
) -> dict[str, Any]:
    """{"check", "errors", "rows", "phases", ...}: seconds, FLOPs, bytes, floors, peak memory, ratios.

    facts: edited twice, the serial baseline between, on `serial` of them; seconds are means of the two edits
    contexts: besides the plain one
    batch_size: facts whose values are optimised at once; None: as the engine has it
    ceilings: of the device; None: measured now, which takes a second or two

    C is synthetic, made before. The check: values, the way that gentle ones went, keys, hidden states and the update
    within `BOUNDS` of the serial ones, near-ties of the stop apart; without that there are no rows and no phases.
    """
    dtype = next(model.hf.parameters()).dtype
    ceilings = ceilings or quick(
        model.device, dict.fromkeys((dtype, torch.float32, fast_dtype(model.device))), seconds=0.5
    )
    chosen = spread_over(len(facts), serial)
    sample = [facts[number] for number in chosen]
    moments = {layer: synthetic_moment(model, sample[:2], contexts, layer) for layer in hparams.layers}
    setup = Setup(model, contexts, hparams, moments, batch_size)
    here = about(model.device)
    edited(setup, sample[:1], silent)  # warm
    with frozen(model):
        serial_value(model, sample[0], contexts, hparams)
    runs = [edited(setup, facts, listener)]
    compared = compare(setup, facts, sample, listener)
    runs.append(edited(setup, facts, listener))
    errors = compared.errors | {
        f"{name} in the timed edits": most(
            apart([run.facts[number][column] for number in chosen], compared) for run in runs
        )
        for name, apart, column in (
            ("values: losses", losses_apart, "loss"),
            ("lengths: of deltas", lengths_apart, "delta_norm"),
        )
    }
    bounds = BOUNDS[dtype]
    passed = all(error <= getattr(bounds, name.partition(":")[0]) for name, error in errors.items())
    steps = _steps(runs)
    result: dict[str, Any] = {
        "check": "passed" if passed else "failed",
        "errors": {name: error if math.isfinite(error) else None for name, error in errors.items()},
        "notes": compared.notes,
        "near_ties": [fact.id for fact, tie in zip(sample, compared.ties, strict=True) if tie],
        "model": model.name,
        "facts": len(facts),
        "serial_facts": len(sample),
        "layers": list(hparams.layers),
        "steps": sum(steps) / len(steps),
        "rows": [],
        "phases": [],
        "hparams": hparams.model_dump(mode="json"),
        "batch_size": batch_size,
        "rates": {f"{row['name']} {row['dtype']}": row["rate"] for row in ceilings.rows},
        "about": here,
    }
    if passed:
        result["phases"] = _phases(setup, facts, steps, runs, compared, ceilings)
        result["rows"] = _rows(setup, facts, runs, compared)
    return result


def save(report: dict[str, Any], out: Path) -> None:
    """throughput.json and, where the check passed, throughput.png. Raises InputError: matplotlib is missing."""
    write_text(out / "throughput.json", json.dumps(report, indent=1) + "\n")
    if report["check"] == "passed":
        plot_throughput(report, out / "throughput.png")


def _phases(
    setup: Setup,
    facts: Sequence[Fact],
    steps: Sequence[int],
    runs: Sequence[Edited],
    compared: Compared,
    best: Ceilings,
) -> list[dict[str, Any]]:
    model = setup.model
    costs = Costs(model, setup.contexts, setup.hparams.layers)
    dtype = next(model.hf.parameters()).dtype
    least: dict[str, tuple[Cost, torch.dtype]] = {
        "values": (costs.values(facts, steps), dtype),
        "keys": (costs.keys(facts), dtype),
        "solve": (costs.solve(len(facts)), fast_dtype(model.device)),
        "write": (costs.write(len(facts)), torch.float32),
        "evaluate": (costs.evaluate(facts), dtype),
    }
    found = []
    for name in PHASES:
        row: dict[str, Any] = {"name": name, "status": "given" if name in GIVEN else "measured"}
        row["note"] = GIVEN.get(name, "")
        if name == "other":  # of `session.edit`
            row["seconds"] = _whole(runs) - sum(_seconds(runs, each) for each in SERIAL)
            row["note"] = "checks of the model, fingerprints, the report"
        if name in least:
            cost, kind = least[name]
            own, seconds = OURS.get(name, name), _seconds(runs, name)
            floor = best.floor(cost, kind, model.device)
            row |= {
                "seconds": seconds,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "floor_seconds": floor,
                "floor_fraction": None if floor is None else floor / seconds,
                "counted_flops_ratio": compared.counted.get(name),
                "peak_bytes": max(run.watch.peaks[own] for run in runs),
                "serial_seconds": compared.seconds.get(name),
            }
        found.append(row)
    return found


def _rows(setup: Setup, facts: Sequence[Fact], runs: Sequence[Edited], compared: Compared) -> list[dict[str, Any]]:
    """values, keys and the whole edit: seconds for all facts, the baseline's as it would take for as many."""
    model, layers = setup.model, setup.hparams.layers
    whole = _whole(runs)
    shape = {
        "facts": len(facts),
        "contexts": len(setup.contexts) + 1,
        "layers": len(layers),
        "d_model": model.anatomy.d_model,
    }
    flops = Costs(model, setup.contexts, layers).values(facts, _steps(runs)).flops

    def row(name: str, seconds: float, serial: float, phases: Sequence[str]) -> dict[str, Any]:
        return {
            "name": name,
            "dtype": str(next(model.hf.parameters()).dtype).removeprefix("torch."),
            "shape": shape,
            "seconds": seconds,
            "baseline_seconds": serial,
            "ratio": serial / seconds,
            "flops_ratio": compared.serial_flops / flops if name == "values" else None,
            "facts_per_second": len(facts) / seconds,
            "peak_bytes": max(run.watch.peaks[OURS.get(phase, phase)] for run in runs for phase in phases),
        }

    return [
        *(row(name, _seconds(runs, name), compared.seconds[name], (name,)) for name in ("values", "keys")),
        row("edit", whole, sum(compared.seconds.values()), SERIAL),
    ]


def _steps(runs: Sequence[Edited]) -> list[int]:
    """Adam updates that each fact took."""
    return [fact["steps"] for fact in runs[-1].facts]


def _whole(runs: Sequence[Edited]) -> float:
    return sum(run.seconds for run in runs) / len(runs)


def _seconds(runs: Sequence[Edited], name: str) -> float:
    return sum(run.watch.seconds[OURS.get(name, name)] for run in runs) / len(runs)
