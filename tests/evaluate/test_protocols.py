"""Every protocol against a literal loop over samples, and the conditions that results state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

pytest.importorskip("torchmetrics", reason="needs the [ris] extra")

from fastkd.errors import FastKDWarning
from fastkd.evaluate import PROTOCOLS, RISMetrics, evaluate

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)


def cubic_weights(fraction: float) -> list[float]:
    """Return the weights of the pixels at −1, 0, 1 and 2 in cubic convolution with a = −0.75."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    return [kernel(fraction + 1), kernel(fraction), kernel(1 - fraction), kernel(2 - fraction)]


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) bicubically, pixel by pixel; centres of pixels are at half-integers, borders are repeated."""
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            places = [(n + 0.5) * old / new - 0.5 for n, old, new in zip((y, x), image.shape, size, strict=True)]
            first = [int(np.floor(place)) for place in places]
            rows, columns = (cubic_weights(place - start) for place, start in zip(places, first, strict=True))
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    where = [min(max(s + k - 1, 0), n - 1) for s, k, n in zip(first, (i, j), image.shape, strict=True)]
                    out[y, x] += row * column * image[where[0], where[1]]
    return out


def cris_by_loop(logits: np.ndarray, masks: list[np.ndarray]) -> dict[str, float]:
    total_i = total_u = 0
    ious = []
    for (background, target), mask in zip(logits, masks, strict=True):
        predicted = resized(1 / (1 + np.exp(background - target)), mask.shape) > 0.35
        i, u = int((predicted & mask).sum()), int((predicted | mask).sum())
        total_i, total_u = total_i + i, total_u + u
        ious.append(i / (u + 1e-6))
    found = {"oIoU": total_i / total_u, "mIoU": sum(ious) / len(ious)}
    found |= {f"P@{x}": sum(iou > x for iou in ious) / len(ious) for x in LEVELS}
    return {name: 100 * value for name, value in found.items()}


def gres_by_loop(
    predictions: np.ndarray, masks: np.ndarray, empty: list[bool], predicted_empty: list[bool]
) -> dict[str, float]:
    total_i = total_u = 0
    ious, targeted = [], []
    right = {True: [], False: []}
    for predicted, mask, none, predicted_none in zip(predictions, masks, empty, predicted_empty, strict=True):
        i, u = int((predicted & mask).sum()), int((predicted | mask).sum())
        right[none].append(none == predicted_none)
        if none and predicted_none:
            ious.append(1.0)
            continue
        if none:
            iou = 0.0
        else:
            i = 0 if predicted_none else i
            iou = i / u if u else 0.0
            targeted.append(iou)
        ious.append(iou)
        total_i, total_u = total_i + i, total_u + u
    found = {"oIoU": total_i / total_u, "mIoU": sum(ious) / len(ious)}
    found |= {f"P@{x}": sum(iou >= x for iou in targeted) / len(targeted) for x in LEVELS}
    found |= {"N-acc": sum(right[True]) / len(right[True]), "T-acc": sum(right[False]) / len(right[False])}
    return {name: 100 * value for name, value in found.items()}


class Fixed(nn.Module):
    """Predict the first two channels of the image; the third holds the logit of "no target" of the head."""

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.head = head

    def forward(self, image: Tensor, input_ids: Tensor) -> Any:
        logits = image[:, :2]
        if not self.head:
            return logits
        none = image[:, 2, 0, 0]
        return SimpleNamespace(logits=logits, no_target_logits=torch.stack([torch.zeros_like(none), none], 1))


class Scenes(Dataset[dict[str, Any]]):
    """Logits in images, with masks at their own size and another one."""

    sentences, name, split_by, split, mask_rule = "all", "toy", "unc", "val", "union"

    def __init__(self, n: int = 7, size: int = 6, density: float = 0.5, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.image_size = size
        self.images = torch.randn(n, 3, size, size, generator=g)
        self.images[0, 1] = self.images[0, 0] - 9  # predicts nothing
        self.masks = self.images[:, 1] + density * torch.randn(n, size, size, generator=g) > self.images[:, 0]
        self.no_target = [False] * n
        rng = np.random.default_rng(seed)
        self.original = [rng.random((5 + i, 11 - i)) < 0.5 for i in range(n)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = {"input_ids": torch.arange(3), "ref_id": i // 2, "sent_id": i, "sentence": f"number {i}"}
        return {"image": self.images[i], "mask": self.masks[i], "no_target": self.no_target[i], **ids}


class WithOriginal(Scenes):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "original_mask": self.original[i]}


class InSet(Scenes):
    """Scenes of a referring set, which has the masks."""

    def __init__(self) -> None:
        super().__init__()
        masks = self.original
        self.refcoco = SimpleNamespace(mask=lambda ref_id: masks[2 * ref_id])


def no_targets(data: Scenes) -> Scenes:
    """Make every second sample one without a target; the masks of some predictions are small or empty."""
    for i in range(1, len(data), 2):
        data.no_target[i] = True
        data.masks[i] = False
    for i in (1, 2):  # 49 pixels: no target below 50, found or not
        data.images[i, 1] = data.images[i, 0] - 1
        data.images[i, 1, 7:14, 7:14] += 2
    data.images[5, 1] = data.images[5, 0] - 1  # 50 pixels
    data.images[5, 1, 7:12, 7:17] += 2
    data.masks[2, 8:20, 8:20] = True
    return data


@pytest.mark.parametrize("batch_size", [1, 4])
def test_cris_orig_equals_a_literal_loop(batch_size: int) -> None:
    data = WithOriginal()
    result = evaluate(Fixed(), data, protocol="cris_orig", batch_size=batch_size)
    expected = cris_by_loop(data.images[:, :2].double().numpy(), data.original)
    assert result.metrics == pytest.approx(expected, rel=1e-12)
    assert (result.resolution, result.decision, result.threshold) == (None, "sigmoid > 0.35", "IoU > X")
    text = "cris_orig: toy (unc) val, 7 sentences of 4 refs, each image's own size, sigmoid > 0.35, IoU > X, true masks"
    assert text in str(result)


def test_cris_orig_counts_only_what_exceeds_the_threshold() -> None:
    truth = torch.zeros(2, 1, 20, dtype=torch.bool)
    prediction = truth.clone()
    truth[:, 0, :10], prediction[0, 0, :5], prediction[1, 0, :6] = True, True, True  # 0.5 and 0.6
    found = {}
    for protocol in ("lavt", "cris_orig"):
        metrics = RISMetrics(protocol)
        metrics.update(prediction, truth)
        found[protocol] = [float(metrics.compute()[f"P@{x}"]) for x in LEVELS]
    assert found == {"lavt": [100, 50, 0, 0, 0], "cris_orig": [50, 0, 0, 0, 0]}
    assert metrics.sample_iou().tolist() == [5 / (10 + 1e-6), 6 / (10 + 1e-6)]


def test_cris_orig_takes_masks_from_the_referring_set() -> None:
    data, refs = InSet(), [0, 2, 4, 6]  # the first sentence of each ref
    found = evaluate(Fixed(), Subset(data, refs), protocol="cris_orig")
    expected = cris_by_loop(data.images[refs, :2].double().numpy(), [data.original[i] for i in refs])
    assert found.metrics == pytest.approx(expected, rel=1e-12)
    assert [sample["target_pixels"] for sample in found.samples] == [int(data.original[i].sum()) for i in refs]
    with pytest.raises(ValueError, match="compares: evaluate one set at a time, or add the key 'original_mask'"):
        evaluate(Fixed(), ConcatDataset([data, InSet()]), protocol="cris_orig")
    with pytest.raises(ValueError, match=r"sample 0 has no mask at its image's own size.* evaluate a ReferDataset"):
        evaluate(Fixed(), Scenes(), protocol="cris_orig")
    wrong = WithOriginal()
    wrong.original[2] = wrong.original[2][None]
    with pytest.raises(ValueError, match=r"original_mask must be \(H, W\), got \(1, 7, 9\)"):
        evaluate(Fixed(), wrong, protocol="cris_orig")
    wrong.original[2] = 255 * wrong.original[2][0].astype(np.uint8)
    with pytest.raises(ValueError, match=r"original_mask must be bool or hold only 0 and 1, got torch\.uint8 with 255"):
        evaluate(Fixed(), wrong, protocol="cris_orig")


@pytest.mark.parametrize("head", [False, True])
def test_gres_equals_a_literal_loop(head: bool) -> None:
    data = no_targets(Scenes(8, 480, density=0.3))
    result = evaluate(Fixed(head), data, protocol="gres", batch_size=3)
    predictions = (data.images[:, 1] > data.images[:, 0]).numpy()
    if head:
        empty = [float(image[2, 0, 0]) > 0 for image in data.images]
    else:
        empty = [int(predicted.sum()) < 50 for predicted in predictions]
        assert [int(predicted.sum()) for predicted in predictions[[0, 1, 2, 5]]] == [0, 49, 49, 50]
    assert {(none, found) for none, found in zip(data.no_target, empty, strict=True)} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    expected = gres_by_loop(predictions, data.masks.numpy(), data.no_target, empty)
    assert result.metrics == pytest.approx(expected, rel=1e-12)
    rule = "by the model's head" if head else "below 50 pixels"
    assert result.decision == f"argmax, no target {rule}"
    assert [sample["predicted_no_target"] for sample in result.samples] == empty
    with pytest.raises(ValueError, match="'gres' is defined at 480×480, the dataset has image_size=6"):
        evaluate(Fixed(), Scenes(), protocol="gres")


def test_gres_omits_means_over_no_samples() -> None:
    mask, flag = torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    metrics = RISMetrics("gres")
    metrics.update(mask, ~mask, no_target=flag, predicted_no_target=flag)
    assert {name: float(value) for name, value in metrics.compute().items()} == {"oIoU": 0, "mIoU": 100, "N-acc": 100}
    metrics.reset()
    metrics.update(mask, mask, no_target=~flag, predicted_no_target=~flag)
    assert "N-acc" not in metrics.compute()


def test_gres_needs_flags_that_agree_with_the_masks() -> None:
    data = no_targets(Scenes(6, 480))
    data.masks[3, 0, 0] = True
    with pytest.raises(ValueError, match=r"sample 3 \(ref_id 1\) has no_target=True, but 1 pixels in its mask"):
        evaluate(Fixed(), data, protocol="gres")

    class Without(Scenes):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {key: value for key, value in super().__getitem__(i).items() if key != "no_target"}

    with pytest.raises(ValueError, match="the samples have no key 'no_target', which protocol 'gres' needs"):
        evaluate(Fixed(), Without(2, 480), protocol="gres")
    with pytest.raises(ValueError, match="no_target_pixels must be an integer >= 0, got -1"):
        evaluate(Fixed(), data, protocol="gres", no_target_pixels=-1)
    mask, flag = torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"predicted_no_target: protocol 'gres' needs it: pass \(B,\) bool"):
        RISMetrics("gres").update(mask, mask, no_target=flag)
    with pytest.raises(ValueError, match="no_target: protocol 'lavt' has no such rule: omit it"):
        RISMetrics().update(mask, mask, no_target=flag)
    with pytest.raises(ValueError, match=r"no_target must be bool of shape \(1,\), got torch.int64 of \(1,\)"):
        RISMetrics("gres").update(mask, mask, no_target=flag.long(), predicted_no_target=flag)


def test_a_head_of_another_shape_or_with_nan_is_an_error() -> None:
    class Head(Fixed):
        values = torch.zeros(2)

        def forward(self, image: Tensor, input_ids: Tensor) -> Any:
            return SimpleNamespace(logits=image[:, :2], no_target_logits=self.values)

    model, data = Head(), Scenes(2, 480)
    with pytest.raises(ValueError, match=r"no_target_logits of the model's output must be \(2, 2\).* got \(2,\)"):
        evaluate(model, data, protocol="gres")
    model.values = torch.full((2, 2), torch.nan)
    with pytest.raises(ValueError, match="no_target_logits of the model's output hold NaN"):
        evaluate(model, data, protocol="gres")


def test_other_protocols_warn_of_sentences_without_a_target() -> None:
    data = Scenes()
    data.no_target[3], data.masks[3] = True, False
    with pytest.warns(FastKDWarning, match="1 of 7 sentences have no target: protocol 'lavt' scores them 0"):
        evaluate(Fixed(), data)


def test_records_follow_the_order_of_the_dataset() -> None:
    data = Scenes()
    result = evaluate(Fixed(), data, batch_size=3)
    for i, sample in enumerate(result.samples):
        predicted, mask = data.images[i, 1] > data.images[i, 0], data.masks[i]
        counts = [int(m.sum()) for m in (predicted & mask, predicted | mask, mask, predicted)]
        expected = dict(zip(("intersection", "union", "target_pixels", "predicted_pixels"), counts, strict=True))
        ids = {"ref_id": i // 2, "sent_id": i, "sentence": f"number {i}"}
        assert sample == {**ids, **expected, "iou": counts[0] / max(counts[1], 1)}
    assert result.sample_iou.tolist() == [sample["iou"] for sample in result.samples]


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_metrics_of_parts_merge(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    prediction, truth = (torch.rand(2, 9, 5, 5, generator=g) < 0.5).unbind()
    flags = [torch.arange(9) % 3 == 0, torch.arange(9) % 2 == 0]
    truth = truth & ~flags[0][:, None, None]

    def added(rows: slice) -> RISMetrics:
        metrics = RISMetrics(name)
        names = ("no_target", "predicted_no_target") if PROTOCOLS[name].no_target else ()
        options = {key: flag[rows] for key, flag in zip(names, flags, strict=False)}
        metrics.update(prediction[rows], truth[rows], **options)
        return metrics

    whole, part = added(slice(None)), added(slice(0, 4))
    part.merge_state(added(slice(4, 9)))
    expected = {key: float(value) for key, value in whole.compute().items()}
    assert {key: float(value) for key, value in part.compute().items()} == pytest.approx(expected, rel=1e-12)
    assert sorted(part.sample_iou().tolist()) == sorted(whole.sample_iou().tolist())
