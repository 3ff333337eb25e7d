"""Loading: what is there is checked before anything is done with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rewire
from rewire.engine.model import demo_file, editable
from rewire.kernels.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo's model."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(demo_file(name).read_bytes())
    return tmp_path


def test_an_incomplete_checkpoint_is_refused(folder: Path) -> None:
    """transformers would fill the gap with random numbers."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"incomplete: 1 weights missing, model\.layers\.2\.mlp\.down_proj"):
        rewire.load(folder)


def test_a_truncated_checkpoint_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        rewire.load(folder)


def test_dtypes(folder: Path) -> None:
    found = {dtype: rewire.load(folder, dtype=dtype) for dtype in ("auto", "checkpoint", "float16")}
    kinds = {dtype: next(model.hf.parameters()).dtype for dtype, model in found.items()}
    assert kinds == {"auto": torch.float32, "checkpoint": torch.bfloat16, "float16": torch.float16}
    assert found["auto"].fingerprint == found["checkpoint"].fingerprint


def test_a_folder_named_demo_is_not_the_demo(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert rewire.load("demo").name == "rewire/demo"
    with pytest.raises(InputError, match="no model there"):
        rewire.load("./demo")


def test_a_linear_map_that_cannot_run_on_its_weight_is_refused(folder: Path) -> None:
    model = rewire.load(folder)
    weight = model.projection(1).weight
    assert isinstance(weight, torch.Tensor)
    model.projection(1).weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match="stored as float8"):
        rewire.wrap(model.hf, model.tokenizer)


@pytest.mark.parametrize(
    ("asked", "missing", "said"),
    [
        ({"quantize": "nf5"}, "", "quantize 'nf5' is unknown; expected nf4, fp4, int8"),
        ({"quantize": "nf4"}, "bitsandbytes", "quantize 'nf4' needs bitsandbytes.*: pip install bitsandbytes"),
        ({"quantize": "int8"}, "accelerate", "a quantised model needs accelerate.*: pip install accelerate"),
        ({"device": "balanced"}, "accelerate", "device 'balanced' needs accelerate.*: pip install accelerate"),
    ],
)
def test_what_loading_needs(
    folder: Path, asked: dict[str, str], missing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewire.engine.model.find_spec", lambda package: None if package == missing else package)
    with pytest.raises(InputError, match=said):
        rewire.load(folder, **asked)


def test_balanced_over_what_there_is(folder: Path) -> None:
    plain, balanced = rewire.load(folder, device="cpu"), rewire.load(folder, device="balanced")
    assert balanced.fingerprint == plain.fingerprint
    assert balanced.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    editable(balanced)


def test_the_fingerprint_is_of_the_weights_now(folder: Path) -> None:
    model = rewire.load(folder)
    before = model.fingerprint
    with torch.no_grad():
        model.projection(1).weight.mul_(1.5)  # type: ignore[operator, union-attr]
    assert model.fingerprint != before
