"""A stand-in for a teacher that ran before: what the terms read of its output comes with the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._messages import shortened, suggestion
from fastkd.distill.int8 import from_int8
from fastkd.distill.reduced import restore_channels

PREFIX = "recorded_teacher."  # of a batch's keys
SCALES = "@scales"  # ends the name of a tensor's scales
_MISSING = "batch has no {}: it must come with every batch; TeacherCache.collate adds it"


@dataclass(frozen=True)
class Part:
    """One path into the teacher's output.

    Attributes:
        count: number of tensors if it leads to a list, else None.
        dtypes: the teacher's dtype of each tensor.
        orders: the dimensions of each tensor in the order in which they lie in memory, the batch first: (0, 2, 3, 1)
            for a channels-last map. Recorded tensors are permuted to this order.
        scaled: names of the tensors that are recorded as int8 codes with scales.
    """

    count: int | None
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...], ...]
    scaled: tuple[str, ...] = ()

    def names(self, path: str) -> list[str]:
        """Return the names of all recorded tensors, scales included."""
        return [*part_names(path, self.count), *(name + SCALES for name in self.scaled)]

    def keys(self, path: str) -> list[str]:
        """Return the batch's key of each of them."""
        return [PREFIX + name for name in self.names(path)]


def part_names(path: str, count: int | None) -> list[str]:
    """Return a name for each tensor at a path of the teacher's output."""
    return [path] if count is None else [f"{path}/{position}" for position in range(count)]


class RecordedOutput(Mapping[str, Any]):
    """Output of a `RecordedTeacher`: the paths that the batch holds, each a tensor or a list of tensors.

    Tensors have the teacher's dtype, whatever dtype they were recorded in, and its strides.
    """

    def __init__(
        self, parts: Mapping[str, Part], batch: Mapping[str, Any], fix: str, bases: Mapping[str, Tensor]
    ) -> None:
        self._parts, self._batch, self._fix, self._bases = parts, batch, fix, bases

    def __getitem__(self, path: str) -> Any:
        part = self._parts[path]
        names = part_names(path, part.count)
        tensors = [
            self._value(name, part, order).to(dtype)  # (B, ...)
            for name, dtype, order in zip(names, part.dtypes, part.orders, strict=True)
        ]
        return tensors[0] if part.count is None else tensors

    def _value(self, name: str, part: Part, order: tuple[int, ...]) -> Tensor:
        value: Tensor = self._batch[PREFIX + name]
        if name in part.scaled:
            value = from_int8(value, self._batch[PREFIX + name + SCALES])
        value = value.permute([order.index(dim) for dim in range(len(order))])
        return restore_channels(value, self._bases[name].to(value.device), order) if name in self._bases else value

    def __iter__(self) -> Iterator[str]:
        return (path for path, part in self._parts.items() if all(key in self._batch for key in part.keys(path)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def read(self, selector: Any) -> Any:
        """Return what a selector reads.

        Raises:
            ValueError: it is a function, or was not recorded.
        """
        if not isinstance(selector, str):
            raise ValueError(
                f"{getattr(selector, '__name__', selector)!r} is a function, which reads the output of a teacher that "
                "runs, not a recorded one: select by a path or the name of a tap"
            )
        check_recorded(selector, self._parts, self._fix)
        missing = [key for key in self._parts[selector].keys(selector) if key not in self._batch]
        if missing:
            raise ValueError(_MISSING.format(shortened(missing)))
        return self[selector]


class RecordedTeacher(nn.Module):
    """A module without parameters that takes the place of a `Distiller`'s teacher.

    Args:
        parts: what was recorded, by path.
        taps: name to ``(module path, index)`` of the taps that were recorded.
        fix: how to record more, for error messages.
        bases: (C, r) by name of the tensors whose channels are reduced: they are restored from r coefficients.
    """

    has_own_tokenizer = False

    def __init__(
        self,
        parts: Mapping[str, Part],
        taps: Mapping[str, tuple[str, int | str | None]],
        fix: str = "record it too",
        bases: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.taps, self.fix = dict(parts), dict(taps), fix
        self._reduced = tuple(bases or ())  # names hold dots, those of buffers must not
        for number, basis in enumerate((bases or {}).values()):
            self.register_buffer(f"basis_{number}", basis, persistent=False)
        self.eval()

    @property
    def reduced(self) -> list[str]:
        """The paths whose channels are reduced."""
        parts = self.parts.items()
        return [path for path, part in parts if any(name in self._reduced for name in part_names(path, part.count))]

    def output(self, batch: Mapping[str, Any]) -> RecordedOutput:
        """Return the part of the teacher's output that the batch holds.

        Raises:
            ValueError: it holds none.
        """
        if not any(key.startswith(PREFIX) for key in batch):
            raise ValueError(_MISSING.format("recorded output of the teacher"))
        bases = {name: getattr(self, f"basis_{number}") for number, name in enumerate(self._reduced)}
        return RecordedOutput(self.parts, batch, self.fix, bases)

    def train(self, mode: bool = True) -> RecordedTeacher:
        """Stay in eval mode."""
        return super().train(False)

    def check_paths(self, owner: str, paths: Sequence[str]) -> None:
        """Raise ``ValueError`` if a path was not recorded; ``owner`` begins the message."""
        for path in paths:
            try:
                check_recorded(path, self.parts, self.fix)
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from error

    def check_taps(self, taps: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if something else than these taps was recorded under their names."""
        recorded = {path.partition(".")[0] for path in self.parts}
        for name, target in taps.items():
            if name in recorded and self.taps.get(name) != tap_target(target):
                raise ValueError(
                    f"teacher_taps: {name!r} is module {tap_target(target)!r} here, but "
                    f"{self.taps.get(name, 'no tap')!r} was recorded under this name: {self.fix}"
                )


def tap_target(target: Any) -> tuple[str, int | str | None]:
    """Return a tap's target, a path or ``(path, index)``, as ``(path, index)``."""
    return (target, None) if isinstance(target, str) else (target[0], target[1])


def check_recorded(path: str, parts: Mapping[str, Part], fix: str) -> None:
    """Raise ``ValueError`` if a path was not recorded."""
    if path not in parts:
        raise ValueError(f"{path!r} of the teacher was not recorded: {fix}.{suggestion(path, parts)}")
