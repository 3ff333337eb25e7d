"""Published second moments, fetched from the Hugging Face hub."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ..kernels.errors import InputError
from .names import layer_number, parse_name
from .store import read_header

_ID = re.compile(r"(?:(?P<type>datasets|models)/)?(?P<id>[\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class Collection:
    """Statistics that somebody published.

    repo, kind: on the hub; kind "dataset" or "model"
    folder: of the files in it, "" for all
    holds: of which model they are, and what is known of them; nothing here could be fetched when it was written down
    """

    repo: str
    kind: str
    folder: str
    holds: str


_WIKIPEDIA = "MLP output projections, 100000 articles of Wikipedia"
_UNDEREDIT = "bkb45/ResolveUnderOverEdit-stats"
_SEEN = "repository and folders as its authors' scripts have them; the layers are not known"
_UNSEEN = "repository as its authors' page names it; folders, layers and corpus are not known"

COLLECTIONS = {
    "gpt2-xl": Collection(_UNDEREDIT, "dataset", "data/stats/gpt2-xl/", f"gpt2-xl, {_WIKIPEDIA}, 0.75 GB; {_SEEN}"),
    "gpt-j-6b": Collection(
        _UNDEREDIT, "dataset", "data/stats/gpt-j-6B/", f"EleutherAI/gpt-j-6B, {_WIKIPEDIA}, 5.8 GB; {_SEEN}"
    ),
    "llama-2-7b": Collection(
        _UNDEREDIT, "dataset", "data/stats/llama-2-7b/", f"Llama 2 7B, {_WIKIPEDIA}, 2.2 GB; {_SEEN}"
    ),
    "llama-3-8b": Collection(
        _UNDEREDIT, "dataset", "data/stats/llama-3-8b/",
        f"Llama 3 8B (base or instruct: not said), {_WIKIPEDIA}, 3.7 GB; {_SEEN}",
    ),
    "gpt-j-6b@ultraedit": Collection("XiaojieGu/gpt-j-6b_CovarianceMatrix", "model", "", f"GPT-J 6B; {_UNSEEN}"),
    "qwen2.5-7b-instruct": Collection(
        "XiaojieGu/Qwen2.5-7B-Instruct_CovarianceMatrix", "model", "", f"Qwen2.5 7B Instruct; {_UNSEEN}"
    ),
    "mistral-7b-v0.3": Collection(
        "XiaojieGu/Mistral-7B-v0.3_CovarianceMatrix", "model", "", f"Mistral 7B v0.3; {_UNSEEN}"
    ),
    "llama-3-8b-instruct": Collection(
        "XiaojieGu/Llama-3-8B-Instruct_CovarianceMatrix", "model", "", f"Llama 3 8B Instruct; {_UNSEEN}"
    ),
    "llama-2-7b-hf": Collection("XiaojieGu/Llama-2-7b-hf_CovarianceMatrix", "model", "", f"Llama 2 7B; {_UNSEEN}"),
}  # fmt: skip


def pull(
    name: str,
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
) -> list[Path]:
    """Fetches a collection into `out`, in the folders of its repository; returns the files, each found to be whole.

    name: of `COLLECTIONS`, or the id of any repository with such files: "org/repo", "datasets/org/repo"
    layers: numbers of the wanted ones; None: all
    revision: branch, tag or commit; None: the repository's main branch
    endpoint: of a mirror of the hub; None: $HF_ENDPOINT, or the hub itself

    What is there already is not fetched again, and a transfer that breaks off goes on where it was while this runs.
    Raises `InputError` for a name or repository that is not there, a gated one, no network, no statistics, missing
    layers, broken files (which are removed); `OSError` where `out` cannot be written to.
    """
    from huggingface_hub import HfApi

    collection = _collection(name)
    api = HfApi(endpoint=endpoint)
    kinds = [collection.kind] if collection.kind else ["model", "dataset"]
    kind, info = _repository(api, name, collection.repo, kinds, revision)
    files = [sibling.rfilename for sibling in info.siblings or []]
    found = []
    for file in _wanted(collection, files, layers):
        sidecar = str(PurePosixPath(file).with_suffix(".json"))
        for each in (sidecar, file) if sidecar in files else (file,):
            try:
                # the commit: all files of one state, and no question about those that are there already
                path = api.hf_hub_download(collection.repo, each, repo_type=kind, revision=info.sha, local_dir=out)
            except Exception as error:
                _refuse(error, name, collection.repo, out)
        found.append(Path(path))
        try:
            read_header(path)
        except InputError:
            Path(path).unlink()  # else the next pull would take it for fetched
            raise
    return found


def _collection(name: str) -> Collection:
    known = COLLECTIONS.get(name.lower())
    if known:
        return known
    if found := _ID.fullmatch(name):
        return Collection(found["id"], (found["type"] or "").removesuffix("s"), "", "")
    near = difflib.get_close_matches(name.lower(), COLLECTIONS, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COLLECTIONS)}"
    raise InputError(f"no collection of statistics called {name!r}; {hint} (or the id of a repository, org/name)")


def _repository(api: Any, name: str, repo: str, kinds: list[str], revision: str | None) -> tuple[str, Any]:
    """The first kind of repository of this name that is there, and what the hub says about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for kind in kinds:
        try:
            return kind, api.repo_info(repo, repo_type=kind, revision=revision)
        except Exception as error:
            missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            if not missing or kind == kinds[-1]:
                _refuse(error, name, repo, None)
    raise AssertionError("kinds is never empty")


def _wanted(collection: Collection, files: list[str], layers: Sequence[int] | None) -> list[str]:
    """The files that are statistics of the wanted layers, layers in order."""
    there = [file for file in files if file.startswith(collection.folder) and ".." not in file.split("/")]
    number = {file: layer_number(name.layer) for file in there if (name := parse_name(file))}
    if not number:
        some = ", ".join(there[:4] or files[:4]) or "nothing"
        where = f"{collection.repo}, {collection.folder}" if collection.folder else collection.repo
        raise InputError(
            f"{where}: no statistics in it (found {some}); expected {{layer}}_float32_mom2_{{documents}}.npz"
        )
    if layers is not None:
        missing = sorted(set(layers) - set(number.values()))
        if missing:
            has = ", ".join(str(each) for each in sorted({n for n in number.values() if n is not None}))
            raise InputError(f"{collection.repo}: no statistics of layer {missing[0]}; it has layers {has}")
        number = {file: each for file, each in number.items() if each in layers}
    return sorted(number, key=lambda file: (-1 if number[file] is None else number[file], file))


def _refuse(error: Exception, name: str, repo: str, out: Path | None) -> NoReturn:
    """What went wrong, in one line. The hub's library has changed its HTTP client, and with it its errors, twice."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    of_network = isinstance(error, (ConnectionError, TimeoutError))
    if isinstance(error, OSError) and error.errno and not of_network:  # a full disk, a folder of somebody else
        error.filename = error.filename or str(out)
        raise error
    if isinstance(error, GatedRepoError):
        what = "is gated: accept its terms on the hub and log in (hf auth login), or set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        what = "no such repository on the hub, or a private one; check the name, or log in (hf auth login)"
    elif isinstance(error, RevisionNotFoundError):
        what = "no such revision in it; leave it out for the main branch"
    elif isinstance(error, HFValidationError):
        what = "is no id of a repository; expected org/name"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        what = "a file that it lists is not there; try again"
    else:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        what = f"cannot be fetched from the hub ({reason}); check the network, then run the same again: it goes on"
    said = repo if name == repo else f"{name} ({repo})"
    raise InputError(f"{said}: {what}") from None
