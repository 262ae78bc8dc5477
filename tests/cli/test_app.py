"""``fastkd app``: what its page answers, with and without Gradio."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm", reason="needs the [ris] extra")

import tiny_teachers
from browser import see
from html_page import Page
from PIL import Image

from fastkd.cli import main
from fastkd.cli.app import answer, build_page, load_named
from fastkd.errors import FastKDWarning

HOSTILE = "red <b>'x\""


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return load_named(("teacher=shapes", "<b>other=shapes"), "cpu")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_answer_is_a_frame_without_scripts(models, image):
    with pytest.warns(FastKDWarning, match="cannot represent"):
        found = answer(models, image, HOSTILE)
    frame = Page(found)
    ((tag, attributes),) = frame.tags
    assert tag == "iframe"
    assert attributes["sandbox"] == ""
    page = Page(attributes["srcdoc"])
    assert not {"script", "b", "iframe", "link"} & {tag for tag, _ in page.tags}
    assert HOSTILE in page.text
    alts = [picture["alt"] for picture in page.all("img")]
    for name in ("teacher", "<b>other"):
        assert f"The mask predicted by {name}" in alts
        assert f"Attention of {name} to the word red, at most" in " ".join(alts)


def test_a_browser_shows_the_answer(models, image, tmp_path):
    ((_, attributes),) = Page(answer(models, image, "red circle")).tags
    seen = see(attributes["srcdoc"], tmp_path, 390)
    assert seen.console == []
    assert len(seen.images) >= 2 * (1 + 2)  # of each model: its mask, and its attention to each word
    assert all(seen.images)
    assert seen.width <= 390
    assert "<b>other" in seen.text


def test_models_with_other_words_are_shown_too(models, image, tmp_path):
    """SAM 3 splits the sentence in another way, CLIPSeg compares no pixels with words."""
    folders = [tiny_teachers.write(kind, tmp_path / kind) for kind in ("clipseg", "sam3")]
    others = load_named(tuple(f"{folder.name}={folder}" for folder in folders), "cpu")
    found = html.unescape(answer(others | models, image, "red cross"))
    assert set(re.findall(r'alt="Attention of (\w+) to', html.unescape(found))) == {"sam3", "teacher"}
    assert all(f'alt="The mask predicted by {name}"' in found for name in ("clipseg", "sam3", "teacher"))


@pytest.mark.parametrize(
    ("upload", "sentence", "message"),
    [
        (None, "red", "upload an image first"),
        ("a.png", " ", "the sentence is empty"),
        ("text.png", "red", "can't be read as an image"),
    ],
)
def test_unusable_input_is_an_error(models, image, upload, sentence, message):
    (image.parent / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=message):
        answer(models, upload and image.parent / upload, sentence)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no model: pass NAME=MODEL"),
        (["a=shapes", "a=shapes"], "expected each name once, as NAME=MODEL, got 'a=shapes'"),
        (["=shapes"], "expected each name once"),
        (["a="], "expected each name once"),
        (["a=none/here"], "no model at none/here"),
    ],
)
def test_bad_models_are_one_line_and_status_2(args, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", type(sys)("gradio"))
    assert main(["app", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_folders_name_models(models, tmp_path):
    models["teacher"][0].save_pretrained(tmp_path / "distilled" / "best")
    assert list(load_named((str(tmp_path / "distilled" / "best"), "shapes"), "cpu")) == ["distilled", "shapes"]


def test_missing_gradio_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "shapes"]) == 2
    assert "pip install 'fastkd[app]'" in capsys.readouterr().err


def test_page_answers_and_reports_errors(models, image):
    gradio = pytest.importorskip("gradio", reason="needs the [app] extra")
    respond = build_page(gradio, models).fn
    assert "sandbox" in respond(str(image), "red")
    with pytest.raises(gradio.Error) as raised:
        respond(str(image), "")
    assert re.search("the sentence is empty", html.unescape(str(raised.value)))
