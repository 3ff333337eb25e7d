"""What tests of the benches share."""

import pytest
from subjects import COPIES

from rewire.bench import timing


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_CACHE", COPIES)
