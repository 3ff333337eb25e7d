"""Text to collect statistics over: a file of documents, or a data set of the Hugging Face hub, as a stream."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..kernels.errors import InputError

# what the published presets call their corpora: the hub's names today (bare names no longer load)
HUB_ALIASES = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_NAME = re.compile(r"\.(txt|jsonl?|gz|csv|tsv|parquet)$", re.I)


@dataclass(frozen=True)
class Corpus:
    """Documents, read anew at each iteration; those without text in them are left out.

    name: slug, names the folder of its statistics
    digest: 12 hex digits of sha256: of a file's bytes, or of a hub data set's "id/config/split"
    source: the path or hub id, for errors
    read: gives the documents, blank ones included

    Iterating raises `InputError` where the source cannot be read or holds no document.
    """

    name: str
    digest: str
    source: str
    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        empty = True
        for document in self.read():
            if document.strip():
                empty = False
                yield document.encode(
                    errors="replace"
                ).decode()  # JSON may hold lone surrogates, tokenizers refuse them
        if empty:
            raise InputError(f"{self.source}: no document with text in it; expected at least one")


def read_corpus(source: str | Path, config: str | None = None, split: str = "train") -> Corpus:
    """A corpus from a file or from the hub. Nothing but a file's digest is read before it is iterated.

    source: a file, plain or .gz: text (documents separated by blank lines), .json (a list, held in memory whole) or
        .jsonl, both of strings or of objects with a `text`; or the id of a hub data set with a `text` column
        ("org/name", "wikipedia", "wikitext"), which is streamed and needs `rewire[corpora]`
    config, split: of a hub data set
    Raises `InputError` where `source` is neither.
    """
    path = Path(source)
    if path.is_file():
        kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        reader = {".json": _json, ".jsonl": _jsonl}.get(kind.lower(), _paragraphs)
        return Corpus(_slug(path.name.split(".")[0]), _file_digest(path), str(source), lambda: _file(path, reader))
    text = str(source)
    if path.is_dir():
        raise InputError(f"{text}: is a folder; expected a file (.txt, .json, .jsonl, plain or .gz) or a hub id")
    if text in HUB_ALIASES:
        text, default = HUB_ALIASES[text]
        config = config or default
    elif not _HUB_ID.fullmatch(text) or _FILE_NAME.search(text):
        raise InputError(f"{text}: no such corpus; expected a file (.txt, .json, .jsonl, plain or .gz) or a hub id")
    digest = hashlib.sha256(f"{text}/{config}/{split}".encode()).hexdigest()[:12]
    return Corpus(_slug(text.split("/")[-1]), digest, text, lambda: _hub(text, config, split))


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "corpus"


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:12]


def _file(path: Path, reader: Callable[[Path, IO[str]], Iterator[str]]) -> Iterator[str]:
    try:
        open_ = gzip.open if path.suffix == ".gz" else open
        with open_(path, "rt", encoding="utf-8-sig") as file:
            yield from reader(path, file)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)})") from None


def _paragraphs(path: Path, file: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in file:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def _json(path: Path, file: IO[str]) -> Iterator[str]:
    try:
        items = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    if not isinstance(items, list):
        raise InputError(f"{path}: found {type(items).__name__}, expected a list of strings")
    for index, item in enumerate(items):
        yield _text(item, f"{path}, item {index}")


def _jsonl(path: Path, file: IO[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: broken JSON ({error.msg})") from None
        yield _text(item, f"{path}, line {number}")


def _hub(name: str, config: str | None, split: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"{name}: no such file, and a hub data set needs `datasets`: pip install 'rewire[corpora]'"
        ) from None
    try:
        for number, row in enumerate(load_dataset(name, config, split=split, streaming=True)):
            yield _text(row, f"{name}, row {number}")
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # not there, no network, no such config or split, a script
        raise InputError(f"{name}: cannot be streamed from the hub ({_one_line(error)})") from None


def _text(item: Any, where: str) -> str:
    found = item.get("text") if isinstance(item, dict) else item
    if not isinstance(found, str):
        what = f"an object with {', '.join(map(str, item))}" if isinstance(item, dict) else type(item).__name__
        raise InputError(f"{where}: found {what}, expected a string or an object with a string as `text`")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
