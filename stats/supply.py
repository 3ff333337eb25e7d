"""Second moments for an edit: from the user's folder, else from the cache, else collected and kept there."""

import hashlib
import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from ..kernels.errors import InputError
from .collect import Encode, Progress, Run, collect, default_tokens
from .corpora import Corpus
from .moments import Moment
from .store import file_name, find, list_layer, read_npz, read_sidecar, write

log = logging.getLogger(__name__)

# what a tokenizer makes of this tells apart what the weights' fingerprint cannot: BOS or none, normalisation
_PROBE = "The Eiffel Tower is in Paris.\n\nÉtienne  met 李 in 1987, didn't he?"


def cache_root() -> Path:
    """`$REWIRE_CACHE`, or ~/.cache/rewire."""
    return Path(os.environ.get("REWIRE_CACHE") or Path.home() / ".cache" / "rewire")


def moments_for(
    widths: dict[str, int],
    *,
    model: str,
    fingerprint: str,
    dtype: str,
    run: Run,
    encode: Encode,
    corpus: Corpus | None,
    max_length: int | None,
    stats: str | Path | None = None,
    n_samples: int | None = None,
    tokens: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> dict[str, Moment]:
    """The second moments of the layers in `widths` (name -> d_in), in that order; `source` of each says where from.

    model, fingerprint: its name and that of its weights
    dtype: what the model runs in ("bfloat16"); keys of another dtype are another request
    stats: the user's folder: read, nothing else is looked at, nothing is written there
    corpus: what to collect over where `stats` is None and the cache has not got it
    run, encode, max_length, n_samples, tokens, batch_tokens, progress: as in `collect.collect`

    Raises `InputError` for what is wrong with the folder, the corpus or the keys. A broken file in the cache is
    collected anew; a cache that cannot be written to is logged, and the result stays in memory.
    """
    if stats is not None:
        return {
            layer: read_npz(find(stats, layer, model, n_samples), width, fingerprint) for layer, width in widths.items()
        }
    if corpus is None:
        raise InputError(f"no statistics for {', '.join(widths)}: name a folder that holds them, or a corpus")
    if n_samples is None and tokens is None:
        tokens = default_tokens(widths)
    request = {
        "fingerprint": fingerprint,
        "tokenizer": hashlib.sha256(repr(encode([_PROBE])).encode()).hexdigest()[:12],
        "dtype": dtype,
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "max_length": max_length,
        "asked_documents": n_samples,
        "asked_tokens": tokens,
    }
    folder = cache_root() / "stats" / fingerprint / f"{corpus.name}-{corpus.digest}_stats"
    cached = {layer: _cached(folder, layer, width, request) for layer, width in widths.items()}
    missing = {layer: width for layer, width in widths.items() if cached[layer] is None}
    collected: dict[str, Moment] = {}
    if missing:
        collected = collect(
            run,
            encode,
            corpus,
            missing,
            max_length=max_length,
            n_samples=n_samples,
            tokens=tokens,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        _keep(folder, collected, {"model": model, **request})
    return {layer: cached[layer] or collected[layer] for layer in widths}


def _cached(folder: Path, layer: str, width: int, request: dict[str, Any]) -> Moment | None:
    for path in list_layer(folder, layer):
        try:
            about = read_sidecar(path) or {}
            if all(about.get(field, "unsaid") == value for field, value in request.items()):
                return read_npz(path, width, request["fingerprint"])
        except InputError as error:
            log.warning("%s (in the cache: it is collected anew)", error)
    return None


def _keep(folder: Path, moments: dict[str, Moment], about: dict[str, Any]) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for layer, moment in moments.items():
            assert moment.documents is not None  # `collect` counts them
            of_layer = {
                "layer": layer,
                "width": len(moment.sum),
                "tokens": moment.count,
                "documents": moment.documents,
                "rewire": __version__,
                "date": now,
            }
            name = file_name(layer, about["dtype"], moment.documents, about["max_length"])
            write(folder / name, moment, {**about, **of_layer})
    except OSError as error:
        log.warning("%s: cannot be written to (%s): these statistics are not kept; set REWIRE_CACHE", folder, error)
