"""Wrong input: one line on stderr that says what was found and expected, exit status 2, nothing written."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from commands import FACTS, Command, complaint
from rewire.stats import Moment
from rewire.stats.store import file_name, write


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
    assert complaint(edit("--set", "v_lr=fast")) == "--set: v_lr: 'fast' found, expected a number"
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
    write(path, Moment.of(torch.eye(width), 4 * width, 10, "here"), about)
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
    assert complaint(edit("--batch-size", "0")).startswith("--batch-size 0: expected auto, or a whole number")
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


def test_a_folder_that_cannot_be_made(run: Command) -> None:
    """Root is stopped only when it writes, others are before any work."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here, where nobody can make a folder")
    done = run("edit", "demo", FACTS, "--limit", 1, "--no-evaluate", "--out", "/proc/x")
    assert complaint(done).startswith(("/proc/x: ", "--out /proc/x: "))


def test_a_bug_is_shown_as_one(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rewire.engine.presets.preset_files", broken)
    with pytest.raises(RuntimeError, match="a bug"):  # Python prints the traceback and leaves with status 1
        run("presets")
