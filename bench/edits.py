"""Whole edits as users get them, with the second moments given: what `bench throughput` times."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..engine.delta import Factors
from ..engine.editors.registry import Job
from ..engine.evaluation import evaluate
from ..engine.facts import Fact
from ..engine.hparams import Hparams
from ..engine.model import Model
from ..engine.phases import Listener
from ..engine.session import EditSession
from ..kernels.spd_solve import Factor, regular_factor
from .serial import serial_keys
from .timing import single
from .watch import Watch, hand_back, own_cache, watching

DECADES = 3  # that the eigenvalues of a synthetic C fall by


@dataclass(frozen=True)
class Setup:
    """What both sides are handed.

    contexts: besides the plain one; hparams: MEMIT's; moments: layer -> C, [d_in, d_in] float32, on the model's device
    batch_size: facts whose values are optimised at once; None: as the engine has it
    """

    model: Model
    contexts: Sequence[str]
    hparams: Hparams
    moments: Mapping[int, Tensor]
    batch_size: int | None


@dataclass(frozen=True)
class Edited:
    """seconds: of the whole edit; facts: what its report says of each; update: weight name -> factors"""

    watch: Watch
    seconds: float
    facts: list[dict[str, Any]]
    update: dict[str, Factors]


def synthetic_moment(model: Model, facts: Sequence[Fact], contexts: Sequence[str], layer: int) -> Tensor:
    """[d_in, d_in] float32 on the layer's device: full rank, a falling spectrum in mixed directions, of the keys' size.

    The directions are those of the discrete Hartley transform, which costs d² log d.
    """
    d, device = model.anatomy.d_in, model.projection(layer).weight.device
    spectrum = 10 ** torch.linspace(0, -DECADES, d, dtype=torch.float64, device=device)  # type: ignore[arg-type]
    C = torch.diag(spectrum)
    for _ in range(2):  # H diag H, with H symmetric
        found = torch.fft.fft(C, dim=0)
        C = ((found.real - found.imag) / d**0.5).T
    K = serial_keys(model, facts, contexts, layer)
    size = float(K.double().square().sum(1).mean() / spectrum.sum())
    return ((C + C.T) * (size / 2)).float()


def edited(setup: Setup, facts: Sequence[Fact], listener: Listener) -> Edited:
    """The session's own edit, in a cache of its own, with C given; then evaluated, and taken back."""
    factors: dict[str, Factor] = {}
    moments = {setup.model.anatomy.layer_name(layer): C for layer, C in setup.moments.items()}

    def factor(name: str) -> Factor:
        if name not in factors:
            factors[name] = regular_factor(moments[name])
        return factors[name]

    def given(job: Job) -> Job:
        return replace(job, moments=lambda names: {name: moments[name] for name in names}, factor=factor)

    hand_back()
    with own_cache(), TemporaryDirectory(prefix="rewire-bench-") as folder:
        preset = Path(folder) / "preset.yaml"
        preset.write_text(json.dumps(setup.hparams.model_dump(mode="json")), encoding="utf-8")
        watch = Watch(setup.model.device, listener)
        session = EditSession(
            setup.model, "memit", preset, contexts=list(setup.contexts), batch_size=setup.batch_size, listener=listener
        )
        session.method = watching(session.method, watch, given)
        edits = []
        seconds = single(lambda: edits.append(session.edit(facts, evaluate=False)), setup.model.device).p50
        with watch("evaluate") as tick:
            evaluate(setup.model, facts, progress=tick)
        update = session.weights.updates[-1]
        session.undo(edits[0].id)
    return Edited(watch, seconds, edits[0].report["facts"], update)
