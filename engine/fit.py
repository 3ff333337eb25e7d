"""Whether second moments are those of a model: by what is said about them, and by running it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..stats import Corpus, Moment
from ..stats.collect import Progress, batches
from ..stats.projections import read_projections
from ..stats.store import layers_in, read, read_sidecar
from .model import Model
from .passes import forward_bytes, tokens_that_fit
from .statistics import encode
from .streams import can_pack, linear_widths, stream_inputs

LEAST_CORRELATION, RATIO = 0.3, 4.0  # what `Fit.fits` asks for (docs/numerics.md)
LEAST_SPARED = 0.75  # of the energy that a null space of that rank would hold by chance
LENGTH = 128  # tokens of a document that are looked at

OURS = "collected on these very weights"
AGREES = "nothing says whose it is; the model's keys agree"
OTHERWISE = "the model's keys look otherwise: another model or layer, or a sum that was divided twice or not at all"


@dataclass(frozen=True)
class Fit:
    """How a layer's C compares with what the model's keys are on some text.

    correlation: of the ranks of the two diagonals: the units that fire most are the same ones (1) or any (0)
    ratio: median over units of the measured mean square over C's
    """

    correlation: float
    ratio: float

    @property
    def fits(self) -> bool:
        """Even very different text leaves half of the order; another layer or model leaves none (docs/numerics.md)."""
        return self.correlation > LEAST_CORRELATION and 1 / RATIO < self.ratio < RATIO


def compare(model: Model, moments: Mapping[str, Moment], texts: Sequence[str]) -> dict[str, Fit]:
    """Each moment's diagonal against the keys that the model has on `texts`, cut to `LENGTH` tokens."""
    squares, tokens = {name: torch.zeros(moment.width, dtype=torch.float64) for name, moment in moments.items()}, 0
    for X in _keys(model, list(moments), texts):
        for name, keys in X.items():
            squares[name] += keys.double().square().sum(0).cpu()
        tokens += len(keys)
    return {name: _fit(squares[name] / tokens, moment.diagonal / moment.count) for name, moment in moments.items()}


def _keys(model: Model, names: Sequence[str], texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Batch by batch, name -> X [tokens, d_in]."""
    rows = [np.array(row[:LENGTH]) for row in encode(model, list(texts)) if row]
    packed = can_pack(model, names)
    for chosen in batches([len(row) for row in rows], tokens_that_fit(model, forward_bytes(model)), packed):
        found: dict[str, Tensor] = {}
        stream_inputs(model, [rows[i] for i in chosen], names, found.__setitem__, packed)
        yield found


def _fit(measured: Tensor, said: Tensor) -> Fit:
    ranks = torch.stack([values.argsort().argsort().double() for values in (measured, said)])
    live = (measured > 0) & (said > 0)
    ratio = float((measured[live] / said[live]).median()) if live.any() else 0.0
    return Fit(float(torch.corrcoef(ranks)[0, 1]), ratio)


def some_texts(model: Model, corpus: Corpus, tokens: int) -> list[str]:
    """The corpus' first documents that hold so many tokens, each cut to `LENGTH`."""
    texts: list[str] = []
    for text in corpus:
        texts.append(text)
        tokens -= min(LENGTH, len(encode(model, [text])[0]))
        if tokens <= 0:
            break
    return texts


def verify_folder(
    model: Model, folder: Path, corpus: Corpus, tokens: int, progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """Layer by layer, whether the statistics in a folder (or file) are the model's, and why.

    First by what is said about them: layer, width, tokens, fingerprint; then by running the model on `tokens` tokens of
    the corpus and comparing. Raises `InputError` where there are none at all.
    """
    found, rows = layers_in(folder, model.name), []
    texts = some_texts(model, corpus, tokens)
    for done, (layer, paths) in enumerate(found.items()):
        for path in paths:
            row: dict[str, Any] = {"layer": layer, "file": str(path), "fits": False, "why": ""}
            row |= {"tokens": None, "correlation": None, "ratio": None}
            try:
                width = linear_widths(model, [layer])[layer]
                moment = read(path, width, model.fingerprint)
                fit = compare(model, {layer: moment}, texts)[layer]
                row |= {"fits": fit.fits, "tokens": moment.count, "correlation": fit.correlation, "ratio": fit.ratio}
                said = "fingerprint" in (read_sidecar(path) or {})
                row["why"] = OTHERWISE if not fit.fits else OURS if said else AGREES
            except InputError as error:
                row["why"] = str(error).removeprefix(f"{path}: ")
            rows.append(row)
        progress(done + 1, len(found))
    return rows


def verify_projections(
    model: Model, path: Path, layers: Sequence[int], corpus: Corpus, tokens: int
) -> list[dict[str, Any]]:
    """Layer by layer, whether published null-space projections are projections, and the model's.

    A null space of the model's keys holds little of their energy; one of another model holds as much as its share of
    the dimensions. `ratio` is the one over the other. Raises `InputError` for another number of layers or width.
    """
    projections = read_projections(path, layers, model.anatomy.d_in)
    rows, texts = [], some_texts(model, corpus, tokens)
    for layer in layers:
        name = model.anatomy.layer_name(layer)
        row: dict[str, Any] = {"layer": name, "file": str(path), "fits": False, "why": ""}
        row |= {"tokens": None, "correlation": None, "ratio": None}
        try:
            P = projections[layer]
            energy = torch.zeros(2, dtype=torch.float64)
            for X in _keys(model, [name], texts):
                k = X[name].float().cpu()
                energy += torch.stack([((k @ P) * k).sum(), (k * k).sum()]).double()
            row["ratio"] = float(energy[0] / energy[1] / (P.diagonal().double().sum() / len(P)))
            row["fits"] = row["ratio"] < LEAST_SPARED
            row["why"] = (
                "the model's keys avoid it" if row["fits"] else "the model's keys do not avoid it: another model?"
            )
        except InputError as error:
            row["why"] = str(error).removeprefix(f"{path}, layer {layer}: ")
        rows.append(row)
    return rows
