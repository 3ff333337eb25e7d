"""The UnderEdit protocol: every number is that of plain transformers, one prompt at a time without batches."""

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FACTS, make

import rewire
from rewire.engine import asked, scores
from rewire.engine.asked import Asked
from rewire.engine.evaluation import evaluate
from rewire.engine.evaluation.perplexity import perplexities
from rewire.engine.evaluation.underedit import score
from rewire.engine.facts import EditNeighbor, Fact, Probe
from rewire.kernels.errors import InputError


@functools.lru_cache(maxsize=500)
@torch.no_grad()
def plain(model: rewire.Model, prompt: str, target: str) -> tuple[list[int], list[int], list[float]]:
    """(labels, most probable ids, log-probabilities of the labels) of the target's tokens."""
    prompt = prompt.rstrip()
    start = len(model.tokenizer(prompt)["input_ids"])
    ids = model.tokenizer(f"{prompt} {target}")["input_ids"]
    logp = model.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    places = range(start, len(ids))
    return ids[start:], [int(logp[i - 1].argmax()) for i in places], [float(logp[i - 1, ids[i]]) for i in places]


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def plain_record(model: rewire.Model, before: rewire.Model, fact: Fact) -> dict[str, Any]:
    """What the protocol says of one fact; the acc of neighbours against `before`."""

    def acc(prompt: str, target: str) -> float:
        labels, best, _ = plain(model, prompt, target)
        return average([float(a == b) for a, b in zip(labels, best, strict=True)])

    def success(prompt: str, wanted: str, other: str) -> float:
        return float(average(plain(model, prompt, wanted)[2]) > average(plain(model, prompt, other)[2]))

    def ppl(prompts: list[str]) -> float:
        return math.exp(-average([lp for prompt in prompts for lp in plain(model, prompt, fact.target_new)[2]]))

    new, true = fact.target_new, fact.target_true
    neighbors = [(prompt, true) for prompt in fact.neighbors if true is not None]
    probes = [(probe.prompt, probe.target) for probe in fact.locality]
    now = [plain(model, *pair)[1] for pair in neighbors + probes]
    then = [plain(before, *pair)[1] for pair in neighbors + probes]
    stays = [[float(a == b) for a, b in zip(*pair, strict=True)] for pair in zip(now, then, strict=True)]
    record: dict[str, Any] = {"id": fact.id}
    for kind, prompts in (("efficacy", [fact.question]), ("generalization", list(fact.paraphrases))):
        record[kind] = {
            "acc": [acc(prompt, new) for prompt in prompts],
            "success": [] if true is None else [success(prompt, new, true) for prompt in prompts],
        }
    record["specificity"] = {
        "output": now,
        "success": [success(prompt, target, new) for prompt, target in neighbors + probes],
        "acc": [min(row) for row in stays[: len(neighbors)]] + [average(row) for row in stays[len(neighbors) :]],
    }
    record["rewrite_ppl"] = ppl([fact.question])
    record["rephrase_ppl"] = ppl(list(fact.paraphrases)) if fact.paraphrases else None
    return record


def disturbed(model: rewire.Model, scale: float) -> rewire.Model:
    """The same with weights moved so far that some answers change and some stay."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (1, 2):
            weight = other.projection(layer).weight
            weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def facts_of(shared: Path, kind: str) -> list[Fact]:
    """Records of which the small models know the truth, in two sorts; some lack what others have."""
    data = shared / "data"
    if kind == "zsre":
        return rewire.read_facts(data / "zsre_subset_0.json", 12, "zsre")
    facts = rewire.read_facts(data / "mcf_subset_1.json", 5)
    facts[1] = replace(facts[1], target_true=None)
    facts[2] = replace(facts[2], paraphrases=(), neighbors=())
    facts[3] = replace(facts[3], neighbors=facts[0].neighbors, locality=(Probe("Who wrote Faust? It was", "Goethe"),))
    return facts


@pytest.mark.parametrize("kind", ["mcf", "zsre"])
def test_against_a_plain_evaluator(known: rewire.Model, shared: Path, kind: str) -> None:
    facts = facts_of(shared, kind)
    edited = disturbed(known, 3.0 if kind == "zsre" else 0.6)
    texts = ["Regions and cities of Australia", " It was late."]
    before = evaluate(known, facts, "underedit", 200, texts=texts)
    after = evaluate(edited, facts, "underedit", 200, unedited=before, texts=texts)
    wanted = [plain_record(edited, known, fact) for fact in facts]
    for record, expected in zip(after["facts"], wanted, strict=True):
        assert record == {
            key: pytest.approx(value, rel=1e-4) if key.endswith("_ppl") and value else value
            for key, value in expected.items()
        }
    stays = [acc for record in wanted for acc in record["specificity"]["acc"]]
    assert 0 < sum(stays) < len(stays)  # or it would show nothing

    metrics = after["metrics"]
    for kind_ in ("efficacy", "generalization", "specificity"):
        for name in ("acc", "success"):
            found = [average(record[kind_][name]) for record in wanted if record[kind_][name]]
            assert metrics[f"{kind_}_{name}"] == (pytest.approx(average(found)) if found else None)
    for name in ("rewrite_ppl", "rephrase_ppl"):
        found = [record[name] for record in wanted if record[name] is not None]
        assert metrics[name] == pytest.approx(average(found), rel=1e-4)
    assert metrics["me_ppl"] == pytest.approx(average(perplexities(Asked(edited), texts)))
    assert (metrics["score_success"] is None) == (kind == "zsre")  # nothing to hold the answer against

    assert before["metrics"]["specificity_acc"] is before["metrics"]["score_acc"] is None
    assert all("acc" not in record["specificity"] for record in before["facts"])
    assert json.loads(json.dumps(after, allow_nan=False)) == after


def test_an_unchanged_model_is_stable_in_any_batches(known: rewire.Model, shared: Path) -> None:
    facts = facts_of(shared, "mcf")
    before = evaluate(known, facts, "underedit", 60)
    again = evaluate(known, facts, "underedit", 5000, unedited=json.loads(json.dumps(before)))
    assert again["metrics"]["specificity_acc"] == 1
    assert again["metrics"]["efficacy_success"] == 0  # it says the true objects
    assert again["metrics"]["score_success"] == 0
    published = evaluate(known, facts, "underedit", compat=True)["metrics"]  # of GPT-2 at shifted positions
    rates = [published[f"{kind}_success"] for kind in ("efficacy", "generalization", "specificity")]
    assert published["score_success"] == pytest.approx(score([rate for rate in rates if rate], compat=True))


def test_texts_under_deltas_are_refused() -> None:
    model = make("llama")
    with pytest.raises(InputError, match="measures the weights as they are, 1 deltas beside them given"):
        evaluate(model, FACTS[:1], "underedit", deltas=[{}], texts=["The old man."])


def test_each_pair_runs_once_and_the_head_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    fact = replace(FACTS[0], paraphrases=(FACTS[0].question, FACTS[1].question), neighbors=(FACTS[1].question,) * 3)
    rows: list[int] = []
    scored = scores.token_scores

    def counted(model: Any, of: Any, *more: Any, **named: Any) -> Any:
        rows.append(len(of))
        return scored(model, of, *more, **named)

    monkeypatch.setattr(asked, "token_scores", counted)
    heads: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (heads.append(len(hidden)), logits(hidden))[1])
    seen: list[tuple[int, int]] = []
    report = evaluate(model, [fact, replace(fact, id="twin")], "underedit", 30, lambda *now: seen.append(now))
    assert rows == [4]  # two prompts, two objects
    assert seen[-1] == (4, 4)
    labels = [len(plain(model, f.question, target)[0]) for f in FACTS[:2] for target in ("music and art", "physics")]
    assert sum(heads) == sum(labels)
    twins = [{key: value for key, value in record.items() if key != "id"} for record in report["facts"]]
    assert twins[0] == twins[1]
    assert len(twins[0]["specificity"]["output"]) == 3


def test_portions_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    rows = [scores.Row(tuple(range(5, 5 + n)), labels=tuple(range(6, 6 + n))) for n in (7, 1, 12, 3)]
    whole = scores.token_scores(model, rows)
    monkeypatch.setattr(scores, "HEAD_ROWS", 2)
    for one, other in zip(whole, scores.token_scores(model, rows, batch_tokens=8), strict=True):
        assert (one.labels, one.best) == (other.labels, other.best)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_edit_time_neighbours_do_not_count() -> None:
    model = make("gpt2")
    used = EditNeighbor("Danielle Darrieux", FACTS[1].prompt, "French")
    first = replace(FACTS[0], neighbors=(FACTS[1].question, FACTS[2].question))
    second = replace(FACTS[2], neighbors=(FACTS[1].question,), edit_neighbors=(used,))
    alone, both = evaluate(model, [first], "underedit"), evaluate(model, [first, second], "underedit")
    assert len(alone["facts"][0]["specificity"]["output"]) == 2
    assert [len(record["specificity"]["output"]) for record in both["facts"]] == [1, 0]


def test_one_token_that_moves_is_all_of_a_neighbour_and_its_part_of_a_probe() -> None:
    model = make("gpt2")
    answer = "music and art"  # several tokens
    fact = replace(FACTS[1], target_true=answer, neighbors=(FACTS[1].question,) * 2)
    fact = replace(fact, locality=(Probe(FACTS[2].question, answer),))
    before = evaluate(model, [fact], "underedit")
    first, _, probe = before["facts"][0]["specificity"]["output"]
    assert min(len(first), len(probe)) > 1
    first[-1] += 1  # as if the unedited model had said something else
    probe[0] += 1
    found = evaluate(model, [fact], "underedit", unedited=before)["facts"][0]["specificity"]["acc"]
    assert found == [0.0, 1.0, (len(probe) - 1) / len(probe)]


def test_scores() -> None:
    assert score([0.5, 1.0, 1.0], False) == score([0.5, 1.0, 1.0], True) == pytest.approx(0.75)
    assert score([0.0, 0.5, 1.0], False) == 0
    assert score([0.0, 0.5, 1.0], True) == pytest.approx(2 / 3)
    assert score([0.0, 0.0, 0.0], True) == 0
    assert score([0.0, None, 1.0], True) is score([0.0, None, 1.0], False) is None


def test_what_is_refused() -> None:
    model = make("gpt2")
    fact = replace(FACTS[0], neighbors=(FACTS[1].question,))
    for facts in (FACTS[1:2], [replace(fact, neighbors=())]):
        with pytest.raises(InputError, match=f"fact {fact.id}: .*evaluate the unedited model on the same facts"):
            evaluate(model, [fact], "underedit", unedited=evaluate(model, facts, "underedit"))
    long = replace(FACTS[0], paraphrases=("and " * 120,))
    with pytest.raises(InputError, match=r"prompt 'and and .*tokens, the model takes 96"):
        evaluate(model, [long], "underedit")
    with pytest.raises(InputError, match="did you mean 'underedit'"):
        evaluate(model, [fact], "overedit")


@torch.no_grad()
def padded_left(model: rewire.Model, pairs: list[tuple[str, str]]) -> list[float]:
    """Mean log-probability of each object in a batch as published: padded on the left, positions counted through it."""
    tokenizer: Any = model.tokenizer
    coded = [tokenizer(f"{prompt} {target}")["input_ids"] for prompt, target in pairs]
    longest, found = max(map(len, coded)), []
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in coded])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in coded])
    at = torch.arange(longest)[None].expand(len(coded), -1)
    logp = model.hf(input_ids=ids, attention_mask=mask, position_ids=at).logits.log_softmax(-1)
    for row, (tokens, (prompt, _)) in enumerate(zip(coded, pairs, strict=True)):
        places = range(len(tokenizer(prompt)["input_ids"]), len(tokens))
        values = [float(logp[row, longest - len(tokens) + place - 1, tokens[place]]) for place in places]
        found.append(sum(values) / len(values))
    return found


def test_gpt2s_padding_as_published(shared: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published code pads GPT-2's batches on the left and gives no positions: under `compat` alone."""
    model = load(shared / "models" / "cf-gpt2")
    facts = rewire.read_facts(shared / "data" / "mcf_subset_1.json", 2)
    found: dict[tuple[str, str, int], float] = {}
    answers = asked.Asked.answers

    def watch(self: Any, wanted: Any, progress: Any = lambda done, total: None, begins: Any = ()) -> Any:
        result = answers(self, wanted, progress, begins)
        for (_, prompt, target), answer, first in zip(wanted, result, begins or [0] * len(wanted), strict=True):
            found[prompt, target, first] = answer.mean_logprob
        return result

    monkeypatch.setattr(asked.Asked, "answers", watch)
    evaluate(model, facts, "underedit")
    assert {first for *_, first in found} == {0}
    evaluate(model, facts, "underedit", compat=True)
    moved = 0.0
    for fact in facts:
        for target in (fact.target_new, str(fact.target_true)):
            pairs = [(prompt, target) for prompt in fact.neighbors]
            lengths = [len(model.tokenizer(f"{prompt} {target}")["input_ids"]) for prompt in fact.neighbors]
            for prompt, length, value in zip(fact.neighbors, lengths, padded_left(model, pairs), strict=True):
                first = max(lengths) - length
                assert found[prompt, target, first] == pytest.approx(value, abs=1e-4)
                moved = max(moved, abs(value - found[prompt, target, 0]))
    assert moved > 1e-2  # it does change what is measured
