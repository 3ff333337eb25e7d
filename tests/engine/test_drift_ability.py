"""Drift, perplexity and general ability: every number is that of plain transformers on the two models as they are."""

import copy
import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from small_models import FACTS, make

import rewire
from rewire.engine.answer_store import AnswerStore
from rewire.engine.delta import EditedWeights, Factors
from rewire.engine.evaluation import ability, drift, evaluate
from rewire.engine.facts import EditNeighbor, Fact, Probe
from rewire.kernels.errors import InputError
from weights import changed, state

TEXTS = ["You and I know the capital.", " Because of physics", "Where is it? " * 6, "a b"]


def edited(model: rewire.Model, scale: float = 0.5, times: int = 2) -> EditedWeights:
    """Random edits of two layers, applied."""
    generator = torch.Generator().manual_seed(0)
    weights = EditedWeights(model)
    for _ in range(times):
        with weights.provisional() as put:
            for layer in (1, 2):
                name, weight = model.anatomy.weight_name(layer), model.projection(layer).weight
                d_out, d_in = (len(weight.T), len(weight)) if "gpt2" in model.name else weight.shape
                left, right = torch.randn(d_out, 1, generator=generator), torch.randn(1, d_in, generator=generator)
                put(name, Factors(scale * left * weight.std().float().item(), right))
    return weights


# the unedited weights in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_originals_come_into_place_and_go(dtype: torch.dtype) -> None:
    model = make("gpt2")
    model.hf.to(dtype)
    before, name = state(model), model.fingerprint
    weights = edited(model)
    after = state(model)
    names = changed(model, before)
    assert names == {model.anatomy.weight_name(layer) for layer in (1, 2)}
    with weights.originals_in_place():
        assert changed(model, before) == set()
        assert model.fingerprint == name
        with weights.originals_in_place():
            assert changed(model, before) == set()
        assert changed(model, before) == set()
    assert changed(model, after) == set()
    with pytest.raises(KeyboardInterrupt), weights.originals_in_place():
        raise KeyboardInterrupt
    assert changed(model, after) == set()
    weights.undo_last()  # what it keeps of the weights is as it was
    weights.undo_last()
    assert changed(model, before) == set()


def test_what_breaks_on_the_way_in_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    weights = edited(model)
    after = state(model)
    find, calls = weights._parameter, []

    def second_fails(name: str) -> Any:
        calls.append(name)
        if len(calls) == 4:  # the first weight is read and written, the second is read
            raise MemoryError
        return find(name)

    monkeypatch.setattr(weights, "_parameter", second_fails)
    with pytest.raises(MemoryError), weights.originals_in_place():
        pytest.fail("it did not come to this")
    assert changed(model, after) == set()


# drift


@torch.no_grad()
def plain_logprobs(model: rewire.Model, text: str) -> tuple[list[int], list[list[float]]]:
    """(ids, natural logarithms of the next token's probabilities at each position)."""
    ids = model.tokenizer(text)["input_ids"]
    return ids, model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1).tolist()


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def plain_drift(before: rewire.Model, after: rewire.Model, text: str) -> dict[str, list[float]]:
    """Each number at each position that predicts a token."""
    ids, p = plain_logprobs(before, text)
    _, q = plain_logprobs(after, text)
    pairs = list(zip(p[:-1], q[:-1], strict=True))
    return {
        "kl_unedited_edited": [kl(a, b) for a, b in pairs],
        "kl_edited_unedited": [kl(b, a) for a, b in pairs],
        "total_variation": [
            sum(max(0.0, math.exp(x) - math.exp(y)) for x, y in zip(a, b, strict=True)) for a, b in pairs
        ],
        "top1_agreement": [float(a.index(max(a)) == b.index(max(b))) for a, b in pairs],
        "nll_unedited": [-a[token] for a, token in zip(p, ids[1:], strict=False)],
        "nll_edited": [-b[token] for b, token in zip(q, ids[1:], strict=False)],
    }


def average(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_drift_against_the_two_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family)
    model.hf.double()
    before = copy.deepcopy(model)
    weights = edited(model)
    kept = state(model)
    texts = [plain_drift(before, model, text) for text in TEXTS]
    probes = (Probe("Where is it? ", "x"), Probe("I know", "x"))
    used = EditNeighbor("Danielle Darrieux", FACTS[1].prompt, "French")
    facts = [
        replace(FACTS[0], locality=probes, neighbors=("You and", FACTS[1].question)),
        replace(FACTS[2], locality=probes[:1], edit_neighbors=(used,)),
        replace(FACTS[1]),
    ]

    def last(prompt: str) -> float:
        return kl(plain_logprobs(before, prompt)[1][-1], plain_logprobs(model, prompt)[1][-1])

    wanted: dict[str, float] = {}
    for name in drift.PER_POSITION:
        wanted[name] = average([value for text in texts for value in text[name]])
    assert wanted["kl_unedited_edited"] > 1e-3
    assert 0 < wanted["top1_agreement"] < 1
    for side in ("unedited", "edited"):
        wanted[f"perplexity_{side}"] = average([math.exp(average(text[f"nll_{side}"])) for text in texts])
    of_facts = [average([last("Where is it?"), last("I know"), last("You and")]), last("Where is it?")]
    wanted["locality_kl"] = average(of_facts)
    for size, head, group in ((1, 256, 16384), (7, 3, 10), (64, 256, 20), (None, 256, 16384)):
        monkeypatch.setattr(drift, "HEAD_ROWS", head)
        monkeypatch.setattr(drift, "GROUP", group)
        seen: list[tuple[int, int]] = []
        asked: dict[str, Any] = {"texts": TEXTS, "weights": weights, "batch_size": size}
        found = evaluate(model, facts, "drift", progress=lambda *now, s=seen: s.append(now), **asked)
        # Gemma's norms compute in float32, whatever the model is in
        assert found["metrics"] == pytest.approx(wanted, rel=1e-6 if family == "gemma2" else 1e-9, abs=1e-12)
        assert changed(model, kept) == set()
        assert seen[-1] == (7, 7)
    records = found["facts"]
    assert [record["id"] for record in records] == [*(f"text {n}" for n in (1, 2, 3, 4)), *(fact.id for fact in facts)]
    for record, text in zip(records, texts, strict=False):
        assert record["token_count"] == len(text["nll_edited"])
        assert record["total_variation"] == pytest.approx(average(text["total_variation"]))
        assert record["perplexity_edited"] == pytest.approx(math.exp(average(text["nll_edited"])))
    assert [record["locality_kl"] for record in records[4:]] == [*map(pytest.approx, of_facts), None]
    assert set(found["definitions"]) == set(found["metrics"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_perplexities_of_drift_are_those_of_the_protocol() -> None:
    model = make("llama")
    before = evaluate(model, [], "perplexity", texts=TEXTS)["metrics"]["perplexity"]
    weights = edited(model)
    after = evaluate(model, [], "perplexity", texts=TEXTS)["metrics"]["perplexity"]
    found = evaluate(model, [], "drift", texts=TEXTS, weights=weights)["metrics"]
    assert found["perplexity_unedited"] == pytest.approx(before, rel=1e-5)
    assert found["perplexity_edited"] == pytest.approx(after, rel=1e-5)
    assert found["locality_kl"] is None


def test_of_no_edit_there_is_none() -> None:
    model = make("gpt2")
    facts = [replace(FACTS[0], locality=(Probe("I know", "x"),))]
    for weights in (EditedWeights(model), edited(model, 0.0)):
        found = evaluate(model, facts, "drift", texts=TEXTS, weights=weights)["metrics"]
        assert found["kl_unedited_edited"] == found["kl_edited_unedited"] == found["locality_kl"] == 0
        assert (found["total_variation"], found["top1_agreement"]) == (0, 1)
        assert found["perplexity_unedited"] == found["perplexity_edited"]


def test_what_fails_inside_leaves_the_edited_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    weights = edited(model)
    kept, calls, read = state(model), [], drift.final_hidden

    def fails(*args: Any) -> Any:
        calls.append(changed(model, kept))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(drift, "final_hidden", fails)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, [], "drift", texts=TEXTS, weights=weights)
    assert [len(names) for names in calls] == [0, 2]
    assert changed(model, kept) == set()


@pytest.mark.parametrize("protocol", ["drift", "perplexity"])
def test_what_was_interrupted_goes_on(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    options = {"weights": edited(model)} if protocol == "drift" else {}
    plain = evaluate(model, [], protocol, texts=TEXTS, batch_size=1, **options)
    monkeypatch.setattr(drift, "GROUP", 1)  # a text at a time
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), AnswerStore(tmp_path / "x") as store:
        evaluate(model, [], protocol, None, stop, texts=TEXTS, batch_size=1, store=store, **options)
    assert seen == [1, 2]
    seen.clear()
    with AnswerStore(tmp_path / "x") as store:
        assert len(store.known) == 2
        again = evaluate(
            model,
            [],
            protocol,
            None,
            lambda done, _: seen.append(done),
            texts=TEXTS,
            batch_size=1,
            store=store,
            **options,
        )
    assert seen == [3, 4]  # the others alone
    numbers = {name: value for name, value in plain["metrics"].items() if value is not None}
    assert numbers
    assert {name: again["metrics"][name] for name in numbers} == pytest.approx(
        numbers, rel=1e-5
    )  # float32, other chunks


def test_what_drift_refuses() -> None:
    model = make("gpt2")
    weights = edited(model)
    plain: list[Fact] = FACTS
    with pytest.raises(InputError, match=r"drift: nothing given as weights; expected what Delta.apply gave"):
        evaluate(model, plain, "drift", texts=TEXTS)
    with pytest.raises(InputError, match="drift: another model's given as weights"):
        evaluate(make("gpt2"), plain, "drift", texts=TEXTS, weights=weights)
    with pytest.raises(InputError, match="drift: none given as texts"):
        evaluate(model, plain, "drift", weights=weights)
    with pytest.raises(InputError, match="drift: a single text given as texts"):
        evaluate(model, plain, "drift", texts="a text", weights=weights)
    with pytest.raises(InputError, match=r"text 2 of 2 \('and and .*cut it"):
        evaluate(model, plain, "drift", texts=["a b", "and " * 120], weights=weights)
    long = replace(FACTS[0], locality=(Probe("and " * 120, "x"),))
    with pytest.raises(InputError, match=r"prompt 'and and .* tokens, expected 1 to 96"):
        evaluate(model, [long], "drift", weights=weights)
    found = evaluate(model, [replace(FACTS[0], locality=(Probe("I know", "x"),))], "drift", weights=weights)
    assert found["metrics"]["locality_kl"] > 0
    assert found["metrics"]["kl_unedited_edited"] is found["metrics"]["perplexity_edited"] is None
    with pytest.raises(InputError, match=r"drift measures the weights as they are, 1 deltas beside them given"):
        evaluate(model, FACTS[:1], "drift", texts=TEXTS, weights=weights, deltas=[{}])


# perplexity


def test_perplexity_against_the_models_own_loss() -> None:
    model = make("llama")
    model.hf.double()
    nlls = [plain_drift(model, model, text)["nll_edited"] for text in TEXTS]
    for size in (1, 7, 64):
        found = evaluate(model, FACTS, "perplexity", texts=TEXTS, batch_size=size)
        assert found["metrics"] == {
            "perplexity": pytest.approx(average([math.exp(average(nll)) for nll in nlls]), rel=1e-5),
            "perplexity_tokens": pytest.approx(math.exp(average([value for nll in nlls for value in nll])), rel=1e-5),
        }
        assert [record["token_count"] for record in found["facts"]] == list(map(len, nlls))
    published = evaluate(model, [], "perplexity", texts=TEXTS[:1], compat=True)["metrics"]["perplexity"]
    assert published == pytest.approx(math.exp(sum(nlls[0]) / (len(nlls[0]) + 1)), rel=1e-5)
    for texts in ((), []):
        with pytest.raises(InputError, match="perplexity: none given as texts"):
            evaluate(model, FACTS, "perplexity", texts=texts)
    with pytest.raises(InputError, match="perplexity: none given as texts"):
        evaluate(model, FACTS, "perplexity")
    with pytest.raises(InputError, match=r"perplexity measures the weights as they are"):
        evaluate(model, FACTS[:1], "perplexity", texts=TEXTS, deltas=[{}])


# general ability

PLACES = ["Aracataca", "Tokyo", "Bogota", "Kyoto", "Cali", "Osaka", "Medellin", "Nagoya", "Leticia"]
CHOICES = ["Japan", "Colombia", "physics"]
harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (rewire[eval])")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A task of some questions, all of it in files here; without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def write(name: str) -> Path:
        data = tmp_path / f"{name}.jsonl"
        docs = [{"question": f"Where is {w}?", "choices": CHOICES, "answer": i * i % 3} for i, w in enumerate(PLACES)]
        data.write_text("\n".join(map(json.dumps, docs)))
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{question}} It is in",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        return path

    return write


@torch.no_grad()
def plain_accuracy(model: rewire.Model, places: list[str]) -> float:
    right = []
    for number, place in enumerate(places):
        scores = []
        for choice in CHOICES:
            prompt = f"Where is {place}? It is in"
            ids = model.tokenizer(f"{prompt} {choice}")["input_ids"]
            logp = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(model.tokenizer(prompt)["input_ids"])
            scores.append(sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))))
        right.append(float(scores.index(max(scores)) == number * number % 3))
    return average(right)


@harness
def test_ability_of_the_model_in_memory(task: Callable[[str], Path]) -> None:
    paths = [task("places"), task("more_places")]
    found = []
    model = make("gpt2")
    edits = edited(model, 3.0)
    random_states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    for _ in range(2):
        kept = state(model)
        report = evaluate(model, [], "ability", tasks=paths, batch_size=2)
        assert report["metrics"] == {
            "places/acc": pytest.approx(plain_accuracy(model, PLACES)),
            "more_places/acc": pytest.approx(plain_accuracy(model, PLACES)),
        }
        assert [record["id"] for record in report["facts"]] == ["places", "more_places"]
        assert report["facts"][0]["acc_stderr"] > 0
        assert changed(model, kept) == set()
        found.append(report["metrics"]["places/acc"])
        edits.undo_last()
        edits.undo_last()
        edits = edited(model, 0.0)
    assert found[0] != found[1]  # or it would show nothing
    assert random.getstate() == random_states[0]
    assert numpy.random.get_state()[1].tolist() == random_states[1]
    assert torch.equal(torch.get_rng_state(), random_states[2])
    assert model.tokenizer.pad_token is None
    some = evaluate(model, [], "ability", tasks=[str(paths[0])], limit=4)
    assert some["metrics"]["places/acc"] == pytest.approx(plain_accuracy(model, PLACES[:4]))


@harness
def test_tasks_that_are_not_there(task: Callable[[str], Path], tmp_path: Path) -> None:
    model = make("gpt2")
    with pytest.raises(InputError, match=r"none\.yaml: no such file, expected a task"):
        evaluate(model, [], "ability", tasks=[tmp_path / "none.yaml"])
    broken = task("broken")
    (tmp_path / "broken.jsonl").unlink()
    with pytest.raises(InputError, match=r"task .*broken\.yaml: it, or its data, cannot be loaded"):
        evaluate(model, [], "ability", tasks=[broken])


def test_ability_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"needs lm-eval .*: pip install 'rewire\[eval\]'"):
        evaluate(model, [], "ability")
    for tasks in ([], "sst2"):
        with pytest.raises(InputError, match="expected a list of names or YAML files"):
            evaluate(model, [], "ability", tasks=tasks)
    with pytest.raises(InputError, match="ability measures the weights as they are"):
        evaluate(model, FACTS[:1], "ability", deltas=[{}])


def test_metrics_are_flat() -> None:
    found = ability._flat(
        {
            "results": {
                "mmlu": {"alias": "mmlu"},
                "sums": {"alias": "sums", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "f1,none": 1},
                "words": {"acc,none": numpy.float64(0.25), "acc_stderr,none": "N/A", "sample_len": 4},
            },
            "groups": {"mmlu": {"acc,none": 0.75, "alias": "mmlu"}},
            "n-shot": {"sums": 5},
            "n-samples": {"sums": {"original": 100, "effective": 10}},
            "lm_eval_version": "0.4",
        }
    )
    assert found["metrics"] == {"mmlu/acc": 0.75, "sums/exact_match,strict": 0.5, "sums/f1": 1.0, "words/acc": 0.25}
    assert found["facts"] == [
        {"id": "mmlu", "acc": 0.75},
        {"id": "sums", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "f1": 1.0},
        {"id": "words", "acc": 0.25},
    ]
    assert found["definitions"] == {
        "mmlu/acc": "acc on mmlu (lm-evaluation-harness 0.4)",
        "sums/exact_match,strict": "exact_match,strict on sums, 5-shot, 10 documents (lm-evaluation-harness 0.4)",
        "sums/f1": "f1 on sums, 5-shot, 10 documents (lm-evaluation-harness 0.4)",
        "words/acc": "acc on words (lm-evaluation-harness 0.4)",
    }
