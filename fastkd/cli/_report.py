"""Measure models for a report: intervals, examples, latency, and what the losses compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastkd.data import ReferDataset, Tokenizer
    from fastkd.evaluate import EvalResult
    from fastkd.report import ChannelRelations, Example, SampleIoU, WordAttention

_RESAMPLES = 2000
_RELATED = 32  # samples whose channels are related


@dataclass
class Scored:
    """A model with its scores on a test split.

    Attributes:
        name: name in the report.
        model: the model; of several seeds, the first one's.
        dataset: the split, prepared for this model.
        results: one evaluation per seed.
        baseline: name of the model that it is compared with, or None.
    """

    name: str
    model: Any
    dataset: ReferDataset
    results: Sequence[EvalResult]
    baseline: str | None = None

    @property
    def ious(self) -> np.ndarray:
        """Return the IoU of every seed and sample in percent, (S, N)."""
        return 100 * np.stack([np.asarray(result.sample_iou) for result in self.results])


def report_sections(scored: Sequence[Scored], focus: str, count: int = 3) -> dict[str, Any]:
    """Return the arguments of `write_report` that are measured: scores, examples, attention and relations.

    Args:
        scored: the models, the reference of relations (the teacher) first.
        focus: name of the model by whose IoU examples are chosen.
        count: number of examples of each kind.

    Raises:
        ValueError: the models were scored on different samples.
    """
    for other in scored[1:]:
        if other.results[0].sent_ids != scored[0].results[0].sent_ids:
            raise ValueError(f"{other.name!r} and {scored[0].name!r} were scored on different samples")
    chosen = _chosen(next(one for one in scored if one.name == focus), count)
    first = [indices[0] for indices in chosen.values() if indices]
    return {
        "scores": _scores(scored),
        "examples": [_example(scored, index, group) for group, indices in chosen.items() for index in indices],
        "attention": [shown for index in first for shown in _attention(scored, index)],
        "relations": _relations(scored),
    }


def measure_latency(model: Any, dataset: ReferDataset, repeats: int = 10, limit: float = 10.0) -> float:
    """Return the median seconds of a forward of one image and sentence, after two warm-ups.

    Forwards after the third begin only within ``limit`` seconds.
    """
    import torch

    from fastkd.distill.forward import run_model

    batch = _inputs(model, dataset, [0])
    seconds: list[float] = []
    with torch.inference_mode():
        while len(seconds) < 3 or (len(seconds) < repeats + 2 and sum(seconds) < limit):
            start = time.perf_counter()
            output = run_model(model, **batch)
            getattr(output, "logits", output)[0, 0, 0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def _scores(scored: Sequence[Scored]) -> list[SampleIoU]:
    from fastkd.report import SampleIoU

    named = {one.name: one for one in scored}
    found = []
    for one in scored:
        images = [sample["image_id"] for sample in one.results[0].samples]
        gain = None
        if one.baseline is not None and named[one.baseline].ious.shape == one.ious.shape:
            gain = _interval(one.ious - named[one.baseline].ious, images)
        interval, precision = _interval(one.ious, images), _precision([result.metrics for result in one.results])
        found.append(SampleIoU(one.name, one.ious.ravel(), interval, gain, one.baseline or "", precision))
    return found


def _precision(metrics: Sequence[Mapping[str, float]]) -> list[float]:
    """Return P@X in percent, averaged over seeds; 0 where no sample has a target."""
    from fastkd.report.scores import THRESHOLDS

    return [statistics.fmean(seed.get(f"P@{x}", 0.0) for seed in metrics) for x in THRESHOLDS]


def _interval(values: np.ndarray, images: Sequence[Any]) -> tuple[float, float, float]:
    """Return the mean of values (S, N) and the ends of its 95 % interval, drawing seeds and images."""
    from fastkd.evaluate import paired_bootstrap

    found = paired_bootstrap(values, np.zeros_like(values), groups=images, resamples=_RESAMPLES)
    return found.mean, found.low, found.high


def _chosen(focus: Scored, count: int) -> dict[str, list[int]]:
    """Return the best, median and worst samples of a model, no sample twice and each of a kind of another image."""
    ious = focus.ious[0]
    order = np.argsort(ious, kind="stable")
    middle = np.argsort(np.abs(ious - np.median(ious)), kind="stable")
    taken: set[int] = set()
    chosen: dict[str, list[int]] = {}
    for group, indices in (("Best", order[::-1]), ("Median", middle), ("Worst", order)):
        name = f"{group} by the IoU of {focus.name}"
        chosen[name], images = [], set()
        for index in map(int, indices):
            if len(chosen[name]) == count:
                break
            image = focus.results[0].samples[index]["image_id"]
            if index not in taken and image not in images:
                taken.add(index)
                images.add(image)
                chosen[name].append(index)
    return chosen


def _example(scored: Sequence[Scored], index: int, group: str) -> Example:
    from fastkd.evaluate import predict
    from fastkd.report import Example

    refcoco, sample = scored[0].dataset.refcoco, scored[0].results[0].samples[index]
    image, sentence = refcoco.image(sample["image_id"]), sample["sentence"]
    masks = {one.name: predict(one.model, image, sentence, one.dataset.tokenizer).mask for one in scored}
    ious = {one.name: float(one.ious[0, index]) for one in scored}
    return Example(image, refcoco.mask(sample["ref_id"]), masks, sentence, ious, group)


def _attention(scored: Sequence[Scored], index: int) -> list[WordAttention]:
    sample = scored[0].results[0].samples[index]
    image = scored[0].dataset.refcoco.image(sample["image_id"])
    return word_attention({one.name: (one.model, one.dataset.tokenizer) for one in scored}, image, sample["sentence"])


def word_attention(
    models: Mapping[str, tuple[Any, Tokenizer]], pixels: np.ndarray, sentence: str
) -> list[WordAttention]:
    """Return the attention at the finest stage of the models that have one, together where their words are the same.

    Args:
        models: name to model and tokenizer.
        pixels: (H, W, 3) uint8.
        sentence: the referring expression.
    """
    import torch

    from fastkd._runtime import device_of
    from fastkd.data._prepare import normalise
    from fastkd.data.images import to_square
    from fastkd.distill.forward import normalisation, run_model
    from fastkd.models.inputs import word_limit
    from fastkd.report import WordAttention
    from fastkd.report.compared import attention_probabilities

    maps: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, (model, tokenizer) in models.items():
        device = device_of(model)
        input_ids, word_mask = tokenizer([sentence], word_limit(model))  # (1, T)
        image = normalise(to_square(pixels, model.config.image_size), *(normalisation(model) or ()))
        with torch.inference_mode():
            output = run_model(model, image[None].to(device), input_ids.to(device), word_mask.to(device))
        logits = getattr(output, "pixel_word_logits", None)
        pieces = tokenizer.pieces()
        words = tuple(pieces[number] for number in input_ids[0][word_mask[0].bool()].tolist())
        if logits:
            maps.setdefault(words, {})[name] = attention_probabilities(logits[0][0].cpu(), word_mask[0])
    return [WordAttention(pixels, words, found) for words, found in maps.items()]


def _relations(scored: Sequence[Scored]) -> ChannelRelations | None:
    import torch

    from fastkd.distill.forward import run_model
    from fastkd.report import ChannelRelations
    from fastkd.report.compared import channel_similarities

    matrices = {}
    for one in scored:
        with torch.inference_mode():
            batch = _inputs(one.model, one.dataset, range(min(_RELATED, len(one.dataset))))
            output = run_model(one.model, **batch)
        features = getattr(output, "decoder_features", None)
        if features is not None:
            matrices[one.name] = channel_similarities(features)
    return ChannelRelations(matrices) if matrices else None


def _inputs(model: Any, dataset: ReferDataset, indices: Sequence[int]) -> dict[str, Any]:
    """Return a batch of samples as arguments of a model, on its device."""
    from fastkd._runtime import device_of
    from fastkd.data import collate

    device = device_of(model)
    batch = collate([dataset[index] for index in indices])
    return {key: batch[key].to(device) for key in ("image", "input_ids", "word_mask")}
