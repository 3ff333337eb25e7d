"""Where an answer ends: a table over the vocabulary, and texts that several tokens may spell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .model import Model


@dataclass(frozen=True)
class Ending:
    """Where an answer ends: behind the first token that `table` has, or whose text completes one of `spelled`.

    table: [vocab] bool on the CPU; spelled: texts that several tokens may spell; surface: the text of each token id,
    empty where nothing is spelled
    """

    table: Tensor
    spelled: tuple[str, ...] = ()
    surface: tuple[str, ...] = ()


def surfaces(tokenizer: Any, vocab: int) -> tuple[str, ...]:
    """The text of each token id as it stands within a text: with its space, special tokens as they are written."""
    prefix = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    known = min(vocab, len(tokenizer))
    whole = tokenizer.batch_decode(
        [[*prefix, i] for i in range(known)], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    before = tokenizer.decode(prefix, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tuple(text.removeprefix(before) for text in whole) + ("",) * (vocab - known)


def ending(model: Model, texts: Sequence[str] = ()) -> Ending:
    """At the end of the text, and behind any token that holds one of these texts anywhere (arXiv 2502.11177: "." and
    a line break): the whole token counts as said.

    The end of the text also counts where ordinary tokens spell it, as in the stop strings of transformers.
    """
    tokenizer = model.tokenizer
    config = getattr(model.hf, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = [*(named if isinstance(named, (list, tuple)) else [named]), tokenizer.eos_token_id]
    table = torch.zeros(model.anatomy.vocab, dtype=torch.bool)
    table[[i for i in ids if i is not None and i < len(table)]] = True
    if not texts:
        return Ending(table)
    surface = surfaces(tokenizer, len(table))
    spelled = tuple(text for text in (tokenizer.eos_token,) if text)
    table |= torch.tensor([any(text in token for text in (*texts, *spelled)) for token in surface])
    return Ending(table, spelled, surface)
