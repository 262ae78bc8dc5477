"""The CUDA kernels as compiled: for every chip, without spills, with tensor cores, in a module of modest size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from shared_build import shared_folder

import fastkd
from fastkd import _native
from fastkd.ops.dispatch import FAMILIES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_facts.py"
READERS = (SCRIPT, SCRIPT.parent / "aot" / "compiler.py")
TABLES = {file.stem: file for file in (SCRIPT.parent / "results" / "nvcc").glob("*.json")}
LARGEST = 25 * 2**20  # bytes of the module, uncompressed


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """In a process of its own, where no test has put another module in the place of ``fastkd._cuda``."""
    if not _native.build_info().get("cuda", {}).get("built"):
        pytest.skip("fastkd was installed without CUDA kernels")
    if shutil.which("cuobjdump") is None:
        pytest.importorskip("triton", reason="cuobjdump is missing: neither CUDA's tools nor Triton, which brings it")
    module = Path(fastkd.__file__).parent / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with shared_folder("cuda-facts", module, *(path.read_text() for path in READERS)) as folder:
        file = folder / "cuda.json"
        if not file.exists():
            read_facts(module, folder / "unfinished.json")
            (folder / "unfinished.json").rename(file)
        return json.loads(file.read_text())["rows"]


def read_facts(module: Path, file: Path) -> None:
    paths = (str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-m", "benchmarks.cuda_facts", "--module", str(module), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert file.exists(), done.stdout + done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_every_chip_has_every_kernel(rows: list[dict], family: str) -> None:
    kernels = {row["kernel"] for row in rows if row["kernel"].startswith(f"{family}.")}
    assert kernels
    chips = {target for target in _native.build_info()["cuda"]["targets"] if target.startswith("sm_")}
    assert chips
    for chip in chips:
        assert kernels <= {row["kernel"] for row in rows if row["target"] == chip}


def test_no_spills(rows: list[dict]) -> None:
    for row in rows:
        assert "." in row["kernel"], f"{row['kernel']}: of which family?"
    failed = [row for row in rows if not row["ok"]]
    compiler = _native.build_info()["cuda"]["compiler"]
    if failed and compiler.removeprefix("nvcc ") not in TABLES:
        pytest.xfail(f"{len(failed)} kernels spill with {compiler}, which the kernels were not written with")
    assert not failed


def test_the_table_is_of_todays_kernels(rows: list[dict]) -> None:
    today = {row["kernel"] for row in rows}
    assert TABLES
    for file in TABLES.values():
        table = json.loads(file.read_text())["rows"]
        assert {row["kernel"] for row in table} == today, file.name
        assert all(row["ok"] for row in table), file.name


def test_products_use_tensor_cores(rows: list[dict]) -> None:
    """On every chip: ``mma.sync`` is HMMA on all of them. fp64 has loops of its own."""
    relation = {f"relation.{name}_kernel" for name in ("tiles", "derivative", "product")}
    pixel_word = {f"pixel_word.{name}_kernel" for name in ("logits", "terms", "gradient", "features")}
    products = [row for row in rows if row["kernel"].split("<")[0] in relation | pixel_word]
    assert {row["kernel"].split("<")[0] for row in products} == relation | pixel_word
    for row in products:
        assert row["matrix_instructions"].get("HMMA", 0) > 0, row


def test_the_module_is_small() -> None:
    path = _native.load("cuda").__file__ if _native.build_info().get("cuda", {}).get("built") else None
    if path is None:
        pytest.skip("fastkd was installed without CUDA kernels")
    assert Path(path).stat().st_size < LARGEST
