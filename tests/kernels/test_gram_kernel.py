"""The Triton kernel of gram_: which tiles it visits, what it touches, and that the gates notice when it is broken."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from rewire.bench.check import check, inputs_of, verdict
from rewire.bench.operations import gram as subject
from rewire.kernels.dispatch import interpreting
from rewire.kernels.gram import gram_, mirror_, reference

triton = pytest.importorskip("triton")
tl = triton.language
from rewire.kernels.gram import kernel  # noqa: E402  (not before Triton is known to be there)
from rewire.kernels.gram.kernel import Config  # noqa: E402

interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process"),
]
compiled = [
    pytest.mark.compile,
    pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled"),
]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SMALL = [
    Config(16, 32, 16, 2, 4, 1),  # two tiles a super-tile, one above the other
    Config(32, 16, 16, 3, 4, 1),  # two beside each other
    Config(16, 16, 64, 1, 4, 1),
    Config(16, 32, 16, 2, 4, 1, descriptors=True),
    Config(32, 32, 16, 8, 4, 1, descriptors=True),
]
SHAPES = [(70, 50), (64, 64), (1, 33), (17, 1), (33, 112)]


def launch(module, dtype, T, d, config, weighted=False) -> None:
    """On guarded memory: NaN around X and above C's diagonal, -0.0 around C (adding even zero to that shows)."""
    seed = torch.Generator().manual_seed(1000 * T + d)
    X = torch.full((T + 70, (d + 55) // 16 * 16), torch.nan, dtype=dtype)[:T, :d]  # descriptors want aligned rows
    X.copy_(torch.randn(T, d, generator=seed))
    weights = torch.full((T + 70,), torch.nan)
    weights[:T] = torch.rand(T, generator=seed)
    w = weights[:T] if weighted else None
    guarded = torch.full((d + 40, d + 40), -0.0)
    C = guarded[:d, :d]
    C.copy_(torch.randn(d, d, generator=seed))
    C[torch.ones(d, d, dtype=torch.bool).triu(1)] = torch.nan
    before = C.tril()

    module.gram_lower_(C, X, w, config)

    exact = reference.gram(before.double(), X.double(), None if w is None else w.double()).tril()
    plain = before + subject.plain((X, w))[0]
    found = verdict((C.tril(),), (exact,), (plain,))
    assert found.passed, found
    assert guarded[d:].signbit().all(), "something was written below C"
    assert guarded[:, d:].signbit().all(), "something was written right of C"


class TestInterpreted:
    pytestmark = interpreted

    @pytest.mark.parametrize("config", SMALL, ids=str)
    @pytest.mark.parametrize(("T", "d"), SHAPES)
    def test_on_guarded_memory(self, T, d, config):
        launch(kernel, torch.float16 if d < T else torch.float32, T, d, config, weighted=d % 2 == 0)

    @pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
    def test_every_tile_has_one_owner(self, group):
        for rows in (*range(1, 18), 112):  # 112 rows of 256 are d = 28672
            row, col = tiles(torch.arange(rows * (rows + 1) // 2), rows, group)
            visited = torch.zeros(rows, rows, dtype=torch.int)
            visited.index_put_((row.long(), col.long()), torch.ones_like(row), accumulate=True)
            assert torch.equal(visited, torch.ones_like(visited).tril()), rows

    def test_strips_are_walked_column_by_column(self):
        row, col = tiles(torch.arange(21), 6, 3)
        assert row[:6].tolist() == [0, 1, 1, 2, 2, 2]
        assert row[6:15].tolist() == [3, 4, 5] * 3
        assert col[6:15].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    def test_tiles_are_counted_exactly_at_every_row_boundary(self):
        first = torch.arange(1, 5000) * torch.arange(2, 5001) // 2  # 5000 rows of 16 are d = 80,000
        tile = torch.cat((first - 1, first, first + 1))
        row, col = tiles(tile, 5001, 1)
        assert torch.equal(row * (row + 1) // 2 + col, tile.int())
        assert ((col >= 0) & (col <= row)).all()

    def test_rows_of_weight_zero_are_nothing_and_of_one_are_whole(self):
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(70, 50, generator=generator).half()
        mask = torch.rand(70, generator=generator) < 0.5
        zeroed = torch.where(mask[:, None], X, 0)
        X[~mask] = 6e4
        masked, expected = torch.zeros(50, 50), torch.zeros(50, 50)
        gram_(masked, X, mask, impl="triton")
        gram_(expected, zeroed, impl="triton")
        assert torch.equal(masked.tril(), expected.tril())

    def test_twice_the_same_bits_and_symmetric(self):
        X = torch.randn(140, 300, generator=torch.Generator().manual_seed(0)).half()[::2]
        first, second = torch.zeros(300, 300), torch.zeros(300, 300)
        for C in (first, second):
            gram_(C, X, impl="triton")
            mirror_(C)
        assert torch.equal(first, second)
        assert torch.equal(first, first.T)

    @pytest.mark.parametrize("config", [SMALL[0], SMALL[4]], ids=str)
    def test_tokens_in_several_launches(self, config, monkeypatch):
        monkeypatch.setattr(kernel, "CHUNK", 64)
        launch(kernel, torch.float32, 150, 50, config, weighted=True)

    # A read past the width is not among them: it reaches elements that are never written, so numbers cannot show it.
    MUTANTS = {  # noqa: RUF012
        "the last tile has no owner": ("side * (side + 1) // 2 * parts,", "side * (side + 1) // 2 * parts - 1,"),
        "half a super-tile has no owner": ("side * (side + 1) // 2 * parts,", "side * (side + 1) // 2,"),
        "the second half of a tile is not written": ("add_tile(c_ptr, c_stride, width, i, j + HALF, second)", "pass"),
        "halves exchanged": ("first, second = acc", "second, first = acc"),
        "left reads past the last token": ("(t[None, :] < live)", "(t[None, :] <= live)"),
        "right reads past the last token": ("(t[:, None] < live)", "(t[:, None] <= live)"),
        "writes past the width": ("inside = (i[:, None] < width)", "inside = (i[:, None] <= width)"),
        "overwrites": ("tl.load(at, mask=inside) + tile", "tile"),
        "the wrong column": ("j0 = col * SUPER +", "j0 = (col + 1) * SUPER +"),
        "rows and columns exchanged": ("row, col = grouped_tile", "col, row = grouped_tile"),
        "parts exchanged": ("part // ACROSS * BLOCK_M", "part % ACROSS * BLOCK_M"),
        "the wrong strip": ("within = tile - top * (top + 1) // 2", "within = tile - top * (top - 1) // 2"),
        "the last strip too high": ("height = tl.minimum(rows - top, GROUP)", "height = GROUP"),
        "the wrong stride of C": ("tl.int64)[:, None] * c_stride", "tl.int64)[:, None] * width"),
        "the wrong stride of X": ("tl.int64)[None, :] * x_stride", "tl.int64)[None, :] * width"),
        "weights forgotten": ("* w[None, :]", ""),
        "weights of the first step only": ("tl.load(w_ptr + start + t", "tl.load(w_ptr + t"),
        "launches overlap": ("range(0, tokens, chunk)", "range(0, tokens, chunk // 2)"),
        "weights of the first launch only": ("weight[start : start + chunk]", "weight"),
    }

    @pytest.mark.parametrize("name", MUTANTS)
    def test_gate_a_catches(self, name, mutate):
        mutant = mutate("gram", *self.MUTANTS[name])
        mutant.CHUNK = 64
        with pytest.raises(AssertionError):
            launch(mutant, torch.float32, 70, 90, mutant.Config(16, 32, 32, 2, 4, 1), weighted=True)

    def test_the_check_of_the_bench_catches(self, mutate):
        inputs = inputs_of(subject.SUBJECTS[0], {"T": 70, "d": 50}, torch.float32, "cpu")
        assert check(subject.SUBJECTS[0], inputs, "triton").passed
        mutate("gram", *self.MUTANTS["the second half of a tile is not written"])
        assert not check(subject.SUBJECTS[0], inputs, "triton").passed


def tiles(tile, rows, group):
    """(row, col) of each, by the functions that the kernel calls."""

    @triton.jit
    def run(tile_ptr, row_ptr, col_ptr, n, rows, GROUP: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        row, col = kernel.grouped_tile(tl.load(tile_ptr + at, mask=at < n, other=0), rows, GROUP)
        tl.store(row_ptr + at, row, mask=at < n)
        tl.store(col_ptr + at, col, mask=at < n)

    tile = tile.int()
    row, col = torch.full_like(tile, -1), torch.full_like(tile, -1)
    run[(1,)](tile, row, col, len(tile), rows, group, triton.next_power_of_2(len(tile)))
    return row, col


def stand_in(width, dtype=torch.bfloat16, stride=None, at=0, rows=700, cuda=True):
    """What `candidates` asks a matrix for."""
    return SimpleNamespace(
        shape=(rows, width),
        dtype=dtype,
        is_cuda=cuda,
        device="cuda",
        stride=lambda dim: (stride or width, 1)[dim],
        data_ptr=lambda: at,
    )


@pytest.mark.parametrize(
    ("X", "capability", "key"),
    [
        (stand_in(14336), (9, 0), "16bit-tma-16384"),
        (stand_in(4096), (9, 0), "16bit-tma-narrow-4096"),
        (stand_in(14336), (8, 0), "16bit-16384"),
        (stand_in(14336), (12, 0), "16bit-16384"),
        (stand_in(14336, cuda=False), None, "16bit-16384"),
        (stand_in(300), (9, 0), "16bit-ragged-512"),
        (stand_in(320, stride=1000), (9, 0), "16bit-ragged-512"),
        (stand_in(320, at=8), (9, 0), "16bit-ragged-512"),
        (stand_in(320, stride=16), (9, 0), "16bit-512"),  # rows that overlap
        (stand_in(320, torch.float32), (9, 0), "fp32-tma-512"),
        (stand_in(320, torch.float32), (8, 6), "fp32-512"),
        (stand_in(1, torch.float32), (8, 6), "fp32-ragged-1"),
    ],
)
def test_what_serves_which_layout(X, capability, key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, configs = kernel.candidates(stand_in(X.shape[1], torch.float32), X)
    assert found == key
    assert configs == kernel.CONFIGS[key.rpartition("-")[0]]


def test_every_configuration_is_listed_once():
    for kind, configs in kernel.CONFIGS.items():
        assert len(set(configs)) == len(configs)
        assert all(config.descriptors == ("-tma" in kind) for config in configs)


@pytest.mark.parametrize("alone", [True, False])
def test_fp32_is_split_except_by_the_interpreter(alone, monkeypatch):
    monkeypatch.setattr(kernel, "interpreting", lambda: alone)
    few, many = torch.zeros(kernel.FEW - 1, 1), torch.zeros(kernel.FEW, 1)
    assert kernel.precision(few) == ("ieee" if alone else "bf16x6")
    assert kernel.precision(many) == ("ieee" if alone else "bf16x3")
    assert kernel.precision(many.half()) == "ieee"


def parts(X, count):
    """X as a sum of bf16, each exact in float64."""
    found = []
    for _ in range(count):
        found.append(X.bfloat16().double())
        X = X - found[-1].float()
    return found


@pytest.mark.parametrize(("T", "passes"), [(1, False), (kernel.FEW, True), (4096, True)])
def test_three_products_are_enough_off_the_diagonal_of_many_tokens(T, passes):
    """Why `precision` and the diagonal are as they are, by an emulation: sums in float64, so of the split alone."""
    X, _ = inputs_of(subject.SUBJECTS[0], {"T": T, "d": 96}, torch.float32, "cpu")
    exact, plain = subject.exact((X, None))[0], subject.plain((X, None))[0]
    a, b = parts(X, 2)
    three = (a.T @ a + a.T @ b + b.T @ a).tril()
    assert not verdict((three,), (exact,), (plain,)).passed
    a, b, c = parts(X, 3)
    six = (a.T @ a + a.T @ b + b.T @ a + b.T @ b + a.T @ c + c.T @ a).tril()
    assert verdict((six,), (exact,), (plain,)).passed
    mixed = three.clone()
    mixed.diagonal().copy_(six.diagonal())
    assert verdict((mixed,), (exact,), (plain,)).passed is passes


class TestCompiled:
    pytestmark = compiled

    def broken(self, name, chip, tmp_path, **changes):
        import gate_b

        (variant,) = (each for each in kernel.variants() if each.name == name)
        variant = dataclasses.replace(variant, **changes)
        return gate_b.complaints(variant, chip, gate_b.compile_variant(variant, chip, tmp_path))

    @pytest.mark.parametrize(
        ("name", "chip", "changes", "complaint"),
        [
            ("gram-16bit-tma-bf16-ieee-128x256x64-g8-w8-s4", 90, {"num_stages": 5}, "shared memory"),
            ("gram-16bit-tma-bf16-ieee-128x256x64-g8-w8-s4", 90, {"num_warps": 4}, "spills"),
            ("gram-16bit-bf16-ieee-128x128x64-g8-w8-s3", 80, {"num_stages": 5}, "shared memory"),
            ("gram-16bit-bf16-ieee-128x128x64-g8-w8-s3", 80, {"aligned": ("left_x",)}, "asynchronous"),
        ],
    )
    def test_gate_b_catches(self, name, chip, changes, complaint, tmp_path):
        found = self.broken(name, chip, tmp_path, **changes)
        assert any(complaint in each for each in found), found

    def test_gate_b_catches_products_without_tensor_cores_or_rounded_to_tf32(self, tmp_path):
        name = "gram-fp32-ragged-fp32-bf16x6-64x64x32-g16-w4-s3"
        (variant,) = (each for each in kernel.variants() if each.name == name)
        ieee = {**variant.constants, "PRECISION": "ieee"}
        assert self.broken(name, 80, tmp_path, constants=ieee) == ["no tensor cores"]
        tf32 = {**variant.constants, "PRECISION": "tf32"}
        assert self.broken(name, 80, tmp_path, constants=tf32) == ["fp32 is rounded to tf32"]


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("d", [300, 640, 4352])
    def test_every_configuration(self, d, dtype):
        shape = {"T": 1000, "d": d, "weighted": 1}
        X, w = inputs_of(subject.SUBJECTS[0], shape, dtype, "cuda")
        for weight in (None, w, (w < 0.5).float()):
            exact, plain = subject.exact((X, weight)), subject.plain((X, weight))
            C = torch.empty(d, d, device="cuda")
            key, configs = kernel.candidates(C, X, weight)
            for config in configs:
                runs = []
                for _ in range(2):
                    kernel.gram_lower_(C.zero_(), X, weight, config)
                    runs.append(C.tril())
                assert verdict(runs[:1], exact, plain).passed, (key, config)
                assert torch.equal(*runs), (key, config)
