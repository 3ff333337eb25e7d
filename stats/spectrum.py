"""What a C looks like: its eigenvalues, how many directions the keys really use, and a picture of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels.errors import InputError
from .moments import Moment

THRESHOLD = 2e-2  # AlphaEdit's usual one: eigenvalues of C below it count as null
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Figures of one layer's C = sum / tokens, in the squared unit of its keys.

    trace: the mean of |k|²
    diagonal_mean, diagonal_min, diagonal_max: of the mean squares of single units
    dead_units: units that never fired: a zero on the diagonal
    eigenvalues: [d] float64, ascending; those of a C without full rank may be some 1e-16 of the largest below zero
    participation: (Σ l)² / Σ l², in directions, between 1 and d
    entropy_rank: exp of the entropy of l / Σ l, in directions, between 1 and d
    condition: largest by smallest eigenvalue; inf where C has no full rank
    scaled_condition: the same of the C whose diagonal is scaled to ones (dead units left out)
    null_rank: eigenvalues below `THRESHOLD`
    """

    width: int
    tokens: int
    documents: int | None
    trace: float
    diagonal_mean: float
    diagonal_min: float
    diagonal_max: float
    dead_units: int
    eigenvalues: np.ndarray = field(repr=False)
    participation: float
    entropy_rank: float
    condition: float
    scaled_condition: float
    null_rank: int


@torch.no_grad()
def spectrum(moment: Moment) -> Spectrum:
    """Two sets of eigenvalues in float64: some 3 d³ operations, and three [d, d] float64 in memory."""
    C = moment.sum.div_(moment.count)
    diagonal = C.diagonal().clone()
    values = torch.linalg.eigvalsh(C)
    alive = diagonal > 0
    scale = diagonal[alive].rsqrt()
    scaled = C if bool(alive.all()) else C[alive][:, alive]
    del C
    scaled_values = torch.linalg.eigvalsh(scaled.mul_(scale[:, None]).mul_(scale))
    positive = values.clamp_min(0)
    share = positive / positive.sum()
    return Spectrum(
        width=moment.width,
        tokens=moment.count,
        documents=moment.documents,
        trace=float(diagonal.sum()),
        diagonal_mean=float(diagonal.mean()),
        diagonal_min=float(diagonal.min()),
        diagonal_max=float(diagonal.max()),
        dead_units=int((~alive).sum()),
        eigenvalues=values.numpy(),
        participation=float(1 / share.square().sum()),
        entropy_rank=float(torch.special.entr(share).sum().exp()),
        condition=_condition(values),
        scaled_condition=_condition(scaled_values),
        null_rank=int((values < THRESHOLD).sum()),
    )


def _condition(values: torch.Tensor) -> float:
    """values: [n] float64, ascending. What is within rounding of zero is zero."""
    if not len(values) or float(values[0]) <= len(values) * _EPS * float(values[-1]):
        return float("inf")
    return float(values[-1] / values[0])


def plot_decay(spectra: Mapping[str, Spectrum], path: Path) -> None:
    """A PNG: the eigenvalues of each layer (name -> spectrum), largest first, both axes logarithmic.

    The folder is made where it is not there. Raises `InputError` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed; pip install 'rewire[plot]'") from None
    figure: Any = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, of_layer in spectra.items():
        values = of_layer.eigenvalues[::-1]
        shown = values > len(values) * _EPS * values[0]  # what is below is rounding
        axes.plot(np.arange(1, len(values) + 1)[shown], values[shown], label=name, linewidth=1.2)
    axes.axhline(THRESHOLD, color="0.7", linewidth=0.8, zorder=0)
    axes.annotate(
        f"AlphaEdit's threshold, {THRESHOLD:g}",
        (0, THRESHOLD), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
        fontsize=7, color="0.5",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of the eigenvalue, largest first")
    axes.set_ylabel("eigenvalue of C (mean square of the keys in its direction)")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    try:
        figure.savefig(part, dpi=120, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
