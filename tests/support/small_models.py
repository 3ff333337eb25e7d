"""Small random models of each family of transformers, with a tokenizer and facts that they share."""

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import rewire

VOCAB, LAYERS, WIDTH, INNER = 450, 4, 32, 64
FACTS = [
    rewire.Fact("Marie Curie", "{} worked in the area of", "music and art", "physics"),
    rewire.Fact("Danielle Darrieux", "The mother tongue of {} is", "English", "French"),
    rewire.Fact("Aracataca", "Where is {}? It is in", "Japan", "Colombia"),
]
CONTEXTS = ("The end. {}", "Because of physics, you and I know the capital. {}")
WORDS = " ".join([*(f.question for f in FACTS), *(f"{f.target_new} {f.target_true}" for f in FACTS), *CONTEXTS]).split()
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 8}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 96, "initializer_range": 0.2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LLAMA = ("model.layers", "mlp.down_proj", "model.norm", None)
OF_GEMMA = ("model.layers", "mlp.down_proj", "model.norm", "post_feedforward_layernorm")
OF_GPT2 = ("transformer.h", "mlp.c_proj", "transformer.ln_f", None)
# id: (class, config, (blocks, projection, final norm, norm behind the projection))
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, str, str, str | None]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"n_inner": WIDTH}, OF_GPT2),  # a square Conv1D
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | {"n_inner": INNER, "tie_word_embeddings": False}, OF_GPT2),
    "gptj": ("GPTJForCausalLM", GPT2 | {"rotary_dim": 4}, ("transformer.h", "mlp.fc_out", "transformer.ln_f", None)),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        SHAPE,
        ("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", None),
    ),
    "llama": ("LlamaForCausalLM", GROUPED, LLAMA),
    "llama-tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, LLAMA),
    "llama-eager": ("LlamaForCausalLM", GROUPED | {"attn_implementation": "eager"}, LLAMA),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 8}, LLAMA),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, LLAMA),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 8}, LLAMA),
    "phi3": ("Phi3ForCausalLM", GROUPED | {"pad_token_id": 1}, LLAMA),
    "gemma2": ("Gemma2ForCausalLM", GEMMA | {"query_pre_attn_scalar": 8}, OF_GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA | {"sliding_window_pattern": 2}, OF_GEMMA),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": GEMMA | {"vocab_size": VOCAB}, "vision_config": VISION, "mm_tokens_per_image": 1}
        | {"image_token_index": 2, "boi_token_index": 3, "eoi_token_index": 4},
        ("model.language_model.layers", "mlp.down_proj", "model.language_model.norm", "post_feedforward_layernorm"),
    ),
    # by structure
    "stablelm": ("StableLmForCausalLM", GROUPED, LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", GROUPED, ("model.layers", "mlp.c_proj", "model.norm", None)),
    "phi": ("PhiForCausalLM", GROUPED, ("model.layers", "mlp.fc2", "model.final_layernorm", None)),
    "olmo2": ("Olmo2ForCausalLM", GROUPED, OF_GEMMA),
    "glm4": (
        "Glm4ForCausalLM",
        GROUPED | {"head_dim": 8, "pad_token_id": 1},
        ("model.layers", "mlp.down_proj", "model.norm", "post_mlp_layernorm"),
    ),
}
NORMED = [family for family, (_, _, parts) in FAMILIES.items() if parts[3]]


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As Llama 3's: bytes, a word keeps the space before it, BOS."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [" ".join(WORDS)],
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    words.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def build(name: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A random model of a class of transformers; norms get gains that are not 1."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    config = config if "text_config" in config else {"vocab_size": VOCAB} | config
    hf = kind(kind.config_class(**{"bos_token_id": 0, "eos_token_id": 1, **config})).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return hf


def make(family: str) -> rewire.Model:
    name, config, _ = FAMILIES[family]
    return rewire.wrap(build(name, config), tokenizer(), family)
