"""Perplexity of plain texts: what an edit does to the rest of the language (ME-PPL-50: on 50 sentences)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ...stats import read_corpus
from ...stats.documents import clean
from ..asked import Asked, mean
from ..facts import Fact, read_text
from ..model import Model
from ..phases import Tick
from ..prompts import Row, prompt_ids
from ..scores import Answer, perplexity
from .registry import Protocol


def measure(
    asked: Asked, facts: Sequence[Fact], progress: Tick, *, texts: Sequence[str] = (), compat: bool = False
) -> dict[str, Any]:
    """Of the weights as they are; facts say nothing here, and there may be none.

    texts: what is read, one at least
    compat: as of `perplexities`, for `perplexity`

    facts: a record a text: {"id": "text 1", ..., "token_count": of those that are predicted, "perplexity"}
    Raises `InputError` without texts, under deltas beside the weights, and as `perplexities`.
    """
    check_texts("perplexity", asked, texts)
    scored = asked.scores(text_rows(asked.model, texts), progress)
    each = [_perplexity(answer, compat) for answer in scored]
    every = [value for answer in scored for value in answer.logprobs]
    records = [
        {"id": f"text {number}", "token_count": len(answer.labels), "perplexity": value}
        for number, (answer, value) in enumerate(zip(scored, each, strict=True), 1)
    ]
    whole = perplexity(-math.fsum(every) / len(every))
    return {"metrics": {"perplexity": mean(each), "perplexity_tokens": whole}, "facts": records}


def check_texts(protocol: str, asked: Asked, texts: Sequence[str]) -> None:
    """Raises `InputError` without texts, and where each fact has a delta of its own: which one would read them?"""
    if isinstance(texts, str) or not texts:
        found = "a single text" if texts else "none"
        raise InputError(f"protocol {protocol}: {found} given as texts; expected a list of one or more")
    refuse_deltas(protocol, asked)


def refuse_deltas(protocol: str, asked: Asked) -> None:
    """Raises `InputError` where each fact has a delta of its own beside the weights."""
    if asked.deltas:
        said = f"protocol {protocol} measures the weights as they are, {len(asked.deltas)} deltas beside them given"
        raise InputError(f"{said}; apply one of them, and measure that")


def text_rows(model: Model, texts: Sequence[str]) -> list[Row]:
    """Of each text of N tokens (BOS included, where the tokenizer puts one) the row that predicts all but the first.

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
    return [Row(tuple(ids[:-1]), labels=tuple(ids[1:])) for ids in coded]


def perplexities(
    asked: Asked, texts: Sequence[str], compat: bool = False, progress: Tick = lambda done, total: None
) -> list[float]:
    """exp of the mean negative log-probability of each text's tokens, given those before them; batched.

    Of N tokens N - 1 are predicted, and the mean is over these; texts: as of `text_rows`, which raises
    compat: the sum is divided by N instead, as in the published code of UnderEdit/OverEdit
    """
    return [_perplexity(answer, compat) for answer in asked.scores(text_rows(asked.model, texts), progress)]


def _perplexity(answer: Answer, compat: bool) -> float:
    return perplexity(-math.fsum(answer.logprobs) / (len(answer.labels) + compat))


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


METRICS = {
    "perplexity": "mean over texts of exp(mean negative log-probability of a text's tokens behind the first)",
    "perplexity_tokens": "exp(mean negative log-probability) of the tokens of all texts together",
}

PROTOCOL = Protocol("perplexity", measure, METRICS, options=("texts", "compat"))
