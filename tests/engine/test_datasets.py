"""The published data sets as they are, known by their fields."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewire.engine.datasets import read_facts, scan_candidates, scan_facts, write_facts
from rewire.engine.facts import EditNeighbor, Fact, InvalidFact, Probe, Ripple, held_out
from rewire.kernels.errors import InputError

NESTED = {
    "case_id": 3,
    "pararel_idx": 5,
    "requested_rewrite": {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": "Italy", "id": "Q38"},
        "target_true": {"str": "France", "id": "Q142"},
        "subject": "Paris",
    },
    "paraphrase_prompts": ["Where is Paris? In"],
    "neighborhood_prompts": ["Lyon lies in"],
    "attribute_prompts": ["x"],
    "generation_prompts": ["y"],
    "neighborhood_samples": [{"subject": "Lyon", "prompt": "{} lies in"}, {"subject": "Nice", "prompt": "{} lies in"}],
}
FLAT = {
    "case_id": 3,
    "prompt": "Paris lies in",
    "target_new": "Italy",
    "ground_truth": "France",
    "portability": {},
    "locality": {"neighborhood": {"prompt": ["Lyon lies in"], "ground_truth": ["France"]}},
    "subject": "Paris",
    "rephrase_prompt": ["Where is Paris? In"],
    "neighborhood_samples": [{"subject": "Nice", "prompt": "{} lies in"}],
}


EASYEDIT = {
    "case_id": 3,
    "prompt": "Paris lies in",
    "target_new": "Italy",
    "subject": "Paris",
    "ground_truth": "France",
    "rephrase_prompt": "Where is Paris? In",
    "locality_prompt": "Lyon lies in",
    "locality_ground_truth": "France",
}


def test_counterfact_nested_and_flat(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps([NESTED]))
    nested = read_facts(path)
    path.write_text(json.dumps([FLAT]))
    flat = read_facts(path)
    common = ("Paris", "{} lies in", "Italy", "France", ("Where is Paris? In",), ("Lyon lies in",))
    assert nested == [Fact(*common, id="3")]
    assert flat == [Fact(*common, (EditNeighbor("Nice", "{} lies in", "France"),), "3")]
    path.write_text(json.dumps([EASYEDIT, {**EASYEDIT, "case_id": 4, "locality_ground_truth": "Italy"}]))
    easy, other = read_facts(path)
    assert easy == Fact(*common, id="3")
    assert (other.neighbors, other.locality) == ((), (Probe("Lyon lies in", "Italy"),)), "not this fact's true object"
    path.write_text(json.dumps([{key: value for key, value in EASYEDIT.items() if key != "locality_ground_truth"}]))
    (unanswered,) = read_facts(path)
    assert (unanswered.neighbors, unanswered.locality) == ((), ())


@pytest.mark.parametrize(
    ("name", "count", "assisted"),
    [
        ("mcf_subset_1", 1000, False),
        ("mcf_subset_15", 1000, False),
        ("mcf_neighbors_739", 739, True),
        ("mcf_neighbors_960", 960, True),
        ("mcf_neighbors_1340", 1340, True),
        ("counterfact-edit", 10000, False),
    ],
)
def test_counterfact_as_published(shared: Path, name: str, count: int, assisted: bool) -> None:
    facts = read_facts(shared / "data" / f"{name}.json")
    assert len(facts) == count == len({fact.id for fact in facts})
    for fact in facts:
        assert fact.prompt.count("{}") == 1
        assert fact.target_true
        assert fact.target_true != fact.target_new
        assert fact.paraphrases
        assert all(near.prompt.count("{}") == 1 and near.target == fact.target_true for near in fact.edit_neighbors)
    assert any(fact.edit_neighbors for fact in facts) is assisted
    assert sum(len(fact.neighbors) for fact in facts) >= count


def test_counterfact_keeps_what_the_file_says(shared: Path) -> None:
    path = shared / "data" / "mcf_subset_1.json"
    record = json.loads(path.read_text())[0]
    rewrite = record["requested_rewrite"]
    (fact,) = read_facts(path, limit=1)
    assert (fact.id, fact.subject, fact.prompt) == (str(record["case_id"]), rewrite["subject"], rewrite["prompt"])
    assert (fact.target_new, fact.target_true) == (rewrite["target_new"]["str"], rewrite["target_true"]["str"])
    assert list(fact.paraphrases) == record["paraphrase_prompts"]
    assert list(fact.neighbors) == record["neighborhood_prompts"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({**NESTED, "requested_rewrite": {**NESTED["requested_rewrite"], "target_new": "Italy"}}, "TypeError"),
        ({**NESTED, "requested_rewrite": {}}, "KeyError"),
        ({key: value for key, value in FLAT.items() if key != "rephrase_prompt"}, "rephrase_prompt"),
        ({**FLAT, "locality": {}}, "neighborhood"),
        ({**FLAT, "locality": []}, "TypeError"),
        ({key: value for key, value in EASYEDIT.items() if key != "case_id"}, "case_id"),
    ],
)
def test_a_published_record_that_is_none(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([NESTED, broken]))
    with pytest.raises(InputError, match=r"record 1: not the format that it looks like") as found:
        read_facts(path)
    assert message in str(found.value)


def test_candidates_are_no_edit_time_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    other = {"subject": "Lyon", "prompt": "Lyon lies in"}  # nothing marks its subject
    path.write_text(json.dumps([NESTED, {**NESTED, "case_id": 4, "neighborhood_samples": [other]}]))
    (nested, none), _ = scan_candidates(path)
    assert nested.edit_neighbors == (EditNeighbor("Lyon", "{} lies in", "France"),), "the other is not asked about"
    assert nested.neighbors == ("Lyon lies in",)
    assert none.edit_neighbors == ()
    assert [fact.edit_neighbors for fact in read_facts(path)] == [(), ()]
    path.write_text(json.dumps([FLAT]))
    assert scan_candidates(path) == scan_facts(path)
    path.write_text(json.dumps([ZSRE]))
    with pytest.raises(InputError, match=r"record 0: zsRE, whose questions .* no neighbours"):
        scan_candidates(path)


# what generated texts are judged by

SNIPPETS = [
    {"relation_id": "P17", "target_id": "Q38", "samples": [{"name": "Rome", "text": "Rome is ..."}]},
    {"relation_id": "P17", "target_id": "Q142", "samples": [{"name": "Lyon", "text": "Lyon is ..."}]},
    {"relation_id": "P17", "target_id": "Q38", "samples": [{"name": "Pisa", "text": "Pisa is ..."}]},
]
MAPPED = {
    "P17": {
        "Q38": [{"name": "Rome", "text": "Rome is ..."}, {"name": "Pisa", "text": "Pisa is ..."}],
        "Q142": SNIPPETS[1]["samples"],
    }
}


def test_generation_is_read_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps([NESTED]))
    (plain,) = read_facts(path)
    assert (plain.generation_prompts, plain.references) == ((), ())
    (more,) = read_facts(path, generation=True)
    assert more == replace(plain, generation_prompts=("y",))
    for content in (SNIPPETS, MAPPED):
        (tmp_path / "snippets").write_text(json.dumps(content))
        (most,) = read_facts(path, snippets=tmp_path / "snippets")
        assert most == replace(more, references=("Rome is ...", "Pisa is ...")), "of the new object, not the true one"
    write_facts(tmp_path / "facts.jsonl", [most])
    assert read_facts(tmp_path / "facts.jsonl") == [most], "what our own file has is what was asked for"
    other = {**NESTED["requested_rewrite"], "relation_id": "P36"}
    path.write_text(json.dumps([{**NESTED, "requested_rewrite": other}]))
    assert read_facts(path, snippets=tmp_path / "snippets")[0].references == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1", "line 1: broken JSON"),
        ("5", "not attribute_snippets.json"),
        ('[{"a": 1}]', "not attribute_snippets.json"),
        ('{"P17": [1]}', "not attribute_snippets.json"),
        ('{"P17": {"Q1": [{"name": "x"}]}}', "not attribute_snippets.json"),
    ],
)
def test_snippets_that_are_none(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "any.json").write_text(json.dumps([NESTED]))
    (tmp_path / "snippets").write_text(content)
    with pytest.raises(InputError, match=rf"snippets: {reason}"):
        read_facts(tmp_path / "any.json", snippets=tmp_path / "snippets")
    with pytest.raises(InputError, match=r"nowhere: cannot be read"):
        read_facts(tmp_path / "any.json", snippets=tmp_path / "nowhere")


def test_snippets_are_for_counterfact(tmp_path: Path) -> None:
    (tmp_path / "snippets").write_text(json.dumps(SNIPPETS))
    (tmp_path / "any.json").write_text(json.dumps([EASYEDIT]))
    with pytest.raises(InputError, match=r"any.json: record 0: snippets are found by relation and object"):
        read_facts(tmp_path / "any.json", snippets=tmp_path / "snippets")


def test_generation_prompts_as_published(shared: Path) -> None:
    path = shared / "data" / "mcf_subset_1.json"
    records = json.loads(path.read_text())[:50]
    facts = read_facts(path, 50, generation=True)
    assert [list(fact.generation_prompts) for fact in facts] == [record["generation_prompts"] for record in records]
    assert all(fact.generation_prompts for fact in facts)


# writing


@pytest.mark.parametrize(("name", "leaks"), [("739", 6), ("960", 1), ("1340", 1)])
def test_the_neighbour_sets_are_written_as_published(shared: Path, tmp_path: Path, name: str, leaks: int) -> None:
    path = shared / "data" / f"mcf_neighbors_{name}.json"
    facts = read_facts(path)
    write_facts(tmp_path / "flat.json", facts)
    assert json.loads((tmp_path / "flat.json").read_text()) == json.loads(path.read_text())
    write_facts(tmp_path / "facts.jsonl", facts)
    assert read_facts(tmp_path / "facts.jsonl") == facts
    assert len(list(tmp_path.iterdir())) == 2
    alone = [held_out([fact])[0] for fact in facts]
    assert sum(held != fact.neighbors for held, fact in zip(alone, facts, strict=True)) == leaks


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target_true": None}, "no true object"),
        ({"locality": (Probe("Who wrote Faust?", "Goethe"),)}, "questions about other things"),
        ({"ripples": (Ripple("Forgetfulness", "Paris is", ("big",)),)}, "tests of what follows"),
        ({"generation_prompts": ("Paris is",)}, "what its generated texts are judged by"),
        ({"references": ("Rome is ...",)}, "what its generated texts are judged by"),
        ({"edit_neighbors": (EditNeighbor("Bonn", "{} lies in", "Germany"),)}, "with another object than its own"),
        ({"prompt": "{}, oh Paris, lies in"}, "a subject that its prompt holds more than once"),
        ({"subject": "{}", "prompt": "{} lies in"}, "a subject that its prompt holds more than once"),
    ],
)
def test_what_the_flat_form_cannot_say(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    fact = replace(Fact("Paris", "{} lies in", "Italy", "France", id="3"), **change)
    with pytest.raises(InputError, match=rf"^fact 3 \(.*\): .*{reason}.*; the flat form cannot say that: write .jsonl"):
        write_facts(tmp_path / "a.json", [fact])
    with pytest.raises(InputError, match=r"a.txt: expected a name in .jsonl \(facts\), or .json"):
        write_facts(tmp_path / "a.txt", [fact])
    assert list(tmp_path.iterdir()) == []
    write_facts(tmp_path / "a.jsonl", [fact])
    assert read_facts(tmp_path / "a.jsonl") == [fact]


# zsRE

ZSRE = {
    "subject": "Paris",
    "src": "In which country is Paris?",
    "pred": "Spain",
    "rephrase": "Paris is where?",
    "alt": "Italy ",
    "answers": ["France", "the French Republic"],
    "loc": "nq question: who wrote faust",
    "loc_ans": "Goethe",
    "cond": "Spain >> Italy || In which country is Paris?",
}


def test_zsre_in_both_conventions(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps([ZSRE, {**ZSRE, "alt": "France", "loc": "who?", "portability": {}}]))
    probe = Probe("nq question: who wrote faust?", "Goethe")
    first, second = read_facts(path, convention="zsre")
    right = Fact("Paris", "In which country is {}?", "France", None, ("Paris is where?",), id="0", locality=(probe,))
    assert first == right
    assert second == replace(right, id="1", locality=(Probe("who?", "Goethe"),))
    first, second = read_facts(path, convention="zsre-alt")
    assert first == replace(right, target_new="Italy", target_true="France")
    assert (second.target_new, second.target_true) == ("France", None), "nothing else is true"


def test_zsre_asks_on_from_the_other_answer(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    beyond = {"Recalled Relation": "(Italy, capital, Rome)", "New Question": "What is the capital there?"}
    answered, unanswered = {**beyond, "New Answer": "Rome"}, {**beyond, "New Answer": " "}
    path.write_text(json.dumps([{**ZSRE, "portability": portability} for portability in (answered, unanswered, None)]))
    ripple = Ripple("Compositionality_I", "What is the capital there?", ("Rome",))
    assert [fact.ripples for fact in read_facts(path, convention="zsre-alt")] == [(ripple,), (), ()]
    assert [fact.ripples for fact in read_facts(path, convention="zsre")] == [(), (), ()], "nobody taught that"


def test_zsre_asks_for_its_convention(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps([ZSRE]))

    def refused(path: Path, convention: str | None = None) -> str:
        with pytest.raises(InputError) as found:
            read_facts(path, convention=convention)
        return str(found.value)

    message = refused(path)
    assert message.startswith(f"{path}: record 0: zsRE, which is read in two ways; say which with --convention: zsre (")
    assert "answers[0]" in message
    assert "zsre-alt (" in message
    assert refused(path, "zsre_alt") == "--convention: unknown convention 'zsre_alt'; did you mean 'zsre-alt'?"
    assert refused(path, "mcf") == "--convention: unknown convention 'mcf'; there are zsre, zsre-alt"
    foreign = "--convention zsre is for zsRE, and this is no zsRE record (src, answers); leave it out"
    path.write_text(json.dumps([ZSRE, NESTED]))
    assert refused(path, "zsre") == f"{path}: record 1: {foreign}"
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(ZSRE))
    assert refused(path, "zsre") == f"{path}: line 1: {foreign}"


@pytest.mark.parametrize(
    ("change", "convention", "reason"),
    [
        ({"alt": " "}, "zsre-alt", "alt is empty"),
        ({"answers": []}, "zsre", "answers has no first one"),
        ({"answers": ["", "France"]}, "zsre-alt", "answers has no first one"),
        ({"src": "Where is it?"}, "zsre", "subject 'Paris' does not occur in prompt 'Where is it?'"),
        ({"src": "Is Paris Paris?"}, "zsre", "subject 'Paris' occurs 2 times in prompt"),
        ({"rephrase": ""}, "zsre", "a text of paraphrases is empty"),
        ({"loc_ans": ""}, "zsre", "target in locality is empty"),
        ({"subject": 5}, "zsre", "subject is int"),
    ],
)
def test_zsre_records_that_cannot_be_edited(
    tmp_path: Path, change: dict[str, Any], convention: str, reason: str
) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps([ZSRE, {**ZSRE, **change}, ZSRE]))
    facts, invalid = scan_facts(path, convention=convention)
    assert [fact.id for fact in facts] == ["0", "2"], "an id is a place in the file, whatever else stands there"
    assert [bad.where for bad in invalid] == ["record 1"]
    assert reason in invalid[0].reason


@pytest.mark.parametrize(
    ("name", "count"), [("subset_0", 996), ("subset_15", 994), ("mend_edit", 1037), ("train_4000", 3977)]
)
def test_zsre_as_published(shared: Path, name: str, count: int) -> None:
    path = shared / "data" / f"zsre_{name}.json"
    records = json.loads(path.read_text())
    facts = read_facts(path, convention="zsre")
    assert len(facts) == len(records)
    for fact, record in zip(facts, records, strict=True):
        assert (fact.question, fact.target_new, fact.target_true) == (record["src"], record["answers"][0], None)
        assert fact.paraphrases == (record["rephrase"],)
        assert fact.locality == (Probe(record["loc"] + "?", record["loc_ans"]),)
    other, invalid = scan_facts(path, convention="zsre-alt")
    empty = [i for i, record in enumerate(records) if not record["alt"].strip()]
    assert invalid == [InvalidFact(f"record {i}", "alt is empty") for i in empty]
    assert len(other) == count == len(records) - len(empty)
    for fact in other:
        record = records[int(fact.id)]
        assert (fact.question, fact.target_new) == (record["src"], record["alt"].strip())
        assert fact.target_true in (None, record["answers"][0])
        assert fact.target_true != fact.target_new
        beyond = record.get("portability")
        asked = [(beyond["New Question"].strip(), (beyond["New Answer"].strip(),))] if beyond else []
        assert [(ripple.prompt, ripple.targets) for ripple in fact.ripples] == asked
