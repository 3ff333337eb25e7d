"""What an evaluation leaves in a folder: a summary, a flat table of the facts, and the published layout."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...stats.cache import write_whole
from ..asked import mean
from ..facts import Fact
from ..finite import finite
from .things import kept_things

SUMMARY, RECORDS, TABLE, PUBLISHED = "evaluation.json", "records.jsonl", "records.csv", "results.json"
FORMAT = "rewire-evaluation-1"
# columns of a record -> what they are called in the table, "" for none
_CALLED = {
    **{"rewrite_right": "reliability", "rephrase_right": "generalization", "portability_right": "portability"},
    **{"rewrite_acc": "reliability", "rephrase_acc": "generalization", "portability_acc": "portability"},
    **{"locality_same": "locality", "locality_acc": "locality"},
    **{"rewrite_answer": "answer", "rephrase_answer": "paraphrase_answer", "rewrite_ended": "ended"},
    **{"rephrase_ended": "", "locality_ended": "", "portability_ended": ""},
}


def write(
    folder: Path,
    facts: Sequence[Fact],
    after: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes `evaluation.json` (what was measured, how, and the metrics; also the records of texts and tasks), of facts
    `records.jsonl` and `records.csv` (a flat row each) and, of `wild` and `synthetic` beside an unedited model,
    `results.json` (published layout). Each file is written whole.

    after, before: what `evaluate` gave of the model, and of the unedited one
    about: what else the summary says: model, fingerprint, delta, seconds, versions, ...
    """
    now, then = _by_id(after), {} if before is None else _by_id(before)
    rows = [flat(fact, now[fact.id], then.get(fact.id)) for fact in facts if fact.id in now]
    ids = {fact.id for fact in facts}
    others = [record for record in after["facts"] if record["id"] not in ids]
    summary = {
        "format": FORMAT,
        "protocol": after["protocol"],
        "metrics": after["metrics"],
        "definitions": after["definitions"],
        "unedited": None if before is None else before["metrics"],
        **{key: after[key] for key in ("judge", "context", "left_out") if key in after},
        "facts": len(facts),
        **({"records": others} if others else {}),
        **(about or {}),
    }
    if rows:
        _write(folder / RECORDS, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))
        _write(folder / TABLE, _csv(rows))
    if before is not None and after["protocol"] in ("wild", "synthetic"):
        records = [
            published(place, fact, things, then[fact.id], now[fact.id])
            for place, (fact, things) in enumerate(zip(facts, kept_things(facts, 1), strict=True))
        ]
        _write(folder / PUBLISHED, json.dumps(finite(records), ensure_ascii=False, indent=4))
    _write(folder / SUMMARY, json.dumps(finite(summary), ensure_ascii=False, indent=1) + "\n")


def _by_id(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in measured["facts"]}


def flat(fact: Fact, after: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """One row: what the fact asks for, and each of its numbers and answers, `..._unedited` for those of before."""
    row = {
        "id": fact.id,
        "subject": fact.subject,
        "prompt": fact.question,
        "target_new": fact.target_new,
        "target_true": fact.target_true,
    }
    now, then = _columns(after), {} if before is None else _columns(before)
    for column, value in now.items():
        name = _CALLED.get(column, column)
        if name:
            row[name] = value
            if column in then:
                row[f"{name}_unedited"] = then[column]
    return row


def _columns(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A record's numbers: of several prompts their mean; its answers: of several prompts the first."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        named = f"{prefix}{key}"
        if key in ("id", "ids", "prompt", "output") or key.endswith(("_output", "_logprob")):
            continue
        if isinstance(value, bool):
            found[named] = float(value)
        elif isinstance(value, (int, float, str)) or value is None:
            found[named] = value
        elif isinstance(value, Mapping):
            found |= _columns(value, f"{named}_")
        elif value and all(isinstance(each, Mapping) for each in value):
            rows = [_columns(each) for each in value]
            for column in dict.fromkeys(column for each in rows for column in each):
                cells = [each.get(column) for each in rows]
                words = any(isinstance(cell, str) for cell in cells)
                found[f"{named}_{column}"] = cells[0] if words else mean(cells)
        elif value and all(isinstance(each, (int, float)) for each in value):
            found[named] = sum(map(float, value)) / len(value)
    return found


def published(
    place: int,
    fact: Fact,
    things: Sequence[tuple[str, str]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """One record as published (arXiv 2502.11177): the first paraphrase and the first question about something else.

    things: the (question about something else, its answer) that was asked, or none
    """
    asked = {"prompt": things[0][0], "ground_truth": things[0][1]} if things else None
    return {
        "pre": _side(before),
        "case_id": place,
        "requested_rewrite": {
            "prompt": fact.question,
            "target_new": fact.target_new,
            "ground_truth": fact.target_true or "<|endoftext|>",
            "portability": {},
            "locality": {"neighborhood": asked} if asked else {},
            "subject": fact.subject,
            "loc_prompt": None,  # a text of zsRE's training set, which WISE alone reads
            "rephrase_prompt": fact.paraphrases[0] if fact.paraphrases else None,
        },
        "post": _side(after) | {"locality": _kept(after)},
    }


def _side(record: Mapping[str, Any]) -> dict[str, Any]:
    side: dict[str, Any] = {"portability": {}}
    for kind in ("rewrite", "rephrase"):
        if record.get(f"{kind}_acc"):  # synthetic: a list with one number
            side[f"{kind}_acc"] = record[f"{kind}_acc"][:1]
        elif record.get(kind):
            side |= {f"{kind}_acc": float(record[kind][0]["right"]), f"{kind}_gen_content": record[kind][0]["answer"]}
    return side


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    found = record.get("locality_acc") or [float(one["same"]) for one in record.get("locality", []) if "same" in one]
    return {"neighborhood_acc": found[:1]} if found else {}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")  # \r\n: else what holds a lone \r is not quoted before Python 3.13
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
