"""The phases of an edit by pytest-benchmark, each beside its serial or plain counterpart: `make bench`.

Without --benchmark-only every one is run once at a tiny size and checked. With it, the ratio of both sides, timed in
turn, must not have lost a quarter of the committed one; with REWIRE_BENCH_TABLE=1 (`make bench-table`) it is written
into the table.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from rewire.bench import phases, ratios
from rewire.bench.phases import ONCE, TIMED
from rewire.bench.table import write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
NAMES = tuple(phases.phases(ONCE))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> None:
    require_table(request.config.getoption("benchmark_only"))


def require_table(timed: bool) -> None:
    """Ends the run with one line where there is nothing to hold a ratio against, before anything is timed."""
    missing = ratios.absent(ratios.committed(PAGE.read_text()))
    if timed and missing and not os.environ.get("REWIRE_BENCH_TABLE"):
        pytest.exit(missing, returncode=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("table")  # before the benchmark
def test_phase(name: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    timed = request.config.getoption("benchmark_only")
    benchmark.disabled = not timed
    phase = phases.phases(TIMED if timed else ONCE)[name]()
    assert phase.error(phase.ours(), phase.plain()) <= phase.bound
    benchmark.group = "phases of an edit"
    if not timed:
        benchmark(phase.ours)
        return
    ours, plain = phases.timed(phase)
    known = ratios.committed(PAGE.read_text())
    if os.environ.get("REWIRE_BENCH_TABLE"):
        write_text(PAGE, ratios.rewritten(PAGE.read_text(), name, ours, plain))
    elif ratios.complaint(name, plain / ours, known):
        ours, plain = phases.timed(phase)  # once more: a machine is not always quiet
        wrong = ratios.complaint(name, plain / ours, known)
        assert wrong is None, wrong
    benchmark.extra_info["ratio"] = plain / ours
    benchmark.pedantic(phase.ours, rounds=3)


def test_every_phase_has_a_row() -> None:
    assert tuple(ratios.committed(PAGE.read_text())) == NAMES


# the comparer

TABLE = f"""# Page
{ratios.BEGIN}

{ratios.HEAD}
| values | 10 | 80 | 8.00 |
| keys | - | - | not measured |

{ratios.END}
| values | 1 | 1 | 1.00 |
"""


def test_the_committed_ratios() -> None:
    assert ratios.committed(TABLE) == {"values": 8.0, "keys": None}
    assert ratios.committed("# Page\n| values | 1 | 1 | 1.00 |\n") == {}


@pytest.mark.parametrize("found", [8.0, 6.01, 100.0])
def test_noise_passes(found: float) -> None:
    assert ratios.complaint("values", found, ratios.committed(TABLE)) is None


@pytest.mark.parametrize("found", [5.99, 0.0, float("nan")])
def test_a_lost_quarter_fails(found: float) -> None:
    said = ratios.complaint("values", found, ratios.committed(TABLE))
    assert said == f"values: ratio 8.00 committed, {found:.2f} found: more than 25% lost"


@pytest.mark.parametrize("name", ["keys", "solve"])
def test_a_row_that_is_missing_or_not_measured_fails(name: str) -> None:
    said = ratios.complaint(name, 3.0, ratios.committed(TABLE))
    assert said is not None
    assert said.startswith(f"{name}: ratio 3.00 found, none committed")


def test_without_a_table_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ratios.absent({"values": 8.0, "keys": None}) is None
    page = tmp_path / "page.md"
    page.write_text(TABLE.replace("8.00", "not measured"))
    monkeypatch.setitem(globals(), "PAGE", page)
    monkeypatch.delenv("REWIRE_BENCH_TABLE", raising=False)
    require_table(timed=False)
    said = "no ratios in docs/benchmarks.md yet: run `make bench-table` on a quiet machine and commit the page"
    with pytest.raises(pytest.exit.Exception) as stopped:
        require_table(timed=True)
    assert (stopped.value.msg, stopped.value.returncode) == (said, 1)
    monkeypatch.setenv("REWIRE_BENCH_TABLE", "1")
    require_table(timed=True)  # it is about to be written


def test_a_row_is_written_and_the_rest_stays() -> None:
    page = ratios.rewritten(TABLE, "keys", 0.002, 0.0125)
    assert page == TABLE.replace("| keys | - | - | not measured |", "| keys | 2 | 12.5 | 6.25 |")
    page = ratios.rewritten(page, "solve", 0.001, 0.0005)
    assert ratios.committed(page) == {"values": 8.0, "keys": 6.25, "solve": 0.5}
    assert page.startswith("# Page\n")
    assert page.endswith(TABLE[TABLE.index(ratios.END) :])
    with pytest.raises(ValueError, match="expected <!-- from here on"):
        ratios.rewritten("# Page\n", "keys", 1.0, 1.0)


def test_a_wrong_phase_is_seen() -> None:
    """The check that stands before the timing can fail, for each phase."""
    for name, make in phases.phases(ONCE).items():
        phase = make()
        ours, plain = phase.ours(), phase.plain()
        assert phase.error(ours, plain) <= phase.bound, name
        wrong = {key: 1.01 * total for key, total in plain.items()} if name == "statistics" else 1.01 * plain
        assert phase.error(ours, wrong) > phase.bound, name
