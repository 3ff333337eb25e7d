import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rewire.kernels.errors import InputError
from rewire.kernels.spd_solve import null_space
from rewire.stats import Moment
from rewire.stats.spectrum import Spectrum, plot_decay, spectrum
from rewire.stats.store import layers_in, read


def of_values(values: list[float], tokens: int = 100) -> Spectrum:
    """Of a C with these eigenvalues, in a random basis."""
    d = len(values)
    X = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(X)[0]
    return spectrum(Moment.of((Q * torch.tensor(values, dtype=torch.float64)) @ Q.T * tokens, tokens, 7))


def test_figures_that_are_known() -> None:
    values = [1e-3, 1e-2, 0.5, 4.0]
    found = of_values(values)
    assert (found.width, found.tokens, found.documents) == (4, 100, 7)
    assert np.allclose(found.eigenvalues, values, rtol=1e-12)
    total = sum(values)
    assert found.trace == pytest.approx(total)
    assert found.diagonal_mean == pytest.approx(total / 4)
    assert found.diagonal_min <= found.diagonal_mean <= found.diagonal_max
    assert found.participation == pytest.approx(total**2 / sum(value**2 for value in values))
    entropy = -sum(value / total * math.log(value / total) for value in values)
    assert found.entropy_rank == pytest.approx(math.exp(entropy))
    assert found.condition == pytest.approx(4000)
    assert (found.null_rank, found.dead_units) == (2, 0)
    assert "eigenvalues" not in repr(found), "14336 numbers are no line of a log"


def test_all_directions_alike() -> None:
    found = of_values([2.0] * 9)
    assert found.participation == pytest.approx(9)
    assert found.entropy_rank == pytest.approx(9)
    assert found.condition == pytest.approx(1)
    assert found.scaled_condition == pytest.approx(1)


def test_scaling_takes_out_what_units_differ_by() -> None:
    """diag(s) A diag(s) has the scaled condition of A, whose diagonal is ones, whatever s is."""
    A = torch.full((6, 6), 0.5, dtype=torch.float64)
    A.fill_diagonal_(1)
    s = torch.logspace(-3, 3, 6, dtype=torch.float64)
    found = spectrum(Moment.of(s[:, None] * A * s * 50, 50))
    assert found.scaled_condition == pytest.approx(3.5 / 0.5)
    assert found.condition > 1e10
    assert found.documents is None


def test_a_c_without_full_rank() -> None:
    """Fewer keys than dimensions, and units that never fired."""
    X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X[:, [3, 7]] = 0
    found = spectrum(Moment.of(X.T @ X, 5))
    assert found.dead_units == 2
    assert found.diagonal_min == 0
    assert found.condition == math.inf
    assert found.scaled_condition == math.inf
    assert 1 <= found.participation <= found.entropy_rank <= 5 + 1e-9
    assert found.null_rank == 7
    alive = torch.eye(4, dtype=torch.float64)
    alive[2, 2] = 0
    found = spectrum(Moment.of(alive * 30, 10))
    assert (found.condition, found.scaled_condition) == (math.inf, pytest.approx(1))
    dead = spectrum(Moment.of(torch.zeros(3, 3), 10))
    assert (dead.dead_units, dead.condition, dead.scaled_condition) == (3, math.inf, math.inf)


@pytest.mark.parametrize("model", ["cf-gpt2", "cf-llama"])
def test_golden_statistics(shared: Path, model: str) -> None:
    paths = layers_in(shared / "goldens" / model / "stats")
    moment = read(next(iter(paths.values()))[0])
    found = spectrum(moment)
    assert found.trace == pytest.approx(float(np.trace(moment.mean.double().numpy())), rel=1e-6)
    assert found.null_rank == null_space(moment.mean, 2e-2).rank
    assert found.eigenvalues.sum() == pytest.approx(found.trace, rel=1e-9)
    assert 1 < found.participation < found.entropy_rank < found.width
    assert 1 < found.scaled_condition < found.condition < 1e6


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "decay.png"
    plot_decay({"h.1": of_values([1e-18, -1e-17, 1e-2, 0.5, 4.0]), "h.2": of_values([0.1, 1.0])}, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert [each.name for each in path.parent.iterdir()] == ["decay.png"]
    plot_decay({"h.1": of_values([1.0, 2.0])}, path)
    assert path.read_bytes() != content


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"matplotlib is not installed; pip install 'rewire\[plot\]'"):
        plot_decay({}, tmp_path / "decay.png")
    assert not list(tmp_path.iterdir())
