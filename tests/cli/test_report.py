"""`rewire report` on what `rewire edit` wrote."""

from pathlib import Path

from commands import Command, complaint


def test_an_edit_becomes_a_page(edit: Command, run: Command, tmp_path: Path) -> None:
    assert edit().status == 0
    folder = tmp_path / "out"
    done = run("report", folder, "--json")
    assert done.json == {"out": str(folder / "report.html"), "kind": "edit"}
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>3 facts edited into demo</h1>" in text
    assert "Zaenen Firott" in text  # the demo's first fact
    named = run("report", folder, "--out", tmp_path / "other.html")
    assert (named.status, named.out.count("\n")) == (0, 1)
    assert str(tmp_path / "other.html") in named.out
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == text


def test_a_folder_of_something_else(run: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    said = complaint(run("report", tmp_path))
    assert said.startswith(f"{tmp_path}: notes.txt found, expected the folder of an edit (with report.json), ")
    assert "no such folder" in complaint(run("report", tmp_path / "missing"))
