"""Golden files of the methods that act inside the language model: ``CASES`` as in :mod:`golden_cases`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import transformers
from golden_cases import plain_norms
from torch import Tensor, nn

import vtc
from vtc.core import Facts, Layout, Reducer, Schedule, Signals, Stage
from vtc.engine import taps
from vtc.engine.patch import Handle, bind
from vtc.engine.undo import Undo
from vtc.families.base import Family, VisionCall
from vtc.kernels import transition_score
from vtc.reducers import aim as aim_module
from vtc.reducers import corematching as corematching_module
from vtc.reducers import sparsevlm as sparsevlm_module
from vtc.reducers.transprune import TransPruneStage, combine, transitions
from vtc.signals import AttentionTap, StateTap, next_question_attn

Tensors = dict[str, Tensor]
Run = Callable[[Tensors, dict[str, Any], str], Tensors]


def signals_of(features: Tensor, budget: int, *, slots: int | None = None, **taps: Tensor) -> Signals:
    """Signals of ``B`` images whose geometry is unknown."""
    batch, n = features.shape[:2]
    entries = torch.arange(n).expand(batch, n)
    return Signals(features, Layout.flat(n), entries, budget, slots or n, taps)


def span(length: int, start: int, n: int, batch: int = 1) -> Tensor:
    """``(B, length)`` bool: the visual tokens."""
    at = torch.arange(length)
    return ((at >= start) & (at < start + n)).expand(batch, -1)


# ---------------------------------------------------------------------------------------------------------------- DART
def dart(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Measures on the recorded keys and states, then the selection."""
    key, hidden = inputs["key_states"], inputs["normed_hidden"]
    start, n, length = params["image_start"], params["N"], hidden.shape[1]
    tokens = params.get("max") or params.get("retain")
    budget = {"keep": min(tokens, params["N"] - params["pivot_image"]) if tokens else 1 - params["ratio"]}
    reducer = vtc.create(
        "dart", **budget, image_pivots=params["pivot_image"], text_pivots=params["pivot_text"], official=True, layer=2
    )
    visual, valid = span(length, start, n), torch.ones(1, length, dtype=torch.bool)
    last = torch.tensor([length - 1])
    taps: Tensors = {}
    for need in sorted(reducer.needs, key=lambda need: need.layer):
        if need.of == "attention":
            tap: Any = AttentionTap(key, key, key, 1.0, None, True, last, visual, valid)
        else:  # the recorded states are under the final norm already
            tap = StateTap(hidden, last, visual, valid, lambda t: t, given=taps)
        taps[need.name] = need.measure(tap)
    rows = {need.name for need in reducer.needs if need.axis == "row"}
    own = {k: v if k in rows else v[:, start : start + n] for k, v in taps.items()}
    wanted = reducer.count(n, FACTS)
    signals = signals_of(hidden[:, start : start + n], wanted, **own)
    image, _, where = reducer.pivots(signals)
    return {
        "image_pivots": image[0] + start,
        "text_pivots": taps["text_places"][0],
        "pivot_order": where[0],
        "retained_sorted": reducer.select(signals).index[0] + start,
    }


# --------------------------------------------------------------------------------- a text model with the file's weights
IMAGE = 7


def facts_of(layers: int) -> Facts:
    """Numbers of a model of which only the decoder exists."""
    return Facts(
        family="golden",
        layers=layers,
        encoder_layers=0,
        feature_layer=0,
        tokens=None,
        max_tokens=None,
        grid=(1, 1),
        has_cls=True,
        provides=frozenset({"attention", "cls"}),
        stages=dict.fromkeys(Stage, ""),
    )


FACTS = facts_of(32)


class Base(nn.Module):
    """The least a multimodal model is: features in the places of the image tokens, then the text model."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def get_image_features(self, pixel_values: list[Tensor]) -> list[Tensor]:
        return list(pixel_values)

    def forward(self, input_ids: Tensor, inputs_embeds: Tensor, pixel_values: Any = None, **kwargs: Any) -> Any:
        if pixel_values is not None:
            features = torch.cat(self.get_image_features(pixel_values))
            inputs_embeds = inputs_embeds.masked_scatter((input_ids == IMAGE)[..., None], features)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


def llama(weights: Tensors, *, heads: int, theta: float, eps: float, kind: str = "Llama") -> nn.Module:
    """A LLaMA (or Qwen2) with these weights, by layer (``0.self_attn...``) and ``norm.weight``."""
    layers = 1 + max(int(k.split(".")[0]) for k in weights if not k.startswith("norm."))
    width = weights["0.input_layernorm.weight"].shape[0]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=16,
        hidden_size=width,
        intermediate_size=weights["0.mlp.up_proj.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=weights["0.self_attn.k_proj.weight"].shape[0] * heads // width,
        max_position_embeddings=8192,
        rms_norm_eps=eps,
        rope_theta=theta,
    )
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{kind}Model")(config).eval()
    named = {(k if k.startswith("norm.") else f"layers.{k}"): v for k, v in weights.items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected
    assert missing == ["embed_tokens.weight"], missing
    frequency = theta ** -(torch.arange(0, width // heads, 2) / (width // heads))
    torch.testing.assert_close(model.rotary_emb.inv_freq, frequency, check_dtype=False)
    return plain_norms(model)


def ranking_model(weights: Tensors, *, heads: int, eps: float, theta: float, width: int) -> nn.Module:
    """Two layers: one that changes nothing, and the one whose norm and projections the file brings (the rest is random)."""
    full: Tensors = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            full[f"{layer}.self_attn.{name}.weight"] = torch.randn(width, width, generator=generator)
        for name, shape in (("gate_proj", (8, width)), ("up_proj", (8, width)), ("down_proj", (width, 8))):
            full[f"{layer}.mlp.{name}.weight"] = torch.randn(shape, generator=generator)
        for name in ("input_layernorm", "post_attention_layernorm"):
            full[f"{layer}.{name}.weight"] = torch.ones(width)
    full["norm.weight"] = torch.ones(width)
    full["0.self_attn.o_proj.weight"].zero_()
    full["0.mlp.down_proj.weight"].zero_()
    full |= {f"1.{name}": t for name, t in weights.items() if f"1.{name}" in full and "mlp" not in name}
    narrow = full["1.self_attn.k_proj.weight"].shape[0]  # fewer key heads than query heads
    for name in ("0.self_attn.k_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"):
        full[f"{name}.weight"] = full[f"{name}.weight"][:narrow]
    return llama(full, heads=heads, theta=theta, eps=eps)


class Patched:
    """A patched text model, and what its layers really get: ``hidden[i]``, ``positions[i]`` of the last forward."""

    def __init__(self, text: nn.Module, spans: list[tuple[int, int]], reducer: Reducer) -> None:
        self.text = text
        self.spans = [(row, start, n) for row, (start, n) in enumerate(spans) if start >= 0]  # -1: a row without image
        layouts = [Layout.flat(n) for _, _, n in self.spans]
        facts = facts_of(len(text.layers))
        self.base = Base(text)
        family = Family(
            name="golden",
            base=self.base,
            text=text,
            layers=text.layers,
            text_attention=[layer.self_attn for layer in text.layers],
            tower=nn.Identity(),
            encoder_layers=nn.ModuleList(),
            encoder_attention=[],
            projector=nn.Identity(),
            image_token_ids=(IMAGE,),
            facts=facts,
            describe=lambda call: VisionCall([1] * len(layouts), layouts, layouts, torch.zeros(len(layouts), 1)),
        )
        self.handle = Handle(self.base, family, bind(reducer, facts), strict=True)
        self.handle.install(self.base)
        self.hidden: dict[int, Tensor] = {}
        self.positions: dict[int, Tensor] = {}
        self.context: Any = None
        for i, layer in enumerate(text.layers):
            layer.register_forward_pre_hook(self.watch(i), with_kwargs=True)
        text.register_forward_hook(self.leave, with_kwargs=True)

    def watch(self, i: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.hidden[i] = args[0] if args else kwargs["hidden_states"]
            cos, sin = kwargs["position_embeddings"]
            table = self.text.rotary_emb(self.hidden[i], torch.arange(4096)[None])
            same = (cos[:, :, None] == table[0][:, None]).all(-1) & (sin[:, :, None] == table[1][:, None]).all(-1)
            assert bool((same.sum(-1) == 1).all()), "a rotation that is no whole position"
            self.positions[i] = same.int().argmax(-1).expand(self.hidden[i].shape[:2])

        return hook

    def leave(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], _out: Any) -> None:
        self.context = kwargs.get("_vtc") or self.context

    def prefill(self, embeds: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        ids = torch.ones(embeds.shape[:2], dtype=torch.long)
        for row, start, n in self.spans:
            ids[row, start : start + n] = IMAGE
        features = [embeds[row, start : start + n] for row, start, n in self.spans]
        blank = torch.where((ids == IMAGE)[..., None], 0.0, embeds)
        with torch.no_grad():
            return self.base(input_ids=ids, inputs_embeds=blank, pixel_values=features, attention_mask=mask, **kwargs)

    def left(self, i: int, rows: Tensor) -> Tensor:
        """``rows (B, P, ...)`` of layer ``i`` with padding on the right, zeroed, as the files have it."""
        seg = self.context.keep[i][0]
        out = torch.zeros_like(rows)
        for b in range(len(rows)):
            real = rows[b] if seg is None or seg.valid is None else rows[b, seg.valid[b]]
            out[b, : len(real)] = real
        return out

    def kept(self, i: int) -> Tensor:
        """Logical columns layer ``i`` holds (one row)."""
        seg = self.context.keep[i][0]
        return torch.arange(self.context.q) if seg is None else seg.rows[0]


# --------------------------------------------------------------------------------------------------------- PyramidDrop
def pyramiddrop(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """The whole engine on the file's decoder; for a single step, on a decoder whose first layer changes nothing."""
    if "inputs_embeds" in inputs:
        weights = {k.removeprefix("layers."): v for k, v in inputs.items() if k != "inputs_embeds"}
        text = llama(weights, heads=params["heads"], theta=params["rope_base"], eps=params["rms_eps"])
        ratios, cuts = tuple(params["ratio_list"]), tuple(params["layer_list"])
        reducer = vtc.create("pyramiddrop", keep=ratios[-1], ratios=ratios, layers=cuts)
        model = Patched(text, [(params["sys_len"], params["n_image"])], reducer)
        out = model.prefill(inputs["inputs_embeds"])
        last = len(text.layers) - 1
        return {
            **{f"hidden_into_layer{cut}": model.hidden[cut] for cut in cuts},
            "last_hidden_state": out.last_hidden_state[:, model.kept(last)],
            "length_per_layer": torch.tensor([model.hidden[i].shape[1] for i in range(last + 1)]),
        }
    stage, ratios, full = params["stage"], tuple(params["ratios"]), params["image_tokens_full"]
    schedule = vtc.create("pyramiddrop", keep=ratios[-1], ratios=ratios[1:], layers=tuple(range(1, len(ratios))))
    counts = [part.count(full, FACTS) for part in schedule.bind(FACTS).parts()]
    current = full if stage == 0 else counts[stage - 1]
    hidden, mask = inputs["hidden_states"], inputs["attention_mask"]
    weights = {k.removeprefix("next_layer."): v for k, v in inputs.items() if k.startswith("next_layer.")}
    text = ranking_model(weights, heads=params["heads"], eps=1e-6, theta=1e4, width=hidden.shape[2])
    reducer = vtc.create("pyramiddrop", keep=counts[stage], ratios=(0.5,), layers=(1,))
    model = Patched(text, [(start, current) for start in params["image_start"]], reducer)
    model.prefill(hidden, mask, position_ids=inputs["position_ids"])
    gone = current - counts[stage]
    lengths = [int(m.sum()) - gone * (start >= 0) for m, start in zip(mask, params["image_start"], strict=True)]
    padded = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {
        "hidden_states": model.left(1, model.hidden[1]),
        "position_ids": model.left(1, model.positions[1]),
        "attention_mask": padded,
    }


# ---------------------------------------------------------------------------------------------------------- TransPrune
@dataclass(frozen=True, kw_only=True)
class Given(TransPruneStage):
    """The product's cut; transitions of layers before the file's come from the file, and what it decides is noted."""

    rows: Tensor | None = None
    log: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> Any:
        return super().needs if self.rows is None else (next_question_attn(self.layer),)

    def score(self, signals: Signals) -> Tensor:
        if self.rows is None:
            score = super().score(signals)
        else:
            score = combine(self.rows[:, None], signals.next_question_attn)
        self.log.append((score, signals.entries))
        return score


@dataclass(frozen=True, kw_only=True)
class Several(Schedule):
    """Given parts as a schedule."""

    given: tuple[Reducer, ...] = ()

    def parts(self) -> tuple[Reducer, ...]:
        return self.given


def transprune(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """The measure, one cut, or the whole engine with a decode step, by what the file brings."""
    if "before" in inputs:
        return {"weight": transition_score(inputs["before"], inputs["after"], shared=True)}
    weights = {k.removeprefix("w."): v for k, v in inputs.items() if k.startswith("w.")}
    start, n = params["image_pos"], params["image_tokens"]
    if "features" in inputs:
        return transprune_step(inputs, weights, params)
    text = llama(weights, heads=params["heads"], theta=params["rope_theta"], eps=params["rms_eps"])
    ratios = tuple(params["ratios"])
    schedule = vtc.create(
        "transprune",
        keep=ratios[-1],
        ratios=ratios,
        layers=tuple(params["prune"]),
        watch=tuple(number - 1 for number in params["acc"]),
    )
    bound = schedule.bind(facts_of(len(text.layers)))
    parts = tuple(Given(**{f.name: getattr(p, f.name) for f in fields(p)}) for p in bound.parts())
    model = Patched(text, [(start, n)], Several(keep=1.0, given=parts))
    cache = transformers.DynamicCache()
    out = model.prefill(inputs["embeds"], past_key_values=cache, use_cache=True)
    layers, length = range(len(text.layers)), inputs["embeds"].shape[1]
    held = torch.tensor([layer.keys.shape[2] for layer in cache.layers])
    result = {
        "last_hidden": out.last_hidden_state[:, model.kept(layers[-1])],
        "lens": torch.tensor([*(model.hidden[i].shape[1] for i in layers), len(model.kept(layers[-1]))]),
        "cache_lens": held,
    }
    context = model.context
    for number in params["acc"]:
        pair = [context.tapped[need.key][0][0] for need in transitions(number - 1)]
        result[f"ttv.{number}"] = pair[0] + pair[1]
    for i, part in enumerate(parts):
        ((score, entries),) = part.log
        result[f"score.{i}"] = score[0]
        result[f"keep.{i}"] = model.kept(part.layer)[start : start + part.count(n, facts_of(len(text.layers)))] - start
        assert torch.equal(entries[0] + start, model.kept(part.layer - 1)[start : start + len(entries[0])])
    with torch.no_grad():
        after = model.base(
            input_ids=torch.ones(1, 1, dtype=torch.long), inputs_embeds=inputs["decode_embed"], past_key_values=cache
        )
    result["decode_hidden"] = after.last_hidden_state
    result["decode_pos"] = torch.cat([model.positions[i][0] for i in layers])
    assert cache.get_seq_length() == length + 1
    return result


def transprune_step(inputs: Tensors, weights: Tensors, params: dict[str, Any]) -> Tensors:
    """One cut in a model whose first layer changes nothing."""
    stage, ratios, start = params["stage"], tuple(params["ratios"][1:]), params["image_pos"]
    features, rows = inputs["features"], inputs["ttv"]
    facts = facts_of(len(ratios) + 1)
    schedule = vtc.create("transprune", keep=ratios[-1], ratios=ratios, layers=tuple(range(1, len(ratios) + 1)))
    counts = [part.count(params["image_tokens"], facts) for part in schedule.bind(facts).parts()]
    current = params["image_tokens"] if stage == 0 else counts[stage - 1]
    text = ranking_model(
        {k.removeprefix(f"{params['rank_layer']}."): v for k, v in weights.items()},
        heads=params["heads"],
        eps=params["rms_eps"],
        theta=params["rope_theta"],
        width=features.shape[2],
    )
    part = Given(
        keep=counts[stage],
        cuts=(1,),
        ratios=(0.5,),
        watched=(0,),
        stage_index=0,
        rows=rows[:, start : start + current],
    )
    model = Patched(text, [(start, current)], Several(keep=1.0, given=(part,)))
    model.prefill(features)
    held = model.kept(1)
    return {
        "score": part.log[0][0][0],
        "keep": held[(held >= start) & (held < start + current)] - start,
        "features": model.hidden[1],
        "position_ids": model.positions[1],
        "ttv_after": rows[:, held],
    }


# ----------------------------------------------------------------------------------------------------------- SparseVLM
@dataclass(frozen=True, kw_only=True)
class RecordedNoise(sparsevlm_module.SparseVLMStage):
    """The product's cut with the noise of the file."""

    recorded: Tensor | None = None

    def noise(self, signals: Signals, image: int, n: int) -> Tensor | None:
        return self.recorded


def sparsevlm(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Clustering alone; or raters, scores and selection of every stage on the recorded attention and states."""
    if "tokens" in inputs:
        tokens, clusters = inputs["tokens"], params["clusters"]
        noise = inputs["density_noise"]
        return {"merged": torch.stack([_clustered(t, clusters, n) for t, n in zip(tokens, noise, strict=True)])}
    embeds, start, n = inputs["inputs_embeds"], params["sys_len"], params["N"]
    length = embeds.shape[1]
    visual, valid = span(length, start, n), torch.ones(1, length, dtype=torch.bool)
    chosen = sparsevlm_module.raters(StateTap(embeds, torch.tensor([length - 1]), visual, valid, lambda t: t))
    raters = chosen[0, start + n :].nonzero()[:, 0]
    version = params["version"].split("_")[0]
    schedule = vtc.create(
        "sparsevlm",
        keep=params["retain"],
        version=version,
        layers=tuple(p + 1 for p in params["pruning_layers"]),
        official=True,
    )
    text = llama_rope(params["head_dim"])
    places, current = torch.arange(length), n
    out: Tensors = {"rater_text_index": raters}
    for i, part in enumerate(schedule.bind(FACTS).parts()):
        hidden, attention = inputs[f"stage{i}.hidden_states"], inputs[f"stage{i}.text_to_visual_attn"][None]
        weight = torch.ones(1, len(raters))
        rows = attention[:, :, raters]
        if version == "2":
            vectors = sparsevlm_module.rope_prior(text(hidden, places[None]))[0]
            rows = rows / (vectors[start + current + raters] @ vectors[start : start + current].T)
            score = sparsevlm_module.rate(rows, weight, part.heads)
        else:
            score = sparsevlm_module.rate(rows, weight)
        if part.merges:
            own = {f.name: getattr(part, f.name) for f in fields(part)}
            part = RecordedNoise(**own, recorded=inputs[f"stage{i}.density_noise"][0])
        total = part.count(n, FACTS)
        selection = part.select(signals_of(hidden[:, start : start + current], total, rater_attention=score))
        kept = selection.index[0]
        features = hidden[:, start + kept] if selection.features is None else selection.features
        out[f"stage{i}.hidden_states"] = torch.cat([hidden[:, :start], features, hidden[:, start + current :]], 1)
        stay = torch.cat([torch.arange(start), start + kept, torch.arange(start + current, hidden.shape[1])])
        places = torch.arange(len(stay)) if part.position_policy == "compact" else places[stay]
        out[f"stage{i}.position_ids"] = places[None]
        out["last_hidden_state"] = out[f"stage{i}.hidden_states"]
        current = total
    return out


def _clustered(tokens: Tensor, clusters: int, noise: Tensor) -> Tensor:
    return sparsevlm_module.merge(tokens, sparsevlm_module.density_peaks(tokens, clusters, noise)[1], clusters)


def llama_rope(width: int) -> nn.Module:
    """Hugging Face's rotations for heads of this width."""
    config = transformers.LlamaConfig(hidden_size=width, num_attention_heads=1, num_key_value_heads=1, rope_theta=10000.0)
    return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)


# ------------------------------------------------------------------------------------------------------------------ AIM
def aim(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Merging, the importance, or the whole schedule on the file's decoder, by what the file brings."""
    if "x" in inputs:
        return aim_merging(inputs, params)
    if "logits" in inputs:
        return {"importance": aim_importance(inputs["logits"], inputs["masked_keys"], params)}
    # a stock model hides the same columns from every row it is given, and what a row hides is its own affair: one at a time
    each = {name for name in inputs if not name.startswith("w.")}
    alone = [
        aim_decoder({name: t[b : b + 1] if name in each else t for name, t in inputs.items()}, params)
        for b in range(len(inputs["embeds"]))
    ]
    layered = {"importance", "mask_after"}
    return {
        name: first if name == "n_keep" else torch.cat([out[name] for out in alone], int(name in layered))
        for name, first in alone[0].items()  # n_keep: of the first sample
    }


def aim_merging(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    x = inputs["x"]
    groups, n, _ = x.shape
    metric = inputs.get("metric", x)
    out: Tensors = {}
    place = torch.arange(n).expand(groups, -1)
    now = aim_module.Merged(metric, x, place, place)
    weights = aim_module.Merged(metric, torch.eye(n).expand(groups, -1, -1), place, place)
    for i, r in enumerate(params["r"]):
        now, weights = (aim_module.merge_once(m, r, official=True) for m in (now, weights))
        out[f"x{i}"] = now.tokens
    halving = aim_module.merge_to(metric, x, now.tokens.shape[1], official=True).tokens
    if params["r"][:-1] == [n >> i for i in range(1, len(params["r"]))]:  # the release's own schedules
        assert torch.equal(halving, now.tokens)
    return {**out, "assign": weights.tokens}


def aim_importance(logits: Tensor, masked: Tensor, params: dict[str, Any]) -> Tensor:
    """The measure on queries whose products with unit keys are the recorded logits."""
    assert params["d"] == 0.0
    batch, heads, n, _ = logits.shape
    unit = torch.eye(n).expand(batch, heads, n, n)
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & ~masked[:, None, None, :].bool()
    valid = torch.ones(batch, n, dtype=torch.bool)
    tap = AttentionTap(logits, unit, unit, 1.0, allowed, True, None, valid, valid)
    return aim_module.importance(tap, params["iters"], params["tau"])


def aim_decoder(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """The release hides tokens instead of dropping them: a stock model, whose layers are given masks from the product's stages."""
    weights = {k.removeprefix("w."): v for k, v in inputs.items() if k.startswith("w.")}
    kind = "Qwen2" if "0.self_attn.q_proj.bias" in weights else "Llama"
    text = llama(weights, heads=params["heads"], theta=params["rope_theta"], eps=params["rms_eps"], kind=kind)
    layers, before, n, length = params["layers"], params["sys"], params["vis"], inputs["embeds"].shape[1]
    facts = replace(facts_of(layers), tokens=n)
    stages = {part.after: part for part in vtc.create("aim", keep=1.0).bind(facts).parts() if part.stage is Stage.DECODER}
    first, end = aim_module.RELEASED[layers]
    assert sorted(stages) == list(range(first, end)), "the released schedule"
    visible = torch.ones(length, dtype=torch.bool)
    scores, masks = [], []

    def observe(i: int, _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float, _ctx: Any) -> None:
        nonlocal visible
        if query.shape[2] == 1:
            return
        every = torch.ones(1, length, dtype=torch.bool)
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & visible
        score = aim_module.importance(AttentionTap(query, key, value, scaling, allowed[None, None], True, None, every, every))
        scores.append(score)
        if i in stages and bool(visible[before : before + n].any()):
            left = visible[before : before + n].nonzero()[:, 0]
            part = stages[i]
            signals = signals_of(torch.zeros(1, len(left), 1), part.count(n, facts), importance=score[:, before + left])
            visible = visible.clone()
            visible[before : before + n] = False
            visible[before + left[part.select(signals).index[0]]] = True
        masks.append(visible)

    def hide(i: int, _module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
        seen = torch.ones(length, dtype=torch.bool) if i == 0 else masks[i - 1]
        seen = torch.cat([seen, torch.ones(length_now - length, dtype=torch.bool)])
        allowed = torch.ones(length_now, length_now, dtype=torch.bool).tril()[-queries:] & seen
        return args, {**kwargs, "attention_mask": allowed[None, None]}

    undo = Undo()
    for i, layer in enumerate(text.layers):
        taps.attach(undo, layer.self_attn, functools.partial(observe, i))
    hooks = [
        layer.register_forward_pre_hook(functools.partial(hide, i), with_kwargs=True) for i, layer in enumerate(text.layers)
    ]
    cache = transformers.DynamicCache()
    length_now = length
    try:
        with torch.no_grad():
            full = text(inputs_embeds=inputs["embeds"], past_key_values=cache, use_cache=True).last_hidden_state
            length_now = length + 1
            place = torch.tensor([[length]])
            decoded = None
            if "decode_embed" in inputs:
                decoded = text(
                    inputs_embeds=inputs["decode_embed"], past_key_values=cache, position_ids=place
                ).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
        undo.run()
    out = {
        "importance": torch.stack(scores),
        "mask_after": torch.stack(masks)[:, None].long(),
        "n_keep": torch.stack(masks).sum(1),
        "last_hidden": full,
    }
    return out if decoded is None else {**out, "decode_hidden": decoded}


# -------------------------------------------------------------------------------------------------------- CoreMatching
def corematching(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """A stock MLP with the file's weights; measure, knee and selection on what its last projection is given."""
    hidden, key, value = inputs["hidden_states"], inputs["key"], inputs["value"]
    width, inner = hidden.shape[2], inputs["gate_weight"].shape[0]
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        hidden_act=params["activation"],
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    mlp = transformers.models.llama.modeling_llama.LlamaMLP(config)
    mlp.load_state_dict({f"{name}_proj.weight": inputs[f"{name}_weight"] for name in ("gate", "up", "down")})
    start, n, length = params["image_start"], params["num_image_tokens"], hidden.shape[1]
    visual, valid = span(length, start, n), torch.ones(1, length, dtype=torch.bool)
    reducer = vtc.create("corematching", keep=1.0, layer=params["layer_idx"] + 1, reference=params["reference_position"])
    (need,) = reducer.needs
    seen: Tensors = {}

    def observe(_module: nn.Module, args: Any) -> None:
        seen["overlap"] = need.measure(StateTap(args[0], torch.tensor([length - 1]), visual, valid, lambda t: t))

    hook = mlp.down_proj.register_forward_pre_hook(observe)
    with torch.no_grad():
        out: Tensors = {"mlp": mlp(hidden), "key": key, "value": value}
    hook.remove()
    if params["layers_cached_including_this"] - 1 not in corematching_module.RELEASED:
        return out
    overlap = seen["overlap"][:, start : start + n]
    index = reducer.select(signals_of(hidden[:, start : start + n], n, overlap=overlap)).index[0]
    place, height = corematching_module.knee(overlap)
    gone = torch.ones(length, dtype=torch.bool)
    gone[:start] = gone[start + n :] = gone[start + index] = False
    zero = gone[None, None, :, None]  # the release blanks the cache where the product drops
    return {
        **out,
        "overlap": overlap[0],
        "elbow_index": place,
        "elbow_value": height,
        "core_indices": index,
        "key": key.masked_fill(zero, 0.0),
        "value": value.masked_fill(zero, 0.0),
    }


CASES: dict[str, Run] = {
    "dart": dart,
    "pyramiddrop": pyramiddrop,
    "transprune": transprune,
    "sparsevlm": sparsevlm,
    "aim": aim,
    "corematching": corematching,
}
