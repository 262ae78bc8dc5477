"""Distil the last attention of a vision transformer: what each patch of the image attends to.

An `AttentionTap` records the queries and keys of an attention module after its norms and rotary embeddings, and
`tapped_attention_kd` compares the two maps without storing either. The networks here share only the grid of patches:
the teacher has more heads, and register tokens next to its CLS token. Tokens are compared one by one, so both networks
keep their patches only (``tokens=``), and ``relation_heads`` regroups the heads. Needs ``pip install 'fastkd[ris]'``
(for timm); the weights are random.

    python examples/attention_maps.py
"""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.distill import AttentionTap, tapped_attention_kd

CLASSES = 10


def vit(**sizes: int) -> torch.nn.Module:
    """Return a small ViT on 48×48 images, 6×6 patches."""
    return timm.models.VisionTransformer(img_size=48, patch_size=8, num_classes=CLASSES, **sizes)


def task_loss(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the classification loss."""
    return F.cross_entropy(output, batch["label"])


def main(steps: int = 20) -> list[dict[str, float]]:
    """Train the student and return the terms of every step."""
    torch.manual_seed(0)
    teacher = vit(embed_dim=96, depth=3, num_heads=6, reg_tokens=4).eval().requires_grad_(False)
    with torch.no_grad():
        teacher.blocks[2].attn.qkv.weight.mul_(8)  # random maps are nearly uniform, those of trained networks are not
    student = vit(embed_dim=48, depth=2, num_heads=3)
    batch = {"x": torch.rand(8, 3, 48, 48), "label": torch.randint(CLASSES, (8,))}

    distiller = fastkd.Distiller(
        student,
        teacher,
        task_loss,
        [fastkd.Term(tapped_attention_kd, "last", weight=1.0, name="attention", kwargs={"relation_heads": 3})],
        inputs=("x",),
        student_taps={"last": AttentionTap("blocks.1.attn", tokens="1:")},  # without CLS
        teacher_taps={"last": AttentionTap("blocks.2.attn", tokens="5:")},  # without CLS and four registers
    )
    print(distiller.check(batch))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    history = []
    for step in range(steps):
        out = distiller(batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in out.terms.items()} | {"task": out.task.item()})
        print(f"step {step:3}  task {out.task:.3f}  attention {out.terms['attention']:.6f}")
    return history


if __name__ == "__main__":
    main()
