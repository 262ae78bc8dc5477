"""Add fused distillation losses to an ordinary PyTorch training loop.

Two small convolutional networks segment random images. The student learns from the labels and from the teacher's last
feature map: the relations between its channels (`channel_kd`) and where each channel is active
(`channel_distribution_kd`).

For your own models: return a feature map (B, C, H, W) from both networks, or read it with taps
(hooks_on_any_model.py). Both losses need the same C on both sides; if widths differ, their module forms `ChannelKD` and
`ChannelDistributionKD` own a 1×1 aligner. Choose weights that keep each term's gradient a fraction of the task's.

    python examples/loss_in_a_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import channel_distribution_kd, channel_kd

CLASSES, CHANNELS = 3, 32
CHANNEL_WEIGHT, DISTRIBUTION_WEIGHT = 0.5, 2.0


class SegmentationNet(nn.Module):
    """Small network that returns its logits and its last feature map."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, CHANNELS, 3, padding=1),
        )
        self.head = nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3, H, W) to logits (B, classes, H/2, W/2) and features (B, channels, H/2, W/2)."""
        features = self.encoder(image)
        return self.head(features.relu()), features


def main(steps: int = 50) -> list[float]:
    """Train the student and return its total loss at every step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = SegmentationNet(hidden=32).to(device).eval()  # load trained weights here
    student = SegmentationNet(hidden=8).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    images = F.interpolate(torch.rand(8, 3, 4, 4, device=device), size=32)  # patches of random colours
    labels = images[:, :, ::2, ::2].argmax(1)  # (B, H/2, W/2): index of the strongest colour channel

    history = []
    for step in range(steps):
        logits, features = student(images)
        with torch.no_grad():  # the teacher gets no gradient; a graph would waste memory
            _, teacher_features = teacher(images)
        task = F.cross_entropy(logits, labels)
        relation = channel_kd(features, teacher_features)
        distribution = channel_distribution_kd(features, teacher_features, temperature=0.5)
        loss = task + CHANNEL_WEIGHT * relation + DISTRIBUTION_WEIGHT * distribution
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  task {task:.3f}  channel_kd {relation:.3f}  distribution {distribution:.3f}")
    return history


if __name__ == "__main__":
    main()
