"""Checks of a batch's values while it is on the host.

On a GPU looking would wait for the device, and a word id beyond the table would end the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastkd.data.tokenizer import Tokenizer
from fastkd.models.inputs import check_host_ids, check_normalisation, check_vocabulary, unwrapped
from fastkd.train.distiller import Distiller
from fastkd.train.task import check_mask, segmentation_loss
from fastkd.train.words import PREFIX


def check_tokenizers(distiller: Distiller, dataset: Any) -> None:
    """Refuse a dataset whose tokenizers or normalisation are not those of the models that read it.

    Raises:
        ValueError: naming both sides.
    """
    check_normalisation(distiller.student, dataset, "student")
    tokenizer = getattr(dataset, "tokenizer", None)
    check_vocabulary(distiller.student, tokenizer, "student")
    if distiller.teacher is not None:
        check_vocabulary(distiller.teacher, getattr(dataset, "teacher_tokenizer", None) or tokenizer, "teacher")


def keep_tokenizer(student: nn.Module, dataset: Any) -> None:
    """Hand the dataset's tokenizer to a `RISModel`, which saves it along with its weights."""
    from fastkd.models import RISModel

    student, tokenizer = unwrapped(student), getattr(dataset, "tokenizer", None)
    if isinstance(student, RISModel) and isinstance(tokenizer, Tokenizer):
        student.tokenizer = tokenizer


def check_batch(distiller: Distiller, batch: Mapping[str, Any]) -> None:
    """Refuse masks that `segmentation_loss` does not take, and word ids beyond a model's table.

    Raises:
        ValueError: naming the values.
    """
    loss = distiller.task_loss
    mask = batch.get("mask")
    if getattr(loss, "func", loss) is segmentation_loss and isinstance(mask, Tensor) and mask.device.type == "cpu":
        check_mask(mask)
    check_host_ids(batch.get("input_ids"), distiller.student)
    if distiller.teacher is not None:
        check_host_ids(batch.get(PREFIX + "input_ids", batch.get("input_ids")), distiller.teacher)
