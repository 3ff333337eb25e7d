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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ask(bench: Any, corpus: Corpus | None, **changed: Any) -> dict[str, Moment]:
    request: dict[str, Any] = {
        "widths": bench.widths,
        "model": "a/tiny",
        "fingerprint": "feedbeef",
        "dtype": "float32",
        "run": bench.run,
        "encode": bench.encode,
        "corpus": corpus,
        "max_length": 16,
        "n_samples": 30,
    }
    return moments_for(**{**request, **changed})


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_cache_root(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_root() == cache
    monkeypatch.delenv("REWIRE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "rewire"


def test_collected_once(bench: Any, corpus: Corpus, texts: list[str], cache: Path) -> None:
    first = ask(bench, corpus)
    ran = len(bench.batches)
    assert ran > 0
    assert [moment.source for moment in first.values()] == ["collected"] * 2
    second = ask(bench, corpus)
    assert len(bench.batches) == ran, "found in the cache, nothing runs"
    folder = cache / "stats" / "feedbeef" / "words-0123456789ab_stats"
    for name, moment in second.items():
        assert torch.equal(moment.sum, first[name].sum)
        assert (moment.count, moment.documents) == (first[name].count, 30)
        assert Path(moment.source) == folder / f"{name}_float32_mom2_30_t16.npz"
        about = json.loads(Path(moment.source).with_suffix(".json").read_text())
        assert about.pop("date").endswith("+00:00")
        assert len(about.pop("tokenizer")) == 12
        assert about == {
            "model": "a/tiny",
            "fingerprint": "feedbeef",
            "dtype": "float32",
            "corpus": "words",
            "corpus_digest": "0123456789ab",
            "max_length": 16,
            "asked_documents": 30,
            "asked_tokens": None,
            "layer": name,
            "width": bench.widths[name],
            "tokens": sum(min(16, len(row)) for row in bench.encode(texts[:30])),
            "documents": 30,
            "rewire": rewire.__version__,
        }
    assert len(files(cache)) == 4


def test_another_request_is_no_hit(bench: Any, corpus: Corpus, texts: list[str]) -> None:
    ask(bench, corpus)
    other = Corpus("words", "ba9876543210", "words.txt", lambda: iter(texts[::-1]))
    changes: list[dict[str, Any]] = [
        {"fingerprint": "cafe"},
        {"dtype": "bfloat16"},
        {"max_length": 15},
        {"max_length": None},
        {"n_samples": 29},
        {"n_samples": None},
        {"n_samples": None, "tokens": 200},
        {"corpus": other},
        {"encode": lambda texts: [row[1:] for row in bench.encode(texts)]},
    ]
    for change in changes:
        bench.batches.clear()
        result = ask(bench, **{"corpus": corpus, **change})
        assert bench.batches, change
        assert {moment.source for moment in result.values()} == {"collected"}
    for change in changes[:-1]:  # the last has taken the place of the first request: same documents, other tokenizer
        bench.batches.clear()
        ask(bench, **{"corpus": corpus, **change})
        assert not bench.batches, change


def test_only_missing_layers_are_collected(bench: Any, corpus: Corpus) -> None:
    ask(bench, corpus, widths={"h.0.proj": 6}, n_samples=None, tokens=180)
    both = ask(bench, corpus, n_samples=None)
    assert both["h.0.proj"].source.endswith(".npz"), "20 x 9, the widest of both, are the 180 of before"
    assert both["h.1.proj"].source == "collected"
    assert list(both) == ["h.0.proj", "h.1.proj"]


@pytest.mark.parametrize("harm", ["truncated", "empty", "sidecar gone", "sidecar broken", "sidecar of other tokens"])
def test_a_broken_file_in_the_cache_is_collected_anew(
    bench: Any, corpus: Corpus, cache: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = ask(bench, corpus)
    sidecar, npz = files(cache)[:2]
    if harm == "truncated":
        npz.write_bytes(npz.read_bytes()[:-50])
    elif harm == "empty":
        npz.write_bytes(b"")
    elif harm == "sidecar gone":
        sidecar.unlink()
    elif harm == "sidecar broken":
        sidecar.write_text("{")
    else:
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "tokens": 1}))
    with caplog.at_level(logging.WARNING):
        again = ask(bench, corpus)
    assert ("collected anew" in caplog.text) == (harm != "sidecar gone")
    assert [moment.source == "collected" for moment in again.values()] == [True, False]
    for name, moment in again.items():
        assert torch.equal(moment.sum, first[name].sum)
    bench.batches.clear()
    ask(bench, corpus)
    assert not bench.batches, "mended"


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
store.write(Path(sys.argv[1]), Moment(torch.eye(6) * 999, 50, 30), {"fingerprint": "feedbeef", "tokens": 50})
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_overwriting(bench: Any, corpus: Corpus, cache: Path, renames: int) -> None:
    """kill -9 before the npz' rename, and between it and the sidecar's: never old words beside new numbers."""
    first = ask(bench, corpus)
    sidecar, npz = files(cache)[:2]
    result = subprocess.run([sys.executable, "-c", KILLED, str(npz), str(renames)], env=os.environ.copy())
    assert result.returncode == -9
    assert not sidecar.exists()
    assert any(path.suffix == ".tmp" for path in npz.parent.iterdir())
    again = ask(bench, corpus)
    assert again["h.0.proj"].source == "collected"
    assert torch.equal(again["h.0.proj"].sum, first["h.0.proj"].sum)
    assert ask(bench, corpus)["h.0.proj"].source == str(npz)


def test_a_failed_write_leaves_nothing_and_is_not_fatal(
    bench: Any, corpus: Corpus, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rewire.stats.store.np.savez", full)
    assert ask(bench, corpus)["h.0.proj"].count
    assert "No space left on device): these statistics are not kept; set REWIRE_CACHE" in caplog.text
    assert not files(cache)


def test_cache_that_is_no_folder(bench: Any, corpus: Corpus, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file")
    assert ask(bench, corpus)["h.0.proj"].count
    assert "not kept" in caplog.text


def test_a_users_folder_is_read_and_nothing_else(bench: Any, corpus: Corpus, cache: Path, tmp_path: Path) -> None:
    first = ask(bench, corpus)
    bench.batches.clear()
    before = files(cache)
    folder = cache / "stats" / "feedbeef"
    result = ask(bench, None, stats=folder)
    assert not bench.batches
    assert all(torch.equal(result[name].sum, first[name].sum) for name in first)
    assert all(Path(moment.source).parent.parent == folder for moment in result.values())
    with pytest.raises(InputError, match="statistics of another model"):
        ask(bench, corpus, stats=folder, fingerprint="cafe")
    with pytest.raises(InputError, match=r"statistics of width 6 found, the model's layer h\.0\.proj has 7"):
        ask(bench, corpus, stats=folder, widths={"h.0.proj": 7})
    with pytest.raises(InputError, match=r"no statistics for h\.2\.proj"):
        ask(bench, corpus, stats=folder, widths={"h.2.proj": 7})
    assert files(cache) == before
    assert not bench.batches


def test_neither_folder_nor_corpus(bench: Any) -> None:
    with pytest.raises(InputError, match=r"no statistics for h\.0\.proj, h\.1\.proj: name a folder"):
        ask(bench, None)


def test_a_file_that_changes_is_another_corpus(bench: Any, tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(texts))
    ask(bench, read_corpus(path))
    bench.batches.clear()
    ask(bench, read_corpus(path))
    assert not bench.batches
    path.write_text("\n\n".join(texts[::-1]))
    ask(bench, read_corpus(path))
    assert bench.batches
