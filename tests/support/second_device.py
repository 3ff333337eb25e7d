"""A second device on a machine that has one: its tensors hold numbers, and mix with the CPU's as little as a GPU's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import rewire

SECOND = torch.device("lazy:0")  # what its tensors say: a kind that torch guards, and nobody asks for


class Away(Tensor):
    """On the second device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Away":
        made: Away = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=SECOND
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class _Machine(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, shape = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    away = any(isinstance(tensor, Away) for tensor in tensors)
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if away and not moves and any(not isinstance(tensor, Away) and tensor.ndim for tensor in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found two")
    place = kwargs.get("device")
    gives = (away if place is None else torch.device(place) == SECOND) and not (
        func is torch.ops.aten.copy_.default and not isinstance(args[0], Away)
    )
    asked: Any = tree_unflatten([value.inner if isinstance(value, Away) else value for value in flat], shape)
    if place is not None and torch.device(place) == SECOND:
        asked[1]["device"] = torch.device("cpu")
    known = {id(value.inner): value for value in flat if isinstance(value, Away)}  # in place, it stays what it is
    found = func(*asked[0], **asked[1])

    def wrap(value: Any) -> Any:
        if not gives or not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Away(value)

    return tree_map(wrap, found)


class _Literals(TorchFunctionMode):
    """What asks no dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


@contextmanager
def two_devices() -> Iterator[None]:
    """Inside, `SECOND` computes."""
    with _Literals(), _Machine():
        yield


def placed(model: rewire.Model, away: set[int]) -> rewire.Model:
    """The model by accelerate: the blocks `away` on the second device, all else on the CPU."""
    hf: Any = model.hf
    blocks = model.anatomy.blocks
    places: dict[str, Any] = {f"{blocks}.{i}": SECOND if i in away else "cpu" for i in range(model.anatomy.n_layers)}
    for path, part in hf.named_modules():
        if not any(part.children()) and not path.startswith(f"{blocks}."):
            places[path] = "cpu"
    accelerate.dispatch_model(hf, places, main_device="cpu", force_hooks=True)
    return rewire.wrap(hf, model.tokenizer, model.name)
