"""Where a collection stands, on disk: after `kill -9` the same command goes on, to the same last bit.

Each rank keeps its own sums, so that when a checkpoint is written has no say in the result. A generation counts once
every rank has written it; the one before goes only then.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .ranks import Ranks

log = logging.getLogger(__name__)

_NAME = re.compile(r"rank(\d+)of(\d+)-(\d+)\.safetensors")


@dataclass(frozen=True)
class Position:
    """block: the next one; tokens, documents: taken so far, by all ranks; the rest must stay as it was at the start.

    per_block: documents of a block; batch_tokens, packed, place: how the forwards and sums are made
    seconds: spent so far; next_check: tokens at which a tolerance is looked at again
    """

    block: int
    tokens: int
    documents: int
    per_block: int
    batch_tokens: int
    packed: bool
    place: str
    seconds: float = 0.0
    next_check: int = 0


class Checkpoint:
    """The checkpoints of one request, in a folder of their own."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks

    def load(self) -> tuple[Position, dict[str, Tensor]] | None:
        """The newest position that every rank holds, with this rank's tensors; None where there is none."""
        _remove_leftovers(self.folder)
        mine = self._generations()
        common = set.intersection(*(set(blocks) for blocks in self.ranks.gather(list(mine))))
        for block in sorted(common, reverse=True):
            found = self._read(mine[block])
            if all(self.ranks.gather(found is not None)):
                return found
        return None

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> bool:
        """Whether every rank has written it; where one could not (a full disk), the generation before stays."""
        path = self.folder / f"rank{self.ranks.rank}of{self.ranks.world}-{position.block}.safetensors"
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, temporary, {"position": json.dumps(asdict(position))})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # the generation before goes soon
            temporary.replace(path)
            written = True
        except (OSError, SafetensorError) as error:
            log.warning("%s: a checkpoint could not be written (%s); going on without it", self.folder, error)
            written = False
        finally:
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)
        whole = all(self.ranks.gather(written))
        for old in self._generations().values():
            if (old != path) == whole:  # the ones before; or this one, where another rank has none
                old.unlink(missing_ok=True)
        return whole

    def _generations(self) -> dict[int, Path]:
        """This rank's files, by the block that they stand before."""
        found: dict[int, Path] = {}
        for path in sorted(self.folder.glob("rank*.safetensors")):
            name = _NAME.fullmatch(path.name)
            if name and (int(name[1]), int(name[2])) == (self.ranks.rank, self.ranks.world):
                found[int(name[3])] = path
        return found

    def _read(self, path: Path) -> tuple[Position, dict[str, Tensor]] | None:
        try:
            with safe_open(path, "pt") as file:
                known: dict[str, Any] = json.loads(file.metadata()["position"])
                return Position(**known), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: a checkpoint that cannot be read (%s), not used", path, error)
            return None


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of processes that died."""
    for path in folder.glob("*.tmp"):
        name = re.search(r"\.(\d+)\.tmp$", path.name)
        if name and not _alive(int(name[1])):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
