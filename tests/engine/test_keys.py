"""Walking the layers once gives the keys and hidden states of the published procedure, in any memory."""

import pytest
import torch
from alone import read_alone
from hypothesis import given
from hypothesis import strategies as st
from small_models import CONTEXTS, FACTS, FAMILIES, LAYERS, build, make, tokenizer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire.bench.serial import serial_hidden, serial_keys
from rewire.engine import keys
from rewire.engine.keys import KeyWalk, Measured, key_weights
from rewire.engine.model import demo_file
from rewire.engine.outline import model_shape
from rewire.engine.passes import blocks_until
from rewire.engine.prompts import Row, pad, subject_rows
from rewire.engine.suffix import Suffix, record_calls
from rewire.kernels.dispatch import interpreting, recording, using
from rewire.kernels.floors import keys_cost

LONG = (*CONTEXTS, "Japan. And where is the capital, of course? {}")  # ragged: 1 to some 20 tokens before the prompt
FOUR = ("gpt2", "gptj", "llama", "gemma2")
CASES = [
    *((family, layers, tokens) for family in FOUR for layers in ((0, 1, 3), (2,)) for tokens in (1, 60, None)),
    *((family, (1, 3), 60) for family in FAMILIES),
]


def rows_of(model: rewire.Model, facts: list[rewire.Fact], contexts: tuple[str, ...] = LONG) -> list[list[Row]]:
    found: list[list[Row]] = subject_rows(model.tokenizer, facts, ("{}", *contexts), model.max_length)
    return found


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@torch.no_grad()
def change(model: rewire.Model, layer: int) -> None:
    """As much as a strong edit changes."""
    weight = model.projection(layer).weight
    assert isinstance(weight, Tensor)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer)).to(weight.dtype)
    weight.add_(0.2 * noise * weight.norm() / noise.norm())


def kept_bytes(walk: KeyWalk) -> int:
    total = 0
    for batch in walk._batches:
        state = batch.stands
        parts = () if state is None else (state[1],) if isinstance(state, tuple) else (state.base, state.read)
        total += sum(tensor.untyped_storage().nbytes() for tensor in parts)
    return total


def kinds(walk: KeyWalk) -> set[str]:
    return {type(batch.stands).__name__ for batch in walk._batches}


@pytest.mark.parametrize(("family", "layers", "batch_tokens"), CASES)
def test_as_the_published_procedure(family: str, layers: tuple[int, ...], batch_tokens: int | None) -> None:
    """With the lower layers updated, and not its own; then with all of them."""
    model = make(family)
    walk = KeyWalk(model, rows_of(model, FACTS), layers, batch_tokens)
    for layer in layers:
        found = walk.measure(layer)
        assert relative(found.K, serial_keys(model, FACTS, LONG, layer)) < 2e-6
        assert relative(found.H, serial_hidden(model, FACTS, layers[-1])) < 2e-6
        plain = [group[0] for group in rows_of(model, FACTS)]
        if model.anatomy.post_norm is None:
            assert found.given is None
        else:
            assert relative(found.given, read_alone(model, model.projection(layer), plain)) < 2e-6
        change(model, layer)
        assert relative(found.H, serial_hidden(model, FACTS, layers[-1])) > 1e-3  # so the next layer must see it
    assert relative(walk.hidden(), serial_hidden(model, FACTS, layers[-1])) < 2e-6


def test_the_given_memory_is_enough() -> None:
    """The same keys in any room, and never more kept; all rows wait somewhere before any is in two parts."""
    facts = FACTS * 4

    def walked(room: int) -> tuple[list[Measured], Tensor, list[int], set[str]]:
        model = make("llama")
        walk = KeyWalk(model, rows_of(model, facts), (1, 2, 3), batch_tokens=100, room=room)
        found, kept, states = [], [], set()
        for layer in (1, 2, 3):
            found.append(walk.measure(layer))
            kept.append(kept_bytes(walk))
            states |= kinds(walk) if layer < 3 else set()
            change(model, layer)
        return found, walk.hidden(), kept, states

    model = make("llama")
    tokens = sum(batch.ids.numel() for batch in KeyWalk(model, rows_of(model, facts), (1,), batch_tokens=100)._batches)
    before, parted = 4 * 32 * tokens, 4 * (32 + 64) * tokens
    exact, after, kept, states = walked(parted)
    assert kept == [parted, parted, 0]
    assert states == {"Parted"}
    for room, wanted in (
        (0, {"NoneType"}),
        (before // 2, {"NoneType", "tuple"}),
        (before, {"tuple"}),
        (before + parted // 3, {"tuple", "Parted"}),
    ):
        found, last, kept, states = walked(room)
        assert states == wanted
        assert max(kept) <= room
        assert kept[-1] == 0
        for got, want in zip(found, exact, strict=True):
            assert relative(got.K, want.K) < 1e-6
            assert relative(got.H, want.H) < 1e-6
        assert relative(last, after) < 1e-6


def test_the_room_of_a_machine() -> None:
    """Some of what is free, and on a CPU never more than a GiB."""
    for device, free, most in (("cpu", 10**12, 2**30), ("cpu", 10**8, 10**8 / 2), ("cuda", 10**11, 10**11 / 2)):
        assert most / 2 < keys.kept_bytes(torch.device(device), free) <= most


@given(lengths=st.lists(st.integers(1, 40), max_size=60), tokens=st.integers(1, 300), enough=st.integers(0, 100))
def test_batches_of_about_one_length(lengths: list[int], tokens: int, enough: int) -> None:
    """Each row once, never too many tokens, and no batch that is large enough pads a row by much."""
    found = keys._even(lengths, tokens, enough)
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        width = lengths[batch[0]]
        assert len(batch) == 1 or len(batch) * width <= tokens
        for place, index in enumerate(batch):
            assert width >= lengths[index]
            assert lengths[index] >= 0.9 * width or place * width < enough


def test_padding_enters_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def walked() -> list[Tensor]:
        model = make("gemma2")
        walk = KeyWalk(model, rows_of(model, FACTS), (1, 3))
        assert any(len(batch.ids) > 1 and (batch.position < batch.ids.shape[1] - 1).any() for batch in walk._batches)
        first = walk.measure(1)
        change(model, 1)
        second = walk.measure(3)
        return [first.K, first.H, second.K, second.H, walk.hidden()]

    exact = walked()

    def other_padding(rows: list[Row], device: str) -> Tensor:
        ids = pad(rows, device)
        for line, row in enumerate(rows):
            ids[line, len(row.ids) :] = 77
        return ids

    monkeypatch.setattr(keys, "pad", other_padding)
    assert all(torch.equal(got, want) for got, want in zip(walked(), exact, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "gemma2"])
def test_in_16_bits_as_near_as_full_forwards(family: str) -> None:
    """K and H behind two updates against float32's: no further off than what the model's own forward gives."""
    exact, model = make(family), make(family)
    rows = rows_of(model, FACTS)
    model.hf.bfloat16()
    walk = KeyWalk(model, rows, (0, 2, 3))
    for layer in (0, 2, 3):
        found = walk.measure(layer)
        K, H = serial_keys(exact, FACTS, LONG, layer), serial_hidden(exact, FACTS, 3)
        assert relative(found.K, K) < 1.25 * relative(serial_keys(model, FACTS, LONG, layer), K)
        assert relative(found.H, H) < 1.25 * relative(serial_hidden(model, FACTS, 3), H)
        assert found.H.dtype is found.K.dtype is torch.float32
        assert torch.equal(found.H, found.H.bfloat16().float())  # as the model holds it
        change(exact, layer)
        with torch.no_grad():
            model.projection(layer).weight.copy_(exact.projection(layer).weight)
    H = serial_hidden(exact, FACTS, 3)
    assert relative(walk.hidden(), H) < 1.25 * relative(serial_hidden(model, FACTS, 3), H)


def test_facts_may_have_different_numbers_of_rows() -> None:
    model = make("gpt2")
    rows = [group[:count] for group, count in zip(rows_of(model, FACTS), (1, 4, 2), strict=True)]
    K = KeyWalk(model, rows, (1, 2)).measure(1).K
    for key, group in zip(K, rows, strict=True):
        each = read_alone(model, model.projection(1), group, entering=True)
        assert relative(key, key_weights(len(group) - 1) @ each) < 1e-6


def test_progress_goes_by_rows() -> None:
    model = make("gpt2")
    walk = KeyWalk(model, rows_of(model, FACTS), (1, 2), batch_tokens=40)
    seen: list[tuple[int, int]] = []
    for layer in (1, 2):
        walk.measure(layer, lambda done, total: seen.append((done, total)))
    rows = len(FACTS) * (1 + len(LONG))
    assert len(seen) > 6
    assert seen == sorted(seen)
    assert seen[-1] == (2 * rows, 2 * rows)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_are_those_of_the_floor(family: str) -> None:
    """The blocks below once, then only what an update changes. Without room, more."""
    shape = {"n_embd": 96, "n_layer": LAYERS + 2, "n_head": 4, "n_positions": 96}
    llama = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": LAYERS + 2, "num_attention_heads": 4}
    kind = ("GPT2LMHeadModel", shape) if family == "gpt2" else ("LlamaForCausalLM", llama | {"num_key_value_heads": 2})
    model = rewire.wrap(build(*kind), tokenizer())
    layers = (2, 3, 5)
    rows = rows_of(model, rewire.read_facts(demo_file("facts.jsonl"), limit=64))
    plain = [len(group[0].ids) for group in rows]
    contexts = [len(row.ids) for group in rows for row in group[1:]]
    floor = keys_cost(model_shape(model), layers, plain, contexts, 4).flops

    def flops(room: int | None) -> int:
        with FlopCounterMode(display=False) as counter:
            walk = KeyWalk(model, rows, layers, batch_tokens=512, room=room)
            for layer in layers:
                walk.measure(layer)
            walk.hidden()
        return int(counter.get_total_flops())

    all_kept, nothing = flops(None), flops(0)
    print(f"{family}: {all_kept / floor:.3f} of the floor, {nothing / floor:.3f} without room")
    assert all_kept == pytest.approx(floor, rel=0.15)
    assert nothing > 1.5 * floor


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
def test_the_kernels_serve_keys_and_values(demo: rewire.Model) -> None:
    rows = rows_of(demo, rewire.read_facts(demo_file("facts.jsonl"), limit=3))
    plain = [group[0] for group in rows]
    hidden = blocks_until(demo, pad(plain, "cpu"), 2)
    start = torch.tensor([row.position for row in plain])
    width = max(len(row.ids) - row.position for row in plain)
    suffix = Suffix.of(demo, record_calls(demo, 2, hidden.shape[1]), hidden, start, width)
    generator = torch.Generator().manual_seed(0)
    added = torch.randn(len(plain), hidden.shape[2], generator=generator)

    def everything(impl: str) -> list[Tensor]:
        moved = added.clone().requires_grad_()
        with using(impl):
            out = suffix(moved, torch.arange(3), (torch.arange(3), start))
            out.square().sum().backward()
            found = KeyWalk(demo, rows, (1, 2)).measure(1)
            return [found.K, found.H, out.detach(), moved.grad]

    with recording() as served:
        by_kernels = everything("triton")
    assert {name for name, _ in served} >= {"gather_mean_", "scatter_add"}
    assert {impl for name, impl in served if name in ("gather_mean_", "scatter_add")} == {"triton"}
    for got, exact in zip(by_kernels, everything("torch"), strict=True):
        assert relative(got, exact) < 1e-6
