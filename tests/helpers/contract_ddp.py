"""Run one rank of the distributed contract test."""

from __future__ import annotations

import torch
from contract_cases import ONE_PER_LOSS, settings
from contract_problems import Problem
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.ops import dispatch


class Student(nn.Module):
    """A trainable scale and shift of the first student input, and the loss of the result."""

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__()
        self.case, self.backend, self.n = problem.case, backend, problem.students
        generator = torch.Generator().manual_seed(5)
        draw = lambda: nn.Parameter(torch.rand(problem.args[0].shape[1:], generator=generator) + 0.5)
        self.scale, self.shift = draw(), draw()
        module_class = problem.case.module_class
        self.loss = None if module_class is None else module_class(**problem.case.options, backend=backend)

    def forward(self, args: list[Tensor], masks: dict[str, Tensor]) -> Tensor:
        args = [args[0] * self.scale + self.shift, *args[1:]]
        if self.loss is not None:
            return self.loss(*args, **masks)
        return Problem(self.case, args, masks).loss(self.backend, "mean")


def half_batch(problem: Problem, rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    half = lambda x: x.chunk(2)[rank]
    cut = lambda m: tuple(map(half, m)) if isinstance(m, tuple) else half(m)
    return [half(x) for x in problem.args], {k: cut(m) for k, m in problem.masks.items()}


def compare(rank: int) -> None:
    """Compare the gradients of DistributedDataParallel with those of one process, for every case and backend."""
    compared = 0
    for case, (backend, device) in settings():
        if (
            (backend in ("triton", "cuda") and case.name not in ONE_PER_LOSS)
            or device != "cpu"
            or dispatch.BACKENDS[backend].device_type_reason(device)
            or dispatch.unavailable_reason(backend)
        ):
            continue
        batch = 8 if case.options.get("distance") == "cka" else 4  # CKA compares at least 4 samples
        problem = case.problem_of((batch, *case.sizes["small"][1:]), dtype=torch.float32, device="cpu")
        alone = Student(problem, backend)
        (sum(alone(*half_batch(problem, r)) for r in range(2)) / 2).backward()
        together = DistributedDataParallel(Student(problem, backend))
        together(*half_batch(problem, rank)).backward()
        for a, b in zip(together.module.parameters(), alone.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * b.grad.abs().max().item() + 1e-9)
        compared += 1
    print("compared", compared)
