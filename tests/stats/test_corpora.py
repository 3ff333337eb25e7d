import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewire.kernels.errors import InputError
from rewire.stats import read_corpus


def put(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


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
    path = put(tmp_path / "c.txt", b"one \xff\xfe two")
    assert "is not UTF-8" in message(path)


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
    assert message(tmp_path).startswith(f"{tmp_path}: is a folder; expected a file")


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
