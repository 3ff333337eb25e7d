"""`rewire merge`: a delta into its base model, as an ordinary model directory."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from . import common


def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out folder of an edit.")],
    to: Annotated[str, typer.Option(metavar="MODEL", help="The base model that the delta was made on.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    device: common.Device = "cpu",
    dtype: common.Dtype = "checkpoint",
    json: common.Json = False,
) -> None:
    """Write the base model with the delta merged in: a directory that anything can load.

    Example: rewire merge edits/first --to gpt2-xl --out gpt2-xl-edited
    """
    from ..engine.delta import Delta, readable

    whole = common.new_folder(out)
    delta = Delta.load(folder)
    loaded = common.load(to, dtype, device)
    weights = delta.apply(loaded)
    whole.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{whole.name}-", dir=whole.parent))
    try:
        loaded.hf.save_pretrained(temporary)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(temporary)
        for path in (temporary, *temporary.iterdir()):
            readable(path)
        if whole.exists():
            whole.rmdir()  # `new_folder` saw that it is empty
        os.replace(temporary, whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    lost = weights.lost_to_rounding()
    if json:
        common.print_json({"out": str(out), "edits": len(delta.edits), "lost_to_rounding": lost})
        return
    print(f"{common.count(len(delta.edits), 'edit')} merged into {to}, written to {out}")
    worst = max(lost.values(), default=0.0)
    if worst > 0.01:
        print(f"rounding lost up to {100 * worst:.1f} % of a weight's update; try --dtype float32")
