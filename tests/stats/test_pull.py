"""The hub's library against a stand-in of the hub on this machine: what it asks is answered as the hub would."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from rewire.kernels.errors import InputError
from rewire.stats import Moment
from rewire.stats.pull import COLLECTIONS, pull
from rewire.stats.store import read, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = "data/stats/gpt2-xl/wikipedia_stats"


@dataclass
class Hub:
    """repos: "models/org/name" or "datasets/org/name" -> its files; what to do wrong, and what was asked.

    cut: file -> how many of its transfers break off half way; short: files whose content is half of what was said
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    short: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self.info(f"{found[1]}/{found[2]}", found[2], found[3])
            elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.file(f"{(found[1] or 'models/').rstrip('/')}/{found[2]}", found[4])
            else:
                self.answer(404)

        def info(self, repo: str, name: str, revision: str | None) -> None:
            if repo not in hub.repos:
                self.answer(401, {"X-Error-Code": "RepoNotFound"})  # as the hub does to a stranger
            elif revision not in (None, "main", COMMIT):
                self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [{"rfilename": file} for file in hub.repos[repo]]
                self.answer(200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

        def file(self, repo: str, file: str) -> None:
            if repo in hub.gated:
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            if file not in hub.repos.get(repo, {}):
                return self.answer(404, {"X-Error-Code": "EntryNotFound"})
            content = hub.repos[repo][file]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if file in hub.short and self.command == "GET":
                content = content[: len(content) // 2]
            start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            left = hub.cut.get(file, 0)
            if left and self.command == "GET":
                hub.cut[file] = left - 1
                return self.answer(206 if start else 200, headers, content[start:], len(content) // 2 - start)
            return self.answer(206 if start else 200, headers, content[start:])

        def answer(
            self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", send: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) if send is None else max(0, send)])
            if send is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def moments(hub: Hub, tmp_path: Path) -> dict[str, Moment]:
    """File -> moment of the collection of gpt2-xl in the stand-in, among other things."""
    made: dict[str, Moment] = {}
    files = {"README.md": b"# statistics", "data/stats/gpt-j-6B/wikipedia_stats/h.1_float32_mom2_5.npz": b"other"}
    source = tmp_path / "source"
    source.mkdir()
    for layer in (2, 10):
        name = f"transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz"
        X = torch.randn(300, 100, generator=torch.Generator().manual_seed(layer))
        made[f"{FOLDER}/{name}"] = Moment.of((X.T @ X), 300, 100000)
        write(source / name, made[f"{FOLDER}/{name}"], {})
        files[f"{FOLDER}/{name}"] = (source / name).read_bytes()
    hub.repos["datasets/bkb45/ResolveUnderOverEdit-stats"] = files
    return made


def refused(name: str, out: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        pull(name, out, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_over(out: Path) -> list[str]:
    """What lies in `out`, but for the library's notes about what it has fetched."""
    files = (path for path in out.rglob("*") if path.is_file() and not path.name.endswith((".metadata", ".lock")))
    return sorted(path.relative_to(out).as_posix() for path in files if path.name not in (".gitignore", "CACHEDIR.TAG"))


PROGRAM = """
import sys
from pathlib import Path
from rewire.stats.pull import pull
for path in pull("gpt2-xl", Path(sys.argv[1])):
    print(path)
"""


def test_a_collection_by_its_name_from_the_endpoint_of_the_environment(
    hub: Hub, moments: dict[str, Moment], tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, out], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(out / file) for file in moments], "layers in order"
    assert left_over(out) == sorted(moments), "and nothing of another model"
    for file, moment in moments.items():
        assert torch.equal(read(out / file, 100).triangle, moment.triangle.float().double())


def test_some_layers_and_what_is_there_already(hub: Hub, moments: dict[str, Moment], tmp_path: Path) -> None:
    two, ten = moments
    assert pull("GPT2-XL", tmp_path / "out", layers=[10], endpoint=hub.url) == [tmp_path / "out" / ten]
    assert left_over(tmp_path / "out") == [ten]
    hub.asked.clear()
    assert len(pull("gpt2-xl", tmp_path / "out", endpoint=hub.url)) == 2
    fetched = [asked.split("/")[-1] for asked in hub.asked if asked.startswith("GET") and "resolve" in asked]
    assert fetched == [two.split("/")[-1]], "the other one is there"
    text = refused("gpt2-xl", tmp_path / "out", layers=[2, 13], endpoint=hub.url)
    assert text == "bkb45/ResolveUnderOverEdit-stats: no statistics of layer 13; it has layers 2, 10"


def test_any_repository_with_its_sidecars(hub: Hub, tmp_path: Path) -> None:
    """Found as a model, or else as a data set."""
    path = tmp_path / "h.3.proj_bfloat16_mom2_30_t16.safetensors"
    write(path, Moment.of(torch.eye(4) * 9, 40, 30), {"fingerprint": "feedbeef"})
    files = {each.name: each.read_bytes() for each in (path, path.with_suffix(".json"))}
    for kind in ("models", "datasets"):
        hub.repos = {f"{kind}/me/stats": files}
        (found,) = pull("me/stats", tmp_path / kind, endpoint=hub.url)
        assert left_over(tmp_path / kind) == sorted(files)
        assert read(found, 4, "feedbeef").count == 40
        with pytest.raises(InputError, match="statistics of another model"):
            read(found, 4, "cafe")
    assert pull("datasets/me/stats", tmp_path / "out", endpoint=hub.url, revision=COMMIT)
    text = refused("datasets/me/stats", tmp_path / "no", endpoint=hub.url, revision="v9")
    assert text == "datasets/me/stats (me/stats): no such revision in it; leave it out for the main branch"


def test_a_transfer_that_breaks_off_goes_on(
    hub: Hub, moments: dict[str, Moment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # a real one is larger than the file
    two, _ = moments
    hub.cut[two] = 1
    (found,) = pull("gpt2-xl", tmp_path / "out", layers=[2], endpoint=hub.url)
    assert any("bytes=20480-" in asked for asked in hub.asked), "from the last whole chunk before the half, 20599"
    assert torch.equal(read(found).triangle, moments[two].triangle.float().double())


def test_a_transfer_that_stays_short(hub: Hub, moments: dict[str, Moment], tmp_path: Path) -> None:
    two, ten = moments
    hub.short.add(ten)
    text = refused("gpt2-xl", tmp_path / "out", endpoint=hub.url)
    assert text.startswith("gpt2-xl (bkb45/ResolveUnderOverEdit-stats): cannot be fetched from the hub (")
    assert text.endswith("); check the network, then run the same again: it goes on")
    assert left_over(tmp_path / "out") == [two], "what is whole stays, nothing else"
    hub.short.clear()
    assert len(pull("gpt2-xl", tmp_path / "out", endpoint=hub.url)) == 2


def test_a_file_that_is_broken_on_the_hub(hub: Hub, moments: dict[str, Moment], tmp_path: Path) -> None:
    """Such as the pointer that stands for a large file; once mended it is fetched again."""
    _, ten = moments
    files = hub.repos["datasets/bkb45/ResolveUnderOverEdit-stats"]
    whole, files[ten] = files[ten], b"version https://git-lfs.github.com/spec/v1\n"
    text = refused("gpt2-xl", tmp_path / "out", layers=[10], endpoint=hub.url)
    assert text.startswith(f"{tmp_path / 'out' / ten}: truncated or broken, no npz (")
    assert left_over(tmp_path / "out") == []
    files[ten] = whole
    assert read(pull("gpt2-xl", tmp_path / "out", layers=[10], endpoint=hub.url)[0]).count == 300


def test_repositories_that_give_nothing(hub: Hub, moments: dict[str, Moment], tmp_path: Path) -> None:
    out = tmp_path / "out"
    missing = "no such repository on the hub, or a private one; check the name, or log in (hf auth login)"
    assert refused("me/none", out, endpoint=hub.url) == f"me/none: {missing}"
    assert refused("llama-2-7b-hf", out, endpoint=hub.url) == (
        f"llama-2-7b-hf (XiaojieGu/Llama-2-7b-hf_CovarianceMatrix): {missing}"
    )
    hub.gated.add("datasets/bkb45/ResolveUnderOverEdit-stats")
    assert "is gated: accept its terms on the hub and log in" in refused("gpt2-xl", out, endpoint=hub.url)
    text = refused("llama-3-8b", out, endpoint=hub.url)
    assert text.startswith("bkb45/ResolveUnderOverEdit-stats, data/stats/llama-3-8b/: no statistics in it (found ")
    hub.repos["models/me/evil"] = {"../../h.1_float32_mom2_5.npz": b""}
    assert "no statistics in it" in refused("me/evil", out, endpoint=hub.url)
    assert left_over(out) == []


def test_no_network(tmp_path: Path) -> None:
    text = refused("gpt2-xl", tmp_path / "out", endpoint="http://127.0.0.1:9")
    assert text.startswith("gpt2-xl (bkb45/ResolveUnderOverEdit-stats): cannot be fetched from the hub (")
    assert "check the network" in text


def test_a_folder_that_cannot_be_written_to(hub: Hub, moments: dict[str, Moment], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError) as caught:
        pull("gpt2-xl", tmp_path / "out", endpoint=hub.url)
    assert not isinstance(caught.value, InputError)
    assert str(tmp_path / "out") in str(caught.value.filename)


def test_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no collection of statistics called 'gpt2xl'; did you mean 'gpt2-xl'\?"):
        pull("gpt2xl", tmp_path)
    with pytest.raises(InputError, match=r"called 'zzz'; known are gpt2-xl, .*\(or the id of a repository, org/name\)"):
        pull("zzz", tmp_path)
    for name, collection in COLLECTIONS.items():
        assert name == name.lower()
        assert collection.kind in ("model", "dataset")
        assert not collection.folder or collection.folder.endswith("/")
