"""Multi-vector retrievers of transformers: ColPali and ColQwen2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

TYPES = ("colpali", "colqwen2")
"""Values of ``config.model_type``."""


@dataclass(eq=False)
class Retriever:
    """What the engine needs to know of one model: its name, and where its output holds the vectors.

    Attributes
    ----------
    name : str
        ``config.model_type``.
    vectors : str
        Attribute of the output with the vectors ``(B, S, d)``, zeros where ``attention_mask`` is 0.
    pixels : str
        Argument whose presence makes a call one with documents; queries have none.
    """

    name: str
    vectors: str = "embeddings"
    pixels: str = "pixel_values"


def is_retriever(model: nn.Module) -> bool:
    """Whether a model is one of :data:`TYPES`."""
    return getattr(getattr(model, "config", None), "model_type", None) in TYPES
