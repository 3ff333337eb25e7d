"""What is printed of a file of facts, and the exit status."""

import json
from pathlib import Path

import pytest

from rewire.cli.validate import show
from rewire.kernels.errors import InputError

FACTS = [
    {"subject": "Paris", "prompt": "{} lies in", "target_new": " Italy", "target_true": "France"},
    {"subject": "Bonn", "prompt": "{} lies [bold]in", "target_new": "Italy "},
    {"subject": "Bonn", "prompt": "{} lies [bold]in", "target_new": "Spain"},
]
BROKEN = {"subject": "Rome", "prompt": "Bonn lies in", "target_new": "Spain"}


def written(path: Path, *records: object) -> Path:
    path = path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(autouse=True)
def as_wide_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No width of the shell that the tests run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


def test_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, *FACTS)
    assert show(path) == 0, "a warning is no error"
    said = capsys.readouterr().out
    assert "spaces around the object" in said
    assert "line 1: target_new ' Italy'" in said
    assert "'Bonn lies [bold]in': 'Spain', but 'Italy' in line 2" in said, "no markup"
    assert "no target_true: success" in said
    assert f"{path}: 3 records, 3 can be edited, 0 with neither error nor warning" in " ".join(said.split())
    assert "--json names all" not in said
    assert show(written(tmp_path, *FACTS, BROKEN)) == 2
    said = capsys.readouterr().out
    assert "line 4: subject 'Rome' does not occur" in said
    assert "4 records, 3 can be edited" in said


def test_more_than_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spaced = [{"subject": f"Ulm{i}", "prompt": "{} lies in", "target_new": " Italy"} for i in range(5)]
    assert show(written(tmp_path, *spaced)) == 0
    said = capsys.readouterr().out
    assert ("line 3: " in said, "line 4: " in said) == (True, False)
    assert "--json names all of them" in said


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, *FACTS, BROKEN)
    assert show(path, json=True) == 2
    said = json.loads(capsys.readouterr().out)
    assert {key: said[key] for key in ("file", "records", "facts", "errors", "clean")} == {
        "file": str(path), "records": 4, "facts": 3, "errors": 1, "clean": 0,
    }  # fmt: skip
    assert [(found["severity"], found["where"]) for found in said["problems"]] == [
        ("warning", "line 1"), ("warning", "line 2"), ("warning", "line 3"), ("error", "line 4"),
    ]  # fmt: skip
    severities = [group["severity"] for group in said["groups"]]
    assert severities == ["error", "warning", "warning", *["missing"] * 4]
    assert said["groups"][0]["examples"] == [said["problems"][-1]]
    assert said["groups"][1]["count"] == 2


def test_the_convention_of_zsre(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared / "data" / "zsre_subset_0.json"
    assert show(path, "zsre") == 0
    assert show(path, "zsre-alt") == 2
    assert "alt is empty" in capsys.readouterr().out
    with pytest.raises(InputError, match="--convention"):
        show(path)
