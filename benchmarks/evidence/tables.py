"""Tables of experiments: scores of each row, and its gains over other rows with intervals over seeds and images."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastkd.cli._grid.records import best_scales, decode_images, decode_iou
from fastkd.evaluate import PairedDifference, paired_bootstrap

Records = Sequence[Mapping[str, Any]]

ALONE, PLAIN, METHOD = "alone", "logit_feature", "method"
ROWS = {
    "alone": "student alone",
    "logit": "+ logit",
    "feature": "+ feature (cosine)",
    "logit_feature": "+ logit + feature, the plain baseline",
    "cwd": "+ channel-wise distribution (CWD)",
    "pixel_relation": "+ pixel relation",
    "channel": "+ channel relation, per sample",
    "channel_batch": "+ channel relation, pooled over the batch",
    "channel_attended": "+ maps attended by channel, CKA",
    "cwd_guided": "+ CWD guided by the teacher's channel attention",
    "cwd_weighted": "+ CWD weighted by channel attention",
    "word_channel": "+ channel relation of what words see",
    "word_descriptor": "+ relations of words by what they see",
    "first_order": "+ cross-modal, first order",
    "second_order": "+ cross-modal, second order",
    "cross_modal": "+ cross-modal, both orders",
    "attention": "+ attention of words to each other",
    "first_order_guided": "+ first order + guided CWD",
    "method": "+ first order in the first half + CWD, the method",
    "method_logit": "the method + logit",
    "method_smaller_shares": "the method, a quarter of the shares",
    "method_constant": "+ first order throughout + CWD",
    "method_constant_less_first_order": "+ less first order throughout + CWD",
    "method_guided": "the method with guided CWD",
    "method_weighted": "the method with CWD weighted by channel attention",
    "method_channel": "the method + channel relation, per sample",
    "method_channel_batch": "the method + channel relation, pooled over the batch",
    "method_channel_attended": "the method + maps attended by channel, CKA",
    "method_word_channel": "the method + channel relation of what words see",
    "method_word_descriptor": "the method + relations of words by what they see",
    "method_int8": "the method, trained for int8",
    "method_constant_guided": "first order throughout + guided CWD, equal shares",
    "method_constant_weighted": "first order throughout + CWD weighted by channel attention",
    "method_constant_channel": "first order throughout + CWD + channel relation, per sample",
    "method_constant_channel_batch": "first order throughout + CWD + channel relation, pooled over the batch",
    "method_constant_channel_attended": "first order throughout + CWD + maps attended by channel, CKA",
    "method_constant_word_channel": "first order throughout + CWD + channel relation of what words see",
    "method_constant_word_descriptor": "first order throughout + CWD + relations of words by what they see",
}
"""Row name to its description, in the order of the tables; other rows follow."""


@dataclass(frozen=True)
class Sample:
    """The scores of one row under one setting: a record by seed and split."""

    row: str
    by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]]

    def seeds(self, splits: Iterable[str]) -> list[int]:
        """Return the seeds with results on all of these splits."""
        return sorted(seed for seed, found in self.by_seed.items() if set(splits) <= set(found))

    def values(self, name: str, splits: Sequence[str]) -> list[float]:
        """Return a score by seed, averaged over the sentences of the splits (oIoU: over the splits)."""
        return [
            float(np.average([self.by_seed[s][p][name] for p in splits], weights=self._weights(name, s, splits)))
            for s in self.seeds(splits)
        ]

    def _weights(self, name: str, seed: int, splits: Sequence[str]) -> list[int]:
        return [1 if name == "oiou" else self.by_seed[seed][split]["sentences"] for split in splits]

    def iou(self, seeds: Sequence[int], splits: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return IoU in percent, (seeds, sentences of the splits)."""
        return np.array([np.concatenate([_decoded(self.by_seed[s][p]["iou"]) for p in splits]) for s in seeds])

    def images(self, seeds: Sequence[int], splits: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the number of the image of every sentence of the splits, (sentences,); splits share no image.

        Raises:
            ValueError: results of a split that are not of the same sentences.
        """
        parts: list[npt.NDArray[np.int64]] = []
        for split in splits:
            held = {self.by_seed[seed][split]["images"] for seed in seeds}
            if len(held) > 1:
                raise ValueError(f"results of row {self.row!r} on {split} are of different sets: run them again")
            numbers = decode_images(held.pop())
            parts.append(numbers + (parts[-1].max() + 1 if parts else 0))
        return np.concatenate(parts)


@functools.cache
def _decoded(text: str) -> npt.NDArray[np.float64]:
    return 100 * decode_iou(text)


def select(records: Records, setting: str, equal: str) -> dict[str, Sample]:
    """Return the rows of a setting with equal "time" or "steps", in the order of `ROWS`.

    A row that took the reference's steps anyway, as the reference itself, counts for both. The student of the setting
    is the one with most results.
    """
    of_setting = [r for r in records if r["setting"] == setting]
    timed = [r for r in of_setting if r["equal_time"]]
    if equal == "time":
        chosen = timed
    else:
        chosen = [r for r in of_setting if not r["equal_time"]]
        steps = {r["steps"] for r in chosen}
        held = {r["row"] for r in chosen}
        chosen += [r for r in timed if r["relative_cost"] == 1 and {r["steps"]} == steps and r["row"] not in held]
    found: dict[str, dict[int, dict[str, Mapping[str, Any]]]] = {}
    for record in chosen:
        found.setdefault(record["row"], {}).setdefault(record["seed"], {})[record["split"]] = record
    return {row: Sample(row, found[row]) for row in sorted(found, key=_place)}


def _place(row: str) -> tuple[int, str]:
    names = list(ROWS)
    return (names.index(row) if row in names else len(names), row)


def gain(row: Sample, over: Sample, splits: Sequence[str], resamples: int = 10_000) -> PairedDifference | None:
    """Return a row's gain in mIoU over another on the seeds that both have; None without a common seed."""
    seeds = sorted({*row.seeds(splits)} & {*over.seeds(splits)})
    if not seeds:
        return None
    images = row.images(seeds, splits)
    if not np.array_equal(images, over.images(seeds, splits)):
        raise ValueError(f"results of rows {row.row!r} and {over.row!r} are of different sets: run them again")
    return paired_bootstrap(row.iou(seeds, splits), over.iou(seeds, splits), groups=images, resamples=resamples)


def scores_table(rows: Mapping[str, Sample], splits: Sequence[str], resamples: int = 10_000) -> str:
    """Return the table of a setting on some splits together."""
    header = ["row", "steps", "CPU s", "seeds", "mIoU (sd)", "gain over alone", "gain over logit + feature"]
    header += [*(["gain of the method over it"] if METHOD in rows else []), "oIoU", "P@0.5", "P@0.7", "P@0.9"]
    lines = [_line(header), _line(["---"] * len(header))]
    for name, sample in rows.items():
        seeds = sample.seeds(splits)
        if not seeds:
            continue
        miou = sample.values("miou", splits)
        first = [sample.by_seed[seed][splits[0]] for seed in seeds]
        cells = [ROWS.get(name, f"`{name}`"), _mean(r["steps"] for r in first), _mean(r["seconds"] for r in first)]
        cells += [str(len(seeds)), f"{statistics.fmean(miou):.1f}{_spread(miou)}"]
        pairs = [(name, ALONE), (name, PLAIN), *([(METHOD, name)] if METHOD in rows else [])]
        for one, other in pairs:
            compared = other in rows and one != other
            difference = gain(rows[one], rows[other], splits, resamples) if compared else None
            cells.append("" if difference is None else interval(difference))
        cells += [f"{statistics.fmean(sample.values(score, splits)):.1f}" for score in ("oiou", "p50", "p70", "p90")]
        lines.append(_line(cells))
    return "\n".join(lines)


def base_of(row: str, rows: Iterable[str]) -> str | None:
    """Return the row that this one is a variant of: the longest whose name, followed by "_", begins its name."""
    return max((name for name in rows if row.startswith(f"{name}_")), key=len, default=None)


def variants_table(rows: Mapping[str, Sample], splits: Sequence[str], resamples: int = 10_000) -> str:
    """Return the table of a setting whose rows are losses and their variants, such as "cwd" and "cwd_temperature_1"."""
    header = ["row", "variant", "steps", "seeds", "mIoU (sd)", "gain over the row"]
    lines = [_line(header), _line(["---"] * len(header))]
    for name in sorted(rows, key=lambda name: _place_of_variant(name, rows)):
        sample, base = rows[name], base_of(name, rows)
        seeds = sample.seeds(splits)
        if not seeds:
            continue
        miou = sample.values("miou", splits)
        difference = None if base is None else gain(sample, rows[base], splits, resamples)
        steps = _mean(sample.by_seed[seed][splits[0]]["steps"] for seed in seeds)
        described = ROWS.get(base or name, f"`{base or name}`")
        variant = "" if base is None else name.removeprefix(f"{base}_").replace("_", " ")
        cells = [described, variant, steps, str(len(seeds)), f"{statistics.fmean(miou):.1f}{_spread(miou)}"]
        lines.append(_line([*cells, "" if difference is None else interval(difference)]))
    return "\n".join(lines)


def _place_of_variant(row: str, rows: Iterable[str]) -> tuple[tuple[int, str], str]:
    return _place(base_of(row, rows) or row), row


def interval(difference: PairedDifference) -> str:
    """Return a difference as text; in bold if its interval excludes 0."""
    text = f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]".replace("-", "−")
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.fmean(values):.0f}"


def _spread(values: Sequence[float]) -> str:
    return f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""


def tuning_table(records: Records, setting: str) -> str:
    """Return mIoU on val by row and scale, the best one of a row with several in bold."""
    chosen = [r for r in records if r["setting"] == setting and r["split"] == "val"]
    scales = sorted({r["scale"] for r in chosen})
    best = best_scales(chosen, f"setting {setting!r}")
    header = ["row", *[f"× {scale:g}" for scale in scales]]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in sorted(best, key=_place):
        found = {scale: [r["miou"] for r in chosen if (r["row"], r["scale"]) == (row, scale)] for scale in scales}
        texts = {scale: f"{statistics.fmean(values):.1f}" if values else "" for scale, values in found.items()}
        if sum(map(bool, texts.values())) > 1:
            texts[best[row]] = f"**{texts[best[row]]}**"
        lines.append(_line([ROWS.get(row, f"`{row}`"), *texts.values()]))
    return "\n".join(lines)


def conditions(records: Records) -> str:
    """Return where the runs of a table were made, as a sentence."""
    names = {
        name: sorted({str(r[name]) for r in records})
        for name in ("processor", "torch", "student", "parameters", "commit")
    }
    students = ", ".join(names["student"])
    return (
        f"Student: {students}, {', '.join(f'{int(p):,}' for p in names['parameters'])} parameters in every row. "
        f"Processor: {', '.join(names['processor'])}; torch {', '.join(names['torch'])}; one thread; "
        f"commit {', '.join(names['commit'])}."
    )


def latency(found: Mapping[str, Any]) -> str:
    """Return the inference time of every student, which is one network, and of the teacher, as a sentence."""
    in_torch = {name: time for name, time in found["milliseconds"].items() if name.endswith(" torch")}
    teacher = in_torch.pop("teacher torch")
    (student,) = in_torch.values()
    return (
        f"At inference the student of every row is the same network: {student:.1f} ms for one image and sentence, the "
        f"teacher {teacher:.1f} ms (plain torch, one thread, {found['processor']})."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def deployment_table(found: Mapping[str, Any]) -> str:
    """Return sizes, scores and times of exported networks, from the file of `benchmarks.evidence.deployment`."""
    header = ["network", "dtype", "MB", "seeds", "mIoU", "change from fp32", "IoU of masks with fp32", "ms"]
    lines = [_line(header), _line(["---"] * len(header))]
    scores: Records = found["scores"]
    for row in dict.fromkeys(one["row"] for one in scores):
        miou = {(one["seed"], one["dtype"]): one["miou"] for one in scores if one["row"] == row}
        for dtype in dict.fromkeys(one["dtype"] for one in scores if one["row"] == row):
            chosen = [one for one in scores if one["row"] == row and one["dtype"] == dtype]
            change = statistics.fmean(one["miou"] - miou[one["seed"], "fp32"] for one in chosen)
            same = [one["mask_iou_with_fp32"] for one in chosen if one["mask_iou_with_fp32"] is not None]
            milliseconds = found["milliseconds"].get(f"{row} {dtype}")
            cells = [ROWS.get(row, row), dtype, f"{chosen[0]['bytes'] / 1e6:.2f}", str(len(chosen))]
            cells += [f"{statistics.fmean(one['miou'] for one in chosen):.2f}"]
            cells += ["" if dtype == "fp32" else f"{change:+.2f}".replace("-", "−")]
            cells += [f"{statistics.fmean(same):.3f}" if same else ""]
            cells += ["" if milliseconds is None else f"{milliseconds:.2f}"]
            lines.append(_line(cells))
    return "\n".join(lines)
