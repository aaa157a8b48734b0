"""Multi-vector retrieval (ColPali and its kin): fewer vectors per document, and the scores they give.

Pooling happens once, when documents are indexed; queries stay as they are. As a function on plain tensors::

    pooled = vtc.pool_vectors(vectors, "hierpool", keep=1 / 3, mask=mask)
    scores = vtc.maxsim(queries, pooled)

or inside the model, ``vtc.patch(model, "hierpool", keep=1 / 3)``: the embeddings of pages then come pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Facts, Layout, Reducer, Signals, Stage
from vtc.errors import UnsupportedFeatureError
from vtc.registry import resolve
from vtc.views import ask

FACTS = Facts(
    family="vectors",
    layers=0,
    encoder_layers=0,
    feature_layer=0,
    tokens=None,
    max_tokens=None,
    grid=(1, 1),
    has_cls=False,
    provides=frozenset(),
    stages={stage: "" if stage is Stage.BOUNDARY else "a retriever's vectors have no model behind them" for stage in Stage},
)


def check_vector_reducer(reducer: Reducer) -> Reducer:
    """Return a reducer resolved for vectors without a model; raise if it needs more than the vectors.

    Raises
    ------
    UnsupportedFeatureError
        The reducer acts elsewhere, or looks at more than the vectors.
    """
    part = None
    if getattr(reducer, "stage", None) is Stage.BOUNDARY:
        (part,) = reducer.bind(FACTS).parts()
    if part is None or part.needs or part.wants_text or part.wants_cls or part.wants_fingerprint:
        raise UnsupportedFeatureError(
            f"'{reducer.name}' needs more than a document's vectors: use 'hierpool', 'divprune' or 'uniform'"
        )
    return part


def pool_vectors(
    vectors: Tensor | Sequence[Tensor],
    reducer: str | Reducer = "hierpool",
    *,
    mask: Tensor | None = None,
    normalize: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Replace the vectors of each document by fewer.

    Parameters
    ----------
    vectors : Tensor or sequence of Tensor
        ``(documents, n, d)``, or one ``(n_i, d)`` per document. Rows of zeros are padding, as retrievers return it: they are left
        out, also where no ``mask`` says so.
    reducer : str or Reducer, default "hierpool"
        A method that needs nothing but the vectors.
    mask : Tensor or None
        ``(documents, n)``: vectors that are there, of a padded batch.
    normalize : bool, default True
        Scale the pooled vectors to length one: retrievers compare by dot products of unit vectors.
    **options
        The reducer's options, ``keep=1 / 3`` or ``keep=340`` among them. A share is rounded.

    Returns
    -------
    list of Tensor
        ``(k_i, d)`` per document, in the dtype and on the device of the vectors.

    Raises
    ------
    UnsupportedFeatureError
        The reducer needs more than the vectors.
    InvalidSignalError
        NaN or infinite vectors.
    """
    part = check_vector_reducer(resolve(reducer, **options))
    documents = list(vectors)
    if mask is not None:
        documents = [v[m.to(v.device).bool()] for v, m in zip(documents, mask, strict=True)]
    return [_pool(part, without_padding(v), normalize) for v in documents]


def without_padding(vectors: Tensor) -> Tensor:
    """Return the rows ``(n, d)`` that are not zero; the same tensor where all are there."""
    there = (vectors != 0).any(-1)
    return vectors if bool(there.all()) else vectors[there]


def _pool(part: Reducer, vectors: Tensor, normalize: bool) -> Tensor:
    n = len(vectors)
    layout = Layout.flat(n)
    budget = min(n, part.wanted(layout, FACTS)) if n else 0
    if budget == n:
        return vectors
    entries = torch.arange(n, device=vectors.device)[None]
    chosen = ask(part, Signals(vectors[None], layout, entries, budget, n).check(f"a document ('{part.name}')"))
    pooled = vectors[chosen.index[0]] if chosen.features is None else chosen.features[0]
    if chosen.valid is not None:
        pooled = pooled[chosen.valid[0]]
    return nn.functional.normalize(pooled.float(), dim=-1).to(vectors.dtype) if normalize else pooled


def maxsim(queries: Tensor | Sequence[Tensor], documents: Tensor | Sequence[Tensor]) -> Tensor:
    """Late-interaction scores: for every query vector the best document vector, summed over the query.

    Parameters
    ----------
    queries, documents : Tensor or sequence of Tensor
        ``(m_i, d)`` per query and ``(n_j, d)`` per document. Rows of zeros (padding) in a query add nothing, in a document they
        win only where all cosines are negative, as in the retrievers' own scoring.

    Returns
    -------
    Tensor
        ``(queries, documents)`` float32.

    Raises
    ------
    UnsupportedFeatureError
        A document without vectors.
    """
    empty = next((j for j, d in enumerate(documents) if not len(d)), None)
    if empty is not None:
        raise UnsupportedFeatureError(f"document {empty} has no vectors, and so no score: leave it out")
    scores = [[(q.float() @ d.float().T).amax(1).sum() for d in documents] for q in queries]
    if not (len(queries) and len(documents)):
        return torch.zeros(len(queries), len(documents))
    return torch.stack([torch.stack(row) for row in scores])
