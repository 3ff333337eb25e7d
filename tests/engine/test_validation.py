"""What is said of a file before it is edited: each kind of problem, on a file made for it, and on the real ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from rewire.engine.datasets import Report, validate
from rewire.engine.datasets.validation import normalized
from rewire.kernels.errors import InputError

CLEAN = {
    "id": "a",
    "subject": "Paris",
    "prompt": "{} lies in",
    "target_new": "Italy",
    "target_true": "France",
    "paraphrases": ["Where is Paris? In"],
    "neighbors": ["Lyon lies in"],
    "locality": [{"prompt": "Who wrote Faust?", "target": "Goethe"}],
}
OTHER = {**CLEAN, "id": "b", "subject": "Bonn", "paraphrases": ["Where is Bonn? In"], "target_new": "Spain"}


def report(path: Path, *records: Any) -> Report:
    path = path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return validate(path)


def test_nothing_to_say(tmp_path: Path) -> None:
    found = report(tmp_path, CLEAN, OTHER)
    assert (found.records, found.facts, found.errors, found.clean, found.problems) == (2, 2, 0, 2, ())
    assert found.groups() == []


@pytest.mark.parametrize(
    ("change", "severity", "kind", "text"),
    [
        ({"subject": "Rome", "prompt": "Bonn lies in"}, "error", "cannot be edited", "does not occur in prompt"),
        ({"target_new": 5}, "error", "cannot be edited", "target_new is int"),
        ({"id": "a"}, "error", "the same fact or id twice: the file is refused", "id 'a' again, as in line 1"),
        ({"prompt": "{}, not Bonn, is"}, "warning", "subject more than once in its prompt", "number 1 of 2 is taken"),
        ({"prompt": "Bonn, not {}, is"}, "warning", "subject more than once in its prompt", "number 2 of 2 is taken"),
        ({"prompt": "{}er lie in"}, "warning", "subject is part of a longer word", "'Bonn' in 'Bonner lie in'"),
        ({"target_new": "france"}, "warning", "the new object is the true one", "'france'"),
        ({"target_new": " Spain"}, "warning", "spaces around the object", "target_new ' Spain'"),
        ({"target_true": "France\n"}, "warning", "spaces around the object", "target_true 'France\\n'"),
        ({"target_new": "The )"}, "warning", "new object of which normalising leaves nothing", "'The )'"),
        (
            {"target_new": "St. Gallen"}, "warning", "new object that generation stops within ('.' or a new line)",
            "'St. Gallen' stops behind 'St'",
        ),
        (
            {"target_new": "Spain\nor so"}, "warning", "new object that generation stops within ('.' or a new line)",
            "stops behind 'Spain'",
        ),
        ({"paraphrases": ["bonn  lies in"]}, "warning", "paraphrase that is the prompt", "'Bonn lies in'"),
        ({"neighbors": ["Bonn lies in"]}, "warning", "held-out question that is the prompt", "'Bonn lies in'"),
        ({"neighbors": ["Bonn is"]}, "warning", "held-out question with the subject in it", "'Bonn' in 'Bonn is'"),
        (
            {"locality": [{"prompt": "Is Bonn big?", "target": "no"}]}, "warning",
            "held-out question with the subject in it", "'Bonn' in 'Is Bonn big?'",
        ),
        (
            {"edit_neighbors": [{"subject": "Lyon", "prompt": "{} lies in", "target": "France"}]}, "warning",
            "edit-time neighbour among neighbors: not counted there", "'Lyon lies in'",
        ),
        ({"prompt": "{} lies in "}, "warning", "prompt that ends in a space", "'Bonn lies in '"),
        ({"neighbors": ["Lyon is "]}, "warning", "held-out question that ends in a space", "'Lyon is '"),
        ({"paraphrases": ["In {x"]}, "warning", "prompt with braces", "'In {x'"),
        (
            {"prompt": '"Is ""it"" {}?"'}, "warning", 'prompt quoted as a CSV cell (""): taken as it is',
            "'\"Is \"\"it\"\" Bonn?\"'",
        ),
        ({"neighbors": ["MÃ¼nchen lies in"]}, "warning", "characters that were lost in decoding", "'MÃ¼nchen lies in'"),
        ({"target_new": "It\ufffdly"}, "warning", "characters that were lost in decoding", "'It\ufffdly'"),
        ({"target_new": "donâ€™t"}, "warning", "characters that were lost in decoding", "'donâ€™t'"),
        (
            {"subject": "Paris", "paraphrases": ["In"], "target_new": "italy"}, "warning",
            "question asked twice, with the same object", "'Paris lies in', as in line 1",
        ),
        (
            {"subject": "Paris", "paraphrases": ["In"]}, "warning", "question asked twice, with another object",
            "'Paris lies in': 'Spain', but 'Italy' in line 1",
        ),
    ],
)  # fmt: skip
def test_each_kind(tmp_path: Path, change: dict[str, Any], severity: str, kind: str, text: str) -> None:
    found = report(tmp_path, CLEAN, {**OTHER, **change})
    (problem,) = found.problems
    assert (problem.severity, problem.kind, problem.where) == (severity, kind, "line 2")
    assert text in problem.text
    assert (found.records, found.errors, found.clean) == (2, severity == "error", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"target_new": "Spain."},  # the stop comes at the end of what is to be said
        {"target_new": "Österreich"},
        {"subject": "Bonn's", "prompt": "{} river is", "paraphrases": ["The river of Bonn is"]},
        {"neighbors": ["Bonner lies in"]},
        {"prompt": 'The "{}" is'},
    ],
)
def test_what_is_no_problem(tmp_path: Path, change: dict[str, Any]) -> None:
    assert report(tmp_path, CLEAN, {**OTHER, **change}).problems == ()


@pytest.mark.parametrize("name", ["target_true", "paraphrases", "neighbors", "locality"])
def test_what_is_missing_is_no_fault(tmp_path: Path, name: str) -> None:
    without = [{key: value for key, value in record.items() if key != name} for record in (CLEAN, OTHER)]
    found = report(tmp_path, *without)
    assert found.clean == 2
    (group,) = found.groups(1)
    assert (group.severity, group.count, len(group.examples)) == ("missing", 2, 1)
    assert group.kind.startswith(f"no {name}: ")


def test_groups_say_errors_first_and_count_records(tmp_path: Path) -> None:
    spaced = [{**OTHER, "id": f"c{i}", "subject": f"Ulm{i}", "target_new": " Spain"} for i in range(4)]
    both = {**OTHER, "id": "d", "target_new": " Spain", "target_true": " France"}
    found = report(tmp_path, CLEAN, *spaced, both, {**OTHER, "id": "a", "subject": "Ulm"})
    first, second = found.groups(3)
    assert [(group.severity, group.count, len(group.examples)) for group in (first, second)] == [
        ("error", 1, 1),
        ("warning", 5, 3),
    ]
    assert [problem.where for problem in second.examples] == ["line 2", "line 3", "line 4"]
    assert (found.errors, found.clean) == (1, 1)


def test_facts_that_stand_twice_are_named(tmp_path: Path) -> None:
    same = {key: value for key, value in CLEAN.items() if key != "id"}
    found = report(tmp_path, same, OTHER, same)
    assert [(problem.severity, problem.where) for problem in found.problems] == [
        ("error", "line 3"),
        ("warning", "line 3"),
    ]
    assert found.problems[0].text == "the same fact, as in line 1"


def test_files_of_which_nothing_can_be_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: unknown field 'target'"):
        report(tmp_path, CLEAN, {**OTHER, "target": 1})
    with pytest.raises(InputError, match=r"no facts in it"):
        report(tmp_path)
    with pytest.raises(InputError, match=r"no such file"):
        validate(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"--convention: unknown convention 'x'"):
        validate(tmp_path / "none.json", "x")


@pytest.mark.parametrize(
    ("text", "left"),
    [("The 24,303.04", "2430304"), (")", ""), ("An  apple a Day!", "apple day"), ("Theatre", "theatre")],
)
def test_normalized(text: str, left: str) -> None:
    assert normalized(text) == left


@pytest.mark.parametrize(
    ("name", "convention", "errors", "clean"),
    [
        ("qaedit_500", None, 0, 452),
        ("mcf_subset_1", None, 0, 993),
        ("mcf_neighbors_739", None, 0, 729),
        ("hallucination-edit", None, 0, 363),
        ("zsre_subset_0", "zsre-alt", 4, 968),
        ("zsre_mend_edit", "zsre", 0, 1030),
    ],
)
def test_published_files(shared: Path, name: str, convention: str | None, errors: int, clean: int) -> None:
    found = validate(shared / "data" / f"{name}.json", convention)
    assert (found.errors, found.clean) == (errors, clean)


def test_what_is_wrong_with_qaedit(shared: Path) -> None:
    found = validate(shared / "data" / "qaedit_500.json")
    counts = {group.kind: group.count for group in found.groups() if group.severity == "warning"}
    assert counts == {
        "new object of which normalising leaves nothing": 1,
        "new object that generation stops within ('.' or a new line)": 24,
        'prompt quoted as a CSV cell (""): taken as it is': 13,
        "spaces around the object": 9,
        "subject more than once in its prompt": 3,
    }
    (empty,) = (problem for problem in found.problems if "normalising" in problem.kind)
    assert (empty.where, empty.text) == ("record 9", "')': no answer can match it")
