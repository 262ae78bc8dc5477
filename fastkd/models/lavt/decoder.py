"""LAVT's decoder: upsample the coarsest fused map and concatenate each finer one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, H, W) bilinearly with aligned corners."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class LAVTDecoder(nn.Module):
    """From y = stage 4, repeat y = ReLU(bn2(conv2(ReLU(bn1(conv1([resize(y), stage])))))), then classify with conv1_1.

    Each pair of convolutions is named after the coarser of its two stages: conv1_4, bn1_4, conv2_4, bn2_4, then _3
    and _2.

    Args:
        widths: Channels of the four stages, finest first.
        hidden: Channels of all intermediate maps.
    """

    def __init__(self, widths: Sequence[int], hidden: int) -> None:
        super().__init__()
        for level in (4, 3, 2):
            coarse = widths[3] if level == 4 else hidden
            for half, inputs in ((1, coarse + widths[level - 2]), (2, hidden)):
                self.add_module(f"conv{half}_{level}", nn.Conv2d(inputs, hidden, 3, padding=1, bias=False))
                self.add_module(f"bn{half}_{level}", nn.BatchNorm2d(hidden))
        self.conv1_1 = nn.Conv2d(hidden, 2, 1)

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last feature map (B, hidden, h, w) and the logits (B, 2, h, w), at the finest stage's size."""
        y = stages[3]
        for level in (4, 3, 2):
            finer = stages[level - 2]
            y = torch.cat([resize(y, finer.shape[-2:]), finer], dim=1)
            for half in (1, 2):
                conv, bn = self.get_submodule(f"conv{half}_{level}"), self.get_submodule(f"bn{half}_{level}")
                y = F.relu(bn(conv(y)))
        return y, self.conv1_1(y)
