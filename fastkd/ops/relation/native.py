"""Call the C++ or CUDA C++ kernels of ``relation`` with addresses and strides: one build serves every torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastkd._integers import round_up
from fastkd.ops.launch import (
    allocate_workspace,
    dtype_name,
    launch_on,
    native,
    statistics_dtype,
    workspace_limit,
)
from fastkd.ops.registration import number_of
from fastkd.ops.relation.plan import (
    Options,
    Sizes,
    gram_side,
    has_double_gram,
    stored_elements,
    stored_elements_cpu,
)

STATISTICS_PER_PAIR = 5  # of a row and a sample it is compared with


def sizes(student: Tensor, teacher: Tensor, options: Options) -> Sizes:
    """Return the sizes of statistics and stored matrices."""
    batch, rows = student.shape[:2]
    others = batch if options.cross else 1
    dtype, common = statistics_dtype(student, teacher), torch.promote_types(student.dtype, teacher.dtype)
    if options.form == "gram":  # two scales per row, and the Gram matrix G
        widths = (student.shape[2], teacher.shape[2])
        gram_dtype = torch.float64 if has_double_gram(*widths, common) else torch.float32
        return Sizes(2, (1 if options.cross else batch) * gram_side(*widths) ** 2, torch.float64, gram_dtype)
    stored = 0
    if options.form == "stored" and options.backend == "cuda":
        temperature = number_of(options.temperature)
        stored = stored_elements(batch, rows, common, options.similarity, options.distance, temperature)
    elif options.form == "stored":
        stored = stored_elements_cpu(batch, rows)
    return Sizes(STATISTICS_PER_PAIR * others + 2, stored, torch.float64, dtype)


def forward(
    student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, stored: Tensor, options: Options
) -> None:
    """Fill ``loss``, ``statistics`` and ``stored``."""
    with launch_on(student) as extra:
        limit = workspace_limit(student.device)
        call = _call(student, teacher, extra, options, limit)
        workspace = allocate_workspace(call, False, student, limit)
        of_student, of_teacher = _readable(student, options.backend), _readable(teacher, options.backend)
        call.forward(
            _rows(*of_student),
            _rows(*of_teacher),
            loss.data_ptr(),
            statistics.data_ptr(),
            stored.data_ptr(),
            workspace.data_ptr(),
        )


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    stored: Tensor,
    grad_student: Tensor,
    options: Options,
) -> None:
    """Fill ``grad_student``."""
    with launch_on(student) as extra:
        limit = workspace_limit(student.device)
        call = _call(student, teacher, extra, options, limit)
        workspace = allocate_workspace(call, True, student, limit)
        of_student, of_teacher = _readable(student, options.backend), _readable(teacher, options.backend)
        call.backward(
            grad_loss.data_ptr(),
            grad_loss.stride(),
            _rows(*of_student),
            _rows(*of_teacher),
            statistics.data_ptr(),
            stored.data_ptr(),
            grad_student.data_ptr(),
            grad_student.stride(),
            workspace.data_ptr(),
        )


def _readable(x: Tensor, backend: str) -> tuple[Tensor, bool]:
    """Return rows that the kernels can read, and whether zeros pad their contiguous dimension to 16 bytes.

    Asynchronous copies on a GPU move 4 bytes or more, so 16-bit rows of odd length or address are copied.
    """
    if backend != "cuda" or x.element_size() > 2:
        return x, False
    batch_stride, row_stride, column_stride = x.stride()
    rows_inner = row_stride == 1 and column_stride != 1
    length, line_stride = (x.shape[1], column_stride) if rows_inner else (x.shape[2], row_stride)
    odd = (length | line_stride | batch_stride | x.data_ptr() // x.element_size()) % 2
    if not odd and (row_stride == 1 or column_stride == 1):
        return x, False
    lines = x.mT if rows_inner else x  # (B, lines, length)
    whole = round_up(length, 16 // x.element_size())
    padded = x.new_empty((*lines.shape[:2], whole))
    if whole > length:
        padded.narrow(2, length, whole - length).zero_()
    padded = padded.narrow(2, 0, length).copy_(lines)
    return padded.mT if rows_inner else padded, True


def _rows(x: Tensor, padded: bool) -> tuple[Any, ...]:
    """Return address, width, the strides of batch, row and column, and whether zeros follow."""
    return (x.data_ptr(), x.shape[2], *x.stride(), padded)


def _call(student: Tensor, teacher: Tensor, extra: int, options: Options, limit: int) -> Any:
    sizes = (*student.shape, teacher.shape[2])
    return _cached_call(
        native(options.backend), *sizes, *options[:5], dtype_name(student.dtype), options.form, extra, limit
    )


@functools.lru_cache(64)
def _cached_call(module: Any, *arguments: Any) -> Any:
    """Return a native call, which holds checked settings and no addresses."""
    return module.Relation(*arguments)
