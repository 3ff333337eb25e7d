"""A causal LM with its tokenizer, its anatomy and a fingerprint of its weights."""

import hashlib
import logging
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..kernels.errors import InputError
from .anatomy import Anatomy, find_anatomy, stored_as, writable
from .objective import MLP

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZE = ("nf4", "fp4", "int8")  # what bitsandbytes makes while it loads
DEMO = "rewire/demo"  # the name of the embedded model
_SAMPLES = 256  # values a tensor gives to the fingerprint


class Model:
    """What the engine works on.

    hf: the transformers model, untouched but for the edits
    tokenizer: a fast tokenizer (character offsets are needed)
    anatomy: where its parts are
    name: as given to `load`, or the config's `_name_or_path`
    fingerprint: of the weights as they are now, 16 hex digits
    """

    def __init__(self, hf: nn.Module, tokenizer: Any, name: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer")
        _keep_layout(hf)
        self.hf = hf
        self.tokenizer = tokenizer
        self.anatomy: Anatomy = find_anatomy(hf)
        self.name: str = name or getattr(hf.config, "_name_or_path", "") or type(hf).__name__

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.hf)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device that the input embedding is computed on."""
        embedding = self.hf.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embedding.weight.device
        if device.type == "meta":  # accelerate keeps the weight elsewhere and brings it for each forward
            return torch.device(_offloader(embedding).execution_device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def quantized(self) -> str | None:
        """How the MLP output projections are stored where that is not as plain numbers: "nf4", "fp4", "int8", ..."""
        return stored_as(self.projection(0))

    @property
    def max_length(self) -> int:
        """The longest row that the model takes, in tokens."""
        config = self.hf.config.get_text_config()  # type: ignore[union-attr, operator]
        return int(getattr(config, "max_position_embeddings", None) or 2048)

    @cached_property
    def token_texts(self) -> tuple[str, ...]:
        """The text of each token id as it stands within a text: with its space, special tokens as they are written;
        empty where the tokenizer has none."""
        how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        prefix = self.tokenizer("abcdef", add_special_tokens=False)["input_ids"]
        known = min(self.anatomy.vocab, len(self.tokenizer))
        whole = self.tokenizer.batch_decode([[*prefix, i] for i in range(known)], **how)
        before = self.tokenizer.decode(prefix, **how)
        return tuple(text.removeprefix(before) for text in whole) + ("",) * (self.anatomy.vocab - known)

    def block(self, layer: int) -> nn.Module:
        return self.hf.get_submodule(f"{self.anatomy.blocks}.{layer}")

    def projection(self, layer: int, part: str = MLP) -> nn.Module:
        """The MLP's output projection, or attention's."""
        return self.hf.get_submodule(self.anatomy.layer_name(layer, part))

    def post_norm(self, layer: int) -> nn.Module | None:
        """The norm that the projection's output passes before it is added, where the family has one."""
        name = self.anatomy.post_norm
        return None if name is None else self.block(layer).get_submodule(name)

    @property
    def head(self) -> nn.Module:
        return self.hf.get_submodule(self.anatomy.head)

    def head_parts(self) -> tuple[Tensor, Tensor | None, float | None]:
        """The head's weight [vocab, d_model], its bias and the soft cap, where it has them."""
        head = self.head
        if not isinstance(head, nn.Linear):
            raise InputError(f"the head is a {type(head).__name__}, expected Linear: this family cannot be edited yet")
        return head.weight, head.bias, self.anatomy.softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, d_model] after the final norm -> [rows, vocab] float32 logits, soft-capped where the family does."""
        logits = self.head(hidden).float()
        cap = self.anatomy.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def load(
    name: str | Path,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> Model:
    """A model from a directory or a hub id; "demo" is the embedded one (a folder of that name is "./demo").

    dtype: "float32", "bfloat16", "float16", "checkpoint" (as stored), or "auto": as stored (quantised: what the GPU
        computes fastest in), on a CPU float32
    quantize: "nf4", "fp4" or "int8": weights are quantised by bitsandbytes while they are loaded, `dtype` is what they
        compute in. Such a model, like a checkpoint that is stored quantised, can be read but not edited.
    device: "cpu", "cuda", "cuda:1", "auto": CUDA where there is one, or "balanced": over all GPUs, what is left on the
        CPU, what is left then on disk (by accelerate)
    Raises `InputError` where there is no model, it is incomplete or no causal LM, a name is unknown, or a library is
    missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("auto", "checkpoint", *DTYPES):
        raise InputError(f"dtype {dtype!r} is unknown; expected auto, checkpoint, {', '.join(DTYPES)}")
    if quantize is not None:
        if quantize not in QUANTIZE:
            raise InputError(f"quantize {quantize!r} is unknown; expected {', '.join(QUANTIZE)} (or none)")
        _require("bitsandbytes", f"quantize {quantize!r}")
    place = pick_device("auto") if device == "balanced" else pick_device(device)
    source = str(demo_file(".")) if str(name) == "demo" else str(name)
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{source}: no model there (no config.json); expected a Hugging Face model directory")
    elif folder.exists() or folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise InputError(f"{source}: no model there; expected a Hugging Face model directory or a hub id")
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        _refuse_other_tasks(source, config)
        how = _how(source, config, dtype, quantize, device, place)
        hf, found = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, trust_remote_code=False, output_loading_info=True, **how
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"{source}: {why_not(error, 'cannot be loaded as a causal LM')}") from None
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise InputError(f"{source}: its checkpoint is incomplete: {len(missing)} weights missing, {missing[0]} first")
    hf.eval()
    if "device_map" not in how:
        hf.to(place)
    return Model(hf, tokenizer, DEMO if str(name) == "demo" else str(name))


def _require(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"{what} needs {package}, which is not installed: pip install {package}")


def _how(source: str, config: Any, dtype: str, quantize: str | None, device: str, place: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`: dtype, and for what accelerate places as it is read, where and how."""
    stored = getattr(config, "quantization_config", None) is not None
    if stored and quantize is not None:
        raise InputError(f"{source} is stored quantised already; load it without quantize")
    how: dict[str, Any] = {"dtype": _dtype(config, dtype, quantize, place)}
    if stored or quantize is not None:
        _require("accelerate", "a quantised model")
        how["device_map"] = {"": place}
        # at every product it says that 8 bits are multiplied in float16
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if device == "balanced":
        _require("accelerate", "device 'balanced'")
        how["device_map"] = "auto"
    if quantize is not None:
        from transformers import BitsAndBytesConfig

        bits = {"load_in_8bit": True} if quantize == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": quantize}
        how["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=how["dtype"])
    return how


def _dtype(config: Any, asked: str, quantize: str | None, place: str) -> Any:
    """A torch dtype, or "auto" for as stored."""
    if asked in DTYPES:
        return DTYPES[asked]
    if asked == "auto" and place == "cpu":
        return torch.float32
    if quantize is None:
        return "auto"
    if asked == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    stored = getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, stored) if isinstance(stored, str) else stored or torch.float32


def _keep_layout(hf: nn.Module) -> None:
    """4-bit weights stay as they were loaded.

    On some processors the first forward of bitsandbytes lays them out anew, to compute in bfloat16 whatever was asked
    for, and the way back, which every `state_dict` takes, breaks them (0.50).
    """
    module: Any
    for name, module in hf.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise InputError(f"{name}: bitsandbytes has laid it out for this CPU; wrap the model before it is run")
            module.support_avx512bf16_for_cpu = False


def editable(model: Model) -> None:
    """Raises `InputError` for a model whose projections no edit can be written into: quantised, or kept elsewhere."""
    for layer in range(model.anatomy.n_layers):
        writable(model.anatomy.layer_name(layer), model.projection(layer))


def demo_file(name: str) -> Path:
    """A file of the embedded demo: `rewire/demo/<name>`."""
    return Path(str(files("rewire"))) / "demo" / name


def wrap(hf: nn.Module, tokenizer: Any, name: str | None = None) -> Model:
    """A model that is loaded already. Edits change `hf` in place."""
    return Model(hf, tokenizer, name)


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    kind = device.partition(":")[0]
    if kind not in there:
        raise InputError(f"device {device!r} is unknown; expected auto, cpu, cuda or cuda:N")
    if not there[kind]:
        raise InputError(f"device {device!r} was asked for, but torch sees none here; use --device cpu")
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def why_not(error: Exception, otherwise: str) -> str:
    """Why a model, or its config, is not there, in one line."""
    reason = " ".join(str(error).split())
    if "couldn't connect to" in reason or "offline mode" in reason:
        return "no such folder, not in the hub's cache, and the hub cannot be reached; name a folder with the model"
    return f"{otherwise}: {reason[:300]}"


def _refuse_other_tasks(source: str, config: Any) -> None:
    """BERT and its like load as causal LMs without a word: the config says what they were made for."""
    kinds = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{source}: {config.model_type} is an encoder-decoder model; expected a causal LM")
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if kinds and not any(kind.endswith(causal) for kind in kinds):
        raise InputError(
            f"{source}: {kinds[0]} is not a causal LM; expected a decoder-only model such as GPT-2 or Llama"
        )


def fingerprint(hf: nn.Module) -> str:
    """16 hex digits over the names, shapes and a sample of the values of all parameters.

    The values are rounded to bfloat16 first, so that one checkpoint loaded in float32 or bfloat16 is the same model.
    """
    parts = hashlib.sha256()
    for name, tensor in sorted(hf.state_dict(keep_vars=True).items()):
        flat = (_kept(hf, name) if tensor.is_meta else tensor).detach().reshape(-1)
        count = flat.numel()
        picked = flat[torch.arange(min(count, _SAMPLES), device=flat.device) * max(1, count // _SAMPLES)]
        parts.update(f"{name}:{tuple(tensor.shape)}".encode())
        parts.update(picked.to("cpu", torch.float32).bfloat16().view(torch.int16).numpy().tobytes())
    return parts.hexdigest()[:16]


def _kept(hf: nn.Module, name: str) -> Tensor:
    """A weight that accelerate keeps in another memory (in the model it is on "meta")."""
    path, _, leaf = name.rpartition(".")
    stored: Tensor = _offloader(hf.get_submodule(path)).weights_map[leaf]
    return stored


def _offloader(module: Any) -> Any:
    """The hook of accelerate's that brings a module's weights for a forward."""
    hook = module._hf_hook
    return next(part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "weights_map", None) is not None)
