"""Sessions: an edit is whole or not at all, is taken back bit for bit, and says what it did."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from rewire.engine import session as session_module
from rewire.engine.decoding import continuations
from rewire.engine.delta import Delta, Factors
from rewire.engine.editors import memit
from rewire.engine.facts import Fact, InvalidFact
from rewire.engine.model import demo_file
from rewire.kernels.errors import InputError
from rewire.kernels.requantize_add import requantize_add
from rewire.kernels.spd_solve import SolveError
from weights import CONTEXTS, FAST, changed, equal, session_on, state


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=5)


# edit and undo


def test_an_edit_changes_the_edited_projections_only(demo: rewire.Model, facts: list[Fact]) -> None:
    before = state(demo)
    edit = session_on(demo).edit(facts)
    assert changed(demo, before) == {"model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    assert all(after["nll_with_delta"] < after["nll_before"] for after in edit.report["facts"])
    assert all(0 < layer["relative_change"] < 1 for layer in edit.report["layers"])


def test_an_edit_does_what_its_factors_say(demo: rewire.Model, facts: list[Fact]) -> None:
    before = state(demo)
    session = session_on(demo)
    session.edit(facts[:2], evaluate=False)
    session.edit(facts[2:4], evaluate=False)
    first, second = session.delta.updates
    for name in first:
        left, right = first[name].left, first[name].right
        assert (left.shape, right.shape) == ((demo.anatomy.d_model, 2), (2, demo.anatomy.d_in))  # one a fact
        assert torch.equal(demo.hf.state_dict()[name], before[name] + left @ right + second[name].dense())


def test_undo_is_bit_for_bit(demo: rewire.Model, facts: list[Fact]) -> None:
    before = state(demo)
    session = session_on(demo)
    first = session.edit(facts[:2], evaluate=False)
    between = state(demo)
    second = session.edit(facts[2:4], evaluate=False)
    assert changed(demo, between)
    session.undo(second.id)
    assert changed(demo, between) == set()
    session.undo(first.id)
    assert changed(demo, before) == set()
    assert session.edits == []
    again = session.edit(facts[:2], evaluate=False)
    assert again.id != first.id
    assert changed(demo, between) == set()


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_a_float64_model_stays_one(demo: rewire.Model, facts: list[Fact], method: str) -> None:
    demo.hf.double()
    before = state(demo)
    session = rewire.EditSession(demo, method, contexts=CONTEXTS)
    edit = session.edit(facts[:2])
    assert edit.report["after"]["efficacy_success"] == 1
    ((name, factors), *_) = session.weights.updates[0].items()
    change = (demo.hf.state_dict()[name] - before[name]).double()
    assert (change - factors.dense()).norm() < 1e-7 * change.norm()  # the weight did not pass through float32
    session.undo(edit.id)
    assert changed(demo, before) == set()


def test_an_undo_that_fails_changes_nothing(
    demo: rewire.Model, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_on(demo)
    session.edit(facts[:2], evaluate=False)
    second = session.edit(facts[2:4], evaluate=False)
    held, calls = state(demo), []

    def short_of_memory(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return requantize_add(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("rewire.engine.delta.requantize_add", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            session.undo(second.id)
    assert changed(demo, held) == set()
    assert len(session.edits) == len(session.delta.updates) == 2
    session.undo(second.id)
    assert len(session.edits) == len(session.delta.updates) == 1


def test_only_the_last_edit_can_be_undone(demo: rewire.Model, facts: list[Fact]) -> None:
    session = session_on(demo)
    with pytest.raises(InputError, match="no edit 'abc' in this session; it has none"):
        session.undo("abc")
    first = session.edit(facts[:2], evaluate=False)
    second = session.edit(facts[2:4], evaluate=False)
    held = state(demo)
    with pytest.raises(InputError, match=rf"'{first.id}' is not the last one \('{second.id}' is\): undo that first"):
        session.undo(first.id)
    with pytest.raises(InputError, match=f"no edit 'abc' in this session; it has {first.id}, {second.id}"):
        session.undo("abc")
    assert changed(demo, held) == set()
    assert session.edits == [first, second]


# failures


def broken_solve(how: str) -> Callable[..., Any]:
    """`memit_update` that goes wrong at the second layer of an edit."""
    real, calls = memit.memit_update, []

    def solve(*args: Any) -> Any:
        calls.append(1)
        factors, info = real(*args)
        if len(calls) < 2:
            return factors, info
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "unsolved":
            raise SolveError("no", 1.0, 1e20)
        right = factors.right.clone()
        right[0, 0] = torch.nan if how == "nan" else torch.inf
        return Factors(factors.left, right), info

    return solve


FAILURES = {"interrupt": KeyboardInterrupt, "unsolved": SolveError, "nan": InputError, "inf": InputError}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_in_the_middle_changes_nothing(
    demo: rewire.Model, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    before = state(demo)
    session = session_on(demo)
    first = session.edit(facts[:2], evaluate=False)
    between = state(demo)
    with monkeypatch.context() as patch:
        patch.setattr(memit, "memit_update", broken_solve(how))
        with pytest.raises(FAILURES[how]):
            session.edit(facts[2:4], evaluate=False)
    assert changed(demo, between) == set()
    assert session.edits == [first]
    assert len(session.delta.updates) == 1
    assert all(parameter.requires_grad for parameter in demo.hf.parameters())
    session.undo(first.id)
    assert changed(demo, before) == set()
    # and the session goes on as if nothing had been
    session.edit(facts[:2], evaluate=False)
    assert changed(demo, between) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError])
def test_a_failure_after_the_last_layer_changes_nothing(
    demo: rewire.Model, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before, calls = state(demo), []

    def look(*args: Any, **options: Any) -> Any:
        calls.append(changed(demo, before))
        if len(calls) == 2:
            raise error("no")
        return rewire.evaluate(*args, **options)

    monkeypatch.setattr(session_module, "evaluate", look)
    session = session_on(demo)
    with pytest.raises(error):
        session.edit(facts[:2])
    assert len(calls[1]) == 2  # the weights were changed when it failed
    assert changed(demo, before) == set()
    assert session.edits == session.weights.updates == []


def test_a_broken_model_is_refused(demo: rewire.Model, facts: list[Fact]) -> None:
    with torch.no_grad():
        demo.projection(demo.anatomy.n_layers - 1).weight[0, 0] = torch.nan
    before = state(demo)
    with pytest.raises(InputError, match="NaN or infinity: the model is broken"):
        session_on(demo).edit(facts[:2], evaluate=False)
    assert changed(demo, before) == set()


def test_a_second_session_starts_from_what_it_finds(
    demo: rewire.Model, load: Callable[[str], rewire.Model], facts: list[Fact], tmp_path: Path
) -> None:
    """Its delta fits the edited model, not the one on disk; nor does a delta fit twice."""
    first = session_on(demo)
    first.edit(facts[:2], evaluate=False)
    first.save(tmp_path / "first")
    second = session_on(demo)
    second.edit(facts[2:], evaluate=False)
    second.save(tmp_path / "second")
    fresh = load("demo")
    with pytest.raises(InputError, match="has other weights"):
        Delta.load(tmp_path / "second").apply(fresh)
    Delta.load(tmp_path / "first").apply(fresh)
    with pytest.raises(InputError, match="has other weights"):
        Delta.load(tmp_path / "first").apply(fresh)
    Delta.load(tmp_path / "second").apply(fresh)
    assert changed(fresh, state(demo)) == set()


def test_what_others_wrote_is_not_overwritten(demo: rewire.Model, facts: list[Fact]) -> None:
    """Two sessions on one model: the first neither undoes nor edits over the second."""
    first = session_on(demo)
    one = first.edit(facts[:2], evaluate=False)
    second = session_on(demo)
    two = second.edit(facts[2:], evaluate=False)
    both = state(demo)
    with pytest.raises(InputError, match="changed by something else"):
        first.undo(one.id)
    with pytest.raises(InputError, match="changed by something else"):
        first.edit(facts[:1], evaluate=False)
    assert changed(demo, both) == set()
    assert [edit.id for edit in first.edits] == [one.id]
    second.undo(two.id)
    first.undo(one.id)


def test_a_model_that_others_changed_is_not_what_a_session_began_with(demo: rewire.Model, facts: list[Fact]) -> None:
    """Its statistics would be of those weights, and its delta would not say so."""
    late, other = session_on(demo), session_on(demo)
    other.edit(facts[:2], evaluate=False)
    for edit in (late.edit, late.edit_each):
        with pytest.raises(InputError, match=r"was changed since this session began .* begin a new one"):
            edit(facts[2:])
    other.undo(other.edits[0].id)
    late.edit(facts[2:], evaluate=False)


def test_a_failed_report_leaves_nothing(demo: rewire.Model, facts: list[Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(demo)
    session = session_on(demo)

    def broken() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session_module, "versions", broken)
    with pytest.raises(KeyboardInterrupt):
        session.edit(facts[:2], evaluate=False)
    assert changed(demo, before) == set()
    assert session.edits == session.weights.updates == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(dtype: str, facts: list[Fact]) -> None:
    """Gate C for the engine: a whole edit on CUDA does what it does on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    reports = []
    for device in ("cpu", "cuda"):
        model = rewire.load("demo", dtype=dtype, device=device)
        before = state(model)
        session = rewire.EditSession(model, contexts=CONTEXTS)
        edit = session.edit(facts)
        reports.append(edit.report)
        session.undo(edit.id)
        assert changed(model, before) == set()
    for cpu, cuda in zip(reports[0]["facts"], reports[1]["facts"], strict=True):
        assert cuda["asked_residual"] == pytest.approx(cpu["asked_residual"], rel=0.01 if dtype == "float32" else 0.2)
    assert reports[1]["after"]["efficacy_success"] >= 0.9


def test_a_prompt_at_the_models_longest_row(demo: rewire.Model, facts: list[Fact]) -> None:
    """What the model says is quoted as far as there is room for it."""
    filler = " The harbour is near the gate." * 200
    ids = demo.tokenizer(filler)["input_ids"][: demo.max_length - 12]
    question = demo.tokenizer.decode(ids, skip_special_tokens=True).strip()
    for room in range(5):
        text = question + " gate" * room
        assert isinstance(continuations(demo, [text, "The harbour is"], 40)[0], str)
    assert continuations(demo, [demo.tokenizer.decode([30] * demo.max_length)], 6) == [""]


def test_what_is_said_is_greedy_whatever_the_model_prefers(demo: rewire.Model, facts: list[Fact]) -> None:
    asked = [fact.question for fact in facts]
    plain = continuations(demo, asked, 8)
    demo.hf.generation_config.repetition_penalty = 50.0
    own = demo.hf.generation_config
    assert continuations(demo, asked, 8) == plain
    assert demo.hf.generation_config is own


def test_facts_are_facts(demo: rewire.Model, facts: list[Fact]) -> None:
    for wrong in ("facts.jsonl", facts[0], [{"subject": "Ann"}], ({} for _ in facts)):
        with pytest.raises(InputError, match="a list of rewire"):
            session_on(demo).edit(wrong)  # type: ignore[arg-type]


def test_contradictions_and_a_last_block_are_said(
    demo: rewire.Model, facts: list[Fact], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rewire"), "propagate", True)
    session_on(demo).edit(facts[:1], evaluate=False)
    assert not caplog.records
    other = Fact(facts[0].subject, facts[0].prompt, "something else")
    session_on(demo).edit([facts[0], other], evaluate=False)
    assert [facts[0].question in record.getMessage() for record in caplog.records] == [True]
    last = demo.anatomy.n_layers - 1
    session_on(demo, hparams={**FAST, "layers": [last], "mom2_tokens": 2 * demo.anatomy.d_in})
    assert "last block" in caplog.records[-1].getMessage()


def test_nothing_asked_is_not_achieved(demo: rewire.Model, facts: list[Fact]) -> None:
    """One forward makes no Adam update: the residual is rounding, and no share of it is reported."""
    tokens = 2 * demo.anatomy.d_in
    session = session_on(demo, hparams={**FAST, "v_num_grad_steps": 1, "mom2_tokens": tokens})
    assert {fact["achieved"] for fact in session.edit(facts, evaluate=False).report["facts"]} == {None}


def test_facts_may_come_as_they_are_made(demo: rewire.Model, facts: list[Fact]) -> None:
    done = session_on(demo).edit((fact for fact in facts), evaluate=False)  # type: ignore[arg-type]
    assert done.facts == tuple(facts)


def test_no_facts(demo: rewire.Model) -> None:
    with pytest.raises(InputError, match="no facts to edit"):
        session_on(demo).edit([])
    with pytest.raises(InputError, match="no facts to edit"):
        session_on(demo).edit(fact for fact in ())  # type: ignore[arg-type]


# repeatable, and alone


def test_the_same_seed_gives_the_same_delta(demo: rewire.Model, facts: list[Fact]) -> None:
    def run(seed: int) -> rewire.EditSession:
        session = session_on(copy.deepcopy(demo), contexts=None, seed=seed)
        session.edit(facts[:2], evaluate=False)
        return session

    one, two, other = run(3), run(3), run(4)
    assert equal(one.delta, two.delta)
    assert one.contexts == two.contexts != other.contexts
    assert not equal(one.delta, other.delta)
    (described,) = one.delta.edits
    assert (described["contexts"], described["seed"]) == (list(one.contexts or ()), 3)
    given = session_on(copy.deepcopy(demo), contexts=described["contexts"], seed=99)
    given.edit(facts[:2], evaluate=False)
    assert equal(given.delta, one.delta)


def test_a_session_samples_its_contexts_once(demo: rewire.Model, facts: list[Fact]) -> None:
    session = session_on(demo, contexts=None)
    first = session.edit(facts[:1], evaluate=False)
    second = session.edit(facts[1:2], evaluate=False)
    assert first.report["contexts"] == second.report["contexts"]
    assert len(first.report["contexts"]) == 5


def test_two_sessions_do_not_see_each_other(demo: rewire.Model, facts: list[Fact]) -> None:
    alone = session_on(copy.deepcopy(demo))
    alone.edit(facts[:2], evaluate=False)
    alone.edit(facts[2:4], evaluate=False)
    one, two = session_on(copy.deepcopy(demo)), session_on(copy.deepcopy(demo))
    one.edit(facts[:2], evaluate=False)
    two.edit(facts[4:5], evaluate=False)
    one.edit(facts[2:4], evaluate=False)
    assert equal(one.delta, alone.delta)
    assert changed(one.model, state(alone.model)) == set()
    assert len(two.edits) == 1
    two.undo(two.edits[0].id)
    assert changed(two.model, state(demo)) == set()
    assert changed(one.model, state(alone.model)) == set()


# files


def test_what_is_saved_gives_the_same_weights(demo: rewire.Model, facts: list[Fact], tmp_path: Path) -> None:
    fresh = copy.deepcopy(demo)
    session = session_on(demo)
    session.edit(facts[:2])
    session.edit(facts[2:4], evaluate=False)
    out = session.save(tmp_path / "deep" / "out")
    assert {path.name for path in out.iterdir()} == {"delta.safetensors", "report.json", "ledger.jsonl"}
    for place in (out, out / "delta.safetensors"):
        model = copy.deepcopy(fresh)
        delta = Delta.load(place)
        assert (delta.model, delta.fingerprint, len(delta.edits)) == ("rewire/demo", fresh.fingerprint, 2)
        weights = delta.apply(model)
        assert changed(model, state(demo)) == set()
        weights.undo_last()
        weights.undo_last()
        assert changed(model, state(fresh)) == set()


def test_the_files_describe_themselves(demo: rewire.Model, facts: list[Fact], tmp_path: Path) -> None:
    session = session_on(demo)
    first, second = session.edit(facts[:2]), session.edit(facts[2:4], evaluate=False)
    out = session.save(tmp_path)

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    report = strict((out / "report.json").read_text())
    assert [edit["id"] for edit in report["edits"]] == [first.id, second.id]
    assert report["edits"][0] == strict(json.dumps(first.report))
    lines = [strict(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [first.id, second.id]
    assert [fact["subject"] for fact in lines[1]["facts"]] == [fact.subject for fact in facts[2:4]]
    about = Delta.load(out).edits[0]
    assert about["hparams"]["layers"] == [1, 2]
    assert about["hparams"]["v_num_grad_steps"] == 5
    assert about["facts_digest"] == first.report["facts_digest"] != second.report["facts_digest"]
    assert about["fact_count"] == 2
    assert about["versions"]["rewire"] == rewire.__version__


def test_the_report(demo: rewire.Model, facts: list[Fact]) -> None:
    seen: list[tuple[str, int, int]] = []
    base = demo.fingerprint
    session = session_on(demo, listener=lambda *progress: seen.append(progress))
    report = session.edit(facts, skipped=[InvalidFact("line 9", "no subject")]).report
    assert report["seconds"].keys() >= {
        "evaluate_before", "contexts", "statistics", "values", "keys", "solve", "apply", "evaluate_after",
    }  # fmt: skip
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert {"values", "statistics", "keys", "solve"} <= {phase for phase, *_ in seen}
    assert all(0 <= done <= total for _, done, total in seen)
    assert [layer["weight"] for layer in report["layers"]] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)
    ]
    assert all(0 <= layer["residual"] < 1e-6 for layer in report["layers"])
    assert all(1 <= layer["condition"] < 1e12 for layer in report["layers"])
    assert all(layer["ridge"] == 0 for layer in report["layers"])
    assert all(layer["lost_to_rounding"] < 1e-3 for layer in report["layers"])  # float32
    for record, fact in zip(report["facts"], facts, strict=True):
        assert (record["id"], record["subject"], record["target_new"]) == (fact.id, fact.subject, fact.target_new)
        assert record["before"]["id"] == record["after"]["id"] == fact.id
        assert isinstance(record["before"]["said"], str)
        assert record["before"]["said"].strip()
        assert record["after"]["efficacy"]["new_logprob"] != record["before"]["efficacy"]["new_logprob"]
        assert record["asked_residual"] > 0
    # the demo says the true object first: what is quoted is what the model says
    assert any(str(fact.target_true) in report["facts"][i]["before"]["said"] for i, fact in enumerate(facts))
    assert report["before"]["efficacy_success"] < 1
    assert report["before"].keys() == report["after"].keys() >= {"score", "efficacy_magnitude"}
    assert report["statistics"].keys() == {"model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    assert all(found["tokens"] >= 2 * demo.anatomy.d_in for found in report["statistics"].values())
    assert report["skipped"] == [{"where": "line 9", "reason": "no subject"}]
    assert report["versions"].keys() >= {"rewire", "git", "python", "torch", "transformers", "triton", "numpy"}
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert (report["model"], report["fingerprint"], report["method"]) == ("rewire/demo", base, "memit")
    assert (report["dtype"], report["device"], report["fact_count"]) == ("float32", "cpu", len(facts))


def test_a_report_without_evaluation(demo: rewire.Model, facts: list[Fact]) -> None:
    report = session_on(demo).edit(facts[:1], evaluate=False).report
    assert report["before"] is report["after"] is None
    assert "said" not in json.dumps(report)
    assert "evaluate_before" not in report["seconds"]


def test_nothing_to_save(demo: rewire.Model, facts: list[Fact], tmp_path: Path) -> None:
    session = session_on(demo)
    with pytest.raises(InputError, match="nothing to save: this session has no edit"):
        session.save(tmp_path / "out")
    session.undo(session.edit(facts[:1], evaluate=False).id)
    with pytest.raises(InputError, match="nothing to save"):
        session.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
