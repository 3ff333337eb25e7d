import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewire
from rewire.kernels.errors import InputError
from rewire.stats import Moment
from rewire.stats.merge import _meet, merge
from rewire.stats.store import file_name, read, write

LAYERS = {"h.2.proj": 5, "h.10.proj": 7}
REQUEST = {
    "model": "a/tiny",
    "fingerprint": "feedbeef",
    "tokenizer": "0123456789ab",
    "dtype": "float32",
    "corpus": "words",
    "corpus_digest": "ba9876543210",
    "max_length": 16,
    "seed": 0,
    "shard": [0, 1],
    "asked_documents": 30,
    "asked_tokens": None,
    "tolerance": None,
}


def moment(layer: str, seed: int) -> Moment:
    d = LAYERS[layer]
    X = torch.randn(40 + seed, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Moment.of(X.T @ X * 10.0**seed, 40 + seed, 30 + seed)


def put(folder: Path, number: int, suffix: str = ".safetensors", **changed: Any) -> Path:
    """The collection of both layers with that number; keys that are set to ... are left out."""
    folder.mkdir(parents=True)
    for layer in LAYERS:
        each = moment(layer, number)
        about = REQUEST | {"layer": layer, "width": each.width, "tokens": each.count, "documents": each.documents}
        about |= {"digest": each.digest} | changed
        path = folder / file_name(layer, "float32", each.documents, 16, suffix)
        write(path, each, {key: value for key, value in about.items() if value is not ...})
    return folder


def shards(top: Path, n: int) -> list[Path]:
    return [put(top / f"{i}", i, shard=[i, n]) for i in range(n)]


def refused(folders: list[Path], out: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        merge(folders, out, **options)
    assert not out.exists()
    return str(caught.value)


def sidecar(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return content


def without_sidecars(folder: Path) -> Path:
    for path in folder.glob("*.json"):
        path.unlink()
    return folder


def test_sums_in_float64(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    written = merge(shards(tmp_path, 3), tmp_path / "out", progress=lambda *at: calls.append(at))
    assert calls == [(1, 2), (2, 2)]
    assert [path.name for path in written] == [f"{layer}_float32_mom2_93_t16.safetensors" for layer in LAYERS]
    for layer, path in zip(LAYERS, written, strict=True):
        parts = [moment(layer, seed) for seed in range(3)]
        found = read(path, LAYERS[layer], "feedbeef")
        exact = sum(part.triangle for part in parts)
        assert float((found.triangle - exact).abs().max() / exact.abs().max()) <= 1e-16
        assert (found.count, found.documents) == (123, 93)
        about = sidecar(path)
        assert about.pop("date").endswith("+00:00")
        same = ("model", "fingerprint", "tokenizer", "dtype", "corpus", "max_length")
        assert about == {
            **{key: REQUEST[key] for key in same},
            "layer": layer, "width": LAYERS[layer], "tokens": 123, "documents": 93, "digest": found.digest,
            "rewire": rewire.__version__,
            "parts": [
                {
                    "corpus": "words", "corpus_digest": "ba9876543210", "seed": 0, "shard": [i, 3],
                    "tokens": part.count, "documents": part.documents, "digest": part.digest,
                }
                for i, part in enumerate(parts)
            ],
        }  # fmt: skip


def test_other_text_of_the_same_model(tmp_path: Path) -> None:
    """Merging goes on with what was merged before; an npz takes part."""
    one, two = put(tmp_path / "1", 1), put(tmp_path / "2", 2, corpus="wiki", corpus_digest="cc")
    three = put(tmp_path / "3", 3, ".npz", corpus="books", corpus_digest="dd", digest=..., model="elsewhere/tiny")
    (first, _) = merge([one, two], tmp_path / "first")
    assert sidecar(first)["corpus"] == "words+wiki"
    (path, _) = merge([tmp_path / "first", three], tmp_path / "all")
    assert [part["corpus"] for part in sidecar(path)["parts"]] == ["words", "wiki", "books"]
    assert sidecar(path)["model"] == "a/tiny", "the fingerprint decides, names differ from place to place"
    assert read(path).count == 41 + 42 + 43
    assert "holds documents that" in refused([tmp_path / "all", put(tmp_path / "4", 2, corpus="w")], tmp_path / "no")


def test_the_same_data_twice(tmp_path: Path) -> None:
    one = put(tmp_path / "1", 1)
    other_numbers = put(tmp_path / "2", 2)
    text = refused([one, other_numbers], tmp_path / "out")
    assert text.startswith(f"{other_numbers / 'h.2.proj_float32_mom2_32_t16.safetensors'}: holds documents that {one}")
    assert 'corpus "words", seed 0, shard [0, 1]' in text
    same_numbers = put(tmp_path / "3", 1, corpus="wiki", corpus_digest="cc")
    assert "holds documents that" in refused([one, same_numbers], tmp_path / "out")
    assert "holds documents that" in refused([one, one], tmp_path / "out")
    copies = [without_sidecars(put(tmp_path / name, 1)) for name in "ab"]
    text = refused(copies, tmp_path / "out", model="a/tiny")
    assert f"the same numbers as in {copies[0]}" in text
    assert merge([one, put(tmp_path / "5", 4, seed=None, corpus_digest="ee")], tmp_path / "out")


@given(a=st.tuples(st.integers(0, 11), st.integers(1, 12)), b=st.tuples(st.integers(0, 11), st.integers(1, 12)))
def test_shards_that_share_documents(a: tuple[int, int], b: tuple[int, int]) -> None:
    a, b = (a[0] % a[1], a[1]), (b[0] % b[1], b[1])
    shared = set(range(a[0], 300, a[1])) & set(range(b[0], 300, b[1]))
    assert _meet(a, b) == bool(shared)


def test_other_samples_of_one_corpus_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = put(tmp_path / "1", 1, seed=1), put(tmp_path / "2", 2, seed=2)
    with caplog.at_level(logging.WARNING):
        merge([one, two], tmp_path / "out")
    assert "drawn from one corpus: some documents may count twice" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"), [("fingerprint", "cafe"), ("tokenizer", "cafe"), ("dtype", "bfloat16"), ("max_length", None)]
)
def test_keys_that_differ(tmp_path: Path, key: str, value: Any) -> None:
    one, two = put(tmp_path / "1", 1), put(tmp_path / "2", 2, corpus_digest="cc", **{key: value})
    path = two / "h.2.proj_float32_mom2_32_t16.safetensors"
    text = refused([one, two], tmp_path / "out")
    assert text.startswith(f"{path}: {key} {value} found, {REQUEST[key]} in {one}/h.2.proj_")


def test_without_sidecars_somebody_has_to_say_the_model(tmp_path: Path) -> None:
    one, two = put(tmp_path / "1", 1), without_sidecars(put(tmp_path / "2", 2, ".npz"))
    assert "nothing beside it says which model it is of; say the name" in refused([one, two], tmp_path / "out")
    (path, _) = merge([one, two], tmp_path / "out", model="a/tiny")
    about = sidecar(path)
    assert about["model"] == "a/tiny"
    assert "fingerprint" not in about, "it is not known of all"
    assert about["corpus"] == "words+unknown"
    assert about["parts"][1] == {"tokens": 42, "documents": 32}
    three = put(tmp_path / "3", 3, fingerprint=..., corpus_digest="cc", model="gpt-9")
    assert "of gpt-9 by its sidecar, a/tiny was said" in refused([one, three], tmp_path / "no", model="a/tiny")
    other_cap = without_sidecars(put(tmp_path / "4", 4))
    for path in other_cap.iterdir():
        path.rename(path.with_name(path.name.replace("_t16", "_t32")))
    assert "max_length 32 found, 16 in" in refused([one, other_cap], tmp_path / "no", model="a/tiny")


def test_layers_that_differ(tmp_path: Path) -> None:
    one, two = put(tmp_path / "1", 1), put(tmp_path / "2", 2, corpus_digest="cc")
    extra = two / file_name("h.10.proj", "float32", 99, 16)
    write(extra, moment("h.10.proj", 3), REQUEST)
    assert f"{two}: several statistics for h.10.proj: " in refused([one, two], tmp_path / "out")
    for path in two.glob("h.10.*"):
        path.unlink()
    for folders in ([one, two], [two, one]):
        text = refused(folders, tmp_path / "out")
        assert text == f"{two}: no statistics for h.10.proj, which {one} has; expected the same layers"
    wide = Moment.of(torch.eye(6), 50, 32)
    write(two / "h.2.proj_float32_mom2_32_t16.safetensors", wide, REQUEST | {"corpus_digest": "cc"})
    for path in one.glob("h.10.*"):
        path.unlink()
    assert "width 6 found, 5 in" in refused([one, two], tmp_path / "out")


def test_what_is_there_stays(tmp_path: Path) -> None:
    one, two = shards(tmp_path, 2)
    (path, other) = merge([one, two], tmp_path / "out")
    before = path.read_bytes(), other.read_bytes()
    with pytest.raises(InputError, match="is there already and is not overwritten"):
        merge([one, two], tmp_path / "out")
    assert before == (path.read_bytes(), other.read_bytes())
    with pytest.raises(InputError, match="1 folder to merge; expected at least two"):
        merge([one], tmp_path / "new")


def test_a_damaged_shard(tmp_path: Path) -> None:
    one, two = shards(tmp_path, 2)
    path = min(two.glob("h.2*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    assert refused([one, two], tmp_path / "out").startswith(f"{path}: truncated or broken")
