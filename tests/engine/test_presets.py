"""Preset files: that each shipped one is whole, how they are found, and where sources differ."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rewire.engine import presets
from rewire.engine.anatomy import Anatomy
from rewire.engine.editors.names import METHODS
from rewire.engine.editors.registry import find_method
from rewire.engine.hparams import load_hparams
from rewire.engine.presets import Preset, conflicts, find_preset, methods, read_preset, shipped_presets
from rewire.kernels.errors import InputError

ROOT = Path(__file__).resolve().parents[2] / "hparams"
SMALL = ("cf-gpt2", "cf-llama", "demo")


def shipped() -> list[tuple[str, Preset]]:
    return [(method, preset) for method in methods() for preset in shipped_presets(method)]


def house(preset: Preset) -> Anatomy:
    """A model that the preset fits."""
    module = preset.values["rewrite_module_tmp"]
    blocks, _, projection = module.partition(".{}.")
    n_layers = preset.values["v_loss_layer"] + 1
    return Anatomy("llama", blocks, projection, None, "model.norm", "lm_head", n_layers, 8, 32, 100, None, "family")


def refused(method: str, asked: str, model: str = "unheard-of") -> str:
    with pytest.raises(InputError) as error:
        find_preset(method, model, asked)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder of shipped presets: two models of one method."""
    folder = tmp_path / "hparams"
    (folder / "memit").mkdir(parents=True)
    (folder / "models.yaml").write_text("known-7.5b: [Known-7.5B-chat, twin]\nknown-7b: [other-7b, twin, small/k]\n")
    text = "default: {}\nsource: {{{}}}\nlayers: [2]\nv_lr: {}\n"
    (folder / "memit/known-7b@one.yaml").write_text(text.format("true", "one: a paper, two: another", 0.3))
    (folder / "memit/known-7b@three.yaml").write_text(text.format("false", "three: a third", 0.4))
    (folder / "memit/known-7.5b@one.yaml").write_text(text.format("true", "one: a paper", 0.5))
    monkeypatch.setattr("rewire.engine.presets.files", lambda package: folder)
    return folder


# shipped presets


def test_every_shipped_file_is_a_preset_of_a_method() -> None:
    assert {preset.path for _, preset in shipped()} == set(ROOT.glob("*/*.yaml"))
    assert set(methods()) == set(METHODS)


@pytest.mark.parametrize(("method", "preset"), shipped(), ids=lambda value: getattr(value, "name", value))
def test_shipped_presets_load_and_fit_a_model(method: str, preset: Preset) -> None:
    kind = find_method(method).hparams
    assert preset.sources
    assert all(text.strip() for text in preset.sources.values())
    if "@" in preset.name:
        assert preset.name.partition("@")[2] == next(iter(preset.sources))
    else:
        assert preset.model in SMALL
    house_ = house(preset)
    for name in preset.sources:
        asked = f"{preset.model}@{name}" if name else preset.name
        hparams, source = load_hparams(kind, method, "unheard-of", house_, asked)
        assert list(hparams.layers) == preset.values["layers"]
        assert source.startswith(f"hparams/{method}/{preset.path.name} (")
        assert load_hparams(kind, method, "unheard-of", house_, f"{method}/{asked}") == (hparams, source)
    assert max(hparams.layers) < house_.n_layers - 1  # something must lie above the z-layer
    own = yaml.safe_load(preset.path.read_text())
    given = own.keys() - presets.ABOUT
    assert given <= kind.model_fields.keys()  # nothing that the method ignores
    if preset.default:
        for model in (preset.model, f"org/{preset.model.upper()}", f"/models/{preset.model}"):
            assert load_hparams(kind, method, model, house_) == (hparams, source)
        assert load_hparams(kind, method, "unheard-of", house_, preset.model) == (hparams, source)


def test_each_method_and_model_has_one_default_and_each_name_one_file() -> None:
    defaults = Counter((method, preset.model) for method, preset in shipped() if preset.default)
    assert defaults == Counter({(method, preset.model) for method, preset in shipped()})
    names = Counter((method, preset.model, source) for method, preset in shipped() for source in preset.sources)
    assert set(names.values()) == {1}


def test_presets_of_one_model_differ() -> None:
    """Sources that agree in every value share a file."""
    for method, preset in shipped():
        for other in shipped_presets(method, preset.model):
            assert other.name == preset.name or other.values != preset.values


def test_every_model_has_an_entry_and_every_method_the_usual_models() -> None:
    models = yaml.safe_load((ROOT / "models.yaml").read_text())
    assert {preset.model for _, preset in shipped()} == set(models)
    for method in methods():
        there = {preset.model for preset in shipped_presets(method)}
        assert {"gpt2-xl", "gpt-j-6B", "llama-2-7b", "llama-3-8b", *SMALL} <= there


@pytest.mark.parametrize("name", ["cf-gpt2", "cf-llama"])
def test_the_small_models_presets_are_the_goldens(name: str, shared: Path) -> None:
    golden = json.loads((shared / "goldens" / name / "golden.json").read_text())
    common, special = golden["hparams"], {"alphaedit", "rome", "r_rome", "pmet", "emmet"}
    for method in methods():
        (preset,) = shipped_presets(method, name)
        own = golden[method.replace("-", "_")] if method.replace("-", "_") in special else {}
        wanted = common | {"mom2_adjustment": own.get("covariance", True)} | own
        wanted["layers"] = [own["layer"]] if "layer" in own else common["layers"]
        for key in preset.values.keys() - {"mom2_dataset", "mom2_tokens", "mom2_max_length", "mom2_seed"}:
            assert preset.values[key] == wanted[key], (method, key)


def test_what_the_notes_say_of_conflicts() -> None:
    """Reference values: MEMIT's and AlphaEdit's for Llama 3."""
    found = conflicts(shipped_presets("alphaedit", "llama-3-8b"))
    assert [(value, [name for p in who for name in p.short]) for value, who in found["L2"]] == [
        (10, ["alphaedit", "underedit", "encore"]),
        (1, ["easyedit"]),
    ]
    found = conflicts(shipped_presets("memit", "llama-3-8b"))
    assert found.keys() >= {"v_lr", "clamp_norm_factor", "v_weight_decay", "layers"}
    assert "v_loss_layer" not in found
    for key, default in {"v_lr": 0.1, "clamp_norm_factor": 0.75, "v_weight_decay": 0.5}.items():
        assert found[key][0][0] == default


# finding


def test_found_by_model_by_alias_and_by_source(own: Path) -> None:
    def lr(model: str, asked: str | None = None) -> Any:
        preset = find_preset("memit", model, asked)
        return preset and preset.values["v_lr"]

    for name in ("known-7b", "org/Known-7B", "/models/OTHER-7b", "./other-7b", "small/K"):
        assert lr(name) == 0.3
        assert lr(name, "@three") == 0.4
    assert lr("org/known-7.5b-CHAT") == lr("twin") == 0.5  # of two models with one name the first
    assert lr("known-13b") is None
    assert lr("other/k") is None
    for asked in ("known-7b", "KNOWN-7b", "other-7b", "known-7b@one", "known-7b@two", "memit/known-7b@two"):
        assert lr("anything", asked) == 0.3
    assert lr("anything", "memit/known-7b@three") == 0.4


def test_a_name_that_is_unknown(own: Path) -> None:
    all_ = "known-7.5b@one, known-7b@one, known-7b@three"
    assert refused("memit", "nonesuch") == f"--preset nonesuch: no such file, and no shipped preset; there are {all_}"
    assert refused("memit", "other-7b@four").endswith("there are known-7b@one, known-7b@two, known-7b@three")
    assert refused("memit", "@four", "known-7.5b").endswith("there are known-7.5b@one")
    assert refused("memit", "@one").endswith(f"there are {all_}")
    assert refused("rome", "memit/known-7b@one") == (
        "--preset memit/known-7b@one: a preset of memit, expected one of rome; or choose --method memit"
    )


def test_a_path_is_no_name(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MEMIT").mkdir()
    assert "no such file" in refused("memit", "MEMIT/known-7b")
    (tmp_path / "MEMIT/known-7b.yaml").write_text("layers: [7]\n")
    for asked in ("MEMIT/known-7b", "./MEMIT/known-7b.yaml", str(tmp_path / "MEMIT/known-7b")):
        preset = find_preset("memit", "any", asked)
        assert preset is not None
        assert (preset.values, preset.shipped) == ({"layers": [7]}, False)
    (tmp_path / "MEMIT/known-7b.json").write_text("{}")
    assert refused("memit", "MEMIT/known-7b") == (
        "--preset MEMIT/known-7b: there are known-7b.yaml and known-7b.json; name one of them"
    )


# reading


def test_a_file_may_build_on_a_shipped_one(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("from: memit/known-7b@three\nlayers: [3]\nkl_factor: 5e-1\n")
    assert read_preset(path).values == {"layers": [3], "v_lr": 0.4, "kl_factor": 0.5}
    for wrong in ("known-7b", "memit/", "memit/known-7b@four", "nonesuch/known-7b", str(path)):
        path.write_text(f"from: {wrong}\n")
        with pytest.raises(InputError):
            read_preset(path)


@given(number=st.floats(allow_nan=False, allow_infinity=False), digits=st.integers(1, 17))
def test_texts_that_read_as_numbers(number: float, digits: int) -> None:
    for text in (repr(number), f"{number:.{digits}e}", f" {number!r} "):
        assert presets.number(text) == float(text)
    assert presets.number("wikipedia") == "wikipedia"
    assert presets.number([number]) == [number]


def test_conflicts_are_between_those_who_say_something() -> None:
    made = [
        Preset(str(i), Path(), "", values)
        for i, values in enumerate([{"a": 4, "b": 1}, {"a": 4.0}, {"a": [1], "b": 1}])
    ]
    found = conflicts(made)
    assert list(found) == ["a"]
    assert [(value, [preset.name for preset in who]) for value, who in found["a"]] == [(4, ["0", "1"]), ([1], ["2"])]
    assert conflicts([]) == {}
