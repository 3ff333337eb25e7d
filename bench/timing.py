"""Times that mean something: inputs rotated past the caches, variants interleaved, warmed up by time.

Below the command line this needs torch only.
"""

import copy
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[Any], object]

CPU_CACHE = 64 * 2**20  # more than the last level of most
SAMPLE = 1e-4  # seconds that a sample takes at least: shorter calls are repeated
MOST_COPIES = 256
MOST_SAMPLES = 400
MOST_LEAD = 0.02  # seconds that a GPU is kept busy so that the host runs ahead of it


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile; samples: how many of them there are."""

    p50: float
    p20: float
    p80: float
    samples: int


def measure(
    calls: Mapping[str, Call],
    copies: Sequence[Any],
    device: torch.device,
    seconds: float = 0.5,
    warm: float = 0.1,
    least: int = 5,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time `calls` in turn (A, B, C, A, B, C, ...), each call on the next of `copies`; returns timings and failures.

    seconds: for each of them, about; warm: the same before that; least: rounds, however long they take

    On a GPU between CUDA events, and the host is let ahead, so that the cost of launches is not in it, unless a call
    itself waits for the GPU.
    """
    following = itertools.cycle(copies)
    repeats: dict[str, int] = {}
    failures: dict[str, Exception] = {}
    for name, call in calls.items():
        try:
            repeats[name] = math.ceil(SAMPLE / _warm_up(call, following, device, warm))
        except Exception as error:  # of one variant: the others are still worth their time
            failures[name] = error.with_traceback(None)  # which would keep its tensors
    running = {name: calls[name] for name in repeats}
    samples: dict[str, list[float]] = {name: [] for name in running}
    lead, start = 0.0, time.perf_counter()
    while running and len(next(iter(samples.values()))) < MOST_SAMPLES:
        if device.type == "cuda":
            found, lead = _cuda_round(running, repeats, following, lead)
        else:
            found = _cpu_round(running, repeats, following)
        for name, value in found.items():
            samples[name].append(value)
        enough = len(next(iter(samples.values()))) >= least
        if enough and time.perf_counter() - start > seconds * len(running):
            break
    return {name: _percentiles(values) for name, values in samples.items()}, failures


def single(call: Callable[[], object], device: torch.device) -> Timing:
    """Of what takes too long to be done twice; whoever calls has done it once before."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    seconds = time.perf_counter() - start
    return Timing(seconds, seconds, seconds, 1)


def _warm_up(call: Call, following: Iterator[Any], device: torch.device, warm: float) -> float:
    """Seconds of a call, the first one left out: it compiles, or picks an algorithm."""
    call(next(following))
    _wait(device)
    start, count = time.perf_counter(), 0
    while True:
        call(next(following))
        _wait(device)
        count += 1
        passed = time.perf_counter() - start
        if passed >= warm:
            return passed / count


def _cpu_round(running: Mapping[str, Call], repeats: Mapping[str, int], following: Iterator[Any]) -> dict[str, float]:
    found = {}
    for name, call in running.items():
        start = time.perf_counter()
        for _ in range(repeats[name]):
            call(next(following))
        found[name] = (time.perf_counter() - start) / repeats[name]
    return found


def _cuda_round(
    running: Mapping[str, Call], repeats: Mapping[str, int], following: Iterator[Any], lead: float
) -> tuple[dict[str, float], float]:
    """Seconds of each, and how long the host took to launch the round: the lead that the next one gets."""
    torch.cuda._sleep(int(lead * 2e9))  # cycles of some 2 GHz: the GPU must not wait for the host inside a sample
    events = {}
    start = time.perf_counter()
    for name, call in running.items():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats[name]):
            call(next(following))
        end.record()
        events[name] = begin, end
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    found = {name: begin.elapsed_time(end) / 1e3 / repeats[name] for name, (begin, end) in events.items()}
    return found, min(1.2 * launched, MOST_LEAD)


def _percentiles(values: Sequence[float]) -> Timing:
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return Timing(p50, p20, p80, len(values))


def rotation(inputs: Any, device: torch.device, cache: int | None = None) -> list[Any]:
    """`inputs` and as many copies as together pass three times the last-level cache, and fit a quarter of memory.

    cache: bytes; default: of the device
    """
    if cache is None:
        cache = CPU_CACHE
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CPU_CACHE)
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30
    each = max(1, tensor_bytes(inputs))
    count = min(math.ceil(3 * cache / each), 1 + room // each, MOST_COPIES)
    return [inputs, *(copy.deepcopy(inputs) for _ in range(count - 1))]  # which keeps strides and gaps


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors inside."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(each) for each in value.values())
    if isinstance(value, (tuple, list)):
        return sum(tensor_bytes(each) for each in value)
    return tensor_bytes(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else 0


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that a call holds at once beyond what was there before it: by the allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with _Held() as held:
        call()
    return held.most


class _Held(TorchDispatchMode):
    """Bytes held on a CPU, from operator to operator: what one takes and gives back inside itself is not seen."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else entering the mode imports all of the compiler: seconds

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in filter(_is_tensor, tree_leaves((args, kwargs))):
            self.known.add(tensor.untyped_storage()._cdata)  # there before, or counted when it was made
        made = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
