"""Vision transformers of timm: plain blocks, at most one class token, a classifier or features behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Facts, Stage
from vtc.errors import UnsupportedModelError
from vtc.families.base import Observe, Transformer

TYPES = ("timm",)
_BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_NO_TEXT = "a vision transformer has no language model"


class _Tap:
    """Collects what one attention module computes on its way (an object: closures would not follow a copied model)."""

    def __init__(self, attention: nn.Module, observe: Observe) -> None:
        self.attention, self.observe = attention, observe
        self.seen: dict[str, Tensor] = {}

    def values(self, _module: nn.Module, _args: Any, out: Tensor) -> None:
        batch, n, _ = out.shape
        self.seen["v"] = out.reshape(batch, n, 3, self.attention.num_heads, -1)[:, :, 2].transpose(1, 2)

    def queries(self, _module: nn.Module, _args: Any, out: Tensor) -> None:
        self.seen["q"] = out

    def keys(self, _module: nn.Module, _args: Any, out: Tensor) -> None:
        self.observe(self.seen.pop("q"), out, self.seen.pop("v"), self.attention.scale)


def mlp_branch(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the first and the last module of a block's second residual branch."""
    return layer.norm2, layer.drop_path2


def tap(attention: nn.Module, observe: Observe, hook: Callable[[nn.Module, Callable[..., Any]], None]) -> None:
    """Call ``observe`` whenever the attention module runs; ``hook(module, function)`` registers a forward hook."""
    collector = _Tap(attention, observe)
    places = ((attention.qkv, collector.values), (attention.q_norm, collector.queries), (attention.k_norm, collector.keys))
    for module, look in places:
        hook(module, look)


def average(head: int, whole: bool, tokens: Tensor, weight: Tensor) -> Tensor:
    """Mean of tokens ``(B, head + n, D)`` by the ``weight (B, n)`` of the patches; ``whole``: those in front count once."""
    own = torch.cat([weight.new_ones(len(weight), head), weight], 1) if whole else weight
    tokens = tokens if whole else tokens[:, head:]
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return (tokens * own[..., None]).sum(1) / own.sum(1, keepdim=True)


def build(model: nn.Module) -> Transformer:
    """Describe a ``timm.models.VisionTransformer``.

    Raises
    ------
    UnsupportedModelError
        Another architecture, other blocks, or prefix tokens besides the class token (distillation, registers).
    """
    what = f"{type(model).__name__} of timm"
    if not all(hasattr(model, name) for name in ("blocks", "patch_embed", "num_prefix_tokens", "forward_features")):
        raise UnsupportedModelError(f"{what} is not a vision transformer: use a model such as vit_base_patch16_224")
    if model.num_prefix_tokens > 1:
        raise UnsupportedModelError(
            f"{what} has {model.num_prefix_tokens} tokens besides its patches (distillation or register tokens): models with a "
            "class token or none are supported"
        )
    blocks = list(model.blocks)
    for block in blocks:
        missing = [name for name in _BLOCK if not hasattr(block, name)]
        missing += [name for name in ("qkv", "q_norm", "k_norm") if not hasattr(getattr(block, "attn", None), name)]
        if missing:
            raise UnsupportedModelError(
                f"{what} has blocks without {missing[0]} ({type(block).__name__}), which vtc cannot shorten"
            )
    has_cls = bool(model.num_prefix_tokens)
    stages = {stage: "" if stage in (Stage.ENCODER, Stage.VISION) else _NO_TEXT for stage in Stage}
    stages[Stage.IMAGE] = "its input size is fixed: give it smaller pictures instead"
    patches = model.patch_embed.num_patches
    facts = Facts(
        family="timm",
        layers=0,
        encoder_layers=len(blocks),
        feature_layer=len(blocks) - 1,
        tokens=patches,
        max_tokens=patches,
        grid=tuple(model.patch_embed.grid_size),
        has_cls=has_cls,
        provides=frozenset({"attention", "cls"} if has_cls else {"attention"}),
        stages=stages,
    )
    averages = (
        getattr(model, "global_pool", "") == "avg" and getattr(model, "attn_pool", None) is None and hasattr(model, "pool")
    )
    return Transformer(
        name="timm",
        model=model,
        layers=blocks,
        attention=[b.attn for b in blocks],
        facts=facts,
        mlp_branch=mlp_branch,
        tap=tap,
        pooling="pool" if averages else "",
        average=functools.partial(average, int(has_cls), bool(getattr(model, "pool_include_prefix", False))),
    )
