"""``fastkd predict``: segment one image by one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd._atomic import replace_files
from fastkd._console import decode_argument, show


def predict(
    image: Annotated[Path, tyro.conf.Positional],
    sentence: Annotated[str, tyro.conf.Positional],
    model: str,
    out: Path = Path("runs/predict"),
    tokenizer: str | None = None,
    device: str = "auto",
) -> None:
    """Segment the object that a sentence refers to; write IMAGE-mask.png and IMAGE-overlay.png and print a score.

    The score is the mean probability of the object over the predicted mask, or 0 for an empty mask. It measures the
    model's confidence in the chosen pixels, not the quality of the mask.

    Args:
        image: image file.
        sentence: referring expression, such as "the left red cup".
        model: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``), or "shapes" for the
            shipped teacher of the procedural set.
        out: folder for the two pictures; earlier ones of the same names are replaced.
        tokenizer: path of a vocab.txt or of a tokenizer folder; if omitted, the one in the model's folder or named by
            its configuration.
        device: "auto", "cpu", "cuda", ...
    """
    from fastkd._runtime import pick_device
    from fastkd.cli._arguments import check_folder
    from fastkd.cli._models import load_local_model
    from fastkd.data.images import read_image
    from fastkd.evaluate.prediction import load_tokenizer_for, tokenizer_of
    from fastkd.evaluate.prediction import predict as run
    from fastkd.report.overlays import overlay, write_png

    image, out = image.expanduser(), out.expanduser()
    pixels = read_image(image)  # before the slower loading of the model, to report errors early
    check_folder("out", out)
    loaded = load_local_model(model).to(pick_device(device))
    if tokenizer is not None:
        chosen = load_tokenizer_for(loaded, tokenizer)
    else:
        chosen = tokenizer_of(loaded, Path(model).expanduser())
    found = run(loaded, pixels, decode_argument(sentence), chosen)

    mask, picture = out / f"{image.stem}-mask.png", out / f"{image.stem}-overlay.png"
    drawn = overlay(found.image, found.mask, longest=max(*found.mask.shape, 384))
    with replace_files(mask, picture) as (partial_mask, partial_picture):
        write_png(found.mask.astype("uint8") * 255, partial_mask)
        write_png(drawn, partial_picture)
    if found.mask.any():
        show(f"score {found.score:.3f} (mean probability over the mask), {100 * found.share:.1f} % of the image")
    else:
        show("score 0: found nothing in this image that the sentence refers to")
    show(f"mask     {mask}\noverlay  {picture}")
