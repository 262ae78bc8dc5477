"""LAVT's pixel–word fusion, as it was trained: InstanceNorm over the pixels, and no sentence branch.

After Yang et al., "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation", CVPR 2022,
arXiv 2112.02244. (:mod:`fastkd.models.fusion` is the variant for networks trained from scratch.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.fusion import instance_norm


class Pointwise(nn.Conv1d):
    """A 1×1 convolution on (B, N, C_in) → (B, N, C_out); its weight is stored as Conv1d's, (C_out, C_in, 1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same linear map for every pixel or word."""
        return F.linear(x, self.weight[:, :, 0], self.bias)


class PixelNorm(nn.Module):
    """InstanceNorm without parameters: each channel of (B, N, C) over the N pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """(x − mean) / √(variance + 1e-5).

        The mean is taken off twice. With one word every pixel reads the same, and what rounding leaves of the first
        mean would be divided by √1e-5.
        """
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return instance_norm(wide - wide.mean(dim=1, keepdim=True)).to(x.dtype)


class ImageLanguageAttention(nn.Module):
    """Every pixel reads the words: lang = InstanceNorm(W(softmax(q·kᵀ/√C + 1e4·mask − 1e4) v)).

    q = InstanceNorm(f_query(x)), k = f_key(words)·mask, v = f_value(words)·mask. C counts the key channels of all
    heads; head h has the h-th block of C/heads channels.

    Args:
        width: C of the stage.
        word_width: D of the words.
        heads: Divides C.
    """

    def __init__(self, width: int, word_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.f_query = nn.Sequential(Pointwise(width, width), PixelNorm())
        self.f_key = nn.Sequential(Pointwise(word_width, width))
        self.f_value = nn.Sequential(Pointwise(word_width, width))
        self.W = nn.Sequential(Pointwise(width, width), PixelNorm())

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What each pixel read, (B, N, C), and the logits (B, heads, N, T) before 1e4·mask − 1e4 is added."""
        valid = word_mask.unsqueeze(-1).to(x.dtype)  # (B, T, 1)
        query = self._split(self.f_query(x))
        key, value = self._split(self.f_key(words) * valid), self._split(self.f_value(words) * valid)
        logits = (query * x.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        masked = logits + (1e4 * valid - 1e4).transpose(1, 2).unsqueeze(1)
        read = masked.softmax(dim=-1).to(value.dtype) @ value
        return self.W(read.transpose(1, 2).flatten(2)), logits

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PixelWordFusion(nn.Module):
    """fused = GELU(project_mm(GELU(vis_project(x)) ⊙ lang)), lang what :class:`ImageLanguageAttention` read."""

    def __init__(self, width: int, word_width: int, heads: int) -> None:
        super().__init__()
        self.vis_project = nn.Sequential(Pointwise(width, width), nn.GELU())
        self.image_lang_att = ImageLanguageAttention(width, word_width, heads)
        self.project_mm = nn.Sequential(Pointwise(width, width), nn.GELU())

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """From pixels (B, N, C) and words (B, T, D): the fused pixels (B, N, C) and logits (B, heads, N, T)."""
        lang, logits = self.image_lang_att(x, words, word_mask)
        return self.project_mm(self.vis_project(x) * lang), logits
