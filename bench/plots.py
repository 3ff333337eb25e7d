"""Pictures: of a benchmark CSV, from the CSV only; of an edit's phases, from `throughput.json` only."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError
from . import table
from .table import Row

PICTURES: dict[str, tuple[str, str]] = {  # file -> column, axis
    "ratio": ("ratio", "times plain torch"),
    "floor": ("floor_fraction", "share of the floor"),
}

COLOURS = {"triton": "C3", "torch": "C0", "plain": "C7", "library": "C2"}
NAMES = {"plain": "plain torch", "library": "best library call"}


def plot(csv: Path, out: Path) -> list[Path]:
    """One PNG a device and figure: bars by provider for every operation, dtype and shape. Returns the files.

    Raises InputError: `csv` is no benchmark CSV or holds no figures, or matplotlib is missing.
    """
    rows = [row for row in table.read(csv) if row["status"] == "measured" and row["ratio"] is not None]
    if not rows:
        raise InputError(f"{csv}: no measured row in it; expected figures of `rewire bench kernels --csv`")
    Figure = _figure()
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for device in dict.fromkeys(row["device"] for row in rows):
        there = [row for row in rows if row["device"] == device]
        for name, (column, axis) in PICTURES.items():
            shown = [row for row in there if row[column] is not None]
            if shown:
                path = out / f"{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}-{name}.png"
                _bars(Figure, shown, column, axis, device, path)
                written.append(path)
    return written


def _bars(figure: Any, rows: Sequence[Row], column: str, axis: str, device: str, path: Path) -> None:
    """Horizontal bars, of the library calls the best; written to `path` as a whole."""
    bars: dict[tuple[str, str], Row] = {}  # (label, kind)
    for row in rows:
        key = _label(row), row["provider"] if row["provider"] in COLOURS else "library"
        if key not in bars or row[column] > bars[key][column]:
            bars[key] = row
    labels = sorted({label for label, _ in bars})
    kinds = [kind for kind in COLOURS if any(kind == each for _, each in bars)]
    height = 0.8 / len(kinds)
    picture = figure(figsize=(9, 1.2 + (0.1 + 0.14 * len(kinds)) * len(labels)), layout="constrained")
    axes = picture.add_subplot()
    for number, kind in enumerate(kinds):
        found = {labels.index(label): row for (label, each), row in bars.items() if each == kind}
        places = [place + (number - (len(kinds) - 1) / 2) * height for place in found]
        drawn = axes.barh(
            places, [row[column] for row in found.values()], height, label=NAMES.get(kind, kind), color=COLOURS[kind]
        )
        said = [f"{row[column]:.2g}{' ' + row['provider'] if kind == 'library' else ''}" for row in found.values()]
        axes.bar_label(drawn, said, fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel(axis)
    axes.set_title(device)
    axes.legend(fontsize=7)
    _save(picture, path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed; pip install 'rewire[plot]'") from None
    return Figure


def _save(picture: Any, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    picture.savefig(part, dpi=120, format="png")
    part.replace(path)


def plot_throughput(report: Mapping[str, Any], path: Path) -> None:
    """Stacked bars of the seconds that a fact takes, phase by phase: ours, the serial baseline's, the floor's.

    report: as `bench_throughput` gives it, its check passed. Raises InputError: matplotlib is missing.
    """
    picture = _figure()(figsize=(8, 5), layout="constrained")
    phases = [phase for phase in report["phases"] if "seconds" in phase and phase["name"] != "evaluate"]
    serial = f"serial baseline\n(from {report['serial_facts']} facts)"
    sides = [("Rewire", "seconds"), (serial, "serial_seconds")]
    if all(phase.get("floor_seconds", 0) is not None for phase in phases):
        sides.append(("floor", "floor_seconds"))
    axes = picture.add_subplot()
    bottoms = [0.0] * len(sides)
    for number, phase in enumerate(phases):
        heights = [phase.get(key, 0.0) / report["facts"] for _, key in sides]
        axes.bar([name for name, _ in sides], heights, 0.6, bottoms, label=phase["name"], color=f"C{number}")
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    ratio = next(row["ratio"] for row in report["rows"] if row["name"] == "edit")
    for number, total in enumerate(bottoms):
        axes.text(
            number, total, f"{total:.3g} s" + (f"\n{ratio:.1f} times" if number == 0 else ""), ha="center", va="bottom"
        )
    axes.set_ylim(0, 1.2 * max(bottoms))  # room for what stands above
    axes.set_ylabel("seconds per fact")
    about = f"{report['facts']} facts, layers {report['layers']}, {report['rows'][0]['dtype']}"
    axes.set_title(f"{report['model']}: {about}\n{report['about']['device']}", fontsize=9)
    axes.legend(fontsize=8)
    _save(picture, path)


def _label(row: Row) -> str:
    return f"{row['operation']} {row['dtype']}\n{' '.join(f'{name}={value}' for name, value in row['shape'].items())}"
