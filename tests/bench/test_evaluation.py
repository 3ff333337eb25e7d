"""`bench evaluation`: the check beside each figure, on the demo: passed, failed, a tie, and through the command."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import rewire
from commands import FACTS
from rewire.bench import evaluation
from rewire.bench.evaluation import TIE, bench_answers, bench_singles
from rewire.bench.serial_evaluation import first_difference, gap_at, plain_logprobs, published_ids
from rewire.engine.evaluation import evaluate
from rewire.engine.facts import EditNeighbor

HPARAMS = {"layers": [1, 2], "v_num_grad_steps": 3, "mom2_tokens": 1600, "mom2_max_length": 64}
ROW = {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}


@pytest.fixture
def facts() -> list[rewire.Fact]:
    read = rewire.read_facts(FACTS, limit=3)
    return [replace(fact, paraphrases=fact.paraphrases[:1], neighbors=fact.neighbors[:1]) for fact in read]


@pytest.fixture
def begin(demo: rewire.Model) -> Callable[[], rewire.EditSession]:
    hparams = HPARAMS | {"mom2_update_weight": 20}
    return lambda: rewire.EditSession(demo, "memit", hparams=hparams, contexts=["The ferry waits. {}"])


def wrong_here(monkeypatch: pytest.MonkeyPatch, module: Any, gap: float) -> None:
    """Whatever is said the published way, another token comes first; and so far apart are the two best."""
    inner = module.published_ids

    def said(model: rewire.Model, prompt: str, limit: int = 50) -> tuple[int, ...]:
        first, *others = inner(model, prompt, limit)
        return (first + 1, *others)

    monkeypatch.setattr(module, "published_ids", said)
    monkeypatch.setattr(module, "gap_at", lambda model, prompt, said: gap)


def test_answers(demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int, int]] = []
    found = bench_answers(demo, facts, 2, listener=lambda *said: heard.append(said))
    assert (found["check"], found["flips"], found["wrong"]) == ("passed", [], [])
    (row,) = found["rows"]
    assert row.keys() >= ROW
    assert row["shape"] == {"facts": 3, "prompts": 9, "published": 6}
    assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
    assert found["metrics"] == evaluate(demo, facts, "wild")["metrics"]
    assert heard[-1] == ("published", 6, 6)

    wrong_here(monkeypatch, evaluation, gap=1.0)
    failed = bench_answers(demo, facts, 2)
    assert (failed["check"], failed["rows"], failed["flips"], len(failed["wrong"])) == ("failed", [], [], 6)
    assert failed["wrong"][0] == {"prompt": facts[0].question, "token": 0, "gap": 1.0}


def test_a_tie_is_no_fault(demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_here(monkeypatch, evaluation, gap=TIE / 2)
    found = bench_answers(demo, facts[:1], 1)
    assert (found["check"], len(found["rows"]), found["wrong"], len(found["flips"])) == ("passed", 1, [], 3)
    monkeypatch.setattr(evaluation, "gap_at", lambda model, prompt, said: float("nan"))
    assert bench_answers(demo, facts[:1], 1)["check"] == "failed"


def test_singles(
    demo: rewire.Model, facts: list[rewire.Fact], begin: Callable[[], rewire.EditSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = {name: weight.clone() for name, weight in demo.hf.state_dict().items()}
    found = bench_singles(demo, facts[:2], begin)
    assert (found["check"], found["wrong"]) == ("passed", [])
    names = ["edit", "teacher-forced", "teacher-forced, plain padded forwards", "generation", "together"]
    assert [row["name"] for row in found["rows"]] == names
    assert all(row.keys() >= ROW and row["shape"] == {"edits": 2} and row["seconds"] > 0 for row in found["rows"])
    edit, forced, _, generation, together = found["rows"]
    assert together["seconds"] == pytest.approx(sum(row["seconds"] for row in (edit, forced, generation)))
    assert found["metrics"]["counterfact"]["efficacy_success"] == 1.0  # the edits are no trifle
    assert found["method"] == "memit"
    for name, weight in demo.hf.state_dict().items():
        assert torch.equal(weight, before[name]), name

    inner = evaluation.evaluate

    def swapped(model: Any, asked: Sequence[Any], *args: Any, deltas: Sequence[Any] = (), **more: Any) -> Any:
        """Each fact under another one's delta: what a fault in the batch would look like."""
        return inner(model, asked, *args, deltas=list(deltas)[::-1], **more)

    monkeypatch.setattr(evaluation, "evaluate", swapped)
    failed = bench_singles(demo, facts[:2], begin)
    assert (failed["check"], failed["rows"]) == ("failed", [])
    kinds = ("efficacy", "padded forwards")
    assert {each["prompt"] for each in failed["wrong"]} >= {f"{f.id}: {kind}" for f in facts[:2] for kind in kinds}


def test_an_edit_time_neighbour_of_another_fact(
    facts: list[rewire.Fact], begin: Callable[[], rewire.EditSession]
) -> None:
    """Is asked neither of all facts together nor of each alone."""
    subject, other = facts[1].subject, facts[1].question
    kept = (EditNeighbor(subject, facts[1].prompt, str(facts[1].target_true)),)
    asked = [replace(facts[0], neighbors=(other, *facts[0].neighbors)), replace(facts[2], edit_neighbors=kept)]
    assert bench_singles(begin().model, asked, begin)["check"] == "passed"


def test_what_is_no_number_is_wrong(facts: list[rewire.Fact]) -> None:
    def of(logprob: float, success: float) -> dict[str, Any]:
        return {"efficacy": {"new_logprob": [logprob], "true_logprob": [-1.0], "success": success}}

    for mine, theirs, wanted in (
        (of(-2.0, 1.0), of(-2.0, 1.0), (0, 0)),
        (of(-2.0, 1.0), of(-2.0 + TIE / 2, 0.0), (1, 0)),
        (of(-2.0, 1.0), of(-2.1, 1.0), (0, 1)),
        (of(float("nan"), 1.0), of(-2.0, 1.0), (0, 1)),
    ):
        flips: list[dict[str, Any]] = []
        wrong: list[dict[str, Any]] = []
        evaluation._compare_forced(facts[0], mine, theirs, flips, wrong)
        assert (len(flips), len(wrong)) == wanted


def test_the_baseline(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    """The plain ways say what ours do, and where two answers part is found."""
    record = evaluate(demo, facts[:1], "counterfact")["facts"][0]["efficacy"]
    fact = facts[0]
    pairs = [(fact.question, fact.target_new), (fact.question, str(fact.target_true))]
    (new, _), (true, best) = plain_logprobs(demo, pairs)
    assert (new, true) == (pytest.approx(record["new_logprob"][0], abs=1e-4), pytest.approx(record["true_logprob"][0]))
    assert best
    said = published_ids(demo, fact.question)
    ours = evaluate(demo, facts[:1], "wild", context="question-only")["facts"][0]["rewrite"][0]["ids"]
    assert list(said) == ours
    logits = demo.hf(input_ids=torch.tensor([[*demo.tokenizer(fact.question)["input_ids"], *said[:1]]])).logits[0, -1]
    best_two = logits.float().topk(2).values
    assert gap_at(demo, fact.question, said[:1]) == pytest.approx((best_two[0] - best_two[1]).item())
    assert first_difference([1, 2], (1, 2)) is None
    assert [first_difference([1, 2], other) for other in ([1, 3], [1], [], [1, 2, 3])] == [1, 1, 0, 2]
