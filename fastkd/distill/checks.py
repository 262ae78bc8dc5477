"""Checks before training, for mistakes that would otherwise go unnoticed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._messages import shortened
from fastkd._wrappers import is_sharded, plain_name, unwrap
from fastkd.distill.gradients import GradientReport

NamedTensors = list[tuple[str, Tensor]]


def check_frozen(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ``ValueError`` unless the teacher is in eval mode, frozen, loaded and on the student's device."""
    training = [name or "teacher" for name, module in teacher.named_modules() if module.training]
    if training:
        raise ValueError(
            f"teacher is in train mode ({shortened(training)}): dropout, drop path and batch statistics would change "
            "its output; call teacher.eval()"
        )
    trainable = [name for name, p in teacher.named_parameters() if p.requires_grad]
    if trainable:
        raise ValueError(
            f"teacher has parameters that require a gradient ({shortened(trainable)}): call "
            "teacher.requires_grad_(False)"
        )
    check_has_weights(teacher)
    if is_sharded(unwrap(teacher)):
        return  # weights may wait in host memory
    device = next((p.device for p in student.parameters()), None)
    elsewhere = [
        f"{name} on {p.device}" for name, p in teacher.named_parameters() if device is not None and p.device != device
    ]
    if elsewhere:
        raise ValueError(
            f"student is on {device}, but the teacher has {shortened(elsewhere)}: move both with distiller.to(device)"
        )


def check_batch(batch: object, inputs: Iterable[str]) -> None:
    """Raise ``TypeError`` unless a batch is a mapping; a loader of pairs gives a tuple."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping of names to values, got {type(batch).__name__}; pass a dict whose keys are among "
            f"inputs={tuple(inputs)}, with whatever the task loss reads"
        )


def check_has_weights(teacher: nn.Module) -> None:
    """Raise ``ValueError`` if a parameter of the teacher is on the meta device."""
    empty = [name for name, p in teacher.named_parameters() if p.is_meta]
    if empty:
        raise ValueError(f"teacher has parameters without weights ({shortened(empty)}): load them before distilling")


def check_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if an input of the models holds NaN or +Inf, which would look like a fault of the models."""
    for key, value in inputs.items():
        for name, tensor in named_tensors(value, key):
            broken = _broken(tensor)
            if broken.any():
                each = broken.flatten(1).any(1) if broken.ndim > 1 else broken.reshape(-1)
                samples = shortened([str(sample) for sample in each.nonzero().flatten().tolist()])
                raise ValueError(
                    f"batch[{name!r}] holds NaN or Inf (samples {samples} of the batch): look at the dataset and its "
                    "transforms"
                )


def _broken(x: Tensor) -> Tensor:
    return torch.isnan(x) | (x == math.inf)  # −inf may be a mask


def check_deterministic(run_teacher: Callable[[], NamedTensors]) -> None:
    """Run the teacher twice; raise ``ValueError`` if it returns no tensor, NaN, +Inf or different values."""
    first, second = run_teacher(), run_teacher()
    if not first:
        raise ValueError("teacher returned no tensor: its forward must return a tensor or an object that holds some")
    if len(first) != len(second):
        raise ValueError("teacher returned different outputs in two passes over one batch")
    for (name, a), (_, b) in zip(first, second, strict=True):
        if _broken(a).any():
            raise ValueError(f"teacher's {name} holds NaN or Inf on the first batch: were all of its weights loaded?")
        # Not bit for bit: some GPU convolutions differ in the last digits between two runs.
        tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 1e-2
        scale = a.detach().abs().nan_to_num(0, 0, 0).max() if a.numel() else a.new_zeros(())
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=float(tolerance * scale), equal_nan=True):
            raise ValueError(
                f"teacher's {name} changes between two passes over one batch: something in it is random or keeps "
                "state; make its forward deterministic"
            )


def check_trained(teacher: nn.Module, run_teacher: Callable[[], Any]) -> None:
    """Raise ``ValueError`` if normalisation layers that the teacher's forward uses hold their initial values.

    Training changes them, so their weights were not loaded. Other layers begin at random and do not show it.
    """
    used: dict[str, bool] = {}  # path to whether the values are the initial ones

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if name not in used:
                used[name] = _is_initial(module)

        return hook

    norms = [(name, module) for name, module in teacher.named_modules() if _is_norm(module)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in norms]
    try:
        run_teacher()
    finally:
        for handle in handles:
            handle.remove()
    initial = [plain_name(name) for name, untrained in used.items() if untrained]
    if initial:
        raise ValueError(
            f"teacher: {len(initial)} of the {len(used)} normalisation layers that it uses hold their initial values "
            f"({shortened(initial)}), so {'its' if len(initial) == len(used) else 'some of its'} weights were not "
            "loaded: load them all, or set allow_untrained_teacher=True (--allow-untrained-teacher)"
        )


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


def _is_initial(module: nn.Module) -> bool:
    """Return whether scale and running variance are 1, offset and running mean 0, as before training."""
    expected = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    found = [(getattr(module, name, None), value) for name, value in expected.items()]
    return all(bool((tensor == value).all()) for tensor, value in found if isinstance(tensor, Tensor))


@contextmanager
def process_group_explained() -> Iterator[None]:
    """Raise a clear ``ValueError`` in place of torch's if something in the block needs other processes, without any."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if not alone or "process group has not been initialized" not in str(error):
            raise
        source = " ".join(getattr(error, "__notes__", ())) or "This is the task loss or a model."
        raise ValueError(
            "something in the forward calls torch.distributed, but this process has joined no others. "
            f"{source} Start it with torchrun or accelerate launch, or let it skip the call in a single process "
            "(torch.distributed.is_initialized())"
        ) from error


def check_gradients(report: GradientReport, *, labelled: bool = True) -> None:
    """Raise ``ValueError`` if a loss or its gradient is not finite, or if a gradient or a term is exactly 0.

    The task loss of a batch that is not ``labelled`` may be 0.
    """
    for name, value in report.values.items():
        loss = "the task loss" if name == "task" else f"term {name!r}"
        if not math.isfinite(value):
            raise ValueError(f"{loss} is {value} on the first batch: look at its inputs for NaN, Inf or overflow")
        if value == 0 and name != "task":
            raise ValueError(
                f"{loss} is exactly 0 on the first batch: it teaches nothing. Student and teacher select equal "
                "tensors, or the loss is constant on these shapes"
            )
        norm = report.norms[name]
        if not math.isfinite(norm):
            raise ValueError(f"{loss} is {value:.4g} but its gradient with respect to the student is {norm}")
        if norm == 0 and (labelled or name != "task"):
            raise ValueError(
                f"{loss} sends no gradient to the student: the selected tensor is detached or does not depend on the "
                "student's trainable parameters, or the loss is constant there"
            )


def named_tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield every floating-point tensor in a nested output with its path."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        items = vars(value).items()
    for key, item in items:
        yield from named_tensors(item, str(key) if name == "output" else f"{name}.{key}")
