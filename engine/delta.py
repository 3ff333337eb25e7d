"""Updates of weights: kept as factors, written beside the model as `delta.safetensors`, applied in order."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.errors import InputError
from ..kernels.requantize_add import full_precision, requantize_add, share_lost
from .anatomy import writable
from .model import Model, editable

FORMAT = "rewire-delta-1"
FILE = "delta.safetensors"


@dataclass(frozen=True)
class Factors:
    """One weight's update in [d_out, d_in] orientation: left @ right.

    left: [d_out, r] float32; right: [r, d_in] float32, or None where `left` is the dense [d_out, d_in] update
    """

    left: Tensor
    right: Tensor | None

    def dense(self) -> Tensor:
        """[d_out, d_in] float32."""
        if self.right is None:
            return self.left
        with full_precision():
            return self.left @ self.right

    def compact(self) -> "Factors":
        """Dense once the factors would hold more numbers than the product."""
        if self.right is None or self.left.numel() + self.right.numel() <= self.left.shape[0] * self.right.shape[1]:
            return self
        return Factors(self.dense(), None)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def finite(self) -> bool:
        return all(bool(torch.isfinite(part).all()) for part in (self.left, self.right) if part is not None)


def summed(parts: Sequence[Factors]) -> Factors:
    """Their sum, compact."""
    if len(parts) == 1:
        return parts[0]
    sides = [(part.left, part.right) for part in parts if part.right is not None]
    if len(sides) < len(parts):
        return Factors(torch.stack([part.dense() for part in parts]).sum(0), None)
    return Factors(torch.cat([left for left, _ in sides], 1), torch.cat([right for _, right in sides])).compact()


Update = dict[str, Factors]  # weight name -> its factors: what one edit changes


class EditedWeights:
    """The edited weights of one model: W = cast(W0 + update 1 + update 2 + ..., in float32), W0 kept as it was."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.originals: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # W0 + updates in float32, in the weight's own layout
        self.updates: list[Update] = []

    @contextmanager
    def provisional(self) -> Iterator["Provisional"]:
        """`put(name, factors)` inside writes the weight at once; leaving keeps it all, an exception puts all back."""
        put = Provisional(self)
        try:
            yield put
            put.settle()
        except BaseException:
            for name, total in put.before.items():
                self._restore(name, total)
            raise
        self.updates.append(put.update)

    def undo_last(self) -> None:
        """Weights as they were before the last update, bit for bit: the sum is made again without it."""
        for name in self.updates[-1]:
            self._check_untouched(name)
        totals: dict[str, Tensor | None] = {}  # all of them before any weight changes
        for name in self.updates[-1]:
            totals[name] = None
            for update in self.updates[:-1]:
                if name in update:
                    totals[name] = self._add(name, totals[name], update[name])[1]
        for name, total in totals.items():
            self._restore(name, total)
        self.updates.pop()

    @contextmanager
    def originals_in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the unedited ones; afterwards what they were before, bit for bit."""
        edited: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for name, original in self.originals.items():
                    edited[name] = self._parameter(name).detach().clone()
                    self._parameter(name).copy_(original)
            yield
        finally:
            with torch.no_grad():
                for name, weight in edited.items():
                    self._parameter(name).copy_(weight)

    def lost_to_rounding(self) -> dict[str, float]:
        """Weight name -> relative Frobenius norm of what the weight's dtype lost of all updates together."""
        lost = {}
        for name, total in self.sums.items():
            missed = self._parameter(name).detach().to(total.dtype) - total
            lost[name] = share_lost(float(missed.norm()), float((total - self.originals[name]).norm()))
        return lost

    def _add(self, name: str, base: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor, float]:
        """The weight after one more update, its float32 sum, in the weight's own layout, and the share that is lost.

        base: the sum so far; None: of the original alone
        """
        module, original = self._module(name), self.originals[name]
        left, right = factors.left.to(original.device), factors.right
        weight, total, lost = requantize_add(
            oriented(module, self._cast(name, base)),
            left,
            None if right is None else right.to(original.device),
            None if base is None else oriented(module, base),
            keep_total=True,
        )
        assert total is not None
        return oriented(module, weight), oriented(module, total), lost

    def _check_untouched(self, name: str) -> None:
        """What somebody else wrote meanwhile (another session, a training step) is not overwritten."""
        if name in self.originals and not torch.equal(self._parameter(name), self._cast(name, self.sums.get(name))):
            raise InputError(f"{name} was changed by something else since this session wrote it; start a new session")

    def _restore(self, name: str, total: Tensor | None) -> None:
        with torch.no_grad():
            self._parameter(name).copy_(self.originals[name] if total is None else total)
        if total is None:
            self.sums.pop(name, None)
        else:
            self.sums[name] = total

    def _cast(self, name: str, total: Tensor | None) -> Tensor:
        return self.originals[name] if total is None else total.to(self.originals[name].dtype)

    def _module(self, name: str) -> nn.Module:
        return self.model.hf.get_submodule(name.removesuffix(".weight"))

    def _parameter(self, name: str) -> nn.Parameter:
        return self._module(name).weight  # type: ignore[return-value]


class Provisional:
    """One edit's update while it is made.

    before: weight name -> its float32 sum before the edit; parts: weight name -> what was put there since, in order
    """

    def __init__(self, weights: EditedWeights) -> None:
        self.weights = weights
        self.before: dict[str, Tensor | None] = {}
        self.parts: dict[str, list[Factors]] = {}

    @property
    def update(self) -> Update:
        """Behind `settle`."""
        return {name: parts[0] for name, parts in self.parts.items()}

    def __call__(self, name: str, factors: Factors) -> float:
        """Writes one more part of the update; returns the share of it that rounding to the weight's dtype lost
        (relative Frobenius norm). Raises `InputError` where numbers are not finite, or somebody else wrote the weight.
        """
        weights = self.weights
        if not factors.finite():
            raise InputError(f"{name}: its update holds NaN or infinity; no weight was changed")
        if name not in self.parts:
            writable(name, weights._module(name))
            weights._check_untouched(name)
            if name not in weights.originals:
                weights.originals[name] = weights._parameter(name).detach().clone()
            self.before[name] = weights.sums.get(name)
        lost = self._write(name, weights.sums.get(name), factors)
        self.parts.setdefault(name, []).append(factors)
        return lost

    def settle(self) -> dict[str, float]:
        """What was written in parts is written anew as one update: to the bits that the saved delta gives.

        Returns weight name -> the share of its whole update that rounding lost, of those.
        """
        lost = {}
        for name, parts in self.parts.items():
            if len(parts) > 1:
                whole = summed(parts)
                lost[name] = self._write(name, self.before[name], whole)
                parts[:] = [whole]
        return lost

    def _write(self, name: str, base: Tensor | None, factors: Factors) -> float:
        parameter = self.weights._parameter(name)
        weight, total, lost = self.weights._add(name, base, factors)
        if not math.isfinite(lost):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(f"{name}: with its update it holds NaN or infinity in {dtype}; nothing was changed")
        with torch.no_grad():
            parameter.copy_(weight)
        self.weights.sums[name] = total
        return lost


def readable(path: Path) -> None:
    """The mode of an ordinary new file or folder: safetensors leaves its files to their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def oriented(module: nn.Module, change: Tensor) -> Tensor:
    """A [d_out, d_in] change in the layout of the module's weight, and back: `Conv1D` stores [d_in, d_out]."""
    return change.T if isinstance(module, Conv1D) else change


@dataclass(frozen=True)
class Delta:
    """The updates of one or more edits, in order, and what they were made on.

    model: base model's name; fingerprint: of the weights that the first edit was made on
    edits: for each edit what describes it (id, method, preset, hyper-parameters, facts' digest, ...)
    updates: for each edit its factors
    """

    model: str
    fingerprint: str
    edits: Sequence[Mapping[str, Any]]
    updates: Sequence[Update]

    def save(self, folder: str | Path) -> Path:
        """Writes `folder/delta.safetensors`, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for number, update in enumerate(self.updates):
            for name, factors in update.items():
                tensors[f"{number}/{name}/left"] = factors.left.cpu().contiguous()
                if factors.right is not None:
                    tensors[f"{number}/{name}/right"] = factors.right.cpu().contiguous()
        metadata = {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "edits": json.dumps(list(self.edits), ensure_ascii=False),
        }
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, temporary, metadata)
            readable(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """From a file, or a folder that holds `delta.safetensors`. Raises `InputError` for anything else."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(f"{path}: no {FILE} there; expected the --out folder of an edit")
        try:
            with safe_open(file, "pt") as content:
                metadata = content.metadata() or {}
                tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read as a delta ({error}); was it cut off?") from None
        if metadata.get("format") != FORMAT:
            raise InputError(f"{file}: format {metadata.get('format')!r} found, expected {FORMAT!r}")
        try:
            edits = json.loads(metadata["edits"])
            updates: list[Update] = [{} for _ in edits]
            for key in sorted(tensors):
                number, name, part = key.split("/")
                if part == "left":
                    updates[int(number)][name] = Factors(tensors[key], tensors.get(f"{number}/{name}/right"))
            return cls(metadata["model"], metadata["fingerprint"], edits, updates)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{file}: says that it is a delta, but does not hold one ({error!r})") from None

    def check(self, model: Model) -> None:
        """Raises `InputError` for a model that it cannot be applied to: a quantised one, another base model (by its
        fingerprint), one without such a weight, or with another shape of it."""
        editable(model)
        if model.fingerprint != self.fingerprint:
            made_in = ", ".join(sorted({str(edit.get("dtype")) for edit in self.edits}))
            loaded_in = str(next(model.hf.parameters()).dtype).removeprefix("torch.")
            hint = f": try it in {made_in}" if "float16" in (made_in, loaded_in) and made_in != loaded_in else ""
            raise InputError(
                f"the delta was made on {self.model} (fingerprint {self.fingerprint}, in {made_in}); "
                f"{model.name} has other weights (fingerprint {model.fingerprint}, in {loaded_in}){hint}"
            )
        for update in self.updates:
            for name, factors in update.items():
                try:
                    module = model.hf.get_submodule(name.removesuffix(".weight"))
                    weight = module.weight
                except AttributeError:
                    raise InputError(f"the delta changes {name}, which {model.name} does not have") from None
                width = factors.left.shape[1] if factors.right is None else factors.right.shape[1]
                assert isinstance(weight, Tensor)
                found, asked = tuple(weight.shape), (factors.left.shape[0], width)
                if found != (asked[::-1] if isinstance(module, Conv1D) else asked):
                    raise InputError(f"the delta changes {name} as {asked} (out, in); the model's weight is {found}")

    def apply(self, model: Model) -> EditedWeights:
        """Changes the model's weights; all of them or, with an `InputError` (see `check`), none."""
        self.check(model)
        weights = EditedWeights(model)
        try:
            for update in self.updates:
                with weights.provisional() as put:
                    for name, factors in update.items():
                        put(name, factors)
        except BaseException:
            while weights.updates:
                weights.undo_last()
            raise
        return weights
