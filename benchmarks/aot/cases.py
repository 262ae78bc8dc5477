"""Cases of ahead-of-time compilation: kernels as the GPU workloads and the contract's cases launch them, recorded."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from benchmarks.aot.record import Recording, Specialisation

TARGETS = (80, 90, 100, 120)
"""Compute capability × 10 of each chip, on which the GPU workloads are compiled, in three dtypes."""

CONTRACT_TARGET = 90
"""The chip on which the contract's cases, which also have odd sizes and all dtypes and options, are compiled."""

_HELPERS = Path(__file__).parents[2] / "tests" / "helpers"


class Case(NamedTuple):
    """A kernel with the arguments of ``triton.compiler.ASTSource``, in a form that can be sent to other processes."""

    kernel: str  # family.name
    function: str  # path of the function within fastkd.kernels
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    options: dict[str, Any]  # stated at the launch

    @classmethod
    def of(cls, one: Specialisation) -> Case:
        """Return the case of a recorded specialisation."""
        family, _, name = one.kernel.split(".")
        names = one.function.arg_names
        return cls(
            f"{family}.{name.removesuffix('_kernel')}",
            one.kernel,
            dict(one.signature),
            {names[path[0]]: value for path, value in one.constants.items()},
            tuple(names[path[0]] for path, attributes in one.attributes.items() if attributes),
            one.options,
        )

    @property
    def family(self) -> str:
        return self.kernel.partition(".")[0]

    @property
    def dtype(self) -> str:
        """Return the dtype of the inputs: that of the first pointer to floating-point numbers other than fp32."""
        floats = [kind[1:] for kind in self.signature.values() if kind[:3] in ("*fp", "*bf")]
        return next((dtype for dtype in floats if dtype != "fp32"), "fp32")

    def load(self) -> Any:
        """Return the function."""
        module, _, name = self.function.rpartition(".")
        return getattr(importlib.import_module(f"fastkd.kernels.{module}"), name)


@functools.cache
def recorded_cases(target: int) -> tuple[Case, ...]:
    """Return the cases of a chip, each once; for a GPU with the largest workspace."""
    from benchmarks.aot.record import recorded
    from fastkd.ops.launch import MAX_GPU_WORKSPACE_MIB

    with (
        mock.patch.dict(os.environ, {"FASTKD_WORKSPACE_MIB": str(MAX_GPU_WORKSPACE_MIB)}),
        recorded(target) as recording,
    ):
        _run_workloads(recording)
        if target == CONTRACT_TARGET:
            run_contract()
    return tuple(Case.of(one) for one in recording.specialisations)


def _run_workloads(recording: Recording) -> None:
    """Run the forward and the backward of each GPU workload, and of rows that several programs share."""
    import torch

    from benchmarks import workloads
    from benchmarks.aot.record import workload_launches

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for family in workloads.GPU_WORKLOADS:
            for workload in workloads.select(family, "cuda", (dtype,)):
                workload_launches(workload, recording)
        long_rows = workloads.Workload("softmax_kl", "channel_distribution_kd", (1, 8, 240, 240), dtype)
        workload_launches(long_rows, recording)


def run_contract() -> None:
    """Run the forward and the backward of each case of the contract suite (tests/contract), at each size and dtype."""
    sys.path.append(str(_HELPERS))
    contract = importlib.import_module("contract_cases")
    place = contract.Place("triton", "cuda")
    for case in contract.CASES:
        for dtype in filter(contract.Setting(case, place).supports, contract.DTYPES):
            for size in case.sizes:
                case.problem(size, dtype=dtype).run("triton")
