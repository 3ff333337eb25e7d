"""What an evaluation leaves in a folder, of what protocols gave or might give."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import rewire
from rewire.engine.evaluation import outcome
from rewire.engine.evaluation.outcome import flat, write
from rewire.engine.facts import EditNeighbor, Probe

ADA = rewire.Fact(
    "Ada", "{} lives in", "Rome", "Oslo", paraphrases=("Where is Ada? In", "The home of Ada is"),
    locality=(Probe("Bob lives in", "Bern"), Probe("Cid lives in", "Kyiv")), id="ada",
)  # fmt: skip
BOB = rewire.Fact("Bob", "{} eats", "figs", id="bob")  # nothing besides
FACTS = [ADA, BOB]


def said(answer: str, **more: Any) -> dict[str, Any]:
    return {"prompt": "p", "answer": answer, "ids": [3, 4], "ended": "stop", **more}


def wild(right: bool, answer: str, same: bool | None = None) -> dict[str, Any]:
    """As `evaluate` gives it; same: beside an unedited model."""
    kept = {} if same is None else {"same": same}
    ada = {
        "id": "ada",
        "rewrite": [said(answer, right=right)],
        "rephrase": [said("first", right=right), said("second", right=False)],
        "portability": [],
        "locality": [said("elsewhere", **kept)],
    }
    bob = {"id": "bob", "rewrite": [said("", right=False)], "rephrase": [], "portability": [], "locality": []}
    return {
        "protocol": "wild",
        "metrics": {"reliability": right / 2, "portability": None},
        "definitions": {"reliability": "share"},
        "facts": [ada, bob],
        "judge": {"kind": "exact"},
        "context": "qa_inst",
    }


def synthetic(acc: float, same: float | None = None) -> dict[str, Any]:
    kept = {} if same is None else {"locality_acc": [same, 0.0]}
    ada = {"id": "ada", "rewrite_acc": [acc], "rephrase_acc": [acc, 0.0], "portability_acc": []}
    bob = {"id": "bob", "rewrite_acc": [0.0], "rephrase_acc": [], "portability_acc": [], "locality_output": []}
    if same is not None:
        bob["locality_acc"] = []
    facts = [ada | {"locality_output": [[1], [2]]} | kept, bob]
    return {"protocol": "synthetic", "metrics": {"reliability": acc / 2}, "definitions": {}, "facts": facts}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_of_generated_answers(tmp_path: Path) -> None:
    after, before = wild(True, 'Rome,\n"the\rcity"', same=False), wild(False, "Oslo")
    write(tmp_path, FACTS, after, before, {"model": "demo", "seconds": {"evaluate": 1.5}})
    assert {path.name for path in tmp_path.iterdir()} == {
        *("evaluation.json", "records.jsonl", "records.csv", "results.json")
    }  # and no temporary ones
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        **{"format": "rewire-evaluation-1", "protocol": "wild", "metrics": after["metrics"]},
        **{"definitions": {"reliability": "share"}, "unedited": before["metrics"], "facts": 2},
        **{"judge": {"kind": "exact"}, "context": "qa_inst", "model": "demo", "seconds": {"evaluate": 1.5}},
    }
    ada, bob = lines(tmp_path / "records.jsonl")
    assert ada == {
        **{"id": "ada", "subject": "Ada", "prompt": "Ada lives in", "target_new": "Rome", "target_true": "Oslo"},
        **{"answer": 'Rome,\n"the\rcity"', "answer_unedited": "Oslo", "ended": "stop", "ended_unedited": "stop"},
        **{"reliability": 1.0, "reliability_unedited": 0.0},
        **{"paraphrase_answer": "first", "paraphrase_answer_unedited": "first"},
        **{"generalization": 0.5, "generalization_unedited": 0.0},
        **{"locality_answer": "elsewhere", "locality_answer_unedited": "elsewhere", "locality": 0.0},
    }
    assert bob == {
        **{"id": "bob", "subject": "Bob", "prompt": "Bob eats", "target_new": "figs", "target_true": None},
        **{"answer": "", "answer_unedited": "", "ended": "stop", "ended_unedited": "stop"},
        **{"reliability": 0.0, "reliability_unedited": 0.0},
    }

    with (tmp_path / "records.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(ada)
    assert [row["answer"] for row in table] == ['Rome,\n"the\rcity"', ""]
    assert [row["generalization"] for row in table] == ["0.5", ""]


def test_the_table_is_read_by_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write(tmp_path, FACTS, wild(True, "one\rtwo, three", same=True), wild(False, "Oslo"))
    table = pandas.read_csv(tmp_path / "records.csv")
    assert table["reliability"].tolist() == [1.0, 0.0]
    assert table["answer"][0] == "one\rtwo, three"
    assert table["generalization"].isna().tolist() == [False, True]


REQUESTED = {
    **{"prompt": "Ada lives in", "target_new": "Rome", "ground_truth": "Oslo", "portability": {}},
    "locality": {"neighborhood": {"prompt": "Bob lives in", "ground_truth": "Bern"}},
    **{"subject": "Ada", "loc_prompt": None, "rephrase_prompt": "Where is Ada? In"},
}


def test_the_published_layout_of_generated_answers(tmp_path: Path) -> None:
    write(tmp_path, FACTS, wild(True, "Rome", same=True), wild(False, "Oslo"))
    ada, bob = json.loads((tmp_path / "results.json").read_text())
    assert ada == {
        "pre": {
            **{"rewrite_acc": 0.0, "rewrite_gen_content": "Oslo", "portability": {}},
            **{"rephrase_acc": 0.0, "rephrase_gen_content": "first"},
        },
        "case_id": 0,
        "requested_rewrite": REQUESTED,
        "post": {
            **{"rewrite_acc": 1.0, "rewrite_gen_content": "Rome", "portability": {}},
            **{"rephrase_acc": 1.0, "rephrase_gen_content": "first", "locality": {"neighborhood_acc": [1.0]}},
        },
    }
    requested = bob["requested_rewrite"]
    assert (bob["case_id"], requested["ground_truth"], requested["rephrase_prompt"]) == (1, "<|endoftext|>", None)
    assert requested["locality"] == {}
    assert bob["post"] == {"rewrite_acc": 0.0, "rewrite_gen_content": "", "portability": {}, "locality": {}}


def test_the_published_layout_of_tokens_fed(tmp_path: Path) -> None:
    write(tmp_path, FACTS, synthetic(1.0, same=0.5), synthetic(0.25))
    ada, bob = json.loads((tmp_path / "results.json").read_text())
    assert ada["pre"] == {"rewrite_acc": [0.25], "rephrase_acc": [0.25], "portability": {}}
    assert ada["requested_rewrite"] == REQUESTED
    assert ada["post"] == {
        **{"rewrite_acc": [1.0], "rephrase_acc": [1.0], "portability": {}},
        "locality": {"neighborhood_acc": [0.5]},
    }
    assert bob["post"] == {"rewrite_acc": [0.0], "portability": {}, "locality": {}}
    first, second = lines(tmp_path / "records.jsonl")
    assert (first["reliability"], first["reliability_unedited"]) == (1.0, 0.25)
    assert (first["generalization"], first["locality"]) == (0.5, 0.25)
    assert "locality" not in second


def test_the_neighbour_that_is_named_is_the_one_that_was_asked(tmp_path: Path) -> None:
    """One that another fact has for its edit is not asked, and without a true object none is."""
    facts = [
        rewire.Fact("Ada", "{} lives in", "Rome", "Oslo", neighbors=("Bob lives in", "Cid lives in"), id="ada"),
        rewire.Fact("Bob", "{} eats", "figs", edit_neighbors=(EditNeighbor("Bob", "{} lives in", "Oslo"),), id="bob",
                    neighbors=("Cid eats",)),
    ]  # fmt: skip
    write(tmp_path, facts, wild(True, "Rome", same=True), wild(False, "Oslo"))
    asked = [r["requested_rewrite"]["locality"] for r in json.loads((tmp_path / "results.json").read_text())]
    assert asked == [{"neighborhood": {"prompt": "Cid lives in", "ground_truth": "Oslo"}}, {}]


def test_without_an_unedited_model(tmp_path: Path) -> None:
    write(tmp_path, FACTS, wild(True, "Rome"))
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "records.jsonl", "records.csv"}
    assert json.loads((tmp_path / "evaluation.json").read_text())["unedited"] is None
    ada, _ = lines(tmp_path / "records.jsonl")
    assert not [column for column in ada if column.endswith("_unedited")]
    assert "locality" not in ada


def test_columns_of_the_other_protocols() -> None:
    efficacy = {"new_logprob": [-1.0], "true_logprob": [-2.0], "accuracy": 0.0, "success": 1.0, "magnitude": 0.2}
    counterfact = {"id": "ada", "efficacy": efficacy, "ngram_entropy": 4.5, "text": ["a", "b"]}
    found = flat(ADA, counterfact, None)
    assert {
        key: found[key] for key in found if key not in ("id", "subject", "prompt", "target_new", "target_true")
    } == {
        **{"efficacy_accuracy": 0.0, "efficacy_success": 1.0, "efficacy_magnitude": 0.2, "ngram_entropy": 4.5},
    }
    tests = [{"category": "c", "held": held, "passed": True, "answers": ["x"]} for held in (True, False)]
    ripple = {"id": "ada", "reliability": 1.0, "answer": "Rome", "portability": None, "ripples": tests}
    found = flat(ADA, ripple, ripple | {"reliability": 0.0})
    assert (found["reliability"], found["reliability_unedited"], found["portability"]) == (1.0, 0.0, None)
    assert (found["ripples_held"], found["ripples_passed"]) == (0.5, 1.0)
    zsre = {"id": "ada", "reliability": 0.5, "locality": None, "output": [[1, 2]]}
    assert "output" not in flat(ADA, zsre, None)


def test_of_texts_and_of_no_facts(tmp_path: Path) -> None:
    """Records of texts are no facts': they stand in the summary, and there is no empty table."""
    text = {"id": "text 1", "token_count": 9, "perplexity": 12.5}
    of_texts = {"protocol": "perplexity", "metrics": {"perplexity": 12.5}, "definitions": {}, "facts": [text]}
    write(tmp_path / "texts", [], of_texts)
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["evaluation.json"]
    assert json.loads((tmp_path / "texts" / "evaluation.json").read_text())["records"] == [text]
    both = of_texts | {"protocol": "drift", "facts": [text, {"id": "ada", "locality_kl": 0.5}, {"id": "bob"}]}
    write(tmp_path / "both", FACTS, both)
    assert json.loads((tmp_path / "both" / "evaluation.json").read_text())["records"] == [text]
    ada, bob = lines(tmp_path / "both" / "records.jsonl")
    assert (ada["id"], ada["locality_kl"], bob["id"]) == ("ada", 0.5, "bob")


def test_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be written what was there stays; the summary, by which a folder is known, comes last."""
    write(tmp_path, FACTS, wild(False, "Oslo"), wild(False, "Oslo"))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    inner = outcome.write_whole

    def full(path: Path, write: Any) -> None:
        def some(file: Any) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device", str(path))

        inner(path, some if path.name == "results.json" else write)

    monkeypatch.setattr(outcome, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, FACTS, wild(True, "Rome", same=True), wild(False, "Oslo"))
    now = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert now.keys() == kept.keys()
    assert now["results.json"] == kept["results.json"]
    assert now["evaluation.json"] == kept["evaluation.json"]
    assert now["records.jsonl"] != kept["records.jsonl"]
