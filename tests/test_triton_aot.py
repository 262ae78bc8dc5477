"""Every Triton kernel and block shape compiles for every supported chip, without spills, within its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

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
        timeout=500,
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
    for row in rows:
        assert row["local"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
