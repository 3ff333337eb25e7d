"""Perplexities of texts: batched they are the model's own loss, one text at a time; which files are texts."""

import json
import math
from pathlib import Path

import pytest
import torch
from small_models import make

import rewire
from rewire.engine.asked import Asked
from rewire.engine.evaluation.perplexity import perplexities, read_texts
from rewire.engine.scores import perplexity
from rewire.kernels.errors import InputError

TEXTS = ["You and I know the capital.", " Because of physics", "Where is it? " * 6, "a b"]


@torch.no_grad()
def own_losses(model: rewire.Model, text: str) -> tuple[float, int]:
    """(the model's own mean loss over the predicted tokens, N), by plain transformers."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    return float(model.hf(input_ids=ids, labels=ids).loss), ids.shape[1]


@pytest.mark.parametrize("budget", [None, 1, 40])
def test_batched_is_one_by_one(known: rewire.Model, shared: Path, budget: int | None) -> None:
    texts = read_texts(shared / "data" / "ME-PPL_50.json")
    assert len(texts) == 50
    assert texts[0].startswith(" Regions")  # as it stands
    chosen = [*texts[:12], texts[0]]
    found = perplexities(Asked(known, batch_tokens=budget), chosen)
    losses = [own_losses(known, text) for text in chosen]
    assert found == pytest.approx([math.exp(loss) for loss, _ in losses], rel=1e-4)
    published = perplexities(Asked(known, batch_tokens=budget), chosen, compat=True)
    assert published == pytest.approx([math.exp(loss * (n - 1) / n) for loss, n in losses], rel=1e-4)


def test_of_a_family_with_bos() -> None:
    model = make("llama")
    found = perplexities(Asked(model), TEXTS)
    assert found == pytest.approx([math.exp(own_losses(model, text)[0]) for text in TEXTS], rel=1e-5)
    seen: list[tuple[int, int]] = []
    perplexities(Asked(model, batch_tokens=1), TEXTS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 4) for n in (1, 2, 3, 4)]
    assert perplexities(Asked(model), []) == []


def test_texts_without_a_perplexity_are_named(known: rewire.Model) -> None:
    bos = len(known.tokenizer("a")["input_ids"]) - 1
    with pytest.raises(InputError, match=r"text 2 of 2 \(''\) has no token, expected two or more"):
        perplexities(Asked(known), ["a b", ""])
    if bos:
        assert len(perplexities(Asked(known), ["a"])) == 1
    else:
        with pytest.raises(InputError, match=r"text 1 of 2 \('a'\) has 1 token, expected two or more"):
            perplexities(Asked(known), ["a", "a b"])
    with pytest.raises(InputError, match=r"text 1 of 1 \('a a a.*\) has \d+ tokens, the model takes 256; cut it"):
        perplexities(Asked(known), ["a " * 400])


def test_a_broken_model_still_has_a_number() -> None:
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(math.inf) == perplexity(math.nan) == perplexity(1e9) == math.exp(500)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([" one text", {"Text": "two"}, {"text": "three"}])),
        ("a.jsonl", '" one text"\n{"text": "two"}\n"three"\n'),
        ("a.txt", " one text\n\ntwo\n\nthree\n"),
    ],
)
def test_files_of_texts(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert [text.strip() for text in read_texts(tmp_path / name)] == ["one text", "two", "three"]
    if name != "a.txt":
        assert read_texts(tmp_path / name)[0] == " one text"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"Text": "a"}', "dict found, expected a JSON list"),
        ("[]", "no texts in it"),
        ('["a", 3]', "item 1: int found"),
        ('["a", {"Corpus": "C4"}]', "item 1: an object with Corpus found, expected a text, or an object with a `Text`"),
        ('["a",', "line 1: broken JSON"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        read_texts(tmp_path / "a.json")
    with pytest.raises(InputError, match="no such file"):
        read_texts(tmp_path / "b.json")
