"""Hyper-parameters: presets as shipped and as published, single values, and what is refused."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewire.engine.anatomy import Anatomy
from rewire.engine.editors.registry import find_method, method_names
from rewire.engine.hparams import Hparams, default_layers, load_hparams, parse_overrides, preset_files, read_yaml
from rewire.kernels.errors import InputError

PUBLISHED = """\
alg_name: "MEMIT"
model_name: "some-llama"
stats_dir: "./data/stats"
device: 0
layers: [1, 2, 3]
clamp_norm_factor: 4
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 11
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 15000
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
fp16: false
batch_size: 1
max_length: 40
"""


def anatomy(n_layers: int = 12, module: str = "model.layers.{}.mlp.down_proj") -> Anatomy:
    blocks, _, projection = module.partition(".{}.")
    return Anatomy("llama", blocks, projection, None, "model.norm", "lm_head", n_layers, 8, 32, 100, None, "family")


def load(
    preset: str | Path | None = None, model: str = "unheard-of", house: Anatomy | None = None, **overrides: Any
) -> tuple[Hparams, str]:
    return load_hparams(Hparams, "memit", model, house or anatomy(), preset, overrides)


def written(folder: Path, text: str = PUBLISHED, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(text) | changes) if changes else text)
    return path


def refused(preset: str | Path | None = None, house: Anatomy | None = None, **overrides: Any) -> str:
    with pytest.raises(InputError) as error:
        load(preset, house=house, **overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# shipped presets


def shipped() -> list[tuple[str, str, Path]]:
    return [(method, name, path) for method in method_names() for name, path in preset_files(method).items()]


def test_every_shipped_preset_belongs_to_a_method() -> None:
    root = Path(__file__).resolve().parents[2] / "hparams"
    assert {path for *_, path in shipped()} == {path.resolve() for path in root.rglob("*.yaml")}
    assert shipped()


@pytest.mark.parametrize(("method", "name", "path"), shipped(), ids=lambda value: str(value).rpartition("/")[2])
def test_shipped_presets_load_and_fit_a_model(method: str, name: str, path: Path) -> None:
    content = read_yaml(path)
    assert content["source"]  # a preset says where its values come from
    house = anatomy(
        content.get("v_loss_layer", 11) + 1, content.get("rewrite_module_tmp", "model.layers.{}.mlp.down_proj")
    )
    hparams, source = load_hparams(find_method(method).hparams, method, "any", house, name)
    assert list(hparams.layers) == content["layers"]
    assert max(hparams.layers) < house.n_layers - 1  # something must lie above the z-layer
    assert source.startswith(f"hparams/{method}/{name}.yaml (")
    own = content.get("model_name", name)
    asked = own.upper() if "/" in own else f"org/{own.upper()}"
    by_model, again = load_hparams(find_method(method).hparams, method, asked, house)
    assert (by_model, again) == (hparams, source)


def test_presets_are_found_by_alias_and_by_the_last_part_of_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hparams" / "memit"
    folder.mkdir(parents=True)
    (folder / "known.yaml").write_text("model_name: Known-7B\naliases: [Other-7B, third]\nlayers: [2]\nv_lr: 0.3\n")
    monkeypatch.setattr("rewire.engine.hparams.files", lambda package: tmp_path / "hparams")
    for name in ("known-7b", "org/Known-7B", "/models/OTHER-7b", "./third"):
        hparams, source = load(model=name)
        assert (hparams.v_lr, source) == (0.3, "hparams/memit/known.yaml")
    assert load(model="known-13b")[1] == "defaults by depth"
    assert load("known", model="anything")[0].v_lr == 0.3


def test_an_unknown_preset_is_named_with_those_there_are() -> None:
    message = refused("nonesuch")
    assert message.startswith("--preset nonesuch: no such file, and no shipped preset; there are ")
    assert "cf-gpt2" in message


# the published form


def test_a_published_preset_loads_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert isinstance(yaml.safe_load(PUBLISHED)["v_lr"], str)  # YAML 1.1 leaves `5e-1` a text
    hparams, source = load(path)
    assert (hparams.v_lr, hparams.v_weight_decay, hparams.layers) == (0.5, 0.001, (1, 2, 3))
    assert hparams.clamp_norm_factor == 4
    assert source == str(path)


def test_unused_keys_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rewire"):
        load(written(tmp_path))
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("not used by Rewire, ignored: alg_name, attn_module_tmp, batch_size, device")
    assert "v_lr" not in said


def test_where_the_values_come_from_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, source="a paper", aliases=["x"])
    assert load(path)[1] == f"{path} (a paper)"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("layers: [1\n", "cannot be read as a preset: while parsing a flow sequence"),
        ("- layers\n", "expected a YAML mapping of hyper-parameters"),
        ("", "expected a YAML mapping of hyper-parameters"),
        ("v_lr: 0.5\n", "layers: Field required"),
    ],
)
def test_files_that_are_no_preset(tmp_path: Path, content: str, reason: str) -> None:
    path = written(tmp_path, content)
    assert refused(path).startswith(f"{path}: {reason}")


def test_a_binary_file_is_no_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a preset" in refused(path)


# what is refused, by file and by --set


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v_lrr": 0.1}, "unknown hyper-parameter 'v_lrr'; did you mean 'v_lr'?"),
        ({"qqq": 0.1}, "unknown hyper-parameter 'qqq'; known are clamp_norm_factor, "),
        ({"v_lr": "fast"}, "v_lr: Input should be a valid number, unable to parse string as a number ('fast' found)"),
        ({"v_lr": 0}, "v_lr: Input should be greater than 0 (0 found)"),
        ({"v_lr": float("nan")}, "v_lr: Input should be "),
        ({"kl_factor": float("inf")}, "kl_factor: Input should be a finite number"),
        ({"v_num_grad_steps": 2.5}, "v_num_grad_steps: Input should be a valid integer"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps: Input should be greater than or equal to 1 (0 found)"),
        ({"fact_token": "last"}, "fact_token: Input should be 'subject_last' ('last' found)"),
        ({"layers": 3}, "layers: expected a list of layer numbers such as [3, 4, 5] (3 found)"),
        ({"layers": "1,2"}, "layers: expected a list of layer numbers such as [3, 4, 5] ('1,2' found)"),
        ({"layers": ["a"]}, "layers.0: Input should be a valid integer"),
        ({"layers": []}, "layers: Tuple should have at least 1 item"),
        ({"layers": [3, 2]}, "layers: expected ascending layer numbers from 0, each once ([3, 2] found)"),
        ({"layers": [2, 2]}, "layers: expected ascending layer numbers from 0, each once"),
        ({"layers": [-1, 2]}, "layers: expected ascending layer numbers from 0, each once"),
        ({"layers": [2, 12]}, "layers [2, 12] out of range: the model has layers 0 to 11"),
        ({"v_loss_layer": 10}, "v_loss_layer is 10, expected the last block, 11"),
        (
            {"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"},
            "rewrite_module_tmp is 'transformer.h.{}.mlp.c_proj', this model has 'model.layers.{}.mlp.down_proj'",
        ),
    ],
)
def test_what_is_refused_is_named_with_its_place(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = written(tmp_path, **change)
    assert refused(path).startswith(f"{path}: {reason}")
    good = written(tmp_path)
    assert refused(good, **change).startswith(f"--set: {reason}")  # the file is not to blame
    assert refused(None, **change).startswith(f"--set: {reason}")


def test_what_the_file_has_wrong_is_not_blamed_on_set(tmp_path: Path) -> None:
    path = written(tmp_path, layers=[2, 12])
    assert refused(path, v_lr=0.1).startswith(f"{path}: layers [2, 12] out of range")


def test_overrides_replace_the_presets_values(tmp_path: Path) -> None:
    hparams, _ = load(written(tmp_path), v_lr=0.2, layers=[4, 5])
    assert (hparams.v_lr, hparams.layers, hparams.clamp_norm_factor) == (0.2, (4, 5), 4)
    with pytest.raises(ValueError, match="frozen"):
        hparams.v_lr = 1


def test_set_texts_are_read_as_yaml() -> None:
    texts = ["layers=[1, 2]", "v_lr=5e-1", "mom2_dataset=wiki=text", "v_loss_layer=null", "fact_token=subject_last"]
    assert parse_overrides(texts) == {
        "layers": [1, 2],
        "v_lr": 0.5,
        "mom2_dataset": "wiki=text",
        "v_loss_layer": None,
        "fact_token": "subject_last",
    }


@pytest.mark.parametrize("text", ["v_lr", "=5", "", "layers=[1"])
def test_set_texts_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=f"^--set {re.escape(text)}: .*expected"):
        parse_overrides([text])


# no preset


def test_defaults_by_depth_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    hparams, source = load(model="unheard-of", house=anatomy(32))
    assert (hparams.layers, source) == ((4, 5, 6, 7, 8), "defaults by depth")
    assert "no preset for unheard-of: editing layers [4, 5, 6, 7, 8]" in caplog.text
    caplog.clear()
    load(model="unheard-of", layers=[3])
    assert "editing layers [3]" in caplog.text


@pytest.mark.parametrize("n", [1, 2, 3, 6, 12, 24, 28, 32, 48, 80])
def test_default_layers_are_layers_of_the_model(n: int) -> None:
    layers = default_layers(n)
    assert layers == list(range(layers[0], layers[-1] + 1))
    assert layers[0] >= 0
    assert layers[-1] <= n / 2
    assert len(layers) <= 5
