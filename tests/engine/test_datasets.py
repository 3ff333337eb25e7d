"""The published data sets as they are, known by their fields."""

import json
from pathlib import Path
from typing import Any

import pytest

from rewire.engine.datasets import read_facts
from rewire.engine.facts import EditNeighbor, Fact
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
    assert other.neighbors == (), "the answer there is not this fact's true object"


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
