"""Hyper-parameters: presets as shipped and as published, single values, and what is refused."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewire.engine.anatomy import Anatomy
from rewire.engine.editors.alphaedit import AlphaEditHparams
from rewire.engine.editors.names import METHODS
from rewire.engine.editors.pmet import PmetHparams
from rewire.engine.editors.registry import find_method
from rewire.engine.editors.rome import RomeHparams
from rewire.engine.hparams import Hparams, load_hparams, parse_overrides
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


# the published form


def test_a_published_preset_loads_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert isinstance(yaml.safe_load(PUBLISHED)["v_lr"], str)  # YAML 1.1 leaves `5e-1` a text
    hparams, source = load(path)
    assert (hparams.v_lr, hparams.v_weight_decay, hparams.layers) == (0.5, 0.001, (1, 2, 3))
    assert hparams.clamp_norm_factor == 4
    assert source == str(path)


JSON = """\
{
\t"layers": [5], "clamp_norm_factor": 4, "fact_token": "subject_last", "v_num_grad_steps": 20, "v_lr": 5e-1,
\t"v_loss_layer": 11, "v_weight_decay": 1e-3, "kl_factor": "0.0625", "mom2_adjustment": false,
\t"context_template_length_params": [[5, 10], [10, 10]], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
\t"mlp_module_tmp": "model.layers.{}.mlp", "mom2_dataset": "wikipedia", "mom2_n_samples": "1e5", "mom2_dtype": "float32"
}
"""


@pytest.mark.parametrize("suffix", [".json", ""])
def test_a_json_file_loads_as_it_is(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "Some_model-6B.json").write_text(JSON)  # tabs: no YAML
    hparams, _ = load_hparams(RomeHparams, "rome", "any", anatomy(), f"{tmp_path}/Some_model-6B{suffix}")
    assert (hparams.layers, hparams.v_lr, hparams.v_weight_decay, hparams.kl_factor) == ((5,), 0.5, 0.001, 0.0625)
    assert (hparams.mom2_adjustment, hparams.mom2_n_samples) == (False, 100_000)
    assert hparams.context_template_length_params == ((5, 10), (10, 10))


def test_a_field_of_one_method_is_unused_by_the_others_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(
        tmp_path, alg_name=None, layers=[3], mom2_adjustment=False, nullspace_threshold="3e-2", nll_loss_factor=2
    )
    rome = load_hparams(RomeHparams, "rome", "any", anatomy(), path)[0]
    assert rome.mom2_adjustment is False
    assert "mom2_adjustment" not in caplog.text
    caplog.clear()
    assert load_hparams(AlphaEditHparams, "alphaedit", "any", anatomy(), path)[0].nullspace_threshold == 0.03
    assert "mom2_adjustment, mom2_dtype" in caplog.text
    assert "nullspace_threshold" not in caplog.text
    assert load_hparams(PmetHparams, "pmet", "any", anatomy(), path)[0].nll_loss_factor == 2


KEYS = """
alg alg_name model_name stats_dir device model_parallel fp16 batch_size max_length layer_selection mom2_dtype
layer_module_tmp mlp_module_tmp attn_module_tmp ln_f_module lm_head_module P_loc nullspace_threshold L2
update_norm_lambda emmet_lambda rewrite_module_tmps nll_loss_factor cumulative_ratio suppression_strength
base_method lamHyper solver init_model inner_params lr editor_batch_size batch_size_once dynamic
dynamic_multiplier prob_cutoff evaluation_type api_key use_chat_template mom2_adjustment Pre
"""


@pytest.mark.parametrize("key", KEYS.split())
def test_keys_of_the_ecosystem_pass_in_files_and_not_by_set(tmp_path: Path, key: str) -> None:
    written(tmp_path, "layers: [1, 2]\n" + (f"{key}: MEMIT\n" if key in ("alg", "alg_name") else f"{key}: 0\n"))
    assert load(tmp_path / "mine.yaml")[0].layers == (1, 2)
    assert refused(tmp_path / "mine.yaml", **{key: 0}).startswith(f"--set: unknown hyper-parameter {key!r}; ")


@pytest.mark.parametrize(
    ("key", "plain", "other"),
    [("prob_cutoff", 0, -2), ("Pre", 1, 0), ("layer_selection", "all", "random"), ("update_norm_lambda", 0, 20)],
)
def test_what_published_code_can_and_rewire_cannot_is_said(
    tmp_path: Path, key: str, plain: Any, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load(written(tmp_path, **{key: plain}))
    assert "another way" not in caplog.text
    load(written(tmp_path, **{key: other}))
    assert f"another way for {key}: {other}" in caplog.text


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(
            ("memit", name)
            for name in ("MEMIT", "MEMIT_RECURSIVE", "MEMIT_RECURSIVE_NEIGHBOR", "MEMIT_RECURSIVE_SPREAD")
        ),
        *(("alphaedit", name) for name in ("AlphaEdit", "AlphaEdit_RECURSIVE_NEIGHBOR")),
        *(("pmet", "PMET_RECURSIVE"), ("r-rome", "R-ROME"), ("memit-history", "MEMIT"), ("emmet", "EMMET")),
    ],
)
def test_names_of_a_methods_published_forms(tmp_path: Path, method: str, name: str) -> None:
    for key in ("alg_name", "alg"):
        path = written(tmp_path, f"layers: [2]\n{key}: {name}\n")
        assert load_hparams(Hparams, method, "any", anatomy(), path)[0].layers == (2,)


@pytest.mark.parametrize(
    ("method", "name", "hint"),
    [
        ("memit", "AlphaEdit_RECURSIVE", "choose --method alphaedit, or another preset"),
        ("rome", "R-ROME", "choose --method r-rome, or another preset"),
        ("memit", "MEMIT_FE", "choose another preset"),
        ("memit", "SimIE", "choose another preset"),
    ],
)
def test_another_methods_file_is_refused(tmp_path: Path, method: str, name: str, hint: str) -> None:
    for key in ("alg_name", "alg"):
        path = written(tmp_path, f"layers: [2]\n{key}: {name}\n")
        with pytest.raises(InputError) as error:
            load_hparams(Hparams, method, "any", anatomy(), path)
        assert str(error.value) == f"{path}: {key} is {name}, expected a preset of {method}; {hint}"


def test_a_lambda_for_each_layer_is_refused(tmp_path: Path) -> None:
    reason = (
        "mom2_update_weight: one number for all layers is expected ([1000, 2000] found, one for each); "
        "choose with --set mom2_update_weight=N"
    )
    path = written(tmp_path, mom2_update_weight=[1000, 2000])
    assert refused(path) == f"{path}: {reason}"
    assert refused(None, mom2_update_weight=[1000, 2000]) == f"--set: {reason}"
    assert load(path, mom2_update_weight=1500)[0].mom2_update_weight == 1500


def test_unused_keys_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rewire"):
        load(written(tmp_path))
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("not used by Rewire, ignored: alg_name, attn_module_tmp, batch_size, device")
    assert "v_lr" not in said


def test_where_the_values_come_from_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, source="a paper")
    assert load(path)[1] == f"{path} (a paper)"
    path = written(tmp_path, source={"a": "a paper", "b": "another", "c": "a third"})
    assert load(path)[1] == f"{path} (a paper; the same: b, c)"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("layers: [1\n", "cannot be read as a preset: while parsing a flow sequence"),
        ("- layers\n", "expected a mapping of hyper-parameters"),
        ("", "expected a mapping of hyper-parameters"),
        ("v_lr: 0.5\n", "layers: missing"),
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
        ({"v_lr": "fast"}, "v_lr: 'fast' found, expected a number"),
        ({"v_lr": 0}, "v_lr: 0 found, expected more than 0"),
        ({"v_lr": float("nan")}, "v_lr: nan found, expected "),
        ({"kl_factor": float("inf")}, "kl_factor: inf found, expected a finite number"),
        ({"v_num_grad_steps": 2.5}, "v_num_grad_steps: 2.5 found, expected a whole number"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps: 0 found, expected 1 or more"),
        ({"fact_token": "last"}, "fact_token: 'last' found, expected 'subject_last'"),
        ({"layers": 3}, "layers: 3 found, expected a list of layer numbers such as [3, 4, 5]"),
        ({"layers": "1,2"}, "layers: '1,2' found, expected a list of layer numbers such as [3, 4, 5]"),
        ({"layers": ["a"]}, "layers.0: 'a' found, expected a whole number"),
        ({"layers": []}, "layers: [] found, expected a list of 1 or more"),
        ({"layers": [3, 2]}, "layers: [3, 2] found, expected ascending layer numbers from 0, each once"),
        ({"layers": [2, 2]}, "layers: [2, 2] found, expected ascending layer numbers from 0, each once"),
        ({"layers": [-1, 2]}, "layers: [-1, 2] found, expected ascending layer numbers from 0, each once"),
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


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_defaults_on_a_model_of_any_depth(method: str) -> None:
    kind = find_method(method).hparams
    for n in (1, 5, 12, 32, 80):
        hparams, source = load_hparams(kind, method, "unheard-of", anatomy(n))
        assert (hparams.layers[-1], source) == (Hparams.default_layers(n)[-1], "defaults by depth")


@pytest.mark.parametrize("n", [1, 2, 3, 6, 12, 24, 28, 32, 48, 80])
def test_default_layers_are_layers_of_the_model(n: int) -> None:
    layers = Hparams.default_layers(n)
    assert layers == list(range(layers[0], layers[-1] + 1))
    assert layers[0] >= 0
    assert layers[-1] <= n / 2
    assert len(layers) <= 5
