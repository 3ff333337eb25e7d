"""What an experiment is: a frozen `Experiment`, read from YAML, from flags, or from both."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...kernels.errors import InputError
from ..editors.registry import find_method
from ..evaluation.contexts import check_context
from ..facts import read_text
from ..hparams import SET, check_settings
from ..model import DTYPES
from ..presets import number
from ..wrong import in_words
from . import names

PULL = "pull"  # what `stats` says for the published collection
SETS = {"mcf": None, "zsre": "zsre", "zsre-alt": "zsre-alt"}  # data sets by name -> the convention they are read by
FILE = "experiment.yaml"
# what may differ when a folder is gone on with: where things lie, not what they are
PLACES = {"out", "data_dir", "device"}
# keys of the published command line -> ours
PUBLISHED = {
    "alg_name": "method",
    "model_name": "model",
    "hparams_fname": "preset",
    "ds_name": "data",
    "ds_subset": "subset",
}


class Experiment(BaseModel):
    """Edit the first facts of a data set into a model, iteration after iteration, or batch after batch, and measure.

    model: a directory, a hub id, "demo", or a published name ("gpt2-xl", "gpt-j-6B", "llama-2-7b", "llama-3-8b")
    method: ours ("memit") or a published name ("MEMIT_RECURSIVE_NEIGHBOR"), which also says `neighbors` and that it
        iterates
    data: "mcf", "zsre" (its first answer is the new object), "zsre-alt" (its counterfactual one), or a file of facts
    convention: how a file of zsRE is read: "zsre" or "zsre-alt"; data sets by name say it themselves
    subset: which subset of a data set by name
    num_edits: the first so many facts; None: all
    data_dir: the folder of data sets by name, and of `ME-PPL_50.json`
    iterations: values, keys and solve so many times, each from the weights as they are then; None: 1, or 5 of a
        method whose name ends in _RECURSIVE
    neighbors: the facts' `edit_neighbors` enter the values; None: as the method's name says
    batch: facts that are edited together, batch after batch in sequence; None: all at once
    preset: a file, or the name of a shipped one; None: found by the model's name
    set: single hyper-parameters that replace the preset's
    stats: a folder of second moments; "pull": the published collection of this model; None: cached or collected
    corpus: what they are collected over; None: the demo's text
    contexts: a JSON file of context templates; None: sampled from the model
    perplexity: a JSON list of texts whose perplexity is followed (ME-PPL); None: `ME-PPL_50.json` of `data_dir` if any
    mode: how facts are edited and when they are measured: "single" (each alone, on the clean model), "sequential" (one
        after the other, each measured at once, all so far at checkpoints and at the end), "batch" (`batch` after
        `batch`, or all at once; measured likewise); None: as UnderEdit/OverEdit do, iteration by iteration
    protocol: what is measured, of a mode: "wild", "synthetic", "counterfact", "zsre", "ripple"; else "underedit"
    context: what stands around each question (wild, synthetic); None: the protocol's own
    judge, judge_model, judge_url: who judges generated answers (wild)
    only_wrong: only facts whose answer the unedited model gets wrong (of wild)
    checkpoints: in a mode all facts so far are measured behind so many edits, each time; None: at the end alone
    stop_gap: a batch is done once |SPREAD - OPTIMIZATION| perplexity is at most this; None: after all iterations
    compat: published behaviour where the default differs (docs/methods.md)
    seed: of the sampled context templates
    device, dtype: as `rewire.load` takes them
    out: the root of the results' folders
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1)
    method: str = "memit"
    data: str = Field(min_length=1)
    convention: Literal["zsre", "zsre-alt"] | None = None
    subset: int | None = Field(None, ge=0)
    num_edits: int | None = Field(None, ge=1)
    data_dir: Path = Path("data")
    iterations: int = Field(1, ge=1)
    neighbors: bool = False
    batch: int | None = Field(None, ge=1)
    preset: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    stats: str | None = None
    corpus: str | None = None
    contexts: Path | None = None
    perplexity: Path | None = None
    mode: Literal["single", "sequential", "batch"] | None = None
    protocol: Literal["underedit", "wild", "synthetic", "counterfact", "zsre", "ripple"] = "underedit"
    context: str | None = None
    judge: Literal["auto", "exact", "llm"] = "auto"
    judge_model: str | None = None
    judge_url: str | None = None
    only_wrong: bool = False
    checkpoints: int | None = Field(None, ge=1)
    stop_gap: float | None = Field(None, ge=0)
    compat: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    out: Path = Path("results")

    @model_validator(mode="before")
    @classmethod
    def _said_by_the_method(cls, values: Any) -> Any:
        """What the method's name says, where nothing else is said."""
        if not isinstance(values, dict) or not isinstance(values.get("method", "memit"), str):
            return values
        algorithm = names.parse(values.get("method", "memit"))
        said = {"iterations": names.ITERATIONS if algorithm.recursive else 1, "neighbors": algorithm.neighbors}
        given = {key: value for key, value in values.items() if value is not None}
        if algorithm.neighbors and given.get("neighbors") is False:
            raise ValueError(f"method {values['method']!r} has neighbours' help, neighbors: false says otherwise")
        made = said | given | {"method": algorithm.name}
        if isinstance(made.get("data"), str) and made["data"] in SETS and made["neighbors"] and "num_edits" in made:
            made.setdefault("subset", made["num_edits"])  # published sets with neighbours are numbered by their size
        return made

    @field_validator("set")
    @classmethod
    def _numbers(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {key: number(value) for key, value in settings.items()}

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in ("auto", "checkpoint", *DTYPES):
            raise ValueError(f"expected auto, checkpoint, {', '.join(DTYPES)}")
        return dtype

    @model_validator(mode="after")
    def _one_convention(self) -> "Experiment":
        if self.data in SETS and self.convention not in (None, SETS[self.data]):
            raise ValueError(
                f"data {self.data!r} says how it is read, convention {self.convention!r} otherwise; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _what_a_mode_takes(self) -> "Experiment":
        asked = {"judge": self.judge != "auto", "judge_model": self.judge_model, "judge_url": self.judge_url}
        of_judge = next((name for name, value in asked.items() if value), None)
        if of_judge and self.protocol != "wild":
            raise ValueError(f"{of_judge} is of generated answers; protocol {self.protocol} has none (wild has)")
        if self.judge == "exact" and (self.judge_model or self.judge_url):
            raise ValueError("judge_model and judge_url are of judge llm; judge exact asks no model")
        own = {"context": self.context, "only_wrong": self.only_wrong, "checkpoints": self.checkpoints}
        if self.mode is None:
            named = [name for name, value in own.items() if value]
            if named or self.protocol != "underedit":
                raise ValueError(
                    f"{named[0] if named else 'protocol ' + self.protocol} is of a mode; say mode: single, sequential "
                    "or batch"
                )
            return self
        if self.protocol == "underedit":
            raise ValueError(f"mode {self.mode}: say which protocol: wild, synthetic, counterfact, zsre or ripple")
        if self.mode != "batch" and self.batch is not None:
            raise ValueError(f"batch is of mode batch; mode {self.mode} edits one fact at a time")
        if self.mode == "single" and self.iterations > 1:
            said = f"iterations is {self.iterations} (also by a method's name that ends in {names.RECURSIVE})"
            raise ValueError(f"mode single edits each fact once; {said}")
        if self.mode == "single" and self.stop_gap is not None:
            raise ValueError("stop_gap is of iterations; mode single edits each fact once")
        if self.perplexity is not None:
            raise ValueError(f"perplexity is of an experiment without a mode; mode {self.mode} reads no texts")
        if self.mode == "single" and self.checkpoints:
            raise ValueError("checkpoints is of sequential and batch; single edits never meet each other")
        if self.only_wrong and self.protocol != "wild":
            raise ValueError(f"only_wrong needs generated answers; protocol {self.protocol} has none (wild has)")
        if self.context and self.protocol not in ("wild", "synthetic"):
            raise ValueError(f"context is of wild and synthetic; protocol {self.protocol} asks as it stands")
        if self.context:
            check_context(self.context)
        return self

    @property
    def algorithm(self) -> names.Algorithm:
        return names.parse(self.method)

    @property
    def name(self) -> str:
        """The method's published name, with what the experiment adds to it."""
        return names.published(self.algorithm, self.iterations, self.neighbors)

    def folder(self, facts: int) -> Path:
        """`{out}/{method}/{model}/{data}/N_{edits}/S_{subset}/[B_{batch}/]I_{iterations}`, but for the batch as
        published; facts: how many there are, where no number was asked for."""
        data = self.data if self.data in SETS else Path(self.data).stem
        parts = [self.name, Path(self.model).name, data, f"N_{self.num_edits or facts}", f"S_{self.subset or 0}"]
        if self.batch is not None:
            parts.append(f"B_{self.batch}")
        if self.mode is not None:
            parts += [f"I_{self.iterations}"] if self.iterations > 1 else []
            asked = "-".join(part for part in (self.protocol, self.context) if part)
            parts += [self.mode + (f"-{self.checkpoints}" if self.checkpoints else ""), asked]
            if self.only_wrong:
                parts[-1] += "-wrong"
            return self.out.joinpath(*parts)
        return self.out.joinpath(*parts, f"I_{self.iterations}")

    def label(self, facts: int) -> str:
        """The folder's parts in one word, as the published tables are named."""
        return "_".join(self.folder(facts).relative_to(self.out).parts)

    def title(self, facts: int) -> str:
        """Its first parts, for people."""
        method, model, data, number, *_ = self.folder(facts).relative_to(self.out).parts
        return f"{method}, {model}, {data}, {number.replace('_', ' = ')}"

    def dump(self) -> str:
        """As YAML, which `read_experiment` reads back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def differs(self, other: "Experiment") -> list[str]:
        """What the other one asks for differently, in words."""
        mine, others = self.wanted, other.wanted
        return [
            f"{key} is {_yaml(mine[key])} there, {_yaml(others[key])} asked for"
            for key in mine
            if mine[key] != others[key]
        ]

    @property
    def wanted(self) -> dict[str, Any]:
        """All keys but those that say where things lie, ready for JSON; a method is one, by whichever name."""
        said = self.model_dump(mode="json") | {"method": self.name}
        return {key: value for key, value in said.items() if key not in PLACES}


def read_experiment(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Experiment:
    """From a YAML file and what flags say, which win; `set` is merged, a flag of None says nothing.

    Raises `InputError` that names the file or the flag: an unknown key (with the nearest one), a wrong type or value.
    """
    values = {} if path is None else _read(Path(path))
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    of_flags = _mapping(given.get("set"), SET)
    settings = {**_mapping(values.get("set"), f"{path}: set"), **of_flags}

    def where(key: str) -> str:
        return flag(key) if key in given or path is None else f"{path}: {key}"

    def of_set(name: str) -> str:
        return SET if name in of_flags or path is None else f"{path}: set"

    merged = {**values, **given, **({"set": settings} if settings else {})}
    for key in ("model", "data"):
        if merged.get(key) is None:
            wanted = "a model" if key == "model" else "a data set, or a file of facts"
            if path is None:
                raise InputError(
                    f"{flag(key)} is missing; expected {wanted}: name it, or a FILE with `{key}: ...` in it"
                )
            raise InputError(f"{path}: {key} is missing, and there is no {flag(key)}; expected {wanted}")
    try:
        made = Experiment(**merged)
    except ValidationError as error:
        raise InputError(_said(error, where)) from None
    check_settings(find_method(made.algorithm.method).hparams, made.set, of_set)
    return made


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{path}: {line}broken YAML ({error.problem or error.context})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: {type(content).__name__} found, expected the keys of an experiment (model, data, ...)"
        )
    known = list(Experiment.model_fields)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            meant = [PUBLISHED[key]] if key in PUBLISHED else near
            hint = f"did you mean {meant[0]!r}?" if meant else f"known are {', '.join(known)}"
            raise InputError(f"{path}: unknown key {key!r}; {hint}")
    return content


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {value!r} found, expected a mapping of hyper-parameters such as {{v_lr: 0.1}}")
    return {str(name): setting for name, setting in value.items()}


def _said(error: ValidationError, where: Callable[[str], str]) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    return f"{where(str(first['loc'][0]))}: {in_words(first)}"


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).removesuffix("...\n").strip()
