"""Pixel–word fusion: each pixel reads the words it needs, and the result goes on into the vision encoder.

After Yang et al., "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation", CVPR 2022,
arXiv 2112.02244.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Each channel of (B, N, C) normalised over the N pixels, without parameters; one pixel alone is left as it is.

    A single pixel has no spread to divide by: normalising it would erase it, so it passes unchanged.
    """
    if x.shape[1] == 1:
        return x
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = wide - wide.mean(dim=1, keepdim=True)
    return (centred * (centred.square().mean(dim=1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def pixel_coordinates(height: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H·W, 8): left, top, centre x, centre y, right, bottom of each cell in [-1, 1], then 1/W and 1/H."""
    left = torch.arange(width, device=device, dtype=dtype) * (2 / width) - 1
    top = torch.arange(height, device=device, dtype=dtype) * (2 / height) - 1
    y, x = torch.meshgrid(top, left, indexing="ij")
    dx, dy = 1 / width, 1 / height
    one = torch.ones_like(x)
    return torch.stack([x, y, x + dx, y + dy, x + 2 * dx, y + 2 * dy, one * dx, one * dy], dim=-1).flatten(0, 1)


class PixelWordAttention(nn.Module):
    """Every pixel attends to the valid words: logits = q·k / √C per head, softmax over words.

    q = InstanceNorm(f_query(x)), k = f_key(words), v = f_value(words), out = LayerNorm(W(softmax(q·kᵀ/√C) v)).
    C counts the key channels of all heads, as LAVT does. LAVT ends in an InstanceNorm over the pixels instead: where
    all pixels read nearly the same, that takes away what they share (the sentence) and magnifies rounding, up to 1/√eps
    a stage, which made training from scratch diverge.

    Args:
        channels: C, the width of the pixels.
        word_channels: D, the width of the words.
        heads: Divides C.
    """

    def __init__(self, channels: int, word_channels: int, heads: int = 1) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"fusion_heads={heads} does not divide the stage's {channels} channels")
        self.heads = heads
        self.f_query = nn.Linear(channels, channels)
        # No bias: it would add the same number to a pixel's logits of all words, which the softmax cancels.
        self.f_key = nn.Linear(word_channels, channels, bias=False)
        self.f_value = nn.Linear(word_channels, channels)
        self.W = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What each pixel read, (B, N, C), and the logits (B, heads, N, T) before masking."""
        query = self._split(instance_norm(self.f_query(pixels)))
        key, value = self._split(self.f_key(words)), self._split(self.f_value(words))
        logits = (query * pixels.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        # The least finite number, not -inf: on a GPU a sentence without a valid word isn't refused, but gives no NaN.
        masked = logits.masked_fill(~word_mask[:, None, None], torch.finfo(logits.dtype).min)
        read = masked.softmax(dim=-1).to(value.dtype) @ value
        read = read.transpose(1, 2).flatten(2)
        return self.norm(self.W(read)), logits

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Fusion(nn.Module):
    """Fuses the words into one stage: a map for the decoder, one for the next stage, and the attention's logits.

    read = attention(x, words) + sentence(mean of the valid words);
    out = LayerNorm(GELU(project_mm(GELU(vis_project(x)) ⊙ read)));
    next = x + tanh(gate(out)) ⊙ out, with gate = Linear, ReLU, Linear.

    Two things differ from LAVT, whose encoders come pretrained; both are for training from scratch. LAVT gates the map
    before its LayerNorm, which keeps the words' part small at first. And it has no sentence branch: without it, words
    of place were not grounded after 4500 steps.

    Args:
        channels: C of the stage.
        word_channels: D of the words.
        heads: Heads of the attention.
        coordinates: Adds a linear map of eight pixel coordinates to x before the attention and the visual branch.
        feed_next: Whether there is a next stage; without one there is no gate.
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
        """From a map (B, C, H, W) and words (B, T, D): (out, next) of the map's shape and logits (B, heads, H·W, T)."""
        height, width = x.shape[-2:]
        pixels = x.flatten(2).transpose(1, 2)
        placed = pixels
        if self.coordinates is not None:
            placed = pixels + self.coordinates(pixel_coordinates(height, width, device=x.device, dtype=x.dtype))
        read, logits = self.attention(placed, words, word_mask)
        valid = word_mask.unsqueeze(-1).to(words.dtype)
        read = read + self.sentence((words * valid).sum(1) / valid.sum(1).clamp(min=1)).unsqueeze(1)
        fused = self.norm(F.gelu(self.project_mm(F.gelu(self.vis_project(placed)) * read)))
        onward = pixels if self.gate is None else pixels + self.gate(fused).tanh() * fused
        return _to_map(fused, height, width), _to_map(onward, height, width), logits


def _to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))
