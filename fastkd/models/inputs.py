"""Check the inputs of referring segmentation models before they run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastkd._wrappers import unwrap
from fastkd.distill.forward import normalisation, same_normalisation
from fastkd.errors import FastKDWarning


@dataclass(frozen=True)
class WordLimits:
    """Word inputs that a model accepts.

    Attributes:
        width: D, the width of a word vector.
        vocab_size: Number of word embeddings; None for a model without text encoder, which needs word vectors.
        max_words: The longest sentence that the position embeddings allow, or None.
        pad_id: The padding id.
        tokenizer: Name of the model's tokenizer, for error messages.
    """

    width: int
    vocab_size: int | None
    max_words: int | None = None
    pad_id: int = 0
    tokenizer: str | None = None


def word_limit(model: torch.nn.Module) -> int:
    """Return the configured number of word ids per sentence, capped at the number of position embeddings."""
    model = unwrap(model)
    config: Any = model.config
    positions = getattr(getattr(model, "text_encoder", None), "max_words", None)
    return min(config.max_words, positions) if isinstance(positions, int) else config.max_words


def placement(module: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of a module's first floating-point parameter or buffer.

    Raises:
        ValueError: There is none.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    raise ValueError(f"{type(module).__name__} has neither floating-point parameters nor buffers")


def check_normalisation(model: torch.nn.Module, dataset: Any, whose: str = "model") -> None:
    """Reject a dataset whose images are not normalised as the model expects.

    Raises:
        ValueError: Both declare a normalisation and they differ.
    """
    expected = normalisation(model)
    given = getattr(dataset, "image_mean", None), getattr(dataset, "image_std", None)
    if expected is None or None in given or same_normalisation(expected, given):
        return
    raise ValueError(
        f"the dataset normalises images by {_format(given)}, the {whose} expects {_format(expected)}: pass "
        "image_mean=model.config.image_mean and image_std=model.config.image_std to the dataset"
    )


def _format(values: Any) -> str:
    mean, std = (", ".join(f"{each:g}" for each in part) for part in values)
    return f"mean ({mean}) and std ({std})"


def table_size(model: torch.nn.Module) -> int | None:
    """Return the number of word embeddings of a model or of a module inside it; None if none declares it."""
    model = unwrap(model)
    for owner in (getattr(model, "text_encoder", None), *model.modules()):
        rows = getattr(owner, "vocab_size", None)
        if isinstance(rows, int):
            return rows
    return None


def tokenizer_name(model: torch.nn.Module) -> str | None:
    """Return the tokenizer that a model's configuration names, or None."""
    name = getattr(getattr(unwrap(model), "config", None), "tokenizer", None)
    return name if isinstance(name, str) else None


def check_vocabulary(model: torch.nn.Module, tokenizer: Any, whose: str = "model") -> None:
    """Reject a tokenizer with more entries than the model's word embeddings, or with another padding id.

    On a GPU, an id out of range would abort the process. The padding embedding is never trained, and some text encoders
    count positions from the padding id.

    Raises:
        ValueError: Model and tokenizer declare values that do not match.
    """
    rows, entries = table_size(model), getattr(tokenizer, "vocab_size", None)
    if rows is not None and isinstance(entries, int) and entries > rows:
        own = tokenizer_name(model)
        raise ValueError(
            f"the tokenizer ({getattr(tokenizer, 'name', None)!r}) has {entries} entries, the {whose} has {rows} word "
            "embeddings: use the model's own tokenizer" + (f" ({own!r})" if own is not None else "")
        )

    model_pad, tokenizer_pad = _padding_id(model), getattr(tokenizer, "pad_id", None)
    if isinstance(model_pad, int) and isinstance(tokenizer_pad, int) and model_pad != tokenizer_pad:
        text = (
            f"the tokenizer ({getattr(tokenizer, 'name', None)!r}) pads with id {tokenizer_pad}, the {whose}'s text "
            f"encoder expects padding id {model_pad}: set text={{'pad_token_id': {tokenizer_pad}}} in its configuration"
        )
        if tokenizer_pad:
            raise ValueError(text)
        warnings.warn(text, FastKDWarning, stacklevel=3)  # not an error: existing models were trained this way


def _padding_id(model: torch.nn.Module) -> Any:
    text = getattr(unwrap(model), "text_encoder", None)
    return getattr(getattr(getattr(text, "model", text), "config", None), "pad_token_id", None)


def check_host_ids(input_ids: Any, model: torch.nn.Module) -> None:
    """Reject ids outside the model's word embeddings while they are on the CPU, where no synchronisation is needed.

    Raises:
        ValueError: An id is out of range.
    """
    rows = table_size(model)
    if rows is None or not isinstance(input_ids, Tensor) or input_ids.device.type != "cpu" or input_ids.numel() == 0:
        return
    _check_range(input_ids, rows, tokenizer_name(model))


def check_inputs(
    image: Tensor,
    input_ids: Tensor | None,
    word_mask: Tensor | None,
    words: Tensor | None,
    limits: WordLimits,
    device: torch.device,
) -> Tensor:
    """Check a model's inputs and return the word mask, (B, T) bool.

    Values are checked on the CPU only, where no synchronisation is needed, and not while tracing a graph.

    Raises:
        ValueError: Shapes do not match, both or neither of ``input_ids`` and ``words`` are given, a sentence exceeds
            the position embeddings, a tensor is on another device, an id is outside the vocabulary, or a sentence has
            no valid word.
        TypeError: An argument is not a tensor or has the wrong dtype.
    """
    _check_tensors(device, image=image, input_ids=input_ids, words=words, word_mask=word_mask)
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (B, 3, H, W) without empty dimensions, got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point and normalised, got {image.dtype}")
    if (input_ids is None) == (words is None):
        raise ValueError(f"pass either input_ids or words, got {'neither' if words is None else 'both'}")
    if input_ids is not None:
        _check_ids(input_ids, image.shape[0], limits)
    elif words is not None:
        _check_words(words, image.shape[0], limits)
    source = input_ids if input_ids is not None else words
    assert source is not None
    if word_mask is None:
        word_mask = (
            input_ids.ne(limits.pad_id)
            if input_ids is not None
            else torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
        )
    if word_mask.dtype != torch.bool:
        raise TypeError(f"word_mask must be bool (True at words), got {word_mask.dtype}: use mask.bool()")
    if word_mask.shape != source.shape[:2]:
        raise ValueError(f"word_mask must be {tuple(source.shape[:2])} like the words, got {tuple(word_mask.shape)}")
    if _is_readable(word_mask) and not bool(word_mask.any(dim=1).all()):
        row = int((~word_mask.any(dim=1)).nonzero()[0, 0])
        raise ValueError(f"word_mask has no valid word in sample {row}: a sentence needs at least one word")
    return word_mask


def _is_readable(values: Tensor) -> bool:
    """Return whether values can be read without a synchronisation or graph break."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_ids(input_ids: Tensor, batch: int, limits: WordLimits) -> None:
    if limits.vocab_size is None:
        raise ValueError(
            "this model has no text encoder, so it cannot use input_ids: pass words, the word vectors (B, T, "
            f"{limits.width}), or load it with its text encoder's weights"
        )
    if input_ids.dim() != 2 or input_ids.shape[0] != batch or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be (B, T) with B={batch}, got {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if limits.max_words is not None and input_ids.shape[1] > limits.max_words:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} words, the text encoder takes at most {limits.max_words}: truncate it"
        )
    if _is_readable(input_ids):
        _check_range(input_ids, limits.vocab_size, limits.tokenizer)


def _check_range(input_ids: Tensor, rows: int, tokenizer: str | None) -> None:
    if not (0 <= int(input_ids.min()) <= int(input_ids.max()) < rows):
        raise ValueError(
            f"input_ids range from {int(input_ids.min())} to {int(input_ids.max())}, but the vocabulary has "
            f"{rows} words: check that the tokenizer is this model's own ({tokenizer!r})"
        )


def _check_words(words: Tensor, batch: int, limits: WordLimits) -> None:
    if words.dim() != 3 or words.shape[0] != batch or words.shape[1] == 0 or words.shape[2] != limits.width:
        raise ValueError(f"words must be (B, T, D) with B={batch}, D={limits.width}, got {tuple(words.shape)}")
    if not words.is_floating_point():
        raise TypeError(f"words must be floating point, got {words.dtype}: pass ids as input_ids")


def _check_tensors(device: torch.device, **tensors: Tensor | None) -> None:
    """Reject arguments that are not tensors or not on the model's device."""
    for name, tensor in tensors.items():
        if tensor is None and name != "image":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {device}: move one with .to(device)")
