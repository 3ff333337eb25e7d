"""Families of models: small random ones of each kind, through the engine and through plain forwards of their own."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import (
    CONTEXTS,
    FACTS,
    FAMILIES,
    GPT2,
    GROUPED,
    INNER,
    LAYERS,
    NORMED,
    SHAPE,
    VOCAB,
    WIDTH,
    WORDS,
    build,
    make,
    tokenizer,
)
from torch import Tensor, nn

import rewire
from rewire.bench.serial import serial_hidden, serial_spread, serial_value
from rewire.engine.delta import EditedWeights
from rewire.engine.editors.registry import Job
from rewire.engine.editors.spreading import spread
from rewire.engine.hparams import Hparams
from rewire.engine.objective import MEMIT
from rewire.engine.passes import blocks_until
from rewire.engine.phases import Phases
from rewire.engine.prompts import Row, pad, subject_rows
from rewire.engine.solve import memit_update, through_norm
from rewire.engine.suffix import Suffix, record_calls, verify
from rewire.engine.values import optimise_values

HPARAMS = {
    "layers": [1, 2],
    "v_num_grad_steps": 10,
    "v_lr": 0.5,
    "v_loss_layer": None,
    "clamp_norm_factor": 2,
    "mom2_update_weight": 10,
    "mom2_tokens": 1000,
    "mom2_seed": None,  # the corpus' own order, which `moments_of` takes
}
BY_STRUCTURE = {"stablelm", "starcoder2", "phi", "olmo2", "glm4"}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    chosen = random.Random(0)
    path.write_text("\n\n".join(" ".join(chosen.choices(WORDS, k=chosen.randint(1, 20))) for _ in range(120)))
    return path


def watch(module: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """(what went into the module, what came out) while `run` runs."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append((args[0], output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(keep)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return kept[0]


def nll(model: rewire.Model, fact: rewire.Fact) -> float:
    """Mean negative log-likelihood of the new target, in a plain forward."""
    target = tokenizer().encode(" " + fact.target_new, add_special_tokens=False)
    ids = torch.tensor([tokenizer().encode(fact.question) + target])
    with torch.no_grad():
        logp = model.hf(input_ids=ids).logits[0].float().log_softmax(-1)
    return -float(logp[-len(target) - 1 : -1].gather(1, ids[0, -len(target) :, None]).mean())


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@families
def test_anatomy(family):
    model = make(family)
    blocks, projection, norm, post_norm = FAMILIES[family][2]
    anatomy = model.anatomy
    assert (anatomy.blocks, anatomy.projection, anatomy.norm, anatomy.post_norm) == (
        blocks,
        projection,
        norm,
        post_norm,
    )
    assert anatomy.source == ("structure" if family in BY_STRUCTURE else "family")
    read, given = watch(model.projection(1), lambda: model.hf(input_ids=torch.tensor([[0, 5, 9]])))
    assert (anatomy.d_in, anatomy.d_model) == (read.shape[-1], given.shape[-1])
    assert (anatomy.n_layers, anatomy.vocab, model.max_length) == (LAYERS, VOCAB, 96)
    for layer in range(LAYERS):
        verify(model, layer)


@families
def test_the_blocks_above_alone(family):
    """Ragged rows, padded on the right, something added at each: as each row alone in the model itself."""
    model, layer, lengths, starts = make(family), 1, (11, 4, 9, 7), (6, 0, 2, 6)
    generator = torch.Generator().manual_seed(0)
    rows = [Row(tuple(torch.randint(2, VOCAB, (length,), generator=generator).tolist())) for length in lengths]
    delta = torch.randn(3, WIDTH, generator=generator)
    fact = torch.tensor([2, 0, 2, 1])
    hidden = blocks_until(model, pad(rows, "cpu"), layer)
    places = [
        (row, at)
        for row, (length, start) in enumerate(zip(lengths, starts, strict=True))
        for at in range(start, length)
    ]
    read = tuple(torch.tensor(side) for side in zip(*places, strict=True))
    suffix = Suffix.of(model, record_calls(model, layer, max(lengths)), hidden, torch.tensor(starts), 7)
    with torch.no_grad():
        got = model.logits(suffix(delta, fact, read))
    own = []
    for row, start, change in zip(rows, starts, delta[fact], strict=True):

        def add(module: nn.Module, args: Any, output: Any, start: int = start, change: Tensor = change) -> Any:
            (output[0] if isinstance(output, tuple) else output)[0, start] += change

        handle = model.block(layer).register_forward_hook(add)
        with torch.no_grad():
            own.append(model.hf(input_ids=torch.tensor([row.ids])).logits[0, start:].float())
        handle.remove()
    assert relative(got, torch.cat(own)) < 1e-5


@families
def test_values_as_the_serial_ones(family):
    model = make(family)
    hparams = Hparams(**HPARAMS)
    got = optimise_values(model, FACTS, CONTEXTS, hparams)
    for i, fact in enumerate(FACTS):
        one = serial_value(model, fact, CONTEXTS, hparams)
        assert one.updates == int(got.steps[i]) == hparams.v_num_grad_steps - 1
        assert relative(got.h0[i], one.h0) < 1e-5
        assert relative(got.Z[i] - got.h0[i], one.z - one.h0) < 1e-3
        assert float(got.loss[i]) == pytest.approx(one.loss, rel=1e-3)


def test_values_of_a_quiet_model():
    """Hidden states much smaller than 1 are numbers too."""
    model = rewire.wrap(build("LlamaForCausalLM", GROUPED | {"initializer_range": 0.01}), tokenizer())
    assert (serial_hidden(model, FACTS, 2).norm(dim=1) < 0.2).all()
    values = optimise_values(model, FACTS, CONTEXTS, Hparams(**HPARAMS))
    assert values.Z.isfinite().all()
    assert (values.steps > 0).all()


def moments_of(model: rewire.Model, corpus: Path) -> dict[int, Tensor]:
    """layer -> mean of k kᵀ over documents until they hold the asked number of tokens, one at a time."""
    texts, documents, count = corpus.read_text().split("\n\n"), [], 0
    while count < HPARAMS["mom2_tokens"]:
        documents.append(tokenizer().encode(texts[len(documents)]))
        count += len(documents[-1])
    result = {}
    for layer in HPARAMS["layers"]:
        keys = [
            watch(model.projection(layer), lambda ids=ids: model.hf(input_ids=torch.tensor([ids])))[0][0].double()
            for ids in documents
        ]
        result[layer] = sum(X.T @ X for X in keys) / count
    return result


@families
def test_whole_edit(family, corpus):
    """Statistics, values and solves as the serial ones; the new targets get likelier; undone to the last bit."""
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    unlikely = [nll(model, fact) for fact in FACTS]
    session = rewire.EditSession(model, corpus=corpus, contexts=CONTEXTS, hparams=HPARAMS)
    edit = session.edit(FACTS)
    likely = [nll(model, fact) for fact in FACTS]
    assert sum(likely) < sum(unlikely) - 0.2
    for first, last, record in zip(unlikely, likely, edit.report["facts"], strict=True):
        assert record["nll_with_delta"] < record["nll_before"]
        assert record["before"]["efficacy"]["new_logprob"] == pytest.approx([-first], rel=1e-4)
        assert record["after"]["efficacy"]["new_logprob"] == pytest.approx([-last], rel=1e-4)
    edited = {model.anatomy.weight_name(layer) for layer in HPARAMS["layers"]}
    changed = {name for name, tensor in model.hf.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == edited
    session.undo(edit.id)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.hf.state_dict().items())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NORMED])
def test_update_as_the_serial_one(family, corpus):
    """The session's whole update, statistics and all, from the same Z: dense solves, facts read in plain forwards."""
    model = make(family)
    session = rewire.EditSession(model, corpus=corpus, contexts=CONTEXTS, hparams=HPARAMS)
    edit = session.edit(FACTS, evaluate=False)
    (update,) = session.delta.updates
    session.undo(edit.id)
    Z = optimise_values(model, FACTS, CONTEXTS, session.hparams).Z
    exact = serial_spread(model, FACTS, CONTEXTS, session.hparams, Z, moments_of(model, corpus))
    assert update.keys() == exact.keys()
    for name, factors in update.items():
        assert relative(factors.dense(), exact[name]) < 1e-3


@pytest.mark.parametrize("family", NORMED)
def test_through_the_norm(family):
    """What is asked behind the norm comes out of it, to first order; the part along what it reads cannot."""
    model = make(family)
    norm = model.post_norm(1)
    assert norm is not None
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(5, WIDTH, generator=generator)
    with torch.no_grad():
        y, jacobian = norm(x), torch.func.vmap(torch.func.jacrev(norm))(x)
    R = torch.einsum("nij,nj->ni", jacobian, torch.randn(5, WIDTH, generator=generator))  # a change that can be had
    errors = []
    for size in (1e-2, 1e-3):
        with torch.no_grad():
            errors.append(relative(norm(x + through_norm(norm, x, size * R)) - y, size * R))
    assert errors[0] < 0.02
    assert errors[1] < 0.005
    assert float(through_norm(norm, x, y).norm() / y.norm()) < 1e-2
    asked = through_norm(norm, x, R + 5 * y)
    assert relative(asked, through_norm(norm, x, R)) < 1e-2


@pytest.mark.parametrize("family", NORMED)
def test_small_residuals_are_achieved_behind_a_norm(family):
    model = make(family)
    hparams = Hparams(**HPARAMS | {"mom2_update_weight": 1e-5})
    rows = subject_rows(tokenizer(), FACTS, ["{}"], 96)
    H = serial_hidden(model, FACTS, 2)
    Z = H + 0.02 * H.norm(dim=1, keepdim=True) / WIDTH**0.5 * torch.randn(3, WIDTH, generator=torch.manual_seed(0))
    with EditedWeights(model).provisional() as put:
        job = Job(model, FACTS, (), hparams, MEMIT, lambda names: {}, lambda *_: None, lambda *_: None, put, Phases())
        _, _, asked, left = spread(
            job, rows, Z, lambda name, K, R: memit_update(K, R, torch.eye(INNER), hparams.mom2_update_weight)
        )
    assert torch.allclose(asked, (Z - H).norm(dim=1), rtol=1e-3)
    after = serial_hidden(model, FACTS, 2)
    assert torch.allclose(left, (Z - after).norm(dim=1), rtol=1e-3)
    assert (left < 0.4 * asked).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_bfloat16(family, corpus):
    model = make(family)
    model.hf.bfloat16()
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    unlikely = [nll(model, fact) for fact in FACTS]
    session = rewire.EditSession(model, corpus=corpus, contexts=CONTEXTS, hparams=HPARAMS)
    edit = session.edit(FACTS)
    assert edit.report["dtype"] == "bfloat16"
    assert all(0 < layer["lost_to_rounding"] < 1 for layer in edit.report["layers"])
    assert sum(nll(model, fact) for fact in FACTS) < sum(unlikely)
    session.undo(edit.id)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.hf.state_dict().items())


MOE = GROUPED | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
T5 = {"d_model": WIDTH, "d_ff": INNER, "num_layers": 2, "num_heads": 4, "d_kv": 8}


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}, r"\(mixtral\) is a mixture of experts"),
        ("Qwen2MoeForCausalLM", MOE, r"\(qwen2_moe\) is a mixture of experts"),
        ("Qwen3MoeForCausalLM", MOE | {"head_dim": 8}, r"\(qwen3_moe\) is a mixture of experts"),
        ("BertForMaskedLM", SHAPE, r"BertForMaskedLM \(bert\) is an encoder"),
        ("T5ForConditionalGeneration", T5, r"\(t5\) is an encoder"),
        ("LlamaModel", GROUPED, "LlamaModel .* no language-model head"),
    ],
    ids=["mixtral", "qwen2-moe", "qwen3-moe", "bert", "t5", "headless"],
)
def test_refuses_to_wrap(name, config, said):
    with pytest.raises(rewire.InputError, match=said):
        rewire.wrap(build(name, config), tokenizer())


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("GraniteForCausalLM", {"residual_multiplier": 0.5}, "granite: a block rescales the MLP's output"),
        ("GraniteForCausalLM", {"logits_scaling": 4.0}, "granite: its logits are not head"),
        ("CohereForCausalLM", {"logit_scale": 0.25}, "cohere: its logits are not head"),
        ("EuroBertForMaskedLM", {"mask_token_id": 2, "pad_token_id": 1}, "eurobert: its tokens see later ones"),
        ("BloomForCausalLM", {"n_layer": LAYERS, "n_head": 4}, "cannot be edited yet"),
        ("OPTForCausalLM", {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "pad_token_id": 1}, "cannot be edited yet"),
    ],
    ids=["granite-residual", "granite-logits", "cohere", "eurobert", "bloom", "opt"],
)
def test_refuses_to_edit(name, config, said, corpus):
    """What the structure does not show, a run does; nothing is changed."""
    model = rewire.wrap(build(name, GROUPED | config), tokenizer())
    before = {key: tensor.clone() for key, tensor in model.hf.state_dict().items()}
    session = rewire.EditSession(model, corpus=corpus, contexts=CONTEXTS, hparams=HPARAMS)
    with pytest.raises(rewire.InputError, match=said):
        session.edit(FACTS, evaluate=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.hf.state_dict().items())


def test_granite_without_multipliers_is_edited():
    """So it is the multipliers that are refused, not the family."""
    verify(rewire.wrap(build("GraniteForCausalLM", GROUPED), tokenizer()), 2)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("BertForMaskedLM", SHAPE, "BertForMaskedLM is not a causal LM"),
        ("T5ForConditionalGeneration", T5, "t5 is an encoder-decoder"),
    ],
    ids=["bert", "t5"],
)
def test_refuses_to_load(name, config, said, tmp_path):
    build(name, config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(rewire.InputError, match=said):
        rewire.load(tmp_path / "model")


def test_refuses_a_slow_tokenizer():
    with pytest.raises(rewire.InputError, match="ByT5Tokenizer gives no character offsets"):
        rewire.wrap(build("GPT2LMHeadModel", GPT2), transformers.ByT5Tokenizer())
