import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewire.kernels.errors import InputError
from rewire.stats import Moment
from rewire.stats.store import file_name, find, read_npz, write

LAYER = "transformer.h.1.mlp.c_proj"
NAME = f"{LAYER}_float32_mom2_300.npz"


def moment(d: int = 8) -> Moment:
    X = torch.randn(40, d, generator=torch.Generator().manual_seed(0))
    return Moment(X.T @ X, 40, 300)


def put(path: Path, **members: Any) -> Path:
    """An npz as published code writes it, with members replaced (None: left out)."""
    total = moment().sum.numpy()
    held = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(40),
        "mom2.mom2": total,
        "sample_size": np.array(300),
        **members,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in held.items() if value is not None})
    return path


def refused(path: Path, width: int = 8, fingerprint: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_npz(path, width, fingerprint)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_file_name() -> None:
    assert file_name(LAYER, "float32", 300, None) == NAME
    assert file_name(LAYER, "bfloat16", 300, 128) == f"{LAYER}_bfloat16_mom2_300_t128.npz"


def test_written_file_is_the_ecosystems(tmp_path: Path) -> None:
    written = moment()
    write(tmp_path / NAME, written, {"fingerprint": "aa", "tokens": 40})
    with np.load(tmp_path / NAME, allow_pickle=False) as held:
        assert set(held.files) == {"mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"}
        assert held["mom2.constructor"].dtype.kind == "U"
        assert held["mom2.constructor"].item().endswith("SecondMoment()")
        assert (held["mom2.count"].dtype, held["mom2.count"].shape, held["mom2.count"].item()) == (np.int64, (), 40)
        assert (held["sample_size"].dtype, held["sample_size"].shape, held["sample_size"].item()) == (np.int64, (), 300)
        assert held["mom2.mom2"].dtype == np.float32
        assert np.array_equal(held["mom2.mom2"], written.sum.numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME.replace(".npz", ".json"), NAME]
    back = read_npz(tmp_path / NAME, 8, "aa")
    assert torch.equal(back.sum, written.sum)
    assert (back.count, back.documents, back.source) == (40, 300, str(tmp_path / NAME))


@pytest.mark.parametrize(("model", "width", "tokens"), [("cf-gpt2", 1024, 31151), ("cf-llama", 704, 31290)])
def test_golden_files_are_read(shared: Path, model: str, width: int, tokens: int) -> None:
    folder = shared / "goldens" / model / "stats"
    for layer in (1, 2, 3):
        name = f"transformer.h.{layer}.mlp.c_proj" if model == "cf-gpt2" else f"model.layers.{layer}.mlp.down_proj"
        found = read_npz(find(folder, name, model), width, "a fingerprint: no sidecar, nothing to compare")
        assert (found.count, found.documents, found.sum.shape) == (tokens, 300, (width, width))
        assert found.mean.diagonal().mean() == pytest.approx(found.sum.diagonal().mean().item() / tokens)
    text = refused(find(folder, name, model), width + 1)
    assert text == f"statistics of width {width} found, the model's layer {name} has {width + 1}"


def test_forms_of_published_files(tmp_path: Path) -> None:
    boxed_none = np.frombuffer(np.uint64(0xFFF8000000000002).tobytes(), dtype=np.float64)[0]
    path = put(tmp_path / f"{LAYER}_float32_mom2.npz", sample_size=boxed_none)
    assert read_npz(path, 8).documents is None
    assert read_npz(put(tmp_path / NAME, sample_size=None), 8).documents is None
    path = put(tmp_path / NAME, **{"mom2.mom2": moment().sum.double().numpy(), "mom2.count": np.array(40.0)})
    assert read_npz(path, 8).sum.dtype is torch.float32
    np.savez_compressed(path, **{"mom2.mom2": moment().sum.numpy(), "mom2.count": 40})
    assert torch.equal(read_npz(path, 8).sum, moment().sum)


def test_broken_files(tmp_path: Path) -> None:
    path = put(tmp_path / NAME)
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-30], b"<html>not found</html>"):
        path.write_bytes(content)
        assert refused(path).startswith("truncated or broken, no npz (")
    flipped = bytearray(whole)
    flipped[whole.index(b"mom2.mom2.npy") + 200] ^= 1
    path.write_bytes(flipped)
    assert refused(path).startswith("truncated or broken, no npz (")
    with path.open("wb") as file:
        np.save(file, np.zeros((8, 8), np.float32))
    assert refused(path).startswith("holds a single array")
    put(path, **{"mom2.mom2": np.array({"a": 1}, dtype=object)})
    assert refused(path).startswith("truncated or broken, no npz (Object arrays cannot be loaded")
    assert refused(tmp_path / "none.npz").startswith("no such file")


def test_wrong_contents(tmp_path: Path) -> None:
    path, total = tmp_path / NAME, moment().sum.numpy()

    def changed(row: int, column: int, value: float) -> np.ndarray:
        copy = total.copy()
        copy[row, column] = value
        return copy

    for members, width, expected in [
        ({"mom2.mom2": None}, 8, "no mom2.mom2 in it (found mom2.constructor, mom2.count, sample_size); expected"),
        ({"mom2.count": None}, 8, "no mom2.count in it (found "),
        ({}, 9, f"statistics of width 8 found, the model's layer {LAYER} has 9"),
        ({"mom2.mom2": total[:5]}, 8, "mom2.mom2 of shape (5, 8) found, expected a square matrix of width 8"),
        ({"mom2.mom2": total[0]}, 8, "mom2.mom2 of shape (8,) found"),
        ({"mom2.mom2": total.astype(np.int32)}, 8, "mom2.mom2 holds int32, expected float32"),
        ({"mom2.mom2": changed(3, 5, np.nan)}, 8, "NaN or Inf in mom2.mom2"),
        ({"mom2.mom2": changed(3, 3, np.inf)}, 8, "NaN or Inf in mom2.mom2"),
        ({"mom2.mom2": changed(3, 3, -1.0)}, 8, "negative diagonal in mom2.mom2"),
        ({"mom2.mom2": np.tril(total)}, 8, "mom2.mom2 is not symmetric"),
        ({"mom2.count": np.array(15)}, 8, f"statistics of 15 tokens found, layer {LAYER} of width 8 needs 16"),
        ({"mom2.count": np.array(np.nan)}, 8, "statistics of None tokens found"),
        ({"mom2.count": np.array([40, 40])}, 8, "statistics of None tokens found"),
    ]:
        assert refused(put(path, **members), width).startswith(expected)


def test_a_triangle_with_one_huge_column_is_still_noticed(tmp_path: Path) -> None:
    """The BOS of Llama gives a column of 1e4 times the others' norm."""
    X = torch.randn(600, 300, generator=torch.Generator().manual_seed(0)) + 0.2
    X[:, 7] *= 1e4
    total = (X.T @ X).numpy()
    members = {"mom2.count": np.array(600), "mom2.mom2": total}
    assert read_npz(put(tmp_path / NAME, **members), 300).count == 600
    members["mom2.mom2"] = np.tril(total)
    assert refused(put(tmp_path / NAME, **members), 300).startswith("mom2.mom2 is not symmetric")


def test_sidecar(tmp_path: Path) -> None:
    path, sidecar = tmp_path / NAME, tmp_path / NAME.replace(".npz", ".json")
    write(path, moment(), {"fingerprint": "aa", "model": "gpt2-xl", "tokens": 40})
    assert read_npz(path, 8).count == 40
    assert refused(path, 8, "bb").startswith(
        "statistics of another model: of gpt2-xl (weights aa), the model has weights bb"
    )
    sidecar.write_text(json.dumps({"fingerprint": "aa", "tokens": 41}))
    assert refused(path, 8, "aa").startswith("holds 40 tokens, its sidecar says 41")
    for content in ('{"fingerprint": "a', "[1]"):
        sidecar.write_text(content)
        with pytest.raises(InputError, match="sidecar of") as caught:
            read_npz(path, 8, "aa")
        assert str(caught.value).startswith(f"{sidecar}: ")
    sidecar.unlink()
    assert read_npz(path, 8, "bb").count == 40, "without a sidecar there is nothing to compare"


@pytest.mark.parametrize("folder", ["", "wikipedia_stats", "gpt-j-6B/wiki_stats", "EleutherAI_gpt-j-6B/wiki_stats"])
@pytest.mark.parametrize("suffix", ["_100000", "_100000_t128", "_t{batch_tokens}_100000", "_t512_100000", ""])
def test_find(tmp_path: Path, folder: str, suffix: str) -> None:
    path = put(tmp_path / folder / f"{LAYER}_float32_mom2{suffix}.npz")
    put(tmp_path / folder / "transformer.h.11.mlp.c_proj_float32_mom2_100000.npz")
    put(tmp_path / folder / "transformerXh.1.mlp.c_proj_float32_mom2_100000.npz")
    put(tmp_path / "gpt2-xl" / "wiki_stats" / NAME)
    assert find(tmp_path, LAYER, "EleutherAI/gpt-j-6B") == path
    assert find(tmp_path, LAYER, "EleutherAI/gpt-j-6B", n_samples=7) == path


def test_several_are_decided_by_the_sample_size(tmp_path: Path) -> None:
    small, large = put(tmp_path / NAME), put(tmp_path / "wiki_stats" / NAME.replace("300", "5000"))
    assert find(tmp_path, LAYER, n_samples=300) == small
    assert find(tmp_path, LAYER, n_samples=5000) == large
    for asked in (None, 7):
        with pytest.raises(InputError) as caught:
            find(tmp_path, LAYER, n_samples=asked)
        assert str(caught.value) == (
            f"{tmp_path}: several statistics for {LAYER}: {NAME}, wiki_stats/{large.name}; expected one: "
            "name the folder that holds it, or set mom2_n_samples to its number"
        )
    put(tmp_path / "other_stats" / NAME)
    with pytest.raises(InputError, match=r"several .* other_stats/"):
        find(tmp_path, LAYER, n_samples=300)


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder; expected one with statistics"):
        find(tmp_path / "none", LAYER)

    def looked(model: str = "") -> str:
        with pytest.raises(InputError) as caught:
            find(tmp_path, LAYER, model)
        return str(caught.value)

    wanted = f"{tmp_path}: no statistics for {LAYER} (looked for {LAYER}_float32_mom2_*.npz in: "
    assert looked() == f"{wanted}there, *_stats/); found nothing"
    (tmp_path / "notes.txt").touch()
    assert looked("a/b").startswith(f"{wanted}there, *_stats/, b/*_stats/, a_b/*_stats/); found notes.txt")
    for i in range(2, 8):
        put(tmp_path / "b" / "w_stats" / f"h.{i}.c_proj_float32_mom2_300.npz")
    assert looked("a/b").endswith(
        "found b/w_stats/h.2.c_proj_float32_mom2_300.npz, b/w_stats/h.3.c_proj_float32_mom2_300.npz, "
        "b/w_stats/h.4.c_proj_float32_mom2_300.npz, b/w_stats/h.5.c_proj_float32_mom2_300.npz and 2 more"
    )
