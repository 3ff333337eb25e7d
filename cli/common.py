"""What the verbs share: options, the loaded model, progress bars, tables."""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..engine.finite import finite
from ..engine.phases import Listener, silent
from ..kernels.errors import InputError

if TYPE_CHECKING:  # --help waits for no torch
    from ..engine.model import Model
    from ..stats.ranks import Ranks

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model directory or hub id; `demo` is the embedded one.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or balanced (GPUs, then CPU, then disk).")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, or checkpoint (as stored).")]
Quantize = Annotated[str | None, typer.Option(help="Quantise while loading: nf4, fp4 or int8 (not for edits).")]
Impl = Annotated[str, typer.Option(help="What serves the kernels: auto, torch or triton.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampled context templates.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first N records only.")]
BatchSize = Annotated[
    str,
    typer.Option(metavar="auto|N", help="Facts optimised at once, by each process; auto: by the free memory."),
]
Convention = Annotated[
    str | None,
    typer.Option(
        metavar="zsre|zsre-alt", help="Of a zsRE file: zsre (answers[0] is new; MEMIT) or zsre-alt (EasyEdit)."
    ),
]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Go on without facts that cannot be edited.")]
BatchTokens = Annotated[int | None, typer.Option(min=1, help="Padded tokens of a forward; default: by free memory.")]
Stats = Annotated[Path | None, typer.Option(help="Folder of second moments (ours, or the ecosystem's npz).")]
Contexts = Annotated[Path | None, typer.Option(help="JSON file of context templates; default: sampled from the model.")]
Preset = Annotated[str | None, typer.Option(help="Preset file or name; default: found by the model's name.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a hyper-parameter.")]

MethodName = Annotated[
    str, typer.Option(help="Editing method: memit, memit-history, alphaedit, pmet, emmet, rome or r-rome.")
]
Compat = Annotated[bool, typer.Option("--compat", help="Do as the published code where the default differs.")]

METRICS = {  # protocol -> (metric, what it is called)
    "counterfact": (
        ("efficacy_success", "efficacy"),
        ("paraphrase_success", "paraphrase"),
        ("neighborhood_success", "neighborhood"),
        ("score", "score"),
        ("efficacy_accuracy", "new object most probable"),
        ("paraphrase_accuracy", "the same, paraphrases"),
    ),
    "underedit": (
        ("efficacy_success", "efficacy"),
        ("generalization_success", "generalization"),
        ("specificity_success", "specificity"),
        ("score_success", "score"),
        ("efficacy_acc", "efficacy: tokens right"),
        ("generalization_acc", "generalization: tokens right"),
        ("specificity_acc", "specificity: answers as before"),
        ("score_acc", "score of these"),
        ("rewrite_ppl", "perplexity of the new object"),
        ("rephrase_ppl", "the same, paraphrases"),
        ("me_ppl", "perplexity of texts"),
    ),
}
# names of what is no share
NUMBERS = ("ppl", "perplexity", "entropy", "kl", "tokens", "left_out", "nll", "count", "magnitude", "reference_score")
NEEDS = {  # what a missing one would need
    "counterfact": "no fact has what it needs (target_true; paraphrases; neighbors)",
    "underedit": "nothing has what it needs (target_true; paraphrases; neighbors or locality; --delta; --texts)",
    "wild": "nothing has what it needs (paraphrases; locality or neighbors, with --delta; ripples; --truncation gold)",
    "synthetic": "nothing has what it needs (paraphrases; locality or neighbors, with --delta; ripples)",
    "zsre": "nothing has what it needs (paraphrases; locality, with --delta; ripples)",
    "ripple": "no fact has ripples of this kind",
    "drift": "nothing has what it needs (--texts; facts with locality or neighbors)",
}


def load(name: str, dtype: str, device: str, quantize: str | None = None) -> "Model":
    """The model, without the libraries' own progress bars."""
    from transformers.utils import logging

    from ..engine.model import load

    logging.disable_progress_bar()
    return load(name, dtype, quantize, device)


def find_judge(name: str, model: str | None, url: str | None) -> Any:
    """Who judges answers. Raises `InputError` for what is not there, or not for this one."""
    from ..engine.judges import find_judge

    if name == "exact" and (model or url):
        named = "--judge-model" if model else "--judge-url"
        raise InputError(f"{named}: exact match asks no model; leave it out, or say --judge llm")
    judge = find_judge(name, model=model, base_url=url)
    judge.prepare()
    return judge


def batch_size(text: str) -> int | None:
    """ "64" -> 64, "auto" -> None."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch-size {text}: expected auto, or a whole number of facts from 1 on")
    return int(text)


def new_folder(path: Path) -> Path:
    """A folder to write into that holds nothing yet. Raises `InputError` for one that does, or cannot be made."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out {path}: something is there already; name a new folder")
    return _reachable(path.absolute(), "folder")


def new_file(path: Path) -> Path:
    """A file to write that is not there. Raises `InputError` for one that is, or cannot be made."""
    if path.exists():
        raise InputError(f"--out {path}: something is there already; name a new file")
    return _reachable(path.absolute(), "file")


def _reachable(path: Path, what: str) -> Path:
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not above.is_dir():
        raise InputError(f"--out {path}: {above} is a file; name a new {what}")
    if not os.access(above, os.W_OK):
        raise InputError(f"--out {path}: nothing can be written to {above}; name a new {what} elsewhere")
    return path


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        best = task.fields["best"]
        return Text(
            f"{task.speed:,.1f}/s" + (f" ({100 * task.speed / best:.0f} % of floor)" if best else ""), no_wrap=True
        )


def only_first(ranks: "Ranks") -> None:
    """Of several processes the first one speaks; what the others cannot go on with, they say too."""
    if not ranks.first:
        logging.getLogger("rewire").setLevel(logging.ERROR)


@contextmanager
def bars(best: Mapping[str, float | None] | None = None, shown: bool = True) -> Iterator[Listener]:
    """A listener that draws one bar a phase, with rate and time to go; silent where stdout is no terminal.

    The rate of a phase is measured from its first call on: what was done before it (values from disk) took no time.
    best: phase -> the rate that nothing passes, where it is known; shown: whether anything is drawn
    """
    if not shown or not sys.stdout.isatty():
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def listen(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(
                    phase.replace("_", " "), total=total, completed=done, best=(best or {}).get(phase)
                )
            progress.update(tasks[phase], completed=done, total=total)

        yield listen


def console() -> Console:
    """A wide one where neither a terminal nor COLUMNS sets the width: tables are not cut then."""
    asked = os.environ.get("COLUMNS", "")
    if sys.stdout.isatty():
        return Console()
    return Console(width=int(asked) if asked.isdecimal() and int(asked) else 200)


def print_json(content: Mapping[str, Any]) -> None:
    print(json.dumps(finite(content), indent=1, ensure_ascii=False))


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def print_metrics(columns: Mapping[str, Mapping[str, Any]], protocol: str = "counterfact") -> None:
    """Metrics, one column a state of the model; where one is missing, what it would need is said below."""
    titles = {"counterfact": "success rates", "underedit": "success rates, perplexities"}
    table = Table("", *map(escape, columns), title=titles.get(protocol, protocol), title_justify="left")
    rows = labels(protocol, [key for metrics in columns.values() for key in metrics])
    for key, label in rows:
        table.add_row(label, *(said(key, metrics.get(key)) for metrics in columns.values()))
    Console().print(table)
    if any(metrics.get(key) is None for metrics in columns.values() for key, _ in rows):
        print(f"-: {NEEDS.get(protocol, 'nothing has what it needs')}")


def labels(protocol: str, metrics: Iterable[str]) -> Sequence[tuple[str, str]]:
    """(metric, what it is called), of those that are shown, in order."""
    return METRICS.get(protocol) or [(key, key.replace("_", " ")) for key in dict.fromkeys(metrics)]


def said(name: str, value: float | None) -> str:
    """A metric as it is shown: a share in percent, or a number."""
    return _perplexity(value) if any(word in name for word in NUMBERS) else percent(value)


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def count(number: int, what: str) -> str:
    """1 fact, 2 facts."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def seconds_line(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{phase.replace('_', ' ')} {value:.1f} s" for phase, value in seconds.items())
