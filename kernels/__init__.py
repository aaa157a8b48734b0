"""Similarity and selection operations (installed as ``vtc.kernels``). Imports nothing else of vtc.

Every op has a torch implementation in :mod:`vtc.kernels.ref`, which is its specification.
"""

from __future__ import annotations

from vtc.kernels.ref import (
    absorb_neighbours,
    apportion,
    attention_colsum,
    attention_rows,
    coarse_grid,
    cosine_distance,
    drop_duplicates,
    farthest_point,
    greedy_dpp,
    max_sum,
    merge_scatter,
    nearest_distance,
    pairwise_top1,
    topk_per_group,
    topk_sorted,
)

# With the repository root on sys.path this folder is importable as top-level `kernels`, the name of Hugging Face's package; some
# transformers releases then parse its version. A version string keeps them from raising.
__version__ = "0.0.0"

__all__ = [
    "absorb_neighbours",
    "apportion",
    "attention_colsum",
    "attention_rows",
    "coarse_grid",
    "cosine_distance",
    "drop_duplicates",
    "farthest_point",
    "greedy_dpp",
    "max_sum",
    "merge_scatter",
    "nearest_distance",
    "pairwise_top1",
    "topk_per_group",
    "topk_sorted",
]
