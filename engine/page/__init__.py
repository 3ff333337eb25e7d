"""One HTML file that says what an edit, an evaluation or an experiment did; nothing outside the file is needed.

`write(folder)` reads what lies there (`folder.kind_of` says what); `edit`, `experiment` or `evaluation` makes a
`Content` of it, and `template.html` shows that. The same input gives the same bytes.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...stats.cache import write_whole
from . import edit, evaluation, experiment, plots
from .content import FAILED, PARTLY, UNKNOWN, WORKED, Column, Content, Row, number, percent
from .folder import kind_of

HERE = Path(__file__).parent
READERS = {"edit": edit.read, "experiment": experiment.read, "evaluation": evaluation.read, "run": evaluation.read}
STATIC_ROWS = 50  # of the table, for readers without scripts; with one they are its pages
WELL, BADLY = 3, 9  # examples of what worked and of what did not
OUTCOMES = {WORKED: "✓", PARTLY: "◐", FAILED: "✗", UNKNOWN: "·"}  # in words and signs, never by colour alone


def write(folder: str | Path, out: str | Path | None = None) -> tuple[Path, str]:
    """Writes the page of a folder; returns (its path, the folder's kind: edit, experiment, evaluation or run).

    out: the file; None: `report.html` in the folder
    Raises `InputError`: the folder is none of these, or a file in it is broken.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    page = render(READERS[kind](folder))
    path = Path(out) if out is not None else folder / "report.html"
    # a model may say half a surrogate pair, which is no UTF-8
    write_whole(path, lambda file: file.write(page.encode("utf-8", "replace")))
    return path, kind


def render(content: Content) -> str:
    """The whole page. All texts of the content are escaped, whatever they hold."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "number": number, "shown": _shown}
    columns = content.columns
    rows = [_cells(row, columns) for row in content.rows]
    pictures = []
    drawn = plots.available()
    for place, picture in enumerate(content.pictures if drawn else ()):
        pictures.append((picture, Markup(plots.draw(picture, f"p{place}")), plots.alternative(picture)))
    script = (HERE / "table.js").read_text(encoding="utf-8")
    return environment.get_template("template.html").render(
        content=content,
        columns=columns,
        main=[(place, column) for place, column in enumerate(columns) if column.main],
        rows=rows[:STATIC_ROWS],
        outcomes=_outcomes(content.rows),
        lead=_lead(content.rows),
        signs=OUTCOMES,
        examples=_examples(content.rows),
        reasons=_frequent(label for row in content.rows for label in {reason.label for reason in row.reasons}),
        pictures=pictures,
        no_pictures=None if drawn or not content.pictures else plots.MISSING,
        data=Markup(_data(columns, rows)),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        page=STATIC_ROWS,
    )


def _cells(row: Row, columns: Sequence[Column]) -> list[Any]:
    own = {"outcome": row.outcome, "why": "; ".join(reason.label for reason in row.reasons)}
    return [own.get(column.key, row.cells.get(column.key)) for column in columns]


def _outcomes(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """(outcome, facts) of those that there are, the good ones first."""
    counts = Counter(row.outcome for row in rows)
    return [(outcome, counts[outcome]) for outcome in OUTCOMES if counts[outcome]]


def _lead(rows: Sequence[Row]) -> str | None:
    """The result in a sentence or two; None where nothing was measured."""
    counts = Counter(row.outcome for row in rows)
    measured = len(rows) - counts[UNKNOWN]
    if not measured:
        return None
    right = counts[WORKED] + counts[PARTLY]
    said = f"On its own prompt the new object is right for {right:,} of {measured:,} facts"
    visible = [label for row in rows for label in {reason.label for reason in row.reasons if reason.makes}]
    troubles = [f"{label} ({count:,})" for label, count in _frequent(visible)[:3]]
    return f"{said}. Most frequent trouble: {'; '.join(troubles)}." if troubles else f"{said}, with nothing amiss."


def _frequent(labels: Iterable[str]) -> list[tuple[str, int]]:
    """(label, how often), the most frequent ones first; of the same number by name, so that no order is chance."""
    return sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))


def _examples(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(heading, facts): what worked, from all over the list; what did not, each reason before any comes twice."""
    well = [row for row in rows if row.outcome == WORKED]
    picked = [well[place * len(well) // WELL] for place in range(WELL)] if len(well) > WELL else well
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        if row.outcome in (PARTLY, FAILED):
            by_reason.setdefault(row.reasons[0].label, []).append(row)
    badly: list[Row] = []
    depth = 0
    while len(badly) < BADLY and any(len(group) > depth for group in by_reason.values()):
        badly += [group[depth] for group in by_reason.values() if len(group) > depth]
        depth += 1
    groups = [("Some that worked", picked), ("Some that did not, and why", badly[:BADLY])]
    return [(heading, group) for heading, group in groups if group]


def _shown(value: Any, kind: str) -> str:
    """A cell of the table, as the script shows it, too."""
    if value is None:
        return ""
    if kind == "rate":
        return f"{100 * value:.0f} %"
    return number(value) if kind == "number" else str(value)


def _data(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> str:
    """JSON that cannot end the element it stands in."""
    content = {"columns": [[c.key, c.label, c.kind, c.main] for c in columns], "signs": OUTCOMES, "rows": rows}
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
