"""The `rewire` command through its entry point: what it prints, what it writes, and its exit status."""

import inspect
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import rewire
from rewire import cli
from rewire.cli.app import app
from rewire.engine.model import demo_file
from rewire.stats import Moment
from rewire.stats.store import file_name, write

FACTS = str(demo_file("facts.jsonl"))


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document without NaN and nothing else."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


Command = Callable[..., Run]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """run("edit", "demo", ...) in this process, by the function that the installed script calls."""
    log = logging.getLogger("rewire")
    handlers, propagate, threads = log.handlers, log.propagate, torch.get_num_threads()
    torch.set_num_threads(1)  # many small models: on a busy machine threads spend most of their time waiting

    def run(*words: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["rewire", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Run(left.value.code, out, err)

    yield run
    log.handlers, log.propagate = handlers, propagate
    torch.set_num_threads(threads)


def start(*words: object) -> subprocess.Popen[str]:
    """The installed script, in a process of its own."""
    script = Path(sys.executable).with_name("rewire")
    return subprocess.Popen(
        [str(script), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def installed(*words: object) -> Run:
    process = start(*words)
    out, err = process.communicate(timeout=120)
    return Run(process.returncode, out, err)


def complaint(done: Run) -> str:
    """What is said about wrong input: one line on stderr, nothing on stdout, status 2."""
    assert done.status == 2, done
    assert done.out == ""
    assert done.err.startswith("rewire: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    return done.err.removeprefix("rewire: ").rstrip("\n")


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """Few steps on few tokens; small lambda, so that weights move."""
    path = tmp_path / "fast.yaml"
    path.write_text(
        "layers: [1, 2]\nv_num_grad_steps: 5\nmom2_tokens: 1600\nmom2_max_length: 64\nmom2_update_weight: 50\n"
    )
    return path


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    path = tmp_path / "contexts.json"
    path.write_text('["The ferry waits. {}", "You see. {}"]')
    return path


@pytest.fixture
def edit(run: Command, preset: Path, contexts: Path, tmp_path: Path) -> Command:
    """`rewire edit demo FACTS --out tmp/out` with options; `model` and `facts` may be others."""

    def edit(*options: object, model: object = "demo", facts: object = FACTS, limit: int = 3) -> Run:
        fast = ("--preset", preset, "--contexts", contexts, "--limit", limit)
        return run("edit", model, facts, *fast, "--out", tmp_path / "out", *options)

    return edit


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model directory with the demo's shape and other weights."""
    model = rewire.load("demo")
    with torch.no_grad():
        model.hf.get_submodule(model.anatomy.norm).weight.mul_(1.5)
    model.hf.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


# wrong input


def test_facts_that_are_wrong(edit: Command, tmp_path: Path) -> None:
    good = {"subject": "Ann", "prompt": "{} is a", "target_new": "smith"}

    def said(*records: Any) -> str:
        path = tmp_path / "mine.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        message = complaint(edit(facts=path, limit=99))
        assert message.startswith(f"{path}: ")
        return message.removeprefix(f"{path}: ")

    missing = tmp_path / "no.jsonl"
    assert complaint(edit(facts=missing)) == f"{missing}: no such file (expected facts as .jsonl, .csv or .json)"
    assert re.fullmatch(r"line 2: broken JSON \(.* at column \d+\)", said(good, '{"subject": "Ann",'))
    assert said() == "no facts in it"
    assert said({**good, "targetnew": "x"}) == "line 1: unknown field 'targetnew'; did you mean 'target_new'?"
    hint = "1 fact cannot be edited (--skip-invalid goes on without): line 2:"
    assert said(good, {**good, "target_new": ""}) == f"{hint} target_new is empty"
    absent = "subject 'Ann' does not occur in prompt 'Bob is a' and no {} marks its place"
    assert said(good, {**good, "prompt": "Bob is a"}) == f"{hint} {absent}"
    twice = "subject 'Ann' occurs 2 times in prompt 'Ann, Ann is a': mark the place with {}"
    assert said(good, {**good, "prompt": "Ann, Ann is a"}) == f"{hint} {twice}"
    assert not (tmp_path / "out").exists()


def test_hyper_parameters_that_are_wrong(edit: Command, preset: Path, tmp_path: Path) -> None:
    assert complaint(edit("--method", "memmit")) == "unknown method 'memmit'; did you mean 'memit'?"
    assert complaint(edit("--set", "v_lrr=1")) == "--set: unknown hyper-parameter 'v_lrr'; did you mean 'v_lr'?"
    assert complaint(edit("--set", "v_lr")) == "--set v_lr: expected key=value"
    assert complaint(edit("--set", "layers=[1")).startswith("--set layers=[1: the value cannot be read")
    assert complaint(edit("--set", "v_lr=fast")).startswith("--set: v_lr: Input should be a valid number")
    n = rewire.load("demo").anatomy.n_layers
    assert complaint(edit("--set", "layers=[1, 99]")) == (
        f"--set: layers [1, 99] out of range: the model has layers 0 to {n - 1}"
    )
    preset.write_text("layers: [1, 99]\n")
    assert complaint(edit()).startswith(f"{preset}: layers [1, 99] out of range")
    preset.write_text("layers: [1]\nqq: 3\n")
    assert complaint(edit()).startswith(f"{preset}: unknown hyper-parameter 'qq'; known are ")
    assert complaint(edit("--preset", "nonesuch")).startswith("--preset nonesuch: no such file, and no shipped preset")
    assert not (tmp_path / "out").exists()


def test_contexts_that_are_wrong(edit: Command, contexts: Path) -> None:
    contexts.write_text('["The ferry waits."]')
    assert complaint(edit()) == (
        f"{contexts}: context template 'The ferry waits.' found, expected text that ends in {{}}"
    )
    contexts.write_text('{"a": 1}')
    assert complaint(edit()) == f"{contexts}: dict found, expected a JSON list of context templates"
    contexts.write_text("[")
    assert complaint(edit()).startswith(f"{contexts}: no context templates there (")
    contexts.unlink()
    assert complaint(edit()).startswith(f"{contexts}: no context templates there (")


@pytest.mark.parametrize("size", ["model", "width"])
def test_statistics_of_another_model(edit: Command, tmp_path: Path, size: str) -> None:
    model = rewire.load("demo")
    layer, width = model.anatomy.layer_name(1), model.anatomy.d_in + (size == "width")
    folder = tmp_path / "stats"
    folder.mkdir()
    path = folder / file_name(layer, "float32", 10, None)
    about = {} if size == "width" else {"model": "gpt-9", "fingerprint": "0123456789abcdef"}
    write(path, Moment(torch.eye(width), 4 * width, 10, "here"), about)
    message = complaint(edit("--set", "layers=[1]", "--stats", folder))
    assert message.startswith(f"{path}: statistics of ")
    assert ("another model: of gpt-9 (weights 0123456789abcdef)" in message) == (size == "model")
    assert (f"of width {width} found" in message and f"has {width - 1}" in message) == (size == "width")
    assert not (tmp_path / "out").exists()


def test_statistics_and_corpora_that_are_not_there(edit: Command, tmp_path: Path) -> None:
    folder = tmp_path / "stats"
    assert complaint(edit("--stats", folder)).startswith(f"--stats {folder}: no such folder; expected")
    folder.mkdir()
    assert "no statistics for model.layers.1.mlp.down_proj" in complaint(edit("--stats", folder))
    corpus = tmp_path / "no.txt"
    assert complaint(edit("--corpus", corpus)).startswith(f"{corpus}: no such corpus; expected a file")
    corpus.write_text("\n\n")
    assert complaint(edit("--corpus", corpus)).startswith(f"{corpus}: no document with text in it")


def test_models_that_are_not_there(edit: Command, run: Command, tmp_path: Path) -> None:
    missing = tmp_path / "nonesuch"
    assert complaint(edit(model=missing)).startswith(f"{missing}: no model there; expected a Hugging Face model")
    (tmp_path / "empty").mkdir()
    message = complaint(edit(model=tmp_path / "empty"))
    assert message.startswith(f"{tmp_path / 'empty'}: no model there (no config.json)")
    assert complaint(run("inspect", "./nonesuch")).startswith("./nonesuch: no model there")


def test_an_encoder_is_refused(edit: Command, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=30, **shape)).save_pretrained(tmp_path / "bert")
    message = complaint(edit(model=tmp_path / "bert"))
    assert message.startswith(f"{tmp_path / 'bert'}: BertForMaskedLM is not a causal LM; expected a decoder-only model")


def test_a_mixture_of_experts_is_refused(edit: Command, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = rewire.load("demo").tokenizer
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=2, **shape)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    assert "MixtralForCausalLM (mixtral) is a mixture of experts (num_local_experts=2)" in complaint(
        edit(model=tmp_path / "moe")
    )


def test_options_that_are_wrong(edit: Command, run: Command) -> None:
    message = complaint(edit("--nope"))
    assert message.startswith("No such option: --nope")
    assert message.endswith("(see rewire edit --help)")
    assert complaint(edit("--seed", "abc")).startswith("Invalid value for '--seed': ")
    assert complaint(edit("--batch-size", "0")).startswith("Invalid value for '--batch-size': ")
    assert complaint(edit("--device", "gpu")) == ("device 'gpu' is unknown; expected auto, cpu, cuda or cuda:N")
    assert complaint(edit("--dtype", "float8")) == (
        "dtype 'float8' is unknown; expected auto, checkpoint, float32, bfloat16, float16"
    )
    assert complaint(run("edit")) == "Missing argument 'MODEL'. (see rewire edit --help)"
    assert complaint(run("edit", "demo", FACTS)).startswith("Missing option '--out'")
    assert complaint(run("edti")).startswith("No such command 'edti'.")
    assert complaint(run("presets", "memti")) == "unknown method 'memti'; did you mean 'memit'?"
    assert complaint(run("evaluate", "demo", FACTS, "--protocol", "counter")) == (
        "unknown protocol 'counter'; did you mean 'counterfact'?"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there(edit: Command) -> None:
    assert complaint(edit("--device", "cuda")).startswith("device 'cuda' was asked for, but torch sees none here")


def test_out_that_is_there(edit: Command, run: Command, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    message = f"--out {out}: something is there already; name a new folder"
    assert complaint(edit()) == message
    assert complaint(run("merge", out, "--to", other, "--out", out)) == message
    assert complaint(run("demo", "--limit", 1, "--out", out)) == message
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    inside = out / "mine.txt" / "deeper"
    assert complaint(edit("--out", inside)) == f"--out {inside}: {out / 'mine.txt'} is a file; name a new folder"
    if os.getuid() != 0:
        out.chmod(0o500)
        assert complaint(edit("--out", out / "deeper")).endswith("name a new folder elsewhere")


def test_deltas_that_do_not_fit(edit: Command, run: Command, other: Path, tmp_path: Path) -> None:
    assert edit().status == 0
    out = tmp_path / "out"
    made_on = r"the delta was made on rewire/demo \(fingerprint \w+, in float32\)"
    mismatch = rf"{made_on}; {re.escape(str(other))} has other weights .*"
    assert re.fullmatch(mismatch, complaint(run("evaluate", other, FACTS, "--limit", 2, "--delta", out)))
    assert re.fullmatch(mismatch, complaint(run("merge", out, "--to", other, "--out", tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()
    assert "no delta.safetensors there" in complaint(run("evaluate", "demo", FACTS, "--delta", tmp_path))
    file = out / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "was it cut off?" in complaint(run("merge", out, "--to", "demo", "--out", tmp_path / "merged"))


def test_a_bug_is_shown_as_one(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rewire.engine.hparams.preset_files", broken)
    with pytest.raises(RuntimeError, match="a bug"):  # Python prints the traceback and leaves with status 1
        run("presets")


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
    assert len(list(cache.rglob("*.npz"))) == 2  # as the message says


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
    write(path, Moment(torch.eye(width) * 4 * width, 4 * width, 10, "here"), {"fingerprint": model.fingerprint})
    done = edit("--set", "layers=[1]", "--stats", folder, "--json")
    assert done.status == 0, done.err
    (statistics,) = json.loads((tmp_path / "out" / "report.json").read_text())["edits"][0]["statistics"].values()
    assert statistics == {"source": str(path), "tokens": 4 * width, "corpus": None}
    assert not list(Path(os.environ["REWIRE_CACHE"]).rglob("*.npz"))


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


def test_bench_values(run: Command, preset: Path, contexts: Path) -> None:
    done = run("bench", "values", "--limit", 3, "--preset", preset, "--contexts", contexts, "--json")
    assert done.status == 0, done.err
    assert done.json["check"] == "passed"
    (row,) = done.json["rows"]
    assert row.keys() >= {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}
    assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
    assert row["seconds"] > 0


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
    assert message.startswith("rewire-no-such-model: cannot be loaded as a causal LM: ")
