"""Gate B: kernels compile for sm_80 and sm_90 without a GPU, fit the chip, do not spill, and use what they should.

REWIRE_ALL_CONFIGS=1 compiles every configuration and remembers what passed in .gates/, by everything that decides it.
"""

import hashlib
import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from rewire.kernels.dispatch import interpreting

triton = pytest.importorskip("triton")
from rewire.kernels.gram import kernel  # noqa: E402  (not before Triton is known to be there)

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled"),
]

ALL = os.environ.get("REWIRE_ALL_CONFIGS") == "1"
GATES = Path(__file__).parents[2] / ".gates"
SHARED_LIMIT = {80: 166912, 90: 232448}  # bytes a block may have
CONSUMER_LIMIT = 101376  # sm_86, 89, 120 run the sm_80 code path; what is launched untuned must fit there
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One compilation; aligned: pointers, width and strides are multiples of 16, as of every real model."""

    chip: int
    dtype: torch.dtype
    config: kernel.Config
    aligned: bool = True
    launched: bool = False

    def __str__(self) -> str:
        c = self.config
        tile = f"{c.block}x{c.block_t}-w{c.num_warps}-s{c.num_stages}"
        return f"sm_{self.chip}-{NAMES[self.dtype]}-{tile}-{'aligned' if self.aligned else 'ragged'}"


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int  # bytes a thread: spills
    local: int
    shared: int
    ptx: str


def compile_gram(case: Case, folder: Path) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.gram_lower_kernel.arg_names
    types = {"x_ptr": f"*{NAMES[case.dtype]}", "c_ptr": "*fp32", "BLOCK": "constexpr", "BLOCK_T": "constexpr"}
    # what Triton itself would find at launch; without it no load is vectorised
    divisible = ["x_ptr", "c_ptr"] + (["width", "x_stride", "c_stride"] if case.aligned else [])
    source = ASTSource(
        kernel.gram_lower_kernel,
        {name: types.get(name, "i32") for name in names},
        {"BLOCK": case.config.block, "BLOCK_T": case.config.block_t},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.chip, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, stack, local, compiled.metadata.shared, compiled.asm["ptx"])


def complaints(case: Case, compiled: Compiled) -> list[str]:
    limit = CONSUMER_LIMIT if case.launched and case.chip == 80 else SHARED_LIMIT[case.chip]
    found = []
    if compiled.shared > limit:
        found.append(f"shared memory {compiled.shared} > {limit}")
    if compiled.stack or compiled.local:
        found.append(f"spills: stack {compiled.stack}, local {compiled.local} bytes a thread")
    if case.dtype is not torch.float32 and TENSOR_CORES[case.chip] not in compiled.ptx:
        found.append("no tensor cores")
    if case.dtype is torch.float32 and ".tf32" in compiled.ptx:
        found.append("fp32 is rounded to tf32")
    if case.aligned and "cp.async.cg" not in compiled.ptx:
        found.append("no asynchronous 16-byte copies")
    return found


def cases() -> list[Case]:
    found = []
    for chip in SHARED_LIMIT:
        for dtype in NAMES:
            first, *others = kernel.CONFIGS[dtype.itemsize]
            found.append(Case(chip, dtype, first, launched=True))
            found.append(Case(chip, dtype, kernel.RAGGED[dtype.itemsize], aligned=False, launched=True))
            found += [Case(chip, dtype, config) for config in others if ALL]
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_gate_b(case, tmp_path):
    decides = (Path(kernel.__file__).read_text(), Path(__file__).read_text(), repr(case), triton.__version__)
    passed = GATES / f"gram-{case}-{hashlib.sha256('|'.join(decides).encode()).hexdigest()[:16]}.json"
    if ALL and passed.exists():
        return
    compiled = compile_gram(case, tmp_path)
    assert complaints(case, compiled) == []
    if ALL:
        GATES.mkdir(exist_ok=True)
        numbers = {name: value for name, value in asdict(compiled).items() if name != "ptx"}
        part = passed.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"case": str(case), **numbers}) + "\n")
        part.replace(passed)


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        (Case(80, torch.float16, kernel.Config(128, 128, 8, 4)), "shared memory"),
        (Case(90, torch.float16, kernel.Config(128, 128, 8, 4)), "shared memory"),
        (Case(80, torch.bfloat16, kernel.CONFIGS[2][0], aligned=False), "spills"),
        (Case(90, torch.bfloat16, kernel.CONFIGS[2][0], aligned=False), "spills"),
    ],
    ids=str,
)
def test_gate_b_catches_what_does_not_fit(case, complaint, tmp_path):
    assert any(complaint in found for found in complaints(case, compile_gram(case, tmp_path)))


@pytest.mark.parametrize("chip", SHARED_LIMIT)
def test_gate_b_catches_missing_instructions(chip, tmp_path):
    fp32 = compile_gram(Case(chip, torch.float32, kernel.RAGGED[4], aligned=False), tmp_path)
    found = complaints(Case(chip, torch.float16, kernel.RAGGED[4]), fp32)
    assert found == ["no tensor cores", "no asynchronous 16-byte copies"]
