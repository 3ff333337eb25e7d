import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewire.kernels.errors import InputError
from rewire.kernels.spd_solve import null_space
from rewire.stats.projections import basis_of, read_projections
from rewire.stats.store import layers_in, read

RANKS = {"cf-gpt2": (1024, [866, 819, 804]), "cf-llama": (704, [569, 563, 549])}  # goldens/README.md


def projection(d: int, rank: int, seed: int = 0) -> Tensor:
    X = torch.randn(d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q = torch.linalg.qr(X)[0]
    return (Q @ Q.T).float()


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def refused(path: Path, layers: list[int], width: int, take: int | None = None) -> str:
    """What is said at reading; or at taking a layer out, reading having gone well."""
    if take is not None:
        projections = read_projections(path, layers, width)
        with pytest.raises(InputError) as caught:
            projections[take]
    else:
        with pytest.raises(InputError) as caught:
            read_projections(path, layers, width)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=RANKS)
def golden(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> tuple[str, Path, dict[str, Tensor]]:
    """The published code's projections of layers 1 to 3, in one file as it writes them."""
    from safetensors.torch import load_file

    tensors = load_file(shared / "goldens" / request.param / "golden.safetensors")
    stack = torch.stack([tensors[f"alphaedit.P.{layer}"] for layer in (1, 2, 3)])
    return request.param, saved(tmp_path / "null_space_project.pt", stack), tensors


def test_published_projections(golden: tuple[str, Path, dict[str, Tensor]]) -> None:
    model, path, tensors = golden
    width, ranks = RANKS[model]
    projections = read_projections(path, [1, 2, 3], width)
    assert [basis_of(projections[layer]).rank for layer in (1, 2, 3)] == ranks
    P = projections[2]
    assert P.dtype is torch.float32
    assert torch.equal(P, tensors["alphaedit.P.2"])
    space = basis_of(P)
    assert space.complement
    assert space.basis.shape == (width, width - ranks[1])
    assert float((space.basis.T @ space.basis - torch.eye(width - ranks[1])).abs().max()) < 1e-12
    # P is itself 1.7e-6 of a random vector away from P P; the nearest projection to it is that of its eigenvectors
    vectors = torch.linalg.eigh((P.double() + P.T) / 2)[1][:, -ranks[1] :]
    nearest = vectors @ vectors.T
    assert float((space.dense() - nearest).abs().max()) < 1e-9
    assert float((space.dense() - P).abs().max()) < 1.5e-6
    assert float((space.dense() - P).norm() / P.norm()) < 2e-6


def test_a_published_projection_is_the_null_space_of_its_statistics(
    golden: tuple[str, Path, dict[str, Tensor]], shared: Path
) -> None:
    model, path, _ = golden
    width, _ = RANKS[model]
    known = json.loads((shared / "goldens" / model / "golden.json").read_text())
    (stats,) = next(iter(layers_in(shared / "goldens" / model / "stats").values()))
    ours = null_space(read(stats, width).mean, known["alphaedit"]["nullspace_threshold"])
    published = basis_of(read_projections(path, [1, 2, 3], width)[1])
    assert ours.rank == published.rank
    assert float((ours.dense() - published.dense()).abs().max()) < 1e-5


@pytest.mark.parametrize(("d", "rank"), [(2, 1), (40, 1), (40, 19), (40, 20), (40, 21), (40, 39), (33, 16), (33, 17)])
def test_the_smaller_side_is_kept(d: int, rank: int) -> None:
    P = projection(d, rank)
    space = basis_of(P)
    assert (space.rank, space.complement) == (rank, 2 * rank > d)
    assert space.basis.shape == (d, min(rank, d - rank))
    assert space.basis.dtype is torch.float64
    assert float((space.dense() - P).abs().max()) < 1e-6
    assert space.below != space.below
    assert space.above != space.above


def test_one_file_for_each_layer(tmp_path: Path) -> None:
    for layer in (4, 11):
        saved(tmp_path / f"layer-{layer}.pt", projection(20, layer, layer))
    projections = read_projections(tmp_path, [11, 4], 20)
    assert torch.equal(projections[4], projection(20, 4, 4))
    assert torch.equal(projections[11], projection(20, 11, 11))
    assert "holds layers 11, 4, layer 5 was asked for" in refused(tmp_path, [11, 4], 20, take=5)
    assert refused(tmp_path, [4, 5], 20) == f"{tmp_path}/layer-5.pt: no such file; " + (
        "expected a null-space projection, as torch.save writes it"
    )
    assert "layer-4.pt: a tensor [20, 20] found, expected a projection [21, 21]" in refused(tmp_path, [4], 21)


def test_layers_are_in_the_order_that_is_given(tmp_path: Path) -> None:
    path = saved(tmp_path / "P.pt", torch.stack([projection(20, 7, seed) for seed in range(3)]))
    projections = read_projections(path, [8, 4, 6], 20)
    assert torch.equal(projections[4], projection(20, 7, 1))
    single = saved(tmp_path / "one.pt", projection(20, 7).double())
    assert torch.equal(read_projections(single, [5], 20)[5], projection(20, 7))


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "P.pt", torch.stack([projection(20, 7)] * 3))
    assert "3 projections found, expected 2, of layers 4, 5; name the layers" in refused(path, [4, 5], 20)
    assert "projections of width 20 found, the model's layers have 22" in refused(path, [4, 5, 6], 22)
    saved(path, torch.zeros(3, 20, 19))
    assert "a tensor [3, 20, 19] found, expected projections [3, 20, 20]" in refused(path, [4, 5, 6], 20)
    saved(path, projection(20, 7))
    assert "a tensor [20, 20] found, expected projections [2, 20, 20]" in refused(path, [4, 5], 20)


def test_what_is_no_projection(tmp_path: Path) -> None:
    P = projection(40, 15)
    oblique = torch.zeros(40, 40)
    oblique[0, :2] = torch.tensor([1.0, 0.5])
    nan = P.clone()
    nan[3, 5] = torch.nan
    for content, what in [
        (2 * P, "not idempotent"),
        (-P, "not idempotent"),
        (P + 0.001 * torch.eye(40), "not idempotent"),
        (torch.tril(P), "not idempotent"),
        (P.bfloat16().float(), "not idempotent"),
        (nan, "not idempotent"),
        (oblique, "not symmetric"),
        (torch.zeros(40, 40), "of rank 0 in 40"),
        (torch.eye(40), "of rank 40 in 40"),
    ]:
        path = saved(tmp_path / "P.pt", torch.stack([P, content]))
        text = refused(path, [4, 5], 40, take=5)
        assert text.startswith(f"{path}, layer 5: ")
        assert what in text
        assert read_projections(path, [4, 5], 40)[4].shape == (40, 40)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    path = saved(tmp_path / "P.pt", projection(20, 7))
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[:100], whole[:-100], b"<html>not found</html>", pickle.dumps({"P": 1})):
        path.write_bytes(content)
        assert refused(path, [4], 20).startswith(f"{path}: truncated or broken; expected a null-space projection")
    for other, what in [
        ({"P": projection(20, 7)}, "dict found"),
        ([projection(20, 7)], "list found"),
        (projection(20, 7).half(), "torch.float16 found"),
        (torch.eye(20, dtype=torch.int64), "torch.int64 found"),
    ]:
        text = refused(saved(path, other), [4], 20)
        assert text == f"{path}: {what}, expected one tensor in float32: null-space projections"


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "harmed",)  # type: ignore[return-value]

    path = saved(tmp_path / "P.pt", Harm())
    assert refused(path, [4], 20).startswith(f"{path}: holds Python objects, which are not run")
    assert not (tmp_path / "harmed").exists()
