"""Gate B: compile a variant of a kernel for a chip without a GPU, and say what is wrong with what came out."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

SHARED_LIMIT = {80: 166912, 90: 232448}  # bytes a block may have
CONSUMER_LIMIT = 101376  # sm_86, 89, 120 run the sm_80 code path; what is launched untuned must fit there
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int  # bytes a thread: spills
    local: int
    shared: int
    ptx: str


def compile_variant(variant, chip: int, folder: Path) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    unknown = {*variant.types, *variant.constants, *variant.aligned} - set(names)
    assert not unknown, f"{variant}: the kernel has no argument {sorted(unknown)}"
    types = {name: variant.types.get(name, "i32") for name in names} | dict.fromkeys(variant.constants, "constexpr")
    source = ASTSource(
        variant.kernel,
        types,
        dict(variant.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, stack, local, compiled.metadata.shared, compiled.asm["ptx"])


def complaints(variant, chip: int, compiled: Compiled) -> list[str]:
    limit = CONSUMER_LIMIT if variant.default and chip == 80 else SHARED_LIMIT[chip]
    found = []
    if compiled.shared > limit:
        found.append(f"shared memory {compiled.shared} > {limit}")
    if compiled.stack or compiled.local:
        found.append(f"spills: stack {compiled.stack}, local {compiled.local} bytes a thread")
    if variant.tensor_cores and TENSOR_CORES[chip] not in compiled.ptx:
        found.append("no tensor cores")
    if ".tf32" in compiled.ptx:
        found.append("fp32 is rounded to tf32")
    if variant.pipelined and "cp.async.cg" not in compiled.ptx and "cp.async.bulk.tensor" not in compiled.ptx:
        found.append("no asynchronous 16-byte copies")
    return found
