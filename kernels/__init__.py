"""Similarity and selection operations (installed as ``vtc.kernels``). Imports nothing else of vtc.

Every op has a torch implementation in :mod:`vtc.kernels.ref`, which is its specification.
"""

from __future__ import annotations

from vtc.kernels.ref import (
    attention_colsum,
    attention_rows,
    farthest_point,
    max_sum,
    merge_scatter,
    pairwise_top1,
    topk_sorted,
)

# With the repository root on sys.path this folder is importable as top-level `kernels`, the name of Hugging Face's package; some
# transformers releases then parse its version. A version string keeps them from raising.
__version__ = "0.0.0"

__all__ = [
    "attention_colsum",
    "attention_rows",
    "farthest_point",
    "max_sum",
    "merge_scatter",
    "pairwise_top1",
    "topk_sorted",
]
