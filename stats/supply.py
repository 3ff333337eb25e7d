"""Second moments for an edit: from the user's folder, else from the cache, else collected and kept there."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from ..kernels.errors import InputError
from .cache import cache_root
from .collect import Budget, Means, Progress, Run, collect_each, default_tokens
from .corpora import Corpus
from .moments import Moment
from .ranks import ALONE, Ranks
from .store import file_name, find, list_layer, read, read_sidecar, write
from .tokens import Encode, TokenRows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What numbers are asked for; with the layer it decides every digit but for rounding. The sidecar's first keys.

    model: its name, which decides nothing; fingerprint: of its weights; tokenizer: digest of what it makes of a probe
    dtype: what the model runs in
    corpus, corpus_digest, seed, shard: the documents and their order; max_length: of each, in tokens
    asked_documents, asked_tokens, tolerance: the budget
    """

    model: str
    fingerprint: str
    tokenizer: str
    dtype: str
    corpus: str
    corpus_digest: str
    max_length: int | None
    seed: int | None
    shard: tuple[int, int]
    asked_documents: int | None
    asked_tokens: int | None
    tolerance: float | None

    @property
    def folder_name(self) -> str:
        order = {0: "", None: "-in-order"}.get(self.seed, f"-seed{self.seed}")
        index, of = self.shard
        return f"{self.corpus}-{self.corpus_digest}{order}{'' if of == 1 else f'-{index + 1}of{of}'}_stats"

    def digest(self, layers: Mapping[str, int]) -> str:
        known = asdict(self) | {"model": None, "layers": sorted(layers)}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]

    def answered_by(self, about: Mapping[str, Any]) -> int:
        """By what a sidecar describes: 2: the very numbers; 1: a longer sample of the shuffled corpus; 0: it is not."""
        asked = json.loads(json.dumps(asdict(self)))
        wrong = {name for name, value in asked.items() if about.get(name, "unsaid") != value} - {"model"}
        if self.tolerance is None:  # a bound that neither reached had no say
            for name, got in (("asked_documents", about.get("documents", 0)), ("asked_tokens", about.get("tokens", 0))):
                if all(bound is None or bound > got for bound in (asked[name], about.get(name))):
                    wrong.discard(name)
        if not wrong:
            return 2
        if wrong - {"asked_documents", "asked_tokens"} or self.seed is None or self.tolerance is not None:
            return 0
        bounds = ((self.asked_documents, "documents"), (self.asked_tokens, "tokens"))
        return int(any(asked is not None and about.get(got, 0) >= asked for asked, got in bounds))


def moments_for(
    widths: dict[str, int],
    *,
    model: str,
    fingerprint: str,
    dtype: str,
    prepare: Callable[[], tuple[Run, Means]],
    encode: Encode,
    corpus: Corpus | None,
    budget: Budget,
    seed: int | None = 0,
    shard: tuple[int, int] = (0, 1),
    stats: str | Path | None = None,
    out: Path | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> dict[str, Moment]:
    """The second moments of the layers in `widths` (name -> d_in), in that order; `source` of each says where from.

    model, fingerprint: its name and that of its weights
    dtype: what the model runs in ("bfloat16"); keys of another dtype are another request
    stats: the user's folder: read, nothing else is looked at, nothing is written there
    corpus: what to collect over where `stats` is None and the cache has not got it
    seed: of the order in which documents are drawn; None: the corpus' own order
    shard: (i, n): only every n-th document of the order, from the i-th
    out: a folder to look in and write to instead of the cache; what cannot be written there is an error
    prepare: gives what runs the model, and how; called where something has to be collected
    encode: texts -> token rows, special tokens included
    budget, ranks, progress: as in `collect.collect`

    Raises `InputError` for what is wrong with the folder, the corpus or the keys. A broken file in the cache is
    collected anew; a cache that cannot be written to is logged, and the result stays in memory.
    """
    if stats is not None:
        return {
            layer: read(find(stats, layer, model, budget.documents), width, fingerprint)
            for layer, width in widths.items()
        }
    if corpus is None:
        raise InputError(f"no statistics for {', '.join(widths)}: name a folder that holds them, or a corpus")
    tokens = budget.tokens
    if budget.documents is None and tokens is None and budget.tolerance is None:
        tokens = default_tokens(widths)
    budget = Budget(budget.max_length, budget.documents, tokens, budget.tolerance)
    rows = TokenRows(corpus, encode, seed=seed, shard=shard, folder=cache_root() / "tokens")
    request = Request(
        model, fingerprint, rows.tokenizer, dtype, corpus.name, corpus.digest, budget.max_length, seed, shard,
        budget.documents, tokens, budget.tolerance,
    )  # fmt: skip
    folder = cache_root() / "stats" / fingerprint / request.folder_name if out is None else out
    cached = {layer: _cached(folder, layer, width, request) for layer, width in widths.items()}
    missing = ranks.same({layer: width for layer, width in widths.items() if cached[layer] is None})
    if not missing:
        return {layer: moment for layer, moment in cached.items() if moment is not None}
    budget.check(missing)
    # of all layers: whoever is killed between their files goes on with those that are still missing
    resting = folder / f"progress-{request.digest(widths)}"
    if out is not None and ranks.first:
        _check_folder(folder, missing, resting)
    run, means = prepare()
    found, kept = dict(cached), True
    passed = collect_each(run, rows, missing, budget, means, ranks=ranks, checkpoint=resting, progress=progress)
    for layer, moment in passed:
        path = _keep(folder, layer, moment, request, must=out is not None)
        kept = kept and path is not None
        # from now on mapped from its file: several large ones are never held together
        found[layer] = moment if path is None else replace(read(path), seconds=moment.seconds)
    if ranks.same(kept):
        shutil.rmtree(resting, ignore_errors=True)  # every rank: they may be on machines of their own
    return {layer: moment for layer, moment in found.items() if moment is not None}


def _cached(folder: Path, layer: str, width: int, request: Request) -> Moment | None:
    """The exact answer if there is one, else the one with most tokens that serves."""
    answers: list[tuple[int, int, Path]] = []
    for path in list_layer(folder, layer):
        try:
            about = read_sidecar(path) or {}
        except InputError as error:
            log.warning("%s (in the cache: not used)", error)
            continue
        answers.append((request.answered_by(about), about.get("tokens", 0), path))
    for answer, _, path in sorted(answers, reverse=True):
        try:
            if answer:
                return read(path, width, request.fingerprint)
        except InputError as error:
            log.warning("%s (in the cache: it is collected anew)", error)
    return None


def file_bytes(widths: Mapping[str, int]) -> int:
    """What the collected moments of these layers take on disk; a checkpoint of them takes as much."""
    return sum(4 * d * (d + 1) for d in widths.values())


def _check_folder(folder: Path, widths: Mapping[str, int], resting: Path) -> None:
    """Room for the results, and nothing that they would lie among: what serves the request would have been taken.

    Where a checkpoint of the request rests it was all right once, and what lies there may be a result cut off.
    """
    for layer in widths if not resting.is_dir() else ():
        for path in list_layer(folder, layer)[:1]:
            raise InputError(f"{path}: other statistics of {layer} are there already; name a new folder")
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written to" if above.is_dir() else "is a file"
        raise InputError(f"{folder}: {above} {what}; name another folder")
    # two checkpoints, or one and the moments; one may be there already
    needed = 2 * file_bytes(widths) - sum(path.stat().st_size for path in resting.glob("rank*"))
    free = shutil.disk_usage(above).free
    if needed > free:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB are free there, {needed / 1e9:.1f} GB are needed (the moments, and a "
            "checkpoint of them while they are collected); free some space, or name another folder"
        )


def _keep(folder: Path, layer: str, moment: Moment, request: Request, must: bool) -> Path | None:
    """Where the layer's file is; None where it could not be written."""
    assert moment.documents is not None  # `collect` counts them
    of_layer = {
        "layer": layer,
        "width": moment.width,
        "tokens": moment.count,
        "documents": moment.documents,
        "digest": moment.digest,
        "seconds": round(moment.seconds, 3),
        "rewire": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path = folder / file_name(layer, request.dtype, moment.documents, request.max_length)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(path, moment, asdict(request) | of_layer)
        return path
    except OSError as error:
        if must:
            raise InputError(
                f"{error.filename or folder}: cannot be written ({error.strerror}); the last checkpoint is kept in "
                f"{folder}: free some space and run the same command again, it goes on from there"
            ) from None
        said = "%s: cannot be written to (%s): these statistics are not kept; set REWIRE_CACHE to another folder"
        log.warning(said, folder, error.strerror or error)
        return None
