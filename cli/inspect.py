"""`rewire inspect`: what Rewire finds in a model."""

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import common


def inspect(
    model: common.ModelName,
    device: common.Device = "cpu",
    dtype: common.Dtype = "checkpoint",
    json: common.Json = False,
) -> None:
    """Show where the edited parts of a model are, whether it can be edited, and with which preset.

    Example: rewire inspect gpt2-xl
    """
    from ..engine.editors.registry import find_method, method_names
    from ..engine.hparams import load_hparams
    from ..engine.suffix import verify

    loaded = common.load(model, dtype, device)
    found: dict[str, object] = asdict(loaded.anatomy)
    found["edited_weight"] = loaded.anatomy.weight_name(0).replace(".0.", ".{}.")
    found["parameters"] = sum(p.numel() for p in loaded.hf.parameters())
    found["dtype"] = str(next(loaded.hf.parameters()).dtype).removeprefix("torch.")
    found["max_length"] = loaded.max_length
    found["fingerprint"] = loaded.fingerprint
    for name in method_names():
        kind = find_method(name).hparams
        hparams, source = load_hparams(kind, name, loaded.name, loaded.anatomy)
        found[f"preset for {name}"] = f"{source}, layers {list(hparams.layers)}"
        verify(loaded, hparams.layers[-1])
    found["checked"] = "replayed blocks give the model's own logits"
    if json:
        common.print_json(found)
        return
    table = Table(show_header=False, title=escape(model), title_justify="left")
    for key, value in found.items():
        table.add_row(key.replace("_", " "), escape(str(value)))
    Console().print(table)
