"""Facts edited each alone, in one batch: each update is that of an edit of the fact on the clean model, and what is
measured under it is what is measured with it written."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CONTEXTS, FACTS, WORDS, make
from torch import Tensor

import rewire
from rewire.engine.delta import Update
from rewire.engine.editors.names import METHODS
from rewire.engine.evaluation import evaluate
from rewire.engine.facts import EditNeighbor, Probe, Ripple
from rewire.engine.objective import ATTENTION
from rewire.kernels.errors import InputError
from weights import changed, state

CLOSE = 1e-4  # relative Frobenius: values in a batch are those of one alone to rounding
HPARAMS: dict[str, Any] = {
    "v_num_grad_steps": 4,
    "v_lr": 0.5,
    "clamp_norm_factor": 2.0,
    "mom2_update_weight": 10.0,
    "mom2_tokens": 1000,
    "mom2_seed": None,
}
NEIGHBORS = (EditNeighbor("Aracataca", "{} worked in the area of", "English"),)
TOLD = ("asked_residual", "achieved", "nll_before", "nll_with_delta")


@pytest.fixture(autouse=True)
def values_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one way found is not what the other reads from the disk."""
    monkeypatch.setattr(rewire.EditSession, "_value_folder", lambda *args: None)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    chosen = random.Random(0)
    path.write_text("\n\n".join(" ".join(chosen.choices(WORDS, k=chosen.randint(1, 20))) for _ in range(120)))
    return path


def session_of(model: rewire.Model, method: str, corpus: Path, **more: Any) -> rewire.EditSession:
    # of GPT-J the lowest layer's MLP reads single words, too few for a C of full rank: rounding of keys decides there
    layers = (2,) if "rome" in method else (1, 2) if model.name == "gptj" else (0, 1, 2)
    null = {"nullspace_threshold": 0.5, "L2": 1.0} if method == "alphaedit" else {}
    hparams = HPARAMS | {"layers": layers} | null | more.pop("hparams", {})
    return rewire.EditSession(model, method, corpus=corpus, contexts=CONTEXTS, hparams=hparams, **more)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check_alone(session: rewire.EditSession, facts: Sequence[rewire.Fact]) -> list[Update]:
    model = session.model
    before = state(model)
    singles = session.edit_each(facts)
    assert changed(model, before) == set()
    assert not session.edits
    assert len(singles.updates) == len(singles.report["facts"]) == len(facts)
    for fact, update, told in zip(facts, singles.updates, singles.report["facts"], strict=True):
        edit = session.edit([fact], evaluate=False)
        wanted = session.weights.updates[-1]
        session.undo(edit.id)
        assert update.keys() == wanted.keys()
        for name, factors in update.items():
            assert factors.right is not None
            assert factors.rank == 1
            assert relative(factors.dense(), wanted[name].dense()) < CLOSE, name
        for name in TOLD:
            assert told[name] == pytest.approx(edit.report["facts"][0][name], rel=1e-3, abs=1e-4), name
    assert changed(model, before) == set()
    return singles.updates


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gemma2"])
def test_as_an_edit_of_each_on_the_clean_model(family: str, method: str, corpus: Path) -> None:
    check_alone(session_of(make(family), method, corpus), FACTS)


def test_attention_and_neighbours_too(corpus: Path) -> None:
    model = make("gpt2")
    both = [model.anatomy.layer_name(0, part).replace(".0.", ".{}.") for part in ("mlp", ATTENTION)]
    beside = [replace(fact, edit_neighbors=NEIGHBORS) for fact in FACTS[:2]]
    hparams = {"rewrite_module_tmps": both}
    updates = check_alone(session_of(model, "pmet", corpus, hparams=hparams, neighbors=True), beside)
    assert len(updates[0]) == 6
    check_alone(session_of(model, "emmet", corpus, hparams={"emmet_lambda": 0.0, "update_norm_lambda": 0.5}), FACTS[:2])
    check_alone(session_of(model, "rome", corpus, hparams={"mom2_adjustment": False}), FACTS[:2])


def test_a_fact_in_a_batch_of_one_and_twice_in_one(corpus: Path) -> None:
    model = make("llama")
    session = session_of(model, "memit", corpus)
    (one,) = session.edit_each(FACTS[:1]).updates
    several = session.edit_each([FACTS[1], FACTS[0], FACTS[0]]).updates
    for update in several[1:]:
        for name, factors in one.items():
            assert relative(update[name].dense(), factors.dense()) < CLOSE


def test_of_a_session_that_has_edited_it_is_refused(corpus: Path) -> None:
    model = make("llama")
    for method in ("memit", "memit-history", "rome"):
        session = session_of(model, method, corpus)
        edit = session.edit(FACTS[:1], evaluate=False)
        after = state(model)
        with pytest.raises(InputError, match="this session has edits; begin a new one"):
            session.edit_each(FACTS[1:])
        assert changed(model, after) == set()
        session.undo(edit.id)
        assert len(session.edit_each(FACTS[1:]).updates) == 2


def test_a_model_whose_numbers_are_none_is_refused(corpus: Path) -> None:
    model = make("llama")
    session = session_of(model, "memit", corpus)
    session.edit_each(FACTS[:1])  # statistics are there
    with torch.no_grad():
        model.hf.get_parameter(model.anatomy.weight_name(2))[3, 3] = torch.nan
    before = state(model)
    with pytest.raises(InputError):
        session.edit_each(FACTS[:1])
    assert changed(model, before) == set()


PROBES = (Probe("Where is the capital of Japan? It is in", "English"), Probe("Because of physics, you", "and I"))
ASKED = [
    replace(
        fact,
        id=str(number),
        paraphrases=(f"You know that {fact.question}", f"The end. {fact.question}"),
        neighbors=tuple(other.question for other in FACTS if other is not fact),
        locality=PROBES,
        ripples=(Ripple("Compositionality_I", f"I know {fact.subject} and", ("music", "art")),),
    )
    for number, fact in enumerate(FACTS)
]


def one_by_one(model: rewire.Model, updates: Sequence[Update], protocol: str, unedited: Any, **more: Any) -> list[Any]:
    """The record of each fact with its own update written, and the weights put back."""
    kept = {name: weight.detach().clone() for name, weight in model.hf.state_dict().items()}
    records = []
    for fact, update in zip(ASKED, updates, strict=True):
        with torch.no_grad():
            for name, factors in update.items():
                weight, change = model.hf.get_parameter(name), factors.dense()
                weight.add_(change.T if "c_proj" in name else change)
        given = {"unedited": {**unedited, "facts": [unedited["facts"][int(fact.id)]]}} if unedited else {}
        records += evaluate(model, [fact], protocol, **more, **given)["facts"]
        model.hf.load_state_dict(kept)
    return records


def same(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list | tuple) and not isinstance(wanted, str):
        assert len(found) == len(wanted), where
        for number, value in enumerate(wanted):
            same(found[number], value, f"{where}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_measured_under_each_as_with_each_written(family: str, corpus: Path) -> None:
    model = make(family)
    hparams = {"mom2_update_weight": 0.1, "clamp_norm_factor": 8.0}  # so that answers change
    updates = session_of(model, "memit", corpus, hparams=hparams).edit_each(ASKED).updates
    model.hf.double()
    before = state(model)
    moved = 0
    for protocol, more in (
        ("counterfact", {}),
        ("synthetic", {"locality": 3}),
        ("wild", {"locality": 2, "limit": 8, "context": "question-only"}),
        ("wild", {"truncation": "gold"}),
    ):
        plain = evaluate(model, ASKED, protocol, **more)
        given = {} if protocol == "counterfact" else {"unedited": plain}
        wanted = one_by_one(model, updates, protocol, given.get("unedited"), **more)
        for size in (None, 1):
            found = evaluate(model, ASKED, protocol, deltas=updates, batch_size=size, **more, **given)
            same(found["facts"], wanted, protocol)
        moved += found["facts"] != plain["facts"] if protocol == "counterfact" else _differ(found, plain)
    assert moved >= 3  # the edits are no trifle
    assert changed(model, before) == set()
    with pytest.raises(InputError, match="2 deltas for 3 facts; expected one each"):
        evaluate(model, ASKED, "synthetic", deltas=updates[:2])


def _differ(found: Any, plain: Any) -> bool:
    """Whether some token is another one."""
    kinds = ("rewrite", "rephrase", "locality", "locality_output", "rewrite_acc")

    def tokens(record: Any) -> list[Any]:
        of = [record[kind] for kind in kinds if kind in record]
        return [[a["ids"] for a in each] if each and isinstance(each[0], dict) else each for each in of]

    return [tokens(record) for record in found["facts"]] != [tokens(record) for record in plain["facts"]]
