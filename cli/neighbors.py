"""`rewire neighbors`: the facts that can be edited with a neighbour's help on a model."""

from pathlib import Path
from typing import Annotated

import typer

from . import common


def neighbors(
    model: common.ModelName,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="multi-CounterFact (.json), or facts with edit_neighbors to choose from (.jsonl, .csv).",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="New file: .jsonl for facts, .json for the flat form of the published sets.")
    ],
    limit: common.Limit = None,
    skip_invalid: common.SkipInvalid = False,
    batch_tokens: common.BatchTokens = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:
    """Choose each fact's neighbour for the edit, and those that are held out, among the ones that the model knows.

    A neighbour survives where the unedited model says the true object. The first survivor is the edit's, the others
    are held out; facts with fewer than two are left out.

    Example: rewire neighbors gpt2-xl multi_counterfact.json --out gpt2-xl.jsonl
    """
    from ..engine.datasets import check_writable, name_invalid, scan_candidates, write_facts
    from ..engine.neighbors import candidates, choose
    from ..kernels.errors import InputError

    # what can be known to be wrong is said before the model is loaded
    common.new_file(out)
    facts, invalid = scan_candidates(data, limit)
    if not skip_invalid:
        name_invalid(data, invalid)
    able = [fact for fact in facts if candidates(fact)]
    check_writable(out, able)
    if not able:
        raise InputError(
            f"{data}: no fact has neighbours to choose from; expected neighborhood_samples (multi-CounterFact), or "
            "edit_neighbors whose target is the fact's target_true"
        )
    loaded = common.load(model, dtype, device)
    with common.bars() as listener:
        found = choose(loaded, facts, batch_tokens, lambda done, total: listener("neighbors", done, total))
    if not found.facts:
        raise InputError(f"{data}: none of {common.count(len(facts), 'fact')} has two neighbours that {model} knows")
    write_facts(out, found.facts)
    if json:
        common.print_json(
            {
                "records": found.records,
                "candidates": found.candidates,
                "eligible": len(found.facts),
                "held_out": found.histogram,
                "mean": found.mean,
                "subjects_again": found.subjects_again,
                "not_counted": found.not_counted,
                "skipped": [{"where": record.where, "reason": record.reason} for record in invalid],
                "out": str(out),
            }
        )
        return
    for record in invalid:
        print(f"skipped {record.where}: {record.reason}")
    print(f"{common.count(found.records, 'fact')}, {len(found.facts)} of them eligible on {model}")
    if found.candidates < found.records:
        print(f"{found.records - found.candidates} without neighbours to choose from")
    shown = ", ".join(f"{count}: {facts}" for count, facts in found.histogram.items())
    print(f"facts by held-out neighbours: {shown}; mean {found.mean:.2f}")
    if found.subjects_again:
        again = common.count(found.subjects_again, "fact")
        print(f"{again} kept with the subject of the edit's neighbour in a held-out prompt, too")
    if found.not_counted:
        print(
            f"{common.count(found.not_counted, 'held-out prompt')} that another fact's edit is told: not counted where "
            "both are evaluated"
        )
    print(f"written to {out}")
