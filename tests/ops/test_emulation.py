"""The CUDA kernels run on the host, beyond the contract: in any order of threads, and under sanitizers.

A block's threads are fibers that switch only where they wait for each other (csrc/tests/emulation). What the contract
suite asks of every backend it asks of these kernels too, as ``cuda@cpu``; here it is run once more in a process of its
own under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer, which knows of no order but the
barriers'. Bugs planted in copies of a kernel prove that each would be found.
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
def test_same_bits_in_any_order(kernel_setting: Any) -> None:
    """Threads and blocks take turns in another order, and asynchronous copies arrive as soon as they may."""
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
    """A kind of sanitizer, and what a process needs to run under it."""

    name: str
    libraries: tuple[str, ...]
    environment: dict[str, str]


SANITIZERS = {
    # Torch's own memory is torch's business: no leaks are looked for, and no odd calls of new and delete.
    "address": Sanitizer(
        "address;undefined",
        ("libasan.so", "libubsan.so"),
        {"ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": Sanitizer("thread", ("libtsan.so",), {"TSAN_OPTIONS": "halt_on_error=1"}),
}


class Rig(NamedTuple):
    """A copy of the sources, and the module built from it under one kind of sanitizer."""

    kind: str
    sources: Path
    folder: Path

    def make(self) -> None:
        build(self.folder, self.sources, f"-DFASTKD_SANITIZE={SANITIZERS[self.kind].name}")

    def contract(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Tests of the contract suite, on these kernels alone."""
        sanitizer = SANITIZERS[self.kind]
        preload = " ".join(_library(name) for name in sanitizer.libraries)
        # ThreadSanitizer's map of the memory does not stand it being laid out too randomly.
        quiet = [shutil.which("setarch") or "", platform.machine(), "-R"] if self.kind == "thread" else []
        if quiet and not quiet[0]:
            pytest.skip("ThreadSanitizer needs setarch, which is not installed")
        command = [*quiet, sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        own = {READY: str(self.folder), "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        return subprocess.run(
            [*command, "-m", "not gpu", *arguments],
            cwd=TESTS.parent,
            env=os.environ | sanitizer.environment | own,
            capture_output=True,
            text=True,
        )


def _library(name: str) -> str:
    found = subprocess.run(
        [os.environ.get("CXX", "c++"), f"-print-file-name={name}"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(found).is_file():
        pytest.skip(f"the compiler has no {name}")
    return found


@pytest.fixture(scope="module", params=list(SANITIZERS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    try:
        for name in ("cmake", "ninja"):
            tool(name)
        for library in SANITIZERS[request.param].libraries:
            _library(library)
        with emulated():  # where it cannot be built at all, or a GPU runs the kernels themselves
            pass
    except (OSError, RuntimeError) as error:
        pytest.skip(str(error))
    with shared_folder(f"emulated-{request.param}", CSRC) as folder:
        rig = Rig(request.param, folder / "csrc", folder / "build")
        update(CSRC, rig.sources)
        rig.make()
        yield rig


# Every case at all its sizes, in every dtype, forward and backward; in any layout and with masks where addresses are
# watched. Races do not depend on layouts, and ThreadSanitizer takes twice as long.
WATCHED = {
    "address": "test_same_bits_every_time or test_layouts or test_masks_of_any_layout or test_expanded_inputs",
    "thread": "test_same_bits_every_time",
}


@pytest.mark.timeout(1800)
def test_kernels_are_clean(rig: Rig) -> None:
    files = [str(TESTS / "contract" / f"test_{name}.py") for name in ("determinism", "memory")]
    done = rig.contract(*files, "-k", f"cuda and ({WATCHED[rig.kind]})")
    said = done.stdout[-4000:] + done.stderr[-6000:]
    assert done.returncode == 0, said
    assert " passed" in done.stdout, said
    assert "Sanitizer" not in done.stderr, said


class Bug(NamedTuple):
    """One wrong line, and what must say so."""

    kind: str
    file: str
    right: str
    wrong: str
    finding: str
    where: str = "cuda"
    test: str = "ops/test_softmax_kl.py"


LONG_ROWS = "cpu and 12293"  # a block to a row: warps meet in shared memory
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
        "    block_barrier(); // of_warp may be written again",
        "    if (lane < warp_size) { block_barrier(); }",
        "threads wait for others that never come",
        LONG_ROWS,
    ),
    "a wrong mask": Bug(  # a row too many takes part in the last block of short rows
        "address",
        "cuda/softmax_kl/softmax_kl.cu",
        "const bool mine = row < args.shape.count();",
        "const bool mine = row <= args.shape.count();",
        "AddressSanitizer: heap-buffer-overflow",
    ),
}


@pytest.mark.parametrize(("rig", "name"), [(bug.kind, name) for name, bug in BUGS.items()], indirect=["rig"])
@pytest.mark.timeout(1800)
def test_a_planted_bug_is_found(rig: Rig, name: str) -> None:
    bug = BUGS[name]
    with planted(rig.sources / bug.file, bug.right, bug.wrong, rig.make):
        done = rig.contract(str(TESTS / bug.test), "-k", f"cuda and {bug.where}")
    assert done.returncode != 0, done.stdout
    assert bug.finding in done.stdout + done.stderr
