"""A picture of an experiment: rates and perplexities over iterations, from the summary only."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ...stats.cache import write_whole
from .summary import COLUMNS, Entry, Summary, batched, rows, spread

Line = tuple[str, str, Sequence[float | None]]  # (label, style, a value from the unedited model on)

ALL = "all cases"
RATES = (  # title, column, what acc is there
    ("efficacy", "Efficacy", "accuracy"),
    ("paraphrases", "Generalization", "accuracy"),
    ("specificity", "Specificity", "answers as before"),
)


def draw(summary: Summary, path: Path, title: str) -> None:
    """A PNG, and beside it an SVG of the same name: one row of panels for all cases, one for the hard ones if any.

    Panels: efficacy, paraphrases, specificity (success and accuracy), perplexity of the edit behind OPTIMIZATION and
    SPREAD, and, not of cases, of plain texts (ME-PPL). Iteration (or batch) 0 is the unedited model; nothing was
    optimised there.
    summary: as `summary.write` gives it
    Raises `InputError`: matplotlib is missing, or there is no iteration in the summary.
    """
    if not summary["all"]:
        raise InputError(f"{path}: the summary has no iteration, nothing can be drawn")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed; pip install 'rewire[plot]'") from None
    groups = [(name, entries) for name, entries in ((ALL, summary["all"]), ("hard cases", summary["hard"])) if entries]
    in_batches = batched(summary)
    unit = "batch" if in_batches else "iteration"
    picture = Figure(figsize=(15, 0.7 + 2.9 * len(groups)), layout="constrained")
    picture.suptitle(title, fontsize=11)
    grid = picture.subplots(len(groups), 5, squeeze=False)
    for axes, (group, entries) in zip(grid, groups, strict=True):
        cells = dict(zip(COLUMNS, zip(*rows(entries, False, in_batches), strict=True), strict=True))
        for place, (name, column, acc) in enumerate(RATES):
            success: Line = ("success", "C0o-", cells[column, "success"])
            _panel(axes[place], name, [success, (acc, "C1s--", cells[column, "acc"])], unit)
            axes[place].set_ylim(-0.03, 1.03)
        behind = [
            ("SPREAD", "C3o-", spreads(entries, in_batches)),
            ("OPTIMIZATION", "C2s--", cells["Perplexity", "final"]),
        ]
        _panel(axes[3], "perplexity of the new object", behind, unit)
        if group == ALL:
            _panel(axes[4], "perplexity of plain texts", [("ME-PPL", "C4o-", cells["Perplexity", "m-ppl-50"])], unit)
        else:
            axes[4].remove()
        axes[0].set_ylabel(group)
    for kind, more in (("png", {"dpi": 120}), ("svg", {"metadata": {"Date": None}})):
        write_whole(path.with_suffix(f".{kind}"), _saver(picture, kind, more))


def spreads(entries: Sequence[Entry], batched: bool) -> list[float | None]:
    """The SPREAD perplexity from the unedited model on.

    Published runs did not measure that of an iteration: it is what the next one began with, and of the last unknown.
    """
    began: list[float | None] = [entry["post"].get("init_ppl") for entry in entries]
    measured = [spread(entry["post"]) for entry in entries]
    later = [*began[1:], None]
    return [
        began[-1 if batched else 0],
        *(now if now is not None else then for now, then in zip(measured, later, strict=True)),
    ]


def _panel(axes: Any, title: str, lines: Sequence[Line], unit: str) -> None:
    """Lines over iterations; what is not known leaves a gap, and a line of nothing is left out.

    The first line is drawn wide and pale, its marks hollow, so that it is seen where another one lies on it.
    """
    known = [value for _, _, values in lines for value in values if value is not None]
    if known and min(known) > 1 and max(known) > 10 * min(known):  # perplexities far apart
        axes.set_yscale("log")
    for place, (label, style, values) in enumerate(lines):
        if any(value is not None for value in values):
            shown = [float("nan") if value is None else value for value in values]
            look: dict[str, Any] = {"markersize": 4, "linewidth": 1.2}
            if place == 0 and len(lines) > 1:
                look = {"markersize": 9, "linewidth": 4, "markerfacecolor": "none", "alpha": 0.6}
            axes.plot(range(len(shown)), shown, style, label=label, **look)
    axes.set_xticks(range(len(lines[0][2])))
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    if known:
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.5")


def _saver(picture: Any, kind: str, more: dict[str, Any]) -> Callable[[Any], None]:
    return lambda file: picture.savefig(file, format=kind, **more)
