"""`rewire plan` below the command line: its sums against models that are loaded and collected from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rewire
from rewire.bench.stats import collected, peak_growth, take_rows
from rewire.engine import plan as room
from rewire.engine.editors.registry import find_method
from rewire.engine.hparams import Hparams, load_hparams
from rewire.engine.model import demo_file
from rewire.engine.objective import ATTENTION, MLP
from rewire.engine.outline import Outline, model_shape, outline
from rewire.engine.passes import frozen, sample_contexts
from rewire.engine.plan import Plan, Texts
from rewire.engine.statistics import Floor
from rewire.engine.values import optimise_values
from rewire.kernels.errors import InputError
from rewire.kernels.floors import Cost, factor_cost, push_through_cost, requantize_add_cost, woodbury_cost
from rewire.stats import memory, read_corpus


def flops(cost: Cost, dtype: torch.dtype) -> float:
    return float(cost.flops)


def made(
    model: Outline,
    method: str = "memit",
    facts: int = 100,
    tokens: int | None = None,
    iterations: int = 1,
    floor: Floor = flops,
    **changes: Any,
) -> Plan:
    hparams, _ = load_hparams(find_method(method).hparams, method, model.name, model.anatomy, None, changes)
    return room.plan(model, hparams, method, Texts(facts), floor, tokens, iterations)


def phase(plan: Plan, name: str) -> room.Phase:
    return next(phase for phase in plan.phases if phase.name == name)


# weights


def held(hf: torch.nn.Module) -> int:
    """Bytes of a loaded model."""
    there = {tensor.data_ptr(): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    scales = [m.weight.quant_state.absmax for m in hf.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    scales += [m.weight.SCB for m in hf.modules() if hasattr(getattr(m, "weight", None), "SCB")]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*there.values(), *scales))


@pytest.mark.parametrize("dtype", ["auto", "checkpoint", "bfloat16"])
def test_weights_are_what_load_gives(dtype: str) -> None:
    found, loaded = outline("demo", dtype, device="cpu"), rewire.load("demo", dtype, device="cpu")
    assert found.dtype is next(loaded.hf.parameters()).dtype
    assert found.weight_bytes(found.dtype) == held(loaded.hf)
    assert (found.anatomy, found.name) == (loaded.anatomy, loaded.name)
    assert model_shape(found) == model_shape(loaded)


@pytest.mark.parametrize("name", ["cf-gpt2", "cf-llama"])
def test_weights_of_real_models(name: str, shared: Path, load: Callable[[Path], rewire.Model]) -> None:
    found = outline(str(shared / "models" / name), device="cpu")
    assert found.weight_bytes(found.dtype) == held(load(shared / "models" / name).hf)


@pytest.mark.parametrize("tied", [True, False])
def test_shared_weights_count_once(tmp_path: Path, tied: bool) -> None:
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, tie_word_embeddings=tied
    )
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    found = outline(str(tmp_path), device="cpu")
    assert found.weight_bytes(torch.float32) == held(AutoModelForCausalLM.from_config(config))
    assert found.weight_bytes(torch.float32) == 4 * (64 * 32 * (2 - tied) + 16 * 32 + 2 * (12 * 32**2 + 13 * 32) + 64)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_weights(quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    found, loaded = outline("demo", quantize=quantize, device="cpu"), rewire.load("demo", "auto", quantize, "cpu")
    assert found.weight_bytes(found.dtype, found.quantize) == pytest.approx(held(loaded.hf), rel=0.01)
    assert model_shape(loaded) == model_shape(found)
    plan = made(found)
    assert [phase.name for phase in plan.phases] == ["model", "statistics"]  # such a model is not edited


def test_what_is_stored_quantised(tmp_path: Path) -> None:
    config = json.loads(demo_file("config.json").read_text())
    for about, kind in (
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
        assert outline(str(tmp_path), device="cpu").quantize == kind
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="stored quantised by gptq"):
        outline(str(tmp_path), device="cpu")


# memory


def test_collecting_stays_within_the_plan(demo: rewire.Model) -> None:
    """Of a model whose keys are so wide that its sums stand out of what else happens in this process."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=2,
        vocab_size=demo.anatomy.vocab, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = rewire.wrap(LlamaForCausalLM(config).eval(), demo.tokenizer, "wide")
    with torch.device("meta"):
        found = Outline(LlamaForCausalLM(config), "wide", torch.device("cpu"))
    names = [model.anatomy.layer_name(layer) for layer in (1, 2, 3)]
    rows = take_rows(read_corpus(demo_file("corpus.txt")), model, 4200)
    collected(model, names, rows)  # what is made once and stays is not the plan's
    peak = peak_growth(lambda: collected(model, names, rows), torch.device("cpu"))
    planned = phase(made(found, tokens=4200, layers=[1, 2, 3]), "statistics")
    assert planned.device == 0
    assert peak < planned.cpu < 3 * peak


GIB = 2**30


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with so much free memory."""

    def chip(device: int, cpu: int) -> None:
        for where in (room, memory):
            monkeypatch.setattr(where, "free_bytes", lambda place: cpu if place.type == "cpu" else device)
        monkeypatch.setattr(room, "fast_dtype", lambda device: torch.float64)

    return chip


@pytest.fixture
def llama() -> Outline:
    """Llama-3-8B in bfloat16, on a GPU."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Outline(hf, "llama-3-8b", torch.device("cuda"))


def test_a_large_model_on_a_large_chip(llama: Outline, chip: Callable[..., None]) -> None:
    chip(130 * GIB, 100 * GIB)
    plan = made(llama, facts=1000, tokens=44_000_000)
    d2 = 14336**2
    assert phase(plan, "model").device == llama.weight_bytes(torch.bfloat16) == pytest.approx(2 * 8.03e9, rel=1e-3)
    statistics = phase(plan, "statistics")
    assert (plan.chunks, plan.sums) == ("device", "device")
    assert 5 * 8 * d2 < statistics.device < 5 * 8 * d2 + 30 * GIB
    assert statistics.disk == 5 * 8 * d2  # the triangles and a checkpoint, in float64
    assert statistics.seconds == pytest.approx((169 + 45) * 1e15, rel=0.01)
    solve = phase(plan, "solve")
    assert solve.disk == 5 * 4 * d2
    assert solve.seconds == pytest.approx(5 * (14336**3 / 3 + 2000 * d2), rel=0.1)
    assert plan.need["device"] == phase(plan, "model").device + max(p.device for p in plan.phases[1:])
    assert plan.fits
    assert plan.advice == ()
    edited = made(llama, "alphaedit", 1000)
    assert phase(edited, "solve").disk == 5 * 8 * d2
    assert phase(edited, "solve").seconds == pytest.approx(5 * 14336**3 * 10 / 3, rel=0.2)
    dense = made(llama, facts=4000)
    assert phase(dense, "solve").disk == 5 * 4 * d2
    assert "dense" in phase(dense, "solve").what


def test_a_small_chip(llama: Outline, chip: Callable[..., None]) -> None:
    """Sums go elsewhere, batches shrink; what is too large all the same is said, with what helps."""
    chip(22 * GIB, 100 * GIB)
    plan = made(llama, facts=1000)
    assert (plan.chunks, plan.sums) == ("device", "cpu")
    assert phase(plan, "statistics").cpu > 5 * 8 * 14336**2
    assert plan.fits, plan.advice
    assert phase(plan, "values").device < 8 * GIB
    chip(22 * GIB, 6 * GIB)
    plan = made(llama)
    assert plan.sums == "disk"
    assert not plan.fits
    assert plan.advice[0].startswith("cpu: ")
    chip(10 * GIB, 100 * GIB)
    plan = made(llama)
    assert not plan.fits
    assert plan.advice[0].startswith("device: ")
    assert [line.split(":")[0] for line in plan.advice[1:]] == [
        "--quantize nf4 (for statistics and evaluation",
        "--set layers=[...]",
    ]
    assert plan.report()["fits"] is False


# time


def test_values_cost_what_they_do(demo: rewire.Model) -> None:
    """Every step in full: facts stop early in practice, lengths are estimated, and rows of a group are padded."""
    facts = rewire.read_facts(demo_file("facts.jsonl"), limit=12)
    demo.hf.set_attn_implementation("eager")
    contexts = sample_contexts(demo, seed=0)
    hparams = Hparams(layers=(1, 2), v_num_grad_steps=4, v_lr=1e-6)
    plan = room.plan(outline("demo", device="cpu"), hparams, "memit", Texts.of(facts), flops)
    with frozen(demo), FlopCounterMode(display=False) as counter:
        optimise_values(demo, facts, contexts, hparams)
    assert phase(plan, "values").seconds == pytest.approx(counter.get_total_flops(), rel=0.3)


def test_more_facts_and_tokens_take_longer() -> None:
    model = outline("demo", device="cpu")
    small, large = made(model), made(model, facts=200, tokens=80_000)
    for name in ("statistics", "values", "keys", "solve", "apply"):
        assert phase(large, name).seconds > phase(small, name).seconds, name  # type: ignore[operator]
    assert small.tokens == 40_000  # the preset's
    assert room.plan(
        model, Hparams(layers=(1,), mom2_n_samples=5, mom2_max_length=64), "memit", Texts(1), flops
    ).tokens == 5 * 64  # fmt: skip


def test_rome_solves_and_writes_by_the_fact() -> None:
    model = outline("demo", device="cpu")
    d, d_out = 736, 192
    for facts in (1, 500):  # of more keys than a quarter of the width MEMIT makes one system
        plan = made(model, "rome", facts, layers=[2], mom2_adjustment=True)
        assert phase(plan, "solve").what.startswith("Cholesky factor of C")
        assert phase(plan, "solve").seconds == factor_cost(d).flops + 2 * facts * d * d
        assert phase(plan, "solve").disk == 4 * d * d
    dense = phase(made(model, facts=500), "solve")
    assert "dense system" in dense.what
    assert dense.disk == 3 * 4 * d * d  # of each C the factor is made all the same: it tells whether there is a ridge

    def moved(cost: Cost, dtype: torch.dtype) -> float:
        return float(cost.bytes)

    one = requantize_add_cost(d_out, d, 1, 4).bytes
    assert phase(made(model, "r-rome", 1, floor=moved, layers=[2]), "apply").seconds == one
    whole = requantize_add_cost(d_out, d, 500, 4).bytes  # what all facts' parts are settled as
    assert phase(made(model, "r-rome", 500, floor=moved, layers=[2]), "apply").seconds == 500 * one + whole
    assert phase(made(model, facts=500, floor=moved, layers=[2]), "apply").seconds == whole


def test_history_solves_by_the_factor_and_keys() -> None:
    model, d = outline("demo", device="cpu"), 736
    solve = phase(made(model, "memit-history", 500, layers=[1, 2]), "solve")
    assert solve.what == "Cholesky factor of C, 500 right-hand sides, a weight"
    assert solve.seconds == 2 * (factor_cost(d) + woodbury_cost(d, 500)).flops
    assert "dense system" in phase(made(model, "memit-history", 800), "solve").what


def test_pmet_has_two_variables_and_writes_what_is_named(chip: Callable[..., None]) -> None:
    chip(0, 100 * GIB)
    model = outline("demo", device="cpu")
    values = {name: phase(made(model, name), "values") for name in ("memit", "pmet")}
    assert values["pmet"].disk == 2 * values["memit"].disk == 16 * 100 * 192
    assert values["pmet"].cpu - values["memit"].cpu == 8 * 100 * 192
    mlp, attention = (model.anatomy.layer_name(0, part).replace(".0.", ".{}.", 1) for part in (MLP, ATTENTION))
    alone, both = (
        made(model, "pmet", 40, layers=[1, 2], rewrite_module_tmps=named) for named in ([mlp], [mlp, attention])
    )
    assert alone.phases == made(model, "pmet", 40, layers=[1, 2]).phases
    square = 4 * (736**2 + 192**2)
    assert phase(both, "statistics").disk == 2 * 2 * square
    assert phase(both, "statistics").what.endswith("C of 2 layers, width 736 and 192")
    assert phase(both, "solve").disk == 2 * square
    assert phase(both, "apply").what == "4 weights of 192 x 736 and 192 x 192"
    for name in ("statistics", "solve", "apply"):
        assert phase(both, name).seconds > phase(alone, name).seconds, name  # type: ignore[operator]
    only = made(model, "pmet", layers=[1, 2], rewrite_module_tmps=[attention])
    assert phase(only, "apply").what == "2 weights of 192 x 192"


@pytest.mark.parametrize("method", ["memit", "alphaedit", "rome"])
def test_iterations_repeat_all_but_what_the_unedited_model_gives(method: str, chip: Callable[..., None]) -> None:
    chip(0, 100 * GIB)
    model = outline("demo", device="cpu")
    one, four = (made(model, method, iterations=passes, layers=[2]) for passes in (1, 4))
    assert (one.iterations, four.iterations, four.report()["iterations"]) == (1, 4, 4)
    assert phase(four, "statistics") == phase(one, "statistics")
    for name in ("values", "keys", "apply"):
        assert phase(four, name).seconds == 4 * phase(one, name).seconds, name  # type: ignore[operator]
    assert phase(four, "values").disk == 4 * phase(one, "values").disk
    d, n = 736, 100
    more = {"memit": woodbury_cost(d, n), "alphaedit": push_through_cost(d, d // 2, n), "rome": Cost(2 * n * d * d, 0)}
    assert phase(four, "solve").seconds == phase(one, "solve").seconds + 3 * more[method].flops  # type: ignore[operator]


def test_one_of_a_thing() -> None:
    plan = made(outline("demo", device="cpu"), facts=1, tokens=1000, layers=[2], v_num_grad_steps=1)
    said = {phase.name: phase.what for phase in plan.phases[1:]}
    assert said["statistics"].endswith("; C of 1 layer, width 736")
    assert said["values"].startswith("1 fact, 1 at once, ")
    assert said["values"].endswith(", up to 1 step")
    assert said["keys"] == "1 key of each layer"
    assert said["solve"].endswith(", 1 right-hand side, a weight")
    assert said["apply"] == "1 weight of 192 x 736"


def test_an_unknown_rate_is_no_time() -> None:
    model = outline("demo", device="cpu")
    known = {torch.float64}
    plan = room.plan(
        model, Hparams(layers=(1,)), "memit", Texts(9), lambda cost, dtype: 1.0 if dtype in known else None
    )
    assert {p.name: p.seconds for p in plan.phases} == {
        "model": None, "statistics": None, "values": None, "keys": None, "solve": 1.0, "apply": None
    }  # fmt: skip


def test_texts_are_counted() -> None:
    facts = [
        rewire.Fact("Ada Lovelace", "{} was born in the city of", "London"),
        rewire.Fact("Bo", "The mother tongue of {} is", "Dutch and French"),
    ]
    assert Texts.of(facts) == Texts(2, prompt=8, subject=2, behind=4, target=3, longest=11)


# refusals


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model there \(no config.json\)"):
        outline(str(tmp_path))
    with pytest.raises(InputError, match="no model there"):
        outline(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(InputError, match="not that of a causal LM"):
        outline(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError):
        outline(str(tmp_path))
    for arguments, said in (({"dtype": "int4"}, "dtype 'int4'"), ({"quantize": "q4"}, "quantize 'q4'")):
        with pytest.raises(InputError, match=said):
            outline("demo", **arguments)
    with pytest.raises(InputError, match="out of range: the model has layers 0 to 4"):
        made(outline("demo", device="cpu"), layers=[3, 9])
