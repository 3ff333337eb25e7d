"""The page of an experiment: iterations or batches, in the layout of UnderEdit/OverEdit, ours or published."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...kernels.errors import InputError
from ..experiment import results
from ..experiment.plots import spreads
from ..experiment.summary import COLUMNS, rows
from ..facts import read_text
from . import edit, reasons
from .content import Content, Lines, Metric, Picture, Row, cell, finite, said, short_name
from .content import facts as count
from .definitions import metric, metrics
from .folder import REPORT, read_edits, read_list

MAIN = ("outcome", "question", "target_new", "efficacy_acc", "generalization", "specificity_acc", "why")
SUMMARY, HARD, RETENTION, SETTINGS = "summary.json", "summaryHard.json", "retention.json", "experiment.yaml"
RATES = {"efficacy": "Efficacy", "generalization": "Generalization", "specificity": "Specificity", "score": "Score"}
OF_RECORD = {  # ours -> published
    "efficacy_acc": "rewrite_acc",
    "efficacy_success": "rewrite_success",
    "generalization_acc": "rephrase_acc",
    "generalization_success": "rephrase_success",
}
PERPLEXITIES = ("init_ppl", "final_ppl", "spread_ppl", "rewrite_ppl", "rephrase_ppl")


def read(folder: Path) -> Content:
    """Raises `InputError` where nothing is summed up yet."""
    steps = results.count(folder)
    if not (folder / SUMMARY).is_file():
        raise InputError(
            f"{folder}: {steps} of its steps measured and no {SUMMARY}: the run is not done; "
            "given again, rewire run goes on"
        )
    entries = read_list(folder / SUMMARY)[:steps]
    if not entries or any(not isinstance(entry.get(side), dict) for entry in entries for side in ("pre", "post")):
        raise InputError(f"{folder / SUMMARY}: expected a list of steps with `pre` and `post`, at least one")
    records = results.read(folder, steps)
    batched = len(results.read(folder, 1)) < len(records)
    settings = _settings(folder / SETTINGS)
    edits = read_edits(folder / REPORT) if (folder / REPORT).is_file() else []
    facts = {str(fact.get("id")): fact for each in edits for fact in each.get("facts") or ()}
    cells = dict(zip(COLUMNS, zip(*rows(entries, bool(settings.get("compat")), batched), strict=True), strict=True))
    unit = "batch" if batched else "iteration"
    model = settings.get("model") or (edits[-1].get("model") if edits else None)
    # several batches are several edits; one edit that was iterated is one
    total = f"{len(entries)} {unit}{'' if len(entries) == 1 else 'es' if batched else 's'}"
    content = Content(
        "experiment",
        f"{count(len(records))} edited into {short_name(model)} in {total}",
        _about(settings, edits),
        _groups(cells, entries),
        [row(record, facts.get(str(record.get("id")), {})) for record in records],
        MAIN,
        pictures=_pictures(cells, entries, batched, unit, folder),
        phases=edit.phases(edits),
        details=({"experiment": {key: said(value) for key, value in settings.items()}} if settings else {})
        | (edit.details(edits[-1]) if edits else {}),
    )
    if edits:
        content.pictures += [each for each in edit.pictures(edits) if not isinstance(each, Lines)]
    content.notes.append("What the model says in words is not measured here: the table has the shares of right tokens.")
    return content


def row(record: Mapping[str, Any], fact: Mapping[str, Any]) -> Row:
    """fact: of the edit's report, empty where there is none."""
    asked, pre, post = record.get("requested_rewrite") or {}, record["pre"], record["post"]
    measured = {f"{ours}{end}": side.get(name) for ours, name in OF_RECORD.items() for end, side in _sides(pre, post)}
    for name in ("acc", "success"):
        for end, side in _sides(pre, post):
            measured[f"specificity_{name}{end}"] = (side.get("locality") or {}).get(f"neighborhood_{name}")
    shares = {key: reasons.mean_of(value) for key, value in measured.items()}
    shares["generalization"] = shares["generalization_acc"]
    if shares["generalization_success"] is not None:
        shares["generalization"] = shares["generalization_success"]
    cells = {
        "question": asked.get("prompt"),
        "target_new": asked.get("target_new"),
        **shares,
        "id": record.get("id", record.get("case_id")),
        "target_true": asked.get("ground_truth"),
        **{name: finite(post.get(name)) for name in PERPLEXITIES},
        **{key: value for key, value in edit.inside(fact).items() if key != "spread_ppl"},
    }
    first = {"right tokens before": "efficacy_acc_unedited", "right tokens now": "efficacy_acc"}
    says = [("asked for", str(asked.get("target_new")))]
    says += [(who, f"{100 * share:.0f} %") for who, key in first.items() if (share := shares[key]) is not None]
    return Row(
        {key: cell(value) for key, value in cells.items()},
        str(asked.get("subject") or ""),
        str(asked.get("prompt") or ""),
        says,
        reasons.of_experiment(record, fact),
        measured=shares["efficacy_acc"] is not None,
    )


def _sides(pre: Mapping[str, Any], post: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return (("", post), ("_unedited", pre))


def _settings(path: Path) -> dict[str, Any]:
    """Of the experiment, as its file has them; empty for published results, which have none."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: {type(content).__name__} found, expected the settings of an experiment")
    return content


def _about(settings: Mapping[str, Any], edits: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    ours = {key: said(settings[key]) for key in ("model", "method", "data") if settings.get(key) is not None}
    return ours | {key: value for key, value in (edit.about_edit(edits) if edits else {}).items() if key not in ours}


def _groups(
    cells: Mapping[tuple[str, str], Sequence[float | None]], entries: Sequence[dict[str, Any]]
) -> dict[str, list[Metric]]:
    def ends(name: str) -> tuple[dict[str, float | None], dict[str, float | None]]:
        first, last = {}, {}
        for ours, published in RATES.items():
            values = cells[published, name]
            first[f"{ours}_{name}"], last[f"{ours}_{name}"] = values[0], values[-1]
        return first, last

    post = entries[-1]["post"]
    others = [
        metric("optimization", None, post.get("final_ppl")),
        metric("spread", post.get("init_ppl") if len(entries) == 1 else None, cells["Perplexity", "init_verify"][-1]),
        metric("rewrite_ppl", None, post.get("rewrite_ppl")),
        metric("me_ppl", cells["Perplexity", "m-ppl-50"][0], cells["Perplexity", "m-ppl-50"][-1]),
    ]
    groups = {
        "success rates": metrics(*ends("success")),
        "accuracy": metrics(*ends("acc")),
        "perplexities": [each for each in others if each.before is not None or each.after is not None],
    }
    return {name: group for name, group in groups.items() if group}


def _pictures(
    cells: Mapping[tuple[str, str], Sequence[float | None]],
    entries: list[dict[str, Any]],
    batched: bool,
    unit: str,
    folder: Path,
) -> list[Picture]:
    x = [float(number) for number in range(len(entries) + 1)]
    from_0 = f"{unit.capitalize()} 0 is the unedited model."
    found: list[Picture] = []
    for name, title in (("success", "success"), ("acc", "accuracy")):
        series = edit.known({ours: cells[published, name] for ours, published in RATES.items() if ours != "score"})
        if series:
            found.append(Lines(f"{title} by {unit}", from_0, unit, x, series, rate=True))
    series = edit.known({"spread": spreads(entries, batched), "optimization": cells["Perplexity", "final"]})
    if series:
        caption = "SPREAD: as the weights give it. OPTIMIZATION: with the target values put in by hand."
        found.append(Lines("perplexity of the new object", caption, unit, x, series, rate=False))
    series = edit.known({"plain texts": cells["Perplexity", "m-ppl-50"]})
    if series:
        found.append(Lines("perplexity of plain texts", "What the edit did to the rest.", unit, x, series, rate=False))
    if (folder / HARD).is_file():
        hard = read_list(folder / HARD)[: len(entries)]
        series = {"efficacy": [None, *(finite(entry.get("post", {}).get("rewrite_success")) for entry in hard)]}
        series["efficacy, accuracy"] = [None, *(finite(entry.get("post", {}).get("rewrite_acc")) for entry in hard)]
        caption = f"Facts of which {unit} 1 left no token right."
        if len(hard) == len(entries) and edit.known(series):
            found.append(Lines("hard cases", caption, unit, x, edit.known(series), rate=True))
    if (folder / RETENTION).is_file():
        found += retention(read_list(folder / RETENTION))
    return found


def retention(steps: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """What is left of earlier batches behind each later one: of the first, of the newest, and of all together."""
    firsts, newest, means = [], [], []
    for step in steps:
        batches = [each for each in step.get("batches") or () if isinstance(each, dict)]
        values = [(each.get("facts") or 0, finite(each.get("efficacy_acc"))) for each in batches]
        kept = [(weight, value) for weight, value in values if value is not None]
        total = sum(weight for weight, _ in kept)
        firsts.append(values[0][1] if values else None)
        newest.append(values[-1][1] if values else None)
        means.append(sum(weight * value for weight, value in kept) / total if total else None)
    series = edit.known({"first batch": firsts, "newest batch": newest, "all so far": means})
    if len(steps) < 2 or not series:
        return []
    caption = "Token accuracy on the edits' own prompts, of batches that were edited earlier."
    return [Lines("retention", caption, "after batch", [float(step.get("after") or 0) for step in steps], series, True)]
