"""ToMe: in every block of the vision tower, merge the pairs of tokens whose keys are most alike."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Budget, EncoderMerger, EncoderState, Facts, Need, Newlines, Positions
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import apportion, pairwise_top1
from vtc.registry import register
from vtc.signals import keys


def merged_per_layer(r: int, layers: int, inflect: float = 0.0) -> list[int]:
    """Return the tokens to merge in each layer: a straight line with the mean ``r``.

    ``inflect`` 0 is constant, -1 falls from ``2 r`` to 0, +1 rises from 0 to ``2 r``; fractions are cut off.
    """
    low = int(r * (1 - inflect))
    step = (2 * r - 2 * low) / max(layers - 1, 1)
    return [int(low + layer * step) for layer in range(layers)]


def most(tokens: int) -> int:
    """Return the largest number of ``tokens`` (without the class token) that one layer can merge away."""
    return tokens // 2


def next_step(tokens: int, target: int, layers: int) -> int:
    """Return how many of ``tokens`` to merge in the first of ``layers`` layers, so that ``target`` are left behind the last.

    As evenly as possible, earlier layers first where it does not divide; more where later layers could not make up for it.
    """
    excess = tokens - target
    even = -(-excess // layers)
    needed = tokens - target * 2 ** (layers - 1)
    return max(0, min(most(tokens), max(even, needed)))


def match(key: Tensor, valid: Tensor, r: Tensor, *, has_cls: bool) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: return ``owner (V, n)``, the token each one becomes, and the tokens left, ``(V,)``.

    Tokens go to two sets in turn; each of the first finds its most similar of the second by cosine; the ``r`` most similar
    pairs are merged. What is left of the first set comes first (ascending with a class token, else by falling similarity),
    then the second set. Padding has the owner -1. A view that merges nothing stays as it is.

    Parameters
    ----------
    key : Tensor
        ``(V, n, d)`` keys of the patches, mean over heads.
    valid : Tensor
        ``(V, n)`` bool, padding last.
    r : Tensor
        ``(V,)`` int64 pairs to merge, at most half of a view's tokens.
    has_cls : bool
        A class token stands in front of the patches, in the first set, and is never merged.
    """
    start = int(has_cls)  # the class token shifts the turns by one
    first, second = slice(start, None, 2), slice(1 - start, None, 2)
    a_valid, b_valid = valid[:, first], valid[:, second]
    same = torch.where(valid, torch.arange(valid.shape[1], device=key.device), -1)
    if a_valid.shape[1] == 0 or b_valid.shape[1] == 0:
        return same, valid.sum(1)
    owner = torch.full_like(same, -1)
    b = torch.where(b_valid[..., None], key[:, second], key[:, second][:, :1])  # padding repeats the first: it never wins
    value, best = pairwise_top1(key[:, first], b)
    best = torch.where(b_valid.gather(1, best), best, 0)
    order = value.masked_fill(~a_valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    turn = torch.arange(order.shape[1], device=key.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, turn)
    merged = (rank < r[:, None]) & a_valid
    stays = a_valid & ~merged
    unmerged = stays.sum(1, keepdim=True)
    place = stays.cumsum(1) - 1 if has_cls else rank - r[:, None]
    owner[:, first] = torch.where(merged, unmerged + best, torch.where(stays, place, -1))
    owner[:, second] = torch.where(b_valid, unmerged + b_valid.cumsum(1) - 1, -1)
    owner = torch.where(r[:, None] > 0, owner, same)  # as released, and whatever the other views of the call merge
    return owner, valid.sum(1) - merged.sum(1)


@register(
    "tome",
    paper="arXiv:2210.09461",
    code="https://github.com/facebookresearch/ToMe @ af95e4b",
    licence="CC-BY-NC-4.0",
    presets={
        "vit-b16": {"r": 13},
        "vit-l16": {"r": 7},
        "vit-l16-384": {"r": 23},
        "swag-h14-518": {"r": 40},
        "clip-l14-336": {"r": 16},
    },
)
@dataclass(frozen=True, kw_only=True)
class ToMe(EncoderMerger):
    """Merge the most similar tokens in every block of the vision tower, between its attention and its MLP.

    Similarity is the cosine of the keys, mean over heads; tokens are matched between every other token and the ones between
    (:func:`match`), so that no layer can merge more than half. A merged token is the mean of its patches, and attention counts
    it as often as it has patches (``proportional``). The class token never merges. The features come from one layer: the
    layers up to it merge, the ones behind it (LLaVA leaves out the last) do not.

    The order of the tokens inside the tower is that of the release. Behind it, a merged token stands at the first of its
    patches in the picture: crops, padding and newlines of AnyRes models are where they were, and tokens enter the language
    model in raster order.

    Deviates: the release knows ``r`` only; ``keep`` spreads the merging evenly over the layers. Views may end with different
    numbers of tokens, so budgets are exact on AnyRes models, too; groups of padding alone are dropped. A zero key is similar to
    nothing (cosine 0), where the release divides by zero. ``r`` stops at half of the tokens, as released.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image that leave the tower, shared evenly by its views; at least a ``2 ** -layers`` part.
    r : int or None
        Instead of ``keep``: tokens that every layer merges away, in every view.
    inflect : float, default 0.0
        With ``r``: how it changes from layer to layer, see :func:`merged_per_layer`.
    proportional : bool, default True
        Add the logarithm of a token's size to its attention logits. Needs a mask, so FlashAttention cannot be used; the release
        switches it off for models pre-trained as masked autoencoders.
    size_pool : bool, default False
        In a vision transformer whose head averages its tokens: count each as often as it has patches. The release does so for
        masked autoencoders and takes the plain mean of the merged tokens everywhere else.
    """

    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    budget_options: ClassVar[tuple[str, ...]] = ("keep", "avg_tokens", "r")

    r: int | None = None
    inflect: float = 0.0
    proportional: bool = True
    size_pool: bool = False
    _rates: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    _layers: int = field(default=0, init=False, repr=False, compare=False)
    _cls: bool = field(default=False, init=False, repr=False, compare=False)
    _share: float = field(default=1.0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        super().__post_init__()
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise BudgetError(f"tome: r={self.r!r} makes no sense; use the tokens to merge in each layer, an int of at least 1")
        if not -1.0 <= self.inflect <= 1.0 or (self.inflect and self.r is None):
            raise UnknownArgumentError(
                f"tome: inflect={self.inflect!r} is not possible; use a number from -1 to 1, together with r="
            )

    @property
    def budget(self) -> Budget:
        """The budget; with ``r`` the share of the patches that is left (known once :meth:`bind` has run)."""
        if self.r is None:
            return super().budget
        if self.keep is not None or self.avg_tokens is not None:
            raise BudgetError("tome: give exactly one of keep=, avg_tokens= and r=")
        return Budget(keep=self._share)

    @property
    def weighs_sizes(self) -> bool:
        """Proportional attention."""
        return self.proportional

    @property
    def weighs_pool(self) -> bool:
        """The head's average by size."""
        return self.size_pool

    def bind(self, facts: Facts) -> ToMe:
        """Fix the layers that merge.

        Raises
        ------
        BudgetError
            More tokens than there are, or fewer than merging in every layer can reach.
        """
        super().bind(facts)
        bound = copy.copy(self)
        layers, patches = facts.feature_layer + 1, facts.grid[0] * facts.grid[1]
        left, rates = patches, ()
        if self.r is not None:
            rates = tuple(merged_per_layer(self.r, layers, self.inflect))
            for rate in rates:
                left -= min(rate, most(left))
        for name, value in {"_rates": rates, "_layers": layers, "_cls": facts.has_cls, "_share": left / patches}.items():
            object.__setattr__(bound, name, value)
        bound.view_budgets(facts.max_views, patches, facts)
        return bound

    def view_budgets(self, views: int, patches: int, facts: Facts) -> list[int]:
        """Share an image's budget evenly over its views, lowest first."""
        floor = -(-patches // 2**self._layers)
        budgets = apportion(self.budget.tokens(views * patches), [1.0] * views, [patches] * views)
        if min(budgets) < floor:
            raise BudgetError(
                f"tome halves a view's {patches} patches at most once in each of the {self._layers} tower layers: keep at least "
                f"{views * floor} tokens of an image with {views} view{'s' if views > 1 else ''}"
            )
        return budgets

    def encoder_needs(self, layer: int) -> tuple[Need, ...]:
        """Keys of every layer."""
        return (keys(layer),)

    def merge(self, state: EncoderState) -> tuple[Tensor, Tensor] | None:
        """Match the tokens of each view."""
        if self._rates:
            wanted = [min(self._rates[state.layer], most(n)) for n in state.counts]
        else:
            left = self._layers - state.layer
            wanted = [next_step(n, t, left) for n, t in zip(state.counts, state.targets, strict=True)]
        if not any(wanted):
            return None
        r = torch.tensor(wanted)
        owner, _ = match(state.taps["keys"], state.valid, r.to(state.valid.device, non_blocking=True), has_cls=self._cls)
        return owner, torch.tensor(state.counts) - r  # on the host, which wants to know
