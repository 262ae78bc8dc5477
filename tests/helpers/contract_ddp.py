"""What one rank of the distributed test does."""

from __future__ import annotations

import torch
from contract_cases import ONE_PER_LOSS, Problem, settings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.ops import dispatch


class Student(nn.Module):
    """A trainable scale and shift of every input of the student, and the loss after it."""

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__()
        self.case, self.backend, self.n = problem.case, backend, problem.students
        generator = torch.Generator().manual_seed(5)
        draw = lambda: nn.Parameter(torch.rand(problem.args[0].shape[1:], generator=generator) + 0.5)
        self.scale, self.shift = draw(), draw()
        twin = problem.case.twin
        self.loss = None if twin is None else twin(**problem.case.options, backend=backend)

    def forward(self, args: list[Tensor], masks: dict[str, Tensor]) -> Tensor:
        args = [args[0] * self.scale + self.shift, *args[1:]]
        if self.loss is not None:
            return self.loss(*args, **masks)
        return Problem(self.case, args, masks).loss(self.backend, "mean")


def half(problem: Problem, rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    cut = lambda m: tuple(x[2 * rank : 2 * rank + 2] for x in m) if isinstance(m, tuple) else m[2 * rank : 2 * rank + 2]
    return [x[2 * rank : 2 * rank + 2] for x in problem.args], {k: cut(m) for k, m in problem.masks.items()}


def compare(rank: int) -> None:
    compared = 0
    for case, (backend, device) in settings():
        if (
            (backend in ("triton", "cuda") and case.name not in ONE_PER_LOSS)
            or device != "cpu"
            or dispatch.BACKENDS[backend].device_type_reason(device)
            or dispatch.unavailable_reason(backend)
        ):
            continue
        problem = case.problem_of((4, *case.sizes["small"][1:]), dtype=torch.float32, device="cpu")
        alone = Student(problem, backend)
        (sum(alone(*half(problem, r)) for r in range(2)) / 2).backward()
        together = DistributedDataParallel(Student(problem, backend))
        together(*half(problem, rank)).backward()
        for a, b in zip(together.module.parameters(), alone.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * b.grad.abs().max().item() + 1e-9)
        compared += 1
    print("compared", compared)
