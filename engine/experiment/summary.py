"""Means over records, iteration by iteration, from the results files alone: summary.json and the published tables."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...stats.cache import write_whole
from ..evaluation.underedit import mean, score
from . import results

# in the published order; `spread_ppl` is ours
MEANS = (
    *("rewrite_acc", "rephrase_acc", "rewrite_success", "rephrase_success", "rewrite_ppl", "init_ppl", "final_ppl"),
    *("init_ppl_verify", "spread_ppl"),
)
LOCALITY = ("neighborhood_acc", "neighborhood_success")
COLUMNS = (
    *(("Efficacy", "acc"), ("Efficacy", "success"), ("Generalization", "acc"), ("Generalization", "success")),
    *(("Specificity", "acc"), ("Specificity", "success"), ("Score", "acc"), ("Score", "success")),
    *(("Perplexity", "m-ppl-50"), ("Perplexity", "init"), ("Perplexity", "init_verify"), ("Perplexity", "final")),
    *(("Perplexity", "rewrite"), ("ApproxError", "rewrite - final")),
)
LEVELS = ("Metric", "MEMIT")  # names of the two header rows, whatever the method

Entry = dict[str, Any]  # of one iteration: pre, post, m_ppl, m_ppl_pre
# {"all": [an entry an iteration], "hard": the same of the hard cases, None where none is, "facts": [of each how many]}
Summary = dict[str, Any]


def write(folder: Path, iterations: int, compat: bool) -> Summary:
    """Sums `results_{1..iterations}.json` up, ours or published ones, and writes `summary.json` and `summaryHard.json`.

    Where iteration 1 left no hard cases there is no `summaryHard.json`. Mean perplexities of texts are taken from
    `me_ppl.json`, and are None where it is missing.
    compat: means over neighbours are rounded to two digits, as in the published summaries
    Raises `InputError` where a results file is missing or broken.
    """
    path = folder / results.PERPLEXITIES
    of_texts = results.read_json(path) if path.is_file() else {}
    entries, facts = _entries(folder, iterations, False, of_texts, compat)
    summary: Summary = {"all": entries, "hard": None, "facts": facts}
    if results.results_file(folder, 1, hard=True).is_file():
        summary["hard"], _ = _entries(folder, iterations, True, of_texts, compat)
        results.write_json(folder / "summaryHard.json", summary["hard"])
    else:
        (folder / "summaryHard.json").unlink(missing_ok=True)  # of an earlier run
    results.write_json(folder / "summary.json", summary["all"])
    return summary


def batched(summary: Summary) -> bool:
    """Whether its steps are batches, of more and more facts, and not iterations, all of the same."""
    facts = summary["facts"]
    return bool(facts[0] < facts[-1])


def write_csv(folder: Path, name: str, summary: Summary, compat: bool) -> list[Path]:
    """Writes `Group_{name}.csv` and, where there are hard cases, `GroupHard_{name}.csv`; returns their paths.

    name: `{method}_{model}_{data}_N_{edits}_S_{subset}_I_{iterations}`
    compat: scores leave zeros out, and init_verify stays empty, as published; else it is the SPREAD perplexity
    `pandas.read_csv(path, header=[0, 1], index_col=0)` reads them.
    """
    written = []
    for group, entries in (("Group", summary["all"]), ("GroupHard", summary["hard"])):
        if entries:
            path = folder / f"{group}_{name}.csv"
            text = _table(rows(entries, compat, batched(summary)))
            write_whole(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
            written.append(path)
    return written


def rows(entries: Sequence[Entry], compat: bool, batched: bool) -> list[list[float | None]]:
    """The cells under `COLUMNS`: the unedited model first, then each iteration.

    The unedited model's init is that of iteration 1, which began there; an iteration's init is its own.
    batched: entries are of batches; then what is said of the unedited model is of all facts, as the last one has them
    """
    first = entries[-1 if batched else 0]
    rates = _rates(first["pre"])
    unedited = [*rates, None, score(rates[1::2], compat), first.get("m_ppl_pre"), first["post"].get("init_ppl")]
    found = [unedited + [None] * (len(COLUMNS) - len(unedited))]
    for entry in entries:
        post, rates = entry["post"], _rates(entry["post"])
        final, rewrite = post.get("final_ppl"), post.get("rewrite_ppl")
        found.append(
            [
                *(*rates, score(rates[::2], compat), score(rates[1::2], compat)),
                *(entry.get("m_ppl"), post.get("init_ppl"), post.get("init_ppl_verify") if compat else spread(post)),
                *(final, rewrite, None if final is None or rewrite is None else rewrite - final),
            ]
        )
    return found


def spread(post: dict[str, Any]) -> float | None:
    """The SPREAD perplexity, under our name or under that of the published runs which measured it."""
    value: float | None = post.get("spread_ppl", post.get("init_ppl_verify"))
    return value


def _rates(means: dict[str, Any]) -> list[float | None]:
    locality = means.get("locality", {})
    own = [means.get(f"{kind}_{name}") for kind in ("rewrite", "rephrase") for name in ("acc", "success")]
    return own + [locality.get(name) for name in LOCALITY]


def _table(cells: Iterable[Sequence[float | None]]) -> str:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    for level, name in enumerate(LEVELS):
        table.writerow([name, *(column[level] for column in COLUMNS)])
    table.writerows([number, *row] for number, row in enumerate(cells))
    return text.getvalue()


def _entries(
    folder: Path, iterations: int, hard: bool, of_texts: dict[str, float], compat: bool
) -> tuple[list[Entry], list[int]]:
    """(entries, of how many records each is)."""
    entries, counts = [], []
    for number in range(1, iterations + 1):
        records = results.read(folder, number, hard)
        entry: Entry = {side: _means([record[side] for record in records], compat) for side in ("pre", "post")}
        entries.append(entry | {"m_ppl": of_texts.get(str(number)), "m_ppl_pre": of_texts.get("0")})
        counts.append(len(records))
    return entries, counts


def _means(records: Sequence[dict[str, Any]], compat: bool) -> dict[str, Any]:
    """Of each record's prompts first, then of the records; what no record has is left out."""
    means: dict[str, Any] = {}
    for name in MEANS:
        means[name] = mean([_own_mean(record.get(name)) for record in records])
    locality = {
        name: mean([_own_mean(record.get("locality", {}).get(name)) for record in records]) for name in LOCALITY
    }
    if compat:
        locality = {name: None if value is None else round(value, 2) for name, value in locality.items()}
    means["locality"] = {name: value for name, value in locality.items() if value is not None}
    return {name: value for name, value in means.items() if value not in (None, {})}


def _own_mean(value: Any) -> float | None:
    return mean(value) if isinstance(value, list) else value
