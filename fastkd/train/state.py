"""Tensors of a run: what a checkpoint holds of the models, and the buffers as they were after the latest step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._messages import shortened
from fastkd._wrappers import plain_name, unwrapped
from fastkd.distill.distiller import Distiller

_STUDENT = "student."


class ModelState:
    """Parameters and buffers of a distiller (without the teacher), with a copy of the buffers.

    Parameters change only when the optimiser updates them, but a forward may change buffers (running statistics), or
    put other tensors in their place. The copy restores them if a step is abandoned between forward and update.
    """

    def __init__(self, distiller: Distiller) -> None:
        with unwrapped(distiller) as root:
            named = root.state_dict(keep_vars=True)
            owners = {
                f"{prefix}.{name}" if prefix else name: (module, name)
                for prefix, module in root.named_modules(remove_duplicate=False)
                for name in module._buffers
            }
        unique: dict[int, str] = {}
        for name, value in named.items():
            if isinstance(value, Tensor):
                unique.setdefault(id(value), name)  # tied parameters have several names
        self.tensors: dict[str, Tensor] = {name: named[name] for name in unique.values()}
        self._names = [name for name, t in self.tensors.items() if not isinstance(t, nn.Parameter)]
        self._owners = [owners.get(name) for name in self._names]
        self._buffers = [self.tensors[name] for name in self._names]
        self._copies = [t.detach().clone() for t in self._buffers]
        self._versions = [t._version for t in self._buffers]

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Copy the buffers as they are after a step."""
        changed = self._changed()
        for number in changed:
            self._versions[number] = self._buffers[number]._version
            if not _alike(self._copies[number], self._buffers[number]):
                self._copies[number] = torch.empty_like(self._buffers[number], requires_grad=False)
        if changed:
            torch._foreach_copy_([self._copies[n] for n in changed], [self._buffers[n] for n in changed])

    @torch.no_grad()
    def restore_buffers(self, where: Tensor | None = None) -> None:
        """Undo changes of buffers since the last `keep_buffers`, or only if the scalar bool ``where`` is true."""
        for number in self._changed():
            buffer, copy = self._buffers[number], self._copies[number]
            if _alike(copy, buffer):
                buffer.copy_(copy if where is None else torch.where(where, copy, buffer))
            elif where is None or bool(where):
                self._replace(number, copy.clone())

    def _changed(self) -> list[int]:
        """Return the numbers of the buffers that may have changed: batch norms change theirs without a new version."""
        replaced = self._look_up()
        return [
            number
            for number, (buffer, version) in enumerate(zip(self._buffers, self._versions, strict=True))
            if number in replaced or buffer.is_floating_point() or buffer._version != version
        ]

    def _look_up(self) -> set[int]:
        """Take the tensors that forwards put in place of buffers (``self.center = ...``); return their numbers."""
        replaced = set()
        for number, owner in enumerate(self._owners):
            found = owner and owner[0]._buffers.get(owner[1])
            if isinstance(found, Tensor) and found is not self._buffers[number]:
                self.tensors[self._names[number]] = self._buffers[number] = found
                replaced.add(number)
        return replaced

    def _replace(self, number: int, tensor: Tensor) -> None:
        owner = self._owners[number]
        assert owner is not None  # its tensor has been replaced
        owner[0]._buffers[owner[1]] = self.tensors[self._names[number]] = self._buffers[number] = tensor
        self._versions[number] = tensor._version

    def consistent(self) -> dict[str, dict[str, Tensor]]:
        """Return ``"student"`` and ``"aligners"`` to tensors by name, as they were after the latest step."""
        parts: dict[str, dict[str, Tensor]] = {"student": {}, "aligners": {}}
        copies = dict(zip(self._names, self._copies, strict=True))
        for name, tensor in self.tensors.items():
            part = "student" if name.startswith(_STUDENT) else "aligners"
            parts[part][name.removeprefix(_STUDENT)] = copies.get(name, tensor)
        return parts

    def load(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the tensors of a checkpoint into the models.

        Raises:
            ValueError: names or shapes differ.
        """
        for part, tensors in self.consistent().items():
            copy_tensors(
                {_full(part, name): tensor for name, tensor in parts.get(part, {}).items()},
                {_full(part, name): self.tensors[_full(part, name)] for name in tensors},
                part,
            )
        self.keep_buffers()


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _full(part: str, name: str) -> str:
    return _STUDENT + name if part == "student" else name


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor], part: str) -> None:
    """Copy tensors by name.

    Raises:
        ValueError: names or shapes differ; nothing is copied.
    """
    differ = [f"{name} only in the checkpoint" for name in source.keys() - target.keys()]
    differ += [f"{name} only in the model" for name in target.keys() - source.keys()]
    differ += [
        f"{name} {tuple(source[name].shape)} in the checkpoint, {tuple(target[name].shape)} in the model"
        for name in source.keys() & target.keys()
        if source[name].shape != target[name].shape
    ]
    if differ:
        raise ValueError(
            f"the checkpoint's {part} does not fit the model: {shortened(sorted(differ))}; resume with the model and "
            "terms of the run, or start another run"
        )
    for name, tensor in source.items():
        target[name].copy_(tensor)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state dict, with plain parameter names."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["param_names"] = [plain_name(name) for name in group["param_names"]]
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict of `optimizer_state`.

    Raises:
        ValueError: the parameters differ.
    """
    ours = [group["param_names"] for group in optimizer_state(optimizer)["param_groups"]]
    theirs = [group["param_names"] for group in state["param_groups"]]
    if ours != theirs:
        differ = sorted(set(itertools.chain(*ours)) ^ set(itertools.chain(*theirs)))
        raise ValueError(
            "the checkpoint's optimiser trained other parameters than this run"
            + (f": {shortened(differ)}" if differ else "")
            + "; freeze the same parameters"
        )
    hyper = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, hyper, strict=True):
        group.update(values)  # of this run's settings, which may differ where allowed
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:  # fused updates need the parameter's memory format
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
