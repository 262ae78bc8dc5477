"""The teacher's output, computed once and read from a cache."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_cache_tools import Net, build, make
from torch import Tensor
from torch.nn import functional as F
from train_tools import Scenes, collate, read_log, run, same

from fastkd import Term
from fastkd.distill import Schedule
from fastkd.errors import FastKDWarning
from fastkd.train import TeacherCache
from fastkd.train.teacher_cache import shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a cache of 32 samples in 4 shards of one batch."""
    path = tmp_path_factory.mktemp("cache") / "teacher"
    assert len(build(path)) == 32
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


class TestTraining:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_equals_the_teacher_online_bit_for_bit(self, workers: int, folder: Path, tmp_path: Path) -> None:
        online, cached = make(), make(TeacherCache(folder))
        run(online, out=tmp_path / "online", log_every=1)
        run(cached, out=tmp_path / "cached", log_every=1, workers=workers)
        assert same(online.student, cached.student)
        logs = [
            [(line["terms"], line["loss"]) for line in read_log(tmp_path / name) if line["event"] == "train"]
            for name in ("online", "cached")
        ]
        assert logs[0] == logs[1]
        assert len(logs[0]) == 6

    def test_equal_in_channels_last_memory_format(self, tmp_path: Path) -> None:
        """The losses depend on the teacher's strides in the last digits, so these are those of a teacher online."""
        cache = build(tmp_path / "c", channels_last=True)
        cached, online = make(cache), make()
        batch = cache.collate(collate, cached)([Scenes()[n] for n in range(8)])
        online.to(memory_format=torch.channels_last)
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        exact, ours = online.record_teacher({**batch, "image": image}), cache.output(batch)
        assert exact["logits"].stride() == ours["logits"].stride() != exact["logits"].contiguous().stride()
        assert torch.equal(exact["logits"], ours["logits"])
        run(cached, channels_last=True), run(online, channels_last=True)
        assert same(cached.student, online.student)

    def test_resumes_from_the_same_cache_only(self, folder: Path, copied: Path, tmp_path: Path) -> None:
        whole = make(TeacherCache(folder))
        run(whole, out=tmp_path, checkpoint_every=3)
        shutil.rmtree(tmp_path / "checkpoints/step-000006")
        with pytest.raises(ValueError, match=r"settings .teacher_cache: '[0-9a-f]{32}' → None"):
            run(make(), out=tmp_path, resume=True)
        resumed = make(TeacherCache(copied))  # the same content in another folder
        assert run(resumed, out=tmp_path, resume=True).resumed_at == 3
        assert same(resumed.student, whole.student)

    def test_another_precision_is_a_warning(self, folder: Path) -> None:
        with pytest.warns(FastKDWarning, match="was computed in fp32, this run computes in bf16"):
            run(make(TeacherCache(folder)), steps=1, precision="bf16")

    def test_teacher_cannot_run_without_recorded_output(self, folder: Path) -> None:
        distiller = make(TeacherCache(folder))
        with pytest.raises(ValueError, match=r"batch has no recorded output of the teacher.*TeacherCache\.collate"):
            distiller(collate([Scenes()[0]]))

    def test_distiller_with_a_cache_can_be_copied_and_pickled(self, folder: Path) -> None:
        cache = TeacherCache(folder)
        batch = cache.collate(collate, make(cache))([Scenes()[n] for n in range(8)])  # opens a shard
        expected = make(cache)(batch).terms
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            again = make(other)(other.collate(collate, make(other))([Scenes()[n] for n in range(8)])).terms
            assert {name: value.item() for name, value in again.items()} == {
                name: value.item() for name, value in expected.items()
            }


class TestBuild:
    def test_stores_what_the_teacher_returns(self, folder: Path) -> None:
        distiller, cache = make(), TeacherCache(folder)
        batch = collate([Scenes()[n] for n in (31, 4, 4, 17, 0, 9, 30, 2)])
        expected = distiller.record_teacher(batch)
        batch |= cache.read(batch, distiller.inputs, list(expected))
        output = cache.output(batch)
        assert set(output) == set(expected) == {"stages.*", "logits", "stages.-1", "word_mask", "early"}
        for path, value in expected.items():
            ours = output[path]
            pairs = zip(value, ours, strict=True) if isinstance(value, list) else [(value, ours)]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)

    def test_incomplete_shard_has_batches_of_full_size(self, tmp_path: Path) -> None:
        """13 samples in batches of 8: the second batch is filled up, so its results are those of a full batch."""
        sizes: list[int] = []
        distiller = make()
        assert distiller.teacher is not None
        distiller.teacher.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["image"])), with_kwargs=True
        )
        cache = build(tmp_path / "c", distiller, Scenes(13))
        assert len(cache) == 13
        assert set(sizes) == {8}

    def test_killed_build_continues_with_the_missing_shards(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target, written = tmp_path / "c", []
        save = shards.save_file

        def dies(tensors: Any, path: str, **options: Any) -> None:
            if len(written) == 2:
                Path(path).write_bytes(b"half")
                raise KeyboardInterrupt
            written.append(path)
            save(tensors, path, **options)

        monkeypatch.setattr(shards, "save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            build(target)
        monkeypatch.setattr(shards, "save_file", save)
        assert len(shard_files(target)) == 2
        with pytest.raises(ValueError, match=r"shard-00002.safetensors is missing: build the cache again"):
            TeacherCache(target)
        (target / ".shard-00002.safetensors.1.partial").write_bytes(b"left by SIGKILL")
        times = {path: path.stat().st_mtime_ns for path in target.glob("shard-*")}
        build(target)
        assert shard_files(target) == shard_files(folder)
        assert {path: path.stat().st_mtime_ns for path in times} == times  # kept, not computed again
        assert not list(target.glob(".*"))

    def test_damaged_shards_are_computed_again(self, copied: Path, folder: Path) -> None:
        (copied / "shard-00001.safetensors").write_bytes(shard_files(folder)["shard-00001.safetensors"][:-100])
        flip(copied / "shard-00003.safetensors")
        build(copied)
        assert shard_files(copied) == shard_files(folder)

    @pytest.mark.parametrize(
        ("dtype", "name", "size", "bound"),
        [("bf16", "bfloat16", 4352, 1e-2), ("fp16", "float16", 4352, 1e-3), ("int8", "int8", 2176 + 4 * 40, 2e-2)],
    )
    def test_narrower_dtype_is_smaller_and_its_error_is_measured(
        self, dtype: Any, name: str, size: int, bound: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        online = make(dropout=0.0)
        later = Schedule(start=100)  # without a meaning here
        terms = list(online.terms.values())
        online.terms = {term.name: replace(term, schedule=later) for term in terms}
        cache = build(tmp_path / "c", online, dtype=dtype, progress=True)
        online.terms = {term.name: term for term in terms}
        assert cache.measured["bytes_per_sample"] == size + 3  # the word mask stays as it is
        printed = capsys.readouterr().err
        assert "32 samples of " in printed
        for term, error in cache.measured["errors"].items():
            assert 0 < error["gradient"] < bound, term
            assert f"{term}, stored as {name}: relative error" in printed
        distiller = make(cache, dropout=0.0)
        difference, total = 0.0, 0.0
        for start in (0, 10, 21):  # the batches that it was measured on
            batch = cache.collate(collate, distiller)([Scenes()[(start + n) % 32] for n in range(8)])
            ours, exact = distiller(batch).terms["relation"].item(), online(batch).terms["relation"].item()
            difference, total = difference + (ours - exact) ** 2, total + exact**2
            assert cache.output(batch)["logits"].dtype == torch.float32
        assert math.sqrt(difference / total) == pytest.approx(cache.measured["errors"]["relation"]["loss"], rel=0.05)


def flip(path: Path) -> None:
    """Change one value of the last recorded tensor, so that the file is still a valid shard."""
    tensors = load_file(path)
    tensors["value/logits"][3, 0, 0, 0] += 1
    with_metadata = json.loads((path.parent / "cache.json").read_text())
    from fastkd.train.teacher_cache.description import fingerprint

    save_file(tensors, path, metadata={"cache": fingerprint(with_metadata)})


class Changed(Scenes):
    """`Scenes` with a change to every image or sentence."""

    def __init__(self, change: Callable[[dict[str, Any], int], None], n: int = 32) -> None:
        super().__init__(n)
        self.change = change

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = dict(super().__getitem__(i))
        self.change(sample, self.epochs[-1] if self.epochs else 0)
        return sample


def augmented(sample: dict[str, Any], epoch: int) -> None:
    sample["image"] = sample["image"] + torch.rand(())


def drawn(sample: dict[str, Any], epoch: int) -> None:
    sample["input_ids"] = (sample["input_ids"] + epoch) % 8


def scaled(sample: dict[str, Any], epoch: int) -> None:
    sample["image"] = sample["image"] * 2


def smaller(sample: dict[str, Any], epoch: int) -> None:
    sample["image"], sample["mask"] = sample["image"][:, :4, :4], sample["mask"][:4, :4]


def longer(sample: dict[str, Any], epoch: int) -> None:
    sample["input_ids"] = F.pad(sample["input_ids"], (0, 2))


def other_sentence(sample: dict[str, Any], epoch: int) -> None:
    sample["input_ids"] = Scenes().ids[(sample["ref_id"] + 1) % 32]


class TestRefusedForTraining:
    """Each planted fault is one error before the first step."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (augmented, "no cached sample has its image: .*augments at random"),
            (scaled, r"sample 0 of the batch \(ref_id 0, sent_id 0\) is not in the cache .* its transform differs"),
            (smaller, "no cached sample has its image"),
            (longer, "no cached sample has its input_ids: another sentence, tokenizer or number of words"),
            (other_sentence, "is in the cache, but not together: another sentence of this image"),
        ],
    )
    def test_other_data(self, change: Any, message: str, folder: Path) -> None:
        student = make(TeacherCache(folder))
        before = copy.deepcopy(student.student)
        with pytest.raises(ValueError, match=message):
            run(student, Changed(change))
        assert same(before, student.student)

    def test_declared_transform_is_named(self, tmp_path: Path) -> None:
        data = Scenes()
        data.image_mean, data.image_size = (0.5, 0.5, 0.5), 8
        cache = build(tmp_path / "c", data=data)
        other = Scenes()
        other.image_mean, other.image_size = (0.5, 0.5, 0.4), 8
        with pytest.raises(ValueError, match=r"another transform \(image_mean: \[\[0.5, 0.5, 0.5\]\] → "):
            run(make(cache), other)

    def test_another_teacher(self, folder: Path) -> None:
        teacher = make().teacher
        assert teacher is not None
        assert TeacherCache(folder, teacher).parts
        with torch.no_grad():
            teacher.head.bias[1] += 1e-6
        with pytest.raises(ValueError, match="output of another teacher"):
            TeacherCache(folder, teacher)

    def test_term_that_is_not_cached(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"term 'kd': 'stages.0' of the teacher was not recorded: cache it too"):
            make(TeacherCache(folder), terms=[Term(F.mse_loss, "stages.0", name="kd")])

    def test_function_as_a_selector(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="term 'kd' selects from the teacher by a function"):
            make(TeacherCache(folder), terms=[Term(F.mse_loss, lambda out: out.logits, name="kd")])

    def test_tap_of_another_module(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"'early' is module \('head', None\) here, but \('stem', None\) was"):
            make(TeacherCache(folder), teacher_taps={"early": "head"})

    def test_torn_shard(self, copied: Path) -> None:
        path = copied / "shard-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"shard-00002.safetensors is torn or damaged .*: build the cache again"):
            TeacherCache(copied)

    def test_shard_of_another_cache(self, copied: Path, tmp_path: Path) -> None:
        build(tmp_path / "other", dtype="bf16")
        shutil.copy(tmp_path / "other/shard-00001.safetensors", copied)
        with pytest.raises(ValueError, match=r"shard-00001.safetensors belongs to another cache"):
            TeacherCache(copied)

    def test_changed_value(self, copied: Path) -> None:
        flip(copied / "shard-00003.safetensors")
        cache = TeacherCache(copied)
        with pytest.raises(ValueError, match=r"row 3 of 'logits' has another CRC-32 than was written"):
            run(make(cache))

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "is not a teacher cache: it has no cache.json"), ("{", "is damaged"), ('{"format": 99}', "format 99")],
    )
    def test_no_cache(self, content: str | None, message: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "cache.json").write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            TeacherCache(tmp_path)


class TestRefusedWhileBuilding:
    @pytest.mark.parametrize(
        ("distiller", "data", "options", "message"),
        [
            (lambda: make(teacher=other_teacher()), Scenes, {}, r"of another teacher \(weights: "),
            (make, lambda: Scenes(31), {}, r"of another dataset \(samples: 32 → 31"),
            (make, lambda: Changed(scaled), {}, "of another dataset .probes.image"),
            (make, lambda: Changed(smaller), {}, r"of another transform .*\(shapes.image: \[3, 8, 8\] → \[3, 4, 4\]\)"),
            (lambda: make(terms=[Term(F.mse_loss, "logits")]), Scenes, {}, "of other terms or taps"),
            (make, Scenes, {"dtype": "bf16"}, r"in another dtype \('teacher' → 'bfloat16'\)"),
            (make, Scenes, {"batch_size": 4}, "computed in another way .batch_size: 8 → 4"),
        ],
    )
    def test_another_cache_in_the_folder(
        self, distiller: Any, data: Any, options: dict[str, Any], message: str, folder: Path
    ) -> None:
        before = shard_files(folder)
        with pytest.raises(ValueError, match=message):
            build(folder, distiller(), data(), **options)
        assert shard_files(folder) == before

    def test_overwrite_replaces_it(self, copied: Path) -> None:
        build(copied, dtype="bf16", overwrite=True)
        assert TeacherCache(copied).read(batch := collate([Scenes()[0]]), ("image", "input_ids"), ["logits"])
        assert batch

    def test_folder_with_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(FileExistsError, match="something else than a teacher cache"):
            build(tmp_path, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (augmented, "image of sample 0 changes from epoch to epoch: a random augmentation"),
            (drawn, r"sentence of sample 0 changes from epoch to epoch: .*sentences='all'"),
        ],
    )
    def test_random_samples(self, change: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "c", data=Changed(change))
        assert not (tmp_path / "c").exists()

    def test_teacher_that_mixes_samples(self, tmp_path: Path) -> None:
        distiller = make()
        distiller.teacher.mixes = True
        with pytest.raises(ValueError, match=r"changes by .* with the order of the batch: its forward mixes samples"):
            build(tmp_path / "c", distiller)

    def test_nan_in_a_later_sample(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="of the teacher on samples 16 to 23 holds NaN or Inf"):
            build(tmp_path / "c", data=Scenes(poison=20))

    def test_range_of_fp16(self, tmp_path: Path) -> None:
        distiller = make()
        with torch.no_grad():
            distiller.teacher.head.bias += 1e5
        with pytest.raises(ValueError, match=r"'logits' of the teacher has values of 1e.05, outside the range"):
            build(tmp_path / "c", distiller, dtype="fp16")

    def test_value_without_rows(self, tmp_path: Path) -> None:
        teacher = make().teacher
        term = Term(F.mse_loss, "scale", name="kd")
        distiller = make(terms=[term], teacher=Scaled(teacher), student_taps=None, teacher_taps=None)
        with pytest.raises(ValueError, match=r"'scale' of the teacher cannot be cached: expected tensors with one row"):
            build(tmp_path / "c", distiller)

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match=r"needs .* KiB, but the disk has 1000 B free"):
            build(tmp_path / "c")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"terms": []}, "at least one term"),
            ({"terms": [Term(F.mse_loss, lambda out: out.logits, name="kd")]}, "term 'kd' selects .* by a function"),
        ],
    )
    def test_nothing_to_store(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "c", make(**changes))


class Scaled(torch.nn.Module):
    """A network whose output has a scalar."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> Any:
        return {"scale": self.inner(image, input_ids).logits.mean()}


def other_teacher() -> Net:
    torch.manual_seed(101)
    return Net(8).eval().requires_grad_(False)
