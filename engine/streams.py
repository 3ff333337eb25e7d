"""Documents through the model: what chosen linear maps read at every token, for statistics.

The documents of a batch stand in rows, padded on the right, or, packed, one behind the other in a single row: no
padding is computed, the positions of each document start at 0, and an attention function of ours runs the model's own
on each document alone, so that no mask of the whole row is ever made. Soft caps, sinks, grouped heads and scales stay
what the family makes of them.
"""

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from ..kernels.errors import InputError
from .anatomy import widths
from .model import Model
from .passes import Stop, forward, fused, hooks

Sink = Callable[[str, Tensor], None]

ATTENTION = "rewire_documents"  # our name in transformers' AttentionInterface
TRIAL = (7, 4, 1)  # tokens of the documents that `can_pack` tries
# What packing may change: against the document alone, and against it among other documents (units of the dtype, and
# at least). Where padding changes more (8-bit maps round by what stands beside a token), so many times that.
ALONE, AMONG, TIMES = (4, 1e-5), (1 / 8, 1e-6), 4


@torch.no_grad()
def stream_inputs(model: Model, rows: Sequence[np.ndarray], modules: Sequence[str], sink: Sink, packed: bool) -> None:
    """One forward over documents, up to the last of the named modules: `sink(name, X)` for each of them, once.

    rows: int token ids of one document each; a document without tokens gives none
    modules: paths of linear maps (`transformer.h.3.mlp.c_proj`), in any order
    sink: gets X [tokens of all rows, d_in] in the model's dtype, in the order of the rows, padding never in it
    packed: all documents in one row (see `can_pack`), else a row each

    Raises `InputError` for a name that is no linear map of the model, and for a map that a forward runs on something
    else than all its tokens, twice, or never (experts, say). The model is as before, whatever happens.
    """
    maps = _linears(model, modules)
    rows = [np.asarray(row, dtype=np.int64) for row in rows if len(row)]
    if not rows:
        return
    ids, real = (torch.from_numpy(np.concatenate(rows))[None], None) if packed else _padded(rows)
    left = dict.fromkeys(maps)

    def hook(name: str) -> Callable[..., None]:
        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            X = args[0]
            if X[..., 0].numel() != ids.numel():
                raise InputError(
                    f"{name} was run on {X[..., 0].numel()} tokens of a batch of {ids.numel()}: it does not see every "
                    "token (an expert?); name other modules"
                )
            if name not in left:
                raise InputError(f"{name} is run more than once in a forward: name other modules")
            X = X.reshape(-1, X.shape[-1])
            sink(name, X if real is None else X[real.to(X.device)])
            del left[name]
            if not left:
                raise Stop

        return take

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in maps.items()]
    with fused(model), hooks(*handles):
        if packed:
            positions = torch.cat([torch.arange(len(row)) for row in rows])[None]  # from 0 in each document
            with _packing(model, [len(row) for row in rows]):
                forward(model, ids.to(model.device), position_ids=positions.to(model.device))
        else:
            forward(model, ids.to(model.device))
    if left:
        raise InputError(f"{next(iter(left))} is not run in a forward over text: name other modules")


def can_pack(model: Model, modules: Sequence[str]) -> bool:
    """Whether packed documents give what each gives alone, by trying: some short ones, at the named modules.

    False where the family takes no positions, has an attention of its own or a window that it keeps from it; padded
    rows serve every causal family. Raises `InputError` for names as `stream_inputs`.
    """
    _linears(model, modules)
    tokens = np.arange(1, sum(TRIAL) + 1) * 7919 % model.anatomy.vocab
    first, last = TRIAL[0], TRIAL[0] + TRIAL[1] - 1
    others = (tokens + 1) % model.anatomy.vocab
    others[first:last] = tokens[first:last]  # of all documents, only the middle one's first tokens stay
    here, there = (np.split(ids, np.cumsum(TRIAL)[:-1]) for ids in (tokens, others))

    def changes(way: bool) -> dict[str, tuple[float, float]]:
        read, among = (_read(model, rows, modules, way) for rows in (here, there))
        return {
            name: (
                _furthest(read[name][first : last + 1], alone[name]),
                _furthest(among[name][first:last], read[name][first:last]),
            )
            for name in modules
        }

    try:
        alone = _read(model, here[1:2], modules, packed=False)
        padded, packed = changes(False), changes(True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a family says to positions, a missing mask or an unknown attention
        return False
    return all(
        found <= max(units * torch.finfo(alone[name].dtype).eps, least, TIMES * noise)  # NaN is not
        for name in modules
        for (units, least), found, noise in zip((ALONE, AMONG), packed[name], padded[name], strict=True)
    )


def linear_widths(model: Model, names: Sequence[str]) -> dict[str, int]:
    """Name -> d_in of each named linear map. Raises `InputError` for no names, and for what is no linear map."""
    return {name: widths(module)[0] for name, module in _linears(model, names).items()}


def _linears(model: Model, names: Sequence[str]) -> dict[str, nn.Module]:
    if not names:
        raise InputError(f"no modules named; expected paths such as {model.anatomy.layer_name(0)}")
    found: dict[str, nn.Module] = {}
    there = dict(model.hf.named_modules(remove_duplicate=False))
    for name in names:
        module = there.get(name)
        if module is None:
            known = [path for path, part in there.items() if isinstance(part, (nn.Linear, Conv1D))]
            near = difflib.get_close_matches(name, known, cutoff=0.3)
            raise InputError(f"{model.name} has no module {name!r}; the nearest linear maps: {', '.join(near)}")
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise InputError(f"{name} is a {type(module).__name__}; expected a linear map (Linear or Conv1D)")
        found[name] = module
    return found


def _padded(rows: list[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """(ids [rows, longest], which of them all are real, flat; None: all)."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = np.concatenate(rows)
    return torch.from_numpy(ids), None if real.all() else torch.from_numpy(np.flatnonzero(real))


def _read(model: Model, rows: Sequence[np.ndarray], modules: Sequence[str], packed: bool) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    stream_inputs(model, rows, modules, lambda name, X: kept.update({name: X.cpu()}), packed)
    return kept


def _furthest(got: Tensor, exact: Tensor) -> float:
    """The largest relative distance of a token's vector from what it should be."""
    got, exact = got.double(), exact.double()
    return float(((got - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)).max())


@dataclass(frozen=True)
class _Documents:
    """The documents of one packed row.

    lengths: tokens of each
    attention: id of a config -> the attention implementation that it asks for
    masks, bounds: made once a forward
    """

    lengths: list[int]
    attention: dict[int, str]
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    bounds: dict[torch.device, Tensor] = field(default_factory=dict)

    def mask(self, length: int, window: int | None, asked: str, like: Tensor) -> Tensor | None:
        """[1, 1, length, length] of a document: bool for sdpa, added for eager; None: sdpa makes its own causal one."""
        if asked == "sdpa" and (window is None or length <= window):
            return None
        key = (window, asked, like.dtype, like.device)
        if key not in self.masks:
            at = torch.arange(max(self.lengths), device=like.device)
            seen = at[:, None] >= at
            if window is not None:
                seen &= at[:, None] - at < window
            if asked == "eager":
                seen = torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)
            self.masks[key] = seen
        return self.masks[key][None, None, :length, :length]  # a corner of the longest one's

    def ends(self, device: torch.device) -> Tensor:
        """[documents + 1] int32: where each document starts, and the last one ends."""
        if device not in self.bounds:
            ends = torch.tensor([0, *self.lengths], device=device).cumsum(0)
            self.bounds[device] = ends.to(torch.int32)
        return self.bounds[device]


_documents: ContextVar[_Documents] = ContextVar("rewire_documents")


@contextlib.contextmanager
def _packing(model: Model, lengths: list[int]) -> Iterator[None]:
    """Attention stays inside documents of these lengths; afterwards it is what it was."""
    configs: dict[int, Any] = {}
    for module in model.hf.modules():
        config = getattr(module, "config", None)  # a text model's is not its composite's
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    asked = {key: config._attn_implementation_internal for key, config in configs.items()}
    token = _documents.set(_Documents(lengths, asked))
    try:
        for config in configs.values():  # the attribute behind the property, which would hand it on to sub-configs
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = asked[key]
        _documents.reset(token)


def _within_documents(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The model's own attention on each document of a packed row.

    query: [1, heads, T, d], key, value: [1, key heads, T, d]
    Returns ([1, T, heads, d], None). Raises `NotImplementedError` for what cannot be cut into documents.
    """
    documents = _documents.get()
    asked = documents.attention[id(module.config)]
    if asked not in ("sdpa", "eager") or attention_mask is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"attention {asked!r} with a mask or bias of its own")
    window = _window(module, kwargs.get("sliding_window"))
    kwargs.pop("position_ids", None)  # of the whole row
    if asked == "sdpa" and _flash_serves(module, query, value, kwargs):
        return _flash(documents, query, key, value, window, kwargs.get("scaling")), None
    # the names that the family's own code calls: it may have replaced sdpa by one of its own
    names = inspect.unwrap(type(module).forward).__globals__
    own = names["eager_attention_forward"] if asked == "eager" else names["ALL_ATTENTION_FUNCTIONS"][asked]
    parts = zip(documents.lengths, *(part.split(documents.lengths, 2) for part in (query, key, value)), strict=True)
    outputs = [own(module, q, k, v, documents.mask(length, window, asked, q), **kwargs)[0] for length, q, k, v in parts]
    return torch.cat(outputs, 1), None


AttentionInterface.register(ATTENTION, _within_documents)


def _window(module: nn.Module, given: int | None) -> int | None:
    """How many tokens one sees, itself among them; None: all before it. Refused where the config says otherwise: the
    family keeps its window in masks that we do not make."""
    config: Any = module.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else "sliding_attention" if window else "full_attention"
    said = {"full_attention": None, "sliding_attention": window}
    if kind not in said or said[kind] != given:
        raise NotImplementedError(f"{kind} with a window of {given}")
    return given


def _flash_serves(module: nn.Module, query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether one kernel can run all documents: 16-bit on a GPU that has it, plainly causal, torch's new enough."""
    width = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
        and width == value.shape[3] and width % 8 == 0 and width <= 256
        and kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
        and kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    )  # fmt: skip


def _flash(
    documents: _Documents, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """[1, T, heads, d]; arguments as `_within_documents`."""
    ends, longest = documents.ends(query.device), max(documents.lengths)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    size = (-1, 0) if window is None else (window - 1, 0)  # tokens before and behind that one sees
    found = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scale, window_size=size, enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(found, Tensor)
    return found[None]
