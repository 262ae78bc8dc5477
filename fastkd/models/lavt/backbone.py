"""LAVT's encoder: four Swin stages, each followed by pixel–word fusion and a gate into the next stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.models.lavt.config import LAVTConfig
from fastkd.models.lavt.fusion import PixelWordFusion
from fastkd.models.lavt.swin import PatchEmbed, PatchMerging, SwinBlock, shift_mask


class Stage(nn.Module):
    """Swin blocks, fusion with the words, and the next stage's input: x + res_gate(fused) ⊙ fused, downsampled.

    res_gate = tanh(Linear(ReLU(Linear(·)))), without biases. The last stage is not downsampled.
    """

    def __init__(self, config: LAVTConfig, index: int) -> None:
        super().__init__()
        width, heads = config.widths[index], config.heads[index]
        self.window = config.window
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, config.window, shifted=j % 2 == 1) for j in range(config.depths[index])
        )
        self.fusion = PixelWordFusion(width, config.word_width, config.fusion_heads[index])
        self.res_gate = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Tanh()
        )  # published checkpoints have it in the last stage too, where it is unused
        self.downsample = PatchMerging(width) if index < 3 else None

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the blocks, the fusion and the downsampling.

        Args:
            x: (B, H, W, C).
            words: (B, T, D).
            word_mask: (B, T) bool.

        Returns:
            The fused map (B, H, W, C); the next stage's input (B, ⌈H/2⌉, ⌈W/2⌉, 2C), in the last stage the blocks'
            output (B, H, W, C); the attention logits (B, heads, H·W, T).
        """
        height, width = x.shape[1:3]
        allowed = self._shift_mask(height, width, x.device)
        for block in self.blocks:
            x = block(x, allowed)
        fused, logits = self.fusion(x.flatten(1, 2), words, word_mask)
        fused = fused.unflatten(1, (height, width))  # (B, H, W, C)
        if self.downsample is None:
            return fused, x, logits
        return fused, self.downsample(x + self.res_gate(fused) * fused), logits

    def _shift_mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return `shift_mask` of the map padded to whole windows."""
        padded_height, padded_width = (side + -side % self.window for side in (height, width))
        return shift_mask(padded_height, padded_width, self.window, device)


class LAVTBackbone(nn.Module):
    """Swin encoder fused with the words; returns each stage's fused map after a LayerNorm, at strides 4, 8, 16 and 32.

    After Yang et al., CVPR 2022, and Liu et al., ICCV 2021.
    """

    def __init__(self, config: LAVTConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.embed)
        self.layers = nn.ModuleList(Stage(config, i) for i in range(4))
        self.norm0, self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for width in config.widths)

    def forward(self, image: Tensor, words: Tensor, word_mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return four maps (B, C_i, H_i, W_i) and their attention logits (B, heads_i, H_i·W_i, T).

        Args:
            image: (B, 3, H, W).
            words: (B, T, D).
            word_mask: (B, T) bool.
        """
        x = self.patch_embed(image)  # (B, H_0, W_0, C_0)
        maps, all_logits = [], []
        for stage, norm in zip(self.layers, (self.norm0, self.norm1, self.norm2, self.norm3), strict=True):
            fused, x, logits = stage(x, words, word_mask)
            maps.append(norm(fused).permute(0, 3, 1, 2))  # (B, C_i, H_i, W_i)
            all_logits.append(logits)
        return maps, all_logits
