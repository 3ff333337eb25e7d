"""Where an answer ends: a table over the vocabulary, and texts that several tokens may spell."""

from collections.abc import Sequence
from dataclasses import dataclass

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


def end_ids(model: Model) -> list[int]:
    """The tokens that end a text: those of the generation config (a chat model has several), and the tokenizer's."""
    config = getattr(model.hf, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = [*(named if isinstance(named, (list, tuple)) else [named]), model.tokenizer.eos_token_id]
    return [i for i in dict.fromkeys(ids) if i is not None and i < model.anatomy.vocab]


def ending(model: Model, texts: Sequence[str] = ()) -> Ending:
    """At the end of the text, and behind any token that holds one of these texts anywhere (arXiv 2502.11177: "." and
    a line break): the whole token counts as said.

    The end of the text also counts where ordinary tokens spell it, as in the stop strings of transformers.
    """
    tokenizer = model.tokenizer
    table = torch.zeros(model.anatomy.vocab, dtype=torch.bool)
    table[end_ids(model)] = True
    if not texts:
        return Ending(table)
    surface = model.token_texts
    spelled = tuple(text for text in (tokenizer.eos_token,) if text)
    table |= torch.tensor([any(text in token for text in (*texts, *spelled)) for token in surface])
    return Ending(table, spelled, surface)
