"""Pictures of a benchmark CSV, from the CSV only."""

import re
from collections.abc import Sequence
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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed; pip install 'rewire[plot]'") from None
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
    part = path.with_name(f".{path.name}")
    picture.savefig(part, dpi=120, format="png")
    part.replace(path)


def _label(row: Row) -> str:
    return f"{row['operation']} {row['dtype']}\n{' '.join(f'{name}={value}' for name, value in row['shape'].items())}"
