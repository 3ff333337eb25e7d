"""The benchmark registry: one file an operation, each with its `SUBJECTS`."""

from importlib import import_module

from ..check import Subject

_FILES = ("gram", "target_nll", "gather_mean", "small_solve", "requantize_add", "delta_linear")


def subjects() -> list[Subject]:
    """All of them, in the order of an edit."""
    return [subject for name in _FILES for subject in import_module(f".{name}", __package__).SUBJECTS]
