"""Multi-vector retrievers of transformers: ColPali and ColQwen2."""

from __future__ import annotations

from torch import nn

from vtc.families.base import Retriever

TYPES = ("colpali", "colqwen2")


def build(model: nn.Module) -> Retriever:
    """Describe a ``ColPaliForRetrieval`` or ``ColQwen2ForRetrieval``."""
    return Retriever(model.config.model_type)
