"""One process, or several under `torchrun`: who takes which block, and sums in the order of the ranks."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """rank, world: this process and how many there are; group: the processes, None where it is alone."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value (picklable, small), in the order of the ranks; on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def same(self, value: T) -> T:
        """The first rank's value, on every rank."""
        return self.gather(value)[0]

    def share(self, value: Tensor | None) -> list[Tensor]:
        """Everybody's tensors, of any size, on the CPU, in the order of the ranks; on every rank. None: has none."""
        if self.world == 1:
            return [] if value is None else [value]
        found = []
        for rank, about in enumerate(self.gather(None if value is None else (tuple(value.shape), value.dtype))):
            if about is None:
                continue
            part = torch.empty(about[0], dtype=about[1])
            if rank == self.rank and value is not None:
                part.copy_(value)
            if part.numel():  # as bytes: some dtypes do not travel
                dist.broadcast(part.view(-1).view(torch.uint8), group=self.group, group_src=rank)
            found.append(part)
        return found

    def sum(self, value: Tensor) -> Tensor:
        """On the first rank the sum of everybody's tensors, added in the order of the ranks; on others their own."""
        if self.world == 1:
            return value
        if not self.first:
            dist.send(value, group=self.group, group_dst=0)
            return value
        total, part = value.clone(), torch.empty_like(value)
        for rank in range(1, self.world):
            dist.recv(part, group=self.group, group_src=rank)
            total += part
        return total


ALONE = Ranks()
PATIENCE = timedelta(days=30)  # one rank may be done long before another


def join() -> Ranks:
    """The processes of `torchrun` (or of a group that is initialised already); `ALONE` where there are none.

    CPU tensors travel by gloo, CUDA tensors by NCCL; each process takes the GPU of its `LOCAL_RANK`.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return ALONE
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    # of our own: objects travel by gloo whatever backend somebody else chose
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = dist.new_group(backend=backend, timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), group)
