"""Sections of the report that compare models sample by sample, word by word and channel by channel."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import see
from html_page import Page
from PIL import Image

from fastkd.report import ChannelRelations, CurveSeries, Example, ResultRow, SampleIoU, WordAttention, write_report
from fastkd.report.compared import attention_probabilities, channel_similarities
from fastkd.report.overlays import FADE, HIT, PREDICTION, TRUTH, errors_overlay

SIZE = 12
HOSTILE = "<script>alert('$x$')</script>"
GENERATOR = torch.Generator().manual_seed(0)
IOUS = [0.0, 5.0, 50.0, 60.0, 95.0]


def attention(
    words: tuple[str, ...] = ("the", "cup"), names: tuple[str, ...] = ("teacher", "student")
) -> WordAttention:
    maps = {name: torch.rand(len(words), 3, 4, generator=GENERATOR) for name in names}
    return WordAttention(np.full((SIZE, SIZE, 3), 100, np.uint8), words, maps)


def similarities(channels: int) -> torch.Tensor:
    return channel_similarities(torch.randn(2, channels, 3, 3, generator=GENERATOR))


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[2:5, 2:5] = True
    groups = ("Best", "Best", "Worst", HOSTILE)
    examples = [Example(np.zeros((SIZE, SIZE, 3), np.uint8), mask, {"a": ~mask}, "cup", group=g) for g in groups]
    path = write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        title="t",
        rows=[ResultRow("teacher", latency=0.0123), ResultRow(HOSTILE, latency=0.0012)],
        curves=[CurveSeries(HOSTILE, "loss", [1, 2], [2.0, 1.0])],
        scores=[
            SampleIoU("teacher", [100.0] * 5, (100.0, 90.0, 100.0)),
            SampleIoU(HOSTILE, IOUS, (42.0, 40.25, 44.0), (-1.5, -2.5, 0.5), "<b>alone"),
        ],
        examples=examples,
        attention=[attention(("the", HOSTILE))],
        relations=ChannelRelations({"teacher": similarities(6), HOSTILE: similarities(6), "wide": similarities(8)}),
    )
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.mark.parametrize("width", [390, 1280])  # a phone, a desktop
def test_a_browser_shows_the_page(html: str, tmp_path: Path, width: int) -> None:
    seen = see(html, tmp_path, width)
    assert seen.console == []
    assert len(seen.images) >= 7
    assert all(seen.images)
    assert seen.width <= width
    assert HOSTILE in seen.text
    assert not {"script", "b", "link", "iframe"} & set(seen.elements)


def test_text_is_escaped_and_nothing_is_loaded(page: Page) -> None:
    assert not {"script", "b", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) >= 7  # table, intervals, two legends, axis, group, word, two row headings
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    for image in page.all("img"):
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1])))
        assert picture.size == (int(image["width"]), int(image["height"]))
        assert image["alt"]


def test_intervals_gains_and_latency_are_shown(page: Page) -> None:
    assert "42.0 [40.2, 44.0]" in page.text
    assert "−1.5 [−2.5, +0.5]" in page.text
    assert "over <b>alone" in page.text
    assert "12 ms" in page.text
    assert "1.2 ms" in page.text


def test_charts_describe_histogram_and_precision(page: Page) -> None:
    labels = [svg.get("aria-label", "") for svg in page.all("svg")]
    assert any(f"{HOSTILE} has 40 % below 10 and 20 % from 90" in label for label in labels)
    assert any(f"{HOSTILE} 60.0, 40.0, 20.0, 20.0, 20.0" in label for label in labels)  # 50 counts at P@0.5
    assert any(f"{HOSTILE} 42.0, 40.2 to 44.0" in label for label in labels)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_groups_of_examples_have_one_heading_each(page: Page) -> None:
    assert page.text.count("Best") == 1
    assert page.text.count("Worst") == 1


def test_each_word_and_channel_matrix_has_a_picture(page: Page) -> None:
    alts = [image["alt"] for image in page.all("img")]
    assert sum(alt.startswith("Attention of") for alt in alts) == 2 * 2
    assert sum(alt.startswith("Matrix of") for alt in alts) == 3
    assert "mean |difference| from teacher" in page.text
    assert "8 channels" in page.text


def test_precision_of_another_protocol_is_shown_as_given(tmp_path: Path) -> None:
    score = SampleIoU("a", IOUS, precision=[40.0, 30.0, 12.5, 0.0, 0.0])
    written = write_report(tmp_path / "r.html", title="t", rows=[ResultRow("a")], scores=[score])
    labels = [svg.get("aria-label", "") for svg in Page(written.read_text(encoding="utf-8")).all("svg")]
    assert any("P@0.9: a 40.0, 30.0, 12.5, 0.0, 0.0" in label for label in labels)


def test_scores_without_intervals_have_no_table(tmp_path: Path) -> None:
    written = write_report(tmp_path / "r.html", title="t", rows=[ResultRow("a")], scores=[SampleIoU("a", IOUS)])
    page = Page(written.read_text(encoding="utf-8"))
    assert "Gain [interval]" not in page.text
    assert "Samples by IoU" in page.text
    assert any("P@0.9: a 60.0, 40.0, 20.0, 20.0, 20.0" in svg.get("aria-label", "") for svg in page.all("svg"))
    assert "What the losses compare" not in page.text


def test_overlay_distinguishes_hits_missed_and_false_pixels() -> None:
    prediction, truth = np.zeros((2, SIZE, SIZE), bool)
    prediction[2:9, 2:6], truth[2:9, 4:9] = True, True
    drawn = errors_overlay(np.full((SIZE, SIZE, 3), 100, np.uint8), prediction, truth).astype(int)
    for (row, column), colour in {(5, 4): HIT, (5, 8): TRUTH, (5, 2): PREDICTION}.items():
        expected = 100 + 0.55 * (np.array(colour) - 100)
        assert np.abs(drawn[row, column] - expected).max() <= 1
    assert np.array_equal(drawn[5, 6], (255, 255, 255))  # the outline of the prediction
    assert np.abs(drawn[11, 11] - (100 + FADE * 28)).max() <= 1


def test_attention_equals_the_mean_of_softmaxes_over_words() -> None:
    logits = torch.randn(3, 9, 5, generator=GENERATOR)
    mask = torch.tensor([True, True, False, True, False])
    found = attention_probabilities(logits, mask)
    expected = np.zeros((3, 3, 3))
    for pixel in range(9):
        for head in range(3):
            weights = np.exp(logits[head, pixel, mask].double().numpy())
            expected[:, pixel // 3, pixel % 3] += weights / weights.sum() / 3
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="square map, got 8 pixels"):
        attention_probabilities(logits[:, :8], mask)


def test_channel_similarities_are_correlations() -> None:
    features = torch.randn(4, 7, 5, 3, generator=GENERATOR)
    features[:, 3] = 2.5  # a constant channel has no direction
    rows = np.delete(features.double().transpose(0, 1).flatten(1).numpy(), 3, axis=0)
    found = channel_similarities(features).numpy()
    np.testing.assert_allclose(np.delete(np.delete(found, 3, 0), 3, 1), np.corrcoef(rows), atol=1e-5)
    assert (found[3] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleIoU("a", []), r"ious must be \(N,\) percentages, N >= 1"),
        (lambda: SampleIoU("a", [101.0]), "from 101 to 101"),
        (lambda: SampleIoU("a", [1.0], precision=[1.0]), "a value for each of P@0.5 to P@0.9"),
        (lambda: SampleIoU("a", [float("nan")]), "must be"),
        (lambda: SampleIoU("a", [[1.0]]), r"got \(1, 1\)"),
        (lambda: SampleIoU("a", [1.0], (1.0, 2.0, 0.0)), r"interval must be \(mean, low, high\)"),
        (lambda: SampleIoU("a", [1.0], gain=(1.0, float("nan"), 0.0)), "gain must be"),
        (lambda: WordAttention(None, ["a"], {"m": torch.zeros(2, 3, 3)}), r"one per word \(1\)"),
        (lambda: WordAttention(None, ["a"], {"m": torch.full((1, 3, 3), -1.0)}), "at least 0"),
        (lambda: WordAttention(None, ["a"], {"m": torch.full((1, 3, 3), torch.nan)}), "finite"),
        (lambda: WordAttention(None, ["a"], {"m": torch.full((1, 3, 3), torch.inf)}), "hold Inf"),
        (lambda: ChannelRelations({"m": torch.zeros(2, 3)}), r"must be \(C, C\)"),
        (lambda: ChannelRelations({"m": torch.full((2, 2), 1.5)}), "from -1 to 1"),
        (lambda: ChannelRelations({"m": torch.full((2, 2), torch.nan)}), "from -1 to 1"),
    ],
)
def test_rejects_bad_records(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rejects_scores_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scores: the names \['a', 'a'\] are not unique"):
        write_report(tmp_path / "r.html", title="t", rows=[ResultRow("a")], scores=[SampleIoU("a", IOUS)] * 2)
    assert not list(tmp_path.iterdir())
