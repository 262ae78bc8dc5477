"""What every model for referring segmentation is given, looked at before it runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd._wrappers import unwrap
from fastkd.distill.forward import normalisation, same_normalisation
from fastkd.errors import FastKDWarning


@dataclass(frozen=True)
class WordLimits:
    """What a model takes for words.

    Attributes:
        width: D, the width of a word's vector.
        vocab_size: Rows of the word table; None: there is no text encoder, so word vectors must be given.
        max_words: The longest sentence the text encoder's position table allows, or None.
        pad_id: The id that stands for no word.
        tokenizer: How errors call the tokenizer that belongs to the model.
    """

    width: int
    vocab_size: int | None
    max_words: int | None = None
    pad_id: int = 0
    tokenizer: str | None = None


def word_limit(model: torch.nn.Module) -> int:
    """How many word ids a model takes: what it was made for, and no more than its table of positions has."""
    model = unwrap(model)
    config: Any = model.config
    table = getattr(getattr(model, "text_encoder", None), "max_words", None)
    return min(config.max_words, table) if isinstance(table, int) else config.max_words


def check_normalisation(model: torch.nn.Module, dataset: Any, whose: str = "model") -> None:
    """Refuse a dataset whose images are normalised otherwise than the model wants them.

    Raises:
        ValueError: naming both. A model or dataset that does not tell passes.
    """
    wanted = normalisation(model)
    given = getattr(dataset, "image_mean", None), getattr(dataset, "image_std", None)
    if wanted is None or None in given or same_normalisation(wanted, given):
        return
    raise ValueError(
        f"the dataset normalises images by {_short(given)}, the {whose} wants {_short(wanted)}: pass "
        "image_mean=model.config.image_mean and image_std=model.config.image_std to the dataset"
    )


def _short(values: Any) -> str:
    mean, std = (", ".join(f"{one:g}" for one in part) for part in values)
    return f"mean ({mean}) and deviation ({std})"


def table_size(model: torch.nn.Module) -> int | None:
    """Return the number of rows of a model's word table, or None where it has none or does not tell.

    A model that does not tell may hold one that does, as a wrapper of somebody's own.
    """
    model = unwrap(model)
    for owner in (getattr(model, "text_encoder", None), *model.modules()):
        rows = getattr(owner, "vocab_size", None)
        if isinstance(rows, int):
            return rows
    return None


def names_tokenizer(model: torch.nn.Module) -> str | None:
    """Return the tokenizer that a model's configuration names, or None."""
    name = getattr(getattr(unwrap(model), "config", None), "tokenizer", None)
    return name if isinstance(name, str) else None


def check_vocabulary(model: torch.nn.Module, tokenizer: Any, whose: str = "model") -> None:
    """Refuse a tokenizer that has ids beyond the model's word table, or another padding id than its text encoder.

    A GPU would end the process at the first id beyond the table. The padding id's vector never trains, and some text
    encoders count positions from it.

    Raises:
        ValueError: naming both sides. A model or tokenizer that does not tell passes.
    """
    rows, entries = table_size(model), getattr(tokenizer, "vocab_size", None)
    if rows is not None and isinstance(entries, int) and entries > rows:
        own = names_tokenizer(model)
        raise ValueError(
            f"the tokenizer ({getattr(tokenizer, 'name', None)!r}) has {entries} entries, the {whose}'s word table "
            f"{rows} rows: it is not this model's own" + (f" ({own!r})" if own is not None else "")
        )

    ours, theirs = _padding_id(model), getattr(tokenizer, "pad_id", None)
    if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
        text = (
            f"the tokenizer ({getattr(tokenizer, 'name', None)!r}) pads with id {theirs}, the {whose}'s text encoder "
            f"takes id {ours} for padding: give its configuration text={{'pad_token_id': {theirs}}}"
        )
        if theirs:
            raise ValueError(text)
        warnings.warn(text, FastKDWarning, stacklevel=3)  # not an error: models were trained this way


def _padding_id(model: torch.nn.Module) -> Any:
    text = getattr(unwrap(model), "text_encoder", None)
    return getattr(getattr(getattr(text, "model", text), "config", None), "pad_token_id", None)


def check_host_ids(input_ids: Any, model: torch.nn.Module) -> None:
    """Refuse ids beyond the model's word table while they are still on the CPU, where looking costs nothing.

    Raises:
        ValueError: naming the range of the ids.
    """
    rows = table_size(model)
    if rows is None or not isinstance(input_ids, Tensor) or input_ids.device.type != "cpu" or input_ids.numel() == 0:
        return
    _check_range(input_ids, rows, names_tokenizer(model))


def check_inputs(
    image: Tensor,
    input_ids: Tensor | None,
    word_mask: Tensor | None,
    words: Tensor | None,
    limits: WordLimits,
    device: torch.device,
) -> Tensor:
    """Refuse what does not fit; returns the mask (B, T) bool.

    Raises:
        ValueError: Shapes that do not fit, both or neither of ``input_ids`` and ``words``, a sentence longer than the
            position table, another device; and, looked at on the CPU only, where looking costs nothing, and not while
            a graph is traced, which has no values: an id outside the vocabulary, or a sentence with no valid word.
        TypeError: A wrong dtype, or something that is no tensor.
    """
    _check_tensors(device, image=image, input_ids=input_ids, words=words, word_mask=word_mask)
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (B, 3, H, W), no dimension 0, got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point and normalised, got {image.dtype}")
    if (input_ids is None) == (words is None):
        raise ValueError(f"give either input_ids or words, got {'neither' if words is None else 'both'}")
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
        raise TypeError(f"word_mask must be bool (True where a word is), got {word_mask.dtype}: use mask.bool()")
    if word_mask.shape != source.shape[:2]:
        raise ValueError(f"word_mask must be {tuple(source.shape[:2])} like the words, got {tuple(word_mask.shape)}")
    if _can_look(word_mask) and not bool(word_mask.any(dim=1).all()):
        row = int((~word_mask.any(dim=1)).nonzero()[0, 0])
        raise ValueError(f"word_mask has no valid word in sample {row}: a sentence needs at least one word")
    return word_mask


def _can_look(values: Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_ids(input_ids: Tensor, batch: int, limits: WordLimits) -> None:
    if limits.vocab_size is None:
        raise ValueError(
            "this model has no text encoder, so it takes no input_ids: give words, the word vectors (B, T, "
            f"{limits.width}), or load it with its text encoder's weights"
        )
    if input_ids.dim() != 2 or input_ids.shape[0] != batch or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be (B, T) with B={batch}, got {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if limits.max_words is not None and input_ids.shape[1] > limits.max_words:
        raise ValueError(f"input_ids has {input_ids.shape[1]} words, the text encoder takes {limits.max_words}: cut it")
    if _can_look(input_ids):
        _check_range(input_ids, limits.vocab_size, limits.tokenizer)


def _check_range(input_ids: Tensor, rows: int, tokenizer: str | None) -> None:
    if not (0 <= int(input_ids.min()) <= int(input_ids.max()) < rows):
        raise ValueError(
            f"input_ids run from {int(input_ids.min())} to {int(input_ids.max())}, the vocabulary has "
            f"{rows} words: is the tokenizer this model's own ({tokenizer!r})?"
        )


def _check_words(words: Tensor, batch: int, limits: WordLimits) -> None:
    if words.dim() != 3 or words.shape[0] != batch or words.shape[1] == 0 or words.shape[2] != limits.width:
        raise ValueError(f"words must be (B, T, D) with B={batch}, D={limits.width}, got {tuple(words.shape)}")
    if not words.is_floating_point():
        raise TypeError(f"words must be floating point, got {words.dtype}: ids go into input_ids")


def _check_tensors(device: torch.device, **tensors: Tensor | None) -> None:
    """Refuse what is no tensor, and tensors that are not on the model's device."""
    for name, tensor in tensors.items():
        if tensor is None and name != "image":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {device}: move one with .to(device)")
