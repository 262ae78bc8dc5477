"""Balance the terms of a distiller on a training set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from fastkd._runtime import autocast, to_device
from fastkd.distill.distiller import Distiller
from fastkd.train.config import TrainConfig
from fastkd.train.host import check_batch, check_tokenizers
from fastkd.train.launch import requested


def balance_on(
    distiller: Distiller, dataset: Dataset[Any], shares: Mapping[str, float], config: TrainConfig, batches: int = 4
) -> dict[str, float]:
    """Run `Distiller.balance` on the first samples of a dataset, in order.

    Args:
        distiller: student, teacher and the terms to weight.
        dataset: the training set; `fastkd.data.collate` makes its batches.
        shares: term name to the norm of its weighted gradient, relative to the task's.
        config: settings of the run; only batch size, device and precision are used.
        batches: number of batches to average gradient norms over.

    Returns:
        Term name to weight, for all terms.
    """
    from fastkd.data import collate

    check_tokenizers(distiller, dataset)
    count = len(dataset)  # type: ignore[arg-type]
    size = min(config.batch_size, count)
    device, precision = requested(config)
    distiller.to(device).train()
    starts = range(0, min(batches * size, count - size + 1), size)
    collated = [collate([dataset[i] for i in range(start, start + size)]) for start in starts]
    for batch in collated:
        check_batch(distiller, batch)
    samples = [to_device(batch, device) for batch in collated]
    with autocast(precision, device):
        return distiller.balance(samples, shares)
