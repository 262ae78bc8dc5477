"""Images that stay uint8 up to the device: where they do, and that batches and results are the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stream_tools import Words
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from fastkd import Distiller, Term, losses
from fastkd.data import (
    MixedDataset,
    PartlyLabelled,
    RefCOCO,
    ReferDataset,
    ShardDataset,
    collate,
    load_tokenizer,
    make_shapes,
    write_shards,
)
from fastkd.data._nested import set_epoch
from fastkd.data._pixels import batch_to_device, with_pixels
from fastkd.data._prepare import STATISTICS, with_images
from fastkd.evaluate import evaluate
from fastkd.models import RISModel, preset
from fastkd.train import TeacherCache, TrainConfig, train
from fastkd.train.stream_feed import feed_for
from fastkd.train.task import segmentation_loss

CPU = torch.device("cpu")
MEANS = {"image_mean": (0.1, 0.5, 0.7), "image_std": (0.2, 0.3, 1.5)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels") / "data"
    make_shapes(folder, images=20, image_size=48)  # resized to 32 below
    return folder


def refs(root: Path, **options: Any) -> ReferDataset:
    return ReferDataset(RefCOCO(root), load_tokenizer("shapes"), **{"image_size": 32, **options})


class Wrapper(Dataset[Any]):
    """A wrapper that the project does not know."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


class Augmented(ReferDataset):
    """A subclass, which may change images."""


def other_collate(samples: list[Any]) -> dict[str, Any]:
    """Collate like the default, under another name."""
    return collate(samples)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert found[key].dtype == value.dtype
            assert found[key].stride() == value.stride()
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (32, 32)])
def test_a_batch_has_the_bits_of_its_samples_normalised_one_by_one(size: tuple[int, int], channels_last: bool) -> None:
    mean, std = MEANS["image_mean"], MEANS["image_std"]
    pixels = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(values).mul_(255.0)[:, None, None] for values in (mean, std))
    expected = torch.stack([image.permute(2, 0, 1).float().sub_(shift).div_(scale) for image in pixels])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    found = with_images({"image": pixels, STATISTICS: [(mean, std)] * 3, "id": [1, 2, 3]}, channels_last)
    assert_same(found, {"image": expected.contiguous(memory_format=layout), "id": [1, 2, 3]})


KNOWN = {
    "alone": lambda root: refs(root, **MEANS),
    "cached": lambda root: refs(root, cache=True),
    "subset": lambda root: Subset(refs(root), [5, 2, 7, 3, 1, 4]),
    "concatenated": lambda root: ConcatDataset([refs(root), Subset(refs(root), [4, 1])]),
    "mixed": lambda root: MixedDataset({"a": refs(root), "b": refs(root, seed=3)}, sizes={"a": 4}),
    "partly labelled": lambda root: PartlyLabelled(refs(root), 0.5),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_served_pixels_give_the_same_batches(root: Path, kind: str) -> None:
    dataset = KNOWN[kind](root)
    served = with_pixels(dataset, collate)
    for epoch in (0, 1):
        set_epoch(dataset, epoch)  # also that of the copy
        indices = range(min(6, len(dataset)))
        batch = collate([served[index] for index in indices])
        assert batch["image"].dtype == torch.uint8
        assert batch["mask"].dtype == torch.bool
        assert_same(batch_to_device(batch, CPU), collate([dataset[index] for index in indices]))
    assert dataset[0]["image"].dtype == torch.float32


def test_shards_serve_pixels(root: Path, tmp_path: Path) -> None:
    write_shards(RefCOCO(root), tmp_path / "shards", samples_per_shard=16)
    dataset = ShardDataset(tmp_path / "shards", Words(), image_size=32, max_words=6, buffer=4)
    served, samples = with_pixels(dataset, collate).read(0, 1), dataset.read(0, 1)
    batch = collate([next(served) for _ in range(4)])
    assert batch["image"].dtype == torch.uint8
    assert_same(batch_to_device(batch, CPU), collate([next(samples) for _ in range(4)]))


def test_code_of_others_receives_normalised_images(root: Path) -> None:
    plain = refs(root)
    assert with_pixels(plain, other_collate) is plain
    others = (
        Wrapper(plain),
        Augmented(RefCOCO(root), load_tokenizer("shapes"), image_size=32),
        Subset(Wrapper(plain), [1, 2]),
        ConcatDataset([plain, Wrapper(plain)]),
        MixedDataset({"a": plain, "b": refs(root, **MEANS)}),  # two normalisations
    )
    for dataset in others:
        assert with_pixels(dataset, collate) is dataset
        assert dataset[0]["image"].dtype == torch.float32


def test_training_and_evaluation_have_the_bits_of_normalised_samples(root: Path) -> None:
    config = TrainConfig(steps=2, batch_size=4, device="cpu", threads=1, workers=1, channels_last=True, check=False)
    every = refs(root, sentences="all")
    feed = feed_for(refs(root), config, collate, Distiller(nn.Identity(), None, segmentation_loss, {}), CPU, 0, 1)
    assert feed._collate([feed.samples[0]])["image"].dtype == torch.uint8
    found = []
    for each in (collate, other_collate):
        torch.manual_seed(0)
        model = RISModel(preset("shapes-student"))
        train(model, refs(root), config, collate=each, progress=False)
        results = [evaluate(model, every, collate=each, protocol=name) for name in ("lavt", "cris_orig")]
        found.append((model.state_dict(), [result.samples for result in results]))
    (weights, scores), (expected_weights, expected_scores) = found
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights.items())
    assert scores == expected_scores


def test_a_cache_of_normalised_images_serves_pixels(root: Path, tmp_path: Path) -> None:
    """Its keys are digests of float32 images, also in caches on disk."""

    def distiller(teacher: nn.Module) -> Distiller:
        student = RISModel(preset("shapes-student"))
        return Distiller(student, teacher, segmentation_loss, [Term(losses.logit_kd, "logits", weight=1.0)])

    online = distiller(RISModel(preset("shapes-student")).eval().requires_grad_(False))
    options = {"device": "cpu", "progress": False, "allow_untrained_teacher": True}
    TeacherCache.build(tmp_path / "cache", online, refs(root, sentences="all"), collate=other_collate, **options)
    cached = distiller(TeacherCache(tmp_path / "cache"))
    config = TrainConfig(steps=1, batch_size=4, device="cpu", threads=1, check=False)
    feed = feed_for(refs(root), config, collate, cached, CPU, 0, 1)
    assert feed._collate([feed.samples[0]])["image"].dtype == torch.uint8
    train(cached, refs(root), config, progress=False)
