"""Operations by pytest-benchmark, each checked before it is timed: `make bench`.

Without --benchmark-only every one is run once, at a size of the tests, so that `make test` sees that this works.
"""

from typing import Any

import pytest
import torch

from rewire.bench.check import Subject, check, inputs_of
from rewire.bench.operations import subjects

CPU = torch.device("cpu")


@pytest.mark.parametrize("provider", ["torch", "plain"])
@pytest.mark.parametrize("subject", subjects(), ids=lambda subject: subject.name)
def test_speed(subject: Subject, provider: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    timed = request.config.getoption("benchmark_only")
    benchmark.disabled = not timed
    dtype = subject.dtypes[0]
    inputs = inputs_of(subject, subject.odd[0], dtype, CPU)
    if provider == "torch":
        assert check(subject, inputs, "torch").passed
    if timed:
        inputs = inputs_of(subject, subject.small[0], dtype, CPU)
    call = {"torch": lambda inputs: subject.run(inputs, "torch"), "plain": subject.plain}[provider]
    benchmark.group = f"{subject.name} {dict(subject.small[0])}"
    found = benchmark(subject.timed.get(provider, call), inputs)
    assert timed or subject.timed or len(found) == len(subject.exact(inputs))
