"""Golden files of our own: plain transcriptions of two specifications, sample by sample in float64, without anything of vtc.

They bring what the recorded files of these methods do not: AIM end to end with more than one sample, and FlowCut's cut in the
language model on samples that end with different lengths, whose padding the comparison leaves out. The transcriptions reproduce the
recorded files, too. ``python tests/transcribed.py`` writes the files again (:data:`FILES`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Params = dict[str, Any]

FOLDER = Path(__file__).parent / "golden_transcribed"
TINY = 1e-20
GAP = 1e-3
"""Least distance of the last score kept from the first one dropped, as a share: no CPU's rounding decides."""


# -------------------------------------------------------------------------------------------------------- a plain decoder
def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turned(t: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate ``t (H, S, d)``; angles are float32, as everywhere."""
    d = t.shape[-1]
    frequency = 1 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = positions.float()[:, None] * frequency
    cos, sin = (torch.cat([f(angle)] * 2, 1).to(t.dtype) for f in (torch.cos, torch.sin))
    return t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin


def attention_inputs(w: Tensors, i: int, x: Tensor, positions: Tensor, p: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(H, S, d)`` of layer ``i`` on one sample ``x (S, D)``, keys and values repeated to all heads."""
    y, d = normed(x, w[f"{i}.input_layernorm.weight"], p["rms_eps"]), x.shape[1] // p["heads"]

    def project(name: str, heads: int) -> Tensor:
        out = y @ w[f"{i}.self_attn.{name}.weight"].T + w.get(f"{i}.self_attn.{name}.bias", 0)
        return out.reshape(len(x), heads, d).transpose(0, 1).repeat_interleave(p["heads"] // heads, 0)

    q, k, v = project("q_proj", p["heads"]), project("k_proj", p["kv_heads"]), project("v_proj", p["kv_heads"])
    return turned(q, positions, p["rope_theta"]), turned(k, positions, p["rope_theta"]), v


def rest_of_layer(w: Tensors, i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, p: Params) -> Tensor:
    """What layer ``i`` returns, given ``allowed (queries, keys)``."""
    logits = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).masked_fill(~allowed, -torch.inf)
    mixed = (torch.softmax(logits, -1) @ v).transpose(0, 1).reshape(len(x), -1)
    x = x + mixed @ w[f"{i}.self_attn.o_proj.weight"].T
    y = normed(x, w[f"{i}.post_attention_layernorm.weight"], p["rms_eps"])
    gate = y @ w[f"{i}.mlp.gate_proj.weight"].T
    return x + (gate * torch.sigmoid(gate) * (y @ w[f"{i}.mlp.up_proj.weight"].T)) @ w[f"{i}.mlp.down_proj.weight"].T


def triangle(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def best(score: Tensor, k: int) -> tuple[Tensor, float]:
    """The ``k`` highest, ascending, and by which share of it the last one beats the next; 0 where float32 calls either nought."""
    order = torch.argsort(score, descending=True, stable=True)
    if k in (0, len(score)):
        return order[:k].sort().values, 1.0
    last, after = score[order[k - 1]].item(), score[order[k]].item()
    clear = last > TINY and (after < 0 or after > TINY)  # -1: hidden already
    return order[:k].sort().values, (last - after) / last if clear else 0.0


def weights_of(inputs: Tensors) -> Tensors:
    return {name.removeprefix("w."): t for name, t in inputs.items() if name.startswith("w.")}


# ------------------------------------------------------------------------------------------------------------------ AIM
def aim(inputs: Tensors, p: Params) -> tuple[Tensors, float]:
    """Importance and visibility after every layer, and the hidden states; ``decode_embed``: one step more."""
    w, samples = weights_of(inputs), []
    first = {28: 14, 32: 13}[p["layers"]]  # the first layer that hides something
    smallest = 1.0
    for b, x in enumerate(inputs["embeds"]):
        n, here = len(x), torch.arange(len(x))
        image = (here >= p["sys"]) & (here < p["sys"] + p["vis"])
        texts = int((~image).sum())
        new = inputs["decode_embed"][b] if "decode_embed" in inputs else x[:0]
        visible, seen = torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
        scores, masks = [], []
        for i in range(p["layers"]):
            q, k, v = attention_inputs(w, i, x, here, p)
            logits = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).masked_fill(~(triangle(n) & visible), -torch.inf)
            walk = torch.full((p["heads"], 1, n), 1 / n, dtype=x.dtype)
            for _ in range(5):
                walk = walk @ torch.softmax(logits / 0.1, -1)
            score = walk[:, 0].square().mean(0).sqrt()
            x = rest_of_layer(w, i, x, q, k, v, triangle(n) & visible, p)
            if len(new):  # sees what is left after the layer before, and itself
                at = torch.tensor([n])
                own = attention_inputs(w, i, new, at, p)
                sees = torch.cat([seen, torch.ones(1, dtype=torch.bool)])[None]
                new = rest_of_layer(w, i, new, own[0], torch.cat([k, own[1]], 1), torch.cat([v, own[2]], 1), sees, p)
            rate = 1.0 if i < first else max(0.0, 1 - (i - first + 1) * 0.125)
            ranked = score.masked_fill(~visible, -1.0).masked_fill(~image, 1.0)
            keep, gap = best(ranked, int((n - texts) * rate + texts))
            if rate > 0:
                smallest = min(smallest, gap)
            visible = visible & torch.zeros_like(visible).index_fill(0, keep, True)
            seen = visible
            scores.append(score)
            masks.append(visible)
        out = {"importance": torch.stack(scores), "mask_after": torch.stack(masks).long()}
        out["last_hidden"] = normed(x, w["norm.weight"], p["rms_eps"])
        if len(new):
            out["decode_hidden"] = normed(new, w["norm.weight"], p["rms_eps"])
        samples.append(out)
    layered = ("importance", "mask_after")
    stacked = {name: torch.stack([s[name] for s in samples], int(name in layered)) for name in samples[0]}
    return {**stacked, "n_keep": samples[0]["mask_after"].sum(1)}, smallest


# -------------------------------------------------------------------------------------------------------------- FlowCut
def flowcut(inputs: Tensors, p: Params) -> tuple[Tensors, float]:
    """The cut in the language model: every sample on its own up to it, then padded on the right, which nothing hides."""
    w, cut, target = weights_of(inputs), p["prune_layer"], p["target"]
    short, kept, smallest = [], [], 1.0
    for x, start, n in zip(inputs["embeds"], p["visual_token_pos"], p["visual_token_num"], strict=True):
        here = torch.arange(len(x))
        for i in range(cut + 1):
            q, k, v = attention_inputs(w, i, x, here, p)
            x = rest_of_layer(w, i, x, q, k, v, triangle(len(x)), p)
        if n > target:
            image, scale = slice(start, start + n), 1 / math.sqrt(q.shape[2])
            near, like = (
                torch.softmax((t[:, -1:] @ u[:, image].transpose(1, 2))[:, 0] * scale, -1).mean(0) for t, u in ((q, k), (v, v))
            )
            score = (near / near.sum() + like / like.sum()) * v[:, image].mean(0).abs().sum(1)
            keep, gap = best(score, target)
            kept.append(keep)
            smallest = min(smallest, gap)
            x = torch.cat([x[:start], x[start + keep], x[start + n :]])
        short.append(x)
    lens = torch.tensor([len(x) for x in short])
    longest = int(lens.max())
    padded = torch.stack([torch.cat([x, x.new_zeros(longest - len(x), x.shape[1])]) for x in short])
    positions = torch.stack([torch.where(torch.arange(longest) < n, torch.arange(longest), 0) for n in lens])
    last = []
    for x, at in zip(padded, positions, strict=True):
        for i in range(cut + 1, p["layers"]):
            q, k, v = attention_inputs(w, i, x, at, p)
            x = rest_of_layer(w, i, x, q, k, v, triangle(longest), p)
        last.append(normed(x, w["norm.weight"], p["rms_eps"]))
    return {
        "keep": torch.stack(kept) if kept else torch.zeros(0, target, dtype=torch.long),
        "hidden2": padded,
        "last_hidden": torch.stack(last),
        "position_ids_after": positions,
        "lens": lens,
    }, smallest


# ---------------------------------------------------------------------------------------------------------------- files
TRANSCRIPTIONS: dict[str, Callable[[Tensors, Params], tuple[Tensors, float]]] = {"aim": aim, "flowcut": flowcut}
"""By method: ``(inputs, params) -> outputs, gap``, the smallest distance of scores at a cut."""


def drawn(
    seed: int, p: Params, width: int, inner: int, length: int, *, sharp: float, bias: bool = False, decode: bool = False
) -> Tensors:
    """Random inputs of a decoder, whose attention is the more uneven the larger ``sharp``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    out = {"embeds": normal(p["B"], length, width)}
    if decode:
        out["decode_embed"] = normal(p["B"], 1, width)
    narrow = width // p["heads"] * p["kv_heads"]
    for i in range(p["layers"]):
        for name, rows, cols, scale in (
            ("self_attn.q_proj", width, width, sharp),
            ("self_attn.k_proj", narrow, width, sharp),
            ("self_attn.v_proj", narrow, width, 0.8),
            ("self_attn.o_proj", width, width, 0.5),
            ("mlp.gate_proj", inner, width, 1.0),
            ("mlp.up_proj", inner, width, 1.0),
            ("mlp.down_proj", width, inner, 0.5),
        ):
            out[f"w.{i}.{name}.weight"] = normal(rows, cols, scale=scale / math.sqrt(cols))
            if bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                out[f"w.{i}.{name}.bias"] = normal(rows, scale=0.2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"w.{i}.{name}.weight"] = 1 + normal(width, scale=0.1)
    return {**out, "w.norm.weight": 1 + normal(width, scale=0.1)}


LLAMA = {"rms_eps": 1e-6, "rope_theta": 10000.0}
FILES: dict[str, tuple[Params, dict[str, Any]]] = {
    "aim/e2e_llama_32l_b2": (
        {"B": 2, "layers": 32, "heads": 2, "kv_heads": 2, "sys": 5, "vis": 32, "text": 8, **LLAMA},
        {"width": 16, "inner": 20, "sharp": 0.6},
    ),
    "aim/e2e_qwen2_28l_b3": (
        {"B": 3, "layers": 28, "heads": 4, "kv_heads": 2, "sys": 4, "vis": 30, "text": 9, **LLAMA},
        {"width": 16, "inner": 20, "sharp": 0.6, "bias": True, "decode": True},
    ),
    "flowcut/llm_stage_b4_t10_gqa_padded": (
        {
            **{"B": 4, "seq": 52, "visual_token_pos": [4, 9, 6, 0], "visual_token_num": [36, 8, 27, 0], "target": 10},
            **{"prune_layer": 1, "heads": 4, "kv_heads": 2, "layers": 4, "act": "silu", **LLAMA},
        },
        {"width": 32, "inner": 40, "sharp": 1.6},
    ),
    "flowcut/llm_stage_b2_all_short": (
        {
            **{"B": 2, "seq": 30, "visual_token_pos": [3, 3], "visual_token_num": [16, 12], "target": 16},
            **{"prune_layer": 1, "heads": 2, "kv_heads": 2, "layers": 3, "act": "silu", **LLAMA},
        },
        {"width": 16, "inner": 24, "sharp": 1.6},
    ),
}
NOTES = {
    "aim": "All samples have the same layout. importance, mask_after (layers, B, S); n_keep: of sample 0.",
    "flowcut": "Rows beyond lens are zero right-padding that nothing hides; compare only the valid rows of last_hidden.",
}


def record(name: str) -> None:
    """Write one file: the first seed whose cuts are clear."""
    params, shape = FILES[name]
    method = name.split("/")[0]
    length = params.get("seq") or params["sys"] + params["vis"] + params["text"]
    for seed in range(1000):
        inputs = drawn(seed, params, length=length, **shape)
        outputs, gap = TRANSCRIPTIONS[method]({k: t.double() for k, t in inputs.items()}, params)
        if gap > GAP:
            break
    else:
        raise RuntimeError(f"{name}: no seed with clear cuts")
    meta = {
        "method": method,
        "case": name.split("/")[1],
        "source": "tests/transcribed.py: a transcription of the specification, not the release",
        "params": json.dumps({**params, "seed": seed, "gap": gap}),
        "notes": NOTES[method],
    }
    tensors = {f"in.{k}": t for k, t in inputs.items()}
    tensors |= {f"out.{k}": (t.float() if t.is_floating_point() else t).contiguous() for k, t in outputs.items()}
    path = FOLDER / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, meta)
    print(name, "seed", seed, "gap", gap)


if __name__ == "__main__":
    for one in FILES:
        record(one)
