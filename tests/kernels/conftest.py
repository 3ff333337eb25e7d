"""What the tests of kernels share."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def mutate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], ModuleType]:
    """mutate(folder, old, new): inside the test `rewire.kernels.<folder>.kernel` has `new` for its only `old`."""

    def mutate(folder: str, old: str, new: str) -> ModuleType:
        name = f"rewire.kernels.{folder}.kernel"
        original = importlib.import_module(name)
        source = Path(original.__file__).read_text()
        assert source.count(old) == 1, f"the mutant no longer fits the kernel: {source.count(old)} times {old!r}"
        path = tmp_path / "mutant.py"  # Triton reads a kernel's source from its file
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, path)
        mutant = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, mutant)
        monkeypatch.setattr(sys.modules[f"rewire.kernels.{folder}"], "kernel", mutant)
        spec.loader.exec_module(mutant)
        return mutant

    return mutate
