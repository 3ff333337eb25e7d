"""What an edit holds and takes, phase by phase, and a cache of its own while it is measured."""

import contextlib
import ctypes
import gc
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch

from ..engine.editors.registry import Job, Method, Outcome
from ..engine.phases import Listener, Phases, Tick, silent

LOOK = 1e-3  # seconds between two looks at the resident memory


def hand_back() -> None:
    """What was freed and the C library has kept goes back to the system, so that it counts when it is taken again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # of glibc
        ctypes.CDLL(None).malloc_trim(0)


def held_bytes(device: torch.device) -> int:
    """Of the allocator on a GPU, else what of this process lies in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


@contextmanager
def most_held(device: torch.device, look: float = LOOK) -> Iterator[Callable[[], int]]:
    """The most bytes that were held inside; the function that is given says how many, also afterwards."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        found: list[int] = []
        yield lambda: found[0] if found else torch.cuda.max_memory_allocated(device)
        torch.cuda.synchronize(device)  # the time of what was launched inside belongs there, too
        found.append(torch.cuda.max_memory_allocated(device))
        return
    memory = psutil.Process().memory_info
    most = memory().rss
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(look):
            most = max(most, memory().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most
        most = max(most, memory().rss)
    finally:
        over.set()
        thread.join()


class Watch(Phases):
    """Phases whose most bytes are kept: `peaks[phase]`, beyond what was held when this was made.

    job: the edit's, once a method that `watching` gave has begun
    """

    def __init__(self, device: torch.device, listener: Listener = silent) -> None:
        super().__init__(listener)
        self.device = device
        self.peaks: dict[str, int] = {}
        self.job: Job | None = None
        self._before = held_bytes(device)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Tick]:
        with super().__call__(phase) as tick, most_held(self.device, 10 * LOOK) as most:
            yield tick
        self.peaks[phase] = max(self.peaks.get(phase, 0), most() - self._before)


def watching(method: Method, watch: Watch, given: Callable[[Job], Job]) -> Method:
    """The method with its phases watched, on what `given` makes of the session's job."""

    def check(job: Job) -> None:
        method.check(given(replace(job, phases=watch)))

    def edit(job: Job) -> Outcome:
        watch.job = given(replace(job, phases=watch))
        return method.edit(watch.job)

    return replace(method, check=check, edit=edit)


@contextmanager
def own_cache() -> Iterator[None]:
    """Nothing that earlier runs have kept is found inside, and nothing stays."""
    before = os.environ.get("REWIRE_CACHE")
    with tempfile.TemporaryDirectory(prefix="rewire-bench-") as folder:
        os.environ["REWIRE_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["REWIRE_CACHE"]
            else:
                os.environ["REWIRE_CACHE"] = before
