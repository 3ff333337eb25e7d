"""What the kernels were written to reach on a GPU, as data: each is met, missed, or said to be unmeasured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .table import Row

Rows = Mapping[str, Row]  # provider -> what was measured of one shape and dtype


@dataclass(frozen=True)
class Target:
    """what: in words; shape: the sizes that it is about, others may be anything; figure: of the rows, None if missing.

    bound: the figure is to be at least that (`least`), or at most
    """

    what: str
    dtype: str
    shape: Mapping[str, int]
    figure: Callable[[Rows], float | None]
    bound: float
    least: bool = True


def times_faster_than(provider: str) -> Callable[[Rows], float | None]:
    """Than another provider at the same shape."""
    return lambda rows: rows[provider]["p50_ms"] / rows["triton"]["p50_ms"] if provider in rows else None


def over(provider: str) -> Callable[[Rows], float | None]:
    """Time over that of another one, as a share of it."""
    return lambda rows: rows["triton"]["p50_ms"] / rows[provider]["p50_ms"] - 1 if provider in rows else None


def tflops(rows: Rows) -> float | None:
    return rows["triton"]["tflops"]


def of_the_logits(rows: Rows) -> float | None:
    """Peak memory beside the inputs, as a share of what the logits alone would take."""
    row = rows["triton"]
    itemsize = 4 if row["dtype"] == "float32" else 2
    return row["peak_bytes"] / (row["shape"]["rows"] * row["shape"]["vocab"] * itemsize)


GRAM = {"T": 32768, "d": 14336}
HEAD = {"rows": 4096, "vocab": 128256}

TARGETS: Mapping[str, tuple[Target, ...]] = {
    "gram_": (
        Target("times faster than addmm(out_dtype)", "bfloat16", GRAM, times_faster_than("addmm"), 1.5),
        Target("TFLOP/s of the triangle", "bfloat16", GRAM, tflops, 600),
    ),
    "target_nll": (
        Target("TFLOP/s", "bfloat16", HEAD, tflops, 600),
        Target("peak memory as a share of the logits", "bfloat16", HEAD, of_the_logits, 0.1, least=False),
    ),
    "delta_linear": (
        Target("over the plain product at rank 1", "bfloat16", {"r": 1}, over("product"), 0.05, least=False),
    ),
}


STATISTICS = {"d": 14336, "layers": 5, "tokens": 1_000_000}  # Llama-3-8B, layers 4 to 8
FRACTION = 0.7


def judge_statistics(row: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Of the statistics section's row, None where it was not asked for: the share of the floor."""
    if row is None:
        return []
    fits = row.get("shape") == STATISTICS and row["status"] == "measured"
    found = row["floor_fraction"] if fits else None
    result = "not measured" if found is None else "met" if found >= FRACTION else "missed"
    entry = {"name": "statistics", "target": "share of the floor", "dtype": "bfloat16", "shape": STATISTICS}
    return [entry | {"bound": f"at least {FRACTION:g}", "result": result, "found": found}]


VALUES = {"facts": 1000, "steps": 25}  # Llama-3-8B and GPT-J-6B in bfloat16
FACTS_PER_SECOND = 16


def judge_values(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the values section's rows: facts a second."""
    found = []
    for row in rows:
        fits = row["shape"] == VALUES and row["status"] == "measured"
        rate = row["facts_per_second"] if fits else None
        result = "not measured" if rate is None else "met" if rate >= FACTS_PER_SECOND else "missed"
        entry = {"name": f"values, {row['config']}", "target": "facts a second", "dtype": "bfloat16", "shape": VALUES}
        found.append(entry | {"bound": f"at least {FACTS_PER_SECOND:g}", "result": result, "found": rate})
    return found


def judge(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a target and shape of the operations in `names`: "met", "missed", or "not measured"."""
    found = []
    for name in names:
        for target in TARGETS.get(name, ()):
            entry: dict[str, Any] = {
                "name": name,
                "target": target.what,
                "dtype": target.dtype,
                "bound": f"{'at least' if target.least else 'at most'} {target.bound:g}",
            }
            groups = _groups(rows, name, target)
            for rows_of_shape in groups:
                figure = target.figure(rows_of_shape)
                entry["shape"] = dict(rows_of_shape["triton"]["shape"])
                if figure is not None:
                    met = figure >= target.bound if target.least else figure <= target.bound
                    found.append(entry | {"result": "met" if met else "missed", "found": figure})
                else:
                    found.append(entry | {"result": "not measured", "found": None})
            if not groups:
                found.append(entry | {"shape": dict(target.shape), "result": "not measured", "found": None})
    return found


def _groups(rows: Sequence[Row], name: str, target: Target) -> list[Rows]:
    """Those shapes of the target at which the kernel was measured."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        fits = all(row["shape"].get(key) == value for key, value in target.shape.items())
        if fits and (row["operation"], row["dtype"], row["status"]) == (name, target.dtype, "measured"):
            groups.setdefault(str(sorted(row["shape"].items())), {})[row["provider"]] = row
    return [group for group in groups.values() if "triton" in group]
