"""Every method against the plain oracle (`bench.serial_methods`) on small models of three families, in float32."""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CONTEXTS, FACTS, WORDS, make, tokenizer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rewire
from rewire.bench.serial_methods import (
    attention_name,
    serial_alphaedit,
    serial_emmet,
    serial_memit,
    serial_pmet,
    serial_rome,
    serial_target,
)
from rewire.engine.delta import Factors
from rewire.engine.facts import EditNeighbor
from rewire.engine.hparams import Hparams
from rewire.engine.model import demo_file
from rewire.engine.objective import ATTENTION, MLP, Objective
from rewire.engine.passes import frozen
from rewire.engine.solve import memit_history_update, memit_update
from rewire.engine.values import Values, optimise_values
from rewire.kernels.spd_solve import KeySystem, regular_factor

Sums = dict[str, Tensor]
CLOSE = 1e-3  # relative Frobenius
LAYERS = (1, 2)
HPARAMS: dict[str, Any] = {
    "layers": LAYERS,
    "v_num_grad_steps": 6,
    "v_lr": 0.5,
    "clamp_norm_factor": 2.0,
    "mom2_update_weight": 10.0,
    "mom2_tokens": 1000,
    "mom2_seed": None,  # the corpus' own order, which `moments_of` takes
}
ONE_LAYER = HPARAMS | {"layers": (2,)}
NEIGHBORS = [  # one or two, whose objects are longer or shorter than what the fact asks for
    (EditNeighbor("Aracataca", "{} worked in the area of", "English"),),
    (EditNeighbor("Marie Curie", "The mother tongue of {} is", "physics, you and I"),),
    (
        EditNeighbor("Danielle Darrieux", "{} worked in the area of", "English"),
        EditNeighbor("Marie Curie", "Where is {}? It is in", "Colombia because of music"),
    ),
]
BESIDE = [replace(fact, edit_neighbors=held) for fact, held in zip(FACTS, NEIGHBORS, strict=True)]


@pytest.fixture(params=["gpt2", "gptj", "llama"])
def model(request: pytest.FixtureRequest) -> rewire.Model:
    return make(request.param)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    chosen = random.Random(0)
    path.write_text("\n\n".join(" ".join(chosen.choices(WORDS, k=chosen.randint(1, 20))) for _ in range(120)))
    return path


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def moments_of(model: rewire.Model, corpus: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Module -> mean of k kᵀ in float64, over documents until they hold the asked number of tokens, one at a time."""
    sums: dict[str, Tensor] = {}
    count, handles = 0, []
    for name in names:

        def add(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            X = args[0][0].double()
            sums[name] = sums.get(name, 0) + X.T @ X

        handles.append(model.hf.get_submodule(name).register_forward_hook(add))
    for text in corpus.read_text().split("\n\n"):
        if count >= HPARAMS["mom2_tokens"]:
            break
        ids = tokenizer().encode(text)
        count += len(ids)
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: total / count for name, total in sums.items()}


def projections(model: rewire.Model, layers: Iterable[int] = LAYERS) -> list[str]:
    return [model.anatomy.layer_name(layer) for layer in layers]


def middle(C: Tensor) -> float:
    """A threshold between two eigenvalues: half of them are below."""
    spectrum = torch.linalg.eigvalsh(C)
    return float(spectrum[len(C) // 2 - 1 : len(C) // 2 + 1].mean())


def stored(model: rewire.Model, name: str) -> Tensor:
    """[d_out, d_in], whatever way round the module keeps it."""
    module = model.hf.get_submodule(name)
    weight = module.weight.detach()
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def plain(values: dict[str, Any]) -> Hparams:
    return Hparams(**{key: value for key, value in values.items() if key in Hparams.model_fields})


def a_session(
    model: rewire.Model, corpus: Path, method: str, values: dict[str, Any], **options: Any
) -> rewire.EditSession:
    """On a copy of the model, so that the oracle finds it as it was."""
    return rewire.EditSession(copy.deepcopy(model), method, corpus=corpus, contexts=CONTEXTS, hparams=values, **options)


def assert_same(update: dict[str, Any], exact: dict[str, Tensor]) -> None:
    assert update.keys() == {f"{name}.weight" for name in exact}
    for name, wanted in exact.items():
        assert relative(update[f"{name}.weight"].dense(), wanted) < CLOSE, name


def sweep(model: rewire.Model, facts: list[rewire.Fact], C: Tensor | None, **options: bool) -> dict[str, Tensor]:
    """The sum of a ROME sweep's updates, found on a copy."""
    own = copy.deepcopy(model)
    with frozen(own):
        made = serial_rome(own, facts, CONTEXTS, plain(ONE_LAYER), C, **options)
    return {made[0].module: sum(torch.outer(one.r, one.u) for one in made)}  # type: ignore[dict-item]


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("method", ["rome", "r-rome"])
def test_rome(method: str, covariance: bool, model: rewire.Model, corpus: Path) -> None:
    """Three facts in one sweep, each on the weights that the ones before left."""
    session = a_session(model, corpus, method, ONE_LAYER | {"mom2_adjustment": covariance})
    session.edit(FACTS, evaluate=False)
    (name,) = projections(model, (2,))
    C = moments_of(model, corpus, [name])[name] if covariance else None
    exact = sweep(model, FACTS, C, averaged=method == "r-rome")
    assert_same(session.weights.updates[0], exact)
    alone = sum(sweep(model, [fact], C, averaged=method == "r-rome")[name] for fact in FACTS)
    assert relative(alone, exact[name]) > 10 * CLOSE, "each alone gives the same, so the order is not tested"  # type: ignore[arg-type]


def test_r_rome_is_not_rome(model: rewire.Model) -> None:
    (name,) = projections(model, (2,))
    assert relative(sweep(model, FACTS, None)[name], sweep(model, FACTS, None, averaged=True)[name]) > 10 * CLOSE


@pytest.mark.parametrize("both", [False, True])
def test_pmet(both: bool, model: rewire.Model, corpus: Path) -> None:
    values = HPARAMS | {"nll_loss_factor": 0.9}
    written = [*projections(model), *(attention_name(model, layer) for layer in LAYERS if both)]
    if both:
        modules = [model.anatomy.layer_name(0), attention_name(model, 0)]
        values |= {"rewrite_module_tmps": [name.replace(".0.", ".{}.") for name in modules]}
    session = a_session(model, corpus, "pmet", values)
    session.edit(FACTS, evaluate=False)
    moments = moments_of(model, corpus, written)
    own = copy.deepcopy(model)
    with frozen(own):
        exact = serial_pmet(own, FACTS, CONTEXTS, plain(values), moments, nll_loss_factor=0.9, both=both)
    assert exact.keys() == set(written)
    assert_same(session.weights.updates[0], exact)


@pytest.mark.parametrize("method", ["rome", "pmet"])
def test_inside_a_block_with_a_norm_behind_its_projection(method: str, corpus: Path) -> None:
    """Gemma 2: what is added to a projection's output passes a norm before the block adds it."""
    model = make("gemma2")
    if method == "rome":
        session = a_session(model, corpus, "rome", ONE_LAYER | {"mom2_adjustment": False})
        exact = sweep(model, FACTS, None)
    else:
        modules = [model.anatomy.layer_name(0), attention_name(model, 0)]
        values = HPARAMS | {"rewrite_module_tmps": [name.replace(".0.", ".{}.") for name in modules]}
        session = a_session(model, corpus, "pmet", values)
        names = [*projections(model), *(attention_name(model, layer) for layer in LAYERS)]
        own = copy.deepcopy(model)
        with frozen(own):
            exact = serial_pmet(own, FACTS, CONTEXTS, plain(values), moments_of(model, corpus, names), both=True)
    session.edit(FACTS, evaluate=False)
    assert_same(session.weights.updates[0], exact)


def test_pmets_own_rule(demo: rewire.Model) -> None:
    """Facts that become certain stop before the loss says so, or go on with a tenth of the likelihood's weight."""
    facts = rewire.read_facts(demo_file("facts.jsonl"), limit=3)
    hparams = Hparams(layers=LAYERS, v_num_grad_steps=15, v_lr=0.1, clamp_norm_factor=3.0, kl_factor=2.0)
    sites = [demo.anatomy.layer_name(2), attention_name(demo, 2)]
    found = optimise_values(demo, facts, CONTEXTS, hparams, objective=Objective((MLP, ATTENTION), nll_factor=1.0))
    with frozen(demo):
        ruled = [serial_target(demo, fact, CONTEXTS, hparams, sites, nll_loss_factor=1.0) for fact in facts]
        free = [serial_target(demo, fact, CONTEXTS, hparams, sites) for fact in facts]
    assert found.steps.tolist() == [one.updates for one in ruled]
    assert found.loss.tolist() == pytest.approx([one.loss for one in ruled], rel=CLOSE)
    for Z, h0, one in zip(found.Z, found.h0, ruled, strict=True):
        assert relative(Z - h0, torch.cat([one.delta[site] for site in sites])) < CLOSE
    pairs = list(zip(ruled, free, strict=True))
    assert any(one.updates < other.updates for one, other in pairs), "no fact stops by the rule"
    assert any(one.updates == other.updates and one.loss < 0.999 * other.loss for one, other in pairs), (
        "no fact goes on with a tenth"
    )


def test_alphaedit_in_two_batches(model: rewire.Model, corpus: Path) -> None:
    moments = moments_of(model, corpus, names := projections(model))
    rest = {"nullspace_threshold": middle(moments[names[0]]), "L2": 0.5}
    session = a_session(model, corpus, "alphaedit", HPARAMS | rest)
    own, history = copy.deepcopy(model), Sums()
    for batch, facts in enumerate((FACTS[:2], FACTS[2:])):
        session.edit(facts, evaluate=False)
        with frozen(own):
            exact = serial_alphaedit(own, facts, CONTEXTS, plain(HPARAMS), moments, history, **rest)
        assert_same(session.weights.updates[batch], exact)


def test_emmet(model: rewire.Model, corpus: Path) -> None:
    rest = {"emmet_lambda": 0.3, "update_norm_lambda": 0.7}
    session = a_session(model, corpus, "emmet", HPARAMS | rest)
    session.edit(FACTS, evaluate=False)
    moments = moments_of(model, corpus, projections(model))
    own = copy.deepcopy(model)
    with frozen(own):
        exact = serial_emmet(own, FACTS, CONTEXTS, plain(HPARAMS), moments, **rest)
    assert_same(session.weights.updates[0], exact)


def test_memit_with_history_in_three_batches(model: rewire.Model, corpus: Path) -> None:
    """The second and third batch have the keys of those before in their systems, and the weights they left."""
    moments = moments_of(model, corpus, projections(model))
    session = a_session(model, corpus, "memit-history", HPARAMS)
    own, history = copy.deepcopy(model), Sums()
    for batch, fact in enumerate(FACTS):
        session.edit([fact], evaluate=False)
        with frozen(own):
            exact = serial_memit(own, [fact], CONTEXTS, plain(HPARAMS), moments, history=history)
        assert_same(session.weights.updates[batch], exact)


@pytest.mark.parametrize(
    ("method", "compat"), [("memit", False), ("rome", False), ("alphaedit", False), ("alphaedit", True)]
)
def test_iterations(method: str, compat: bool, corpus: Path) -> None:
    """The whole method again on what it left; published, AlphaEdit's batch is then in its own history."""
    model = make("llama")
    values = ONE_LAYER if method == "rome" else HPARAMS
    moments = moments_of(model, corpus, names := projections(model, values["layers"]))
    rest = {"nullspace_threshold": middle(moments[names[0]]), "L2": 0.5} if method == "alphaedit" else {}
    session = a_session(model, corpus, method, values | rest, compat=compat)
    session.edit(FACTS, evaluate=False, iterations=2)
    own, history = copy.deepcopy(model), Sums()
    with frozen(own):
        for _ in range(2):
            if method == "rome":
                serial_rome(own, FACTS, CONTEXTS, plain(values), moments[names[0]])
            elif method == "memit":
                serial_memit(own, FACTS, CONTEXTS, plain(values), moments)
            else:
                serial_alphaedit(own, FACTS, CONTEXTS, plain(values), moments, history if compat else {}, **rest)
    exact = {name: stored(own, name) - stored(model, name) for name in names}
    assert_same(session.weights.updates[0], exact)


@pytest.mark.parametrize("method", ["memit", "rome", "pmet"])
def test_neighbours(method: str, model: rewire.Model, corpus: Path) -> None:
    check_neighbours(method, False, model, corpus)


@pytest.mark.parametrize("method", ["memit", "rome", "pmet"])
def test_neighbours_as_published(method: str, corpus: Path) -> None:
    check_neighbours(method, True, make("llama"), corpus)


def check_neighbours(method: str, compat: bool, model: rewire.Model, corpus: Path) -> None:
    values = ONE_LAYER if method == "rome" else HPARAMS
    session = a_session(model, corpus, method, values, neighbors=True, compat=compat)
    session.edit(BESIDE, evaluate=False)
    moments = moments_of(model, corpus, names := projections(model, values["layers"]))
    own, how = copy.deepcopy(model), {"neighbors": True, "compat": compat}
    if method == "rome":
        exact = sweep(model, BESIDE, moments[names[0]], **how)
    else:
        run = serial_memit if method == "memit" else serial_pmet
        with frozen(own):
            exact = run(own, BESIDE, CONTEXTS, plain(values), moments, **how)  # type: ignore[operator]
    assert_same(session.weights.updates[0], exact)


def test_neighbours_are_asked_for(corpus: Path) -> None:
    """Facts may carry them: without the option they change nothing, with it they do, and so does `compat`."""
    found = []
    beside = {"neighbors": True}
    for facts, options in ((FACTS, {}), (BESIDE, {}), (BESIDE, beside), (BESIDE, beside | {"compat": True})):
        session = a_session(make("llama"), corpus, "memit", HPARAMS, **options)
        session.edit(facts, evaluate=False)
        found.append(session.weights.updates[0]["model.layers.2.mlp.down_proj.weight"].dense())
    without, unasked, asked, compat = found
    assert torch.equal(without, unasked)
    assert relative(asked, without) > 10 * CLOSE
    assert relative(compat, asked) > 10 * CLOSE


def test_history_adds_up_to_one_edit_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, keys and values of the unedited weight: the engine's solves of batch after batch are one of all."""

    def exactly(R: Tensor, Xt: Tensor) -> Factors:  # a session's are float32, which the identity is finer than
        return Factors(R.T.double(), Xt.double())

    monkeypatch.setattr("rewire.engine.solve._factors", exactly)
    generator = torch.Generator().manual_seed(0)
    K, V, W0, X = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((50, 64), (50, 32), (32, 64), (300, 64))
    )
    C, weight, batches = X.T @ X / len(X), 3.0, [range(0, 1), range(1, 9), range(9, 29), range(29, 50)]
    factor, system, W = regular_factor(C), KeySystem.empty(64, weight), W0
    for batch in batches:
        k = K[batch]
        made, system, _ = memit_history_update(k, V[batch] - k @ W.T, C, factor, system)
        W = W + made.dense()
    once, _ = memit_update(K, V - K @ W0.T, C, weight)
    assert relative(W - W0, once.dense()) < 1e-8
    apart = W0 + sum(memit_update(K[b], V[b] - K[b] @ W0.T, C, weight)[0].dense() for b in batches)
    assert relative(apart - W0, once.dense()) > 0.1, "batches that know nothing of each other do as well"


@pytest.mark.parametrize("layers", [(2,), LAYERS], ids=["one layer", "two layers"])
def test_history_through_a_session(
    layers: tuple[int, ...],
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """A float64 model, one fact a batch, values of the unedited model, plain keys: one layer ends where one edit of all
    does (as near as factors in float32 allow); two do not, since the upper one's keys move with the lower one."""
    model = make("llama")
    model.hf.double()
    values = HPARAMS | {"layers": layers}
    known = optimise_values(model, FACTS, (), plain(values))
    rows = {fact.id: i for i, fact in enumerate(FACTS)}

    def of_the_unedited(model: rewire.Model, facts: Sequence[rewire.Fact], *args: Any, **options: Any) -> Values:
        at = [rows[fact.id] for fact in facts]
        columns = {field.name: getattr(known, field.name) for field in fields(known)}
        return Values(**{n: c[at] if isinstance(c, Tensor) else c for n, c in columns.items()})

    monkeypatch.setattr("rewire.engine.editors.spreading.optimise_values", of_the_unedited)
    total = {}
    for method, batches in (
        ("memit", [FACTS]),
        ("memit-history", [[fact] for fact in FACTS]),
        ("memit", [[f] for f in FACTS]),
    ):
        session = rewire.EditSession(copy.deepcopy(model), method, corpus=corpus, contexts=(), hparams=values)
        for batch in batches:
            session.edit(batch, evaluate=False)
        name = f"{projections(model, layers)[-1]}.weight"
        total[method, len(batches)] = sum(update[name].dense().double() for update in session.weights.updates)
    once = total["memit", 1]
    difference = relative(total["memit-history", 3], once)  # type: ignore[arg-type]
    record_property("difference from one edit", difference)
    if len(layers) == 1:
        assert difference < 1e-6
        assert relative(total["memit", 3], once) > 100 * difference  # type: ignore[arg-type]
    else:
        assert 1e-3 < difference < 1, f"over {len(layers)} layers the sum differs by {difference:.1e}"
