"""The ``relation`` family: a distance, row by row, between the self-relation matrices of two row sets."""

from __future__ import annotations

from torch import Tensor

from fastkd.ops import _backends
from fastkd.reference.relation import relation as reference
from fastkd.reference.relation import relation_mse_gram


def relation(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    distance: str = "kl",
    temperature: float = 0.1,
    negate: bool = False,
    cross: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Per-row distances (B, R) of the relation matrices of ``student`` (B, R, K_S) and ``teacher`` (B, R, K_T).

    The arguments are those of :func:`fastkd.reference.relation.relation`. Under ``backend="auto"`` the mean squared
    error of narrow rows (K ≤ half the columns) is computed from K×K Gram matrices, which costs less time and memory
    than the R×R matrices; ``backend="reference"`` is always the plain formula.
    """
    _backends.choose("relation", backend, student, teacher)  # raises for a backend this family does not have
    if backend == "auto" and distance == "mse":
        columns = student.shape[1] * (student.shape[0] if cross else 1)
        narrow = 2 * max(student.shape[2], teacher.shape[2]) <= columns
        # Unequal widths are combined in fp64, which Apple's GPUs do not have.
        if narrow and (student.shape[2] == teacher.shape[2] or student.device.type != "mps"):
            return relation_mse_gram(student, teacher, similarity=similarity, cross=cross)
    return reference(
        student,
        teacher,
        similarity=similarity,
        distance=distance,
        temperature=temperature,
        negate=negate,
        cross=cross,
    )
