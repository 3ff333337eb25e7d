"""What an experiment begins with: what can be wrong is found before the model is loaded, then a session on it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ...stats import Corpus, cache_root, read_corpus
from ...stats.pull import pull
from ..editors.registry import find_method
from ..hparams import SET, check_names, check_settings, check_values
from ..model import Model
from ..phases import Listener
from ..presets import find_preset
from ..prompts import read_contexts
from ..session import EditSession
from . import names
from .config import PULL, Experiment
from .progress import content_digest

MOMENTS = (".npz", ".safetensors")  # files of second moments


@dataclass(frozen=True)
class Inputs:
    """What the experiment names, read: the preset's values, context templates, text and folder of second moments; None:
    none named."""

    preset: Mapping[str, Any] | None
    contexts: tuple[str, ...] | None
    corpus: Corpus | None
    stats: str | None

    @property
    def digests(self) -> dict[str, str]:
        """By which a folder's experiment is told from one whose files read otherwise (of statistics their sizes)."""
        folder = None if self.stats in (None, PULL) else Path(str(self.stats))
        files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.suffix in MOMENTS)
        return {
            "preset": content_digest(self.preset),
            "contexts": content_digest(self.contexts),
            "corpus": content_digest(None if self.corpus is None else self.corpus.digest),
            "statistics": content_digest([[str(path.relative_to(str(folder))), path.stat().st_size] for path in files]),
        }


def check(experiment: Experiment) -> None:
    """Raises `InputError` for hyper-parameters, a preset, context templates, or statistics that are wrong whatever the
    model's weights."""
    kind = find_method(experiment.algorithm.method).hparams
    check_settings(kind, experiment.set, lambda name: SET)
    preset = find_preset(experiment.algorithm.method, names.locate(experiment.model), experiment.preset)
    if preset is not None:
        place = preset.place
        check_names(kind, preset.values, place)
        values = {name: value for name, value in preset.values.items() if name in kind.model_fields}
        check_values(kind, values | experiment.set, lambda name: SET if name in experiment.set else place)
    if experiment.contexts is not None:
        read_contexts(experiment.contexts)
    if experiment.stats == PULL:
        names.collection(experiment.model)
    elif experiment.stats is not None and not Path(experiment.stats).is_dir():
        raise InputError(
            f"--stats {experiment.stats}: no such folder; expected one that holds second moments, or {PULL!r}"
        )


def read_inputs(experiment: Experiment) -> Inputs:
    """Raises `InputError` for files that are wrong."""
    preset = find_preset(experiment.algorithm.method, names.locate(experiment.model), experiment.preset)
    contexts = None if experiment.contexts is None else read_contexts(experiment.contexts)
    corpus = None if experiment.corpus is None else read_corpus(experiment.corpus)
    return Inputs(None if preset is None else preset.values, contexts, corpus, experiment.stats)


def fetched(experiment: Experiment, inputs: Inputs) -> Inputs:
    """With the published second moments where they are asked for."""
    if inputs.stats != PULL:
        return inputs
    files = pull(names.collection(experiment.model), cache_root() / "stats" / "published")
    return replace(inputs, stats=str(files[0].parent))


def session_of(experiment: Experiment, inputs: Inputs, model: Model, listener: Listener) -> EditSession:
    return EditSession(
        model,
        experiment.algorithm.method,
        experiment.preset,
        inputs.stats,
        hparams=experiment.set,
        corpus=inputs.corpus,
        contexts=inputs.contexts,
        seed=experiment.seed,
        neighbors=experiment.neighbors,
        compat=experiment.compat,
        listener=listener,
    )
