"""A model without its weights: what `kernels.floors` needs to know of one, and from a config how large it will be."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..kernels.errors import InputError
from ..kernels.floors import ModelShape, Reach
from .anatomy import find_anatomy, widths
from .model import DEMO, DTYPES, QUANTIZE, Model, demo_file, pick_device, why_not

ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
BLOCK = 64  # weights that share a scale where they have 4 bits


def _four_bits(d_in: int, d_out: int) -> int:
    return math.ceil(d_in * d_out / 2) + 4 * math.ceil(d_in * d_out / BLOCK)


# bytes of a linear map's weight, scales included
STORED: dict[str, Callable[[int, int], int]] = {
    "nf4": _four_bits,
    "fp4": _four_bits,
    "int8": lambda d_in, d_out: d_out * (d_in + 4),
}


def model_shape(model: Model) -> ModelShape:
    """What a forward costs; of a quantised model the same as of the one it was made from."""
    config: Any = model.hf.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    anatomy = model.anatomy
    weights = sum(math.prod(widths(module)) for module in _linears(model.block(0)).values())
    return ModelShape(anatomy.n_layers, weights, heads * width, anatomy.d_model, anatomy.d_in, anatomy.vocab)


def reach_of(model: Model, modules: Sequence[str]) -> Reach:
    """How far a forward goes that stops at the input of the last of these linear maps.

    modules: paths such as "transformer.h.3.mlp.c_proj"; in a block attention comes first, then what else there is, in
        the order in which it was defined; what lies outside the blocks (the head) comes behind all of them
    """
    prefix = model.anatomy.blocks + "."
    found = []
    for name in modules:
        if not name.startswith(prefix):
            found.append(Reach(model.anatomy.n_layers, 0, False))
            continue
        layer, _, inside = name.removeprefix(prefix).partition(".")
        weights = 0
        for path, module in sorted(_linears(model.block(int(layer))).items(), key=lambda item: _turn(item[0])):
            if path == inside:
                break
            weights += math.prod(widths(module))
        found.append(Reach(int(layer), weights, _turn(inside) > 0))
    return max(found, key=lambda reach: (reach.blocks, reach.weights))


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {path: part for path, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))}


def _turn(path: str) -> int:
    """When a linear map of a block is run: 0 before attention's products, 1 behind them, 2 outside attention."""
    if "attn" not in path and "attention" not in path:
        return 2
    return int(path.rpartition(".")[2] in ATTENTION_OUTPUTS)


class Outline(Model):
    """A model without weights: for whatever asks about shapes. It cannot run.

    hf: on the meta device, in the dtype that it would be loaded in
    device: where it would be
    quantize: what its linear maps would be stored in: a key of `STORED`, or None
    """

    def __init__(self, hf: nn.Module, name: str, device: torch.device, quantize: str | None = None) -> None:
        self.hf = hf
        self.anatomy = find_anatomy(hf)
        self.name = name
        self.quantize = quantize
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    def weight_bytes(self, dtype: torch.dtype, quantize: str | None = None) -> int:
        """What weights and buffers take once they are loaded so; shared ones once."""
        head = self.hf.get_submodule(self.anatomy.head)
        maps = [module for module in _linears(self.hf).values() if module is not head] if quantize else []
        small = {id(module.weight): STORED[str(quantize)](*widths(module)) for module in maps}
        weights = {id(weight): weight.numel() * dtype.itemsize for weight in self.hf.parameters()}
        buffers = {id(buffer): buffer.numel() * buffer.element_size() for buffer in self.hf.buffers()}
        return sum((weights | small | buffers).values())


def outline(
    name: str, dtype: str = "auto", quantize: str | None = None, device: str = "auto", revision: str | None = None
) -> Outline:
    """The model that `load` would give for these arguments, from its config alone.

    Raises `InputError` where there is no config of a causal LM, and for unknown names.
    """
    if dtype not in ("auto", "checkpoint", *DTYPES):
        raise InputError(f"dtype {dtype!r} is unknown; expected auto, checkpoint, {', '.join(DTYPES)}")
    if quantize not in (None, *QUANTIZE):
        raise InputError(f"quantize {quantize!r} is unknown; expected {', '.join(QUANTIZE)} (or none)")
    place = torch.device(pick_device("auto" if device == "balanced" else device))
    source = str(demo_file(".")) if name == "demo" else name
    if (Path(source).exists() or Path(source).is_absolute()) and not (Path(source) / "config.json").is_file():
        raise InputError(f"{source}: no model there (no config.json); expected a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        kind = quantize or _stored_quantised(source, config)
        chosen = _dtype(config, dtype, place, kind)
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, dtype=chosen)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{source}: {why_not(error, 'its config is not that of a causal LM')}") from None
    return Outline(hf, DEMO if name == "demo" else name, place, kind)


def _dtype(config: Any, asked: str, place: torch.device, quantize: str | None) -> torch.dtype:
    if asked in DTYPES:
        return DTYPES[asked]
    if asked == "auto" and quantize and place.type != "cpu":
        return torch.bfloat16  # or float16, of the same size
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    return (
        torch.float32 if (asked, place.type) == ("auto", "cpu") else getattr(torch, str(stored).removeprefix("torch."))
    )


def _stored_quantised(source: str, config: Any) -> str | None:
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    if about.get("load_in_8bit"):
        return "int8"
    if about.get("load_in_4bit"):
        return str(about.get("bnb_4bit_quant_type", "fp4"))
    raise InputError(f"{source} is stored quantised by {about.get('quant_method')}: how large it will be is not known")
