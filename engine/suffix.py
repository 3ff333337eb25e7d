"""The blocks above the z-layer as one function of what is added at the subject: everything else is computed once.

Under causal attention tokens before the subject never change, so above the z-layer only the tokens from the subject on
("active") are run; keys and values of the earlier ones are kept from one pass, for each block. Rows of any lengths
share a batch: what a block is called with (masks, positions, rotary angles) is recorded once from a single row and
then gathered at each row's own positions.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..kernels.errors import InputError
from ..kernels.gather_mean import scatter_add
from .entry import Entry, Gate, Seen
from .model import Model
from .objective import ATTENTION
from .passes import Call, Stop, blocks_until, frozen, hidden_of, hooks, run_until

Calls = dict[int, Call]  # block -> what it is called with


class PrefixCache:
    """What a block sees as its cache: hands out the kept keys and values of earlier tokens before the new ones.

    Only `update` is used by the attention of the families of transformers 5. kept: layer -> (keys, values), each
    [rows, heads, prefix, head width]; while `recording`, what comes is kept, and behind block `last` nothing is wanted.
    """

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]], last: int = -1) -> None:
        self.kept = kept
        self.last = last
        self.recording = False

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.recording:
            self.kept[layer] = (keys, values)
            if layer == self.last:
                raise Stop
        elif layer in self.kept:
            earlier_keys, earlier_values = self.kept[layer]
            return torch.cat([earlier_keys, keys], 2), torch.cat([earlier_values, values], 2)
        return keys, values

    def only(self, rows: Tensor) -> "PrefixCache":
        pairs = {layer: (keys, values, rows.to(keys.device)) for layer, (keys, values) in self.kept.items()}
        return PrefixCache({layer: (keys[at], values[at]) for layer, (keys, values, at) in pairs.items()})


def record_calls(model: Model, layer: int, length: int) -> Calls:
    """What the model calls each block above `layer` with, for one row of `length` tokens, masks in full."""
    calls: Calls = {}

    def record(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[number] = (args[1:], dict(kwargs)) if args else ((), _without_hidden(kwargs))

        return hook

    above = range(layer + 1, model.anatomy.n_layers)
    handles = [model.block(i).register_forward_pre_hook(record(i), with_kwargs=True) for i in above]
    norm = model.hf.get_submodule(model.anatomy.norm)
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    with torch.no_grad(), frozen(model), _full_masks(model), hooks(*handles):
        run_until(model, ids, norm, past_key_values=DynamicCache(), use_cache=True)
    return calls


def _without_hidden(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "hidden_states"}


@contextlib.contextmanager
def _full_masks(model: Model) -> Iterator[None]:
    """Eager attention gets its mask as a tensor; sdpa may get none where it is plainly causal."""
    config: Any = model.hf.config
    asked = config._attn_implementation
    if asked not in ("eager", "sdpa"):
        raise InputError(f"attention {asked!r} takes no mask of ours; load the model with attn_implementation='sdpa'")
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = asked


@dataclass(frozen=True)
class Suffix:
    """The blocks above a layer and the final norm, for a batch of rows.

    active: [rows, A, d_model] hidden states from each row's start on; later than a row's end: never read
    start: [rows] position of the first active token (the subject's last)
    calls: block -> what it is called with, gathered for these rows
    entry: where the variables are inside the layer's block; None: they are added to its output
    """

    model: Model
    active: Tensor
    start: Tensor
    calls: Calls
    cache: PrefixCache
    entry: Entry | None = None

    @classmethod
    def of(
        cls, model: Model, calls: Calls, hidden: Tensor, start: Tensor, width: int, recorded: int | None = None
    ) -> "Suffix":
        """hidden: [rows, T, d_model], what the layer gives; width: active tokens, A.

        calls: of the blocks above, recorded for a row of `recorded` tokens, at least T; None: T
        """
        length = hidden.shape[1]
        recorded = recorded or length
        prefix = int(start.max())
        cache = PrefixCache({}, last=model.anatomy.n_layers - 1)
        rows = torch.arange(len(hidden), device=hidden.device)
        if prefix:
            cache.recording = True
            early = hidden[:, :prefix]
            with torch.no_grad(), contextlib.suppress(Stop):
                for layer, (args, kwargs) in _gather(
                    calls, torch.zeros_like(start), prefix, 0, (length, recorded), cache
                ).items():
                    early = hidden_of(model.block(layer)(early, *args, **kwargs))
            cache.recording = False
        gathered = _gather(calls, start, width, prefix, (length, recorded), cache)
        at = (start[:, None] + torch.arange(width, device=start.device)).clamp_max(length - 1)
        return cls(model, hidden[rows[:, None], at], start, gathered, cache)

    def inside(self, gate: Gate, seen: Seen, layer: int, call: Call, recorded: int) -> "Suffix":
        """The same, with variables inside the layer's block; call: of that block, recorded for so many tokens."""
        rows = torch.arange(len(self.start), device=self.start.device)
        length = seen.read.shape[1]
        ((_, gathered),) = _gather({layer: call}, self.start, 1, 0, (length, recorded), PrefixCache({})).items()
        here = self.start.device  # what the block reads may lie where the block below is
        read, attended = (hidden.to(here)[rows, self.start] for hidden in (seen.read, seen.given[ATTENTION]))
        return replace(self, entry=Entry(self.model, layer, gate, read, attended, gathered))

    def only(self, kept: Tensor) -> "Suffix":
        """Some of the rows; kept: [rows] bool."""
        cache = self.cache.only(kept)

        def take(value: Any) -> Any:
            if isinstance(value, PrefixCache):
                return cache
            # what was gathered has a row of each row; a one-dimensional tensor is all rows'
            return value[kept.to(value.device)] if isinstance(value, Tensor) and value.ndim > 1 else value

        calls: Calls = _map(self.calls, take, {})
        entry = self.entry and self.entry.only(kept, _map(self.entry.call, take, {}))
        return replace(self, active=self.active[kept], start=self.start[kept], calls=calls, cache=cache, entry=entry)

    def __call__(self, delta: Tensor, fact: Tensor, read: tuple[Tensor, Tensor]) -> Tensor:
        """[m, d_model] behind the final norm at m places (row, position in the row), with a delta at each row's start.

        delta: [n, variables * d_model] float32, differentiable; fact: [rows] int64, which of them a row gets
        """
        if self.entry is not None:  # what it makes of the block's output, a delta for each row
            delta = self.entry(delta, fact).float() - self.active[:, 0].float()
            fact = torch.arange(len(fact), device=fact.device)
        hidden = scatter_add(self.active, torch.zeros_like(fact), fact, delta)
        for layer, (args, kwargs) in self.calls.items():
            hidden = hidden_of(self.model.block(layer)(hidden, *args, **kwargs))
        rows, positions = read
        norm = self.model.hf.get_submodule(self.model.anatomy.norm)
        places = (rows.to(hidden.device), (positions - self.start[rows]).to(hidden.device))
        found: Tensor = norm(hidden[places])
        return found


def _gather(
    calls: Calls, start: Tensor, width: int, prefix: int, lengths: tuple[int, int], cache: PrefixCache
) -> Calls:
    """Recorded calls at positions start .. start + width - 1 of each row, keys at 0 .. prefix - 1 and there.

    lengths: tokens of the rows, and of the row that was recorded, which is no shorter
    """
    length, recorded = lengths
    asked = start[:, None] + torch.arange(width, device=start.device)  # [rows, A]
    query = asked.clamp_max(length - 1)
    early = torch.arange(prefix, device=start.device).expand(len(start), prefix)
    key = torch.cat([early, query], 1)
    unseen = torch.cat([early >= start[:, None], asked >= length], 1)  # not this row's

    def take(value: Any) -> Any:
        if isinstance(value, Cache):
            return cache
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 4 and value.shape[:3] == (1, 1, recorded) and value.shape[3] >= recorded:  # some add a column
            mask = value[0, 0].to(start.device)[query[:, :, None], key[:, None, :]]
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return mask.masked_fill(unseen[:, None, :], hidden)[:, None]
        if value.shape == (recorded,):  # `cache_position` of earlier transformers: for caches alone
            return value
        if value.shape[:2] == (1, recorded):
            return value[0][query.to(value.device)]
        raise InputError(f"blocks take a tensor of shape {tuple(value.shape)}: this family cannot be edited yet")

    found: Calls = _map(calls, take, {})
    return found


def _map(value: Any, change: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    """`change` on everything inside tuples, lists and dictionaries; once for what all blocks share (`done`, by id)."""
    if isinstance(value, (tuple, list)):
        return type(value)(_map(part, change, done) for part in value)
    if isinstance(value, dict):
        return {key: _map(part, change, done) for key, part in value.items()}
    if id(value) not in done:
        done[id(value)] = change(value)
    return done[id(value)]


@torch.no_grad()
def verify(model: Model, layer: int) -> None:
    """Runs two short rows to see that the anatomy is right. Raises `InputError` where the family does something else.

    Checked: no token sees a later one; blocks replayed above `layer` give the model's own logits; what is added to the
    output of the projection, or of the norm behind it, arrives unscaled at the block's output.
    """
    with frozen(model), unknown_family(model):
        _verify(model, layer, model.anatomy.model_type)


@contextlib.contextmanager
def unknown_family(model: Model) -> Iterator[None]:
    """Where the anatomy was guessed, what its blocks raise when they are run alone is an `InputError`."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if model.anatomy.source == "family":
            raise
        kind, reason = model.anatomy.model_type, " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise InputError(f"{kind}: its blocks cannot be run alone ({reason}): it cannot be edited yet") from error


def _verify(model: Model, layer: int, kind: str) -> None:
    rows, length = 2, 8
    ids = torch.arange(1, rows * length + 1, device=model.device).view(rows, length) % model.anatomy.vocab
    own = model.hf(input_ids=ids, use_cache=False).logits.float()
    if not torch.isfinite(own).all():
        raise InputError(f"{model.name}: its logits hold NaN or infinity: the model is broken")
    before = blocks_until(model, ids, layer)
    tolerance = (1e-3 if own.dtype == before.dtype else 5e-2) * float(own.abs().max())
    shorter = model.hf(input_ids=ids[:, :-1], use_cache=False).logits.float()
    if not torch.allclose(shorter, own[:, :-1], atol=tolerance, rtol=0):
        raise InputError(f"{kind}: its tokens see later ones; expected a causal (decoder-only) LM")
    seen = [(row, at) for row, first in enumerate((2, 5)) for at in range(first, length)]
    read_row, read_at = torch.tensor(seen, device=before.device).T
    start = torch.tensor([2, 5], device=before.device)  # the rows' first active tokens; earlier ones are not read
    suffix = Suffix.of(model, record_calls(model, layer, length), before, start, length - 2)
    replayed = model.logits(
        suffix(before.new_zeros(1, before.shape[2]).float(), torch.zeros_like(start), (read_row, read_at))
    )
    asked = own[read_row.to(own.device), read_at.to(own.device)]
    if not torch.allclose(replayed.to(own.device), asked, atol=tolerance, rtol=0):
        raise InputError(f"{kind}: its logits are not head(norm(blocks)): this family cannot be edited yet")
    push = torch.ones_like(before[:, -1]) * before.float().std().to(before.dtype)

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + push[:, None]], 1)

    giver = model.post_norm(layer) or model.projection(layer)
    with hooks(giver.register_forward_hook(add)):
        moved = blocks_until(model, ids, layer)[:, -1] - before[:, -1]
    if not torch.allclose(moved.float(), push.float(), rtol=5e-2, atol=5e-2 * float(push.abs().max())):
        raise InputError(f"{kind}: a block rescales the MLP's output before adding it: it cannot be edited yet")
