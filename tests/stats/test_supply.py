import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from rewire.kernels.errors import InputError
from rewire.stats import Corpus, Moment, cache_root, moments_for, read_corpus
from rewire.stats.collect import Budget, Means
from rewire.stats.documents import Held
from rewire.stats.supply import file_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ask(
    bench: Any, corpus: Corpus | None, cap: int | None = 16, documents: int | None = 30, tokens: int | None = None,
    tolerance: float | None = None, **changed: Any,
) -> dict[str, Moment]:  # fmt: skip
    request: dict[str, Any] = {
        "widths": bench.widths,
        "model": "a/tiny",
        "fingerprint": "feedbeef",
        "dtype": "float32",
        "prepare": lambda: (bench.run, Means(100)),
        "encode": bench.encode,
        "corpus": corpus,
        "budget": Budget(cap, documents, tokens, tolerance),
    }
    return moments_for(**{**request, **changed})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def runs(bench: Any) -> int:
    """How many batches ran since the last time."""
    count = len(bench.batches)
    bench.batches.clear()
    return count


def test_cache_root(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_root() == cache
    monkeypatch.delenv("REWIRE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "rewire"


def test_collected_once(bench: Any, corpus: Corpus, texts: list[str], cache: Path) -> None:
    first = ask(bench, corpus, seed=None)
    assert runs(bench) > 0
    second = ask(bench, corpus, seed=None)
    assert runs(bench) == 0, "found in the cache, nothing runs"
    folder = cache / "stats" / "feedbeef" / "words-0123456789ab-in-order_stats"
    for name, moment in second.items():
        assert torch.equal(moment.triangle, first[name].triangle)
        assert (moment.count, moment.documents, moment.source) == (first[name].count, 30, first[name].source)
        assert Path(moment.source) == folder / f"{name}_float32_mom2_30_t16.safetensors"
        about = json.loads(Path(moment.source).with_suffix(".json").read_text())
        assert about.pop("date").endswith("+00:00")
        assert about.pop("seconds") >= 0
        assert len(about.pop("tokenizer")) == 12
        assert about == {
            "model": "a/tiny",
            "fingerprint": "feedbeef",
            "dtype": "float32",
            "corpus": "words",
            "corpus_digest": "0123456789ab",
            "max_length": 16,
            "seed": None,
            "shard": [0, 1],
            "asked_documents": 30,
            "asked_tokens": None,
            "tolerance": None,
            "layer": name,
            "width": bench.widths[name],
            "tokens": sum(min(16, len(row)) for row in bench.encode(texts[:30])),
            "documents": 30,
            "digest": moment.digest,
            "rewire": rewire.__version__,
        }
    assert len(files(cache / "stats")) == 4, "no checkpoint is left"


def test_another_request_is_no_hit(bench: Any, corpus: Corpus, texts: list[str]) -> None:
    ask(bench, corpus)
    other = Corpus("words", "ba9876543210", "words.txt", lambda: Held("words.txt", texts[::-1]))
    changes: list[dict[str, Any]] = [
        {"fingerprint": "cafe"},
        {"dtype": "bfloat16"},
        {"cap": 15},
        {"cap": None},
        {"documents": 31},
        {"seed": 1},
        {"seed": None},
        {"seed": None, "documents": 29},
        {"shard": (0, 2), "documents": 20},
        {"shard": (1, 2), "documents": 20},
        {"tolerance": 0.5, "documents": None},
        {"corpus": other},
    ]
    for change in changes:
        runs(bench)
        ask(bench, **{"corpus": corpus, **change})
        assert runs(bench), change
    for change in changes:  # each has its own file, or is served by one that holds more
        ask(bench, **{"corpus": corpus, **change})
        assert not runs(bench), change
    ask(bench, corpus, encode=lambda texts: [row[1:] for row in bench.encode(texts)])
    assert runs(bench), "another tokenizer"


def test_more_of_the_same_serves(bench: Any, corpus: Corpus) -> None:
    """A sample of the shuffled corpus that is longer than the one asked for is a better answer to the same question."""
    long = ask(bench, corpus, documents=35)
    runs(bench)
    for asked in ({"documents": 20}, {"documents": None, "tokens": 100}, {"documents": 39, "tokens": 100}):
        found = ask(bench, corpus, **asked)
        assert not runs(bench), asked
        assert found["h.0.proj"].count == long["h.0.proj"].count
    ask(bench, corpus, documents=36)
    assert runs(bench)
    exact = ask(bench, corpus, documents=35)
    assert exact["h.0.proj"].documents == 35, "the very request before a longer one"


@pytest.mark.parametrize("seed", [0, None])
def test_a_bound_that_was_not_reached_is_no_difference(bench: Any, corpus: Corpus, seed: int | None) -> None:
    ask(bench, corpus, seed=seed, documents=None, tokens=100)
    runs(bench)
    ask(bench, corpus, seed=seed, documents=1000, tokens=100)
    assert not runs(bench), "the tokens stopped it"
    whole = ask(bench, corpus, seed=seed, documents=50)
    assert whole["h.0.proj"].documents == 40
    runs(bench)
    for asked in ({"documents": 60}, {"documents": None, "tokens": 10**6}, {"documents": 41, "tokens": 10**6}):
        ask(bench, corpus, seed=seed, **asked)
        assert not runs(bench), "the corpus was over"
    ask(bench, corpus, seed=None, documents=39)
    assert runs(bench), "in order, a shorter sample is another one"


def test_only_missing_layers_are_collected(bench: Any, corpus: Corpus) -> None:
    first = ask(bench, corpus, widths={"h.0.proj": 6}, documents=None, tokens=180)
    both = ask(bench, corpus, documents=None)
    assert both["h.0.proj"].source == first["h.0.proj"].source, "20 x 9, the widest of both, are the 180 of before"
    assert both["h.0.proj"].seconds == 0 < both["h.1.proj"].seconds
    assert list(both) == ["h.0.proj", "h.1.proj"]


@pytest.mark.parametrize("harm", ["truncated", "empty", "sidecar gone", "sidecar broken", "sidecar of other tokens"])
def test_a_broken_file_in_the_cache_is_collected_anew(
    bench: Any, corpus: Corpus, cache: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = {name: moment.triangle.clone() for name, moment in ask(bench, corpus).items()}  # they are mapped
    sidecar, data = files(cache / "stats")[:2]
    if harm == "truncated":
        data.write_bytes(data.read_bytes()[:-50])
    elif harm == "empty":
        data.write_bytes(b"")
    elif harm == "sidecar gone":
        sidecar.unlink()
    elif harm == "sidecar broken":
        sidecar.write_text("{")
    else:
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "tokens": 1}))
    with caplog.at_level(logging.WARNING):
        again = ask(bench, corpus)
    assert ("in the cache" in caplog.text) == (harm != "sidecar gone")
    assert [moment.seconds > 0 for moment in again.values()] == [True, False]
    for name, moment in again.items():
        assert torch.equal(moment.triangle, first[name])
    runs(bench)
    ask(bench, corpus)
    assert not runs(bench), "mended"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from rewire.stats import Moment, store
renames = 0
replace = Path.replace
def die_at(self, target):
    global renames
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames += 1
    return replace(self, target)
Path.replace = die_at
moment = Moment.of(torch.eye(6) * 999, 50, 30)
store.write(Path(sys.argv[1]), moment, {"fingerprint": "feedbeef", "tokens": 50})
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_overwriting(bench: Any, corpus: Corpus, cache: Path, renames: int) -> None:
    """kill -9 before the file's rename, and between it and the sidecar's: never old words beside new numbers."""
    first = ask(bench, corpus)
    sidecar, data = files(cache / "stats")[:2]
    result = subprocess.run([sys.executable, "-c", KILLED, str(data), str(renames)], env=os.environ.copy())
    assert result.returncode == -9
    assert not sidecar.exists()
    again = ask(bench, corpus)
    assert again["h.0.proj"].seconds > 0
    assert torch.equal(again["h.0.proj"].triangle, first["h.0.proj"].triangle)
    runs(bench)
    assert ask(bench, corpus)["h.0.proj"].source == str(data)
    assert not runs(bench)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_cache_that_is_full_is_not_fatal(
    bench: Any, corpus: Corpus, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewire.stats.supply.write", full_disk)
    assert ask(bench, corpus)["h.0.proj"].source == "collected"
    assert "No space left on device): these statistics are not kept; set REWIRE_CACHE" in caplog.text


def test_a_folder_that_is_full_keeps_the_checkpoint(
    bench: Any, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was collected for a folder that cannot take it is not lost: the same command goes on."""
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 120)
    often = {"prepare": lambda: (bench.run, Means(50, checkpoint_tokens=1))}
    with monkeypatch.context() as patch:
        patch.setattr("rewire.stats.supply.write", full_disk)
        with pytest.raises(InputError, match=r"goes on from there"):
            ask(bench, corpus, out=tmp_path / "out", **often)
    whole = runs(bench)
    found = ask(bench, corpus, out=tmp_path / "out", **often)
    assert 0 < runs(bench) < whole / 2
    assert torch.equal(found["h.0.proj"].triangle, ask(bench, corpus, **often)["h.0.proj"].triangle)
    assert not list((tmp_path / "out").glob("progress-*"))


@pytest.mark.parametrize("written", [1, 2])
@pytest.mark.parametrize("mine", [True, False])
def test_killed_between_the_files_of_the_result(
    bench: Any, corpus: Corpus, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, written: int, mine: bool
) -> None:
    """Before the second layer's file, or between it and its sidecar: the same command goes on where it rested."""
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 120)
    out = tmp_path / "out" if mine else None
    often = {"prepare": lambda: (bench.run, Means(50, checkpoint_tokens=1)), "out": out}
    renames, replace = 0, Path.replace

    def die(self: Path, target: Path) -> Path:
        nonlocal renames
        if not target.name.startswith("rank"):
            renames += target.name.startswith("h.")
            if renames == written + 2:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            ask(bench, corpus, **often)
    whole = runs(bench)
    found = ask(bench, corpus, **often)
    assert 0 < runs(bench) < whole / 2
    exact = ask(bench, corpus, out=tmp_path / "exact", prepare=often["prepare"])
    for layer, moment in found.items():
        assert torch.equal(moment.triangle, exact[layer].triangle)
    assert not [path for place in (tmp_path / "out", cache) for path in place.rglob("progress-*")]


def test_a_checkpoint_without_a_layer_is_not_gone_on_from(bench: Any, corpus: Corpus, cache: Path) -> None:
    """One layer was there when the work began, and is not when it goes on: its sums would lack the first documents."""
    ask(bench, corpus, widths={"h.0.proj": 6})
    often = {"prepare": lambda: (dying, Means(50, checkpoint_tokens=1))}

    def dying(batch: Any, sink: Any) -> None:
        bench.run(batch, sink)
        if list(cache.rglob("rank0of1-*.safetensors")):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewire.stats.collect.BLOCK", 120)
        with pytest.raises(KeyboardInterrupt):
            ask(bench, corpus, **often)
        for path in cache.rglob("h.0.proj*"):
            path.unlink()
        found = ask(bench, corpus)
    assert found["h.0.proj"].count == found["h.1.proj"].count
    exact = ask(bench, corpus, fingerprint="another")
    assert torch.allclose(found["h.0.proj"].sum, exact["h.0.proj"].sum)


def test_a_disk_that_is_too_small_is_refused_at_once(
    bench: Any, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewire.stats.supply.shutil.disk_usage", lambda _: type("", (), {"free": 100}))
    with pytest.raises(InputError, match=r"out: 0\.0 GB are free there"):
        ask(bench, corpus, out=tmp_path / "out")
    assert not runs(bench)


def test_a_file_where_the_folder_should_be_is_refused_at_once(bench: Any, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(InputError, match=r"out is a file; name another folder"):
            ask(bench, corpus, out=out)
    assert not runs(bench)


def test_what_was_begun_needs_no_more_room_than_its_rest(
    bench: Any, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that held two checkpoints, one of which is left, holds that one and the moments."""
    (out := tmp_path / "out").mkdir()
    monkeypatch.setattr("rewire.stats.collect.BLOCK", 120)
    often = {"prepare": lambda: (bench.run, Means(50, checkpoint_tokens=1))}
    room = 2 * file_bytes(bench.widths)

    def usage(_: Path) -> Any:
        return type("", (), {"free": room - sum(path.stat().st_size for path in files(out))})

    monkeypatch.setattr("rewire.stats.supply.shutil.disk_usage", usage)
    with monkeypatch.context() as patch:
        patch.setattr("rewire.stats.supply.write", full_disk)
        with pytest.raises(InputError, match=r"goes on from there"):
            ask(bench, corpus, out=out, **often)
    assert files(out)
    assert ask(bench, corpus, out=out, **often)["h.0.proj"].documents == 30


def test_a_folder_of_ones_own(bench: Any, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ask(bench, corpus, out=out)
    assert files(out)[0].name == "h.0.proj_float32_mom2_30_t16.json"
    runs(bench)
    assert ask(bench, corpus, out=out)["h.0.proj"].source == first["h.0.proj"].source
    assert not runs(bench)
    with pytest.raises(InputError, match=r"other statistics of h\.0\.proj are there already; name a new folder"):
        ask(bench, corpus, cap=12, out=out)


def test_cache_that_is_no_folder(bench: Any, corpus: Corpus, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file")
    assert ask(bench, corpus)["h.0.proj"].count
    assert "not kept" in caplog.text


def test_a_users_folder_is_read_and_nothing_else(bench: Any, corpus: Corpus, cache: Path) -> None:
    first = ask(bench, corpus)
    runs(bench)
    before = files(cache)
    folder = cache / "stats" / "feedbeef"
    result = ask(bench, None, stats=folder)
    assert not runs(bench)
    assert all(torch.equal(result[name].triangle, first[name].triangle) for name in first)
    assert all(Path(moment.source).parent.parent == folder for moment in result.values())
    with pytest.raises(InputError, match="statistics of another model"):
        ask(bench, corpus, stats=folder, fingerprint="cafe")
    with pytest.raises(InputError, match=r"statistics of width 6 found, the model's layer h\.0\.proj has 7"):
        ask(bench, corpus, stats=folder, widths={"h.0.proj": 7})
    with pytest.raises(InputError, match=r"no statistics for h\.2\.proj"):
        ask(bench, corpus, stats=folder, widths={"h.2.proj": 7})
    assert files(cache) == before


def test_neither_folder_nor_corpus(bench: Any) -> None:
    with pytest.raises(InputError, match=r"no statistics for h\.0\.proj, h\.1\.proj: name a folder"):
        ask(bench, None)


def test_a_file_that_changes_is_another_corpus(bench: Any, tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(texts))
    ask(bench, read_corpus(path))
    runs(bench)
    ask(bench, read_corpus(path))
    assert not runs(bench)
    path.write_text("\n\n".join(texts[::-1]))
    ask(bench, read_corpus(path))
    assert runs(bench)
