"""What a teacher cache stores of a tensor: the tensor itself, rounded to a narrower dtype, or int8 codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastkd.distill.int8 import scale_shape, to_int8
from fastkd.distill.recorded import SCALES, Part, part_names

DTYPES = {"teacher": None, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class Storage:
    """The form in which recorded tensors are stored; its inverse is `fastkd.distill.recorded.RecordedOutput`.

    Args:
        dtype: one of `DTYPES`.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: str) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        self.dtype = DTYPES[dtype]

    @property
    def is_exact(self) -> bool:
        """Whether the teacher's values are stored as they are."""
        return self.dtype is None

    def __str__(self) -> str:
        return str(self.dtype or "teacher").removeprefix("torch.")

    def parts(self, parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> dict[str, Part]:
        """Return the parts of stored tensors from those of recorded ones."""
        return {
            path: replace(part, scaled=tuple(n for n in part_names(path, part.count) if self._shape(tensors[n])))
            for path, part in parts.items()
        }

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is stored of recorded tensors (n, ...), by name.

        Raises:
            ValueError: a finite value is outside the range of the dtype.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            shape = self._shape(tensor)
            if shape is not None:
                found[name], found[name + SCALES] = to_int8(_narrowed(name, tensor, torch.float32), shape)
            elif self.dtype in (torch.bfloat16, torch.float16):
                found[name] = _narrowed(name, tensor, self.dtype)
            else:
                found[name] = tensor
        return found

    def _shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Return the shape of a sample's scales if a tensor (n, ...) is stored as int8."""
        return scale_shape(tensor.shape[1:]) if self.dtype == torch.int8 and tensor.is_floating_point() else None


def _narrowed(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a floating-point tensor of a wider dtype in this one, any other as it is."""
    if not value.is_floating_point() or value.dtype.itemsize <= dtype.itemsize:
        return value
    narrow = value.to(dtype)
    if bool((narrow.isinf() & value.isfinite()).any()):
        largest = float(value[value.isfinite()].abs().max())
        fix = "bf16" if dtype == torch.float16 else "the dtype 'teacher'"
        raise ValueError(
            f"{name!r} of the teacher has values of {largest:.3g}, outside the range of {dtype}: use {fix}"
        )
    return narrow
