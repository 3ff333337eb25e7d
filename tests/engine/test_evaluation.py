"""Evaluation: the batched scores are those of plain transformers, one text at a time; the rates are what they say."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rewire
from rewire.engine.asked import Asked
from rewire.engine.evaluation import evaluate
from rewire.engine.evaluation.counterfact import harmonic_mean
from rewire.engine.facts import Fact
from rewire.engine.model import demo_file
from rewire.engine.scores import Answer
from rewire.kernels.errors import InputError

RATES = ("success", "magnitude", "accuracy")


@torch.no_grad()
def naive(model: rewire.Model, prompt: str, target: str) -> tuple[float, bool]:
    """(mean log-probability of the target's tokens, whether each is the most probable), by plain transformers."""
    tokenizer, prompt = model.tokenizer, prompt.rstrip()
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    assert ids[:start] == tokenizer(prompt)["input_ids"]
    logp = model.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    found = [float(logp[at - 1, ids[at]]) for at in range(start, len(ids))]
    best = [int(logp[at - 1].argmax()) == ids[at] for at in range(start, len(ids))]
    return sum(found) / len(found), all(best)


def naive_record(model: rewire.Model, fact: Fact) -> dict[str, Any]:
    kinds = {"efficacy": [fact.question], "paraphrase": fact.paraphrases, "neighborhood": fact.neighbors}
    record: dict[str, Any] = {"id": fact.id}
    for kind, prompts in kinds.items():
        if not prompts:
            continue
        new = [naive(model, prompt, fact.target_new) for prompt in prompts]
        true = [] if fact.target_true is None else [naive(model, prompt, fact.target_true) for prompt in prompts]
        wanted, other = (true, new) if kind == "neighborhood" else (new, true)
        record[kind] = {"new_logprob": [lp for lp, _ in new], "true_logprob": [lp for lp, _ in true]}
        if wanted:
            record[kind]["accuracy"] = sum(hit for _, hit in wanted) / len(wanted)
        if wanted and other:
            pairs = [(a, b) for (a, _), (b, _) in zip(wanted, other, strict=True)]
            record[kind]["success"] = sum(a > b for a, b in pairs) / len(pairs)
            record[kind]["magnitude"] = sum(math.exp(a) - math.exp(b) for a, b in pairs) / len(pairs)
    return record


def compare(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    assert found["id"] == wanted["id"]
    for kind in found.keys() - {"id"}:
        assert found[kind].keys() == wanted[kind].keys()
        for name, value in found[kind].items():
            # of a log-probability float32 keeps some 1e-7 of itself
            relative = tolerance if name.endswith("logprob") else 0
            assert value == pytest.approx(wanted[kind][name], rel=relative, abs=tolerance), (kind, name)


def check_against_naive(model: rewire.Model, facts: list[Fact]) -> None:
    result = evaluate(model, facts, batch_tokens=300)
    records = [naive_record(model, fact) for fact in facts]
    for found, wanted in zip(result["facts"], records, strict=True):
        compare(found, wanted, 1e-5)
    for kind in ("efficacy", "paraphrase", "neighborhood"):
        for name in RATES:
            rates = [record[kind][name] for record in records if name in record.get(kind, {})]
            assert result["metrics"][f"{kind}_{name}"] == pytest.approx(sum(rates) / len(rates), abs=1e-5)


def ragged(facts: list[Fact]) -> list[Fact]:
    """The same without some paraphrases, neighbours and true objects, and with one of each very short and long."""
    first, second, third, *rest = facts
    long = "It was late. " * 12 + first.question
    return [
        Fact(first.subject, first.prompt, first.target_new, None, first.paraphrases, first.neighbors, (), "a"),
        Fact(second.subject, second.prompt, second.target_new, second.target_true, (), second.neighbors[:1], (), "b"),
        Fact(third.subject, "{}", third.target_new, third.target_true, (long, "It"), (), (), "c"),
        *rest,
    ]


def test_demo_as_one_at_a_time(demo: rewire.Model) -> None:
    facts = rewire.read_facts(demo_file("facts.jsonl"), limit=4)
    check_against_naive(demo, facts)
    check_against_naive(demo, ragged(facts))


def test_known_models_as_one_at_a_time(known: rewire.Model, shared: Any) -> None:
    facts = rewire.read_facts(shared / "data" / "mcf_subset_1.json", limit=5)
    check_against_naive(known, ragged(facts))


def test_spaces_at_the_end_of_a_prompt_change_nothing(demo: rewire.Model) -> None:
    (fact,) = rewire.read_facts(demo_file("facts.jsonl"), limit=1)
    spaced = Fact(
        fact.subject, fact.prompt + " ", fact.target_new, fact.target_true,
        tuple(text + "  " for text in fact.paraphrases), fact.neighbors, (), fact.id,
    )  # fmt: skip
    assert evaluate(demo, [spaced])["metrics"] == evaluate(demo, [fact])["metrics"]


def test_batch_size_changes_nothing(demo: rewire.Model) -> None:
    facts = ragged(rewire.read_facts(demo_file("facts.jsonl"), limit=8))
    whole = evaluate(demo, facts)
    for batch_tokens in (1, 64, 333):
        part = evaluate(demo, facts, batch_tokens=batch_tokens)
        assert part["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)
        for one, other in zip(part["facts"], whole["facts"], strict=True):
            compare(one, other, 1e-6)


def test_progress_ends_at_the_total(demo: rewire.Model) -> None:
    seen: list[tuple[int, int]] = []
    facts = rewire.read_facts(demo_file("facts.jsonl"), limit=2)
    evaluate(demo, facts, batch_tokens=64, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_weights_and_modes_are_left_alone(demo: rewire.Model) -> None:
    demo.hf.train()
    before = {name: tensor.clone() for name, tensor in demo.hf.state_dict().items()}
    evaluate(demo, rewire.read_facts(demo_file("facts.jsonl"), limit=2))
    assert demo.hf.training
    assert all(parameter.requires_grad for parameter in demo.hf.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in demo.hf.state_dict().items())


# what the rates say: log-probabilities are given, nothing runs


@pytest.fixture
def scored(demo: rewire.Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """evaluate(facts, {(prompt, object): mean log-probability}) on a model that gives just these."""

    def run(facts: list[Fact], logprobs: dict[tuple[str, str], float]) -> dict[str, Any]:
        def answers(self: Asked, asked: list[tuple[int, str, str]], progress: Any) -> list[Answer]:
            values = [logprobs[prompt, target] for _, prompt, target in asked]
            return [Answer((1,), (int(value > math.log(0.5)),), (value,)) for value in values]

        monkeypatch.setattr(Asked, "answers", answers)
        return evaluate(demo, facts)

    return run


def fact(name: str, **more: Any) -> Fact:
    return Fact(name, "{} is a", "smith", more.pop("true", "doctor"), id=name, **more)


def p(value: float) -> float:
    return math.log(value)


def test_success_is_strict(scored: Callable[..., dict[str, Any]]) -> None:
    one = fact("A", paraphrases=("P", "Q"), neighbors=("N", "M"))
    level = {(prompt, target): p(0.25) for prompt in ("A is a", "P", "Q", "N", "M") for target in ("smith", "doctor")}
    tied = scored([one], level)["metrics"]
    for kind in ("efficacy", "paraphrase", "neighborhood"):
        assert tied[f"{kind}_success"] == 0  # neither the new object nor, for neighbours, the true one is above
        assert tied[f"{kind}_magnitude"] == 0
    above = level | {("A is a", "smith"): p(0.26), ("P", "smith"): p(0.26), ("N", "doctor"): p(0.26)}
    found = scored([one], above)["metrics"]
    assert (found["efficacy_success"], found["paraphrase_success"], found["neighborhood_success"]) == (1, 0.5, 0.5)


def test_neighbors_want_the_true_object(scored: Callable[..., dict[str, Any]]) -> None:
    given = {("A is a", "smith"): p(0.9), ("A is a", "doctor"): p(0.1), ("N", "smith"): p(0.6), ("N", "doctor"): p(0.2)}
    result = scored([fact("A", neighbors=("N",))], given)
    metrics = result["metrics"]
    assert metrics["efficacy_success"] == 1
    assert metrics["efficacy_magnitude"] == pytest.approx(0.8)
    assert metrics["efficacy_accuracy"] == 1
    assert metrics["neighborhood_success"] == 0
    assert metrics["neighborhood_magnitude"] == pytest.approx(-0.4)
    assert metrics["neighborhood_accuracy"] == 0
    assert result["facts"][0]["neighborhood"]["new_logprob"] == [pytest.approx(p(0.6))]
    assert result["facts"][0]["neighborhood"]["true_logprob"] == [pytest.approx(p(0.2))]


def test_prompts_are_averaged_before_records(scored: Callable[..., dict[str, Any]]) -> None:
    facts = [fact("A", paraphrases=("P",)), fact("B", paraphrases=("Q", "R", "S"))]
    wins = {"A is a": True, "B is a": True, "P": True, "Q": True, "R": False, "S": False}
    given = {(q, "smith"): p(0.5 if won else 0.1) for q, won in wins.items()} | {(q, "doctor"): p(0.3) for q in wins}
    assert scored(facts, given)["metrics"]["paraphrase_success"] == pytest.approx((1 + 1 / 3) / 2)  # not 2 of 4


def test_prompts_of_two_facts_run_once(scored: Callable[..., dict[str, Any]]) -> None:
    facts = [fact("A", neighbors=("N",)), fact("B", neighbors=("N",))]
    given = {(q, t): p(0.3) for q in ("A is a", "B is a") for t in ("smith", "doctor")}
    given |= {("N", "smith"): p(0.1), ("N", "doctor"): p(0.4)}
    assert scored(facts, given)["metrics"]["neighborhood_success"] == 1


def test_what_is_missing_is_none(scored: Callable[..., dict[str, Any]]) -> None:
    given = {("A is a", "smith"): p(0.9), ("P", "smith"): p(0.2), ("N", "smith"): p(0.1)}
    result = scored([fact("A", true=None, paraphrases=("P",), neighbors=("N",))], given)
    metrics = result["metrics"]
    assert metrics["efficacy_accuracy"] == 1
    assert metrics["paraphrase_accuracy"] == 0
    assert [name for name, value in metrics.items() if value is not None] == [
        "efficacy_accuracy",
        "paraphrase_accuracy",
    ]
    assert metrics["score"] is None
    bare = {("A is a", "smith"): p(0.9), ("A is a", "doctor"): p(0.1)}
    metrics = scored([fact("A")], bare)["metrics"]
    assert (metrics["efficacy_success"], metrics["paraphrase_success"], metrics["score"]) == (1, None, None)
    # those that have it count, the others do not
    both = scored([fact("A"), fact("B", true=None)], bare | {("B is a", "smith"): p(0.1)})["metrics"]
    assert (both["efficacy_success"], both["efficacy_accuracy"]) == (1, 0.5)


def test_score_is_the_harmonic_mean(scored: Callable[..., dict[str, Any]]) -> None:
    one = fact("A", paraphrases=("P", "Q"), neighbors=("N", "M", "O", "L"))
    given = {(q, "doctor"): p(0.3) for q in ("A is a", "P", "Q", "N", "M", "O", "L")}
    given |= {(q, "smith"): p(0.5) for q in ("A is a", "P", "N")} | {(q, "smith"): p(0.1) for q in ("Q", "M", "O", "L")}
    assert scored([one], given)["metrics"]["score"] == pytest.approx(3 / (1 / 1 + 1 / 0.5 + 1 / 0.75))
    given |= {("P", "smith"): p(0.1)}
    assert scored([one], given)["metrics"]["score"] == 0


def test_harmonic_mean() -> None:
    assert harmonic_mean([1, 1, 1]) == 1
    assert harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([1, 0, 1]) == 0
    assert harmonic_mean([0.0]) == 0
    assert harmonic_mean([1, None, 1]) is None
    assert harmonic_mean([0, None]) is None


# refusals


def test_unknown_protocol(demo: rewire.Model) -> None:
    with pytest.raises(InputError, match=r"unknown protocol 'counterfacts'; did you mean 'counterfact'\?"):
        evaluate(demo, [fact("A")], "counterfacts")
    with pytest.raises(InputError, match="unknown protocol 'xyz'; there are counterfact"):
        evaluate(demo, [fact("A")], "xyz")


def test_a_prompt_that_is_too_long_is_named(demo: rewire.Model) -> None:
    long = "so it went on and " * demo.max_length
    with pytest.raises(InputError, match=rf"prompt 'so it went.* tokens, the model takes {demo.max_length}"):
        evaluate(demo, [fact("A", neighbors=(long,))])


def test_the_result_names_its_protocol(demo: rewire.Model) -> None:
    result = evaluate(demo, [fact("A")])
    assert result["protocol"] == "counterfact"
    assert [record["id"] for record in result["facts"]] == ["A"]
