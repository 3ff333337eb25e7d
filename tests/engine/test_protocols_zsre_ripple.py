"""zsRE and RippleEdits: every number is that of plain transformers, one prompt at a time, and of examples by hand."""

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FACTS, make

import rewire
from rewire.engine.delta import Factors
from rewire.engine.evaluation import evaluate, ripple, zsre
from rewire.engine.facts import RIPPLES, Fact, Probe, Query, Ripple
from rewire.engine.scores import Answer
from rewire.kernels.errors import InputError

BATCHES = [1, 7, 64]


@functools.lru_cache(maxsize=500)
@torch.no_grad()
def plain_answer(model: rewire.Model, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """(labels, most probable ids) of the target's tokens, by one full forward."""
    start = len(model.tokenizer(prompt.rstrip())["input_ids"])
    ids = model.tokenizer(f"{prompt.rstrip()} {target}")["input_ids"]
    return ids[start:], model.hf(torch.tensor([ids])).logits[0].argmax(-1)[start - 1 : -1].tolist()


@functools.lru_cache(maxsize=500)
@torch.no_grad()
def plain_said(model: rewire.Model, prompt: str, tokens: int = 20) -> str:
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    made = model.hf.generate(ids, do_sample=False, use_cache=False, max_new_tokens=tokens, pad_token_id=1)
    return str(model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def same(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def in_float64(model: rewire.Model) -> rewire.Model:
    model.hf.double()
    return model


def disturbed(model: rewire.Model, scale: float) -> rewire.Model:
    """The same with weights moved so far that some answers change and some stay."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (1, 2):
            weight = other.projection(layer).weight
            weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


# zsRE


def plain_zsre(model: rewire.Model, before: rewire.Model, fact: Fact) -> dict[str, float | None]:
    def accuracy(pairs: list[tuple[str, str]]) -> float | None:
        return average([same(*plain_answer(model, *pair)) for pair in pairs])

    probes = [(probe.prompt, probe.target) for probe in fact.locality]
    follows = [(t.prompt, t.targets[0]) for t in fact.ripples if t.category in RIPPLES[:4]]
    return {
        "reliability": accuracy([(fact.question, fact.target_new)]),
        "generalization": accuracy([(prompt, fact.target_new) for prompt in fact.paraphrases]),
        "locality_accuracy": accuracy(probes),
        "locality": average([same(plain_answer(model, *p)[1], plain_answer(before, *p)[1]) for p in probes]),
        "portability": accuracy(follows),
    }


def test_zsre_against_a_plain_evaluator(known: rewire.Model, shared: Path) -> None:
    model = in_float64(known)
    facts = rewire.read_facts(shared / "data" / "zsre_subset_0.json", 4, "zsre")
    facts[1] = replace(facts[1], locality=(*facts[1].locality, *facts[2].locality))
    facts[2] = replace(facts[2], locality=(), paraphrases=())
    follows = [Ripple(category, facts[3].question, (facts[3].target_new, "x")) for category in RIPPLES[2:]]
    facts[3] = replace(facts[3], ripples=tuple(follows))
    edited = disturbed(model, 2.0)
    before = evaluate(model, facts, "zsre")
    wanted = [plain_zsre(edited, model, fact) for fact in facts]
    moved = [record["locality"] for record in wanted if record["locality"] is not None]
    assert 0 < sum(moved) < len(moved)  # or it would show nothing
    for size in BATCHES:
        after = evaluate(edited, facts, "zsre", unedited=json.loads(json.dumps(before)), batch_size=size)
        for record, expected in zip(after["facts"], wanted, strict=True):
            assert {name: record[name] for name in expected} == expected
        for name in zsre.METRICS:
            found = [record[name] for record in wanted if record[name] is not None]
            assert after["metrics"][name] == pytest.approx(average([v for v in found if v is not None]), abs=1e-12)
    assert before["metrics"]["locality"] is None
    assert before["metrics"]["locality_accuracy"] is not None
    assert set(after["definitions"]) == set(after["metrics"])
    assert evaluate(model, facts, "zsre", unedited=before)["metrics"]["locality"] == 1


class Told:
    """Asked, with answers given by hand."""

    deltas = ()

    def __init__(self, answers: Mapping[str, str] = {}, said: Mapping[tuple[int, str], str] = {}) -> None:
        self._answers, self._said = answers, said

    def answers(self, wanted: Sequence[tuple[int, str, str]], progress: Any) -> list[Answer]:
        found = []
        for _, prompt, target in wanted:
            labels, best = (tuple(map(ord, text)) for text in (target, self._answers[prompt]))
            found.append(Answer(labels, best, (0.0,) * len(labels)))
        return found

    def continuations(self, wanted: Sequence[tuple[int, str]], texts: Any = (), **more: Any) -> list[str]:
        assert (texts, more["limit"]) == ((), 20)
        return [self._said[key] for key in wanted]

    def text(self, said: str, special: bool) -> str:
        assert not special
        return said


def tick(done: int, total: int) -> None:
    """Nobody watches."""


def told(measure: Callable[..., dict[str, Any]], asked: Told, facts: list[Fact], **more: Any) -> dict[str, Any]:
    return measure(asked, facts, tick, **more)


def test_zsre_by_hand() -> None:
    first = Fact("A", "{} is", "wxyz", paraphrases=("P", "Q"), locality=(Probe("L", "abcd"), Probe("M", "ab")), id="1")
    tests = [Ripple("Forgetfulness", "R", ("ab",)), Ripple("Compositionality_I", "S", ("ab", "cd"))]
    second = Fact("B", "{} is", "wx", ripples=tuple(tests), id="2")
    given = {"A is": "wxy-", "P": "w---", "Q": "wxyz", "L": "ab--", "M": "ab", "B is": "--", "S": "a-"}
    before = told(zsre.measure, Told(given | {"L": "a-c-", "M": "--"}), [first, second])
    after = told(zsre.measure, Told(given), [first, second], unedited=before)
    assert after["metrics"] == {
        "reliability": (3 / 4 + 0) / 2,
        "generalization": (1 / 4 + 1) / 2,
        "locality_accuracy": (2 / 4 + 1) / 2,
        "locality": (2 / 4 + 0) / 2,  # "a" and the last "-" of "L"
        "portability": 1 / 2,  # what must not change does not follow
    }
    assert after["facts"][1]["locality"] is after["facts"][0]["portability"] is None
    for unlike in ([replace(first, locality=())], [second]):
        with pytest.raises(InputError, match=r"fact 1: .*evaluate the unedited model on the same facts"):
            told(zsre.measure, Told(given), [first], unedited=told(zsre.measure, Told(given), unlike))


def test_protocols_without_facts() -> None:
    for name, protocol in (("zsre", zsre), ("ripple", ripple)):
        found = evaluate(make("gpt2"), [], name)
        assert set(found["metrics"]) <= set(protocol.METRICS)
        assert not any(found["metrics"].values())
        assert found["facts"] == []


# RippleEdits


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        (" Paris, the capital", ["London", "paris"], True),
        (" Parisian", ["Paris"], False),
        (" I know", ["no"], False),
        (" He said:\n no\u00a0!", ["No"], True),
        (" the  United\nStates of", ["united states"], True),
        (" born in the U.S.", ["U.S."], True),
        (" born in the U.S.A.", ["U.S."], False),
        (" in 1990-1995", ["1990"], True),
        (" in 19901", ["1990"], False),
        (" \uff30aris", ["Paris"], True),  # full width
        (" STRASSE", ["Straße"], True),
        (" (C++)", ["C++"], True),
        ("", ["x"], False),
    ],
)
def test_whole_words(text: str, answers: list[str], found: bool) -> None:
    assert ripple.holds(text, answers) == found


def hand() -> tuple[list[Fact], dict[tuple[int, str], str]]:
    """Two facts, and what the edited (0, 1) and the unedited model (-1) say."""
    known, unknown = Query("K", ("yes",)), Query("U", ("yes",))
    tests = (
        Ripple("Logical_Generalization", "right", ("yes",), (known,)),
        Ripple("Logical_Generalization", "wrong", ("yes",), (known, known)),
        Ripple("Logical_Generalization", "right", ("yes",), (known, unknown)),  # left out
        Ripple("Compositionality_I", "wrong", ("yes",), (), (Query("right", ("yes", "yep")),)),
        Ripple("Compositionality_II", "wrong", ("yes",), (), (Query("right", ("yes",)),), True),
        Ripple("Subject_Aliasing", "right", ("yes",), (unknown,)),  # left out
        Ripple("Forgetfulness", "right", ("yes",)),
    )
    facts = [Fact("A", "{} is", "new", ripples=tests, id="1"), Fact("B", "{} is", "new", ripples=tests[:1], id="2")]
    said = {(-1, "K"): " yes.", (-1, "U"): " no.", (0, "right"): " yes", (0, "wrong"): " no", (1, "right"): " none"}
    return facts, said | {(0, "A is"): " the new one", (1, "B is"): " newer"}


def test_ripples_by_hand() -> None:
    facts, said = hand()
    found = told(ripple.measure, Told(said=said), facts)
    first, second = found["facts"]
    assert [test["held"] for test in first["ripples"]] == [True, True, False, True, True, False, True]
    assert [test["passed"] for test in first["ripples"]] == [True, False, True, True, False, True, True]
    assert first["ripples"][3]["answers"] == [" no", " yes"]
    assert (first["reliability"], second["reliability"]) == (1.0, 0.0)
    assert (first["Logical_Generalization"], second["Logical_Generalization"]) == (0.5, 0.0)
    assert first["Subject_Aliasing"] is None
    assert "Relation_Specificity" not in first
    assert first["portability"] == pytest.approx((0.5 + 1 + 0) / 3)
    expected = {
        "reliability": 0.5,
        "portability": (0.25 + 1 + 0) / 3,
        "locality": 1.0,
        "portability_edited": (0.5 + 1 + 0) / 3,  # the second fact's edit failed
        "locality_edited": 1.0,
        "Logical_Generalization": 0.25,
        "Logical_Generalization_count": 3,
        "Logical_Generalization_left_out_count": 1,
        "Compositionality_I": 1.0,
        "Compositionality_II": 0.0,
        "Subject_Aliasing": None,
        "Subject_Aliasing_count": 0,
        "Subject_Aliasing_left_out_count": 1,
        "Forgetfulness": 1.0,
        "Relation_Specificity": None,
        "Relation_Specificity_left_out_count": 0,
    }
    assert {name: found["metrics"][name] for name in expected} == {
        name: value if value is None else pytest.approx(value) for name, value in expected.items()
    }
    assert set(found["metrics"]) | {"generalization"} == set(ripple.METRICS)


def test_conditions_are_those_of_the_unedited_model() -> None:
    facts, said = hand()
    before = json.loads(json.dumps(told(ripple.measure, Told(said=said), facts)))
    without = {key: text for key, text in said.items() if key[0] != -1}  # nobody is asked for them again
    assert told(ripple.measure, Told(said=without), facts, unedited=before)["facts"] == before["facts"]
    for unlike in ([replace(facts[0], ripples=facts[0].ripples[:2])], [facts[1]]):
        earlier = told(ripple.measure, Told(said=said | {(0, "B is"): ""}), unlike)
        with pytest.raises(InputError, match=r"fact 1: .*evaluate the unedited model on the same facts"):
            told(ripple.measure, Told(said=without), facts[:1], unedited=earlier)


def test_all_left_out() -> None:
    facts, said = hand()
    found = told(ripple.measure, Told(said=said | {(-1, "K"): ""}), [replace(facts[0], ripples=facts[0].ripples[:3])])
    metrics = found["metrics"]
    assert metrics["Logical_Generalization"] is metrics["portability"] is metrics["portability_edited"] is None
    assert (metrics["Logical_Generalization_count"], metrics["Logical_Generalization_left_out_count"]) == (0, 3)
    assert metrics["reliability"] == 1
    none = told(ripple.measure, Told(said=said), [replace(facts[0], ripples=())])
    assert none["metrics"]["portability"] is None
    assert none["facts"][0]["ripples"] == []


def ripples_of(facts: Sequence[Fact], number: int) -> tuple[Ripple, ...]:
    """Tests of each category that ask other facts' questions; some have conditions, some several questions."""
    made = []
    for place, category in enumerate(RIPPLES):
        other, more = facts[(number + place + 1) % len(facts)], facts[(number + place + 2) % len(facts)]
        mine = Query(other.question, (str(other.target_true),))
        also = Query(more.question, (str(more.target_true),))
        wrong = Query(facts[number].question, ("nobody says this",))
        conditions = (mine,) if place % 3 == 0 else (mine, wrong) if place % 3 == 1 and number % 2 else ()
        others = (also,) if place in (1, 4) else ()
        targets = mine.targets if place != 2 else wrong.targets
        made.append(Ripple(category, mine.prompt, targets, conditions, others, place == 4))
    return tuple(made)


def plain_ripples(model: rewire.Model, before: rewire.Model, fact: Fact) -> list[tuple[bool, bool]]:
    """(whether its conditions hold, whether it passes) of each test."""

    def right(of: rewire.Model, query: Query) -> bool:
        return ripple.holds(plain_said(of, query.prompt), query.targets)

    found = []
    for test in fact.ripples:
        queries = [Query(test.prompt, test.targets), *test.others]
        answers = [right(model, query) for query in queries]
        passed = all(answers) if test.needs_all else any(answers)
        found.append((all(right(before, query) for query in test.conditions), passed))
    return found


def test_ripples_against_a_plain_evaluator(known: rewire.Model, shared: Path) -> None:
    model = in_float64(known)
    facts = rewire.read_facts(shared / "data" / "mcf_subset_1.json", 3)
    facts = [replace(fact, ripples=ripples_of(facts, number)) for number, fact in enumerate(facts)]
    edited = disturbed(model, 4.0)
    wanted = [plain_ripples(edited, model, fact) for fact in facts]
    passed = [test for tests in wanted for _, test in tests]
    held = [test for tests in wanted for test, _ in tests]
    assert 0 < sum(passed) < len(passed)  # or it would show nothing
    assert 0 < sum(held) < len(held)
    before = evaluate(model, facts, "ripple")
    for size in BATCHES:
        after = evaluate(edited, facts, "ripple", unedited=before, batch_size=size)
        assert [[(t["held"], t["passed"]) for t in r["ripples"]] for r in after["facts"]] == wanted
        assert [record["answer"] for record in after["facts"]] == [plain_said(edited, f.question) for f in facts]
        for place, category in enumerate(RIPPLES):
            counted = [float(tests[place][1]) for tests in wanted if tests[place][0]]
            assert after["metrics"][category] == average(counted)
            assert after["metrics"][f"{category}_left_out_count"] == len(facts) - len(counted)


def test_under_deltas_conditions_are_asked_of_the_weights_alone() -> None:
    model = in_float64(make("llama"))
    generator = torch.Generator().manual_seed(1)
    name, weight = model.anatomy.weight_name(1), model.projection(1).weight
    deltas = []
    for _ in range(2):
        left, right = (torch.randn(n, 1, generator=generator) for n in weight.shape)
        deltas.append({name: Factors(left, right.T.contiguous())})
    edited = []
    for update in deltas:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.projection(1).weight += update[name].dense().double()
        edited.append(other)
    asked = FACTS[2].question
    before = plain_said(model, asked)
    assert len({before, *(plain_said(other, asked) for other in edited)}) == 3  # or it would show nothing
    now = tuple(plain_said(other, asked).strip() for other in edited)
    condition = Query(asked, (before.strip(),))
    tests = tuple(Ripple("Forgetfulness", asked, (text,), (condition,)) for text in now)
    found = evaluate(model, [replace(fact, ripples=tests) for fact in FACTS[:2]], "ripple", deltas=deltas)
    assert [[test["passed"] for test in r["ripples"]] for r in found["facts"]] == [[True, False], [False, True]]
    assert all(test["held"] for record in found["facts"] for test in record["ripples"])


def test_as_emsedit_measures() -> None:
    tests = (
        Ripple("Forgetfulness", "F", ("zz",)),
        Ripple("Relation_Specificity", "S", ("ab", "cd")),
        Ripple("Subject_Aliasing", "P", ("not asked",)),
        Ripple("Relation_Specificity", "T", ("ab",)),
        Ripple("Subject_Aliasing", "Q", ("not asked",)),
    )
    facts = [Fact("A", "{} is", "wxyz", ripples=tests, id="1"), Fact("B", "{} is", "wx", ripples=tests[:1], id="2")]
    given = {"A is": "wxyz", "P": "w---", "S": "ab", "B is": "w-"}
    found = told(ripple.measure, Told(given), facts, compat=True)
    assert found["facts"] == [
        {"id": "1", "reliability": 1.0, "generalization": 0.25, "locality": 1.0},
        {"id": "2", "reliability": 0.5, "generalization": 0.5, "locality": 0.5},  # all of them the edit's own prompt
    ]
    assert found["metrics"] == {"reliability": 0.75, "generalization": 0.375, "locality": 0.75}
    evaluated = evaluate(make("gpt2"), facts, "ripple", compat=True)
    assert set(evaluated["metrics"]) == {"reliability", "generalization", "locality"}
