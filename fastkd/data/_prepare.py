"""From pixels, mask and text to the tensors of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.data.tokenizer import Tokenizer

STATISTICS = "image_statistics"  # key of mean and deviation in samples and batches whose images are still uint8


class Prepared:
    """Image size, normalisation and tokenizers of a dataset."""

    normalised = True  # False in the copies that `fastkd.data._pixels` makes

    def _set_transform(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        max_words: int,
        teacher_tokenizer: Tokenizer | None,
        teacher_max_words: int | None,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        """Check and set the attributes."""
        teacher_max_words = max_words if teacher_max_words is None else teacher_max_words
        tokenizers = [("tokenizer", "max_words", tokenizer, max_words)]
        if teacher_tokenizer is not None:
            tokenizers.append(("teacher_tokenizer", "teacher_max_words", teacher_tokenizer, teacher_max_words))
        for name, length_name, loaded, length in tokenizers:
            if not callable(loaded):
                raise TypeError(f"{name} must come from load_tokenizer, got {type(loaded).__name__}")
            if not isinstance(length, int) or length < 3:
                raise ValueError(
                    f"{length_name} must be an integer of at least 3 ([CLS], a word, [SEP]), got {length!r}"
                )
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size must be a positive integer, got {image_size!r}")
        if len(image_mean) != 3 or len(image_std) != 3 or not min(image_std) > 0:
            raise ValueError(
                "image_mean and image_std must be three numbers each, image_std above 0, got "
                f"{image_mean!r} and {image_std!r}"
            )
        self.tokenizer, self.image_size, self.max_words = tokenizer, image_size, max_words
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.teacher_tokenizer, self.teacher_max_words = teacher_tokenizer, teacher_max_words

    def _tokenise(self, text: str) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``word_mask``, both (T,), and those of the teacher's tokenizer if there is one."""
        input_ids, word_mask = self.tokenizer([text], self.max_words)
        tokens = {"input_ids": input_ids[0], "word_mask": word_mask[0]}
        if self.teacher_tokenizer is not None:
            input_ids, word_mask = self.teacher_tokenizer([text], self.teacher_max_words)
            tokens |= {"teacher_input_ids": input_ids[0], "teacher_word_mask": word_mask[0]}
        return tokens

    def _image_entries(self, pixels: np.ndarray) -> dict[str, Any]:
        """Return what a sample holds of its image (S, S, 3) uint8."""
        if self.normalised:
            return {"image": normalise(pixels, self.image_mean, self.image_std)}
        return {"image": torch.from_numpy(pixels), STATISTICS: (self.image_mean, self.image_std)}

    def _square_mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize a mask (H, W) bool by nearest neighbour to (S, S)."""
        if mask.shape == (self.image_size, self.image_size):
            return mask
        picture = Image.fromarray(mask.astype(np.uint8))
        return np.array(picture.resize((self.image_size,) * 2, Image.Resampling.NEAREST)).astype(bool)


def normalise(
    pixels: np.ndarray, image_mean: Sequence[float] = IMAGENET_MEAN, image_std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """Convert an RGB image (H, W, 3) uint8 to float32 (3, H, W) and normalise it; mean and std are in [0, 1]."""
    return _normalise(torch.from_numpy(pixels)[None], image_mean, image_std)[0]


def with_images(batch: Mapping[str, Any], channels_last: bool = False) -> dict[str, Any]:
    """Return a batch with its images as float32 (B, 3, S, S), normalised on their device if they are still uint8."""
    found = dict(batch)
    if STATISTICS in found:
        image_mean, image_std = found.pop(STATISTICS)[0]
        found["image"] = _normalise(found["image"], image_mean, image_std, channels_last)
    return found


def _normalise(
    pixels: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float], channels_last: bool = False
) -> torch.Tensor:
    """Return (B, H, W, 3) uint8 as float32 (B, 3, H, W); bits are the same for one image and many."""
    batch, height, width, _ = pixels.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = torch.empty(batch, 3, height, width, dtype=torch.float32, device=pixels.device, memory_format=layout)
    image.copy_(pixels.permute(0, 3, 1, 2))  # first, so that the rest runs over contiguous memory
    return image.sub_(_scaled(image_mean, image)).div_(_scaled(image_std, image))


def _scaled(values: Sequence[float], image: torch.Tensor) -> torch.Tensor:
    """Return values in [0, 1] of each channel for images in [0, 255], (3, 1, 1) on the device of the image."""
    column = torch.empty(3, 1, 1, dtype=torch.float32, device=image.device)
    for channel, value in enumerate(torch.tensor(values, dtype=torch.float32, device="cpu").mul_(255.0).tolist()):
        column[channel].fill_(value)  # a copy from the host would wait for a GPU
    return column
