"""What an edit spends its time on: seconds of each phase, and progress for whoever watches."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tick = Callable[[int, int], None]  # (done, total)
Listener = Callable[[str, int, int], None]  # (phase, done, total)


def silent(phase: str, done: int, total: int) -> None:
    """Nobody watches."""


class Phases:
    """`with phases("values") as tick:` adds to `seconds["values"]`; `tick(done, total)` tells the listener."""

    def __init__(self, listener: Listener = silent) -> None:
        self.listener = listener
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Tick]:
        start = time.perf_counter()
        try:
            yield lambda done, total: self.listener(phase, done, total)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
