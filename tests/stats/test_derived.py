"""Factors and null spaces on disk: the same to the last bit, of the right C, and never worse than none."""

import json
import logging
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rewire.bench.solve import second_moment
from rewire.kernels.errors import InputError
from rewire.kernels.spd_solve import factor as factor_module
from rewire.kernels.spd_solve import regular_factor
from rewire.stats import Moment, derived
from rewire.stats.derived import Derived

D = 300  # more than one strip of a factor
CPU = torch.device("cpu")
LOW, HIGH = 1e-6, 2e-2  # thresholds: a small null space, and one of more than half the directions


@pytest.fixture(scope="module")
def moment() -> Moment:
    return Moment.of(second_moment(D, 4 * D) * 4 * D, 4 * D)


@pytest.fixture(scope="module")
def C(moment: Moment) -> Tensor:
    return moment.mean


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged as a warning."""
    monkeypatch.setattr(logging.getLogger("rewire"), "propagate", True)
    messages: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Told(logging.WARNING)
    derived.log.addHandler(handler)
    yield messages
    derived.log.removeHandler(handler)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was made and not read."""
    calls: list[str] = []
    for name in ("regular_factor", "eigenbasis"):

        def counted(C: Tensor, name: str = name, real: object = getattr(derived, name)) -> object:
            calls.append(name)
            return real(C)  # type: ignore[operator]

        monkeypatch.setattr(derived, name, counted)
    return calls


def both(
    folder: Path, digest: str, C: Tensor, threshold: float = HIGH, device: torch.device = CPU
) -> tuple[Tensor, ...]:
    """Factor and null space, as a new session gets them."""
    found = Derived(folder)
    factor, space = found.factor(digest, C, device, "h.1"), found.null_space(digest, C, device, threshold)
    numbers = torch.tensor([factor.condition, factor.ridge, space.complement, space.rank, space.below, space.above])
    return factor.L, factor.scale, space.basis, numbers.double()


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """To the last bit, and lying in memory the same way: solves with another layout round otherwise."""
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(one, other, strict=True))


def test_what_was_made_once_is_read(tmp_path, moment, C, made, told):
    first = both(tmp_path, moment.digest, C)
    assert made == ["regular_factor", "eigenbasis"]
    assert same(both(tmp_path, moment.digest, C), first)
    assert len(made) == 2
    names = ["eigen.safetensors", "factor_float64.safetensors"]
    assert sorted(path.name for path in (tmp_path / moment.digest).iterdir()) == names
    assert told == []
    # the lower triangle and what completes its strips, no square
    assert (tmp_path / moment.digest / names[1]).stat().st_size < 8 * (D * (D + 1) / 2 + 128 * D + D) + 1000


@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 600), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_triangle_comes_back_whatever_its_width(d, dtype):
    L = (torch.randn(d, d).tril() + torch.eye(d)).to(dtype).T.contiguous().T
    packed = torch.cat([strip.flatten() for strip in derived._strips(L)])
    back = derived._unpack(packed, d)
    assert torch.equal(back, L)
    assert back.stride() == L.stride()
    assert len(packed) <= d * (d + 1) // 2 + 128 * d


def test_other_statistics_are_a_miss(tmp_path, moment, C, made):
    both(tmp_path, moment.digest, C)
    longer = Moment(moment.triangle, moment.count + 1)
    assert longer.digest != moment.digest
    again = both(tmp_path, longer.digest, longer.mean)
    assert len(made) == 4
    assert torch.equal(again[0], regular_factor(longer.mean).L)


def test_thresholds_share_one_file_of_which_the_smaller_side_is_read(tmp_path, moment, C, made, told):
    want = {threshold: both(tmp_path / "whole", moment.digest, C, threshold) for threshold in (LOW, HIGH)}
    assert made == ["regular_factor", "eigenbasis"]  # the second threshold is another slice
    ranks = {threshold: int(numbers[3]) for threshold, (*_, numbers) in want.items()}
    assert 0 < ranks[LOW] < D / 2 < ranks[HIGH] < D
    for threshold, unread in ((LOW, slice(ranks[LOW], D)), (HIGH, slice(0, ranks[HIGH]))):
        shutil.copytree(tmp_path / "whole", tmp_path / str(threshold))
        numbers_in(tmp_path / str(threshold) / moment.digest / "eigen.safetensors", "vectors")[unread] = np.nan
        assert same(both(tmp_path / str(threshold), moment.digest, C, threshold), want[threshold])
        assert told == []
        other = LOW if threshold == HIGH else HIGH
        assert same(both(tmp_path / str(threshold), moment.digest, C, other), want[other])  # sees it, makes it anew
        assert len(told) == 1
        assert "does not fit the second moment" in told.pop()


def numbers_in(path: Path, name: str) -> np.memmap:
    """A tensor in a file, to be written to."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    return np.memmap(path, np.float64, "r+", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))


@pytest.mark.parametrize(("name", "change"), [("vectors", 0.0), ("vectors", 2.0), ("values", -1.0)])
def test_eigenvectors_are_unit_and_values_add_up(tmp_path, moment, C, made, told, name, change):
    """What the equation C v = w v does not see: a scale of all vectors, and the values of the side that is not read."""
    first = both(tmp_path, moment.digest, C)
    numbers = numbers_in(tmp_path / moment.digest / "eigen.safetensors", name)
    if name == "vectors":
        numbers *= change
    else:
        numbers[0] = change
    assert same(both(tmp_path, moment.digest, C), first)
    assert made.count("eigenbasis") == 2
    assert len(told) == 1


@pytest.mark.parametrize("made_already", [False, True])
@pytest.mark.parametrize("threshold", [1e-12, 1e6])
def test_a_threshold_outside_the_spectrum_is_refused(tmp_path, moment, C, made, told, made_already, threshold):
    if made_already:
        both(tmp_path, moment.digest, C)
    with pytest.raises(InputError, match=r"of 300 eigenvalues are below .*choose one between"):
        Derived(tmp_path).null_space(moment.digest, C, CPU, threshold)
    both(tmp_path, moment.digest, C)
    assert made.count("eigenbasis") == 1
    assert told == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, number: int) -> None:
    """The exponent of a number, counted from the end: every shape and name stays right."""
    content = bytearray(path.read_bytes())
    content[-8 * number - 1] ^= 0x7F
    path.write_bytes(content)


def other_names(path: Path) -> None:
    save_file({"something": torch.zeros(3)}, path)


def no_numbers(path: Path) -> None:
    relabelled(path, lambda header: [header["__metadata__"].pop(key, None) for key in ("condition", "moment")])


def other_shape(path: Path) -> None:
    relabelled(path, lambda header: [entry.update(shape=[1, *entry["shape"]]) for entry in tensors_of(header)])


def other_dtype(path: Path) -> None:
    with safe_open(path, "pt") as content:
        about, tensors = content.metadata(), {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
    large = "L" if "L" in tensors else "vectors"
    tensors[large] = tensors[large].float()
    save_file(tensors, path, about)


def older_format(path: Path) -> None:
    relabelled(path, lambda header: header["__metadata__"].update(format="rewire-derived-0"))


def tensors_of(header):
    return [entry for name, entry in header.items() if name != "__metadata__"]


def relabelled(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


DAMAGE = {
    "cut off": cut,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 1000),
    "last number": lambda path: flip(path, 0),  # of the scale, and of the vectors
    "one number": lambda path: flip(path, D + 5),  # of L
    "foreign": other_names,
    "no numbers": no_numbers,
    "shape": other_shape,
    "dtype": other_dtype,
    "format": older_format,
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_broken_file_is_made_anew(tmp_path, moment, C, made, told, how):
    first = both(tmp_path, moment.digest, C)
    paths = sorted((tmp_path / moment.digest).iterdir())
    for path in paths:
        DAMAGE[how](path)
    assert same(both(tmp_path, moment.digest, C), first)
    assert len(made) == 4
    unfit = [message for message in told if "cannot be written to" not in message]
    for path, message in zip(reversed(paths), unfit, strict=True):
        assert message.startswith(f"{path}: of no use (")
    if how == "a folder":  # nor can it be replaced
        assert len(told) == 3
    else:
        assert len(told) == 2
        assert same(both(tmp_path, moment.digest, C), first)
        assert len(made) == 4
        assert len(told) == 2


def test_a_file_of_another_moment_is_found_out(tmp_path, moment, C, made, told):
    """By its name inside, and by its numbers where a digest does not tell (it looks at a sample)."""
    first = both(tmp_path, moment.digest, C)
    shutil.copytree(tmp_path / moment.digest, tmp_path / "0123456789abcdef")
    other = C.clone()
    other[7, 7] *= 1.0001
    right = both(tmp_path, "0123456789abcdef", other)
    assert len(made) == 4
    assert len(told) == 2
    assert all(f"moment '{moment.digest}' found" in message for message in told)
    assert torch.equal(right[0], regular_factor(other).L)
    assert not same(both(tmp_path, moment.digest, other), first)
    assert len(made) == 6
    assert all("does not fit the second moment" in message for message in told[2:])


def test_where_nothing_can_be_written(tmp_path, moment, C, made, told):
    (tmp_path / "file").touch()
    want = both(tmp_path / "good", moment.digest, C)
    assert same(both(tmp_path / "file", moment.digest, C), want)  # two writes fail, one is told
    (message,) = told
    assert message.startswith(f"{tmp_path / 'file'}: cannot be written to (")
    assert "REWIRE_CACHE" in message


def test_a_full_disk(tmp_path, moment, C, told):
    want = both(tmp_path / "good", moment.digest, C)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        assert same(both(tmp_path / "full", moment.digest, C), want)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (message,) = told
    assert "cannot be written to" in message
    assert list((tmp_path / "full" / moment.digest).iterdir()) == []  # no half of a file
    assert same(both(tmp_path / "full", moment.digest, C), want)
    assert len(list((tmp_path / "full" / moment.digest).iterdir())) == 2


def test_a_float32_factor_is_for_who_wants_one(tmp_path, moment, C, made, monkeypatch):
    mild = (C.double() + 1e-4 * torch.eye(D)).float()

    def factors(dtype: torch.dtype, C: Tensor = mild, digest: str = "mild") -> tuple[str, ...]:
        for module in (derived, factor_module):
            monkeypatch.setattr(module, "fast_dtype", lambda device: dtype)
        read = [Derived(tmp_path).factor(digest, C, CPU, "h.1") for _ in range(2)]
        assert torch.equal(read[0].L, read[1].L)
        return tuple(factor.dtype for factor in read)

    assert factors(torch.float32) == ("float32",) * 2
    assert factors(torch.float64) == ("float64",) * 2
    assert factors(torch.float32) == ("float32",) * 2
    assert len(made) == 2
    # float32 breaks down: float64 is what there is, and is not made again at every start
    assert factors(torch.float32, C, "hard") == ("float64",) * 2
    assert len(made) == 3


def test_a_ridge_is_kept_and_told_once_a_layer(tmp_path, moment, C, made, told):
    dead = C.clone()
    dead[:, 17] = dead[17] = 0
    for session in range(2):
        found = Derived(tmp_path)
        for layer in ("h.1", "h.2", "h.1"):
            factor = found.factor("dead", dead, CPU, layer)
            assert factor.ridge == pytest.approx(1e-6 * float(dead.diagonal().mean()))
        assert len(told) == 2 * session + 2
        for layer, message in zip(("h.1", "h.2"), told[2 * session :], strict=True):
            assert message.startswith(f"{layer}: its second moment has no full rank")
            assert "1 of 300 diagonal elements are not positive, the first in row 17" in message
            assert f"a ridge of {factor.ridge:.1e}" in message
    assert made == ["regular_factor"]
    scaled = factor.scale * (dead.double() + factor.ridge * torch.eye(D, dtype=torch.float64)) * factor.scale.T
    assert torch.linalg.norm(factor.L @ factor.L.T - scaled) < 1e-12 * torch.linalg.norm(scaled)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, moment, C, made, told):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    device = torch.device("cuda")
    first = both(tmp_path, moment.digest, C, device=device)
    assert {tensor.device.type for tensor in first[:3]} == {"cuda"}
    assert same(both(tmp_path, moment.digest, C, device=device), first)
    assert len(made) == 2
    assert told == []
