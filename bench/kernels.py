"""Every operation against plain torch and the best library calls: right first, then how fast.

Below the command line this needs torch, Triton and NumPy only.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..kernels.dispatch import interpreting
from ..kernels.errors import InputError
from . import table
from .about import about, find_device, find_dtype
from .ceilings import LARGE, SMALL, Ceilings, Sizes, ceilings_of, measure_products, reason_of
from .check import Inputs, Outputs, Shape, Subject, Verdict, check, inputs_of, poisoned, relative_error, verdict
from .operations import subjects
from .table import Row
from .timing import Timing, measure, peak_bytes, rotation

Listener = Callable[[str, int, int], None]  # (what, done, total)
Provider = Callable[[Inputs], Any]

OURS = ("triton", "torch")
PATIENCE = 8.0  # seconds of float64 work at most to verify at the timed shape


def silent(what: str, done: int, total: int) -> None:
    """Nobody watches."""


def bench_kernels(
    device: str | torch.device = "auto",
    only: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    csv: Path | None = None,
    seconds: float = 0.5,
    listener: Listener = silent,
    found: Iterable[Subject] | None = None,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """{"check", "about", "ceilings", "rows", "not_measured", "wrong"} of all operations, or those named in `only`.

    device: "auto", "cpu", "cuda", "cuda:N"; shapes are the subjects' small ones on a CPU, their large ones on a GPU
    dtypes: names; default: all that an operation takes
    csv: rows are put there after every shape
    seconds: to time each provider for
    found, sizes: instead of the registered subjects, and of what the ceilings are measured at

    Raises InputError: no such device, operation or dtype, or `csv` is something else.
    """
    place = find_device(device)
    chosen = choose(subjects() if found is None else found, only)
    kinds = [find_dtype(name) for name in dtypes]
    if csv is not None:
        table.upsert(csv, ())  # what is wrong with it is known before anything is timed
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext():  # events are of the current device
        rows = list(measure_products(sizes or (LARGE if place.type == "cuda" else SMALL), place))
        bench = Bench(place, ceilings_of(rows), seconds)
        groups = groups_of(chosen, kinds, place)
        done: list[Row] = []
        for number, group in enumerate(groups):
            listener("kernels", number, len(groups))
            new = bench.group(*group)
            done += new
            if csv is not None:
                table.upsert(csv, new)
        listener("kernels", len(groups), len(groups))
    return {"about": bench.about, "ceilings": rows} | sorted_out(done)


def sorted_out(rows: Sequence[Row]) -> dict[str, Any]:
    """{"check", "rows", "not_measured", "wrong"}: what was measured, and what was not with the reason."""
    wrong = [_reason(row) for row in rows if row["status"] == "wrong"]
    return {
        "check": "failed" if wrong else "passed",
        "rows": [as_json(row) for row in rows if row["status"] == "measured"],
        "not_measured": [_reason(row) for row in rows if row["status"] in ("not measured", "refused")],
        "wrong": wrong,
    }


def as_json(row: Row) -> dict[str, Any]:
    """A measured row in seconds, with the keys that scripts rely on."""
    own = ("provider", "tflops", "gbs", "floor_fraction", "error", "plain_error", "verified", "samples", "copies")
    return {
        "name": row["operation"],
        "dtype": row["dtype"],
        "shape": dict(row["shape"]),
        "seconds": row["p50_ms"] / 1e3,
        "p20": row["p20_ms"] / 1e3,
        "p80": row["p80_ms"] / 1e3,
        "baseline_seconds": None if row["plain_ms"] is None else row["plain_ms"] / 1e3,
        "ratio": row["ratio"],
        "peak_bytes": row["peak_bytes"],
        **{name: row[name] for name in own},
    }


def _reason(row: Row) -> dict[str, Any]:
    keys = ("operation", "provider", "dtype", "shape", "note")
    return {"name" if key == "operation" else key: row[key] for key in keys}


Group = tuple[Subject, Shape, torch.dtype]


def groups_of(chosen: Sequence[Subject], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Group]:
    """What is timed together; the first shape of every operation first, 16-bit ones before others on a GPU."""
    order = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    if device.type == "cpu":
        order.reverse()
    found = []
    for subject in chosen:
        for number, shape in enumerate(subject.large if device.type == "cuda" else subject.small):
            for dtype in subject.dtypes:
                if not dtypes or dtype in dtypes:
                    rank = order.index(dtype) if dtype in order else len(order)
                    found.append((number, rank, (subject, shape, dtype)))
    return [group for _, _, group in sorted(found, key=lambda each: each[:2])]


class Bench:
    """One run on one device. What was found right is remembered: nothing is timed before.

    gates: (operation, implementation, dtype) -> what is wrong with it on the odd shapes: (status, reason), or None
    """

    def __init__(
        self, device: torch.device, ceilings: Ceilings, seconds: float = 0.5, cache: int | None = None
    ) -> None:
        self.device = device
        self.ceilings = ceilings
        self.seconds = seconds
        self.cache = cache
        self.about = about(device)
        self.gates: dict[tuple[str, str, torch.dtype], tuple[str, str] | None] = {}

    def gate(self, subject: Subject, impl: str, dtype: torch.dtype) -> tuple[str, str] | None:
        """All odd shapes, twice: (status, reason) of the first that is refused or wrong, or None. Remembered."""
        key = subject.name, impl, dtype
        if key not in self.gates:
            self.gates[key] = self._gate(subject, impl, dtype)
        return self.gates[key]

    def _gate(self, subject: Subject, impl: str, dtype: torch.dtype) -> tuple[str, str] | None:
        if impl not in subject.operation.implementations:
            return "refused", f"there is no {impl} implementation"
        if impl == "triton" and interpreting():
            return "refused", "interpreted kernels say nothing about speed (unset TRITON_INTERPRET)"
        for shape in subject.odd:
            try:
                wrong = gate(subject, shape, dtype, impl, self.device)
            except InputError as refusal:
                return "refused", str(refusal)
            except Exception as failure:
                return "wrong", f"at {words(shape)}: {reason_of(failure)}"
            if wrong:
                return "wrong", f"at {words(shape)}: {wrong}"
        return None

    def group(self, subject: Subject, shape: Shape, dtype: torch.dtype) -> list[Row]:
        """One row a provider: measured, wrong, or why not."""
        rows = {row["provider"]: row for row in self.unmeasured(subject, shape, dtype, "")}
        try:
            self._group(subject, shape, dtype, rows)
        except Exception as failure:  # of one shape: the others are still worth their time
            for row in rows.values():
                row |= {"note": row["note"] or reason_of(failure)}
        finally:
            _free(self.device)
        return list(rows.values())

    def _group(self, subject: Subject, shape: Shape, dtype: torch.dtype, rows: dict[str, Row]) -> None:
        providers = _providers(subject)
        for name in OURS:
            reason = self.gate(subject, name, dtype) if name in providers else None
            if reason is not None:
                rows[name] |= {"status": reason[0], "note": reason[1]}
                del providers[name]
        inputs = drawn(subject, shape, dtype, self.device)
        where, found = self._verify(subject, shape, dtype, inputs, providers)
        for name, result in found.items():
            problem = self._problem(name, result)
            if problem is not None:
                rows[name] |= problem
                del providers[name]
            if isinstance(result, Verdict):
                rows[name] |= {"error": result.error, "plain_error": result.plain_error, "verified": where}
        _free(self.device)
        calls = {name: subject.timed.get(name, call) for name, call in providers.items()} | dict(subject.beside)
        copies = rotation(inputs, self.device, self.cache)
        timings, failures = measure(calls, copies, self.device, self.seconds, self.seconds / 5, least=3)
        for name, failure in failures.items():
            rows[name] |= {"note": reason_of(failure)}
        cost = subject.cost(shape, dtype)
        floor = self.ceilings.floor(cost, dtype, self.device)
        plain = timings.get("plain")
        for name, timing in timings.items():
            rows[name] |= _figures(timing, cost.flops, cost.bytes, floor, plain) | {"copies": len(copies)}
            rows[name] |= {"peak_bytes": peak_bytes(partial(calls[name], inputs), self.device)}
            rows[name] |= {"status": "measured"}
        for name in subject.beside:
            rows[name] |= {
                "ratio": None,
                "floor_fraction": None,
                "tflops": None,
                "gbs": None,
                "note": "does another job",
            }

    def unmeasured(self, subject: Subject, shape: Shape, dtype: torch.dtype, reason: str) -> list[Row]:
        """One row a provider that says why."""
        names = (*_providers(subject), *subject.beside)
        return [self.row(subject, name, shape, dtype) | {"note": reason} for name in names]

    def verified(self, subject: Subject, shape: Shape, dtype: torch.dtype, name: str) -> tuple[str, str]:
        """("passed", where) of one provider at the timed shape, or as large as float64 affords; else (status, note)."""
        inputs = drawn(subject, shape, dtype, self.device)
        where, found = self._verify(subject, shape, dtype, inputs, {name: _providers(subject)[name]})
        problem = self._problem(name, found[name])
        return ("passed", where) if problem is None else (problem["status"], problem["note"])

    def row(self, subject: Subject, provider: str, shape: Shape, dtype: torch.dtype) -> Row:
        """Nothing known yet."""
        return {
            **dict.fromkeys(table.COLUMNS),
            "operation": subject.name,
            "provider": provider,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": dict(shape),
            "status": "not measured",
            "note": "",
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{key: self.about[key] for key in ("device", "git", "driver", "torch", "triton")},
        }

    def _verify(
        self, subject: Subject, shape: Shape, dtype: torch.dtype, inputs: Inputs, providers: Mapping[str, Provider]
    ) -> tuple[str, dict[str, Verdict | Exception]]:
        """(where, provider -> verdict or failure): at the timed shape, or at a smaller one that float64 can afford."""
        rate = self.ceilings.products.get(torch.float64) or self.ceilings.products.get(torch.float32, 1e11) / 64
        small = dict(shape)
        while subject.cost(small, dtype).flops / rate > PATIENCE:
            largest = max(small, key=lambda name: small[name])
            small[largest] //= 2
        while True:
            try:
                used = inputs if small == shape else drawn(subject, small, dtype, self.device)
                exact, plain = subject.exact(used), subject.plain(used)
                break
            except torch.OutOfMemoryError:
                _free(self.device)
                largest = max(small, key=lambda name: small[name])
                small[largest] //= 2
                if small[largest] < 64:
                    raise
        found: dict[str, Verdict | Exception] = {}
        for name, call in providers.items():
            try:
                with poisoned():
                    made = call(used)
                    found[name] = verdict(made, *_those_of(made, exact, plain))
            except Exception as failure:
                found[name] = failure.with_traceback(None)  # which would keep its tensors
                _free(self.device)
        return "the timed shape" if small == shape else words(small), found

    def _problem(self, name: str, result: Verdict | Exception) -> Row | None:
        """What its row says if it is not to be timed. Only our own failures make the check fail."""
        if isinstance(result, Verdict):
            if result.passed and math.isfinite(result.error):
                return None
            note = f"error {result.error:.1e}, plain torch {result.plain_error:.1e}"
            return {"status": "wrong" if name in OURS else "not measured", "note": note}
        memory = isinstance(result, (torch.OutOfMemoryError, MemoryError))
        ours = name in OURS and not memory and not isinstance(result, InputError)
        return {"status": "wrong" if ours else "not measured", "note": reason_of(result)}


def _those_of(made: Outputs, exact: Outputs, plain: Outputs) -> tuple[Outputs, Outputs]:
    """Of all outputs those that `made` are: in order, each the nearest of those left."""
    places: list[int] = []
    for number, y in enumerate(made):
        first = places[-1] + 1 if places else 0
        errors = {place: relative_error(y, exact[place]) for place in range(first, len(exact) - len(made) + number + 1)}
        places.append(min(errors, key=lambda place: math.inf if math.isnan(errors[place]) else errors[place]))
    return tuple(exact[place] for place in places), tuple(plain[place] for place in places)


def gate(subject: Subject, shape: Shape, dtype: torch.dtype, impl: str, device: torch.device) -> str:
    """What is wrong with an implementation at one shape, by the rule of the house and run after run; "" if nothing."""
    inputs = inputs_of(subject, shape, dtype, device)
    found = check(subject, inputs, impl)
    if not found.passed:
        return f"error {found.error:.1e}, plain torch {found.plain_error:.1e}"
    first, second = subject.run(inputs, impl), subject.run(inputs, impl)
    return "" if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) else "two runs differ"


def drawn(subject: Subject, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Inputs of a timed shape; on a GPU drawn there, where that works: gigabytes of random numbers take a CPU long."""
    if device.type == "cuda":
        try:
            with torch.device(device):
                return subject.make(shape, dtype, device, torch.Generator(device).manual_seed(0))
        except (RuntimeError, TypeError):  # makes something of its own on the CPU
            _free(device)
    return inputs_of(subject, shape, dtype, device)


def _by(subject: Subject, impl: str) -> Provider:
    return lambda inputs: subject.run(inputs, impl)


def _providers(subject: Subject) -> dict[str, Provider]:
    found: dict[str, Provider] = {}
    for impl in OURS:
        if impl in subject.operation.implementations:
            found[impl] = _by(subject, impl)
    return {**found, "plain": subject.plain, **subject.library}


def _figures(timing: Timing, flops: int, moved: int, floor: float | None, plain: Timing | None) -> Row:
    return {
        "p50_ms": timing.p50 * 1e3,
        "p20_ms": timing.p20 * 1e3,
        "p80_ms": timing.p80 * 1e3,
        "samples": timing.samples,
        "tflops": flops / timing.p50 / 1e12,
        "gbs": moved / timing.p50 / 1e9,
        "floor_ms": None if floor is None else floor * 1e3,
        "floor_fraction": None if floor is None else floor / timing.p50,
        "plain_ms": None if plain is None else plain.p50 * 1e3,
        "ratio": None if plain is None else plain.p50 / timing.p50,
    }


def words(shape: Shape) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def choose(found: Iterable[Subject], only: Sequence[str]) -> list[Subject]:
    """Those named in `only`, all if it is empty. Raises InputError: one of them is not there."""
    there = list(found)
    names = [subject.name for subject in there]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise InputError(f"no operation {unknown[0]!r}; expected one of {', '.join(names)}")
    return [subject for subject in there if not only or subject.name in only]
