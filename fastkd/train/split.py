"""A batch split over micro-batches and processes: what differs from the whole batch, and how gradients are joined."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastkd._wrappers import plain_name
from fastkd.distill.checks import _few, undisturbed
from fastkd.distill.distiller import Distiller, Term
from fastkd.errors import FastKDWarning
from fastkd.train.config import TrainConfig

_POOLED = ("across_batch", "cross_image")  # options of losses that compare samples with each other


def warn_of_micro_batches(distiller: Distiller, config: TrainConfig, processes: int = 1) -> None:
    """Warn of what makes micro-batches differ from the whole batch: batch norms, and terms pooled over the batch."""
    if config.accumulate == 1:
        return
    size = config.batch_size // (config.accumulate * processes)
    norms = [name for name, m in distiller.student.named_modules() if isinstance(m, _BatchNorm) and m.training]
    pooled = [name for name, term in distiller.terms.items() if _pools(term)]
    found = []
    if norms:
        found.append(f"{len(norms)} BatchNorm layers ({_few([plain_name(name) for name in norms])}) normalise")
    if pooled:
        found.append(f"{_few(list(map(repr, pooled)))} ({' or '.join(_POOLED)}) compare{'s' * (len(pooled) == 1)}")
    if found:
        warnings.warn(
            f"accumulate={config.accumulate}: {' and '.join(found)} within each micro-batch of {size}, so a step is "
            f"not that of the whole batch of {config.batch_size}: use fewer micro-batches, or norms (GroupNorm, frozen "
            "BatchNorm) and terms that do not mix samples",
            FastKDWarning,
            stacklevel=2,
        )


def data_parallel(
    module: nn.Module, distiller: Distiller, batch: Mapping[str, Any], config: TrainConfig, device: torch.device
) -> DistributedDataParallel:
    """Wrap for several processes; parameters that the first batch gives no gradient are named, and looked for then."""
    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, without_gradient(distiller, batch))
    names = list(dict.fromkeys(name for part in gathered for name in part))
    if names and torch.distributed.get_rank() == 0:
        warnings.warn(
            f"{len(names)} parameters get no gradient on the first batch, so they do not train: {_few(names)}. With "
            "several processes they are looked for at every step, which takes time: freeze them "
            "(requires_grad_(False)) or remove them from the student",
            FastKDWarning,
            stacklevel=2,
        )
    look = bool(names) or config.find_unused_parameters
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=look)


def without_gradient(distiller: Distiller, batch: Mapping[str, Any]) -> list[str]:
    """Return the names of the trainable parameters that the loss of a batch does not depend on; nothing is changed."""
    named = [(plain_name(name), p) for name, p in distiller.named_parameters() if p.requires_grad]
    with undisturbed(distiller), torch.enable_grad():
        loss = distiller(batch).loss
        if not loss.requires_grad:
            return [name for name, _ in named]
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]


def check_all_reduced(module: nn.Module, step: int) -> None:
    """Refuse a step in which a parameter that had a gradient before has none: its processes did not join theirs.

    Raises:
        RuntimeError: naming the parameters and the fix.
    """
    if not isinstance(module, DistributedDataParallel) or module.find_unused_parameters:
        return
    names = [name for name, p in module.module.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        raise RuntimeError(
            f"{len(names)} parameters got no gradient at step {step}, although they did on the first batch: "
            f"{_few([plain_name(name) for name in names])}. Processes then do not wait for each other: set "
            "find_unused_parameters=True, or let every parameter take part in every step"
        )


def _pools(term: Term) -> bool:
    loss, options = term.loss, dict(term.kwargs)
    while isinstance(loss, functools.partial):
        options = {**loss.keywords, **options}
        loss = loss.func
    return any(options.get(name, getattr(loss, name, False)) for name in _POOLED)
