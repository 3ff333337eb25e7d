"""Models of published shapes with random weights, and facts to edit into them: a profile needs no download."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ..engine.datasets import read_facts
from ..engine.facts import Fact
from ..engine.hparams import Hparams, load_hparams
from ..engine.model import Model, demo_file
from ..kernels.errors import InputError
from ..stats.memory import free_bytes
from .stats import random_model


@dataclass(frozen=True)
class Shape:
    """kind: the family, by transformers' name; sizes: its config's keys, others as that family has them
    preset: the shipped MEMIT preset that is edited with, None: the defaults and `settings`
    settings: hyper-parameters that replace the preset's
    source: where the sizes and the layers are from
    """

    kind: str
    sizes: Mapping[str, Any]
    preset: str | None
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


SHAPES: Mapping[str, Shape] = {
    "gpt2": Shape(
        "gpt2",
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
        None,
        "openai-community/gpt2, config.json; layers as in `rewire bench stats`",
        {"layers": [3, 4, 5], "v_lr": 0.5, "v_num_grad_steps": 20, "mom2_update_weight": 20000.0},
    ),
    "gpt2-xl": Shape(
        "gpt2",
        {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 1024},
        "gpt2-xl",
        "openai-community/gpt2-xl, config.json",
    ),
    "gpt-j-6b": Shape(
        "gptj",
        {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400, "n_positions": 2048,
         "tie_word_embeddings": False},
        "gpt-j-6B",
        "EleutherAI/gpt-j-6b, config.json",
    ),
    "llama-3-8b": Shape(
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        "llama-3-8b",
        "meta-llama/Meta-Llama-3-8B, config.json",
    ),
    "qwen2.5-7b": Shape(
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
         "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        None,
        "Qwen/Qwen2.5-7B, config.json; hyper-parameters of EasyEdit's qwen2.5-7b.yaml for MEMIT",
        {"layers": [4, 5, 6, 7, 8], "v_lr": 0.5, "v_num_grad_steps": 25, "clamp_norm_factor": 4.0,
         "v_weight_decay": 1e-3, "mom2_update_weight": 15000.0},
    ),
}  # fmt: skip

# besides the plain one; some 10 tokens each
CONTEXTS = (
    "The harbour is near the gate. {}",
    "Because the lamp was out, they rested. {}",
    "My teacher told me so. {}",
    "You must wait for the ferry. {}",
    "I was told that the song is true. {}",
)


def find_shape(name: str) -> Shape:
    """Raises `InputError` with the nearest name for an unknown one."""
    if name not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SHAPES)}"
        raise InputError(f"--config {name}: no such shape; {hint}")
    return SHAPES[name]


def shaped_model(
    name: str, device: str, dtype: torch.dtype = torch.float32, sizes: Mapping[str, Any] | None = None
) -> Model:
    """Random weights in a published shape, made on the device, and the demo's tokenizer.

    sizes: of its config, instead of the published ones
    """
    shape = find_shape(name)
    config = CONFIG_MAPPING[shape.kind](**(sizes or shape.sizes))
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, dtype=dtype).parameters())
    needed, free = weights * dtype.itemsize, free_bytes(torch.device(device))
    if needed > free and device != "meta":
        raise InputError(
            f"--config {name}: its weights take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, "
            f"{free / 2**30:.1f} GiB are free; expected room for them: try a smaller shape, or --dtype bfloat16"
        )
    return random_model(config, f"{name} by its shape, random weights", device, dtype)


def shaped_hparams(name: str, model: Model, settings: Mapping[str, Any]) -> Hparams:
    """MEMIT's for that shape; settings: single values that replace them."""
    shape = find_shape(name)
    settings = {**shape.settings, **settings}
    if shape.preset is None:
        hparams = Hparams(**settings)
        hparams.check(model.anatomy, lambda _: f"--config {name}")
        return hparams
    return load_hparams(Hparams, "memit", model.name, model.anatomy, shape.preset, settings)[0]


def made_facts(count: int) -> list[Fact]:
    """`count` facts whose prompts all differ: the demo's, then its subjects under the prompts of other ones.

    The same for the same count. In turn r subject i gets the prompt, the objects and the paraphrases of fact i + r.
    """
    known = read_facts(demo_file("facts.jsonl"))
    found: dict[str, Fact] = {}
    for turn in range(len(known)):
        for number, fact in enumerate(known):
            other = known[(number + turn) % len(known)]
            asked = fact if turn == 0 else _about(fact.subject, other, f"{fact.id}-{turn}")
            found.setdefault(asked.question, asked)
            if len(found) == count:
                return list(found.values())
    raise InputError(f"--facts {count}: {len(found)} can be made; name a file of more by --data")


def _about(subject: str, other: Fact, name: str) -> Fact:
    paraphrases: Sequence[str] = [text.replace(other.subject, subject) for text in other.paraphrases]
    return replace(other, subject=subject, paraphrases=tuple(paraphrases), id=name)
