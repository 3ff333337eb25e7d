"""Deltas beside the weights: many edits evaluated in one forward, each row under its own, no weight written."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.delta_linear import add_delta_
from ..kernels.errors import InputError
from .anatomy import widths
from .delta import Factors, Update
from .model import Model
from .passes import forward_bytes, hooks, tokens_that_fit
from .prompts import Row
from .scores import token_scores


@dataclass(frozen=True)
class _Stack:
    """The factors of all deltas that change one weight, on its device.

    left: [G, d_out, r], right: [G, r, d_in] float32, lower ranks padded with zeros
    place: [deltas + 1] int64, where each delta stands in them, -1 where it leaves the weight alone; the last is -1
    """

    module: nn.Module
    left: Tensor
    right: Tensor
    place: Tensor


class Beside:
    """Inside `with`, the model computes each row of a batch as if its delta were written into the weights.

    Hooks add what the deltas change to the outputs of the projections, so quantised ones work too, and nothing of the
    model is written. `owner` says which delta each row of the forwards to come has, and must be set before the first::

        with Beside(model, deltas) as beside, torch.no_grad():
            beside.owner = torch.tensor([0, 0, 2, -1])  # -1: the unedited model
            model.hf(input_ids)  # [4, T], rows in that order

    Raises `InputError` for a delta that does not fit the model, is dense, or holds NaN.
    """

    def __init__(self, model: Model, deltas: Sequence[Update]) -> None:
        self.count = len(deltas)
        names = dict.fromkeys(name for update in deltas for name in update)
        self._stacks = {name: _stack(model, name, deltas) for name in names}
        self._owner: Tensor | None = None
        self._groups: dict[str, Tensor] = {}
        self._open = ExitStack()

    @property
    def owner(self) -> Tensor | None:
        """[rows] int64, the number of each row's delta, -1 for none."""
        return self._owner

    @owner.setter
    def owner(self, owner: Tensor | None) -> None:
        self._owner = None
        if owner is None:
            return
        if owner.ndim != 1 or owner.dtype is not torch.int64:
            raise InputError(f"owner is {list(owner.shape)} {str(owner.dtype)[6:]}; expected [rows] int64")
        if len(owner) and not -1 <= int(owner.min()) <= int(owner.max()) < self.count:
            found = f"{int(owner.min())} to {int(owner.max())}"
            raise InputError(f"owner holds {found}; expected -1 to {self.count - 1}, one of {self.count} deltas or -1")
        self._groups = {name: stack.place[owner.to(stack.place.device)] for name, stack in self._stacks.items()}
        self._owner = owner

    def enter(self, owners: Sequence[int]) -> None:
        """Sets `owner` for the forward to come."""
        self.owner = torch.tensor(owners, dtype=torch.int64)

    def __enter__(self) -> "Beside":
        handles = [stack.module.register_forward_hook(self._adder(name)) for name, stack in self._stacks.items()]
        self._open.enter_context(hooks(*handles))
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()
        self.owner = None

    def _adder(self, name: str) -> Callable[..., None]:
        stack = self._stacks[name]

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._owner is None:
                raise InputError(f"{name}: a forward before `owner` was set; expected the delta of each of its rows")
            group = self._groups[name]
            if args[0].ndim != 3 or len(args[0]) != len(group):
                found = list(args[0].shape)
                raise InputError(
                    f"{name} reads {found}; expected [{len(group)}, T, d_in]: owner names {len(group)} rows"
                )
            add_delta_(output, args[0], stack.left, stack.right, group)

        return add


@torch.no_grad()
def score_each(
    model: Model,
    rows: Sequence[Row],
    owner: Sequence[int],
    deltas: Sequence[Update],
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """What `score` returns, row i as after the edit deltas[owner[i]] alone; -1: by the unedited model.

    Rows of all deltas share forwards. Raises `InputError` as `Beside`.
    """
    if len(owner) != len(rows):
        raise InputError(f"owner names {len(owner)} rows; expected {len(rows)}, the delta of each row")
    budget = batch_tokens or tokens_that_fit(model, forward_bytes(model) + 2 * model.anatomy.vocab)
    with Beside(model, deltas) as beside:
        found = token_scores(model, rows, budget, progress, owner=owner, enter=beside.enter)
    means = torch.tensor([answer.mean_logprob for answer in found], dtype=torch.float64)
    return means, torch.tensor([answer.exact for answer in found], dtype=torch.bool)


def _stack(model: Model, name: str, deltas: Sequence[Update]) -> _Stack:
    try:
        module = model.hf.get_submodule(name.removesuffix(".weight"))
        weight = module.weight
    except AttributeError:
        raise InputError(f"a delta changes {name}, which {model.name} does not have") from None
    assert isinstance(weight, Tensor)
    device = weight.device
    d_in, d_out = widths(module)
    changes = {number: _low_rank(name, update[name]) for number, update in enumerate(deltas) if name in update}
    rank = max(right.shape[0] for _, right in changes.values())
    # [G, r, d_out] in memory: the kernel reads columns
    left = torch.zeros(len(changes), rank, d_out, device=device).mT
    right = torch.zeros(len(changes), rank, d_in, device=device)
    place = torch.full((len(deltas) + 1,), -1, device=device)
    for slot, (number, (u, v)) in enumerate(changes.items()):
        if (len(u), v.shape[1]) != (d_out, d_in):
            raise InputError(
                f"delta {number} changes {name} as {(len(u), v.shape[1])} (out, in); the model's is {(d_out, d_in)}"
            )
        left[slot, :, : u.shape[1]] = u
        right[slot, : len(v)] = v
        place[number] = slot
    return _Stack(module, left, right, place)


def _low_rank(name: str, factors: Factors) -> tuple[Tensor, Tensor]:
    if factors.right is None:
        raise InputError(f"{name}: its delta is dense; expected factors, only those are computed beside the weight")
    if not factors.finite():
        raise InputError(f"{name}: its delta holds NaN or infinity")
    return factors.left, factors.right
