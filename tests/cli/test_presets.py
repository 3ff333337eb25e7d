"""`rewire presets`: the list, one model's values by source, and where sources differ."""

import re

import pytest

from commands import Command, complaint


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_the_list_has_the_default_of_each_model(run: Command) -> None:
    shown = run("presets", "alphaedit").out
    lines = [line for line in shown.splitlines() if "llama-3-8b@" in line]
    assert ["default" in line for line in lines] == [True, False, False]
    assert re.search(r"llama-3-8b@alphaedit .*\[4, 5, 6, 7, 8\] .*alphaedit, underedit", lines[0])


def test_one_models_values_stand_side_by_side(run: Command) -> None:
    shown = run("presets", "alphaedit", "meta-llama/Meta-Llama-3-8B").out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in shown.splitlines()
        if "│" in line
    }
    assert rows["* L2"] == ["10", "1", "10"]
    assert rows["v_lr"] == ["0.1", "0.1", "0.1"]
    assert [key for key in rows if key.startswith("*")] == ["* L2", "* mom2_n_samples"]
    assert "easyedit: zjunlp/EasyEdit, hparams/AlphaEdit/llama3-8b.yaml" in shown
    assert "-: not given" not in shown
    assert "-: not given" in run("presets", "memit", "llama-3-8b").out  # EAMET's


def test_names_are_whole_in_80_columns(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("presets", "memit", "llama-3-8b").out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert ["* mom2_update_weight", "15000", "15000", "1000", "15000"] in rows
    assert ["v_num_grad_steps", "25", "25", "25", "25"] in rows
    assert [row[0] for row in rows if row[0].endswith("rewrite_module_tmp")] == []
    assert "rewrite_module_tmp, of all: model.layers.{}.mlp.down_proj" in lines
    said = " ".join(line.strip() for line in lines)
    assert "underedit: UnderEdit/OverEdit release (arXiv 2503.11895), MEMIT_RECURSIVE for llama3-8b alphaedit: " in said
    one = run("presets", "memit", "gpt2-xl").out  # alone, all values stand in the table
    assert re.search(r"│   rewrite_module_tmp +│ transformer\.h\.\{\}\.mlp\.c_proj +│", one)
    listed = run("presets", "memit").out
    assert "baichuan-7b@easyedit" in listed
    assert "…" not in listed
    monkeypatch.setenv("COLUMNS", "60")
    assert "…" not in run("presets", "memit", "llama-3-8b").out


def test_conflicts_say_who_says_what(run: Command) -> None:
    lines = run("presets", "--conflicts").out.splitlines()
    assert any(
        re.search(r"alphaedit .*llama-3-8b .*L2 .*10: alphaedit, underedit, encore; 1: easyedit", line)
        for line in lines
    )
    assert not any("gpt-j-6B" in line and "alphaedit" in line for line in lines)  # all agree
    found = run("presets", "rome", "gpt2-xl", "--conflicts", "--json").json
    assert found == {
        "rome": {
            "gpt2-xl": {
                "mom2_adjustment": [
                    {"value": True, "sources": ["rome", "simie"], "default": True},
                    {"value": False, "sources": ["underedit", "easyedit"], "default": False},
                ]
            }
        }
    }


def test_the_json_is_complete(run: Command) -> None:
    found = run("presets", "memit-history", "llama-3-8b", "--json").json
    preset = found["memit-history"]["llama-3-8b@ours"]
    assert (preset["model"], preset["default"]) == ("llama-3-8b", True)
    assert preset["file"] == "hparams/memit-history/llama-3-8b@ours.yaml"
    assert preset["sources"]["ours"].startswith("the values of memit/llama-3-8b@underedit")
    assert (preset["v_lr"], preset["mom2_update_weight"]) == (0.1, 15000)  # from there


def test_a_model_without_presets(run: Command) -> None:
    message = complaint(run("presets", "r-rome", "gemma-7b"))
    assert message.startswith("no preset of r-rome for gemma-7b; there are presets for cf-gpt2, ")
