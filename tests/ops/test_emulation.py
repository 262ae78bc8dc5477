"""The CUDA kernels on the host: in different thread orders, and under sanitizers.

A block's threads are fibers that switch only where they wait for each other (csrc/tests/emulation). The contract suite
includes these kernels as ``cuda@cpu``; here it runs again in a separate process, under AddressSanitizer with
UndefinedBehaviorSanitizer and under ThreadSanitizer, which knows only the order that barriers impose. Bugs planted in
copies of a kernel prove that each kind is detected.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from contract_cases import REPRESENTATIVE
from contract_tools import assert_same
from emulation import CSRC, READY, build, emulated, tool
from fault_injection import planted, update
from shared_build import shared_folder

TESTS = Path(__file__).parents[1]
ORDERS = ("forward", "reverse", "random")


@contextmanager
def order(name: str) -> Iterator[None]:
    with emulated() as module:
        module.set_order(name)
        try:
            yield
        finally:
            module.set_order("forward")


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda kernel_setting: kernel_setting.place == ("cuda", "cpu"))
def test_bits_do_not_depend_on_thread_order(kernel_setting: Any) -> None:
    """Threads and blocks run in three orders; in one, asynchronous copies arrive immediately."""
    for size in kernel_setting.case.sizes:
        problem = kernel_setting.case.problem(size, device="cpu")
        weight = problem.weight()
        results = []
        for name in ORDERS:
            with order(name):
                results.append(problem.run("cuda", weight))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])


# --- under sanitizers -------------------------------------------------------------------------------------------------


class Sanitizer(NamedTuple):
    """A kind of sanitizer, with the libraries and environment of a process under it."""

    name: str
    libraries: tuple[str, ...]
    environment: dict[str, str]


SANITIZERS = {
    # Torch's memory is not under test: leaks and mismatched new and delete are ignored.
    "address": Sanitizer(
        "address;undefined",
        ("libasan.so", "libubsan.so"),
        {"ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": Sanitizer("thread", ("libtsan.so",), {"TSAN_OPTIONS": "halt_on_error=1"}),
}


class Rig(NamedTuple):
    """A copy of the sources, and the module built from it with one kind of sanitizer."""

    kind: str
    sources: Path
    folder: Path

    def make(self) -> None:
        build(self.folder, self.sources, f"-DFASTKD_SANITIZE={SANITIZERS[self.kind].name}")

    def contract(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run tests of the contract suite on these kernels in a process under the sanitizer."""
        sanitizer = SANITIZERS[self.kind]
        preload = " ".join(_library(name) for name in sanitizer.libraries)
        # ThreadSanitizer's memory map fails under address-space randomisation.
        without_randomisation = (
            [shutil.which("setarch") or "", platform.machine(), "-R"] if self.kind == "thread" else []
        )
        if without_randomisation and not without_randomisation[0]:
            pytest.skip("ThreadSanitizer needs setarch, which is not installed")
        command = [
            *without_randomisation,
            sys.executable,
            "-m",
            "pytest",
            "-qxs",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:benchmark",
        ]
        variables = {READY: str(self.folder), "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        return subprocess.run(
            [*command, "-m", "not gpu", *arguments],
            cwd=TESTS.parent,
            env=os.environ | sanitizer.environment | variables,
            capture_output=True,
            text=True,
        )


def _library(name: str) -> str:
    found = subprocess.run(
        [os.environ.get("CXX", "c++"), f"-print-file-name={name}"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(found).is_file():
        pytest.skip(f"{name} does not come with the compiler")
    return found


@pytest.fixture(scope="module", params=list(SANITIZERS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    try:
        for name in ("cmake", "ninja"):
            tool(name)
        for library in SANITIZERS[request.param].libraries:
            _library(library)
        with emulated():  # raises if the module cannot be built, or a GPU is visible
            pass
    except (OSError, RuntimeError) as error:
        pytest.skip(str(error))
    with shared_folder(f"emulated-{request.param}", CSRC) as folder:
        rig = Rig(request.param, folder / "csrc", folder / "build")
        update(CSRC, rig.sources)
        rig.make()
        yield rig


# Every case at all its sizes, in every dtype, forward and backward. AddressSanitizer also runs masks and the layouts
# that move data; races do not depend on them, and ThreadSanitizer takes twice as long.
LAYOUTS = "test_masks_of_any_layout or test_layouts and (gaps or offset or swapped)"
CHECKED = {
    "address": f"test_same_bits_every_time or {LAYOUTS}",
    "thread": "test_same_bits_every_time",
}


@pytest.mark.timeout(1800)
def test_sanitizers_report_nothing(rig: Rig) -> None:
    files = [str(TESTS / "contract" / f"test_{name}.py") for name in ("determinism", "memory")]
    done = rig.contract(*files, "-k", f"cuda and ({CHECKED[rig.kind]})")
    output = done.stdout[-4000:] + done.stderr[-6000:]
    assert done.returncode == 0, output
    assert " passed" in done.stdout, output
    assert "Sanitizer" not in done.stderr, output


class Bug(NamedTuple):
    """A planted fault, the tests that run with it, and the message they must fail with."""

    kind: str
    file: str
    original: str
    faulty: str
    finding: str
    select: str = "cuda"
    test: str = "ops/test_softmax_kl.py"


LONG_ROWS = "cpu and 12293"  # one thread block per row: warps merge in shared memory
BUGS = {
    "a missing barrier": Bug(
        "thread",
        "cuda/softmax_kl/softmax_kl.cu",
        """    block_barrier();
    if (lane < warp_size) {""",
        "    if (lane < warp_size) {",
        "ThreadSanitizer: data race",
        LONG_ROWS,
    ),
    "a missing wait for an asynchronous copy": Bug(
        "thread",
        "cuda/relation/tile.cuh",
        "copy_async_wait<B::stages - 2>();",
        "copy_async_wait<B::stages - 1>();",
        "ThreadSanitizer: data race",
        "test_same_bits_every_time and channel_kd and mse",
        "contract/test_determinism.py",
    ),
    "an off-by-one": Bug(
        "address",
        "cuda/softmax_kl/softmax_kl.cu",
        """            for (std::int64_t i = parts.tail_begin + lane; i < args.shape.cols; i += group) {
                one(i);""",
        """            for (std::int64_t i = parts.tail_begin + lane; i <= args.shape.cols; i += group) {
                one(i);""",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a barrier that some threads never reach": Bug(
        "address",
        "cuda/softmax_kl/softmax_kl.cu",
        "    block_barrier(); // before of_warp is overwritten",
        "    if (lane < warp_size) { block_barrier(); }",
        "threads wait for others that never arrive",
        LONG_ROWS,
    ),
}


@pytest.mark.parametrize(("rig", "name"), [(bug.kind, name) for name, bug in BUGS.items()], indirect=["rig"])
@pytest.mark.timeout(1800)
def test_finds_planted_bugs(rig: Rig, name: str) -> None:
    bug = BUGS[name]
    with planted(rig.sources / bug.file, bug.original, bug.faulty, rig.make):
        done = rig.contract(str(TESTS / bug.test), "-k", f"cuda and {bug.select}")
    assert done.returncode != 0, done.stdout
    assert bug.finding in done.stdout + done.stderr
