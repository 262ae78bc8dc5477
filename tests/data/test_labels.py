"""Training sets of which a part keeps its masks, and the loss on them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchvision", reason="needs the [ris] extra")

from fastkd.data import PartlyLabelled, RefCOCO, ReferDataset, collate, load_tokenizer, make_shapes
from fastkd.train import segmentation_loss


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels") / "data"
    make_shapes(root, images=40, image_size=32)
    return ReferDataset(RefCOCO(root), load_tokenizer("shapes"), image_size=32, cache=True)


def labelled_refs(part):
    samples = [part[i] for i in range(len(part))]
    return {sample["ref_id"] for sample in samples if sample["label_weight"] > 0}, samples


def test_unlabelled_samples_have_no_mask_and_no_weight(dataset):
    part = PartlyLabelled(dataset, 0.5)
    refs, samples = labelled_refs(part)
    assert len(part) == len(dataset)
    assert 0 < len(refs) < len(part)
    images = {sample["image_id"] for sample in samples if sample["ref_id"] in refs}
    for i, sample in enumerate(samples):
        kept = sample["ref_id"] in refs
        assert kept == (sample["image_id"] in images)  # all refs of an image, or none
        assert bool(sample["mask"].any()) == kept
        assert sample["label_weight"].item() == pytest.approx(len(part) / len(refs) if kept else 0)
        assert torch.equal(sample["image"], dataset[i]["image"])
        assert part.describe(i) == dataset.describe(i)
    assert sum(sample["label_weight"].item() for sample in samples) == pytest.approx(len(part))


def test_smaller_shares_are_parts_of_larger_ones_and_only_serves_the_same_refs(dataset):
    small, large = (labelled_refs(PartlyLabelled(dataset, share))[0] for share in (0.3, 0.7))
    assert small < large < labelled_refs(PartlyLabelled(dataset, 1.0))[0]
    only = PartlyLabelled(dataset, 0.3, only=True)
    refs, samples = labelled_refs(only)
    assert len(only) == len(samples) == len(small)
    assert refs == small
    assert {sample["label_weight"].item() for sample in samples} == {1.0}
    assert all(sample["mask"].any() for sample in samples)
    assert (
        only.describe(1)
        == f"ref {samples[1]['ref_id']}, sentence {samples[1]['sent_id']}, image {samples[1]['image_id']}"
    )


def test_epochs_reach_the_set_inside(dataset):
    from fastkd.data._nested import set_epoch

    set_epoch(PartlyLabelled(dataset, 0.5), 3)
    assert dataset.epoch == 3


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_loss_is_the_weighted_mean_over_samples(dataset, dice_weight):
    part = PartlyLabelled(dataset, 0.5)
    batch = collate([part[i] for i in range(12)])
    logits = torch.randn(12, 2, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    each = [
        segmentation_loss(logits[i : i + 1], {"mask": batch["mask"][i : i + 1]}, dice_weight=dice_weight)
        for i in range(12)
    ]
    weights = batch["label_weight"]
    assert 0 < (weights > 0).sum() < 12
    loss = segmentation_loss(logits, batch, dice_weight=dice_weight)
    torch.testing.assert_close(loss, (torch.stack(each) * weights).mean())
    loss.backward()
    assert torch.equal(logits.grad.flatten(1).any(1), weights > 0)


def test_wrong_sets_and_shares_are_refused(dataset):
    for share in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="labels must be above 0 and at most 1"):
            PartlyLabelled(dataset, share)
    with pytest.raises(ValueError, match=r"leaves none of \d+ refs with a mask"):
        PartlyLabelled(dataset, 1e-9)
    every = ReferDataset(dataset.refcoco, dataset.tokenizer, image_size=32, sentences="all")
    for other in (every, [1, 2]):
        with pytest.raises(ValueError, match="needs one ReferDataset with sentences='random'"):
            PartlyLabelled(other, 0.5)
