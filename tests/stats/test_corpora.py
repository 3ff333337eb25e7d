import gzip
import json
import logging
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewire.kernels.errors import InputError
from rewire.stats import read_corpus, sources
from rewire.stats.cache import ABANDONED, cache_root


def put(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def corpus_file(path: Path, texts: list[str]) -> Path:
    """These documents in the form that the name asks for."""
    kind = path.name.removesuffix(".gz").split(".")[-1]
    joined = {"txt": "\n\n".join, "json": json.dumps, "jsonl": lambda t: "\n".join(map(json.dumps, t))}[kind](texts)
    return put(path, gzip.compress(joined.encode()) if path.suffix == ".gz" else joined)


def message(source: str | Path, **arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        list(read_corpus(source, **arguments))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    corpus = read_corpus(put(tmp_path / "some text.txt", "\ufeff\n\none\ntwo\r\n \t\n\nthree é\n\n"))
    assert list(corpus) == ["one\ntwo", "three é"]
    assert list(corpus) == ["one\ntwo", "three é"], "a corpus can be read again"
    assert corpus.name == "some-text"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", json.dumps(["one", "", "  \n", "two", {"text": "three", "id": 4}])),
        ("c.jsonl", '"one"\n\n{"text": ""}\n{"text": "two", "id": 7}\n"three"'),
        ("c.txt", "one\n\ntwo\n\nthree"),
    ],
)
def test_forms_plain_and_gz(tmp_path: Path, name: str, text: str) -> None:
    plain = read_corpus(put(tmp_path / name, text))
    packed = read_corpus(put(tmp_path / f"{name}.gz", gzip.compress(text.encode())))
    assert list(plain) == list(packed) == ["one", "two", "three"]
    assert plain.name == packed.name == "c"


def test_documents_stream(tmp_path: Path) -> None:
    """What lies behind the documents that are taken is not looked at."""
    documents = iter(read_corpus(put(tmp_path / "c.jsonl", '"one"\n"two"\n{broken')))
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(InputError, match="line 3"):
        next(documents)


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    one = read_corpus(put(tmp_path / "a.txt", "hello"))
    assert one.digest == read_corpus(put(tmp_path / "b.txt", "hello")).digest == "2cf24dba5fb0"
    assert one.digest != read_corpus(put(tmp_path / "a.txt", "hallo")).digest


def test_lone_surrogates_become_what_a_tokenizer_takes(tmp_path: Path) -> None:
    assert list(read_corpus(put(tmp_path / "c.json", '["a\\ud800b"]'))) == ["a?b"]


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", '"one"\n\n{"text": "two"\n')
    assert message(path).startswith(f"{path}, line 3: broken JSON (")
    path = put(tmp_path / "c.jsonl", '"one"\n{"body": "two", "id": 1}\n')
    assert message(path).startswith(f"{path}, line 2: found an object with body, id, expected a string or an object")
    path = put(tmp_path / "c.jsonl", "[1]\n")
    assert message(path).startswith(f"{path}, line 1: found list, expected a string")
    path = put(tmp_path / "c.json", '["one", 2]')
    assert message(path).startswith(f"{path}, item 1: found int, expected a string")
    path = put(tmp_path / "c.json", '["one",\n2')
    assert message(path).startswith(f"{path}, line 2: broken JSON")
    path = put(tmp_path / "c.json", '{"text": "one"}')
    assert message(path) == f"{path}: found dict, expected a list of strings"
    path = put(tmp_path / "c.txt", b"one\n\ntwo\nthree \xff\xfe")
    assert message(path).startswith(f"{path}, line 4: is not UTF-8 text (")
    path = put(tmp_path / "c.jsonl.gz", gzip.compress(b'"one"\n\n{"text": "two"\n'))
    assert message(path).startswith(f"{path}, line 3: broken JSON (")
    path = put(tmp_path / "c.jsonl", "[" * 100_000)
    assert message(path).startswith(f"{path}, line 1: broken JSON (")


@pytest.mark.parametrize(("name", "text"), [("c.txt", "\n \n"), ("c.json", "[]"), ("c.jsonl", '{"text": " "}')])
def test_empty(tmp_path: Path, name: str, text: str) -> None:
    path = put(tmp_path / name, text)
    assert message(path) == f"{path}: no document with text in it; expected at least one"


@pytest.mark.parametrize("cut", [0, 4, 60])
def test_broken_gz(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress("\n\n".join(f"document {i}" for i in range(200)).encode())
    path = put(tmp_path / "c.txt.gz", packed[:cut] if cut else b"plain text")
    assert message(path).startswith(f"{path}: cannot be read (")


def test_no_such_corpus(tmp_path: Path) -> None:
    for source in (tmp_path / "none.txt", "none.jsonl", "data/none.json", "data/none.txt.gz", "just words", "a/b/c"):
        assert message(source).startswith(f"{source}: no such corpus; expected a file (")
    assert message(tmp_path).startswith(f"{tmp_path}: is a folder without .parquet files; expected a file")


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = message("wikimedia/wikipedia")
    assert text.startswith("wikimedia/wikipedia: no such file, and ")
    assert text.endswith("pip install 'rewire[corpora]'")


def test_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\non the Hub")
        return iter([{"text": "one"}, {"text": ""}, {"text": "two"}] if name != "no/text" else [{"sentence": "x"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = read_corpus("wikipedia")
    assert not asked, "nothing is fetched before the first document is wanted"
    assert list(corpus) == ["one", "two"]
    assert list(read_corpus("some/Corpus", config="en", split="test")) == ["one", "two"]
    assert asked == [
        ("wikimedia/wikipedia", "20231101.en", "train", True),
        ("some/Corpus", "en", "test", True),
    ]
    assert (corpus.name, len(corpus.digest)) == ("wikipedia", 12)
    assert read_corpus("some/Corpus").digest != read_corpus("some/Corpus", split="test").digest
    assert message("no/such") == (
        "no/such: cannot be streamed from the hub (Dataset 'no/such' doesn't exist on the Hub)"
    )
    assert message("no/text").startswith("no/text, row 0: found an object with sentence, expected")


def lines_between_blank_ones(text: str) -> list[str]:
    """What the index has to find, in the plainest way."""
    documents, lines = [], []
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            documents.append("\n".join(lines).rstrip())
            lines = []
    return documents


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["a", "bc", " ", "\t", "\n", "\n", "\n", "\r\n", "\r\n", "\u00a0", "\u3000", "é", "\u2003", "\u0c80"]
        )
    ),
    st.booleans(),
    st.integers(1, 9),
)
def test_paragraphs_are_those_of_a_plain_loop(parts: list[str], bom: bool, block: int) -> None:
    """Ends of line of any kind, lines of any white space, a byte order mark; whatever the blocks of the scan."""
    text = "".join(parts)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SCAN", block)
        corpus = read_corpus(put(Path(folder) / "c.txt", ("\ufeff" if bom else "") + text))
        wanted = lines_between_blank_ones(text)
        assert list(corpus.read()) == wanted
        assert corpus.read().take(range(len(wanted))[::-1]) == wanted[::-1]


@settings(deadline=None)
@given(st.lists(st.text()), st.sampled_from(["\n", "\r\n", "\n \n"]), st.booleans())
def test_lines_of_json_come_back(texts: list[str], end: str, ascii: bool) -> None:
    lines = end.join(json.dumps(text, ensure_ascii=ascii) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        found = read_corpus(put(Path(folder) / "c.jsonl", "\ufeff" + lines)).read()
        assert list(found) == found.take(range(len(texts))) == texts


def test_the_file_is_read_once_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 MB in 10 000 documents only the offsets are in memory, while it is indexed and afterwards."""
    line = json.dumps("word " * 400) + "\n"
    path = put(tmp_path / "c.jsonl", line * 10_000)
    monkeypatch.setattr(sources, "SCAN", 1 << 18)
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest: (opened.append(self), real(self, *rest))[1])
    tracemalloc.start()
    try:
        corpus = read_corpus(path)
        documents = corpus.documents(seed=3)
        assert opened == [path]
        assert documents.total == 10_000
        assert documents.read(100, 110) == ["word " * 400] * 10
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6


def test_a_document_of_a_million_words(tmp_path: Path) -> None:
    long = "word " * 1_000_000
    corpus = read_corpus(
        put(tmp_path / "c.jsonl", json.dumps({"text": "a"}) + "\n" + json.dumps({"text": long}) + "\n")
    )
    assert corpus.documents(None).read(0, 5) == ["a", long]


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.json", "c.jsonl.gz"])
def test_a_file_that_changes_under_the_reader(tmp_path: Path, name: str) -> None:
    path = corpus_file(tmp_path / name, ["one", "two"])
    corpus = read_corpus(path)
    time.sleep(0.01)
    corpus_file(path, ["one", "three"])
    with pytest.raises(InputError, match="has changed since it was indexed; expected a file that stays as it is"):
        corpus.documents(None).read(0, 1)


def test_a_file_that_goes_or_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "c.txt", "one\n\ntwo")
    corpus = read_corpus(path)
    path.unlink()
    with pytest.raises(InputError, match=r"c\.txt: cannot be read \(No such file"):
        corpus.documents(None).read(0, 1)

    def refuse(self: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("c.txt", "c.json", "c.txt.gz"):
        put(tmp_path / name, "one")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            assert message(tmp_path / name) == f"{tmp_path / name}: cannot be read (Permission denied)"


def test_gz_is_unpacked_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = corpus_file(tmp_path / "c.jsonl.gz", ["one", "two", "three"])
    with caplog.at_level(logging.INFO):
        corpus = read_corpus(path)
        assert not cache_root().exists(), "not before a document is asked for"
        assert corpus.documents(None).read(0, 9) == ["one", "two", "three"]
        (unpacked,) = (cache_root() / "corpora").iterdir()
        assert caplog.text.count("is unpacked into") == 1
        assert list(corpus) == list(read_corpus(path)) == ["one", "two", "three"]
        assert caplog.text.count("is unpacked into") == 1
    assert unpacked.read_text() == gzip.decompress(path.read_bytes()).decode()
    other = corpus_file(tmp_path / "d.txt.gz", ["four"])
    assert list(read_corpus(other)) == ["four"]
    # another process unpacks the same file: what this one has indexed stays good
    unpacked.write_bytes(unpacked.read_bytes())
    assert corpus.documents(None).read(2, 3) == ["three"]


def test_gz_that_is_cut_leaves_nothing(tmp_path: Path) -> None:
    path = corpus_file(tmp_path / "c.txt.gz", [str(i) * 20 for i in range(500)])
    put(path, path.read_bytes()[:-30])
    left = cache_root() / "corpora" / "x"
    left.parent.mkdir(parents=True)
    assert message(path).startswith(f"{path}: cannot be read (")
    assert list(left.parent.iterdir()) == []


def test_gz_where_the_cache_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus_file(tmp_path / "c.txt.gz", ["one"])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rewire.stats.sources.shutil.copyfileobj", full)
    text = message(path)
    assert text.startswith(
        f"{path}: cannot be unpacked into {cache_root() / 'corpora'} (No space left on device); make"
    )
    assert list((cache_root() / "corpora").iterdir()) == []


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    """kill -9 while 20 GB are unpacked must not cost 20 GB for ever; nor may a live process lose its file."""
    path = corpus_file(tmp_path / "c.txt.gz", ["one"])
    corpus = read_corpus(path)
    folder = cache_root() / "corpora"
    folder.mkdir(parents=True)
    name = f"{corpus.digest}"
    list(corpus)
    (unpacked,) = folder.iterdir()
    assert unpacked.name.startswith(name)
    unpacked.unlink()
    dead, live = (put(folder / f"{unpacked.name}.{i}.77.tmp", "half") for i in "ab")
    os.utime(dead, (0, time.time() - ABANDONED - 9))
    list(read_corpus(path))
    assert sorted(folder.iterdir()) == sorted([unpacked, live])


def test_what_the_hub_libraries_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        pass

    def load_dataset(*_: Any, **__: Any) -> Any:
        yield {"text": "one"}
        raise Odd("Server\ndisconnected")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = iter(read_corpus("some/set"))
    assert next(documents) == "one"
    with pytest.raises(InputError, match=r"some/set: cannot be streamed from the hub \(Server disconnected\)"):
        next(documents)
