"""From pixels, mask and text to the tensors of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.data.tokenizer import Tokenizer


class Prepared:
    """Image size, normalisation and tokenizers of a dataset."""

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
    image = torch.empty(3, *pixels.shape[:2])
    image.copy_(torch.from_numpy(pixels).permute(2, 0, 1))  # first, so that the rest runs over contiguous memory
    mean = torch.tensor(image_mean, dtype=torch.float32).mul_(255.0)[:, None, None]
    std = torch.tensor(image_std, dtype=torch.float32).mul_(255.0)[:, None, None]
    return image.sub_(mean).div_(std)
