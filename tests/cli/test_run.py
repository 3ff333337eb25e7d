"""`rewire run` through the command's entry point, and killed."""

import inspect
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import rewire
from commands import FACTS, Command, complaint, start
from rewire.cli.run import run as verb
from rewire.engine.experiment.config import Experiment

FAST = ("layers=[1, 2]", "v_num_grad_steps=4", "mom2_tokens=1600", "mom2_max_length=64", "mom2_update_weight=50")
SETTINGS = [word for setting in FAST for word in ("--set", setting)]
FOLDER = "MEMIT_RECURSIVE/demo/facts/N_6/S_0/I_2"

PUBLISHED = """alg_name: MEMIT_RECURSIVE
model_name: ./hugging_cache/gpt2-xl
stats_dir: ./data/stats
device: 0
layers: [1, 2]
clamp_norm_factor: 0.75
layer_selection: all
fact_token: subject_last
v_num_grad_steps: 3
v_lr: 5e-1
v_weight_decay: 0.5
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 20
mom2_dataset: wikipedia
mom2_n_samples: 300
mom2_dtype: float32
model_parallel: false
rewrite_module_tmp: transformer.h.{}.mlp.c_proj
layer_module_tmp: transformer.h.{}
mlp_module_tmp: transformer.h.{}.mlp
attn_module_tmp: transformer.h.{}.attn
ln_f_module: transformer.ln_f
lm_head_module: transformer.wte
"""


@pytest.fixture
def words(tmp_path: Path, contexts: Path) -> list[object]:
    return [
        *("run", "--model", "demo", "--data", FACTS, "--num-edits", 6, "--iterations", 2, *SETTINGS),
        *("--contexts", contexts, "--data-dir", tmp_path),
    ]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewire.engine.experiment.plots.draw", lambda summary, path, title: None)


def test_every_key_is_a_flag() -> None:
    flags = {"set" if name == "settings" else name for name in inspect.signature(verb).parameters}
    assert flags == set(Experiment.model_fields) | {"file", "summarize", "json"}


@pytest.mark.usefixtures("no_pictures")
def test_the_published_command_line(
    run: Command, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own flags, its own paths and a preset file of its own form, in a folder laid out as there."""
    monkeypatch.chdir(tmp_path)
    records = json.loads((shared / "data" / "mcf_subset_1.json").read_text())[:4]
    (tmp_path / "data" / "mcf_random_subsets_4").mkdir(parents=True)
    (tmp_path / "data" / "mcf_random_subsets_4" / "random_subset_1.json").write_text(json.dumps(records))
    (tmp_path / "hugging_cache").mkdir()
    (tmp_path / "hugging_cache" / "gpt2-xl").symlink_to(shared / "models" / "cf-gpt2")
    preset = tmp_path / "hparams" / "MEMIT_RECURSIVE" / "gpt2-xl.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(PUBLISHED)
    line = ["run", "--alg_name", "MEMIT_RECURSIVE", "--model_name", "gpt2-xl", "--hparams_fname", str(preset)]
    line += ["--ds_name", "mcf", "--num_edits", "4", "--ds_subset", "1", "--iterations", "2"]
    stats = shared / "goldens" / "cf-gpt2" / "stats"
    done = run(*line, "--stats", stats)
    assert done.status == 0, done.err
    folder = tmp_path / "results/MEMIT_RECURSIVE/gpt2-xl/mcf/N_4/S_1/I_2"
    assert (folder / "results_2.json").is_file()
    assert (folder / "summary.json").is_file()
    assert (folder / "Group_MEMIT_RECURSIVE_gpt2-xl_mcf_N_4_S_1_I_2.csv").is_file()
    again = run(*line, "--stats", stats, "--summarize", "--json")
    assert again.status == 0, again.err
    assert [row["number"] for row in again.json["iterations"]] == [0, 1, 2]


def test_for_people(run: Command, words: list[object], tmp_path: Path) -> None:
    done = run(*words, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    head, *steps, _, legend, last = done.out.splitlines()
    assert head.split()[:3] == ["step", "facts", "efficacy"]
    assert [line.split()[:2] for line in steps] == [["0", "6"], ["1", "6"], ["2", "6"]]
    assert all(len(line) <= len(head) < 80 for line in steps)
    assert "SPREAD" in legend
    assert last == f"written to {tmp_path / 'out' / FOLDER}"
    assert "no ME-PPL is measured" in done.err
    assert (tmp_path / "out" / FOLDER / "summary.png").stat().st_size > 10_000
    again = run(*words, "--out", tmp_path / "out")  # finished: the same table, nothing loaded
    assert (again.status, again.out) == (0, done.out)


@pytest.mark.usefixtures("no_pictures")
def test_for_machines(run: Command, words: list[object], tmp_path: Path) -> None:
    done = run(*words, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    said = done.json
    assert said.keys() == {"out", "iterations", "seconds"}
    assert said["out"] == str(tmp_path / "out" / FOLDER)
    first, *rows = said["iterations"]
    assert first["metrics"].keys() >= {"efficacy_acc", "specificity_success", "score_success", "me_ppl"}
    assert all(row.keys() >= {"number", "metrics", "optimization", "spread", "seconds"} for row in rows)
    assert rows[1]["metrics"]["efficacy_acc"] >= first["metrics"]["efficacy_acc"]
    # its own record of itself is the same experiment, and an edit's folder
    again = run("run", tmp_path / "out" / FOLDER / "experiment.yaml", "--json")
    assert again.json["iterations"] == said["iterations"]
    measured = run("evaluate", "demo", FACTS, "--limit", 6, "--delta", tmp_path / "out" / FOLDER, "--json")
    assert measured.status == 0, measured.err
    assert measured.json["metrics"]["efficacy_success"] == rows[1]["metrics"]["efficacy_success"]


def test_what_is_wrong(run: Command, tmp_path: Path, words: list[object]) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("model: demo\ndata: mcf\nitertions: 2\n")
    assert complaint(run("run", file)) == f"{file}: unknown key 'itertions'; did you mean 'iterations'?"
    assert complaint(run("run", tmp_path / "no.yaml")).startswith(f"{tmp_path / 'no.yaml'}: cannot be read")
    assert complaint(run("run")).startswith("--model is missing; expected a model: name it, or a FILE ")
    assert complaint(run(*words, "--set", "v_lrr=1")) == "--set: unknown hyper-parameter 'v_lrr'; did you mean 'v_lr'?"
    assert complaint(run(*words, "--set", "v_lr=fast")) == "--set: v_lr: 'fast' found, expected a number"
    assert complaint(run(*words, "--convention", "zsre")).endswith(
        "this is no zsRE record (src, answers); leave it out"
    )
    assert complaint(run(*words, "--stats", tmp_path / "no")).startswith(f"--stats {tmp_path / 'no'}: no such folder")
    assert complaint(run(*words, "--alg_name", "MEMIT_RECURSIVE_NEIGHBOR")).startswith(
        f"{FACTS}: 6 of 6 facts have no edit_neighbors, and neighbours' help is asked for; `rewire neighbors demo"
    )
    assert not (tmp_path / "results").exists()


def test_interrupted(run: Command, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rewire.engine.session.EditSession.edit", interrupt)
    done = run(*words, "--out", tmp_path / "out", "--json")
    assert (done.status, done.out) == (3, "")
    assert done.err.splitlines()[-1] == (
        "rewire: interrupted, the unedited model measured; given again, the same command goes on"
    )


@pytest.mark.usefixtures("no_pictures")
def test_stopped_by_the_gap(run: Command, words: list[object], tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text('[" The ferry waits for the old man.", " Here is a story."]')
    words += ["--out", tmp_path / "out", "--perplexity", texts, "--stop-gap", 1e9]
    for more in ([], ["--summarize"]):
        done = run(*words, *more)
        assert done.status == 0, done.err
        assert "of 2 texts (ME-PPL)" in done.out
        assert done.out.splitlines()[-2] == "stopped after 1 of 2: SPREAD within 1e+09 of OPTIMIZATION"
    done = run(*words, "--batch", 4)
    assert done.out.splitlines()[-2] == ("stopped after 1 of 2 in 2 of 2 batches: SPREAD within 1e+09 of OPTIMIZATION")


def results(folder: Path) -> Any:
    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key != "time"}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    read = {path.name: timeless(json.loads(path.read_text())) for path in sorted(folder.glob("results_*.json"))}
    return read | {path.name: path.read_text() for path in folder.glob("Group*.csv")}


@pytest.mark.usefixtures("no_pictures")
def test_killed_and_started_again(
    run: Command, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the unedited model's evaluation, and behind the first step's; it ends as one that was never killed."""

    def wait_for(path: str, process: Any) -> None:
        end = time.monotonic() + 90
        while not list(tmp_path.glob(path)) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)

    for seen in ("cache/evaluations/*.json", f"out/{FOLDER}/results_1.json"):
        process = start(*words, "--out", tmp_path / "out")
        wait_for(seen, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, seen
        assert not (tmp_path / "out" / FOLDER / "summary.json").exists()

    assert run(*words, "--out", tmp_path / "out").status == 0
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "another"))
    assert run(*words, "--out", tmp_path / "once").status == 0
    often, once = results(tmp_path / "out" / FOLDER), results(tmp_path / "once" / FOLDER)
    assert {"results_1.json", "results_2.json"} <= set(often)
    assert often == once
    (one,), (other,) = (rewire.Delta.load(tmp_path / out / FOLDER).updates for out in ("out", "once"))
    assert all((one[name].dense() == other[name].dense()).all() for name in other)
