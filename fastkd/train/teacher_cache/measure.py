"""Checks and measurements on the first batch, before a teacher cache is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd._wrappers import uncompiled
from fastkd.data._nested import set_epoch
from fastkd.distill.distiller import Distiller
from fastkd.distill.gradients import preserve_state
from fastkd.distill.recorded import PREFIX, Part, RecordedTeacher, part_names
from fastkd.distill.words import is_sentence, teacher_keys
from fastkd.ops.collectives import alone
from fastkd.train.samples import TrainingSamples
from fastkd.train.teacher_cache.keys import digest_of, sample_keys
from fastkd.train.teacher_cache.storage import Recorded
from fastkd.train.teacher_cache.views import augmented_in

Collate = Callable[[list[Any]], dict[str, Any]]
_TOLERANCE = 1e-3  # of the largest value, as in `Distiller.check`


def spread(count: int, number: int = 16) -> list[int]:
    """Return up to ``number`` evenly spaced indices below ``count``."""
    number = min(number, count)
    return [index * count // number for index in range(number)]


def repeatable_keys(
    dataset: Dataset[Any], collate: Collate, inputs: Sequence[str]
) -> tuple[dict[str, str], list[bytes]]:
    """Read some samples twice, in different epochs; return the batch's key of each teacher input, and their keys.

    Raises:
        ValueError: what the teacher receives changes between the two reads.
    """
    if augmented_in(dataset):
        raise ValueError("dataset is AugmentedViews, which serves one view per epoch: cache its all()")
    indices = spread(len(dataset))  # type: ignore[arg-type]
    reads = []
    for epoch in (1, 0):
        set_epoch(dataset, epoch)
        samples = TrainingSamples(dataset, seed=epoch)
        samples.epoch = epoch
        batch = collate([samples[index] for index in indices])
        names = teacher_keys(inputs, batch)
        if not names:
            raise ValueError(f"a batch holds none of the teacher's inputs ({', '.join(inputs)})")
        reads.append(sample_keys(batch, list(names.values())))
    for index, before, after in zip(indices, *reads, strict=True):
        changed = [name for n, name in enumerate(names.values()) if digest_of(before, n) != digest_of(after, n)]
        if changed:
            raise ValueError(_changes(changed, index))
    return names, reads[-1]


def _changes(names: Sequence[str], index: int) -> str:
    if all(is_sentence(name) for name in names):
        return (
            f"the sentence of sample {index} changes from epoch to epoch: cache a dataset that lists every sentence "
            "(ReferDataset(..., sentences='all')); a run may then draw them at random"
        )
    return (
        f"{' and '.join(names)} of sample {index} changes from epoch to epoch: a random augmentation would be cached "
        "in one view only; augment by fastkd.train.AugmentedViews and cache its all(), or train with the teacher online"
    )


def flatten(values: Mapping[str, Any], size: int) -> Recorded:
    """Return the parts and the tensors of what terms read from the teacher's output on ``size`` samples.

    The tensors' dimensions are permuted to the order in which they lie in memory.

    Raises:
        ValueError: a value that is not a tensor or list of tensors with one row per sample.
    """
    parts: dict[str, Part] = {}
    tensors: dict[str, Tensor] = {}
    for path, value in values.items():
        several = list(value) if isinstance(value, list | tuple) else [value]
        for tensor in several:
            if not isinstance(tensor, Tensor) or tensor.ndim == 0 or tensor.shape[0] != size:
                inside = f"{type(tensor).__name__}: select tensors inside it, such as {path}.q of an attention tap"
                found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else inside
                raise ValueError(
                    f"{path!r} of the teacher cannot be cached: expected tensors with one row for each of {size} "
                    f"samples, got {found}"
                )
        count = len(several) if isinstance(value, list | tuple) else None
        orders = tuple(_memory_order(tensor) for tensor in several)
        parts[path] = Part(count, tuple(tensor.dtype for tensor in several), orders)
        permuted = [tensor.permute(order) for tensor, order in zip(several, orders, strict=True)]
        tensors |= dict(zip(part_names(path, count), permuted, strict=True))
    return Recorded(parts, tensors)


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions in the order in which they lie in memory; the usual order if they overlap or have gaps."""
    strides = tensor.stride()
    order = (0, *sorted(range(1, tensor.ndim), key=lambda dim: -strides[dim]))
    return order if tensor.permute(order).is_contiguous() else tuple(range(tensor.ndim))


def check_independent(distiller: Distiller, batch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> float:
    """Run the teacher on the batch in reverse order; return the largest change, relative to the largest value.

    It is 0 where a sample's result is, bit for bit, the same whatever the other samples of a batch of this size are.

    Raises:
        ValueError: the teacher mixes samples of a batch.
    """
    size = len(next(iter(tensors.values())))
    reverse = {key: _reversed(value, size) for key, value in batch.items()}
    again = flatten(distiller.record_teacher(reverse), size).tensors
    worst = 0.0
    for name, value in tensors.items():
        first, second = (each.double().nan_to_num(0, 0, 0) for each in (value, again[name].flip(0)))
        if first.numel():
            change = float((first - second).abs().max() / first.abs().max().clamp_min(1e-300))
            worst = max(worst, change)
    if worst > _TOLERANCE:
        raise ValueError(
            f"the teacher's output for a sample changes by {worst:.2g} with the order of the batch: its forward mixes "
            "samples, so it cannot be cached per sample"
        )
    return worst


def _reversed(value: Any, size: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value.flip(0)
    return value[::-1] if isinstance(value, list) and len(value) == size else value


def storage_errors(
    distiller: Distiller,
    taps: Mapping[str, tuple[str, int | str | None]],
    recorded: Iterable[tuple[Mapping[str, Any], Recorded, Recorded]],
) -> dict[str, dict[str, float]]:
    """Return the relative error of each term's loss and gradient that storing causes, over a few batches.

    Args:
        distiller: its student and terms.
        taps: the teacher's taps.
        recorded: batches, each with what the teacher returned and with what is stored of it.
    """
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    squares: dict[tuple[str, str], list[float]] = {}  # of the difference, of the exact value; summed over batches
    for batch, *both in recorded:
        exact, stored = (_term_gradients(distiller, taps, batch, one, parameters) for one in both)
        for key, value in exact.items():
            total = squares.setdefault(key, [0.0, 0.0])
            total[0] += float((stored[key] - value).square().sum())
            total[1] += float(value.square().sum())
    return {
        name: {kind: math.sqrt(_ratio(*squares[name, kind])) for kind in ("loss", "gradient")}
        for name in distiller.terms
    }


def _term_gradients(
    distiller: Distiller,
    taps: Mapping[str, tuple[str, int | str | None]],
    batch: Mapping[str, Any],
    recorded: Recorded,
    parameters: Sequence[Tensor],
) -> dict[tuple[str, str], Tensor]:
    """Return each term's loss and gradient, as vectors in fp64."""
    with preserve_state(distiller), torch.enable_grad(), uncompiled(), alone():
        teacher = distiller.with_teacher(RecordedTeacher(recorded.parts, taps, bases=recorded.bases))
        with teacher.at_step(None):
            output = teacher({**batch, **{PREFIX + name: value for name, value in recorded.tensors.items()}})
        losses = {(name, "loss"): term.detach().double() for name, term in output.terms.items()}
        return losses | {(name, "gradient"): _gradient(term, parameters) for name, term in output.terms.items()}


def _ratio(difference: float, exact: float) -> float:
    return difference / max(exact, 1e-300)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient as one vector."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([g.detach().reshape(-1).double() for g in gradients if g is not None])
