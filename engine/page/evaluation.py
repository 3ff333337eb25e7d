"""The page of an evaluation, or of a run whose records lie in the published layout of WILD (arXiv 2502.11177)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ..facts import RIPPLES
from . import edit, reasons
from .content import (
    Content,
    Lines,
    Metric,
    Phase,
    Picture,
    Row,
    average,
    cell,
    facts,
    finite,
    is_rate,
    said,
    short_name,
)
from .definitions import ABOUT, PROMPT, define, metrics, telling
from .folder import EVALUATION, RECORDS, REPORT, RESULTS, read_edits, read_lines, read_list, read_object

CHECKPOINTS = "checkpoints.json"
SAYS = {  # column of a record -> who says it
    "target_new": "asked for",
    "answer_unedited": "before",
    "answer": "now",
    "paraphrase_answer_unedited": "paraphrase, before",
    "paraphrase_answer": "paraphrase, now",
    "locality_answer_unedited": "something else, before",
    "locality_answer": "something else, now",
}
PUBLISHED = {"reliability": "rewrite_acc", "generalization": "rephrase_acc"}  # ours -> in results.json


def read(folder: Path) -> Content:
    about = read_object(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
    if (folder / RECORDS).is_file():
        records = list(read_lines(folder / RECORDS))
    elif (folder / RESULTS).is_file():
        records = [flat(record, place) for place, record in enumerate(read_list(folder / RESULTS))]
    else:
        records = []  # of an evaluation that asks about no facts
    measured = about.get("metrics")
    if not records and not measured:
        raise InputError(
            f"{folder}: {EVALUATION} without `metrics`, and no {RECORDS}: expected what an evaluation leaves"
        )
    if not isinstance(measured, dict):
        measured = {key: average(finite(record.get(key)) for record in records) for key in (*PUBLISHED, "locality")}
        before = {key: average(finite(record.get(f"{key}_unedited")) for record in records) for key in PUBLISHED}
    else:
        before = about.get("unedited") or {}
    of_facts = _of_records(measured, records)
    asked = {what: telling(of_facts, what) for what in ABOUT}
    edits = read_edits(folder / REPORT) if (folder / REPORT).is_file() else []
    what = "edited into" if (folder / RESULTS).is_file() else "asked of"
    model = about.get("model") or (edits[-1].get("model") if edits else None)
    main = ["outcome", "question", "target_new"]
    main += [key for key in ("answer_unedited", "answer") if any(record.get(key) is not None for record in records)]
    main += [key for key in asked.values() if key is not None and "answer" not in main]
    return Content(
        "run" if (folder / RESULTS).is_file() else "evaluation",
        f"{facts(len(records))} {what} {short_name(model)}" if records else f"{short_name(model)}, measured",
        _about(about, edits),
        _groups(before, measured, about.get("definitions") or {}),
        [row(record, asked) for record in records],
        [*main, "why"],
        pictures=_checkpoints(folder / CHECKPOINTS) + (edit.pictures(edits) if edits else []),
        phases=edit.phases(edits) + _phases(about),
        details=_details(about) | (edit.details(edits[-1]) if edits else {}),
        left_out=[(str(error.get("id")), str(error.get("reason"))) for error in about.get("errors") or ()],
    )


def row(record: Mapping[str, Any], asked: Mapping[str, str | None]) -> Row:
    prompt, subject = str(record.get("prompt") or ""), str(record.get("subject") or "")
    if subject:
        prompt = prompt.replace("{}", subject)
    own = {key: value for key, value in record.items() if key not in ("prompt", "subject", "protocol")}
    own |= {key: reasons.stripped(own[key]) for key in SAYS if key in own}
    cells = {"question": prompt, "target_new": record.get("target_new"), **own}
    decides = asked[PROMPT]
    return Row(
        {key: cell(value) for key, value in cells.items()},
        subject,
        prompt,
        [(who, reasons.stripped(text)) for key, who in SAYS.items() if isinstance(text := record.get(key), str)],
        reasons.of_record(record, asked),
        measured=decides is not None and finite(record.get(decides)) is not None,
    )


def flat(record: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A record of results.json as a line of records.jsonl would have it."""
    pre, post, asked = (record.get(key) or {} for key in ("pre", "post", "requested_rewrite"))
    found = {
        "id": record.get("id", record.get("case_id", place)),
        **{key: asked.get(key) for key in ("subject", "prompt", "target_new")},
        "target_true": asked.get("ground_truth"),
        "locality": reasons.mean_of((post.get("locality") or {}).get("neighborhood_acc")),
    }
    for end, side in (("", post), ("_unedited", pre)):
        for ours, published in PUBLISHED.items():
            found[f"{ours}{end}"] = reasons.mean_of(side.get(published))
        found[f"answer{end}"] = side.get("rewrite_gen_content")
        found[f"paraphrase_answer{end}"] = side.get("rephrase_gen_content")
    return {key: value for key, value in found.items() if value is not None}


def _of_records(metrics: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that single facts have, too."""
    return [key for key in metrics if any(finite(record.get(key)) is not None for record in records)]


def _groups(
    before: Mapping[str, Any], after: Mapping[str, Any], definitions: Mapping[str, str]
) -> dict[str, list[Metric]]:
    """Shares, what follows from the edits (by category of RippleEdits), and other numbers."""

    def ripples(key: str) -> bool:
        return key in RIPPLES

    own = {key: value for key, value in after.items() if not ripples(key)}
    general = metrics(before, own, definitions)
    groups = {
        "rates": [each for each in general if each.rate],
        "what follows from the edits, by category": metrics(
            before, {key: value for key, value in after.items() if ripples(key)}, definitions
        ),
        "other numbers": [each for each in general if not each.rate],
    }
    return {name: group for name, group in groups.items() if group}


def _about(about: Mapping[str, Any], edits: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    judge = about.get("judge")
    found = {
        "model": about.get("model"),
        "protocol": about.get("protocol"),
        "judge": judge if judge is not None else "none" if about else None,
        "delta": about.get("delta"),
        "facts": about.get("facts"),
        "date": about.get("date"),
        "device": about.get("device"),
        "weights": about.get("fingerprint"),
        "Rewire": (about.get("versions") or {}).get("rewire"),
    }
    ours = {name: said(value) for name, value in found.items() if value is not None}
    return ours | {key: value for key, value in (edit.about_edit(edits) if edits else {}).items() if key not in ours}


def _phases(about: Mapping[str, Any]) -> list[Phase]:
    seconds = about.get("seconds")
    if not isinstance(seconds, dict):
        return []
    floors = about.get("floors") or {}
    return [
        Phase(name.replace("_", " "), value, finite(floors.get(name)))
        for name, value in seconds.items()
        if finite(value) is not None
    ]


def _details(about: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    found = {}
    for key in ("judge", "versions"):
        value = about.get(key)
        if isinstance(value, dict) and value:
            found[key] = {str(name): said(item) for name, item in value.items()}
    return found


def _checkpoints(path: Path) -> list[Picture]:
    """The retention curve: all edits so far, measured after so many of them."""
    steps = read_list(path) if path.is_file() else []
    if len(steps) < 2:
        return []
    names = dict.fromkeys(name for step in steps for name in step.get("metrics") or {})
    series = {name: [finite((step.get("metrics") or {}).get(name)) for step in steps] for name in names}
    shares = {define(key)[0]: series[key] for key in names if is_rate(key, [v for v in series[key] if v is not None])}
    x = [float(step.get("after") or 0) for step in steps]
    shown = edit.known(shares)
    return [Lines("retention", "All edits so far, measured again.", "edits made", x, shown, rate=True)] if shown else []
