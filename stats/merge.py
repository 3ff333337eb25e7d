"""Second moments of separately collected shards, added up."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError
from .convert import made_now, numbers_of, refuse_existing
from .moments import Moment
from .names import file_name, layers_in, parse_name
from .store import read, read_header, read_sidecar, write

log = logging.getLogger(__name__)

AGREE = ("fingerprint", "tokenizer", "dtype", "max_length")  # what the keys depend on, besides the text
_OF_PART = ("corpus", "corpus_digest", "seed", "shard", "tokens", "documents", "digest")


@dataclass(frozen=True)
class _File:
    path: Path
    about: dict[str, Any]
    parts: list[dict[str, Any]]


def merge(
    folders: Sequence[Path], out: Path, *, model: str = "", progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Adds the moments in several folders, layer by layer, in float64; returns the files, which are ours.

    folders: each with one file for each of the same layers
    out: a folder; made where it is not there
    model: the name of the model that all are of; needed only where a sidecar does not say by its fingerprint
    progress: called after each layer with (layers done, layers in all)

    The sidecar lists its `parts`. Raises `InputError` where layers, widths or what their keys depend on differ, where
    two hold the same documents, where it is not known that they are of one model, or where a file is there already.
    """
    if len(folders) < 2:
        raise InputError(f"{len(folders)} folder to merge; expected at least two")
    layers = _layers(folders)
    files = {layer: [_described(path) for path in paths] for layer, paths in layers.items()}
    common = {layer: _common(group, model) for layer, group in files.items()}
    for group in files.values():
        _refuse_overlap([(file.path, part) for file in group for part in file.parts])
    targets = {layer: out / _target_name(layer, group, common[layer]) for layer, group in files.items()}
    refuse_existing(list(targets.values()))
    for done, (layer, group) in enumerate(files.items(), 1):
        moment = _add(group)
        out.mkdir(parents=True, exist_ok=True)
        of_layer = {"layer": layer, **numbers_of(moment), "documents": moment.documents}
        parts = [part for file in group for part in file.parts]
        write(targets[layer], moment, common[layer] | of_layer | {"parts": parts} | made_now())
        if progress is not None:
            progress(done, len(files))
    return list(targets.values())


def _layers(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Layer -> its file in each folder."""
    found = [layers_in(folder) for folder in folders]
    for folder, layers in zip(folders, found, strict=True):
        if layers.keys() != found[0].keys():
            odd = sorted(layers.keys() ^ found[0].keys())[0]
            has, lacks = (folder, folders[0]) if odd in layers else (folders[0], folder)
            raise InputError(f"{lacks}: no statistics for {odd}, which {has} has; expected the same layers")
        for layer, paths in layers.items():
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                raise InputError(f"{folder}: several statistics for {layer}: {names}; expected one: name its folder")
    return {layer: [layers[layer][0] for layers in found] for layer in found[0]}


def _described(path: Path) -> _File:
    header, name = read_header(path), parse_name(path)
    assert name is not None
    about = {"dtype": name.dtype, "max_length": name.max_length} | (read_sidecar(path) or {})
    counted = {"tokens": header.tokens, "documents": header.documents}
    itself = {key: (about | counted)[key] for key in _OF_PART if key in about | counted}
    return _File(path, about | {"width": header.width} | counted, about.get("parts") or [itself])


def _common(group: list[_File], model: str) -> dict[str, Any]:
    """What holds for all files of a layer, for the merged sidecar."""
    first = group[0]
    for file in group:
        if "fingerprint" not in file.about and not model:
            raise InputError(
                f"{file.path}: nothing beside it says which model it is of; say the name of the model that all of them "
                "are of (--model)"
            )
        if "fingerprint" not in file.about and file.about.get("model", model) != model:
            raise InputError(f"{file.path}: of {file.about['model']} by its sidecar, {model} was said")
        for key in (*AGREE, "width"):
            found, expected = (each.about.get(key, "unsaid") for each in (file, first))
            if "unsaid" not in (found, expected) and found != expected:
                raise InputError(
                    f"{file.path}: {key} {found} found, {expected} in {first.path}; expected moments of one model's "
                    "keys, collected in one way"
                )
    common: dict[str, Any] = {"model": model or first.about.get("model")}
    common |= {key: first.about[key] for key in AGREE if all(key in file.about for file in group)}
    corpora = [part.get("corpus") or "unknown" for file in group for part in file.parts]
    return common | {"corpus": "+".join(dict.fromkeys(corpora))}


def _refuse_overlap(parts: list[tuple[Path, dict[str, Any]]]) -> None:
    for (path, a), (other, b) in combinations(parts, 2):
        one_order = _of_one_order(a, b)
        if _same(a, b, "digest") or (one_order and _meet(a.get("shard") or [0, 1], b.get("shard") or [0, 1])):
            raise InputError(
                f"{other}: holds documents that {path} holds too ({_said(b)}; {_said(a)}); expected shards of one "
                "order, or other text"
            )
        if _same(a, b, "corpus_digest") and not one_order:
            log.warning("%s and %s: drawn from one corpus: some documents may count twice", path, other)


def _same(a: dict[str, Any], b: dict[str, Any], key: str) -> bool:
    return a.get(key) is not None and a[key] == b.get(key)


def _of_one_order(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return _same(a, b, "corpus_digest") and a.get("seed") == b.get("seed")


def _meet(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether some number is i mod n for both shards (i, n): by the Chinese remainder theorem."""
    return (a[0] - b[0]) % math.gcd(a[1], b[1]) == 0


def _said(part: dict[str, Any]) -> str:
    known = (f"{key} {json.dumps(part[key])}" for key in ("corpus", "seed", "shard", "digest") if key in part)
    return ", ".join(known)


def _target_name(layer: str, group: list[_File], common: dict[str, Any]) -> str:
    counts = [file.about["documents"] for file in group]
    documents = None if None in counts else sum(counts)
    return file_name(layer, common["dtype"], documents, common["max_length"])


def _add(group: list[_File]) -> Moment:
    first, *rest = (file.path for file in group)
    moment = read(first)
    total, tokens, documents, seen = moment.triangle.clone(), moment.count, moment.documents, {moment.digest: first}
    for path in rest:
        moment = read(path)
        if moment.digest in seen:
            raise InputError(f"{path}: the same numbers as in {seen[moment.digest]}; expected other text")
        seen[moment.digest] = path
        total += moment.triangle
        tokens += moment.count
        documents = None if documents is None or moment.documents is None else documents + moment.documents
    return Moment(total, tokens, documents)
