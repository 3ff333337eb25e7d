"""Neighbours that a model knows: as plain transformers say, one prompt at a time; chosen without a leak."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewire
from rewire.engine import neighbors
from rewire.engine.datasets import read_facts, scan_candidates, write_facts
from rewire.engine.evaluation import evaluate
from rewire.engine.facts import EditNeighbor, Fact
from rewire.engine.model import demo_file
from rewire.engine.neighbors import Eligible, choose, says
from rewire.kernels.errors import InputError

PUBLISHED = {"mcf_neighbors_739": (6, 166), "mcf_neighbors_960": (1, 197), "mcf_neighbors_1340": (1, 270)}


@torch.no_grad()
def naive(model: rewire.Model, prompt: str, target: str) -> bool:
    """Whether what is most probable where the target stands reads as the target."""
    ids = model.tokenizer(f"{prompt} {target}")["input_ids"]
    start = len(model.tokenizer(prompt)["input_ids"])
    best = model.hf(torch.tensor([ids])).logits[0].argmax(-1)[start - 1 : -1]
    return bool(model.tokenizer.decode(best).strip() == target)


def naive_choice(model: rewire.Model, fact: Fact) -> Fact | None:
    """As the published procedure has it, but for the leak: of these records no two neighbours are the same."""
    assert fact.target_true
    kept = [near for near in fact.edit_neighbors if naive(model, near.question, fact.target_true)]
    if len(kept) < 2:
        return None
    held = tuple(near.question for near in kept[1:])
    return replace(fact, neighbors=held, edit_neighbors=(kept[0],))


def test_as_one_prompt_at_a_time(known: rewire.Model, shared: Any) -> None:
    facts = scan_candidates(shared / "data" / "mcf_subset_1.json", limit=318)[0]
    facts = facts[:3] + facts[300:]  # the models know the first 300
    assert all([near.question for near in fact.edit_neighbors] == list(fact.neighbors) for fact in facts)
    wanted = [naive_choice(known, fact) for fact in facts]
    found = choose(known, facts, batch_tokens=500)
    assert found.facts == [fact for fact in wanted if fact is not None]
    assert 3 < len(found.facts) < len(facts) == found.records == found.candidates


def test_the_models_know_neighbours_of_all_that_they_know(known: rewire.Model, shared: Any) -> None:
    facts = scan_candidates(shared / "data" / "mcf_subset_1.json", limit=40)[0]
    found = choose(known, facts)
    assert [fact.id for fact in found.facts] == [fact.id for fact in facts]
    assert sum(found.histogram.values()) == 40
    assert found.mean == sum(count * facts for count, facts in found.histogram.items()) / 40
    before = evaluate(known, found.facts)["metrics"]
    assert before["neighborhood_accuracy"] == 1, "held out is what the model gets right"


def test_batch_size_changes_nothing_and_progress_ends_at_the_total(demo: rewire.Model) -> None:
    facts = read_facts(demo_file("facts.jsonl"), limit=6)
    targets = [(fact, target) for fact in facts for target in (fact.target_new, str(fact.target_true))]
    pairs = [(prompt, target) for fact, target in targets for prompt in (fact.question, *fact.neighbors)]
    seen: list[tuple[int, int]] = []
    whole = says(demo, pairs)
    assert says(demo, pairs, 64, lambda done, total: seen.append((done, total))) == whole
    assert says(demo, pairs, 1) == whole == [naive(demo, *pair) for pair in pairs]
    assert set(whole) == {True, False}
    assert len(seen) > 2
    assert seen[-1] == (len(pairs), len(pairs))


def test_a_prompt_too_long(demo: rewire.Model) -> None:
    with pytest.raises(InputError, match=rf"prompt 'x x .*'\.\.\. has \d+ tokens, the model takes {demo.max_length}"):
        says(demo, [("x " * demo.max_length, "y")])


@pytest.mark.parametrize(("said", "known"), [(" m", True), ("m", True), (" i", False)])
def test_other_tokens_that_spell_the_object(monkeypatch: pytest.MonkeyPatch, said: str, known: bool) -> None:
    """What counts is the text: the object without its space is another token, and the object all the same."""
    tokenizer = small_models.tokenizer()
    (best,) = tokenizer(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(neighbors, "final_hidden", lambda *_: torch.eye(small_models.VOCAB)[[best]])
    model: Any = SimpleNamespace(tokenizer=tokenizer, max_length=99, logits=lambda hidden: hidden)
    model.anatomy = SimpleNamespace(d_model=1, d_in=1, vocab=1)
    model.device = torch.device("cpu")
    assert says(model, [("It is", "m")], 99) == [known]


# the choice

PLACES = st.sampled_from([f"{name} lies in" for name in "abcdef"])


def fact_of(questions: Sequence[str], candidates: Sequence[str], number: int) -> Fact:
    near = tuple(EditNeighbor(question[0], "{}" + question[1:], "France") for question in candidates)
    return Fact("Paris", "{} lies in", "Italy", "France", (), tuple(questions), near, str(number))


@given(
    records=st.lists(st.tuples(st.lists(PLACES, max_size=6), st.lists(PLACES, max_size=6)), max_size=4),
    known=st.sets(PLACES),
)
def test_what_is_chosen(records: list[tuple[list[str], list[str]]], known: set[str]) -> None:
    asked: list[tuple[str, str]] = []

    def say(model: Any, pairs: Sequence[tuple[str, str]], *_: Any) -> list[bool]:
        asked.extend(pairs)
        return [question in known for question, _ in pairs]

    facts = [fact_of(*record, number) for number, record in enumerate(records)]
    model: Any = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "says", say)
        found = choose(model, facts)
    assert len(asked) == len(set(asked)), "every question runs once"
    assert found.records == len(facts)
    assert found.candidates == sum(bool(candidates) for _, candidates in records)
    chosen = {fact.id: fact for fact in found.facts}
    for number, (questions, candidates) in enumerate(records):
        survivors = [question for question in [*questions, *candidates] if question in known]
        first = next((question for question in candidates if question in known), None)
        eligible = first is not None and len(set(survivors)) > 1
        assert eligible == (str(number) in chosen)
        if eligible:
            fact = chosen[str(number)]
            assert [near.question for near in fact.edit_neighbors] == [first]
            assert set(fact.neighbors) == set(survivors) - {first}
            kept = [question for question in questions if question in known and question != first]
            assert list(fact.neighbors[: len(kept)]) == kept, "in the record's order"


def test_a_candidate_with_another_object_is_none() -> None:
    fact = fact_of(["a lies in", "b lies in"], ["a lies in"], 0)
    other, nothing = replace(fact, target_true="Spain", id="1"), replace(fact, target_true=None, id="2")
    model: Any = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "says", lambda model, pairs, *_: [True] * len(pairs))
        found = choose(model, [other, fact, nothing])
    assert [chosen.id for chosen in found.facts] == [fact.id]
    assert (found.records, found.candidates) == (3, 1)
    assert Eligible([], 2, 0).mean is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_said_of_the_published_sets(shared: Any, name: str) -> None:
    """The leaks that were counted in them; in ours there is none of the first kind."""
    facts = read_facts(shared / "data" / f"{name}.json")
    found = Eligible(facts, len(facts), len(facts))
    leaks, subjects = PUBLISHED[name]
    assert sum(fact.edit_neighbors[0].question in fact.neighbors for fact in facts) == leaks
    assert found.subjects_again == subjects
    assert found.not_counted >= leaks
    assert sum(found.histogram.values()) == len(facts)


# what comes of it


def test_an_edit_time_neighbour_counts_nowhere(demo: rewire.Model) -> None:
    first, second = read_facts(demo_file("facts.jsonl"), limit=2)
    before, _, subject = second.neighbors[0].rpartition(" ")
    assisted = replace(first, edit_neighbors=(EditNeighbor(subject, before + " {}", str(first.target_true)),))
    less = replace(second, neighbors=second.neighbors[1:])
    assert evaluate(demo, [assisted, second]) == evaluate(demo, [first, less])
    whole = evaluate(demo, [first, second])["facts"][1]["neighborhood"]["true_logprob"]
    assert len(whole) == len(second.neighbors) == len(less.neighbors) + 1


def test_both_forms_give_the_same_facts(known: rewire.Model, shared: Any, tmp_path: Any) -> None:
    facts = scan_candidates(shared / "data" / "mcf_subset_1.json", limit=8)[0]
    chosen = choose(known, facts).facts
    write_facts(tmp_path / "a.jsonl", chosen)
    write_facts(tmp_path / "a.json", chosen)
    assert read_facts(tmp_path / "a.jsonl") == chosen
    flat = read_facts(tmp_path / "a.json")
    assert [fact.id for fact in flat] == [str(number) for number in range(len(chosen))]
    for one, other in zip(flat, chosen, strict=True):
        assert (one.question, one.target_new, one.target_true) == (other.question, other.target_new, other.target_true)
        assert (one.neighbors, one.edit_neighbors) == (other.neighbors, other.edit_neighbors)
    # chosen again, on the same model, it is the same choice
    assert choose(known, scan_candidates(tmp_path / "a.jsonl")[0]).facts == chosen
