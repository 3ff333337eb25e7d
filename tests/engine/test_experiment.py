"""Experiments: what is asked for, and where its data and results lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewire
from rewire.engine.experiment import names
from rewire.engine.experiment.config import Experiment, read_experiment
from rewire.engine.experiment.data import facts_file, facts_of, texts_of

# names


@pytest.mark.parametrize(
    ("name", "parsed", "published"),
    [
        ("memit", ("memit", False, False), "MEMIT"),
        ("MEMIT_RECURSIVE", ("memit", True, False), "MEMIT_RECURSIVE"),
        ("pmet_recursive_neighbor", ("pmet", True, True), "PMET_RECURSIVE_NEIGHBOR"),
        ("AlphaEdit_RECURSIVE_NEIGHBOR", ("alphaedit", True, True), "AlphaEdit_RECURSIVE_NEIGHBOR"),
        ("ROME_RECURSIVE", ("rome", True, False), "ROME_RECURSIVE"),
        ("memit-history", ("memit-history", False, False), "memit-history"),
    ],
)
def test_names_of_methods(name: str, parsed: tuple[str, bool, bool], published: str) -> None:
    algorithm = names.parse(name)
    assert (algorithm.method, algorithm.recursive, algorithm.neighbors) == parsed
    assert names.published(algorithm, 1, algorithm.neighbors) == published
    assert names.parse(algorithm.name) == algorithm
    assert names.published(algorithm, 5, algorithm.neighbors).endswith(("_RECURSIVE", "_RECURSIVE_NEIGHBOR"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MEMITT_RECURSIVE", "did you mean 'memit'"),
        ("MEMIT_RECURSIVE_SPREAD", "is not here"),
        ("PMET_RECURSIVE_WO_NEIGHBOR", "is not here"),
        ("_NEIGHBOR", "unknown method"),
    ],
)
def test_methods_that_are_not_there(name: str, said: str) -> None:
    with pytest.raises(rewire.InputError, match=said):
        names.parse(name)


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names.locate("gpt-j-6B") == "EleutherAI/gpt-j-6B"
    assert names.locate("me/mine") == "me/mine"
    (tmp_path / "hugging_cache" / "gpt-j-6B").mkdir(parents=True)
    assert names.locate("gpt-j-6B") == "hugging_cache/gpt-j-6B"
    (tmp_path / "gpt-j-6B").mkdir()
    assert names.locate("gpt-j-6B") == "gpt-j-6B"
    assert names.collection("meta-llama/Llama-2-7b-hf") == names.collection("llama-2-7b") == "llama-2-7b"
    with pytest.raises(rewire.InputError, match="no published ones of demo"):
        names.collection("demo")


# what is asked for


def test_the_published_layout() -> None:
    asked = {"model": "gpt2-xl", "data": "mcf", "num_edits": 1000, "subset": 1, "method": "MEMIT_RECURSIVE"}
    folder = read_experiment(None, asked).folder(1000)
    assert folder == Path("results/MEMIT_RECURSIVE/gpt2-xl/mcf/N_1000/S_1/I_5")
    assert read_experiment(None, asked | {"iterations": 1}).folder(0).name == "I_1"
    ours = read_experiment(None, asked | {"method": "memit", "iterations": 5})
    assert (ours.folder(0), ours.label(0)) == (folder, "MEMIT_RECURSIVE_gpt2-xl_mcf_N_1000_S_1_I_5")
    assert read_experiment(None, asked | {"method": "memit"}).name == "MEMIT"
    helped = read_experiment(None, asked | {"neighbors": True})
    assert helped.name == "MEMIT_RECURSIVE_NEIGHBOR"
    named = read_experiment(None, {"model": "a/b", "data": "mcf", "num_edits": 960, "method": "alphaedit_NEIGHBOR"})
    assert (named.subset, named.neighbors) == (960, True)
    file = read_experiment(None, {"model": "/x/cf-gpt2", "data": "my/facts.v2.jsonl", "batch": 10, "out": "o"})
    plain = read_experiment(None, {"model": "demo", "data": "/x/facts", "out": "o"})
    assert plain.folder(3) == Path("o/MEMIT/demo/facts/N_3/S_0/I_1")
    assert file.folder(30) == Path("o/MEMIT/cf-gpt2/facts.v2/N_30/S_0/B_10/I_1")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("model: demo\ndata: mcf\niterations: 3\nseed: 4\nset: {v_lr: 5e-1, layers: [1]}\n")
    made = read_experiment(path, {"iterations": 2, "data": None, "set": {"v_lr": 0.1}})
    assert (made.iterations, made.seed, made.data) == (2, 4, "mcf")
    assert made.set == {"v_lr": 0.1, "layers": [1]}


def test_a_method_is_one_by_whichever_name() -> None:
    asked = {"model": "demo", "data": "mcf", "subset": 1, "iterations": 2}
    ours, published = (read_experiment(None, asked | {"method": name}) for name in ("memit", "MEMIT_RECURSIVE"))
    assert (ours.folder(3), ours.wanted) == (published.folder(3), published.wanted)
    assert ours.differs(published) == []
    assert ours.wanted != read_experiment(None, asked | {"method": "rome"}).wanted


def test_the_shipped_example() -> None:
    shipped = Path(__file__).resolve().parents[2] / "docs" / "experiment.yaml"
    assert list(yaml.safe_load(shipped.read_text())) == list(Experiment.model_fields)
    made = read_experiment(shipped)
    assert made == read_experiment(
        None, {"model": "gpt2-xl", "method": "MEMIT_RECURSIVE", "data": "mcf", "subset": 1, "num_edits": 1000}
        | {"dtype": "float32"},
    )  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.fixed_dictionaries(
        {"model": st.sampled_from(["demo", "a/b", "é"]), "data": st.sampled_from(["mcf", "x.jsonl"])},
        optional={
            "method": st.sampled_from(["memit", "MEMIT_RECURSIVE", "AlphaEdit_RECURSIVE_NEIGHBOR"]),
            "subset": st.integers(0, 99),
            "num_edits": st.integers(1, 2000),
            "iterations": st.integers(1, 9),
            "batch": st.integers(1, 100),
            "stop_gap": st.floats(0, 1e9),
            "compat": st.booleans(),
            "set": st.fixed_dictionaries({}, optional={"v_lr": st.floats(1e-6, 9), "layers": st.just([1, 2])}),
        },
    )
)
def test_what_is_written_is_read_back(keys: dict[str, Any], tmp_path: Path) -> None:
    made = read_experiment(None, keys)
    (tmp_path / "e.yaml").write_text(made.dump(), encoding="utf-8")
    again = read_experiment(tmp_path / "e.yaml")
    assert again == made
    assert again.folder(7) == made.folder(7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: demo\ndata: mcf\nitertions: 3", "{path}: unknown key 'itertions'; did you mean 'iterations'?"),
        ("model: demo\ndata: mcf\nalg_name: ROME", "{path}: unknown key 'alg_name'; did you mean 'method'?"),
        ("model: demo", "{path}: data is missing, and there is no --data; expected a data set, or a file of facts"),
        ("data: mcf", "{path}: model is missing, and there is no --model; expected a model"),
        ("- demo", "{path}: list found, expected the keys of an experiment (model, data, ...)"),
        ("model: demo\ndata: mcf\niterations: 0", "{path}: iterations: 0 found, expected 1 or more"),
        ("model: demo\ndata: mcf\nbatch: many", "{path}: batch: 'many' found, expected a whole number"),
        ("model: demo\ndata: mcf\nbatch: 1.5", "{path}: batch: 1.5 found, expected a whole number"),
        ("model: demo\ndata: [mcf]", "{path}: data: ['mcf'] found, expected a text"),
        ("model: demo\ndata: mcf\nstop_gap: -1", "{path}: stop_gap: -1 found, expected 0 or more"),
        ("model: demo\ndata: mcf\nstop_gap: .inf", "{path}: stop_gap: inf found, expected a finite number"),
        ("model: demo\ndata: mcf\ncompat: maybe", "{path}: compat: 'maybe' found, expected true or false"),
        ("model: ''\ndata: mcf", "{path}: model: '' found, expected a text that is not empty"),
        ("model: demo\ndata: mcf\nout: 3", "{path}: out: 3 found, expected a path"),
        ("model: demo\ndata: mcf\ndtype: float23", "{path}: dtype: 'float23' found, expected auto, checkpoint, float"),
        ("model: demo\ndata: a.json\nconvention: zs", "{path}: convention: 'zs' found, expected 'zsre' or 'zsre-alt'"),
        ("model: demo\ndata: zsre\nconvention: zsre-alt", "data 'zsre' says how it is read, convention 'zsre-alt' oth"),
        ("model: demo\ndata: mcf\nset: [v_lr]", "{path}: set: ['v_lr'] found, expected a mapping of hyper-parameters"),
        ("model: demo\ndata: mcf\nset: {v_lrr: 1}", "{path}: set: unknown hyper-parameter 'v_lrr'; did you mean 'v_l"),
        ("model: demo\ndata: mcf\nset: {v_lr: fast}", "{path}: set: v_lr: 'fast' found, expected a number"),
        ("model: demo\ndata: mcf\nset: {v_lr: 0}", "{path}: set: v_lr: 0 found, expected more than 0"),
        ("model: demo\ndata: mcf\nset: {layers: 3}", "{path}: set: layers: 3 found, expected a list of layer numbers"),
        ("model: demo\ndata: mcf\nset: {layers: [a]}", "{path}: set: layers.0: 'a' found, expected a whole number"),
        ("model: demo\ndata: mcf\nmethod: rome\nset: {layers: [1, 2]}", "layers: [1, 2] found, expected a list of at"),
        ("model: demo\ndata: mcf\nmethod: memmit", "unknown method 'memmit'; did you mean 'memit'?"),
        ("model: demo\ndata: mcf\nmethod: 3", "{path}: method: 3 found, expected a text"),
        ("model: demo\ndata: mcf\nmethod: MEMIT_NEIGHBOR\nneighbors: false", "'MEMIT_NEIGHBOR' has neighbours' help"),
        ("model: [demo", "{path}: line 1: broken YAML (expected ',' or ']', but got '<stream end>')"),
        ("model: demo\ndata: mcf\n\tseed: 1", "{path}: line 3: broken YAML (found character '\\t' that cannot start"),
        ("model: \x07", "{path}: broken YAML ("),
    ],
)  # fmt: skip
def test_keys_that_are_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(rewire.InputError) as error:
        read_experiment(path)
    assert said.format(path=path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "Input should" not in str(error.value)


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(rewire.InputError, match=r"^--num-edits: 0 found, expected 1 or more$"):
        read_experiment(None, {"model": "demo", "data": "mcf", "num_edits": 0})
    with pytest.raises(rewire.InputError, match=r"^--model is missing; expected a model: name it, or a FILE with"):
        read_experiment(None, {"data": "mcf"})


def test_a_setting_is_said_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("model: demo\ndata: mcf\nset: {v_lr: fast, kl_factor: 1}\n")
    assert read_experiment(path, {"set": {"v_lr": 0.1}}).set == {"v_lr": 0.1, "kl_factor": 1}
    for flags, said in (
        ({"kl_factor": -1}, r"set: v_lr: 'fast'"),
        ({"v_lr": 1, "kl_factor": -1}, r"^--set: kl_factor: -1"),
    ):
        with pytest.raises(rewire.InputError, match=said):
            read_experiment(path, {"set": flags})


# its data


def test_where_data_sets_are_looked_for(tmp_path: Path) -> None:
    def found(**keys: Any) -> str:
        experiment = read_experiment(None, {"model": "demo", "data": "mcf", "data_dir": tmp_path, **keys})
        return str(facts_file(experiment).relative_to(tmp_path))

    def put(name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")

    with pytest.raises(
        rewire.InputError, match=r"mcf_random_subsets_20/random_subset_1.json, .*mcf_subset_1.json is t"
    ):
        found(num_edits=20, subset=1)
    with pytest.raises(rewire.InputError, match="which subset"):
        found(num_edits=20)
    with pytest.raises(rewire.InputError, match="has nothing of mcf; say --data-dir"):
        found(num_edits=20, subset=1)
    with pytest.raises(rewire.InputError, match=f"there is no folder {tmp_path / 'no'}; say --data-dir"):
        found(subset=1, data_dir=tmp_path / "no")
    put("mcf_subset_1.json")
    assert found(num_edits=20, subset=1) == found(subset=1) == "mcf_subset_1.json"
    put("mcf_random_subsets_1000/random_subset_1.json")
    assert found(num_edits=20, subset=1) == "mcf_random_subsets_1000/random_subset_1.json"
    assert found(num_edits=2000, subset=1) == "mcf_subset_1.json"
    put("mcf_random_subsets_20/random_subset_1.json")
    assert found(num_edits=20, subset=1) == "mcf_random_subsets_20/random_subset_1.json"
    put("mcf_neighbors_960.json")
    assert found(num_edits=960, method="MEMIT_RECURSIVE_NEIGHBOR") == "mcf_neighbors_960.json"
    put("zsre_subset_1.json")
    assert found(data="zsre-alt", subset=1) == "zsre_subset_1.json"
    there = (
        "mcf_random_subsets_1000/random_subset_1.json, mcf_random_subsets_20/random_subset_1.json, mcf_subset_1.json, "
    )
    for subset in (7, None):
        with pytest.raises(rewire.InputError, match=f"; {tmp_path} has {there}mcf_neighbors_960.json"):
            found(subset=subset)
    for data, said in (("nonesuch", "no such file, and no data set"), ("no.jsonl", "no such file")):
        with pytest.raises(rewire.InputError, match=said):
            facts_of(read_experiment(None, {"model": "demo", "data": data}))


def test_a_file_of_zsre(tmp_path: Path) -> None:
    record = {"subject": "Moe", "src": "Who is Moe?", "rephrase": "Moe?", "alt": "Bo", "answers": ["Al"]}
    record |= {"loc": "nq question: who", "loc_ans": "Cy", "pred": "", "cond": ""}
    (tmp_path / "mine.json").write_text(json.dumps([record]))
    asked = {"model": "demo", "data": str(tmp_path / "mine.json")}
    for convention, new in (("zsre", "Al"), ("zsre-alt", "Bo")):
        (fact,) = facts_of(read_experiment(None, asked | {"convention": convention}))
        assert fact.target_new == new
    with pytest.raises(rewire.InputError, match="say which with --convention"):
        facts_of(read_experiment(None, asked))


def test_published_sets(shared: Path) -> None:
    asked = {"model": "gpt-j-6B", "data_dir": shared / "data"}
    helped = facts_of(
        read_experiment(None, asked | {"method": "PMET_RECURSIVE_NEIGHBOR", "data": "mcf", "num_edits": 960})
    )
    assert len(helped) == 960
    kept = {neighbor.question for fact in helped for neighbor in fact.edit_neighbors}
    assert not any(prompt in kept for fact in helped for prompt in fact.neighbors)
    one, other = (
        facts_of(read_experiment(None, asked | {"data": data, "subset": 0, "num_edits": 2}))
        for data in ("zsre", "zsre-alt")
    )
    assert (one[0].target_new, other[0].target_new) == ("Daniel Libeskind", "Mitsumasa Anno")
    assert len(texts_of(read_experiment(None, asked | {"data": "mcf"}))) == 50
