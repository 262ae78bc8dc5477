"""Gram anchoring: keep a vision transformer's patch features consistent during long training.

DINOv3 (Siméoni et al., 2025, arXiv 2508.10104) found that long training improves the class token while patch features
lose their spatial structure. Its remedy compares the similarities between patches, X Xᵀ of unit-norm features, with
those of an earlier checkpoint of the same network, the Gram teacher:

    pixel_relation_kd(student_patches, gram_teacher_patches, distance="mse")

within each image; with ``cross_image=True``, as here, between all patches of the batch. The features themselves may
change as long as their similarities stay. The loss never stores the patches × patches matrix.

Here a tiny transformer continues training on a task of its class token, without and with the anchor, and prints the
drift of its patch similarities. For your own model: pass the patch tokens after the final norm, without class and
register tokens, as (B, C, N), and replace the Gram teacher by a newer checkpoint from time to time.

    python examples/gram_anchoring.py
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import pixel_relation_kd

IMAGE, PATCH, WIDTH, CLASSES = 32, 4, 64, 8


class TinyViT(nn.Module):
    """Small vision transformer that returns class-token logits and patch features."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (IMAGE // PATCH) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3, H, W) to logits (B, classes) and patch features (B, C, N)."""
        patches = self.patches(image).flatten(2).mT  # (B, N, C)
        tokens = torch.cat([self.class_token.expand(len(image), -1, -1), patches], dim=1) + self.positions
        tokens = self.blocks(tokens)
        return self.head(tokens[:, 0]), tokens[:, 1:].mT


def train(checkpoint: TinyViT, steps: int, weight: float) -> float:
    """Continue from a checkpoint with the anchor at this weight; return the drift of patch similarities."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gram_teacher = copy.deepcopy(checkpoint).to(device).eval().requires_grad_(False)
    student = copy.deepcopy(checkpoint).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    images = torch.rand(8, 3, IMAGE, IMAGE, device=device)
    labels = torch.randint(CLASSES, (8,), device=device)
    for step in range(steps + 1):
        logits, patches = student(images)
        with torch.no_grad():
            _, anchor = gram_teacher(images)
        task = F.cross_entropy(logits, labels)
        gram = pixel_relation_kd(patches, anchor, distance="mse", cross_image=True)
        if step == steps:  # after the last update: measure only
            break
        optimizer.zero_grad()
        (task + weight * gram).backward()
        optimizer.step()
    print(f"weight {weight:4g}: task {task:.4f}, drift of patch similarities {gram:.6f}")
    return gram.item()


def main(steps: int = 30, weight: float = 10.0) -> tuple[float, float]:
    """Return the drift without and with the anchor."""
    torch.manual_seed(0)
    checkpoint = TinyViT()  # load an early checkpoint of your own training here
    return train(checkpoint, steps, weight=0.0), train(checkpoint, steps, weight)


if __name__ == "__main__":
    main()
