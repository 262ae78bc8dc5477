"""LAVT's pixel–word fusion as published: InstanceNorm over the pixels, no sentence branch.

After Yang et al., "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation", CVPR 2022,
arXiv 2112.02244. `fastkd.models.fusion` is the variant for training from scratch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.fusion import instance_norm


class Pointwise(nn.Conv1d):
    """A linear layer (B, N, C_in) → (B, N, C_out) with the weight of a Conv1d, (C_out, C_in, 1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the same linear map to every pixel or word."""
        return F.linear(x, self.weight[:, :, 0], self.bias)


class PixelNorm(nn.Module):
    """InstanceNorm without parameters: normalise each channel of (B, N, C) over the N pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (x − mean) / √(variance + 1e-5).

        The mean is subtracted twice: with a single word all pixels are equal, and the rounding error of the first
        subtraction would be divided by √1e-5.
        """
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return instance_norm(wide - wide.mean(dim=1, keepdim=True)).to(x.dtype)


class ImageLanguageAttention(nn.Module):
    """Attention from pixels to words: lang = InstanceNorm(W(softmax(q·kᵀ/√C + 1e4·mask − 1e4) v)).

    q = InstanceNorm(f_query(x)), k = f_key(words)·mask, v = f_value(words)·mask. C is the key width of all heads
    together; head h uses the h-th block of C/heads channels.

    Args:
        width: C, the stage's channels.
        word_width: D, the width of a word vector.
        heads: Must divide C.
    """

    def __init__(self, width: int, word_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.f_query = nn.Sequential(Pointwise(width, width), PixelNorm())
        self.f_key = nn.Sequential(Pointwise(word_width, width))
        self.f_value = nn.Sequential(Pointwise(word_width, width))
        self.W = nn.Sequential(Pointwise(width, width), PixelNorm())

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention output (B, N, C) and the logits (B, heads, N, T) before the mask is added.

        Args:
            x: (B, N, C).
            words: (B, T, D).
            word_mask: (B, T) bool.
        """
        valid = word_mask.unsqueeze(-1).to(x.dtype)  # (B, T, 1)
        query = self._split_heads(self.f_query(x))  # (B, heads, N, C/heads)
        key = self._split_heads(self.f_key(words) * valid)  # (B, heads, T, C/heads)
        value = self._split_heads(self.f_value(words) * valid)  # (B, heads, T, C/heads)
        logits = (query * x.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, heads, N, T)
        masked = logits + (1e4 * valid - 1e4).transpose(1, 2).unsqueeze(1)
        out = masked.softmax(dim=-1).to(value.dtype) @ value  # (B, heads, N, C/heads)
        return self.W(out.transpose(1, 2).flatten(2)), logits

    def _split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, N, C) to (B, heads, N, C/heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PixelWordFusion(nn.Module):
    """Fuse words into pixels: GELU(project_mm(GELU(vis_project(x)) ⊙ lang)), lang from `ImageLanguageAttention`."""

    def __init__(self, width: int, word_width: int, heads: int) -> None:
        super().__init__()
        self.vis_project = nn.Sequential(Pointwise(width, width), nn.GELU())
        self.image_lang_att = ImageLanguageAttention(width, word_width, heads)
        self.project_mm = nn.Sequential(Pointwise(width, width), nn.GELU())

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fused pixels (B, N, C) and the logits (B, heads, N, T).

        Args:
            x: (B, N, C).
            words: (B, T, D).
            word_mask: (B, T) bool.
        """
        lang, logits = self.image_lang_att(x, words, word_mask)
        return self.project_mm(self.vis_project(x) * lang), logits
