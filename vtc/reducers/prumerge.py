"""PruMerge: keep the outliers of the class token's attention, each absorbing its nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from vtc.core import Need
from vtc.registry import register
from vtc.signals import wide_cls_attn, wide_keys
from vtc.views import AbsorbingReducer


@register(
    "prumerge",
    paper="arXiv:2403.15388",
    code="https://github.com/42Shawn/LLaVA-PruMerge @ 097c041",
    licence="Apache-2.0",
    presets={
        "llava15-adaptive": {"keep": 1.0, "adaptive": True},
        "llava15-eighth": {"keep": 73},
        "llava15-32": {"keep": 32},
    },
)
@dataclass(frozen=True, kw_only=True)
class PruMerge(AbsorbingReducer):
    """Keep the patches with the highest CLS attention, add their nearest neighbours to them, and the rest as one more token.

    Attention is that of the class token in the tower's *last* layer, as one head as wide as all of them; features are those handed
    to the projector. A kept patch becomes ``x_i + sum_j a_j x_j`` over the 32 other patches (kept or not) with the most similar
    keys (cosine), with attention ``a`` as it is, not normalised. One last token is the sum of all patches not kept, weighted
    likewise. The language model gets the kept patches in order of descending attention, then the last token, view by view in an
    AnyRes image; no newline tokens. The release was made for models tuned with it; using it without training is a harsher test.

    Adaptive: the number of kept patches is that of the outliers, attention above the third quartile plus one and a half
    interquartile ranges; ``keep`` is then only an upper limit.

    Towers without a class token: the attention a patch receives takes the place of CLS attention.

    Deviates: by default exactly ``keep`` tokens stay, so that methods compare at equal budgets; the release's call is adaptive.
    The outliers are counted view by view, where the release pools them over the batch, and there is at least one. Where the budget
    is one token it is the patch of highest attention with its neighbours, without the sum of the rest.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the projector, the last one included.
    adaptive : bool, default False
        Let the outliers of attention decide on the number of tokens, at most ``keep``.
    official : bool, default False
        As released: outliers are pooled over all images of a batch that have one geometry and may be none; every view gets
        ``keep // views`` tokens.
    """

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention and keys of the last layer, all heads taken as one."""
        return wide_cls_attn(-1), wide_keys(-1)
