"""What the tests of kernels share."""

from collections.abc import Callable

import pytest
import torch

from rewire.kernels.gram import reference


@pytest.fixture
def assert_gram() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """The rule of the house: error against float64 at most twice that of plain torch in the same dtype, plus 1e-6."""

    def check(got: torch.Tensor, C: torch.Tensor, X: torch.Tensor) -> None:
        exact = reference.gram(C.double(), X.double()).tril()
        plain = reference.gram(C, X.float()).tril()  # fp32 is what 16-bit keys are accumulated in
        top = exact.abs().max().clamp_min(1e-30)

        def error(y: torch.Tensor) -> float:
            return float((y.double() - exact).abs().max() / top)

        assert got.tril().isfinite().all(), "an element of the lower triangle is not finite"
        assert error(got.tril()) <= 2 * error(plain) + 1e-6

    return check
