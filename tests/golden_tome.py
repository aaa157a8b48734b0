"""Golden cases of ToMe (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import vtc
from vtc.core import Facts, Stage
from vtc.engine.encoder import EncoderRun, EncoderStage
from vtc.engine.undo import Undo
from vtc.kernels import merge_scatter
from vtc.reducers.tome import match, merged_per_layer, most
from vtc.signals import AttentionTap, keys
from vtc.stats import Clock

Tensors = dict[str, Tensor]


def tome(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Schedules, one matching, or a chain of blocks, by what the file brings."""
    if "metric" in inputs:
        return _one(inputs, params)
    if "x" in inputs:
        return _chain(inputs, params)
    return _schedules()


def _schedules() -> Tensors:
    """Schedules under the names a file may ask for: ``r13_inflectm0p5_L12``."""
    out: Tensors = {}
    for inflect in (0, 0.25, 0.5, 0.75, 1.0, -0.25, -0.5, -0.75, -1.0):
        name = str(inflect).replace("-", "m").replace(".", "p")
        for r in range(1, 65):
            out |= {
                f"r{r}_inflect{name}_L{n}": torch.tensor(merged_per_layer(r, n, inflect)) for n in (4, 6, 8, 12, 16, 24, 32)
            }
    return out


def _one(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """One matching, applied with unit sizes and with the sizes of the file."""
    metric, x, head = inputs["metric"], inputs["x"], int(params["class_token"])
    batch, n = metric.shape[0], metric.shape[1] - head
    r = torch.full((batch,), min(params["r"], most(n)))
    owner, count = match(metric[:, head:], torch.ones(batch, n, dtype=torch.bool), r, has_cls=bool(head))
    if head:
        owner = torch.cat([torch.zeros_like(owner[:, :1]), owner + 1], 1)
    groups = int(count[0]) + head
    out = {"group_of_token": owner}
    for name, size in (("1", torch.ones(batch, n + head)), ("weighted", inputs["size"][..., 0])):
        out["x_size1" if name == "1" else "x_weighted"] = merge_scatter(x, owner, groups, weight=size)
        total = merge_scatter(size[..., None], owner, groups, mean=False)
        out["size_from1" if name == "1" else "size_weighted"] = total
    return out


class Nothing(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Block(nn.Module):
    """``x + attention(x)``: the release's chain has no MLP."""

    def __init__(self, weights: Tensors, heads: int, observe: Any) -> None:
        super().__init__()
        self.weights, self.heads, self.observe = weights, heads, observe
        self.norm2, self.mlp = nn.Identity(), Nothing()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        w, x = self.weights, hidden_states
        b, n, d = x.shape
        qkv = F.linear(x, w["qkv.weight"], w["qkv.bias"]).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        self.observe(*qkv)
        mixed = F.scaled_dot_product_attention(*qkv, attn_mask=attention_mask).transpose(1, 2).reshape(b, n, d)
        x = x + F.linear(mixed, w["proj.weight"], w["proj.bias"])
        return x + self.mlp(self.norm2(x))


def _chain(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """Blocks under the engine's hooks."""
    x, head, rates = inputs["x"], int(params["class_token"]), params["r"]
    layers = len(rates)
    facts = Facts(
        "test", 1, layers, layers - 1, None, None, (1, x.shape[1] - head), bool(head), frozenset(), dict.fromkeys(Stage, "")
    )
    part = vtc.create("tome", r=1, proportional=params["prop_attn"]).bind(facts)
    object.__setattr__(part, "_rates", tuple(rates))
    run = EncoderRun([1] * x.shape[0], None, Clock())
    out: Tensors = {}
    blocks = []
    for i in range(layers):

        def observe(q: Tensor, k: Tensor, v: Tensor, i: int = i) -> None:
            def tap(cls: bool) -> Tensor:
                return keys(i).measure(AttentionTap(q, k, v, 1.0, cls=cls))

            run.taps = {"keys": tap(bool(head))}
            out[f"layer{i}.metric"] = tap(False)

        weights = {name.removeprefix(f"layer{i}."): t for name, t in inputs.items() if name.startswith(f"layer{i}.")}
        blocks.append(Block(weights, params["heads"], observe))
    stage = EncoderStage(part, blocks, blocks, lambda layer: (layer.norm2, layer.mlp), facts, lambda: run)
    stage.install(Undo())
    for i, block in enumerate(blocks):
        x = block(x)
        out[f"layer{i}.x"], out[f"layer{i}.size"] = x, stage.with_head(run.size, 1.0)[..., None]
    out["group_of_original"] = torch.cat([torch.zeros_like(run.owner[:, :1]), run.owner + 1], 1) if head else run.owner
    return out


CASES = {"tome": tome}
