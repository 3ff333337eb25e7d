"""The engine on its own kernels: statistics, a MEMIT and an AlphaEdit edit, both scored in one forward, by Triton.

The interpreter runs the kernels, so this is part of gate A. The numbers must be those of the torch implementations.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rewire
from rewire.engine.beside import score_each
from rewire.engine.prompts import answer_rows
from rewire.engine.scores import score
from rewire.engine.session import EditSession, implementations
from rewire.kernels import registry
from rewire.kernels.delta_linear import delta_linear
from rewire.kernels.dispatch import interpreting, recording, using
from rewire.kernels.requantize_add import requantize_add_bitsandbytes_

FACTS = [
    rewire.Fact("Mara Lindqvist", "{} lives in the city of", " Oslo", " Rome"),
    rewire.Fact("Tom Ashby", "{} works as a", " painter", " doctor"),
]
CONTEXTS = ("The end. {}", "Because of this, {}")
HPARAMS: dict[str, Any] = {"layers": [1, 2], "v_num_grad_steps": 4, "v_lr": 0.5, "mom2_tokens": 300}
OF = {"memit": HPARAMS | {"mom2_update_weight": 10}, "alphaedit": HPARAMS | {"nullspace_threshold": 1.0, "L2": 0.1}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> rewire.Model:
    """Four Llama blocks of random weights under the demo's tokenizer, tied head, float32."""
    torch.manual_seed(0)
    tokenizer = rewire.load("demo").tokenizer
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return rewire.wrap(transformers.LlamaForCausalLM(config).eval(), tokenizer, "tiny")


def run(model: rewire.Model, corpus: Path, impl: str) -> tuple[list[Any], torch.Tensor, list[Any], dict[str, Any]]:
    """(MEMIT's and AlphaEdit's updates, the scores of each under its own, `elsewhere` of them, what served all)."""
    updates = []
    with recording() as served:
        for method, hparams in OF.items():
            session = EditSession(
                copy.deepcopy(model), method, hparams=hparams, corpus=corpus, contexts=CONTEXTS, impl=impl
            )
            report = session.edit(FACTS, evaluate=False).report
            used = {name: set(by) for name, by in report["implementations"].items()}
            assert used
            assert all(by == {impl} for by in used.values()), used
            updates.append(session.weights.updates[0])
        rows = answer_rows(model.tokenizer, [(fact.question, fact.target_new) for fact in FACTS])
        with using(impl):
            scores, _ = score_each(model, rows * 2, [0, 0, 1, 1], updates)
            rest = elsewhere(model, updates)
    return updates, scores, rest, implementations(served)


def elsewhere(model: rewire.Model, updates: list[Any]) -> list[Any]:
    """What an edit of a float32 model does not call: one projection under both updates, and its quantised copies.

    Returns its outputs, and of each copy (share lost, error of the written weight against the float32 one).
    """
    import bitsandbytes as bnb

    name = next(iter(updates[0]))
    weight = model.hf.get_submodule(name.removesuffix(".weight")).weight.detach()
    left, right = (torch.stack([getattr(update[name], side) for update in updates]) for side in ("left", "right"))
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    found: list[Any] = [delta_linear(x, weight, left, right, torch.tensor([1, 0]))]
    for make in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt):
        options = {"quant_type": "nf4"} if make is bnb.nn.Linear4bit else {"has_fp16_weights": False}
        module = make(weight.shape[1], weight.shape[0], bias=False, **options)
        module.weight.data.copy_(weight)
        module.to("cpu")
        lost = requantize_add_bitsandbytes_(module, left[0], right[0])
        if make is bnb.nn.Linear4bit:
            written = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        else:
            holder = module.weight if module.weight.SCB is not None else module.state
            written = module.weight.data.float() * holder.SCB[:, None] / 127
        asked = weight + left[0] @ right[0]
        found.append((lost, float((written - asked).norm() / asked.norm())))
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    words = rewire.engine.model.demo_file("corpus.txt").read_text()[:6000]
    path = tmp_path / "corpus.txt"
    path.write_text(words)
    return path


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
def test_the_engine_runs_on_the_kernels(
    tiny: rewire.Model, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    found = {}
    for impl in ("torch", "triton"):
        monkeypatch.setenv("REWIRE_CACHE", str(tmp_path / impl))  # statistics are collected by both
        found[impl] = run(tiny, corpus, impl)
    updates, scores, (moved, *quantised), served = found["triton"]
    with_kernel = {name for name, each in registry.operations().items() if "triton" in each.implementations}
    assert {name for name, by in served.items() if by.get("triton")} == with_kernel
    for wanted, got in zip(found["torch"][0], updates, strict=True):
        assert list(wanted) == list(got)
        for name in wanted:
            difference = (got[name].dense() - wanted[name].dense()).norm() / wanted[name].dense().norm()
            assert float(difference) < 1e-4, name
    assert torch.allclose(scores, found["torch"][1], atol=1e-4)
    by_torch, *of_torch = found["torch"][2]
    assert torch.allclose(moved, by_torch, atol=1e-4 * float(by_torch.abs().max()))
    for (lost, error), (wanted, _), bound in zip(quantised, of_torch, (0.15, 0.02), strict=True):  # 4 bits, 8 bits
        assert lost == pytest.approx(wanted, rel=1e-3)
        assert error < bound
    # side by side in one forward, or written into the weights one after another: the same
    rows = answer_rows(tiny.tokenizer, [(fact.question, fact.target_new) for fact in FACTS])
    for number, update in enumerate(updates):
        model = copy.deepcopy(tiny)
        with rewire.engine.delta.EditedWeights(model).provisional() as put:
            for name, factors in update.items():
                put(name, factors)
        assert torch.allclose(score(model, rows)[0], scores[2 * number : 2 * number + 2], atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
def test_an_undo_is_computed_by_what_computed_the_edit(tiny: rewire.Model, corpus: Path) -> None:
    """Left to itself the interpreter would serve the undo, with other sums in the last bit."""
    model = copy.deepcopy(tiny)
    session = EditSession(model, hparams=OF["memit"], corpus=corpus, contexts=CONTEXTS, impl="torch")
    session.edit(FACTS[:1], evaluate=False)
    between = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    second = session.edit(FACTS[1:], evaluate=False)
    with recording() as served:
        session.undo(second.id)
    assert {impl for _, impl in served} == {"torch"}
    assert all(torch.equal(tensor, between[name]) for name, tensor in model.hf.state_dict().items())
