import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rewire.kernels.errors import InputError
from rewire.stats import Moment
from rewire.stats.cache import ABANDONED
from rewire.stats.store import Header, file_name, find, layers_in, read, read_header, write

LAYER = "transformer.h.1.mlp.c_proj"
NPZ = f"{LAYER}_float32_mom2_300.npz"
OURS = f"{LAYER}_float32_mom2_300.safetensors"
NONE_BITS = 0xFFF8000000000002


def moment(d: int = 8, documents: int | None = 300) -> Moment:
    X = torch.randn(40, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Moment.of(X.T @ X, 40, documents)


def put(path: Path, **members: Any) -> Path:
    """An npz as published code writes it, with members replaced (None: left out)."""
    held = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(40),
        "mom2.mom2": moment().sum.float().numpy(),
        "sample_size": np.array(300),
        **members,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in held.items() if value is not None})
    return path


def refused(path: Path, width: int | None = 8, fingerprint: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(path, width, fingerprint)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_file_name() -> None:
    assert file_name(LAYER, "float32", 300, None) == OURS
    assert file_name(LAYER, "float32", 300, None, ".npz") == NPZ
    assert file_name(LAYER, "bfloat16", 300, 128) == f"{LAYER}_bfloat16_mom2_300_t128.safetensors"
    assert file_name(LAYER, "float32", None, 128, ".npz") == f"{LAYER}_float32_mom2_t128.npz"


def test_a_written_npz_is_the_ecosystems(tmp_path: Path) -> None:
    written = moment()
    write(tmp_path / NPZ, written, {"fingerprint": "aa", "tokens": 40})
    with np.load(tmp_path / NPZ, allow_pickle=False) as held:
        assert set(held.files) == {"mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"}
        assert held["mom2.constructor"].dtype.kind == "U"
        assert held["mom2.constructor"].item().endswith("SecondMoment()")
        assert (held["mom2.count"].dtype, held["mom2.count"].shape, held["mom2.count"].item()) == (np.int64, (), 40)
        assert (held["sample_size"].dtype, held["sample_size"].shape, held["sample_size"].item()) == (np.int64, (), 300)
        assert held["mom2.mom2"].dtype == np.float32
        assert np.array_equal(held["mom2.mom2"], written.sum.float().numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == [NPZ.replace(".npz", ".json"), NPZ]
    back = read(tmp_path / NPZ, 8, "aa")
    assert torch.equal(back.triangle, written.triangle.float().double())
    assert (back.count, back.documents, back.source) == (40, 300, str(tmp_path / NPZ))


def test_no_documents_are_boxed_as_published_code_boxes_none(tmp_path: Path) -> None:
    write(tmp_path / NPZ, moment(documents=None), {})
    with np.load(tmp_path / NPZ, allow_pickle=False) as held:
        assert held["sample_size"].dtype == np.float64
        assert held["sample_size"].view(np.uint64).item() == NONE_BITS
    assert read(tmp_path / NPZ).documents is None


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 40), seed=st.integers(0, 2**31), documents=st.none() | st.integers(0, 10**12))
def test_ours_come_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, d: int, seed: int, documents: int | None
) -> None:
    folder = tmp_path_factory.mktemp("ours")
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * d, d, generator=generator, dtype=torch.float64) * 10 ** torch.linspace(-6, 6, d).double()
    written = Moment.of(X.T @ X, 2 * d, documents)
    write(folder / OURS, written, {"digest": written.digest})
    back = read(folder / OURS, d)
    assert torch.equal(back.triangle, written.triangle)
    assert (back.count, back.documents, back.width) == (2 * d, documents, d)
    assert read_header(folder / OURS) == Header(d, 2 * d, documents)
    again = folder / f"again_{OURS}"
    write(again, back, {})
    assert again.read_bytes() == (folder / OURS).read_bytes(), "the same moment is the same file"


def test_our_file_is_safetensors(tmp_path: Path) -> None:
    write(tmp_path / OURS, moment(), {})
    with safe_open(tmp_path / OURS, "np") as file:
        assert file.metadata() == {"format": "rewire-moment-1", "tokens": "40", "documents": "300"}
        assert list(file.keys()) == ["triangle"]
        assert file.get_tensor("triangle").dtype == np.float64
        assert np.array_equal(file.get_tensor("triangle"), moment().triangle.numpy())
    assert (tmp_path / OURS).stat().st_size < 36 * 8 + 256, "as many bytes as a full float32 matrix"
    with pytest.raises(InputError, match=r"expected a file that ends in .safetensors or .npz"):
        write(tmp_path / "C.pt", moment(), {})


@pytest.mark.parametrize(("model", "width", "tokens"), [("cf-gpt2", 1024, 31151), ("cf-llama", 704, 31290)])
def test_golden_files_are_read(shared: Path, model: str, width: int, tokens: int) -> None:
    folder = shared / "goldens" / model / "stats"
    assert [name.split(".")[2] for name in layers_in(folder)] == ["1", "2", "3"]
    for layer in (1, 2, 3):
        name = f"transformer.h.{layer}.mlp.c_proj" if model == "cf-gpt2" else f"model.layers.{layer}.mlp.down_proj"
        path = find(folder, name, model)
        assert read_header(path) == Header(width, tokens, 300)
        found = read(path, width, "a fingerprint: no sidecar, nothing to compare")
        assert (found.count, found.documents, found.width) == (tokens, 300, width)
        with np.load(path) as held:
            assert np.array_equal(found.sum.float().numpy(), held["mom2.mom2"])
    text = refused(path, width + 1)
    assert text == f"statistics of width {width} found, the model's layer {name} has {width + 1}"


def test_forms_of_published_files(tmp_path: Path) -> None:
    boxed_none = np.frombuffer(np.uint64(NONE_BITS).tobytes(), dtype=np.float64)[0]
    path = put(tmp_path / f"{LAYER}_float32_mom2.npz", sample_size=boxed_none)
    assert read(path, 8).documents is None
    assert read(put(tmp_path / NPZ, sample_size=None), 8).documents is None
    exact = moment().sum.numpy()
    for total in (exact, exact.astype(">f8"), np.asfortranarray(exact)):
        path = put(tmp_path / NPZ, **{"mom2.mom2": total, "mom2.count": np.array(40.0)})
        assert torch.equal(read(path, 8).triangle, moment().triangle), "float64 in the file is kept"
    path = put(tmp_path / NPZ, **{"mom2.mom2": exact.astype(np.float16)})
    assert torch.equal(read(path, 8).sum, moment().sum.half().double())
    np.savez_compressed(path, **{"mom2.mom2": exact.astype(np.float32), "mom2.count": 40})
    assert torch.equal(read(path, 8).triangle, moment().triangle.float().double())
    path = put(tmp_path / NPZ.replace("mom2", "mean-mom2"), **{"mean.count": 40, "mean.mean": np.zeros(8)})
    assert read(path, 8).count == 40
    assert list(layers_in(path)) == [LAYER]


def test_broken_npz(tmp_path: Path) -> None:
    path = put(tmp_path / NPZ)
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-30], b"<html>not found</html>"):
        path.write_bytes(content)
        assert refused(path).startswith("truncated or broken, no npz (")
    flipped = bytearray(whole)
    flipped[whole.index(b"mom2.mom2.npy") + 200] ^= 1
    path.write_bytes(flipped)
    assert refused(path).startswith("truncated or broken, no npz (")
    for save in (np.savez, np.savez_compressed):  # the last bytes of a member are checked, too
        save(path, **{"mom2.mom2": moment().sum.numpy(), "mom2.count": 40})
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x03\x04", 4) - 4] ^= 1
        path.write_bytes(content)
        assert refused(path).startswith("truncated or broken, no npz (")
    with path.open("wb") as file:
        np.save(file, np.zeros((8, 8), np.float32))
    assert refused(path).startswith("holds a single array")
    put(path, **{"mom2.mom2": np.array({"a": 1}, dtype=object)})
    assert refused(path).startswith("mom2.mom2 of shape () found, expected a square matrix")
    put(path, **{"mom2.mom2": np.full((8, 8), None, dtype=object)})
    assert refused(path).startswith("mom2.mom2 holds object, expected float32")
    put(path, **{"mom2.count": np.array({"a": 1}, dtype=object)})
    assert refused(path).startswith("truncated or broken, no npz (Object arrays cannot be loaded")
    assert refused(tmp_path / "none.npz").startswith("no such file")


def test_wrong_contents_of_an_npz(tmp_path: Path) -> None:
    path, total = tmp_path / NPZ, moment().sum.float().numpy()

    def changed(row: int, column: int, value: float) -> np.ndarray:
        copy = total.copy()
        copy[row, column] = value
        return copy

    only_mean = {"mom2.mom2": None, "mom2.count": None, "mom2.constructor": None, "mean.mean": np.zeros(8)}
    for members, width, expected in [
        ({"mom2.mom2": None}, 8, "no mom2.mom2 in it (found mom2.constructor, mom2.count, sample_size); expected"),
        ({"mom2.count": None}, 8, "no mom2.count in it (found "),
        (only_mean, 8, "no mom2.mom2 in it (found statistics called mean); expected the npz of a second moment (mom2)"),
        ({}, 9, f"statistics of width 8 found, the model's layer {LAYER} has 9"),
        ({"mom2.mom2": total[:5]}, 8, "mom2.mom2 of shape (5, 8) found, expected a square matrix"),
        ({"mom2.mom2": total[:0, :0]}, None, "mom2.mom2 of shape (0, 0) found, expected a square matrix"),
        ({"mom2.mom2": total[0]}, 8, "mom2.mom2 of shape (8,) found"),
        ({"mom2.mom2": total.astype(np.int32)}, 8, "mom2.mom2 holds int32, expected float32"),
        ({"mom2.mom2": changed(3, 5, np.nan)}, 8, "NaN or Inf in mom2.mom2"),
        ({"mom2.mom2": changed(3, 3, np.inf)}, 8, "NaN or Inf in mom2.mom2"),
        ({"mom2.mom2": changed(3, 3, -1.0)}, 8, "negative diagonal in mom2.mom2"),
        ({"mom2.mom2": np.tril(total)}, 8, "mom2.mom2 is not symmetric"),
        ({"mom2.count": np.array(15)}, 8, f"statistics of 15 tokens found, layer {LAYER} of width 8 needs 16"),
        ({"mom2.count": np.array(0)}, None, "statistics of 0 tokens found, expected at least one"),
        ({"mom2.count": np.array(np.nan)}, 8, "statistics of None tokens found"),
        ({"mom2.count": np.array([40, 40])}, 8, "statistics of None tokens found"),
    ]:
        assert refused(put(path, **members), width).startswith(expected)
    assert read(put(path, **{"mom2.count": np.array(15)})).count == 15, "a small shard is to be merged"


def test_a_triangle_with_one_huge_column_is_still_noticed(tmp_path: Path) -> None:
    """The BOS of Llama gives a column of 1e4 times the others' norm."""
    X = torch.randn(600, 300, generator=torch.Generator().manual_seed(0)) + 0.2
    X[:, 7] *= 1e4
    total = (X.T @ X).numpy()
    members = {"mom2.count": np.array(600), "mom2.mom2": total}
    assert read(put(tmp_path / NPZ, **members), 300).count == 600
    members["mom2.mom2"] = np.tril(total)
    assert refused(put(tmp_path / NPZ, **members), 300).startswith("mom2.mom2 is not symmetric")


def test_wrong_contents_of_ours(tmp_path: Path) -> None:
    path, triangle = tmp_path / OURS, moment().triangle
    about = {"format": "rewire-moment-1", "tokens": "40", "documents": "300"}
    nan, negative = triangle.clone(), triangle.clone()
    nan[17] = torch.nan
    negative[9] = -1  # row 3, column 3
    for tensors, metadata, width, expected in [
        (
            {"triangle": triangle.float()},
            about,
            8,
            "triangle of shape [36] in F32 found, expected [d (d + 1) / 2] in F64",
        ),
        ({"triangle": triangle.bfloat16()}, about, 8, "triangle of shape [36] in BF16 found"),
        ({"triangle": triangle.long()}, about, 8, "triangle of shape [36] in I64 found"),
        ({"triangle": triangle.view(6, 6)}, about, 8, "triangle of shape [6, 6] in F64 found"),
        ({"triangle": triangle[:35]}, about, 8, "35 values are no lower triangle"),
        ({"triangle": triangle[:0]}, about, 8, "0 values are no lower triangle"),
        ({"triangle": triangle}, about, 9, f"statistics of width 8 found, the model's layer {LAYER} has 9"),
        ({"triangle": triangle}, {**about, "tokens": "15"}, 8, "statistics of 15 tokens found"),
        ({"triangle": triangle}, {**about, "tokens": "many"}, 8, "statistics of None tokens found"),
        ({"triangle": triangle}, {}, 8, "format None with triangle found, expected 'rewire-moment-1' with `triangle`"),
        ({"a": triangle}, {"format": "rewire-delta-1"}, 8, "format 'rewire-delta-1' with a found"),
        ({"triangle": nan}, about, 8, "NaN or Inf in the triangle"),
        ({"triangle": negative}, about, 8, "negative diagonal in the triangle"),
    ]:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        assert refused(path, width).startswith(expected)


def test_broken_ours(tmp_path: Path) -> None:
    path = tmp_path / OURS
    write(path, moment(), {})
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:60], whole[:-8], whole[:-1], b"<html>not found</html>"):
        path.write_bytes(content)
        assert refused(path).startswith("truncated or broken, no safetensors (")
    assert refused(tmp_path / "none.safetensors").startswith("no such file")


@pytest.mark.parametrize("name", [NPZ, OURS])
def test_sidecar(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    sidecar = path.with_suffix(".json")
    write(path, moment(), {"fingerprint": "aa", "model": "gpt2-xl", "tokens": 40, "layer": LAYER})
    assert json.loads(sidecar.read_text())["model"] == "gpt2-xl"
    assert read(path, 8).count == 40
    assert refused(path, 8, "bb").startswith(
        "statistics of another model: of gpt2-xl (weights aa), the model has weights bb"
    )
    sidecar.write_text(json.dumps({"fingerprint": "aa", "tokens": 41}))
    assert refused(path, 8, "aa").startswith("holds 40 tokens, its sidecar says 41")
    sidecar.write_text(json.dumps({"layer": LAYER.replace("1", "2")}))
    assert refused(path).startswith(f"named after layer {LAYER}, its sidecar says transformer.h.2.mlp.c_proj")
    for content in ('{"fingerprint": "a', "[1]"):
        sidecar.write_text(content)
        with pytest.raises(InputError, match="sidecar of") as caught:
            read(path, 8, "aa")
        assert str(caught.value).startswith(f"{sidecar}: ")
    sidecar.unlink()
    assert read(path, 8, "bb").count == 40, "without a sidecar there is nothing to compare"


def test_other_numbers_beside_a_sidecar_of_ours_are_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / OURS, Moment(moment().triangle * 2, 40, 300)
    write(path, other, {"digest": moment().digest})
    assert refused(path) == (
        f"its sidecar is of other numbers (digest {moment().digest}, found {other.digest}); collect them anew"
    )


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from rewire.stats import Moment
from rewire.stats.cache import ABANDONED
from rewire.stats.store import write
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write(Path(sys.argv[1]), Moment.of(torch.eye(100) * 3, 300, 4), {"new": True, "long": "x" * int(sys.argv[2])})
except OSError as error:
    print(error.filename, error.strerror, sep="|")
"""


@pytest.mark.parametrize(("name", "long"), [(NPZ, 0), (OURS, 0), (OURS, 30000)])
def test_a_full_disk_loses_nothing(tmp_path: Path, name: str, long: int) -> None:
    """The file does not fit; or, of width 3, it does and its sidecar does not."""
    path = tmp_path / name
    program = FULL_DISK.replace("eye(100)", "eye(3)") if long else FULL_DISK
    write(path, moment(), {"old": True})
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    result = subprocess.run([sys.executable, "-c", program, path, str(long)], capture_output=True, text=True)
    failed = path.with_suffix(".json") if long else path
    assert result.stdout.strip() == f"{failed}|File too large", result.stderr
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    left = tmp_path / f"{OURS}.0badcafe.77.tmp"
    left.write_bytes(b"half of it")
    write(tmp_path / OURS, moment(), {})
    assert left.exists(), "somebody may be at it"
    os.utime(left, (0, time.time() - ABANDONED - 9))
    write(tmp_path / OURS, moment(), {})
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "no" / OURS, moment(), {})
    assert caught.value.filename == str(tmp_path / "no" / OURS)


def test_a_sidecar_that_is_no_json_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / OURS, moment(), {"old": True})
    with pytest.raises(TypeError):
        write(tmp_path / OURS, Moment(moment().triangle * 2, 40), {"bad": {1, 2}})
    assert torch.equal(read(tmp_path / OURS).triangle, moment().triangle)
