"""Text to collect statistics over: a file of documents, or a data set of the Hugging Face hub, as a stream."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..kernels.errors import InputError
from .documents import Documents, Drawn, Stream, Streamed, Texts, clean, no_text
from .parquet import list_parquet, read_parquet
from .sources import Hub, file_digest, read_json, scan, unpack_gz

# what the published presets call their corpora: the hub's names today (bare names no longer load)
HUB_ALIASES = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_NAME = re.compile(r"\.(txt|jsonl?|gz|csv|tsv|parquet)$", re.I)
_EXPECTED = "expected a file (.txt, .json, .jsonl, plain or .gz, or .parquet), a folder of .parquet files or a hub id"


@dataclass(frozen=True)
class Corpus:
    """Documents. Iterating gives those with text in them, in the corpus' own order, read anew each time.

    name: slug, names the folder of its statistics
    digest: 12 hex digits of sha256: of a file's bytes (of several files: of their digests, in the order of their
        names), or of a hub data set's "id/config/split"
    source: the path or hub id, for errors
    read: gives what documents are read from, always the same

    Raises `InputError` where the source cannot be read, has changed since its digest was taken, or holds no document.
    """

    name: str
    digest: str
    source: str
    read: Callable[[], Texts | Stream]

    def __iter__(self) -> Iterator[str]:
        source, empty = self.read(), True
        for document in source.start(None) if isinstance(source, Stream) else source:
            if document.strip():
                empty = False
                yield from clean([document])
        if empty:
            raise no_text(self.source)

    def documents(self, seed: int | None, shard: tuple[int, int] = (0, 1)) -> Documents:
        """All documents, blank ones too, in an order that can be read from any position.

        seed: of a permutation of the corpus (of a stream: shuffled as far as its buffer reaches); the same for the same
            corpus and seed, so that a longer sample extends a shorter one, and any is spread over the whole. None: the
            corpus' own order
        shard: (i, n): positions i, i + n, i + 2 n ... of that order
        """
        index, count = shard
        if not 0 <= index < count:
            raise ValueError(f"shard {index} of {count}, expected 0 to {count - 1}")
        source = self.read()
        if isinstance(source, Stream):
            return Streamed(source, self.source, seed, shard)
        return Drawn(source, self.source, seed, shard)


def read_corpus(source: str | Path, config: str | None = None, split: str = "train") -> Corpus:
    """A corpus from files or from the hub. Files are read once, for their digest and the places of their documents.

    source: a file, plain or .gz: text (documents separated by blank lines), .jsonl, or .json (a list, held in memory
        whole), both of strings or of objects with a `text`; a .parquet file or a folder of them, with a column `text`
        (needs pyarrow); or the id of a hub data set with a `text` column ("org/name", "wikipedia", "wikitext"), which
        is streamed. The last two need `rewire[corpora]`. What cannot be read by number (.gz, parquet of large row
        groups) is unpacked into the cache when documents are first asked for
    config, split: of a hub data set
    Raises `InputError` where `source` is none of these.
    """
    path = Path(source)
    if path.is_file():
        return _from_parquet(path, [path]) if path.suffix.lower() == ".parquet" else _from_file(path)
    text = str(source)
    if path.is_dir():
        if files := list_parquet(path):
            return _from_parquet(path, files)
        raise InputError(f"{text}: is a folder without .parquet files; {_EXPECTED}")
    if text in HUB_ALIASES:
        text, default = HUB_ALIASES[text]
        config = config or default
    elif not _HUB_ID.fullmatch(text) or _FILE_NAME.search(text):
        raise InputError(f"{text}: no such corpus; {_EXPECTED}")
    digest = hashlib.sha256(f"{text}/{config}/{split}".encode()).hexdigest()
    return Corpus(_slug(text.split("/")[-1]), digest[:12], text, lambda: Hub(text, config, split))


def _from_file(path: Path) -> Corpus:
    packed = path.suffix.lower() == ".gz"
    kind = (Path(path.stem) if packed else path).suffix.lower()
    if kind == ".json":
        digest, stamp = file_digest(path)
        return _corpus(path, digest, cache(lambda: read_json(path, stamp)))
    if packed:
        digest, stamp = file_digest(path)
        return _corpus(path, digest, cache(lambda: unpack_gz(path, digest, stamp, kind == ".jsonl")))
    digest, found = scan(path, str(path), kind == ".jsonl")
    return _corpus(path, digest, lambda: found)


def _from_parquet(path: Path, files: list[Path]) -> Corpus:
    digests, stamps = zip(*map(file_digest, files), strict=True)
    digest = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return _corpus(path, digest, cache(lambda: read_parquet(str(path), files, stamps, digest)))


def _corpus(path: Path, digest: str, read: Callable[[], Texts]) -> Corpus:
    return Corpus(_slug(path.name.split(".")[0]), digest[:12], str(path), read)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "corpus"
