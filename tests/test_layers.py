"""Imports point downwards only, without cycles, and `fastkd.distill` and below need only torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from fastkd._lazy import EXTRA

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (  # top to bottom; packages that share a layer do not import each other
    ("cli",),
    ("train",),
    ("evaluate", "report"),
    ("models",),
    ("data",),
    ("distill",),
    ("losses",),
    ("ops",),
    ("kernels",),
)
ENTRY_POINTS = {"fastkd", "fastkd.__main__", "fastkd._info"}  # may import any layer
TORCH_ONLY = ("distill", "losses", "ops")


class Import(NamedTuple):
    source: str
    target: str
    line: int


def find_modules(root: Path) -> dict[str, Path]:
    """Map module names to files; ``kernels/`` is installed as ``fastkd.kernels``."""
    modules = {}
    for package, prefix in (("fastkd", "fastkd"), ("kernels", "fastkd.kernels"), ("benchmarks", "benchmarks")):
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root / package).with_suffix("").parts
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            modules[name] = file
    return modules


def find_imports(modules: dict[str, Path]) -> Iterator[Import]:
    """Yield every import of one module by another, also inside functions and under TYPE_CHECKING.

    The exception is TYPE_CHECKING in an ``__init__.py``, which repeats names that are loaded on first use.
    """
    for source, file in modules.items():
        for node in _nodes(ast.parse(file.read_text("utf-8")), skip_types=file.name == "__init__.py"):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [name if name in modules else str(node.module) for name in names]
            for target in dict.fromkeys(targets):
                if target in modules and target != source:
                    yield Import(source, target, node.lineno)


def _nodes(tree: ast.AST, skip_types: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if skip_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node, skip_types)


def upward_imports(imports: list[Import]) -> list[str]:
    """Return imports of a layer by a lower one, by another package of its layer, or by a helper below all layers."""
    return [
        f"{one.source}:{one.line} imports {one.target}"
        for one in imports
        if one.source not in ENTRY_POINTS and one.source.partition(".")[0] == "fastkd" and not _is_allowed(one)
    ]


def _is_allowed(one: Import) -> bool:
    source, target = (name.split(".")[1] if "." in name else "" for name in (one.source, one.target))
    if one.target.partition(".")[0] != "fastkd":
        return False
    return source == target or _depth(source) < _depth(target)


def _depth(package: str) -> int:
    return next((depth for depth, layer in enumerate(LAYERS) if package in layer), len(LAYERS))


def import_cycle(imports: list[Import]) -> list[str]:
    """Return the modules of one import cycle, or an empty list."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        graph.setdefault(one.source, set()).add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return list(find_imports(find_modules(ROOT)))


def test_imports_point_downwards(imports: list[Import]) -> None:
    assert len(imports) > 300
    assert upward_imports(imports) == []


def test_no_import_cycles(imports: list[Import]) -> None:
    assert import_cycle(imports) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("fastkd/ops/kl.py", "from fastkd.losses import kd", "fastkd.ops.kl:1 imports fastkd.losses.kd"),
        ("fastkd/ops/kl.py", "def f():\n    import fastkd.losses.kd", "fastkd.ops.kl:2 imports fastkd.losses.kd"),
        (
            "fastkd/losses/kd.py",
            "if TYPE_CHECKING:\n    from fastkd import cli",
            "fastkd.losses.kd:2 imports fastkd.cli",
        ),
        ("fastkd/report/page.py", "from fastkd import evaluate", "fastkd.report.page:1 imports fastkd.evaluate"),
        ("fastkd/_helper.py", "import fastkd.ops.kl", "fastkd._helper:1 imports fastkd.ops.kl"),
        ("kernels/kl.py", "from fastkd.ops import kl", "fastkd.kernels.kl:1 imports fastkd.ops.kl"),
        ("fastkd/cli/run.py", "import benchmarks.measure", "fastkd.cli.run:1 imports benchmarks.measure"),
    ],
)
def test_finds_a_planted_upward_import(tmp_path: Path, file: str, line: str, message: str) -> None:
    plant(tmp_path)
    assert upward_imports(list(find_imports(find_modules(tmp_path)))) == []
    (tmp_path / file).write_text(line + "\n")
    assert upward_imports(list(find_imports(find_modules(tmp_path)))) == [message]


def test_finds_a_planted_cycle(tmp_path: Path) -> None:
    plant(tmp_path)
    assert import_cycle(list(find_imports(find_modules(tmp_path)))) == []
    (tmp_path / "fastkd/losses/other.py").write_text("def f():\n    from fastkd.losses.kd import g\n")
    (tmp_path / "fastkd/losses/kd.py").write_text("import fastkd.losses.other\n")
    assert set(import_cycle(list(find_imports(find_modules(tmp_path))))) == {"fastkd.losses.kd", "fastkd.losses.other"}


def plant(root: Path) -> None:
    """Write a small package whose imports all point downwards."""
    files = {
        "fastkd/__init__.py": "if TYPE_CHECKING:\n    from fastkd import cli\n",
        "fastkd/_helper.py": "",
        "fastkd/cli/__init__.py": "",
        "fastkd/cli/run.py": "from fastkd.report import page\n",
        "fastkd/evaluate/__init__.py": "",
        "fastkd/report/page.py": "from fastkd import _helper\n",
        "fastkd/losses/kd.py": "from fastkd.ops.kl import kl\n",
        "fastkd/ops/kl.py": "def f():\n    import fastkd.kernels.kl\n",
        "kernels/kl.py": "import fastkd._helper\n",
        "benchmarks/measure.py": "import fastkd.cli.run\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_distill_and_below_need_torch_alone() -> None:
    names = [name for name in find_modules(ROOT) if name.split(".")[1:2] and name.split(".")[1] in TORCH_ONLY]
    assert len(names) > 30
    code = f"""
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted({*EXTRA, "torchvision"} - {"numpy"})}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
import fastkd
for name in {names}:
    importlib.import_module(name)
fastkd.Distiller, fastkd.Taps, fastkd.Term, fastkd.distill.recipe, fastkd.train.TrainConfig
for package, name in ((fastkd.train, "train"), (fastkd.evaluate, "predict"), (fastkd.evaluate, "RISMetrics")):
    try:
        getattr(package, name)
    except ImportError as error:
        assert "pip install 'fastkd[ris]'" in str(error), error
    else:
        raise AssertionError(f"{{name}} was imported without the extra")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
