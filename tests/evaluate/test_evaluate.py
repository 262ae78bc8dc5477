"""Metrics against hand-computed values and a loop over pixels; evaluation and the conditions that it reports."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("torchmetrics", reason="needs the [ris] extra")

from fastkd.evaluate import RISMetrics, evaluate
from fastkd.train import segmentation_loss


def metrics_by_loop(predictions: Tensor, truths: Tensor) -> dict[str, float]:
    """Compute the metrics from their definitions, pixel by pixel."""
    total_i = total_u = 0
    ious = []
    for prediction, truth in zip(predictions.tolist(), truths.tolist(), strict=True):
        i = u = 0
        for row_p, row_t in zip(prediction, truth, strict=True):
            for p, t in zip(row_p, row_t, strict=True):
                i += int(bool(p) and bool(t))
                u += int(bool(p) or bool(t))
        total_i, total_u = total_i + i, total_u + u
        ious.append(i / u if u else 0.0)
    result = {"oIoU": 100 * total_i / total_u, "mIoU": 100 * sum(ious) / len(ious)}
    for x in (0.5, 0.6, 0.7, 0.8, 0.9):
        result[f"P@{x}"] = 100 * sum(iou >= x for iou in ious) / len(ious)
    return result


def masks(seed: int, n: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, 7, 9, generator=g) < 0.5
    flips = torch.rand(n, 7, 9, generator=g) < torch.linspace(0, 0.4, n)[:, None, None]
    return truth ^ flips, truth


class TestRISMetrics:
    def test_hand_computed_values(self) -> None:
        # IoU 2/4, 7/10 (exactly at a threshold), 0 of an empty union, 1.
        prediction, truth = torch.zeros(4, 2, 10), torch.zeros(4, 2, 10)
        prediction[0, 0, :3], truth[0, 0, 1:4] = 1, 1
        prediction[1, 0, :7], truth[1, 0, :10] = 1, 1
        prediction[3], truth[3] = 1, 1
        metrics = RISMetrics()
        metrics.update(prediction.bool(), truth.bool())
        got = {k: float(v) for k, v in metrics.compute().items()}
        assert got == pytest.approx(
            {
                "oIoU": 100 * (2 + 7 + 0 + 20) / (4 + 10 + 0 + 20),
                "mIoU": 100 * (0.5 + 0.7 + 0 + 1) / 4,
                "P@0.5": 75.0,
                "P@0.6": 50.0,
                "P@0.7": 50.0,
                "P@0.8": 25.0,
                "P@0.9": 25.0,
            }
        )
        assert metrics.sample_iou().tolist() == [0.5, 0.7, 0.0, 1.0]

    @pytest.mark.parametrize("seed", range(3))
    def test_against_a_loop_over_pixels(self, seed: int) -> None:
        prediction, truth = masks(seed)
        metrics = RISMetrics()
        for part in range(0, 12, 5):
            metrics.update(prediction[part : part + 5], truth[part : part + 5].long())
        assert {k: float(v) for k, v in metrics.compute().items()} == pytest.approx(metrics_by_loop(prediction, truth))

    def test_merged_states_equal_one_update(self) -> None:
        prediction, truth = masks(5)
        whole, a, b = RISMetrics(), RISMetrics(), RISMetrics()
        whole.update(prediction, truth)
        a.update(prediction[:7], truth[:7])
        b.update(prediction[7:], truth[7:])
        a.merge_state(b)
        for name, value in whole.compute().items():
            assert float(a.compute()[name]) == pytest.approx(float(value))

    def test_sums_are_exact_beyond_float32(self) -> None:
        metrics = RISMetrics()
        metrics.update(*masks(0))
        metrics.intersections[:] = [torch.tensor([2**24 + 1] * 3)]
        metrics.unions[:] = [torch.tensor([2**24 + 3] * 3)]
        assert float(metrics.compute()["oIoU"]) == 100 * (2**24 + 1) / (2**24 + 3)

    def test_reset_empties_the_state(self) -> None:
        metrics = RISMetrics()
        metrics.update(*masks(0))
        metrics.reset()
        torchmetrics_warning = pytest.warns(UserWarning, match="called before the ``update`` method")
        with torchmetrics_warning, pytest.raises(ValueError, match="RISMetrics has no samples"):
            metrics.compute()

    def test_rejects_bad_shapes_and_values(self) -> None:
        metrics = RISMetrics()
        good = torch.zeros(2, 3, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"both be \(B, H, W\), got \(2, 3, 3\) and \(2, 3, 4\)"):
            metrics.update(good, torch.zeros(2, 3, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"prediction must be bool or hold only 0 and 1, got torch\.float32"):
            metrics.update(good.float(), good)
        with pytest.raises(ValueError, match="truth must be bool or hold only 0 and 1"):
            metrics.update(good, good.long() + 254)


class Echo(nn.Module):
    """Predict the sign of the image's first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        assert not self.training
        assert input_ids.shape[0] == image.shape[0]
        self.seen += len(image)
        return torch.stack([torch.zeros_like(image[:, 0]), self.scale * image[:, 0]], 1)


class Scenes(Dataset[dict[str, Any]]):
    image_size = 8

    def __init__(self, n: int = 10, sentences: str = "all") -> None:
        self.n, self.sentences, self.split, self.name = n, sentences, "val", "toy"
        self.prediction, self.truth = masks(3, 32)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self.prediction[i].float().expand(3, 7, 9) - 0.5
        return {
            "image": image,
            "input_ids": torch.arange(4),
            "word_mask": torch.ones(4, dtype=torch.bool),
            "mask": self.truth[i],
            "ref_id": i // 3,
            "sent_id": 100 + i,
            "sentence": f"number {i}",
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Omit word_mask, which a model need not accept."""
    first = {k: v for k, v in samples[0].items() if k != "word_mask"}
    return {
        k: torch.stack([s[k] for s in samples]) if isinstance(v, Tensor) else [s[k] for s in samples]
        for k, v in first.items()
    }


class TestEvaluate:
    def test_result_holds_scores_and_conditions(self) -> None:
        data, model = Scenes(), Echo().train()
        result = evaluate(model, data, batch_size=4, collate=collate)
        assert result.metrics == pytest.approx(metrics_by_loop(data.prediction[:10], data.truth[:10]))
        assert (result.protocol, result.dataset, result.split) == ("lavt", "toy", "val")
        assert (result.sentences, result.refs, result.resolution) == (10, 4, (7, 9))
        assert result.sent_ids == list(range(100, 110))
        assert result.sample_iou.shape == (10,)
        assert 100 * float(result.sample_iou.mean()) == pytest.approx(result.miou)
        assert model.training
        assert model.seen == 10
        assert json.loads(json.dumps(result.to_dict()))["metrics"]["mIoU"] == pytest.approx(result.miou)
        for part in ("lavt", "val", "10 sentences of 4 refs", "7x9", "argmax", "IoU >= X"):
            assert part in str(result)

    def test_scores_do_not_depend_on_batch_size_or_workers(self) -> None:
        data = Scenes()
        results = [
            evaluate(Echo(), data, batch_size=size, collate=collate, workers=workers)
            for size, workers in ((1, 0), (3, 0), (64, 0), (3, 1))
        ]
        assert all(r.metrics == results[0].metrics for r in results)

    def test_states_no_size_if_there_are_several(self) -> None:
        class Cropped(Scenes):
            def __getitem__(self, i: int) -> dict[str, Any]:
                sample, height = super().__getitem__(i), 4 + i % 2
                return {**sample, "image": sample["image"][:, :height], "mask": sample["mask"][:height]}

        result = evaluate(Echo(), Cropped(), batch_size=1, collate=collate)
        assert result.resolution is None
        assert "each image's own size" in str(result)

    def test_samples_of_which_some_lack_an_id(self) -> None:
        class Partial(Scenes):
            def __getitem__(self, i: int) -> dict[str, Any]:
                sample = super().__getitem__(i)
                return sample if i < 4 else {key: value for key, value in sample.items() if key != "sent_id"}

        with pytest.raises(ValueError, match="of 10 samples, 4 have 'sent_id': give every sample these keys"):
            evaluate(Echo(), Partial(), batch_size=2, collate=collate)

    def test_restores_the_mode_of_every_module(self) -> None:
        model = nn.Sequential(Echo(), nn.Dropout()).train()
        model[1].eval()
        with pytest.raises(
            TypeError
        ):  # nn.Sequential does not accept the arguments; modes are restored after an error too
            evaluate(model, Scenes(), collate=collate)
        assert [m.training for m in model.modules()] == [True, True, False]

    def test_rejects_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="dataset is empty"):
            evaluate(Echo(), Scenes(0), collate=collate)
        with pytest.raises(ValueError, match=r"sentences='random'.*use sentences='all'"):
            evaluate(Echo(), Scenes(sentences="random"), collate=collate)
        with pytest.raises(ValueError, match="unknown protocol 'lvat'; available: 'lavt', 'lavt480'"):
            evaluate(Echo(), Scenes(), collate=collate, protocol="lvat")
        with pytest.raises(ValueError, match=r"'lavt480' is defined at 480×480, the dataset has image_size=8"):
            evaluate(Echo(), Scenes(), collate=collate, protocol="lavt480")
        with pytest.raises(ValueError, match="precision must be"):
            evaluate(Echo(), Scenes(), collate=collate, precision="fp8")

        class Small(Echo):
            def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
                return super().forward(image, input_ids)[:, :, ::2]

        with pytest.raises(ValueError, match=r"logits \(10, 2, 4, 9\) do not match masks \(10, 7, 9\)"):
            evaluate(Small(), Scenes(), collate=collate)

    @pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32])
    def test_accepts_masks_of_0_and_1_in_any_dtype_and_rejects_other_values(self, kind: torch.dtype) -> None:
        class Stored(Scenes):
            top = 1

            def __getitem__(self, i: int) -> dict[str, Any]:
                sample = super().__getitem__(i)
                return {**sample, "mask": sample["mask"].to(kind) * self.top}

        data = Stored()
        assert evaluate(Echo(), data, collate=collate).metrics == evaluate(Echo(), Scenes(), collate=collate).metrics
        data.top = 255
        with pytest.raises(ValueError, match=r"mask must be bool or hold only 0 and 1, got .* with 255: use mask > 0"):
            evaluate(Echo(), data, collate=collate)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_logits_raise_and_name_the_sample(self, value: float) -> None:
        class Broken(Scenes):
            def __getitem__(self, i: int) -> dict[str, Any]:
                sample = super().__getitem__(i)
                return {**sample, "image": sample["image"] * (value if i == 7 else 1)}

        class Both(Echo):
            def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
                return super().forward(image, input_ids).abs() + image[:, :1].abs()

        with pytest.raises(
            FloatingPointError, match=r"NaN for ref_id 2, sent_id 107, 'number 7': its weights .*finite"
        ):
            evaluate(Both(), Broken(), batch_size=4, collate=collate)
        assert evaluate(Both(), Scenes(), collate=collate).sentences == 10

    def test_infinite_logits_that_differ_are_accepted(self) -> None:
        class ZeroTimesInf(Echo):
            def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
                return super().forward(image, input_ids) * torch.inf

        class Scaled(Echo):
            def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
                a, b = super().forward(image, input_ids).unbind(1)
                return torch.stack([a - b, b], 1) * torch.inf  # (-inf, inf) or (inf, -inf)

        data = Scenes()
        assert evaluate(Scaled(), data, collate=collate).metrics == evaluate(Echo(), data, collate=collate).metrics
        with pytest.raises(FloatingPointError, match="NaN"):
            evaluate(ZeroTimesInf(), data, collate=collate)

    def test_error_names_non_finite_weights(self) -> None:
        model = Echo()
        model.register_parameter("gain", nn.Parameter(torch.tensor(torch.nan)))
        model.scale = model.gain
        with pytest.raises(FloatingPointError, match=r"its weights hold NaN or Inf \((gain|scale).*earlier checkpoint"):
            evaluate(model, Scenes(), collate=collate)

    def test_rejects_word_ids_beyond_the_table_before_running_the_model(self) -> None:
        class WithVocabulary(Echo):
            vocab_size = 3

        with pytest.raises(ValueError, match="input_ids range from 0 to 3, but the vocabulary has 3 words"):
            evaluate(WithVocabulary(), Scenes(), collate=collate)
        data, WithVocabulary.vocab_size = Scenes(), 50
        data.tokenizer = SimpleNamespace(vocab_size=51, name="other")
        with pytest.raises(ValueError, match=r"tokenizer \('other'\) has 51 entries, the model has 50 word embeddings"):
            evaluate(WithVocabulary(), data, collate=collate)
        data.tokenizer.vocab_size = 50
        assert evaluate(WithVocabulary(), data, collate=collate).sentences == 10

    @pytest.mark.gpu
    def test_gpu_and_cpu_scores_are_equal(self) -> None:
        data = Scenes()
        gpu = evaluate(Echo(), data, collate=collate, device="cuda", precision="fp32")
        assert gpu.metrics == evaluate(Echo(), data, collate=collate).metrics


class TestSegmentationLoss:
    def test_against_the_formula(self) -> None:
        torch.manual_seed(0)
        logits, mask = torch.randn(3, 2, 5, 4, dtype=torch.float64), torch.rand(3, 5, 4) < 0.3
        total = 0.0
        for x, y in zip(logits, mask, strict=True):
            p = x.softmax(0)[1]
            w = torch.where(y, 1.1, 0.9).double()
            ce = (w * -torch.where(y, p, 1 - p).log()).sum() / w.sum()
            dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
            total += float(ce + 0.5 * dice) / 3
        got = segmentation_loss(logits, {"mask": mask}, dice_weight=0.5)
        assert float(got) == pytest.approx(total, rel=1e-5)

    def test_equals_cross_entropy_without_dice_and_weights(self) -> None:
        torch.manual_seed(0)
        logits, mask = torch.randn(3, 2, 5, 4), torch.rand(3, 5, 4) < 0.3
        got = segmentation_loss(logits, {"mask": mask}, class_weights=(1, 1), dice_weight=0)
        torch.testing.assert_close(got, nn.functional.cross_entropy(logits, mask.long()))

    def test_half_precision_is_computed_in_float32(self) -> None:
        logits = torch.full((1, 2, 4, 4), 30.0, dtype=torch.float16)
        logits[:, 0] = -3e4
        loss = segmentation_loss(logits, {"mask": torch.zeros(1, 4, 4, dtype=torch.bool)})
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)

    @pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32])
    def test_rejects_masks_with_values_other_than_0_and_1(self, kind: torch.dtype) -> None:
        torch.manual_seed(0)
        logits, mask = torch.randn(2, 2, 5, 4), torch.rand(2, 5, 4) < 0.3
        assert torch.equal(
            segmentation_loss(logits, {"mask": mask.to(kind)}), segmentation_loss(logits, {"mask": mask})
        )
        with pytest.raises(ValueError, match=r"mask must be bool or hold only 0 and 1, got .* with 255"):
            segmentation_loss(logits, {"mask": mask.to(kind) * 255})
        with pytest.raises(ValueError, match=r"with 0\.25: use"):
            segmentation_loss(logits, {"mask": mask.float() * 0.25})

    def test_traced_loss_is_nan_for_invalid_masks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, mask = torch.randn(2, 2, 5, 4), torch.ones(2, 5, 4, dtype=torch.uint8)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.isfinite(segmentation_loss(logits, {"mask": mask}))
        mask[0, 0, 0] = 255
        for dice_weight in (0.0, 1.0):
            assert torch.isnan(segmentation_loss(logits, {"mask": mask}, dice_weight=dice_weight))

    def test_rejects_bad_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"logits must be \(B, 2, H, W\), got \(1, 1, 4, 4\)"):
            segmentation_loss(torch.zeros(1, 1, 4, 4), {"mask": torch.zeros(1, 4, 4)})
        with pytest.raises(ValueError, match=r"mask \(1, 8, 8\) does not match logits \(1, 2, 4, 4\)"):
            segmentation_loss(torch.zeros(1, 2, 4, 4), {"mask": torch.zeros(1, 8, 8)})
