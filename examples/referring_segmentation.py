"""Distil a referring-image-segmentation student end to end: data, training, evaluation, prediction.

Writes a small procedural set in RefCOCO's layout, distils a student of 0.29 M parameters from the shipped teacher for a
few steps, evaluates both on the validation split, and segments the object of one sentence. A useful student needs
about 1000 steps and 2500 images (``make demo``). Needs ``pip install 'fastkd[ris]'``.

For your own data: point `RefCOCO` at the folder of RefCOCO, RefCOCO+ or RefCOCOg. For your own teacher: see
docs/teachers.md; for larger students, `fastkd.models.list_presets()`.

    python examples/referring_segmentation.py
"""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fastkd import Distiller, Term, losses
from fastkd.data import RefCOCO, ReferDataset, collate, make_shapes
from fastkd.evaluate import Prediction, evaluate, predict, tokenizer_of
from fastkd.models import RISModel, preset
from fastkd.train import TrainConfig, segmentation_loss, train

TEACHER = files("fastkd.models") / "assets" / "shapes-teacher"


def main(steps: int = 20, images: int = 80) -> dict[str, Any]:
    """Run the example; return the training history, both scores, and one prediction with its image."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shapes"
        make_shapes(root, images=images, image_size=64)

        teacher = RISModel.from_pretrained(str(TEACHER)).eval().requires_grad_(False)
        student = RISModel(preset("shapes-student"))
        config = student.config

        def split(name: str, sentences: str) -> ReferDataset:
            return ReferDataset(
                RefCOCO(root, split=name),
                tokenizer_of(student),
                image_size=config.image_size,
                max_words=config.max_words,
                sentences=sentences,
                image_mean=config.image_mean,
                image_std=config.image_std,
            )

        train_set, val_set = split("train", sentences="random"), split("val", sentences="all")

        words = {"word_mask": "batch.word_mask"}  # looked up in each batch
        terms = [
            Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", name="cross_modal", kwargs=words),
            Term(losses.channel_distribution_kd, "decoder_features", name="distribution"),
        ]
        distiller = Distiller(student, teacher, segmentation_loss, terms)
        first = collate([train_set[i] for i in range(8)])
        weights = distiller.balance(
            first, {"cross_modal": 0.5, "distribution": 0.5}
        )  # gradient norms, relative to the task's
        print("weights", weights)
        settings = TrainConfig(steps=steps, batch_size=8, lr=1e-3, log_every=1)
        result = train(distiller, train_set, settings, progress=False)

        scores = {"teacher": evaluate(teacher, val_set), "student": evaluate(student, val_set)}
        for name, score in scores.items():
            print(f"{name}: {score}")
        ref = val_set.refcoco.refs[0]
        image = val_set.refcoco.image(ref.image_id)  # a path or a PIL image works too
        found: Prediction = predict(student, image, ref.sentences[0].text)
        print(f"{found.sentence!r}: score {found.score:.2f}, {found.share:.0%} of the image")
    return {"history": result.history, "scores": scores, "prediction": found, "image": image}


if __name__ == "__main__":
    main()
