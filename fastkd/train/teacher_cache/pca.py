"""Principal directions of the channels of feature maps, from a sample of the training set, and their file.

For a map with C channels, X (N, C) holds one row per pixel of the sample. The basis V (C, r) holds the eigenvectors of
Xᵀ X with the r largest eigenvalues. X is not centred: relations compare pixels and channels as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastkd._atomic import replace_files
from fastkd._messages import suggestion
from fastkd.distill.recorded import part_names
from fastkd.distill.terms import Term, check_relational, teacher_paths
from fastkd.train.digest import as_bytes
from fastkd.train.teacher_cache.storage import Recorded

FILE = "basis.safetensors"


class Bases(NamedTuple):
    """Bases (C, r) by name of the recorded tensor, and the share of the squared values that each keeps."""

    bases: dict[str, Tensor]
    kept: dict[str, float]

    def digest(self) -> str:
        """Return a digest of the bases."""
        found = hashlib.blake2b(digest_size=16)
        for name, basis in sorted(self.bases.items()):
            found.update(f"{name} {tuple(basis.shape)}".encode())
            found.update(as_bytes(basis))
        return found.hexdigest()


def check_ranks(ranks: Mapping[str, int], terms: Sequence[Term]) -> None:
    """Raise ``ValueError`` for a path that no term reads, or that a term reads which compares no relations."""
    known = [path for term in terms for path in teacher_paths(term)]
    for path in ranks:
        if path not in known:
            raise ValueError(f"pca: no term reads {path!r} from the teacher.{suggestion(path, known)}")
    check_relational(terms, ranks)


def principal_bases(ranks: Mapping[str, int], batches: Iterable[Recorded]) -> Bases:
    """Return the bases of the maps at these paths from what was recorded on some batches.

    Raises:
        ValueError: a rank that is not below the number of channels, or NaN or Inf in a map.
    """
    moments: dict[str, Tensor] = {}
    chosen: dict[str, int] = {}
    for recorded in batches:
        for path, rank in ranks.items():
            part = recorded.parts[path]
            for name, order in zip(part_names(path, part.count), part.orders, strict=True):
                rows = recorded.tensors[name].movedim(order.index(1), -1).flatten(0, -2).double()  # (pixels, C)
                _check_rank(name, rank, rows.shape[1])
                moments[name] = moments.get(name, 0) + rows.mT @ rows
                chosen[name] = rank
    found = Bases({}, {})
    for name, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise ValueError(f"{name!r} of the teacher holds NaN or Inf")
        values, vectors = torch.linalg.eigh(moment)  # ascending
        found.bases[name] = vectors[:, -chosen[name] :].flip(1).float().contiguous()
        found.kept[name] = float(values[-chosen[name] :].sum() / values.sum().clamp_min(1e-300))
    return found


def _check_rank(name: str, rank: int, channels: int) -> None:
    if type(rank) is not int or not 1 <= rank < channels:
        raise ValueError(
            f"pca: the rank of {name!r} must be an integer from 1 to {channels - 1}, for {channels} channels, got "
            f"{rank!r}"
        )


def write_bases(folder: Path, found: Bases) -> None:
    """Write the bases of a cache."""
    tensors = {f"basis/{name}": basis for name, basis in found.bases.items()}
    tensors |= {f"kept/{name}": torch.tensor(kept, dtype=torch.float64) for name, kept in found.kept.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replace_files(folder / FILE, durable=True) as (partial,):
        save_file(tensors, str(partial))


def read_bases(folder: Path, digest: str) -> Bases:
    """Return the bases of a cache.

    Raises:
        ValueError: the file is missing, damaged or of another cache.
    """
    path = folder / FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): build the cache again (fastkd cache)") from error
    found = Bases(
        {name.removeprefix("basis/"): value for name, value in tensors.items() if name.startswith("basis/")},
        {name.removeprefix("kept/"): float(value) for name, value in tensors.items() if name.startswith("kept/")},
    )
    if found.digest() != digest:
        raise ValueError(f"{path} belongs to another cache or is damaged: build the cache again (fastkd cache)")
    return found
