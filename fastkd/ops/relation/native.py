"""``relation`` as each backend is called: what its operators return, and how its kernels are given their arguments."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._compile import number_of
from fastkd.ops import workspace
from fastkd.ops.launch import dtype_name, launch_on, native, promoted, statistics_dtype
from fastkd.ops.relation.plan import STORED_BLOCK, gram_double, gram_side, stored_elements

STATISTIC_PLANES = 5


class Options(NamedTuple):
    """The operators' options."""

    similarity: str
    distance: str
    temperature: float | Tensor
    negate: bool
    cross: bool
    form: str  # "streamed", "stored" or, in C++, "gram"
    backend: str


class Sizes(NamedTuple):
    """Of what a forward leaves for its backward."""

    planes: int  # of statistics, numbers per row
    stored: int  # elements of stored matrices
    statistics_dtype: torch.dtype
    stored_dtype: torch.dtype


def sizes_of(student: Tensor, teacher: Tensor, options: Options, temperature: float) -> Sizes:
    """Sizes at this temperature, whatever that of the options is."""
    batch, rows = student.shape[:2]
    others = batch if options.cross else 1
    dtype, common = statistics_dtype(student, teacher), torch.promote_types(student.dtype, teacher.dtype)
    if options.backend == "triton":
        plan = importlib.import_module("fastkd.kernels.relation.plan")
        planes = plan.statistics_planes(options.similarity, options.distance, temperature, others)
        return Sizes(planes, plan.stored_elements(batch, rows) if options.form == "stored" else 0, dtype, dtype)
    planes, stored, stored_dtype = STATISTIC_PLANES * others + 2, 0, dtype
    if options.form == "stored" and options.backend == "cuda":
        stored = stored_elements(batch, rows, common, options.similarity, options.distance, temperature)
    elif options.form == "stored":
        blocks = (rows + STORED_BLOCK - 1) // STORED_BLOCK
        stored = batch * blocks * (blocks + 1) * STORED_BLOCK * STORED_BLOCK
    elif options.form == "gram":  # the scales, and G
        widths = (student.shape[2], teacher.shape[2])
        planes, stored = 2, (1 if options.cross else batch) * gram_side(*widths) ** 2
        stored_dtype = torch.float64 if gram_double(*widths, common) else torch.float32
    return Sizes(planes, stored, torch.float64, stored_dtype)


def _larger(a: int, b: int) -> int:
    """The larger of two sizes; ``max`` would tie a traced graph to which it is."""
    return torch.sym_max(a, b)  # type: ignore[return-value]


def outputs(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and stored matrices, unfilled; where the temperature is a tensor, enough for any value of it."""
    if isinstance(options.temperature, Tensor):
        # Warm rows need no maxima: one temperature on either side of where that begins.
        cold, warm = (sizes_of(student, teacher, options, t) for t in (0.0, float("inf")))
        sizes = cold._replace(planes=max(cold.planes, warm.planes), stored=_larger(cold.stored, warm.stored))
    else:
        sizes = sizes_of(student, teacher, options, options.temperature)
    rows, device = student.shape[:2], student.device
    return (
        torch.empty(rows, dtype=statistics_dtype(student, teacher), device=device),
        torch.empty((sizes.planes, *rows), dtype=sizes.statistics_dtype, device=device),
        torch.empty((sizes.stored,), dtype=sizes.stored_dtype, device=device),
    )


def _at_its_value(
    student: Tensor, teacher: Tensor, statistics: Tensor, stored: Tensor, options: Options
) -> tuple[Tensor, Tensor, Options]:
    """Return the parts of statistics and stored matrices used at the temperature's value, and options with it."""
    if not isinstance(options.temperature, Tensor):
        return statistics, stored, options
    options = options._replace(temperature=number_of(options.temperature))
    sizes = sizes_of(student, teacher, options, number_of(options.temperature))
    return statistics[: sizes.planes], stored[: sizes.stored], options


def forward(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, filled."""
    loss, statistics, stored = filled = outputs(student, teacher, options)
    if loss.numel():
        *used, options = _at_its_value(student, teacher, statistics, stored, options)
        for whole, part in zip((statistics, stored), used, strict=True):
            if len(part) < len(whole):
                whole[len(part) :].zero_()  # an operator's outputs are defined throughout
        student, teacher = promoted(student, teacher)
        _kernels(options.backend).forward(student, teacher, loss, *used, options)
    return filled


def backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, stored: Tensor, options: Options
) -> Tensor:
    """The student's gradient."""
    dtype = student.dtype
    grad_loss = grad_loss.to(statistics_dtype(student, teacher))
    statistics, stored, options = _at_its_value(student, teacher, statistics, stored, options)
    student, teacher = promoted(student, teacher)
    grad_student = torch.empty_like(student)
    if grad_student.numel():
        kernels = _kernels(options.backend)
        kernels.backward(grad_loss, student, teacher, statistics, stored, grad_student, options)
    return grad_student.to(dtype)


def _kernels(backend: str) -> Any:
    """Return what computes: an object with ``forward`` and ``backward``, filling the outputs that it is given."""
    return _Triton() if backend == "triton" else _Native()


class _Triton:
    """``fastkd.kernels.relation.forward``."""

    def forward(
        self, student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, stored: Tensor, options: Options
    ) -> None:
        family = importlib.import_module("fastkd.kernels.relation.forward")
        family.forward(student, teacher, loss, statistics, stored, options, workspace.check)

    def backward(
        self,
        grad_loss: Tensor,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        stored: Tensor,
        grad_student: Tensor,
        options: Options,
    ) -> None:
        family = importlib.import_module("fastkd.kernels.relation.backward")
        family.backward(grad_loss, student, teacher, statistics, stored, grad_student, options, workspace.check)


class _Native:
    """``csrc/cpu`` or ``csrc/cuda``: raw pointers and element strides, so that one build serves every torch."""

    def forward(
        self, student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, stored: Tensor, options: Options
    ) -> None:
        with launch_on(student) as extra:
            call = self._call(student, teacher, extra, options)
            scratch = workspace.allocate(call, False, student)
            call.forward(
                self._rows(student),
                self._rows(teacher),
                loss.data_ptr(),
                statistics.data_ptr(),
                stored.data_ptr(),
                scratch.data_ptr(),
            )

    def backward(
        self,
        grad_loss: Tensor,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        stored: Tensor,
        grad_student: Tensor,
        options: Options,
    ) -> None:
        with launch_on(student) as extra:
            call = self._call(student, teacher, extra, options)
            scratch = workspace.allocate(call, True, student)
            call.backward(
                grad_loss.data_ptr(),
                grad_loss.stride(),
                self._rows(student),
                self._rows(teacher),
                statistics.data_ptr(),
                stored.data_ptr(),
                grad_student.data_ptr(),
                grad_student.stride(),
                scratch.data_ptr(),
            )

    def _rows(self, x: Tensor) -> tuple[int, ...]:
        """Address, width, and the strides of batch, row and column."""
        return (x.data_ptr(), x.shape[2], *x.stride())

    def _call(self, student: Tensor, teacher: Tensor, extra: int, options: Options) -> Any:
        return native(options.backend).Relation(
            *student.shape,
            teacher.shape[2],
            *options[:5],
            dtype_name(student),
            options.form,
            extra,
            workspace.limit(),
        )
