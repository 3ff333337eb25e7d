"""Where things are in a causal LM: decoder blocks, MLP output projection, final norm, head.

Known families are data (`FAMILIES`, by `model_type`); anything else is found by its structure, and what was found is
checked by running it (`suffix.verify`).
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..kernels.errors import InputError
from .objective import ATTENTION, MLP

_Family = tuple[str, str, str, str | None, str | None]
# model_type: (decoder blocks, final norm; in a block: MLP output projection, attention's, norm behind the MLP's)
_LLAMA = ("model.layers", "model.norm", "mlp.down_proj", "self_attn.o_proj", None)
_GEMMA = ("model.layers", "model.norm", "mlp.down_proj", "self_attn.o_proj", "post_feedforward_layernorm")
FAMILIES: dict[str, _Family] = {
    "gpt2": ("transformer.h", "transformer.ln_f", "mlp.c_proj", "attn.c_proj", None),
    "gptj": ("transformer.h", "transformer.ln_f", "mlp.fc_out", "attn.out_proj", None),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm", "mlp.dense_4h_to_h", "attention.dense", None),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": (
        "model.language_model.layers",
        "model.language_model.norm",
        "mlp.down_proj",
        "self_attn.o_proj",
        "post_feedforward_layernorm",
    ),
}

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")  # names of a norm behind the projection


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are, as module paths.

    model_type: the config's name of the family
    blocks: path of the decoder blocks' list; `projection`, `attention` and `post_norm` are paths within one block
    attention: attention's output projection, or None where it was not found
    post_norm: the norm that the projection's output passes before it is added to the residual stream, or None
    norm, head: final norm and output embedding
    softcap: final logits are softcap * tanh(logits / softcap), or None
    source: "family" where `FAMILIES` knows the model_type, "structure" where it was found by looking
    """

    model_type: str
    blocks: str
    projection: str
    post_norm: str | None
    norm: str
    head: str
    n_layers: int
    d_model: int
    d_in: int
    vocab: int
    softcap: float | None
    source: str
    attention: str | None = None

    def layer_name(self, layer: int, part: str = MLP) -> str:
        """Path of an edited projection, as the ecosystem names statistics: `transformer.h.3.mlp.c_proj`.

        part: the MLP's (also where the block's output is meant), or attention's, which raises `InputError` where it is
        not known.
        """
        if part != ATTENTION:
            return f"{self.blocks}.{layer}.{self.projection}"
        if self.attention is None:
            raise InputError(f"{self.model_type}: unknown family, and its attention output projection was not found")
        return f"{self.blocks}.{layer}.{self.attention}"

    def weight_name(self, layer: int) -> str:
        return f"{self.layer_name(layer)}.weight"


def find_anatomy(hf: nn.Module) -> Anatomy:
    """The anatomy of a transformers model. Raises `InputError` for what is no decoder, or has experts."""
    config: Any = hf.config
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    _refuse(hf, config, text)
    head = _path_of(hf, hf.get_output_embeddings())  # type: ignore[operator]
    family = FAMILIES.get(config.model_type)
    source = "structure" if family is None else "family"
    blocks, norm, projection, attention, post_norm = family or _by_structure(hf, text)
    try:
        stack = hf.get_submodule(blocks)
        assert isinstance(stack, nn.ModuleList)
        hf.get_submodule(norm)
        found = {_edited(hf.get_submodule(f"{blocks}.{i}.{projection}")) for i in range(len(stack))}
    except AttributeError as error:
        raise InputError(f"{config.model_type}: expected {blocks}, {norm} and {projection} in it ({error})") from None
    if len(found) > 1:
        raise InputError(f"{config.model_type}: its MLP output projections have different widths: {sorted(found)}")
    d_in, d_out = found.pop()
    softcap = getattr(text, "final_logit_softcapping", None)
    out: Any = hf.get_submodule(head)
    vocab = int(out.out_features if isinstance(out, nn.Linear) else out.weight.shape[0])  # a packed weight has no shape
    return Anatomy(
        config.model_type, blocks, projection, post_norm, norm, head,
        len(stack), d_out, d_in, vocab, softcap, source, attention,
    )  # fmt: skip


def _edited(projection: nn.Module) -> tuple[int, int]:
    kind = stored_as(projection)
    if kind is not None and type(projection) in (nn.Linear, Conv1D):  # which cannot even run on such a weight
        raise InputError(
            f"the MLP output projection ({type(projection).__name__}) is stored as {kind}; "
            "expected float32, bfloat16 or float16, or a map that is made for quantised weights"
        )
    return widths(projection)


def stored_as(module: nn.Module) -> str | None:
    """How a linear map holds its weight where these are not plain numbers: "nf4", "fp4", "int8", ...; else None."""
    weight: Any = module.weight
    kind = getattr(weight, "quant_type", None)  # bitsandbytes packs 4 bits into any dtype
    plain = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    return kind or (None if plain else str(weight.dtype).removeprefix("torch."))


def writable(name: str, module: nn.Module) -> None:
    """Raises `InputError` where an update cannot be added to the weight of the module of this name."""
    kind = stored_as(module)
    if kind is not None:
        raise InputError(
            f"{name} is quantised ({kind}): statistics and evaluation read it, but an edit cannot be written into it; "
            "load the model without quantize"
        )
    if module.weight.device.type == "meta":
        raise InputError(
            f"{name} is kept in another memory than it is computed in, so an edit cannot be written into it; "
            "load the model on one device"
        )


def widths(projection: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a `Linear` or `Conv1D`, by its type: a square weight tells nothing by its shape."""
    if isinstance(projection, Conv1D):
        return int(projection.weight.shape[0]), int(projection.weight.shape[1])
    if isinstance(projection, nn.Linear):
        return projection.in_features, projection.out_features
    raise InputError(f"the MLP output projection is a {type(projection).__name__}, expected Linear or Conv1D")


def _refuse(hf: nn.Module, config: Any, text: Any) -> None:
    kind = type(hf).__name__
    # GPT-NeoX is causal, and its config says is_decoder=False nevertheless
    encoder = config.model_type not in FAMILIES and getattr(text, "is_decoder", None) is False
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} ({config.model_type}) is an encoder model; expected a causal (decoder-only) LM")
    experts = next((name for name in _EXPERT_COUNTS if (getattr(text, name, None) or 0) > 1), None)
    if experts is not None:
        raise InputError(
            f"{kind} ({config.model_type}) is a mixture of experts ({experts}={getattr(text, experts)}); "
            "its MLP has no single output projection, and editing a part of it is refused"
        )
    if not hasattr(hf, "get_output_embeddings") or hf.get_output_embeddings() is None:  # type: ignore[operator]
        raise InputError(f"{kind} ({config.model_type}) has no language-model head; expected a causal LM")


def _path_of(root: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in root.named_modules() if module is wanted)


def _by_structure(hf: nn.Module, text: Any) -> _Family:
    """Blocks: the list as long as the config has layers. Projection: the block's last map from a wider space back to
    the hidden size outside attention. Attention: the last map to the hidden size inside it, by its name an output's.
    Norm: the last norm beside the blocks."""
    name = text.model_type
    lists = [
        (path, module)
        for path, module in hf.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers
    ]
    if len(lists) != 1:
        raise InputError(f"{name}: unknown family, and {len(lists)} lists of blocks in it where one was expected")
    blocks, stack = lists[0]
    candidates = [
        path
        for path, module in stack[0].named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "attn" not in path and "attention" not in path
        and widths(module)[1] == text.hidden_size and widths(module)[0] > text.hidden_size
    ]  # fmt: skip
    if len(candidates) != 1:
        raise InputError(
            f"{name}: unknown family, and {len(candidates)} candidates for the MLP output projection in a block "
            f"({', '.join(candidates) or 'none'}) where one was expected"
        )
    inside = [
        path
        for path, module in stack[0].named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "att" in path and widths(module)[1] == text.hidden_size
        and path.rpartition(".")[2] in _ATTENTION_OUTPUTS
    ]  # fmt: skip
    attention = inside[0] if len(inside) == 1 else None
    parent = hf.get_submodule(blocks.rpartition(".")[0])
    norms = [path for path, module in parent.named_children() if "norm" in type(module).__name__.lower()]
    if not norms:
        raise InputError(f"{name}: unknown family, and no final norm beside {blocks}")
    prefix = blocks.rpartition(".")[0]
    post = [path for path, _ in stack[0].named_children() if path in _POST_NORMS]
    norm = f"{prefix}.{norms[-1]}" if prefix else norms[-1]
    return blocks, norm, candidates[0], attention, post[0] if post else None
