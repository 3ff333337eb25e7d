"""Preset files: shipped ones, found by name or by the model's, and those of others, by path.

Shipped ones are `hparams/<method>/<model>@<source>.yaml`, or `<model>.yaml` for the small models that we tuned. A file
holds hyper-parameters under their published names, and about itself: `source` (where the values are from: a text, or
each source that has these very values with its place), `default: true` (what the model gets where no source is named;
one file of each method and model), `from` (the shipped preset whose values are taken where the file has none).
`hparams/models.yaml` has the models' other names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..kernels.errors import InputError

ABOUT = {"source", "default", "from"}
SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Preset:
    """name: `llama-3-8b@underedit`, or the path of somebody's file
    place: what messages call it: its path, of a shipped one from `hparams/` on
    values: hyper-parameters, as the file and the preset it is `from` have them; texts that read as numbers are numbers
    sources: short name -> where that source has these values; one without a name ("") where the file says a text
    """

    name: str
    path: Path
    place: str
    values: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)
    default: bool = False
    shipped: bool = False

    @property
    def model(self) -> str:
        return self.name.partition("@")[0]

    @property
    def short(self) -> list[str]:
        """The short names of its sources."""
        return [name or "ours" for name in self.sources]

    @property
    def said(self) -> str:
        """The place and the sources, for reports."""
        first, *others = self.sources or [""]
        text = self.sources.get(first, "")
        if others:
            text += f"; the same: {', '.join(others)}"
        return f"{self.place} ({text})" if text else self.place


def methods() -> list[str]:
    """The methods that presets are shipped for."""
    return sorted(path.name for path in _root().iterdir() if any(path.glob("*.yaml")))


def preset_files(method: str) -> dict[str, Path]:
    """The shipped presets of a method: name -> file."""
    return {path.stem: path for path in sorted((_root() / method).glob("*.yaml"))}


def shipped_presets(method: str, model: str | None = None) -> list[Preset]:
    """Those of a method, or of one model of it by any of its names; a model's default goes first."""
    known = preset_files(method)
    only = None if model is None else _model(model, known)
    found = [_read_shipped(path) for name, path in known.items() if model is None or name.partition("@")[0] == only]
    return sorted(found, key=lambda preset: (preset.model.lower(), not preset.default, preset.name))


def find_preset(method: str, model_name: str, asked: str | Path | None = None) -> Preset | None:
    """The preset that is asked for, or that the model's name finds; None where nothing is asked for and none is known.

    asked: `llama-3-8b@underedit`, the method may go before it (`memit/llama-3-8b@underedit`); without a source the
        model's default; `@underedit`: the model's by that source; or a file, whose suffix may be left out
    Raises `InputError` for what is none of these, and for a name or a path that fits several.
    """
    if asked is None:
        return next((preset for preset in shipped_presets(method, model_name) if preset.default), None)
    text = str(asked)
    folder, slash, name = text.partition("/")
    of = folder if slash and folder in methods() else method
    named, at, source = (name if slash and folder in methods() else text).partition("@")
    # a path's last part names no model: EasyEdit's `hparams/MEMIT/gpt2-xl` is a file
    candidates = shipped_presets(of, named or model_name) if Path(named).name == named else []
    fitting = [preset for preset in candidates if (source in preset.sources if at else preset.default)]
    if fitting and of == method:
        return fitting[0]
    path = _file(text)
    if path is not None:
        return read_preset(path)
    if fitting:
        raise InputError(f"--preset {text}: a preset of {of}, expected one of {method}; or choose --method {of}")
    there = [name for preset in candidates for name in _names(preset)] or preset_files(of)
    raise InputError(f"--preset {text}: no such file, and no shipped preset; there are {', '.join(there)}")


def conflicts(presets: Sequence[Preset]) -> dict[str, list[tuple[Any, list[Preset]]]]:
    """Keys in which presets differ -> each value with those who give it. Who leaves a key out does not differ in it."""
    found: dict[str, list[tuple[Any, list[Preset]]]] = {}
    for preset in presets:
        for key, value in preset.values.items():
            same = next((who for other, who in found.setdefault(key, []) if other == value), None)
            if same is None:
                found[key].append((value, [preset]))
            else:
                same.append(preset)
    return {key: values for key, values in found.items() if len(values) > 1}


def read_preset(path: Path) -> Preset:
    """Somebody's file: YAML, or JSON by its suffix."""
    return _preset(path, str(path), str(path))


def number(value: Any) -> Any:
    """A text that reads as a number (YAML 1.1 leaves `5e-1` a text) as that number; anything else as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _root() -> Path:
    return Path(str(files("rewire.hparams")))


def _read_shipped(path: Path) -> Preset:
    return _preset(path, path.stem, f"hparams/{path.parent.name}/{path.name}", shipped=True)


def _preset(path: Path, name: str, place: str, shipped: bool = False) -> Preset:
    content = _content(path)
    about = {key: content.pop(key) for key in ABOUT & content.keys()}
    source = about.get("source", {})
    sources = {str(key): str(value) for key, value in (source if isinstance(source, dict) else {"": source}).items()}
    values = {key: number(value) for key, value in content.items()}
    if "from" in about:
        values = {**_base(path, str(about["from"])).values, **values}
    return Preset(name, path, place, values, sources, about.get("default") is True, shipped)


def _base(path: Path, text: str) -> Preset:
    method, _, name = text.partition("/")
    preset = find_preset(method, "", name) if method in methods() and name.partition("@")[0] else None
    if preset is None or not preset.shipped:
        raise InputError(f"{path}: from: {text} is no shipped preset; expected one such as memit/llama-3-8b@underedit")
    return preset


def _content(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a preset: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of hyper-parameters")
    return {str(key): value for key, value in content.items()}


def _names(preset: Preset) -> list[str]:
    return [f"{preset.model}@{source}" if source else preset.model for source in preset.sources]


def _model(name: str, known: Mapping[str, Path]) -> str | None:
    """The model that a name means, of those that there are presets for."""
    there = {preset.partition("@")[0] for preset in known}
    wanted = (name.lower(), Path(name).name.lower())
    aliases = _content(_root() / "models.yaml")
    for model in (*aliases, *sorted(there)):
        if model in there and any(other.lower() in wanted for other in (model, *(aliases.get(model) or ()))):
            return model
    return None


def _file(text: str) -> Path | None:
    """The file of that path, or the only one that some suffix makes of it."""
    if Path(text).is_file():
        return Path(text)
    found = [path for suffix in SUFFIXES if (path := Path(text + suffix)).is_file()]
    if len(found) > 1:
        raise InputError(f"--preset {text}: there are {' and '.join(path.name for path in found)}; name one of them")
    return found[0] if found else None
