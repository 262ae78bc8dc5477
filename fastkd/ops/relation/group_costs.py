"""Costs of a relation over a group of processes (``group.py``): collectives with their bytes, and FLOP of one rank.

Collectives are listed in the order in which a rank calls them. FLOP are counted as in ``fastkd/ops/flops.py``.
"""

from __future__ import annotations

from typing import NamedTuple


class Collective(NamedTuple):
    """One collective of a rank."""

    kind: str  # "all_reduce", "all_gather" or "reduce_scatter"
    bytes: int  # of the tensor that is reduced; of the tensors of all ranks where they are gathered or scattered

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank sends in a ring: (P − 1)/P of the tensor, twice that for an all-reduce."""
        return self.bytes * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)


class Traffic(NamedTuple):
    """The collectives of a forward and of its backward."""

    forward: list[Collective]
    backward: list[Collective]

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank sends in both passes."""
        return sum(one.sent(ranks) for one in (*self.forward, *self.backward))


def channel_traffic(channels: int, *, means: bool, fp64: bool = False) -> Traffic:
    """Return the collectives of ``channel_kd(across_batch=True, group=...)``.

    Args:
        channels: C.
        means: means over all ranks are needed: ``centered=True``, ``weight="attention"`` or the similarity "mean".
        fp64: an input is fp64.
    """
    size = 8 if fp64 else 4
    first = [Collective("all_reduce", 8 * (3 * channels + 2))] if means else []  # in fp64
    grams = [Collective("all_reduce", size * channels**2)] * 2
    return Traffic(first + grams, [Collective("all_reduce", size * channels)])


def pixel_traffic(
    samples: int,
    pixels: int,
    width_s: int,
    width_t: int,
    ranks: int,
    *,
    distance: str,
    size_s: int = 4,
    size_t: int = 4,
) -> Traffic:
    """Return the collectives of ``pixel_relation_kd(cross_image=True, group=...)`` with reduction "mean".

    Args:
        samples: the largest batch of a rank; smaller ones are padded.
        pixels: N, also of a pooled map.
        width_s, width_t: C_S and C_T.
        ranks: P.
        distance: "kl", "mse" or "row_cosine".
        size_s, size_t: bytes of an element of the student's and of the teacher's features.
    """
    size = 8 if 8 in (size_s, size_t) else 4
    mean = Collective("all_reduce", 2 * size)  # sums of the rows and of their weights
    if distance == "mse":
        if width_s == width_t:
            grams = Collective("all_reduce", size * (3 * width_s**2 + 1))
        else:
            grams = Collective("all_reduce", 8 * (width_s**2 + width_t**2 + width_s * width_t + 1))
        return Traffic([grams, mean], [mean, grams])
    rows = ranks * samples * pixels
    sizes = Collective("all_gather", ranks * 4 * 8)
    features = [Collective("all_gather", rows * width_s * size_s), Collective("all_gather", rows * width_t * size_t)]
    return Traffic([sizes, *features, mean], [mean, Collective("reduce_scatter", rows * width_s * size)])


class Flops(NamedTuple):
    """FLOP of the products of one rank."""

    forward: int
    backward: int


def channel_flops(channels: int, columns_s: int, columns_t: int) -> Flops:
    """Return the FLOP of X Xᵀ of both networks and of H X_S, for a rank's columns B·N of each network."""
    each = 2 * channels**2
    return Flops(each * (columns_s + columns_t), each * columns_s)


def pixel_flops(samples: int, all_samples: int, pixels: int, width_s: int, width_t: int, *, distance: str) -> Flops:
    """Return the FLOP of ``pixel_relation_kd(cross_image=True, group=...)``.

    Args:
        samples, all_samples: of this rank, and of all ranks.
        pixels, width_s, width_t, distance: as in `pixel_traffic`.
    """
    own, s, t = samples * pixels, width_s, width_t
    if distance == "mse" and s == t:  # of A, D and B: three Gram matrices and three bilinear forms
        return Flops(6 * 2 * own * s * s, 11 * 2 * own * s * s)
    if distance == "mse":
        return Flops(2 * 2 * own * (s * s + t * t + s * t), 2 * own * (4 * s * s + 3 * s * t + t * t))
    pairs = own * all_samples * pixels
    return Flops(2 * pairs * (s + t), 2 * pairs * (s + t) + 2 * 2 * pairs * s)
