"""The facts and texts of an experiment: data sets by name, where they are looked for, and files."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from ...kernels.errors import InputError
from ..datasets import read_facts
from ..evaluation.perplexity import read_texts
from ..facts import Fact, held_out
from .config import SETS, Experiment

log = logging.getLogger("rewire")

TEXTS = "ME-PPL_50.json"


def facts_of(experiment: Experiment) -> list[Fact]:
    """The experiment's facts, of each its held-out neighbours alone: whichever of them are measured together, an
    edit-time neighbour of any is none of them.

    Raises `InputError` where the file is not there or wrong, and where neighbours are asked for that facts do not have.
    """
    path = facts_file(experiment)
    facts = read_facts(path, experiment.num_edits, SETS.get(experiment.data) or experiment.convention)
    if experiment.num_edits is not None and len(facts) < experiment.num_edits:
        log.warning("%s: %d facts in it, %d asked for; going on with those", path, len(facts), experiment.num_edits)
    lacking = sum(not fact.edit_neighbors for fact in facts)
    if experiment.neighbors and lacking:
        raise InputError(
            f"{path}: {lacking} of {len(facts)} facts have no edit_neighbors, and neighbours' help is asked for; "
            f"`rewire neighbors {experiment.model} {path}` finds those that the model knows"
        )
    return [replace(fact, neighbors=kept) for fact, kept in zip(facts, held_out(facts), strict=True)]


def facts_file(experiment: Experiment) -> Path:
    """Where the facts are: a file, or of a data set by name the first of its places that is there.

    As published, `{ds}_random_subsets_{n}/random_subset_{subset}.json`, n the number of edits or the next larger one;
    `{ds}_subset_{subset}.json`; and of sets with edit-time neighbours `{ds}_neighbors_{n}.json`.
    """
    if experiment.data not in SETS:
        path = Path(experiment.data)
        if not path.suffix and not path.exists():
            raise InputError(
                f"data {experiment.data!r}: no such file, and no data set; expected {', '.join(SETS)} or a file"
            )
        return path
    name, folder, edits = experiment.data.partition("-")[0], experiment.data_dir, experiment.num_edits
    subset = experiment.subset
    if subset is None:
        raise InputError(
            f"data {experiment.data}: which subset? say --subset (published are 1, 10 and 15 of mcf); "
            f"{_there(folder, name)}"
        )
    places = [folder / f"{name}_random_subsets_{edits}" / f"random_subset_{subset}.json"] if edits else []
    sizes = {
        int(found[1]): path for path in folder.glob(f"{name}_random_subsets_*") if (found := _SIZE.search(path.name))
    }
    places += [sizes[n] / f"random_subset_{subset}.json" for n in sorted(sizes) if n > (edits or 0)]
    places.append(folder / f"{name}_subset_{subset}.json")
    if subset == edits:
        places.append(folder / f"{name}_neighbors_{edits}.json")
    for place in places:
        if place.is_file():
            return place
    listed = ", ".join(str(place) for place in places)
    raise InputError(
        f"data {experiment.data}: none of {listed} is there; {_there(folder, name)}; "
        "say --data-dir, or name a file of facts"
    )


def _there(folder: Path, name: str) -> str:
    """Which subsets of a data set are there, in words."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    patterns = (f"{name}_random_subsets_*/random_subset_*.json", f"{name}_subset_*.json", f"{name}_neighbors_*.json")
    found = [str(path.relative_to(folder)) for pattern in patterns for path in sorted(folder.glob(pattern))]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"{folder} has {', '.join(found[:_LISTED])}{more}" if found else f"{folder} has nothing of {name}"


_SIZE = re.compile(r"_(\d+)$")
_LISTED = 8  # files that a message names


def texts_of(experiment: Experiment) -> list[str]:
    """The texts whose perplexity is followed; none where none are named and the usual file is not there."""
    usual = experiment.data_dir / TEXTS
    if experiment.perplexity is None and not usual.is_file():
        return []
    return read_texts(experiment.perplexity or usual)
