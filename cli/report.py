"""`rewire report`: what an edit, an evaluation or an experiment did, as a page to read."""

from pathlib import Path
from typing import Annotated

import typer

from . import common


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of an edit, an evaluation, or one run of an experiment.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page; default: report.html in DIR.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Write one HTML page: numbers before and after, pictures, examples with reasons, and a table of all facts.

    Example: rewire report edits/first
    """
    from ..engine.page import write

    path, kind = write(folder, out)
    if json:
        common.print_json({"out": str(path), "kind": kind})
        return
    print(f"written to {path}: open it in any browser, it needs nothing else")
