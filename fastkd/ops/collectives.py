"""Collectives over a group of processes, and their derivatives.

Convention: rank r computes a loss ℓ_r, and differentiation is that of Σ_r ℓ_r. Under DistributedDataParallel, which
averages the parameters' gradients, the result is the gradient of the mean of ℓ_r: where every rank has the loss L of
the global batch, that of L. A caller that reduces gradients itself averages them too.

So a sum over ranks, y = Σ_r x_r, has the derivative ∂(Σ_q ℓ_q)/∂x_r = Σ_q ∂ℓ_q/∂y on every rank: another sum over
ranks. Where y only reaches the loss through a smaller value z = f(y) that is the same on every rank, it is cheaper to
sum ∂ℓ_q/∂z (`same_on_every_rank`) and to pass the result through f and the sum unchanged (`total`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.errors import BackendUnavailable
from fastkd.ops.dispatch import BACKENDS, backend_from_env
from fastkd.ops.torch_state import is_transformed, wrapper_class_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WORLD = "world"
_alone = 0  # number of `alone` blocks entered; a plain global, so that torch.compile guards on it


def check_group(group: object, option: str, pools: bool) -> None:
    """Raise unless ``group`` is None, "world" or a ProcessGroup with this process in it.

    Args:
        group: the argument of a loss.
        option: name of the option that makes the loss pool the batch.
        pools: its value.
    """
    if group is None:
        return
    expected = "None, 'world' or a torch.distributed.ProcessGroup"
    if isinstance(group, str):
        if group != WORLD:
            raise ValueError(f"group: expected {expected}, got {group!r}")
    elif not dist.is_available():
        raise TypeError(f"group: this torch has no torch.distributed, so only None and 'world' apply, got {group!r}")
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not a member; call the loss in the members of the group only")
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected {expected}, got {type(group).__name__}")
    if not pools:
        raise ValueError(f"group: pools the batches of several processes, which needs {option}=True")


def active_group(group: ProcessGroup | str | None) -> ProcessGroup | None:
    """Return the group to communicate with, or None if this process is alone in it.

    "world" is the default group at the time of the call, and this process alone if torch.distributed has none.
    """
    if group is None or _alone:
        return None
    if isinstance(group, str):
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


@contextmanager
def alone() -> Iterator[None]:
    """Compute losses of this process alone, whatever their ``group``: for work that not every rank does."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def check_call(backend: str, *tensors: Tensor) -> None:
    """Raise if a loss over a group cannot be computed with this backend or for these tensors."""
    source = f"backend={backend!r}"
    if backend == "auto":
        backend = backend_from_env()
        source = f"FASTKD_BACKEND={backend}"
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in ("auto", "reference"):
        raise BackendUnavailable(
            f"{source}: over a group of processes the relation is computed in plain torch; use backend='auto' or "
            "'reference'"
        )
    if is_transformed(*tensors):
        raise BackendUnavailable(
            "group: collectives have no rules for vmap, torch.func transforms and forward-mode AD; call the loss "
            "outside of them, or with group=None"
        )
    if kind := wrapper_class_name(*tensors):
        raise BackendUnavailable(
            f"group: collectives take plain tensors, got {kind}, which wraps other tensors; pass those (for a DTensor "
            "x.to_local() or x.full_tensor())"
        )


# --- sums -------------------------------------------------------------------------------------------------------------


def plain_total(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return Σ_r x_r on every rank, without a derivative."""
    if torch.compiler.is_compiling():  # torch 2.11 drops an all-reduce in place from the backward of a Function
        from torch.distributed import _functional_collectives

        summed: Tensor = _functional_collectives.all_reduce(x.detach().contiguous(), "sum", group)
        return summed
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def total(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return Σ_r x_r on every rank; its derivative is Σ_q ∂ℓ_q/∂y, another sum over ranks."""
    result: Tensor = _Total.apply(x, group)
    return result


def same_on_every_rank(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return ``x``, which is the same on every rank; its derivative is Σ_q ∂ℓ_q/∂x."""
    result: Tensor = _SameOnEveryRank.apply(x, group)
    return result


def share_of_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return ``x``, a parameter used before `same_on_every_rank`: each rank contributes 1/P of its gradient."""
    result: Tensor = _Scaled.apply(x, 1.0 / dist.get_world_size(group))
    return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return plain_total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return once(plain_total(grad, ctx.group), grad), None


class _SameOnEveryRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return once(plain_total(grad, ctx.group), grad), None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def once(gradient: Tensor, *sources: Tensor) -> Tensor:
    """Return a gradient whose own derivative raises an error, where create_graph=True asks for one."""
    if not torch.is_grad_enabled():
        return gradient
    result: Tensor = _Once.apply(gradient, *sources)
    return result


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "group: a loss over several processes is differentiable once; for double backward use group=None with "
            'backend="reference"'
        )


# --- rows of all ranks ------------------------------------------------------------------------------------------------


def exchanged(numbers: Sequence[int], device: torch.device, group: ProcessGroup) -> list[list[int]]:
    """Return the numbers of every rank, (ranks, numbers). Synchronises with the device."""
    own = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    everyone = own.new_empty(dist.get_world_size(group) * len(own))
    _gather(everyone, own, group)
    found: list[list[int]] = everyone.view(-1, len(own)).tolist()
    return found


def gathered(x: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return the samples of all ranks in their order, (Σ counts, ...), from this rank's (counts[rank], ...)."""
    most = max(counts)
    everyone = x.new_empty((len(counts) * most, *x.shape[1:]))
    _gather(everyone, _padded(x.detach(), most), group)
    if min(counts) == most:
        return everyone
    return torch.cat([part[:n] for part, n in zip(everyone.split(most), counts, strict=True)])


def scattered_total(x: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return this rank's samples of Σ_r x_r, (counts[rank], ...), from (Σ counts, ...) on every rank."""
    most, own = max(counts), counts[dist.get_rank(group)]
    parts = x if min(counts) == most else torch.cat([_padded(part, most) for part in x.split(list(counts))])
    result = x.new_empty((most, *x.shape[1:]))
    # Before torch 2.14 these functions have other names, which warn since.
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    getattr(dist, name)(result, parts.contiguous(), group=group)
    return result[:own]


def _gather(everyone: Tensor, own: Tensor, group: ProcessGroup) -> None:
    """Fill ``everyone`` with the tensors of all ranks."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(everyone, own, group=group)


def _padded(x: Tensor, count: int) -> Tensor:
    """Return ``x`` with samples of zeros appended up to ``count``."""
    if len(x) == count:
        return x.contiguous()
    return torch.cat([x, x.new_zeros((count - len(x), *x.shape[1:]))])
