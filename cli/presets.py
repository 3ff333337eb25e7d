"""`rewire presets`: the shipped hyper-parameters."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import common


def presets(
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="One method only.")] = None,
    json: common.Json = False,
) -> None:
    """List the shipped presets.

    Example: rewire presets memit
    """
    from ..engine.editors.registry import find_method, method_names
    from ..engine.hparams import preset_files, read_yaml

    names = method_names() if method is None else [find_method(method).name]
    found = {name: {preset: read_yaml(path) for preset, path in preset_files(name).items()} for name in names}
    if json:
        common.print_json(found)
        return
    table = Table("method", "preset", "layers", "source")
    for name, files in found.items():
        for preset, content in files.items():
            table.add_row(name, preset, str(content.get("layers")), escape(str(content.get("source", ""))))
    Console().print(table)
