"""General ability: tasks of the lm-evaluation-harness, on the model as it is in memory.

Without `tasks` these are `TASKS`, of GLUE, zero-shot: what edited models are commonly held against (arXiv 2410.02355,
there with MMLU, which takes hours: name "mmlu"). The harness takes its data from the Hugging Face hub, or from where a
task's file says.
"""

import copy
import difflib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from ...kernels.errors import InputError
from ..asked import Asked
from ..facts import Fact
from ..passes import fused
from ..phases import Tick
from .perplexity import refuse_deltas
from .registry import Protocol

TASKS = ("sst2", "mrpc", "cola", "rte", "mnli")
BATCH = 16  # rows of a forward, where nothing is said
STDERR = "_stderr"


def measure(
    asked: Asked,
    facts: Sequence[Fact],
    progress: Tick,
    *,
    tasks: Sequence[str | Path] = TASKS,
    limit: int | float | None = None,
    fewshot: int | None = None,
) -> dict[str, Any]:
    """Of the weights as they are; facts say nothing here, and there may be none.

    tasks: names of the harness' tasks, groups or tags, or files of a task each (names that end in .yaml or .yml)
    limit: documents of each task at most, or below 1 their share; None: all
    fewshot: examples before each document; None: as each task says

    metrics: {"task/metric": number}, "task/metric,filter" where the task filters answers; groups have theirs, too
    facts: a record a task: {"id": its name, each of its metrics, and their "..._stderr" where the harness has one}
    Also returns "definitions": of each metric a line.
    Raises `InputError` where the harness is missing, for an unknown task, and where a task's data cannot be had.
    """
    refuse_deltas("ability", asked)
    if isinstance(tasks, str) or not tasks:
        raise InputError(f"protocol ability: tasks is {tasks!r}; expected a list of names or YAML files of tasks")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"protocol ability needs lm-eval ({error}): pip install 'rewire[eval]'") from None
    model = asked.model
    with fused(model), _own_randomness():
        manager = TaskManager(include_defaults=not all(map(_is_file, tasks)))  # to find those takes long
        chosen = [task for name in tasks for task in _load(manager, name)]
        # of the tokenizer a copy: it gets a padding token where it has none
        tokenizer = copy.deepcopy(model.tokenizer)
        lm = HFLM(pretrained=model.hf, tokenizer=tokenizer, batch_size=asked.batch_rows or BATCH)
        found: dict[str, Any] = simple_evaluate(
            model=lm, tasks=chosen, num_fewshot=fewshot, limit=limit, log_samples=False, task_manager=manager
        )
    progress(len(tasks), len(tasks))
    return _flat(found)


def _load(manager: Any, name: str | Path) -> list[Any]:
    """The task, the group, or the tasks of the tag of this name, or what stands in this file."""
    if _is_file(name) and not Path(name).is_file():
        raise InputError(f"{name}: no such file, expected a task of the harness as YAML")
    if not _is_file(name) and name not in manager.task_index:
        near = difflib.get_close_matches(str(name), manager.all_tasks, 1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them"
        raise InputError(f"unknown task {str(name)!r}; {hint}")
    try:
        loaded = manager.load(str(name))
    except Exception as error:  # YAML, the hub, and a task's own code each fail in ways of their own
        said = " ".join(str(error).split())[:300]
        raise InputError(f"task {name}: it, or its data, cannot be loaded ({type(error).__name__}: {said})") from error
    inside = {child for children in loaded["group_map"].values() for child in children}
    return [each for kind in ("groups", "tasks") for name, each in loaded[kind].items() if name not in inside]


def _is_file(name: str | Path) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The harness seeds every generator that there is: behind it they go on as if it had not."""
    kept = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(kept[0])
            numpy.random.set_state(kept[1])


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    metrics: dict[str, float | None] = {}
    definitions: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    for task, result in (found["results"] | found.get("groups", {})).items():
        record: dict[str, Any] = {"id": task}
        for key, value in result.items():
            name = key.removesuffix(",none")  # no filter of the answers
            if "," not in key or isinstance(value, bool) or not isinstance(value, (int, float, numpy.number)):
                continue
            record[name] = float(value)
            if STDERR not in name:
                metrics[f"{task}/{name}"] = float(value)
                definitions[f"{task}/{name}"] = _definition(found, task, name)
        records.append(record)
    return {"metrics": metrics, "facts": records, "definitions": definitions}


def _definition(found: dict[str, Any], task: str, name: str) -> str:
    parts = [f"{name} on {task}"]
    if (shots := found.get("n-shot", {}).get(task)) is not None:
        parts.append(f"{shots}-shot")
    if (count := found.get("n-samples", {}).get(task, {}).get("effective")) is not None:
        parts.append(f"{count} documents")
    return ", ".join(parts) + f" (lm-evaluation-harness {found.get('lm_eval_version', '')})".replace(" )", ")")


# what is measured depends on the tasks: `measure` gives the definitions
METRICS: dict[str, str] = {}

PROTOCOL = Protocol("ability", measure, METRICS, options=("tasks", "limit", "fewshot"))
