"""Shards: safetensors files with the teacher's output for consecutive samples of a dataset.

A shard holds, with n samples: ``keys`` (n, bytes) uint8, and for every recorded tensor ``value/NAME`` (n, ...) and
``crc/NAME`` (n,) int64, the CRC-32 of each row. Its metadata names the cache it belongs to. Files are memory-mapped: a
row is read from the disk when it is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastkd._atomic import replace_files
from fastkd.train.digest import as_bytes


class DamagedShard(ValueError):
    """A shard that cannot be read or does not belong to the cache."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} {reason}: build the cache again with the same arguments (fastkd cache), which computes missing "
            "and damaged shards only"
        )


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, keys: Sequence[bytes], values: Mapping[str, Tensor], fingerprint: str) -> None:
    """Write a shard; the file appears once it is complete and on the disk.

    Args:
        path: the file.
        keys: key of each sample.
        values: recorded tensors (n, ...) by name.
        fingerprint: identifies the cache.
    """
    tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), -1)}
    for name, value in values.items():
        tensors[f"value/{name}"] = value.contiguous()
        tensors[f"crc/{name}"] = torch.tensor([zlib.crc32(as_bytes(row)) for row in value])
    with replace_files(path, durable=True) as (partial,):
        save_file(tensors, str(partial), metadata={"cache": fingerprint})


class Shard:
    """Read rows of a shard.

    Raises:
        DamagedShard: the file is missing, cut off or of another cache.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
            metadata = self._file.metadata() or {}
            self._names = set(self._file.keys())
        except FileNotFoundError:
            raise DamagedShard(path, "is missing") from None
        except (SafetensorError, OSError) as error:
            raise DamagedShard(path, f"is torn or damaged ({error})") from error
        if metadata.get("cache") != fingerprint or "keys" not in self._names:
            raise DamagedShard(path, "belongs to another cache")
        self._tensors: dict[str, Tensor] = {}

    def keys(self) -> list[bytes]:
        """Return the samples' keys."""
        return [bytes(row) for row in self._tensor("keys").numpy()]

    def row(self, name: str, number: int) -> Tensor:
        """Return a sample's row of a recorded tensor, in mapped memory.

        Raises:
            DamagedShard: its content has changed since it was written.
        """
        row = self._tensor(f"value/{name}")[number]
        if zlib.crc32(as_bytes(row)) != int(self._tensor(f"crc/{name}")[number]):
            raise DamagedShard(self.path, f"is damaged (row {number} of {name!r} has another CRC-32 than was written)")
        return row

    def verify(self, names: Sequence[str]) -> None:
        """Read all rows of the named tensors.

        Raises:
            DamagedShard: as in `row`.
        """
        for name, number in self._rows(names):
            self.row(name, number)

    def _rows(self, names: Sequence[str]) -> Iterator[tuple[str, int]]:
        for name in names:
            for number in range(len(self._tensor("keys"))):
                yield name, number

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            if name not in self._names:
                raise DamagedShard(self.path, f"has no tensor {name!r}")
            self._tensors[name] = self._file.get_tensor(name)  # maps the file; reads nothing yet
        return self._tensors[name]
