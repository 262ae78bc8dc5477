"""LAVT's decoder: from the coarsest fused map up, each finer one concatenated on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners aligned with corners."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class LAVTDecoder(nn.Module):
    """y = stage 4; three times y = ReLU(bn2(conv2(ReLU(bn1(conv1([y resized, stage])))))); then two classes by conv1_1.

    The pairs are named after the coarser stage they start from: conv1_4, bn1_4, conv2_4, bn2_4, then _3 and _2.

    Args:
        widths: Channels of the four stages, finest first.
        hidden: Width of every map in between.
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
        """The last map (B, hidden, h, w) and the two-class map (B, 2, h, w), h and w being the finest stage's."""
        y = stages[3]
        for level in (4, 3, 2):
            finer = stages[level - 2]
            y = torch.cat([resize(y, finer.shape[-2:]), finer], dim=1)
            for half in (1, 2):
                conv, bn = self.get_submodule(f"conv{half}_{level}"), self.get_submodule(f"bn{half}_{level}")
                y = F.relu(bn(conv(y)))
        return y, self.conv1_1(y)
