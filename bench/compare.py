"""An edit of a few facts against the serial baseline: what differs, the baseline's time, FLOPs by torch's count."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..engine.delta import Factors
from ..engine.editors.spreading import spread
from ..engine.evaluation import evaluate
from ..engine.facts import Fact
from ..engine.hparams import Hparams
from ..engine.model import Model
from ..engine.outline import model_shape
from ..engine.passes import frozen
from ..engine.phases import Listener, Phases, silent
from ..engine.prompts import PLAIN, subject_rows
from ..engine.values import STOP_LOSS, optimise_values
from ..kernels.floors import published_value_step
from ..kernels.spd_solve import SolveInfo
from .costs import Costs
from .edits import Edited, Setup, edited
from .serial import KEY_BATCH, SerialValue, serial_hidden, serial_keys, serial_spread, serial_value
from .timing import single

# of the stop: a rounding error decides about one more step, so such facts are listed, not compared
NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 5e-3}
SERIAL = ("values", "keys", "solve", "write")  # what an edit takes once templates and statistics are there


@dataclass(frozen=True)
class Bounds:
    """What may lie between our figures and the serial ones, as relative norms.

    values: of a fact's z; in 16 bits of its last loss: Adam's first steps follow the signs of gradients, and rounding
    turns the small ones, so that the paths part. That loss says little: with random weights it hardly moves
    keys: of a fact's K and H; update: of a weight's, with the same Z
    movement: of a fact's delta where it is optimised gently (`movement`)
    lengths: of |delta| at the rate that is asked for
    """

    values: float
    keys: float
    update: float
    movement: float
    lengths: float


# In bfloat16 a gentle delta was at most 0.22 (median 0.01) from the serial one of the same dtype, on nine small models
# (trained, and random ones of four families' kinds), 0.25 from that in float32; half the learning rate is 0.45 away or
# more, none is 1. At the asked rate lengths were up to 0.08 apart (float32: 1e-4).
BOUNDS = {
    torch.float32: Bounds(values=1e-3, keys=1e-4, update=1e-3, movement=1e-3, lengths=1e-2),
    torch.bfloat16: Bounds(values=5e-2, keys=5e-2, update=5e-2, movement=0.35, lengths=0.35),
}
GENTLE = 6  # forwards of the gentle optimisation
MOVED = 0.375  # of the least |h0|: as far as its updates go


@dataclass(frozen=True)
class Compared:
    """Of a sample of the facts.

    errors: by what is bounded; infinite where nothing could be compared, `notes` say so
    ties: which facts are near-ties of the stop; losses, lengths: the serial last losses and |delta|
    seconds: phase -> of the serial baseline, for all facts of the edit
    counted: phase -> FLOPs by torch's counter over those of the closed count
    serial_flops: of the values of all facts, by the published structure's count
    """

    errors: dict[str, float]
    notes: list[str]
    ties: list[bool]
    losses: list[float]
    lengths: list[float]
    seconds: dict[str, float]
    counted: dict[str, float]
    serial_flops: float


def compare(setup: Setup, facts: Sequence[Fact], sample: Sequence[Fact], listener: Listener) -> Compared:
    """Ours and the serial baseline on the sample of the facts; keys and residuals on more, full batches of theirs."""
    model, contexts, hparams = setup.model, setup.contexts, setup.hparams
    layers, device, count = hparams.layers, model.device, len(facts)
    full = KEY_BATCH // (len(contexts) + 1)  # facts of a batch of the published procedure
    keyed = [facts[number] for number in spread_over(count, max(len(sample), 2 * full))]
    seconds = dict.fromkeys(SERIAL, 0.0)
    values: list[SerialValue] = []
    with frozen(model):
        for number, fact in enumerate(sample):
            seconds["values"] += _timed(values, lambda: serial_value(model, fact, contexts, hparams), device)  # noqa: B023
            listener("serial", number + 1, len(sample) + len(layers))
        keys: list[Tensor] = []
        hidden: list[Tensor] = []
        for layer in layers:
            seconds["keys"] += _timed(keys, lambda: serial_keys(model, keyed, contexts, layer), device)  # noqa: B023
            seconds["keys"] += _timed(hidden, lambda: serial_hidden(model, keyed, layers[-1]), device)
    seconds["values"] *= count / len(sample)
    seconds["keys"] *= count / len(keyed)
    _dense(setup, layers[0], count)  # warm: the first LU takes twice as long
    for number, layer in enumerate(layers):
        for name, passed in _dense(setup, layer, count).items():
            seconds[name] += passed
        listener("serial", len(sample) + number + 1, len(sample) + len(layers))

    whole = edited(setup, sample, silent)
    with FlopCounterMode(display=False) as of_values:
        ours = optimise_values(model, sample, contexts, hparams, setup.batch_size)  # the same numbers as in the edit
    with FlopCounterMode(display=False) as of_keys:
        K, H = _walked(setup, whole, keyed)
    with FlopCounterMode(display=False) as of_evaluation:
        evaluate(model, sample)
    costs = Costs(model, contexts, layers)
    closed = {
        "values": (of_values, costs.values(sample, ours.steps.tolist())),
        "keys": (of_keys, costs.keys(keyed)),
        "evaluate": (of_evaluation, costs.evaluate(sample)),
    }
    losses = [value.loss for value in values]
    ties = [_near_tie(model, *pair) for pair in zip(losses, ours.loss.tolist(), strict=True)]
    Z = torch.stack([value.z for value in values])
    exact = next(model.hf.parameters()).dtype is torch.float32
    apart = _relative(ours.Z, Z).tolist() if exact else [_off(a, b) for a, b in zip(ours.loss, losses, strict=True)]
    moved = movement(model, sample, contexts, hparams, values, setup.batch_size)
    notes = []
    if all(ties):
        notes.append(
            "every sampled fact is a near-tie of the stop: no value was compared; try --serial, --steps or --data"
        )
    if not moved:
        notes.append("no sampled fact has to move far enough to compare: try --serial or --data")
    errors = {
        "values": _of_the_rest(apart, ties),
        "movement": most(moved) if moved else math.inf,
        "keys": most(error for a, b in zip(K, keys, strict=True) for error in _relative(a, b).tolist()),
    }
    if all(model.post_norm(layer) is None for layer in layers):  # else R was mapped through a norm
        errors["keys: hidden states"] = most(
            error for a, b in zip(H, hidden, strict=True) for error in _relative(a, b).tolist()
        )
    with frozen(model):
        wanted = serial_spread(model, sample, contexts, hparams, ours.Z, dict(setup.moments))
    errors["update"] = most(
        float((whole.update[name].dense() - change).norm() / change.norm()) for name, change in wanted.items()
    )
    return Compared(
        errors,
        notes,
        ties,
        losses,
        [float((value.z - value.h0).norm()) for value in values],
        seconds,
        {name: counter.get_total_flops() / cost.flops for name, (counter, cost) in closed.items()},
        sum(_published_flops(setup, value) for value in values) * count / len(sample),
    )


def spread_over(total: int, count: int) -> list[int]:
    """Places of so many facts among all, or all."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def movement(
    model: Model,
    sample: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    serial: Sequence[SerialValue],
    batch_size: int | None = None,
) -> list[float]:
    """How far our deltas are from the serial ones, relative to those, of each fact that moves and is no near-tie.

    serial: the sample's; they say how large h0 is. Both sides go gently: so few updates, so small a learning rate that
    none is clamped and none leaves the slope it starts on. There roundings stay small in 16 bits too, and the way that
    was gone is as long as the rate says; at the asked rate random weights make deltas swing about within the clamp.
    """
    reach = min(MOVED, hparams.clamp_norm_factor / 2) * min(float(value.h0.float().norm()) for value in serial)
    rate = min(hparams.v_lr, reach / (model.anatomy.d_model**0.5 * (GENTLE - 1)))
    gentle = hparams.model_copy(update={"v_lr": rate, "v_num_grad_steps": GENTLE})
    with frozen(model):
        values = [serial_value(model, fact, contexts, gentle) for fact in sample]
    ours = optimise_values(model, sample, contexts, gentle, batch_size)
    apart = _relative(ours.Z - ours.h0, torch.stack([value.z - value.h0 for value in values])).tolist()
    return [
        error
        for error, value, loss in zip(apart, values, ours.loss.tolist(), strict=True)
        if value.updates and not _near_tie(model, value.loss, loss)
    ]


def _near_tie(model: Model, *losses: float) -> bool:
    return min(abs(loss - STOP_LOSS) for loss in losses) < NEAR_TIE[next(model.hf.parameters()).dtype]


def _published_flops(setup: Setup, value: SerialValue) -> int:
    """Of one fact's value, by the published structure; the KL row is one of its rows."""
    shape, z_layer, rows = model_shape(setup.model), setup.hparams.layers[-1], len(setup.contexts) + 2
    passes = [number < value.updates for number in range(value.updates + 1)]
    return sum(published_value_step(shape, z_layer, rows, 1, value.tokens, update) for update in passes)


def _walked(setup: Setup, whole: Edited, sample: Sequence[Fact]) -> tuple[list[Tensor], list[Tensor]]:
    """K and H of each layer, weights as they are: by the engine's own way, asked for Z = 0, with nothing written."""
    K: list[Tensor] = []
    H: list[Tensor] = []
    anatomy = setup.model.anatomy

    def solve(name: str, keys: Tensor, residual: Tensor) -> tuple[Factors, SolveInfo]:
        K.append(keys)
        H.append(residual * (len(H) - len(setup.hparams.layers)))  # of -H that layer's share
        nothing = Factors(keys.new_zeros(anatomy.d_model, 1), keys.new_zeros(1, anatomy.d_in))
        return nothing, SolveInfo(0.0, 1.0, "float32", 0, "none", "full")

    rows = subject_rows(setup.model.tokenizer, sample, (PLAIN, *setup.contexts), setup.model.max_length)
    Z = torch.zeros(len(sample), anatomy.d_model, device=setup.model.device)
    assert whole.watch.job is not None
    spread(replace(whole.watch.job, put=lambda name, factors: 0.0, phases=Phases()), rows, Z, solve)
    return K, H


def _dense(setup: Setup, layer: int, count: int) -> dict[str, float]:
    """Seconds of one layer's dense solve for `count` keys as published, and of its write.

    Keys and residuals are random: the time depends on their shapes alone, and those of all facts are not there.
    """
    model = setup.model
    C, weight = setup.moments[layer], model.projection(layer).weight
    assert isinstance(weight, Tensor)
    K = torch.randn(len(C), count, dtype=torch.float64, device=C.device)
    R = torch.randn(model.anatomy.d_model, count, dtype=torch.float64, device=C.device)

    def solve() -> Tensor:
        A = torch.linalg.solve(setup.hparams.mom2_update_weight * C.double() + K @ K.T, K)
        return (R @ A.T).float()

    found: list[Tensor] = []
    solved = _timed(found, solve, model.device)
    change = found[0] if weight.shape == found[0].shape else found[0].T
    target = torch.empty_like(weight)
    return {"solve": solved, "write": single(lambda: target.copy_(weight.detach() + change), model.device).p50}


def _timed(found: list[Any], call: Callable[[], Any], device: torch.device) -> float:
    return single(lambda: found.append(call()), device).p50


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """[n] float64: row by row."""
    found, wanted = found.double(), wanted.double().to(found.device)
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)


def _off(found: Any, wanted: float) -> float:
    return abs(float(found) - wanted) / abs(wanted)


def losses_apart(found: Sequence[float], compared: Compared) -> float:
    """The worst of the sample's last losses, near-ties of the stop apart: relative to the serial ones."""
    apart = [_off(own, serial) for own, serial in zip(found, compared.losses, strict=True)]
    return _of_the_rest(apart, compared.ties)


def lengths_apart(found: Sequence[float], compared: Compared) -> float:
    """The same of |delta|; where the serial one did not move, 0 or infinite."""
    apart = [
        abs(own - serial) / serial if serial else math.inf if own else 0.0
        for own, serial in zip(found, compared.lengths, strict=True)
    ]
    return _of_the_rest(apart, compared.ties)


def _of_the_rest(errors: Sequence[float], ties: Sequence[bool]) -> float:
    """The most of those that are no ties; infinite where all are: nothing was compared."""
    return math.inf if all(ties) else most(error for error, tie in zip(errors, ties, strict=True) if not tie)


def most(errors: Iterable[float]) -> float:
    """The largest, 0 of none, infinite where one is NaN."""
    return max((error if error == error else math.inf for error in errors), default=0.0)
