"""`rewire inspect`: what Rewire finds in a model."""

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..kernels.errors import InputError
from . import common


def inspect(
    model: common.ModelName,
    device: common.Device = "cpu",
    dtype: common.Dtype = "checkpoint",
    quantize: common.Quantize = None,
    json: common.Json = False,
) -> None:
    """Show where the edited parts of a model are, whether it can be edited, and with which preset.

    Example: rewire inspect gpt2-xl
    """
    from ..engine.editors.names import METHODS
    from ..engine.editors.registry import find_method
    from ..engine.hparams import load_hparams
    from ..engine.model import editable
    from ..engine.suffix import verify

    loaded = common.load(model, dtype, device, quantize)
    found: dict[str, object] = asdict(loaded.anatomy)
    found["edited_weight"] = loaded.anatomy.weight_name(0).replace(".0.", ".{}.")
    found["parameters"] = loaded.hf.num_parameters()  # type: ignore[operator]  # 4 bits are packed
    found["dtype"] = str(next(loaded.hf.parameters()).dtype).removeprefix("torch.")
    found["quantized"] = loaded.quantized
    found["max_length"] = loaded.max_length
    found["fingerprint"] = loaded.fingerprint
    refused = None
    try:
        editable(loaded)
    except InputError as error:
        refused = str(error)
    last = set()
    for name in METHODS:
        kind = find_method(name).hparams
        try:
            hparams, source = load_hparams(kind, name, loaded.name, loaded.anatomy)
        except InputError as error:
            found[f"preset for {name}"] = str(error)
            continue
        found[f"preset for {name}"] = f"{source}, layers {list(hparams.layers)}"
        last.add(hparams.layers[-1])
    if refused is None:
        for layer in sorted(last):
            verify(loaded, layer)
    found["checked"] = refused or "replayed blocks give the model's own logits"
    if json:
        common.print_json(found)
        return
    table = Table(show_header=False, title=escape(model), title_justify="left")
    for key, value in found.items():
        table.add_row(key.replace("_", " "), escape(str(value)))
    Console().print(table)
