"""What tests of single methods share: signals and layouts made of plain tensors, and what every method shows inside a model."""

from __future__ import annotations

from typing import Any

import torch
from models import image_features, make_inputs, shared
from torch import Tensor

import vtc
from vtc.core import Layout, Reducer, Signals


def signals(
    features: Tensor, budget: int, layout: Layout | None = None, *, marks: tuple[int, ...] = (), **taps: Tensor
) -> Signals:
    """Images with all their tokens ``(B, N, D)``, and the signals of these; ``marks`` are their fingerprints."""
    batch, n = features.shape[:2]
    return Signals(
        features=features,
        layout=layout or Layout.flat(n),
        entries=torch.arange(n).expand(batch, n),
        budget=budget,
        slots=n,
        taps=taps,
        fingerprint=marks,
    )


def crops(rows: int, cols: int, views: int, *, hidden: tuple[int, ...] = ()) -> Layout:
    """A thumbnail and crops side by side, without newlines; ``hidden`` entries are padding without a slot."""
    n = torch.arange(rows * cols * views)
    view, r, c = n // (rows * cols), n % (rows * cols) // cols, n % cols
    slot = torch.ones_like(n)
    slot[list(hidden)] = 0
    slot = torch.where(slot > 0, slot.cumsum(0) - 1, -1)
    x = c + (view - 1).clamp(min=0) * cols
    return Layout(torch.zeros_like(n), view, r, c, r, x, slot, ((rows, cols),) * views, True)


def check_batch_mates(reducer: Reducer, asked: Signals) -> None:
    """Every image of a batch is reduced as it is alone."""
    together = reducer.select(asked)
    for b in range(len(asked.features)):
        at = slice(b, b + 1)
        taps = {k: v[at].clone() for k, v in asked.taps.items()}
        alone = reducer.select(signals(asked.features[at].clone(), asked.budget, asked.layout, **taps))
        real = slice(None) if together.valid is None else together.valid[b]
        assert torch.equal(alone.index[0], together.index[b, real])
        if alone.features is not None:
            assert torch.equal(alone.features[0], together.features[b, real])
        if alone.owner is not None:
            assert torch.equal(alone.owner[0], together.owner[b])


def check_inside_a_model(family: str, name: str, keep: int | float, *, exact: bool = True, **options: Any) -> None:
    """The prompt's pass and an answer are finite, changed and as long as ever; images keep (exactly) what was asked for."""
    model = shared(family)
    inputs = make_inputs(family, model, 2)
    with torch.no_grad():
        plain = model(**inputs).logits
        with vtc.patch(model, name, keep=keep, **options) as handle:
            short = model(**inputs).logits
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        call = handle.stats.last
    real = inputs["attention_mask"].bool()
    assert torch.isfinite(short[real]).all()
    assert not torch.equal(short[real], plain[real])
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    for image, features in zip(call.images, image_features(model, inputs), strict=True):
        assert 1 <= image.kept < len(features)
        if exact and handle.reducer.newline_policy == "none":
            assert image.kept == (keep if isinstance(keep, int) else round(keep * len(features)))
