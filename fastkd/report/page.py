"""`write_report`: the HTML page, section by section."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastkd._atomic import replace_files
from fastkd.report import overlays, text
from fastkd.report.compared import ChannelRelations, WordAttention, attention_html, relations_html
from fastkd.report.curves import SMOOTH_FROM, charts
from fastkd.report.environment import describe
from fastkd.report.records import CurveSeries, Example, ResultRow, baseline_of, check_rows, gain, summary
from fastkd.report.scores import SampleIoU, interval_table, score_charts
from fastkd.report.style import PAGE, STYLE
from fastkd.report.svg import Chart, Style, styles

HOW_TO_READ = (
    (
        "Table",
        "All metrics are percentages, higher is better: oIoU is the summed intersection over the summed union of all "
        "samples, mIoU the mean of the samples' IoU, P@X the share of samples whose IoU reaches X.",
    ),
    (
        "Samples",
        "Intervals cover 95 % of the resamples of a bootstrap over images and, if there are several, seeds; gains are "
        "paired, sample by sample.",
    ),
    (
        "Curves",
        "A step of distillation takes longer than a step of training alone, so validation is drawn over steps and over "
        "wall-clock seconds of training.",
    ),
    (
        "Pictures",
        "Predicted masks have a white outline: pixels of the object that were found are green, missed ones blue, and "
        "those outside of the object orange; the IoU stands below. A medium IoU is usually the right object with a "
        "rough outline, an IoU near 0 the wrong object.",
    ),
)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    rows: Sequence[ResultRow],
    curves: Sequence[CurveSeries] = (),
    scores: Sequence[SampleIoU] = (),
    examples: Sequence[Example] = (),
    attention: Sequence[WordAttention] = (),
    relations: ChannelRelations | None = None,
    notes: str | Sequence[str] | None = None,
    environment: Mapping[str, object] | None = None,
) -> Path:
    """Write results as one self-contained HTML page: no network, no script, light and dark, printable.

    Args:
        path: file to write; its folder is created if missing. An existing file is replaced once the page is complete.
        title: heading of the page.
        rows: rows of the results table; those with a ``baseline`` show their gains.
        curves: training and validation curves, for example from `curves_from_log`; no section if empty.
        scores: IoU of every sample and intervals, per model; no section if empty.
        examples: images with truth and predictions; no section if empty.
        attention: samples with the networks' attention to each word; not shown if empty.
        relations: matrices of channel similarities; not shown if None.
        notes: paragraphs under the heading, one string or several.
        environment: facts to list (``{"CPU": "..."}``); default: versions, processor and threads of this process.

    Returns:
        The path written.

    Raises:
        ValueError: no rows, repeated names in rows or scores, an unknown baseline, a mask whose size differs from its
            image's.
        IsADirectoryError: ``path`` is a folder.

    Example:
        >>> rows = [ResultRow("alone", 315_000, {"mIoU": 34.1}),
        ...         ResultRow("distilled", 315_000, {"mIoU": 52.9}, baseline="alone")]
        >>> write_report("report.html", title="Shapes", rows=rows)
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"path: {path} is a folder: pass the name of a file, such as {path / 'report.html'}")
    facts = describe() if environment is None else environment
    names = [score.name for score in scores]
    if len(set(names)) != len(names):
        raise ValueError(f"scores: the names {names} are not unique; give each SampleIoU another one")
    style = styles([series.run for series in curves] + names)
    body = "\n".join(
        (
            _heading(title, notes),
            _results(rows),
            _how_to_read(bool(scores)),
            _scores(scores, style),
            _curves(curves, style),
            _examples(examples),
            _compared(attention, relations),
            _environment(facts),
        )
    )
    page = PAGE.substitute(title=escape(title), style=STYLE, body=body)
    with replace_files(path) as (partial,):
        partial.write_bytes(page.encode())
    return path


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"


def _heading(title: str, notes: str | Sequence[str] | None) -> str:
    paragraphs = [notes] if isinstance(notes, str) else list(notes or ())
    moment = datetime.now().astimezone()
    date = (
        f'<p class="date"><time datetime="{moment.isoformat(timespec="seconds")}">{moment:%d %B %Y, %H:%M}</time></p>'
    )
    return "\n".join(
        [f"<header>\n<h1>{escape(title)}</h1>", date, *(f"<p>{escape(p)}</p>" for p in paragraphs), "</header>"]
    )


def _results(rows: Sequence[ResultRow]) -> str:
    metrics = check_rows(rows)
    timed, stepped = any(r.train_seconds is not None for r in rows), any(r.steps is not None for r in rows)
    measured = any(r.latency is not None for r in rows)
    header = ["Model", "Parameters", *(["Latency"] if measured else []), *metrics]
    header += [*(["Steps"] if stepped else []), *(["Training"] if timed else [])]
    lines = []
    for row in rows:
        note = f'<span class="note">{escape(row.note)}</span>' if row.note else ""
        latency = [text.milliseconds(row.latency)] if measured else []
        cells = [text.count(row.parameters), *latency, *(_metric(row, metric, rows) for metric in metrics)]
        if stepped:
            cells.append(f"{row.steps:,}" if row.steps is not None else "–")
        if timed:
            cells.append(text.duration(row.train_seconds))
        lines.append(
            f'<tr><th scope="row">{escape(row.name)}{note}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results table">\n<table>\n'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>"
    )
    return _section("Results", table + _table_caption(rows))


def _metric(row: ResultRow, metric: str, rows: Sequence[ResultRow]) -> str:
    if metric not in row.metrics:
        return "–"
    mean, spread = summary(row.metrics[metric])
    cell = text.number(mean) + (f'<span class="spread"> ± {text.number(spread)}</span>' if spread is not None else "")
    baseline = baseline_of(row, rows)
    if baseline is None or metric not in baseline.metrics:
        return cell
    difference, spread = gain(row.metrics[metric], baseline.metrics[metric])
    direction = "up" if difference > 0 else "down" if difference < 0 else ""
    deviation = f" ± {text.number(spread)}" if spread is not None else ""
    return f'{cell}<span class="gain {direction}">{text.signed(difference)}{deviation}</span>'


def _table_caption(rows: Sequence[ResultRow]) -> str:
    sentences = []
    for name in dict.fromkeys(row.baseline for row in rows if row.baseline):
        compared = " and ".join(row.name for row in rows if row.baseline == name)
        sentences.append(f"Coloured: gain of {compared} over {name}, in points.")
    if any(summary(value)[1] is not None for row in rows for value in row.metrics.values()):
        sentences.append("± is the standard deviation over seeds; for a gain, that of the paired differences.")
    if any(row.latency is not None for row in rows):
        sentences.append("Latency: one image and sentence on this machine.")
    return f'\n<p class="caption">{escape(" ".join(sentences))}</p>' if sentences else ""


def _how_to_read(samples: bool) -> str:
    shown = [(term, meaning) for term, meaning in HOW_TO_READ if samples or term != "Samples"]
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>\n" for term, meaning in shown)
    return _section("How to read this", f"<dl>\n{terms}</dl>")


def _scores(scores: Sequence[SampleIoU], style: Mapping[str, Style]) -> str:
    if not scores:
        return ""
    drawn = _figures(score_charts(scores, style), wide=False)
    return _section("Samples", f"{interval_table(scores)}\n{_legend([s.name for s in scores], style)}\n{drawn}")


def _legend(runs: Iterable[str], styles: Mapping[str, Style]) -> str:
    swatches = []
    for run in dict.fromkeys(runs):
        style = styles[run]
        dashes = f' stroke-dasharray="{" ".join(str(d * 1.7) for d in style.dashes)}"' if style.dashes else ""
        line = f'<line x1="0" y1="5" x2="32" y2="5" stroke="{style.css}" stroke-width="2.5"{dashes}/>'
        swatches.append(f'<li><svg viewBox="0 0 32 10" aria-hidden="true">{line}</svg>{escape(run)}</li>')
    return '<ul class="legend" aria-label="Runs">' + "".join(swatches) + "</ul>"


def _figures(charts: Sequence[Chart], *, wide: bool) -> str:
    figures = "\n".join(
        f'<figure class="chart"><figcaption>{escape(chart.heading)}</figcaption>{chart.svg}</figure>'
        for chart in charts
    )
    return f'<div class="charts{" wide" if wide else ""}">\n{figures}\n</div>'


def _curves(curves: Sequence[CurveSeries], style: Mapping[str, Style]) -> str:
    if not curves:
        return ""
    parts = [_legend((series.run for series in curves), style)]
    for phase, heading in (("validation", "Validation"), ("train", "Training losses")):
        drawn = charts(curves, phase, style)
        if drawn:
            parts.append(f"<h3>{heading}</h3>\n{_figures(drawn, wide=phase == 'validation')}")
    if any(series.phase == "train" and len(series.steps) >= SMOOTH_FROM for series in curves):
        parts.append('<p class="caption">Training: moving mean over a thirtieth of the run; single steps are pale.</p>')
    return _section("Curves", "\n".join(parts))


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    parts, group = [], ""
    for index, example in enumerate(examples):
        if example.group and example.group != group:
            parts.append(f"<h3>{escape(example.group)}</h3>")
        group = example.group
        parts.append(_example(example, index))
    key = "".join(
        f'<li><span class="key {kind}"></span>{meaning}</li>'
        for kind, meaning in (("truth", "true mask, or missed"), ("hit", "hit"), ("false", "false"))
    )
    return _section("Examples", f'<ul class="legend" aria-label="Colours">{key}</ul>\n' + "\n".join(parts))


def _example(example: Example, index: int) -> str:
    where = f"examples[{index}]"
    image = overlays.as_image(example.image, f"{where}.image")
    size = image.shape[:2]
    truth = overlays.as_mask(example.truth, size, f"{where}.truth")
    panels = [
        panel(overlays.overlay(image, longest=overlays.PANEL), "Image", "The image"),
        panel(overlays.overlay(image, truth, overlays.TRUTH, overlays.PANEL), "Truth", "The true mask", key="truth"),
    ]
    for name, prediction in example.predictions.items():
        mask = overlays.as_mask(prediction, size, f"{where}.predictions[{name!r}]")
        score = (example.ious or {}).get(name, overlays.iou(mask, truth))
        drawn = overlays.errors_overlay(image, mask, truth, overlays.PANEL)
        alt = f"The mask predicted by {name}, IoU {text.number(score)} %" + ("" if mask.any() else ", empty")
        panels.append(panel(drawn, name, alt, score=score, empty=not mask.any()))
    caption = f"<figcaption>{escape(example.sentence)}</figcaption>"
    return f'<figure class="example">{caption}\n<div class="panels">\n' + "\n".join(panels) + "\n</div></figure>"


def panel(
    picture: np.ndarray, name: str, alt: str, key: str = "", score: float | None = None, empty: bool = False
) -> str:
    """Return a captioned picture; ``score`` is its IoU."""
    height, width = picture.shape[:2]
    swatch = f'<span class="key {key}"></span>' if key else ""
    iou = "" if score is None else f' <span class="iou">{"empty, " if empty else ""}IoU {text.number(score)}</span>'
    return (
        f'<div class="panel"><img src="{overlays.data_uri(picture)}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}">{swatch}{escape(name)}{iou}</div>'
    )


def answer_page(
    image: Any, sentence: str, found: Mapping[str, tuple[Any, float]], attention: Sequence[WordAttention] = ()
) -> str:
    """Return a page with the masks that models predict for one sentence, without the true mask.

    Args:
        image: as in `Example`.
        sentence: the referring expression.
        found: model name to its mask (H, W) and score in [0, 1].
        attention: the models' attention to each word.

    Raises:
        ValueError: a mask whose size differs from the image's.
    """
    pixels = overlays.as_image(image)
    panels = [panel(overlays.overlay(pixels, longest=overlays.PANEL), "Image", "The image")]
    for name, (given, score) in found.items():
        mask = overlays.as_mask(given, pixels.shape[:2], f"mask of {name!r}")
        drawn = overlays.overlay(pixels, mask, overlays.PREDICTION, overlays.PANEL)
        caption = f"{name}: {f'score {score:.2f}' if mask.any() else 'found nothing'}"
        panels.append(panel(drawn, caption, f"The mask predicted by {name}"))
    body = (
        f'<figure class="example"><figcaption>{escape(sentence)}</figcaption>\n<div class="panels">\n'
        + "\n".join(panels)
        + "\n</div></figure>"
    )
    if attention:
        body += "\n<h3>Attention to each word</h3>"
        body += "".join(f"\n{attention_html(shown, index)}" for index, shown in enumerate(attention))
    return PAGE.substitute(title=escape(sentence), style=STYLE, body=body)


def _compared(attention: Sequence[WordAttention], relations: ChannelRelations | None) -> str:
    parts = []
    if attention:
        parts.append(
            "<h3>Attention to each word</h3>\n<p>Yellow: pixels that attend to the word, in one scale per word."
        )
        parts[-1] += " Below the word stand the ends of the scale: the share of a pixel's attention.</p>"
        parts += [attention_html(shown, index) for index, shown in enumerate(attention)]
    if relations is not None:
        parts.append(
            "<h3>Relations of channels</h3>\n<p>Cosine between each two channels: orange is 1, white 0, blue −1. "
            f"Channels are sorted alike in all matrices of one size.</p>\n{relations_html(relations)}"
        )
    return _section("What the losses compare", "\n".join(parts)) if parts else ""


def _environment(facts: Mapping[str, object]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>\n'
        for name, value in facts.items()
    )
    return _section("Environment", f'<table class="facts">\n<tbody>\n{lines}</tbody>\n</table>') if facts else ""
