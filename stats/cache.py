"""Where Rewire keeps what it can make again, and how a file gets there whole."""

import os
import secrets
import time
from collections.abc import Callable
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
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
        except OSError:  # somebody else was faster
            pass
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
