"""How each method's golden files are run: through the code that runs in the patched model.

``CASES`` maps a method to ``run(inputs, params, case) -> outputs``. ``inputs`` and ``outputs`` are the tensors named ``in.*`` and
``out.*`` without that prefix; what a file asks for is told from the tensors it brings, never from its name alone. Where a file's
notes exclude rows from the comparison, the output is a :class:`Rows`. A case computes in the type of its inputs, which
:func:`replay` makes torch's default while it runs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.engine import taps
from vtc.engine.undo import Undo
from vtc.kernels import attention_rows, cosine_distance
from vtc.signals import AttentionTap, cls_attn, keys

Tensors = dict[str, Tensor]
Run = Callable[[Tensors, dict[str, Any], str], "dict[str, Tensor | Rows]"]


class Rows(NamedTuple):
    """An output of which only the rows that are ``real`` (bool, the leading dimensions) are compared."""

    values: Tensor
    real: Tensor


@contextmanager
def arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` torch's default: what a case builds, models included, is of that type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def replay(run: Run, inputs: Tensors, params: dict[str, Any], case: str, dtype: torch.dtype) -> dict[str, Tensor | Rows]:
    """Run one case with its floats, and all that is made of them, in ``dtype``."""
    with arithmetic(dtype):
        return run({name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}, params, case)


def plain_norms(model: nn.Module) -> nn.Module:
    """In float64: put torch's RMS norms for Hugging Face's, which go through float32 whatever the type."""
    for parent in list(model.modules()) if torch.get_default_dtype() == torch.float64 else ():
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
                plain = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                plain.weight = norm.weight
                setattr(parent, name, plain)
    return model


def signals_of(
    features: Tensor, budget: int, *, layout: Layout | None = None, cls: Tensor | None = None, **tapped: Tensor
) -> Signals:
    """Return the signals of ``B`` plain images with these features ``(B, N, D)``."""
    batch, n = features.shape[:2]
    side = math.isqrt(n)
    return Signals(
        features=features,
        layout=layout or (Layout.grid(side, side) if side * side == n else Layout.flat(n)),
        entries=torch.arange(n).expand(batch, n),
        budget=budget,
        slots=n,
        taps=tapped,
        cls=cls,
    )


# ----------------------------------------------------------------------------------------- a model around given weights
class _Tower(nn.Module):
    """Stands for a vision tower: returns the features it was given, whatever the picture."""

    def __init__(self, features: Tensor, layers: int = 2) -> None:
        super().__init__()
        self.register_buffer("features", features)
        layer = SimpleNamespace  # the adapter only looks; nothing is tapped here
        self.vision_model = nn.Module()
        self.vision_model.embeddings = SimpleNamespace(class_embedding=True)
        self.vision_model.encoder = SimpleNamespace(layers=[layer(self_attn=nn.Identity()) for _ in range(layers)])
        self.dtype = features.dtype

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Return the class token and the features as every hidden state."""
        full = torch.cat([torch.zeros_like(self.features[:, :1]), self.features], 1)
        return transformers.modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=full, hidden_states=(full,) * 3)


def factors(n: int) -> tuple[int, int]:
    """Rows and columns of the most square grid of exactly ``n`` cells."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return rows, n // rows


def llava_around(
    embeddings: Tensor, features: Tensor, layers: dict[str, Tensor], stack: ExitStack, **config: Any
) -> tuple[nn.Module, int]:
    """Build a LLaVA whose text embeddings and image features are the given ones; return it and its image token id.

    Parameters
    ----------
    embeddings : Tensor
        ``(V, D)`` embedding table; the image token is appended.
    features : Tensor
        ``(1, N, D)`` what the projector returns for the one image.
    layers : dict
        State of the text model (Hugging Face names); missing layers keep their random weights.
    stack : ExitStack
        Holds the stand-in for the model's grid until the test is over: LLaVA's own adapter knows square grids only.
    **config
        Text config.
    """
    token, grid = len(embeddings), factors(features.shape[1])
    text = transformers.LlamaConfig(vocab_size=token + 1, pad_token_id=None, bos_token_id=None, eos_token_id=None, **config)
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_id=token, image_token_index=token, vision_feature_layer=-2
        )
    ).eval()
    model.model.vision_tower = _Tower(features)
    model.model.multi_modal_projector = nn.Identity()
    inner = plain_norms(model.model.language_model)
    state = {**layers, "embed_tokens.weight": torch.cat([embeddings, torch.zeros_like(embeddings[:1])])}
    left = inner.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, f"golden weights that the model does not have: {left.unexpected_keys}"
    if layers:
        assert not left.missing_keys, f"weights the golden file does not bring: {left.missing_keys}"
    stack.enter_context(mock.patch("vtc.families.llava.grid_of", lambda _: grid))
    return model, token


class _Watch:
    """Notes what the decoder layers of a patched model really get."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.text = model.model.language_model
        self.layer, self.hidden, self.rope, self.context = layer, None, None, None
        self.text.layers[layer].register_forward_pre_hook(self.enter, with_kwargs=True)
        self.text.register_forward_hook(self.leave, with_kwargs=True)

    def enter(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Runs after the engine's own hook: sees the shortened input."""
        self.hidden = args[0] if args else kwargs["hidden_states"]
        self.rope = kwargs["position_embeddings"]

    def leave(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], _out: Any) -> None:
        """Keep the forward's context."""
        self.context = kwargs["_vtc"]

    @property
    def kept(self) -> Tensor:
        """``(n,)`` logical columns the layer holds."""
        seg = self.context.keep[self.layer][0]
        return torch.arange(self.context.q) if seg is None else seg.rows[0]

    @property
    def positions(self) -> Tensor:
        """``(1, n)`` RoPE positions, read off the rotation the layer gets."""
        cos, sin = self.rope
        table_cos, table_sin = self.text.rotary_emb(self.hidden, torch.arange(self.context.q)[None])
        same = (cos[0][:, None] == table_cos[0]).all(-1) & (sin[0][:, None] == table_sin[0]).all(-1)
        assert bool((same.sum(1) == 1).all()), "a rotation that is no whole position"
        return same.int().argmax(1)[None]


# ------------------------------------------------------------------------------------------------------------- methods
def fastv(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Run the whole engine on a LLaVA with the file's decoder."""
    embeds = inputs["inputs_embeds"]
    start, n, k = params["sys_len"], params["n_image"], params["K"]
    length = embeds.shape[1]
    layers = {name: t for name, t in inputs.items() if name.startswith(("layers.", "norm."))}
    theta, key = float(params["rope_base"]), inputs["layers.0.self_attn.k_proj.weight"]
    keep = params["n_keep"] if "n_keep" in params else round(n * (1 - params["R"]))
    with ExitStack() as stack:
        model, token = llava_around(
            embeds[0],
            embeds[:, start : start + n],
            layers,
            stack,
            hidden_size=params["hidden"],
            intermediate_size=params["intermediate"],
            num_hidden_layers=params["layers"],
            num_attention_heads=params["heads"],
            num_key_value_heads=key.shape[0] // (params["hidden"] // params["heads"]),
            max_position_embeddings=4 * length,
            rms_norm_eps=params["rms_eps"],
            rope_theta=theta,
        )
        frequency = model.model.language_model.rotary_emb.inv_freq
        width = params["hidden"] // params["heads"]
        torch.testing.assert_close(frequency, theta ** -(torch.arange(0, width, 2) / width), check_dtype=False)
        ids = torch.arange(length)[None]  # the table's rows are the text tokens themselves
        ids[:, start : start + n] = token
        with vtc.patch(model, "fastv", layer=k, keep=keep), torch.no_grad():
            watch = _Watch(model, k)
            out = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.zeros(1, 3, 4, 4))
    return {
        "last_query_attn_mean": watch.context.tapped["last_attn", "text", k - 1][0][0],
        "keep_indices": watch.kept,
        "position_ids_after": watch.positions,
        "hidden_at_layer_K": watch.hidden,
        "last_hidden_state": out.last_hidden_state[:, watch.kept],
    }


def visionzip(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Run the reducer, its re-ordering of crops, or the tapped signals, by what the file brings."""
    if "x" in inputs:
        return _clip_attention(inputs, params)
    if "crop_tokens" in inputs:
        return _crops(inputs, params)
    hidden, attention = inputs["hidden_states"], inputs["cls_attention"]
    dominant, contextual = params["dominant_arg"], params["contextual"]
    reducer = vtc.create("visionzip", keep=dominant + contextual, contextual=contextual)
    signals = signals_of(
        hidden[:, 1:],
        dominant + contextual,
        cls=hidden[:, :1],
        cls_attn=attention[:, :, 1:].mean(1),
        keys=inputs["metric"][:, 1:],
    )
    views = reducer.views(signals)
    ranked = torch.cat([torch.zeros_like(views[0].ranked[:, :1]), views[0].ranked + 1], 1)
    return {"tokens": reducer.select(signals).features, "kept_index_unsorted": ranked}


def _crops(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """Order the tokens of all crops as one picture's."""
    from vtc.reducers.visionzip import ZippedView, in_order

    tokens, chosen = inputs["crop_tokens"], inputs["kept_index"]
    side, per = params["grid"], params["grid"] ** 2
    crops, kept = len(tokens), chosen.shape[1] - 1
    entry = torch.arange((crops + 1) * per)
    view, row, col = entry // per, entry % per // side, entry % side
    crop = (view - 1).clamp(min=0)
    layout = Layout(
        kind=torch.full_like(entry, int(Kind.PATCH)),
        view=view,
        row=row,
        col=col,
        y=row + crop // params["width"] * side * (view > 0),
        x=col + crop % params["width"] * side * (view > 0),
        slot=entry,
        grids=((side, side),) * (crops + 1),
        thumbnail=True,
    )
    nobody = torch.zeros(1, 0, dtype=torch.long)
    parts = []
    for c in range(crops):
        ranked = chosen[c, 1:][None] - 1
        part = ZippedView(
            ranked=ranked,
            kept=ranked.sort(1).values,
            dominant=tokens[c, 1 : 1 + kept][None],
            contextual=tokens[c, 1 + kept :][None],
            owner=nobody,
            view=c + 1,
            entries=torch.arange(per) + (c + 1) * per,
            head=tokens[c, :1][None],
        )
        parts.append(part)
    return {"tokens": in_order(parts, layout)[0][0]}


def _clip_attention(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """Tap a real CLIP attention layer that has the file's weights."""
    from transformers.models.clip.modeling_clip import CLIPAttention

    x, heads = inputs["x"], params["heads"]
    config = transformers.CLIPVisionConfig(hidden_size=x.shape[-1], num_attention_heads=heads)
    config._attn_implementation = "sdpa"
    layer = CLIPAttention(config).eval()
    layer.load_state_dict({name: t for name, t in inputs.items() if name != "x"})
    seen: list[AttentionTap] = []

    def observe(_module, query, key, value, mask, scaling, _ctx):
        seen.append(AttentionTap(query, key, value, scaling, mask))

    undo = Undo()
    taps.attach(undo, layer, observe)
    try:
        with torch.no_grad():
            out = layer(x, attention_mask=None)[0]
    finally:
        undo.run()
    (tap,) = seen
    rows, mask = tap.rows(torch.zeros(len(x), 1, dtype=torch.long))
    per_head = attention_rows(rows, tap.key, scaling=tap.scaling, mask=mask, reduce="none")[:, :, 0]
    # the signals themselves are head means of these rows, and leave the class token out where there is one
    torch.testing.assert_close(cls_attn().measure(tap), per_head.mean(1))
    return {"attn_output": out, "cls_attention": per_head, "metric": keys().measure(tap)}


def fastervlm(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Score and select."""
    features = inputs["features"]
    reducer = vtc.create("fastervlm", keep=params["n_keep"])
    signals = signals_of(features, params["n_keep"], cls_attn=inputs["cls_attention"].mean(1))
    index = reducer.select(signals).index
    return {
        "score": reducer.score(signals),
        "keep_mask": torch.zeros(features.shape[:2], dtype=torch.long).scatter(1, index, 1),
        "tokens": features.gather(1, index[..., None].expand(-1, -1, features.shape[2])),
    }


def divprune(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Select, or run the whole engine to see what the language model is fed."""
    reducer = vtc.create("divprune", keep=float(params["subset_ratio"]))
    if "tokens" in inputs:
        tokens = inputs["tokens"][None]
        signals = signals_of(tokens, reducer.budget.tokens(tokens.shape[1]))
        return {
            "selected_in_order": reducer.pick(signals)[0],
            "selected_sorted": reducer.select(signals).index[0],
            "distance_row0": cosine_distance(tokens, torch.zeros(1, dtype=torch.long))[0],
        }
    ids, features = inputs["input_ids"], inputs["image_features"]
    at = int((ids[0] == params["image_token"]).nonzero())
    dim = features.shape[2]
    with ExitStack() as stack:
        model, token = llava_around(
            inputs["embed_weight"],
            features,
            {},
            stack,
            hidden_size=dim,
            intermediate_size=dim,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=4 * (ids.shape[1] + features.shape[1]),
        )
        full = torch.cat([ids[:, :at], torch.full((1, features.shape[1]), token), ids[:, at + 1 :]], 1)
        with vtc.patch(model, reducer), torch.no_grad():
            watch = _Watch(model, 0)
            model.model(input_ids=full, attention_mask=torch.ones_like(full), pixel_values=torch.zeros(1, 3, 4, 4))
    n = watch.hidden.shape[1]
    assert torch.equal(watch.positions, torch.arange(n)[None]), "positions must be renumbered"
    seg = watch.context.keep[0][0]
    real = torch.ones(1, n, dtype=torch.bool) if seg.valid is None else seg.valid
    return {"inputs_embeds": watch.hidden, "attention_mask": real.long()}


def flowcut(inputs: Tensors, params: dict[str, Any], case: str) -> Tensors:
    """See :mod:`golden_flowcut`."""
    from golden_flowcut import run

    return run(inputs, params, case)


CASES: dict[str, Run] = {
    "fastv": fastv,
    "visionzip": visionzip,
    "fastervlm": fastervlm,
    "divprune": divprune,
    "flowcut": flowcut,
}


def load_all() -> dict[str, Run]:
    """Add the ``CASES`` of every ``golden_*.py`` beside this file, and return the map of all methods."""
    for path in sorted(Path(__file__).parent.glob("golden_*.py")):
        if path.stem == "golden_cases":
            continue
        for method, case in getattr(importlib.import_module(path.stem), "CASES", {}).items():
            if CASES.setdefault(method, case) is not case:
                raise ValueError(f"{path.name}: '{method}' has a golden case already")
    return CASES
