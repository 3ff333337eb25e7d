"""Results of one iteration, in the published layout of UnderEdit/OverEdit (docs/formats.md)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ...stats.cache import write_whole
from ..edits import Iteration
from ..facts import Fact, held_out, read_text

PERPLEXITIES = "me_ppl.json"


def write(
    folder: Path,
    number: int,
    facts: Sequence[Fact],
    before: dict[str, Any],
    after: dict[str, Any],
    iteration: Iteration,
    seconds: float,
    hard: set[str] | None,
) -> list[dict[str, Any]]:
    """Writes `results_{number}.json` and, where there are hard cases, `results_{number}_false_cases.json`.

    Mean perplexities of texts, where both evaluations have them, go to `me_ppl.json`. Each file is written whole.

    number: of the iteration, from 1
    before, after: what `evaluate` ("underedit") gave of the unedited model and of the one behind this iteration
    iteration: its `facts` have init_ppl, opt_ppl and spread_ppl, in the order of `facts`
    seconds: that the edit took, of the whole batch
    hard: ids of the cases that iteration 1 left wrong; None: this is iteration 1
    Returns the records of all facts.
    """
    columns = (facts, held_out(facts), before["facts"], after["facts"], iteration.facts)
    records = [
        {
            "case_id": place,
            "id": fact.id,
            "requested_rewrite": _request(fact, neighbors),
            "time": seconds,
            "pre": _measured(pre),
            "post": _measured(post) | _perplexities(post, of_values),
        }
        for place, (fact, neighbors, pre, post, of_values) in enumerate(zip(*columns, strict=True))
    ]
    hard = hard_cases(after) if hard is None else hard
    write_json(results_file(folder, number), records)
    left = [record for record in records if record["id"] in hard]
    if left:
        write_json(results_file(folder, number, hard=True), left)
    else:
        results_file(folder, number, hard=True).unlink(missing_ok=True)  # of an earlier run
    _follow(folder / PERPLEXITIES, {0: before["metrics"]["me_ppl"], number: after["metrics"]["me_ppl"]})
    return records


def hard_cases(after: dict[str, Any]) -> set[str]:
    """Ids of the facts of which no token of the new object is the most probable: behind iteration 1, the hard ones.

    after: what `evaluation.evaluate` ("underedit") gave
    """
    return {record["id"] for record in after["facts"] if record["efficacy"]["acc"][0] == 0.0}


def results_file(folder: Path, number: int, hard: bool = False) -> Path:
    return folder / f"results_{number}{'_false_cases' if hard else ''}.json"


def read(folder: Path, number: int, hard: bool = False) -> list[dict[str, Any]]:
    """Records of one iteration, ours or published ones. Raises `InputError` where the file is missing or broken."""
    path = results_file(folder, number, hard)
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: expected a JSON list of records")
    for place, record in enumerate(records):
        if not isinstance(record, dict) or not all(isinstance(record.get(side), dict) for side in ("pre", "post")):
            raise InputError(f"{path}: record {place}: expected an object with `pre` and `post`")
    return records


def count(folder: Path) -> int:
    """Iterations whose results are there, from 1 on without a gap."""
    number = 0
    while results_file(folder, number + 1).is_file():
        number += 1
    return number


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=4)
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: broken JSON ({error.msg})") from None


def _request(fact: Fact, neighbors: Sequence[str]) -> dict[str, Any]:
    """What was asked for, with the neighbours that were measured."""
    kept = [(prompt, fact.target_true) for prompt in neighbors if fact.target_true is not None]
    kept += [(probe.prompt, probe.target) for probe in fact.locality]
    return {
        "prompt": fact.question,
        "target_new": fact.target_new,
        "ground_truth": fact.target_true,
        "portability": {},
        "locality": {"neighborhood": {"prompt": [p for p, _ in kept], "ground_truth": [t for _, t in kept]}}
        if kept
        else {},
        "subject": fact.subject,
        "rephrase_prompt": list(fact.paraphrases),
    }


def _measured(record: dict[str, Any]) -> dict[str, Any]:
    specificity = record["specificity"]
    named = {"neighborhood_output": "output", "neighborhood_success": "success", "neighborhood_acc": "acc"}
    return {
        "rewrite_acc": record["efficacy"]["acc"],
        "rewrite_success": record["efficacy"]["success"],
        "rephrase_acc": record["generalization"]["acc"],
        "rephrase_success": record["generalization"]["success"],
        "locality": {name: specificity[ours] for name, ours in named.items() if ours in specificity}
        if specificity["output"]
        else {},
        "portability": {},
    }


def _perplexities(record: dict[str, Any], of_values: dict[str, float]) -> dict[str, Any]:
    return {
        "init_ppl": of_values["init_ppl"],
        "final_ppl": of_values["opt_ppl"],
        "spread_ppl": of_values["spread_ppl"],
        "rewrite_ppl": record["rewrite_ppl"],
        "rephrase_ppl": record["rephrase_ppl"],
    }


def _follow(path: Path, measured: dict[int, float | None]) -> None:
    known = {str(number): value for number, value in measured.items() if value is not None}
    if known:
        write_json(path, (read_json(path) if path.is_file() else {}) | known)
