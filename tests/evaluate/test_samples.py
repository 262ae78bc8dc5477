"""Scores of samples in files, and comparisons of two evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="needs the [ris] extra")

from fastkd.evaluate import EvalResult, SampleScores, compare, paired_bootstrap, read_samples, write_samples


def result(seed: int = 0, n: int = 12, protocol: str = "lavt", **changes: Any) -> EvalResult:
    """Return an evaluation with random scores; target pixels and sentences do not depend on the seed."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        inside, predicted = (int(value) for value in rng.integers(1, 50, 2))
        sample = {"ref_id": i // 2, "sent_id": 10 + i, "image_id": i // 5, "sentence": f"größer {i}"}
        sample |= {"intersection": inside, "union": 50 + predicted, "target_pixels": 50}
        sample |= {"predicted_pixels": inside + predicted}
        if protocol == "gres":
            sample |= {"no_target": i % 3 == 0, "predicted_no_target": bool(rng.random() < 0.5)}
        samples.append({**sample, "iou": inside / (50 + predicted)})
    conditions = {"dataset": "toy", "split": "val", "sentences": n, "refs": n // 2, "resolution": (9, 9)}
    conditions |= {"decision": "argmax", "threshold": "IoU >= X", "precision": "fp32", "seconds": 0.0}
    iou = torch.tensor([sample["iou"] for sample in samples], dtype=torch.float64)
    return EvalResult({}, protocol, **{**conditions, **changes}, sample_iou=iou, samples=samples)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("changes", [{}, {"split_by": "umd", "mask_rule": "lavt", "resolution": None}])
@pytest.mark.parametrize("protocol", ["lavt", "gres"])
def test_a_file_holds_what_was_written(tmp_path: Path, suffix: str, changes: dict[str, Any], protocol: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the [stream] extra")
    ours = result(protocol=protocol, **changes)
    write_samples(ours, tmp_path / f"a.{suffix}")
    read = read_samples(tmp_path / f"a.{suffix}")
    assert read.conditions == ours.conditions
    assert list(read.samples.values()) == list(ours.samples)
    assert list(read.samples) == [(str(s["ref_id"]), str(s["sent_id"])) for s in ours.samples]


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_samples(result(), "~/a.jsonl")
    assert len(read_samples("~/a.jsonl").samples) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_ids_may_be_strings_or_numpy_numbers_or_missing(tmp_path: Path) -> None:
    ours = result()
    for i, sample in enumerate(ours.samples):
        sample["ref_id"] = f"cup {i}" if i else np.int64(3)
    for suffix in ("jsonl", "parquet"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow", reason="needs the [stream] extra")
        write_samples(ours, tmp_path / f"a.{suffix}")
        assert list(read_samples(tmp_path / f"a.{suffix}").samples)[:2] == [("3", "10"), ("cup 1", "11")]
    for sample in ours.samples:
        del sample["ref_id"]
    write_samples(ours, tmp_path / "a.jsonl")
    assert compare(ours, read_samples(tmp_path / "a.jsonl"), resamples=5).oiou == 0


def test_differences_are_those_of_the_paired_bootstrap(tmp_path: Path) -> None:
    ours, theirs = result(0), result(1)
    theirs.samples = list(reversed(theirs.samples))  # matched by id, not by position
    write_samples(theirs, tmp_path / "b.jsonl")
    found = compare(ours, read_samples(tmp_path / "b.jsonl"), resamples=99, confidence=0.9, seed=3)
    a = np.array([sample["iou"] for sample in ours.samples])
    b = np.array([sample["iou"] for sample in reversed(theirs.samples)])
    options = {"resamples": 99, "confidence": 0.9, "seed": 3}
    for name, difference in (("mIoU", 100 * a - 100 * b), ("P@0.5", 100.0 * (a >= 0.5) - 100.0 * (b >= 0.5))):
        mean = sum(difference) / 12
        images = [difference[:5], difference[5:10], difference[10:]]
        drawn = [mean + 3 / 12 * sum(value - mean for value in image) for image in images]
        expected = paired_bootstrap(drawn, [0.0] * 3, **options)
        assert found.differences[name].mean == pytest.approx(mean)
        assert (found.differences[name].low, found.differences[name].high) == pytest.approx(
            (expected.low, expected.high)
        )
    overall = [sum(s["intersection"] for s in r.samples) / sum(s["union"] for s in r.samples) for r in (ours, theirs)]
    assert found.oiou == pytest.approx(100 * (overall[0] - overall[1]))
    assert json.loads(json.dumps(found.to_dict()))["differences"]["mIoU"]["samples"] == 3
    assert "12 paired sentences, 90 % intervals of a paired bootstrap over 3 images:" in str(found)
    assert f"mIoU   {found.differences['mIoU']}" in str(found)


@pytest.mark.parametrize(("lacks", "unit", "units"), [((), "images", 3), (("image_id",), "refs", 6)])
def test_unit_of_the_bootstrap(lacks: tuple[str, ...], unit: str, units: int) -> None:
    ours, theirs = result(0), result(1)
    for sample in (*ours.samples, *theirs.samples):
        for name in lacks:
            del sample[name]
    found = compare(ours, theirs, resamples=9)
    assert (found.unit, found.differences["mIoU"].samples, found.sentences) == (unit, units, 12)


def test_samples_without_ids_are_units() -> None:
    ours, theirs = result(0), result(1)
    for sample in (*ours.samples, *theirs.samples):
        for name in ("image_id", "ref_id", "sent_id"):
            del sample[name]
    found = compare(ours, theirs, resamples=99)
    iou = [[100 * sample["iou"] for sample in each.samples] for each in (ours, theirs)]
    expected = paired_bootstrap(*iou, resamples=99)
    assert found.unit == "sentences"
    got = found.differences["mIoU"]
    assert (got.mean, got.low, got.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_intervals_are_wider_where_the_sentences_of_an_image_agree() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = result(0, n=400), result(0, n=400)
    for i, sample in enumerate(ours.samples):  # the difference depends on the image alone
        sample["image_id"] = i // 8
        sample["iou"] = 0.5 + 0.1 * rng.normal() if i % 8 == 0 else ours.samples[i - 1]["iou"]
    for sample in theirs.samples:
        sample["iou"] = 0.5
    found = compare(ours, theirs, resamples=2000).differences["mIoU"]
    values = np.array([100 * sample["iou"] for sample in ours.samples[::8]])
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.1)


def test_gres_compares_samples_with_and_without_a_target() -> None:
    ours, theirs = result(0, protocol="gres"), result(1, protocol="gres")
    found = compare(ours, theirs, resamples=9).differences
    targeted = [(a, b) for a, b in zip(ours.samples, theirs.samples, strict=True) if not a["no_target"]]
    assert (found["P@0.5"].samples, found["N-acc"].samples, found["T-acc"].samples) == (3, 2, 3)
    right = [[not sample["predicted_no_target"] for sample in pair] for pair in targeted]
    assert found["T-acc"].mean == pytest.approx(100 * (np.mean(right, 0)[0] - np.mean(right, 0)[1]))
    assert found["P@0.5"].mean == pytest.approx(
        100 * np.mean([(a["iou"] >= 0.5) - float(b["iou"] >= 0.5) for a, b in targeted])
    )


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("dataset", "cups"),
        ("split_by", "google"),
        ("split", "testA"),
        ("resolution", (8, 8)),
        ("threshold", "IoU > X"),
        ("mask_rule", "lavt"),
    ],
)
def test_other_conditions_are_refused(name: str, other: Any) -> None:
    theirs = SampleScores.of(result(**{name: other}))
    value = repr("8x8" if name == "resolution" else other)
    with pytest.raises(
        ValueError, match=f"this evaluation has {name} {value}, but this evaluation .*same set and split"
    ):
        compare(result(), theirs)


def test_another_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="has protocol 'gres', but this evaluation 'lavt'"):
        compare(result(), result(protocol="gres"))


def changed(key: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda samples: samples[4].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: samples.pop(), "other lacks 1 of the 12 samples of this evaluation: ref 5, sentence 21"),
        (lambda samples: samples.append({**samples[0], "sent_id": 99}), "this evaluation lacks 1 of the 13 samples of"),
        (
            changed("sentence", "cup"),
            "ref 2, sentence 14 has sentence 'größer 4' in this evaluation, but 'cup' in other",
        ),
        (changed("target_pixels", 51), "ref 2, sentence 14 has target_pixels 50 in this evaluation, but 51 in other"),
    ],
)
def test_other_samples_are_refused(change: Callable[[Any], None], message: str) -> None:
    theirs = result(1)
    change(theirs.samples)
    with pytest.raises(ValueError, match=message):
        compare(result(), replace(SampleScores.of(theirs), source="other"))


def test_a_result_without_samples_or_with_equal_ids_is_refused(tmp_path: Path) -> None:
    ours = result()
    ours.samples[3]["sent_id"], ours.samples[3]["ref_id"] = 10, 0
    with pytest.raises(ValueError, match="has ref 0, sentence 10 twice: give each sample its own ref_id and sent_id"):
        write_samples(ours, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="the result has no samples: it must come from evaluate"):
        write_samples(EvalResult.from_dict(ours.to_dict()), tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"path must end in \.jsonl or \.parquet, got .*a\.csv'"):
        write_samples(result(), tmp_path / "a.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("iou", float("nan"), "line 2: iou must be a number in .0, 1., got nan"),
        ("iou", 1.5, "iou must be a number in .0, 1., got 1.5"),
        ("iou", 10**400, "iou must be a number in .0, 1., got 1000"),
        ("iou", True, "iou must be a number"),
        ("union", -1, "must be integers >= 0"),
        ("target_pixels", 2.5, "must be integers >= 0"),
        ("protocol", "lvat", "line 2: unknown protocol 'lvat'"),
        ("protocol", ["lavt"], "line 2: unhashable"),
        ("split", "train", "line 2 has split 'train', but .* line 1 'val': a file must hold one evaluation"),
        ("sent_id", 10, "has ref 0, sentence 10 twice"),
        ("iou", None, "iou must be a number"),
    ],
)
def test_damaged_rows_are_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    write_samples(result(), path)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows[1][name] = value
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(ValueError, match=message):
        read_samples(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"{", r"line 1 can't be read as JSON"),
        ("a.jsonl", b"[1]", "line 1 has no object"),
        ("a.jsonl", b'{"dataset": "toy"}', r"line 1 has no split_by, split, protocol and \d+ more"),
        ("a.parquet", b"no", "can't be read as parquet"),
        ("a.txt", b"", "must end in .jsonl or .parquet"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    if file.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs the [stream] extra")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.jsonl: write it with fastkd evaluate --out-samples"):
        read_samples(tmp_path / "b.jsonl")
