"""``fastkd app``: a page that shows what models predict for an uploaded image and a sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastkd._console import show

if TYPE_CHECKING:
    from fastkd.data import Tokenizer

_LARGEST = "30mb"  # of an uploaded file


def app(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME=MODEL ...")],
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Serve a page: upload an image, type a sentence, see the masks of several models and their attention to each word.

    Needs ``pip install 'fastkd[app]'`` (Gradio). Nothing is sent elsewhere; the page is reachable only from this
    machine unless --host states another address.

    Args:
        models: NAME=MODEL for each, such as teacher=shapes alone=runs/alone/best; without
            NAME=, the folder's name.
        host: address to listen on; 0.0.0.0 for every network of this machine.
        port: port to listen on.
        device: "auto", "cpu", "cuda", ...
    """
    gradio = _gradio()
    loaded = load_named(models, device)
    page = build_page(gradio, loaded)
    show(f"http://{host}:{port}")
    page.launch(server_name=host, server_port=port, share=False, max_file_size=_LARGEST, quiet=True)


def load_named(models: tuple[str, ...], device: str) -> dict[str, tuple[Any, Tokenizer]]:
    """Return models with their tokenizers, by name.

    Raises:
        ValueError: no model, or a name that occurs twice.
        FileNotFoundError: no such model.
    """
    from fastkd._runtime import pick_device
    from fastkd.cli._models import load_local_model
    from fastkd.evaluate import tokenizer_of

    if not models:
        raise ValueError("no model: pass NAME=MODEL, such as teacher=shapes distilled=runs/distilled/best")
    sources: dict[str, str] = {}
    for text in models:
        name, equals, source = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            path = Path(text)
            name, source = (path.parent.name if path.name in ("best", "last") else path.name) or text, text
        if not name or not source or name in sources:
            raise ValueError(f"models: expected each name once, as NAME=MODEL, got {text!r}")
        sources[name] = source
    found = {}
    for name, source in sources.items():
        model = load_local_model(source).to(pick_device(device))
        found[name] = model, tokenizer_of(model, Path(source).expanduser() if source != "shapes" else None)
    return found


def answer(models: Mapping[str, tuple[Any, Tokenizer]], image: str | os.PathLike[str] | None, sentence: str) -> str:
    """Return the page with every model's mask and attention, in a frame that cannot run scripts.

    Raises:
        ValueError: no image or sentence, or one that cannot be used.
    """
    from fastkd.cli._report import word_attention
    from fastkd.data.images import read_image
    from fastkd.evaluate import predict
    from fastkd.report.page import answer_page

    if image is None:
        raise ValueError("upload an image first")
    pixels = read_image(image)
    found = {name: predict(model, pixels, sentence, tokenizer) for name, (model, tokenizer) in models.items()}
    page = answer_page(
        pixels,
        sentence,
        {name: (one.mask, one.score) for name, one in found.items()},
        word_attention(models, pixels, sentence),
    )
    style = "width: 100%; height: 75vh; min-height: 30rem; border: 0"
    return f'<iframe title="Masks and attention" sandbox="" style="{style}" srcdoc="{escape(page)}"></iframe>'


def build_page(gradio: Any, models: Mapping[str, tuple[Any, Tokenizer]]) -> Any:
    """Return the Gradio application."""

    def respond(image: str | None, sentence: str) -> str:
        try:
            return answer(models, image, sentence or "")
        except (OSError, ValueError, ArithmeticError) as error:
            reason = str(error).replace(f"{image} ", "the image ") if image else str(error)
            raise gradio.Error(escape(reason), print_exception=False) from error

    return gradio.Interface(
        respond,
        inputs=[
            gradio.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image"),
            gradio.Textbox(label="Sentence", placeholder="the left red cup", max_length=1000),
        ],
        outputs=gradio.HTML(label="Masks and attention"),
        title="Referring segmentation: " + ", ".join(map(escape, models)),
        flagging_mode="never",
        analytics_enabled=False,
        api_name=False,
    )


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ImportError(
            f"fastkd app needs the package {error.name!r}, which is not installed: pip install 'fastkd[app]'"
        ) from error
    return gradio
