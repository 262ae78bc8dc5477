"""Distil between models that you cannot change: `Taps` read features by module path, `Distiller` adds the losses.

A torchvision MobileNetV3 learns from a ResNet. Neither returns intermediate features; taps read them. Their widths
differ (48 and 256 channels), so the channel-wise term owns a 1×1 aligner, which trains with the student but is
not part of it. Needs ``pip install 'fastkd[ris]'`` (for torchvision); the weights are random.

For your own models: list the module paths with ``model.named_modules()``, print the taps' shapes once, and choose
modules whose maps have the same height and width. ``inputs`` names the keys of the batch to pass to both models as
keyword arguments; a term selects tap names, paths in the output, or functions of the output.

    python examples/hooks_on_any_model.py
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import mobilenet_v3_small, resnet18

import fastkd
from fastkd import losses

CLASSES = 10
STUDENT_PATH, TEACHER_PATH = "features.8", "layer3"  # both at 1/16 of the image


def task_loss(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the classification loss."""
    return F.cross_entropy(output, batch["label"])


def main(steps: int = 10) -> tuple[fastkd.Distiller, list[float]]:
    """Train the student and return the distiller with the total loss of every step."""
    torch.manual_seed(0)
    teacher = resnet18(weights=None, num_classes=CLASSES).eval().requires_grad_(False)
    student = mobilenet_v3_small(weights=None, num_classes=CLASSES)
    batch = {"x": torch.rand(8, 3, 96, 96), "label": torch.randint(CLASSES, (8,))}

    with torch.no_grad(), fastkd.Taps(teacher, {"map": TEACHER_PATH}) as taps:  # read a feature once
        teacher(batch["x"])
        width = taps["map"].shape[1]
        print(f"teacher's {TEACHER_PATH}: {tuple(taps['map'].shape)}")
    with torch.no_grad(), fastkd.Taps(student, {"map": STUDENT_PATH}) as taps:
        student(batch["x"])
        aligned = losses.ChannelDistributionKD(student_channels=taps["map"].shape[1], teacher_channels=width)
        print(f"student's {STUDENT_PATH}: {tuple(taps['map'].shape)}")

    distiller = fastkd.Distiller(
        student,
        teacher,
        task_loss,
        [
            fastkd.Term(aligned, "map", weight=0.5, name="channels"),
            fastkd.Term(losses.pixel_relation_kd, "map", weight=0.1, name="pixels"),
            fastkd.Term(losses.logit_kd, lambda output: output, weight=0.5, name="logits", kwargs={"temperature": 2.0}),
        ],
        inputs=("x",),
        student_taps={"map": STUDENT_PATH},
        teacher_taps={"map": TEACHER_PATH},
    )
    print(distiller.check(batch))  # finds silent mistakes and shows each term's gradient norm
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)  # student and aligner
    history = []
    for step in range(steps):
        out = distiller(batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(out.loss.item())
        terms = "  ".join(f"{name} {value:.3f}" for name, value in out.terms.items())
        print(f"step {step:3}  loss {out.loss:.3f}  task {out.task:.3f}  {terms}")
    return distiller, history


if __name__ == "__main__":
    main()
