"""Gate B: kernels compile for sm_80 and sm_90 without a GPU, fit the chip, do not spill, and use what they should.

What passed is remembered in .gates/, by everything that decides it; REWIRE_ALL_CONFIGS=1 compiles every configuration.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import gate_b
import pytest

from rewire.kernels import registry
from rewire.kernels.dispatch import interpreting

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled"),
]

ALL = os.environ.get("REWIRE_ALL_CONFIGS") == "1"
GATES = Path(__file__).parents[2] / ".gates"


def cases():
    found, names = [], set()
    for variant in registry.variants():
        assert variant.name not in names, f"two variants are called {variant.name}"
        names.add(variant.name)
        for chip in variant.chips:
            if ALL or variant.default:
                found.append(pytest.param(variant, chip, id=f"{variant}-sm_{chip}"))
    return found


@pytest.mark.parametrize(("variant", "chip"), [] if interpreting() else cases())
def test_gate_b(variant, chip, tmp_path):
    home = Path(sys.modules[variant.kernel.__module__].__file__)
    decides = (home.read_text(), Path(gate_b.__file__).read_text(), repr(variant), str(chip), triton.__version__)
    digest = hashlib.sha256("|".join(decides).encode()).hexdigest()[:16]
    passed = GATES / f"{variant}-sm_{chip}-{digest}.json"
    if passed.exists():
        return
    compiled = gate_b.compile_variant(variant, chip, tmp_path)
    assert gate_b.complaints(variant, chip, compiled) == []
    GATES.mkdir(exist_ok=True)
    numbers = {name: value for name, value in asdict(compiled).items() if name != "ptx"}
    part = passed.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"case": f"{variant}-sm_{chip}", **numbers}) + "\n")
    part.replace(passed)
