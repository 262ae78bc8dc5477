"""Matrix products by Intel AMX on any x86-64 machine: emulated, and the machine code of the real instructions.

``tests/ops/test_sanitizers.py`` runs the relation kernels with the same emulation.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import _native

CSRC = Path(__file__).parents[2] / "csrc"
CXX = os.environ.get("CXX", "c++")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
LACKS_ISA = 77

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(CXX) is None, reason="needs x86-64 and a C++ compiler"
)


def compile_to(target: Path, *arguments: str) -> None:
    command = [CXX, "-std=c++17", "-O1", "-w", *AVX512, "-DFASTKD_ISA=avx512", *arguments, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_products_equal_sums_in_double(tmp_path: Path) -> None:
    """Sizes around whole tiles and panels, sums added to a result, padding, NaN, infinity and subnormals."""
    program = tmp_path / "amx_product"
    emulation = ["-I", str(CSRC / "tests" / "emulation"), "-I", str(CSRC)]
    compile_to(program, *emulation, str(CSRC / "tests" / "amx_product.cpp"))
    done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode == LACKS_ISA:
        pytest.skip("the machine lacks AVX512-BF16")
    assert done.returncode == 0, done.stdout


ENCODINGS = {  # Intel's instruction-set reference, without the operands of memory
    "multiply_tiles<1, 6, 7>()": bytes.fromhex("c4e2425cce"),  # tdpbf16ps tmm1, tmm6, tmm7
    "zero_tile<3>()": bytes.fromhex("c4e27b49d8"),
    "release_tiles()": bytes.fromhex("c4e27849c0"),
    "load_tile<7>(from, stride)": bytes.fromhex("c4e27b4b3c"),
    "store_tile<2>(from, stride)": bytes.fromhex("c4e27a4b14"),
    "configure_tiles(*static_cast<const TileShapes*>(from))": bytes.fromhex("c4e2784907"),
}


def test_instructions_have_the_documented_encodings(tmp_path: Path) -> None:
    """The emulation cannot tell whether the assembly names the operands in the right order."""
    source, assembled = tmp_path / "calls.cpp", tmp_path / "calls.o"
    functions = [
        f'extern "C" void call{i}(void* from, std::ptrdiff_t stride) {{ using namespace fastkd::cpu; {call}; }}\n'
        for i, call in enumerate(ENCODINGS)
    ]
    source.write_text('#include "cpu/amx.h"\n' + "".join(functions))
    compile_to(assembled, "-DFASTKD_AMX_ASSEMBLER", "-I", str(CSRC), "-c", str(source))
    code = assembled.read_bytes()
    assert [call for call, encoding in ENCODINGS.items() if encoding not in code] == []


def isa(requested: str) -> subprocess.CompletedProcess[str]:
    code = "from fastkd import _native; print(_native.load('cpu').isa())"
    environment = os.environ | {"FASTKD_CPU_ISA": requested}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_tiles_are_used_only_if_requested() -> None:
    """They were not measured on any machine."""
    if "cpu" not in _native.build_info() or not _native.build_info()["cpu"]["built"]:
        pytest.skip("the C++ kernels were not built")
    assert isa("").stdout.strip() in ("baseline", "avx2", "avx512")
    done, available = isa("amx"), "amx_bf16" in Path("/proc/cpuinfo").read_text()
    if not available:
        assert "FASTKD_CPU_ISA: expected an instruction set of this machine (baseline" in done.stderr
        assert "got 'amx'" in done.stderr
        assert "amx" not in done.stderr.split("(baseline")[1].split(")")[0]
    elif done.returncode == 0:  # a sandbox may deny the permission
        assert done.stdout.strip() == "amx"
