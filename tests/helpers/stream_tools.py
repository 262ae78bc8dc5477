"""Pictures to write to shards, and a tokenizer that needs no vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Words:
    """Number words by their length, up to 7."""

    name, vocab_size = "lengths", 8

    def __call__(self, sentences: list[str], max_words: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(sentences), max_words, dtype=torch.int64)
        for row, sentence in zip(ids, sentences, strict=True):
            numbers = [min(7, len(word)) for word in sentence.split()][:max_words]
            row[: len(numbers)] = torch.tensor(numbers)
        return ids, ids > 0


def pictures(count: int, size: int = 8) -> list[dict[str, Any]]:
    """Return random images with a mask of their bright red pixels and two sentences each, named s0, s1, ..."""
    generator = np.random.default_rng(0)
    samples = []
    for number in range(count):
        image = generator.integers(0, 256, (size, size, 3), np.uint8)
        sentences = [f"number {number}", f"the picture {'x' * (number % 5 + 1)}"]
        samples.append({"id": f"s{number}", "image": image, "mask": image[..., 0] > 127, "sentence": sentences})
    return samples
