"""The report: a self-contained page, a console table, overlays, curves from a log."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from html_page import Page
from PIL import Image

from fastkd.report import CurveSeries, Example, ResultRow, console_table, curves_from_log, save_overlay, write_report
from fastkd.report import page as report_page
from fastkd.report.svg import styles

SIZE = 24


def square(top: int, left: int, side: int = 8) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def example(sentence: str = "the red square", **changes: object) -> Example:
    image = np.full((SIZE, SIZE, 3), 200, np.uint8)
    image[square(4, 4)] = (200, 30, 30)
    fields = {"image": image, "truth": square(4, 4), "sentence": sentence}
    fields["predictions"] = {"teacher": square(4, 4), "student": square(4, 8)}
    return Example(**fields | changes)  # type: ignore[arg-type]


def rows() -> list[ResultRow]:
    return [
        ResultRow("teacher", 3_060_000, {"oIoU": np.float32(57.25), "mIoU": 55.9, "P@0.5": 63.0}, note="frozen"),
        ResultRow("alone", 315_400, {"oIoU": 38.0, "mIoU": [34.0, 36.0, 38.0]}, steps=1200, train_seconds=42),
        ResultRow("distilled", 315_400, {"oIoU": 36.5, "mIoU": [44.0, 47.0, 50.0]}, 1200, 66.4, baseline="alone"),
    ]


def curves() -> list[CurveSeries]:
    steps = list(range(1, 101))
    made = []
    for run, scale in (("alone", 1.0), ("distilled", 0.5)):
        made.append(CurveSeries(run, "loss", steps, [scale / s for s in steps], [s * 0.1 for s in steps]))
        made.append(CurveSeries(run, "mIoU", [50, 100], [30.0, 40.0], [5.0, 10.0], phase="validation"))
    return [*made, CurveSeries("distilled", "cross_modal", steps, [float("nan"), *[2.0] * 99])]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "new" / "folder" / "report.html"
    returned = write_report(
        path,
        title="Shapes <demo>",
        rows=rows(),
        curves=curves(),
        examples=[example(), example("<script>alert('x')</script> & \"more\"")],
        notes=["Three seeds.", "A & B"],
        environment={"CPU": "a <fast> one", "threads": 2},
    )
    assert returned == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_page_is_self_contained(html: str) -> None:
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("iframe")
    for _, attrs in page.tags:
        assert not any(key.startswith("on") for key in attrs)
        if "src" in attrs:
            assert attrs["src"].startswith("data:image/")
        if "href" in attrs:
            assert attrs["href"].startswith("#")


def test_user_text_is_escaped(html: str) -> None:
    page = Page(html)
    for words in ("Shapes <demo>", "<script>alert('x')</script> & \"more\"", "A & B", "a <fast> one"):
        assert words in page.text
    assert "<script>alert" not in html
    hostile = ResultRow('<img src="x">', metrics={'"><b>': 1.0}, note="<i>")
    series = CurveSeries('"><script>', "</svg><b>", [1, 2], [1.0, 2.0])
    parts = report_page._results([hostile]) + report_page._curves([series], styles([series.run]))
    assert not {"img", "script", "b", "i"} & {tag for tag, _ in Page(parts).tags}


def test_table_holds_the_numbers_and_gains(html: str) -> None:
    text = Page(html).text
    for words in ("3.06 M", "315 k", "57.2", "1,200", "42 s", "1 min 06 s", "frozen"):
        assert words in text, words
    assert "36.0 ± 2.0" in text  # mean and sample deviation of 34, 36, 38
    assert "+11.0 ± 1.0" in text  # paired: 10, 11, 12
    assert "−1.5" in text  # a negative gain
    assert "gain of distilled over alone" in text
    assert html.count('scope="col"') == 7
    assert html.count('scope="row"') == 3 + 2


def test_curves_are_drawn_over_steps_and_seconds(html: str) -> None:
    page = Page(html)
    labels = [svg.get("aria-label", "") for svg in page.all("svg")]
    assert any("validation mIoU over steps" in label and "distilled ends at 40" in label for label in labels)
    assert any("validation mIoU over seconds" in label for label in labels)
    assert any("training cross_modal over steps" in label for label in labels)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', html))
    assert used <= set(ids)
    assert "var(--run-1)" in html
    assert "#01021" not in html  # no placeholder colour is left


def test_examples_have_overlays_captions_and_alt_texts(html: str) -> None:
    images = Page(html).all("img")
    assert len(images) == 2 * 4
    assert all(image["alt"] for image in images)
    assert "The mask predicted by student, IoU 33.3 %" in images[3]["alt"]  # two 8×8 squares that overlap by half
    pictures = [decoded(image["src"]) for image in images[:4]]
    assert all(max(picture.shape) >= 192 for picture in pictures)
    plain, truth, teacher, student = (picture.astype(int) for picture in pictures)
    assert abs(truth - plain).max() > 40
    assert truth[:, :, 2].sum() > teacher[:, :, 2].sum()  # blue against orange
    assert abs(teacher - student).max() > 40


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGB"))


def test_given_iou_and_empty_prediction_are_shown(tmp_path: Path) -> None:
    empty = example(predictions={"a": np.zeros((SIZE, SIZE), bool), "b": square(0, 0)}, ious={"b": 12.34})
    page = Page(write_report(tmp_path / "r.html", title="t", rows=rows(), examples=[empty]).read_text("utf-8"))
    assert "empty, IoU 0.0" in page.text
    assert "IoU 12.3" in page.text


def test_page_without_curves_and_examples_lists_the_environment(tmp_path: Path) -> None:
    html = write_report(tmp_path / "r.html", title="t", rows=rows()).read_text("utf-8")
    assert "Curves</h2>" not in html
    assert "Examples</h2>" not in html
    assert torch.__version__ in html


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (SIZE, SIZE), 128),
        torch.rand(3, SIZE, SIZE),
        torch.rand(3, SIZE, SIZE, dtype=torch.bfloat16),
        np.random.default_rng(0).random((SIZE, SIZE, 3)),
    ],
    ids=["pil", "chw", "bfloat16", "hwc"],
)
def test_overlay_accepts_pil_images_arrays_and_tensors(image: object, tmp_path: Path) -> None:
    path = save_overlay(image, torch.from_numpy(square(2, 2)).long(), tmp_path / "a" / "overlay.png", longest=96)
    assert Image.open(path).size == (96, 96)


def test_overlay_colours_only_the_mask(tmp_path: Path) -> None:
    grey = np.full((SIZE, SIZE, 3), 100, np.uint8)
    path = save_overlay(grey, square(8, 8), tmp_path / "overlay.png", colour=(255, 0, 0))
    drawn = np.asarray(Image.open(path)).astype(int)
    assert drawn.shape == (SIZE, SIZE, 3)
    assert np.array_equal(drawn[8, 8], (255, 0, 0))  # outline
    assert np.array_equal(drawn[7, 8], (255, 255, 255))  # halo
    assert drawn[12, 12, 0] > drawn[12, 12, 1] + 40  # fill
    assert len(set(drawn[0, 0])) == 1  # no tint elsewhere


def test_example_from_a_dataset_sample_undoes_the_normalisation() -> None:
    from fastkd.data._prepare import normalise

    sample = {"image": normalise(example().image), "mask": torch.from_numpy(square(4, 4)), "sentence": "red"}
    made = Example.from_sample(sample, {"s": square(4, 4)})
    assert np.abs(report_page.overlays.as_image(made.image).astype(int) - example().image).max() <= 1
    assert (made.sentence, made.truth is sample["mask"]) == ("red", True)


BAD_REPORTS = {
    "no rows": ({"rows": []}, "rows is empty"),
    "twice": ({"rows": [ResultRow("a"), ResultRow("a")]}, "more than once"),
    "baseline": ({"rows": [ResultRow("a", baseline="b")]}, "'b', which is not another row"),
    "truth shape": ({"examples": [example(truth=np.zeros((8, 8), bool))]}, r"examples\[0\].truth has shape \(8, 8\)"),
    "mask shape": ({"examples": [example(predictions={"s": np.zeros((3, 3))})]}, r"predictions\['s'\] has shape"),
    "logits": ({"examples": [example(predictions={"s": np.full((SIZE, SIZE), 0.4)})]}, "threshold or argmax"),
    "normalised": ({"examples": [example(image=torch.randn(3, SIZE, SIZE) * 3)]}, "undo the normalisation"),
    "nan": ({"examples": [example(image=torch.full((3, SIZE, SIZE), torch.nan))]}, "must lie in"),
    "grey": ({"examples": [example(image=np.zeros((SIZE, SIZE), np.uint8))]}, r"must be \(H, W, 3\)"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_REPORTS.values(), ids=BAD_REPORTS)
def test_bad_input_raises_and_keeps_the_old_report(arguments: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_report(path, title="t", **{"rows": rows()} | arguments)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    page = write_report("~/report.html", title="a", rows=[ResultRow("alone")], environment={})
    drawn = save_overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool), "~/overlay.png")
    assert (page, drawn) == (tmp_path / "home" / "report.html", tmp_path / "home" / "overlay.png")
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["overlay.png", "report.html"]


def test_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        self.open("wb").write(content[:10])
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path / "report.html", title="t", rows=rows())
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "old")]


def test_rejects_a_path_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_report(tmp_path, title="t", rows=rows())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResultRow("  "), "name must be a non-empty string"),
        (lambda: ResultRow("a", metrics={"mIoU": []}), "metric 'mIoU'"),
        (lambda: ResultRow("a", metrics={"mIoU": "52"}), "metric 'mIoU'"),
        (lambda: ResultRow("a", metrics={"mIoU": 101.0}), "percent"),
        (lambda: ResultRow("a", parameters=-1), "parameters"),
        (lambda: ResultRow("a", train_seconds=float("nan")), "train_seconds"),
        (lambda: CurveSeries("a", "loss", [], []), "steps is empty"),
        (lambda: CurveSeries("a", "loss", [1, 2], [1.0]), "values has 1 points, but steps has 2"),
        (lambda: CurveSeries("a", "loss", [1], [1.0], [1.0, 2.0]), "seconds has 2 points"),
        (lambda: CurveSeries("a", "loss", [1], [1.0], phase="test"), "phase"),  # type: ignore[arg-type]
        (lambda: example(ious={"nobody": 3.0}), "nobody"),
    ],
)
def test_rejects_bad_records(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("width", [60, 200])
def test_console_table_fits_and_shows_gains(width: int) -> None:
    from rich.console import Console

    out = io.StringIO()
    named = [*rows()[:2], ResultRow("[bold]x[/]", 1, {"mIoU": 50.0}, baseline="alone", note="[red]")]
    console_table(named, console=Console(file=out, width=width))
    shown = out.getvalue()
    assert "[bold]x[/]" in shown
    assert "[bold]x[/]: [red]" in shown
    assert "+14.0" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    with pytest.raises(ValueError, match="rows is empty"):
        console_table([])


LOG = """\
{"event": "start", "title": "distilled", "config": {}}
{"event": "train", "step": 20, "seconds": 2.0, "loss": 2.5, "task": 1.5, "terms": {"cross_modal": 4.0}, "lr": 0.1}
{"event": "eval", "step": 20, "seconds": 2.0, "metrics": {"oIoU": 11.0, "mIoU": 10.0}}
{"event": "train", "step": 40, "seconds": 4.0, "loss": 2.0, "task": 1.2, "terms": {"cross_modal": null}, "lr": 0.0}
{"event": "eval", "step": 40, "seconds": 4.5, "metrics": {"oIoU": 21.0, "mIoU": 20.0}}
{"event": "end", "step": 4"""


def test_curves_from_an_unfinished_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(LOG)
    series = {s.quantity: s for s in curves_from_log(tmp_path, metrics=["mIoU", "oIoU"])}
    assert set(series) == {"loss", "task", "cross_modal", "mIoU", "oIoU"}
    assert {s.run for s in series.values()} == {"distilled"}
    assert (series["mIoU"].steps, series["mIoU"].values) == ([20, 40], [10.0, 20.0])
    assert (series["mIoU"].seconds, series["mIoU"].phase) == ([2.0, 4.5], "validation")
    assert series["cross_modal"].values[0] == 4.0
    assert np.isnan(series["cross_modal"].values[1])
    assert series["loss"].phase == "train"
    assert curves_from_log(tmp_path / "log.jsonl", run="other")[0].run == "other"
    write_report(tmp_path / "r.html", title="t", rows=rows(), curves=list(series.values()))


def test_curves_from_the_log_of_the_trainer(tmp_path: Path) -> None:
    from fastkd.train.log import RunLog

    log = RunLog(tmp_path / "log.jsonl")
    log.write("start", title="alone")
    log.write("train", step=1, seconds=0.5, loss=float("nan"), task=2.0, terms={})
    log.write("train", step=2, seconds=0.9, loss=1.5, task=1.5, terms={})
    log.close()
    assert [(s.quantity, s.run) for s in curves_from_log(tmp_path)] == [("loss", "alone"), ("task", "alone")]


def test_rejects_logs_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no log at"):
        curves_from_log(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(LOG)
    with pytest.raises(ValueError, match=r"\['dice'\] are not in .*\['oIoU', 'mIoU'\]"):
        curves_from_log(log, metrics=["dice"])
    for text in ("not json\n{}\n", '{"event": "train", "loss": 1}\n{}\n', "[]\n[]\n"):
        log.write_text(text)
        with pytest.raises(ValueError, match=r"line 1 of .* is not a line of a fastkd training log"):
            curves_from_log(log)
    log.write_text('{"event": "start"}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        curves_from_log(log)


def test_import_is_lazy_and_error_names_the_missing_extra() -> None:
    code = (
        "import sys, fastkd.report as r\n"
        "assert not {'torch', 'numpy', 'PIL', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.modules['numpy'] = None\n"
        "try: r.write_report\n"
        "except ImportError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs the package 'numpy" in done.stdout
    assert "pip install 'fastkd[ris]'" in done.stdout
