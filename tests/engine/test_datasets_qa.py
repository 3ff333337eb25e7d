"""QAEdit and hallucinations, whose records do not mark where the subject stands; and how many facts each file has."""

import json
from pathlib import Path
from typing import Any

import pytest

from rewire.engine.datasets import read_facts, scan_facts
from rewire.engine.datasets.marking import mark_subject, stands_alone
from rewire.engine.facts import Fact, Probe
from rewire.kernels.errors import InputError

QAEDIT = {
    "id": 70,
    "source": "NQ",
    "prompt": "who wrote faust?",
    "target": " Goethe ",
    "subject": "faust",
    "rephrase": "Who is the author of Faust?",
    "locality": [{"loc": "where is rome", "loc_ans": "Italy"}, {"loc": "where is bonn", "loc_ans": "Germany"}],
}
HALLUCINATION = {
    "prompt": "This is a Wikipedia passage about ada byron. Ada Byron was a countess.",
    "target_new": "She wrote programs. They were never run.",
    "subject": "ada byron",
    "locality_prompt": "A text that is cut in tw",
    "locality_ground_truth": "o parts.",
}


def written(path: Path, *records: Any) -> Path:
    path = path / "any.json"
    path.write_text(json.dumps(records))
    return path


def test_qaedit(tmp_path: Path) -> None:
    (fact,) = read_facts(written(tmp_path, QAEDIT))
    probes = (Probe("where is rome", "Italy"), Probe("where is bonn", "Germany"))
    assert fact == Fact(
        "faust", "who wrote {}?", "Goethe", None, ("Who is the author of Faust?",), id="70", locality=probes
    )


def test_ids_that_repeat_are_numbered_whatever_stands_before(tmp_path: Path) -> None:
    broken = {**QAEDIT, "subject": "hamlet"}
    path = written(tmp_path, QAEDIT, {**QAEDIT, "id": 5}, broken, QAEDIT, {**QAEDIT, "id": 5})
    facts, invalid = scan_facts(path)
    assert [fact.id for fact in facts] == ["70", "5", "70-3", "5-2"]
    assert [(bad.where, bad.reason) for bad in invalid] == [
        ("record 2", "subject 'hamlet' does not occur in prompt 'who wrote faust?'")
    ]
    assert [fact.id for fact in scan_facts(path, limit=4)[0]] == ["70", "5", "70-3"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": " "}, "target_new is empty"),
        ({"subject": ""}, "subject is empty"),
        ({"subject": 5}, "subject is int"),
        ({"prompt": None}, "prompt is NoneType"),
        ({"prompt": "what does {} mean in faust?"}, "holds {} itself, which would mark the subject's place"),
        ({"prompt": "Faust, or FAUST?"}, "occurs 2 times in prompt 'Faust, or FAUST?', in other letters"),
        ({"locality": [{"loc": "where", "loc_ans": ""}]}, "target in locality is empty"),
    ],
)
def test_qaedit_records_that_cannot_be_edited(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    facts, invalid = scan_facts(written(tmp_path, QAEDIT, {**QAEDIT, **change}))
    assert len(facts) == 1
    assert reason in invalid[0].reason


@pytest.mark.parametrize(
    "broken",
    [{key: value for key, value in QAEDIT.items() if key != "id"}, {**QAEDIT, "locality": [{"prompt": "x"}]}],
)
def test_a_record_that_is_no_qaedit(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"record 1: not the format that it looks like"):
        read_facts(written(tmp_path, QAEDIT, broken))


@pytest.mark.parametrize(
    ("prompt", "subject", "marked", "stands"),
    [
        ("who wrote faust?", "faust", "who wrote {}?", "faust"),
        ("Ernie met Ernie in May", "Ernie", "Ernie met {} in May", "Ernie"),
        ("i want to be with you", "i", "{} want to be with you", "i"),  # "with" has no word "i"
        ("tandoori from a tandoor?", "tandoor", "tandoori from a {}?", "tandoor"),
        ("carts and cartoons", "cart", "carts and {}oons", "cart"),  # a word of its own nowhere
        ("the category", "cat", "the {}egory", "cat"),
        ('"Which ""Cars"" ran?"', '"Cars"', '"Which "{}" ran?"', '"Cars"'),
        ("When did Paris fall?", "paris", "When did {} fall?", "Paris"),  # what stands there is the subject
        ("paris, Paris", "Paris", "paris, {}", "Paris"),  # the same letters win
        ("the {curly} {x", "curly", "the {{}} {x", "curly"),
        ("$5 (about) a day?", "$5 (about)", "{} a day?", "$5 (about)"),
        ("Straße nach Rom", "STRASSE", None, ""),  # a letter is a letter
        ("a {} in it", "it", None, ""),
        ("", "it", "", "it"),  # `Fact` says what is wrong
    ],
)
def test_mark_subject(prompt: str, subject: str, marked: str | None, stands: str) -> None:
    if marked is None:
        with pytest.raises(InputError):
            mark_subject(prompt, subject)
        return
    assert mark_subject(prompt, subject) == (marked, stands)
    if prompt:
        assert Fact(stands, marked, "x").question == prompt


def test_stands_alone() -> None:
    assert stands_alone("LinkedIn's owner", 0, 8)
    assert stands_alone('a "b" c', 2, 5)
    assert not stands_alone("tandoori", 0, 7)
    assert not stands_alone("in 2010", 3, 6)
    assert not stands_alone("in 2010", 4, 7)


def test_qaedit_as_published(shared: Path) -> None:
    path = shared / "data" / "qaedit_500.json"
    records = json.loads(path.read_text())
    facts = read_facts(path)
    assert len({fact.id for fact in facts}) == len(facts) == 500
    for fact, record in zip(facts, records, strict=True):
        assert (fact.question, fact.subject) == (record["prompt"], record["subject"])
        assert (fact.target_new, fact.target_true) == (record["target"].strip(), None)
        assert fact.paraphrases == (record["rephrase"],)
        assert [probe.prompt for probe in fact.locality] == [asked["loc"] for asked in record["locality"]]
        assert len(fact.locality) == 5
        assert (fact.neighbors, fact.ripples) == ((), ())
    assert sum("-" in fact.id for fact in facts) == 13
    by_place = {place: facts[place] for place in (9, 22, 28, 54, 295, 326)}
    assert by_place[9].target_new == ")"
    assert by_place[22].question.startswith('"Who is a South African serial killer who committed the ""ABC Murders""')
    assert by_place[28].target_new == "24,303.04", "the file has a space before it"
    assert by_place[54].prompt.startswith("In the 1971 Number One hit Ernie by Benny Hill")
    assert by_place[54].prompt.endswith("that {} loved who lived at 22 Linley?")
    assert by_place[295].prompt == "{} want to be with you everywhere song?"
    assert by_place[326].prompt.endswith("involves a tandoor. What is a {} ?")


# hallucinations


def test_hallucinations(tmp_path: Path) -> None:
    again = {**HALLUCINATION, "subject": "Wikipedia"}
    first, second = read_facts(written(tmp_path, HALLUCINATION, again))
    assert first == Fact(
        "ada byron",
        "This is a Wikipedia passage about {}. Ada Byron was a countess.",
        "She wrote programs. They were never run.",
        id="0",
        locality=(Probe("A text that is cut in tw", "o parts."),),
    )
    assert (second.id, second.prompt[:12]) == ("1", "This is a {}")


def test_hallucinations_as_published(shared: Path) -> None:
    path = shared / "data" / "hallucination-edit.json"
    facts = read_facts(path)
    for fact, record in zip(facts, json.loads(path.read_text()), strict=True):
        assert (fact.question, fact.subject) == (record["prompt"], record["subject"])
        assert fact.target_new == record["target_new"].strip()
        assert fact.locality == (Probe(record["locality_prompt"], record["locality_ground_truth"]),)
        assert (fact.target_true, fact.paraphrases, fact.neighbors) == (None, (), ())
    assert len(facts) == 600


# every file


@pytest.mark.parametrize(
    ("name", "convention", "count", "bad"),
    [
        ("counterfact-edit", None, 10000, 0),
        ("hallucination-edit", None, 600, 0),
        ("mcf_neighbors_1340", None, 1340, 0),
        ("mcf_neighbors_739", None, 739, 0),
        ("mcf_neighbors_960", None, 960, 0),
        ("mcf_subset_1", None, 1000, 0),
        ("mcf_subset_15", None, 1000, 0),
        ("qaedit_500", None, 500, 0),
        ("zsre_mend_edit", "zsre", 1037, 0),
        ("zsre_mend_edit", "zsre-alt", 1037, 0),
        ("zsre_subset_0", "zsre", 1000, 0),
        ("zsre_subset_0", "zsre-alt", 996, 4),
        ("zsre_subset_15", "zsre", 1000, 0),
        ("zsre_subset_15", "zsre-alt", 994, 6),
        ("zsre_train_4000", "zsre", 4000, 0),
        ("zsre_train_4000", "zsre-alt", 3977, 23),
    ],
)
def test_every_data_set_is_read(shared: Path, name: str, convention: str | None, count: int, bad: int) -> None:
    facts, invalid = scan_facts(shared / "data" / f"{name}.json", convention=convention)
    assert (len(facts), len(invalid)) == (count, bad)


@pytest.mark.parametrize(
    ("name", "reason"), [("ME-PPL_50", "unknown field 'Corpus'"), ("wikitext2_valid_detok", "str found")]
)
def test_files_of_texts_hold_no_facts(shared: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_facts(shared / "data" / f"{name}.json")
