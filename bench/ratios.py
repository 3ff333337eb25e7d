"""The committed table of ratios: read, held against what was found, written anew. docs/benchmarks.md has it."""

import re
from collections.abc import Mapping

LOST = 0.25  # of a committed ratio: losing more fails
BEGIN, END = "<!-- from here on `make bench-table` writes -->", "<!-- to here -->"
HEAD = "| phase | ours, ms | counterpart, ms | ratio |\n|---|---|---|---|"
ROW = r"^\| (\w+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$"


def committed(page: str) -> dict[str, float | None]:
    """Phase -> its ratio in the page's table; None where it says something else (not measured yet)."""
    return {name: float(ratio) if re.fullmatch(r"\d+(\.\d+)?", ratio) else None for name, *_, ratio in _rows(page)}


def absent(known: Mapping[str, float | None]) -> str | None:
    """What to do where no ratio is committed yet; None: one is."""
    if any(ratio is not None for ratio in known.values()):
        return None
    return "no ratios in docs/benchmarks.md yet: run `make bench-table` on a quiet machine and commit the page"


def complaint(name: str, found: float, known: Mapping[str, float | None]) -> str | None:
    """What is wrong with a ratio that was found; None: nothing."""
    ratio = known.get(name)
    if ratio is None:
        return f"{name}: ratio {found:.2f} found, none committed in docs/benchmarks.md; `make bench-table` writes it"
    if not found >= (1 - LOST) * ratio:  # NaN too
        return f"{name}: ratio {ratio:.2f} committed, {found:.2f} found: more than {LOST:.0%} lost"
    return None


def rewritten(page: str, name: str, ours: float, plain: float) -> str:
    """The page with that phase's row made of these seconds; the other rows stay.

    Raises ValueError: the page has no such table.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not end:
        raise ValueError(f"expected {BEGIN} and {END} in the page")
    rows = {phase: f"| {phase} | {' | '.join(cells)} |" for phase, *cells in _rows(page)}
    rows[name] = f"| {name} | {1e3 * ours:.3g} | {1e3 * plain:.3g} | {plain / ours:.2f} |"
    return "\n".join([before + begin, "", HEAD, *rows.values(), "", end + behind])


def _rows(page: str) -> list[tuple[str, ...]]:
    block = page.partition(BEGIN)[2].partition(END)[0]
    return [row for row in re.findall(ROW, block, re.M) if row[0] != "phase"]
