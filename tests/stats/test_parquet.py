import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rewire.kernels.errors import InputError
from rewire.stats import parquet, read_corpus
from rewire.stats.cache import cache_root

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def table(path: Path, texts: list[str | None], **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), path, **options)
    return path


def message(source: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_corpus(source))
    return str(caught.value)


@pytest.mark.parametrize("group", [7, 1000])
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_parquet(tmp_path: Path, group: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, or a folder of them by name; by row groups or, where these are too large, unpacked."""
    monkeypatch.setattr(parquet, "GROUP", limit)
    texts = [f"document {i}\nof many" if i % 5 else None for i in range(100)]
    folder = tmp_path / "some.set"
    table(folder / "b.parquet", texts[40:], row_group_size=group)
    table(folder / "a.parquet", texts[:40], row_group_size=group)
    (folder / "README.md").write_text("not a part")
    corpus = read_corpus(folder)
    documents = corpus.documents(None)
    assert documents.total == 100
    assert documents.read(0, 200) == [text or "" for text in texts]
    assert list(corpus) == [text for text in texts if text]
    shuffled = corpus.documents(1).read(0, 100)
    assert sorted(shuffled) == sorted(text or "" for text in texts)
    assert (cache_root() / "corpora").exists() == (limit == 0)
    single = read_corpus(folder / "a.parquet")
    assert single.documents(None).read(38, 50) == texts[38:40]
    assert single.name == "a"
    assert len({corpus.digest, single.digest, read_corpus(folder / "b.parquet").digest}) == 3
    (folder / "a.parquet").rename(tmp_path / "c.parquet")
    assert read_corpus(folder).digest == read_corpus(folder / "b.parquet").digest


def test_each_row_group_is_decoded_once_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "c.parquet", [str(i) for i in range(100)], row_group_size=10)
    documents = read_corpus(path).documents(5)
    decoded = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **options: (decoded.append(i), real(self, i, **options))[1]
    )
    assert len(documents.read(0, 60)) == 60
    assert decoded == sorted(set(decoded))


def test_parquet_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    assert message(path) == (f"{path}: found the columns body (string), n (int64), expected strings in a column `text`")
    pq.write_table(pa.table({"text": [1]}), path)
    assert "found the columns text (int64), expected" in message(path)
    pq.write_table(pa.table({"text": pa.array([], pa.large_string())}), path)
    assert message(path) == f"{path}: no document with text in it; expected at least one"
    table(path, ["one"] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    assert message(path).startswith(f"{path}: cannot be read (")
    whole = table(path, [f"{i} {random.Random(i).random()}" for i in range(5000)]).read_bytes()
    half = len(whole) // 2
    path.write_bytes(whole[:half] + bytes(2000) + whole[half + 2000 :])
    assert message(path).startswith(f"{path}: cannot be read (")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message(path) == f"{path}: parquet needs `pyarrow`: pip install 'rewire[corpora]'"


def test_a_parquet_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    path = table(tmp_path / "c.parquet", ["one", "two"])
    corpus = read_corpus(path)
    documents = corpus.documents(None)
    assert documents.read(0, 1) == ["one"]
    time.sleep(0.01)
    table(path, ["one", "three"])
    for late in (documents, corpus.documents(None)):
        with pytest.raises(InputError, match="has changed since it was indexed"):
            late.read(0, 1)
