"""One CSV for all figures: a row an operation, provider, dtype, shape and device, the newest one kept."""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError

Row = dict[str, Any]

KEY = ("operation", "provider", "dtype", "shape", "device")
FIGURES = (
    *("p50_ms", "p20_ms", "p80_ms", "tflops", "gbs", "floor_ms", "floor_fraction", "plain_ms", "ratio", "peak_bytes"),
    *("error", "plain_error", "samples", "copies"),
)
COLUMNS = (
    *KEY, "status", *FIGURES, "verified", "note", "git", "driver", "torch", "triton", "timestamp",
)  # fmt: skip
STATUS = ("measured", "not measured", "refused", "wrong")  # refused: cannot serve such a call on this device


def read(path: Path) -> list[Row]:
    """The rows of a CSV that :func:`upsert` wrote: shapes as dicts, figures as numbers or None.

    Raises InputError: no such file, or not such a CSV.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            header, lines = tuple(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}; expected a CSV that `rewire bench kernels --csv` wrote") from None
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; expected a CSV that `rewire bench kernels --csv` wrote")
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            row: Row = {column: line[column] for column in COLUMNS}
            row |= {column: float(line[column]) if line[column] else None for column in FIGURES}
            row["shape"] = json.loads(line["shape"])
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{number}: {error}; expected a row of `rewire bench kernels --csv`") from None
        rows.append(row)
    return rows


def upsert(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put `rows` into the CSV at `path`, each in the place of the one with its key; others stay. Renamed at the end.

    A row that was not measured does not replace one that was; one that is wrong does. What was refused is left out.
    """
    merged = {_key(row): row for row in (read(path) if path.exists() else ())}
    for new in rows:
        if new["status"] == "refused":
            continue
        row: Row = {column: new.get(column) for column in COLUMNS}
        old = merged.get(_key(row))
        if row["status"] == "not measured" and old is not None and old["status"] == "measured":
            continue
        merged[_key(row)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in merged.values())
    os.replace(part, path)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_cell(row[name]) for name in KEY)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.6g}"
    return str(value)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)
