"""Where and with what something was measured: the chip, versions, and the names that a user gives them by."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..kernels.errors import InputError


def find_device(name: str | torch.device) -> torch.device:
    """Raises InputError: there is no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(name)!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(name)!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs")
    return device


def find_dtype(name: str) -> torch.dtype:
    """Raises InputError: none that is benchmarked."""
    names = ("bfloat16", "float16", "float32", "float64")
    if name not in names:
        raise InputError(f"dtype {name!r}; expected one of {', '.join(names)}")
    found: torch.dtype = getattr(torch, name)
    return found


def about(device: torch.device) -> dict[str, Any]:
    """Where and with what: goes into every report."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else "",
        "rewire": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return found


def device_name(device: torch.device) -> str:
    """The chip's: of a CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model na")
        ]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def _git() -> str:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    sha = _said("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    return sha + ("+" if sha and _said("git", "-C", str(root), "status", "--porcelain") else "")  # +: changed since


def _said(*words: str) -> str:
    """First line of a command's stdout, "" if it cannot be run."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
