"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

A driver without Python (csrc/tests) runs every kernel with extreme shapes, layouts, values and numbers of threads, on
exactly sized memory. Bugs injected into a copy of a kernel prove that the sanitizers detect them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_injection import planted, update
from shared_build import shared_folder

from fastkd import _native

pytestmark = pytest.mark.timeout(1800)  # a minute on an idle machine, ten while other builds run

CSRC = Path(__file__).parents[2] / "csrc"
SANITIZERS = {"address": "address;undefined", "thread": "thread"}
WRONG_RESULT, LACKS_ISA = 3, 77


def tool(name: str) -> str:
    """Return the path of a program next to this Python or on PATH; skip the test without one."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def best_isa() -> str:
    """Return the best instruction set of this machine and of the installed kernels, "baseline" without them."""
    try:
        return str(_native.load("cpu").isa())
    except ImportError:
        return "baseline"


class DriverRun(NamedTuple):
    """Output and exit status of the driver."""

    stdout: str
    stderr: str
    returncode: int


class Rig(NamedTuple):
    """A copy of the sources and the driver built from it with one sanitizer."""

    kind: str
    sources: Path
    build: Path

    @property
    def isas(self) -> list[str]:
        """Return the instruction sets to run.

        All divide the work in the same way, so "thread" needs only one. Accesses to memory are written in terms of the
        number of lanes, so "address" runs those with the fewest and the most.
        """
        return ["baseline", best_isa()][: 2 if self.kind == "address" and best_isa() != "baseline" else 1]

    def make(self) -> None:
        done = subprocess.run([tool("cmake"), "--build", str(self.build)], capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]

    def run(self, *isas: str, checks: tuple[str, ...] = ()) -> list[DriverRun]:
        """Run the driver for each of these instruction sets concurrently, with all checks unless some are named."""
        driver = [str(self.build / "sanitize"), *checks]
        done = self._run(driver, isas)
        if any("unexpected memory mapping" in d.stderr for d in done):  # ASLR beyond what ThreadSanitizer supports
            done = self._run([tool("setarch"), platform.machine(), "-R", *driver], isas)
            if any("unexpected memory mapping" in d.stderr or "setarch" in d.stderr for d in done):
                pytest.skip(f"ThreadSanitizer cannot run on this system: {done[0].stderr.strip()[:200]}")
        return done

    @staticmethod
    def _run(command: list[str], isas: tuple[str, ...]) -> list[DriverRun]:
        options = {"UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": ""}
        running = [
            subprocess.Popen(
                command,
                env=os.environ | options | {"FASTKD_CPU_ISA": isa},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for isa in isas
        ]
        return [DriverRun(*process.communicate(timeout=900), process.returncode) for process in running]


@pytest.fixture(scope="module", params=list(SANITIZERS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    with shared_folder(f"sanitizers-{request.param}", CSRC, best_isa()) as folder:
        rig = Rig(request.param, folder / "csrc", folder / "build")
        update(CSRC, rig.sources)
        configure(rig)
        rig.make()
        yield rig


def configure(rig: Rig) -> None:
    options = [f"-DFASTKD_SANITIZE={SANITIZERS[rig.kind]}"]
    if len(rig.isas) == 1:
        options.append("-DFASTKD_ISA_X86=OFF")
    else:
        options += [f"-DFASTKD_UNSANITIZED_ISA={isa}" for isa in ("avx2", "avx512") if isa not in rig.isas]
    command = [tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    done = subprocess.run(
        [*command, "-S", str(rig.sources), "-B", str(rig.build), *options], capture_output=True, text=True
    )
    if "cannot link with -fsanitize" in done.stderr or "needs GCC" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_sanitizers_report_nothing(rig: Rig) -> None:
    for isa, done in zip(rig.isas, rig.run(*rig.isas), strict=True):
        assert done.returncode == 0, done.stdout + done.stderr[-6000:]
        assert f"instruction set {isa}" in done.stdout
        assert done.stdout.strip().endswith(" right, 0 wrong")
        assert "WARNING" not in done.stderr


@pytest.mark.applies(lambda rig: rig == "address" and best_isa() == "avx512")  # the build holds these kernels
def test_sanitizers_report_nothing_in_emulated_amx_products(rig: Rig) -> None:
    (done,) = rig.run("amx", checks=("relation",))
    if done.returncode == LACKS_ISA:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert "instruction set amx" in done.stdout
    assert done.stdout.strip().endswith(" right, 0 wrong")


BUGS = {
    # The maximum of a row reads one element beyond its end.
    "address": (
        "cpu/softmax_kl/forward.cpp",
        "state.raise(block_max(s + begin, count),",
        "state.raise(block_max(s + begin, count + 1),",
        "heap-buffer-overflow",
    ),
    # Every row also writes the next row's loss, which may belong to another thread. The owner mostly rewrites it later,
    # so results are mostly correct.
    "thread": (
        "cpu/softmax_kl/forward.cpp",
        "loss[r] = static_cast<T>(",
        "loss[r] = loss[r + 1 < shape.count() ? r + 1 : r] = static_cast<T>(",
        "data race",
    ),
}


def test_sanitizers_find_an_injected_bug(rig: Rig) -> None:
    file, original, faulty, finding = BUGS[rig.kind]
    with planted(rig.sources / file, original, faulty, rig.make):
        (done,) = rig.run("baseline", checks=("softmax_kl",))
    assert done.returncode not in (0, WRONG_RESULT, LACKS_ISA), done.stdout
    assert finding in done.stderr
    assert "softmax_kl" in done.stderr
