"""Torch implementations of all ops: the specification that the Triton versions in :mod:`vtc.kernels.gpu` are tested against.

All arithmetic is float32 (float64 stays float64) whatever the input's dtype; ties go to the lowest index. The Triton version of an
op lies in the module of :mod:`vtc.kernels.gpu` of the same name.
"""

from vtc.kernels.ref.attention import attention_colsum, attention_rows, attention_walk
from vtc.kernels.ref.cluster import k_means, k_medoids, seat_clusters
from vtc.kernels.ref.duplicates import drop_duplicates
from vtc.kernels.ref.greedy import farthest_point, farthest_point_weighted, greedy_dpp, max_sum, shrinking_picks
from vtc.kernels.ref.hierarchy import ward
from vtc.kernels.ref.linear import along, dot, unit_rows, widened
from vtc.kernels.ref.merge import absorb_neighbours, merge_scatter
from vtc.kernels.ref.select import compacted, select_compact, smallest, take, topk, topk_mask, topk_per_group, topk_sorted
from vtc.kernels.ref.share import apportion, coarse_grid
from vtc.kernels.ref.similarity import (
    connectivity,
    cosine_distance,
    count_similar,
    mean_cosine,
    most_isolated,
    nearest_centre,
    pairwise_top1,
    similarity_rows,
)
from vtc.kernels.ref.transition import transition_score

__all__ = [
    "absorb_neighbours",
    "along",
    "apportion",
    "attention_colsum",
    "attention_rows",
    "attention_walk",
    "coarse_grid",
    "compacted",
    "connectivity",
    "cosine_distance",
    "count_similar",
    "dot",
    "drop_duplicates",
    "farthest_point",
    "farthest_point_weighted",
    "greedy_dpp",
    "k_means",
    "k_medoids",
    "max_sum",
    "mean_cosine",
    "merge_scatter",
    "most_isolated",
    "nearest_centre",
    "pairwise_top1",
    "seat_clusters",
    "select_compact",
    "shrinking_picks",
    "similarity_rows",
    "smallest",
    "take",
    "topk",
    "topk_mask",
    "topk_per_group",
    "topk_sorted",
    "transition_score",
    "unit_rows",
    "ward",
    "widened",
]
