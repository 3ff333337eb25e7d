"""Gate A: the numbers of the Triton kernel, by the interpreter. Needs a process of its own with TRITON_INTERPRET=1."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rewire.kernels.dispatch import interpreting
from rewire.kernels.gram import gram_, mirror_, operation

triton = pytest.importorskip("triton")
tl = triton.language
from rewire.kernels.gram import kernel  # noqa: E402  (not before Triton is known to be there)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process"),
]

SMALL = [kernel.Config(16, 16, 4, 1), kernel.Config(32, 16, 4, 1), kernel.Config(16, 64, 4, 1)]


def gate_a(module: ModuleType, dtype: torch.dtype, T: int, d: int, config: object, assert_gram) -> None:
    """Run on poisoned memory: NaN around X and above C's diagonal, -0.0 around C (adding even zero to that shows)."""
    seed = torch.Generator().manual_seed(1000 * T + d)
    X = torch.full((T + 70, d + 40), torch.nan, dtype=dtype)[:T, :d]
    X.copy_(torch.randn(T, d, generator=seed))
    guarded = torch.full((d + 40, d + 40), -0.0)
    C = guarded[:d, :d]
    C.copy_(torch.randn(d, d, generator=seed))
    above = torch.ones(d, d, dtype=torch.bool).triu(1)
    C[above] = torch.nan
    before = C.clone()

    module.gram_lower_(C, X, config)

    assert_gram(C, before.tril(), X)
    assert C[above].isnan().all(), "something was written above the diagonal"
    assert guarded[d:].signbit().all(), "something was written below C"
    assert guarded[:, d:].signbit().all(), "something was written right of C"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", SMALL, ids=str)
@pytest.mark.parametrize(("T", "d"), [(70, 50), (64, 64), (1, 33), (0, 20), (17, 1), (33, 100)])
def test_gate_a(T, d, config, dtype, assert_gram):
    gate_a(kernel, dtype, T, d, config, assert_gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_through_the_public_function(dtype, assert_gram):
    seed = torch.Generator().manual_seed(0)
    X = torch.randn(140, 300, generator=seed).to(dtype)[::2]
    C = torch.zeros(300, 300)
    before = operation.calls["triton"]
    gram_(C, X, impl="triton")
    gram_(C, X, impl="triton")
    assert operation.calls["triton"] == before + 2
    assert_gram(C, torch.zeros(300, 300), torch.cat((X, X)))
    again = torch.zeros(300, 300)
    gram_(again, X)
    gram_(again, X)
    assert torch.equal(C.tril(), again.tril())
    mirror_(C)
    assert torch.equal(C, C.T)


def test_tiles_are_counted_exactly_at_every_row_boundary():
    @triton.jit
    def run(tile_ptr, row_ptr, col_ptr, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        row, col = kernel.lower_tile(tl.load(tile_ptr + at, mask=at < n, other=0))
        tl.store(row_ptr + at, row, mask=at < n)
        tl.store(col_ptr + at, col, mask=at < n)

    first = torch.arange(1, 5000) * torch.arange(2, 5001) // 2  # 5000 rows of 16 are d = 80,000
    tiles = torch.cat((torch.arange(1000), first - 1, first, first + 1)).int()
    row, col = torch.empty_like(tiles), torch.empty_like(tiles)
    run[(1,)](tiles, row, col, len(tiles), BLOCK=triton.next_power_of_2(len(tiles)))
    assert torch.equal(row * (row + 1) // 2 + col, tiles)
    assert ((col >= 0) & (col <= row)).all()


# A read past the width is not among them: it reaches only elements that are never written, so numbers cannot show it.
MUTANTS = {
    "the last tile has no owner": ("rows * (rows + 1) // 2,", "rows * (rows + 1) // 2 - 1,"),
    "left reads past the last token": ("(t[None, :] < live)", "(t[None, :] <= live)"),
    "right reads past the last token": ("(t[:, None] < live)", "(t[:, None] <= live)"),
    "writes past the width": ("inside = (i[:, None] < width)", "inside = (i[:, None] <= width)"),
    "overwrites": ("tl.load(c_tile, mask=inside) + acc", "acc"),
    "the wrong column": ("j = col * BLOCK", "j = (col + 1) * BLOCK"),
    "rows and columns exchanged": ("row, col = lower_tile", "col, row = lower_tile"),
    "the wrong stride": ("tl.int64)[:, None] * c_stride", "tl.int64)[:, None] * width"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_gate_a_catches(name, tmp_path, assert_gram):
    source, (old, new) = Path(kernel.__file__).read_text(), MUTANTS[name]
    assert source.count(old) == 1, "the mutant no longer fits the kernel"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant_of_gram", path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant
    spec.loader.exec_module(mutant)
    with pytest.raises(AssertionError):
        gate_a(mutant, torch.float32, 70, 50, SMALL[0], assert_gram)
