"""Training from shards: divided between processes and workers, resumed, refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs the [ris] extra")
pytest.importorskip("webdataset", reason="needs the [stream] extra")

import torch
from stream_tools import Words, pictures
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset
from train_tools import distiller, run, same, toy

from fastkd import Distiller, Term
from fastkd.data import ShardDataset, write_shards
from fastkd.errors import FastKDWarning
from fastkd.train import TeacherCache, TrainConfig, segmentation_loss
from fastkd.train.balance import balance_on
from fastkd.train.loop import train
from fastkd.train.stream_feed import StreamOrder


def shards(folder: Path, count: int = 30, per_shard: int = 4) -> Path:
    write_shards(pictures(count), folder, samples_per_shard=per_shard)
    return folder


def stream(folder: Path, **options: Any) -> ShardDataset:
    return ShardDataset(folder, Words(), **{"image_size": 8, "max_words": 5, "buffer": 6, **options})


_ALLOW = {"allow_untrained_teacher": True}


def train_on(model: Any, data: ShardDataset, out: Path | None = None, **settings: Any) -> Any:
    more = {k: settings.pop(k) for k in ("resume", "resume_allow") if k in settings}
    config = TrainConfig(
        **{"steps": 9, "batch_size": 4, "lr": 1e-2, "device": "cpu", "power": 0.0, **_ALLOW, **settings}
    )
    return train(model, data, config, progress=False, out_dir=out, **more)


class Samples(Dataset[Any]):
    """Samples in memory."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def terms(cached: TeacherCache | None = None) -> Distiller:
    """Return a distiller whose term a cache can store, with its teacher or a cached one."""
    model = distiller()
    term = Term(F.mse_loss, "early", weight=0.5, name="kd")
    taps = {"student_taps": {"early": "stem"}, "teacher_taps": {"early": "stem"}}
    teacher = toy(100).eval().requires_grad_(False)
    return Distiller(model.student, cached or teacher, segmentation_loss, [term], **taps)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, workers: int) -> None:
    folder = shards(tmp_path / "shards")
    whole, part = toy(), toy()
    train_on(whole, stream(folder), workers=workers, accumulate=2)
    train_on(part, stream(folder), tmp_path / "run", steps=5, workers=workers, accumulate=2)
    resumed = toy(1)
    allow = {"resume": True, "resume_allow": ["steps"]}
    train_on(resumed, stream(folder), tmp_path / "run", workers=workers, accumulate=2, **allow)
    assert same(whole, resumed)
    assert not same(whole, part)


def test_other_shards_or_readers_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    train_on(toy(), stream(folder), tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match=r"stream.readers: 1 → 2\).*--resume-allow stream.readers"):
        train_on(toy(), stream(folder), tmp_path / "run", steps=2, workers=2, resume=True)
    allow = {"resume": True, "resume_allow": ["stream", "steps"]}
    assert train_on(toy(), stream(folder), tmp_path / "run", steps=3, workers=2, **allow).resumed_at == 2
    write_shards(pictures(30), folder, samples_per_shard=5, overwrite=True)
    with pytest.raises(ValueError, match=r"stream.shards: 8 → 6, stream.digest: "):
        train_on(toy(), stream(folder), tmp_path / "run", steps=2, resume=True)


def test_processes_and_workers_share_the_samples(tmp_path: Path) -> None:
    data = stream(shards(tmp_path / "shards", 32, 4))
    config = TrainConfig(batch_size=8, workers=2)
    ranks = [StreamOrder(data, config, rank, 2) for rank in (0, 1)]
    for first in (0, 4):  # 4 steps are a pass: 8 samples for each of 4 readers
        served = [
            n for order in ranks for step in range(first, first + 4) for [part] in [order.indices(step)] for n in part
        ]
        assert sorted(served) == list(range(32))


def test_batches_and_replays_hold_the_samples_of_the_order(tmp_path: Path) -> None:
    from fastkd.data import collate
    from fastkd.train.stream_feed import feed_for

    data = stream(shards(tmp_path / "shards"))
    config = TrainConfig(batch_size=6, accumulate=2, workers=2)
    for rank in (0, 1, 2):
        feed = feed_for(
            data, TrainConfig(batch_size=6, accumulate=2), collate, distiller(), torch.device("cpu"), rank, 3
        )
        batches = feed.start(4)
        for step in (4, 5):
            for micro, numbers in enumerate(feed.order.indices(step)):
                names = [f"s{n}" for n in numbers]
                assert next(batches)["id"] == names
                assert feed.reload(step, micro)["id"] == names
    assert StreamOrder(data, config, 0, 3).position(40)[0] > 3


def test_unsuitable_settings_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", 8, 4)
    with pytest.raises(ValueError, match=r"2 shards cannot be divided between 3 readers .*lower workers"):
        train_on(toy(), stream(folder), workers=3)
    with pytest.raises(ValueError, match="has 8 samples, fewer than one batch of 16"):
        train_on(toy(), stream(folder), batch_size=16)

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    with pytest.raises(ValueError, match="dataset is a ShardDataset, which is read in sequence: evaluation needs"):
        run(toy(), val_dataset=stream(folder))
    with pytest.raises(ValueError, match="dataset is a ShardDataset, which is read in sequence: a cache needs"):
        TeacherCache.build(tmp_path / "cache", distiller(), stream(folder))
    with pytest.raises(ValueError, match="train_dataset is a Endless, an IterableDataset"):
        run(toy(), Endless())


def test_samples_that_cannot_be_decoded_are_replaced_and_listed(tmp_path: Path) -> None:
    samples = pictures(30)
    for number in (4, 5, 17):
        samples[number]["image"] = b"\x89PNG" + bytes(9)
    write_shards(samples, tmp_path / "shards", samples_per_shard=4, format="parquet")
    data, settings = stream(tmp_path / "shards"), {"skip_bad_samples": True, "workers": 2, "steps": 9}
    with pytest.raises(ValueError, match=r"sample 's[0-9]+' of .* can't be decoded"):
        train_on(toy(), data)
    whole, resumed = toy(), toy(1)
    with pytest.warns(FastKDWarning, match=r"cannot be read and are replaced, such as sample [0-9]+ \(id s"):
        result = train_on(whole, data, **settings)
    assert set(result.bad_samples) == {4, 5, 17}
    with pytest.warns(FastKDWarning):
        train_on(toy(), data, tmp_path / "run", **{**settings, "steps": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastKDWarning)  # perhaps: what was reported before is not reported again
        train_on(resumed, data, tmp_path / "run", **settings, resume=True, resume_allow=["steps"])
    assert same(whole, resumed)
    order = [n for _, n in take(data.order(0, 1), 31)]
    served = [sample["id"] for sample, _ in take(data.serve(0, 1, skip_bad=True), 30)]
    for turn, name in enumerate(served):  # a bad sample's turn goes to the next good one, which keeps its own
        assert name == next(f"s{n}" for n in order[turn:] if n not in (4, 5, 17))


def test_a_teacher_cache_of_the_samples_serves_their_shards(tmp_path: Path) -> None:
    data = stream(shards(tmp_path / "shards", 12, 4))
    every = take(data.read(0, 1), 12) + take(data.read(0, 1, 12), 36)  # of three more passes: other sentences
    options = {"device": "cpu", "progress": False, "batch_size": 4, **_ALLOW}
    TeacherCache.build(tmp_path / "cache", terms(), Samples(every), **options)
    online, cached = terms(), terms(TeacherCache(tmp_path / "cache"))
    train_on(online, data, steps=3)
    train_on(cached, stream(tmp_path / "shards"), steps=3)
    assert same(online.student, cached.student)


def test_terms_are_balanced_on_the_first_samples(tmp_path: Path) -> None:
    model = distiller()
    balance_on(model, stream(shards(tmp_path / "shards")), {"kd": 0.5}, TrainConfig(batch_size=4, device="cpu"))
    assert model.weights["kd"] != 0.5


def take(iterator: Iterator[Any], count: int) -> list[Any]:
    return list(itertools.islice(iterator, count))
