"""Several forwards on one cache: prefixes, a second reduction after a ragged first one, masks of two and of four dimensions.

What a conversation gives, turn by turn and then token by token, equals what the slow reference gives for all of it at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from models import DECODER_LAYERS, image_features, make_inputs, set_attention, shared, visual_of
from pickers import BoundaryPicker, DecoderPicker, EncoderPicker, marks_of
from reference import oracle_model, plan_of, recorded, suppressed
from test_signals import Spy
from torch import Tensor, nn

import vtc
from vtc import signals
from vtc.core import Reducer

TOLERANCE = 1e-5
STEPS = 3
MASKS = ("2-D", "bool", "additive")

ORIGINAL = (
    BoundaryPicker(keep=0.6, ragged=True, positions="original"),
    DecoderPicker(keep=0.3, layer=3, salt=2, ragged=True, positions="original"),
)
KINDS: dict[str, tuple[Reducer, ...]] = {
    "original": ORIGINAL,
    "compact": tuple(replace(p, positions="compact") for p in ORIGINAL),
    "merge": (DecoderPicker(keep=0.4, merge=True, ragged=True, positions="original"),),
    "encoder": (
        EncoderPicker(keep=0.5, ragged=True),
        DecoderPicker(keep=0.2, layer=3, salt=2, ragged=True, positions="original"),
    ),
}


@dataclass
class Talk:
    """Turns of two rows: the first is padded on the left, later ones have one length.

    Attributes
    ----------
    ids, mask : list of Tensor
        Of each turn, ``(B, q)``.
    pixels : list of Tensor or None
        Pictures of each turn, in order of rows.
    whole : dict
        All of it as one prompt.
    """

    ids: list[Tensor]
    mask: list[Tensor]
    pixels: list[Tensor | None]
    whole: dict[str, Tensor]


def talk(model: nn.Module, turns: list[list[int]], seed: int = 0) -> Talk:
    """Make up a conversation; a turn is the number of pictures of each row (as many as in the others, but in the first)."""
    generator = torch.Generator().manual_seed(seed)
    ids, masks, rows = [], [], [[] for _ in turns[0]]
    pixels: list[Tensor | None] = []
    for number, images in enumerate(turns):
        made = make_inputs("llava", model, images=images, seed=seed + number) if number == 0 or any(images) else None
        if number == 0:
            assert made is not None
            turn, mask = made["input_ids"], made["attention_mask"]
        else:  # the same text length for all rows
            slots = len(image_features(model, made)[0]) if made is not None else 0
            words = torch.randint(3, 90, (len(images), 7), generator=generator)
            image = torch.full((len(images), slots * images[0]), 100)
            turn = torch.cat([words[:, :3], image, words[:, 3:]], 1)
            mask = torch.ones_like(turn)
            assert len(set(images)) == 1
        taken = iter(made["pixel_values"]) if made is not None and "pixel_values" in made else iter(())
        own = [[next(taken) for _ in range(n)] for n in images]
        for row, mine in zip(rows, own, strict=True):
            row += mine
        ids.append(turn), masks.append(mask)
        pixels.append(torch.stack([p for mine in own for p in mine]) if any(images) else None)
    whole = {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(masks, 1)}
    whole["pixel_values"] = torch.stack([p for row in rows for p in row])
    return Talk(ids, masks, pixels, whole)


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def mask_of(kind: str, mask: Tensor, q: int, dtype: torch.dtype) -> Tensor:
    """The mask of the last ``q`` tokens: ``(B, K)`` as it is, or ``(B, 1, q, K)`` spelled out; padding sees itself alone."""
    if kind == "2-D":
        return mask
    keys = mask.shape[1]
    at = torch.arange(keys)
    allowed = (at <= at[:, None]) & mask.bool()[:, None, :] | torch.eye(keys, dtype=torch.bool)
    allowed = allowed[:, None, -q:]
    return allowed if kind == "bool" else torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def converse(model: nn.Module, said: Talk, mask: str) -> tuple[Tensor, Tensor, list]:
    """Logits of the last turn ``(B, q, V)`` and of the greedy steps behind it ``(B, STEPS, V)``; the cache's layers."""
    seen, cache, out = torch.empty(len(said.ids[0]), 0, dtype=torch.long), None, None
    dtype = model.dtype
    with torch.no_grad():
        for ids, own, pixels in zip(said.ids, said.mask, said.pixels, strict=True):
            seen = torch.cat([seen, own], 1)
            given = {"input_ids": ids, "attention_mask": mask_of(mask, seen, ids.shape[1], dtype)}
            given |= {} if pixels is None else {"pixel_values": pixels}
            positions = positions_of(seen)[:, -ids.shape[1] :]
            out = model(**given, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        last, steps = out.logits, []
        logits = last[:, -1]
        for _ in range(STEPS):
            token = suppressed(logits).argmax(-1, keepdim=True)
            seen = torch.cat([seen, torch.ones_like(token)], 1)
            given = {"input_ids": token, "attention_mask": mask_of(mask, seen, 1, dtype)}
            logits = model(**given, position_ids=positions_of(seen)[:, -1:], past_key_values=cache, use_cache=True).logits[
                :, -1
            ]
            steps.append(logits)
    return last, torch.stack(steps, 1), cache.layers


def expected(model: nn.Module, said: Talk, plan) -> tuple[Tensor, Tensor]:
    """The same from the slow reference, which sees everything at once and hides what is gone."""
    ids, mask, q = said.whole["input_ids"], said.whole["attention_mask"], said.ids[-1].shape[1]
    steps, last = [], None
    with oracle_model(model, plan) as twin, torch.no_grad():
        for _ in range(STEPS + 1):
            given = {**said.whole, "input_ids": ids, "attention_mask": mask}
            logits = twin(**given, position_ids=positions_of(mask), use_cache=False).logits
            last = logits[:, -q:] if last is None else last
            steps.append(logits[:, -1])
            token = suppressed(steps[-1]).argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return last, torch.stack(steps[1:], 1)


CONVERSATIONS = {
    "one turn": [[1, 2]],
    "a prefix of text": [[0, 0], [1, 1]],
    "a ragged reduction, then another": [[2, 1], [1, 1]],
    "pictures in one row only, then in both": [[0, 1], [1, 1]],
    "two reductions around text": [[1, 2], [0, 0], [1, 1]],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_equals_all_of_it_at_once(kind, conversation, mask):
    check(kind, conversation, mask, "sdpa")


@pytest.mark.parametrize(("impl", "mask"), [("eager64", "2-D"), ("eager64", "additive"), ("fake_flash", "2-D")])
@pytest.mark.parametrize("conversation", list(CONVERSATIONS)[1:3])
@pytest.mark.parametrize("kind", ["original", "compact"])
def test_a_conversation_under_other_attention(kind, conversation, impl, mask):
    check(kind, conversation, mask, impl)


@functools.cache
def reference(kind: str, conversation: str):
    """What is said, what is dropped, and what comes of it."""
    model = shared("llava")
    said = talk(model, CONVERSATIONS[conversation])
    plan = plan_of(model, said.whole, KINDS[kind], marks_of(model, said.whole))
    return said, plan, *expected(model, said, plan)


@functools.cache
def unreduced(conversation: str) -> tuple[Tensor, Tensor]:
    model = shared("llava")
    return converse(model, talk(model, CONVERSATIONS[conversation]), "2-D")[:2]


def check(kind: str, conversation: str, mask: str, impl: str) -> None:
    model, parts = shared("llava", impl), KINDS[kind]
    said, plan, want, want_steps = reference(kind, conversation)
    plain, plain_steps = unreduced(conversation)
    with vtc.patch(model, list(parts)):
        got, got_steps, layers = converse(model, said, mask)
    q = said.ids[-1].shape[1]
    kept = said.mask[-1].bool() & ~plan.hide[DECODER_LAYERS - 1][:, -q:]
    assert (got - want)[kept].abs().max() < TOLERANCE
    assert (got_steps - want_steps).abs().max() < TOLERANCE
    assert (plain[:, -1] - got[:, -1]).abs().max() > 1e-3 and (plain_steps - got_steps).abs().max() > 1e-3
    real = said.whole["attention_mask"].bool()
    for i, layer in enumerate(layers):  # no more than what is left of every turn, each as long as its longest row
        held, start = 0, 0
        for ids in said.ids:
            at = slice(start, start + ids.shape[1])
            alive = real[:, at] & ~plan.hide[i][:, at] if i in plan.hide else real[:, at]
            held += int(alive.sum(1).max()) if visual_of({"input_ids": ids}).any() and i in plan.hide else ids.shape[1]
            start = at.stop
        assert layer.keys.shape[-2] == held + STEPS, i


# --------------------------------------------------------------------------------------------------------------- signals
NEEDS = (
    signals.last_attn(2), signals.last_value_logits(2), signals.text_values(3), signals.peak_text_attn(3),
    signals.peak_text_attn(1, question=False),
)  # fmt: skip


@pytest.mark.parametrize(
    ("impl", "mask"), [("sdpa", "2-D"), ("sdpa", "bool"), ("sdpa", "additive"), ("fake_flash", "2-D"), ("eager64", "2-D")]
)
@pytest.mark.parametrize("prefix", [[0, 0], [2, 1]], ids=["text", "pictures"])
def test_signals_behind_a_prefix_count_the_tokens_of_the_cache(impl, mask, prefix):
    """Attention of the new prompt runs over what the cache holds, too, and over none of its padding."""
    model = shared("llava", impl)
    said = talk(model, [prefix, [1, 1]], seed=2)
    names = tuple(replace(n, name=f"{n.name}_{i}") for i, n in enumerate(NEEDS))
    spy = Spy(asked=names)
    with vtc.patch(model, spy):
        converse(model, said, mask)
    twin = shared("llava", "sdpa")
    set_attention(twin, "recorded")
    try:
        with recorded() as calls, torch.no_grad():
            twin(**said.whole, position_ids=positions_of(said.whole["attention_mask"]), use_cache=False)
    finally:
        set_attention(twin, "sdpa")
    (seen,) = spy.seen[-1:]
    q = said.ids[-1].shape[1]
    visual = visual_of({"input_ids": said.ids[-1]})
    for row in range(2):
        columns = visual[row].nonzero()[:, 0]
        text = (~visual[row]).nonzero()[:, 0]
        for need in names:
            attention = twin.model.language_model.layers[need.layer].self_attn
            ((_, _, value, _, _, weights),) = calls[id(attention)]
            maps = weights[row].mean(0)[-q:, -q:]
            name = need.name.rsplit("_", 1)[0]
            if name == "last_attn":
                want = maps[-1, columns]
            elif name == "peak_text_attn":
                rows = text[text > columns[-1]] if need.measure.question else text
                want = maps[rows][:, columns].max(0).values
            else:
                v = value[row][:, -q:]
                want = v.mean(0)[columns] if name == "text_values" else (v[:, -1:] @ v.mT)[:, 0, columns].T / v.shape[-1] ** 0.5
            got = seen.taps[need.name][row]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, msg=lambda m, n=need: f"{n.name}: {m}")
