import platform
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = """
import resource, sys, torch
sys.path.append(sys.argv[1])
from benchmarks.measure import settle_malloc

def call():
    blocks = [torch.zeros(6 * 2**20, dtype=torch.uint8) for _ in range(4)]

settle_malloc()
for _ in range(3):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settle_malloc is about glibc's malloc")
def test_settled_malloc_keeps_the_memory_of_calls():
    # Without it, in some processes, all 24 MiB are fresh in every call: 61,000 page faults of 4 KiB.
    command = [sys.executable, "-P", "-c", CALLS, str(Path(__file__).parents[2])]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults < 2000
