"""Which configuration of a kernel is launched: the first of its list, or the one that was fastest on this GPU.

``$REWIRE_TUNED`` names a JSON file, ``{"<name of the GPU>": {"<operation>": {"<key>": {field: value}}}}``, the fields
of a configuration; ``rewire bench gpu`` writes it. Nothing is tuned at run time: the tile fixes the order in which a
sum is added up, so a choice by stopwatch would make two runs of one edit differ.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar

import torch

from .errors import InputError

log = logging.getLogger(__name__)

VARIABLE = "REWIRE_TUNED"
Config = TypeVar("Config")  # a frozen dataclass


def pick(operation: str, key: str, configs: Sequence[Config]) -> Config:
    """The first of ``configs``, unless the table names another of them for this operation and key on the current GPU.

    key: what else decides which is fastest: the kind of load, the width; the kernel names it

    Raises InputError: the file named by $REWIRE_TUNED cannot be read, or is no such table.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return configs[0]
    try:
        written = os.stat(path).st_mtime_ns
    except OSError as error:
        raise InputError(f"{VARIABLE}={path}: {error.strerror}; expected a table of `rewire bench gpu`") from None
    return _named(path, written, device_name(), operation, key, tuple(configs))


def device_name() -> str:
    """How the table calls the current device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@cache  # cheap on every launch; and what is unknown is said once
def _named(path: str, written: int, device: str, operation: str, key: str, configs: tuple[Config, ...]) -> Config:
    entry = _table(path, written).get(device, {}).get(operation, {}).get(key)
    if entry is None:
        return configs[0]
    for config in configs:
        if asdict(config) == entry:  # type: ignore[call-overload]
            return config
    log.warning("%s: %s, %s, %s: this version has no %s; launching its first", path, device, operation, key, entry)
    return configs[0]


@cache
def _table(path: str, written: int) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{VARIABLE}={path}: {error}; expected a table of `rewire bench gpu`") from None
    level = [table]
    for what in ("GPUs", "operations", "keys", "fields"):
        for found in level:
            if not isinstance(found, dict):
                raise InputError(f"{VARIABLE}={path}: found {json.dumps(found)[:60]}; expected an object of {what}")
        level = [inner for found in level for inner in found.values()]
    return table
