"""What an adapter is: data about one model, and the geometry of its visual slots. No method knowledge, no hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Facts, Layout, Stage
from vtc.errors import UnsupportedModelError


@dataclass(eq=False)
class VisionCall:
    """Geometry of one call of ``get_image_features``.

    Attributes
    ----------
    views : list of int
        Number of views (crops) of each image, in order; their sum is the tower's batch size.
    slots : list of Layout
        Slot layout of each image. Images of one geometry share one object.
    patches : list of Layout
        View layout of each image (every patch of every view).
    pixels : Tensor
        ``(sum(views), 3, H, W)`` what the tower is given, for fingerprints.
    """

    views: list[int]
    slots: list[Layout]
    patches: list[Layout]
    pixels: Tensor


@dataclass(eq=False)
class Family:
    """Where things are in one loaded model.

    Attributes
    ----------
    name : str
        Family name (``config.model_type``).
    base : Module
        The multimodal model that owns ``get_image_features`` (not the ``lm_head``).
    text : Module
        The text model whose ``forward`` runs the decoder layers.
    layers : ModuleList
        Decoder layers.
    text_attention : list of Module
        Attention module of every decoder layer.
    tower : Module
        Vision tower.
    encoder_layers : ModuleList
        Its layers.
    encoder_attention : list of Module
        Their attention modules.
    projector : Module
        Maps tower features ``(views, patches, D_v)`` to ``(views, patches, D)``, token by token.
    image_token_ids : tuple of int
        Placeholder token ids.
    facts : Facts
        Numbers reducers may see.
    describe : callable
        Bound arguments of ``get_image_features`` to :class:`VisionCall`.
    """

    name: str
    base: nn.Module
    text: nn.Module
    layers: nn.ModuleList
    text_attention: list[nn.Module]
    tower: nn.Module
    encoder_layers: nn.ModuleList
    encoder_attention: list[nn.Module]
    projector: nn.Module
    image_token_ids: tuple[int, ...]
    facts: Facts
    describe: Callable[[Mapping[str, Any]], VisionCall]
    notes: list[str] = field(default_factory=list)


def find(root: nn.Module, names: tuple[str, ...]) -> Any:
    """Return the first attribute of ``root`` among ``names`` that is not None, else None."""
    for name in names:
        value = getattr(root, name, None)
        if value is not None:
            return value
    return None


def require(value: Any, what: str, model: nn.Module) -> Any:
    """Return ``value``; raise :class:`UnsupportedModelError` naming what was not found if it is None."""
    if value is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {what} where vtc looks for it: supported families are listed by `vtc doctor`"
        )
    return value


def multimodal_parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return ``(base, text)``: the module owning ``get_image_features`` and the text model with ``.layers``."""
    names = ("language_model", "text_model")
    inner = getattr(model, "model", None)
    base = inner if inner is not None and find(inner, names) is not None else model
    text = require(find(base, names), "language model", model)
    if not hasattr(text, "layers") and hasattr(text, "model"):
        text = text.model
    require(getattr(text, "layers", None), "decoder layers", model)
    types = set(getattr(text.config, "layer_types", None) or ())
    odd = types - {"full_attention", "sliding_attention", "chunked_attention"}
    if odd:
        raise UnsupportedModelError(
            f"{type(model).__name__} has decoder layers of type {sorted(odd)}, which vtc cannot shorten"
        )
    return base, text


def clip_tower(tower: nn.Module, model: nn.Module) -> tuple[nn.ModuleList, list[nn.Module], bool]:
    """Return layers, attention modules and class-token flag of a CLIP- or SigLIP-like tower."""
    inner = getattr(tower, "vision_model", tower)
    encoder = require(find(inner, ("encoder",)), "vision encoder", model)
    layers = require(find(encoder, ("layers", "layer")), "vision encoder layers", model)
    attention = [require(find(layer, ("self_attn", "attention")), "vision attention", model) for layer in layers]
    embeddings = require(find(inner, ("embeddings",)), "vision embeddings", model)
    has_cls = find(embeddings, ("class_embedding", "cls_token")) is not None
    return layers, attention, has_cls


def feature_layer(config: Any, layers: int) -> int | None:
    """Index of the tower layer whose output is used, or None when several are concatenated.

    ``hidden_states`` has ``layers + 1`` entries and entry ``i`` is the output of layer ``i - 1``.
    """
    index = config.vision_feature_layer
    if not isinstance(index, int):
        return None
    return (index if index >= 0 else layers + 1 + index) - 1


def tower_stages(single_layer: bool, full_strategy: bool) -> dict[Stage, str]:
    """Which stages a CLIP-tower family supports, and why not."""
    stages = dict.fromkeys(Stage, "")
    if full_strategy:
        why = "vision_feature_select_strategy='full' hands the class token to the language model as one more slot"
        stages |= {Stage.IMAGE: why, Stage.ENCODER: why, Stage.VISION: why}
    elif not single_layer:
        why = "features of several tower layers are concatenated (vision_feature_layer is a list)"
        stages |= {Stage.ENCODER: why}
    return stages


def grid_of(vision_config: Any) -> tuple[int, int]:
    """Patch grid of one view."""
    side = vision_config.image_size // vision_config.patch_size
    return side, side


def view_layout(n_views: int, grid: tuple[int, int], slot: Tensor, y: Tensor, x: Tensor, thumbnail: bool) -> Layout:
    """Build a view layout: ``n_views`` grids in view-major raster order."""
    rows, cols = grid
    per = rows * cols
    n = torch.arange(n_views * per)
    inside = n % per
    return Layout(torch.zeros_like(n), n // per, inside // cols, inside % cols, y, x, slot, (grid,) * n_views, thumbnail)
