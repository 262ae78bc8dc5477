"""Batches split over micro-batches and processes: gradient reduction, and warnings where results differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastkd._messages import shortened
from fastkd._wrappers import plain_name, uncompiled
from fastkd.distill.distiller import Distiller
from fastkd.distill.gradients import preserve_state
from fastkd.distill.terms import Term, loss_and_options, pools_batch, takes_group
from fastkd.errors import FastKDWarning
from fastkd.train.config import TrainConfig

_ENOUGH = 16  # samples whose batch statistics are as good as those of all; smaller shares cause a warning


def warn_of_micro_batches(distiller: Distiller, config: TrainConfig, processes: int = 1) -> None:
    """Warn about BatchNorm layers and terms that mix samples, whose result depends on the micro-batch size.

    Micro-batches are those of one process, or of the group of a term that has one. Without accumulation, BatchNorm of
    few samples and terms without a group cause a warning if there are several processes.
    """
    size = config.batch_size // (config.accumulate * processes)
    norms = [name for name, m in distiller.student.named_modules() if isinstance(m, _BatchNorm) and m.training]
    pooled = [term for term in distiller.terms.values() if pools_batch(term)]
    own = [term for term in pooled if not _has_group(term)]  # of one process
    if config.accumulate == 1 and processes > 1:
        if norms and size < _ENOUGH and not config.sync_batchnorm:
            warnings.warn(
                f"{len(norms)} BatchNorm layers ({shortened([plain_name(name) for name in norms])}) normalise within "
                f"the {size} samples of each process, so a step differs from that of one process with "
                f"{config.batch_size}: set sync_batchnorm=True, or use norms that do not mix samples (GroupNorm, "
                "frozen BatchNorm)",
                FastKDWarning,
                stacklevel=2,
            )
        if own:
            can_pool = [term for term in own if takes_group(term)]
            fix = f": set group='world' among the options of {_names(can_pool)}" if can_pool else "; it has no group"
            warnings.warn(
                f"{_compare(own)} within the {size} samples of each process, so a step differs from that of one "
                f"process with {config.batch_size}{fix}",
                FastKDWarning,
                stacklevel=2,
            )
    if config.accumulate == 1:
        return
    found = []
    if norms:
        found.append(f"{len(norms)} BatchNorm layers ({shortened([plain_name(name) for name in norms])}) normalise")
    if pooled:
        found.append(_compare(pooled))
    if not own and (config.sync_batchnorm or not norms):
        size *= processes
    if found:
        warnings.warn(
            f"accumulate={config.accumulate}: {' and '.join(found)} within each micro-batch of {size}, so a step "
            f"differs from that of the whole batch of {config.batch_size}: use fewer micro-batches, or norms "
            "(GroupNorm, frozen BatchNorm) and terms that do not mix samples",
            FastKDWarning,
            stacklevel=2,
        )


def data_parallel(
    module: nn.Module, distiller: Distiller, batch: Mapping[str, Any], config: TrainConfig, device: torch.device
) -> DistributedDataParallel:
    """Return the module wrapped in DistributedDataParallel.

    If parameters get no gradient on the first batch, warn and enable ``find_unused_parameters``, without a warning also
    if some get one from scheduled losses only.
    """
    own = without_gradient(distiller, batch)
    gathered = [own for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, own)
    names, scheduled = (
        list(dict.fromkeys(name for part in parts for name in part)) for parts in zip(*gathered, strict=True)
    )
    if names and torch.distributed.get_rank() == 0:
        _warn_without_gradient(names, " With several processes, looking for them at every step takes time.")
    find_unused = bool(names or scheduled) or config.find_unused_parameters
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=find_unused)


def warn_of_unused(module: nn.Module, distiller: Distiller, batch: Mapping[str, Any]) -> None:
    """Warn of trainable parameters without a gradient after the first backward of one process.

    Those that scheduled losses train at other steps are found by another pass over the batch, without schedules.
    """
    names = [plain_name(name) for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if names and distiller.schedules:
        names, _ = without_gradient(distiller, batch)
    if names:
        _warn_without_gradient(names)


def _warn_without_gradient(names: Sequence[str], consequence: str = "") -> None:
    """Warn that parameters do not train."""
    warnings.warn(
        f"{len(names)} parameters get no gradient on the first batch, so they do not train: {shortened(names)}."
        f"{consequence} Freeze them (requires_grad_(False)) or remove them from the student",
        FastKDWarning,
        stacklevel=3,
    )


def without_gradient(distiller: Distiller, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names of trainable parameters that no loss of a batch depends on, and that only scheduled ones do."""
    named = [(plain_name(name), p) for name, p in distiller.named_parameters() if p.requires_grad]
    with preserve_state(distiller), torch.enable_grad(), uncompiled(), distiller.at_step(None):
        output = distiller(batch)
        losses = {"task": output.task, **output.terms}
        always = [loss for name, loss in losses.items() if name not in distiller.schedules]
        never = _unused(output.loss, named)
        scheduled = _unused(sum(always), named) if len(always) < len(losses) else never
    return never, [name for name in scheduled if name not in never]


def _unused(loss: Any, named: Sequence[tuple[str, nn.Parameter]]) -> list[str]:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [name for name, _ in named]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]


def check_all_reduced(module: nn.Module, step: int) -> None:
    """Raise if a parameter that had a gradient on the first batch has none: DDP did not reduce it over the processes.

    Raises:
        RuntimeError: such parameters; the message names them and the fix.
    """
    if not isinstance(module, DistributedDataParallel) or module.find_unused_parameters:
        return
    names = [name for name, p in module.module.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        raise RuntimeError(
            f"{len(names)} parameters got no gradient at step {step}, although they did on the first batch: "
            f"{shortened([plain_name(name) for name in names])}. DDP then leaves gradients unreduced: set "
            "find_unused_parameters=True, or use every parameter at every step"
        )


def _has_group(term: Term) -> bool:
    """Return whether a term compares the samples of several processes."""
    loss, options = loss_and_options(term)
    return options.get("group", getattr(loss, "group", None)) is not None


def _compare(terms: Sequence[Term]) -> str:
    """Return that these terms compare samples."""
    return f"{_names(terms)} compare{'s' * (len(terms) == 1)} samples with each other"


def _names(terms: Sequence[Term]) -> str:
    return shortened([repr(term.name) for term in terms])
