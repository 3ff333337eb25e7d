"""Who may import whom (DESIGN.md §1), read from the sources; what is packaged; and that the face is lazy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rewire

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # room -> rooms that it may import
    "kernels": set(),
    "stats": {"kernels"},
    "engine": {"stats", "kernels"},
    "bench": {"engine", "stats", "kernels"},
    # `kernels.errors` holds the exception that the command prints
    "cli": {"bench", "engine", "stats", "kernels.errors"},
    "hparams": set(),
}
# inside engine each may import what stands left of it
ENGINE = (
    *("phases", "finite", "objective", "facts", "anatomy", "model", "outline", "prompts"),
    *("presets", "wrong", "hparams"),
    *("passes", "streams", "statistics", "fit"),
    *("branches", "scores", "entry", "suffix", "walk", "datasets", "neighbors", "keys"),
    *("value_groups", "value_steps", "value_store", "values", "value_turns", "delta", "beside"),
    *("endings", "kept", "decoding", "answer_store", "asked", "judges"),
    *("solve", "plan", "evaluation", "editors", "edits", "held", "report"),
    *("session", "experiment", "page", "compat"),
)


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """(line, full dotted name, whether it was written as a relative import) of every import anywhere in `source`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name]), node.level > 0
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and not name.startswith("."):
                yield node.lineno, name, False


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, were it the module `module` ("rewire.engine.keys"), imports against the law."""
    room, *inside = module.split(".")[1:]
    found = []
    for line, name, relative in imported(source, module, is_package):
        parts = name.split(".")
        if not relative:
            if parts[0] in ROOMS:
                found.append(f"{module}:{line}: {name} by a room's bare name")
            elif parts[0] == "rewire":
                found.append(f"{module}:{line}: {name} is not imported relatively")
            continue
        if parts[0] != "rewire":
            found.append(f"{module}:{line}: {name} leaves the package")
        elif parts[1:] == ["__version__"]:
            pass
        elif len(parts) < 2 or parts[1] not in ROOMS:
            found.append(f"{module}:{line}: {name} is of the face; only __version__ may be taken from there")
        elif parts[1] != room:
            if not any(".".join(parts[1:]).startswith(allowed) for allowed in ROOMS[room]):
                found.append(f"{module}:{line}: {room} may not import {name}")
        elif room == "engine" and inside:
            # `from . import x` names a module of engine, or nothing that this law knows
            if len(parts) < 3 or parts[2] not in ENGINE:
                found.append(f"{module}:{line}: {name} stands nowhere in the order of engine")
            elif inside[0] not in ENGINE:
                found.append(f"{module}:{line}: {inside[0]} stands nowhere in the order of engine")
            elif inside[0] != parts[2] and ENGINE.index(parts[2]) > ENGINE.index(inside[0]):
                found.append(f"{module}:{line}: {inside[0]} may not import {parts[2]}, which stands right of it")
    return found


def modules(room: str) -> Iterator[tuple[Path, str, bool]]:
    for path in sorted((ROOT / room).rglob("*.py")):
        parts = ["rewire", *path.relative_to(ROOT).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_import_what_they_may(room: str) -> None:
    files = list(modules(room))
    assert files
    assert [breach for path, name, package in files for breach in breaches(path.read_text(), name, package)] == []


def test_every_module_of_engine_has_its_place() -> None:
    there = {path.stem if path.is_file() else path.name for path in (ROOT / "engine").iterdir() if python(path)}
    assert there - {"__init__"} <= set(ENGINE)


@pytest.mark.parametrize(
    ("source", "module", "reason"),
    [
        ("from .session import EditSession", "rewire.engine.facts", "stands right of it"),
        ("from . import session", "rewire.engine.facts", "stands right of it"),
        ("from ..session import EditSession", "rewire.engine.editors.memit", "stands right of it"),
        ("def f():\n    from .session import EditSession", "rewire.engine.facts", "stands right of it"),
        ("from .util import x", "rewire.engine.facts", "nowhere in the order"),
        ("from .facts import Fact", "rewire.engine.util", "nowhere in the order"),
        ("from ..engine.model import Model", "rewire.stats.collect", "stats may not import"),
        ("from ..stats import read_corpus", "rewire.kernels.floors", "kernels may not import"),
        ("from ..engine import model", "rewire.kernels.floors", "kernels may not import"),
        ("from ..bench.serial import serial_value", "rewire.engine.values", "engine may not import"),
        ("from ..kernels.gram import gram", "rewire.cli.edit", "cli may not import"),
        ("from ..cli.app import app", "rewire.bench.values", "bench may not import"),
        ("import kernels", "rewire.engine.solve", "bare name"),
        ("from kernels.gram import gram", "rewire.engine.solve", "bare name"),
        ("import torch, engine.model", "rewire.engine.solve", "bare name"),
        ("import_module('stats.store')", "rewire.engine.solve", "bare name"),
        ("import rewire", "rewire.engine.solve", "not imported relatively"),
        ("from rewire.kernels import gram", "rewire.engine.solve", "not imported relatively"),
        ("from .. import load", "rewire.cli.edit", "only __version__"),
        ("from ..demo.world import people", "rewire.bench.values", "only __version__"),
        ("from ... import x", "rewire.stats.store", "leaves the package"),
    ],
)
def test_the_checker_finds(source: str, module: str, reason: str) -> None:
    (breach,) = breaches(source, module)
    assert reason in breach


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch\nfrom pathlib import Path", "rewire.kernels.floors"),
        ("from .. import __version__", "rewire.stats.supply"),
        ("from ..kernels.spd_solve import spd_solve\nfrom .delta import Factors", "rewire.engine.solve"),
        ("from ..facts import Fact\nfrom ...kernels.errors import InputError", "rewire.engine.datasets.zsre"),
        ("from .registry import Job", "rewire.engine.editors.memit"),
        ("from ..engine.session import EditSession\nfrom ..kernels.errors import InputError", "rewire.cli.edit"),
    ],
)
def test_the_checker_lets_pass(source: str, module: str) -> None:
    assert breaches(source, module) == []


def test_the_face_imports_nothing_at_once() -> None:
    eager = [name for _, name, _ in imported((ROOT / "rewire/__init__.py").read_text(), "rewire", True)]
    assert set(eager) <= {"importlib.import_module", "typing.Any"}


def test_import_is_lazy() -> None:
    program = (
        "import sys, rewire; heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'yaml'} & set(sys.modules);"
        "assert not heavy, heavy; rewire.Fact; assert 'torch' not in sys.modules; print(rewire.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd="/")
    assert (run.returncode, run.stdout.strip()) == (0, rewire.__version__), run.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--help",), ("--version",), ("edit", "--help"), ("stats", "--help"), ("bench", "stats", "--help"),
        ("presets", "memit", "gpt2-xl"), ("presets", "memitt"), ("edit", "demo", "nonesuch.jsonl", "--out", "x"),
        ("evaluate", "--validate", "nonesuch.jsonl"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_needs_no_model_waits_for_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    program = (
        f"import sys; sys.argv = {['rewire', *words]!r}\nfrom rewire.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode in (0, 2), run.stderr
    assert "AssertionError" not in run.stderr


def test_every_public_name_is_there() -> None:
    assert {"load", "wrap", "read_facts", "EditSession", "evaluate", "Fact", "Delta", "InputError"} <= set(dir(rewire))
    for name in rewire.__all__:
        assert getattr(rewire, name) is not None
    assert set(rewire.__all__) <= set(dir(rewire))
    with pytest.raises(AttributeError, match=r"'nonesuch'.*EditSession"):
        rewire.nonesuch  # noqa: B018


def python(path: Path) -> bool:
    return path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))


def packaged() -> tuple[dict[str, str], dict[str, list[str]]]:
    """`PACKAGES` and `package_data` of setup.py, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    packages = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PACKAGES"
    )
    keywords = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    data = next(ast.literal_eval(word.value) for word in keywords if word.arg == "package_data")
    return packages, data


def test_every_package_is_listed() -> None:
    packages, _ = packaged()
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")} | {ROOT / "rewire"}
    wanted = {".".join(["rewire", *f.relative_to(ROOT).parts]) if f.name != "rewire" else "rewire": f for f in folders}
    assert packages == {name: str(folder.relative_to(ROOT)) for name, folder in wanted.items()}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_presets_demo_and_page_are_package_data() -> None:
    packages, data = packaged()

    def covered(package: str, path: Path) -> bool:
        name = path.relative_to(ROOT / packages[package])
        return any(len(name.parts) == p.count("/") + 1 and name.match(p) for p in data.get(package, ()))

    presets = list((ROOT / "hparams").rglob("*.yaml"))
    demo = [p for p in (ROOT / "rewire/demo").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert presets
    assert [p for p in presets if not covered("rewire.hparams", p)] == []
    assert [p for p in [*demo, ROOT / "rewire/py.typed"] if not covered("rewire", p)] == []
    page = [p for p in (ROOT / "engine/page").iterdir() if p.suffix in (".html", ".css", ".js")]
    assert len(page) == 3
    assert [p for p in page if not covered("rewire.engine.page", p)] == []
