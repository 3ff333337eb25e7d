"""Counts against figures worked out elsewhere, and against what torch counts while real small models run."""

from collections.abc import Mapping

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import rewire
from rewire.engine.model import demo_file
from rewire.engine.outline import model_shape, reach_of
from rewire.engine.streams import stream_inputs
from rewire.kernels.floors import (
    Cost,
    ModelShape,
    Reach,
    ValueRow,
    gram_cost,
    keys_cost,
    statistics_cost,
    truncated_forward_cost,
    up_to_projection,
    value_cost,
)

LLAMA3_8B = ModelShape(32, 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336, 4096, 4096, 14336, 128256)
GPTJ_6B = ModelShape(28, 4 * 4096**2 + 2 * 4096 * 16384, 4096, 4096, 16384, 50400)
DOCUMENTS = [440] * 100_000  # 44 million tokens


@pytest.mark.parametrize(
    ("shape", "layers", "forward", "gram"),
    [(LLAMA3_8B, range(4, 9), 169, 45), (GPTJ_6B, range(3, 9), 155, 71)],
    ids=["llama-3-8b", "gpt-j-6b"],
)
def test_published_models(shape: ModelShape, layers: range, forward: int, gram: int) -> None:
    """PFLOP, as reference/performance-and-style.md has them."""
    cost = statistics_cost(shape, up_to_projection(shape, layers[-1]), [shape.d_in] * len(layers), DOCUMENTS, 2)
    assert round(cost.forward.flops / 1e15) == forward
    assert round(cost.gram.flops / 1e15) == gram
    assert cost.total.flops == cost.forward.flops + cost.gram.flops


def test_documents_do_not_see_each_other() -> None:
    """Two documents cost less than one of both, by what the second would have seen of the first."""
    reach = up_to_projection(LLAMA3_8B, 8)
    apart, together = (truncated_forward_cost(LLAMA3_8B, reach, lengths, 2) for lengths in ([3, 5], [8]))
    assert together.flops - apart.flops == 4 * 4096 * 9 * 3 * 5
    assert together.bytes == apart.bytes


def test_bytes_are_weights_and_embeddings_once() -> None:
    reach, few, many = up_to_projection(LLAMA3_8B, 0), [100], [100, 100]
    before_down = LLAMA3_8B.block_weights - 4096 * 14336
    assert truncated_forward_cost(LLAMA3_8B, reach, few, 2).bytes == 2 * (before_down + 100 * 4096)
    assert truncated_forward_cost(LLAMA3_8B, reach, many, 4).bytes == 4 * (before_down + 200 * 4096)
    assert statistics_cost(LLAMA3_8B, reach, [7, 9], many, 4).gram == gram_cost(200, 7, 4) + gram_cost(200, 9, 4)


SMALL = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
CONFIGS: Mapping[str, Mapping[str, int]] = {
    "gpt2": {"vocab_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 32},
    "gptj": {"vocab_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 32, "rotary_dim": 4},
    "llama": {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2},
    "phi3": {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "pad_token_id": 0},
    "gemma2": {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 16},
}
WANTED = {  # some module of the second block -> what runs ahead of it in there: numbers, and whether attention does
    "gpt2": {"attn.c_attn": (0, 0), "attn.c_proj": (3072, 1), "mlp.c_fc": (4096, 1), "mlp.c_proj": (8192, 1)},
    "gptj": {"attn.out_proj": (3072, 1), "mlp.fc_in": (4096, 1), "mlp.fc_out": (8192, 1)},
    "llama": {"self_attn.k_proj": (1024, 0), "self_attn.o_proj": (2048, 1), "mlp.down_proj": (3072 + 5120, 1)},
    "phi3": {"self_attn.qkv_proj": (0, 0), "self_attn.o_proj": (2048, 1), "mlp.gate_up_proj": (3072, 1)},
    "gemma2": {"self_attn.o_proj": (4096, 1), "mlp.up_proj": (6144 + 2560, 1), "mlp.down_proj": (6144 + 5120, 1)},
}


@pytest.fixture(params=CONFIGS)
def small(request: pytest.FixtureRequest) -> rewire.Model:
    config: PreTrainedConfig = AutoConfig.for_model(request.param, **CONFIGS[request.param])
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # whose products are counted
    return rewire.wrap(hf.eval(), rewire.load("demo").tokenizer, request.param)


def test_what_torch_counts(small: rewire.Model) -> None:
    """A pass over documents of two lengths, up to each module."""
    lengths = (12, 7)
    shape = model_shape(small)
    for inside, (weights, attention) in WANTED[small.name].items():
        name = f"{small.anatomy.blocks}.1.{inside}"
        reach = reach_of(small, [name, small.anatomy.layer_name(0)])
        assert (reach.blocks, reach.weights, reach.attention) == (1, weights, bool(attention)), inside
        products = attended = 0
        for length in lengths:
            with FlopCounterMode(display=False) as counter:
                stream_inputs(small, [np.arange(length)], [name], lambda name, X: None, False)
            counts = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
            # of attention torch counts the whole square, of which about half must be done
            half = 1 + 1 / length
            attended += round(counts.pop("aten.bmm", 0) * half / 2)
            products += sum(counts.values())
        assert truncated_forward_cost(shape, reach, lengths, 4).flops == pytest.approx(products + attended, abs=8)
        assert truncated_forward_cost(shape, Reach(1, weights, False), (), 4) == Cost(
            0, 4 * (shape.block_weights + weights)
        )


def test_the_projection_is_reached_last() -> None:
    model = rewire.load("demo")
    shape = model_shape(model)
    assert reach_of(model, [model.anatomy.layer_name(i) for i in (2, 0)]) == up_to_projection(shape, 2)
    assert reach_of(model, ["lm_head"]) == Reach(shape.layers, 0, False)
    assert demo_file("config.json").is_file()


@pytest.mark.parametrize(
    ("shape", "values", "stopped", "keys"),
    [(LLAMA3_8B, 24.6, 13.0, 2.13 / 5), (GPTJ_6B, 18.6, 9.9, None)],
    ids=["llama-3-8b", "gpt-j-6b"],
)
def test_a_published_edit(shape: ModelShape, values: float, stopped: float, keys: float | None) -> None:
    """PFLOP of 1000 facts, z-layer 8, as reference/performance-and-style.md 1f has them (without attention)."""
    for steps, expected in ((25, values), (12, stopped)):
        fact = [ValueRow(22, 15, 2, steps, steps)] * 6 + [ValueRow(8, 5, 0, steps, steps)]
        assert 1e3 * value_cost(shape, 8, fact, 2).flops / 1e15 == pytest.approx(expected, rel=0.04)
    if keys is not None:
        found = keys_cost(shape, range(4, 9), [8], [18] * 5, 2).flops
        assert 1e3 * found / 1e15 == pytest.approx(keys, rel=0.04)


def test_what_keys_go_over_twice() -> None:
    """One layer: up to its projection, and that of the plain rows twice. Blocks between layers run for all rows once,
    for plain rows once more on the way to the z-layer."""
    shape = ModelShape(6, 1000, 0, 10, 40, 99)
    assert keys_cost(shape, [2], [3], [4], 4).flops == 2 * 7 * (3 * 1000 - 400) + 2 * 2 * 3 * 400
    apart = keys_cost(shape, [1, 4], [3], [4], 4).flops
    assert apart == 2 * 7 * (2 * 1000 - 400 + 3 * 1000) + 2 * 3 * (400 + 3 * 1000) + 2 * 2 * 3 * 400


def test_what_a_value_step_costs() -> None:
    """A row of 5 tokens from place 3 on, two blocks above, attention by hand: queries 4 and 5 see 4 and 5 tokens."""
    shape = ModelShape(4, 1000, 8, 10, 40, 99)
    once = 2 * 5 * 2 * 1000 + 2 * 15 * 4 * 8 + 2 * 3 * 1000 + 6 * 4 * 8  # two blocks; one more over the prefix
    forward = 2 * (2 * 2 * 1000 + 9 * 4 * 8) + 2 * 2 * 10 * 99
    backward = 2 * (2 * 2 * 1000 + 2 * 9 * 4 * 8) + 2 * 2 * 10 * 99
    row = ValueRow(5, 3, labels=2, forwards=3, backwards=2)
    assert value_cost(shape, 1, [row], 4).flops == once + 3 * forward + 2 * backward
    held = ValueRow(3, 2, labels=0, forwards=1, backwards=0)
    alone = 3 * 2 * 2 * 1000 + 2 * 6 * 4 * 8 + 2 * 2 * 1000 + 3 * 4 * 8  # two blocks; one more over the prefix
    step = 2 * (2 * 1000 + 3 * 4 * 8) + 2 * 10 * 99
    assert value_cost(shape, 1, [held], 4).flops == alone + step + 2 * 10 * 99
    weights, head = 1000, 10 * 99
    assert value_cost(shape, 1, [row], 2).bytes == 2 * (3 * weights + 5 * 10 + 5 * (2 * weights + head))


def test_the_last_block_has_nothing_above() -> None:
    shape = ModelShape(4, 1000, 8, 10, 40, 99)
    row = ValueRow(5, 3, 1, 1, 0)
    assert value_cost(shape, 3, [row], 4).flops == 5 * 4 * 2 * 1000 + 4 * 15 * 4 * 8 + 2 * 10 * 99
