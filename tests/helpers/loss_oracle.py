"""The parts of a loss in plain Python floats, one loop per sum."""

from __future__ import annotations

import math


def unit(x):
    norm = max(math.sqrt(sum(v * v for v in x)), 1e-12)
    return [v / norm for v in x]


def log_softmax(x):
    top = max(x)
    lse = top + math.log(sum(math.exp(v - top) for v in x))
    return [v - lse for v in x]


def kl(teacher, student):
    """Return KL(softmax(teacher) ‖ softmax(student)); a term is 0 where the teacher's probability is."""
    lt, ls = log_softmax(teacher), log_softmax(student)
    return sum(math.exp(t) * (t - s) for t, s in zip(lt, ls, strict=True) if math.exp(t) > 0)
