"""Check tokenizers, masks and word ids on the host, before a batch moves to the device.

On a GPU, reading the values would synchronise, and an out-of-range word id would abort the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastkd._wrappers import unwrap
from fastkd.data._nested import declared_values, leaves
from fastkd.data.tokenizer import Tokenizer
from fastkd.distill.distiller import Distiller
from fastkd.distill.words import PREFIX
from fastkd.evaluate._values import check_mask
from fastkd.evaluate.evaluation import check_dataset
from fastkd.evaluate.protocols import PROTOCOLS
from fastkd.models.inputs import check_host_ids, check_normalisation, check_vocabulary
from fastkd.train.task import segmentation_loss


def check_tokenizers(distiller: Distiller, dataset: Any) -> None:
    """Reject a dataset whose tokenizers or normalisation differ from the models', or from each other.

    Raises:
        ValueError: they differ; the message names both sides.
    """
    for part in leaves(dataset, "image_mean"):
        check_normalisation(distiller.student, part, "student")
    ours, theirs = declared_values(dataset, "tokenizer"), declared_values(dataset, "teacher_tokenizer")
    for name, tokenizers in (("tokenizer", ours), ("teacher_tokenizer", theirs)):
        _check_same(name, tokenizers)
    for tokenizer in ours:
        check_vocabulary(distiller.student, tokenizer, "student")
    if distiller.teacher is not None:
        for tokenizer in ours if None in theirs else theirs:
            check_vocabulary(distiller.teacher, tokenizer, "teacher")


def check_validation(distiller: Distiller, dataset: Any) -> None:
    """Reject a validation set that does not fit protocol "lavt" or the student, before hours of training.

    Raises:
        ValueError: it does not fit.
    """
    check_dataset(dataset, PROTOCOLS["lavt"])
    for part in leaves(dataset, "image_mean"):
        check_normalisation(distiller.student, part, "student")
    for tokenizer in declared_values(dataset, "tokenizer"):
        check_vocabulary(distiller.student, tokenizer)


def _check_same(attribute: str, tokenizers: Sequence[Any]) -> None:
    """Reject a combined dataset in which one id stands for different words."""
    distinct = list({id(each): each for each in tokenizers if each is not None}.values())
    if len({_entries(each) for each in distinct}) > 1:
        names = " and ".join(sorted({repr(getattr(each, "name", each)) for each in distinct}))
        raise ValueError(
            f"dataset: its parts have different tokenizers ({attribute}: {names}), so one id would stand for several "
            "words; build them all with the model's own tokenizer"
        )


def _entries(tokenizer: Any) -> Any:
    """Return the vocabulary, or its size if the tokenizer does not list it."""
    pieces = getattr(tokenizer, "pieces", None)
    return tuple(pieces()) if callable(pieces) else getattr(tokenizer, "vocab_size", None)


def keep_tokenizer(student: nn.Module, dataset: Any) -> None:
    """Set the dataset's tokenizer on a `RISModel`, which saves it with its weights."""
    from fastkd.models import RISModel

    student, tokenizer = unwrap(student), next(iter(declared_values(dataset, "tokenizer")), None)
    if isinstance(student, RISModel) and isinstance(tokenizer, Tokenizer):
        student.tokenizer = tokenizer


def check_batch(distiller: Distiller, batch: Mapping[str, Any]) -> None:
    """Reject masks that `segmentation_loss` does not accept and out-of-range word ids.

    Raises:
        ValueError: a value is invalid; the message names it.
    """
    loss = distiller.task_loss
    mask = batch.get("mask")
    if getattr(loss, "func", loss) is segmentation_loss and isinstance(mask, Tensor) and mask.device.type == "cpu":
        check_mask(mask)
    check_host_ids(batch.get("input_ids"), distiller.student)
    if distiller.teacher is not None:
        check_host_ids(batch.get(PREFIX + "input_ids", batch.get("input_ids")), distiller.teacher)
