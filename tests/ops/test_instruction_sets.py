"""The CPU kernels with instruction sets below this machine's best, in one process per set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import _native

try:
    cpu = _native.load("cpu")
except ImportError as error:
    pytest.skip(f"the C++ kernels are unavailable here: {error}", allow_module_level=True)

ISAS = ["baseline", "avx2", "avx512", "amx"]
FILES = [
    Path(__file__).with_name(f"test_{name}.py")
    for name in ("native", "relation", "pixel_word", "pixel_word_contract", "attention_kl")
]
RELATION = "every_form or every_shape or shift or gram_form or zero_ or number_of_threads"
PIXEL_WORD = "(fp64 and (37 or 129 or 257)) or test_dtypes or norm_zero or equal or infinite or identical"
ATTENTION = "cpu and (sizes or everything or equal or last_keys)"
LANE_DEPENDENT = (
    f"test_native or (test_relation and ({RELATION})) or (test_pixel_word and ({PIXEL_WORD})) "
    f"or (test_attention_kl and {ATTENTION})"
)
"""Select tests of code that depends on the number of vector lanes: products, packing, tails, rows of zeros."""


LOWER = [isa for isa in _native.build_info()["cpu"]["isas"] if ISAS.index(isa) < ISAS.index(cpu.isa())]


@pytest.mark.parametrize("isa", LOWER)
def test_lower_instruction_sets_pass_the_tests_that_depend_on_lanes(isa: str) -> None:
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", LANE_DEPENDENT, *map(str, FILES)]
    environment = os.environ | {"FASTKD_CPU_ISA": isa}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:]
