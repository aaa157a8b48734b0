"""Similarity and selection operations (installed as ``vtc.kernels``). Imports nothing else of vtc.

Every op has a torch implementation in :mod:`vtc.kernels.ref`, :mod:`vtc.kernels.greedy` or :mod:`vtc.kernels.compact`, which is its
specification. Those of :data:`ACCELERATED` also have one in Triton; :mod:`vtc.kernels.dispatch` says which of them serves a call.
"""

from __future__ import annotations

from vtc.kernels.dispatch import (
    ACCELERATED,
    BACKENDS,
    KernelError,
    attention_colsum,
    attention_rows,
    backend,
    fallbacks,
    farthest_point,
    farthest_point_weighted,
    greedy_dpp,
    k_means,
    k_medoids,
    max_sum,
    merge_scatter,
    most_isolated,
    nearest_centre,
    pairwise_top1,
    select_compact,
    topk_sorted,
    transition_score,
    unavailable,
    use,
)
from vtc.kernels.linear import along, dot
from vtc.kernels.ref import (
    absorb_neighbours,
    apportion,
    attention_walk,
    coarse_grid,
    connectivity,
    cosine_distance,
    count_similar,
    drop_duplicates,
    seat_clusters,
    shrinking_picks,
    similarity_rows,
    smallest,
    topk_per_group,
    ward,
)

# With the repository root on sys.path this folder is importable as top-level `kernels`, the name of Hugging Face's package; some
# transformers releases then parse its version. A version string keeps them from raising.
__version__ = "0.0.0"

__all__ = [
    "ACCELERATED",
    "BACKENDS",
    "KernelError",
    "absorb_neighbours",
    "along",
    "apportion",
    "attention_colsum",
    "attention_rows",
    "attention_walk",
    "backend",
    "coarse_grid",
    "connectivity",
    "cosine_distance",
    "count_similar",
    "dot",
    "drop_duplicates",
    "fallbacks",
    "farthest_point",
    "farthest_point_weighted",
    "greedy_dpp",
    "k_means",
    "k_medoids",
    "max_sum",
    "merge_scatter",
    "most_isolated",
    "nearest_centre",
    "pairwise_top1",
    "seat_clusters",
    "select_compact",
    "shrinking_picks",
    "similarity_rows",
    "smallest",
    "topk_per_group",
    "topk_sorted",
    "transition_score",
    "unavailable",
    "use",
    "ward",
]
