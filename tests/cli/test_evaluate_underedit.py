"""`rewire evaluate --protocol underedit`: the unedited model is measured first, and what cannot be is said."""

import json
from pathlib import Path

from commands import FACTS, Command, complaint

KINDS = ("efficacy", "generalization", "specificity", "score")


def test_with_and_without_a_delta(edit: Command, run: Command, tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(["The ferry waits for nobody.", {"Text": " You see the town."}]))
    assert edit("--no-evaluate", limit=3).status == 0
    words = ("evaluate", "demo", FACTS, "--limit", 3, "--protocol", "underedit", "--texts", texts)
    alone, edited = run(*words, "--json").json, run(*words, "--json", "--delta", tmp_path / "out").json
    assert list(edited["metrics"]) == [
        *(f"{kind}_{name}" for name in ("acc", "success") for kind in KINDS),
        *("rewrite_ppl", "rephrase_ppl", "me_ppl"),
    ]
    assert None not in edited["metrics"].values()
    assert [name for name, value in alone["metrics"].items() if value is None] == ["specificity_acc", "score_acc"]
    assert edited["metrics"]["rewrite_ppl"] < alone["metrics"]["rewrite_ppl"]

    shown = run(*words, "--delta", tmp_path / "out").out
    assert shown.startswith("success rates, perplexities")
    assert f"{edited['metrics']['me_ppl']:.4g}" in shown
    assert f"{alone['metrics']['me_ppl']:.4g}" in shown  # both states are shown
    assert "--delta" in shown.splitlines()[-2]  # what the first one lacks


def test_texts_of_another_protocol_are_refused(run: Command, tmp_path: Path) -> None:
    assert "--texts: --protocol counterfact takes none; it is of underedit" in complaint(
        run("evaluate", "demo", FACTS, "--texts", tmp_path / "texts.json")
    )
    assert "no such file" in complaint(
        run("evaluate", "demo", FACTS, "--protocol", "underedit", "--texts", tmp_path / "texts.json")
    )
