from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire.kernels.errors import InputError
from rewire.stats.names import (
    Name,
    ecosystem_path,
    file_name,
    find,
    layer_number,
    layers_in,
    list_layer,
    natural,
    parse_name,
)

LAYER = "transformer.h.1.mlp.c_proj"
NAME = f"{LAYER}_float32_mom2_300.npz"


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@given(
    layer=st.from_regex(r"\A[a-z_]+(\.[a-z_0-9]+){0,4}\Z"),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    documents=st.none() | st.integers(0, 10**9),
    cap=st.none() | st.integers(1, 10**6),
    suffix=st.sampled_from([".npz", ".safetensors"]),
)
def test_what_a_name_says_is_what_it_was_made_of(
    layer: str, dtype: str, documents: int | None, cap: int | None, suffix: str
) -> None:
    name = file_name(layer, dtype, documents, cap, suffix)
    assert parse_name(Path("anywhere") / name) == Name(layer, dtype, documents, cap)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h.1_float32_mom2_100000.npz", ("h.1", "float32", 100000, None)),
        ("h.1_float32_mom2_t{batch_tokens}_100000.npz", ("h.1", "float32", 100000, None)),
        ("h.1_float32_mom2_100000_t{batch_tokens}.npz", ("h.1", "float32", 100000, None)),
        ("h.1_float32_mom2_t512_100000.npz", ("h.1", "float32", 100000, 512)),
        ("h.1_float32_mom2_100000_t512.safetensors", ("h.1", "float32", 100000, 512)),
        ("h.1_float32_mom2.npz", ("h.1", "float32", None, None)),
        ("h.1_float64_mean-mom2-norm_mean_7.npz", ("h.1", "float64", 7, None)),
        ("h_1_float32_mom2_float32_mom2_3.npz", ("h_1_float32_mom2", "float32", 3, None)),
        ("h.1_float32_mean_100000.npz", None),
        ("h.1_float32_mom2_100000.json", None),
        ("h.1_float32_mom2_100000.npz.123.tmp", None),
        ("h.1_float32_mom2_many.npz", None),
        ("_float32_mom2_3.npz", None),
    ],
)
def test_names_of_others(name: str, expected: tuple[str, str, int | None, int | None] | None) -> None:
    assert parse_name(name) == (Name(*expected) if expected else None)


def test_where_published_code_looks() -> None:
    root = Path("data/stats")
    last = ecosystem_path(root, "EleutherAI/gpt-j-6B", "wikipedia", LAYER, 300)
    assert last == root / "gpt-j-6B" / "wikipedia_stats" / NAME
    whole = ecosystem_path(root, "EleutherAI/gpt-j-6B", "wikipedia", LAYER, 300, "whole")
    assert whole == root / "EleutherAI_gpt-j-6B" / "wikipedia_stats" / NAME


def test_layers_come_in_the_order_of_their_numbers() -> None:
    names = ["h.10.proj", "h.2.proj", "h.2.mlp.proj", "h.1.proj", "proj"]
    assert sorted(names, key=natural) == ["h.1.proj", "h.2.mlp.proj", "h.2.proj", "h.10.proj", "proj"]
    assert [layer_number(name) for name in names] == [10, 2, 2, 1, None]


@pytest.mark.parametrize("folder", ["", "wikipedia_stats", "gpt-j-6B/wiki_stats", "EleutherAI_gpt-j-6B/wiki_stats"])
@pytest.mark.parametrize("suffix", ["_100000", "_100000_t128", "_t{batch_tokens}_100000", "_t512_100000", ""])
def test_find(tmp_path: Path, folder: str, suffix: str) -> None:
    path = put(tmp_path / folder / f"{LAYER}_float32_mom2{suffix}.npz")
    put(tmp_path / folder / "transformer.h.11.mlp.c_proj_float32_mom2_100000.npz")
    put(tmp_path / folder / "transformerXh.1.mlp.c_proj_float32_mom2_100000.npz")
    put(tmp_path / "gpt2-xl" / "wiki_stats" / NAME)
    assert find(tmp_path, LAYER, "EleutherAI/gpt-j-6B") == path
    assert find(tmp_path, LAYER, "EleutherAI/gpt-j-6B", n_samples=7) == path
    ours = put(path.with_suffix(".safetensors"))
    assert find(tmp_path, LAYER, "EleutherAI/gpt-j-6B") == ours, "of the same name ours is taken"
    assert list_layer(tmp_path / folder, LAYER) == [ours]


def test_several_are_decided_by_the_sample_size(tmp_path: Path) -> None:
    small, large = put(tmp_path / NAME), put(tmp_path / "wiki_stats" / NAME.replace("300", "5000"))
    assert find(tmp_path, LAYER, n_samples=300) == small
    assert find(tmp_path, LAYER, n_samples=5000) == large
    for asked in (None, 7):
        with pytest.raises(InputError) as caught:
            find(tmp_path, LAYER, n_samples=asked)
        assert str(caught.value) == (
            f"{tmp_path}: several statistics for {LAYER}: {NAME}, wiki_stats/{large.name}; expected one: "
            "name the folder that holds it, or set mom2_n_samples to its number"
        )
    put(tmp_path / "other_stats" / NAME)
    with pytest.raises(InputError, match=r"several .* other_stats/"):
        find(tmp_path, LAYER, n_samples=300)


def test_files_that_do_not_say_their_documents_are_not_taken_for_each_other(tmp_path: Path) -> None:
    put(tmp_path / NAME.replace("_300", ""))
    put(tmp_path / NAME.replace("300", "t512"))
    with pytest.raises(InputError, match="several statistics"):
        find(tmp_path, LAYER)


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder; expected one with statistics"):
        find(tmp_path / "none", LAYER)

    def looked(model: str = "") -> str:
        with pytest.raises(InputError) as caught:
            find(tmp_path, LAYER, model)
        return str(caught.value)

    wanted = f"{tmp_path}: no statistics for {LAYER} (looked for {LAYER}_float32_mom2_*.safetensors or .npz in: "
    assert looked() == f"{wanted}there, *_stats/); found nothing"
    (tmp_path / "notes.txt").touch()
    assert looked("a/b").startswith(f"{wanted}there, *_stats/, b/*_stats/, a_b/*_stats/); found notes.txt")
    for i in range(2, 8):
        put(tmp_path / "b" / "w_stats" / f"h.{i}.c_proj_float32_mom2_300.npz")
    assert looked("a/b").endswith(
        "found b/w_stats/h.2.c_proj_float32_mom2_300.npz, b/w_stats/h.3.c_proj_float32_mom2_300.npz, "
        "b/w_stats/h.4.c_proj_float32_mom2_300.npz, b/w_stats/h.5.c_proj_float32_mom2_300.npz and 2 more"
    )


def test_layers_in(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2-xl" / "wikipedia_stats"
    paths = {n: put(folder / f"h.{n}.proj_float32_mom2_300.npz") for n in (10, 9, 2)}
    again = put(folder / "h.9.proj_float32_mom2_500.safetensors")
    put(folder / "notes.npz")
    wanted = {"h.2.proj": [paths[2]], "h.9.proj": [paths[9], again], "h.10.proj": [paths[10]]}
    for directory, model in [(folder, ""), (folder.parent, ""), (tmp_path, "openai/gpt2-xl"), (tmp_path, "")]:
        found = layers_in(directory, model)
        assert found == wanted
        assert list(found) == list(wanted)
    assert layers_in(paths[2]) == {"h.2.proj": [paths[2]]}
    put(tmp_path / "gpt-j-6B" / "wikipedia_stats" / "h.1.proj_float32_mom2_300.npz")
    with pytest.raises(InputError, match=r"statistics of several models: gpt-j-6B, gpt2-xl; name the folder of one"):
        layers_in(tmp_path)
    assert layers_in(tmp_path, "gpt2-xl") == wanted


def test_no_layers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no statistics for a layer \(looked for {layer}_float32_.*found nothing"):
        layers_in(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        layers_in(tmp_path / "no")
    with pytest.raises(InputError, match=r"notes.npz: is not named as statistics are"):
        layers_in(put(tmp_path / "notes.npz"))
