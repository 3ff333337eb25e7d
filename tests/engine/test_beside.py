"""Deltas beside the weights: each row as if its own delta were written, and nothing written."""

import contextlib
from typing import Any

import pytest
import torch
import transformers

import rewire
from rewire.engine.anatomy import widths
from rewire.engine.beside import Beside, score_each
from rewire.engine.delta import EditedWeights, Factors, Update
from rewire.engine.prompts import Row, pad
from rewire.engine.scores import score
from rewire.kernels.dispatch import interpreting, recording, using
from rewire.kernels.errors import InputError
from weights import changed, state

SHAPE = {"max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "initializer_range": 0.2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        SHAPE | {"hidden_size": 32, "intermediate_size": 56, "num_key_value_heads": 2},
    ),
    # a square Conv1D, with a bias
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 32, "initializer_range": 0.2}),
}


@pytest.fixture(params=["demo", *KINDS])
def model(request: pytest.FixtureRequest, demo: rewire.Model) -> rewire.Model:
    if request.param == "demo":
        return demo
    name, config = KINDS[request.param]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    hf = kind(kind.config_class(vocab_size=len(demo.tokenizer), bos_token_id=0, eos_token_id=1, **config)).eval()
    return rewire.wrap(hf, demo.tokenizer, request.param)


def update(model: rewire.Model, layers: dict[int, int], seed: int) -> Update:
    """Random factors for layer -> rank, about as large as the weight itself."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer, rank in layers.items():
        d_in, d_out = widths(model.projection(layer))
        size = float(model.projection(layer).weight.detach().float().norm()) / (rank * d_in * d_out) ** 0.5
        made[model.anatomy.weight_name(layer)] = Factors(
            torch.randn(d_out, rank, generator=generator) * size, torch.randn(rank, d_in, generator=generator)
        )
    return made


def deltas_of(model: rewire.Model) -> list[Update]:
    """Ranks differ at one weight, weights differ between deltas, one delta changes nothing."""
    return [update(model, layers, seed) for seed, layers in enumerate(({1: 1}, {0: 3, 1: 3}, {}, {2: 1, 1: 2}))]


def rows_of(model: rewire.Model, count: int) -> list[Row]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for length in torch.randint(3, 14, (count,), generator=generator).tolist():
        ids = torch.randint(2, model.anatomy.vocab, (length + 1,), generator=generator).tolist()
        made.append(Row(tuple(ids[:-1]), labels=tuple(ids[1:][-(1 + length % 3) :])))
    return made


def written(model: rewire.Model, rows: list[Row], delta: Update | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores with the delta in the weights, which are put back."""
    weights = EditedWeights(model)
    with weights.provisional() as put:
        for name, factors in (delta or {}).items():
            put(name, factors)
    try:
        return score(model, rows)
    finally:
        weights.undo_last()


@pytest.mark.parametrize("budget", [None, 30, 1])
def test_scores_as_if_each_delta_were_written(model: rewire.Model, budget: int | None) -> None:
    before, deltas, rows = state(model), deltas_of(model), rows_of(model, 30)
    owner = [(3 * i) % 5 - 1 for i in range(len(rows))]
    seen: list[tuple[int, int]] = []
    mean, exact = score_each(model, rows, owner, deltas, budget, lambda done, total: seen.append((done, total)))
    assert changed(model, before) == set()
    assert seen[-1] == (30, 30)
    assert len(seen) == 30 if budget == 1 else len(seen) < 30
    plain = score(model, rows)[0]
    for number in range(-1, len(deltas)):
        mine = [i for i, one in enumerate(owner) if one == number]
        own_mean, own_exact = written(model, [rows[i] for i in mine], None if number < 0 else deltas[number])
        assert (mean[mine] - own_mean).abs().max() <= 1e-5 * own_mean.abs().max()
        assert torch.equal(exact[mine], own_exact)
        moved = (own_mean - plain[mine]).abs().max()
        assert moved < 1e-5 if number in (-1, 2) else moved > 0.01  # the deltas are no trifle
    assert changed(model, before) == set()


def test_hundreds_in_one_forward(demo: rewire.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [update(demo, {1: 1, 2: 1}, seed) for seed in range(200)]
    rows = rows_of(demo, 1) * 200
    forwards = []
    handle = demo.block(0).register_forward_pre_hook(lambda module, args: forwards.append(len(args[0])))
    with recording() as served:
        mean, _ = score_each(demo, rows, range(200), deltas, batch_tokens=10**6)
    handle.remove()
    assert forwards == [200]
    assert sum(count for (name, _), count in served.items() if name == "add_delta_") == 2
    for number in (0, 117, 199):
        assert float(written(demo, rows[:1], deltas[number])[0]) == pytest.approx(float(mean[number]), rel=1e-5)


def test_hidden_states_of_a_forward_of_ones_own(model: rewire.Model) -> None:
    deltas, rows = deltas_of(model), rows_of(model, 4)
    ids = pad(rows, "cpu")
    with Beside(model, deltas) as beside, torch.no_grad():
        beside.owner = torch.tensor([3, -1, 0, 3])
        got = model.hf(input_ids=ids).logits
        beside.owner = torch.tensor([1])
        other = model.hf(input_ids=ids[:1]).logits[0]
    weights = EditedWeights(model)
    for number, lines in ((3, [0, 3]), (0, [2]), (None, [1]), (1, [])):
        with weights.provisional() as put:
            for name, factors in (deltas[number] if number is not None else {}).items():
                put(name, factors)
        with torch.no_grad():
            own = model.hf(input_ids=ids).logits
        weights.undo_last()
        for line in lines:
            assert (got[line] - own[line]).abs().max() <= 1e-5 * own.abs().max()
        if number == 1:
            assert (other - own[0]).abs().max() <= 1e-5 * own.abs().max()


def test_the_model_is_as_before_after_an_exception(demo: rewire.Model) -> None:
    before, deltas, rows = state(demo), deltas_of(demo), rows_of(demo, 4)
    first = score(demo, rows)[0]
    stopped = RuntimeError("stopped")

    def stop(done: int, total: int) -> None:
        raise stopped

    with pytest.raises(RuntimeError, match="stopped"):
        score_each(demo, rows, [0, 1, 2, 3], deltas, progress=stop)
    beside = Beside(demo, deltas)
    with contextlib.suppress(RuntimeError), beside:
        beside.owner = torch.tensor([0, 1, 2, 3])
        raise stopped
    assert beside.owner is None
    assert changed(demo, before) == set()
    assert not any(module._forward_hooks for module in demo.hf.modules())
    assert torch.equal(score(demo, rows)[0], first)


def test_bfloat16_is_as_close_as_a_written_delta(demo: rewire.Model) -> None:
    deltas, rows = deltas_of(demo), rows_of(demo, 20)
    owner = [i % 4 for i in range(20)]
    exact = score_each(demo, rows, owner, deltas)[0]
    low = rewire.wrap(demo.hf.to(torch.bfloat16), demo.tokenizer, "low")
    beside = score_each(low, rows, owner, deltas)[0]
    alone = torch.stack([written(low, [row], deltas[one])[0][0] for row, one in zip(rows, owner, strict=True)])
    # beside the weight the projection's output is rounded twice, written into it the weight is rounded
    assert (beside - exact).abs().mean() <= 2 * (alone - exact).abs().mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_projection(demo: rewire.Model, bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes").nn
    name = demo.anatomy.layer_name(1)
    plain = demo.projection(1)
    values = plain.weight.detach().clone()
    if bits == 4:
        quantised = bnb.Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
        quantised.weight = bnb.Params4bit(values, requires_grad=False, quant_type="nf4")
    else:
        quantised = bnb.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
        quantised.weight = bnb.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    delta = update(demo, {1: 2}, 0)
    demo.hf.set_submodule(name, quantised.to("cpu"))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with Beside(demo, [delta]) as beside, torch.no_grad():
        handle = quantised.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        beside.owner = torch.tensor([0, -1])
        demo.hf(input_ids=pad(rows_of(demo, 2), "cpu"))
        handle.remove()
    ((x, got),) = seen
    with torch.no_grad():
        own = quantised(x)
    assert torch.equal(got[1], own[1])
    exact = own[0] + x[0] @ delta[f"{name}.weight"].dense().T
    assert (got[0] - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_no_deltas_and_no_rows(demo: rewire.Model) -> None:
    rows = rows_of(demo, 3)
    assert torch.equal(score_each(demo, rows, [-1, -1, -1], [])[0], score(demo, rows)[0])
    mean, exact = score_each(demo, [], [], deltas_of(demo))
    assert (len(mean), len(exact)) == (0, 0)


def test_what_does_not_fit_is_refused(demo: rewire.Model) -> None:
    before = state(demo)
    name = demo.anatomy.weight_name(1)
    (good,) = update(demo, {1: 2}, 0).values()
    turned = Factors(good.right.T.contiguous(), good.left.T.contiguous())
    rows = rows_of(demo, 2)
    for deltas, says in (
        ([{name: Factors(good.dense(), None)}], f"{name}: its delta is dense; expected factors"),
        ([{}, {name: Factors(good.left * torch.nan, good.right)}], f"{name}: its delta holds NaN or infinity"),
        (
            [{"model.layers.99.mlp.down_proj.weight": good}],
            "changes model.layers.99.*, which rewire/demo does not have",
        ),
        ([{"model.norm.weight": good}], "LlamaRMSNorm, expected Linear or Conv1D"),
        ([{name: good}, {name: turned}], rf"delta 1 changes {name} as \(.*\) \(out, in\); the model's is"),
    ):
        with pytest.raises(InputError, match=says):
            Beside(demo, deltas)
    for owner, says in (
        ([0], "owner names 1 rows; expected 2"),
        ([0, 1], "owner holds 0 to 1; expected -1 to 0"),
        ([0, -2], "owner holds -2 to 0"),
    ):
        with pytest.raises(InputError, match=says):
            score_each(demo, rows, owner, [{name: good}])
    with Beside(demo, [{name: good}]) as beside:
        with pytest.raises(InputError, match=rf"{name}: a forward before `owner` was set"):
            score(demo, rows)
        for owner in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
            with pytest.raises(InputError, match=r"owner is \[2.*; expected \[rows\] int64"):
                beside.owner = owner
        beside.owner = torch.zeros(3, dtype=torch.int64)
        with pytest.raises(InputError, match=rf"{name} reads \[2, .*owner names 3 rows"):
            score(demo, rows)
        beside.owner = torch.zeros(2, dtype=torch.int64)
        with pytest.raises(InputError, match="no gradient"):
            demo.hf(input_ids=pad(rows, "cpu"))
    assert changed(demo, before) == set()


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
def test_by_triton(demo: rewire.Model) -> None:
    deltas, rows = deltas_of(demo), rows_of(demo, 5)
    owner = [3, -1, 1, 0, 3]
    exact = score_each(demo, rows, owner, deltas)[0]
    with using("triton"), recording() as served:
        got = score_each(demo, rows, owner, deltas)[0]
    assert ("add_delta_", "triton") in served
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()
