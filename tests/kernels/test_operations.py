"""Every operation of the registry, by every implementation that serves here: numbers, poisoned memory, odd shapes.

Under TRITON_INTERPRET=1, in a process of its own, this is gate A. bf16 is computed by the torch implementations here,
by Triton on a GPU only (gate C).
"""

from pathlib import Path

import pytest
import torch

from rewire.bench.check import check, inputs_of
from rewire.bench.operations import subjects
from rewire.kernels import registry
from rewire.kernels.dispatch import interpreting, recording

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def cases(impl):
    found = []
    for subject in subjects():
        for shape in subject.odd if impl in subject.operation.implementations else ():
            for dtype in subject.dtypes:
                size = "-".join(f"{key}{value}" for key, value in shape.items())
                found.append(pytest.param(subject, shape, dtype, id=f"{subject.name}-{size}-{NAMES[dtype]}"))
    return found


def passes(subject, shape, dtype, impl, device="cpu"):
    inputs = inputs_of(subject, shape, dtype, device)
    with recording() as served:
        found = check(subject, inputs, impl)
    assert found.passed, found
    assert set(served) <= {(name, impl) for name in registry.operations()}
    again = subject.run(inputs, impl)
    assert all(torch.equal(a, b) for a, b in zip(again, subject.run(inputs, impl), strict=True)), "two runs differ"


@pytest.mark.parametrize(("subject", "shape", "dtype"), cases("torch"))
def test_torch(subject, shape, dtype):
    passes(subject, shape, dtype, "torch")


@pytest.mark.parametrize("name", ["target_nll", "gather_mean_", "scatter_add", "delta_linear"])
def test_torch_takes_float64_models(name):
    subject = next(each for each in subjects() if each.name == name)
    for shape in subject.odd:
        found = check(subject, inputs_of(subject, shape, torch.float64, "cpu"), "torch")
        assert found.error <= 1e-6, (shape, found)  # what is fp32 by contract, the sums, stays so


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
@pytest.mark.parametrize(("subject", "shape", "dtype"), cases("triton"))
def test_gate_a(subject, shape, dtype):
    if dtype is torch.bfloat16:
        pytest.skip("the interpreter cannot compute bfloat16: gate C has it")
    passes(subject, shape, dtype, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("subject", "shape", "dtype"), cases("triton"))
def test_gate_c(subject, shape, dtype, impl):
    passes(subject, shape, dtype, impl, "cuda")


def test_every_operation_with_a_kernel_has_a_benchmark():
    with_kernel = {name for name, each in registry.operations().items() if "triton" in each.implementations}
    assert with_kernel <= {subject.name for subject in subjects()}


def test_every_folder_is_registered_and_whole():
    root = Path(registry.__file__).parent
    folders = {path.name for path in root.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(registry.FOLDERS)
    for folder in registry.FOLDERS:
        assert (root / folder / "reference.py").is_file()
        assert (root / folder / "kernel.py").is_file()
