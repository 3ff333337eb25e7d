"""Target values on disk, as they come: what an interrupted run has done is not done again.

A folder belongs to everything that a value depends on beside its fact: weights, contexts, hyper-parameters, z-layer,
dtype, tokenizer. Each round leaves one file with the facts that it finished and the state of those that still go, each
under its own key; a run that ends well makes one file of them.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..stats.cache import ABANDONED, write_whole
from ..stats.tokens import tokenizer_digest
from .facts import Fact
from .hparams import Hparams
from .model import Model
from .objective import MEMIT, Objective
from .statistics import encode
from .value_steps import Table, pick, stack

log = logging.getLogger("rewire")

# of the files, and of how values are found (`value_steps`, `value_groups`, prompts): who changes what a value comes out
# as counts on, and so leaves the older ones alone
FORMAT = 2
ENTERS = ("fact_token", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor")
DONE, STATE = "done", "state"
_ROUND, _WHOLE = "round", "values"  # how names of files begin
_FOLDED = 64  # rows whose columns are folded together: few enough for the caches, a power of two
_NOTHING = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")  # of a config that changes no value
_BROKEN = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError)


def fact_key(fact: Fact, neighbors: bool = False) -> str:
    """24 hex digits over what is asked for; two facts that ask for the same have one value.

    neighbors: what the fact's edit-time neighbours ask for counts too
    """
    asked = [fact.prompt, fact.subject, fact.target_new]
    asked += [text for n in fact.edit_neighbors for text in (n.prompt, n.subject, n.target)] if neighbors else []
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:24]


def chained_keys(facts: Sequence[Fact], before: str, neighbors: bool = False) -> list[str]:
    """Keys of values that each see the edits of the facts before; before: says what else changed the weights."""
    keys = []
    for fact in facts:
        before = hashlib.sha256(f"{before} {fact_key(fact, neighbors)}".encode()).hexdigest()[:24]
        keys.append(before)
    return keys


def value_folder(model: Model, contexts: Sequence[str], hparams: Hparams, objective: Objective = MEMIT) -> str:
    """Name of the folder of values of this model as it is now: 24 hex digits over everything but the fact."""
    config: Any = model.hf.config
    content = {
        "format": FORMAT,
        "weights": weights_digest(model),
        "config": {key: value for key, value in config.to_dict().items() if key not in _NOTHING},
        "transformers": transformers.__version__,
        "contexts": list(contexts),
        "hparams": {name: getattr(hparams, name) for name in ENTERS},
        "objective": asdict(objective) | {"compat": objective.compat and objective.neighbors},
        "z_layer": hparams.layers[-1],
        "dtype": str(next(model.hf.parameters()).dtype),
        "tokenizer": tokenizer_digest(lambda texts: encode(model, texts)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]


def weights_digest(model: Model) -> str:
    """Over all weights as they are now, every number of them: earlier edits, and what anybody else changed, count.

    Of each row and each column the XOR of its numbers' bits, which a machine finds as fast as it reads. The
    fingerprint's samples tell what cancels out (a sign that changes everywhere).
    """
    parts = hashlib.sha256(model.fingerprint.encode())
    for name, weight in sorted(model.hf.named_parameters()):
        parts.update(f"{name}:{tuple(weight.shape)}".encode())
        if weight.is_meta:  # accelerate keeps it elsewhere: it is not there to be read
            continue
        numbers = weight.detach().reshape(-1, weight.shape[-1] if weight.ndim else 1).contiguous()
        for found in (torch.hash_tensor(numbers, dim=1), _column_bits(numbers)):
            parts.update(found.cpu().view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


def _column_bits(numbers: Tensor) -> Tensor:
    """[columns], the XOR of each column's bits (`torch.hash_tensor` takes ten times as long in that direction)."""
    bits = numbers.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])
    found = bits.new_zeros(_FOLDED, bits.shape[1])
    for rows in bits.split(_FOLDED):
        found[: len(rows)] ^= rows
    while len(found) > 1:
        found = found[::2] ^ found[1::2]
    return found[0]


class ValueStore:
    """The files of one folder.

    width: of a value, variables * d_model; forwards: of a fact at most: files that say otherwise are broken
    A file that is broken is named in a warning and left alone; where the folder cannot be written to, that is said once
    and nothing more is written.
    """

    def __init__(self, folder: Path, width: int, forwards: int) -> None:
        self.folder = folder
        self.width, self.forwards = width, forwards
        self.writable = True
        self.broken: set[Path] = set()

    def read(self, keys: Sequence[str]) -> tuple[dict[str, Table], dict[str, Table]]:
        """Of these facts, those that are done: key -> what is known (a row), and those with a state: the furthest."""
        wanted = set(keys)
        done: dict[str, Table] = {}
        states: dict[str, Table] = {}
        seen: set[Path] = set()
        while new := [path for path in self._files(_ROUND, _WHOLE) if path not in seen]:  # another run may merge them
            seen.update(new)
            for path in new:
                for part, key, row in self._rows(path, wanted):
                    if part == DONE:
                        done.setdefault(key, row)
                    elif key not in states or int(row["step"]) > int(states[key]["step"]):
                        states[key] = row
        return done, {key: row for key, row in states.items() if key not in done}

    def add(self, done: tuple[Sequence[str], Table], states: tuple[Sequence[str], Table]) -> None:
        """A round's file: facts that are done, and the states of those that still go, each (keys, a row a key)."""
        self._write(_ROUND, {DONE: done, STATE: states})

    def merge(self) -> None:
        """One file of all rounds' files that can be read; done when a run is through."""
        paths = self._files(_ROUND)
        if len(paths) < 2 or not self.writable:
            return
        found: dict[str, dict[str, Table]] = {DONE: {}, STATE: {}}
        read = []
        for path in paths:
            rows = self._rows(path, None)
            if rows:
                read.append(path)
            for part, key, row in rows:
                known = found[part].get(key)
                if known is None or (part == STATE and int(row["step"]) > int(known["step"])):
                    found[part][key] = row
        found[STATE] = {key: row for key, row in found[STATE].items() if key not in found[DONE]}
        parts = {part: (list(rows), stack(list(rows.values()))) for part, rows in found.items() if rows}
        if len(read) > 1 and self._write(_WHOLE, parts):
            abandoned = (path for path in self.folder.glob("*.tmp") if time.time() - path.stat().st_mtime > ABANDONED)
            with contextlib.suppress(OSError):  # somebody else's, or somebody was faster: they are read once more
                for path in (*read, *abandoned):
                    path.unlink(missing_ok=True)

    def _files(self, *kinds: str) -> list[Path]:
        return sorted(path for kind in kinds for path in self.folder.glob(f"{kind}-*.safetensors"))

    def _write(self, kind: str, parts: Mapping[str, tuple[Sequence[str], Table]]) -> bool:
        parts = {part: (keys, table) for part, (keys, table) in parts.items() if keys}
        if not self.writable or not parts:
            return False
        tensors = {
            f"{part}/{name}": column.cpu().contiguous()
            for part, (_, table) in parts.items()
            for name, column in table.items()
        }
        about = {"format": str(FORMAT), "keys": json.dumps({part: list(keys) for part, (keys, _) in parts.items()})}
        content = save(tensors, about)
        path = self.folder / f"{kind}-{secrets.token_hex(8)}.safetensors"
        try:
            write_whole(path, lambda file: file.write(content))
        except OSError as error:
            self.writable = False
            said = "%s: cannot be written to (%s): values are not kept; set REWIRE_CACHE to another folder"
            log.warning(said, self.folder, error.strerror or error)
            return False
        return True

    def _rows(self, path: Path, wanted: set[str] | None) -> list[tuple[str, str, Table]]:
        """(part, key, row) of the wanted facts in a file, None: of all; nothing of one that is broken or gone."""
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, Any] = file.metadata() or {}
                keys: dict[str, list[str]] = json.loads(about["keys"])
                held = {
                    part: [i for i, key in enumerate(of) if wanted is None or key in wanted]
                    for part, of in keys.items()
                }
                names = {part: [name for name in file.keys() if name.startswith(f"{part}/")] for part in keys}  # noqa: SIM118
                found = []
                for part, chosen in held.items():
                    if not chosen:
                        continue
                    table = {name.partition("/")[2]: file.get_tensor(name) for name in names[part]}
                    self._check(part, table, len(keys[part]))
                    found += [(part, keys[part][i], pick(table, [i])) for i in chosen]
                return found
        except FileNotFoundError:  # another run has merged it meanwhile
            return []
        except _BROKEN as error:
            if path not in self.broken:
                log.warning("%s: broken (%s); it is ignored", path, " ".join(str(error).split())[:120])
            self.broken.add(path)
            return []

    def _check(self, part: str, table: Table, rows: int) -> None:
        """Raises `ValueError` or `KeyError` where a part is not what this version writes."""
        wide = {DONE: ("Z", "h0"), STATE: ("delta", "m", "v", "h0")}[part]
        numbers = {DONE: ("first_nll", "last_nll", "loss", "steps"), STATE: ("first_nll", "step", "certain")}[part]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(wide, (rows, self.width))
        shapes |= dict.fromkeys(numbers, (rows,)) | {"losses": (rows, self.forwards)}
        for name, shape in shapes.items():
            if tuple(table[name].shape) != shape:
                raise ValueError(f"{part}/{name} is {tuple(table[name].shape)}, expected {shape}")
        for name in (*wide, *(("first",) if part == STATE else ())):
            _finite(part, name, table[name])


def _finite(part: str, name: str, column: Tensor) -> None:
    if not torch.isfinite(column).all():
        raise ValueError(f"{part}/{name} holds NaN or infinity")
