"""Models whose weights are quantised, or lie elsewhere than they are computed: read like any other, never edited."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor

import rewire
from rewire.engine.delta import Delta, EditedWeights, Factors
from rewire.engine.model import demo_file, editable
from rewire.engine.passes import blocks_until
from rewire.engine.prompts import Row, pad
from rewire.engine.streams import can_pack, stream_inputs
from rewire.kernels.errors import InputError
from weights import CONTEXTS, FAST

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantised models")
LAYERS, TOKENS = (1, 2, 3), 4000
# relative Frobenius distance of C from float32's on 4 thousand tokens: nf4 rounds a weight by a tenth of itself, and
# the keys are as far off
FAR = {"nf4": 0.14, "int8": 0.015}


@pytest.fixture(scope="module", params=list(FAR))
def kind(request: pytest.FixtureRequest) -> str:
    if "cpu" not in bitsandbytes.supported_torch_devices:
        pytest.skip(f"bitsandbytes {bitsandbytes.__version__} does not run on a CPU")
    return str(request.param)


@pytest.fixture(scope="module")
def quantized(kind: str, shared: Path) -> rewire.Model:
    return rewire.load(shared / "models/cf-llama", quantize=kind, device="cpu")


@pytest.fixture(scope="module")
def plain(shared: Path) -> rewire.Model:
    return rewire.load(shared / "models/cf-llama", device="cpu")


@pytest.fixture(scope="module")
def documents(shared: Path, plain: rewire.Model) -> list[np.ndarray]:
    texts = json.loads((shared / "data/wikitext2_valid_detok.json").read_text())
    rows: list[np.ndarray] = []
    for text in texts:
        if sum(map(len, rows)) > TOKENS:
            break
        rows.append(np.array(plain.tokenizer(text)["input_ids"][: plain.max_length], dtype=np.int32))
    return sorted(rows, key=len, reverse=True)


def second_moments(model: rewire.Model, rows: list[np.ndarray], packed: bool) -> dict[str, Tensor]:
    names = [model.anatomy.layer_name(layer) for layer in LAYERS]
    sums = {name: torch.zeros(model.anatomy.d_in, model.anatomy.d_in, dtype=torch.float64) for name in names}

    def sink(name: str, X: Tensor) -> None:
        sums[name] += X.double().T @ X.double()

    for start in range(0, len(rows), 8):
        stream_inputs(model, rows[start : start + 8], names, sink, packed)
    return sums


def distances(got: dict[str, Tensor], exact: dict[str, Tensor]) -> list[float]:
    return [float((got[name] - exact[name]).norm() / exact[name].norm()) for name in exact]


def keys(model: rewire.Model) -> dict[str, Tensor]:
    """Of two short documents, padded and packed, and what blocks give at a token."""
    names = [model.anatomy.layer_name(layer) for layer in LAYERS]
    rows = [np.arange(5, 24), np.arange(7, 12)]
    found: dict[str, Tensor] = {}
    for packed in (False, True):
        stream_inputs(model, rows, names, lambda name, X: found.update({f"{name} {packed}": X.clone()}), packed)  # noqa: B023
    ids = pad([Row(tuple(row.tolist())) for row in rows], model.device)
    return found | {f"block {layer}": blocks_until(model, ids, layer)[:, 3] for layer in LAYERS}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(X, other[name]) for name, X in one.items())


def test_second_moments(
    kind: str, quantized: rewire.Model, plain: rewire.Model, documents: list[np.ndarray], record_property: Any
) -> None:
    exact = second_moments(plain, documents, packed=False)
    padded = second_moments(quantized, documents, packed=False)
    found = distances(padded, exact)
    record_property("relative Frobenius distance of C", found)
    print(f"{kind}: C of layers {LAYERS} is off by {', '.join(f'{100 * far:.1f} %' for far in found)}")
    assert min(found) > 1e-3  # quantised indeed
    assert max(found) < FAR[kind]
    assert can_pack(quantized, list(exact))
    among = 1e-5 if kind == "nf4" else 5e-3  # 8 bits round by what stands beside a token
    assert max(distances(second_moments(quantized, documents, packed=True), padded)) < among


@pytest.mark.parametrize("kind", ["nf4"], indirect=True)  # 8-bit maps round what they read, too
def test_only_the_weights_are_rounded(quantized: rewire.Model, shared: Path, documents: list[np.ndarray]) -> None:
    """A float32 model with the 4-bit weights as numbers gives the same C: passes and sums add nothing."""
    twin = rewire.load(shared / "models/cf-llama", device="cpu")
    for name, part in quantized.hf.named_modules():
        if isinstance(part, bitsandbytes.nn.Linear4bit):
            numbers = bitsandbytes.functional.dequantize_4bit(part.weight.data, part.weight.quant_state)
            twin.hf.get_submodule(name).weight.data = numbers
    assert max(distances(second_moments(quantized, documents, True), second_moments(twin, documents, True))) < 1e-5


def test_fingerprint(kind: str, quantized: rewire.Model, plain: rewire.Model, shared: Path) -> None:
    """Of the quantised weights, the same at each loading; reading it, or running the model, changes neither."""
    before, seen = quantized.fingerprint, keys(quantized)
    assert before != plain.fingerprint
    assert quantized.fingerprint == before
    assert same(keys(quantized), seen)
    assert rewire.load(shared / "models/cf-llama", quantize=kind, device="cpu").fingerprint == before
    assert quantized.quantized == kind
    assert plain.quantized is None


def test_stored_quantised(kind: str, quantized: rewire.Model, tmp_path: Path) -> None:
    quantized.hf.save_pretrained(tmp_path)  # type: ignore[operator]
    quantized.tokenizer.save_pretrained(tmp_path)
    stored = rewire.load(tmp_path, device="cpu")
    assert stored.quantized == kind
    assert stored.fingerprint == quantized.fingerprint
    assert same(keys(stored), keys(quantized))
    with pytest.raises(InputError, match="is stored quantised already; load it without quantize"):
        rewire.load(tmp_path, quantize=kind)


def test_edits_are_refused(kind: str, quantized: rewire.Model) -> None:
    said = rf"layers\.\d\.mlp\.down_proj(\.weight)? is quantised \({kind}\).*cannot be written"
    before = quantized.fingerprint
    facts = rewire.read_facts(demo_file("facts.jsonl"), limit=2)
    with pytest.raises(InputError, match=said):
        editable(quantized)
    session = rewire.EditSession(quantized, contexts=CONTEXTS, hparams=FAST)
    with pytest.raises(InputError, match=said):
        session.edit(facts, evaluate=False)
    name = quantized.anatomy.weight_name(1)
    factors = Factors(torch.ones(256, 1), torch.ones(1, 704))
    with pytest.raises(InputError, match=said), EditedWeights(quantized).provisional() as put:
        put(name, factors)
    with pytest.raises(InputError, match=said):
        Delta(quantized.name, before, [{"id": "a"}], [{name: factors}]).apply(quantized)
    assert quantized.fingerprint == before


def test_evaluation(kind: str, quantized: rewire.Model, plain: rewire.Model, shared: Path) -> None:
    facts = rewire.read_facts(shared / "data/mcf_subset_1.json", limit=6)
    found, exact = (rewire.evaluate(model, facts)["metrics"] for model in (quantized, plain))
    assert found.keys() == exact.keys()
    assert found["neighborhood_success"] == pytest.approx(exact["neighborhood_success"], abs=0.1)
    assert all(value is None or math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_what_they_compute_in(dtype: str, kind: str) -> None:
    model = rewire.load("demo", dtype=dtype, quantize=kind, device="cpu")
    found: list[Tensor] = []
    stream_inputs(model, [np.arange(9)], [model.anatomy.layer_name(1)], lambda _, X: found.append(X), packed=True)
    assert [X.dtype for X in found] == [getattr(torch, dtype)]
    assert found[0].isfinite().all()


@pytest.mark.parametrize("kind", ["nf4"], indirect=True)
def test_a_model_that_was_laid_out_for_this_cpu(kind: str) -> None:
    """bitsandbytes does so in the first forward on some processors, and breaks it in the next `state_dict`."""
    model = rewire.load("demo", quantize=kind, device="cpu")
    model.projection(1).support_avx512bf16_for_cpu = True  # as before `load` saw to it
    model.projection(1).weight.quant_state.packing_format_for_cpu = True  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: bitsandbytes has laid it out for this CPU"):
        rewire.wrap(model.hf, model.tokenizer)


def test_inspect_says_that_it_cannot_be_edited(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rewire.cli.inspect import inspect

    inspect("demo", quantize=kind, json=True)
    found = json.loads(capsys.readouterr().out)
    inspect("demo", json=True)
    plain = json.loads(capsys.readouterr().out)
    assert found["quantized"] == kind
    assert found["parameters"] == plain["parameters"]
    assert "cannot be written into it" in found["checked"]


@pytest.mark.parametrize("name", ["cf-llama", "cf-gpt2"])  # both with a head tied to the embedding
def test_weights_on_disk(name: str, shared: Path, tmp_path: Path, load: Callable[[Path], rewire.Model]) -> None:
    """Blocks by turns in memory and on disk, where accelerate fetches them from: to the last bit the same."""
    plain, model = load(shared / "models" / name), load(shared / "models" / name)
    places = {f"{model.anatomy.blocks}.{i}": ("cpu", "disk")[i % 2] for i in range(model.anatomy.n_layers)}
    named = {path for path, part in model.hf.named_modules() if not any(part.children())}
    outside = {path for path in named if not path.startswith(model.anatomy.blocks)}
    hf = accelerate.dispatch_model(
        model.hf, places | dict.fromkeys(outside, "disk"), main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    placed = rewire.wrap(hf, model.tokenizer, model.name)
    assert placed.projection(1).weight.is_meta  # type: ignore[union-attr]
    assert placed.device == torch.device("cpu")
    assert placed.fingerprint == plain.fingerprint
    learning = [parameter.requires_grad for parameter in hf.parameters()]
    assert can_pack(placed, [placed.anatomy.layer_name(1)])
    assert same(keys(placed), keys(plain))
    assert [parameter.requires_grad for parameter in hf.parameters()] == learning
    facts = rewire.read_facts(shared / "data/mcf_subset_1.json", limit=3)
    assert rewire.evaluate(placed, facts) == rewire.evaluate(plain, facts)
    with pytest.raises(InputError, match=r"1\..* is kept in another memory.*load the model on one device"):
        editable(placed)
