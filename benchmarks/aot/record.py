"""Record what Triton would compile and launch, without a GPU, by replacing Triton's driver.

    python -m benchmarks.aot.record [--memory 80] [--chip 90] [--match channel_kd]

prints the launches of each GPU workload, forward and backward, and the number of programs of each, for a GPU with that
many GB of memory. Triton's own launch code, binder and specialiser run; nothing is compiled or executed. In Python:

    with recorded() as recording:
        some_loss(*cpu_tensors, backend="triton")  # inputs are not read, results are undefined
    recording.launches  # [(kernel, grid)], in order
    recording.specialisations  # [Specialisation], each once

Triton must not interpret kernels in the process (that is fixed per process). Works with Triton 3.6 to 3.9.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import providers, workloads
from fastkd._console import plain_characters
from fastkd.ops.launch import MAX_GPU_WORKSPACE_MIB


class Specialisation(NamedTuple):
    """A kernel as Triton would compile it: the arguments of ``triton.compiler.ASTSource`` and the launch's options."""

    kernel: str  # family.module.function
    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    options: dict[str, Any]  # stated at the launch; Triton's defaults are not included
    attributes: Any


@dataclass
class Recording:
    """Recorded launches and the specialisations that they would compile."""

    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    specialisations: list[Specialisation] = field(default_factory=list)
    without_fp_fusion: set[str] = field(default_factory=set)
    """Kernels launched without the argument ``enable_fp_fusion``, whose default depends on Triton's version."""

    def counts(self) -> dict[str, int]:
        """Return the number of specialisations of each kernel."""
        return dict(sorted(Counter(one.kernel for one in self.specialisations).items()))


@contextmanager
def recorded(capability: int = 90) -> Iterator[Recording]:
    """Record launches of the Triton backend, with CPU tensors in place of those on a chip of this capability."""
    from fastkd.kernels import common
    from fastkd.kernels.pixel_word import backward, forward
    from fastkd.kernels.relation import call as relation
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastkd.ops import dispatch

    if common.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: Triton compiles nothing here; record in a process without it")
    recording = Recording()
    with_capability = (forward, backward, relation)  # modules that read a tensor's capability
    launch = JITFunction.run
    functions = set()
    stated: dict[str, Any] = {}  # options of the launch in progress

    def compiled(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> Any:
        functions.add(self)
        one = Specialisation(_name(self), self, signature, constants, dict(stated), attributes)
        recording.specialisations.append(one)
        kernel = self.device_caches[device][0][key] = object()
        return kernel

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        recording.launches.append((_name(self), tuple(grid)))
        stated.clear()
        stated.update((name, value) for name, value in kwargs.items() if name not in self.arg_names)
        if "enable_fp_fusion" not in stated:
            recording.without_fp_fusion.add(_name(self))
        return launch(self, *args, grid=grid, warmup=True, **kwargs)  # everything except the launch

    before = driver._active
    driver.set_active(_StandIn(capability))
    replaced = [
        *((module, "capability", lambda x: capability // 10) for module in with_capability),
        (JITFunction, "_do_compile", compiled),
        (JITFunction, "run", run),
        (dispatch, "unavailable_reason", lambda *args, **kwargs: None),
        (dispatch.BACKENDS["triton"], "device_type_reason", lambda device_type: None),
    ]
    try:
        with ExitStack() as stack:
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            yield recording
    finally:
        driver._active = before
        for function in functions:
            function.device_caches.clear()  # remove the placeholder kernels


def _name(function: Any) -> str:
    return f"{function.fn.__module__.removeprefix('fastkd.kernels.')}.{function.fn.__name__}"


class _StandIn:
    """The methods of a driver that a launch calls before it has a kernel."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def workload_launches(workload: workloads.Workload, recording: Recording) -> list[tuple[str, int]]:
    """Return (kernel, number of programs) of each launch of a workload's forward and backward."""
    inputs = workload.inputs_without_values()
    before = len(recording.launches)
    providers.make_step(workload, "triton", "both", inputs)()
    return [(name, math.prod(grid)) for name, grid in recording.launches[before:]]


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=80, help="GB of the GPU, which determine the workspace")
    parser.add_argument("--chip", type=int, default=90, help="compute capability of the GPU, times 10")
    parser.add_argument("--match", default="", help="only workloads whose name contains this")
    args = parser.parse_args(argv)
    limit = min(MAX_GPU_WORKSPACE_MIB, args.memory * 1000**3 / 2**20 / 100)
    with mock.patch.dict(os.environ, {"FASTKD_WORKSPACE_MIB": str(limit)}), recorded(args.chip) as recording:
        for workload in (w for family in workloads.GPU_WORKLOADS for w in workloads.select(family, "cuda")):
            if args.match in workload.name:
                found = workload_launches(workload, recording)
                print(f"{workload.name}: {len(found)} launches")
                for kernel, programs in found:
                    print(f"    {kernel:36} {programs:>8} programs")
    print(f"{len(recording.specialisations)} specialisations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
