"""``fastkd predict``: what a sentence refers to in one image, as pictures and a score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd._console import show, typed


def predict(
    image: Annotated[Path, tyro.conf.Positional],
    sentence: Annotated[str, tyro.conf.Positional],
    model: str,
    out: Path = Path("runs/predict"),
    tokenizer: str | None = None,
    device: str = "auto",
) -> None:
    """Segment what a sentence refers to: IMAGE-mask.png, IMAGE-overlay.png and a score.

    The score is the mean probability of the object over the pixels of the predicted mask (0 where nothing was found):
    how sure the model is of the pixels it chose, not how good the mask is.

    Args:
        image: the image.
        sentence: what to look for, such as "the left red cup".
        model: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``), or "shapes" for the
            shipped teacher of the procedural set.
        out: folder for the two pictures; those of an earlier call on an image of that name are replaced.
        tokenizer: path of a vocab.txt or of a tokenizer folder; left out: the one in the model's folder, or the one its
            configuration names.
        device: "auto", "cpu", "cuda", ...
    """
    from fastkd._runtime import pick_device
    from fastkd.cli._common import check_folder, load_local
    from fastkd.data import load_tokenizer
    from fastkd.data.images import read_image
    from fastkd.evaluate.prediction import predict as run
    from fastkd.evaluate.prediction import tokenizer_of
    from fastkd.report.overlays import as_png, overlay, write_together

    image, out = image.expanduser(), out.expanduser()
    pixels = read_image(image)  # first: it fails soonest
    check_folder("out", out)
    loaded = load_local(model).to(pick_device(device))
    if tokenizer is not None:
        words = load_tokenizer(tokenizer, keep_end=getattr(loaded.config, "keep_end", False))
    else:
        words = tokenizer_of(loaded, Path(model).expanduser())
    found = run(loaded, pixels, typed(sentence), words)

    mask, picture = out / f"{image.stem}-mask.png", out / f"{image.stem}-overlay.png"
    drawn = overlay(found.image, found.mask, longest=max(*found.mask.shape, 384))
    write_together({mask: as_png(found.mask.astype("uint8") * 255), picture: as_png(drawn)})
    if found.mask.any():
        show(f"score {found.score:.3f} (mean probability over the mask), {100 * found.share:.1f} % of the image")
    else:
        show("score 0: nothing in this image is what the sentence says")
    show(f"mask     {mask}\noverlay  {picture}")
