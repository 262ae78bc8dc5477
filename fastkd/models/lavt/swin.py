"""LAVT's Swin blocks: pad to whole windows, then shift; windows are never shrunk.

After Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021, arXiv
2103.14030, in the order used for dense prediction. timm shifts first and shrinks windows on small maps, which gives
different results. Maps are (B, H, W, C) throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4
"""Patch size, the stride of the first stage."""


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad (B, H, W, C) at the bottom and right to multiples of ``multiple``."""
    below, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def split_windows(x: Tensor, window: int) -> Tensor:
    """Split (B, H, W, C) into (B, windows, window², C), row by row; H and W must be multiples of the window."""
    b, h, w, c = x.shape
    tiles = x.view(b, h // window, window, w // window, window, c)  # (B, rows, window, columns, window, C)
    return tiles.transpose(2, 3).reshape(b, -1, window * window, c)


def join_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Invert `split_windows`: (B, windows, window², C) to (B, height, width, C)."""
    b, c = x.shape[0], x.shape[-1]
    tiles = x.view(b, height // window, width // window, window, window, c)  # (B, rows, columns, window, window, C)
    return tiles.transpose(2, 3).reshape(b, height, width, c)


def shift_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Return the attention mask after the cyclic shift, (windows, window², window²) bool, True where allowed.

    The shift wraps the first window//2 rows (columns) around to the end, next to rows that are far away in the
    image. Two tokens may attend to each other if both or neither were wrapped, in each direction. Height and width must
    be multiples of the window.
    """
    shift = window // 2
    wrapped_y = torch.arange(height, device=device) >= height - shift
    wrapped_x = torch.arange(width, device=device) >= width - shift
    region = 2 * wrapped_y[:, None].long() + wrapped_x  # (H, W)
    inside = split_windows(region[None, :, :, None], window)[0, :, :, 0]  # (windows, window²)
    return inside[:, :, None] == inside[:, None, :]


def relative_position_index(window: int) -> Tensor:
    """Return the bias-table row of each pair of tokens in a window, (window², window²) int64.

    For tokens i at (y_i, x_i) and j: (y_i − y_j + window − 1)·(2·window − 1) + (x_i − x_j + window − 1).
    """
    y, x = (g.flatten() for g in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


class PatchEmbed(nn.Module):
    """(B, 3, H, W) → (B, ⌈H/4⌉, ⌈W/4⌉, C): pad to multiples of 4, 4×4 convolution of stride 4, LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """Return the patch embeddings of an image."""
        below, right = -image.shape[2] % PATCH, -image.shape[3] % PATCH
        if below or right:
            image = F.pad(image, (0, right, 0, below))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Window attention softmax(q·kᵀ / √(C/heads) + bias) v, with a bias by relative position.

    Args:
        width: C, the channels.
        heads: Must divide C.
        window: Side of a window; the bias table has (2·window − 1)² rows.
    """

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """Attend within windows of (B, windows, N, C); ``allowed`` is (windows, N, N) bool, None for no mask."""
        b, windows, n, c = x.shape
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)
        qkv = self.qkv(x).view(b, windows, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, N, C/heads)
        if allowed is None:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B·windows, heads, N, C/heads)
        else:  # each window has its own mask: merge windows into the heads dimension, broadcast over the batch
            bias = bias.masked_fill(~allowed[:, None], -torch.inf).flatten(0, 1)
            q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)  # (B, windows·heads, N, C/heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))
        out = out.reshape(b, windows, self.heads, n, c // self.heads).transpose(2, 3)  # (B, windows, N, heads, C/heads)
        return self.proj(out.reshape(b, windows, n, c))


class Mlp(nn.Module):
    """MLP: Linear(C, 4C), GELU, Linear(4C, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """y = x + attention(norm1(x)), then y + mlp(norm2(y)); odd blocks of a stage shift their windows by window//2.

    norm1(x) is zero-padded to whole windows and then shifted. Padding tokens are attended to, as in the published
    model.
    """

    def __init__(self, width: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Apply to (B, H, W, C); ``allowed`` is `shift_mask` of the padded map, used by shifted blocks."""
        height, width = x.shape[1:3]
        y = pad_to_multiple(self.norm1(x), self.window)
        padded = y.shape[1:3]
        if self.shift:
            y = y.roll((-self.shift, -self.shift), dims=(1, 2))
        y = self.attn(split_windows(y, self.window), allowed if self.shift else None)
        y = join_windows(y, self.window, *padded)
        if self.shift:
            y = y.roll((self.shift, self.shift), dims=(1, 2))
        x = x + y[:, :height, :width]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): concatenate the pixels of each 2×2 square, LayerNorm, Linear.

    The order is (even row, even column), (odd, even), (even, odd), (odd, odd); odd sides are zero-padded.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map at half the size."""
        x = pad_to_multiple(x, 2)
        square = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(square, dim=-1)))
