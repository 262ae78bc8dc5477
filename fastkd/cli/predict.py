"""``fastkd predict``: segment one image by one sentence, or many."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastkd._atomic import replace_files
from fastkd._console import decode_argument, show

if TYPE_CHECKING:
    from fastkd.cli._models import LoadedModel
    from fastkd.data import Tokenizer
    from fastkd.data.requests import Failed, Request


def predict(
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    sentences: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SENTENCE ...")],
    model: str,
    out: Path = Path("runs/predict"),
    tokenizer: str | None = None,
    device: str = "auto",
    image_root: Path | None = None,
    batch_size: int = 16,
    overlays: bool = True,
) -> None:
    """Segment the object that a sentence refers to.

    For one image and sentence, writes IMAGE-mask.png and IMAGE-overlay.png and prints a score. For a folder of images,
    several sentences, or a JSONL or parquet file, writes predictions.json, a COCO dataset with the masks as RLE, and
    overlays/. Records that cannot be read are listed there under "errors", and the status is 1.

    The score is the mean probability of the object over the predicted mask, or 0 for an empty mask. It measures the
    model's confidence in the chosen pixels, not the quality of the mask.

    Args:
        image: image file; folder of images; JSONL file with lines like {"image": "a.jpg", "sentence": "the cup"}; or
            parquet file with these columns, whose images may be in the file itself.
        sentences: referring expression, such as "the left red cup", or several; none for a JSONL or parquet file.
        model: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``), an exported student
            (.onnx), or a shipped teacher: "shapes" or "shapesref".
        out: output folder; earlier files of the same names are replaced.
        tokenizer: path of a vocab.txt or of a tokenizer folder; if omitted, the one in the model's folder or named by
            its configuration.
        device: "auto", "cpu", "cuda", ...
        image_root: folder of the images that a JSONL or parquet file names; if omitted, that of the file.
        batch_size: records per forward.
        overlays: draw overlays; --no-overlays writes masks only, in predictions.json.
    """
    from fastkd.cli._arguments import check_folder
    from fastkd.data.requests import Request, is_parquet, requests_of_file, requests_of_folder

    texts = [decode_argument(sentence) for sentence in sentences]
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    if (image.suffix == ".jsonl" or is_parquet(image)) and not image.is_dir():
        if texts:
            raise ValueError(f"{image} names a sentence for every image: pass it without {texts[0]!r}")
        records = requests_of_file(image, image_root)
    elif image_root is not None:
        raise ValueError(
            f"--image-root is the folder of the images that a JSONL or parquet file names; {image} is not one"
        )
    elif image.is_dir():
        records = requests_of_folder(image, texts, skip=out / "overlays")  # those of an earlier run
    elif len(texts) == 1:
        check_folder("--out", out)
        return _predict_one(image, texts[0], model, out, tokenizer, device, overlays)
    elif not texts:
        raise ValueError(f"no sentence for {image}: pass a referring expression such as 'the left red cup'")
    else:
        records = (Request(image.name, image, text) for text in texts)
    check_folder("--out", out)
    _predict_many(records, model, out, tokenizer, device, batch_size, overlays)


def _load(model: str, tokenizer: str | None, device: str) -> tuple[LoadedModel, Tokenizer]:
    from fastkd._runtime import pick_device
    from fastkd.cli._models import load_local_model
    from fastkd.evaluate.prediction import load_tokenizer_for, tokenizer_of

    loaded = load_local_model(model).to(pick_device(device))
    if tokenizer is not None:
        return loaded, load_tokenizer_for(loaded, tokenizer)
    return loaded, tokenizer_of(loaded, Path(model).expanduser())


def _predict_one(
    image: Path, sentence: str, model: str, out: Path, tokenizer: str | None, device: str, overlays: bool
) -> None:
    from fastkd.data.images import read_image
    from fastkd.evaluate.prediction import predict as run
    from fastkd.report.overlays import overlay, write_png

    pixels = read_image(image)  # before the slower loading of the model, to report errors early
    loaded, chosen = _load(model, tokenizer, device)
    found = run(loaded, pixels, sentence, chosen)

    written = [out / f"{image.stem}-mask.png"] + ([out / f"{image.stem}-overlay.png"] if overlays else [])
    with replace_files(*written) as partials:
        write_png(found.mask.astype("uint8") * 255, partials[0])
        if overlays:
            write_png(overlay(found.image, found.mask, longest=max(*found.mask.shape, 384)), partials[1])
    if found.mask.any():
        show(f"score {found.score:.3f} (mean probability over the mask), {100 * found.share:.1f} % of the image")
    else:
        show("score 0: found nothing in this image that the sentence refers to")
    for name, path in zip(("mask    ", "overlay "), written, strict=False):
        show(f"{name} {path}")


def _predict_many(
    records: Iterable[Request | Failed],
    model: str,
    out: Path,
    tokenizer: str | None,
    device: str,
    batch_size: int,
    overlays: bool,
) -> None:
    from fastkd.cli._predictions import write_predictions

    records = list(records)  # raises before the model is loaded
    loaded, chosen = _load(model, tokenizer, device)
    written = write_predictions(loaded, chosen, records, out, batch_size=batch_size, overlays=overlays)
    show(f"{written.predictions} of {written.predictions + written.failed} records: {out / 'predictions.json'}")
    if overlays:
        show(f"overlays: {out / 'overlays'}")
    if written.failed:
        for line in written.examples:
            print(f"fastkd: {line}", file=sys.stderr)
        if written.failed > len(written.examples):
            print(f"fastkd: and {written.failed - len(written.examples)} more under 'errors'", file=sys.stderr)
        sys.exit(1)
