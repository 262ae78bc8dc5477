"""Tables of the study of bias."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.evidence.bias.measure import (
    ALONE,
    BIASED,
    BIASES,
    CONTROL,
    TEACHER,
    Comparison,
    Key,
    Scores,
    at_equal_gain,
    gain,
    mean_bias,
)
from benchmarks.evidence.tables import ROWS, interval
from fastkd.evaluate import PairedDifference

BASE_SHARE = 0.5  # of the task's gradient norm, of every term at factor 1
RIVAL = "pixel_relation"
Found = Mapping[Key, Scores]


def models_table(found: Found) -> str:
    """Return the biases of both teachers and of the student alone."""
    named = {
        "teacher trained on biased masks and words": found[BIASED, TEACHER, 1.0],
        "control teacher": found[CONTROL, TEACHER, 1.0],
        "student alone": found[BIASED, ALONE, 1.0],
    }
    lines = ["| model | mIoU untouched | colours | left | blind |", "| --- | --- | --- | --- | --- |"]
    for name, scores in named.items():
        bias = mean_bias(scores)
        miou = scores.iou("untouched", sorted(scores.seeds())).mean()
        lines.append(f"| {name} | {miou:.1f} | {bias['colours']:.1f} % | {bias['left']:.1f} % | {bias['blind']:.1f} |")
    return "\n".join(lines)


def comparison(found: Found, row: str, scale: float, *, with_control: bool) -> Comparison | None:
    """Return the comparison of a row with its control, or with the student alone; None without results."""
    students = found.get((BIASED, row, scale))
    reference = found.get((CONTROL, row, scale) if with_control else (BIASED, ALONE, 1.0))
    if students is None or reference is None:
        return None
    nothing = found[CONTROL, TEACHER, 1.0] if with_control else reference
    compared = Comparison(students, reference, mean_bias(found[BIASED, TEACHER, 1.0]), mean_bias(nothing))
    return compared if compared.seeds() else None


def points_of(found: Found) -> list[tuple[str, float]]:
    """Return the distilled rows and factors with results, in the order of the tables."""
    keys = {(row, scale) for setting, row, scale in found if setting == BIASED and row not in (TEACHER, ALONE)}
    names = list(ROWS)
    return sorted(keys, key=lambda key: (names.index(key[0]), key[1]))


def shares_table(found: Found, resamples: int = 10_000) -> str:
    """Return gains and shares of bias handed on, by row and factor."""
    head = ["row", "gradient share", "seeds", "gain, untouched", "colours", "left", "blind"]
    head += ["mean of the three", "mean, against alone"]
    lines = [head, ["---"] * len(head)]
    for row, scale in points_of(found):
        students = found[BIASED, row, scale]
        gained = gain(students, found[BIASED, ALONE, 1.0], resamples)
        controlled = comparison(found, row, scale, with_control=True)
        plain = comparison(found, row, scale, with_control=False)
        cells = [ROWS[row], f"{BASE_SHARE * scale:g}", str(len(students.seeds())), _text(gained)]
        for biases in (*((name,) for name in BIASES), BIASES):
            cells.append(_text(controlled.handed_on(biases, resamples) if controlled else None))
        cells.append(_text(plain.handed_on(resamples=resamples) if plain else None))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def matched_table(found: Found, resamples: int = 10_000) -> str:
    """Return how much less bias each row hands on than pixel relation where both gain the same."""
    lines = ["| row | seeds | at a gain of | share − that of pixel relation |", "| --- | --- | --- | --- |"]
    for row in dict.fromkeys(row for row, _ in points_of(found)):
        if row == RIVAL:
            continue
        parts = {
            name: [
                found_here
                for at, scale in points_of(found)
                if at == name and (found_here := comparison(found, name, scale, with_control=True))
            ]
            for name in (row, RIVAL)
        }
        if any(len(each) < 2 for each in parts.values()):
            continue
        alone = found[BIASED, ALONE, 1.0]
        common = sorted(alone.seeds().intersection(*({*one.seeds()} for each in parts.values() for one in each)))
        if not common:
            continue
        base = alone.iou("untouched", common)
        curves = [
            [(one.students.iou("untouched", common) - base, one.shares(BIASES, common)) for one in each]
            for each in parts.values()
        ]
        matched = at_equal_gain(curves[0], curves[1], resamples)
        cells = (
            ("no common gain", "") if matched is None else (f"{matched[0]:+.1f}".replace("-", "−"), _text(matched[1]))
        )
        lines.append(f"| {ROWS[row]} | {len(common)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _text(difference: PairedDifference | None) -> str:
    """Return a difference as text, never in bold with one seed, whose interval says nothing about other runs."""
    if difference is None:
        return ""
    return interval(difference).replace("*", "" if difference.seeds == 1 else "*")
