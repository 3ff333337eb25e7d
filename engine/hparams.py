"""Hyper-parameters: frozen, typed, validated; the keys are those of the published presets (YAML).

They come from a preset (`presets.py`) and from single values that replace its own. Keys of the published formats that
the method does not use are accepted in files, said once, and ignored; an unknown key is an error that suggests the
nearest one.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..kernels.errors import InputError
from .anatomy import Anatomy
from .presets import Preset, find_preset, methods, number
from .prompts import CONTEXT_TOKENS, SEED_WORDS
from .wrong import in_words

log = logging.getLogger("rewire")

# keys of the published formats that have no meaning here
UNUSED = {
    *("alg_name", "alg", "model_name", "stats_dir", "device", "fp16", "model_parallel", "batch_size", "max_length"),
    *("mom2_dtype", "P_loc", "evaluation_type", "api_key", "use_chat_template", "calculate_objective_value"),
    *("mlp_module_tmp", "attn_module_tmp", "layer_module_tmp", "ln_f_module", "lm_head_module"),
    *("base_method", "lamHyper", "solver", "init_model"),  # SimIE
    *("inner_params", "lr", "editor_batch_size", "batch_size_once"),  # UltraEdit
    "dynamic_multiplier",  # FastMEMIT
}
# fields of some methods, which the files of others have too
OTHERS = {
    *("nullspace_threshold", "L2", "mom2_adjustment", "nll_loss_factor", "rewrite_module_tmps", "emmet_lambda"),
}
# what published code can do and Rewire cannot: key -> the value with which it does not
NEUTRAL: Mapping[str, Any] = {
    "layer_selection": "all",
    "Pre": 1,  # SimIE's AlphaEdit: whether earlier edits are kept
    "prob_cutoff": 0,  # ENCORE: values stop once the new object is likely enough
    "norm_control": 0,
    "update_norm_lambda": 0,
    "add_prev_edits": False,
    "dynamic": False,  # FastMEMIT
    "cumulative_ratio": None,  # SPHERE
    "suppression_strength": None,
}
ALSO = {"memit-history": ("memit",)}  # methods whose presets another one takes, too
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
    context_template_length_params: [tokens, templates] of each kind of sampled context; templates a multiple of 5
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
    context_template_length_params: tuple[tuple[int, int], ...] = ((CONTEXT_TOKENS, len(SEED_WORDS)),)

    @field_validator("context_template_length_params")
    @classmethod
    def _multiples(cls, kinds: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if any(tokens < 1 or count < 1 or count % len(SEED_WORDS) for tokens, count in kinds):
            raise ValueError(f"expected [tokens, templates] with templates a multiple of {len(SEED_WORDS)}")
        return kinds

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

    @classmethod
    def default_layers(cls, n_layers: int) -> list[int]:
        """Layers by relative depth, as the published presets for Llama have them: 4 to 8 of 32."""
        last = max(0, round(n_layers / 4))
        return list(range(max(last - 4, min(last, round(n_layers / 8))), last + 1))

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


def load_hparams(
    kind: type[H],
    method: str,
    model_name: str,
    anatomy: Anatomy,
    preset: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[H, str]:
    """(hyper-parameters, where they come from), checked against the model.

    preset: what `find_preset` takes; None: found by the model's name. Where there is none, layers by relative depth and
        the defaults, said aloud
    overrides: single values that replace the preset's
    """
    found = find_preset(method, model_name, preset)
    overrides = overrides or {}
    check_names(kind, overrides)
    if found is not None:
        values = {**_of_the_method(kind, method, found), **overrides}
    else:
        values = {"layers": kind.default_layers(anatomy.n_layers), **overrides}
        log.warning(
            "no preset for %s: editing layers %s with default hyper-parameters, untuned; see --preset and --set",
            model_name,
            values["layers"],
        )

    def where(name: str) -> str:
        return SET if name in overrides else "defaults by depth" if found is None else found.place

    hparams = check_values(kind, values, where)
    hparams.check(anatomy, where)
    return hparams, "defaults by depth" if found is None else found.said


def check_values(kind: type[H], values: Mapping[str, Any], where: Callable[[str], str]) -> H:
    """Raises `InputError` for hyper-parameters that no model takes; where(name): the value's source."""
    weight = values.get("mom2_update_weight")
    if isinstance(weight, (list, tuple)):
        raise InputError(
            f"{where('mom2_update_weight')}: mom2_update_weight: one number for all layers is expected "
            f"({weight} found, one for each); choose with --set mom2_update_weight=N"
        )
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{where(str(first['loc'][0]))}: {field}: {in_words(first)}") from None


def check_settings(kind: type[Hparams], settings: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """The same of single ones, whatever the preset: `layers` is the only one without a default."""
    for name in settings:
        try:
            check_names(kind, [name])
        except InputError as error:
            raise InputError(where(name) + str(error).removeprefix(SET)) from None
    check_values(kind, {"layers": [0]} | dict(settings), where)


def _of_the_method(kind: type[Hparams], method: str, preset: Preset) -> dict[str, Any]:
    """The values of a preset that the method has; the others are said. Raises `InputError` for unknown ones, and for a
    preset of another method."""
    values = dict(preset.values)
    check_names(kind, values, preset.place)
    for key in ("alg_name", "alg"):
        name = values.get(key)
        # UnderEdit's MEMIT_RECURSIVE, MEMIT_RECURSIVE_NEIGHBOR, ... are MEMIT's with its iterations and neighbours
        plain = re.sub(r"_(RECURSIVE|NEIGHBOR|SPREAD)", "", str(name)).replace("_", "-").lower()
        if name is not None and plain not in (method, *ALSO.get(method, ())):
            hint = f"choose --method {plain}, or another preset" if plain in methods() else "choose another preset"
            raise InputError(f"{preset.place}: {key} is {name}, expected a preset of {method}; {hint}")
    foreign = sorted(values.keys() - kind.model_fields.keys())
    missing = [key for key in foreign if key in NEUTRAL and values[key] not in (NEUTRAL[key], None)]
    if missing:
        there = ", ".join(f"{key}: {values[key]}" for key in missing)
        log.warning("%s: published code goes another way for %s, which Rewire does not", preset.place, there)
    unused = [key for key in foreign if key not in missing]
    if unused:  # of a shipped one, that is no news
        level = logging.INFO if preset.shipped else logging.WARNING
        log.log(level, "not used by Rewire, ignored: %s", ", ".join(unused))
    return {key: value for key, value in values.items() if key in kind.model_fields}


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts of the command line, the value read as YAML."""
    result = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{SET} {text}: expected key=value")
        try:
            result[key.strip()] = number(yaml.safe_load(value))
        except yaml.YAMLError:
            raise InputError(
                f"{SET} {text}: the value cannot be read (YAML is expected, such as 0.5 or [3, 4])"
            ) from None
    return result


def check_names(kind: type[Hparams], names: Iterable[str], where: str = SET) -> None:
    """Raises `InputError` with the nearest name for a hyper-parameter that the method does not have.

    In files, keys of the published formats that have no meaning here pass; by `--set` they would do nothing.
    """
    known = set(kind.model_fields) | (set() if where == SET else UNUSED | OTHERS | NEUTRAL.keys())
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, sorted(known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(kind.model_fields))}"
        raise InputError(f"{where}: unknown hyper-parameter {name!r}; {hint}")
