"""`rewire bench gpu`: one command for a machine with a GPU. Gates C, ceilings, all kernels at real shapes, statistics,
values, tuning.

Needs torch, Triton and NumPy only (statistics and values also transformers): ``python -m rewire.bench.gpu --out DIR``.
What was done is on disk after every section; what did not fit the budget is listed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..kernels.errors import InputError
from ..kernels.tuned import device_name
from . import table
from .ceilings import LARGE, TINY, Ceilings, ceilings_of, measure_factors, measure_products, reason_of
from .check import Shape, Subject
from .configurations import forced, tunable
from .gpu_report import markdown
from .gpu_statistics import LLAMA3_8B, measure_statistics
from .gpu_statistics import TINY as TINY_LLAMA
from .gpu_values import LARGE as LARGE_VALUES
from .gpu_values import LATE, measure_values
from .gpu_values import TINY as TINY_VALUES
from .kernels import OURS, Bench, Listener, choose, drawn, gate, groups_of, silent, sorted_out, words
from .operations import subjects
from .table import Row
from .targets import judge, judge_statistics, judge_values
from .timing import measure, rotation

BUDGET = 540.0  # seconds: inside ten minutes with the start of the program
# until what share of the budget a section may begin something new; what it leaves falls to the next
UNTIL = {"gates": 0.25, "ceilings": 0.35, "kernels": 0.55, "statistics": 0.6, "values": 0.8, "tuning": 1.0}
STATISTICS, VALUES = "statistics", "values"  # in `only`


@dataclass
class Clock:
    """Seconds since the start, held against the budget."""

    budget: float
    start: float

    def late(self, section: str) -> bool:
        return self.passed() > self.budget * UNTIL[section]

    def passed(self) -> float:
        return time.perf_counter() - self.start


def bench_gpu(
    out: Path,
    budget: float = BUDGET,
    only: Sequence[str] = (),
    rehearse: bool = False,
    listener: Listener = silent,
    found: Iterable[Subject] | None = None,
) -> dict[str, Any]:
    """Everything that a GPU is wanted for; the report, which is also written to `out`.

    out: folder for gpu.json, gpu.md, kernels.csv and tuned.json, all renamed into place after every section
    budget: seconds; nothing new is begun after that
    only: names of operations, "statistics" or "values"; default: all
    rehearse: walk all of it on the CPU, at small shapes: figures of a rehearsal say nothing about a GPU
    found: instead of the registered subjects

    Raises InputError: there is no GPU and it is no rehearsal; `out` is a file; no such operation; a budget of nothing.
    """
    clock = Clock(budget, time.perf_counter())
    if budget <= 0:
        raise InputError(f"budget {budget:g} s; expected more than 0")
    if not rehearse and not torch.cuda.is_available():
        raise InputError(
            f"no GPU: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; expected one "
            "(`rewire bench kernels` measures the CPU, --rehearse walks this command on it)"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; expected a folder, or a new name")
    names = [name for name in only if name not in (STATISTICS, VALUES)]
    chosen = choose(subjects() if found is None else found, names) if names or not only else []
    if rehearse:
        chosen = [replace(subject, small=subject.odd[:2]) for subject in chosen]
    device = torch.device("cpu" if rehearse else "cuda")
    run = Run(out, device, chosen, clock, rehearse, listener)
    models = {STATISTICS: run.statistics, VALUES: run.values}
    wanted = [models[name] for name in models if name in only or (not only and found is None)]
    sections = [run.gates, run.ceilings, run.kernels, *wanted, run.tuning]
    for section in sections:
        try:
            section()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            # a fault of the GPU (an illegal address) ends every later call of this process: say so and keep the rest
            run.report["check"] = "failed"
            run.report["broken"] = f"{section.__name__}: {reason_of(failure)}; the rest was not measured"
            break
        finally:
            run.save()
    run.report["finished"] = True
    run.report["seconds"] = round(clock.passed(), 1)
    run.save()
    return run.report


class Run:
    """The sections, in order, and what they have found so far."""

    def __init__(
        self,
        out: Path,
        device: torch.device,
        chosen: Sequence[Subject],
        clock: Clock,
        rehearse: bool,
        listener: Listener,
    ) -> None:
        self.out, self.device, self.chosen, self.clock, self.listener = out, device, chosen, clock, listener
        self.sizes, self.load = (TINY, TINY_LLAMA) if rehearse else (LARGE, LLAMA3_8B)
        self.loads = TINY_VALUES if rehearse else LARGE_VALUES
        seconds, cache = (0.02, 2**20) if rehearse else (0.2, None)
        self.bench = Bench(device, Ceilings(), seconds, cache)
        self.rows: list[Row] = []
        self.report: dict[str, Any] = {
            "about": self.bench.about,
            "rehearsal": rehearse,
            "budget": clock.budget,
            "finished": False,
            "check": "passed",
            "gates": [],
            "ceilings": [],
            "rows": [],
            "not_measured": [],
            "wrong": [],
            "targets": [],
            "statistics": None,
            "values": [],
            "tuning": [],
            "tuned": {},
        }
        self.save()

    def save(self) -> None:
        self.report["seconds"] = round(self.clock.passed(), 1)
        self.report["gates"] = self._passed()
        if any(gate["result"] == "wrong" for gate in self.report["gates"]):
            self.report["check"] = "failed"
        targets = judge(self.rows, [subject.name for subject in self.chosen])
        targets += judge_statistics(self.report["statistics"]) + judge_values(self.report["values"])
        self.report["targets"] = targets
        table.write_text(self.out / "gpu.json", json.dumps(self.report, indent=1) + "\n")
        table.write_text(self.out / "gpu.md", markdown(self.report))
        table.write_text(self.out / "tuned.json", json.dumps(self.report["tuned"], indent=1) + "\n")
        table.upsert(self.out / "kernels.csv", self.rows)

    def gates(self) -> None:
        """Every operation at its odd shapes, in every dtype, by both implementations."""
        cases = [(s, impl, dtype) for impl in OURS for s in self.chosen for dtype in s.dtypes]
        cases = [case for case in cases if case[1] in case[0].operation.implementations]
        for number, (subject, impl, dtype) in enumerate(cases):
            self.listener("gates", number, len(cases))
            if self.clock.late("gates"):
                break  # those of `kernels` pass theirs there
            self.bench.gate(subject, impl, dtype)
            self._alive()
        self.listener("gates", len(cases), len(cases))

    def _passed(self) -> list[dict[str, Any]]:
        """Of every operation, implementation and dtype, whatever section found it."""
        found = []
        for subject in self.chosen:
            for impl in OURS:
                for dtype in subject.dtypes if impl in subject.operation.implementations else ():
                    result, note = self.bench.gates.get((subject.name, impl, dtype), ("not measured", LATE)) or (
                        "passed",
                        "",
                    )
                    found.append(
                        {"name": subject.name, "impl": impl, "dtype": _name(dtype), "result": result, "note": note}
                    )
        return found

    def ceilings(self) -> None:
        """The products and the copy always: the floors need them. Factorisations as time allows."""
        products = list(measure_products(self.sizes, self.device))
        self.bench.ceilings = ceilings_of(products)
        self.report["ceilings"] = products
        self._alive()
        if not self.chosen:
            return
        left = self.clock.budget - self.clock.passed()
        sizes = replace(self.sizes, patience=min(self.sizes.patience, max(0.0, left / 10)))
        factors = measure_factors(sizes, self.device, lambda: LATE if self.clock.late("ceilings") else "")
        for row in factors:
            self.report["ceilings"].append(row)
            self.listener("ceilings", len(self.report["ceilings"]), 0)

    def kernels(self) -> None:
        """Every operation and provider at the large shapes."""
        groups = groups_of(self.chosen, (), self.device)
        for number, group in enumerate(groups):
            self.listener("kernels", number, len(groups))
            if self.clock.late("kernels"):
                self.rows += self.bench.unmeasured(*group, LATE)
            else:
                self.rows += self.bench.group(*group)
                self._alive()
            summary = sorted_out(self.rows)
            failed = summary.pop("check") == "failed"
            self.report |= summary | ({"check": "failed"} if failed else {})
            if number % 8 == 7:
                self.save()
        self.listener("kernels", len(groups), len(groups))

    def statistics(self) -> None:
        """One pass over documents, through the first blocks of a large model."""
        self.listener("statistics", 0, 1)
        if self.clock.late("statistics"):
            row: dict[str, Any] = {"name": "statistics", "status": "not measured", "note": LATE}
        else:
            row = measure_statistics(self.load, self.device, self.bench.ceilings)
        self.report["statistics"] = row
        if row["status"] == "wrong":
            self.report["check"] = "failed"
        self._alive()
        self.listener("statistics", 1, 1)

    def values(self) -> None:
        """Target values of many facts in large models."""
        for number, load in enumerate(self.loads):
            self.listener("values", number, len(self.loads))
            row = measure_values(load, self.device, self.bench.ceilings, lambda: self.clock.late("values"))
            self.report["values"].append(row)
            if row["status"] == "wrong":
                self.report["check"] = "failed"
            self._alive()
            self.save()
        self.listener("values", len(self.loads), len(self.loads))

    def tuning(self) -> None:
        """Every configuration that a kernel may pick, right on the odd shapes first, then timed beside the others."""
        groups = [
            (*group, module) for group in groups_of(self.chosen, (), self.device) if (module := tunable(group[0]))
        ]
        for number, (subject, shape, dtype, module) in enumerate(groups):
            self.listener("tuning", number, len(groups))
            entry: dict[str, Any] = {
                "name": subject.name,
                "dtype": _name(dtype),
                "shape": dict(shape),
                "note": "",
                "configs": [],
            }
            self.report["tuning"].append(entry)
            if self.clock.late("tuning"):
                entry["note"] = LATE
                continue
            try:
                self._tune(subject, shape, dtype, module, entry)
            except InputError as refusal:
                entry["note"] = str(refusal)
            except torch.OutOfMemoryError as failure:
                entry["note"] = reason_of(failure)
            if any(config["result"] == "wrong" for config in entry["configs"]):
                self.report["check"] = "failed"
            self._alive()
            self.save()
        self.listener("tuning", len(groups), len(groups))

    def _tune(
        self, subject: Subject, shape: Shape, dtype: torch.dtype, module: ModuleType, entry: dict[str, Any]
    ) -> None:
        inputs = drawn(subject, shape, dtype, self.device)
        with forced(module, 0) as asked:
            subject.run(inputs, "triton")
        count = max((len(configs) for configs in asked.values()), default=0)
        right: dict[str, Callable[[Any], object]] = {}
        call = subject.timed.get("triton", lambda inputs: subject.run(inputs, "triton"))
        for index in range(count):
            named = {key: asdict(configs[min(index, len(configs) - 1)]) for (_, key), configs in asked.items()}
            config: dict[str, Any] = {"index": index, "configs": named, "result": "passed", "note": ""}
            entry["configs"].append(config)
            if self.clock.late("tuning"):
                config |= {"result": "not measured", "note": LATE}
                continue
            config["result"], config["note"] = self._right(subject, shape, dtype, module, index)
            if config["result"] == "passed":

                def chosen(inputs: Any, index: int = index) -> object:
                    with forced(module, index):
                        return call(inputs)

                right[str(index)] = chosen
        copies = rotation(inputs, self.device, self.bench.cache)
        timings, failures = measure(right, copies, self.device, self.bench.seconds, warm=self.bench.seconds / 5)
        for name, failure in failures.items():
            entry["configs"][int(name)] |= {"result": "not measured", "note": reason_of(failure)}
        for name, timing in timings.items():
            entry["configs"][int(name)]["seconds"] = timing.p50
        if not timings:
            entry["note"] = "no configuration is right and runs"
            return
        best = int(min(timings, key=lambda name: timings[name].p50))
        entry["best"] = best
        chip = self.report["tuned"].setdefault(device_name(), {})
        for (operation, key), configs in asked.items():
            # shapes and dtypes may share a key: the first shape, in bf16, is the one that decides
            chip.setdefault(operation, {}).setdefault(key, asdict(configs[min(best, len(configs) - 1)]))

    def _right(
        self, subject: Subject, shape: Shape, dtype: torch.dtype, module: ModuleType, index: int
    ) -> tuple[str, str]:
        """Of one configuration: on the odd shapes (which may pick from other lists: of each the same place)."""
        try:
            with forced(module, index):
                for odd in subject.odd:
                    wrong = gate(subject, odd, dtype, "triton", self.device)
                    if wrong:
                        return "wrong", f"at {words(odd)}: {wrong}"
                return self.bench.verified(subject, shape, dtype, "triton")
        except InputError as refusal:
            return "not measured", str(refusal)
        except Exception as failure:  # a tile that does not fit this chip is no bug of the operation
            return "not measured", reason_of(failure)

    def _alive(self) -> None:
        """Raises what a fault of the GPU left behind."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def say_lines(every: float = 2.0) -> Listener:
    """A listener that prints a line on stderr, not more often than `every` seconds within a section."""
    last: dict[str, float] = {}
    start = time.perf_counter()

    def listen(what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == total or now - last.get(what, -every) >= every:
            last[what] = now
            print(f"{now - start:6.1f} s  {what} {done}{f' of {total}' if total else ''}", file=sys.stderr, flush=True)

    return listen


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 something is wrong or broken; 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m rewire.bench.gpu",
        description="Gates C, ceilings, kernels, statistics, values and tuning on a GPU.",
        epilog="Example: python -m rewire.bench.gpu --out gpu-report",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md, kernels.csv, tuned.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds (default: %(default)s)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="one operation, statistics or values"
    )
    parser.add_argument("--rehearse", action="store_true", help="walk all of it on the CPU at small shapes")
    options = parser.parse_args(arguments)
    try:
        report = bench_gpu(options.out, options.budget, options.only, options.rehearse, say_lines())
    except InputError as error:
        print(f"rewire: {error}", file=sys.stderr)
        return 2
    print(markdown(report))
    return 0 if report["check"] == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
