"""`rewire stats`, from a newcomer's collection to merged shards."""

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import FACTS, Command, complaint, installed, start
from rewire.engine.model import demo_file
from rewire.stats import read_corpus
from rewire.stats.npz import read_sum
from rewire.stats.store import read

LAYER = "model.layers.1.mlp.down_proj"
WIDTH = 736  # of the demo's keys
TEXT = str(demo_file("corpus.txt"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def collect(run: Command, tmp_path: Path) -> Command:
    """`rewire stats collect demo TEXT` of one layer, some 3000 tokens."""

    def collect(*options: object, text: object = TEXT) -> Any:
        return run("stats", "collect", "demo", text, "--layers", "1", "--tokens", 3000, "--max-length", 64, *options)

    return collect


@pytest.mark.parametrize("options", [(), ("--tolerance", "0.3"), ("--dtype", "bfloat16", "--in-order")], ids=str)
def test_the_command_that_is_printed_takes_them(run: Command, tmp_path: Path, options: tuple[str, ...]) -> None:
    """As it stands, but for the facts and the folder; in a cache that holds another sample of the same text too."""
    run("stats", "collect", "demo", TEXT, "--layers", "1,2", "--tokens", 2000, "--max-length", 64)
    budget = () if "--tolerance" in options else ("--tokens", 3000)
    done = run("stats", "collect", "demo", TEXT, "--layers", "1,2", "--max-length", 64, *budget, *options)
    assert done.status == 0, done.err
    assert "% of what this machine's products allow" in done.out
    (line,) = (line for line in done.out.splitlines() if line.startswith("an edit takes them:"))
    words = shlex.split(line.partition(":")[2])
    out = {"FACTS": FACTS, "DIR": tmp_path / "out"}
    fast = ("--limit", 2, "--set", "v_num_grad_steps=2", "--no-evaluate")
    took = run(*(out.get(word, word) for word in words[1:]), *fast)
    assert took.status == 0, took.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())["edits"][0]
    sources = {row["source"] for row in report["statistics"].values()}
    again = run("stats", "collect", "demo", TEXT, "--layers", "1,2", "--max-length", 64, *budget, *options, "--json")
    assert sources == {row["file"] for row in again.json["layers"]}
    assert again.json["seconds"] is None, "all of them were there already"


def test_an_edit_finds_what_its_preset_asks_for(run: Command, tmp_path: Path) -> None:
    assert run("stats", "collect", "demo", TEXT).status == 0
    made = {path: path.stat().st_mtime_ns for path in Path(os.environ["REWIRE_CACHE"]).rglob("*_mom2_*.safetensors")}
    assert len(made) == 3
    fast = ("--limit", 2, "--set", "v_num_grad_steps=2", "--no-evaluate")
    assert run("edit", "demo", FACTS, "--corpus", TEXT, *fast, "--out", tmp_path / "out").status == 0
    found = {path: path.stat().st_mtime_ns for path in Path(os.environ["REWIRE_CACHE"]).rglob("*_mom2_*.safetensors")}
    assert found == made


def test_json(collect: Command, tmp_path: Path) -> None:
    found = collect("--out", tmp_path / "mine", "--json").json
    (row,) = found["layers"]
    assert (row["layer"], row["width"], Path(row["file"]).parent) == (LAYER, WIDTH, tmp_path / "mine")
    assert row["tokens"] >= 3000
    assert found["tokens_per_second"] == pytest.approx(row["tokens"] / found["seconds"])
    assert found["floor_fraction"] > 0


def test_show(collect: Command, run: Command, tmp_path: Path) -> None:
    collect("--out", tmp_path / "mine")
    png = tmp_path / "decay.png"
    found = run("stats", "show", tmp_path / "mine", "--png", png, "--json").json
    assert found["layers"][LAYER]["width"] == WIDTH
    assert 1 < found["layers"][LAYER]["participation"] < WIDTH
    assert png.read_bytes().startswith(b"\x89PNG")
    said = run("stats", "show", tmp_path / "mine")
    assert "effective" in said.out or "participation" in said.out
    assert complaint(run("stats", "show", tmp_path / "mine", "--layer", "h.9")).endswith("no statistics of h.9")


def test_verify(collect: Command, run: Command, other: Path, tmp_path: Path) -> None:
    collect("--out", tmp_path / "mine")
    fits = run("stats", "verify", "demo", tmp_path / "mine", "--json")
    assert fits.status == 0
    (row,) = fits.json["layers"]
    assert fits.json["fits"]
    assert row["correlation"] > 0.9
    assert "these very weights" in row["why"]
    wrong = run("stats", "verify", other, tmp_path / "mine", "--json")
    assert wrong.status == 2
    assert "another model" in wrong.json["layers"][0]["why"]
    for path in (tmp_path / "mine").glob("*.json"):  # nothing says any more whose it is
        renamed = {
            p: p.with_name(p.name.replace("layers.1", "layers.3")) for p in (path, path.with_suffix(".safetensors"))
        }
        path.unlink()
        del renamed[path]
        for old, new in renamed.items():
            old.rename(new)
    layer = run("stats", "verify", "demo", tmp_path / "mine", "--json")
    assert layer.status == 2
    assert abs(layer.json["layers"][0]["correlation"]) < 0.3
    assert "look otherwise" in layer.json["layers"][0]["why"]


def test_verify_projections(collect: Command, run: Command, tmp_path: Path) -> None:
    collect("--out", tmp_path / "mine")
    (path,) = (tmp_path / "mine").glob("*.safetensors")
    values, vectors = torch.linalg.eigh(read(path).sum)
    null = vectors[:, : len(values) // 2]
    random = torch.linalg.qr(torch.randn(WIDTH, WIDTH // 2, dtype=torch.float64))[0]
    for basis, fits in ((null, True), (random, False)):
        torch.save((basis @ basis.T).float()[None], tmp_path / "null_space_project.pt")
        done = run("stats", "verify", "demo", tmp_path / "null_space_project.pt", "--layers", "1", "--json")
        assert (done.status, done.json["fits"]) == (0 if fits else 2, fits)
    torch.save(torch.eye(WIDTH)[None] * 0.5, tmp_path / "null_space_project.pt")
    done = run("stats", "verify", "demo", tmp_path / "null_space_project.pt", "--layers", "1", "--json")
    assert "not idempotent" in done.json["layers"][0]["why"]


def test_convert_there_and_back(collect: Command, run: Command, tmp_path: Path) -> None:
    collect("--out", tmp_path / "mine")
    to = run(
        "stats", "convert", tmp_path / "mine", "--to", "npz", "--scheme", "last", "--out", tmp_path / "data", "--json"
    )
    (npz,) = map(Path, to.json["written"])
    assert npz.parent == tmp_path / "data" / "demo" / "corpus_stats"
    back = run("stats", "convert", tmp_path / "data" / "demo", "--out", tmp_path / "back", "--json")
    (ours,) = map(Path, back.json["written"])
    (first,) = (tmp_path / "mine").glob("*.safetensors")
    assert torch.equal(read(ours).sum, read(first).sum.float().double())
    assert torch.equal(torch.as_tensor(read_sum(npz)).double(), read(ours).sum)
    again = run("stats", "convert", tmp_path / "data" / "demo", "--out", tmp_path / "back")
    assert "is there already" in complaint(again)


def test_shards_are_merged(run: Command, tmp_path: Path) -> None:
    """Two shards over the whole of a text are what one collection gives."""
    text = tmp_path / "text.json"
    text.write_text(json.dumps(list(read_corpus(TEXT))[:120]))
    options = ("--layers", "1", "--samples", 1000)
    for index in (1, 2):
        done = run("stats", "collect", "demo", text, *options, "--shard", f"{index}/2", "--out", tmp_path / str(index))
        assert done.status == 0, done.err
    run("stats", "collect", "demo", text, *options, "--out", tmp_path / "all")
    merged = run("stats", "merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "sum", "--json")
    (found,), (wanted,) = (list((tmp_path / name).glob("*.safetensors")) for name in ("sum", "all"))
    assert merged.json["written"] == [str(found)]
    assert read(found).count == read(wanted).count
    difference = (read(found).triangle - read(wanted).triangle).norm() / read(wanted).triangle.norm()
    assert float(difference) < 1e-6
    assert "holds documents" in complaint(
        run("stats", "merge", tmp_path / "1", tmp_path / "1", "--out", tmp_path / "x")
    )


def test_pull_lists_what_is_known(run: Command) -> None:
    assert "bkb45/ResolveUnderOverEdit-stats" in run("stats", "pull", "--list").out
    assert run("stats", "pull", "--list", "--json").json["gpt2-xl"]["repo"] == "bkb45/ResolveUnderOverEdit-stats"
    assert "rewire stats pull --list" in complaint(run("stats", "pull"))
    assert "gpt2-xl" in complaint(run("stats", "pull", "gpt2xl"))


def test_wrong_input_is_one_line(collect: Command, run: Command, tmp_path: Path) -> None:
    for options, expected in {
        ("--layers", "1,x"): "--layers 1,x: expected numbers of blocks",
        ("--layers", "99"): "layer 99: the model has layers 0 to",
        ("--layers", "-1"): "layer -1: the model has layers 0 to",
        ("--shard", "3/2"): "--shard 3/2: expected I/N",
        ("--accumulate", "moon"): "--accumulate moon: expected auto, device, cpu, disk",
        ("--module", "model.layers.1.mlp.dwn_proj"): "--layers and --module: name the one or the other",
        ("--tokens", "10"): "a budget of 10 tokens",
        ("--tolerance", "3"): "a tolerance of 3.0; expected a number between 0 and 1",
        ("--seed", "0", "--in-order"): "--seed and --in-order: name the one or the other",
        ("--quantize", "nf5"): "nf5",
    }.items():
        assert expected in complaint(collect(*options)), options
    wrong = run("stats", "collect", "demo", TEXT, "--module", "model.layers.1.mlp.dwn_proj")
    assert "model.layers.1.mlp.down_proj" in complaint(wrong)
    assert "no such corpus" in complaint(collect(text=tmp_path / "nothing.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n  \n")
    assert "no document with text in it" in complaint(collect(text=empty))


def test_what_cannot_be_kept_is_no_success(collect: Command, cache: Path) -> None:
    cache.write_text("a file")
    done = collect()
    assert (done.status, done.out) == (2, "")
    assert "these statistics could not be written there" in done.err.splitlines()[-1]


def test_interrupted_and_continued(tmp_path: Path) -> None:
    """Ctrl-C, as a newcomer presses it: status 3 and how to go on; then the same command goes on to the same file."""
    command = ("stats", "collect", "demo", TEXT, "--layers", "1,2,3", "--samples", 3000, "--checkpoint-tokens", 1)
    out = tmp_path / "out"
    process = start(*command, "--out", out)
    deadline = time.monotonic() + 100
    while not list(out.glob("progress-*/rank0of1-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "statistics from their last checkpoint" in err
    assert list(out.glob("progress-*/rank0of1-*.safetensors"))
    done = installed(*command, "--out", out)
    assert done.status == 0, done.err
    whole = installed(*command, "--out", tmp_path / "whole")
    assert whole.status == 0, whole.err
    for path in out.glob("*.safetensors"):
        assert torch.equal(load_file(path)["triangle"], load_file(tmp_path / "whole" / path.name)["triangle"])
    assert not list(out.glob("progress-*"))
