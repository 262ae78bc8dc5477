"""Every Triton kernel and block shape compiles for every supported chip, without spills, within its shared memory.

Products of bfloat16 numbers go through the chip's matrix instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PRODUCTS = ("relation.tiles", "relation.derivative", "relation.product")
MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "aot.py"


def compile_all(tmp_path: Path, *arguments: str) -> list[dict]:
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    file = tmp_path / "aot.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(file), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert file.exists(), done.stdout + done.stderr
    return json.loads(file.read_text())


# Every chip for what is trained in; the chip with the least shared memory and the oldest one for the others.
@pytest.mark.parametrize(
    ("dtypes", "targets"),
    [(("bf16",), ("80", "90", "100", "120")), (("fp32",), ("80", "120")), (("fp64",), ("120",))],
    ids=["bf16", "fp32", "fp64"],
)
def test_no_spills(tmp_path: Path, dtypes: tuple[str, ...], targets: tuple[str, ...]) -> None:
    rows = compile_all(tmp_path, "--dtypes", *dtypes, "--targets", *targets)
    assert {row["target"] for row in rows} == {f"sm_{t}" for t in targets}
    assert {row["kernel"] for row in rows} >= {"softmax_kl.forward", "softmax_kl.backward"}
    products = [row for row in rows if row["kernel"] in PRODUCTS and not row.get("KEPT")]
    assert {row["kernel"] for row in products} == (set() if "fp64" in dtypes else set(PRODUCTS))
    for row in products:
        assert set(row["matrix_instructions"]) == {MATRIX_INSTRUCTIONS[row["target"]]}, row
    for row in rows:
        assert row["local"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
