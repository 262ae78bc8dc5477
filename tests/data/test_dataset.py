"""The torch dataset and its batches on a small hand-made set; lazy imports of fastkd.data."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import RefCOCO, ReferDataset, collate, load_tokenizer
from fastkd.data._prepare import normalise

HEIGHT, WIDTH = 12, 20
SENTENCES = ("red circle", "leftmost circle", "the one on top")


def write_set(root: Path, refs: int) -> RefCOCO:
    """Write refs 0, 2, 4, ... on alternating images, three sentences each: sent_id = 10 * ref_id + 0, 1, 2."""
    rng = np.random.default_rng(0)
    (root / "refcoco").mkdir()
    (root / "train2014").mkdir()
    images, annotations = [], []
    for i, polygon in ((1, [1, 2, 7, 2, 7, 8, 1, 8]), (2, [5, 4, 11, 4, 11, 10])):
        images.append({"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH})
        annotations.append({"id": i, "image_id": i, "segmentation": [polygon]})
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(root / "train2014" / f"{i}.jpg")
    rows = [
        {
            "ref_id": ref_id,
            "ann_id": 1 + k % 2,
            "image_id": 1 + k % 2,
            "category_id": 1,
            "split": "train",
            "sentences": [{"sent": text, "sent_id": 10 * ref_id + n} for n, text in enumerate(SENTENCES)],
        }
        for k, ref_id in enumerate(range(0, 2 * refs, 2))
    ]
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(rows))
    (root / "refcoco" / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return RefCOCO(root)


@pytest.fixture
def data(tmp_path: Path) -> RefCOCO:
    return write_set(tmp_path, 2)


def test_samples_and_batches(data: RefCOCO) -> None:
    dataset = ReferDataset(data, load_tokenizer("shapes"), image_size=32, max_words=10, sentences="all")
    assert len(dataset) == 6
    sample = dataset[4]
    assert (sample["ref_id"], sample["sent_id"], sample["image_id"]) == (2, 21, 2)
    assert sample["sentence"] == "leftmost circle"
    batch = collate([dataset[i] for i in (0, 4)])
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if isinstance(v, torch.Tensor)} == {
        "image": ((2, 3, 32, 32), torch.float32),
        "input_ids": ((2, 10), torch.int64),
        "word_mask": ((2, 10), torch.bool),
        "mask": ((2, 32, 32), torch.bool),
    }
    lists = {k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)}
    assert lists == {
        "ref_id": [0, 2],
        "sent_id": [0, 21],
        "image_id": [1, 2],
        "no_target": [False, False],
        "sentence": ["red circle", "leftmost circle"],
    }
    assert batch["word_mask"].sum(dim=1).tolist() == [4, 4]


def test_resizes_images_bilinearly_and_masks_by_nearest(data: RefCOCO) -> None:
    sample = ReferDataset(data, load_tokenizer("shapes"), image_size=30)[0]
    pixels = np.asarray(Image.fromarray(data.image(1)).resize((30, 30), Image.Resampling.BILINEAR)) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    torch.testing.assert_close(sample["image"], torch.from_numpy(expected).permute(2, 0, 1).float())
    rows = ((np.arange(30) + 0.5) * HEIGHT / 30).astype(int)
    columns = ((np.arange(30) + 0.5) * WIDTH / 30).astype(int)
    assert np.array_equal(sample["mask"].numpy(), data.mask(0)[rows][:, columns])


def test_random_sentences_depend_on_seed_epoch_and_index(tmp_path: Path) -> None:
    data, tokenizer = write_set(tmp_path, 60), load_tokenizer("shapes")

    def drawn(seed: int, epoch: int) -> list[int]:
        dataset = ReferDataset(data, tokenizer, image_size=8, seed=seed, cache=True)
        dataset.set_epoch(epoch)
        assert dataset.epoch == epoch
        dataset[5]  # an extra draw changes nothing
        return [dataset[i]["sent_id"] for i in range(len(dataset))]

    first = drawn(0, 0)
    assert first == drawn(0, 0)
    assert first != drawn(0, 1) != drawn(1, 1)
    counts = np.bincount([s % 10 for s in first], minlength=3)
    assert counts.min() >= 8, "each of the three sentences should be drawn"


def test_cache_returns_equal_independent_samples(data: RefCOCO) -> None:
    tokenizer = load_tokenizer("shapes")
    plain, cached = (ReferDataset(data, tokenizer, image_size=16, cache=c) for c in (False, True))
    cached.fill_cache()
    for path in data.image_root.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="can't be decoded"):
        plain[0]
    before = collate([cached[0], cached[1]])
    modified = cached[0]
    modified["image"].zero_()
    modified["mask"].fill_(True)
    after = collate([cached[0], cached[1]])
    assert all(torch.equal(before[k], after[k]) for k in ("image", "mask"))
    with pytest.raises(ValueError, match="cache=True"):
        plain.fill_cache()


def test_persistent_workers_see_the_epoch(tmp_path: Path) -> None:
    dataset = ReferDataset(write_set(tmp_path, 12), load_tokenizer("shapes"), image_size=8)
    pickle.loads(pickle.dumps(dataset))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, collate_fn=collate, num_workers=1, persistent_workers=True
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen = [s for batch in loader for s in batch["sent_id"]]
        assert seen == [dataset[i]["sent_id"] for i in range(12)]


def test_normalisation_subtracts_mean_and_divides_by_std_of_each_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (14, 9, 3), dtype=np.uint8)[::2]
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 1.5)
    image = normalise(pixels, mean, std)
    exact = (torch.from_numpy(pixels).double().permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / (
        torch.tensor(std)[:, None, None]
    )
    torch.testing.assert_close(image.double(), exact, rtol=1e-5, atol=1e-6)
    assert image.dtype == torch.float32
    assert image.is_contiguous()


def report_of_stacking(samples: list[torch.Tensor]) -> list[tuple]:
    """Collate in this process, a loading one; return what became of equal and of mixed dtypes."""
    batches = [[{"image": sample.to(dtype)} for sample, dtype in zip(samples, pair, strict=True)] for pair in PAIRS]
    images = [collate(batch)["image"] for batch in batches]
    return [(image.is_shared(), image.dtype, image.tolist()) for image in images]


PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.float64),
    (torch.bool, torch.bool),
    (torch.bool, torch.int64),
)


def test_loading_processes_stack_into_shared_memory_and_mixed_dtypes_as_the_main_process() -> None:
    rows = [torch.eye(3)[:, 1:].T, torch.ones(2, 3)]  # of different strides
    [found] = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, collate_fn=report_of_stacking)
    expected = [torch.stack([row.to(dtype) for row, dtype in zip(rows, pair, strict=True)]) for pair in PAIRS]
    assert [(dtype, values) for _, dtype, values in found] == [(x.dtype, x.tolist()) for x in expected]
    assert [shared for shared, _, _ in found] == [True, False, True, False]


def test_rejects_bad_arguments(data: RefCOCO) -> None:
    tokenizer = load_tokenizer("shapes")
    for options, message in (
        ({"sentences": "first"}, "sentences must be 'random' .* or 'all'"),
        ({"image_size": 0}, "image_size must be a positive integer, got 0"),
        ({"max_words": 2}, "max_words must be an integer of at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            ReferDataset(data, tokenizer, **options)
    with pytest.raises(IndexError, match="index 2 is out of range"):
        ReferDataset(data, tokenizer)[2]
    with pytest.raises(ValueError, match="empty batch"):
        collate([])


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_are_lazy_and_name_a_missing_extra() -> None:
    out = run_python(
        "import sys, fastkd.data as d, fastkd.data.shapes as s\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers', 'pycocotools'} & set(sys.modules)\n"
        "sys.modules['pycocotools'] = None\n"
        "for access in (lambda: d.RefCOCO, lambda: d.ReferFolder):\n"
        "    try: access()\n"
        "    except ImportError as e: print(e)\n"
        "try: d.nonsense\n"
        "except AttributeError as e: print(e)\n"
        "print('make_shapes' in dir(d))\n"
    )
    lines = out.splitlines()
    assert len(lines) == 4
    for line in lines[:2]:
        assert "needs the package 'pycocotools" in line
        assert "pip install 'fastkd[ris]'" in line
    assert lines[2:] == ["module 'fastkd.data' has no attribute 'nonsense'", "True"]


def test_a_missing_reader_of_shards_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.data import ShardDataset, write_shards

    sample = {"id": "a", "image": np.zeros((4, 4, 3), np.uint8), "mask": np.ones((4, 4), bool), "sentence": "one"}
    write_shards([sample], tmp_path / "shards")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    data = ShardDataset(tmp_path / "shards", lambda texts, words: (torch.ones(1, words), torch.ones(1, words)))
    with pytest.raises(ImportError, match=r"needs the package 'webdataset': pip install 'fastkd\[stream\]'"):
        next(iter(data))
