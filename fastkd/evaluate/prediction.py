"""Predict the mask of one sentence in one image."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

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
    image: str | os.PathLike[str] | Image.Image | np.ndarray,
    sentence: str,
    tokenizer: Tokenizer | None = None,
) -> Prediction:
    """Segment the object that a sentence refers to and return a `Prediction`.

    The image is resized to the model's square input and normalised as in training. The logits are resized back
    bilinearly before the decision, so the mask has the image's own size.

    Args:
        model: a `fastkd.models.RISModel`, or a model with the same call and a ``config``. Runs in eval mode on the
            device of its weights; its mode is restored.
        image: path of an image, a PIL image, or (H, W, 3) uint8 RGB; its EXIF orientation is applied, as in training.
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
    from fastkd.data.dataset import normalise
    from fastkd.distill.forward import normalisation, run_model
    from fastkd.evaluate._values import has_nan, nan_cause
    from fastkd.models.inputs import check_host_ids, check_vocabulary, word_limit

    if not isinstance(sentence, str):
        raise TypeError(f"sentence must be a string, got {type(sentence).__name__}")
    if not sentence.strip():
        raise ValueError("the sentence is empty: pass a referring expression such as 'the left red cup'")
    pixels = read_image(image)
    config: Any = _config(model)
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    check_vocabulary(model, tokenizer)
    input_ids, word_mask = tokenizer([sentence], word_limit(model))
    check_host_ids(input_ids, model)
    device = next(model.parameters()).device
    square = normalise(to_square(pixels, config.image_size), *(normalisation(model) or ()))
    batch = square[None].to(device)  # (1, 3, size, size)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = run_model(model, batch, input_ids.to(device), word_mask.to(device)).logits.float()
            if bool(has_nan(logits)[0]):
                raise FloatingPointError(f"the model's logits hold NaN, which gives no mask: {nan_cause(model)}")
            logits = F.interpolate(logits, size=pixels.shape[:2], mode="bilinear", align_corners=False)[0]  # (2, H, W)
            probability = logits.softmax(0)[1].cpu().numpy()  # (H, W)
            mask = logits.argmax(0).bool().cpu().numpy()
    finally:
        model.train(training)
    score = float(probability[mask].mean(dtype=np.float64)) if mask.any() else 0.0
    return Prediction(sentence, pixels, mask, probability, score)


def tokenizer_of(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Return a model's tokenizer: that of its folder, else the one it was trained with, else the one its config names.

    Args:
        model: a model with a ``config``.
        folder: folder that the model was read from.

    Raises:
        ValueError: the folder holds no tokenizer and the configuration names none.
        FileNotFoundError: the named tokenizer does not exist.
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
