"""The CSV of figures, the pictures made of it, and the targets it is held against."""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from subjects import bench, subject, wrong_where

from rewire.bench import table, targets
from rewire.bench.plots import plot
from rewire.kernels.errors import InputError

pytestmark = pytest.mark.usefixtures("small_cache")


# the CSV


def row(**changes: Any) -> dict[str, Any]:
    usual = {"operation": "gram_", "provider": "torch", "dtype": "float32", "shape": {"d": 4, "T": 2}, "device": "a, b"}
    return {**usual, "status": "measured", "p50_ms": 1.5, "ratio": 2.0, "floor_fraction": 0.25, "note": ""} | changes


def test_upsert_keeps_one_row_a_key(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "k.csv"
    table.upsert(path, [row(), row(provider="plain", p50_ms=3.0)])
    table.upsert(path, [row(shape={"T": 2, "d": 4}, p50_ms=1.25, peak_bytes=822083584), row(device="other")])
    found = table.read(path)
    assert [(r["provider"], r["device"], r["p50_ms"]) for r in found] == [
        ("torch", "a, b", 1.25),
        ("plain", "a, b", 3.0),
        ("torch", "other", 1.5),
    ]
    assert found[0]["shape"] == {"T": 2, "d": 4}
    assert found[0]["peak_bytes"] == 822083584
    before = path.read_text()
    table.upsert(path, [])
    assert path.read_text() == before  # reading and writing changes nothing
    assert [p.name for p in path.parent.iterdir()] == ["k.csv"]
    assert next(csv.reader(before.splitlines())) == list(table.COLUMNS)


@pytest.mark.parametrize("key", table.KEY)
def test_every_part_of_the_key_counts(tmp_path: Path, key: str) -> None:
    table.upsert(tmp_path / "k.csv", [row(), row(**{key: {"n": 1} if key == "shape" else "x"})])
    assert len(table.read(tmp_path / "k.csv")) == 2


def test_what_replaces_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "k.csv"
    table.upsert(path, [row(), row(provider="new", status="refused"), row(provider="full", status="not measured")])
    table.upsert(path, [row(status="not measured", p50_ms=None, note="out of memory")])
    assert [(r["provider"], r["status"], r["p50_ms"]) for r in table.read(path)] == [
        ("torch", "measured", 1.5),
        ("full", "not measured", 1.5),
    ]
    table.upsert(path, [row(status="wrong", p50_ms=None)])
    assert (table.read(path)[0]["status"], table.read(path)[0]["p50_ms"]) == ("wrong", None)


def test_an_interrupted_write_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k.csv"
    table.upsert(path, [row()])
    before = path.read_text()

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        table.upsert(path, [row(p50_ms=9.0)])
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "no column 'operation'"),
        ("", "no column 'operation'"),
        (",".join(table.COLUMNS) + "\n" + ",".join(["x"] * len(table.COLUMNS)) + "\n", ":2: "),
        (",".join(table.COLUMNS) + "\nx\n", ":2: "),
        ("\xff\xfe\x00".encode("latin-1"), "k.csv: "),
    ],
)
def test_another_csv_is_refused(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "k.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said):
        bench(subject(), csv=path)
    with pytest.raises(InputError, match=said):
        plot(path, tmp_path / "out")


def test_bench_writes_its_rows(tmp_path: Path) -> None:
    bench(subject(triton_=wrong_where(lambda x: True)), csv=tmp_path / "k.csv")
    found = {r["provider"]: r for r in table.read(tmp_path / "k.csv")}
    assert {name: r["status"] for name, r in found.items()} == {
        "triton": "wrong",
        "torch": "measured",
        "plain": "measured",
    }
    assert found["triton"]["p50_ms"] is None
    good = found["torch"]
    assert all(good[name] for name in ("torch", "triton", "timestamp", "device"))
    assert good["p20_ms"] <= good["p50_ms"] <= good["p80_ms"]


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    providers = ("triton", "torch", "plain", "addmm", "two bmm")
    table.upsert(tmp_path / "k.csv", [row(provider=name, shape={"d": d}) for name in providers for d in (1, 2)])
    written = plot(tmp_path / "k.csv", tmp_path / "out")
    assert [path.name for path in written] == ["a-b-ratio.png", "a-b-floor.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert sorted(tmp_path.joinpath("out").iterdir()) == sorted(written)
    table.upsert(tmp_path / "empty.csv", [])
    with pytest.raises(InputError, match="no measured row"):
        plot(tmp_path / "empty.csv", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'rewire\[plot\]'"):
        plot(tmp_path / "k.csv", tmp_path / "out")


# targets


def test_targets() -> None:
    shape = {"T": 32768, "d": 14336}
    usual = {"dtype": "bfloat16", "status": "measured"}
    gram = [
        row(provider="triton", shape=shape, **usual | {"p50_ms": 10.0, "tflops": 673.0}),
        row(provider="addmm", shape=shape, **usual | {"p50_ms": 14.0}),
    ]
    delta = [
        row(operation="delta_linear", provider=name, shape={"rows": 512, "r": r}, **usual | {"p50_ms": ms})
        for r, name, ms in ((1, "triton", 1.04), (1, "product", 1.0), (16, "triton", 2.0), (16, "product", 1.0))
    ]
    head = row(
        operation="target_nll", provider="triton", shape=dict(targets.HEAD), peak_bytes=2**28, tflops=500.0, **usual
    )
    names = ["gram_", "delta_linear", "target_nll", "other"]
    found = targets.judge([*gram, *delta, head], names)
    assert [(t["name"], t["result"]) for t in found] == [
        ("gram_", "missed"),
        ("gram_", "met"),
        ("delta_linear", "met"),
        ("target_nll", "missed"),
        ("target_nll", "missed"),
    ]
    assert [round(t["found"], 3) for t in found] == [1.4, 673.0, 0.04, 500.0, round(2**28 / (4096 * 128256 * 2), 3)]
    assert found[2]["shape"] == {"rows": 512, "r": 1}
    assert {t["result"] for t in targets.judge([], names)} == {"not measured"}
    assert targets.judge([], ["other"]) == []
    # the wrong dtype, one that failed, and no baseline
    assert targets.judge([r | {"dtype": "float16"} for r in gram], ["gram_"])[0]["result"] == "not measured"
    assert targets.judge([r | {"status": "wrong"} for r in gram], ["gram_"])[0]["result"] == "not measured"
    assert [t["result"] for t in targets.judge(gram[:1], ["gram_"])] == ["not measured", "met"]


def test_targets_name_operations_that_exist() -> None:
    from rewire.bench.operations import subjects

    there = {each.name: each for each in subjects()}
    for name, wanted in targets.TARGETS.items():
        for target in wanted if name in there else ():
            fits = [s for s in there[name].large if all(s.get(key) == value for key, value in target.shape.items())]
            assert fits, (name, target)
