import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewire.stats import Corpus, read_corpus, tokens
from rewire.stats.documents import Held
from rewire.stats.tokens import PIECE, TokenRows, ahead, tokenizer_digest

TEXTS = [" ".join("x" * (1 + (i * j) % 7) for j in range((i * 13) % 29)) or "  " for i in range(2 * PIECE + 88)]


def corpus_of(texts: list[str], **changed: str) -> Corpus:
    about = {"name": "words", "digest": "0123456789ab", "source": "words.txt", **changed}
    return Corpus(**about, read=lambda: Held("words.txt", texts))


class Words:
    """Encodes a text as the lengths of its words, and keeps what it was asked beside the probe."""

    def __init__(self, first: int | None = None) -> None:
        self.first = [] if first is None else [first]
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if texts != tokens._PROBE:
            self.asked.append(texts)
        return [self.first + [len(word) for word in text.split()] for text in texts]


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return len(found) == len(wanted) and all(map(np.array_equal, found, wanted))


@settings(deadline=None, max_examples=50)  # it writes files
@given(
    spans=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5),
    seed=st.sampled_from([None, 0]),
    shard=st.sampled_from([(0, 1), (1, 3)]),
    piece=st.sampled_from([5, 20, 256]),
    cached=st.booleans(),
)
def test_any_pieces_are_those_of_the_whole(
    spans: list[tuple[int, int]], seed: int | None, shard: tuple[int, int], piece: int, cached: bool
) -> None:
    encode = Words(9)
    corpus = corpus_of(TEXTS[:60])
    texts = corpus.documents(seed, shard).read(0, 99)
    wanted = [np.array(encode([text])[0] if text.strip() else []) for text in texts]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", piece)
        for _ in range(2):  # the second time from the disk
            rows = TokenRows(corpus, encode, seed=seed, shard=shard, folder=Path(folder) if cached else None)
            assert rows.total == len(wanted)
            for start, stop in spans:
                found = rows.rows(start, stop)
                assert same(found, wanted[start:stop])
                assert {row.dtype for row in found} <= {np.dtype(np.int32)}


def test_blank_documents_and_those_without_tokens_are_empty() -> None:
    """They hold their place; blank ones are not shown to the tokenizer, which would give a BOS for them."""
    encode = Words()
    corpus = corpus_of(["a bb", "", " \n", "ccc"])
    assert [row.tolist() for row in TokenRows(corpus, encode, seed=None).rows(0, 9)] == [[1, 2], [], [], [3]]
    assert encode.asked == [["a bb", "ccc"]]
    assert [row.tolist() for row in TokenRows(corpus, lambda texts: [[]] * len(texts)).rows(0, 9)] == [[]] * 4


def test_a_piece_is_tokenised_once(tmp_path: Path) -> None:
    encode = Words()
    rows = TokenRows(corpus_of(TEXTS), encode, folder=tmp_path)
    for start in range(0, 700, 60):  # blocks lie across pieces
        rows.rows(start, start + 60)
    assert len(encode.asked) == 3
    assert len(list(tmp_path.rglob("*.npz"))) == 3

    def unread() -> Any:
        raise AssertionError("the corpus is not looked at where everything is in the cache")

    again = TokenRows(Corpus("words", "0123456789ab", "words.txt", unread), encode, folder=tmp_path)
    assert same(again.rows(0, 600), rows.rows(0, 600))
    assert len(encode.asked) == 3


def test_a_piece_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(TEXTS)
    TokenRows(corpus, Words(), folder=tmp_path).rows(0, 700)
    loads: list[Path] = []
    real = np.load
    monkeypatch.setattr(np, "load", lambda path, **options: (loads.append(path), real(path, **options))[1])
    rows = TokenRows(corpus, Words(), folder=tmp_path)
    for start in range(0, 700, 60):
        rows.rows(start, start + 60)
    assert len(loads) == len(set(loads)) == 3
    for start in (PIECE - 5, PIECE + 5) * 3:  # to and fro over a boundary
        rows.rows(start - 20, start + 20)
    assert len(loads) == 5


def test_what_differs_lies_apart(tmp_path: Path) -> None:
    """Corpus, tokenizer, seed and shard: none is ever served another's rows."""
    first = TokenRows(corpus_of(TEXTS), Words(), folder=tmp_path).rows(0, 700)
    requests: list[tuple[Corpus, Words, dict[str, Any]]] = [
        (corpus_of(TEXTS[::-1], digest="ba9876543210"), Words(), {}),
        (corpus_of(TEXTS[1:], name="other"), Words(), {}),
        (corpus_of(TEXTS), Words(0), {}),
        (corpus_of(TEXTS), Words(), {"seed": 1}),
        (corpus_of(TEXTS), Words(), {"seed": None}),
        (corpus_of(TEXTS), Words(), {"shard": (0, 2)}),
        (corpus_of(TEXTS), Words(), {"shard": (1, 2)}),
    ]
    seen = [first]
    for corpus, encode, arguments in requests:
        found = TokenRows(corpus, encode, folder=tmp_path, **arguments).rows(0, 700)
        assert not any(same(found, other) for other in seen)
        assert encode.asked
        seen.append(found)
    assert len(list(tmp_path.iterdir())) == len(seen)


def harmed(path: Path, whole: bytes, ids: np.ndarray, lengths: np.ndarray) -> Iterator[str]:
    """Makes the piece wrong in one way after the other."""
    for cut in (0, 1, 40, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        yield f"cut at {cut}"
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    yield "a bit"
    path.write_bytes(b"no npz at all" * 99)
    yield "text"
    for what, members in {
        "lengths too long": {"ids": ids, "lengths": lengths + 1},
        "negative length": {"ids": ids, "lengths": np.array([len(ids) + 3, -3])},
        "too many documents": {"ids": ids, "lengths": np.append(lengths, 0)},
        "none": {"ids": ids[:0], "lengths": lengths[:0]},
        "two axes": {"ids": ids[None], "lengths": lengths},
        "other type": {"ids": ids.astype(np.int64), "lengths": lengths},
        "no lengths": {"ids": ids},
        "pickled": {"ids": np.array([{}], dtype=object), "lengths": np.array([1])},
    }.items():
        np.savez(path, **members)
        yield what
    with path.open("wb") as file:
        np.save(file, ids)
    yield "a single array"


def test_a_broken_piece_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = corpus_of(TEXTS)
    wanted = TokenRows(corpus, Words(), folder=tmp_path).rows(0, 700)
    path = sorted(tmp_path.rglob("*.npz"))[1]
    whole = path.read_bytes()
    with np.load(path) as members:
        ids, lengths = members["ids"], members["lengths"]
    for what in harmed(path, whole, ids, lengths):
        caplog.clear()
        encode = Words()
        assert same(TokenRows(corpus, encode, folder=tmp_path).rows(0, 700), wanted), what
        assert len(encode.asked) == 1, what
        assert f"{path}: broken (" in caplog.text, what
        assert "made anew" in caplog.text
        with np.load(path) as members:
            assert np.array_equal(members["ids"], ids), what


def test_a_full_disk_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = corpus_of(TEXTS)
    TokenRows(corpus, Words(), folder=tmp_path).rows(0, PIECE)
    before = sorted(tmp_path.rglob("*"))

    def full(file: Any, **_: Any) -> None:
        file.write(b"some")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        encode = Words()
        found = TokenRows(corpus, encode, folder=tmp_path).rows(0, 700)
    assert same(found, TokenRows(corpus, Words()).rows(0, 700))
    assert len(encode.asked) == 2, "what is there is read nevertheless"
    assert caplog.text.count("(No space left on device): token rows are not kept; set REWIRE_CACHE") == 1
    assert sorted(tmp_path.rglob("*")) == before, "nor is half a file left"


def test_a_cache_that_is_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokens").write_text("a file")
    rows = TokenRows(corpus_of(TEXTS), Words(), folder=tmp_path / "tokens")
    assert len(rows.rows(0, 700)) == len(TEXTS)
    assert caplog.text.count("token rows are not kept") == 1


def test_killed_while_a_piece_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever dies before the rename leaves no piece that somebody could take for a whole one."""

    def die(self: Path, _: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        TokenRows(corpus_of(TEXTS), Words(), folder=tmp_path).rows(0, 9)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_several_write_the_same_piece_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = corpus_of(TEXTS)
    wanted = TokenRows(corpus, Words()).rows(0, 700)
    found: list[bool] = []

    def work() -> None:
        for _ in range(5):
            found.append(same(TokenRows(corpus, Words(), folder=tmp_path).rows(0, 700), wanted))
            for path in tmp_path.rglob("*.npz"):
                path.unlink(missing_ok=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
    assert not list(tmp_path.rglob("*.tmp"))
    assert "cannot be written" not in caplog.text


def test_a_document_of_a_million_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncut; and long documents are not all turned into Python's lists at once."""
    monkeypatch.setattr(tokens, "TEXT", 3_000_000)
    path = tmp_path / "c.txt"
    path.write_text("\n\n".join(["a " * 1_000_000, "b", "c", "a " * 999_999, "d"]))
    encode = Words(0)
    for _ in range(2):
        rows = TokenRows(read_corpus(path), encode, seed=None, folder=tmp_path / "tokens")
        assert [len(row) for row in rows.rows(0, 9)] == [1_000_001, 2, 2, 1_000_000, 2]
    assert [[len(text) for text in texts] for texts in encode.asked] == [[1_999_999, 1, 1], [1_999_997, 1]]


def test_the_probe_tells_tokenizers_apart() -> None:
    def with_bos(texts: list[str]) -> list[list[int]]:
        return [[1, *row] for row in Words()(texts)]

    def lowered(texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text.lower()] for text in texts]

    def letters(texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    digests = [tokenizer_digest(encode) for encode in (Words(), with_bos, lowered, letters)]
    assert len(set(digests)) == 4
    assert all(len(digest) == 12 and int(digest, 16) >= 0 for digest in digests)
    assert tokenizer_digest(Words()) == digests[0] == TokenRows(corpus_of(TEXTS), Words()).tokenizer
    as_numpy = tokenizer_digest(lambda texts: [np.array(row) for row in Words()(texts)])  # type: ignore[misc]
    assert as_numpy == digests[0]


# --- ahead


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_ahead_gives_all_in_order() -> None:
    assert list(ahead((lambda i=i: i * i) for i in range(50))) == [i * i for i in range(50)]
    assert list(ahead([])) == []
    assert list(ahead([lambda: None, lambda: None])) == [None, None], "None is a result like others"
    assert not running()


def test_ahead_works_while_the_caller_does_and_no_further() -> None:
    began = [threading.Event() for _ in range(5)]

    def call(i: int) -> Callable[[], int]:
        return lambda: began[i].set() or i

    results = ahead(map(call, range(5)))
    time.sleep(0.02)
    assert not began[0].is_set(), "not before anybody asks"
    for i in range(4):
        assert next(results) == i
        assert began[i + 1].wait(5), "the next is made while the caller has this one"
        time.sleep(0.01)
        assert i + 2 > 4 or not began[i + 2].is_set(), "one is held, not two"
    results.close()
    assert not running()


@pytest.mark.parametrize("where", ["call", "calls"])
def test_ahead_raises_in_the_place_of_the_result(where: str) -> None:
    def fail() -> int:
        raise KeyError("third")

    def calls() -> Iterator[Callable[[], int]]:
        yield lambda: 1
        yield lambda: 2
        if where == "calls":
            raise KeyError("third")
        yield fail
        raise AssertionError("nothing is asked for after a failure")

    results = ahead(calls())
    assert (next(results), next(results)) == (1, 2)
    with pytest.raises(KeyError, match="third"):
        next(results)
    assert not running()
    assert list(results) == []


def test_ahead_leaves_nothing_running() -> None:
    """The caller breaks off, or fails: the call under way ends before the loop is left, and no other begins."""
    ended: list[int] = []

    def call(i: int) -> Callable[[], None]:
        return lambda: (time.sleep(0.03), ended.append(i))[1]

    results = ahead(map(call, range(9)))
    for _ in results:
        break
    results.close()
    assert not running()
    assert ended == [0, 1]


def test_rows_ahead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As collecting uses it: blocks made in the thread are those made without."""
    rows = TokenRows(corpus_of(TEXTS), Words(), folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        blocks = list(ahead((lambda s=s: rows.rows(s, s + 50)) for s in range(0, 700, 50)))
    assert same([row for block in blocks for row in block], TokenRows(corpus_of(TEXTS), Words()).rows(0, 700))
    assert not caplog.text
