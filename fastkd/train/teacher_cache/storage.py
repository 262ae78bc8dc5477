"""Stored forms of a tensor in a teacher cache: its own dtype, a narrower one, or int8 codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastkd.distill.int8 import scale_shape, to_int8
from fastkd.distill.recorded import SCALES, Part, part_names
from fastkd.distill.reduced import reduce_channels

DTYPES = {"teacher": None, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Recorded:
    """Tensors recorded on one batch.

    Attributes:
        parts: by path.
        tensors: by name, each (n, ...).
        bases: (C, r) by name of the tensors whose channels are reduced.
    """

    parts: Mapping[str, Part]
    tensors: Mapping[str, Tensor]
    bases: Mapping[str, Tensor] = field(default_factory=dict)


class Storage:
    """The form in which recorded tensors are stored; its inverse is `fastkd.distill.recorded.RecordedOutput`.

    Args:
        dtype: one of `DTYPES`.

    Attributes:
        bases: (C, r) by name of the tensors whose channels are reduced.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: str) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        self.dtype = DTYPES[dtype]
        self.bases: dict[str, Tensor] = {}

    @property
    def is_exact(self) -> bool:
        """True if the teacher's values are stored unchanged."""
        return self.dtype is None and not self.bases

    @property
    def name(self) -> str:
        """The name of the dtype, "teacher" for the teacher's."""
        return str(self.dtype or "teacher").removeprefix("torch.")

    def stored(self, recorded: Recorded) -> Recorded:
        """Return what is stored of tensors in the teacher's dtype.

        Raises:
            ValueError: a finite value is outside the range of the dtype.
        """
        parts: dict[str, Part] = {}
        found: dict[str, Tensor] = {}
        for path, part in recorded.parts.items():
            names, scaled = part_names(path, part.count), []
            for name, order in zip(names, part.orders, strict=True):
                tensor = recorded.tensors[name]
                if name in self.bases:
                    tensor = reduce_channels(tensor, self.bases[name], order.index(1))
                shape = self._shape(tensor)
                if shape is not None:
                    scaled.append(name)
                    found[name], found[name + SCALES] = to_int8(_narrowed(name, tensor, torch.float32), shape)
                elif self.dtype in (torch.bfloat16, torch.float16):
                    found[name] = _narrowed(name, tensor, self.dtype)
                else:
                    found[name] = tensor
            parts[path] = replace(part, scaled=tuple(scaled))
        return Recorded(parts, found, self.bases)

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
