"""An experiment's files: the published layout record by record, its means, the tables byte by byte, the picture."""

import csv
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rewire.engine.experiment import plots, results, summary
from rewire.engine.facts import EditNeighbor, Fact, Probe
from rewire.kernels.errors import InputError

FACTS = [
    Fact(
        "Marie Curie",
        "{} worked in",
        "music",
        "physics",
        ("Curie's field is", "Marie Curie did"),
        ("Bohr worked in", "Planck did"),
        (EditNeighbor("Planck", "{} did", "physics"),),
        id="a",
    ),
    Fact("Aracataca", "Where is {}?", "Japan", None, ("Find Aracataca:",), locality=(Probe("Who?", "Me"),), id="b"),
]


@dataclass
class Iteration:
    """What a session tells of one iteration."""

    number: int
    facts: list[dict[str, float]]
    initial: float = 0.0
    optimization: float = 0.0
    spread: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


def measured(first: float, second: float, me_ppl: float | None, unedited: bool = False) -> dict[str, Any]:
    """An evaluation: the share of the new object's tokens that each fact says."""

    def record(name: str, acc: float, other: bool) -> dict[str, Any]:
        success = [float(acc > 0.5)] if other else []
        specificity = {"output": [[3, 4]], "success": [1.0], "acc": [0.5]}
        if unedited:
            del specificity["acc"]
        return {
            "id": name,
            "efficacy": {"acc": [acc], "success": success},
            "generalization": {"acc": [acc, 0.0] if other else [acc], "success": success * 2},
            "specificity": specificity,
            "rewrite_ppl": 8.0 - acc,
            "rephrase_ppl": 9.0,
        }

    records = [record("a", first, True), record("b", second, False)]
    return {"protocol": "underedit", "metrics": {"me_ppl": me_ppl}, "facts": records}


def iteration(number: int, *opt: float) -> Iteration:
    return Iteration(number, [{"init_ppl": 10.0 + number, "opt_ppl": ppl, "spread_ppl": 2 * ppl} for ppl in opt])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two iterations; the first leaves one hard case."""
    before = measured(0.0, 0.25, 20.0, unedited=True)
    first, second = measured(0.0, 0.75, 21.0), measured(1.0, 0.0, 22.5)
    results.write(tmp_path, 1, FACTS, before, first, iteration(1, 2.0, 4.0), 1.5, None)
    results.write(tmp_path, 2, FACTS, before, second, iteration(2, 1.0, 1.5), 1.25, results.hard_cases(first))
    return tmp_path


def test_records_are_as_published(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "me_ppl.json",
        *("results_1.json", "results_1_false_cases.json", "results_2.json", "results_2_false_cases.json"),
    ]
    first, second = json.loads((folder / "results_1.json").read_text())
    assert first == {
        "case_id": 0,
        "id": "a",
        "requested_rewrite": {
            "prompt": "Marie Curie worked in",
            "target_new": "music",
            "ground_truth": "physics",
            "portability": {},
            "locality": {"neighborhood": {"prompt": ["Bohr worked in"], "ground_truth": ["physics"]}},
            "subject": "Marie Curie",
            "rephrase_prompt": ["Curie's field is", "Marie Curie did"],
        },
        "time": 1.5,
        "pre": {
            "rewrite_acc": [0.0],
            "rewrite_success": [0.0],
            "rephrase_acc": [0.0, 0.0],
            "rephrase_success": [0.0, 0.0],
            "locality": {"neighborhood_output": [[3, 4]], "neighborhood_success": [1.0]},
            "portability": {},
        },
        "post": {
            "rewrite_acc": [0.0],
            "rewrite_success": [0.0],
            "rephrase_acc": [0.0, 0.0],
            "rephrase_success": [0.0, 0.0],
            "locality": {
                "neighborhood_output": [[3, 4]],
                "neighborhood_success": [1.0],
                "neighborhood_acc": [0.5],
            },
            "portability": {},
            "init_ppl": 11.0,
            "final_ppl": 2.0,
            "spread_ppl": 4.0,
            "rewrite_ppl": 8.0,
            "rephrase_ppl": 9.0,
        },
    }
    assert second["requested_rewrite"]["ground_truth"] is None
    assert second["requested_rewrite"]["locality"] == {"neighborhood": {"prompt": ["Who?"], "ground_truth": ["Me"]}}
    assert results.read(folder, 1, hard=True) == [first]
    (tracked,) = results.read(folder, 2, hard=True)  # the same case, though it is right by now
    assert (tracked["id"], tracked["post"]["rewrite_acc"]) == ("a", [1.0])
    assert results.count(folder) == 2
    assert json.loads((folder / "me_ppl.json").read_text()) == {"0": 20.0, "1": 21.0, "2": 22.5}


def test_hard_is_exactly_zero_and_a_new_run_leaves_no_old_ones(folder: Path) -> None:
    assert results.hard_cases(measured(0.0, 1e-9, None)) == {"a"}
    fine = measured(1.0, 0.5, None)
    results.write(folder, 1, FACTS, measured(0.0, 0.0, None, unedited=True), fine, iteration(1, 1.0, 1.0), 1.0, None)
    assert not (folder / "results_1_false_cases.json").exists()
    summary.write(folder, 2, compat=False)
    assert not (folder / "summaryHard.json").exists()


def test_summary(folder: Path) -> None:
    made = summary.write(folder, 2, compat=False)
    assert made["all"] == json.loads((folder / "summary.json").read_text())
    assert made["hard"] == json.loads((folder / "summaryHard.json").read_text())
    first, second = made["all"]
    assert first == {
        "pre": {
            "rewrite_acc": 0.125,
            "rephrase_acc": 0.125,
            "rewrite_success": 0.0,  # of the one fact that has it
            "rephrase_success": 0.0,
            "locality": {"neighborhood_success": 1.0},
        },
        "post": {
            "rewrite_acc": 0.375,
            "rephrase_acc": 0.375,
            "rewrite_success": 0.0,
            "rephrase_success": 0.0,
            "rewrite_ppl": 7.625,
            "init_ppl": 11.0,
            "final_ppl": 3.0,
            "spread_ppl": 6.0,
            "locality": {"neighborhood_acc": 0.5, "neighborhood_success": 1.0},
        },
        "m_ppl": 21.0,
        "m_ppl_pre": 20.0,
    }
    assert second["post"]["rephrase_acc"] == (0.5 + 0.0) / 2  # a record's prompts first
    assert (second["m_ppl"], second["m_ppl_pre"]) == (22.5, 20.0)
    assert [entry["post"]["rewrite_acc"] for entry in made["hard"]] == [0.0, 1.0]


def test_compat_rounds_locality_alone(folder: Path) -> None:
    path = folder / "results_1.json"
    records = json.loads(path.read_text())
    records[0]["post"]["locality"]["neighborhood_acc"] = [1, 0, 0]
    records[0]["post"]["rewrite_acc"] = [1 / 3]
    path.write_text(json.dumps(records))
    plain, published = (summary.write(folder, 1, compat)["all"][0]["post"] for compat in (False, True))
    assert plain["locality"]["neighborhood_acc"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert published["locality"]["neighborhood_acc"] == 0.42
    assert plain["rewrite_acc"] == published["rewrite_acc"] == pytest.approx((1 / 3 + 0.75) / 2)


HEADER = (
    "Metric,Efficacy,Efficacy,Generalization,Generalization,Specificity,Specificity,Score,Score,"
    "Perplexity,Perplexity,Perplexity,Perplexity,Perplexity,ApproxError\n"
    "MEMIT,acc,success,acc,success,acc,success,acc,success,m-ppl-50,init,init_verify,final,rewrite,rewrite - final\n"
)
PRE = {"rewrite_acc": 0.0, "rewrite_success": 0.0, "rephrase_acc": 0.1, "rephrase_success": 0.25}
POST = {"rewrite_acc": 1.0, "rewrite_success": 1.0, "rephrase_acc": 0.5, "rephrase_success": 0.0}
ENTRIES = [
    {
        "pre": PRE | {"locality": {"neighborhood_success": 0.75}},
        "post": POST
        | {"locality": {"neighborhood_acc": 0.5, "neighborhood_success": 1.0}}
        | {"rewrite_ppl": 3.5, "init_ppl": 900.0, "final_ppl": 1.25, "spread_ppl": 4.5},
        "m_ppl": 62.0,
        "m_ppl_pre": 60.0,
    },
    {"pre": PRE, "post": POST | {"rewrite_ppl": 2.0, "init_ppl": 4.5}, "m_ppl": None, "m_ppl_pre": None},
]


def test_table_byte_by_byte(tmp_path: Path) -> None:
    """In the form of `DataFrame.to_csv` with two named levels of columns and an index without a name."""
    made = {"all": ENTRIES, "hard": None, "facts": [2, 2]}
    (path,) = summary.write_csv(tmp_path, "MEMIT_gpt2-xl_mcf_N_2_S_1_I_2", made, compat=False)
    assert path.name == "Group_MEMIT_gpt2-xl_mcf_N_2_S_1_I_2.csv"
    assert path.read_bytes().decode() == HEADER + (
        "0,0.0,0.0,0.1,0.25,,0.75,,0.0,60.0,900.0,,,,\n"
        "1,1.0,1.0,0.5,0.0,0.5,1.0,0.6,0.0,62.0,900.0,4.5,1.25,3.5,2.25\n"
        "2,1.0,1.0,0.5,0.0,,,,,,4.5,,,2.0,\n"
    )
    made["hard"] = ENTRIES[:1]
    both = summary.write_csv(tmp_path, "x", made, compat=True)
    assert [path.name for path in both] == ["Group_x.csv", "GroupHard_x.csv"]
    assert both[1].read_bytes().decode() == HEADER + (
        "0,0.0,0.0,0.1,0.25,,0.75,,0.375,60.0,900.0,,,,\n"  # zeros left out of the score
        "1,1.0,1.0,0.5,0.0,0.5,1.0,0.6,1.0,62.0,900.0,,1.25,3.5,2.25\n"
    )


def test_batches_are_summed_up(tmp_path: Path) -> None:
    """What is said of the unedited model is of all facts, as step 0 of the run, not of the first batch's alone."""
    before, after = measured(0.0, 0.5, 20.0, unedited=True), measured(1.0, 0.75, 21.0)
    parts = [evaluation | {"facts": evaluation["facts"][:1]} for evaluation in (before, after)]
    results.write(tmp_path, 1, FACTS[:1], *parts, iteration(1, 2.0), 1.0, set())
    assert not summary.batched(summary.write(tmp_path, 1, False))
    results.write(tmp_path, 2, FACTS, before, after, iteration(2, 2.0, 4.0), 1.0, set())
    made = summary.write(tmp_path, 2, compat=False)
    assert made["facts"] == [1, 2]
    assert summary.batched(made)
    unedited, first, _ = [
        dict(zip(summary.COLUMNS, cells, strict=True)) for cells in summary.rows(made["all"], False, True)
    ]
    assert unedited["Efficacy", "acc"] == 0.25
    assert (unedited["Perplexity", "init"], first["Perplexity", "init"]) == (12.0, 11.0)
    assert plots.spreads(made["all"], True) == [12.0, 4.0, 6.0]
    (path,) = summary.write_csv(tmp_path, "x", made, False)
    assert path.read_text().splitlines()[2].split(",")[1] == "0.25"


def test_pandas_reads_it(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for path in summary.write_csv(folder, "x", summary.write(folder, 2, False), False):
        table = pandas.read_csv(path, header=[0, 1], index_col=0)
        assert list(table.index) == [0, 1, 2]
        assert tuple(table.columns) == summary.COLUMNS
        assert tuple(table.columns.names) == summary.LEVELS
        assert table["Perplexity", "final"].tolist()[1:] == ([3.0, 1.25] if "Hard" not in path.name else [2.0, 1.0])


def test_published_results_are_summed_up(tmp_path: Path) -> None:
    """A published run has no `spread_ppl` and no me_ppl.json; a published SPREAD run has another name for it."""
    for number, init in ((1, 50.0), (2, 5.0)):
        post = {"rewrite_acc": [1.0], "rewrite_success": [1], "init_ppl": init, "final_ppl": 2.0, "rewrite_ppl": 3.0}
        post |= {"locality": {"neighborhood_output": [[1]], "neighborhood_acc": [1], "neighborhood_success": [0]}}
        record = {"case_id": 0, "pre": {"rewrite_acc": [0.0], "locality": {}, "portability": {}}, "post": post}
        results.results_file(tmp_path, number).write_text(json.dumps([record]))
    made = summary.write(tmp_path, results.count(tmp_path), compat=True)
    assert plots.spreads(made["all"], False) == [50.0, 5.0, None]  # SPREAD is what the next one began with
    assert made["all"][0]["m_ppl"] is None
    (path,) = summary.write_csv(tmp_path, "x", made, compat=True)
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert [line[10] for line in lines[2:]] == ["50.0", "50.0", "5.0"]  # an iteration's init is its own
    assert [line[7] for line in lines[2:]] == ["", "", ""]  # no paraphrase was asked, there is no score
    for entry in made["all"]:
        entry["post"]["init_ppl_verify"] = 7.0
    assert plots.spreads(made["all"], False) == [50.0, 7.0, 7.0]


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"results_3\.json: cannot be read \(No such file"):
        summary.write(folder, 3, compat=False)
    (folder / "results_2.json").write_text("[{")
    with pytest.raises(InputError, match=r"results_2\.json: line 1: broken JSON"):
        summary.write(folder, 2, compat=False)
    (folder / "results_2.json").write_text('[{"pre": {}}]')
    with pytest.raises(InputError, match="record 0: expected an object with `pre` and `post`"):
        summary.write(folder, 2, compat=False)
    assert not (folder / "summary.json").exists()  # nothing half done


@pytest.mark.parametrize("hard", [False, True])
def test_picture(tmp_path: Path, hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), saved(self, *a, **k)))
    facts = [2, 2] if hard else [1, 2]
    plots.draw({"all": ENTRIES, "hard": ENTRIES if hard else None, "facts": facts}, tmp_path / "summary.png", "MEMIT")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "summary.svg").read_text()
    panels = drawn[0].axes
    assert drawn[0].get_suptitle() == "MEMIT"
    assert len(panels) == (9 if hard else 5)
    assert [panel.get_title() for panel in panels].count("perplexity of plain texts") == 1  # which have no hard cases
    assert {panel.get_xlabel() for panel in panels} == {"iteration" if hard else "batch"}
    assert [panel.get_title() for panel in panels[:3]] == ["efficacy", "paraphrases", "specificity"]
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[3].lines}
    assert lines.keys() == {"SPREAD", "OPTIMIZATION"}
    success, acc = panels[0].lines  # where they are the same, both are seen
    assert success.get_linewidth() > 2 * acc.get_linewidth()
    assert success.get_markersize() > 2 * acc.get_markersize()
    assert success.get_markerfacecolor() == "none"
    assert lines["SPREAD"] == [900.0 if hard else 4.5, 4.5, pytest.approx(math.nan, nan_ok=True)]
    assert lines["OPTIMIZATION"] == [
        pytest.approx(math.nan, nan_ok=True),
        1.25,
        pytest.approx(math.nan, nan_ok=True),
    ]
    assert list(panels[0].lines[0].get_ydata()) == [0.0, 1.0, 1.0]


def test_no_picture_without_matplotlib_or_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no iteration"):
        plots.draw({"all": [], "hard": None, "facts": []}, tmp_path / "a.png", "")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"matplotlib is not installed; pip install 'rewire\[plot\]'"):
        plots.draw({"all": ENTRIES, "hard": None, "facts": [2, 2]}, tmp_path / "a.png", "")
    assert not list(tmp_path.iterdir())
