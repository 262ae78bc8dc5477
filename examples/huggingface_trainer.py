"""Distil under Hugging Face's `transformers.Trainer` by overriding compute_loss.

A tiny SegFormer learns from a wider one on random images. Both have random weights; nothing is downloaded.
Needs ``pip install 'fastkd[ris]'``.

For your own models: load both with ``from_pretrained`` and replace `RandomImages` with your dataset. `logit_kd`
needs the same classes and size on both sides; `pixel_relation_kd` accepts feature maps of different widths. Trainer
optimises only ``model.parameters()``: if a loss module owns an aligner, make it a submodule of the student.

    python examples/huggingface_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

from fastkd.losses import logit_kd, pixel_relation_kd

CLASSES, SIZE = 4, 64
LOGIT_WEIGHT, RELATION_WEIGHT = 0.5, 0.5


class DistillationTrainer(Trainer):
    """Add two distillation terms to the model's own loss."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """Return the model's loss plus the weighted terms."""
        student = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            teacher = self.teacher(pixel_values=inputs["pixel_values"], output_hidden_states=True)
        logits = logit_kd(student.logits, teacher.logits, temperature=2.0)
        relation = pixel_relation_kd(student.hidden_states[-1], teacher.hidden_states[-1])  # (B, C, H, W)
        loss = student.loss + LOGIT_WEIGHT * logits + RELATION_WEIGHT * relation
        return (loss, student) if return_outputs else loss


class RandomImages(Dataset):
    """Random images; the label of a pixel is its quadrant of the image."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        half = torch.arange(SIZE) // (SIZE // 2)
        return {"pixel_values": image, "labels": 2 * half[:, None] + half}


def segformer(width: int) -> SegformerForSemanticSegmentation:
    """Return a small SegFormer with random weights."""
    widths = [width, width, 2 * width, 2 * width]
    sizes = {"depths": [1] * 4, "num_attention_heads": [2] * 4, "hidden_sizes": widths, "decoder_hidden_size": width}
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, **sizes))


def main(steps: int = 15) -> list[float]:
    """Train the student and return the logged loss of every step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1}
        outputs = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        arguments = TrainingArguments(folder, dataloader_pin_memory=False, **settings, **outputs)
        student, teacher = segformer(width=16), segformer(width=32)
        trainer = DistillationTrainer(student, arguments, train_dataset=RandomImages(), teacher=teacher)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
