"""The CUDA kernels as compiled: no spills on any chip, tensor cores in products, a module of modest size.

The table in benchmarks/results/nvcc holds the facts of all chips. Where fastkd is installed without CUDA kernels, they
are compiled for one chip, whose machine code must match the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cuda_build import CSRC, ROOT, CudaBuild, cuda_build

FAMILIES = sorted(folder.name for folder in (CSRC / "cuda").iterdir() if folder.is_dir())
TABLES = {file.stem: file for file in (ROOT / "benchmarks" / "results" / "nvcc").glob("*.json")}
CHIPS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
LARGEST = 25 * 2**20  # bytes of the module for all chips; the limit for fewer chips is proportional
REWRITE = "python -m benchmarks.cuda_facts --targets 80,86,89,90,100,120 --json benchmarks/results/nvcc/{}.json"
PRODUCTS = {f"relation.{name}_kernel" for name in ("tiles", "derivative", "product")} | {
    f"pixel_word.{name}_kernel" for name in ("logits", "terms", "gradient", "features")
}

pytestmark = pytest.mark.timeout(1800)  # compiling for one chip takes a minute of CPU time


@pytest.fixture(scope="module")
def build() -> CudaBuild:
    return cuda_build()


def table(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["rows"]


def kernels(rows: list[dict[str, Any]], chip: str) -> set[str]:
    return {row["kernel"] for row in rows if row["target"] == chip}


def version_of(build: CudaBuild) -> str:
    return build.info["compiler"].removeprefix("nvcc ")


def test_every_chip_has_every_kernel(build: CudaBuild) -> None:
    chips = {target for target in build.info["targets"] if target.startswith("sm_")}
    assert chips == {row["target"] for row in build.rows}
    for chip in chips:
        assert kernels(build.rows, chip) == {row["kernel"] for row in build.rows}
        assert {name.split(".")[0] for name in kernels(build.rows, chip)} == set(FAMILIES)


def test_no_kernel_spills(build: CudaBuild) -> None:
    failed = [row for row in build.rows if not row["ok"]]
    if failed and version_of(build) not in TABLES:
        pytest.xfail(f"{len(failed)} kernels spill with {build.info['compiler']}, for which there is no table")
    assert not failed


def test_table_matches_the_compiled_kernels(build: CudaBuild) -> None:
    version = version_of(build)
    if version not in TABLES:
        pytest.skip(f"no table for nvcc {version}: {REWRITE.format(version)}")
    chips = {row["target"] for row in build.rows}
    recorded = {(row["kernel"], row["target"]): row for row in table(TABLES[version]) if row["target"] in chips}
    compiled = {(row["kernel"], row["target"]): row for row in build.rows}
    stale = sorted(key for key in compiled.keys() | recorded.keys() if compiled.get(key) != recorded.get(key))
    assert not stale, f"{TABLES[version].name} is out of date; run {REWRITE.format(version)}"


@pytest.mark.parametrize("file", TABLES.values(), ids=TABLES)
def test_table_covers_all_chips_without_spills(file: Path) -> None:
    rows = table(file)
    assert {row["target"] for row in rows} == CHIPS
    for chip in CHIPS:
        assert kernels(rows, chip) == {row["kernel"] for row in rows}
    assert all(row["ok"] for row in rows)


@pytest.mark.parametrize("file", TABLES.values(), ids=TABLES)
def test_products_use_tensor_cores(file: Path) -> None:
    """On every chip ``mma.sync`` is compiled to HMMA; the fp64 kernels have plain loops."""
    products = [row for row in table(file) if row["kernel"].split("<")[0] in PRODUCTS]
    assert {row["kernel"].split("<")[0] for row in products} == PRODUCTS
    for row in products:
        assert row["matrix_instructions"].get("HMMA", 0) > 0, row


def test_module_is_small(build: CudaBuild) -> None:
    chips = {row["target"] for row in build.rows}
    assert build.module.stat().st_size < LARGEST * len(chips) / len(CHIPS)
