"""Documents in parquet files: read by number where row groups are small, else unpacked. Needs pyarrow."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..kernels.errors import InputError
from .sources import Stamp, TextFile, one_line, unpacked

COLUMN = "text"
GROUP = 8 << 20  # bytes of text: a row group is decoded whole for each document that is taken from it
BATCH = 256  # rows that are decoded together where all are read


@dataclass(frozen=True, eq=False)
class ParquetFiles:
    """The rows of one or more files, in their order; a null is a blank document.

    footers: one a file, as pyarrow reads them
    starts: [groups + 1] int64: the document that each row group, over all files, begins with, then their number
    places: file and number in it of each row group
    """

    source: str
    paths: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    footers: tuple[Any, ...]
    starts: np.ndarray
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[str]:
        for file in range(len(self.paths)):
            with self._open(file) as opened:
                for batch in opened.iter_batches(BATCH, columns=[COLUMN]):
                    for text in batch.column(0).to_pylist():
                        yield text or ""

    def take(self, numbers: Sequence[int]) -> list[str]:
        slots: dict[int, list[int]] = defaultdict(list)
        groups = np.searchsorted(self.starts, np.asarray(numbers, dtype=np.int64), side="right") - 1
        for slot, group in enumerate(groups.tolist()):
            slots[group].append(slot)
        texts = [""] * len(numbers)
        for group, wanted in sorted(slots.items()):  # each row group is decoded once
            file, number = self.places[group]
            with self._open(file) as opened:
                column = opened.read_row_group(number, columns=[COLUMN]).column(0)
                for slot in wanted:
                    texts[slot] = column[numbers[slot] - int(self.starts[group])].as_py() or ""
        return texts

    @contextmanager
    def _open(self, file: int) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        path = self.paths[file]
        try:
            with path.open("rb") as raw:
                self.stamps[file].check(raw, str(path))
                yield pyarrow.parquet.ParquetFile(raw, metadata=self.footers[file])
        except InputError:
            raise
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: cannot be read ({one_line(error)})") from None


def read_parquet(source: str, paths: Sequence[Path], stamps: Sequence[Stamp], digest: str) -> ParquetFiles | TextFile:
    """What is in the column `text` of these files. Raises `InputError` where one has none, or is broken."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{source}: parquet needs `pyarrow`: pip install 'rewire[corpora]'") from None
    footers, places, rows = [], [], [0]
    largest = 0
    for file, (path, stamp) in enumerate(zip(paths, stamps, strict=True)):
        try:
            with path.open("rb") as raw:
                stamp.check(raw, str(path))
                footer = pyarrow.parquet.read_metadata(raw)
                schema = footer.schema.to_arrow_schema()
        except InputError:
            raise
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
        if COLUMN not in schema.names or not _is_text(schema.field(COLUMN).type):
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(f"{path}: found the columns {columns or 'none'}, expected strings in a column `{COLUMN}`")
        footers.append(footer)
        leaf = [footer.schema.column(i).path for i in range(footer.num_columns)].index(COLUMN)
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            places.append((file, number))
            rows.append(rows[-1] + group.num_rows)
            largest = max(largest, group.column(leaf).total_uncompressed_size)
    starts = np.array(rows, dtype=np.int64)
    files = ParquetFiles(source, tuple(paths), tuple(stamps), tuple(footers), starts, tuple(places))
    if largest <= GROUP:
        return files

    def fill(file: IO[bytes]) -> None:
        for text in files:
            file.write(json.dumps(text).encode() + b"\n")

    return unpacked(source, f"{digest}.jsonl", fill)


def _is_text(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def list_parquet(folder: Path) -> list[Path]:
    """The parquet files that lie in a folder, by name. Raises `InputError` where it cannot be listed."""
    try:
        return sorted(Path(folder, name) for name in os.listdir(folder) if name.lower().endswith(".parquet"))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({one_line(error)})") from None
