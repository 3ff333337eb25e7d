"""Reading facts: every file form, and every way in which a file can be wrong."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire.engine.datasets import read_facts, scan_facts
from rewire.engine.facts import (
    FIELDS,
    RIPPLES,
    EditNeighbor,
    Fact,
    InvalidFact,
    Probe,
    Query,
    Ripple,
    digest,
    from_record,
    held_out,
    place_subject,
    to_record,
)
from rewire.kernels.errors import InputError

PARIS = {"subject": "Paris", "prompt": "{} lies in", "target_new": "Italy"}
ROME = {"subject": "Rome", "prompt": "The capital Rome lies in", "target_new": "France", "target_true": "Italy"}


def jsonl(path: Path, *records: Any, end: str = "\n") -> Path:
    path = path / "facts.jsonl"
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + end for r in records).encode())
    return path


def refused(path: Path, **options: Any) -> str:
    """The message, which must be one line that names the file."""
    with pytest.raises(InputError) as error:
        read_facts(path, **options)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# forms


def test_jsonl(tmp_path: Path) -> None:
    full = {
        **PARIS,
        "id": "a",
        "target_true": "France",
        "paraphrases": ["Where is Paris? In"],
        "neighbors": ["Lyon lies in", "Lille lies in"],
        "edit_neighbors": [{"subject": "Nice", "prompt": "Nice lies in", "target": "France"}],
        "locality": [{"prompt": "Who wrote Faust?", "target": " Goethe"}],
    }
    first, second = read_facts(jsonl(tmp_path, full, ROME))
    assert first == Fact(
        "Paris", "{} lies in", "Italy", "France", ("Where is Paris? In",), ("Lyon lies in", "Lille lies in"),
        (EditNeighbor("Nice", "{} lies in", "France"),), "a", (Probe("Who wrote Faust?", "Goethe"),),
    )  # fmt: skip
    assert second.prompt == "The capital {} lies in"
    assert second.question == ROME["prompt"]
    assert re.fullmatch("[0-9a-f]{12}", second.id)


def test_made_ids_come_from_the_content(tmp_path: Path) -> None:
    (one,) = read_facts(jsonl(tmp_path, PARIS))
    (same,) = read_facts(jsonl(tmp_path, {**PARIS, "prompt": "Paris lies in", "neighbors": ["Lyon lies in"]}))
    (other,) = read_facts(jsonl(tmp_path, {**PARIS, "target_new": "Spain"}))
    assert one.id == same.id != other.id


def test_blank_lines_and_spaces_around_targets_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n" + json.dumps({**PARIS, "target_new": " Italy "}) + "\n  \n")
    assert [fact.target_new for fact in read_facts(path)] == ["Italy"]


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = jsonl(tmp_path, PARIS, ROME, end="\r\n")
    plain = read_facts(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_facts(path) == plain
    table = tmp_path / "facts.csv"
    table.write_bytes(b"\xef\xbb\xbfsubject,prompt,target_new\r\nParis,{} lies in,Italy\r\n")
    assert read_facts(table) == plain[:1]
    listed = tmp_path / "facts.json"
    listed.write_bytes(b"\xef\xbb\xbf" + json.dumps([PARIS, ROME]).encode())
    assert read_facts(listed) == plain


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    (fact,) = read_facts(jsonl(tmp_path, {**PARIS, "neighbors": ["Lyon\u2028lies\x85in"]}))
    assert fact.neighbors == ("Lyon\u2028lies\x85in",)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "facts.CSV"
    near = json.dumps([{"subject": "Nice", "prompt": "{} lies in", "target": "France"}]).replace('"', '""')
    about = json.dumps([{"prompt": "Who, if not", "target": "Goethe"}]).replace('"', '""')
    path.write_text(
        "subject,prompt,target_new,target_true,paraphrases,neighbors,edit_neighbors,id,locality\n"
        f'Paris,"{{}}, lies in",Italy,France,"[""Where? "", ""[Paris] in""]",Lyon lies in,"{near}",7,"{about}"\n'
        "Rome,Rome lies in,France,,,,,,\n"
    )
    first, second = read_facts(path)
    assert (first.prompt, first.target_true, first.id) == ("{}, lies in", "France", "7")
    assert first.paraphrases == ("Where? ", "[Paris] in")
    assert first.neighbors == ("Lyon lies in",)
    assert first.edit_neighbors == (EditNeighbor("Nice", "{} lies in", "France"),)
    assert first.locality == (Probe("Who, if not", "Goethe"),)
    assert (second.target_true, second.paraphrases, second.neighbors, second.locality) == (None, (), (), ())


def test_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path, PARIS, {**PARIS, "target_new": ""}, ROME)
    assert len(read_facts(path, limit=1)) == 1
    facts, invalid = scan_facts(path, limit=2)
    assert (len(facts), len(invalid)) == (1, 1)  # the first two records, whether they can be edited or not
    assert len(scan_facts(path, limit=99)[0]) == 2


# what is wrong with a file


def test_no_such_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "facts.jsonl") == "no such file (expected facts as .jsonl, .csv or .json)"
    assert refused(tmp_path).startswith("is a folder")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "subject,prompt,target_new\n"), ("a.json", "[]")],
)
def test_nothing_in_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert refused(tmp_path / name) == "no facts in it"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{}\n{"subject": "x",}\n', "line 2: broken JSON (.* at column 1[67])"),
        ("a.jsonl", '\n\n{"subject": "x"', r"line 3: broken JSON \("),
        ("a.jsonl", "[1]\n", "line 1: list found, expected a JSON object"),
        ("a.jsonl", '"text"\n', "line 1: str found, expected a JSON object"),
        ("a.json", "[{},\n{]\n", r"line 2: broken JSON \("),
        ("a.json", '{"a": 1}\n{"a": 2}', r"line 2: broken JSON \(Extra data; one record a line is \.jsonl\)"),
        ("a.json", '{"a": 1}', "dict found, expected a JSON list of records"),
        ("a.json", "[{}, 1]", "record 1: int found, expected a JSON object"),
        ("a.csv", "subject,prompt,target_new\na,{} b,c,d\n", "line 2: more cells than the header has fields"),
        ("a.csv", 'subject,prompt,target_new\nx,{} b,"c\n', r"line 2: broken CSV \(unexpected end of data\)"),
        ("a.csv", 'subject,prompt,target_new,neighbors\nx,{} b,c,"[""y"\n', "line 2: broken JSON in neighbors"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    assert re.match(message, refused(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_no_utf8(tmp_path: Path, name: str) -> None:
    text = "\n" * 5000 + "München"
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert refused(tmp_path / name) == "line 5001: not UTF-8 text (byte 0xfc)"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode("latin-1"))
    assert refused(tmp_path / name) == "line 5001: not UTF-8 text (byte 0xfc)"
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    assert "not UTF-8 text" in refused(tmp_path / name)


def test_unknown_fields_stop_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    assert refused(jsonl(tmp_path, PARIS, {**ROME, "target_nwe": "x"})) == (
        "line 2: unknown field 'target_nwe'; did you mean 'target_new'?"
    )
    assert "unknown field 'zzz'; known are id, subject, prompt" in refused(jsonl(tmp_path, {**PARIS, "zzz": 1}))
    with pytest.raises(InputError, match="unknown field"):  # no record of such a file is taken, skipping or not
        scan_facts(jsonl(tmp_path, {**PARIS, "zzz": 1}))
    table = tmp_path / "facts.csv"
    table.write_text("subject,prompt,targetnew\nParis,{} lies in,Italy\n")
    assert refused(table) == "line 2: unknown field 'targetnew'; did you mean 'target_new'?"


def test_a_list_of_something_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"wofür": "x", "label": 1}]))
    assert re.match("record 0: unknown field 'wofür'; known are .* published data set", refused(path))


def test_all_that_cannot_be_edited_are_named_at_once(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        PARIS,
        {**PARIS, "prompt": "Rome lies in"},
        {**PARIS, "prompt": "Paris, oh Paris, lies in"},
        {**PARIS, "prompt": "{} and {} lie in"},
        {**PARIS, "target_new": " "},
        {"subject": "Paris", "prompt": "{} lies in"},
        ROME,
    )
    reasons = [
        ("line 2", "subject 'Paris' does not occur in prompt 'Rome lies in' and no {} marks its place"),
        ("line 3", "subject 'Paris' occurs 2 times in prompt 'Paris, oh Paris, lies in': mark the place with {}"),
        ("line 4", "prompt '{} and {} lie in' has 2 places marked {}, expected one"),
        ("line 5", "target_new is empty"),
        ("line 6", "field 'target_new' is missing"),
    ]
    named = "; ".join(f"{where}: {reason}" for where, reason in reasons)
    assert refused(path) == f"5 facts cannot be edited (--skip-invalid goes on without): {named}"
    facts, invalid = scan_facts(path)
    assert [fact.subject for fact in facts] == ["Paris", "Rome"]
    assert invalid == [InvalidFact(*reason) for reason in reasons]
    one = refused(jsonl(tmp_path, PARIS, {**ROME, "subject": ""}))
    assert one == "1 fact cannot be edited (--skip-invalid goes on without): line 2: subject is empty"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subject": 5}, "subject is int, expected text"),
        ({"prompt": None}, "prompt is NoneType, expected text"),
        ({"target_new": 1990}, "target_new is int, expected text"),
        ({"target_new": ["Italy"]}, "target_new is list, expected text"),
        ({"target_true": 1}, "target_true is int, expected text"),
        ({"target_true": ""}, "target_true is empty; leave the field out"),
        ({"id": [1]}, "id is list, expected text or a whole number"),
        ({"id": True}, "id is bool, expected text or a whole number"),
        ({"paraphrases": {"a": 1}}, "paraphrases is dict, expected a list of texts"),
        ({"paraphrases": 5}, "paraphrases is int, expected a list of texts"),
        ({"neighbors": ["x", ""]}, "a text of neighbors is empty"),
        ({"neighbors": ["x", 5]}, "a text of neighbors is int, expected text"),
        ({"edit_neighbors": 5}, "edit_neighbors is int, expected a list"),
        ({"edit_neighbors": ["x"]}, "edit_neighbors holds 'x', expected objects with subject, prompt and target"),
        ({"edit_neighbors": [{"subject": "x"}]}, "expected objects with subject, prompt and target"),
        (
            {"edit_neighbors": [{"subject": 5, "prompt": "{}", "target": "x"}]},
            "subject in edit_neighbors is int, expected text",
        ),
        (
            {"edit_neighbors": [{"subject": "x", "prompt": "y lies", "target": "z"}]},
            "subject 'x' does not occur in prompt 'y lies'",
        ),
        ({"locality": {"prompt": "x", "target": "y"}}, "locality is dict, expected a list"),
        ({"locality": ["x"]}, "locality holds 'x', expected objects with prompt and target"),
        ({"locality": [{"prompt": "x", "target": "y", "id": 1}]}, "expected objects with prompt and target"),
        ({"locality": [{"prompt": "x", "target": " "}]}, "target in locality is empty"),
        ({"locality": [{"prompt": 5, "target": "y"}]}, "prompt in locality is int, expected text"),
        ({"generation_prompts": 5}, "generation_prompts is int, expected a list of texts"),
        ({"references": [""]}, "a text of references is empty"),
        ({"subject": "Par\ud800is"}, "subject holds half of a surrogate pair"),
    ],
)
def test_wrong_types(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        from_record({**PARIS, **change})


def test_facts_that_stand_twice(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {**PARIS, "id": 7}, {**ROME, "id": "8"}, {**ROME, "id": "7"})
    assert refused(path) == "line 3: id '7' again, as in line 1; expected each once"
    path = jsonl(tmp_path, PARIS, ROME, {**PARIS, "prompt": "Paris lies in"})
    assert refused(path) == "line 3: the same fact, as in line 1; expected each once"


# one fact


@pytest.mark.parametrize("name", ["edit_neighbors", "locality"])
def test_objects_of_the_wrong_kind(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} holds 'x', expected (EditNeighbor|Probe)"):
        Fact("Paris", "{} lies in", "Italy", **{name: ["x"]})  # type: ignore[arg-type]


def test_an_edit_time_neighbour_is_not_held_out() -> None:
    near = EditNeighbor("Nice", "Nice lies in", " France ")
    assert near == EditNeighbor("Nice", "{} lies in", "France")
    assert near.question == "Nice lies in"
    paris = Fact(
        "Paris", "{} lies in", "Italy", "France", (), ("Lyon lies in", "Nice lies in ", "Lille is in"), (near,)
    )
    lyon = Fact("Lyon", "{} lies in", "Italy", "France", (), ("Nice lies in", "Paris lies in", "Nice lies in."))
    assert held_out([paris, lyon]) == [("Lyon lies in", "Lille is in"), ("Paris lies in", "Nice lies in.")]
    assert held_out([lyon]) == [lyon.neighbors]  # of the facts evaluated
    assert held_out([]) == []


@pytest.mark.parametrize(
    ("prompt", "subject", "placed"),
    [
        ("{} lies in", "Paris", "{} lies in"),
        ("Paris lies in", "Paris", "{} lies in"),
        ("{} is not Paris, it lies in", "Paris", "{} is not Paris, it lies in"),  # a mark decides
        ("The {curly} Paris lies in", "Paris", "The {curly} {} lies in"),
    ],
)
def test_place_subject(prompt: str, subject: str, placed: str) -> None:
    assert place_subject(prompt, subject) == placed


def test_digest_depends_on_what_is_asked_and_on_the_order() -> None:
    one, two = from_record({**PARIS, "id": 1}), from_record({**ROME, "id": 2})
    assert digest([one, two]) == digest([one, from_record({**ROME, "id": 2, "neighbors": ["Milan lies in"]})])
    other = from_record({**ROME, "id": 2, "target_new": "Spain"})
    assert len({digest([one, two]), digest([two, one]), digest([one]), digest([one, other])}) == 4


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), min_size=1).filter(str.strip)


queries = st.builds(Query, words, st.lists(words, min_size=1, max_size=2).map(tuple))
ripples = st.lists(
    st.builds(
        Ripple, st.sampled_from(RIPPLES), words, st.lists(words, min_size=1, max_size=2).map(tuple),
        st.lists(queries, max_size=1).map(tuple), st.lists(queries, max_size=1).map(tuple), st.booleans(),
    ),
    max_size=2,
).map(tuple)  # fmt: skip


@given(
    subject=words,
    around=st.tuples(words, words),
    target=words,
    true=st.none() | words,
    paraphrases=st.lists(words, max_size=3).map(tuple),
    neighbors=st.lists(words, max_size=3).map(tuple),
    near=st.lists(st.builds(EditNeighbor, words, words.map(lambda text: text + "{}"), words), max_size=2).map(tuple),
    name=st.sampled_from(["", "x1"]),
    locality=st.lists(st.builds(Probe, words, words), max_size=2).map(tuple),
    ripples=ripples,
    texts=st.lists(words, max_size=2).map(tuple),
)
def test_records_round_trip(
    subject: str,
    around: tuple[str, str],
    target: str,
    true: str | None,
    paraphrases: tuple[str, ...],
    neighbors: tuple[str, ...],
    near: tuple[EditNeighbor, ...],
    name: str,
    locality: tuple[Probe, ...],
    ripples: tuple[Ripple, ...],
    texts: tuple[str, ...],
) -> None:
    prompt = "{}".join(around)
    kept = (locality, ripples, texts, texts[::-1])
    fact = Fact(subject, prompt, target, true, paraphrases, neighbors, near, name, *kept)
    line = json.dumps(to_record(fact), ensure_ascii=False)
    assert from_record(json.loads(line)) == fact
    assert (true is None) == ("target_true" not in to_record(fact))


@given(
    facts=st.lists(
        st.builds(
            Fact, words, st.tuples(words, words).map("{}".join), words, st.none() | words,
            st.lists(words, max_size=3).map(tuple), st.lists(words, max_size=3).map(tuple),
            locality=st.lists(st.builds(Probe, words, words), max_size=3).map(tuple), ripples=ripples,
        ),
        min_size=1, max_size=3, unique_by=lambda fact: fact.id,
    )
)  # fmt: skip
def test_a_table_says_what_the_facts_do(tmp_path_factory: pytest.TempPathFactory, facts: list[Fact]) -> None:
    path = tmp_path_factory.mktemp("table") / "facts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for fact in facts:
            row = to_record(fact)
            table.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    assert read_facts(path) == facts
