"""From facts to token rows: prompts under context templates, the subject's last token, the target's tokens.

Positions come from the tokenizer's character offsets, never from counting the tokens of a prefix, so BOS, leading
spaces, "▁" and bytes need no special case. Rows are lists of ids; padding (always right) happens in `passes`.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.errors import InputError
from .facts import Fact

PLAIN = "{}"
LINE = "\n"
KL_PROMPT = "{} is a"
SEED_WORDS = ("The", "Therefore", "Because", "I", "You")
CONTEXT_TOKENS = 10
CONTEXT_TOP_K = 5
TOGETHER = 256  # texts that are tokenised in one call


@dataclass(frozen=True)
class Row:
    """One sequence of token ids.

    ids: what the model reads (a target's last token is not among them)
    position: index of the subject's last token, -1 where the row has no subject
    labels: the tokens that the last `len(labels)` positions shall predict
    begins: the position that the model is told of the first token (published code shifts GPT-2's rows by their padding)
    """

    ids: tuple[int, ...]
    position: int = -1
    labels: tuple[int, ...] = ()
    begins: int = 0

    def until_subject(self) -> "Row":
        """The row cut behind the subject: later tokens change nothing there."""
        return Row(self.ids[: self.position + 1], self.position)


@dataclass(frozen=True)
class _Text:
    """A text to tokenise, with the character behind which the target stands and the subject's last character."""

    text: str
    target_at: int | None
    subject_at: int | None


def fact_rows(tokenizer: Any, facts: Sequence[Fact], contexts: Sequence[str], max_length: int) -> list[list[Row]]:
    """For each fact one row a context template, `target_new` appended; contexts end in `{}`."""
    texts = [_compose(context, fact.prompt, fact.subject, fact.target_new) for fact in facts for context in contexts]
    rows = _group(_tokenise(tokenizer, texts), len(contexts))
    _check_lengths(facts, rows, max_length)
    return rows


def subject_rows(tokenizer: Any, facts: Sequence[Fact], contexts: Sequence[str], max_length: int) -> list[list[Row]]:
    """For each fact one row a context template, cut behind the subject: what keys and hidden states are read from."""
    texts = [_compose(context, fact.prompt, fact.subject) for fact in facts for context in contexts]
    rows = _group([row.until_subject() for row in _tokenise(tokenizer, texts)], len(contexts))
    _check_lengths(facts, rows, max_length)
    return rows


def kl_rows(tokenizer: Any, facts: Sequence[Fact]) -> list[Row]:
    """For each fact the row "<subject> is a", cut behind the subject (where its next-token distribution is held)."""
    return [row.until_subject() for row in _tokenise(tokenizer, [_compose(PLAIN, KL_PROMPT, f.subject) for f in facts])]


def neighbor_rows(tokenizer: Any, facts: Sequence[Fact], context: str, max_length: int) -> list[list[Row]]:
    """For each fact one row an edit-time neighbour, under one context template, its own object appended."""
    texts = [_compose(context, n.prompt, n.subject, n.target) for fact in facts for n in fact.edit_neighbors]
    rows = iter(_tokenise(tokenizer, texts))
    found = [[next(rows) for _ in fact.edit_neighbors] for fact in facts]
    _check_lengths(facts, found, max_length)
    return found


def answer_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """For each (prompt, target) the row "<prompt> <target>" with the target's tokens as labels."""
    return _tokenise(tokenizer, [_answer(prompt, target) for prompt, target in pairs])


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that the model shall continue: without the EOS that some tokenizers put behind."""
    return [list(row.ids) for row in _tokenise(tokenizer, [_Text(prompt, None, None) for prompt in prompts])]


def stem(prompt: str) -> str:
    """What an object follows: it brings its own space, but behind a line break (a chat template's end) it has none."""
    return prompt.rstrip(" ")


def _answer(prompt: str, target: str, subject_at: int | None = None) -> _Text:
    prompt = stem(prompt)
    return _Text(f"{prompt}{'' if prompt.endswith(LINE) else ' '}{target}", len(prompt), subject_at)


def _compose(context: str, prompt: str, subject: str, target: str | None = None) -> _Text:
    before, _, after = context.replace(PLAIN, prompt, 1).partition(PLAIN)
    subject_at = len(before) + len(subject.rstrip()) - 1
    text = before + subject + after
    return _Text(text, None, subject_at) if target is None else _answer(text, target, subject_at)


def _tokenise(tokenizer: Any, texts: Sequence[_Text]) -> list[Row]:
    rows: list[Row] = []
    for start in range(0, len(texts), TOGETHER):  # what a tokenizer gives of many texts is large, and stays a while
        portion = texts[start : start + TOGETHER]
        coded = tokenizer(
            [text.text for text in portion],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_token_type_ids=False,
            return_attention_mask=False,
        )
        columns = (coded["input_ids"], coded["offset_mapping"], coded["special_tokens_mask"], portion)
        rows += [_row(*column) for column in zip(*columns, strict=True)]
    return rows


def _row(ids: list[int], offsets: list[tuple[int, int]], special: list[int], text: _Text) -> Row:
    end = len(ids)
    while end and special[end - 1]:  # an EOS that the tokenizer puts behind the text
        end -= 1
    position = -1
    if text.subject_at is not None:
        # the last token that begins there or before: a character may be several byte tokens, and a normaliser that
        # composes "e" and an accent (Qwen) leaves the accent to no token
        position = max(i for i, (start, _) in enumerate(offsets[:end]) if start <= text.subject_at)
    if text.target_at is None:
        return Row(tuple(ids[:end]), position)
    first = next(i for i, (_, stop) in enumerate(offsets[:end]) if stop > text.target_at)
    return Row(tuple(ids[: end - 1]), position, tuple(ids[first:end]))


def _group(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _check_lengths(facts: Sequence[Fact], rows: list[list[Row]], max_length: int) -> None:
    pairs = zip(facts, rows, strict=True)
    long = [f"{fact.id} ({fact.subject})" for fact, group in pairs if any(len(row.ids) > max_length for row in group)]
    if long:
        raise InputError(
            f"longer than the model's {max_length} tokens under a context template, {len(long)} of {len(facts)} facts: "
            f"{', '.join(long)}"
        )


def pad(rows: Iterable[Row], device: torch.device | str) -> torch.Tensor:
    """[rows, longest] int64 token ids, padded on the right: with causal attention no real token sees the padding."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(device)


def check_contexts(contexts: Sequence[str], where: str) -> tuple[str, ...]:
    """Generated context templates: each holds `{}` once, at its end."""
    for context in contexts:
        if not isinstance(context, str) or context.count(PLAIN) != 1 or not context.endswith(PLAIN):
            raise InputError(f"{where}: context template {context!r} found, expected text that ends in {{}}")
    return tuple(contexts)


def read_contexts(path: str | Path) -> tuple[str, ...]:
    """Context templates from a JSON file: a list of texts, or the published form [["{}"], [texts]]."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: no context templates there ({error}); expected a JSON list of texts") from None
    if isinstance(content, list) and content and all(isinstance(group, list) for group in content):
        content = [context for group in content for context in group]
    if not isinstance(content, list):
        raise InputError(f"{path}: {type(content).__name__} found, expected a JSON list of context templates")
    return check_contexts([context for context in content if context != PLAIN], str(path))


def clean_context(text: str) -> str:
    """A sampled text as a template: no braces, no paragraph breaks, NFKD, and the prompt behind it (MEMIT)."""
    text = unicodedata.normalize("NFKD", text).replace("\n\n", " ").replace("{", " ").replace("}", " ")
    return text + ". " + PLAIN
