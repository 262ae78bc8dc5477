"""Every Triton kernel and block shape compiles for every supported chip, without spills, within its shared memory.

The tables in benchmarks/results/triton hold the facts of all of them, for every version of Triton that kernels and
blocks were chosen for, with a digest of the code they are of. The tests check that this is today's code, and compile a
sample with the installed Triton: everything takes ten minutes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
PRODUCTS = ("relation.tiles", "relation.derivative", "relation.product")
KERNELS = {
    *("softmax_kl.forward", "softmax_kl.backward", *PRODUCTS, "relation.merge"),
    *(f"pixel_word.{name}" for name in ("logits", "terms", "grams", "merge", "gradient", "pixels", "words")),
}
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "aot"
TABLES = {file.stem: file for file in (SCRIPT.parent / "results" / "triton").glob("*.json")}
FACTS = ("registers", "stack", "shared", "local", "spills", "matrix_instructions", "shared_limit", "ok")


def run(*arguments: str, **variables: str) -> str:
    """Run the script in another process, since the kernels may be interpreted in this one, and return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    paths = (str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "benchmarks.aot", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    return done.stdout + done.stderr


def key(row: dict) -> str:
    """Return which kernel, block shape, dtype, chip and code a row is about."""
    return json.dumps({name: value for name, value in row.items() if name not in FACTS})


def table(version: str) -> dict[str, dict]:
    return {key(row): row for row in json.loads(TABLES[version].read_text())["rows"]}


def assert_no_spills(rows: list[dict]) -> None:
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        assert not row["spills"], row
        assert not row["local"], row


def assert_matrix_instructions(rows: list[dict]) -> None:
    """Products of bfloat16 numbers go through the chip's matrix instructions."""
    products = [row for row in rows if row["dtype"] == "bf16" and row["kernel"] in PRODUCTS and not row.get("STORED")]
    assert {row["kernel"] for row in products} == set(PRODUCTS)
    for row in products:
        assert set(row["matrix_instructions"]) == {MATRIX_INSTRUCTIONS[row["target"]]}, row


def test_the_tables_are_of_todays_code_and_every_supported_triton() -> None:
    today = {key(json.loads(line)) for line in run("--list").splitlines() if line.startswith("{")}
    assert len(today) > 800
    assert {json.loads(k)["kernel"] for k in today} >= KERNELS
    assert {"3.6", "3.7", "3.8", "3.9"} <= {version.rpartition(".")[0] for version in TABLES}
    for version in TABLES:
        assert set(table(version)) == today, (
            f"{version}: run `python -m benchmarks.aot.versions` to compile the kernels that changed"
        )


@pytest.mark.parametrize("version", TABLES)
def test_nothing_spills_in_the_tables(version: str) -> None:
    rows = list(table(version).values())
    assert {row["target"] for row in rows} == set(MATRIX_INSTRUCTIONS)
    assert_no_spills(rows)
    assert_matrix_instructions(rows)


def test_a_sample_compiled_here(tmp_path: Path) -> None:
    """Under a version that has a table the facts are the table's, up to registers: another ptxas counts otherwise."""
    file = tmp_path / "aot.json"
    output = run("--sample", "--json", str(file), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert file.exists(), output
    rows = json.loads(file.read_text())["rows"]
    assert {(row["kernel"], row["target"]) for row in rows} >= {(k, t) for k in KERNELS for t in MATRIX_INSTRUCTIONS}
    version = importlib.metadata.version("triton")
    if version not in TABLES:
        spilled = [row for row in rows if not row["ok"]]
        if spilled:
            pytest.xfail(f"{len(spilled)} kernels spill under Triton {version}, which the blocks were not chosen for")
        return
    assert_no_spills(rows)
    assert_matrix_instructions(rows)
    known = table(version)
    for row in rows:
        assert row["shared"] == known[key(row)]["shared"]
        assert row["matrix_instructions"] == known[key(row)]["matrix_instructions"]


CODE = """
class Kernel:
    def __init__(self, fn):
        self.fn = fn

LIMIT = 4

@Kernel
def helper(x):
    return x * LIMIT

@Kernel
def kernel(x):
    return helper.fn(x)
"""


@pytest.mark.parametrize(
    ("right", "wrong", "changes"),
    [
        ("    return x", "    # Why.\n    return x", False),
        ("    return h", '    """What."""\n    return h', False),
        ("x * LIMIT", "x + LIMIT", True),
        ("LIMIT = 4", "LIMIT = 5", True),
    ],
    ids=["a comment", "a docstring", "a function that it calls", "a constant"],
)
def test_the_digest_changes_with_the_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, changes: bool
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1]))
    from benchmarks.aot.digest import digest

    digests = []
    for i, code in enumerate((CODE, CODE.replace(right, wrong, 1))):
        path = tmp_path / f"kernels_{i}" / "aot_kernels.py"  # the name of a module is part of the code's identity
        path.parent.mkdir()
        path.write_text(code)
        spec = importlib.util.spec_from_file_location("aot_kernels", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        digests.append(digest(("name", module.kernel, {"x": "i32"}, {"ROWS": 4}, 4)))
        assert digest(("name", module.kernel, {"x": "i32"}, {"ROWS": 4}, 4, {"maxnreg": 80})) != digests[-1]
    assert (digests[0] != digests[1]) == changes
