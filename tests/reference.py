"""Slow references that use none of the engine's code.

:func:`hidden_reference` runs an *unpatched* copy of the model on the full sequence, without any KV cache, once per generated token,
with an attention function of its own that hides the dropped tokens from everybody in the layers where they are gone.
:func:`shorter_prompt` feeds the unpatched model the physically shortened embeddings, as a prompt that never had the other tokens.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from models import (
    GRID,
    SPECIAL,
    case_of,
    image_features,
    image_spans,
    set_attention,
    view_count,
    visual_of,
)
from pickers import fewer, merged, pick
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtc.core import Reducer, Stage
from vtc.verify import reference
from vtc.verify.reference import attend, hidden_copy, hide_in

__all__ = ["set_attention"]


# ------------------------------------------------------------------------------------------------- attention functions
def _eager64(module, query, key, value, attention_mask, scaling=None, **_kwargs):
    """The eager form (additive 4-D masks) without Hugging Face's float32 softmax."""
    return attend(query, key, value, attention_mask, scaling)


def _fake_flash(
    module, query, key, value, attention_mask, scaling=None, position_ids=None, is_causal=None, sliding_window=None, **_kwargs
):
    """What FlashAttention-2 computes from what it is handed: a 2-D padding mask or None, causal aligned to the last key.

    A window counts the keys that are not masked. Asserts the contract, and takes the packed-sequence branch as transformers does
    (batch 1, position ids that restart).
    """
    assert attention_mask is None or attention_mask.shape == (key.shape[0], key.shape[2]), "FlashAttention wants (batch, keys)"
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    allowed = (allowed.tril(keys - queries) if causal else allowed)[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, None]
    elif position_ids is not None and len(query) == 1 and queries > 1:
        places = position_ids.reshape(-1)
        if (torch.arange(queries) + places.min() - places).abs().sum():
            document = (places == places.min()).cumsum(0)
            allowed = allowed & (document[:, None] == document[None])
    if sliding_window is not None and keys > sliding_window:
        there = torch.ones(len(query), keys) if attention_mask is None else attention_mask.double()
        place = there.cumsum(1)
        allowed = allowed & (place[:, None, -queries:, None] - place[:, None, None] < sliding_window)
    return attend(query, key, value, allowed, scaling)[0], None


_RECORDED: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor | None, float, Tensor]]] = {}
"""id of an attention module -> what its calls were given, and their maps."""


def _recorded(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Eager attention that writes down query, key, value, mask, scaling and map; the model's own but in float64.

    (Hugging Face's computes the softmax in float32, where a row of padding is NaN.)
    """
    if query.dtype == torch.float64:
        out, weights = attend(query, key, value, attention_mask, scaling)
    else:
        out, weights = eager_of(module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if weights is None:  # the CLIP of 4.57 returns its map only where the call asked for it
        weights = attend(query, key, value, attention_mask, scaling)[1]
    _RECORDED.setdefault(id(module), []).append((query, key, value, attention_mask, scaling, weights))
    return out, weights


def eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention function of the file that an attention module comes from."""
    return sys.modules[type(module).__module__].eager_attention_forward


@contextmanager
def recorded() -> Iterator[dict[int, list[tuple]]]:
    """What the attention modules of models set to ``"recorded"`` are given in the body of a ``with`` block, by module id."""
    _RECORDED.clear()
    kept: dict[int, list[tuple]] = {}
    yield kept
    kept.update(_RECORDED)
    _RECORDED.clear()


for _name, _function, _mask in (
    ("recorded", _recorded, eager_mask),
    ("eager64", _eager64, eager_mask),
    ("fake_flash", _fake_flash, flash_attention_mask),
):
    ALL_ATTENTION_FUNCTIONS.register(_name, _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, _mask)


# ------------------------------------------------------------------------------------------------------------- plans
@dataclass
class Plan(reference.Plan):
    """What happens to a prompt, in logical coordinates, by layer.

    Attributes
    ----------
    tower : dict
        Tower layer -> ``(views, tokens)`` bool: tokens (class token included) that are gone.
    projector : function or None
        Replaces the projector: called with the projector and its input, returns ``(views, patches, D)``.
    """

    tower: dict[int, Tensor] = field(default_factory=dict)
    projector: Callable[[nn.Module, Tensor], Tensor] | None = None


def text_of(model: nn.Module) -> nn.Module:
    """The text model (the module whose ``layers`` are the decoder layers)."""
    return getattr(model.model, "language_model", None) or model.model.text_model


def tower_layers(model: nn.Module) -> nn.ModuleList:
    """The vision tower's layers."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def projector_of(module: nn.Module) -> nn.Module:
    """The module before which ``VISION`` reducers act."""
    return module.model.get_submodule(case_of(module).projector)


@contextmanager
def oracle_model(model: nn.Module, plan: Plan, repeat: int = 1) -> Iterator[nn.Module]:
    """Give a copy of the unpatched ``model`` on which ``plan`` is applied by hiding columns.

    ``repeat``: rows are repeated (beams).
    """
    path = next(name for name, module in model.named_modules() if module is text_of(model))
    with hidden_copy(model, plan, path, repeat) as twin:
        for j, gone in plan.tower.items():
            hide_in(tower_layers(twin)[j], gone)
        if plan.projector is not None:
            projector = projector_of(twin)
            plain = copy.deepcopy(projector)
            projector.register_forward_hook(lambda module, args, out: plan.projector(plain, args[0]))
        yield twin


def hidden_reference(
    model: nn.Module, inputs: dict[str, Tensor], plan: Plan, steps: int = 8, first: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return greedy tokens ``(B, steps)``, their logits ``(B, steps, V)`` and the prompt's logits ``(B, S, V)``.

    ``first``: length of the prompt's first turn, if it has several.
    """
    inputs, case, length = dict(inputs), case_of(model), first or inputs["input_ids"].shape[1]
    tokens, logits, prompt = [], [], None
    with oracle_model(model, plan) as twin, torch.no_grad():
        for _ in range(steps):
            mask = inputs["attention_mask"]
            positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
            positions = positions if case.positions is None else case.positions(model, inputs, positions)
            out = twin(**inputs, position_ids=positions, use_cache=False).logits
            prompt = out if prompt is None else prompt
            logits.append(out[:, -1])
            new = suppressed(out[:, -1]).argmax(-1, keepdim=True)
            tokens.append(new)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
            inputs["attention_mask"] = torch.cat([mask, torch.ones_like(new)], 1)
            inputs |= case.extra(inputs["input_ids"], length)
    return torch.cat(tokens, 1), torch.stack(logits, 1), prompt


def suppressed(logits: Tensor) -> Tensor:
    """Logits without the placeholder tokens, as the tiny models' generation config asks."""
    logits = logits.clone()
    logits[..., SPECIAL] = -torch.inf
    return logits


def hidden_generate(model: nn.Module, inputs: dict[str, Tensor], plan: Plan, repeat: int = 1, **options):
    """``generate`` of an unpatched copy with a full-length KV cache and hidden columns (original positions only)."""
    assert not plan.compact and not plan.write
    with oracle_model(model, plan, repeat) as twin, torch.no_grad():
        return twin.generate(**inputs, return_dict_in_generate=True, output_scores=True, **options)


def embeddings(model: nn.Module, inputs: dict[str, Tensor], plan: Plan | None = None) -> Tensor:
    """``inputs_embeds`` as an unpatched copy hands them to its text model (with the plan's projector and layer-0 writes)."""
    caught: dict[str, Tensor] = {}
    plan = plan or Plan()
    with oracle_model(model, plan) as twin, torch.no_grad():
        hook = text_of(twin).register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
        twin(**inputs)
        hook.remove()
    embeds = caught["inputs_embeds"]
    return plan.write[0](embeds) if 0 in plan.write else embeds


def shorter_prompt(model: nn.Module, embeds: Tensor, keep: Tensor, steps: int = 8) -> tuple[Tensor, Tensor]:
    """Run the unpatched model on the rows' kept embeddings only, left padded; return greedy tokens and logits."""
    rows = [e[k] for e, k in zip(embeds, keep, strict=True)]
    longest = max(map(len, rows))
    short = torch.stack([torch.cat([e.new_zeros(longest - len(e), e.shape[-1]), e]) for e in rows])
    mask = torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in rows])
    table = model.get_input_embeddings()
    tokens, logits = [], []
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(inputs_embeds=short, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        new = suppressed(out).argmax(-1, keepdim=True)
        tokens.append(new), logits.append(out)
        short = torch.cat([short, table(new)], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    return torch.cat(tokens, 1), torch.stack(logits, 1)


# ---------------------------------------------------------------------------------------------------- slots and patches
def projected(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The unpatched projector's output ``(views, patches, D)`` of a call."""
    caught: list[Tensor] = []
    hook = projector_of(model).register_forward_hook(lambda m, a, out: caught.append(out))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return caught[0]


def slot_sources(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """Return ``(first view, source)`` of every image: which projector row each slot holds, found by comparing the features.

    ``source`` is ``(slots,)``: row of the flattened projector output of the image's views, or -1 for a newline.
    """
    case = case_of(model)
    newline = getattr(model.model, "image_newline", None)
    if not case.anyres or not case.exact:  # no crops, or no slot holds exactly one patch: only newlines are told apart
        out = []
        for features in image_features(model, inputs):
            new = torch.zeros(len(features), dtype=torch.bool) if newline is None else (features == newline).all(1)
            out.append((len(out), torch.where(new, -1, GRID * GRID if case.anyres else torch.arange(len(features)))))
        return out
    rows = projected(model, inputs)
    flat = rows.reshape(-1, rows.shape[-1])
    out, first = [], 0
    for features in image_features(model, inputs):
        source = torch.full((len(features),), -1)
        for s, feature in enumerate(features):
            if newline is not None and torch.equal(feature, newline):
                continue
            hit = (flat == feature).all(1).nonzero()[:, 0]
            assert len(hit) == 1, "every slot holds exactly one projected patch"
            source[s] = hit[0]
        view = int(source[source >= 0].min()) // rows.shape[1]
        assert view == first
        source[source >= 0] -= view * rows.shape[1]
        out.append((view, source))
        if "image_sizes" in inputs:
            first += view_count(model, inputs["image_sizes"][len(out) - 1].tolist())
        else:
            first += 1
    return out


# ------------------------------------------------------------------------------------------------- plans of the pickers
def plan_of(model: nn.Module, inputs: dict[str, Tensor], parts: Sequence[Reducer], marks: Sequence[int]) -> Plan:
    """Work out by hand what the pickers do to a prompt.

    Parameters
    ----------
    model : Module
        The unpatched model.
    parts : sequence of Reducer
        Single-stage pickers; only their options are read.
    marks : sequence of int
        Fingerprint of every image.
    """
    spans, sources = image_spans(inputs, model), slot_sources(model, inputs)
    visual, layers = visual_of(inputs), len(text_of(model).layers)
    gone, uncounted = torch.zeros_like(visual), None
    alive = [torch.arange(len(c)) for _, c in spans]
    plan = Plan()

    def by_hand(part: Reducer, image: int) -> Tensor:
        """Slots that survive a text-side part; registers merged values."""
        (row, columns), (_, source) = spans[image], sources[image]
        slots, now = len(columns), alive[image]
        k = min(slots, round(part.keep * slots) if isinstance(part.keep, float) else part.keep)
        if k >= len(now):
            return now
        among = now if part.newline_policy == "compete" else now[source[now] >= 0]
        k = min(k, len(among))
        k = fewer(marks[image], part.salt, k) if part.ragged else k
        chosen = pick(marks[image], part.salt, slots, among, k)
        if part.merge:
            before = plan.write.get(part.layer, lambda hidden: hidden)

            def after(hidden: Tensor) -> Tensor:
                # the values merged are those before any image of this layer was written: images do not overlap
                hidden = before(hidden).clone()
                hidden[row, columns[among[chosen]]] = merged(hidden[row, columns[among]], chosen)
                return hidden

            plan.write[part.layer] = after
        return with_newlines(source, among[chosen], now, part.newline_policy)

    for i in range(layers):
        mine = [p for p in parts if p.layer == i]
        for part in mine:
            if part.stage.in_tower:
                alive = in_tower(model, inputs, part, plan, sources, marks)
            else:
                alive = [by_hand(part, image) for image in range(len(spans))]
        if mine:
            gone = visual.clone()
            for (row, columns), kept in zip(spans, alive, strict=True):
                gone[row, columns[kept]] = False
            if any(p.position_policy == "compact" for p in mine):
                uncounted = gone
        if parts and i >= min(p.layer for p in parts):
            plan.hide[i] = gone
            if uncounted is not None:
                plan.compact[i] = uncounted
    return plan


def with_newlines(source: Tensor, kept: Tensor, alive: Tensor, policy: str) -> Tensor:
    """Add the newlines the policy keeps. A newline closes the run of crop slots (view > 0) before it."""
    if policy not in ("all", "with_row"):
        return kept
    keep, row_lives = set(kept.tolist()), False
    for s, patch in enumerate(source.tolist()):
        if patch >= 0:
            row_lives |= s in kept.tolist() and patch >= GRID * GRID
        else:
            if s in alive.tolist() and (policy == "all" or row_lives):
                keep.add(s)
            row_lives = False
    return torch.tensor(sorted(keep))


def views_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[int], Tensor]:
    """Views of every image, and the pixels of all views, ``(views, 3, H, W)``."""
    pixels = inputs["pixel_values"]
    if pixels.dim() == 4:
        return [1] * len(pixels), pixels
    count = [view_count(model, s) for s in inputs["image_sizes"].tolist()]
    return count, torch.cat([p[:n] for p, n in zip(pixels, count, strict=True)])


def given_to_projector(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The unpatched projector's input ``(views, tokens, D_v)`` of a call."""
    caught: list[Tensor] = []
    hook = projector_of(model).register_forward_pre_hook(lambda m, a: caught.append(a[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return caught[0]


def tower_features(model: nn.Module, pixels: Tensor, **options) -> Tensor:
    """Features the projector is given for these pixels, ``(views, patches, D)``, by a plain call of the tower."""
    with torch.no_grad():
        tower, config = model.model.vision_tower, model.config
        out = tower(pixels, output_hidden_states=True, **options)
        layers = getattr(config, "vision_feature_layers", None) or getattr(config, "vision_feature_layer", None)
        if layers is None:
            return out.last_hidden_state
        layers = [layers] if isinstance(layers, int) else layers
        hidden = torch.cat([out.hidden_states[i] for i in layers], -1)
    return hidden[:, 1:] if getattr(config, "vision_feature_select_strategy", "default") == "default" else hidden


def in_tower(
    model: nn.Module,
    inputs: dict[str, Tensor],
    part: Reducer,
    plan: Plan,
    sources: list[tuple[int, Tensor]],
    marks: Sequence[int],
) -> list[Tensor]:
    """Work out a tower-side picker: surviving slots per image; the plan gets what is hidden or written in the tower."""
    views, pixels = views_of(model, inputs) if case_of(model).anyres else ([1] * len(marks), inputs["pixel_values"])
    per = GRID * GRID
    patches: list[Tensor] = []  # per image: surviving patches of all its views
    if part.stage is Stage.IMAGE:
        rows, cols = part.small
        small = tower_features(model, part.resize(pixels, (rows * 7, cols * 7)), interpolate_pos_encoding=True)
        # the grid cell whose centre is nearest to the centre of the coarse cell; a tie goes to the later one
        near = [
            max(range(GRID), key=lambda g, c=c, n=n: (-abs((g + 0.5) / GRID - (c + 0.5) / n), g))
            for n in (rows, cols)
            for c in range(n)
        ]
        cells = torch.tensor([y * GRID + x for y in near[:rows] for x in near[rows:]])

        def shrunk(projector: nn.Module, _features: Tensor) -> Tensor:
            out = projector(small)
            full = out.new_zeros(len(out), per, out.shape[-1])
            full[:, cells] = out
            return full

        plan.projector = shrunk
        patches = [torch.cat([cells + v * per for v in range(n)]) for n in views]
    elif part.stage is Stage.VISION:
        values: list[tuple[int, Tensor]] = []
        features = given_to_projector(model, inputs)
        first = 0
        for n, mark, (_, source) in zip(views, marks, sources, strict=True):
            slots = len(source)
            k = min(slots, round(part.keep * slots) if isinstance(part.keep, float) else part.keep)
            if k >= slots:
                patches.append(torch.arange(n * per))
            else:
                k = fewer(mark, part.salt, k) if part.ragged else k
                chosen = pick(mark, part.salt, n * per, torch.arange(n * per), k)
                patches.append(chosen)
                if part.merge:
                    values.append((first * per + chosen, merged(features[first : first + n].flatten(0, 1), chosen)))
            first += n
        if values:

            def written(projector: nn.Module, given: Tensor) -> Tensor:
                flat = given.flatten(0, 1).clone()
                for at, value in values:
                    flat[at] = value
                return projector(flat.view_as(given))

            plan.projector = written
    else:
        alive = _encoder_by_hand(model, inputs, part, plan, len(pixels))
        patches, first = [], 0
        for n in views:
            patches.append(alive[first : first + n].flatten().nonzero()[:, 0])
            first += n
    kept = []
    for n, mine, (_, source) in zip(views, patches, sources, strict=True):
        every = torch.arange(len(source))
        if len(mine) == n * per:
            kept.append(every)
        else:
            kept.append(with_newlines(source, every[torch.isin(source, mine)], every, part.newline_policy))
    return kept


def _encoder_by_hand(model: nn.Module, inputs: dict[str, Tensor], part: Reducer, plan: Plan, views: int) -> Tensor:
    """``(views, patches)`` bool: what :class:`pickers.EncoderPicker` leaves; hides the rest in the plan's tower layers."""
    per = GRID * GRID
    has_cls = hasattr(getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).embeddings, "class_embedding")
    head = int(has_cls)
    target = max(1, round(part.keep * per) if isinstance(part.keep, float) else part.keep)
    alive = torch.ones(views, per, dtype=torch.bool)
    before = None
    for j in range(2):
        caught: list[Tensor] = []
        with oracle_model(model, plan) as twin, torch.no_grad():
            layer = tower_layers(twin)[j]
            hook = layer.self_attn.k_proj.register_forward_hook(lambda m, a, out, caught=caught: caught.append(out))
            twin(**inputs)
            hook.remove()
        heads = layer.self_attn.num_heads
        score = caught[0].view(views, per + head, heads, -1).mean(2).sum(-1)[:, head:]
        new = torch.zeros_like(alive)
        for v in range(views):
            at = alive[v].nonzero()[:, 0]
            mine = score[v, at]
            count = target + 4
            if j == 1:
                count = target - (3 if part.ragged and mine[0] > mine[1] else 0)
                mine = mine + before[v, at]
            new[v, at[mine.topk(min(count, len(at))).indices]] = True
        alive, before = new, score
        for deeper in range(j + 1, len(tower_layers(model))):
            plan.tower[deeper] = torch.cat([torch.zeros(views, head, dtype=torch.bool), ~alive], 1)
    return alive
