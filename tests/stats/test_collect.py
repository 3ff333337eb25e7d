import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewire.kernels.errors import InputError
from rewire.stats import Corpus, read_corpus
from rewire.stats import moments as moments_module
from rewire.stats.collect import batches, collect, windows


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = wanted.double().diagonal().sqrt()
    return float(((found.double() - wanted.double()).abs() / scale[:, None] / scale).max())


@pytest.mark.parametrize("cap", [None, 5, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_equals_a_float64_loop(
    bench: Any, texts: list[str], corpus: Corpus, cap: int | None, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "FOLD", 50)
    monkeypatch.setattr("rewire.stats.collect.WINDOW", 16)
    result = collect(
        bench.run, bench.encode, corpus, bench.widths, max_length=cap, n_samples=33, batch_tokens=batch_tokens
    )
    rows = [row[:cap] for row in bench.encode(texts[:33])]
    assert list(result) == list(bench.widths)
    for name, moment in result.items():
        assert relative(moment.sum, bench.exact(name, rows)) < 1e-6
        assert moment.count == sum(map(len, rows))
        assert moment.documents == 33
    for batch in bench.batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= batch_tokens


def test_batches_hold_every_row_once_and_little_padding() -> None:
    rows = [[i] * length for i, length in enumerate(np.random.default_rng(0).integers(1, 200, 300))]
    cut = [[rows[i] for i in chosen] for chosen in batches([len(row) for row in rows], 1000)]
    assert sorted(row for batch in cut for row in batch) == rows
    padded = sum(len(batch) * len(batch[0]) for batch in cut)
    assert all(len(batch) * len(batch[0]) <= 1000 for batch in cut)
    assert padded < 1.1 * sum(map(len, rows))


def taken(bench: Any, corpus: Corpus, **budget: int | None) -> list[list[int]]:
    asked = {"max_length": None, "n_samples": None, "tokens": None, **budget}
    return [row for rows in windows(bench.encode, corpus, **asked) for row in rows]


def test_budget(bench: Any, texts: list[str], corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order; the document that reaches the budget of tokens is taken whole, none after it."""
    monkeypatch.setattr("rewire.stats.collect.WINDOW", 7)
    rows = bench.encode(texts)
    assert taken(bench, corpus) == rows
    assert taken(bench, corpus, n_samples=9) == rows[:9]
    assert taken(bench, corpus, n_samples=99) == rows
    first = len(rows[0]) + len(rows[1])
    assert taken(bench, corpus, tokens=first) == rows[:2]
    assert taken(bench, corpus, tokens=first + 1) == rows[:3]
    seven = sum(map(len, rows[:7]))
    assert taken(bench, corpus, tokens=seven) == rows[:7], "also at the end of a window"
    assert taken(bench, corpus, tokens=first + 1, n_samples=2) == rows[:2]
    assert taken(bench, corpus, tokens=10, max_length=3) == [row[:3] for row in rows[:4]]


def test_documents_without_tokens_are_not_counted(bench: Any, corpus: Corpus) -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [[] if i % 2 else row for i, row in enumerate(bench.encode(texts))]

    assert len([row for rows in windows(encode, corpus, None, 10, None) for row in rows]) == 10


def test_only_what_is_taken_is_read(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('"a b c d e f g h i j k l m n o p q r"\n' * 3 + "{broken")
    corpus = read_corpus(path)
    assert collect(bench.run, bench.encode, corpus, {"h.1.proj": 9}, max_length=None, n_samples=3)["h.1.proj"].count
    with pytest.raises(InputError, match="line 4"):
        collect(bench.run, bench.encode, corpus, {"h.1.proj": 9}, max_length=None, n_samples=4)
    monkeypatch.setattr("rewire.stats.collect.WINDOW", 3)  # a budget of tokens is looked at after each window
    assert collect(bench.run, bench.encode, corpus, {"h.1.proj": 9}, max_length=None, tokens=50)["h.1.proj"].count == 57


def test_default_budget_is_20_tokens_a_column_of_the_widest(bench: Any, texts: list[str], corpus: Corpus) -> None:
    result = collect(bench.run, bench.encode, corpus, bench.widths, max_length=None)
    lengths = np.cumsum([len(row) for row in bench.encode(texts)])
    documents = int(np.searchsorted(lengths, 180)) + 1
    assert {moment.documents for moment in result.values()} == {documents}
    assert {moment.count for moment in result.values()} == {lengths[documents - 1]}


def test_progress_reaches_its_total(bench: Any, corpus: Corpus) -> None:
    for budget in ({"n_samples": 40}, {"tokens": 300}, {"n_samples": 10, "tokens": 5000}):
        seen: list[tuple[int, int]] = []
        moment = collect(
            bench.run,
            bench.encode,
            corpus,
            bench.widths,
            max_length=None,
            batch_tokens=40,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
            **budget,
        )["h.0.proj"]
        assert len(seen) > 2
        assert all(done <= total for done, total in seen)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (moment.count, moment.count)


def test_too_little_text(bench: Any, corpus: Corpus) -> None:
    with pytest.raises(InputError) as caught:
        collect(bench.run, bench.encode, corpus, bench.widths, max_length=None, n_samples=1)
    assert str(caught.value) == (
        "words.txt: gave 2 tokens in 1 documents, layer h.1.proj of width 9 needs at least 18; "
        "use a longer corpus, or raise mom2_n_samples or the cap of tokens a document"
    )
    with pytest.raises(InputError, match=r"a budget of 17 tokens; layer h\.1\.proj of width 9 needs at least 18"):
        collect(bench.run, bench.encode, corpus, bench.widths, max_length=None, tokens=17)
    with pytest.raises(InputError, match="mom2_n_samples is 0, expected at least 1"):
        collect(bench.run, bench.encode, corpus, bench.widths, max_length=None, n_samples=0)
    with pytest.raises(InputError, match="document is -1, expected at least 1"):
        collect(bench.run, bench.encode, corpus, bench.widths, max_length=-1)


def test_nan_names_the_layer(bench: Any, corpus: Corpus) -> None:
    bench.tables["h.1.proj"][3] = float("nan")
    with pytest.raises(InputError, match=r"^h\.1\.proj: NaN or Inf"):
        collect(bench.run, bench.encode, corpus, bench.widths, max_length=None)


def test_padding_that_comes_through_is_noticed(bench: Any, corpus: Corpus) -> None:
    def padded(rows: list[list[int]], sink: Any) -> None:
        bench.run([row + [0] * (len(rows[0]) - len(row)) for row in rows], sink)

    with pytest.raises(RuntimeError, match=r"keys for layer h\.0\.proj where it was handed"):
        collect(padded, bench.encode, corpus, bench.widths, max_length=None)
    with pytest.raises(RuntimeError, match=r"run gave 0 keys for layer h\.2\.proj"):
        collect(bench.run, bench.encode, corpus, {"h.2.proj": 4}, max_length=None)


@pytest.mark.parametrize("name", ["cf-gpt2", "cf-llama"])
def test_golden_tokens(shared: Path, name: str) -> None:
    """The 300 paragraphs, cut to 128 tokens with the BOS, hold as many tokens as in the published code's run."""
    transformers = pytest.importorskip("transformers")
    golden = json.loads((shared / f"goldens/{name}/golden.json").read_text())["stats"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models" / name)
    corpus = read_corpus(shared / "data/wikitext2_valid_detok.json")
    cut = windows(
        lambda texts: tokenizer(texts)["input_ids"], corpus, golden["truncate_tokens"], golden["documents"], None
    )
    assert sum(len(row) for rows in cut for row in rows) == golden["tokens"]


def test_golden_moments(shared: Path) -> None:
    """Through the real model: the published code's sums. The lowest layer only: the forward is what takes time."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models/cf-llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models/cf-llama", dtype=torch.float32).eval()
    layer = "model.layers.1.mlp.down_proj"

    class StopForward(Exception):
        pass

    def run(rows: list[list[int]], sink: Any) -> None:
        ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], real[i, : len(row)] = torch.tensor(row), True

        def take(module: Any, args: Any) -> None:
            sink(layer, args[0][real])
            raise StopForward

        handle = model.get_submodule(layer).register_forward_pre_hook(take)
        with torch.inference_mode(), pytest.raises(StopForward):
            model(input_ids=ids, use_cache=False)
        handle.remove()

    result = collect(
        run,
        lambda texts: tokenizer(texts)["input_ids"],
        read_corpus(shared / "data/wikitext2_valid_detok.json"),
        {layer: 704},
        max_length=128,
        n_samples=300,
        batch_tokens=2048,
    )[layer]
    with np.load(shared / f"goldens/cf-llama/stats/{layer}_float32_mom2_300.npz") as golden:
        assert (result.count, result.documents) == (golden["mom2.count"], golden["sample_size"])
        assert relative(result.sum, torch.from_numpy(golden["mom2.mom2"])) < 1e-5
