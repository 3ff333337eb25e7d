"""Where documents come from: text and JSON files, read by number through an index, and hub data sets, as streams."""

import gzip
import hashlib
import json
import logging
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..kernels.errors import InputError
from .cache import cache_root, write_whole
from .documents import Held, text_of

log = logging.getLogger(__name__)

SCAN = 1 << 22  # bytes of a file that are looked at together
HUB_BUFFER = 10_000  # documents of a stream that are shuffled together
_BOM = b"\xef\xbb\xbf"
# every byte that occurs in white space: a line that has none but these may be blank, any other is not
_SPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()).encode()


@dataclass(frozen=True)
class Stamp:
    """Size and time of change of a file: what tells that it is still the one that was looked at."""

    size: int
    changed: int

    @classmethod
    def of(cls, file: IO[bytes]) -> "Stamp":
        found = os.fstat(file.fileno())
        return cls(found.st_size, found.st_mtime_ns)

    def check(self, file: IO[bytes], source: str) -> None:
        if Stamp.of(file) != self:
            raise has_changed(source)


@dataclass(frozen=True, eq=False)
class TextFile:
    """Paragraphs, or lines of JSON, of a UTF-8 file: the offsets are in memory, the text stays on disk.

    path: what is read; source: what errors call it
    starts: [n + 1] int64, the byte at which each document begins, then the length of the file
    stamp: what it has to look like; None for a file in the cache, which another process may put there once more
    """

    path: Path
    source: str
    jsonl: bool
    starts: np.ndarray
    stamp: Stamp | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            for number in range(len(self)):
                yield self._read(file, number)

    def take(self, numbers: Sequence[int]) -> list[str]:
        texts = dict.fromkeys(numbers, "")
        with self._open() as file:
            for number in sorted(texts):  # forward through the file
                texts[number] = self._read(file, number)
        return [texts[number] for number in numbers]

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with reading(self.source), self.path.open("rb") as file:
            if self.stamp is not None:
                self.stamp.check(file, self.source)
            yield file

    def _read(self, file: IO[bytes], number: int) -> str:
        start, stop = int(self.starts[number]), int(self.starts[number + 1])
        file.seek(start)
        raw = file.read(stop - start)
        if len(raw) < stop - start:
            raise has_changed(self.source)
        try:
            text = raw.decode().replace("\r\n", "\n").rstrip()
        except UnicodeDecodeError as error:
            where = f"{self.source}, line {self._line(file, start + error.start)}"
            raise InputError(f"{where}: is not UTF-8 text ({error.reason})") from None
        if not self.jsonl:
            return text
        try:
            item = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or one_line(error)
            raise InputError(f"{self.source}, line {self._line(file, start)}: broken JSON ({reason})") from None
        return text_of(item, lambda: f"{self.source}, line {self._line(file, start)}")

    def _line(self, file: IO[bytes], offset: int) -> int:
        """Number of the line that holds this byte: counted when somebody has to be told, not before."""
        file.seek(0)
        line = 1
        while offset > 0 and (block := file.read(min(SCAN, offset))):
            line += block.count(b"\n")
            offset -= len(block)
        return line


def scan(path: Path, source: str, jsonl: bool) -> tuple[str, TextFile]:
    """(sha256 of the file, its index), from one reading in which at most `SCAN` bytes, or one line, are in memory."""
    digest = hashlib.sha256()
    starts = array("q")
    with reading(source), path.open("rb") as file:
        stamp = Stamp.of(file)
        position = 0
        if file.read(3) == _BOM:
            digest.update(_BOM)
            position = 3
        file.seek(position)
        inside = False
        while lines := file.readlines(SCAN):
            digest.update(b"".join(lines))
            for line in lines:
                blank = not 0x20 < line[0] < 0x7F and _blank(line)
                if not blank and (jsonl or not inside):
                    starts.append(position)
                inside = not blank
                position += len(line)
        stamp.check(file, source)
    starts.append(position)
    return digest.hexdigest(), TextFile(path, source, jsonl, np.frombuffer(starts, dtype=np.int64), stamp)


def _blank(line: bytes) -> bool:
    return not line.strip(_SPACE) and not line.decode(errors="replace").strip()


def file_digest(path: Path) -> tuple[str, Stamp]:
    """(sha256 of the file, its stamp)."""
    digest = hashlib.sha256()
    with reading(str(path)), path.open("rb") as file:
        stamp = Stamp.of(file)
        while block := file.read(SCAN):
            digest.update(block)
        stamp.check(file, str(path))
    return digest.hexdigest(), stamp


def read_json(path: Path, stamp: Stamp) -> Held:
    """A list in one JSON file, plain or .gz, held in memory."""
    with reading(str(path)), path.open("rb") as file:
        stamp.check(file, str(path))
        raw = gzip.GzipFile(fileobj=file).read() if path.suffix.lower() == ".gz" else file.read()
    try:
        items = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    except RecursionError as error:
        raise InputError(f"{path}: broken JSON ({one_line(error)})") from None
    if not isinstance(items, list):
        raise InputError(f"{path}: found {type(items).__name__}, expected a list of strings")
    return Held(str(path), items)


def unpack_gz(path: Path, digest: str, stamp: Stamp, jsonl: bool) -> TextFile:
    """What is in a .gz, which cannot be read by number: unpacked into the cache, once."""

    def fill(file: IO[bytes]) -> None:
        with path.open("rb") as packed:
            stamp.check(packed, str(path))
            try:
                shutil.copyfileobj(gzip.GzipFile(fileobj=packed), file, SCAN)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise InputError(f"{path}: cannot be read ({one_line(error)})") from None

    return unpacked(str(path), f"{digest}.{'jsonl' if jsonl else 'txt'}", fill)


def unpacked(source: str, name: str, fill: Callable[[IO[bytes]], None]) -> TextFile:
    """The file `corpora/{name}` of the cache, filled by `fill` where it is not there yet, and indexed."""
    path = cache_root() / "corpora" / name
    if not path.is_file():
        log.info("%s: is unpacked into %s, once: documents are read from there", source, path)
        try:
            write_whole(path, fill)
        except OSError as error:
            raise InputError(
                f"{source}: cannot be unpacked into {path.parent} ({one_line(error)}); make room there, set "
                "REWIRE_CACHE to a folder that can be written to, or unpack it yourself"
            ) from None
    return replace(scan(path, source, path.suffix == ".jsonl")[1], stamp=None)


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, streamed. Nothing is fetched before the first document is asked for."""

    name: str
    config: str | None
    split: str

    def start(self, seed: int | None) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError(
                f"{self.name}: no such file, and a hub data set needs `datasets`: pip install 'rewire[corpora]'"
            ) from None
        try:
            rows: Any = load_dataset(self.name, self.config, split=self.split, streaming=True)
            if seed is not None:
                rows = rows.shuffle(seed=seed, buffer_size=HUB_BUFFER)
            for number, row in enumerate(rows):
                yield text_of(row, lambda: f"{self.name}, row {number}")  # noqa: B023 - asked at once or never
        except InputError:
            raise
        except Exception as error:  # of datasets, httpx, aiohttp, fsspec, pyarrow: not there, no network, a script ...
            raise InputError(f"{self.name}: cannot be streamed from the hub ({one_line(error)})") from error


@contextmanager
def reading(source: str) -> Iterator[None]:
    """What the file system or a packed file says, as an `InputError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read ({one_line(error)})") from None


def has_changed(source: str) -> InputError:
    return InputError(
        f"{source}: has changed since it was indexed; expected a file that stays as it is: run the command again"
    )


def one_line(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return " ".join(reason.split())[:200] or type(error).__name__
