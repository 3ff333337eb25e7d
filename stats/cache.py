"""Where Rewire keeps what it can make again, and how a file gets there whole."""

import glob
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ABANDONED = 3600.0  # seconds without a write after which a temporary file is a dead process's


def cache_root() -> Path:
    """`$REWIRE_CACHE`, or ~/.cache/rewire."""
    return Path(os.environ.get("REWIRE_CACHE") or Path.home() / ".cache" / "rewire")


def write_whole(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Makes `path` (and its folder): `fill` writes to a temporary name beside it, which is renamed once on the disk.

    Several processes, on several machines, may write the same path at once. What `fill` raises goes through, and
    `OSError`; then nothing is left behind. A killed process' temporary file goes with a later write of the same path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, fill) as temporary:
        temporary.replace(path)


@contextmanager
def new_file(path: Path, fill: Callable[[IO[bytes]], Any]) -> Iterator[Path]:
    """A temporary file with the content of `path`-to-be, which is gone afterwards unless it was renamed.

    An `OSError` has the name of `path`: a write does not know its file, an open only the temporary one.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
        except OSError:  # somebody else was faster
            pass
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)
            raise
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
