from pathlib import Path

import pytest
import torch

import rewire
from rewire.engine.model import demo_file
from rewire.engine.session import EditSession
from rewire.kernels.errors import InputError


def test_published_projections(tmp_path: Path) -> None:
    """A null_space_project.pt gives what the null space that it was made of gives, and needs no second moments."""
    facts, contexts = rewire.read_facts(demo_file("facts.jsonl"), 4), ["The ferry waits. {}"]
    few = {"layers": [1, 2], "v_num_grad_steps": 4, "mom2_tokens": 1600, "mom2_max_length": 64}
    wanted = EditSession(rewire.load("demo"), "alphaedit", hparams=few, contexts=contexts)
    wanted.edit(facts, evaluate=False)
    threshold = wanted.hparams.nullspace_threshold
    names = [wanted.model.anatomy.layer_name(layer) for layer in (1, 2)]
    P = torch.stack([wanted.held.space(name, threshold).dense().float() for name in names])
    path = tmp_path / "null_space_project.pt"
    torch.save(P, path)
    session = EditSession(rewire.load("demo"), "alphaedit", hparams=few, contexts=contexts, projections=path)
    done = session.edit(facts, evaluate=False)
    assert done.report["statistics"] == {"projections": {"source": str(path)}}
    for name, update in wanted.weights.updates[0].items():
        found = session.weights.updates[0][name].dense()
        assert float((found - update.dense()).norm() / update.dense().norm()) < 1e-4
    with pytest.raises(InputError, match="2 projections found, expected 1"):
        EditSession(rewire.load("demo"), "alphaedit", hparams={**few, "layers": [1]}, projections=path)
    with pytest.raises(InputError, match="AlphaEdit's; memit takes none"):
        EditSession(rewire.load("demo"), "memit", hparams=few, projections=path)
