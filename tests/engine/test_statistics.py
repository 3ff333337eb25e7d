"""Second moments through real model code: against a plain loop over documents in float64, and the goldens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, GPT2Config, GPTJConfig, LlamaConfig

import rewire
from rewire.engine.model import demo_file
from rewire.engine.statistics import second_moments
from rewire.engine.streams import can_pack
from rewire.kernels.errors import InputError
from rewire.stats import Corpus, read_corpus
from rewire.stats.collect import Budget

SHAPES: dict[str, Any] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=96),
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=88, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=96,
    ),
    "gptj": GPTJConfig(n_embd=32, n_layer=4, n_head=4, rotary_dim=4, n_positions=96),
    "gemma2": Gemma2Config(
        hidden_size=32, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=96, sliding_window=24, query_pre_attn_scalar=8,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest) -> rewire.engine.model.Model:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_file("."))
    torch.manual_seed(0)
    config = SHAPES[request.param]
    config.vocab_size = len(tokenizer)
    config.initializer_range = 0.2  # keys that differ
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return rewire.wrap(hf, tokenizer, request.param)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Ragged documents, a blank one and one far beyond the cap among them."""
    texts = list(read_corpus(demo_file("corpus.txt")))[:60]
    texts[7] = "  "
    texts[11] = " ".join(texts[20:40])
    path = tmp_path_factory.mktemp("corpus") / "ragged.json"
    path.write_text(json.dumps(texts))
    return read_corpus(path)


def plain(model: Any, texts: list[str], names: list[str], cap: int) -> tuple[dict[str, torch.Tensor], int]:
    """Every document alone through the whole model; sums in float64."""
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"][:, :cap].long()
        if ids.numel() == 0:
            continue
        tokens += ids.shape[1]
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.hf.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name, seen=seen: seen.__setitem__(name, args[0][0].double())
            )
            for name in names
        ]
        with torch.no_grad():
            model.hf(input_ids=ids)
        for handle in handles:
            handle.remove()
        for name, X in seen.items():
            sums[name] = sums.get(name, 0) + X.T @ X
    return sums, tokens


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = wanted.double().diagonal().sqrt()
    return float(((found.double() - wanted.double()).abs() / scale[:, None] / scale).max())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cap", [13, 512])
def test_equals_a_float64_loop(
    model: Any, corpus: Corpus, packed: bool, cap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [model.anatomy.layer_name(layer) for layer in (2, 0, 1)]
    if packed and not can_pack(model, names):
        assert model.name == "gptj", "whose attention does not go through the interface"
        pytest.skip("served padded")
    monkeypatch.setattr("rewire.engine.statistics.can_pack", lambda *_: packed)
    monkeypatch.setattr("rewire.engine.statistics.tokens_that_fit", lambda *_: 150)
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 800)
    budget = Budget(cap, documents=45)
    found = second_moments(model, names, corpus, budget, seed=None)
    texts = [text for text in corpus if text.strip()][:45]
    wanted, tokens = plain(model, texts, names, min(cap, 96))
    assert list(found) == names
    for name, moment in found.items():
        assert (moment.count, moment.documents) == (tokens, 45)
        assert relative(moment.sum, wanted[name]) < 1e-6


def test_any_named_linear(model: Any, corpus: Corpus) -> None:
    block = model.anatomy.layer_name(1).removesuffix(model.anatomy.projection)
    name = next(
        path
        for path, module in model.hf.named_modules()
        if path.startswith(block) and path.rsplit(".", 1)[-1] in ("o_proj", "c_proj", "out_proj") and "att" in path
    )
    found = second_moments(model, [name], corpus, Budget(64, documents=20), seed=None)[name]
    texts = [text for text in corpus if text.strip()][:20]
    wanted, tokens = plain(model, texts, [name], 64)
    assert found.count == tokens
    assert relative(found.sum, wanted[name]) < 1e-6
    with pytest.raises(InputError, match="nonesuch"):
        second_moments(model, ["nonesuch"], corpus, Budget(64))


@pytest.mark.parametrize("name", ["cf-gpt2", "cf-llama"])
def test_goldens(shared: Path, name: str) -> None:
    """What published code summed over the first 300 paragraphs, cut to 128 tokens."""
    model = rewire.load(shared / "models" / name)
    golden = json.loads((shared / f"goldens/{name}/golden.json").read_text())["stats"]
    corpus = read_corpus(shared / "data/wikitext2_valid_detok.json")
    names = [model.anatomy.layer_name(layer) for layer in (1, 2, 3)]
    budget = Budget(golden["truncate_tokens"], documents=golden["documents"])
    for layer, moment in second_moments(model, names, corpus, budget, seed=None).items():
        with np.load(shared / f"goldens/{name}/stats/{layer}_float32_mom2_300.npz") as published:
            assert (moment.count, moment.documents) == (published["mom2.count"], published["sample_size"])
            assert relative(moment.sum, torch.from_numpy(published["mom2.mom2"])) < 1e-5


def test_a_million_tokens_in_one_document(corpus: Corpus, tmp_path: Path) -> None:
    """Cut to the model's own longest row, whatever cap is asked for."""
    path = tmp_path / "long.jsonl"
    long = "The ferry waits. " * 250_000
    path.write_text(json.dumps({"text": long}) + "\n" + "\n".join(json.dumps(text) for text in corpus))
    model = rewire.load("demo")
    name = model.anatomy.layer_name(0)
    found = second_moments(model, [name], read_corpus(path), Budget(None, tokens=2 * 1024), seed=None)[name]
    texts = [long[:40_000], *corpus][: found.documents]
    wanted, tokens = plain(model, texts, [name], model.max_length)
    assert found.count == tokens
    assert relative(found.sum, wanted[name]) < 1e-6
