"""When second moments have settled: a stop on tolerance instead of a budget."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.spd_solve import SolveError, regular_factor
from .moments import Moment

log = logging.getLogger(__name__)

HELD_DOCUMENTS = 16  # at the start of the order; they are not in the sums
HELD_KEYS = 512  # of each layer, evenly spread over those documents
GROWTH = 1.25  # tokens between two looks


class Settling:
    """Compares each layer's C with what it was at the last look, at least a quarter of the tokens ago.

    tolerance: of both: the root mean square over d of the relative change of the diagonal; and the relative change of
        log det (I + X C⁻¹ Xᵀ) / h, the held-out keys X: [h, d]: what a token still tells that C does not know
    held: layer -> X, on any device
    state: what was measured last, for a checkpoint; layer -> [d + 1] float64: that log det, and the diagonal of C
    """

    def __init__(self, tolerance: float, held: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self.tolerance = tolerance
        self.held = held
        self.state = dict(state)

    def look(self, layer: str, moment: Moment) -> float:
        """The larger of the layer's two changes since the last look; infinite at the first."""
        C = moment.mean
        now = torch.cat([torch.tensor([information(C, self.held[layer])], dtype=torch.float64), C.diagonal().double()])
        before = self.state.get(layer)
        self.state[layer] = now
        if before is None or not math.isfinite(now[0]) or not math.isfinite(before[0]):
            return math.inf
        live = before[1:] > 0
        diagonal = float((now[1:][live] / before[1:][live] - 1).square().mean().sqrt())
        return max(diagonal, abs(float(now[0] / before[0]) - 1))


def information(C: Tensor, X: Tensor) -> float:
    """log det (I + X C⁻¹ Xᵀ) / h in nats a token, X: [h, d]; C with a ridge where it has no full rank, as for edits."""
    try:
        half = regular_factor(C.to(X.device)).half_solve(X.double().T)
    except SolveError as error:
        log.info("C cannot be factored yet: %s", error)
        return math.inf
    inner = half.T.double() @ half.double()
    inner.diagonal().add_(1)
    return float(2 * torch.linalg.cholesky(inner).diagonal().log().sum()) / len(X)
