"""Hyper-parameters: frozen, typed, validated; the keys are those of the published presets (YAML).

A preset is a file of `hparams/<method>/`, found by the model's name, or any path. Keys of the published formats that
Rewire does not use are accepted, said once, and ignored; an unknown key is an error that suggests the nearest one.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..kernels.errors import InputError
from .anatomy import Anatomy

log = logging.getLogger("rewire")

# keys of the published formats that have no meaning here
UNUSED = {
    *("alg_name", "model_name", "stats_dir", "device", "layer_selection", "fp16", "model_parallel", "batch_size"),
    *("max_length", "mom2_adjustment", "mom2_dtype", "evaluation_type", "P_loc"),
    *("mlp_module_tmp", "attn_module_tmp", "layer_module_tmp", "ln_f_module", "lm_head_module"),
}
# keys of a preset file that are about the file: where its values come from, other names of the model
ABOUT = {"source", "aliases"}
SET = "--set"  # where single values come from, in messages


class Hparams(BaseModel):
    """What every method of the locate-and-edit family has.

    layers: edited layers, ascending; the last is the z-layer
    fact_token: the token whose hidden state is edited
    v_num_grad_steps: forwards of the value optimisation (one fewer Adam updates)
    v_lr: Adam's learning rate
    v_loss_layer: kept for the published presets; must be the last block
    v_weight_decay: weight of |delta| / |h0|^2 in the loss
    clamp_norm_factor: |delta| stays within this times |h0|
    kl_factor: weight of KL(now || first) at the subject of "{} is a"
    mom2_update_weight: lambda, multiplies C
    mom2_dataset: the corpus of the published preset; not read: the corpus is named to the session (`--corpus`)
    mom2_n_samples: most documents that second moments are collected over; picks among files of given ones
    mom2_tokens: token budget where moments are collected; None: 20 d_in
    mom2_max_length: documents are cut to so many tokens where moments are collected
    mom2_seed: of the order in which documents are drawn; None: the corpus' own order
    rewrite_module_tmp: the published name of the edited module; must be what the anatomy says
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1)
    fact_token: Literal["subject_last"] = "subject_last"
    v_num_grad_steps: int = Field(25, ge=1)
    v_lr: float = Field(0.1, gt=0)
    v_loss_layer: int | None = Field(None, ge=0)
    v_weight_decay: float = Field(0.5, ge=0)
    clamp_norm_factor: float = Field(0.75, gt=0)
    kl_factor: float = Field(0.0625, ge=0)
    mom2_update_weight: float = Field(15000, gt=0)
    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = Field(100000, ge=1)
    mom2_tokens: int | None = Field(None, ge=1)
    mom2_max_length: int = Field(512, ge=2)
    mom2_seed: int | None = Field(0, ge=0)
    rewrite_module_tmp: str | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _list(cls, layers: Any) -> Any:
        if not isinstance(layers, (list, tuple)):
            raise ValueError("expected a list of layer numbers such as [3, 4, 5]")
        return layers

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError("expected ascending layer numbers from 0, each once")
        return layers

    def check(self, anatomy: Anatomy, where: Callable[[str], str]) -> None:
        """Raises `InputError` where these hyper-parameters do not fit the model; where(name): the value's source."""
        n = anatomy.n_layers
        if self.layers[-1] >= n:
            raise InputError(
                f"{where('layers')}: layers {list(self.layers)} out of range: the model has layers 0 to {n - 1}"
            )
        if self.v_loss_layer not in (None, n - 1):
            raise InputError(
                f"{where('v_loss_layer')}: v_loss_layer is {self.v_loss_layer}, expected the last block, {n - 1}"
            )
        if self.layers[-1] == n - 1:
            log.warning("the last edited layer is the last block: only a prompt that ends in its subject can change")
        module = anatomy.layer_name(0).replace(".0.", ".{}.")
        if self.rewrite_module_tmp not in (None, module):
            raise InputError(
                f"{where('rewrite_module_tmp')}: rewrite_module_tmp is {self.rewrite_module_tmp!r}, "
                f"this model has {module!r}"
            )


H = TypeVar("H", bound=Hparams)


def preset_files(method: str) -> dict[str, Path]:
    """The shipped presets of a method: name -> file."""
    folder = Path(str(files("rewire.hparams"))) / method
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_hparams(
    kind: type[H],
    method: str,
    model_name: str,
    anatomy: Anatomy,
    preset: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[H, str]:
    """(hyper-parameters, where they come from), checked against the model.

    preset: a file, the name of a shipped preset, or None: the shipped one whose `model_name` or alias is the last part
        of the model's name; where there is none, layers by relative depth and the defaults, said aloud
    overrides: single values that replace the preset's
    """
    path = _find(method, model_name, preset)
    if path is None:
        values: dict[str, Any] = {"layers": default_layers(anatomy.n_layers)}
        source = "defaults by depth"
    else:
        values = read_yaml(path)
        source = str(path) if path.parent.parent.name != "hparams" else f"hparams/{method}/{path.name}"
        if "source" in values:
            source += f" ({values['source']})"
    overrides = overrides or {}
    check_names(kind, overrides)
    check_names(kind, set(values) - ABOUT, str(path))
    values |= overrides
    if path is None:
        log.warning(
            "no preset for %s: editing layers %s with default hyper-parameters, untuned; see --preset and --set",
            model_name,
            values["layers"],
        )

    def where(name: str) -> str:
        return SET if name in overrides or path is None else str(path)

    unused = sorted(set(values) & UNUSED)
    if unused:
        level = logging.INFO if path in preset_files(method).values() else logging.WARNING  # of a shipped one, not news
        log.log(level, "not used by Rewire, ignored: %s", ", ".join(unused))
    try:
        hparams = kind(**{key: value for key, value in values.items() if key not in UNUSED | ABOUT})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] == "missing" else f" ({first['input']!r} found)"
        raise InputError(f"{where(str(first['loc'][0]))}: {field}: {reason}{found}") from None
    hparams.check(anatomy, where)
    return hparams, source


def default_layers(n_layers: int) -> list[int]:
    """Layers by relative depth, as the published presets for Llama have them: 4 to 8 of 32."""
    last = max(0, round(n_layers / 4))
    return list(range(max(last - 4, min(last, round(n_layers / 8))), last + 1))


def read_yaml(path: Path) -> dict[str, Any]:
    """A preset's keys and values; texts that read as numbers (YAML 1.1 leaves `5e-1` a text) become numbers."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as a preset: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a YAML mapping of hyper-parameters")
    return {str(key): _number(value) for key, value in content.items()}


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts of the command line, the value read as YAML."""
    result = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{SET} {text}: expected key=value")
        try:
            result[key.strip()] = _number(yaml.safe_load(value))
        except yaml.YAMLError:
            raise InputError(
                f"{SET} {text}: the value cannot be read (YAML is expected, such as 0.5 or [3, 4])"
            ) from None
    return result


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _find(method: str, model_name: str, preset: str | Path | None) -> Path | None:
    shipped = preset_files(method)
    if preset is not None:
        if str(preset) in shipped:
            return shipped[str(preset)]
        if Path(preset).is_file():
            return Path(preset)
        raise InputError(f"--preset {preset}: no such file, and no shipped preset; there are {', '.join(shipped)}")
    wanted = (model_name.lower(), Path(model_name).name.lower())
    for path in shipped.values():
        content = read_yaml(path)
        names = [content.get("model_name", path.stem), *content.get("aliases", [])]
        if any(str(name).lower() in wanted for name in names):
            return path
    return None


def check_names(kind: type[Hparams], names: Iterable[str], where: str = SET) -> None:
    """Raises `InputError` with the nearest name for a hyper-parameter that the method does not have."""
    known = set(kind.model_fields) | UNUSED
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, sorted(known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(kind.model_fields))}"
        raise InputError(f"{where}: unknown hyper-parameter {name!r}; {hint}")
