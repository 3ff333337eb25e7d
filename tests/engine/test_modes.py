"""Experiments by mode on the demo model: each fact alone, one after the other, in batches; stopped and gone on with."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rewire
from commands import FACTS, start
from rewire.engine import asked as asked_module
from rewire.engine.answer_store import AnswerStore
from rewire.engine.datasets import write_facts
from rewire.engine.decoding import continue_each
from rewire.engine.evaluation import evaluate
from rewire.engine.evaluation.outcome import flat
from rewire.engine.experiment import modes
from rewire.engine.experiment.config import read_experiment
from rewire.engine.experiment.data import facts_of
from rewire.engine.experiment.run import Row, run, summarize
from rewire.engine.facts import Ripple

FAST = {"layers": [1, 2], "v_num_grad_steps": 3, "mom2_tokens": 1600, "mom2_max_length": 64, "mom2_update_weight": 20}
TIMES = (
    *("time", "seconds", "date", "id", "cached", "optimised", "facts_per_second", "capacity", "source"),
    "implementations",
)
EVALUATION = {"evaluation.json", "records.jsonl", "records.csv"}
CONTEXTS = ["The ferry waits. {}"]
OURS = {"experiment.yaml", "progress.json"}
SEQUENCE = {"checkpoints.json", "immediate.jsonl", "steps.json", "delta.safetensors", "report.json", "ledger.jsonl"}


Session = Callable[[rewire.Model], rewire.EditSession]


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def facts(tmp_path: Path) -> list[rewire.Fact]:
    """Five facts of the demo with one paraphrase and two neighbours each, the last without either."""
    read = rewire.read_facts(FACTS, limit=5)
    short = [replace(fact, paraphrases=fact.paraphrases[:1], neighbors=fact.neighbors[:2]) for fact in read]
    short[-1] = replace(short[-1], paraphrases=(), neighbors=())
    write_facts(tmp_path / "five.jsonl", short)
    return short


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Second moments of the demo, collected once."""
    cache = tmp_path_factory.mktemp("moments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWIRE_CACHE", str(cache))
        facts = rewire.read_facts(FACTS, limit=1)
        rewire.EditSession(rewire.load("demo"), "memit", hparams=FAST, contexts=CONTEXTS).edit_each(facts)
    (folder,) = cache.glob("stats/*/*_stats")
    return folder


@pytest.fixture
def asked(facts: list[rewire.Fact], tmp_path: Path, moments: Path) -> dict[str, Any]:
    contexts = tmp_path / "contexts.json"
    contexts.write_text(json.dumps(CONTEXTS))
    return {"model": "demo", "data": str(tmp_path / "five.jsonl"), "set": FAST, "contexts": contexts} | {
        "data_dir": tmp_path, "out": tmp_path / "out", "stats": str(moments), "protocol": "synthetic",
    }  # fmt: skip


@pytest.fixture
def go(asked: dict[str, Any], load: Callable[[str], rewire.Model]) -> Callable[..., Path]:
    """Runs the experiment with other keys, on a model as it was given."""

    def go(listener: Any = lambda phase, done, total: None, tell: Any = lambda row: None, **keys: Any) -> Path:
        return run(read_experiment(None, asked | keys), listener, tell, lambda *_: load("demo"))

    return go


@pytest.fixture
def session(moments: Path) -> Callable[[rewire.Model], rewire.EditSession]:
    return lambda model: rewire.EditSession(model, "memit", stats=moments, hparams=FAST, contexts=CONTEXTS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(folder: Path) -> dict[str, Any]:
    """What of a folder must be the same in every run: all but times, dates, ids and where values came from."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.name != "progress.json":
            found[path.name] = timeless(json.loads(path.read_text()))
        elif path.name in ("immediate.jsonl", "records.jsonl", "records.csv"):
            found[path.name] = path.read_text()
        elif path.suffix == ".safetensors":
            updates = rewire.Delta.load(folder).updates
            found[path.name] = [{name: each.dense().tolist() for name, each in update.items()} for update in updates]
        else:
            found[path.name] = None
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def near(found: Any, wanted: dict[str, Any]) -> None:
    """The same row: values that were found in a batch are those of one alone to rounding."""
    assert found == {
        key: pytest.approx(value, rel=1e-2, abs=1e-4) if isinstance(value, float) else value
        for key, value in wanted.items()
    }


@pytest.mark.parametrize("protocol", ["synthetic", "wild", "counterfact"])
def test_single_is_each_edited_measured_and_taken_back(
    go: Callable[..., Path], facts: list[rewire.Fact], demo: rewire.Model, session: Session, protocol: str
) -> None:
    more = {"context": "question-only"} if protocol == "wild" else {}
    rows: list[Row] = []
    folder = go(tell=rows.append, mode="single", protocol=protocol, **more)
    extra = {"singles.json"} | ({"results.json"} if protocol != "counterfact" else set())
    assert {path.name for path in folder.iterdir()} == EVALUATION | OURS | extra
    assert [(row["number"], row["facts"]) for row in rows] == [(0, 5), (1, 5)]

    plain = evaluate(demo, facts, protocol, **more)
    against = {} if protocol == "counterfact" else {"unedited": plain}
    one_by_one = session(demo)
    records = []
    for fact, before in zip(facts, plain["facts"], strict=True):
        edit = one_by_one.edit([fact], evaluate=False)
        (record,) = evaluate(demo, [fact], protocol, **more, **against)["facts"]
        records.append(flat(fact, record, before))
        one_by_one.undo(edit.id)
    found = lines(folder / "records.jsonl")
    for mine, wanted in zip(found, records, strict=True):
        near(mine, wanted)
    # and the edits are no trifle
    name = "efficacy_success" if protocol == "counterfact" else "reliability"
    assert rows[1]["metrics"][name] > rows[0]["metrics"][name]
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["metrics"] == rows[1]["metrics"]
    assert summary["unedited"] == rows[0]["metrics"] == plain["metrics"]
    assert (summary["mode"], summary["method"], summary["facts"]) == ("single", "MEMIT", 5)
    assert len(json.loads((folder / "singles.json").read_text())["facts"]) == 5


def test_of_single_edits_the_unedited_answers_stay(go: Callable[..., Path], demo: rewire.Model) -> None:
    """The next experiment, of any method, does not ask the unedited model again."""
    kept = AnswerStore.of(demo).folder
    go(mode="single")
    known = AnswerStore(kept).known
    assert len(known) == 5 * 3 - 2
    assert [path.suffix for path in kept.iterdir()] == [".jsonl"]


def test_a_sequence(
    go: Callable[..., Path], facts: list[rewire.Fact], load: Callable[[str], rewire.Model], session: Session
) -> None:
    rows: list[Row] = []
    folder = go(tell=rows.append, mode="sequential", checkpoints=2)
    assert {path.name for path in folder.iterdir()} == EVALUATION | OURS | SEQUENCE | {"results.json"}
    assert [(row["number"], row["facts"]) for row in rows] == [(0, 5), (1, 2), (2, 4), (3, 5)]

    plain = evaluate(demo := load("demo"), facts, "synthetic")
    one = session(demo)
    immediate, checkpoints = [], []
    for number, (fact, before) in enumerate(zip(facts, plain["facts"], strict=True), 1):
        one.edit([fact], evaluate=False)
        (record,) = evaluate(demo, [fact], "synthetic", unedited=plain)["facts"]
        immediate.append(flat(fact, record, before))
        if number in (2, 4, 5):
            metrics = evaluate(demo, facts[:number], "synthetic", unedited=plain)["metrics"]
            checkpoints.append({"after": number, "metrics": metrics})
    for mine, wanted in zip(lines(folder / "immediate.jsonl"), immediate, strict=True):
        near(mine, wanted)
    found = json.loads((folder / "checkpoints.json").read_text())
    assert [step["after"] for step in found] == [2, 4, 5]
    for mine, wanted in zip(found, checkpoints, strict=True):
        near(mine["metrics"], wanted["metrics"])
    assert [step["metrics"] for step in found] == [row["metrics"] for row in rows[1:]]
    # locality is that beside the unedited model, of which it has none
    assert rows[0]["metrics"]["locality"] is None
    assert all(row["metrics"]["locality"] is not None for row in rows[1:])

    # the end is what the saved edits make of the model
    last = load("demo")
    delta = rewire.Delta.load(folder)
    assert len(delta.updates) == 5
    delta.apply(last)
    end = evaluate(last, facts, "synthetic", unedited=plain)
    summary = json.loads((folder / "evaluation.json").read_text())
    near(summary["metrics"], end["metrics"])
    for mine, fact, record, before in zip(
        lines(folder / "records.jsonl"), facts, end["facts"], plain["facts"], strict=True
    ):
        near(mine, flat(fact, record, before))


@pytest.mark.parametrize("protocol", ["zsre", "ripple"])
def test_checkpoints_of_what_compares_with_all_facts(
    go: Callable[..., Path], facts: list[rewire.Fact], tmp_path: Path, protocol: str
) -> None:
    """Of the facts so far, beside the unedited model's evaluation of all."""
    tests = (Ripple("Compositionality_I", "The ferry waits for the", ("old",)),)
    asks = [replace(fact, ripples=tests if number % 2 else ()) for number, fact in enumerate(facts)]
    write_facts(tmp_path / "five.jsonl", asks)
    folder = go(mode="batch", batch=2, protocol=protocol, checkpoints=2)
    assert [step["after"] for step in json.loads((folder / "checkpoints.json").read_text())] == [2, 4, 5]
    assert {path.name for path in folder.iterdir()} == EVALUATION | OURS | SEQUENCE


def test_batches_and_all_at_once(
    go: Callable[..., Path], facts: list[rewire.Fact], load: Callable[[str], rewire.Model], session: Session
) -> None:
    two, joint = go(mode="batch", batch=2, protocol="counterfact"), go(mode="batch", protocol="counterfact")
    assert two != joint
    assert [len(rewire.Delta.load(folder).updates) for folder in (two, joint)] == [3, 1]
    assert [step["facts"] for step in json.loads((two / "steps.json").read_text())] == [2, 4, 5]
    assert len(lines(two / "immediate.jsonl")) == len(lines(joint / "immediate.jsonl")) == 5
    plain = evaluate(load("demo"), facts, "counterfact")["facts"]
    for folder, size in ((two, 2), (joint, 5)):
        one = session(model := load("demo"))
        rows = []
        for begin in range(0, 5, size):
            batch, before = facts[begin : begin + size], plain[begin : begin + size]
            one.edit(batch, evaluate=False)
            now = evaluate(model, batch, "counterfact")["facts"]
            rows += [flat(fact, a, b) for fact, a, b in zip(batch, now, before, strict=True)]
        for mine, wanted in zip(lines(folder / "immediate.jsonl"), rows, strict=True):
            near(mine, wanted)
    # all at once there is nothing between its own edit and the end
    assert (joint / "immediate.jsonl").read_text() == (joint / "records.jsonl").read_text()


def test_what_is_asked_at_once_and_at_the_end_is_answered_once(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[int] = []

    def count(model: Any, prompts: Any, *args: Any, **more: Any) -> Any:
        said.append(len(prompts))
        return continue_each(model, prompts, *args, **more)

    monkeypatch.setattr(asked_module, "continue_each", count)
    go(mode="batch", protocol="wild", judge="exact")
    unedited, edited = said
    assert unedited == edited


def test_published_behaviour_reaches_the_protocol(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    def hear(*args: Any, **more: Any) -> Any:
        heard.append(more.get("compat"))
        return evaluate(*args, **more)

    monkeypatch.setattr(modes, "evaluate", hear)
    for protocol, told in (("ripple", True), ("counterfact", None)):
        heard.clear()
        go(mode="batch", protocol=protocol, compat=True)
        assert heard == [told] * 3


def test_iterations_of_a_batch(go: Callable[..., Path]) -> None:
    folder = go(mode="batch", iterations=2)
    (report,) = json.loads((folder / "report.json").read_text())["edits"]
    assert len(report["iterations"]) == 2
    assert folder.parts[-3:] == ("I_2", "batch", "synthetic")


def test_only_what_is_wrong(
    go: Callable[..., Path], facts: list[rewire.Fact], demo: rewire.Model, tmp_path: Path
) -> None:
    """The unedited model is asked first; what it answers right is not edited, and nothing left is said."""
    said = evaluate(demo, facts[:3], "wild", context="question-only")["facts"]
    answers = [record["rewrite"][0]["answer"].strip() for record in said]
    known = [replace(fact, target_new=answer, target_true=None) for fact, answer in zip(facts, answers, strict=False)]
    wild = {"mode": "batch", "protocol": "wild", "context": "question-only", "only_wrong": True}
    write_facts(tmp_path / "five.jsonl", [known[0], *facts[1:3]])
    rows: list[Row] = []
    folder = go(tell=rows.append, **wild)
    assert folder.parts[-2:] == ("batch", "wild-question-only-wrong")
    assert [record["id"] for record in lines(folder / "records.jsonl")] == [fact.id for fact in facts[1:3]]
    summary = json.loads((folder / "evaluation.json").read_text())
    assert (summary["asked"], summary["facts"], summary["unedited"]["reliability"]) == (3, 2, 0.0)
    assert summary["unedited"]["locality"] is None  # it is not compared with itself
    assert [row["facts"] for row in rows] == [2, 2]
    assert rows[0]["metrics"] == summary["unedited"]

    write_facts(tmp_path / "five.jsonl", known)
    with pytest.raises(rewire.InputError, match="the unedited model answers all 3 facts right; nothing is left"):
        go(**wild, out=tmp_path / "right")


def test_folders_are_apart(asked: dict[str, Any]) -> None:
    ways: list[dict[str, Any]] = [
        *({"mode": mode} for mode in ("single", "sequential", "batch")),
        *({"mode": "single", "protocol": protocol} for protocol in ("wild", "counterfact", "zsre", "ripple")),
        *({"mode": "single", "context": context} for context in ("qa_inst", "question-only", "chat", "chat_temp")),
        *({"mode": mode, "checkpoints": n} for mode in ("sequential", "batch") for n in (1, 2)),
        *({"mode": "batch", "batch": n} for n in (1, 2)),
        *({"mode": mode, "iterations": n} for mode in ("sequential", "batch") for n in (2, 3)),
        *({"mode": mode, "protocol": "wild", "only_wrong": True} for mode in ("single", "batch")),
        {"protocol": "underedit"},
        {"protocol": "underedit", "batch": 2},
    ]
    folders = [read_experiment(None, asked | way).folder(5) for way in ways]
    assert len(set(folders)) == len(ways)


def test_finished_it_is_not_done_again(go: Callable[..., Path], asked: dict[str, Any]) -> None:
    def load(*_: str) -> rewire.Model:
        raise AssertionError("the model was loaded")

    rows: list[Row] = []
    folder = go(tell=rows.append, mode="sequential", checkpoints=3)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again: list[Row] = []
    same = read_experiment(None, asked | {"mode": "sequential", "checkpoints": 3})
    assert run(same, tell=again.append, load=load) == folder
    assert again == rows
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert read_experiment(folder / "experiment.yaml") == same
    with pytest.raises(rewire.InputError, match="is summed up as it runs; `rewire report` makes a page"):
        summarize(same)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, ...]]:
    """Which facts were measured, and how often, from now on."""
    seen: Counter[tuple[str, ...]] = Counter()

    def count(model: Any, facts: Any, *args: Any, **more: Any) -> Any:
        seen[tuple(fact.id for fact in facts)] += 1
        return evaluate(model, facts, *args, **more)

    monkeypatch.setattr(modes, "evaluate", count)
    return seen


def test_stopped_it_goes_on(
    go: Callable[..., Path], facts: list[rewire.Fact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a checkpoint, within a step, at the end: the same files; what was measured is not measured again."""
    monkeypatch.setattr(modes, "SAVE_SECONDS", 0.0)
    keys = {"mode": "sequential", "checkpoints": 2}
    once = content(go(**keys, out=tmp_path / "once"))
    ids = [fact.id for fact in facts]
    for where, done in (("checkpoint", 2), ("step", 2), ("end", 4)):
        monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / f"cache of {where}"))
        at_once: list[int] = []

        def tell(row: Row, where: str = where) -> None:
            if where == "checkpoint" and row["number"] == 1:
                raise Stopped

        def listener(phase: str, at: int, of: int, where: str = where, at_once: list[int] = at_once) -> None:
            if phase == "evaluate_at_once" and at == of:
                at_once.append(at)
            if (where, len(at_once)) in (("step", 3), ("end", 5)) and phase.startswith("evaluate"):
                raise Stopped

        out = tmp_path / where
        with pytest.raises(Stopped):
            go(listener, tell, **keys, out=out)
        with monkeypatch.context() as patch:
            seen = counted(patch)
            again: list[Row] = []
            folder = go(tell=again.append, **keys, out=out)
        assert content(folder) == once, where
        assert [(row["number"], row["facts"]) for row in again] == [(0, 5), (1, 2), (2, 4), (3, 5)]
        assert [seen[(name,)] for name in ids] == [0] * done + [1] * (5 - done), where
        assert [seen[tuple(ids[:n])] for n in (2, 4)] == [int(done < n) for n in (2, 4)], where
        assert seen[tuple(ids)] == 2  # the unedited model, whose answers are on disk, and the end


def test_single_edits_stopped_go_on(go: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = content(go(mode="single", out=tmp_path / "once"))
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "other"))

    def listener(phase: str, done: int, total: int) -> None:
        if phase == "evaluate":
            raise Stopped

    with pytest.raises(Stopped):
        go(listener, mode="single")
    heard: set[str] = set()
    assert content(go(lambda phase, *_: heard.add(phase), mode="single")) == once
    assert "evaluate" not in heard  # all was answered, and is on disk


def test_killed_it_goes_on(
    go: Callable[..., Path], asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` of the command behind its first checkpoint, and the same command again."""
    words: list[object] = ["run", "--model", "demo", "--data", asked["data"], "--contexts", asked["contexts"]]
    words += ["--stats", asked["stats"]]
    words += [word for key, value in FAST.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words += ["--mode", "sequential", "--protocol", "synthetic", "--checkpoints", 1, "--out"]
    process = start(*words, tmp_path / "often")
    end = time.monotonic() + 90
    assert process.stdout is not None
    for line in process.stdout:  # the unedited model, the first checkpoint
        if line.startswith("1 fact edited") or time.monotonic() > end:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9
    folder = read_experiment(None, asked | {"mode": "sequential", "checkpoints": 1, "out": tmp_path / "often"}).folder(
        5
    )
    assert (folder / "checkpoints.json").is_file()
    assert not (folder / "evaluation.json").exists()
    keys = {"mode": "sequential", "checkpoints": 1}
    assert go(**keys, out=tmp_path / "often") == folder
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "other"))
    assert content(folder) == content(go(**keys, out=tmp_path / "once"))


def test_a_folder_of_another(
    go: Callable[..., Path], asked: dict[str, Any], facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = {"mode": "single", "protocol": "wild", "num_edits": 1}
    go(**wild)
    with pytest.raises(rewire.InputError, match=r"another experiment: seed is 0 there, 3 asked for; name another"):
        go(**wild, seed=3)
    with pytest.raises(rewire.InputError, match=r"another experiment: judge is auto there, exact asked for"):
        go(**wild, judge="exact")
    folder = read_experiment(None, asked | wild).folder(1)
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(progress | {"iterations": None}))
    monkeypatch.setenv("OPENAI_API_KEY", "nobody-is-asked")  # "auto" is another judge now
    with pytest.raises(rewire.InputError, match="begun with another judge than judge: auto is now: set or unset"):
        go(**wild)


def test_what_does_not_go_together(asked: dict[str, Any]) -> None:
    del asked["protocol"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mode": "single"}, "^mode single: say which protocol: wild, synthetic, counterfact, zsre or ripple$"),
        ({"protocol": "wild"}, "^protocol wild is of a mode; say mode: single, sequential or batch$"),
        ({"checkpoints": 3}, "^checkpoints is of a mode; say mode"),
        ({"only_wrong": True}, "^only_wrong is of a mode"),
        ({"context": "qa_inst"}, "^context is of a mode"),
        ({"mode": "all"}, "^--mode: 'all' found, expected 'single', 'sequential' or 'batch'"),
        ({"mode": "single", "protocol": "drift"}, "^--protocol: 'drift' found, expected"),
        ({"mode": "single", "protocol": "counterfact", "context": "qa_inst"}, "^context is of wild and synthetic"),
        ({"mode": "single", "protocol": "wild", "context": "qa-inst"}, "did you mean 'qa_inst'"),
        ({"mode": "sequential", "protocol": "wild", "batch": 2}, "^batch is of mode batch; mode sequential edits one"),
        ({"mode": "single", "protocol": "wild", "checkpoints": 2}, "^checkpoints is of sequential and batch"),
        ({"mode": "single", "protocol": "wild", "iterations": 2}, "^mode single edits each fact once; iterations is 2"),
        ({"mode": "single", "protocol": "wild", "method": "MEMIT_RECURSIVE"}, "ends in _RECURSIVE"),
        ({"mode": "single", "protocol": "wild", "stop_gap": 1.0}, "^stop_gap is of iterations; mode single"),
        ({"mode": "batch", "protocol": "synthetic", "only_wrong": True}, "^only_wrong needs generated answers"),
        ({"mode": "batch", "protocol": "synthetic", "judge": "llm"}, "^judge is of generated answers; protocol synth"),
        ({"judge_model": "some"}, "^judge_model is of generated answers; protocol underedit has none"),
        ({"mode": "batch", "protocol": "wild", "judge": "exact", "judge_url": "http://x"}, "judge exact asks no model"),
        ({"mode": "batch", "protocol": "wild", "perplexity": "texts.txt"}, "^perplexity is of an experiment without"),
    ]
    for keys, said in wrong:
        with pytest.raises(rewire.InputError, match=said) as error:
            read_experiment(None, asked | keys)
        assert "\n" not in str(error.value)


def test_published_questions(shared: Path, load: Callable[[Path], rewire.Model], tmp_path: Path) -> None:
    """QAEdit as it is published, on a model that does not know it."""
    records = json.loads((shared / "data" / "qaedit_500.json").read_text())[:3]
    (tmp_path / "qaedit.json").write_text(json.dumps(records))
    (tmp_path / "contexts.json").write_text('["The end. {}"]')
    model = shared / "models" / "cf-gpt2"
    keys = {"model": str(model), "data": str(tmp_path / "qaedit.json"), "stats": str(shared / "goldens/cf-gpt2/stats")}
    keys |= {"mode": "single", "protocol": "wild", "only_wrong": True, "out": str(tmp_path)}
    steps = {"v_num_grad_steps": 3, "layers": [1, 2]}
    experiment = read_experiment(None, keys | {"contexts": tmp_path / "contexts.json", "set": steps})
    folder = run(experiment, load=lambda *_: load(model))
    published = json.loads((folder / "results.json").read_text())
    assert [record["case_id"] for record in published] == [0, 1, 2]
    for record, source in zip(published, records, strict=True):
        requested = record["requested_rewrite"]
        assert (requested["prompt"], requested["subject"]) == (source["prompt"], source["subject"])
        assert (requested["target_new"], requested["ground_truth"]) == (source["target"].strip(), "<|endoftext|>")
        assert requested["rephrase_prompt"] == source["rephrase"]
        first = source["locality"][0]
        assert requested["locality"] == {"neighborhood": {"prompt": first["loc"], "ground_truth": first["loc_ans"]}}
        assert record["post"]["locality"]["neighborhood_acc"] in ([0.0], [1.0])
    assert facts_of(experiment)[0].target_true is None
