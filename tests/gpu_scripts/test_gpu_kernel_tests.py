"""scripts/gpu/kernel_tests.py: test selection, and results that survive crashes and hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import stand_in

kernel_tests, records = map(stand_in.script, ("kernel_tests", "records"))

ABSENT = """
import sys

class Absent:
    names = {"pycocotools", "tyro", "transformers", "accelerate", "timm", "torchmetrics", "torchvision", "matplotlib",
             "PIL", "rich", "onnx", "onnxruntime", "onnxscript", "pytest_timeout", "pytest_benchmark", "xdist"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} on the simulated machine", name=name)

sys.meta_path.insert(0, Absent())
import torch
torch.cuda.is_available = lambda: True
"""


def test_collection_without_the_packages_of_the_trainer(tmp_path: Path) -> None:
    """Collect on a simulated GPU machine with only torch, Triton and pytest."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    env = kernel_tests.environment()
    env["PYTHONPATH"] = os.pathsep.join(
        [str(tmp_path), *[p for p in sys.path if p and Path(p).is_dir()], env["PYTHONPATH"]]
    )
    command = kernel_tests.pytest_command(kernel_tests.KERNEL_TESTS, "gpu", "--collect-only")
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=stand_in.ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "error" not in done.stdout.splitlines()[-1]
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 5000
    assert {test.partition("::")[0] for test in tests} == set(kernel_tests.KERNEL_TESTS)
    assert not [test for test in tests if "[reference@" in test]
    stages = [(test.startswith("tests/contract/"), "triton" in test) for test in tests]
    assert stages == sorted(stages)
    assert len(set(stages)) == 4


LOST = """
import os, sys, time, types
import pytest

pytestmark = pytest.mark.gpu
CONTEXT = {"lost": False}

def synchronize():
    if CONTEXT["lost"]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

sys.modules["torch"] = types.SimpleNamespace(
    cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))

def test_first():
    pass

def test_loses_the_context():
    CONTEXT["lost"] = True

def test_after_it():
    pass

def test_ends_the_process():
    print("before the end")
    sys.stdout.flush()
    os.abort()

def test_hangs():
    time.sleep(100)

def test_skipped():
    pytest.skip("no use")

def test_last():
    pass
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_crash_or_hang_fails_only_one_test(tmp_path: Path, jobs: int) -> None:
    (tmp_path / "test_lost.py").write_text(LOST)
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_nowhere\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    out = tmp_path / "tests.jsonl"
    script = str(stand_in.SCRIPTS / "kernel_tests.py")
    files = ["--files", "test_lost.py", "test_broken.py"]
    options = ["--root", str(tmp_path), "--jobs", str(jobs), "--test-seconds", "3", "--id", "build"]
    command = [sys.executable, script, str(out), *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row["test"].rpartition("::")[2]: row for row in records.read(out)}
    assert len(rows) == len(records.read(out))  # no test is recorded twice
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_broken.py": "error",
        "test_first": "passed",
        "test_loses_the_context": "failed",
        "test_after_it": "passed",
        "test_ends_the_process": "crashed",
        "test_hangs": "hung",
        "test_skipped": "skipped",
        "test_last": "passed",
    }
    assert "a_module_that_is_nowhere" in rows["test_broken.py"]["text"]
    assert "illegal memory access" in rows["test_loses_the_context"]["text"]
    assert rows["test_skipped"]["text"] == "no use"
    for text in ("a_module_that_is_nowhere", "illegal memory access", "test_ends_the_process", "timed out after"):
        assert text in done.stdout

    (tmp_path / "test_lost.py").write_text(LOST.replace("100", "0"))  # the file changed: passed tests run again
    again = subprocess.run([*command[:-2], "test_lost.py"], capture_output=True, text=True, timeout=120)
    assert "7 of 7 ran, 0 had passed before" in again.stdout
    last = subprocess.run([*command[:-2], "test_lost.py"], capture_output=True, text=True, timeout=120)
    assert "3 of 3 ran, 4 had passed before" in last.stdout


def test_unavailable_backend_counts_as_failure(tmp_path: Path) -> None:
    skip = "pytest.skip('the cuda backend is not in use on cuda: no build')"
    (tmp_path / "test_it.py").write_text(f"import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    {skip}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    script = str(stand_in.SCRIPTS / "kernel_tests.py")
    options = ["--root", str(tmp_path), "--jobs", "1", "--files", "test_it.py"]
    command = [sys.executable, script, str(tmp_path / "tests.jsonl"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "skipped 1: the cuda backend is not in use on cuda: no build" in done.stdout


LARGE = """
import time
from itertools import pairwise
from pathlib import Path
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("i", range(3))
def test_offsets_beyond_32_bits(i):
    begin = time.time()
    time.sleep(0.4)
    Path(f"span-{i}").write_text(f"{begin} {time.time()}")

def test_prints_much():
    print("dump " * 50_000)
    assert 1 + 1 == 3, "sums are wrong"
"""


def test_large_tests_are_serialised_and_long_output_keeps_the_error(tmp_path: Path) -> None:
    (tmp_path / "test_large.py").write_text(LARGE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    script, out = str(stand_in.SCRIPTS / "kernel_tests.py"), tmp_path / "tests.jsonl"
    options = ["--root", str(tmp_path), "--jobs", "2", "--files", "test_large.py"]
    done = subprocess.run([sys.executable, script, str(out), *options], capture_output=True, text=True, timeout=120)
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    spans = sorted(tuple(map(float, file.read_text().split())) for file in tmp_path.glob("span-*"))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    (text,) = (row["text"] for row in records.read(out) if row["outcome"] == "failed")
    assert "sums are wrong" in text
    assert "dump" in text
    assert len(text) < 10_000
