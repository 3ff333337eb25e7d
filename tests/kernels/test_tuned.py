"""The table of configurations, and that it is not obeyed blindly."""

import json
import logging
import os
from dataclasses import asdict, dataclass

import pytest

from rewire.kernels import tuned
from rewire.kernels.errors import InputError
from rewire.kernels.tuned import pick


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int = 4


CONFIGS = (Config(64), Config(128), Config(128, 8))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(content): writes it and names it in the environment."""
    monkeypatch.setattr(tuned, "device_name", lambda: "a GPU")
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))

    def write(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_without_a_table_the_first_is_launched(monkeypatch):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    assert pick("gram", "wide", CONFIGS) == CONFIGS[0]


def test_the_table_names_another(table):
    table({"a GPU": {"gram": {"wide": asdict(CONFIGS[2])}}, "another": {"gram": {"narrow": asdict(CONFIGS[1])}}})
    assert pick("gram", "wide", CONFIGS) == CONFIGS[2]
    assert pick("gram", "narrow", CONFIGS) == CONFIGS[0]
    assert pick("requantize", "wide", CONFIGS) == CONFIGS[0]


def test_a_table_written_anew_is_read_anew(table):
    path = table({})
    assert pick("gram", "wide", CONFIGS) == CONFIGS[0]
    table({"a GPU": {"gram": {"wide": asdict(CONFIGS[1])}}})
    os.utime(path, ns=(1, 1))  # a clock may be coarser than this test
    assert pick("gram", "wide", CONFIGS) == CONFIGS[1]


def test_an_unknown_configuration_is_said_once_and_ignored(table, caplog):
    path = table({"a GPU": {"gram": {"wide": {"block": 512, "num_warps": 4}}}})
    with caplog.at_level(logging.INFO, logger="rewire.kernels.tuned"):
        assert [pick("gram", "wide", CONFIGS) for _ in range(3)] == [CONFIGS[0]] * 3
    (said,) = [record.message for record in caplog.records]
    assert str(path) in said
    assert "a GPU, gram, wide" in said
    assert "'block': 512" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Expecting"),
        ("", "Expecting"),
        ([1], r"found \[1\]; expected an object of GPUs"),
        ({"a GPU": 3}, "found 3; expected an object of operations"),
        ({"a GPU": {"gram": "wide"}}, 'found "wide"; expected an object of keys'),
        ({"a GPU": {"gram": {"wide": None}}}, "found null; expected an object of fields"),
    ],
)
def test_a_broken_table_is_named(table, content, says):
    path = table(content)
    with pytest.raises(InputError, match=f"REWIRE_TUNED={path}: .*{says}"):
        pick("gram", "wide", CONFIGS)


def test_bytes_that_are_no_text_are_named(table):
    path = table("")
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=f"REWIRE_TUNED={path}: "):
        pick("gram", "wide", CONFIGS)


def test_a_missing_table_is_named(table):
    with pytest.raises(InputError, match=r"tuned\.json: No such file"):
        pick("gram", "wide", CONFIGS)
