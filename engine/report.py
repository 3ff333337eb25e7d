"""What reports say of how they came about."""

import platform
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__


def implementations(served: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Operation -> implementation -> calls."""
    found: dict[str, dict[str, int]] = {}
    for (operation, implementation), calls in sorted(served.items()):
        found.setdefault(operation, {})[implementation] = calls
    return found


def versions() -> dict[str, str | None]:
    """What produced a report: Rewire (with its git commit where it runs from a checkout), Python and the libraries."""
    found: dict[str, str | None] = {"rewire": __version__, "git": _git_hash(), "python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git_hash() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # no git there
        return None
    return asked.stdout.strip() or None
