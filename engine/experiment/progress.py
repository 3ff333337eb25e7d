"""What of an experiment is on disk: whose folder it is, and on which weights each step was measured.

A folder belongs to the experiment in its `experiment.yaml`. `progress.json` says what that file cannot: digests of the
facts, the texts, the preset and other files that it names, and the unedited weights, and for each step the digest of
the weights that its results are of. A run that is started again edits again (values come from disk), and takes a
step's results where its weights are the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ...kernels.errors import InputError
from ...stats.cache import write_whole
from ..facts import Fact, to_record
from . import results
from .config import FILE, Experiment, read_experiment

PROGRESS = "progress.json"
FORMAT = "rewire-experiment-1"
OURS = {FILE, PROGRESS}  # the first files of a folder


@dataclass
class Progress:
    """One folder's.

    about: digests that a run in this folder must have: of the experiment, facts, texts, what else it names, and the
        unedited model
    steps: number -> {"weights": digest, "row": what the command shows}; 0 is the unedited model
    iterations: steps in all, once the last one is known
    """

    folder: Path
    experiment: Experiment
    about: dict[str, str]
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    iterations: int | None = None

    @classmethod
    def find(
        cls, experiment: Experiment, facts: Sequence[Fact], texts: Sequence[str], inputs: Mapping[str, str]
    ) -> "Progress":
        """Of the experiment's folder, which need not be there; inputs: digests of what else the experiment names.

        Raises `InputError` for a folder that is not its own.
        """
        folder = experiment.folder(len(facts))
        about = {
            "experiment": content_digest(experiment.wanted),
            "facts": content_digest([to_record(fact) for fact in facts]),
            "texts": content_digest(list(texts)),
            **inputs,
        }
        found = cls(folder, experiment, about)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: a file; expected a folder, or nothing: name another --out")
        there = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} if folder.exists() else set()
        if there and not there & OURS:
            raise InputError(f"{folder}: files in it, and no {FILE}: no experiment of Rewire's; name another --out")
        if FILE in there:
            differences = read_experiment(folder / FILE).differs(experiment)
            if differences:
                raise InputError(f"{folder}: another experiment: {'; '.join(differences)}; name another --out")
        if PROGRESS in there:
            content = results.read_json(folder / PROGRESS)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise InputError(f"{folder / PROGRESS}: broken, or of another version; name another --out")
            for name, digest in about.items():
                if content["about"].get(name) != digest:
                    raise InputError(f"{folder}: begun with other {name} than now; name another --out")
            found.about |= content["about"]
            found.steps, found.iterations = content["steps"], content["iterations"]
        return found

    def begin(self, fingerprint: str) -> None:
        """Claims the folder for weights with this fingerprint. Raises `InputError` where they were others."""
        known = self.about.setdefault("model", fingerprint)
        if known != fingerprint:
            named = f"{self.experiment.model} has {fingerprint}"
            raise InputError(f"{self.folder}: begun on weights {known}, {named}; name another --out")
        if not (self.folder / FILE).is_file():
            write_whole(self.folder / FILE, lambda file: file.write(self.experiment.dump().encode()))
        self._save()

    def holds(self, number: int, weights: str) -> bool:
        """Whether results of this step are there, and of these weights."""
        step = self.steps.get(str(number))
        return step is not None and step["weights"] == weights and results.results_file(self.folder, number).is_file()

    def add(self, number: int, weights: str, row: dict[str, Any]) -> None:
        """A step is measured, its files are there. Those behind it, if any, were of other weights."""
        self.steps = {key: step for key, step in self.steps.items() if int(key) < number}
        self.steps[str(number)] = {"weights": weights, "row": row}
        self._save()

    def finish(self) -> None:
        self.iterations = len(self.steps) - 1
        self._save()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [self.steps[key]["row"] for key in sorted(self.steps, key=int)]

    def _save(self) -> None:
        content = {
            "format": FORMAT,
            "rewire": __version__,
            "about": self.about,
            "steps": self.steps,
            "iterations": self.iterations,
        }
        results.write_json(self.folder / PROGRESS, content)


def content_digest(content: Any) -> str:
    """24 hex digits over what JSON makes of it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
