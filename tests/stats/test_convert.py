import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewire
from rewire.kernels.errors import InputError
from rewire.stats import Moment
from rewire.stats.convert import convert
from rewire.stats.store import file_name, find, read, read_header, write

LAYERS = ["transformer.h.2.mlp.c_proj", "transformer.h.10.mlp.c_proj"]


def moment(seed: int, d: int = 6, documents: int | None = 30) -> Moment:
    X = torch.randn(50, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Moment.of(X.T @ X, 50, documents)


def fill(folder: Path, suffix: str, **about: Any) -> dict[str, Moment]:
    """Two layers as we write them, with sidecars that say `about`."""
    folder.mkdir(parents=True, exist_ok=True)
    moments = {layer: moment(seed) for seed, layer in enumerate(LAYERS)}
    for layer, each in moments.items():
        known = {"layer": layer, "width": 6, "tokens": 50, "documents": 30, "digest": each.digest}
        write(folder / file_name(layer, "bfloat16", 30, 16, suffix), each, {**about, **known})
    return moments


def sidecar(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return content


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_there_and_back(tmp_path: Path) -> None:
    """To npz rounds to float32 once; back from there and there again changes nothing."""
    about = {"model": "a/tiny", "fingerprint": "feedbeef", "corpus": "words", "seed": 0}
    moments = fill(tmp_path / "ours", ".safetensors", **about)
    calls: list[tuple[int, int]] = []
    npz = convert(tmp_path / "ours", tmp_path / "npz", "npz", progress=lambda *at: calls.append(at))
    assert [path.name for path in npz] == [f"{layer}_bfloat16_mom2_30_t16.npz" for layer in LAYERS]
    assert calls == [(1, 2), (2, 2)]
    back = convert(tmp_path / "npz", tmp_path / "back", "safetensors")
    for layer, first, second in zip(LAYERS, npz, back, strict=True):
        rounded = moments[layer].triangle.float().double()
        assert torch.equal(read(first).triangle, rounded)
        assert torch.equal(read(second, 6, "feedbeef").triangle, rounded)
        for path, source in ((first, first.with_suffix(".safetensors")), (second, first)):
            assert sidecar(path) == {
                **about, "layer": layer, "width": 6, "tokens": 50, "documents": 30,
                "digest": read(path).digest, "converted_from": source.name,
            }  # fmt: skip
    again = convert(tmp_path / "back", tmp_path / "again", "npz")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in npz]
    assert len(names(tmp_path / "ours")) == 4, "the source stays"


def test_a_published_folder_without_sidecars(shared: Path, tmp_path: Path) -> None:
    source = shared / "goldens" / "cf-llama" / "stats"
    written = convert(source, tmp_path, "safetensors", model="cf-llama", fingerprint="feedbeef")
    layer = "model.layers.3.mlp.down_proj"
    path = tmp_path / f"{layer}_float32_mom2_300.safetensors"
    assert written[-1] == path
    about = sidecar(path)
    assert about.pop("date").endswith("+00:00")
    assert about == {
        "model": "cf-llama", "fingerprint": "feedbeef", "layer": layer, "width": 704, "tokens": 31290,
        "documents": 300, "digest": read(path).digest, "converted_from": f"{layer}_float32_mom2_300.npz",
        "rewire": rewire.__version__,
    }  # fmt: skip
    npz = source / f"{layer}_float32_mom2_300.npz"
    assert torch.equal(read(path, 704, "feedbeef").triangle, read(npz).triangle)
    with pytest.raises(InputError, match="statistics of another model"):
        read(path, 704, "cafe")
    assert path.stat().st_size < 1.01 * npz.stat().st_size, "no larger than float32, whole"


def test_no_more_is_said_than_known(tmp_path: Path) -> None:
    path = tmp_path / "h.1_float32_mom2.npz"
    np.savez(path, **{"mom2.mom2": np.eye(3, dtype=np.float32), "mom2.count": 9})  # type: ignore[arg-type]
    (written,) = convert(path, tmp_path / "out", "safetensors")
    assert written == tmp_path / "out" / "h.1_float32_mom2.safetensors"
    assert sidecar(written).keys() == {
        "layer", "width", "tokens", "documents", "digest", "converted_from", "rewire", "date",
    }  # fmt: skip
    assert sidecar(written)["documents"] is None
    assert read_header(written).documents is None


@pytest.mark.parametrize(("scheme", "folder"), [("last", "tiny"), ("whole", "a_tiny")])
def test_where_published_code_looks(tmp_path: Path, scheme: str, folder: str) -> None:
    """Its names know float32 and documents only, and are found under the model's name."""
    moments = fill(tmp_path / "words_stats", ".safetensors", model="a/tiny", corpus="words", fingerprint="aa")
    written = convert(tmp_path / "words_stats", tmp_path / "out", "npz", scheme=scheme)
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        f"{folder}/words_stats/{layer}_float32_mom2_30.npz" for layer in LAYERS
    ]
    assert find(tmp_path / "out", LAYERS[0], "a/tiny", 30) == written[0]
    assert read(written[1], 6, "aa").count == moments[LAYERS[1]].count
    moved = convert(tmp_path / "out" / folder, tmp_path / "moved", "npz", scheme="last", dataset="wiki")
    assert moved[0] == tmp_path / "moved" / "tiny" / "wiki_stats" / f"{LAYERS[0]}_float32_mom2_30.npz"
    assert moved[0].read_bytes() == written[0].read_bytes()


def test_where_published_code_looks_is_not_guessed(tmp_path: Path) -> None:
    fill(tmp_path / "ours", ".safetensors")
    for model, missing in [("", "model"), ("a/tiny", "data set")]:
        with pytest.raises(InputError, match=f"the name of its {missing} is not known; say it"):
            convert(tmp_path / "ours", tmp_path, "npz", model=model, scheme="last")
    (tmp_path / "ours").rename(tmp_path / "words_stats")
    written = convert(tmp_path / "words_stats", tmp_path / "out", "npz", model="a/tiny", scheme="last")
    assert written[0].parent == tmp_path / "out" / "tiny" / "words_stats"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "ours", ".safetensors")
    out = tmp_path / "out"
    out.mkdir()
    for there in (f"{LAYERS[1]}_bfloat16_mom2_30_t16.npz", f"{LAYERS[1]}_bfloat16_mom2_30_t16.json"):
        (out / there).write_text("mine")
        with pytest.raises(InputError, match=r"mom2_30_t16\.\w+: is there already and is not overwritten"):
            convert(tmp_path / "ours", out, "npz")
        assert names(out) == [there], "nor is the first layer written"
        (out / there).unlink()
    with pytest.raises(InputError, match="is there already"):
        convert(tmp_path / "ours", tmp_path / "ours", "npz")  # the sidecars are those of our files
    published = tmp_path / "ours" / "h.1_float32_mom2_5.npz"
    np.savez(published, **{"mom2.mom2": np.eye(3, dtype=np.float32), "mom2.count": 9})  # type: ignore[arg-type]
    (beside,) = convert(published, published.parent, "safetensors")
    assert find(published.parent, "h.1") == beside


def test_two_that_would_get_one_name(tmp_path: Path) -> None:
    fill(tmp_path / "words_stats", ".safetensors", model="a/tiny")
    for cap in (16, 32):
        write(tmp_path / "words_stats" / file_name("h.1", "float32", 30, cap), moment(0), {"model": "a/tiny"})
    with pytest.raises(InputError, match=r"h\.1_float32_mom2_30\.npz: several of the sources would be written there"):
        convert(tmp_path / "words_stats", tmp_path / "out", "npz", scheme="last")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    fill(tmp_path / "ours", ".safetensors", fingerprint="aa", model="a/tiny")
    with pytest.raises(InputError, match=r"with weights aa by its sidecar, bb was given"):
        convert(tmp_path / "ours", tmp_path / "out", "npz", fingerprint="bb")
    with pytest.raises(InputError, match="convert to 'pt'"):
        convert(tmp_path / "ours", tmp_path / "out", "pt")
    with pytest.raises(InputError, match="is a place for npz"):
        convert(tmp_path / "ours", tmp_path / "out", "safetensors", scheme="last")
    path = tmp_path / "ours" / f"{LAYERS[0]}_bfloat16_mom2_30_t16.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated or broken"):
        convert(tmp_path / "ours", tmp_path / "out", "npz")
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        convert(tmp_path / "ours" / f"{LAYERS[1]}_bfloat16_mom2_30_t16.safetensors", tmp_path / "file", "npz")
    assert caught.value.filename == str(tmp_path / "file")
