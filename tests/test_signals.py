"""Every signal that a reducer can ask for, on every family: equal to what the unpatched model's own eager attention, modules and
hidden states give.

The patched model runs SDPA and is only listened to; the reference is a copy of the unpatched model whose eager attention function
writes down its queries, keys, values, maps and scaling. What attention maps define is computed from the maps; other measures are
given what the reference wrote down.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from cases import CASES as REDUCERS
from family_cases import CASES
from models import make_inputs, set_attention, shared, visual_of
from pickers import EncoderPicker, marks_of
from reference import given_to_projector, oracle_model, plan_of, projector_of, recorded, text_of, tower_layers
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer as CLIPLayer

import vtc
from vtc import signals
from vtc.core import Kind, Need, Reducer, Selection, Signals, Stage
from vtc.engine import upstream
from vtc.engine.patch import bind
from vtc.errors import VtcError
from vtc.families import family_of
from vtc.signals import AttentionTap, StateTap

FAMILIES = [name for name in CASES if name != "unknown"]
LAST = 4
"""Decoder layer at which the spy looks; nothing is dropped before or there."""


@dataclass(frozen=True, kw_only=True)
class Spy(Reducer):
    """Keeps everything, and remembers what it was shown."""

    stage: ClassVar[Stage] = Stage.DECODER
    default_newlines: ClassVar[str] = "compete"
    decides_itself: ClassVar[bool] = True
    name: ClassVar[str] = "spy"

    asked: tuple[Need, ...] = ()
    layer: int = LAST
    keep: float = 1.0
    seen: list[Signals] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.asked

    def select(self, signals: Signals) -> Selection:
        self.seen.append(signals)
        return Selection.all(signals.shape[1], signals.shape[0])


def shown(model: nn.Module, inputs: dict[str, Tensor], needs: tuple[Need, ...], **options: Any) -> list[dict[str, Tensor]]:
    """Signals of every image in order, as a reducer gets them: ``(slots, ...)``, or ``(...)`` of its row."""
    spy = Spy(asked=needs, **options)
    with vtc.patch(model, spy) as handle, torch.no_grad():
        model(**inputs)
        layouts = [k.layout for k in handle.stats.kept]
    by_layout = {id(s.layout): iter(zip(*(s.taps[n.name] for n in needs), strict=True)) for s in spy.seen}
    assert all(torch.equal(s.entries, torch.arange(len(s.layout)).expand(len(s.entries), -1)) for s in spy.seen)
    return [dict(zip([n.name for n in needs], next(by_layout[id(layout)]), strict=True)) for layout in layouts]


# ---------------------------------------------------------------------------------------------------------------- needs
def vision_needs(layers: list[int]) -> list[Need]:
    """All ready-made signals of some tower layers."""
    made = (
        signals.cls_attn, signals.keys, signals.values, signals.wide_cls_attn, signals.wide_keys, signals.cls_logits,
        signals.mean_query_attn, signals.all_keys, signals.received_attn, signals.cls_value_affinity,
    )  # fmt: skip
    sensitive = (signals.sensitivity(directions=3), signals.sensitivity(directions=2, seed=5, rank=2))
    return [make(layer) for make in made for layer in layers] + list(sensitive)


def text_needs(layers: range) -> list[Need]:
    """All ready-made signals of some decoder layers."""
    made: tuple[Callable[[int], Need], ...] = (
        signals.last_attn, signals.last_logits, signals.last_value_logits, signals.text_values, signals.modality_mass,
        signals.key_norm, signals.final_states, signals.places, signals.next_last_attn, signals.next_question_attn,
        signals.peak_text_attn, functools.partial(signals.peak_text_attn, question=False),
    )  # fmt: skip
    return [make(layer) for make in made for layer in layers]


TURNED_BACK = ("_mean_query_weight", "_placeless_last_attention")


def all_needs(name: str) -> tuple[Need, ...]:
    """What can be asked of a family: ready-made signals, and those that registered reducers bring; named apart."""
    facts = facts_of(name)
    wanted = vision_needs([i for i in range(facts.encoder_layers) if i not in facts.windowed][-2:])
    # text: the last layer that runs before the spy looks, one in the middle, and previews of the spy's own
    wanted += [n for n in text_needs(range(1, LAST + 1, 2)) + text_needs(range(LAST, LAST + 1)) if before(n)]
    for reducer in vtc.list_reducers():
        try:
            parts = bind(vtc.create(reducer, **REDUCERS[reducer].mild), facts).parts()
        except VtcError:
            continue
        # two take the rotation out of queries and keys again: by hand in test_pact.py, and VScan's golden files
        wanted += [n for p in parts for n in p.needs if before(n) and getattr(n.measure, "__name__", "") not in TURNED_BACK]
    found: dict[Any, Need] = {}
    for need in wanted:
        try:
            bind(Spy(asked=(need,)), facts)
        except VtcError:
            continue
        found.setdefault((need.key, getattr(need.measure, "__name__", repr(need.measure)), need.of), need)
    return tuple(dataclasses.replace(n, name=f"{n.name}#{i}") for i, n in enumerate(found.values()))


def before(need: Need) -> bool:
    """Whether the spy's layer comes late enough for a signal."""
    return need.source == "vision" or need.layer < LAST or (need.layer == LAST and need.of in ("preview", "hidden"))


@functools.cache
def facts_of(name: str):
    return family_of(model_of(name)).facts


def model_of(name: str, impl: str = "sdpa") -> nn.Module:
    """In float32: in float64 the eager functions' own float32 softmax makes rows of padding, and all behind them, NaN."""
    return shared(name, impl, torch.float32)


# ------------------------------------------------------------------------------------------------------------- reference
@dataclass
class Reference:
    """One forward of the unpatched model with its own eager attention, written down."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.twin = copy.deepcopy(self.model)
        set_attention(self.twin, "recorded")
        self.family = family_of(self.twin)
        describe = self.family.describe_video if CASES[self.name].video else self.family.describe
        self.inside: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.entering: dict[int, Tensor] = {}
        hooks = []
        for i, layer in enumerate(self.family.layers):
            hooks.append(layer.register_forward_pre_hook(functools.partial(self.enter, i), with_kwargs=True))
            modules = {"attention_update": layer.self_attn, "mlp_update": layer.mlp, "neurons": layer.mlp.down_proj}
            for place, module in modules.items():
                note = functools.partial(self.note, place, i)
                hooks.append(module.register_forward_hook(note, with_kwargs=True))
        self.places: Tensor | None = None
        hooks.append(text_of(self.twin).register_forward_pre_hook(self.begin, with_kwargs=True))
        with recorded() as self.calls, torch.no_grad():
            call = {k: v for k, v in self.inputs.items() if k not in ("input_ids", "attention_mask")}
            self.described = describe(call)
            self.twin(**self.inputs)
        for hook in hooks:
            hook.remove()
        self.visual, self.valid = visual_of(self.inputs), self.inputs["attention_mask"].bool()
        index = torch.arange(self.valid.shape[1])
        self.last = torch.where(self.valid, index, -1).max(1).values

    def enter(self, i: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entering[i] = args[0] if args else kwargs["hidden_states"]

    def begin(self, _module: nn.Module, _args: Any, kwargs: Any) -> None:
        self.places = kwargs.get("position_ids")

    def note(self, place: str, i: int, _module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        self.inside[place, i] = given, given if place == "neurons" else out[0] if isinstance(out, tuple) else out

    # ------------------------------------------------------------------------------------------------- text side
    def text(self, need: Need) -> Tensor:
        """The signal of all tokens, ``(B, S, ...)``, or of all rows."""
        shared_facts = dict(last=self.last, visual=self.visual, valid=self.valid)
        given = {other.name: self.text(other) for other in need.uses}
        if need.of in ("attention", "preview"):
            ((query, key, value, mask, scaling, weights),) = self.calls[id(self.family.text_attention[need.layer])]
            name = getattr(need.measure, "__name__", type(need.measure).__name__)
            if name in BY_MAP:
                return BY_MAP[name](self, need, weights.double(), query, key, value)
            return need.measure(AttentionTap(query, key, value, scaling, mask, True, given=given, **shared_facts))
        if need.of == "rotation":
            return need.measure(self.rotation(need.layer))
        norm = self.family.text.norm
        if need.of == "hidden":
            return need.measure(StateTap(self.entering[need.layer], norm=norm, given=given, **shared_facts))
        first, second = self.inside[need.of, need.layer]
        return need.measure(StateTap(second, norm=norm, before=first, given=given, **shared_facts))

    def rotation(self, layer: int) -> signals.RotationTap:
        """Cosines and sines at the positions the text model is given; without any, rows count their own tokens."""
        text = text_of(self.twin)
        kinds = getattr(text.config, "layer_types", None)
        local = kinds is not None and kinds[layer] == "sliding_attention" and hasattr(text, "rotary_emb_local")
        rotary = text.rotary_emb_local if local else text.rotary_emb
        more = (kinds[layer],) if "layer_type" in inspect.signature(type(rotary).forward).parameters else ()
        places = self.places if self.places is not None else (self.valid.cumsum(1) - 1).clamp(min=0)
        made = []
        for axis in places[-3:] if places.dim() == 3 else places[None]:
            axis = axis.expand(len(self.valid), -1)
            table = rotary(torch.zeros(1, 1, dtype=torch.float64), axis if places.dim() == 2 else axis.expand(3, -1, -1), *more)
            made.append([t[0] if t.dim() == 4 else t for t in table])
        return signals.RotationTap(*(torch.stack(tables) for tables in zip(*made, strict=True)))

    # ----------------------------------------------------------------------------------------------- vision side
    def vision(self, need: Need) -> list[Tensor]:
        """The signal of every image, ``(slots, ...)``."""
        used = need.resolve(facts_of(self.name).provides)
        if used.of == "projection":
            values = self.projected(used)
            cells = self.described.cells
            if cells is not None and values.shape[1] != len(cells):  # frames are pooled behind the projector
                values = values[:, cells].mean(2)
        elif used.of == "pixels":
            grid = self.described.patches[0].grids[0]
            values = used.measure(signals.PixelTap(self.described.pixels, grid))
        else:
            values = self.tower(used)
            if self.described.cells is not None:
                values = values[:, self.described.cells].mean(2)
        flat, out, start = values.flatten(0, 1), [], 0
        for slots in self.described.slots:
            per_view = [0, *torch.tensor([r * c for r, c in slots.grids]).cumsum(0).tolist()]
            rows = []
            for kind, view, row, col in zip(*(t.tolist() for t in (slots.kind, slots.view, slots.row, slots.col)), strict=True):
                patch = kind == Kind.PATCH
                rows.append(
                    flat[start + per_view[view] + row * slots.grids[view][1] + col] if patch else torch.zeros_like(flat[0])
                )
            out.append(torch.stack(rows))
            start += per_view[-1]
        return out

    def tower(self, need: Need) -> Tensor:
        """The signal of all patches of all views, ``(views, patches, ...)``, or of one packed sequence."""
        cls = facts_of(self.name).has_cls
        name = getattr(need.measure, "__name__", type(need.measure).__name__)
        parts = []
        for query, key, value, _mask, scaling, weights in self.blocks(need.layer):
            if name in BY_MAP:
                found = BY_MAP[name](self, need, weights.double(), query, key, value)
                parts.append(found[:, 1:] if cls else found)
            else:
                parts.append(need.measure(AttentionTap(query, key, value, scaling, cls=cls)))
        return torch.cat(parts, 1 if self.described.pieces is not None else 0)

    def blocks(self, layer: int) -> list[tuple]:
        """What a tower layer's attention was given: all views at once, or block by block of a packed sequence."""
        calls = self.calls[id(self.family.encoder_attention[layer])]
        if self.described.pieces is None or len(calls) > 1:
            return calls
        ((query, key, value, _, scaling, weights),) = calls  # one call with a mask of blocks
        out, start = [], 0
        for n in self.described.pieces:
            at = slice(start, start + n)
            out.append((query[:, :, at], key[:, :, at], value[:, :, at], None, scaling, weights[:, :, at, at]))
            start += n
        return out

    def projected(self, need: Need) -> Tensor:
        """The signal of what the projector is given."""
        given, projector = given_to_projector(self.twin, self.inputs), projector_of(self.twin)
        if not isinstance(need.measure, signals._Sensitivity):  # the stand-in for the class token's logits
            mean = given.mean(1, keepdim=True)
            return -torch.cosine_similarity(given, mean, dim=-1)
        m = need.measure
        if m.rank is not None:
            projector = low_rank(projector, m.rank)
        draw = torch.randn(m.directions, given.shape[-1], generator=torch.Generator().manual_seed(m.seed)).to(given)
        total = 0
        with torch.no_grad():
            for direction in draw:
                step = m.step * direction / direction.norm()
                total = total + (projector(given + step) - projector(given - step)).norm(dim=-1)
        return total / (2 * m.step * m.directions)


def low_rank(projector: nn.Module, rank: int) -> nn.Module:
    """A copy whose linear layers have that rank."""
    twin = copy.deepcopy(projector)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            u, s, v = torch.linalg.svd(module.weight.data, full_matrices=False)
            module.weight.data = (u[:, :rank] * s[:rank]) @ v[:rank]
    return twin


# what attention maps say, from the maps; (B, H, Q, K) each, rows of padding included
def question(ref: Reference) -> Tensor:
    """Rows of the text behind the last visual token."""
    behind = ref.visual.flip(1).cumsum(1).flip(1) == 0
    return ref.valid & ~ref.visual & behind


def mass(ref: Reference, need: Need, weights: Tensor, *_: Tensor) -> Tensor:
    out = []
    for row, maps in enumerate(weights.mean(1)):
        visual, real = ref.visual[row], ref.valid[row]
        text = real & ~visual & (visual.cumsum(0) > 0)
        share = []
        for rows, columns in ((text, visual), (visual, text)):
            share.append(maps[rows][:, columns].sum() / maps[rows][:, real].sum() if rows.any() else torch.tensor(1.0))
        out.append(torch.stack(share))
    return torch.stack(out)


def peak(ref: Reference, need: Need, weights: Tensor, *_: Tensor) -> Tensor:
    rows = question(ref) if need.measure.question else ref.valid & ~ref.visual
    return torch.stack([m[r].max(0).values for m, r in zip(weights.mean(1), rows, strict=True)])


def of_question(ref: Reference, need: Need, weights: Tensor, *_: Tensor) -> Tensor:
    return torch.stack([m[r].mean(0) for m, r in zip(weights.mean(1), question(ref), strict=True)])


def last_row(ref: Reference, weights: Tensor) -> Tensor:
    return torch.stack([w[:, at] for w, at in zip(weights, ref.last.tolist(), strict=True)])


def last_logits(ref: Reference, need: Need, weights: Tensor, *_: Tensor) -> Tensor:
    """Logits are known but for a constant: that of the last token against itself is taken off (see `settled`)."""
    row = last_row(ref, weights).log()
    return torch.stack([(r - r[:, at : at + 1]).T for r, at in zip(row, ref.last.tolist(), strict=True)])


def value_logits(ref: Reference, need: Need, weights: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    own = torch.stack([v[:, at] for v, at in zip(value, ref.last.tolist(), strict=True)])
    return torch.einsum("bhd,bhkd->bkh", own, value) / value.shape[-1] ** 0.5


def query_row(ref: Reference, need: Need, weights: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Logits are linear in the query: those of the mean query are the mean of all logits, known from the maps up to a constant."""
    return weights.log().mean(2).softmax(-1).mean(1)


BY_MAP: dict[str, Callable[..., Tensor]] = {
    "_cls_attention": lambda ref, need, w, *_: w[:, :, 0].mean(1),
    "_received_attention": lambda ref, need, w, *_: w.mean((1, 2)),
    "_mean_query_attention": query_row,
    "_mean_keys": lambda ref, need, w, q, k, v: k.mean(1),
    "_mean_values": lambda ref, need, w, q, k, v: v.mean(1),
    "_wide_keys": lambda ref, need, w, q, k, v: k.transpose(1, 2).flatten(2),
    "_all_keys": lambda ref, need, w, q, k, v: k.transpose(1, 2).flatten(2),
    "_cls_value_affinity": lambda ref, need, w, q, k, v: (v[:, :, :1] @ v.transpose(2, 3)).softmax(-1).mean(1)[:, 0],
    "_last_attention": lambda ref, need, w, *_: last_row(ref, w).mean(1),
    "_last_logits": last_logits,
    "_last_value_logits": value_logits,
    "_all_values": lambda ref, need, w, q, k, v: v.mean(1),
    "_modality_mass": mass,
    "_PeakTextAttention": peak,
    "_question_attention": of_question,
}


# ----------------------------------------------------------------------------------------------------------------- tests
def compare(name: str, model: nn.Module, inputs: dict[str, Tensor], needs: tuple[Need, ...]) -> int:
    """Check every signal of every image; return how many were checked."""
    ref = Reference(name, model, inputs)
    got = shown(model, inputs, needs)
    owner, columns = slots_of(ref)
    checked = 0
    for need in needs:
        if need.source == "vision":
            expected = ref.vision(need)
        elif need.measure is signals._key_norm:
            expected = key_norms(ref, need)
        else:
            all_tokens = ref.text(need)
            expected = [
                all_tokens[row] if need.axis == "row" else all_tokens[row, at] for row, at in zip(owner, columns, strict=True)
            ]
        for image, (one, want) in enumerate(zip(got, expected, strict=True)):
            value = one[need.name]
            if need.measure is signals._last_logits:  # the maps know them but for a constant, and only where one may look
                value, want = (torch.where(want.isfinite(), t, torch.nan) for t in (value, want))
                value, want = (t - t.nanmean(0, keepdim=True) for t in (value, want))
            if any(other.measure is signals._key_norm for other in need.uses) and image == 2:
                continue  # of a row with padding: as below, and it is not listed by itself
            assert value.shape == want.shape and value.dtype == want.dtype or value.is_floating_point(), need.name
            rough = isinstance(need.measure, signals._Sensitivity)  # differences of close numbers
            torch.testing.assert_close(
                value.double(),
                want.double(),
                rtol=1e-2 if rough else 1e-3,
                atol=1e-2 if rough else 1e-4,
                equal_nan=True,
                msg=lambda m, n=need, i=image: f"{n.name} {n.measure}, image {i}: {m}",
            )
            checked += 1
    return checked


def slots_of(ref: Reference) -> tuple[list[int], list[Tensor]]:
    """Row and columns of every image."""
    row, column = ref.visual.nonzero(as_tuple=True)
    owner, columns, start = [], [], 0
    for slots in ref.described.slots:
        owner.append(int(row[start]))
        columns.append(column[start : start + len(slots)])
        start += len(slots)
    return owner, columns


def key_norms(ref: Reference, need: Need) -> list[Tensor]:
    """Norms do not depend on padding: those of the second row are of that row alone."""
    ids = ref.inputs["input_ids"][1:, ref.valid[1]]
    case = CASES[ref.name]
    one = {**case.one(ref.inputs, ref.model, 2), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    alone = Reference(ref.name, ref.model, one | case.extra(ids, ids.shape[1]))
    assert ref.valid[0].all() and not ref.valid[1].all()
    out = []
    for image, (row, at) in enumerate(zip(*slots_of(ref), strict=True)):
        of, at = (alone, slots_of(alone)[1][0]) if image == 2 else (ref, at)
        ((_, key, *_),) = of.calls[id(of.family.text_attention[need.layer])]
        out.append(key[0 if image == 2 else row].abs().sum((0, 2))[at])
    return out


def sees_all_before_it(name: str, need: Need) -> bool:
    """Whether a token sees exactly those before it in the layer of a need; elsewhere see `test_previews.py`."""
    kinds = getattr(text_of(model_of(name)).config, "layer_types", None)
    return name != "paligemma" and (not kinds or kinds[need.layer] == "full_attention")


@pytest.mark.parametrize("name", FAMILIES)
def test_signals_are_those_of_eager_attention(name):
    model = model_of(name)
    inputs = make_inputs(name, model, images=[2, 1])
    needs = tuple(n for n in all_needs(name) if n.of != "preview" or sees_all_before_it(name, n))
    if CASES[name].positions is not None:  # whose rows do not begin at position 0
        needs = tuple(n for n in needs if signals._key_norm not in (n.measure, *(other.measure for other in n.uses)))
        needs = tuple(n for n in needs if n.of != "rotation")
    assert compare(name, model, inputs, needs) >= 3 * 24


@pytest.mark.parametrize("impl", ["eager", "fake_flash"])
def test_other_attention_gives_the_same_signals(impl):
    """What is listened to has other masks, or none."""
    for name in ("llava", "gemma3"):
        if impl == "fake_flash" and name == "gemma3":
            continue  # its tokens of an image see each other, which FlashAttention cannot do
        model = model_of(name, impl)
        needs = tuple(n for n in all_needs(name) if n.source == "text" and (n.of != "preview" or sees_all_before_it(name, n)))
        compare(name, model, make_inputs(name, model, images=[2, 1]), needs)


# --------------------------------------------------------------------------------------- behind a reducer in the tower
# the CLIP of 4.57 hands out no map of its attention here
@pytest.mark.parametrize(
    "name", ["llava_siglip", *(["llava", "llava_next"] if upstream.parameters(CLIPLayer)[-1] == "kwargs" else [])]
)
def test_signals_of_a_tower_whose_views_hold_different_numbers(name):
    """Padding of a view that dropped more must not stand where one of its patches lives."""
    model = shared(name)
    sizes = [[40, 56], [56, 30], [28, 56]] if CASES[name].anyres else None
    inputs = make_inputs(name, model, images=[2, 1], sizes=sizes)
    picker = EncoderPicker(keep=0.5, ragged=True, newlines="none")
    facts = family_of(model).facts
    wanted = (signals.keys(2), signals.keys(3), signals.values(3), signals.received_attn(2))
    wanted += (signals.cls_attn(2), signals.cls_attn(3, substitute=False), signals.wide_keys(3)) if facts.has_cls else ()
    needs = tuple(dataclasses.replace(n, name=f"{n.name}_{n.layer}") for n in wanted)
    spy = Spy(asked=needs)
    with vtc.patch(model, [picker, spy]) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.stats.kept

    plan = plan_of(model, inputs, [picker], marks_of(model, inputs))
    head = int(facts.has_cls)
    gone = {layer: hidden[:, head:] for layer, hidden in plan.tower.items()}
    counts = (~gone[2]).sum(1).tolist()
    assert len(set(counts)) > 1, "the views must differ"
    with oracle_model(model, plan) as twin, torch.no_grad():
        maps, keys, values = {}, {}, {}
        for layer in (2, 3):
            attention = tower_layers(twin)[layer].self_attn
            attention.register_forward_hook(lambda m, a, out, layer=layer: maps.__setitem__(layer, out[1]))
            attention.k_proj.register_forward_hook(lambda m, a, out, layer=layer: keys.__setitem__(layer, out))
            attention.v_proj.register_forward_hook(lambda m, a, out, layer=layer: values.__setitem__(layer, out))
        twin(**inputs)
    heads = attention.num_heads

    def split(t: Tensor) -> Tensor:  # (views, patches, heads, d)
        return t.unflatten(-1, (heads, -1))[:, head:]

    alive = (~gone[2]).double()
    rows = torch.cat([torch.ones_like(alive[:, :head]), alive], 1)
    received = (maps[2].mean(1) * rows[:, :, None]).sum(1) / rows.sum(1, keepdim=True)
    expected = {
        "keys_2": split(keys[2]).mean(2), "keys_3": split(keys[3]).mean(2), "values_3": split(values[3]).mean(2),
        "wide_keys_3": keys[3][:, head:], "received_attn_2": received[:, head:],
        "cls_attn_2": maps[2][:, :, 0, head:].mean(1), "cls_attn_3": maps[3][:, :, 0, head:].mean(1),
    }  # fmt: skip
    # images of one geometry with equally many tokens are shown together, in order
    shown = {(id(s.layout), s.shape[1]): (s, iter(range(s.shape[0]))) for s in spy.seen}
    start = 0
    for image in kept:
        layout, (seen, rows) = image.layout, shown[id(image.layout), len(image.entries)]
        row = next(rows)
        entries = seen.entries[row]
        place = start + layout.view[entries] * 16 + layout.row[entries] * 4 + layout.col[entries]
        assert (~gone[2]).flatten()[place].all()
        for need in needs:
            got, want = seen.taps[need.name][row], expected[need.name].flatten(0, 1)[place]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=lambda m, n=need: f"{n.name}: {m}")
        start += layout.views * 16
