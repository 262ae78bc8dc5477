"""The three kernel families in plain torch: any device, any floating dtype, differentiable twice.

These are the formulas that every other backend is held against, one module per family, each with a function of the same
name: ``softmax_kl``, ``relation`` and ``pixel_word``. Inputs below fp32 are computed in fp32, fp64 in fp64, and the
results are per-row (or, for ``pixel_word``, per-sample) losses without reduction.
"""

from fastkd.reference import pixel_word, relation, softmax_kl

__all__ = ["pixel_word", "relation", "softmax_kl"]
