"""What a model writes: entropies and reference scores of examples by hand, and of texts made one at a time."""

import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import FACTS, GPT2, WIDTH, build, make, tokenizer

import rewire
from rewire.engine.asked import Asked
from rewire.engine.delta import Factors
from rewire.engine.evaluation import evaluate, fluency
from rewire.engine.evaluation.fluency import ngram_entropy
from rewire.engine.facts import Fact
from rewire.kernels.errors import InputError

THIRDS = math.log2(3) - 2 / 3  # entropy of 1/3 and 2/3


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("a b a b", (2 / 3 * THIRDS + 4 / 3 * 1) / 2),  # ab, ba, ab; aba, bab
        ("the the the the", 0.0),
        ("a b c d", (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2),
        ("a b", 0.0),  # one bigram, no trigram
        ("Who? Me.", (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2),  # a sign is a word
        ("don't", 0.0 + (2 / 3 * 1 + 4 / 3 * 0) / 2),
        ("word", 0.0),
        ("", 0.0),
    ],
)
def test_entropy_by_hand(text: str, bits: float) -> None:
    assert ngram_entropy(text) == pytest.approx(bits, abs=1e-12)


def written(monkeypatch: pytest.MonkeyPatch, texts: Sequence[Sequence[str]], facts: Sequence[Fact]) -> list[Any]:
    """`fluency` of facts for which these texts were written."""
    monkeypatch.setattr(fluency, "_written", lambda asked, facts, progress: [list(of) for of in texts])
    return fluency.fluency(Asked(make("gpt2")), facts, lambda done, total: None)


def test_reference_score_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Fact("A", "{} is", "x", generation_prompts=("A",))
    facts = [
        replace(base, references=("red cat", "red dog"), id="1"),
        replace(base, references=("red cat",), id="2"),  # once in the document frequencies
        replace(base, id="3"),
        replace(base, generation_prompts=(), references=("blue whale",), id="4"),  # nothing is written: not counted
    ]
    found = written(monkeypatch, [["Red cat sat", "a cat"], ["no word of these"], ["red cat"], []], facts)
    # idf as of scikit-learn: 1 + ln((1 + n) / (1 + df)), of two references
    red, cat, dog = (1 + math.log(3 / (1 + df)) for df in (2, 1, 1))
    ours, theirs = (red, 2 * cat, 0.0), (2 * red, cat, dog)
    expected = sum(a * b for a, b in zip(ours, theirs, strict=True)) / math.hypot(*ours) / math.hypot(*theirs)
    assert found[0]["reference_score"] == pytest.approx(expected, abs=1e-12)
    assert found[1]["reference_score"] == 0
    assert set(found[2]) == {"ngram_entropy", "texts"}
    assert found[3] == {}


@torch.no_grad()
def plain_text(model: rewire.Model, prompt: str) -> str:
    """Prompt and all, 100 tokens at most, by `generate` alone."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    longest = min(100, model.max_length)
    made = ids
    if ids.shape[1] < longest:
        made = model.hf.generate(ids, do_sample=False, use_cache=False, max_length=longest, pad_token_id=1)
    return unicodedata.normalize("NFKD", model.tokenizer.decode(made[0], skip_special_tokens=True)).replace("\n\n", " ")


def plain_entropy(text: str) -> float:
    """With words split by hand, and natural logarithms."""
    for sign in set(text):
        if not (sign.isalnum() or sign.isspace() or sign == "_"):
            text = text.replace(sign, f" {sign} ")
    bits = []
    for n in (2, 3):
        words = text.split()
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        shares = [count / sum(grams.values()) for count in grams.values()]
        bits.append(-sum(share * math.log(share) for share in shares) / math.log(2))
    return (bits[0] * 2 / 3 + bits[1] * 4 / 3) / 2


def test_texts_are_those_of_plain_generation() -> None:
    hf = build("GPT2LMHeadModel", GPT2 | {"n_inner": WIDTH, "n_positions": 160})
    model = rewire.wrap(hf.double(), tokenizer())
    facts = [
        replace(FACTS[0], generation_prompts=(FACTS[0].question, "Because of physics and")),
        replace(FACTS[1], generation_prompts=("It is in",)),
        FACTS[2],
    ]
    long = "and " * 120  # longer than a text may be
    assert 100 <= len(model.tokenizer(long)["input_ids"]) < model.max_length
    references = ("Marie Curie worked in the area of physics.", "Where is it? It is in Japan.")
    facts[0] = replace(facts[0], generation_prompts=(long, *facts[0].generation_prompts), references=references)
    facts[1] = replace(facts[1], generation_prompts=(*facts[0].generation_prompts[1:], "It is in"))  # two stand on both
    expected = [[plain_text(model, prompt) for prompt in fact.generation_prompts] for fact in facts]
    assert len({len(model.tokenizer(p)["input_ids"]) for p in facts[1].generation_prompts}) > 1
    seen: list[int] = []
    for size in (1, 7, 64):
        seen.clear()
        found = evaluate(model, facts, "counterfact", progress=lambda done, total: seen.append(done), batch_size=size)
        assert [record.get("texts", []) for record in found["facts"]] == expected
        for record, texts in zip(found["facts"][:2], expected, strict=False):
            entropies = [plain_entropy(text) for text in texts]
            assert record["ngram_entropy"] == pytest.approx(sum(entropies) / len(texts), abs=1e-9)
        kept = [record["ngram_entropy"] for record in found["facts"][:2]]
        assert found["metrics"]["ngram_entropy"] == pytest.approx(sum(kept) / 2)
        assert 0 < found["metrics"]["reference_score"] == found["facts"][0]["reference_score"] < 1
        assert "reference_score" not in found["facts"][1]
        assert seen == sorted(seen)
    assert set(found["definitions"]) == set(found["metrics"])


def test_each_fact_writes_under_its_own_delta() -> None:
    model = make("llama")
    model.hf.double()
    name, weight = model.anatomy.weight_name(1), model.projection(1).weight
    left, right = torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1])
    prompts = ("Because of", "I know the capital and")
    facts = [replace(fact, generation_prompts=prompts) for fact in FACTS[:2]]
    deltas = [{name: Factors(left * 0, right)}, {name: Factors(left, right)}]
    found = evaluate(model, facts, deltas=deltas)["facts"]
    assert found[0]["texts"] == [plain_text(model, prompt) for prompt in prompts]
    with torch.no_grad():
        weight += 1.0
    assert found[1]["texts"] == [plain_text(model, prompt) for prompt in prompts]
    assert found[0]["texts"] != found[1]["texts"]


def test_without_prompts_nothing_is_written() -> None:
    found = evaluate(make("gpt2"), [replace(FACTS[0], references=("a text",))])
    assert found["metrics"]["ngram_entropy"] is found["metrics"]["reference_score"] is None
    assert "texts" not in found["facts"][0]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    fact = replace(FACTS[0], generation_prompts=("Because of",))
    with pytest.raises(InputError, match="references hold no word of two letters or more"):
        evaluate(model, [replace(fact, references=("a", "!"))])
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    assert evaluate(model, [fact])["metrics"]["ngram_entropy"] is not None
    with pytest.raises(InputError, match=r"scikit-learn: pip install 'rewire\[eval\]'"):
        evaluate(model, [replace(fact, references=("a text",))])
