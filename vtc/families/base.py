"""What an adapter is: data about one model, and the geometry of its visual slots. No method knowledge, no hooks."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Facts, Kind, Layout, Stage
from vtc.errors import UnsupportedFeatureError, UnsupportedModelError

SHUFFLE = "its pixel shuffle joins squares of patches, so the tower must run on all of them"
NO_BRANCH = "which vtc does not know how to reach between attention and MLP here"
RECORDED = "whose outputs this release of transformers records before hooks can change them (upgrade transformers to 5)"
PACKED = "its tower packs images of any size in one sequence and merges squares of patches inside its last module"


class UnshortenableError(UnsupportedModelError):
    """Decoder layers that cannot run on fewer tokens, of a model that is otherwise one vtc could serve."""


Observe = Callable[[Tensor, Tensor, Tensor, float], None]


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
        View layout of each image: every token the projector makes of every view, in its order.
    pixels : Tensor or list of Tensor
        What the tower is given: ``(sum(views), 3, H, W)``, or one tensor per image where images differ in size.
    cells : Tensor or None
        ``(n, m)`` the ``m`` tower patches that the projector turns into each of the ``n`` tokens of a view (of the whole call
        where the tower packs all views in one sequence); ``None``: one each.
    pieces : list of int or None
        Lengths of the blocks that attend to themselves only, where the tower packs all views in one sequence.
    refuses : str
        Why reducers in the vision tower cannot serve this call; empty if they can.
    appended : int
        Slots per image that the model adds behind what ``get_image_features`` returns.
    from_features : bool
        Nothing is known yet: :func:`by_length` fills the rest in from the features' shapes.
    """

    views: list[int]
    slots: list[Layout]
    patches: list[Layout]
    pixels: Tensor | list[Tensor]
    cells: Tensor | None = None
    pieces: list[int] | None = None
    refuses: str = ""
    appended: int = 0
    from_features: bool = False


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
    projector : Module or None
        Maps tower features ``(views, tokens, D_v)`` to ``(views, tokens, D)``, token by token; ``None`` where no module does.
    image_token_ids : tuple of int
        Placeholder token ids of images.
    facts : Facts
        Numbers reducers may see.
    describe : callable
        Bound arguments of ``get_image_features`` to :class:`VisionCall`.
    video_token_ids : tuple of int
        Placeholder token ids of videos.
    describe_video : callable or None
        The same as ``describe`` for ``get_video_features``; ``None`` where there are no videos.
    example : callable or None
        Height and width of a picture to the arguments ``describe`` takes, where they follow from the model's configuration: for
        counting tokens without a processor (see :mod:`vtc.counts`).
    processing : mapping
        What the model's processor tells its image processor beside that one's own settings.
    probed : bool
        No adapter knows this kind of model: its structure was looked at.
    unit : str
        What ``get_image_features`` takes for one image, and budgets therefore count.
    frames : str
        What the frames of a video are where the model takes videos and is told no clips; empty otherwise.
    between_layers : tuple of str
        Arguments of the text model through which visual features enter between decoder layers (DeepStack): the name of a
        ``(B, S)`` mask of the rows concerned, then that of a list with one ``(rows, D)`` tensor for each layer.
    merger : Module or None
        Last module of a tower that packs all images in one sequence, where reducers may act in front of it: it merges each
        ``facts.merge`` patches in a row into one token.
    mlp_branch : callable
        A tower layer to the modules between which its second residual branch runs (see :func:`mlp_branch`).
    """

    name: str
    base: nn.Module
    text: nn.Module
    layers: nn.ModuleList
    text_attention: list[nn.Module]
    tower: nn.Module
    encoder_layers: nn.ModuleList
    encoder_attention: list[nn.Module]
    projector: nn.Module | None
    image_token_ids: tuple[int, ...]
    facts: Facts
    describe: Callable[[Mapping[str, Any]], VisionCall]
    video_token_ids: tuple[int, ...] = ()
    describe_video: Callable[[Mapping[str, Any]], VisionCall] | None = None
    between_layers: tuple[str, str] | None = None
    example: Callable[[int, int], dict[str, Any]] | None = None
    processing: Mapping[str, Any] = field(default_factory=dict)
    probed: bool = False
    unit: str = "image"
    frames: str = ""
    merger: nn.Module | None = None
    mlp_branch: Callable[[nn.Module], tuple[nn.Module, nn.Module] | None] = field(default_factory=lambda: mlp_branch)


@dataclass(eq=False)
class Transformer:
    """A vision transformer without language model.

    Attributes
    ----------
    name : str
        Family name.
    model : Module
        The model; ``forward_features`` runs its blocks.
    layers, attention : list of Module
        Blocks and their attention modules.
    facts : Facts
        Numbers reducers may see. ``layers`` is 0: there is no language model.
    mlp_branch : callable
        A block to the first and the last module of its second residual branch.
    tap : callable
        ``tap(attention, observe, hook)`` makes ``observe(q, k, v, scale)``, each ``(B, H, N, d)``, be called whenever the attention
        module runs; ``hook(module, function)`` registers a forward hook.
    pooling : str
        Method of the model that averages the tokens behind the last block into one vector; empty where its head does otherwise.
    average : callable
        What it computes, with weights: the tokens ``(B, N, D)`` and the weights of the patches ``(B, n)`` to ``(B, D)``.
    """

    name: str
    model: nn.Module
    layers: list[nn.Module]
    attention: list[nn.Module]
    facts: Facts
    mlp_branch: Callable[[nn.Module], tuple[nn.Module, nn.Module]]
    tap: Callable[[nn.Module, Observe, Callable[[nn.Module, Callable[..., Any]], None]], None]
    pooling: str = ""
    average: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(eq=False)
class Retriever:
    """A model that turns documents and queries into vectors, several each.

    Attributes
    ----------
    name : str
        Family name.
    vectors : str
        Attribute of the output with the vectors ``(B, S, d)``, zeros where ``attention_mask`` is 0.
    pixels : str
        Argument whose presence makes a call one with documents; queries have none.
    """

    name: str
    vectors: str = "embeddings"
    pixels: str = "pixel_values"


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
    if any(layer is None or isinstance(layer, nn.Identity) for layer in text.layers):
        raise UnsupportedFeatureError(
            f"{type(text).__name__} has only some of its decoder layers on this rank (pipeline parallelism), and a reducer needs "
            "them all: load the model whole on every rank, or spread it with tensor parallelism"
        )
    types = set(getattr(text.config, "layer_types", None) or ())
    odd = types - {"full_attention", "sliding_attention", "chunked_attention"}
    if odd:
        raise UnsupportedModelError(
            f"{type(model).__name__} has decoder layers of type {sorted(odd)}, which vtc cannot shorten"
        )
    attentions = [found for layer in text.layers if (found := getattr(layer, "self_attn", None)) is not None]
    sharing = sum(bool(getattr(attention, "is_kv_shared_layer", False)) for attention in attentions)
    if sharing:
        raise UnshortenableError(
            f"{sharing} of the {len(text.layers)} decoder layers of {type(model).__name__} read keys and values that an earlier "
            "layer stored, and vtc does not follow which tokens are left of those: this model is not supported (those of its kind "
            "without shared layers are)"
        )
    counting = next((a for a in attentions if _COUNTS & {*_names(type(a).forward)} or _scales_by_place(a)), None)
    if counting is not None:
        raise UnshortenableError(
            f"{type(counting).__name__} counts positions itself, from the length of the KV cache and the tokens it is given, and "
            "would be wrong about those behind dropped ones: this model is not supported"
        )
    return base, text


_COUNTS = {"get_seq_length", "get_query_offset", "get_mask_sizes"}
"""What an attention asks the KV cache that scales or biases by positions of its own count (Llama 4, Inkling)."""


def _scales_by_place(attention: nn.Module) -> bool:
    """Whether an attention scales queries by their place in the KV cache (Llama 4 of 4.57), which drops move."""
    forward = inspect.signature(type(attention).forward).parameters
    return bool(getattr(attention, "attn_temperature_tuning", False)) and "cache_position" in forward


def _names(function: Any) -> tuple[str, ...]:
    """Names that a function and all it wraps look up in other objects."""
    found: tuple[str, ...] = ()
    while function is not None:
        found += getattr(getattr(function, "__code__", None), "co_names", ())
        function = getattr(function, "__wrapped__", None)
    return found


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
    index = getattr(config, "vision_feature_layer", None)
    if not isinstance(index, int):
        return None
    return (index if index >= 0 else layers + 1 + index) - 1


def refused(image: str = "", encoder: str = "", vision: str = "") -> dict[Stage, str]:
    """Stages of a family with the reasons against those before the projector; the others are supported."""
    return dict.fromkeys(Stage, "") | {Stage.IMAGE: image, Stage.ENCODER: encoder, Stage.VISION: vision}


def tower_stages(single_layer: bool, full_strategy: bool) -> dict[Stage, str]:
    """Which stages a CLIP-tower family supports, and why not."""
    if full_strategy:
        why = "vision_feature_select_strategy='full' hands the class token to the language model as one more slot"
        return refused(why, why, why)
    several = "features of several tower layers are concatenated (vision_feature_layer is a list)"
    return refused(encoder="" if single_layer else several)


def mlp_branch(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the first and the last module of a tower layer's ``x + mlp(norm(x))``, or None where vtc does not know them."""
    norm, mlp = find(layer, ("layer_norm2", "norm2")), find(layer, ("mlp",))
    if norm is None or mlp is None or find(layer, ("ls2", "layer_scale2", "lambda_2", "drop_path2")) is not None:
        return None
    return norm, mlp


def grid_of(vision_config: Any) -> tuple[int, int]:
    """Patch grid of one view."""
    size, patch = vision_config.image_size, vision_config.patch_size
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    down, across = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    return high // down, wide // across


def placeholder(config: Any, what: str) -> tuple[int, ...]:
    """Return the token id of ``"image"`` or ``"video"`` placeholders as a tuple, empty where there is none."""
    ids = (getattr(config, f"{what}_token_{end}", None) for end in ("id", "index"))
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def records_before_hooks(tower: nn.Module) -> bool:
    """Whether the outputs of a tower's layers are recorded inside their ``forward``, where no hook can change them (4.57).

    The decorator that records then puts its own ``forward`` on every layer; later ones use hooks.
    """
    recording = (m for m in tower.modules() if getattr(m, "_can_record_outputs", None))
    return any("monkey_patched_layers" in _code(type(m).forward) for m in recording)


def _code(function: Any) -> tuple[str, ...]:
    """Variables of a function and of all it wraps."""
    names: tuple[str, ...] = ()
    while function is not None:
        code = getattr(function, "__code__", None)
        names += (*code.co_varnames, *code.co_cellvars) if code is not None else ()
        function = getattr(function, "__wrapped__", None)
    return names


def assemble(
    model: nn.Module,
    *,
    tower: nn.Module,
    layers: nn.ModuleList,
    attention: list[nn.Module],
    projector: nn.Module | None,
    describe: Callable[[Mapping[str, Any]], VisionCall],
    describe_video: Callable[[Mapping[str, Any]], VisionCall] | None = None,
    between_layers: tuple[str, str] | None = None,
    example: Callable[[int, int], dict[str, Any]] | None = None,
    processing: Mapping[str, Any] | None = None,
    probed: bool = False,
    unit: str = "image",
    frames: str = "",
    merger: nn.Module | None = None,
    **facts: Any,
) -> Family:
    """Build a :class:`Family` whose language side is found by the usual names; ``facts`` are what only the adapter knows."""
    config = model.config
    base, text = multimodal_parts(model)
    no_merging = RECORDED if records_before_hooks(tower) else ""
    if not all(map(mlp_branch, layers)):
        no_merging = NO_BRANCH
    return Family(
        name=config.model_type,
        base=base,
        text=text,
        layers=text.layers,
        text_attention=[layer.self_attn for layer in text.layers],
        tower=tower,
        encoder_layers=layers,
        encoder_attention=attention,
        projector=projector,
        image_token_ids=require(placeholder(config, "image") or None, "image token id", model),
        facts=Facts(
            family=config.model_type,
            layers=len(text.layers),
            encoder_layers=len(layers),
            **{"no_merging": no_merging, **facts},
        ),
        describe=describe,
        video_token_ids=placeholder(config, "video"),
        describe_video=describe_video,
        between_layers=between_layers,
        example=example,
        processing=processing or {},
        probed=probed,
        unit=unit,
        frames=frames,
        merger=merger,
    )


def of_one_size(
    model: nn.Module,
    tower: nn.Module,
    grid: tuple[int, int],
    *,
    slots: Layout | None = None,
    cells: Tensor | None = None,
    pixels: Callable[[Mapping[str, Any]], Tensor] = operator.itemgetter("pixel_values"),
    feature_layer: int | None = None,
    **rest: Any,
) -> Family:
    """Describe a model with a CLIP- or SigLIP-like tower whose views have one size and are images of their own.

    Parameters
    ----------
    grid : (int, int)
        Rows and columns of the tokens the projector makes of a view.
    slots : Layout, optional
        Slot layout of a view, where that is not ``grid``.
    cells : Tensor, optional
        As in :class:`VisionCall`.
    pixels : callable
        Arguments of ``get_image_features`` to the views ``(V, 3, H, W)``.
    feature_layer : int, optional
        Tower layer whose output is used; the last one by default.
    **rest
        Further arguments of :func:`assemble`.
    """
    layers, attention, has_cls = clip_tower(tower, model)
    patches = Layout.grid(*grid)
    each = patches if slots is None else slots

    def describe(call: Mapping[str, Any]) -> VisionCall:
        views = pixels(call)
        n = len(views)
        return VisionCall([1] * n, [each] * n, [patches] * n, views, cells)

    settings = {
        "feature_layer": len(layers) - 1 if feature_layer is None else feature_layer,
        "tokens": len(each),
        "max_tokens": len(each),
        "grid": grid,
        "has_cls": has_cls,
        "provides": frozenset({"attention", "cls"} if has_cls else {"attention"}),
    }
    return assemble(model, tower=tower, layers=layers, attention=attention, describe=describe, **(settings | rest))


# ------------------------------------------------------------------------------------------------------------ geometry
def by_length(features: list[Tensor]) -> VisionCall:
    """Images of which only the features ``(slots, D)`` are known: a square number of them is taken for a square grid."""
    sides = [math.isqrt(len(f)) for f in features]
    slots = [Layout.grid(s, s) if s * s == len(f) else Layout.grid(1, len(f)) for s, f in zip(sides, features, strict=True)]
    return VisionCall([1] * len(slots), slots, slots, list(features))


def clip_pixels(call: Mapping[str, Any]) -> Tensor:
    """Return the clips ``(V, T, 3, H, W)`` of a call of ``get_video_features``; transformers 4.57 has another name for them."""
    return call.get("pixel_values_videos", call.get("pixel_values"))


def offsets(counts: Sequence[int]) -> list[int]:
    """Return where each of several blocks starts that stand one after the other."""
    return [0, *itertools.accumulate(counts)][:-1]


@functools.lru_cache(maxsize=64)
def frames(t: int, grid: tuple[int, int], newline: bool = False) -> Layout:
    """Layout of a clip: ``t`` frames, each a raster of ``grid``; with a newline behind the last one if asked. Cached."""
    rows, cols = grid
    n = torch.arange(t * rows * cols)
    row, col = n // cols % rows, n % cols
    columns = [torch.zeros_like(n), n // (rows * cols), row, col, row, col, n]
    if newline:
        ends = [int(Kind.NEWLINE), -1, -1, -1, rows - 1, cols, len(n)]
        columns = [torch.cat([c, torch.tensor([e])]) for c, e in zip(columns, ends, strict=True)]
    return Layout(*columns, (grid,) * t, video=True)


def pooled(grid: tuple[int, int], size: int) -> tuple[tuple[int, int], Tensor]:
    """Return the grid made of blocks of ``size`` x ``size`` patches, and the patches of each block ``(blocks, size ** 2)``."""
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    blocks = numbers.unfold(0, size, size).unfold(1, size, size)
    return (blocks.shape[0], blocks.shape[1]), blocks.flatten(2).flatten(0, 1)


def shuffled(grid: tuple[int, int], size: int, shuffle: Callable[[Tensor], Tensor]) -> tuple[tuple[int, int], Tensor]:
    """Return what :func:`pooled` does, for the model's own pixel ``shuffle`` of ``(1, patches, 1)``; raise if it is another one."""
    small, cells = pooled(grid, size)
    numbers = torch.arange(grid[0] * grid[1], dtype=torch.float64)[None, :, None]
    made = shuffle(numbers).reshape(-1, size * size).long()
    if made.shape != cells.shape or not torch.equal(made.sort(1).values, cells.sort(1).values):
        raise UnsupportedModelError("the pixel shuffle of this model joins other patches than squares in raster order")
    return small, cells


def anyres_layouts(
    n: int, grid: tuple[int, int], shape: tuple[int, int], pack: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Layout, Layout]:
    """Slot and view layout of an image cut into a thumbnail and ``n - 1`` crops.

    The model's own packing is run on coordinates instead of features, so unpadding, newlines and shrinking are right by
    construction. Where it shrinks the picture, a slot stands for the patch nearest to its centre.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of crops.
    pack : callable
        ``(views (n, patches, 3), newline (3,))`` to ``(slots, 3)``.
    """
    rows, cols = grid
    per, wide = rows * cols, max(shape[1], 1)
    entry = torch.arange(n * per)
    crop = (entry // per - 1).clamp(min=0)  # a choice: the thumbnail is no crop, and has its own places below
    y, x = entry % per // cols, entry % per % cols
    y = torch.where(entry >= per, y + crop // wide * rows, y)
    x = torch.where(entry >= per, x + crop % wide * cols, x)
    told = torch.stack([entry >= per, y, x], -1).double().view(n, per, 3)
    packed = (pack(told, torch.full((3,), -1.0, dtype=torch.float64)) + 0.5).floor().long()
    new = packed[:, 0] < 0  # newlines
    inside, down, across = packed.clamp(min=0).unbind(-1)  # a choice: newlines have no place, and take none
    view = inside * (1 + down // rows * wide + across // cols)
    at = torch.where(new, 0, view * per + down % rows * cols + across % cols)
    before = torch.where(new, torch.roll(at, 1), at)  # a newline closes the stitched row of the token before it
    slots = Layout(
        kind=torch.where(new, int(Kind.NEWLINE), int(Kind.PATCH)),
        view=torch.where(new, -1, at // per),
        row=torch.where(new, -1, at % per // cols),
        col=torch.where(new, -1, at % per % cols),
        y=y[before],
        x=torch.where(new, x.max() + 1, x[at]),
        slot=torch.arange(len(at)),
        grids=(grid,) * n,
        thumbnail=n > 1,
    )
    slot_of = torch.full((n * per,), -1)
    slot_of[at[~new]] = torch.arange(len(at))[~new]
    return slots, view_layout(n, grid, slot_of, y, x, n > 1)


def view_layout(n_views: int, grid: tuple[int, int], slot: Tensor, y: Tensor, x: Tensor, thumbnail: bool) -> Layout:
    """Build a view layout: ``n_views`` grids in view-major raster order."""
    rows, cols = grid
    per = rows * cols
    n = torch.arange(n_views * per)
    inside = n % per
    return Layout(torch.zeros_like(n), n // per, inside // cols, inside % cols, y, x, slot, (grid,) * n_views, thumbnail)
