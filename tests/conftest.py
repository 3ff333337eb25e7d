"""Models and data that several tests use."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On small matrices threads wait for each other more than they work; two workers share the two cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's statistics."""
    monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared (models, data and goldens) is not there")
    return SHARED


_loaded: dict[str, rewire.Model] = {}


@pytest.fixture
def load() -> Callable[[str | Path], rewire.Model]:
    """A model that the test may change: loaded once a session, copied for each use."""

    def load(name: str | Path) -> rewire.Model:
        if str(name) not in _loaded:
            _loaded[str(name)] = rewire.load(name)
        return copy.deepcopy(_loaded[str(name)])

    return load


@pytest.fixture
def demo(load: Callable[[str], rewire.Model]) -> rewire.Model:
    return load("demo")


@pytest.fixture(params=["cf-gpt2", "cf-llama"])
def known(request: pytest.FixtureRequest, shared: Path, load: Callable[[Path], rewire.Model]) -> rewire.Model:
    """One of the two small models that know CounterFact facts."""
    return load(shared / "models" / request.param)


@pytest.fixture
def golden(known: rewire.Model, shared: Path) -> dict[str, Any]:
    """What the published implementations produced on `known`: golden.json, its tensors, facts and statistics."""
    from safetensors.torch import load_file

    folder = shared / "goldens" / Path(known.name).name
    content: dict[str, Any] = json.loads((folder / "golden.json").read_text())
    content["tensors"] = load_file(folder / "golden.safetensors")
    content["token_count"] = content["stats"]["tokens"]
    content["stats"] = folder / "stats"
    content["facts"] = [
        rewire.Fact(r["subject"], r["prompt"], r["target_new"], r["ground_truth"], id=str(r["case_id"]))
        for r in content["requests"]
    ]
    return content
