"""FlowCut: prune step by step inside the vision encoder, and once more inside the language model where there are many tokens."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core import (
    Budget,
    EncoderReducer,
    EncoderState,
    Facts,
    Layout,
    Need,
    Newlines,
    Positions,
    Reducer,
    Schedule,
    Scorer,
    Signals,
    Stage,
    check_bounds,
)
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.kernels import topk_mask
from vtc.registry import register
from vtc.signals import (
    cls_attn,
    cls_value_affinity,
    last_logits,
    last_value_logits,
    mean_query_attn,
    text_values,
    values,
)

PERIOD = 2
"""Encoder layers from one cut to the next."""
NO_CLS_EPS = 1e-7
"""Added inside the logarithm of the entropy by the release's branch for towers without a class token."""


# ------------------------------------------------------------------------------------------------------- the criterion
def token_score(attention: Tensor, affinity: Tensor | None, value: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return ``(a / sum(a) + s / sum(s)) * ||v||_1``, the criterion of the encoder and of the language model.

    Parameters
    ----------
    attention : Tensor
        ``(B, N)`` attention ``a`` of the reference token (class token, or last text token), mean over heads.
    affinity : Tensor or None
        ``(B, N)`` softmax ``s`` of value dot products with the reference token, mean over heads. ``None``, for towers without a
        class token: the score is ``a * ||v||_1``, as the release has it there.
    value : Tensor
        ``(B, N, d)`` value vectors, mean over heads.
    valid : Tensor or None
        ``(B, N)`` False on padding, which neither counts nor scores.
    """
    size = value.abs().sum(-1)
    if valid is not None:
        attention, size = attention * valid, size * valid
        affinity = None if affinity is None else affinity * valid
    if affinity is None:
        return attention * size
    return (attention / attention.sum(1, keepdim=True) + affinity / affinity.sum(1, keepdim=True)) * size


def accumulate(previous: Tensor | None, score: Tensor) -> Tensor:
    """Exponential moving average over the layers: ``score`` itself at first, the mean with ``previous`` from then on."""
    return score if previous is None else 0.5 * previous + 0.5 * score


def drop_count(
    attention: Tensor, valid: Tensor, target: Tensor, remaining: int, group: Tensor, *, has_cls: bool = True
) -> Tensor:
    """Return how many patches leave each view after a layer that is not the last one: few while attention is spread out.

    ``round((N - target) / sqrt(remaining) * (1 - h^2))`` with the relative entropy ``h`` of the attention, rounded half to
    even; the largest number of a group counts for all its views.

    Parameters
    ----------
    attention : Tensor
        ``(V, N)`` attention of the reference token.
    valid : Tensor
        ``(V, N)`` bool.
    target : Tensor
        ``(V,)`` patches a view is to end with.
    remaining : int
        Layers left before the last cut, at least 1.
    group : Tensor
        ``(V,)`` int64 below ``V``: views that share one number.
    has_cls : bool
        Without a class token the attention sums to one as it is, and the release guards the logarithm with ``NO_CLS_EPS``.
    """
    count = valid.sum(1)
    p = attention * valid
    if has_cls:
        p = p / p.sum(1, keepdim=True)
        terms = torch.xlogy(p, p)  # 0 log 0 = 0: the release gets NaN there and stops
    else:
        terms = p * torch.log(p + NO_CLS_EPS)
    h = -terms.sum(1) / torch.log(count.clamp(min=2).to(p.dtype))
    exact = ((count - target).double() / math.sqrt(remaining)).to(p.dtype) * (1 - h**2)
    most = torch.zeros_like(exact).scatter_reduce(0, group, exact, "amax", include_self=False)[group]
    return most.round().long()


def encoder_target(tokens: int, *, anyres: bool = False, merge: int = 1) -> int:
    """Return the patches a view keeps in the encoder when ``tokens`` visual tokens are asked for, before clamping.

    One view per image: ``tokens``. AnyRes: half of it for every view. Towers that fuse ``merge > 1`` patches into one token
    behind the encoder (Qwen2-VL: 4): twice the tokens, that is ``2 * merge * tokens`` patches.
    """
    return 2 * merge * tokens if merge > 1 else tokens // 2 if anyres else tokens


def crop_layout(crops: tuple[int, int], size: tuple[int, int], side: int = 24) -> Layout:
    """Return the view layout of an image's crops with the release's own padding arithmetic.

    The padded border of the stitched picture has ``slot == -1``; the other patches are numbered in raster order of the stitched
    picture, without newline tokens. In a patched model the layout comes from the model's own packing; Hugging Face rounds a
    product to seven decimals before truncating it, so that in rare sizes its border is one row or column thinner.

    Parameters
    ----------
    crops : tuple of (int, int)
        Rows and columns of the crop grid.
    size : tuple of (int, int)
        Width and height of the original image in pixels.
    side : int
        Patches along one side of a crop.
    """
    rows, cols = crops
    width, height = size
    entry = torch.arange(rows * cols * side * side)
    view, inside = entry // side**2, entry % side**2
    y, x = view // cols * side + inside // side, view % cols * side + inside % side
    high, wide = rows * side, cols * side
    if width / height > wide / high:
        border = (high - int(height * (wide / width))) // 2
        real = (y >= border) & (y < high - border)
    else:
        border = (wide - int(width * (high / height))) // 2
        real = (x >= border) & (x < wide - border)
    raster = torch.where(real, y * wide + x, high * wide)
    slot = torch.empty_like(entry)
    slot[raster.argsort(stable=True)] = entry
    slot = torch.where(real, slot, -1)
    return Layout(torch.zeros_like(entry), view, inside // side, inside % side, y, x, slot, ((side, side),) * (rows * cols))


def image_budget(budget: Budget, n: int, facts: Facts, layer: int) -> int:
    """Return the tokens an image with ``n`` visual tokens ends with in the last decoder layer.

    On AnyRes models an average over the layers counts the ``layer`` first decoder layers with the half budget per view that
    leaves the encoder, for the largest number of views; images with fewer views or with padding stay below it. Behind a merger
    these layers hold twice the budget.
    """
    if budget.keep is not None or not (facts.anyres or facts.merge > 1):
        return budget.tokens(n)
    exact = budget.amount * n if isinstance(budget.amount, float) else budget.amount
    if facts.merge > 1:
        tokens = exact * facts.layers / (facts.layers + layer)
        if 2 * tokens > n:
            tokens = (exact * facts.layers - layer * n) / (facts.layers - layer)
        return max(1, min(n, round(tokens)))
    patches = facts.grid[0] * facts.grid[1]
    tokens = exact * facts.layers / (facts.layers - layer + layer * facts.max_views / 2)
    if tokens / 2 > patches:  # the encoder drops nothing at this budget
        tokens = (exact * facts.layers - layer * facts.max_views * patches) / (facts.layers - layer)
    return max(1, min(n, round(tokens)))


# --------------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True, kw_only=True)
class FlowCutEncoder(EncoderReducer):
    """Encoder stage of :class:`FlowCut`: a cut every second layer, the last one after layer ``last_layer``.

    Parameters
    ----------
    last_layer : int
        Layer after which exactly the target is left; the features come from a later layer.
    has_cls : bool, default True
        Whether the tower has a class token.
    layer_llm : int, default 2
        First decoder layer after the cut inside the language model (AnyRes models; for ``avg_tokens`` only).
    official : bool, default False
        Number of patches to drop shared by the whole batch instead of by the views of one image.
    """

    name: ClassVar[str] = "flowcut"

    last_layer: int
    has_cls: bool = True
    layer_llm: int = 2
    official: bool = False

    def view_budget(self, patches: int, facts: Facts) -> int:
        """Return the patches a view ends with; a share on AnyRes models is one of an image with all the views there can be."""
        if not facts.anyres:
            return self.budget.tokens(patches)
        tokens = image_budget(self.budget, facts.max_views * patches, facts, self.layer_llm)
        return max(1, min(patches, encoder_target(tokens, anyres=True)))

    def view_budgets(self, views: int, patches: int, facts: Facts) -> list[int]:
        """Behind a merger whole tokens are left, those of a clip shared evenly by its frames."""
        if facts.merge == 1:
            return super().view_budgets(views, patches, facts)
        tokens = image_budget(self.budget, views * patches // facts.merge, facts, self.layer_llm)
        each = max(1, encoder_target(tokens, merge=facts.merge) // facts.merge // views) * facts.merge
        return [min(patches, each)] * views

    @property
    def fills_first_slots(self) -> bool:
        """What the release does with the merged tokens."""
        return self.official

    def encoder_needs(self, layer: int) -> tuple[Need, ...]:
        """Attention and value affinity of the class token (or attention of the mean query), and the values."""
        if self.has_cls:
            return (cls_attn(layer, substitute=False), cls_value_affinity(layer), values(layer))
        return (mean_query_attn(layer), values(layer))

    def step(self, state: EncoderState) -> tuple[dict[str, Tensor], Tensor | None]:
        """Update the score of views that are above their target; drop patches after every second layer."""
        if all(n <= target for n, target in zip(state.counts, state.targets, strict=True)):
            return dict(state.carry), None
        valid, count = state.valid, state.valid.sum(1)
        above = count > state.target
        attention = state.taps["cls_attn" if self.has_cls else "mean_query_attn"]
        score = token_score(attention, state.taps.get("cls_value_affinity"), state.taps["values"], valid)
        previous = state.carry.get("cum")
        cum = accumulate(previous, score)
        if previous is not None:
            cum = torch.where(above[:, None], cum, previous)
        remaining = self.last_layer - state.layer
        if remaining % PERIOD:
            return {"cum": cum}, None
        left = state.target
        if remaining > 0:
            group = torch.zeros_like(state.image) if self.official else state.image
            drop = drop_count(attention, valid, state.target, remaining, group, has_cls=self.has_cls)
            left = torch.maximum(count - drop, state.target)
        left = torch.where(above, left, count)
        return {"cum": cum}, topk_mask(cum.masked_fill(~valid, -torch.inf), left) & valid


@dataclass(frozen=True, kw_only=True)
class FlowCutDecoder(Scorer):
    """Language-model stage of :class:`FlowCut`: one cut, scored with the last text token as the reference.

    Parameters
    ----------
    at : int, default 2
        First decoder layer that runs on the shorter sequence.
    """

    name: ClassVar[str] = "flowcut"
    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"

    at: int = 2

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.at

    @property
    def needs(self) -> tuple[Need, ...]:
        """Queries, keys and values of the layer before."""
        return (last_logits(self.at - 1), last_value_logits(self.at - 1), text_values(self.at - 1))

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens an image ends with."""
        return image_budget(self.budget, n, facts, self.at)

    def score(self, signals: Signals) -> Tensor:
        """Both softmaxes run over the visual keys only, per head."""
        attention = torch.softmax(signals.last_logits, 1).mean(-1)
        affinity = torch.softmax(signals.last_value_logits, 1).mean(-1)
        return token_score(attention, affinity, signals.text_values)


@register(
    "flowcut",
    paper="arXiv:2505.19536",
    code="https://github.com/TungChintao/FlowCut @ a2ecd24",
    licence="Apache-2.0",
    presets={
        **{f"llava15-{k}": {"keep": k} for k in (192, 128, 64)},
        **{f"llavanext-{k}": {"keep": k} for k in (640, 320, 160)},
        "qwen2vl-33": {"keep": 1 / 3},
        "qwen2vl-22": {"keep": 2 / 9},
        "qwen2vl-11": {"keep": 1 / 9},
    },
)
@dataclass(frozen=True, kw_only=True)
class FlowCut(Schedule):
    """Prune gradually between the layers of the vision encoder, by a score averaged over the layers; AnyRes models cut once more.

    **Encoder.** Patches are scored in every layer by attention of the class token, value similarity to it and value magnitude
    (:func:`token_score`), averaged over the layers (:func:`accumulate`). After every second layer some leave; how many follows
    from the entropy of the attention (:func:`drop_count`). The layer before the one whose output is used sees exactly the
    target: ``keep`` patches on models with one view per image, ``keep // 2`` of every view on AnyRes models. Survivors stay in
    raster order; on AnyRes models newline tokens and padding go, thumbnail first, then the crops in raster order of the
    stitched picture.

    **Qwen2-VL.** Attention of the mean query times value magnitude ranks the patches; ``8 * keep`` of them are left behind the last
    block, and the merger joins four survivors in a row into one of ``2 * keep`` tokens, whether they were neighbours or not. A
    token stands where the first of its patches was. The frames of a clip share the budget.

    **Language model** (AnyRes models and Qwen2-VL). Before decoder layer ``layer`` an image with more than ``keep`` tokens is cut
    to ``keep``, by the same score with the last text token as the reference. Positions are renumbered from there on.

    Other towers without a class token use the rule of the released Qwen2-VL code.

    Deviates: the number of patches dropped is the largest one among the views of one *image*; the release takes it over the
    whole batch, so that an image's tokens depend on its neighbours (the same at batch size one; ``official=True`` restores it).
    A patch with attention exactly zero counts as ``0 log 0 = 0`` in the entropy, where the release stops with an error. The cut
    in the language model is made per sample in padded batches and grouped-query models too, where the release fails. With another
    tower without class token the last cut lies one layer before the features, as with CLIP; the released Qwen2-VL code cuts
    after the last block. An image of one view on an AnyRes model loses its single newline token, and a budget so large that the
    encoder drops nothing leaves newline tokens in place until the cut in the language model. On Qwen2-VL the release works on
    one image only, and gives the merged tokens the first positions of the image, whatever patches they are made of
    (``official=True``). The paper's setting for Video-LLaVA (256 tokens of 8 frames) has no released code and no preset.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image in the end: those that enter the language model (one view per image), or decoder layer ``layer``
        (AnyRes: up to ``views * (keep // 2)`` enter the layers before; Qwen2-VL: twice as many). A share on an AnyRes model is, in
        the encoder, one of an image with all the views there can be.
    layer : int or None
        AnyRes models and Qwen2-VL: first decoder layer after the cut. ``None``: 2. Other models have no such cut and refuse the
        option.
    official : bool, default False
        Share the number of dropped patches over the whole batch and put Qwen2-VL's tokens in the first slots, as released.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.ENCODER, Stage.DECODER)

    layer: int | None = None  # type: ignore[assignment]
    official: bool = False
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def bind(self, facts: Facts) -> FlowCut:
        """Choose the rule for this tower, and the stages.

        Raises
        ------
        BudgetError
            A budget above the tokens there are.
        UnsupportedFeatureError
            Features of the tower's first layer: there is nothing in front of it to prune.
        UnknownArgumentError
            ``layer`` on a model with one view per image.
        """
        check_bounds(self.budget, facts)
        if facts.feature_layer < 1:
            raise UnsupportedFeatureError(
                "'flowcut' prunes in front of the tower layer whose output is used, which is the first one here: use a reducer "
                "at the boundary"
            )
        twice = facts.anyres or facts.merge > 1
        if self.layer is not None and not twice:
            raise UnknownArgumentError(
                f"'flowcut': layer={self.layer} places the cut inside the language model, which AnyRes models and Qwen2-VL have: "
                "drop it"
            )
        shared: dict[str, Any] = {k: getattr(self, k) for k in ("keep", "avg_tokens", "positions", "newlines", "per")}
        at = 2 if self.layer is None else self.layer
        last = facts.feature_layer - (facts.merge == 1)  # Qwen2-VL's merger follows the last block
        parts: tuple[Reducer, ...] = (
            FlowCutEncoder(**shared, last_layer=last, has_cls=facts.has_cls, layer_llm=at, official=self.official),
        )
        if twice:
            parts += (FlowCutDecoder(**shared, at=at),)
        bound = copy.copy(self)
        object.__setattr__(bound, "_parts", parts)
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """The encoder stage and, on AnyRes models, the cut in the language model; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'flowcut' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
