"""The texts that generated ones are compared with: `attribute_snippets.json` of the CounterFact release."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ..facts import read_text


def read_references(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """(relation, object), both by id -> texts about things that have this object in this relation.

    The published file is a list of {"relation_id", "target_id", "samples": [{"name", "text"}]}; the same as a mapping
    {relation_id: {target_id: samples}} is read, too.
    Raises `InputError` for a file that is neither.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: broken JSON ({error.msg})") from None
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    try:
        for relation, target, samples in _entries(content):
            texts = tuple(sample["text"] for sample in samples)
            found[relation, target] = found.get((relation, target), ()) + texts
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not attribute_snippets.json ({error!r}), expected a list of relation_id, target_id and samples"
        ) from None
    return found


def _entries(content: Any) -> list[tuple[str, str, Any]]:
    if isinstance(content, Mapping):
        return [(relation, target, samples) for relation, of in content.items() for target, samples in of.items()]
    return [(entry["relation_id"], entry["target_id"], entry["samples"]) for entry in content]
