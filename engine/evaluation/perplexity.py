"""Perplexity of plain texts: what an edit does to the rest of the language (ME-PPL-50: on 50 sentences)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ...kernels.errors import InputError
from ...stats import read_corpus
from ...stats.documents import clean
from ..facts import read_text
from ..model import Model
from ..phases import Tick
from ..prompts import Row, prompt_ids
from ..scores import perplexity, token_scores


def perplexities(
    model: Model,
    texts: Sequence[str],
    compat: bool = False,
    batch_tokens: int | None = None,
    progress: Tick = lambda done, total: None,
) -> list[float]:
    """exp of the mean negative log-probability of each text's tokens, given those before them; batched.

    Of N tokens (BOS included, where the tokenizer puts one) N - 1 are predicted, and the mean is over these.
    compat: the sum is divided by N instead, as in the published code of UnderEdit/OverEdit
    batch_tokens: padded tokens of a forward; None: from the free memory
    Raises `InputError` for a text of fewer than two tokens, and for one that is longer than the model's longest row.
    """
    coded = prompt_ids(model.tokenizer, texts)
    for number, (text, ids) in enumerate(zip(texts, coded, strict=True), 1):
        named = f"text {number} of {len(texts)} ({text[:40]!r})"
        if len(ids) < 2:
            count = "1 token" if len(ids) == 1 else "no token"
            raise InputError(f"{named} has {count}, expected two or more: a first token has no perplexity")
        if len(ids) - 1 > model.max_length:
            raise InputError(f"{named} has {len(ids)} tokens, the model takes {model.max_length}; cut it")
    rows = [Row(tuple(ids[:-1]), labels=tuple(ids[1:])) for ids in coded]
    scored = token_scores(model, rows, batch_tokens, progress)
    return [perplexity(-math.fsum(a.logprobs) / (len(a.labels) + compat)) for a in scored]


def read_texts(path: str | Path) -> list[str]:
    """Texts of a file, as they are: leading spaces count.

    path: a `.json` list of texts, or of objects with a `Text` (as ME-PPL-50 has them) or `text`; or any other file
        that `stats.read_corpus` reads (`.txt` with blank lines between texts, `.jsonl`, `.parquet`, `.gz`)
    Raises `InputError` where it is none of these, or holds no text.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found}, expected texts as .json, .jsonl or .txt")
    if path.suffix.lower() != ".json":
        return list(read_corpus(path))
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: broken JSON ({error.msg})") from None
    if not isinstance(content, list):
        raise InputError(f"{path}: {type(content).__name__} found, expected a JSON list of texts")
    texts = []
    for number, item in enumerate(content):
        text = item.get("Text", item.get("text")) if isinstance(item, dict) else item
        if not isinstance(text, str):
            what = f"an object with {', '.join(item) or 'nothing'}" if isinstance(item, dict) else type(item).__name__
            raise InputError(f"{path}: item {number}: {what} found, expected a text, or an object with a `Text`")
        texts.append(text)
    if not texts:
        raise InputError(f"{path}: no texts in it, expected at least one")
    return clean(texts)
