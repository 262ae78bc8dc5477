"""BatchNorm over the samples of all processes, during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd._messages import shortened
from fastkd._wrappers import plain_name

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WITH_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"  # by name, so that timm is not imported


@contextmanager
def synchronised_norms(model: nn.Module, device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Let a model's BatchNorm layers normalise over all processes until the end of the block.

    The layers change their class, not their identity: hooks, parameters and names stay.

    Args:
        model: the model.
        device: where it trains. torch's SyncBatchNorm needs a GPU, and DistributedDataParallel refuses it elsewhere.
        enabled: False changes nothing.

    Raises:
        ValueError: a layer derives from BatchNorm in a way that is not known, so its forward cannot be replaced.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)] if enabled else []
    layers = [(name, m) for name, m in layers if not isinstance(m, nn.SyncBatchNorm)]
    unknown = [f"{plain_name(name)} ({type(m).__name__})" for name, m in layers if _synchronised(m, device) is None]
    if unknown:
        raise ValueError(
            f"sync_batchnorm: cannot replace the forward of {shortened(unknown)}; synchronise these layers in the "
            "model itself (torch.nn.SyncBatchNorm), and set sync_batchnorm=False"
        )
    before = [(m, type(m)) for _, m in layers]
    try:
        for module, _ in before:
            module.__class__ = _synchronised(module, device)  # type: ignore[assignment]
            module.process_group = None  # type: ignore[assignment]
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
            vars(module).pop("process_group", None)


def _synchronised(module: nn.Module, device: torch.device) -> type[nn.Module] | None:
    """Return the class that synchronises a layer, or None for a layer of an unknown class."""
    kind, on_gpu = type(module), device.type == "cuda"
    if kind in _PLAIN:
        return nn.SyncBatchNorm if on_gpu else _Synchronised
    if f"{kind.__module__}.{kind.__qualname__}" == _WITH_ACTIVATION:
        return _OnGpuWithActivation if on_gpu else _WithActivation
    return None


class _Synchronised(_BatchNorm):
    """torch's SyncBatchNorm in plain torch, for devices that it does not support."""

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return super().forward(input)
        normalised, mean, variance, count = _Normalise.apply(input, self.eps)
        if self.track_running_stats:
            self._track(mean, variance * (count / (count - 1)))
        if self.affine:
            shape = (1, -1, *[1] * (input.ndim - 2))
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, with the unbiased variance, as BatchNorm does."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(value.to(running.dtype), factor)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")


class _WithActivation(_Synchronised):
    """A BatchNorm of timm that is followed by dropout and an activation."""

    act: Any
    drop: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class _OnGpuWithActivation(nn.SyncBatchNorm):
    """`_WithActivation` on a GPU."""

    act: Any
    drop: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class _Normalise(torch.autograd.Function):
    """Normalise channels over the batch and positions of all processes.

    With n values per channel, x̂ = (x − μ) / √(σ² + ε) and g = ∂L/∂x̂, sums over all processes:

        ∂L/∂x = (g − Σg/n − x̂ · Σ(g·x̂)/n) / √(σ² + ε)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, C, ...)
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        sums = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])  # (C + 1,)
        torch.distributed.all_reduce(sums)
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = x - mean.view(shape)
        squares = centred.square().sum(dims)  # of differences: E[x²] − μ² would cancel
        torch.distributed.all_reduce(squares)
        variance = squares / count  # (C,)
        scale = torch.rsqrt(variance + eps).view(shape)
        normalised = centred * scale
        ctx.save_for_backward(normalised, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        normalised, scale, count = ctx.saved_tensors
        dims, shape = [0, *range(2, grad.ndim)], (1, -1, *[1] * (grad.ndim - 2))
        sums = torch.stack([grad.sum(dims), (grad * normalised).sum(dims)])  # (2, C)
        torch.distributed.all_reduce(sums)
        mean, projection = (sums / count).unbind()
        return (grad - mean.view(shape) - normalised * projection.view(shape)) * scale, None
