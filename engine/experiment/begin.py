"""What an experiment begins with: what can be wrong is found before the model is loaded, then a session on it."""

from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Inputs:
    """What the experiment names, read: context templates, text and folder of second moments; None: none named."""

    contexts: tuple[str, ...] | None
    corpus: Corpus | None
    stats: str | None


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
    """Fetches the published second moments where they are asked for. Raises `InputError` for files that are wrong."""
    contexts = None if experiment.contexts is None else read_contexts(experiment.contexts)
    corpus = None if experiment.corpus is None else read_corpus(experiment.corpus)
    stats = experiment.stats
    if stats == PULL:
        stats = str(pull(names.collection(experiment.model), cache_root() / "stats" / "published")[0].parent)
    return Inputs(contexts, corpus, stats)


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
