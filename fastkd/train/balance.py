"""Balance the terms of a distiller on a training set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from fastkd._runtime import autocast, to_device
from fastkd.distill.distiller import Distiller
from fastkd.ops.collectives import alone
from fastkd.train.config import TrainConfig
from fastkd.train.host import check_batch, check_tokenizers
from fastkd.train.launch import join, requested
from fastkd.train.seeding import kept_generators, seed_step
from fastkd.train.shard import shard_teacher
from fastkd.train.stream_feed import first_samples
from fastkd.train.teacher_cache.reader import collate_for


def balance_on(
    distiller: Distiller, dataset: Dataset[Any], shares: Mapping[str, float], config: TrainConfig, batches: int = 4
) -> dict[str, float]:
    """Run `Distiller.balance` on the first samples of a dataset, in order.

    Args:
        distiller: student, teacher and the terms to weight.
        dataset: the training set; `fastkd.data.collate` makes its batches.
        shares: term name to the norm of its weighted gradient, relative to the task's.
        config: settings of the run; only what determines a first step is used: batch size,
            device, precision, memory format, threads and seed.
        batches: number of batches to average gradient norms over.

    Returns:
        Term name to weight, for all terms.
    """
    from fastkd.data import collate

    check_tokenizers(distiller, dataset)
    collated_by = collate_for(distiller, collate)
    count = len(dataset)  # type: ignore[arg-type]
    size = min(config.batch_size, count)
    device, precision = requested(config)
    if config.shard_teacher:
        _, device, precision = join(config)
        shard_teacher(distiller.teacher, config, device)
    distiller.to(device).train()
    if config.channels_last:
        distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    samples = first_samples(dataset, min(batches, count // size) * size)
    collated = [collated_by(samples[start : start + size]) for start in range(0, len(samples), size)]
    for batch in collated:
        check_batch(distiller, batch)
    inputs = [to_device(batch, device, config.channels_last) for batch in collated]
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with autocast(precision, device), kept_generators(), alone():  # these are whole batches, equal on every rank
            seed_step(config.seed, 0, 0, 0)  # dropout must not depend on what was loaded before
            return distiller.balance(inputs, shares)
    except torch.OutOfMemoryError as error:
        error.add_note("Balancing computes whole batches of batch_size, not micro-batches; set fixed weights instead.")
        raise
    finally:
        torch.set_num_threads(threads)
