"""`rewire neighbors`, and zsRE by its convention, through the entry point."""

import json
from pathlib import Path
from typing import Any

import pytest

import rewire
from commands import FACTS, Command, complaint
from rewire.engine.neighbors import Eligible, choose


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """multi-CounterFact of the embedded facts: the last word of each neighbour's question stands for its subject."""
    records = []
    for number, fact in enumerate(rewire.read_facts(FACTS, limit=6)):
        samples = []
        for question in fact.neighbors:
            before, _, subject = question.rpartition(" ")
            samples.append({"subject": subject, "prompt": before + " {}"})
        rewrite = {"subject": fact.subject, "prompt": fact.prompt, "relation_id": "P1"}
        rewrite |= {"target_new": {"str": fact.target_new}, "target_true": {"str": fact.target_true}}  # type: ignore[dict-item]
        records.append(
            {
                "case_id": 10 + number,
                "requested_rewrite": rewrite,
                "paraphrase_prompts": list(fact.paraphrases),
                "neighborhood_prompts": list(fact.neighbors),
                "neighborhood_samples": samples,
            }
        )
    path = tmp_path / "mcf.json"
    path.write_text(json.dumps(records))
    return path


def test_json_and_both_forms(run: Command, data: Path, tmp_path: Path, demo: rewire.Model) -> None:
    out = tmp_path / "new" / "eligible.jsonl"
    done = run("neighbors", "demo", data, "--out", out, "--json", "--batch-tokens", 200)
    assert done.status == 0, done.err
    from rewire.engine.datasets import scan_candidates

    found = choose(demo, scan_candidates(data)[0])
    assert done.json == {
        "records": 6,
        "candidates": 6,
        "eligible": len(found.facts),
        "held_out": {str(count): facts for count, facts in found.histogram.items()},
        "mean": found.mean,
        "subjects_again": found.subjects_again,
        "not_counted": found.not_counted,
        "skipped": [],
        "out": str(out),
    }
    assert len(found.facts) > 0
    assert rewire.read_facts(out) == found.facts
    flat = tmp_path / "eligible.json"
    shown = run("neighbors", "demo", data, "--out", flat, "--limit", 3)
    assert shown.status == 0, shown.err
    assert shown.out.startswith(f"3 facts, {len(rewire.read_facts(flat))} of them eligible on demo\n")
    assert "\nfacts by held-out neighbours: " in shown.out
    assert shown.out.endswith(f"written to {flat}\n")
    assert json.loads(flat.read_text())[0]["neighborhood_samples"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eligible.json", "mcf.json", "new"]


def test_subjects_that_come_again_are_counted_as_facts(
    run: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count, said in ((17, "17 facts kept with the subject"), (1, "1 fact kept with the subject")):
        monkeypatch.setattr(Eligible, "subjects_again", property(lambda found: count))  # noqa: B023
        shown = run("neighbors", "demo", data, "--out", tmp_path / f"{count}.jsonl", "--limit", 3)
        assert f"\n{said} of the edit's neighbour in a held-out prompt, too\n" in shown.out


def test_what_is_wrong(run: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"

    def said(facts: object, *options: object) -> str:
        return complaint(run("neighbors", "demo", facts, "--out", out, *options))

    missing = tmp_path / "no.json"
    assert said(missing) == f"{missing}: no such file (expected facts as .jsonl, .csv or .json)"
    assert said(FACTS).startswith(f"{FACTS}: no fact has neighbours to choose from; expected neighborhood_samples")
    records = json.loads(data.read_text())
    records[1]["requested_rewrite"]["target_new"]["str"] = ""
    data.write_text(json.dumps(records))
    hint = "1 fact cannot be edited (--skip-invalid goes on without)"
    assert said(data) == f"{data}: {hint}: record 1: target_new is empty"
    assert complaint(run("neighbors", "demo", data, "--skip-invalid", "--out", tmp_path / "out.csv")) == (
        f"{tmp_path / 'out.csv'}: expected a name in .jsonl (facts), or .json (CounterFact's flat form)"
    )
    with monkeypatch.context() as patch:
        patch.setattr("rewire.engine.neighbors.says", lambda model, pairs, *_: [False] * len(pairs))
        assert said(data, "--skip-invalid") == f"{data}: none of 5 facts has two neighbours that demo knows"
    assert not out.exists()
    shown = run("neighbors", "demo", data, "--skip-invalid", "--out", out)
    assert shown.status == 0, shown.err
    assert shown.out.startswith("skipped record 1: target_new is empty\n5 facts, ")
    before = out.read_bytes()
    assert said(data, "--skip-invalid") == f"--out {out}: something is there already; name a new file"
    assert out.read_bytes() == before
    inside = out / "b.jsonl"
    assert complaint(run("neighbors", "demo", data, "--out", inside)) == (
        f"--out {inside}: {out} is a file; name a new file"
    )


def test_a_record_that_the_flat_form_has_no_place_for(run: Command, data: Path, tmp_path: Path) -> None:
    records = json.loads(data.read_text())
    rewrite = records[0]["requested_rewrite"]
    rewrite["prompt"] = f"{{}}, yes, {rewrite['subject']} is a"
    data.write_text(json.dumps(records))
    message = complaint(run("neighbors", "demo", data, "--out", tmp_path / "a.json"))
    assert message.startswith(f"fact 10 ({rewrite['subject']}): a subject that its prompt holds more than once")
    assert run("neighbors", "demo", data, "--out", tmp_path / "a.jsonl").status == 0


@pytest.mark.parametrize("verb", ["evaluate", "plan"])
def test_zsre_by_its_convention(run: Command, tmp_path: Path, verb: str) -> None:
    path = tmp_path / "zsre.json"
    record: dict[str, Any] = {
        "subject": "Hari", "src": "What is the job of Hari?", "rephrase": "Hari works as?", "alt": "smith",
        "answers": ["doctor"], "loc": "nq question: who wrote faust", "loc_ans": "Goethe",
    }  # fmt: skip
    path.write_text(json.dumps([record, {**record, "src": "Where does Hari work?"}]))
    assert complaint(run(verb, "demo", path)).startswith(f"{path}: record 0: zsRE, which is read in two ways;")
    success = []
    for convention in ("zsre", "zsre-alt"):
        done = run(verb, "demo", path, "--convention", convention, "--json")
        assert done.status == 0, done.err
        assert done.json["facts"] == 2
        success.append(done.json.get("metrics", {}).get("efficacy_success"))
    if verb == "evaluate":
        assert success[0] is None, "nothing to compare with"
        assert success[1] is not None
    assert complaint(run(verb, "demo", FACTS, "--convention", "zsre")).startswith(f"{FACTS}: line 1: --convention zsre")
