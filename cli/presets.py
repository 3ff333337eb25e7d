"""`rewire presets`: the shipped hyper-parameters, where they are from, and where sources differ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from ..kernels.errors import InputError
from . import common

if TYPE_CHECKING:
    from ..engine.presets import Preset

LONG = 20  # characters: a longer value that all sources have takes no column


def presets(
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="One method only.")] = None,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="One model, by any of its names: its values, by source.")
    ] = None,
    conflicts: Annotated[bool, typer.Option("--conflicts", help="Only the values in which sources differ.")] = False,
    json: common.Json = False,
) -> None:
    """List the shipped presets; of one model, show all values side by side.

    Example: rewire presets memit llama-3-8b
    """
    from ..engine import presets as shipped
    from ..engine.editors.names import METHODS, known_method

    names = METHODS if method is None else (known_method(method),)
    found = {name: shipped.shipped_presets(name, model) for name in names}
    if model is not None and not found[names[0]]:
        models = {preset.model: None for preset in shipped.shipped_presets(names[0])}
        raise InputError(f"no preset of {names[0]} for {model}; there are presets for {', '.join(models)}")
    if conflicts:
        differing = {name: _by_model(presets, shipped.conflicts) for name, presets in found.items()}
        common.print_json(_conflicts_json(differing)) if json else _print_conflicts(differing)
    elif json:
        common.print_json({name: {p.name: _json(p) for p in presets} for name, presets in found.items()})
    elif model is None:
        _print_list(found)
    else:
        _print_values(found[names[0]], set(shipped.conflicts(found[names[0]])))


def _json(preset: "Preset") -> dict[str, Any]:
    about = {"model": preset.model, "default": preset.default, "sources": dict(preset.sources), "file": preset.place}
    return {**about, **preset.values}


def _by_model(presets: Sequence["Preset"], differ: Any) -> dict[str, dict[str, Any]]:
    models = {preset.model: [other for other in presets if other.model == preset.model] for preset in presets}
    return {model: keys for model, own in models.items() if (keys := differ(own))}


def _conflicts_json(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    def said(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "value": value,
                "sources": [name for preset in who for name in preset.short],
                "default": any(preset.default for preset in who),
            }
            for value, who in values
        ]

    return {
        method: {model: {key: said(values) for key, values in keys.items()} for model, keys in models.items()}
        for method, models in found.items()
    }


def _print_conflicts(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    table = Table("method", "model", "hyper-parameter", "who says what (the default's value first)")
    for method, models in found.items():
        for model, keys in models.items():
            for key, values in keys.items():
                said = "; ".join(
                    f"{value}: {', '.join(name for preset in who for name in preset.short)}" for value, who in values
                )
                table.add_row(method, model, key, escape(said))
    common.console().print(table)


def _print_list(found: Mapping[str, Sequence["Preset"]]) -> None:
    table = Table(
        "method",
        Column("preset", no_wrap=True),
        "default",
        "layers",
        Column("sources with these values", overflow="fold"),
    )
    for method, presets in found.items():
        for preset in presets:
            sources = ", ".join(name or text for name, text in preset.sources.items())
            default = "default" if preset.default else ""
            table.add_row(method, preset.name, default, escape(str(preset.values.get("layers"))), escape(sources))
    common.console().print(table)
    print("All values, with their sources: rewire presets METHOD MODEL; where sources differ: --conflicts")


def _print_values(presets: Sequence["Preset"], differing: set[str]) -> None:
    """One column a file; the keys in which they differ have a star; long values that all have stand below."""
    heads = ["\n".join([*preset.short, *(["(default)"] if preset.default else [])]) for preset in presets]
    columns = (Column(escape(head), overflow="fold") for head in heads)
    table = Table(Column(no_wrap=True), *columns, title=escape(presets[0].model), title_justify="left")
    keys = list(dict.fromkeys(key for preset in presets for key in preset.values))
    below = []
    for key in keys:
        texts = [str(preset.values.get(key, "-")) for preset in presets]
        if len(texts) > 1 and len(set(texts)) == 1 and len(texts[0]) > LONG:
            below.append(f"{key}, of all: {texts[0]}")
        else:
            table.add_row(f"* {key}" if key in differing else f"  {key}", *map(escape, texts))
    console = common.console()
    console.print(table)
    for line in below:
        print(line)
    for preset in presets:
        for name, text in preset.sources.items():
            console.print(Text(f"{name or 'ours'}: {text}"))
    if differing:
        print("*: these differ between the sources")
    if any(key not in preset.values for key in keys for preset in presets):
        print("-: not given there; Rewire's own default is taken")
