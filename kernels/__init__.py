"""Similarity and selection operations (installed as ``vtc.kernels``). Imports nothing else of vtc.

Every op has a torch implementation in :mod:`vtc.kernels.ref`, which is its specification.
"""

from __future__ import annotations

from vtc.kernels.ref import (
    absorb_neighbours,
    apportion,
    attention_colsum,
    attention_rows,
    attention_walk,
    coarse_grid,
    connectivity,
    cosine_distance,
    count_similar,
    drop_duplicates,
    farthest_point,
    farthest_point_weighted,
    greedy_dpp,
    k_means,
    k_medoids,
    max_sum,
    merge_scatter,
    nearest_centre,
    nearest_distance,
    pairwise_top1,
    seat_clusters,
    shrinking_picks,
    similarity_rows,
    topk_per_group,
    topk_sorted,
    ward,
)

# With the repository root on sys.path this folder is importable as top-level `kernels`, the name of Hugging Face's package; some
# transformers releases then parse its version. A version string keeps them from raising.
__version__ = "0.0.0"

__all__ = [
    "absorb_neighbours",
    "apportion",
    "attention_colsum",
    "attention_rows",
    "attention_walk",
    "coarse_grid",
    "connectivity",
    "cosine_distance",
    "count_similar",
    "drop_duplicates",
    "farthest_point",
    "farthest_point_weighted",
    "greedy_dpp",
    "k_means",
    "k_medoids",
    "max_sum",
    "merge_scatter",
    "nearest_centre",
    "nearest_distance",
    "pairwise_top1",
    "seat_clusters",
    "shrinking_picks",
    "similarity_rows",
    "topk_per_group",
    "topk_sorted",
    "ward",
]
