"""`bench throughput`: every phase of an edit is in it, and what is not the serial baseline's has no figures."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire
from rewire.bench import compare, edits, gpu_values, shapes, throughput
from rewire.bench.ceilings import Ceilings
from rewire.bench.costs import Costs
from rewire.bench.stats import cast
from rewire.engine import value_steps
from rewire.engine.hparams import Hparams
from rewire.engine.outline import model_shape
from rewire.engine.presets import shipped_presets
from rewire.engine.values import optimise_values
from rewire.kernels.floors import requantize_add_cost

CONTEXTS = ("The ferry waits. {}", "You see. {}")
HPARAMS = Hparams(layers=(1, 2), v_num_grad_steps=4, v_lr=0.1, mom2_update_weight=20)
KNOWN = Ceilings({torch.float32: 1e11, torch.float64: 5e10, torch.bfloat16: 1e11}, 1e10)
FACTS = shapes.made_facts(4)


def profile(model: rewire.Model, **options: Any) -> dict[str, Any]:
    settings = {"hparams": HPARAMS, "serial": 2, "ceilings": KNOWN} | options
    return throughput.bench_throughput(model, FACTS, CONTEXTS, **settings)


def test_phases_and_rows(demo: rewire.Model, tmp_path: Path) -> None:
    before = [p.clone() for p in demo.hf.parameters()]
    cache, seen = os.environ["REWIRE_CACHE"], set()
    result = profile(demo, listener=lambda phase, done, total: seen.add(phase))
    assert result["check"] == "passed", result["errors"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert all(torch.equal(a, b) for a, b in zip(before, demo.hf.parameters(), strict=True))
    assert os.environ["REWIRE_CACHE"] == cache
    assert not Path(cache).exists()  # neither read nor filled
    assert seen >= {"values", "serial", "evaluate"}
    assert set(result["errors"]) == {
        *("values", "movement", "keys", "keys: hidden states", "update"),
        *("values: losses in the timed edits", "lengths: of deltas in the timed edits"),
    }
    assert result["notes"] == []
    assert 0 < result["steps"] <= HPARAMS.v_num_grad_steps - 1

    assert [phase["name"] for phase in result["phases"]] == list(throughput.PHASES)
    phases = {phase["name"]: phase for phase in result["phases"]}
    assert {name for name, phase in phases.items() if phase["status"] == "given"} == {"templates", "statistics"}
    for name in ("values", "keys", "solve", "write", "evaluate"):
        phase = phases[name]
        floor = max(phase["flops"] / (5e10 if name == "solve" else 1e11), phase["bytes"] / 1e10)
        assert phase["floor_seconds"] == pytest.approx(floor)
        assert phase["floor_fraction"] == pytest.approx(floor / phase["seconds"])
        assert (phase["serial_seconds"] is None) == (name == "evaluate")
    for name in ("values", "keys", "evaluate"):
        assert 0.9 < phases[name]["counted_flops_ratio"] < 2, name  # small batches on a small model: padding

    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["values", "keys", "edit"]
    for row in rows.values():
        assert row.keys() >= {"name", "dtype", "shape", "seconds", "baseline_seconds", "ratio", "peak_bytes"}
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
    of_all = sum(phases[name]["seconds"] for name in ("values", "keys", "solve", "write"))
    assert rows["edit"]["seconds"] >= of_all  # all of `session.edit`
    assert rows["edit"]["seconds"] == pytest.approx(of_all + phases["other"]["seconds"])
    serial = sum(phases[name]["serial_seconds"] for name in ("values", "keys", "solve", "write"))
    assert rows["edit"]["baseline_seconds"] == pytest.approx(serial)
    assert rows["values"]["flops_ratio"] > 2

    pytest.importorskip("matplotlib")
    throughput.save(result, tmp_path / "new" / "out")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["throughput.json", "throughput.png"]
    assert json.loads((tmp_path / "new" / "out" / "throughput.json").read_text()) == result
    assert (tmp_path / "new" / "out" / "throughput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("broken", ["values", "keys", "update", "the timed edits"])
def test_what_is_wrong_has_no_figures(
    demo: rewire.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    """One fact, one key, one weight, or one loss, a little beside the serial one, or NaN."""
    if broken == "values":

        def moved(*args: Any, **kwargs: Any) -> Any:
            found = optimise_values(*args, **kwargs)
            return dataclasses.replace(found, Z=found.Z + torch.tensor([[0.0], [float("nan")]]))

        monkeypatch.setattr(compare, "optimise_values", moved)
    elif broken == "keys":
        right = compare.serial_keys
        monkeypatch.setattr(compare, "serial_keys", lambda *args: right(*args) * 1.001)
    elif broken == "update":
        serial = compare.serial_spread
        monkeypatch.setattr(
            compare, "serial_spread", lambda *args: {name: change * 1.01 for name, change in serial(*args).items()}
        )
    else:
        own = throughput.edited

        def edited(*args: Any) -> edits.Edited:
            found = own(*args)
            found.facts[0]["loss"] *= 1.01
            return found

        monkeypatch.setattr(throughput, "edited", edited)
    result = profile(demo)
    assert (result["check"], result["rows"], result["phases"]) == ("failed", [], [])
    named = {"the timed edits": "values: losses in the timed edits"}.get(broken, broken)
    assert result["errors"][named] is None or result["errors"][named] > 9e-4
    throughput.save(result, tmp_path)
    assert [path.name for path in tmp_path.glob("throughput*")] == ["throughput.json"]


RATES = {"dead": 0.0, "wrong sign": -1.0, "half the rate": 0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", ["demo", "llama-3-8b", "gpt-j-6b"])
def test_a_wrong_optimiser_is_seen(
    demo: rewire.Model, monkeypatch: pytest.MonkeyPatch, config: str, dtype: torch.dtype
) -> None:
    """By the way that deltas went, on a trained model and on random weights, whose losses do not tell."""
    sizes = {load.config: load.sizes for load in gpu_values.TINY}
    model = cast(demo, dtype) if config == "demo" else shapes.shaped_model(config, "cpu", dtype, sizes[config])
    hparams = HPARAMS if config == "demo" else shapes.shaped_hparams(config, model, {"v_loss_layer": None})
    serial = [compare.serial_value(model, fact, CONTEXTS, hparams) for fact in FACTS[:2]]
    bound = compare.BOUNDS[dtype].movement
    found = compare.movement(model, FACTS[:2], CONTEXTS, hparams, serial)
    assert len(found) == 2
    assert max(found) <= bound / 2
    for name, factor in RATES.items():
        monkeypatch.setattr(
            compare,
            "optimise_values",
            lambda model, facts, contexts, hparams, *rest, factor=factor: optimise_values(
                model, facts, contexts, hparams.model_copy(update={"v_lr": factor * hparams.v_lr}), *rest
            ),
        )
        wrong = compare.movement(model, FACTS[:2], CONTEXTS, hparams, serial)
        assert min(wrong) > bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimiser_that_does_nothing_fails_the_profile(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In the timed edits, too: the engine's own `adam` is what is broken."""
    monkeypatch.setattr(value_steps, "adam", lambda delta, *rest: delta)
    model = shapes.shaped_model("llama-3-8b", "cpu", dtype, gpu_values.TINY[0].sizes)
    hparams = shapes.shaped_hparams("llama-3-8b", model, {"v_num_grad_steps": 3, "v_loss_layer": None})
    result = profile(model, hparams=hparams)
    assert (result["check"], result["rows"]) == ("failed", [])
    assert result["errors"]["movement"] == pytest.approx(1.0)
    assert result["errors"]["lengths: of deltas in the timed edits"] == pytest.approx(1.0)


def test_nothing_but_near_ties_fails(demo: rewire.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare.NEAR_TIE, torch.float32, 1e3)
    result = profile(demo)
    assert (result["check"], result["rows"]) == ("failed", [])
    assert len(result["near_ties"]) == 2
    assert result["errors"]["values"] is result["errors"]["movement"] is None
    assert result["errors"]["values: losses in the timed edits"] is None
    assert [note.partition(":")[0] for note in result["notes"]] == [
        "every sampled fact is a near-tie of the stop", "no sampled fact has to move far enough to compare",
    ]  # fmt: skip


def test_the_serial_side_is_timed_fairly(demo: rewire.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the published batches of up to 128 prompts, not in those of a small sample; no LU is the first one."""
    facts = shapes.made_facts(60)
    batches: list[tuple[int, int]] = []
    solved: list[tuple[int, ...]] = []
    keys, solve = compare.serial_keys, torch.linalg.solve

    def counted(model: Any, some: Any, *rest: Any) -> Any:
        batches.append((len(some), len({fact.id for fact in some})))
        return keys(model, some, *rest)

    def slow_at_first(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        if A.dtype is torch.float64 and B.shape[1] == len(facts) and not solved:
            solved.append(tuple(A.shape))
            time.sleep(2.0)
        return solve(A, B)

    monkeypatch.setattr(compare, "serial_keys", counted)
    monkeypatch.setattr(torch.linalg, "solve", slow_at_first)
    moments = {layer: edits.synthetic_moment(demo, FACTS, CONTEXTS, layer) for layer in HPARAMS.layers}
    setup = edits.Setup(demo, CONTEXTS, HPARAMS, moments, None)
    found = compare.compare(setup, facts, facts[:2], lambda *args: None)
    assert solved == [(736, 736)]
    assert found.seconds["solve"] < 2.0
    assert batches == [(60, 60), (60, 60)]  # of at most 84
    assert found.errors["keys"] <= 1e-4
    assert compare.spread_over(500, 4) == [0, 125, 250, 375]
    assert compare.spread_over(3, 8) == [0, 1, 2]


def test_a_near_tie_is_listed_and_not_compared(demo: rewire.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = float(compare.serial_value(demo, FACTS[0], CONTEXTS, HPARAMS).loss)
    monkeypatch.setattr(compare, "STOP_LOSS", loss)

    def moved(*args: Any, **kwargs: Any) -> Any:
        found = optimise_values(*args, **kwargs)
        return dataclasses.replace(found, Z=found.Z * torch.tensor([[1.01], [1.0]]))

    monkeypatch.setattr(compare, "optimise_values", moved)
    result = profile(demo)
    assert result["near_ties"] == [FACTS[0].id]
    assert result["errors"]["values"] < 1e-3


def test_sixteen_bits(demo: rewire.Model) -> None:
    result = profile(cast(demo, torch.bfloat16))
    assert result["check"] == "passed", result["errors"]
    assert {row["dtype"] for row in result["rows"]} == {"bfloat16"}


def test_a_synthetic_moment_is_regular_and_of_the_keys_size(demo: rewire.Model) -> None:
    C = edits.synthetic_moment(demo, FACTS[:2], CONTEXTS, 1)
    values = torch.linalg.eigvalsh(C.double())
    assert torch.equal(C, C.T)
    assert float(values[-1] / values[0]) == pytest.approx(10**edits.DECADES, rel=1e-2)
    K = compare.serial_keys(demo, FACTS[:2], CONTEXTS, 1)
    assert float(C.trace()) == pytest.approx(float(K.square().sum(1).mean()), rel=1e-4)
    assert float((C / C.diagonal().rsqrt()[:, None] / C.diagonal().rsqrt()).triu(1).abs().max()) > 0  # mixed


def test_costs_add_up_over_facts_and_layers(demo: rewire.Model) -> None:
    costs = Costs(demo, CONTEXTS, (1, 2))
    steps = [3, 0, 2, 1]
    alone = sum(costs.values([fact], [n]).flops for fact, n in zip(FACTS, steps, strict=True))
    assert costs.values(FACTS, steps).flops == alone
    assert costs.values(FACTS, [3] * 4).flops > alone
    assert costs.keys(FACTS).flops == sum(costs.keys([fact]).flops for fact in FACTS)
    assert costs.evaluate(FACTS).flops <= sum(costs.evaluate([fact]).flops for fact in FACTS)  # a prompt on two: once
    assert costs.write(5).flops == 2 * requantize_add_cost(192, 736, 5, 4).flops
    assert costs.solve(5).flops < costs.solve(50).flops < costs.solve(400).flops


# shapes and facts


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt2", 0.12444), ("gpt2-xl", 1.5576), ("gpt-j-6b", 6.0509), ("llama-3-8b", 8.0303), ("qwen2.5-7b", 7.6156)],
)
def test_shapes_have_the_published_numbers_of_weights(name: str, billions: float) -> None:
    model = shapes.shaped_model(name, "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.hf.parameters()) == pytest.approx(billions * 1e9, rel=1e-4)
    hparams = shapes.shaped_hparams(name, model, {"v_num_grad_steps": 7})
    assert hparams.v_num_grad_steps == 7
    preset = shapes.SHAPES[name].preset
    if preset is not None:
        (published, *_) = shipped_presets("memit", preset)
        assert published.default
        assert list(hparams.layers) == published.values["layers"]
    assert hparams.layers[-1] < model_shape(model).layers - 1


def test_made_facts_differ_and_stay() -> None:
    facts = shapes.made_facts(1000)
    assert len({fact.question for fact in facts}) == len({fact.id for fact in facts}) == 1000
    assert facts[:100] == shapes.made_facts(100)
    assert all(fact.subject in text for fact in facts for text in fact.paraphrases)
    with pytest.raises(rewire.kernels.errors.InputError, match=r"--facts 100000: \d+ can be made"):
        shapes.made_facts(100_000)


def test_a_shape_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is made."""
    monkeypatch.setattr("rewire.bench.shapes.free_bytes", lambda device: 10 * 2**30)
    monkeypatch.setattr("rewire.bench.shapes.random_model", lambda *_: pytest.fail("made"))
    said = r"--config llama-3-8b: its weights take 29.9 GiB in float32, 10.0 GiB are free"
    with pytest.raises(rewire.kernels.errors.InputError, match=said):
        shapes.shaped_model("llama-3-8b", "cpu")
