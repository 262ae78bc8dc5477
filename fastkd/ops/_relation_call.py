"""``relation`` as each backend is called: what its operators return, and how its kernels are given their arguments."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops import _workspace
from fastkd.ops._launch import dtype_name, launch_on, native, promoted, statistics_dtype
from fastkd.ops._relation_forms import KEPT_BLOCK, gram_double, gram_side, kept_elements

STATISTIC_PLANES = 5


class Options(NamedTuple):
    """The operators' options."""

    similarity: str
    distance: str
    temperature: float
    negate: bool
    cross: bool
    form: str  # "tiles", "kept" or, in C++, "gram"
    backend: str


def outputs(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and kept matrices, unfilled."""
    batch, rows = student.shape[:2]
    others = batch if options.cross else 1
    dtype = statistics_dtype(student, teacher)
    if options.backend == "triton":
        plan = importlib.import_module("fastkd.kernels._relation_plan")
        planes = plan.statistics_planes(options.similarity, options.distance, options.temperature, others)
        kept, kept_dtype, statistics = plan.kept_elements(batch, rows) if options.form == "kept" else 0, dtype, dtype
    else:
        planes, kept, kept_dtype, statistics = STATISTIC_PLANES * others + 2, 0, dtype, torch.float64
        if options.form == "kept" and options.backend == "cuda":
            kept = kept_elements(batch, rows, torch.promote_types(student.dtype, teacher.dtype), *options[:3])
        elif options.form == "kept":
            blocks = (rows + KEPT_BLOCK - 1) // KEPT_BLOCK
            kept = batch * blocks * (blocks + 1) * KEPT_BLOCK * KEPT_BLOCK
        elif options.form == "gram":  # the scales, and G
            widths = (student.shape[2], teacher.shape[2])
            planes, kept = 2, (1 if options.cross else batch) * gram_side(*widths) ** 2
            double = gram_double(*widths, torch.promote_types(student.dtype, teacher.dtype))
            kept_dtype = torch.float64 if double else torch.float32
    return (
        torch.empty((batch, rows), dtype=dtype, device=student.device),
        torch.empty((planes, batch, rows), dtype=statistics, device=student.device),
        torch.empty((kept,), dtype=kept_dtype, device=student.device),
    )


def forward(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, filled."""
    loss, statistics, kept = filled = outputs(student, teacher, options)
    if loss.numel():
        student, teacher = promoted(student, teacher)
        _kernels(options.backend).forward(student, teacher, loss, statistics, kept, options)
    return filled


def backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, kept: Tensor, options: Options
) -> Tensor:
    """The student's gradient."""
    dtype = student.dtype
    grad_loss = grad_loss.to(statistics_dtype(student, teacher))
    student, teacher = promoted(student, teacher)
    grad_student = torch.empty_like(student)
    if grad_student.numel():
        kernels = _kernels(options.backend)
        kernels.backward(grad_loss, student, teacher, statistics, kept, grad_student, options)
    return grad_student.to(dtype)


def _kernels(backend: str) -> Any:
    """What computes: an object with ``forward`` and ``backward``, filling the outputs that it is given."""
    return _Triton() if backend == "triton" else _Native()


class _Triton:
    """``fastkd.kernels.relation``."""

    def forward(
        self, student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, kept: Tensor, options: Options
    ) -> None:
        family = importlib.import_module("fastkd.kernels.relation")
        family.forward(student, teacher, loss, statistics, kept, options, _workspace.check)

    def backward(
        self,
        grad_loss: Tensor,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        kept: Tensor,
        grad_student: Tensor,
        options: Options,
    ) -> None:
        family = importlib.import_module("fastkd.kernels.relation_backward")
        family.backward(grad_loss, student, teacher, statistics, kept, grad_student, options, _workspace.check)


class _Native:
    """``csrc/cpu`` or ``csrc/cuda``: raw pointers and element strides, so that one build serves every torch."""

    def forward(
        self, student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, kept: Tensor, options: Options
    ) -> None:
        with launch_on(student) as extra:
            call = self._call(student, teacher, extra, options)
            workspace = _workspace.allocate(call, False, student)
            call.forward(
                self._rows(student),
                self._rows(teacher),
                loss.data_ptr(),
                statistics.data_ptr(),
                kept.data_ptr(),
                workspace.data_ptr(),
            )

    def backward(
        self,
        grad_loss: Tensor,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        kept: Tensor,
        grad_student: Tensor,
        options: Options,
    ) -> None:
        with launch_on(student) as extra:
            call = self._call(student, teacher, extra, options)
            workspace = _workspace.allocate(call, True, student)
            call.backward(
                grad_loss.data_ptr(),
                grad_loss.stride(),
                self._rows(student),
                self._rows(teacher),
                statistics.data_ptr(),
                kept.data_ptr(),
                grad_student.data_ptr(),
                grad_student.stride(),
                workspace.data_ptr(),
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
            _workspace.limit(),
        )
