from pathlib import Path

import psutil
import pytest
import torch

from rewire.stats import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container's, of which 900 bytes of 1000 are used."""
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 700\nshmem 100\nactive_file 150\ninactive_file 450\n")
    return tmp_path


def test_files_that_were_read_are_free_memory(group: Path) -> None:
    """After a large corpus nearly all that a container may use is its cache: a batch would shrink to one token."""
    assert memory.free_bytes(torch.device("cpu")) == 1000 - 900 + 600


@pytest.mark.parametrize("name", ["memory.max", "memory.stat"])
def test_no_limit(group: Path, name: str) -> None:
    (group / name).write_text("max\n" if name == "memory.max" else "")
    assert memory.free_bytes(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available, rel=0.3)
