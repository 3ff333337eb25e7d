"""`rewire evaluate` through the entry point: every protocol on the demo, what it leaves, what is wrong, interrupted."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from commands import FACTS, Command, complaint
from rewire import cli
from rewire.cli import common
from rewire.engine import evaluation
from rewire.engine.datasets import write_facts
from rewire.engine.facts import Probe, Ripple
from rewire.engine.phases import Listener

HPARAMS = {"layers": [1, 2], "v_num_grad_steps": 4, "mom2_tokens": 1600, "mom2_max_length": 64}
FOLDER = {"evaluation.json", "records.jsonl", "records.csv"}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three facts of the demo that have all that any protocol asks, and a text besides."""
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    read = rewire.read_facts(FACTS, limit=4)
    tests = (Ripple("Compositionality_I", "The ferry waits for the", ("old man",)),)
    probes = (Probe(read[3].question, str(read[3].target_true)),)
    write_facts(
        path, [replace(fact, paraphrases=fact.paraphrases[:1], locality=probes, ripples=tests) for fact in read[:3]]
    )
    (path.parent / "texts.txt").write_text("The ferry waits for the old man.\n\nHere is a story.\n")
    return path


@pytest.fixture
def texts(facts: Path) -> Path:
    return facts.parent / "texts.txt"


@pytest.fixture(scope="module")
def delta(facts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWIRE_CACHE", str(folder / "cache"))
        hparams = HPARAMS | {"mom2_update_weight": 20}
        session = rewire.EditSession(rewire.load("demo"), "memit", hparams=hparams, contexts=["The ferry waits. {}"])
        session.edit(rewire.read_facts(facts), evaluate=False)
    session.save(folder / "out")
    return folder / "out"


SHARES = {
    "wild": ("reliability", "generalization", "locality", "portability"),
    "synthetic": ("reliability", "generalization", "locality", "portability"),
    "zsre": ("reliability", "generalization", "locality", "locality_accuracy", "portability"),
    "ripple": ("reliability",),
    "counterfact": ("efficacy_success", "paraphrase_success", "neighborhood_success", "score"),
}


@pytest.mark.parametrize("protocol", SHARES)
def test_protocols_of_facts(run: Command, facts: Path, delta: Path, tmp_path: Path, protocol: str) -> None:
    """For machines, with files that `rewire report` reads; then for people, from answers that are known."""
    out = tmp_path / "out"
    words = ("evaluate", "demo", facts, "--protocol", protocol, "--delta", delta)
    done = run(*words, "--out", out, "--json")
    assert done.status == 0, done.err
    said = done.json
    assert (said["protocol"], said["facts"], said["out"]) == (protocol, 3, str(out))
    assert all(said["metrics"][name] is not None for name in SHARES[protocol])
    assert ("judge" in said) == (protocol == "wild")
    assert ("unedited" in said) == (protocol != "counterfact")
    assert said["seconds"].keys() == {"evaluate"} | ({"evaluate_unedited"} if protocol != "counterfact" else set())

    assert {path.name for path in out.iterdir()} == FOLDER | (
        {"results.json"} if protocol in ("wild", "synthetic") else set()
    )
    summary = json.loads((out / "evaluation.json").read_text())
    assert (summary["metrics"], summary["unedited"]) == (said["metrics"], said.get("unedited"))
    assert (summary["model"], summary["delta"], summary["data"]) == ("demo", str(delta), str(facts))
    edit = json.loads((delta / "report.json").read_text())["edits"][0]
    assert summary["fingerprint"] == edit["fingerprint"]  # of the unedited model
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    with (out / "records.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [record["id"] for record in records]
    if "reliability" in said["metrics"]:
        mean = sum(record["reliability"] for record in records) / 3
        assert mean == pytest.approx(said["metrics"]["reliability"])
    page = run("report", out, "--json")
    assert page.status == 0, page.err
    assert records[0]["subject"] in (out / "report.html").read_text()

    shown = run(*words)
    assert shown.status == 0
    for name in SHARES[protocol]:
        assert common.said(name, said["metrics"][name]) in shown.out
    assert "demo +" in shown.out
    assert shown.out.splitlines()[-1].startswith(f"3 facts, protocol {protocol}")


def test_the_unedited_model_alone(run: Command, facts: Path) -> None:
    done = run("evaluate", "demo", facts, "--protocol", "wild", "--context", "question-only", "--locality", 0)
    assert done.status == 0, done.err
    assert done.err.splitlines() == [
        "rewire: exact match judges the answers: OPENAI_API_KEY is not set, so no language model can be asked"
    ]
    assert "--delta" in done.out.splitlines()[-2]  # what a missing locality would need
    assert done.out.splitlines()[-1] == "3 facts, protocol wild, judged by exact"
    exact = run("evaluate", "demo", facts, "--protocol", "wild", "--judge", "exact", "--truncation", "gold", "--json")
    assert exact.err == ""
    assert exact.json["judge"]["kind"] == "exact"
    assert exact.json["metrics"]["reliability_match"] is not None
    assert "unedited" not in exact.json


def test_what_reads_texts(run: Command, facts: Path, texts: Path, delta: Path, tmp_path: Path) -> None:
    words = ("evaluate", "demo", "--protocol", "perplexity", "--texts", texts)
    plain = run(*words, "--out", tmp_path / "plain", "--json").json
    edited = run(*words, "--delta", delta, "--json").json
    assert (plain["facts"], plain["metrics"].keys()) == (0, {"perplexity", "perplexity_tokens"})
    assert plain["metrics"] != edited["metrics"]
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["evaluation.json"]
    summary = json.loads((tmp_path / "plain" / "evaluation.json").read_text())
    assert [record["id"] for record in summary["records"]] == ["text 1", "text 2"]
    assert run("report", tmp_path / "plain").status == 0
    shown = run(*words)
    assert shown.out.splitlines()[-1] == "2 texts, protocol perplexity"
    assert run(*words, "--limit", 1).out.splitlines()[-1] == "1 text, protocol perplexity"
    assert f"{plain['metrics']['perplexity']:.4g}" in shown.out

    words = ("evaluate", "demo", facts, "--protocol", "drift", "--texts", texts, "--delta", delta)
    drift = run(*words, "--out", tmp_path / "drift", "--json")
    assert drift.status == 0, drift.err
    assert drift.json["metrics"]["perplexity_edited"] == pytest.approx(edited["metrics"]["perplexity"], rel=1e-3)
    assert drift.json["metrics"]["kl_unedited_edited"] > 0
    assert drift.json["metrics"]["locality_kl"] is not None
    records = [json.loads(line) for line in (tmp_path / "drift" / "records.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [fact.id for fact in rewire.read_facts(facts)]
    assert run("report", tmp_path / "drift").status == 0
    assert run(*words).out.splitlines()[-1] == "3 facts, 2 texts, protocol drift"


def test_validate(run: Command, facts: Path, tmp_path: Path) -> None:
    done = run("evaluate", "--validate", facts)
    assert (done.status, done.err) == (0, "")
    assert "3 records, 3 can be edited" in " ".join(done.out.split())
    broken = tmp_path / "broken.jsonl"
    broken.write_text(facts.read_text() + '{"subject": "Rome", "prompt": "Bonn lies in", "target_new": "Spain"}\n')
    found = run("evaluate", "--validate", broken, "--json")
    assert (found.status, found.err) == (2, "")
    assert (found.json["records"], found.json["facts"], found.json["errors"]) == (4, 3, 1)
    assert "no such file" in complaint(run("evaluate", "--validate", tmp_path / "no.jsonl"))


def test_what_is_wrong(
    run: Command, facts: Path, texts: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, before the model is loaded."""

    def load(*_: Any) -> rewire.Model:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(common, "load", load)
    demo: tuple[object, ...] = ("demo", facts)
    wild: tuple[object, ...] = (*demo, "--judge", "exact", "--protocol", "wild")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("precious")
    wrong: list[tuple[Sequence[object], str]] = [
        ((), "a MODEL is missing; expected `rewire evaluate MODEL DATA`, or --validate DATA alone"),
        (("demo",), "DATA is missing; --protocol counterfact measures facts: name a file of them"),
        (("demo", "--protocol", "wild"), "DATA is missing; --protocol wild measures facts"),
        (("demo", tmp_path / "no.jsonl"), f"{tmp_path / 'no.jsonl'}: no such file"),
        ((*demo, "--protocol", "wlid"), "unknown protocol 'wlid'; did you mean 'wild'?"),
        ((*wild, "--context", "qa-inst"), "unknown context 'qa-inst'; did you mean 'qa_inst'?"),
        ((*wild, "--truncation", "none"), "--truncation none: expected natural or gold"),
        ((*demo, "--protocol", "wild", "--judge", "me"), "unknown judge 'me'; there are auto, exact, llm"),
        ((*wild, "--judge-model", "big"), "--judge-model: exact match asks no model; leave it out, or say --judge llm"),
        ((*demo, "--judge", "llm"), "--judge: --protocol counterfact takes none; it is of wild"),
        ((*demo, "--judge-url", "http://x"), "--judge-url: --protocol counterfact takes none; it is of wild"),
        ((*demo, "--context", "qa_inst"), "--context: --protocol counterfact takes none; it is of synthetic, wild"),
        ((*demo, "--locality", 2), "--locality: --protocol counterfact takes none; it is of synthetic, wild"),
        ((*demo, "--task", "sst2"), "--task: --protocol counterfact takes none; it is of ability"),
        ((*wild, "--texts", texts), "--texts: --protocol wild takes none; it is of underedit, perplexity, drift"),
        ((*wild, "--compat"), "--compat: --protocol wild takes none; it is of "),
        ((*wild, "--generation"), "--generation: --protocol wild takes none; it is of counterfact"),
        (("demo", "--protocol", "perplexity"), "--texts is missing; --protocol perplexity reads texts"),
        (
            ("demo", "--protocol", "drift", "--delta", delta),
            "drift reads texts (.json, .jsonl or .txt), or DATA",
        ),
        (("demo", facts, "--protocol", "perplexity", "--texts", texts), "measures no facts; leave it out"),
        (("demo", "--protocol", "perplexity", "--texts", tmp_path / "no.txt"), "no.txt: no such file"),
        (("demo", facts, "--protocol", "drift"), "drift compares with the unedited model; name an edit with --delta"),
        ((*demo, "--delta", tmp_path / "no"), str(tmp_path / "no")),
        ((*demo, "--out", tmp_path / "there"), "something is there already; name a new folder"),
        ((*demo, "--limit", 0), "(see rewire evaluate --help)"),
    ]
    for words, said in wrong:
        assert said in complaint(run("evaluate", *words))
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]


def test_a_delta_of_another_model_is_refused_before_the_long_work(
    run: Command, facts: Path, delta: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any, **__: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(evaluation, "evaluate", measure)
    said = complaint(run("evaluate", other, facts, "--delta", delta, "--protocol", "synthetic"))
    assert said.startswith("the delta was made on ")


def test_a_broken_model_gives_json_all_the_same(run: Command, facts: Path, tmp_path: Path) -> None:
    model: Any = rewire.load("demo")
    with torch.no_grad():
        model.hf.get_parameter(model.anatomy.weight_name(2))[0, 0] = float("nan")
    model.hf.save_pretrained(tmp_path / "broken")
    model.tokenizer.save_pretrained(tmp_path / "broken")
    done = run("evaluate", tmp_path / "broken", facts, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    assert done.json["metrics"]["efficacy_magnitude"] is None

    def none(name: str) -> None:
        raise AssertionError(name)

    for path in ("evaluation.json", "records.jsonl"):
        for line in (tmp_path / "out" / path).read_text().splitlines() if path[-1] == "l" else [
            (tmp_path / "out" / path).read_text()
        ]:  # fmt: skip
            json.loads(line, parse_constant=none)


def test_interrupted_it_goes_on(run: Command, facts: Path, delta: Path, tmp_path: Path) -> None:
    """What was answered by then is not asked again."""
    words = ("evaluate", "demo", facts, "--protocol", "synthetic", "--delta", delta, "--batch-size", 1)
    heard: list[tuple[str, int]] = []

    def bars(stop: int) -> Any:
        @contextmanager
        def bars(*_: Any, **__: Any) -> Iterator[Listener]:
            def listener(phase: str, done: int, total: int) -> None:
                heard.append((phase, done))
                if (phase, done) == ("evaluate", stop):
                    raise KeyboardInterrupt

            yield listener

        return bars

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "bars", bars(4))
        done = run(*words, "--out", tmp_path / "out")
    assert (done.status, done.out) == (3, "")
    assert done.err == f"rewire: {cli.INTERRUPTED}\n"
    assert "answers" in cli.INTERRUPTED
    assert "edit" not in cli.INTERRUPTED  # there is none here
    assert not (tmp_path / "out").exists()
    heard.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "bars", bars(-1))
        again = run(*words, "--out", tmp_path / "out", "--json")
    assert again.status == 0
    assert heard[0][1] == 5  # four are known, and all of the unedited model's
    assert {phase for phase, _ in heard} == {"evaluate"}
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_bench(run: Command, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document, the lines, and status 1 with no figure where the check failed."""
    from rewire.bench import evaluation

    words = ("bench", "evaluation", "demo", facts, "--facts", 2, "--serial", 1)
    done = run(*words, "--json")
    assert (done.status, done.err) == (0, "")
    assert done.json.keys() >= {"check", "flips", "wrong", "rows", "model", "about", "context"}
    assert (done.json["check"], done.json["rows"][0]["name"]) == ("passed", "wild")
    monkeypatch.setattr(evaluation, "published_ids", lambda model, prompt: (5,))
    failed = run(*words)
    assert failed.status == 1
    assert "check failed" in failed.out
    assert (
        "not the same: 'As a musician, Zaenen Firott is known for playing the', at token 0 the two best" in failed.out
    )
    assert "wild" not in failed.out
    assert run(*words, "--json").json["rows"] == []
    assert "unknown context 'qa'" in complaint(run(*words, "--context", "qa"))
