"""Rounds and groups: what they cost in padding, and in memory that is not there; families, orders and batch sizes."""

import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rewire
from rewire.bench.serial import serial_value
from rewire.engine import value_steps
from rewire.engine import values as module
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file
from rewire.engine.passes import frozen
from rewire.engine.value_groups import Size, fact_bytes, lay_out, partition, size_for, token_bytes
from rewire.engine.values import STOP_LOSS, fact_columns, optimise_values, summary
from rewire.kernels.dispatch import recording, using
from rewire.kernels.errors import InputError

CONTEXTS = ("The harbour is near the gate. {}", "Because the lamp was out. {}")
HPARAMS = Hparams(layers=(1, 2), v_num_grad_steps=6, v_lr=0.2, clamp_norm_factor=3.0)

EARLY = Hparams(  # facts stop early, each at its own step
    layers=(1, 2), v_num_grad_steps=20, v_lr=0.15, clamp_norm_factor=20.0, kl_factor=0.02, v_weight_decay=0.0
)


@pytest.fixture
def facts() -> list[rewire.Fact]:
    return rewire.read_facts(demo_file("facts.jsonl"), limit=8)


SHAPES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=60)


@settings(deadline=None)
@given(SHAPES, st.integers(1, 100), st.integers(0, 200))
def test_every_row_is_in_one_group(shapes: list[tuple[int, int]], tokens: int, cost: int) -> None:
    groups = partition(shapes, tokens, 3, 3, cost)
    assert sorted(i for group in groups for i in group) == list(range(len(shapes)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(shapes[i][1] for i in group) <= tokens


def test_groups_are_of_one_shape_where_there_are_enough() -> None:
    shapes = [(start, active) for active in (1, 4, 9) for start in (5, 20) for _ in range(30)]
    random.Random(0).shuffle(shapes)
    groups = partition(shapes, 512, 3, 3, 0)
    assert sorted(list({shapes[i] for i in group}) for group in groups) == sorted([shape] for shape in set(shapes))
    assert len(partition(shapes, 10**6, 3, 3, 10**9)) == 1, "a group costs so much that padding is cheaper"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
        ("GPTJForCausalLM", {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4}),
        ("LlamaForCausalLM", {"num_key_value_heads": 2}),
        ("Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ],
)  # fmt: skip
def test_families_orders_and_sizes(
    demo: rewire.Model, facts: list[rewire.Fact], family: str, config: dict[str, Any]
) -> None:
    """Ragged rows; each fact as the serial procedure has it, whoever its neighbours are."""
    import transformers

    if "n_embd" not in config:
        config = config | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    kind = getattr(transformers, family)
    torch.manual_seed(0)
    made = kind.config_class(vocab_size=demo.anatomy.vocab, initializer_range=0.2, **config)
    model = rewire.wrap(kind(made).eval(), demo.tokenizer)
    assert len({len(fact.question) for fact in facts}) > 4
    with frozen(model):
        serial = [serial_value(model, fact, CONTEXTS, HPARAMS) for fact in facts]
    order = list(range(len(facts)))
    for size in (1, 5, None):
        random.Random(size).shuffle(order)
        found = optimise_values(model, [facts[i] for i in order], CONTEXTS, HPARAMS, size)
        for row, i in enumerate(order):
            if abs(serial[i].loss - STOP_LOSS) > 1e-3:  # else rounding decides about one more step
                assert int(found.steps[row]) == serial[i].updates
                assert float((found.Z[row] - serial[i].z).norm() / serial[i].z.norm()) < 1e-3


def starved(facts: int, error: Callable[[], Exception]) -> Callable[..., Any]:
    """A layout for which there is only memory for so many facts."""

    def lay(model: Any, layer: int, rewriting: Any, *rest: Any) -> Any:
        if len(rewriting) > facts:
            raise error()
        return lay_out(model, layer, rewriting, *rest)

    return lay


ERRORS = {
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory_halves_and_goes_on(
    demo: rewire.Model,
    facts: list[rewire.Fact],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    kind: str,
) -> None:
    expected = optimise_values(demo, facts, CONTEXTS, HPARAMS)
    monkeypatch.setattr(module, "lay_out", starved(2, ERRORS[kind]))
    with caplog.at_level(logging.WARNING):
        found = optimise_values(demo, facts, CONTEXTS, HPARAMS, 8, cache=tmp_path)
    assert found.capacity == 2
    assert torch.equal(found.steps, expected.steps)
    assert torch.allclose(found.Z, expected.Z, rtol=1e-4, atol=1e-4)
    assert caplog.text.count("out of memory") == 1


def test_no_memory_for_one_fact(demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "lay_out", starved(0, ERRORS["CPU"]))
    with pytest.raises(InputError, match=r"out of memory while the value of a single fact.*--dtype bfloat16"):
        optimise_values(demo, facts, CONTEXTS, HPARAMS)


@pytest.mark.parametrize("saving", ["at each step", "when it is interrupted"])
def test_the_middle_of_a_round_is_kept(
    demo: rewire.Model,
    facts: list[rewire.Fact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    saving: str,
) -> None:
    """Killed, or interrupted, it goes on from the last step, done facts and all."""
    whole = optimise_values(demo, facts, CONTEXTS, EARLY)
    steps = sorted(whole.steps.tolist())
    middle = steps[len(steps) // 2]
    assert steps[0] < middle < steps[-1]
    own = module.run_steps

    def cut_off(*words: Any) -> Any:
        for number, found in enumerate(own(*words)):
            if number == middle + 1:
                raise KeyboardInterrupt
            yield found

    if saving == "at each step":
        monkeypatch.setattr(module, "SAVE_SECONDS", -1.0)
        monkeypatch.setattr(module.log, "warning", lambda *_: exit("killed"))
    monkeypatch.setattr(module, "run_steps", cut_off)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        optimise_values(demo, facts, CONTEXTS, EARLY, cache=tmp_path)
    monkeypatch.undo()
    done = sum(step <= middle for step in steps)
    if saving != "at each step":
        assert f"{done} of {len(facts)} values are on disk" in caplog.text
    forwards = []
    monkeypatch.setattr(module, "run_steps", lambda *words: (forwards.append(found) or found for found in own(*words)))
    again = optimise_values(demo, facts, CONTEXTS, EARLY, cache=tmp_path)
    assert int(again.cached.sum()) == done
    assert len(forwards) == steps[-1] - middle, "none of the steps was made again"
    assert torch.equal(again.steps, whole.steps)
    assert torch.allclose(again.Z, whole.Z, rtol=1e-4, atol=1e-4)
    assert torch.allclose(again.losses, whole.losses, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_groups_share_the_cores(demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a thread of its own, to the same values; the operations are served, and counted, as outside."""
    monkeypatch.setattr("rewire.engine.value_groups.CPU_TOKENS", 24)
    threads, names = torch.get_num_threads(), set()
    own = value_steps._part
    monkeypatch.setattr(value_steps, "_part", lambda *w: names.add(threading.current_thread().name) or own(*w))
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with using("torch"), recording() as served:
                found.append(optimise_values(demo, facts, CONTEXTS, HPARAMS))
            assert served["target_nll", "torch"] > HPARAMS.v_num_grad_steps
            assert torch.get_num_threads() == count
            assert len(names) == 2 * count - 1, "the main thread, and then two more"
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].steps, found[1].steps)
    assert torch.allclose(found[0].Z, found[1].Z, rtol=1e-5, atol=1e-5)


def test_another_error_goes_through(
    demo: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "lay_out", starved(0, lambda: RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        optimise_values(demo, facts, CONTEXTS, HPARAMS)


def test_the_size_follows_the_memory(demo: rewire.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    config = demo.hf.config.get_text_config()  # type: ignore[union-attr, operator]
    one, token = fact_bytes(demo.anatomy, config, 2, 7, 30, 4), token_bytes(demo.anatomy, 2, 4)
    heads, width = config.num_key_value_heads, 192 // config.num_attention_heads
    assert one == 7 * 30 * 4 * (2 * 2 * heads * width + 192) + 8 * 4 * 192, "two blocks above, keys and values"

    def size(room: int) -> Size:
        monkeypatch.setattr("rewire.engine.value_groups.free_bytes", lambda device: room)
        return size_for(demo, 2, 7, 30)

    assert size(0) == Size(1, 1)
    assert size(5 * 12 * one).facts == 8, "a fifth of it is for facts, twelve would fit: a power of two"
    assert size(5 * 12 * token).tokens == 8
    assert size(10**12) == Size(64, 512)
    assert size_for(demo, 2, 7, 30, 1000).facts == 1000, "as asked"


def test_progress_and_report(demo: rewire.Model, facts: list[rewire.Fact]) -> None:
    said: list[tuple[int, int]] = []
    found = optimise_values(demo, facts, CONTEXTS, HPARAMS, 3, progress=lambda *now: said.append(now))
    assert said[0] == (0, 8)
    assert said[-1] == (8, 8)
    assert [done for done, _ in said] == sorted({done for done, _ in said})
    made = (~found.losses.isnan()).sum(1)
    assert torch.equal(made, found.steps + 1)
    assert torch.equal(found.losses[torch.arange(8), found.steps], found.loss)
    columns = fact_columns(found)
    assert all(len(column) == 8 for column in columns.values())
    assert [len(losses) for losses in columns["losses"]] == made.tolist()
    assert columns["losses"][0][0] == pytest.approx(float(found.losses[0, 0]), rel=1e-3)
    assert columns["probability_with_delta"][2] == pytest.approx(2.718281828 ** -float(found.last_nll[2]), rel=1e-5)
    norm = (found.Z - found.h0).norm(dim=1)
    assert columns["delta_norm"] == pytest.approx(norm.tolist())
    assert columns["relative_delta_norm"] == pytest.approx((norm / found.h0.norm(dim=1)).tolist())
    report = summary(found, 4.0)
    assert (report["facts"], report["optimised"], report["cached"], report["capacity"]) == (8, 8, 0, 3)
    assert report["facts_per_second"] == 2.0
    assert report["mean_steps"] == pytest.approx(sum(columns["steps"]) / 8)
