from pathlib import Path

import pytest
import torch

from rewire.kernels.errors import InputError
from rewire.stats import moments
from rewire.stats.moments import Moment, SecondMoment, width_of


def keys(tokens: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Skewed columns and a shared mean, as real keys have."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randn(tokens, d, generator=generator) + 0.3) * torch.logspace(-2, 1, d)).to(dtype)


def exact(X: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    for row in X.double():
        total += torch.outer(row, row)
    return total


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = wanted.diagonal().sqrt()
    return float(((found.double() - wanted).abs() / scale[:, None] / scale).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_equals_a_float64_loop(dtype: torch.dtype) -> None:
    X = keys(700, 33, dtype)
    moment = SecondMoment(33)
    for part in X.split([1, 0, 250, 449]):
        moment.add(part)
    result = moment.finish(documents=4)
    wanted = exact(X)
    assert relative(result.sum, wanted) < 1e-6
    assert (result.count, result.documents, result.source) == (700, 4, "collected")
    assert result.triangle.dtype is torch.float64
    assert (result.sum.dtype, result.mean.dtype) == (torch.float64, torch.float32)
    assert result.width == 33
    assert torch.equal(result.sum, result.sum.T)
    assert relative(result.mean, wanted / 700) < 1e-6


def test_folds_inside_a_batch_and_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "FOLD", 64)
    X = keys(500, 17)
    whole, parts = SecondMoment(17), SecondMoment(17)
    whole.add(X)
    for part in X.split([3, 200, 64, 1, 232]):
        parts.add(part)
    # chunks are cut at the same tokens however they came in: only the order within a chunk's products differs
    assert relative(whole.finish().sum, exact(X)) < 1e-6
    assert relative(parts.finish().sum, exact(X)) < 1e-6
    assert whole.count == parts.count == 500


def test_both_triangles_of_a_wide_layer() -> None:
    """Wider than a block of the kernel, so that something above the diagonal is left undefined until the end."""
    X = keys(60, 600)
    moment = SecondMoment(600)
    moment.add(X)
    result = moment.finish()
    assert torch.equal(result.sum, result.sum.T)
    assert relative(result.sum, X.double().T @ X.double()) < 1e-6


def test_small_keys_are_not_lost_behind_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a key of 1e4 (a BOS has such) fp32 stands at 1e8, where adding 1 changes nothing: fp64 takes over."""
    monkeypatch.setattr(moments, "FOLD", 16)
    moment = SecondMoment(1)
    moment.add(torch.tensor([[1e4]]))
    for _ in range(2000):
        moment.add(torch.ones(1, 1))
    assert moment.finish().sum.item() == pytest.approx(1e8 + 2000, abs=16)


@pytest.mark.parametrize("d", [1, 2, 255, 256, 257, 600])
def test_triangle_row_after_row(d: int) -> None:
    full = torch.rand(d, d, dtype=torch.float64)
    full += full.T.clone()
    wanted = torch.cat([full[i, : i + 1] for i in range(d)])
    moment = Moment.of(full, 7, 3, "a.npz")
    assert torch.equal(moment.triangle, wanted)
    assert torch.equal(moment.sum, full)
    assert torch.equal(moment.diagonal, full.diagonal())
    assert moment.width == d
    assert torch.equal(Moment.of(full.float(), 7).sum, full.float().double())
    with pytest.raises(InputError, match="no lower triangle"):
        width_of(len(wanted) + 1 if d > 1 else 2)


def test_digest_tells_moments_apart() -> None:
    total = exact(keys(50, 40))
    first = Moment.of(total, 50).digest
    other = total.clone()
    other[5, 5] *= 1 + 1e-12
    assert Moment.of(total.clone(), 50, 3, "elsewhere").digest == first
    assert (
        len({first, Moment.of(other, 50).digest, Moment.of(total, 51).digest, Moment.of(total[:39, :39], 50).digest})
        == 4
    )


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_sums_elsewhere_with_one_chunk_for_several_layers(place: str, tmp_path: Path) -> None:
    chunk = torch.zeros(300, 300)
    layers = [SecondMoment(300, name=str(i), place=place, chunk=chunk, spill=tmp_path) for i in range(3)]
    X = [keys(90, 300, seed=i) for i in range(3)]
    for part in range(0, 90, 30):
        for layer, keys_ in zip(layers, X, strict=True):
            layer.add(keys_[part : part + 30])
    for layer, keys_ in zip(layers, X, strict=True):
        assert relative(layer.finish().sum, exact(keys_)) < 1e-6
    assert not list(tmp_path.iterdir()), "what is mapped has no name that a killed process could leave behind"
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text().splitlines()
        there = [line for line in maps if f"{tmp_path}/sums-" in line]
        assert (len(there) == 3) == (place == "disk")


def test_a_disk_without_room_for_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to through a map, it would end the process without a word."""

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match=r"no room for the running sums of h\.3, 0\.0 GB \(No space left on device\)"):
        SecondMoment(300, name="h.3", place="disk", spill=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_undefined_above_the_diagonal_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may leave anything there, NaN too."""

    def poisoned(C: torch.Tensor, X: torch.Tensor) -> None:
        C += (X.T @ X).tril()
        C[torch.ones_like(C, dtype=torch.bool).triu(1)] = torch.nan

    monkeypatch.setattr(moments, "gram_", poisoned)
    X = keys(80, 300)
    moment = SecondMoment(300)
    moment.add(X[:50])
    moment.fold()
    moment.add(X[50:])
    assert relative(moment.finish().sum, exact(X)) < 1e-6


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 0, "cuda": 0}
    monkeypatch.setattr("rewire.stats.memory.free_bytes", lambda device: free[device.type])
    widths = {"a": 1000, "b": 1000}  # 8 MB of sums, and as much of chunks
    for (cuda, cpu), wanted in {(30, 30): "device", (20, 30): "cpu", (20, 10): "disk"}.items():
        free.update(cuda=cuda * 10**6, cpu=cpu * 10**6)
        assert moments.choose_place(widths, torch.device("cuda")) == wanted
    free["cpu"] = 30 * 10**6
    assert moments.choose_place(widths, torch.device("cpu")) == "device"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_keys_name_the_layer(bad: float) -> None:
    moment = SecondMoment(4, name="h.3.c_proj")
    X = torch.ones(10, 4)
    X[7, 2] = bad
    moment.add(X)
    with pytest.raises(InputError, match=r"^h\.3\.c_proj: NaN or Inf among the keys of tokens 0 to 10; .*$"):
        moment.finish()


def test_wrong_width_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"h\.1: keys of shape \(10, 5\), expected \[T, 4\]"):
        SecondMoment(4, name="h.1").add(torch.ones(10, 5))


def test_inference_mode_of_the_caller_does_not_stick() -> None:
    with torch.inference_mode():
        moment = SecondMoment(4)
        moment.add(torch.ones(10, 4))
    moment.add(torch.ones(5, 4, requires_grad=True))
    result = moment.finish()
    assert result.sum.tolist() == [[15.0] * 4] * 4
    assert not result.sum.requires_grad
