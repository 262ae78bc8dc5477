"""Decode the fused stage maps into mask logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class TopDownDecoder(nn.Module):
    """Light top-down decoder; at every stage: 1×1 lateral, upsample and add, 3×3 convolution, batch norm, ReLU.

    Args:
        channels: Channels of the stage maps, finest first.
        width: Channels of the last map.
        hidden: Channels of the intermediate maps.
    """

    def __init__(self, channels: Sequence[int], width: int, hidden: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, hidden, 1) for c in channels)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(hidden, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
            for out in (width, *[hidden] * (len(channels) - 1))
        )
        self.classifier = nn.Conv2d(width, 2, 1)

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last feature map (B, width, h, w) and the logits (B, 2, h, w), at the finest stage's size."""
        y: Tensor | None = None
        for x, lateral, smooth in reversed(list(zip(stages, self.lateral, self.smooth, strict=True))):
            x = lateral(x)
            if y is not None:
                x = x + F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
            y = smooth(x)
        assert y is not None
        return y, self.classifier(y)
