"""Golden files of FlowCut, run through the reducer's own functions and, where a model is involved, through the patched model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from golden_cases import Rows, plain_norms
from models import set_attention
from torch import Tensor, nn

from vtc.core import EncoderState, Facts, Layout, Schedule, Selection, Stage
from vtc.engine.patch import Handle, bind
from vtc.engine.tower import slots_of
from vtc.families import family_of
from vtc.families.base import Family, VisionCall
from vtc.reducers import flowcut
from vtc.signals import AttentionTap

Tensors = dict[str, Tensor]
IMAGE = 7


def run(inputs: Tensors, params: dict[str, Any], case: str) -> Tensors:
    """Return every output of one golden file, by name without the ``out.`` prefix."""
    inputs = {k.removeprefix("in."): v for k, v in inputs.items()}
    with torch.no_grad():
        if "feature" in inputs:
            return anyres_layout(inputs, params)
        if "rotary" in inputs:
            return qwen_vision(inputs, params)
        if "position_ids" in inputs:
            return qwen_text(inputs, params)
        if "prev_cumulative" in inputs:
            return criterion(inputs, params)
        if "calls" in params:
            return layer_steps(inputs, params)
        if "target_num" in params:
            return encoder(inputs, params)
        if "visual_token_pos" in params:
            return text(inputs, params)
    raise KeyError(
        f"'{case}' is a FlowCut case this runner does not know: inputs {sorted(inputs)[:5]}, params {sorted(params)}"
    )


# ------------------------------------------------------------------------------------------------------------ functions
def criterion(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    attention = inputs["cls_attn"]
    score = flowcut.token_score(attention, inputs["semantic_attn"], inputs["value"])

    def numbers(a: Tensor) -> Tensor:
        views = len(a)
        target = torch.full((views,), params["target"])
        group = torch.zeros(views, dtype=torch.long)
        valid = torch.ones_like(a, dtype=torch.bool)
        return torch.stack([flowcut.drop_count(a, valid, target, int(r), group)[0] for r in inputs["rpl"]])

    return {
        "score": score,
        "cumulative": flowcut.accumulate(inputs["prev_cumulative"], score),
        "prune_num_batch": numbers(attention),
        "prune_num_first": numbers(attention[:1]),
    }


def layer_steps(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    out: Tensors = {}
    for c, (target, remaining, history) in enumerate(params["calls"]):
        part = flowcut.FlowCutEncoder(keep=target - 1, last_layer=remaining, official=True)
        attention = inputs["attn_cls"].mean(1)[:, 1:]
        views, n = attention.shape
        state = EncoderState(
            layer=0,
            taps={"cls_attn": attention, "cls_value_affinity": inputs["semantic"][:, 1:], "values": inputs["value"][:, 1:]},
            valid=torch.ones(views, n, dtype=torch.bool),
            image=torch.arange(views),
            carry={"cum": inputs["cumulative"]} if history else {},
            target=torch.full((views,), target - 1),
        )
        carry, alive = part.step(state)
        alive = state.valid if alive is None else alive
        stay = torch.cat([torch.ones_like(alive[:, :1]), alive], 1)
        out[f"hidden{c}"] = torch.stack([h[s] for h, s in zip(inputs["hidden"], stay, strict=True)])
        out[f"keep{c}"] = torch.stack([i[a] for i, a in zip(inputs["keep_in"], alive, strict=True)])
        out[f"cumulative{c}"] = torch.stack([s[a] for s, a in zip(carry["cum"], alive, strict=True)])
    return out


def anyres_layout(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    rows, cols, side = params["num_patch_height"], params["num_patch_width"], params["crop_side"]
    keep, features = inputs["keep"], inputs["feature"]
    layout = flowcut.crop_layout((rows, cols), tuple(params["original_size_wh"]), side)
    views, k = keep.shape
    alive = (torch.arange(views)[:, None] * side**2 + keep).flatten()
    mask = torch.zeros(rows * side, cols * side, dtype=torch.long)
    mask[layout.y[alive], layout.x[alive]] = 1
    inside = alive[layout.slot[alive] >= 0]
    unpadded = torch.zeros_like(mask)
    unpadded[layout.y[inside], layout.x[inside]] = 1
    place = torch.full((len(layout),), -1)  # slot -> kept token
    place[layout.slot[inside]] = (layout.slot[alive] >= 0).nonzero()[:, 0]
    order = place[slots_of([(layout, alive)])[0]]  # as the engine orders what leaves the encoder
    return {"mask": mask, "mask_unpad": unpadded, "order": order, "selected": features.flatten(0, 1)[order]}


# ---------------------------------------------------------------------------------------------------- patched models
@dataclass(frozen=True, kw_only=True)
class RecordingEncoder(flowcut.FlowCutEncoder):
    """The product's encoder stage, with a list of what it did."""

    log: list[tuple[int, Tensor, Tensor]] = field(default_factory=list, compare=False)

    def step(self, state: EncoderState) -> tuple[Tensors, Tensor | None]:
        carry, alive = super().step(state)
        self.log.append((state.layer, carry["cum"], alive))
        return carry, alive


@dataclass(frozen=True, kw_only=True)
class RecordingDecoder(flowcut.FlowCutDecoder):
    """The product's language-model stage, with a list of what it kept."""

    log: list[Tensor] = field(default_factory=list, compare=False)

    def select(self, signals: Any) -> Selection:
        chosen = super().select(signals)
        self.log.append(chosen.index)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Only(Schedule):
    """One part as a schedule."""

    part: Any = None

    def parts(self) -> tuple[Any, ...]:
        return (self.part,)


def weights_of(inputs: Tensors) -> Tensors:
    return {k.removeprefix("w."): v for k, v in inputs.items() if k.startswith("w.")}


def encoder(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """A CLIP tower with the file's weights inside a patched LLaVA; only its embeddings are replaced by the file's."""
    layers, dim, target = params["layers"], params["dim"], params["target_num"]
    grid = params["grid"]
    vision = transformers.CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=inputs["w.0.mlp.fc1.bias"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=params["heads"],
        image_size=4 * grid,
        patch_size=4,
        layer_norm_eps=params["eps"],
        hidden_act=params["act"],
    )
    words = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    config = transformers.LlavaConfig(text_config=words, vision_config=vision, image_token_id=IMAGE, vision_feature_layer=-2)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    set_attention(model, "sdpa")
    family = family_of(model)
    tower = family.encoder_layers
    tower.load_state_dict(weights_of(inputs))
    part = RecordingEncoder(keep=target, last_layer=family.facts.feature_layer - 1, official=True)
    handle = Handle(model, family, bind(part, family.facts), strict=True)
    norm = next(m for n, m in family.tower.named_modules() if n.endswith("pre_layrnorm"))
    seen: dict[str, Any] = {"lens": []}
    stubs = [norm.register_forward_hook(lambda _m, _a, _o: inputs["embeds"])]
    handle.install(model)
    stubs += [layer.register_forward_pre_hook(_length(seen["lens"]), with_kwargs=True) for layer in tower]
    stubs += [tower[-1].register_forward_hook(lambda _m, _a, o: seen.update(last=o[0] if isinstance(o, tuple) else o))]
    stubs += [family.projector.register_forward_pre_hook(lambda _m, a: seen.update(feature=a[0]))]
    records: list[Any] = []
    handle.tower.on_record = records.append
    views = len(inputs["embeds"])
    pixels = torch.zeros(views, 3, 4 * grid, 4 * grid)
    try:
        family.base.get_image_features(pixel_values=pixels, vision_feature_layer=-2, vision_feature_select_strategy="default")
    finally:
        for stub in stubs:
            stub.remove()
        handle.remove()
    out: Tensors = {
        "lens": torch.tensor([*seen["lens"][1:], seen["last"].shape[1]]),
        "feature": seen["feature"],
        "last_hidden": seen["last"],
        "keep": torch.stack(records[0].entries),
    }
    ids = torch.arange(grid * grid).expand(views, -1)
    for layer, cum, alive in part.log:
        if alive is not None:
            ids = torch.stack([i[a] for i, a in zip(ids, alive, strict=True)])
            cum = torch.stack([c[a] for c, a in zip(cum, alive, strict=True)])
            out[f"keep.{layer}"] = ids
        out[f"cumulative.{layer}"] = cum
    return out


def _length(into: list[int]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    return hook


class Base(nn.Module):
    """The least a multimodal model is: features in the places of the image tokens, then the text model."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def get_image_features(self, pixel_values: list[Tensor]) -> list[Tensor]:
        return list(pixel_values)

    def forward(self, input_ids: Tensor, inputs_embeds: Tensor, pixel_values: list[Tensor], **_: Any) -> Any:
        features = torch.cat(self.get_image_features(pixel_values))
        embeds = inputs_embeds.masked_scatter((input_ids == IMAGE)[..., None], features)
        return self.language_model(inputs_embeds=embeds)


def text(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """A LLaMA with the file's weights, patched; the survivors' hidden states as its layers see them."""
    embeds, target, cut = inputs["embeds"], params["target"], params["prune_layer"] + 1
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=embeds.shape[-1],
        intermediate_size=inputs["w.0.mlp.up_proj.weight"].shape[0],
        num_hidden_layers=params["layers"],
        num_attention_heads=params["heads"],
        num_key_value_heads=params["kv_heads"],
        max_position_embeddings=4 * embeds.shape[1],
        rms_norm_eps=params["rms_eps"],
        hidden_act=params["act"],
        rope_theta=params["rope_theta"],
    )
    config._attn_implementation = "sdpa"
    llama = plain_norms(transformers.LlamaModel(config).eval())
    named = {(k if k.startswith("norm.") else f"layers.{k}"): v for k, v in weights_of(inputs).items()}
    missing, unexpected = llama.load_state_dict(named, strict=False)
    assert not unexpected and missing == ["embed_tokens.weight"], (missing, unexpected)
    spans = list(zip(params["visual_token_pos"], params["visual_token_num"], strict=True))
    images = [(row, start, n) for row, (start, n) in enumerate(spans) if n > 0]
    layouts = [Layout.flat(n) for _, _, n in images]
    model = Base(llama)
    empty = nn.ModuleList()
    facts = Facts(
        family="golden",
        layers=params["layers"],
        encoder_layers=0,
        feature_layer=0,
        tokens=None,
        max_tokens=None,
        grid=(1, 1),
        has_cls=True,
        provides=frozenset({"attention"}),
        stages=dict.fromkeys(Stage, ""),
        anyres=True,
    )
    family = Family(
        name="golden",
        base=model,
        text=llama,
        layers=llama.layers,
        text_attention=[layer.self_attn for layer in llama.layers],
        tower=nn.Identity(),
        encoder_layers=empty,
        encoder_attention=[],
        projector=nn.Identity(),
        image_token_ids=(IMAGE,),
        facts=facts,
        describe=lambda call: VisionCall([1] * len(images), layouts, layouts, torch.zeros(len(images), 1)),
    )
    ids = torch.ones(embeds.shape[:2], dtype=torch.long)
    for row, start, n in images:
        ids[row, start : start + n] = IMAGE
    part = RecordingDecoder(keep=target, at=cut)
    handle = Handle(model, family, bind(part, facts), strict=True)
    handle.install(model)
    seen: dict[str, Tensor] = {}
    stubs = [
        llama.layers[cut].register_forward_pre_hook(
            lambda _m, a, k: seen.update(hidden2=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
        llama.norm.register_forward_hook(lambda _m, _a, o: seen.update(last_hidden=o)),
        llama.rotary_emb.register_forward_pre_hook(
            lambda _m, a, k: seen.update(positions=a[1] if len(a) > 1 else k["position_ids"]), with_kwargs=True
        ),
    ]
    try:
        features = [embeds[row, start : start + n] for row, start, n in images]
        model(input_ids=ids, inputs_embeds=torch.where((ids == IMAGE)[..., None], 0.0, embeds), pixel_values=features)
    finally:
        for stub in stubs:
            stub.remove()
        handle.remove()
    lens = torch.tensor([embeds.shape[1] - max(0, n - target) for _, n in spans])
    left = {k: _to_the_left(v.expand(len(spans), *v.shape[1:]), lens) for k, v in seen.items()}
    real = torch.arange(left["last_hidden"].shape[1]) < lens[:, None]  # what the release computes on padding is not compared
    return {
        "keep": torch.cat(part.log) if part.log else torch.zeros(0, target, dtype=torch.long),
        "hidden2": left["hidden2"],
        "last_hidden": Rows(left["last_hidden"], real),
        "position_ids_after": left["positions"],
        "lens": lens,
    }


def _to_the_left(rows: Tensor, lens: Tensor) -> Tensor:
    """The engine pads on the left, the files on the right with zeros."""
    out = torch.zeros_like(rows)
    for row, n in enumerate(lens.tolist()):
        out[row, :n] = rows[row, rows.shape[1] - n :]
    return out


# ----------------------------------------------------------------------- Qwen2-VL: no adapter yet, blocks written out here
def _halves(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = t.chunk(2, -1)
    return t * cos + torch.cat([-b, a], -1) * sin


def qwen_vision(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    w, heads, depth = weights_of(inputs), params["heads"], params["depth"]
    x, rotary = inputs["embeds"], inputs["rotary"]
    dim, merge = x.shape[-1], params["spatial_merge"] ** 2
    part = flowcut.FlowCutEncoder(keep=params["target_num"], last_layer=depth - 1, has_cls=False)
    target = torch.tensor([flowcut.encoder_target(params["target_num"], merge=merge)])
    out: Tensors = {}
    ids, carry, lens = torch.arange(len(x)), {}, []

    def linear(t: Tensor, name: str) -> Tensor:
        return F.linear(t, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(t: Tensor, name: str) -> Tensor:
        return F.layer_norm(t, (t.shape[-1],), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    cuts = 0
    for i in range(depth):
        lens.append(len(x))
        q, k, v = linear(norm(x, f"{i}.norm1"), f"{i}.attn.qkv").view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        table = torch.cat([rotary, rotary], -1)
        q, k = (_halves(t, table.cos(), table.sin()) for t in (q, k))
        scale = q.shape[-1] ** -0.5
        attended = torch.softmax(q @ k.transpose(1, 2) * scale, -1) @ v
        x = x + linear(attended.transpose(0, 1).reshape(len(x), dim), f"{i}.attn.proj")
        y = linear(norm(x, f"{i}.norm2"), f"{i}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{i}.mlp.fc2")
        tap = AttentionTap(q[None], k[None], v[None], scale)
        taps = {need.name: need.measure(tap) for need in part.encoder_needs(i)}
        valid = torch.ones(1, len(x), dtype=torch.bool)
        carry, alive = part.step(EncoderState(i, taps, valid, torch.zeros(1, dtype=torch.long), carry, target))
        if alive is not None:
            x, ids, rotary = x[alive[0]], ids[alive[0]], rotary[alive[0]]
            carry = {name: t[:, alive[0]] for name, t in carry.items()}
            out[f"keep.{cuts}"] = ids
            cuts += 1
    x = norm(x, "merger.ln_q").view(-1, merge * dim)
    out["merged"] = linear(F.gelu(linear(x, "merger.mlp.0")), "merger.mlp.2")
    out["lens"] = torch.tensor(lens)
    return out


def qwen_text(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    w, heads, kv = weights_of(inputs), params["heads"], params["kv_heads"]
    x, positions = inputs["embeds"][0], inputs["position_ids"][:, 0]
    d = x.shape[-1] // heads
    start, n, eps = params["visual_token_pos"], params["visual_token_num"], params["rms_eps"]
    part = flowcut.FlowCutDecoder(keep=params["target"], at=params["prune_layer"] + 1, positions="original")
    frequency = params["rope_theta"] ** (-torch.arange(0, d, 2).float() / d)
    section = torch.repeat_interleave(torch.arange(3), torch.tensor(params["mrope_section"]))

    def norm(t: Tensor, name: str) -> Tensor:
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    def project(t: Tensor, name: str) -> Tensor:
        return F.linear(t, w[f"{name}.weight"], w.get(f"{name}.bias")).view(len(t), -1, d).transpose(0, 1)

    out: Tensors = {}
    taps: Tensors = {}
    for i in range(params["layers"]):
        if i == part.layer and n > params["target"]:
            entries = torch.arange(n)[None]
            signals = SimpleNamespace(budget=params["target"], **{k: t[:, start : start + n] for k, t in taps.items()})
            chosen = part.select(signals).index[0]
            assert torch.equal(entries[0][chosen], chosen)
            stay = torch.cat([torch.arange(start), start + chosen, torch.arange(start + n, len(x))])
            x, positions = x[stay], positions[:, stay]
            out["keep"] = chosen
        if i == part.layer:
            out["hidden2"] = x[None]
        angle = positions.float()[section].T * frequency  # (seq, d/2): each frequency follows its own coordinate
        angle = torch.cat([angle, angle], -1)
        y = norm(x, f"{i}.input_layernorm")
        q, k, v = (project(y, f"{i}.self_attn.{name}_proj") for name in "qkv")
        q, k = (_halves(t, angle.cos(), angle.sin()) for t in (q, k))
        tap = AttentionTap(q[None], k[None], v[None], 1 / math.sqrt(d), causal=True, last=torch.tensor([len(x) - 1]))
        taps = {need.name: need.measure(tap) for need in part.needs if need.layer == i} or taps
        k, v = k.repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        attended = torch.softmax((q @ k.transpose(1, 2) / math.sqrt(d)).masked_fill(future, -torch.inf), -1) @ v
        x = x + F.linear(attended.transpose(0, 1).reshape(len(x), -1), w[f"{i}.self_attn.o_proj.weight"])
        y = norm(x, f"{i}.post_attention_layernorm")
        y = F.silu(F.linear(y, w[f"{i}.mlp.gate_proj.weight"])) * F.linear(y, w[f"{i}.mlp.up_proj.weight"])
        x = x + F.linear(y, w[f"{i}.mlp.down_proj.weight"])
    out["last_hidden"] = norm(x, "norm")[None]
    return out
