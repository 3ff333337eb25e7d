"""Whole experiments on the demo model: what they write, stopped and gone on with, in batches, summed up again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rewire
from rewire.engine.datasets import write_facts
from rewire.engine.experiment.config import read_experiment
from rewire.engine.experiment.data import facts_of
from rewire.engine.experiment.run import Row, run, summarize
from rewire.engine.facts import EditNeighbor, to_record
from rewire.engine.model import demo_file

FAST = {"layers": [1, 2], "v_num_grad_steps": 4, "mom2_tokens": 1600, "mom2_max_length": 64, "mom2_update_weight": 50}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than such small experiments."""
    monkeypatch.setattr("rewire.engine.experiment.plots.draw", lambda summary, path, title: None)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """Twelve facts of the demo, each with the next one's question as its edit-time neighbour, and a text to follow."""
    read = rewire.read_facts(demo_file("facts.jsonl"), limit=12)
    path = tmp_path / "facts.jsonl"
    records = []
    for fact, other in zip(read, [*read[1:], read[0]], strict=True):
        kept = {"subject": other.subject, "prompt": other.prompt, "target": other.target_true}
        records.append(to_record(fact) | {"edit_neighbors": [kept], "neighbors": list(fact.neighbors[:3])})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "ME-PPL_50.json").write_text('[{"Text": " The ferry waits for the old man."}, " Here is a story."]')
    return path


@pytest.fixture
def asked(facts: Path, tmp_path: Path) -> dict[str, Any]:
    contexts = tmp_path / "contexts.json"
    contexts.write_text('["The ferry waits. {}"]')
    return {"model": "demo", "data": str(facts), "iterations": 2, "set": FAST, "contexts": contexts} | {
        "data_dir": tmp_path, "out": tmp_path / "out",
    }  # fmt: skip


@pytest.fixture
def go(asked: dict[str, Any], load: Callable[[str], rewire.Model]) -> Callable[..., Path]:
    """Runs the experiment with other keys, on a model as it was given."""

    def go(listener: Any = lambda phase, done, total: None, tell: Any = lambda row: None, **keys: Any) -> Path:
        return run(read_experiment(None, asked | keys), listener, tell, lambda *_: load("demo"))

    return go


def content(folder: Path) -> dict[str, Any]:
    """What of a folder must be the same in every run: all but times, dates, ids of edits and where values came from."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name in ("ledger.jsonl", "progress.json", "experiment.yaml"):
            found[path.name] = None
        elif path.suffix == ".json":
            found[path.name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            found[path.name] = path.read_text()
        else:
            found[path.name] = [
                {name: factors.dense().tolist() for name, factors in update.items()}
                for update in rewire.Delta.load(folder).updates
            ]
    return found


def timeless(value: Any) -> Any:
    gone = (
        "time",
        "seconds",
        "source",
        "date",
        "id",
        "cached",
        "optimised",
        "facts_per_second",
        "capacity",
        "implementations",
    )
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in gone}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_a_whole_run(go: Callable[..., Path], asked: dict[str, Any], tmp_path: Path) -> None:
    rows: list[Row] = []
    folder = go(tell=rows.append)
    assert folder == tmp_path / "out/MEMIT_RECURSIVE/demo/facts/N_12/S_0/I_2"
    there = {path.name for path in folder.iterdir()}
    label = "MEMIT_RECURSIVE_demo_facts_N_12_S_0_I_2"
    assert there >= {
        *("experiment.yaml", "progress.json", "me_ppl.json", "results_1.json", "results_2.json", "summary.json"),
        *("summary.png", "delta.safetensors", "report.json", "ledger.jsonl", f"Group_{label}.csv"),
    }
    assert not [name for name in there if name.endswith(".tmp")]
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert set(json.loads((folder / "me_ppl.json").read_text())) == {"0", "1", "2"}
    assert rows[2]["metrics"]["me_ppl"] == json.loads((folder / "me_ppl.json").read_text())["2"]

    # the perplexities are those of the values; what one iteration leaves is what the next begins with
    (report,) = json.loads((folder / "report.json").read_text())["edits"]
    assert [i["spread"] for i in report["iterations"]] == [rows[1]["spread"], rows[2]["spread"]]
    # and the time is the edit's: neither that of statistics nor that of the SPREAD
    for number, made in enumerate(report["iterations"], 1):
        phases = {"values", "keys", "solve", "apply"}
        assert made["seconds"].keys() > phases
        (time,) = {record["time"] for record in json.loads((folder / f"results_{number}.json").read_text())}
        assert time == pytest.approx(sum(made["seconds"][phase] for phase in phases))
        assert time == pytest.approx(rows[number]["seconds"], abs=1e-3)
    assert rows[1]["spread"] == pytest.approx(rows[2]["initial"], rel=1e-3)
    assert rows[2]["optimization"] < rows[2]["initial"]
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["post"]["final_ppl"] for entry in summary] == [pytest.approx(row["optimization"]) for row in rows[1:]]

    # what was measured last is what the saved delta gives, before that the unedited model
    edited = rewire.load("demo")
    rewire.Delta.load(folder).apply(edited)
    measured = rewire.evaluate(edited, facts_of(read_experiment(None, asked)), protocol="underedit")
    assert measured["metrics"]["efficacy_acc"] == pytest.approx(rows[2]["metrics"]["efficacy_acc"])
    assert summary[0]["pre"]["rewrite_acc"] == rows[0]["metrics"]["efficacy_acc"]

    # finished, it is not done again; what is in the folder is the same experiment
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again: list[Row] = []
    assert go(tell=again.append) == folder
    assert again == rows
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert read_experiment(folder / "experiment.yaml") == read_experiment(None, asked)


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_of_another(go: Callable[..., Path], facts: Path, asked: dict[str, Any]) -> None:
    folder = go(iterations=1)
    with pytest.raises(
        rewire.InputError, match=r"another experiment: seed is 0 there, 3 asked for; name another --out"
    ):
        go(iterations=1, seed=3)
    with pytest.raises(rewire.InputError, match=r"stop_gap is null there, 0.5 asked for"):
        go(iterations=1, stop_gap=0.5)
    # what is wrong in itself is said as that
    for wrong, said in (
        ({"set": FAST | {"v_lr": -1}}, r"^--set: v_lr: -1 found, expected more than 0"),
        ({"dtype": "float23"}, r"^--dtype: 'float23' found"),
        ({"preset": "nonesuch"}, "no such file, and no shipped preset"),
        ({"contexts": facts.with_name("no.json")}, "no context templates there"),
        ({"stats": "no/where"}, "^--stats no/where: no such folder"),
        ({"stats": "pull"}, "no published ones of demo"),
    ):
        with pytest.raises(rewire.InputError, match=said):
            go(iterations=1, **wrong)
    with pytest.raises(rewire.InputError, match=r"another experiment: set is .*v_lr: 0.3"):
        go(iterations=1, set=FAST | {"v_lr": 0.3})
    written = (folder / "experiment.yaml").read_text()
    (folder / "experiment.yaml").write_text(written.replace("compat: false", "compat: true"))
    with pytest.raises(rewire.InputError, match="begun with other experiment"):
        run(read_experiment(folder / "experiment.yaml"))
    (folder / "experiment.yaml").write_text(written)
    facts.write_text(facts.read_text().replace("trumpet", "cymbal"))
    with pytest.raises(rewire.InputError, match="begun with other facts"):
        go(iterations=1)
    foreign = asked["out"] / "MEMIT/demo/facts/N_3/S_0/I_1"
    foreign.mkdir(parents=True)
    (foreign / "mine.txt").write_text("precious")
    with pytest.raises(rewire.InputError, match=r"no experiment of Rewire's"):
        go(iterations=1, num_edits=3)


@pytest.mark.usefixtures("no_pictures")
def test_finished_on_files_that_read_otherwise_now(go: Callable[..., Path], tmp_path: Path) -> None:
    preset, contexts, corpus = tmp_path / "p.yaml", tmp_path / "c.json", tmp_path / "text.txt"
    preset.write_text("layers: [1]\n")
    contexts.write_text('["The ferry waits. {}"]')
    corpus.write_text(demo_file("corpus.txt").read_text())
    keys = {"preset": str(preset), "contexts": contexts, "corpus": str(corpus), "stats": None, "iterations": 1}
    go(**keys)
    for path, name in ((preset, "preset"), (contexts, "contexts"), (corpus, "corpus")):
        before = path.read_text()
        path.write_text(before.replace("[1]", "[2]").replace("ferry", "river"))
        with pytest.raises(rewire.InputError, match=f"begun with other {name} than now"):
            go(**keys)
        path.write_text(before)
    go(**keys)


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("no_pictures")
def test_stopped_anywhere_it_goes_on(go: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an iteration's values, keys or evaluation; what is measured is not measured again."""
    once = content(go(out=tmp_path / "once"))
    for number, (phase, done) in enumerate([("values", 0), ("evaluate", 0), ("keys", 1), ("evaluate", 1)]):
        monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / f"cache{number}"))
        rows: list[Row] = []

        def listener(
            heard: str, at: int, total: int, phase: str = phase, rows: list[Row] = rows, n: int = done
        ) -> None:
            if heard == phase and len(rows) == 1 + n:
                raise Stopped

        out = tmp_path / f"out{number}"
        with pytest.raises(Stopped):
            go(listener, rows.append, out=out)
        folder = out / "MEMIT_RECURSIVE/demo/facts/N_12/S_0/I_2"
        assert not (folder / "summary.json").exists()
        results = [folder / f"results_{t}.json" for t in (1, 2)]
        assert [path.exists() for path in results] == [bool(done), False]
        stamps = [path.stat().st_mtime_ns for path in results[:done]]
        heard: list[str] = []
        assert go(lambda phase, at, total, heard=heard: heard.append(phase), rows.append, out=out) == folder
        assert stamps == [path.stat().st_mtime_ns for path in results[:done]]
        assert [row["number"] for row in rows[1 + done :]] == [0, 1, 2]
        assert content(folder) == once


@pytest.mark.usefixtures("no_pictures")
def test_batches_in_sequence(go: Callable[..., Path], tmp_path: Path) -> None:
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        if row["number"] == 2 and len(rows) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        go(tell=tell, batch=5)
    folder = go(tell=rows.append, batch=5)
    assert folder == tmp_path / "out/MEMIT_RECURSIVE/demo/facts/N_12/S_0/B_5/I_2"
    assert content(folder) == content(go(batch=5, out=tmp_path / "once"))
    assert [(row["number"], row["facts"]) for row in rows[3:]] == [(0, 12), (1, 5), (2, 10), (3, 12)]
    assert [len(json.loads((folder / f"results_{t}.json").read_text())) for t in (1, 2, 3)] == [5, 10, 12]
    retention = json.loads((folder / "retention.json").read_text())
    assert [[line["facts"] for line in entry["batches"]] for entry in retention] == [[5], [5, 5], [5, 5, 2]]
    shares = retention[2]["batches"]
    together = sum(line["facts"] * line["efficacy_acc"] for line in shares) / 12
    assert together == pytest.approx(rows[-1]["metrics"]["efficacy_acc"])
    reports = json.loads((folder / "report.json").read_text())["edits"]
    assert [(edit["fact_count"], len(edit["iterations"])) for edit in reports] == [(5, 2), (5, 2), (2, 2)]
    # perplexities of a batch that is over stay what they were
    first, last = (json.loads((folder / f"results_{t}.json").read_text())[0]["post"] for t in (1, 3))
    assert first["spread_ppl"] == last["spread_ppl"]
    assert len(rewire.Delta.load(folder).updates) == 3
    # the table and what is summed up again begin with all facts, too
    (table,) = folder.glob("Group_*.csv")
    unedited = table.read_text().splitlines()[2].split(",")
    assert float(unedited[1]) == pytest.approx(rows[3]["metrics"]["efficacy_acc"])
    assert [row["iterations"] for row in rows[4:]] == [2, 2, 2]
    _, again = summarize(read_experiment(folder / "experiment.yaml", {"out": tmp_path / "out"}))
    assert [(row["number"], row["facts"]) for row in again] == [(0, 12), (1, 5), (2, 10), (3, 12)]
    assert again[0]["texts"] == rows[3]["texts"] == 2
    assert [row["iterations"] for row in again[1:]] == [2, 2, 2]
    for name in ("efficacy_acc", "generalization_success", "specificity_success", "score_success", "me_ppl"):
        assert again[0]["metrics"][name] == pytest.approx(rows[3]["metrics"][name]), name


@pytest.mark.usefixtures("no_pictures")
def test_it_stops_by_the_gap(go: Callable[..., Path]) -> None:
    rows: list[Row] = []
    folder = go(tell=rows.append, iterations=4, stop_gap=1e9)
    assert [row["number"] for row in rows] == [0, 1]
    assert folder.name == "I_4"
    assert len(json.loads((folder / "summary.json").read_text())) == 1


@pytest.mark.usefixtures("no_pictures")
def test_neighbours(go: Callable[..., Path], facts: Path, asked: dict[str, Any]) -> None:
    plain, helped = go(iterations=1), go(iterations=1, neighbors=True)
    assert helped.parts[-6] == "MEMIT_RECURSIVE_NEIGHBOR"
    assert content(plain)["delta.safetensors"] != content(helped)["delta.safetensors"]
    records = [json.loads(line) for line in facts.read_text().splitlines()]
    for record in records[:2]:
        del record["edit_neighbors"]
    facts.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(rewire.InputError, match=r"2 of 12 facts have no edit_neighbors, .*`rewire neighbors demo "):
        go(neighbors=True, out="elsewhere")


@pytest.mark.usefixtures("no_pictures")
def test_two_edit_neighbours_and_none_is_measured(
    go: Callable[..., Path], asked: dict[str, Any], tmp_path: Path
) -> None:
    read = rewire.read_facts(asked["data"], limit=3)
    kept = (*read[0].edit_neighbors, EditNeighbor(read[2].subject, read[2].prompt, str(read[2].target_true)))
    fact = rewire.Fact(
        read[0].subject, read[0].prompt, read[0].target_new, read[0].target_true,
        neighbors=(*read[0].neighbors, kept[1].question), edit_neighbors=kept,
    )  # fmt: skip
    write_facts(tmp_path / "two.jsonl", [fact])
    folder = go(data=str(tmp_path / "two.jsonl"), neighbors=True, iterations=1)
    (record,) = json.loads((folder / "results_1.json").read_text())
    assert record["requested_rewrite"]["locality"]["neighborhood"]["prompt"] == list(read[0].neighbors)


@pytest.mark.usefixtures("no_pictures")
def test_summed_up_again(go: Callable[..., Path], asked: dict[str, Any]) -> None:
    rows: list[Row] = []
    folder = go(tell=rows.append)
    made = content(folder)
    for name in ("summary.json", "progress.json", "experiment.yaml"):
        (folder / name).unlink()
    again, found = summarize(read_experiment(None, asked))
    assert again == folder
    assert {name: made[name] for name in ("summary.json", "results_1.json")} == {
        name: content(folder)[name] for name in ("summary.json", "results_1.json")
    }
    for mine, other in zip(found, rows, strict=True):
        for name, value in mine["metrics"].items():
            if (mine["number"], name) != (0, "rewrite_ppl"):  # the published tables leave it out
                assert value == pytest.approx(other["metrics"][name]), name
        assert mine.get("spread") == pytest.approx(other.get("spread"))
    shutil.rmtree(folder)
    with pytest.raises(rewire.InputError, match=r"no results_1.json there, nothing to sum up"):
        summarize(read_experiment(None, asked))


def test_what_can_be_known_is_said_before_the_model_is_loaded(asked: dict[str, Any], tmp_path: Path) -> None:
    def load(*_: str) -> rewire.Model:
        raise AssertionError("the model was loaded")

    preset = tmp_path / "bad.yaml"
    preset.write_text("layers: [1]\nclamp_norm_factor: wide\n")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"data": "no.jsonl"}, "no such file"),
        ({"stats": str(tmp_path / "no")}, "no such folder; expected one that holds second moments, or 'pull'"),
        ({"preset": "nonesuch"}, "no such file, and no shipped preset"),
        ({"preset": str(preset)}, r"bad.yaml: clamp_norm_factor: 'wide' found, expected a number"),
        ({"stats": "pull"}, "no published ones of demo"),
        ({"corpus": str(tmp_path / "no.txt")}, "no such corpus"),
        ({"contexts": tmp_path / "no.json"}, "no context templates there"),
        ({"perplexity": tmp_path / "no.json"}, "no such file, expected texts"),
    ]
    for keys, said in wrong:
        with pytest.raises(rewire.InputError, match=said):
            run(read_experiment(None, asked | keys), load=load)
    assert not Path(asked["out"]).exists()


def test_published_statistics_are_fetched(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def pull(name: str, out: Path) -> list[Path]:
        fetched.append(name)
        return [tmp_path / "wikipedia_stats" / "x.npz"]

    monkeypatch.setattr("rewire.engine.experiment.begin.pull", pull)
    (tmp_path / "gpt2-xl").mkdir()
    with pytest.raises(rewire.InputError, match=r"no model there"):
        run(read_experiment(None, asked | {"model": str(tmp_path / "gpt2-xl"), "stats": "pull"}))
    assert fetched == ["gpt2-xl"]
