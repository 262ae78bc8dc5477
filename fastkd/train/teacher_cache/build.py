"""Run a teacher over a dataset, shard by shard."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastkd._atomic import remove_leftovers
from fastkd._integers import ceil_div, round_up
from fastkd._messages import with_unit
from fastkd._runtime import autocast, modes_kept, to_device
from fastkd._wrappers import is_sharded, unwrap
from fastkd.data._loading import batches
from fastkd.distill import checks
from fastkd.distill.distiller import Distiller
from fastkd.distill.recorded import RecordedTeacher
from fastkd.train.config import TrainConfig
from fastkd.train.digest import summary, weights_digest
from fastkd.train.host import check_batch, check_tokenizers
from fastkd.train.launch import join
from fastkd.train.log import Progress
from fastkd.train.samples import TrainingSamples
from fastkd.train.teacher_cache import description, pca
from fastkd.train.teacher_cache.keys import digest_of, sample_keys
from fastkd.train.teacher_cache.measure import (
    Collate,
    check_independent,
    flatten,
    repeatable_keys,
    spread,
    storage_errors,
)
from fastkd.train.teacher_cache.shards import DamagedShard, Shard, shard_path, write_shard
from fastkd.train.teacher_cache.storage import Recorded, Storage

_SHARD_BYTES = 256 << 20  # a kill loses at most the shard that is being computed
_SHARDS = 8  # at least, if there are so many batches: a share for several processes
_PCA_BATCHES = 8  # of which principal directions are computed
_MEASURED = 3  # batches on which the errors of a storage are measured


class _Plan(NamedTuple):
    """Samples of one forward of the teacher; those after ``used`` only fill the batch."""

    shard: int
    indices: list[int]
    used: int


class Build:
    """One call of `TeacherCache.build`."""

    def __init__(
        self,
        folder: Path,
        distiller: Distiller,
        dataset: Dataset[Any],
        dtype: str,
        ranks: Mapping[str, int],
        config: TrainConfig,
        collate: Collate | None,
    ) -> None:
        self.storage = Storage(dtype)
        if distiller.teacher is None or isinstance(distiller.teacher, RecordedTeacher):
            raise ValueError("a teacher cache needs a distiller with a teacher that runs")
        if is_sharded(unwrap(distiller.teacher)):
            raise ValueError(
                "the teacher is sharded over the processes, which compute different samples of a cache: load it again"
            )
        if not distiller.terms:
            raise ValueError("a teacher cache needs at least one term: its terms determine what is stored")
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}, which is read in sequence: a cache needs random access; "
                "build it from the samples that the shards were written from (the same images and sentences are found)"
            )
        if not len(dataset):  # type: ignore[arg-type]
            raise ValueError("the dataset is empty: there is nothing to cache")
        pca.check_ranks(ranks, list(distiller.terms.values()))
        self.ranks = dict(ranks)
        self.processes, self.device, self.precision = join(config)
        self.folder, self.distiller, self.dataset = folder, distiller, dataset
        self.config, self.batch_size = config, config.batch_size
        self.count: int = len(dataset)  # type: ignore[arg-type]
        if collate is None:
            from fastkd.data import collate as default

            collate = default
        self.collate = collate

    def run(self, overwrite: bool, progress: bool, notes: Mapping[str, Any]) -> None:
        """Measure, print, and write the shards that are missing."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads or threads)
        try:
            with modes_kept(self.distiller):
                self._run(overwrite, progress, notes)
        finally:
            torch.set_num_threads(threads)

    def _run(self, overwrite: bool, progress: bool, notes: Mapping[str, Any]) -> None:
        distiller = self.distiller.to(self.device).train()
        if self.config.channels_last:
            distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert distiller.teacher is not None
        checks.check_frozen(distiller.teacher, distiller.student)
        check_tokenizers(distiller, self.dataset)
        self.inputs, probes = repeatable_keys(self.dataset, self.collate, distiller.inputs)
        self.principal: pca.Bases = self._together(lambda: self._principal_bases(overwrite))
        self.storage.bases = self.principal.bases
        identity, measured, rate = self._first_batch(probes)
        self.fingerprint = description.fingerprint(identity)
        missing: list[int] = self._together(lambda: self._prepare(identity, measured, notes, overwrite))
        ours = missing[self.processes.process_index :: self.processes.num_processes]
        plans = [plan for number in ours for plan in self._plans(number)]
        bar = Progress(len(plans), "cache", progress and self.processes.is_main_process)
        try:
            self._announce(bar, measured, len(missing), rate * len(plans))
            self._together(lambda: self._check_space(len(missing), measured["bytes_per_sample"]))
            self._write(plans, bar)
        finally:
            bar.close()
        self.processes.wait_for_everyone()

    def _first_batch(self, probes: list[bytes]) -> tuple[dict[str, Any], dict[str, Any], float]:
        """Check and measure the first batch; return identity, figures, and seconds per batch."""
        distiller, teacher = self.distiller, self.distiller.teacher
        assert teacher is not None
        start = time.perf_counter()
        host = self._batch_at(0)
        loading = time.perf_counter() - start
        check_batch(distiller, host)
        batch = self._to_device(host)
        taps = distiller.teacher_tap_targets
        with autocast(self.precision, self.device):
            checks.check_deterministic(lambda: list(checks.named_tensors(distiller.record_teacher(batch))))
            if not self.config.allow_untrained_teacher and distiller.teacher is not None:
                checks.check_trained(distiller.teacher, lambda: distiller.run_teacher(batch))
            start = time.perf_counter()
            recorded = self._record(batch)
            computing = time.perf_counter() - start
            change = check_independent(distiller, batch, recorded.tensors)
            errors = {} if self.storage.is_exact else storage_errors(distiller, taps, self._stored_batches())
        self.recorded = {name: list(tensor.shape[1:]) for name, tensor in recorded.tensors.items()}
        stored = self.storage.stored(recorded)
        self.shapes = {name: list(tensor.shape[1:]) for name, tensor in stored.tensors.items()}
        size = sum(tensor[0].nbytes for tensor in stored.tensors.values())
        self.per_shard = self._samples_per_shard(size)
        self.shard_count = ceil_div(self.count, self.per_shard)
        names = list(self.inputs.values())
        identity = {
            "format": description.FORMAT,
            "teacher": {
                "class": type(unwrap(teacher)).__name__,
                "weights": weights_digest(unwrap(teacher)),
                "summary": summary(unwrap(teacher)),
            },
            "transform": {
                "shapes": {name: list(host[name].shape[1:]) for name in names if isinstance(host[name], Tensor)},
                "declared": description.declared_transform(self.dataset),
            },
            "data": {
                "samples": self.count,
                "inputs": self.inputs,
                "probes": {name: b"".join(digest_of(k, n)[:4] for k in probes).hex() for n, name in enumerate(names)},
            },
            "terms": {
                "paths": {
                    path: {
                        "count": part.count,
                        "dtypes": [str(dtype).removeprefix("torch.") for dtype in part.dtypes],
                        "orders": [list(order) for order in part.orders],
                        **({"scaled": list(part.scaled)} if part.scaled else {}),
                    }
                    for path, part in stored.parts.items()
                },
                "shapes": self.shapes,
                "taps": {name: list(target) for name, target in taps.items()},
                **({"pca": {"ranks": self.ranks, "basis": self.principal.digest()}} if self.ranks else {}),
            },
            "dtype": self.storage.name,
            "computed": {
                "precision": self.precision,
                "device": self.device.type,
                "channels_last": self.config.channels_last,
                "batch_size": self.batch_size,
                "shard_samples": self.per_shard,
            },
        }
        measured = {
            "bytes_per_sample": size,
            "bytes": size * self.count,
            "change_with_order": change,
            "errors": errors,
            "kept": self.principal.kept,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        if self.config.workers:
            return identity, measured, max(loading / self.config.workers, computing)
        return identity, measured, loading + computing

    def _batch_at(self, start: int) -> dict[str, Any]:
        """Return the samples from an index on, collated to a full batch."""
        return self.collate([self.dataset[(start + n) % self.count] for n in range(self.batch_size)])

    def _stored_batches(self) -> Iterator[tuple[dict[str, Any], Recorded, Recorded]]:
        """Yield a few batches, each with what the teacher returns and with what is stored of it."""
        for start in spread(self.count, _MEASURED):
            batch = self._to_device(self._batch_at(start))
            recorded = self._record(batch)
            exact, stored = (self._on_device(one) for one in (recorded, self.storage.stored(recorded)))
            yield batch, exact, stored

    def _on_device(self, recorded: Recorded) -> Recorded:
        return Recorded(
            recorded.parts, to_device(recorded.tensors, self.device), to_device(recorded.bases, self.device)
        )

    def _principal_bases(self, overwrite: bool) -> pca.Bases:
        """Return the bases of the folder's cache, or new ones from a sample of the dataset."""
        if not self.ranks:
            return pca.Bases({}, {})
        if not overwrite and (self.folder / description.FILE).exists():
            held = description.read_description(self.folder)["terms"].get("pca", {})
            if held.get("ranks") == self.ranks:
                with contextlib.suppress(ValueError):
                    return pca.read_bases(self.folder, held["basis"])
        number = min(_PCA_BATCHES, ceil_div(self.count, self.batch_size))
        with autocast(self.precision, self.device):
            batches = (self._to_device(self._batch_at(start)) for start in spread(self.count, number))
            return pca.principal_bases(self.ranks, (self._record(batch) for batch in batches))

    def _samples_per_shard(self, size: int) -> int:
        """Return a multiple of the batch size, of at most `_SHARD_BYTES` if a batch is smaller than that."""
        most = max(_SHARD_BYTES // max(size, 1) // self.batch_size, 1) * self.batch_size
        return min(most, round_up(ceil_div(self.count, _SHARDS), self.batch_size))

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return to_device(batch, self.device, self.config.channels_last)

    def _record(self, batch: Mapping[str, Any]) -> Recorded:
        """Return what the terms read from the teacher's output, on the CPU."""
        recorded = flatten(self.distiller.record_teacher(batch), self.batch_size)
        return Recorded(
            recorded.parts, {name: tensor.to("cpu").contiguous() for name, tensor in recorded.tensors.items()}
        )

    def _prepare(
        self, identity: Mapping[str, Any], measured: Mapping[str, Any], notes: Mapping[str, Any], overwrite: bool
    ) -> list[int]:
        """Write ``cache.json``, unless the folder holds this cache; return the shards that are missing or damaged.

        Raises:
            ValueError: the folder holds another cache.
            FileExistsError: the folder holds something else.
        """
        folder = self.folder
        if folder.exists() and not (folder.is_dir() and all(_is_of_cache(path.name) for path in folder.iterdir())):
            raise FileExistsError(f"{folder} holds something else than a teacher cache: choose another folder")
        remove_leftovers(folder)
        if (folder / description.FILE).exists() and not overwrite:
            description.check_same(folder, description.read_description(folder), identity)
        else:
            (folder / description.FILE).unlink(missing_ok=True)
            (folder / pca.FILE).unlink(missing_ok=True)
            for path in folder.glob("shard-*.safetensors"):
                path.unlink()
            description.write_description(folder, identity, measured, notes)
        if self.ranks:
            pca.write_bases(folder, self.principal)
        return [number for number in range(self.shard_count) if not self._is_complete(number)]

    def _together(self, action: Callable[[], Any]) -> Any:
        """Run an action in the main process only; return its result, or raise its error, in all processes."""
        found: list[Any] = [None, None]
        if self.processes.is_main_process:
            try:
                found[0] = action()
            except (ValueError, OSError) as error:
                found[1] = error
        if self.processes.num_processes > 1:
            torch.distributed.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _is_complete(self, number: int) -> bool:
        """Return whether a shard exists and all of it can be read."""
        path = shard_path(self.folder, number)
        if not path.exists():
            return False
        try:
            Shard(path, self.fingerprint).verify(list(self.shapes))
        except DamagedShard:
            return False
        return True

    def _plans(self, number: int) -> Iterator[_Plan]:
        """Yield the batches of a shard, all of the same size."""
        start = number * self.per_shard
        stop = min(start + self.per_shard, self.count)
        for first in range(start, stop, self.batch_size):
            indices = list(range(first, min(first + self.batch_size, stop)))
            full = [indices[n % len(indices)] for n in range(self.batch_size)]
            yield _Plan(number, full, len(indices))

    def _announce(self, bar: Progress, measured: Mapping[str, Any], missing: int, seconds: float) -> None:
        """Print what will be written, how long that takes, and the errors of the dtype."""
        size = measured["bytes_per_sample"]
        bar.print(
            f"{self.count} samples of {with_unit(size)}, {with_unit(size * self.count)} in {self.shard_count} shards; "
            + (f"{missing} to compute, about {_duration(seconds)}" if missing else "all are complete")
        )
        change = measured["change_with_order"]
        if change:
            bar.print(
                f"a sample's output changes by up to {change:.1g} (relative) with the other samples of its batch, so "
                "results will equal those of the teacher online up to rounding"
            )
        for name, kept in self.principal.kept.items():
            channels, rank = self.storage.bases[name].shape
            bar.print(f"{name}: {rank} of {channels} principal directions keep {kept:.3%} of the squared values")
        form = self.storage.name if self.storage.dtype else "reduced maps"
        for name, error in measured["errors"].items():
            bar.print(
                f"{name}, stored as {form}: relative error of the loss "
                f"{error['loss']:.1e}, of its gradient {error['gradient']:.1e}"
            )

    def _check_space(self, missing: int, size: int) -> None:
        needed = min(missing * self.per_shard, self.count) * size
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder} needs {with_unit(needed)}, but the disk has {with_unit(free)} free: store fewer terms, "
                "a narrower dtype (bf16, fp16 or int8), or choose another disk"
            )

    def _write(self, plans: list[_Plan], bar: Progress) -> None:
        """Compute the batches in order and write each shard after its last one."""
        samples = TrainingSamples(self.dataset, seed=0)
        loader = DataLoader(
            samples,
            batch_sampler=[plan.indices for plan in plans],
            collate_fn=self.collate,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        keys: list[bytes] = []
        rows: dict[str, list[Tensor]] = {}
        begin = time.perf_counter()
        for step, (plan, host) in enumerate(zip(plans, batches(loader), strict=True), 1):
            check_batch(self.distiller, host)
            keys += sample_keys(host, list(self.inputs.values()))[: plan.used]
            with autocast(self.precision, self.device):
                recorded = self._record(self._to_device(host))
            for name, tensor in recorded.tensors.items():
                self._check_tensor(name, tensor, plan)
            for name, tensor in self.storage.stored(recorded).tensors.items():
                rows.setdefault(name, []).append(tensor[: plan.used])
            if step == len(plans) or plans[step].shard != plan.shard:
                values = {name: torch.cat(each) for name, each in rows.items()}
                write_shard(shard_path(self.folder, plan.shard), keys, values, self.fingerprint)
                keys, rows = [], {}
            bar.update(step, {}, time.perf_counter() - begin, step / len(plans))

    def _check_tensor(self, name: str, tensor: Tensor, plan: _Plan) -> None:
        """Raise ``ValueError`` for NaN, +Inf or a size that differs from the first batch's."""
        where = f"{name!r} of the teacher on samples {plan.indices[0]} to {plan.indices[plan.used - 1]}"
        if self.recorded.get(name) != list(tensor.shape[1:]):
            raise ValueError(
                f"{where} has shape {tuple(tensor.shape[1:])} per sample, on the first batch "
                f"{tuple(self.recorded.get(name, ()))}: cache samples of one size (one image_size, padded sentences)"
            )
        if tensor.is_floating_point() and bool((tensor.isnan() | (tensor == torch.inf)).any()):
            raise ValueError(f"{where} holds NaN or Inf")


def _is_of_cache(name: str) -> bool:
    """Return whether a file belongs to a cache, complete or not."""
    return name in (description.FILE, pca.FILE) or name.startswith(("shard-", "."))


def _duration(seconds: float) -> str:
    """Return a number of seconds with a unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
