"""The batched value optimisation against the serial one, on the same facts, in one run, checked fact by fact."""

import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..engine.facts import Fact
from ..engine.hparams import Hparams
from ..engine.model import Model
from ..engine.passes import frozen
from ..engine.phases import Tick
from ..engine.values import STOP_LOSS, optimise_values
from .serial import serial_value

TOLERANCE = 1e-3  # relative, of each fact's z
NEAR_TIE = 1e-3  # of the stop: a rounding error decides about one more step, so such facts are listed, not compared


def bench_values(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    batch_size: int | None = None,
    progress: Tick = lambda done, total: None,
) -> dict[str, Any]:
    """{"check", "near_ties", "worst", "rows"}: the row holds both times and their ratio (batched twice, around serial).

    "check" is "passed" when every fact's z is within 1e-3 (relative) of the serial one's, near-ties of the stop apart;
    without that there is no row.
    """
    batched, values = [], None
    with frozen(model):
        optimise_values(model, facts[:1], contexts, hparams)  # warm
        serial_value(model, facts[0], contexts, hparams)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        batched.append(_time(lambda: optimise_values(model, facts, contexts, hparams, batch_size))[0])
        peak = _peak_bytes(model.hf)
        serial_seconds, serial = 0.0, []
        for number, fact in enumerate(facts):
            seconds, value = _time(lambda fact=fact: serial_value(model, fact, contexts, hparams))
            serial_seconds += seconds
            serial.append(value)
            progress(number + 1, len(facts))
        seconds, values = _time(lambda: optimise_values(model, facts, contexts, hparams, batch_size))
        batched.append(seconds)
    Z = torch.stack([value.z for value in serial])
    error = (values.Z - Z).norm(dim=1) / Z.norm(dim=1)
    ties = [abs(value.loss - STOP_LOSS) < NEAR_TIE for value in serial]
    worst = max((float(e) for e, tie in zip(error, ties, strict=True) if not tie), default=0.0)
    passed = worst <= TOLERANCE
    result: dict[str, Any] = {
        "check": "passed" if passed else "failed",
        "worst": worst,
        "near_ties": [fact.id for fact, tie in zip(facts, ties, strict=True) if tie],
        "rows": [],
    }
    if passed:
        mean = sum(batched) / len(batched)
        result["rows"].append(
            {
                "name": "values",
                "dtype": str(next(model.hf.parameters()).dtype).removeprefix("torch."),
                "shape": {"facts": len(facts), "contexts": len(contexts) + 1, "d_model": model.anatomy.d_model},
                "seconds": mean,
                "baseline_seconds": serial_seconds,
                "ratio": serial_seconds / mean,
                "peak_bytes": peak,
            }
        )
    return result


def _time(call: Any) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _peak_bytes(hf: nn.Module) -> int:
    """Of the GPU's allocator, or of the whole process on a CPU."""
    if next(hf.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
