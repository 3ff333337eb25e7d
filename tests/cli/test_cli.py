"""The `rewire` command through its entry point: what it prints, what it writes, and its exit status."""

import inspect
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import rewire
from commands import FACTS, Command, Run, complaint, installed, start
from rewire import cli
from rewire.cli.app import app
from rewire.stats import Moment
from rewire.stats.store import file_name, write

# interrupted


@pytest.mark.parametrize("where", ["rewire.engine.session.EditSession.edit", "rewire.engine.datasets.read_facts"])
def test_interrupted(edit: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    done = edit()
    assert done.status == 3
    assert (done.out, done.err.strip()) == ("", f"rewire: {cli.INTERRUPTED}")
    assert not (tmp_path / "out").exists()


def test_control_c(tmp_path: Path, preset: Path, contexts: Path) -> None:
    cache = Path(os.environ["REWIRE_CACHE"])
    words = ("edit", "demo", FACTS, "--preset", preset, "--contexts", contexts, "--limit", "4", "--no-evaluate")
    process = start(
        *words, "--set", "v_num_grad_steps=1000000", "--set", "v_lr=1e-9", "--out", tmp_path / "out"
    )  # it would go on for hours
    try:
        end = time.monotonic() + 90
        while len(list(cache.rglob("*.json"))) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)  # until the statistics are there: the values come next
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (3, ""), err
    assert err.splitlines()[-1] == f"rewire: {cli.INTERRUPTED}"
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert len(list(cache.rglob("*_mom2_*.safetensors"))) == 2  # as the message says


# what works


def test_edit_evaluate_merge(edit: Command, run: Command, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    done = edit("--json", "--set", "mom2_update_weight=20000")  # so small an update that bfloat16 loses some of it
    assert done.status == 0, done.err
    report = done.json
    assert report.keys() >= {"facts", "out", "seconds", "before", "after"}
    assert (report["facts"], report["out"]) == (3, str(out))
    assert report["seconds"].keys() >= {"statistics", "values", "keys", "solve", "apply"}
    assert report["before"].keys() >= {"efficacy_success", "paraphrase_success", "neighborhood_success", "score"}
    assert sorted(path.name for path in out.iterdir()) == ["delta.safetensors", "ledger.jsonl", "report.json"]
    saved = json.loads((out / "report.json").read_text())["edits"][0]
    assert {key: saved[key] for key in ("before", "after")} == {key: report[key] for key in ("before", "after")}

    # the delta beside the model measures as the edited model did, the model alone as before
    with_delta = run("evaluate", "demo", FACTS, "--limit", 3, "--delta", out, "--json")
    assert with_delta.status == 0, with_delta.err
    assert with_delta.json.keys() >= {"metrics", "facts"}
    assert with_delta.json["facts"] == 3
    assert with_delta.json["metrics"] == pytest.approx(report["after"], abs=1e-6)
    alone = run("evaluate", "demo", FACTS, "--limit", 3, "--json")
    assert alone.json["metrics"] == pytest.approx(report["before"], abs=1e-6)
    assert alone.json["metrics"] != with_delta.json["metrics"]

    # merged, it is an ordinary model directory
    edited = rewire.load("demo")
    rewire.Delta.load(out).apply(edited)
    ids = torch.tensor([edited.tokenizer("The ferry waits for Ann.")["input_ids"]])
    merged = run("merge", out, "--to", "demo", "--dtype", "float32", "--out", tmp_path / "merged", "--json")
    assert merged.status == 0, merged.err
    assert (merged.json["out"], merged.json["edits"]) == (str(tmp_path / "merged"), 1)
    assert all(lost < 1e-3 for lost in merged.json["lost_to_rounding"].values())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert next(plain.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, edited.hf(ids).logits)
    again = run("evaluate", tmp_path / "merged", FACTS, "--limit", 3, "--json")
    assert again.json["metrics"] == pytest.approx(report["after"], abs=1e-6)

    # by default in the checkpoint's dtype, and what that loses is said
    half = run("merge", out, "--to", "demo", "--out", tmp_path / "half")
    assert half.status == 0, half.err
    assert half.out.startswith(f"1 edit merged into demo, written to {tmp_path / 'half'}\n")
    assert re.search(r"rounding lost up to \d+\.\d % of a weight's update; try --dtype float32", half.out)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert next(stored.parameters()).dtype == torch.bfloat16
    assert not list(tmp_path.glob("*.tmp"))


def test_edit_for_people(edit: Command, tmp_path: Path) -> None:
    done = edit()
    assert done.status == 0
    assert "3 facts edited into demo with memit" in done.out
    assert all(word in done.out for word in ("efficacy", "paraphrase", "neighborhood", "score", "before", "after"))
    last = done.out.splitlines()[-1]  # in one line, to be copied
    assert shlex.split(last) == ["rewire", "merge", str(tmp_path / "out"), "--to", "demo", "--out", "NEW"]


def test_skip_invalid(edit: Command, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    bad = {"subject": "Ann", "prompt": "Bob is a", "target_new": "smith"}
    path.write_text(json.dumps({**bad, "prompt": "{} is a"}) + "\n" + json.dumps(bad) + "\n")
    done = edit("--skip-invalid", "--json", facts=path)
    assert done.status == 0, done.err
    assert done.json["facts"] == 1
    assert [record["where"] for record in done.json["skipped"]] == ["line 2"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["edits"][0]["skipped"] == done.json["skipped"]
    # without target_true no success can be measured, and that is said
    shown = edit("--skip-invalid", "--out", tmp_path / "two", facts=path)
    assert "skipped line 2: subject 'Ann' does not occur in prompt 'Bob is a'" in shown.out
    assert "\n1 fact edited into demo" in shown.out
    assert "-: no fact has what it needs (target_true; paraphrases; neighbors)" in shown.out
    path.write_text(json.dumps(bad) + "\n")
    assert complaint(edit("--skip-invalid", "--out", tmp_path / "three", facts=path)).startswith(
        f"{path}: none of its facts can be edited; line 1: subject 'Ann' does not occur"
    )


def test_options_reach_the_edit(edit: Command, tmp_path: Path) -> None:
    done = edit("--no-evaluate", "--seed", 7, "--set", "v_lr=5e-1", "--set", "layers=[2]", "--json", "--batch-size", 2)
    assert done.status == 0, done.err
    assert done.json["before"] is done.json["after"] is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())["edits"][0]
    assert (report["seed"], report["hparams"]["v_lr"], report["hparams"]["layers"]) == (7, 0.5, [2])
    assert report["contexts"] == ["The ferry waits. {}", "You see. {}"]
    assert report["preset"].endswith("fast.yaml")


def test_statistics_of_ones_own(edit: Command, tmp_path: Path) -> None:
    model = rewire.load("demo")
    folder = tmp_path / "stats"
    folder.mkdir()
    path = folder / file_name(model.anatomy.layer_name(1), "float32", 10, None)
    width = model.anatomy.d_in
    write(path, Moment.of(torch.eye(width) * 4 * width, 4 * width, 10, "here"), {"fingerprint": model.fingerprint})
    done = edit("--set", "layers=[1]", "--stats", folder, "--json")
    assert done.status == 0, done.err
    (statistics,) = json.loads((tmp_path / "out" / "report.json").read_text())["edits"][0]["statistics"].values()
    assert statistics == {"source": str(path), "tokens": 4 * width, "corpus": None}
    assert not list(Path(os.environ["REWIRE_CACHE"]).rglob("*_mom2_*"))


def test_inspect(run: Command, other: Path) -> None:
    model = rewire.load("demo")
    found = run("inspect", "demo", "--json").json
    assert (found["model_type"], found["n_layers"], found["d_in"]) == (
        "llama",
        model.anatomy.n_layers,
        model.anatomy.d_in,
    )
    assert found["edited_weight"] == "model.layers.{}.mlp.down_proj.weight"
    assert found["fingerprint"] == model.fingerprint
    assert found["dtype"] == "bfloat16"
    assert "layers [" in found["preset for memit"]
    shown = run("inspect", other)
    assert shown.status == 0
    assert "model.layers.{}.mlp.down_proj.weight" in shown.out
    assert found["fingerprint"] not in shown.out


def test_presets(run: Command) -> None:
    found = run("presets", "--json").json
    assert found["memit"]["cf-gpt2"]["layers"] == [1, 2, 3]
    assert run("presets", "memit", "--json").json["memit"] == found["memit"]
    shown = run("presets").out
    assert all(name in shown for name in found["memit"])


def test_demo(run: Command, tmp_path: Path) -> None:
    done = run("demo", "--limit", 8, "--json", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert done.json.keys() >= {"facts", "out", "seconds", "before", "after"}
    assert (done.json["facts"], done.json["out"]) == (8, str(tmp_path / "out"))
    assert done.json["before"]["efficacy_success"] < 0.5
    assert (tmp_path / "out" / "delta.safetensors").is_file()


# help


def verbs(group: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    group = group or get_command(app)
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found += verbs(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]
    return found


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_help_has_an_example_that_works(run: Command, verb: tuple[str, ...]) -> None:
    done = run(*verb, "--help")
    assert (done.status, done.err) == (0, "")
    (example,) = re.findall(r"^ *Example: (rewire .*)$", done.out, re.M)
    words = shlex.split(example)
    assert words[1 : 1 + len(verb)] == list(verb)
    command: Any = get_command(app)
    for name in verb:
        command = command.commands[name]
    context = command.make_context(verb[-1], words[1 + len(verb) :], resilient_parsing=False)
    assert context.params.keys() == set(inspect.signature(command.callback).parameters)
    assert "--json" in done.out


def test_help_of_the_whole(run: Command) -> None:
    done = run("--help")
    assert done.status == 0
    assert all(verb[0] in done.out for verb in verbs())
    bare = run()
    assert (bare.status, bare.out) == (2, "")
    assert bare.err.splitlines()[0] == "Usage: rewire [OPTIONS] COMMAND [ARGS]..."  # help, in its own lines
    assert run("bench").err.count("\n") > 5


def test_version(run: Command) -> None:
    assert run("--version") == Run(0, f"{rewire.__version__}\n", "")


# the installed script


def test_the_script_gives_one_json_document(tmp_path: Path, preset: Path, contexts: Path) -> None:
    fast = ("--preset", preset, "--contexts", contexts, "--limit", 2)
    done = installed("edit", "demo", FACTS, *fast, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    assert done.json["facts"] == 2
    assert "Loading weights" not in done.err  # no bars where stdout is no terminal


def test_the_script_refuses_in_one_line(tmp_path: Path) -> None:
    message = complaint(installed("edit", "demo", tmp_path / "no.jsonl", "--out", tmp_path / "out"))
    assert message == f"{tmp_path / 'no.jsonl'}: no such file (expected facts as .jsonl, .csv or .json)"


def test_a_hub_model_that_is_not_there(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = complaint(run("inspect", "rewire-no-such-model"))
    assert message.startswith(
        "rewire-no-such-model: no such folder, not in the hub's cache, and the hub cannot be reached"
    )
