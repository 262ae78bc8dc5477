"""Pixel–word fusion: pixels attend to words, and the result is fed back into the vision encoder.

After Yang et al., "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation", CVPR 2022,
arXiv 2112.02244.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise each channel of (B, N, C) over the N pixels, without parameters.

    A single pixel (N = 1) has zero variance and would become 0, so it is returned unchanged.
    """
    if x.shape[1] == 1:
        return x
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = wide - wide.mean(dim=1, keepdim=True)
    return (centred * (centred.square().mean(dim=1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def pixel_coordinates(height: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (H·W, 8): left, top, centre x, centre y, right, bottom of each cell in [-1, 1], then 1/W and 1/H."""
    left = torch.arange(width, device=device, dtype=dtype) * (2 / width) - 1
    top = torch.arange(height, device=device, dtype=dtype) * (2 / height) - 1
    y, x = torch.meshgrid(top, left, indexing="ij")
    dx, dy = 1 / width, 1 / height
    one = torch.ones_like(x)
    return torch.stack([x, y, x + dx, y + dy, x + 2 * dx, y + 2 * dy, one * dx, one * dy], dim=-1).flatten(0, 1)


class PixelWordAttention(nn.Module):
    """Attention from pixels to valid words: logits = q·k / √C per head, softmax over words.

    q = InstanceNorm(f_query(x)), k = f_key(words), v = f_value(words), out = LayerNorm(W(softmax(q·kᵀ/√C) v)).
    C is the key width of all heads together, as in LAVT. LAVT ends in an InstanceNorm over the pixels instead. When all
    pixels attend alike, that removes their common value (the sentence) and amplifies rounding errors by up to 1/√eps
    per stage, which made training from scratch diverge.

    Args:
        channels: C, the pixels' channels.
        word_channels: D, the width of a word vector.
        heads: Must divide C.
    """

    def __init__(self, channels: int, word_channels: int, heads: int = 1) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"fusion_heads={heads} does not divide the stage's {channels} channels")
        self.heads = heads
        self.f_query = nn.Linear(channels, channels)
        # No bias: it would shift all of a pixel's logits equally, which softmax cancels.
        self.f_key = nn.Linear(word_channels, channels, bias=False)
        self.f_value = nn.Linear(word_channels, channels)
        self.W = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention output (B, N, C) and the logits (B, heads, N, T) before masking.

        Args:
            pixels: (B, N, C).
            words: (B, T, D).
            word_mask: (B, T) bool.
        """
        query = self._split_heads(instance_norm(self.f_query(pixels)))  # (B, heads, N, C/heads)
        key, value = self._split_heads(self.f_key(words)), self._split_heads(self.f_value(words))
        logits = (query * pixels.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, heads, N, T)
        # The most negative finite number, not -inf: GPU inputs are not checked, and a sentence without a valid word
        # must not produce NaN.
        masked = logits.masked_fill(~word_mask[:, None, None], torch.finfo(logits.dtype).min)
        out = masked.softmax(dim=-1).to(value.dtype) @ value  # (B, heads, N, C/heads)
        return self.norm(self.W(out.transpose(1, 2).flatten(2))), logits

    def _split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, N, C) to (B, heads, N, C/heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Fusion(nn.Module):
    """Fuse the words into the map of one stage.

    lang = attention(x, words) + sentence(mean of the valid words);
    out = LayerNorm(GELU(project_mm(GELU(vis_project(x)) ⊙ lang)));
    next = x + tanh(gate(out)) ⊙ out, with gate = Linear, ReLU, Linear.

    Two changes from LAVT, whose encoders are pretrained, allow training from scratch. LAVT gates the map before its
    LayerNorm, which keeps the words' contribution small at first; here the gate follows the LayerNorm. LAVT also has no
    sentence branch; without one, spatial words were not grounded after 4500 steps.

    Args:
        channels: C, the stage's channels.
        word_channels: D, the width of a word vector.
        heads: Heads of the attention.
        coordinates: Add a linear map of eight pixel coordinates to x before the attention and the visual branch.
        feed_next: False for the last stage, which has no gate.
    """

    def __init__(
        self, channels: int, word_channels: int, heads: int = 1, coordinates: bool = True, feed_next: bool = True
    ) -> None:
        super().__init__()
        self.coordinates = nn.Linear(8, channels, bias=False) if coordinates else None
        self.attention = PixelWordAttention(channels, word_channels, heads)
        self.sentence = nn.Linear(word_channels, channels)
        self.vis_project = nn.Linear(channels, channels)
        self.project_mm = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.gate = (
            nn.Sequential(
                nn.Linear(channels, channels, bias=False), nn.ReLU(), nn.Linear(channels, channels, bias=False)
            )
            if feed_next
            else None
        )

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (out, next), both (B, C, H, W), and the attention logits (B, heads, H·W, T).

        Args:
            x: (B, C, H, W).
            words: (B, T, D).
            word_mask: (B, T) bool.
        """
        height, width = x.shape[-2:]
        pixels = x.flatten(2).transpose(1, 2)  # (B, H·W, C)
        located = pixels
        if self.coordinates is not None:
            located = pixels + self.coordinates(pixel_coordinates(height, width, device=x.device, dtype=x.dtype))
        lang, logits = self.attention(located, words, word_mask)
        valid = word_mask.unsqueeze(-1).to(words.dtype)  # (B, T, 1)
        lang = lang + self.sentence((words * valid).sum(1) / valid.sum(1).clamp(min=1)).unsqueeze(1)
        fused = self.norm(F.gelu(self.project_mm(F.gelu(self.vis_project(located)) * lang)))
        following = pixels if self.gate is None else pixels + self.gate(fused).tanh() * fused
        return _to_map(fused, height, width), _to_map(following, height, width), logits


def _to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Reshape (B, H·W, C) to (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))
