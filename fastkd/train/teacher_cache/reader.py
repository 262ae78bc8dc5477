"""`TeacherCache`: read the teacher's output from shards, in place of running the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from fastkd._integers import ceil_div
from fastkd._messages import shortened
from fastkd._wrappers import unwrap
from fastkd.data._prepare import with_images
from fastkd.distill.distiller import Distiller
from fastkd.distill.recorded import PREFIX, Part, RecordedTeacher
from fastkd.distill.terms import teacher_paths
from fastkd.distill.words import is_sentence, teacher_keys
from fastkd.errors import FastKDWarning
from fastkd.train.config import Precision, TrainConfig
from fastkd.train.digest import weights_digest
from fastkd.train.shard import teacher_summary
from fastkd.train.teacher_cache import description
from fastkd.train.teacher_cache.keys import digest_of, sample_keys
from fastkd.train.teacher_cache.measure import Collate, spread
from fastkd.train.teacher_cache.pca import read_bases
from fastkd.train.teacher_cache.shards import Shard, shard_path
from fastkd.train.teacher_cache.views import augmented_in

Dtype = Literal["teacher", "bf16", "fp16", "int8"]
_FIX = "cache it too (fastkd cache, with all terms of the run)"
_IDS = ("ref_id", "sent_id", "image_id")


class TeacherCache(RecordedTeacher):
    """A teacher that was run once over a dataset: pass it to a `Distiller` in place of the teacher.

    Samples are found by what the teacher would receive, image and tokens, so a sample that was not cached, or is
    transformed in another way, is an error. Shards are memory-mapped and their rows checked against a CRC-32. Outputs
    have the teacher's dtype. `fastkd.train.train` reads them in its data-loading processes; in your own loop, pass
    ``cache.collate(collate, distiller)`` to the loader.

    Args:
        folder: a folder written by `TeacherCache.build` or ``fastkd cache``.
        teacher: the teacher to compare with the cached one, by all its weights; None compares nothing.

    Attributes:
        folder: the folder.
        fingerprint: digest of all that determines the content: teacher, data, transform, terms and dtype.
        precision: precision that the teacher was run in.
        notes: what the builder added, as JSON values.
        measured: figures of the first batch, see `build`.

    Raises:
        FileNotFoundError: the folder is not a teacher cache.
        ValueError: a shard is missing, torn or of another cache, or the cache is of another teacher.

    Example:
        >>> TeacherCache.build("cache", distiller, every_sentence, batch_size=16)  # runs the teacher once
        >>> cached = Distiller(student, TeacherCache("cache"), segmentation_loss, terms)
        >>> train(cached, train_set, config)
    """

    def __init__(self, folder: str | Path, teacher: nn.Module | None = None) -> None:
        self.folder = Path(folder)
        content = description.read_description(self.folder)
        parts = {
            path: Part(
                term["count"],
                tuple(getattr(torch, name) for name in term["dtypes"]),
                tuple(map(tuple, term["orders"])),
                tuple(term.get("scaled", ())),
            )
            for path, term in content["terms"]["paths"].items()
        }
        taps = {name: (target[0], target[1]) for name, target in content["terms"]["taps"].items()}
        reduced = content["terms"].get("pca")
        bases = read_bases(self.folder, reduced["basis"]).bases if reduced else {}
        super().__init__(parts, taps, _FIX, bases)
        if teacher is not None and weights_digest(unwrap(teacher)) != content["teacher"]["weights"]:
            raise ValueError(
                f"{folder} holds the output of another teacher ({content['teacher']['class']} with other weights than "
                "this one): build the cache again with this teacher, in another folder"
            )
        self.fingerprint = description.fingerprint(content)
        self.precision: str = content["computed"]["precision"]
        self.notes: dict[str, Any] = content["notes"]
        self.measured: dict[str, Any] = content["measured"]
        self.summary: str = content["teacher"]["summary"]
        self._inputs: dict[str, str] = content["data"]["inputs"]
        self._transform: dict[str, Any] = content["transform"]["declared"]
        self._samples: int = content["data"]["samples"]
        self._per_shard: int = content["computed"]["shard_samples"]
        self._shards: dict[int, Shard] = {}
        self._rows: dict[bytes, int] = {}
        for number in range(ceil_div(self._samples, self._per_shard)):
            shard = Shard(shard_path(self.folder, number), self.fingerprint)
            self._rows |= {key: number * self._per_shard + row for row, key in enumerate(shard.keys())}

    @classmethod
    def build(
        cls,
        folder: str | Path,
        distiller: Distiller,
        dataset: Dataset[Any],
        *,
        batch_size: int = 16,
        dtype: Dtype = "teacher",
        pca: Mapping[str, int] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        channels_last: bool = False,
        workers: int = 0,
        threads: int | None = None,
        collate: Collate | None = None,
        overwrite: bool = False,
        progress: bool = True,
        notes: Mapping[str, Any] | None = None,
        allow_untrained_teacher: bool = False,
    ) -> TeacherCache:
        """Run a distiller's teacher over a dataset and store what its terms read; return the cache.

        Shards appear one by one, each complete. A build that was stopped or killed continues with the missing shards
        when it is called again. Under ``accelerate launch`` or ``torchrun``, every process builds its share of the
        shards; they need a common file system. Size and time, measured on the first batch, and for a narrower
        dtype or with ``pca`` the relative error of each term's loss and gradient over three batches, are printed before
        the work begins.

        Args:
            folder: the cache's folder.
            distiller: student, teacher and the terms whose inputs are stored; the student is used to measure errors.
            dataset: every sample that a run will use; for a `ReferDataset`, with ``sentences="all"``, for
                `AugmentedViews`, their `all()`.
            batch_size: samples per forward of the teacher. With the runs' size of a micro-batch, precision, memory
                format, device and CPU threads, their results are those of a teacher online, bit for bit; other values
                may change the last digits.
            dtype: "teacher" stores the teacher's own dtype, "bf16" and "fp16" half of fp32's size, "int8" about 30 %
                of it: codes, with a scale for each group of at least 16 values.
            pca: path of a map to a rank: its channels are stored as coefficients of so many principal directions and
                restored when read. For maps that only `channel_kd` and `pixel_relation_kd` compare.
            device: as in `TrainConfig`.
            precision: as in `TrainConfig`.
            channels_last: as in `TrainConfig`.
            workers: data-loading processes.
            threads: torch's CPU threads during the build; None keeps the current number.
            collate: turns a list of samples into a batch; default: `fastkd.data.collate`.
            overwrite: replace another cache in ``folder``.
            progress: show figures and progress.
            notes: JSON values to keep with the cache.
            allow_untrained_teacher: as in `TrainConfig`.

        Raises:
            ValueError: a rank is out of range, or a term reads a reduced map that does not compare relations;
                ``folder`` holds another cache (the message says in what it differs), the dataset draws
                images or sentences at random, the teacher mixes the samples of a batch, changes between two passes,
                lacks weights or returns NaN, a term selects by a function, or a value exceeds the range of ``dtype``.
            OSError: the disk has less free space than needed.
        """
        from fastkd.train.teacher_cache.build import Build

        config = TrainConfig(
            batch_size=batch_size,
            device=device,
            precision=precision,
            channels_last=channels_last,
            workers=workers,
            threads=threads,
            allow_untrained_teacher=allow_untrained_teacher,
        )
        Build(Path(folder), distiller, dataset, dtype, pca or {}, config, collate).run(overwrite, progress, notes or {})
        return cls(folder)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # each process maps the files itself

    def collate(
        self, collate: Callable[[list[Any]], dict[str, Any]], distiller: Distiller
    ) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collate function that adds what the distiller's terms read from the teacher's output."""
        paths = [path for term in distiller.terms.values() for path in teacher_paths(term)]
        return _CollateCached(collate, self, distiller.inputs, tuple(dict.fromkeys(paths)))

    def read(self, batch: Mapping[str, Any], inputs: Sequence[str], paths: Sequence[str]) -> dict[str, Tensor]:
        """Return the recorded tensors (B, ...) of a batch by the keys under which a `RecordedTeacher` finds them.

        Args:
            batch: a batch on the CPU.
            inputs: keys that the models receive, as in `Distiller`.
            paths: what to read.

        Raises:
            ValueError: a sample is not in the cache, or its shard is damaged.
        """
        given = teacher_keys(inputs, batch)
        if given != self._inputs:
            raise ValueError(
                f"the cached teacher received {self._inputs} (input: key of the batch), this batch would give it "
                f"{given}: use the dataset's options of the cache (such as teacher_tokenizer)"
            )
        keys = sample_keys(with_images(batch), list(given.values()))
        rows = [self._rows.get(key, -1) for key in keys]
        if -1 in rows:
            raise ValueError(self._not_cached(batch, keys, rows.index(-1)))
        found = {}
        for path in paths:
            for name in self.parts[path].names(path):
                found[PREFIX + name] = torch.stack([self._row(name, row) for row in rows])
        return found

    def check_dataset(self, dataset: Dataset[Any], collate: Collate, inputs: Sequence[str]) -> None:
        """Look up a few samples of a dataset, in every view.

        Raises:
            ValueError: the dataset declares another transform, or a sample is not in the cache.
        """
        declared = description.declared_transform(dataset)
        text = ", ".join(
            description.differences(self._transform[name], value, name)
            for name, value in declared.items()
            if name in self._transform and self._transform[name] != value
        )
        if text:
            raise ValueError(
                f"{self.folder} was computed with another transform ({text}): use the dataset's options of the cache, "
                "or build a cache with these"
            )
        if isinstance(dataset, IterableDataset):
            return  # a missing sample is an error when it is read
        augmented = augmented_in(dataset)
        epochs = [part.epoch for part in augmented]
        try:
            for view in range(max((part.views for part in augmented), default=1)):
                for part in augmented:
                    part.set_epoch(view)
                for index in spread(len(dataset), 8):  # type: ignore[arg-type]
                    self.read(collate([dataset[index]]), inputs, ())
        finally:
            for part, epoch in zip(augmented, epochs, strict=True):
                part.set_epoch(epoch)

    def _row(self, name: str, row: int) -> Tensor:
        number, position = divmod(row, self._per_shard)
        if number not in self._shards:
            self._shards[number] = Shard(shard_path(self.folder, number), self.fingerprint)
        return self._shards[number].row(name, position)

    def _not_cached(self, batch: Mapping[str, Any], keys: Sequence[bytes], number: int) -> str:
        """Return why the sample at a position of the batch is not found."""
        ids = [f"{key} {batch[key][number]}" for key in _IDS if key in batch]
        sample = f"sample {number} of the batch" + (f" ({', '.join(ids)})" if ids else "")
        names = list(self._inputs.values())
        unknown = [
            name
            for n, name in enumerate(names)
            if digest_of(keys[number], n) not in {digest_of(key, n) for key in self._rows}
        ]
        if unknown and not all(is_sentence(name) for name in unknown):
            reason = (
                f"no cached sample has its {' or '.join(unknown)}: the dataset is another one, its transform differs "
                "(size, normalisation), or it augments at random or in views (AugmentedViews) that were not cached"
            )
        elif unknown:
            reason = f"no cached sample has its {' or '.join(unknown)}: another sentence, tokenizer or number of words"
        else:
            reason = f"each of its {', '.join(names)} is in the cache, but not together: another sentence of this image"
        return f"{sample} is not in the cache {self.folder}: {reason}"

    def extra_repr(self) -> str:
        """Return folder and content, for ``print``."""
        return f"{str(self.folder)!r}, {self._samples} samples, {shortened(list(self.parts))}"


class _CollateCached:
    """Collate samples and add what was recorded for them; a class, so that loading processes can receive it."""

    def __init__(
        self,
        collate: Callable[[list[Any]], dict[str, Any]],
        cache: TeacherCache,
        inputs: tuple[str, ...],
        paths: tuple[str, ...],
    ) -> None:
        self.collate, self.cache, self.inputs, self.paths = collate, cache, inputs, paths

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = self.collate(samples)
        return {**batch, **self.cache.read(batch, self.inputs, self.paths)}


def collate_for(
    distiller: Distiller, collate: Callable[[list[Any]], dict[str, Any]]
) -> Callable[[list[Any]], dict[str, Any]]:
    """Return ``collate``, or with a cached teacher one that adds its output."""
    teacher = distiller.teacher
    return teacher.collate(collate, distiller) if isinstance(teacher, TeacherCache) else collate


def teacher_settings(teacher: nn.Module) -> dict[str, str]:
    """Return what a run's settings hold of its teacher, so that a resumed run has the same one, from the same cache."""
    if isinstance(teacher, TeacherCache):
        return {"teacher": teacher.summary, "teacher_cache": teacher.fingerprint}
    return {"teacher": teacher_summary(teacher)}


def check_cache(distiller: Distiller, dataset: Dataset[Any], collate: Collate, precision: str) -> None:
    """Check a cached teacher, if there is one, against a run's training set and precision, before the first step.

    Raises:
        ValueError: as in `TeacherCache.check_dataset`.
    """
    cache = distiller.teacher
    if not isinstance(cache, TeacherCache):
        return
    cache.check_dataset(dataset, collate, distiller.inputs)
    if cache.precision != precision:
        warnings.warn(
            f"{cache.folder} was computed in {cache.precision}, this run computes in {precision}: the teacher's output "
            "differs from that of a teacher online; build the cache with the run's precision for equal results",
            FastKDWarning,
            stacklevel=2,
        )
