"""Predict the masks of sentences in images, one by one or in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fastkd._runtime import device_of, modes_kept
from fastkd._wrappers import unwrap
from fastkd.data.images import read_image, to_square

if TYPE_CHECKING:
    from fastkd.data import Tokenizer


@dataclass
class Prediction:
    """Predicted mask of the object that a sentence refers to, at the image's own size.

    Attributes:
        sentence: the referring expression.
        image: (H, W, 3) uint8 RGB, as read.
        mask: (H, W) bool, True where the object's logit is the larger of the two.
        probability: (H, W) float32, softmax probability of the object.
        score: mean of ``probability`` over the mask, in [0.5, 1]; 0 if the mask is empty. It measures the model's
            confidence in the chosen pixels, not the quality of the mask.
    """

    sentence: str
    image: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    probability: np.ndarray = field(repr=False)
    score: float

    @property
    def share(self) -> float:
        """Return the fraction of the image that the mask covers, in [0, 1]."""
        return float(self.mask.mean())


def predict(
    model: nn.Module,
    image: str | os.PathLike[str] | bytes | Image.Image | np.ndarray,
    sentence: str,
    tokenizer: Tokenizer | None = None,
) -> Prediction:
    """Segment the object that a sentence refers to and return a `Prediction`.

    The image is resized to the model's square input and normalised as in training. The logits are resized back
    bilinearly before the decision, so the mask has the image's own size.

    Args:
        model: a `fastkd.models.RISModel`, or a model with the same call and a ``config``. Runs in eval mode on the
            device of its weights; its modes are restored.
        image: path of an image, its encoded content, a PIL image, or (H, W, 3) uint8 RGB; its EXIF orientation is
            applied, as in training.
        sentence: the referring expression. If longer than the model allows it is truncated, with a `FastKDWarning`.
        tokenizer: the model's tokenizer; default: the one its configuration names.

    Raises:
        FileNotFoundError: the image does not exist.
        ValueError: a file that is not an image, an empty sentence, a model that names no tokenizer, or a tokenizer with
            more entries than the model's vocabulary.
        FloatingPointError: NaN in the logits.
        TypeError: an array that is not uint8, a sentence that is not a string, or a model without a ``config``.

    Example:
        >>> model = RISModel.from_pretrained("student")
        >>> found = predict(model, "table.jpg", "the left red cup")
        >>> found.score, found.mask.shape
    """
    found = next(predict_batches(model, [(image, sentence)], tokenizer))
    if isinstance(found, Exception):
        raise found
    return found


def predict_batches(
    model: nn.Module,
    records: Iterable[tuple[str | os.PathLike[str] | bytes | Image.Image | np.ndarray, str]],
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = 16,
) -> Iterator[Prediction | Exception]:
    """Yield the `Prediction` of each record in order, or the error that it caused; the others are not affected.

    Images are read as in `predict`; records of a batch with the same path share one read. Memory holds one batch.

    Args:
        model: as in `predict`.
        records: image and sentence of each record.
        tokenizer: the model's tokenizer; default: the one its configuration names.
        batch_size: records per forward.

    Yields:
        A `Prediction`, or the ``OSError``, ``ValueError``, ``TypeError`` or ``FloatingPointError`` that `predict` would
        raise for this record.

    Raises:
        ValueError: the model names no tokenizer, or one with more entries than its vocabulary; batch_size < 1.
        TypeError: the model has no ``config``.

    Example:
        >>> for found in predict_batches(model, [("a.jpg", "the red cup"), ("b.jpg", "the cat")]):
        ...     print(found)
    """
    from fastkd.models.inputs import check_vocabulary

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _config(model)
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    check_vocabulary(model, tokenizer)
    remaining = iter(records)
    while batch := list(islice(remaining, batch_size)):
        yield from _predict_batch(model, batch, tokenizer)


def _predict_batch(model: nn.Module, records: Sequence[tuple[Any, str]], tokenizer: Tokenizer) -> list[Any]:
    """Return a `Prediction` or an error for each record."""
    from fastkd.data._prepare import normalise
    from fastkd.distill.forward import normalisation, run_model
    from fastkd.evaluate._values import has_nan, logits_of, nan_cause
    from fastkd.models.inputs import check_host_ids, word_limit

    found: list[Any] = [None] * len(records)
    read: dict[Any, np.ndarray] = {}
    inputs: list[tuple[int, np.ndarray, torch.Tensor, torch.Tensor]] = []
    for number, (image, sentence) in enumerate(records):
        try:
            check_sentence(sentence)
            source = str(image) if isinstance(image, str | os.PathLike) else id(image)  # the batch keeps it alive
            if source not in read:
                read[source] = read_image(image)
            input_ids, word_mask = tokenizer([sentence], word_limit(model))  # (1, T)
            check_host_ids(input_ids, model)
            inputs.append((number, read[source], input_ids, word_mask))
        except (OSError, ValueError, TypeError) as error:
            found[number] = error
    if not inputs:
        return found
    device = device_of(model)
    size, statistics = _config(model).image_size, normalisation(model) or ()
    images = torch.stack([normalise(to_square(pixels, size), *statistics) for _, pixels, _, _ in inputs])
    ids, masks = torch.cat([given[2] for given in inputs]), torch.cat([given[3] for given in inputs])  # (B, T)
    with modes_kept(model), torch.inference_mode():
        model.eval()
        logits = logits_of(run_model(model, images.to(device), ids.to(device), masks.to(device))).float()
        nan = has_nan(logits).tolist()
        for (number, pixels, _, _), rows, undecided in zip(inputs, logits, nan, strict=True):
            if undecided:
                message = f"the model's logits hold NaN, which gives no mask: {nan_cause(model)}"
                found[number] = FloatingPointError(message)
            else:
                found[number] = _prediction(rows, pixels, records[number][1])
    return found


def _prediction(logits: torch.Tensor, pixels: np.ndarray, sentence: str) -> Prediction:
    """Return the prediction of logits (2, h, w) for an image (H, W, 3)."""
    logits = F.interpolate(logits[None], size=pixels.shape[:2], mode="bilinear", align_corners=False)[0]  # (2, H, W)
    probability = logits.softmax(0)[1].cpu().numpy()  # (H, W)
    mask = logits.argmax(0).bool().cpu().numpy()
    score = float(probability[mask].mean(dtype=np.float64)) if mask.any() else 0.0
    return Prediction(sentence, pixels, mask, probability, score)


def check_sentence(sentence: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a sentence is a string that is not empty."""
    if not isinstance(sentence, str):
        raise TypeError(f"sentence must be a string, got {type(sentence).__name__}")
    if not sentence.strip():
        raise ValueError("the sentence is empty: pass a referring expression such as 'the left red cup'")


def tokenizer_of(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Return a model's tokenizer: that of its folder, else the one it was trained with, else the one its config names.

    Args:
        model: a model with a ``config``.
        folder: folder that the model was read from.

    Raises:
        ValueError: the folder holds no tokenizer and the configuration names none.
        FileNotFoundError: the named tokenizer does not exist.

    Example:
        >>> val_set = ReferDataset(refcoco, tokenizer_of(model), image_size=model.config.image_size, sentences="all")
    """
    from fastkd.data.tokenizer import Tokenizer, has_tokenizer

    own = getattr(unwrap(model), "tokenizer", None)
    if isinstance(own, Tokenizer) and (folder is None or not has_tokenizer(Path(folder))):
        return own
    source = tokenizer_source(model, folder)
    if source is None:
        raise ValueError(
            "the model's configuration names no tokenizer, and word ids mean nothing without one: pass it "
            "(--tokenizer, or tokenizer=fastkd.data.load_tokenizer(...)), or put its vocab.txt into the model's folder"
        )
    return load_tokenizer_for(model, source)


def load_tokenizer_for(model: nn.Module, source: str) -> Tokenizer:
    """Load a tokenizer with the end token kept or dropped as the model's configuration requires."""
    from fastkd.data.tokenizer import load_tokenizer

    return load_tokenizer(source, keep_end=getattr(_config(model), "keep_end", False))


def tokenizer_source(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> str | None:
    """Return the source that `tokenizer_of` would load from, or None."""
    from fastkd.data.tokenizer import locate_tokenizer

    named = _config(model).tokenizer
    return named if folder is None else locate_tokenizer(named, Path(folder))


def _config(model: nn.Module) -> Any:
    """Return a model's configuration, also through wrappers."""
    config = getattr(unwrap(model), "config", None)
    if config is None:
        raise TypeError(
            f"model must have a config with image_size, max_words and tokenizer, as a RISModel has; "
            f"{type(unwrap(model)).__name__} has none: pass the model inside it, or set its config"
        )
    return config
