"""Names of the published experiments: of their methods, and of the models that they ran on."""

import re
from dataclasses import dataclass
from pathlib import Path

from ...kernels.errors import InputError
from ..editors.names import known_method

# method here -> its published name, which begins the names of its iterative and neighbour-assisted variants
ALGORITHMS = {
    "memit": "MEMIT",
    "pmet": "PMET",
    "alphaedit": "AlphaEdit",
    "rome": "ROME",
    "r-rome": "R-ROME",
    "emmet": "EMMET",
}
_METHODS = {published.lower(): method for method, published in ALGORITHMS.items()}
_NAME = re.compile(r"(?P<base>.+?)(?P<recursive>_RECURSIVE)?(?P<neighbor>_NEIGHBOR)?", re.I)
_OTHERS = re.compile(r"_SPREAD$|_WO_NEIGHBOR$", re.I)

RECURSIVE, NEIGHBOR = "_RECURSIVE", "_NEIGHBOR"
ITERATIONS = 5  # of an iterative variant, where nobody says how many

# the published name of a model -> where it is published, and the collection of its statistics
MODELS = {
    "gpt2-xl": "openai-community/gpt2-xl",
    "gpt-j-6b": "EleutherAI/gpt-j-6B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
}
FOLDER = Path("hugging_cache")  # where the published code keeps models, below where it runs


@dataclass(frozen=True)
class Algorithm:
    """What a method's name says. method: its name here; recursive: it iterates; neighbors: it has neighbours' help."""

    method: str
    recursive: bool
    neighbors: bool

    @property
    def name(self) -> str:
        """Ours, or as published where it says more than the method."""
        if not self.recursive and not self.neighbors:
            return self.method
        return published(self, 1, self.neighbors)


def parse(name: str) -> Algorithm:
    """Of "memit", "MEMIT", "MEMIT_RECURSIVE", "AlphaEdit_RECURSIVE_NEIGHBOR", ...; upper and lower case are one.

    Raises `InputError` for a method that is not there, with the nearest name.
    """
    if _OTHERS.search(name):
        raise InputError(f"method {name!r} is not here; expected one with or without _RECURSIVE, _RECURSIVE_NEIGHBOR")
    found = _NAME.fullmatch(name)
    if not found:
        raise InputError(f"method {name!r}: expected a name such as memit or MEMIT_RECURSIVE_NEIGHBOR")
    base = found["base"].lower()
    method = known_method(_METHODS.get(base, base))
    return Algorithm(method, bool(found["recursive"]), bool(found["neighbor"]))


def published(algorithm: Algorithm, iterations: int, neighbors: bool) -> str:
    """How the published work calls it; our name where it has none. All its neighbour-assisted ones are iterative."""
    name = ALGORITHMS.get(algorithm.method, algorithm.method)
    if algorithm.recursive or iterations > 1 or neighbors:
        name += RECURSIVE
    return name + NEIGHBOR if neighbors else name


def locate(model: str) -> str:
    """What to load: a folder as it is named, one of the published code's, or the hub id of a published name."""
    if Path(model).is_dir():
        return model
    if (FOLDER / model).is_dir():
        return str(FOLDER / model)
    return MODELS.get(model.lower(), model)


def collection(model: str) -> str:
    """The published statistics of a model, by its name or its hub id. Raises `InputError` where there are none."""
    last = Path(model).name.lower()
    for name, hub in MODELS.items():
        if last in (name, Path(hub).name.lower()):
            return name
    raise InputError(
        f"stats pull: no published ones of {model} are known; there are those of {', '.join(MODELS)}: name a folder, "
        "or leave it out and they are collected (`rewire stats pull` takes any repository)"
    )
