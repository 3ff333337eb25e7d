"""What is free, and where running sums go that do not fit beside a model."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

GROUP = Path("/sys/fs/cgroup")  # of this process, where it is in a container
SHARE = 0.6  # of the free memory that running sums may take; the rest is the forward's


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container's limit, where there is one
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        held = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        files = int(held["active_file"]) + int(held["inactive_file"])  # read once, given back when it is asked for
        available = min(available, limit - used + files)
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's other processes need theirs


def choose_place(widths: Mapping[str, int], device: torch.device) -> str:
    """Where the float64 sums of layers (name -> d_in) go: "device", "cpu" or "disk", the first that they fit into.

    On the device every layer also has its own float32 chunk [d, d]; elsewhere layers of one width share one there.
    """
    return place_for(widths, device, free_bytes(device), free_bytes(torch.device("cpu")))


def place_for(widths: Mapping[str, int], device: torch.device, left: int, cpu: int) -> str:
    """The same where `left` bytes will be free on the device, and `cpu` on the CPU."""
    sums = sum(4 * d * d for d in widths.values())
    if 2 * sums < SHARE * left:
        return "device"
    chunk = 4 * max(widths.values()) ** 2 if device.type == "cpu" else 0
    return "cpu" if sums + chunk < SHARE * cpu else "disk"
