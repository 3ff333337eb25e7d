"""From the ecosystem's npz to our files and back, in the folders where others look for them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from ..kernels.errors import InputError
from .moments import Moment
from .names import SCHEMES, SUFFIXES, ecosystem_path, layers_in, parse_name
from .store import read, read_sidecar, write

Progress = Callable[[int, int], None]


def convert(
    source: Path,
    out: Path,
    kind: str,
    *,
    model: str = "",
    fingerprint: str | None = None,
    scheme: str | None = None,
    dataset: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes what is in `source` as the other kind; returns the files. The source stays as it is.

    source: one file, or a folder in any layout that is read
    out: a folder; made where it is not there
    kind: "safetensors" (ours, float64) or "npz" (the ecosystem's, which rounds to float32)
    model, fingerprint: for the sidecar where the source has none that says them
    scheme: None: all files straight into `out`, called as they were; "last" or "whole": of npz, as published code looks
        for them under `out` (`ecosystem_path`), with the model's and the data set's name given, or as the source says
    progress: called after each file with (files done, files in all)

    A sidecar is always written: the source's, or what is known. Raises `InputError` for what cannot be read, and before
    anything is written where a file is there already or two would get the same name.
    """
    if f".{kind}" not in SUFFIXES or scheme not in (None, *SCHEMES):
        raise InputError(
            f"convert to {kind!r} in scheme {scheme!r}; expected safetensors or npz, and none, last or whole"
        )
    if scheme and kind != "npz":
        raise InputError(f"scheme {scheme!r} is a place for npz, where published code looks for them; convert to npz")
    jobs: list[tuple[Path, Path, dict[str, Any]]] = []
    for paths in layers_in(source, model).values():
        for path in paths:
            about = _described(path, model, fingerprint)
            if scheme:
                target = _published_path(path, about, out, model, dataset, scheme)
            else:
                target = out / f"{path.name.removesuffix(path.suffix)}.{kind}"
            jobs.append((path, target, about))
    refuse_existing([target for _, target, _ in jobs])
    for done, (path, target, about) in enumerate(jobs, 1):
        moment = read(path)
        if kind == "npz":  # of what a reader finds there
            moment = replace(moment, triangle=moment.triangle.float().double())
        documents = about.get("documents") if moment.documents is None else moment.documents
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, moment, about | numbers_of(moment) | {"documents": documents, "converted_from": path.name})
        if progress is not None:
            progress(done, len(jobs))
    return [target for _, target, _ in jobs]


def _described(path: Path, model: str, fingerprint: str | None) -> dict[str, Any]:
    """What the source's sidecar says, with what the caller adds to it."""
    about = read_sidecar(path)
    if about is None:
        name = parse_name(path)
        assert name is not None  # it was listed by its name
        about = {"layer": name.layer} | made_now()
    if fingerprint is not None and about.get("fingerprint", fingerprint) != fingerprint:
        raise InputError(
            f"{path}: of a model with weights {about['fingerprint']} by its sidecar, {fingerprint} was given; expected "
            "the same"
        )
    return {key: value for key, value in (("model", model), ("fingerprint", fingerprint)) if value} | about


def _published_path(path: Path, about: dict[str, Any], out: Path, model: str, dataset: str | None, scheme: str) -> Path:
    name = parse_name(path)
    assert name is not None
    folder = path.parent.name
    model = model or about.get("model", "")
    dataset = dataset or about.get("corpus") or (folder.removesuffix("_stats") if folder.endswith("_stats") else "")
    if not model or not dataset:
        missing = "model" if not model else "data set"
        raise InputError(
            f"{path}: the name of its {missing} is not known; say it: {{model}}/{{dataset}}_stats/ needs it"
        )
    return ecosystem_path(out, model, dataset, name.layer, name.documents, scheme)


def refuse_existing(targets: list[Path]) -> None:
    """Raises `InputError` where a target or its sidecar is there, or two targets are one."""
    for target in targets:
        if targets.count(target) > 1:
            raise InputError(f"{target}: several of the sources would be written there; convert them one by one")
        for path in (target, target.with_suffix(".json")):
            if path.exists():
                raise InputError(f"{path}: is there already and is not overwritten; name another folder, or remove it")


def numbers_of(moment: Moment) -> dict[str, Any]:
    """What a sidecar says of the numbers themselves."""
    return {"width": moment.width, "tokens": moment.count, "digest": moment.digest}


def made_now() -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"rewire": __version__, "date": now}
