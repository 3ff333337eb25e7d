"""What linear maps read in documents: padded, packed, and as each document alone in a plain forward."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import rewire
from rewire.engine import streams
from rewire.engine.model import demo_file
from rewire.engine.streams import can_pack, linear_widths, stream_inputs
from rewire.kernels.errors import InputError

WINDOW, LAYERS = 8, 4
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4}
LLAMA = SHAPE | {"num_key_value_heads": 2}
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": WINDOW}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "llama": ("llama", LLAMA),
    "llama-eager": ("llama", LLAMA | {"attn_implementation": "eager"}),
    "gpt_neox": ("gpt_neox", SHAPE),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "mistral": ("mistral", LLAMA | {"sliding_window": WINDOW}),
    "mistral-eager": ("mistral", LLAMA | {"sliding_window": WINDOW, "attn_implementation": "eager"}),
    "phi3": ("phi3", LLAMA | {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", GEMMA | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}),
    "gemma3_text": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3": (
        "gemma3",
        {"text_config": GEMMA | {"vocab_size": 200, "max_position_embeddings": 96}, "mm_tokens_per_image": 1}
        | {"vision_config": VISION | {"image_size": 16, "patch_size": 8}},
    ),
    "opt": ("opt", SHAPE | OPT),
    # attention that goes another way, or no positions to restart
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4}),
    "gpt_neo": (
        "gpt_neo",
        {"hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "intermediate_size": 48, "window_size": WINDOW}
        | {"attention_types": [[["global", "local"], 2]]},
    ),
    "falcon": ("falcon", SHAPE | {"alibi": True}),
}
UNPACKED = ("gptj", "bloom", "gpt_neo", "falcon")
PACKED = tuple(family for family in FAMILIES if family not in UNPACKED)
LENGTHS = (40, 23, WINDOW + 1, WINDOW, 7, 3, 1, 1)
TOKENIZER = AutoTokenizer.from_pretrained(demo_file("."))


def make(family: str, dtype: torch.dtype = torch.float64, initializer_range: float = 0.2) -> rewire.Model:
    kind, shape = FAMILIES[family]
    asked = {"attn_implementation": shape["attn_implementation"]} if "attn_implementation" in shape else {}
    common = {"vocab_size": 200, "max_position_embeddings": 96, "initializer_range": initializer_range}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **(shape if "text_config" in shape else common | ids | shape))
    torch.manual_seed(0)
    return rewire.wrap(AutoModelForCausalLM.from_config(config, **asked).to(dtype).eval(), TOKENIZER, family)


def documents(lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(5, 200, length, dtype=np.int32) for length in lengths]


def some_maps(model: rewire.Model) -> list[str]:
    """The projections of two blocks, the later one first, the last map before one of them, a block's first map."""
    maps = [name for name, part in model.hf.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
    late, early = model.anatomy.layer_name(2), model.anatomy.layer_name(1)
    first = next(name for name in maps if name.startswith(f"{model.anatomy.blocks}.1."))
    return [late, first, maps[maps.index(late) - 1], early]


def alone(model: rewire.Model, rows: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, Tensor]:
    """What plain forwards of one document each show."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.hf.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for row in rows:
            model.hf(input_ids=torch.tensor(row[None], dtype=torch.long))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def streamed(model: rewire.Model, rows: Sequence[np.ndarray], names: Sequence[str], packed: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def sink(name: str, X: Tensor) -> None:
        assert name not in found
        found[name] = X.clone()

    stream_inputs(model, rows, names, sink, packed)
    assert found.keys() == set(names)
    return found


def furthest(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error of a token at any of the modules."""
    errors = [(got[name] - X).norm(dim=1) / X.norm(dim=1) for name, X in exact.items()]
    assert all(error.shape == errors[0].shape for error in errors)
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_as_in_its_document_alone(family: str) -> None:
    """Ragged, one token to five windows; two maps of one block; asked for out of order."""
    model = make(family)
    names, rows = some_maps(model), documents()
    exact = alone(model, rows, names)
    eager = model.hf.config.get_text_config()._attn_implementation == "eager"  # its softmax is in float32
    assert furthest(streamed(model, rows, names, packed=False), exact) < (1e-5 if eager else 1e-9)
    assert can_pack(model, names) == (family in PACKED)
    if family in PACKED:
        assert furthest(streamed(model, rows, names, packed=True), exact) < (1e-5 if eager else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_is_found_possible_in_the_models_dtype(dtype: torch.dtype) -> None:
    """Rounding is no reason to refuse, and hides no token that sees another document."""
    found = {family: can_pack(model, some_maps(model)) for family in FAMILIES if (model := make(family, dtype))}
    assert found == {family: family in PACKED for family in FAMILIES}


def test_faint_leaks_and_lost_positions_are_no_rounding() -> None:
    """Each is seen by one of the two comparisons alone: here in bfloat16, whose rounding is larger than the leak."""
    leaking = make("bloom", torch.bfloat16, initializer_range=0.02)
    assert not can_pack(leaking, some_maps(leaking))
    model = make("gpt2")
    names = some_maps(model)
    assert can_pack(model, names)
    model.hf.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
    )
    assert not can_pack(model, names)


@functools.cache
def both_kinds() -> tuple[rewire.Model, rewire.Model]:
    """Without a window and with one."""
    return make("llama"), make("mistral")


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 3 * WINDOW), min_size=1, max_size=9))
def test_packed_as_padded_whatever_the_lengths(lengths: list[int]) -> None:
    rows = documents(sorted(lengths, reverse=True))
    for model in both_kinds():
        names = [model.anatomy.layer_name(LAYERS - 1)]
        assert furthest(streamed(model, rows, names, True), streamed(model, rows, names, False)) < 1e-9


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-window"])
def test_one_kernel_for_all_documents(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernel is handed, with one that does what its documentation says."""
    calls = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        calls.append(window_size)
        assert cu_q.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == int(cu_q.diff().max())
        assert enable_gqa == (q.shape[1] != k.shape[1])
        outputs = []
        for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            at = torch.arange(end - start)
            apart = at[:, None] - at
            left = window_size[0] if window_size[0] >= 0 else len(at)
            seen = (apart <= left) & (-apart <= window_size[1])
            own, keys, values = (part[start:end].transpose(0, 1) for part in (q, k, v))
            outputs.append(
                nn.functional.scaled_dot_product_attention(
                    own, keys, values, seen, scale=scale, enable_gqa=enable_gqa
                ).transpose(0, 1)
            )
        return torch.cat(outputs)

    model = make(family)
    names, rows = some_maps(model), documents()
    exact = alone(model, rows, names)
    monkeypatch.setattr(streams, "_flash_serves", lambda *_: True)
    monkeypatch.setattr(streams, "varlen_attn", varlen)
    assert furthest(streamed(model, rows, names, packed=True), exact) < 1e-9
    windows = {"llama": {(-1, 0)}, "mistral": {(WINDOW - 1, 0)}, "qwen2-window": {(-1, 0), (WINDOW - 1, 0)}}
    assert set(calls) == windows[family]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2-window", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    kernel = streams.varlen_attn
    monkeypatch.setattr(streams, "varlen_attn", lambda *args, **kwargs: used.append(1) or kernel(*args, **kwargs))
    exact_model = make(family)
    names, rows = some_maps(exact_model), documents()
    exact = alone(exact_model, rows, names)
    model = make(family, dtype)
    model.hf.to("cuda")
    assert can_pack(model, names)
    assert bool(used) == (dtype != torch.float32 and family != "gemma2")  # a soft cap is eager attention's
    bound = 1e-4 if dtype == torch.float32 else 0.15
    for packed in (False, True):
        got = {name: X.double().cpu() for name, X in streamed(model, rows, names, packed).items()}
        assert furthest(got, exact) < bound


def condition(model: rewire.Model) -> list[Any]:
    """All of a model that a pass might touch."""
    configs = {id(part.config): part.config for part in model.hf.modules() if hasattr(part, "config")}
    return [
        [config._attn_implementation for config in configs.values()],
        [part.training for part in model.hf.modules()],
        [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.hf.modules()],
        [(name, parameter.requires_grad) for name, parameter in model.hf.named_parameters()],
        {name: tensor.clone() for name, tensor in model.hf.state_dict().items()},
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_the_model_is_as_before(family: str, packed: bool) -> None:
    model = make(family)
    model.hf.train()
    model.block(1).eval()
    next(model.hf.parameters()).requires_grad_(False)
    if family == "gemma3":
        model.hf.config.vision_config._attn_implementation = "eager"  # not what its text model has
    before, names = condition(model), some_maps(model)

    def check() -> None:
        after = condition(model)
        assert after[:-1] == before[:-1]
        assert all(torch.equal(after[-1][name], tensor) for name, tensor in before[-1].items())

    def fail(name: str, X: Tensor) -> None:
        raise ValueError("the sink's own")

    with pytest.raises(ValueError, match="the sink's own"):
        stream_inputs(model, documents(), names, fail, packed)
    check()
    streamed(model, documents(), names, packed)
    check()
    assert can_pack(model, names)
    check()


def test_nothing_runs_behind_the_last_module() -> None:
    model = make("llama")
    ran = []
    for part in (model.projection(1), model.block(1), model.block(2), model.head):
        part.register_forward_hook(lambda module, args, output: ran.append(module))
    for packed in (False, True):
        streamed(model, documents(), [model.anatomy.layer_name(1), model.anatomy.layer_name(0)], packed)
    assert ran == []


def test_two_models_in_two_threads() -> None:
    """Lengths of one never reach the other's attention."""
    models = [make("llama"), make("mistral")]
    rows = [documents(), documents((30, 17, 5))]
    names = [[model.anatomy.layer_name(2)] for model in models]
    exact = [alone(*case) for case in zip(models, rows, names, strict=True)]
    errors: list[float] = []
    both = threading.Barrier(2)

    def work(i: int) -> None:
        both.wait()
        for _ in range(20):
            errors.append(furthest(streamed(models[i], rows[i], names[i], packed=True), exact[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) < 1e-9


def test_documents_without_tokens() -> None:
    model = make("llama")
    name, (some,) = model.anatomy.layer_name(1), documents((9,))
    exact = alone(model, [some], [name])
    for packed in (False, True):
        got = streamed(model, [some, some[:0]], [name], packed)
        assert got[name].shape == exact[name].shape
        assert furthest(got, exact) < 1e-9
        stream_inputs(model, [some[:0]], [name], lambda *_: pytest.fail("nothing to give"), packed)


def test_a_window_that_attention_is_not_told_of() -> None:
    """It lies in the masks that packing does not make, and short documents would not show it."""
    model = make("llama")
    names = [model.anatomy.layer_name(2)]
    assert can_pack(model, names)
    model.hf.config.sliding_window = WINDOW
    assert not can_pack(model, names)
    model.hf.config.sliding_window = None
    model.hf.config.layer_types = ["full_attention", "chunked_attention"] * 2
    assert not can_pack(model, names)


def test_widths() -> None:
    model = make("gpt2")
    names = [f"transformer.h.1.{part}" for part in ("mlp.c_proj", "mlp.c_fc", "attn.c_attn")]
    assert linear_widths(model, names) == dict(zip(names, (128, 32, 32), strict=True))


def test_names_that_are_refused() -> None:
    model = make("llama")
    for names, said in [
        ([], r"no modules named; expected paths such as model\.layers\.0\.mlp\.down_proj"),
        (
            ["model.layers.1.mlp.down_prj"],
            r"llama has no module 'model.layers.1.mlp.down_prj'.*layers\.1\.mlp\.down_proj",
        ),
        (["model.layers.9.mlp.down_proj"], r"has no module 'model\.layers\.9\.mlp\.down_proj'"),
        (["model.layers.1.mlp"], r"model\.layers\.1\.mlp is a LlamaMLP; expected a linear map"),
    ]:
        with pytest.raises(InputError, match=said):
            linear_widths(model, names)
        with pytest.raises(InputError, match=said):
            can_pack(model, names)
        with pytest.raises(InputError, match=said):
            streamed(model, documents(), names, packed=False)


@pytest.mark.parametrize("packed", [False, True])
def test_maps_that_do_not_see_every_token_once(packed: bool) -> None:
    model = make("llama")
    wanted = [model.anatomy.layer_name(1), model.anatomy.layer_name(2)]
    router = model.projection(1).register_forward_pre_hook(lambda _, args: (args[0][:, ::2],))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj was run on \d+ tokens of a batch of \d+"):
        streamed(model, documents(), wanted, packed)
    router.remove()
    model.hf.spare = nn.Linear(3, 3)
    with pytest.raises(InputError, match="spare is not run in a forward"):
        stream_inputs(model, documents(), [*wanted, "spare"], lambda *_: None, packed)
    mlp = model.hf.get_submodule("model.layers.1.mlp")
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x)) + mlp.down_proj(mlp.up_proj(x))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj is run more than once"):
        stream_inputs(model, documents(), wanted, lambda *_: None, packed)
