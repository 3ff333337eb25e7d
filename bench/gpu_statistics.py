"""Second moments of a large model's layers on a GPU, against the floor: what `rewire bench gpu` says of statistics.

Needs transformers, which the rest of that command does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .ceilings import Ceilings, Found, reason_of
from .timing import single

PROJECTED = 44_000_000  # tokens that the published statistics hold: 100 000 documents of Wikipedia
BOUND = 2e-2  # relative Frobenius norm: both sides run in bfloat16, but with other shapes


@dataclass(frozen=True)
class Load:
    """config: of a Llama, cut behind the last of `layers`; of: blocks of the whole model

    tokens: of documents of 220 to 660 tokens (or `longest`), ids at random; few: of those that are checked
    """

    config: Mapping[str, Any]
    of: int
    layers: tuple[int, ...]
    tokens: int
    few: int
    longest: int = 660


LLAMA3_8B = Load(
    {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 9, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    of=32, layers=(4, 5, 6, 7, 8), tokens=1_000_000, few=32768,
)  # fmt: skip
TINY = Load(
    {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
    },
    of=4, layers=(0, 1), tokens=1000, few=300, longest=45,
)  # fmt: skip


def measure_statistics(load: Load, device: torch.device, ceilings: Ceilings) -> Found:
    """A row: "status" is "measured", "wrong" (then without figures) or "not measured", with the reason in "note".

    Few documents are checked against the published structure on the same weights, all in bfloat16, at the first and the
    last layer. floor_fraction is that of the whole run; streaming_fraction leaves out what does not grow with the
    tokens (running sums brought to the CPU and packed), and projected_seconds is what 44 M tokens take.
    """
    shape = {"d": load.config["intermediate_size"], "layers": len(load.layers), "tokens": load.tokens}
    row: Found = {
        "name": "statistics",
        "dtype": "bfloat16",
        "shape": shape,
        "model": f"random weights, {load.config['num_hidden_layers']} of {load.of} blocks",
        "status": "not measured",
    }
    try:
        from . import stats
    except ImportError as missing:
        return row | {"note": f"needs {missing.name or 'transformers'}"}
    try:
        return row | _measured(stats, load, device, ceilings)
    except torch.OutOfMemoryError as failure:
        return row | {"note": reason_of(failure)}
    except Exception as failure:  # a bug here must not cost the sections that follow
        return row | {"status": "wrong", "note": reason_of(failure)}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(stats: Any, load: Load, device: torch.device, ceilings: Ceilings) -> Found:
    from transformers import LlamaConfig

    model = stats.random_model(LlamaConfig(**load.config), "llama", str(device), torch.bfloat16)
    names = [model.anatomy.layer_name(layer) for layer in load.layers]
    rows = stats.random_rows(load.tokens, load.longest, model.anatomy.vocab)
    few = stats.Tokenised(rows.held[: len(rows.held) * load.few // load.tokens], rows.source)
    found = stats.collected(model, names, few)
    errors = []
    for name in dict.fromkeys((names[0], names[-1])):  # one at a time: on the CPU each takes seconds and gigabytes
        wanted = stats.published_moments(model, few.held, {name: found[name].width}, load.longest)[name]
        errors.append(stats.difference(found.pop(name).sum, wanted, torch.bfloat16))
        del wanted
    error = float(torch.tensor(errors).max())  # NaN where one is
    if not error <= BOUND:
        return {"status": "wrong", "note": f"error {error:.1e}, at most {BOUND:.0e} expected"}

    def timed(taken: Any) -> float:
        return float(single(lambda: stats.collected(model, names, taken), device).p50)

    short = timed(few)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(rows)
    lengths, few_tokens = [len(row) for row in rows.held], sum(map(len, few.held))
    least = stats.floor_seconds(model, names, lengths, lambda cost, dtype: ceilings.floor(cost, dtype, device))
    each = max(seconds - short, 1e-9) / (load.tokens - few_tokens)  # of a token, without what is done once
    return {
        "status": "measured",
        "note": "",
        "error": error,
        "bound": BOUND,
        "documents": len(lengths),
        "seconds": seconds,
        "tokens_per_second": load.tokens / seconds,
        "floor_seconds": least,
        "floor_fraction": least and least / seconds,
        "streaming_fraction": least and least / load.tokens / each,
        "projected_tokens": PROJECTED,
        "projected_seconds": seconds + each * (PROJECTED - load.tokens),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
