"""All operations of this room by name, and the kernels behind them."""

from importlib import import_module

from .dispatch import Operation
from .variants import Variant

# folder -> its operations
FOLDERS = {
    "gram": ("operation",),
    "target_nll": ("operation",),
    "gather_mean": ("gather_operation", "scatter_operation"),
    "spd_solve": ("small_solve",),
    "requantize_add": ("operation", "operation_4bit", "operation_int8"),
    "delta_linear": ("operation", "add_operation"),
}


def operations() -> dict[str, Operation]:
    """Name -> operation."""
    modules = {folder: import_module(f".{folder}", __package__) for folder in FOLDERS}
    found = [getattr(modules[folder], name) for folder, names in FOLDERS.items() for name in names]
    return {operation.name: operation for operation in found}


def variants() -> list[Variant]:
    """Every way in which the Triton kernels are launched, every configuration included. Needs Triton."""
    return [variant for folder in FOLDERS for variant in import_module(f".{folder}.kernel", __package__).variants()]
