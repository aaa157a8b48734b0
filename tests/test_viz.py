"""Pictures: every token on its patch, kept ones untouched, dropped ones dimmed, groups outlined; and what the engine reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import build, make_inputs, visual_of
from PIL import Image

import vtc
from vtc import viz
from vtc.core import Kind, Layout
from vtc.families import family_of
from vtc.stats import KeptTokens
from vtc.viz import overlay, unprocess

ROWS = COLS = 4


def colours(n: int, seed: int = 0) -> torch.Tensor:
    """``(n, 3)`` saturated colours, far apart."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(40, 90, (n, 3), generator=generator)
    base[torch.arange(n), torch.arange(n) % 3] += 140
    return base.to(torch.uint8)


def mosaic(cells: torch.Tensor, rows: int, cols: int, cell: int = viz.CELL) -> Image.Image:
    """A picture of constant cells."""
    pixels = cells.view(rows, cols, 3).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return Image.fromarray(pixels.numpy())


def at(
    picture: Image.Image, row: int, col: int, left: int = viz._MARGIN, dx: float = 0.5, dy: float = 0.3
) -> tuple[int, int, int]:
    """Colour inside a cell of the panel that starts at ``left`` (beside the dot in the middle)."""
    top = viz._MARGIN + viz._LINE
    return picture.getpixel((left + int((col + dx) * viz.CELL), top + int((row + dy) * viz.CELL)))


def close(a, b, by: int = 2) -> bool:
    return all(abs(int(x) - int(y)) <= by for x, y in zip(a, b, strict=True))


def grey(colour) -> bool:
    return max(colour) - min(colour) < 12 and max(colour) < 90


# ------------------------------------------------------------------------------------------------------ plain pictures
def test_kept_cells_are_untouched_and_dropped_ones_dimmed():
    cells = colours(16)
    kept = torch.tensor([0, 5, 6, 15])
    out = overlay(mosaic(cells, 4, 4), Layout.grid(4, 4), kept, show_input=False)
    for slot in range(16):
        seen = at(out, slot // 4, slot % 4)
        assert close(seen, cells[slot]) if slot in kept else grey(seen), slot


def test_the_input_stands_beside_it():
    cells = colours(16)
    out = overlay(mosaic(cells, 4, 4), Layout.grid(4, 4), torch.tensor([2]))
    right = viz._MARGIN + 4 * viz.CELL + viz._GAP
    assert all(close(at(out, slot // 4, slot % 4), cells[slot]) for slot in range(16))
    assert close(at(out, 0, 2, left=right), cells[2]) and grey(at(out, 3, 3, left=right))


def test_merged_groups_are_outlined_in_their_colour():
    cells = colours(16)
    kept = torch.tensor([0, 10])
    owner = torch.full((16,), -1)
    owner[[0]] = 0
    owner[[10, 11, 14]] = 10
    fate = viz._Fate.of(kept, owner)
    assert fate.shown == {0} and fate.heads == {10} and set(fate.group) == {10, 11, 14} and fate.homeless == 0
    out = overlay(mosaic(cells, 4, 4), Layout.grid(4, 4), kept, owner, show_input=False)
    colour = fate.colours[10]
    edge = 1 / viz.CELL  # a pixel inside the cell
    assert close(at(out, 2, 2, dx=edge, dy=0.5), colour) and close(at(out, 2, 2, dx=0.5, dy=edge), colour)
    assert not close(at(out, 2, 3, dx=edge, dy=0.5), colour), "no line between two members"
    assert close(at(out, 2, 3, dx=1 - edge, dy=0.5), colour)
    assert close(at(out, 2, 2, dx=0.5, dy=0.5), colour), "a dot on the token that stands for the group"
    assert close(at(out, 2, 2, dx=0.2, dy=0.2), cells[10]) and close(at(out, 0, 0), cells[0])
    member, there = at(out, 2, 3), cells[11]
    assert not grey(member) and all(int(m) < int(t) for m, t in zip(member, there, strict=True)), "members are shaded, not grey"
    assert grey(at(out, 0, 1))


def test_tokens_moved_to_other_slots_are_shown_where_they_came_from():
    # two tokens sit in slots 0 and 1 but came from patches 9 and {12, 13}; slot 2 holds a class token
    owner = torch.full((16,), -1)
    owner[9], owner[12], owner[13] = 0, 1, 1
    fate = viz._Fate.of(torch.tensor([0, 1, 2]), owner)
    assert fate.shown == {9} and set(fate.group) == {12, 13} and fate.heads == set() and fate.homeless == 1
    cells = colours(16)
    out = overlay(mosaic(cells, 4, 4), Layout.grid(4, 4), torch.tensor([0, 1, 2]), owner, show_input=False)
    assert close(at(out, 2, 1), cells[9]) and grey(at(out, 0, 0)) and grey(at(out, 0, 1))


def test_small_pictures_are_enlarged_and_captions_wrap():
    out = overlay(Image.new("RGB", (8, 8), (200, 30, 30)), Layout.grid(4, 4), torch.tensor([0]), show_input=False)
    assert out.width == 4 * viz.CELL + 2 * viz._MARGIN
    longer = overlay(
        Image.new("RGB", (8, 8)), Layout.grid(4, 4), torch.tensor([0]), caption="many words " * 6, show_input=False
    )
    assert longer.width == out.width and longer.height > out.height + viz._LINE


def test_missing_views_are_refused(next_model):
    inputs = make_inputs("llava_next", next_model)
    layout = _describe(next_model, inputs).slots[0]
    with pytest.raises(ValueError, match="5 views and 1 were given"):
        overlay(Image.new("RGB", (28, 28)), layout, torch.arange(3))


# -------------------------------------------------------------------------------------------------------------- AnyRes
@pytest.fixture(scope="module")
def next_model():
    return build("llava_next", dtype=torch.float32)


def _describe(model, inputs):
    return family_of(model).describe({k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")})


class Plain:
    """An image processor that only divides by 255."""

    do_normalize, do_rescale = False, True


@pytest.mark.parametrize("size", [[40, 56], [56, 30], [20, 56]])
def test_anyres_every_token_lies_on_its_own_patch(next_model, size):
    inputs = make_inputs("llava_next", next_model, sizes=[size])
    layout = _describe(next_model, inputs).slots[0]
    views = layout.views
    cells = colours(views * 16, seed=1)  # one colour per patch of every view
    pixels = cells.view(views, 4, 4, 3).repeat_interleave(7, 1).repeat_interleave(7, 2).permute(0, 3, 1, 2) / 255
    pictures = unprocess(torch.cat([pixels, torch.zeros(1, 3, 28, 28)])[None], Plain())  # the processor pads with zero views
    panels = viz._panels(pictures, layout)
    assert [p.title for p in panels] == ["thumbnail", "crops, stitched and unpadded"]
    drawn = torch.cat([p.slots for p in panels])
    assert drawn.sort().values.tolist() == list(range(len(layout))), "every slot is drawn once"
    for panel in panels:
        cell = panel.picture.width // panel.cols
        for slot, row, col, newline in zip(
            *(t.tolist() for t in (panel.slots, panel.row, panel.col, panel.newline)), strict=True
        ):
            if newline:
                assert layout.kind[slot] == Kind.NEWLINE
                continue
            own = int(layout.view[slot]) * 16 + int(layout.row[slot]) * 4 + int(layout.col[slot])
            seen = panel.picture.getpixel((col * cell + cell // 2, row * cell + cell // 2))
            assert close(seen, cells[own], 6), (slot, seen, cells[own])


def test_anyres_newlines_show_beside_the_crops(next_model):
    inputs = make_inputs("llava_next", next_model, sizes=[[40, 56]])
    layout = _describe(next_model, inputs).slots[0]
    newlines = (layout.kind == Kind.NEWLINE).nonzero()[:, 0]
    pictures = [Image.new("RGB", (28, 28), (90, 160, 90))] * layout.views
    out = overlay(pictures, layout, newlines[:1])
    strip = viz._MARGIN + 4 * viz.CELL + viz._GAP + int(layout.x[layout.view > 0].max() + 1) * viz.CELL + 4
    assert close(at(out, 0, 0, left=strip, dx=0), viz._NEWLINE) and close(at(out, 1, 0, left=strip, dx=0), viz._NO_NEWLINE)


def test_frames_get_a_panel_each():
    one = Layout.grid(2, 2)
    parts = {f: torch.cat([getattr(one, f)] * 3) for f in ("kind", "row", "col", "y", "x")}
    layout = Layout(**parts, view=torch.arange(12) // 4, slot=torch.arange(12), grids=((2, 2),) * 3)
    panels = viz._panels([Image.new("RGB", (20, 20))] * 3, layout)
    assert [p.slots.tolist() for p in panels] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


# --------------------------------------------------------------------------------------------------------- unprocessing
def test_unprocess_undoes_the_processor():
    _, processor = vtc.load_pocket()
    cells = colours(196)
    picture = mosaic(cells, 14, 14, cell=8)  # 112 pixels: the processor need not resize
    pixels = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    (back,) = unprocess(pixels, processor.image_processor)
    assert back.size == picture.size
    assert np.abs(np.asarray(back, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1


# -------------------------------------------------------------------------------------------- what the engine reports
@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("reducer", ["uniform", "fastv", "gridpool", "visionzip", "downsample", "flowcut"])
def test_kept_tokens_agree_with_the_statistics(name, reducer, next_model):
    model = next_model if name == "llava_next" else build(name, dtype=torch.float32)
    inputs = make_inputs(name, model, batch=2)
    with vtc.patch(model, reducer, keep=0.4) as handle, torch.no_grad():
        model(**inputs)
        images, kept = handle.stats.last.images, handle.stats.kept
    assert len(kept) == len(images) == 3
    for image, tokens in zip(images, kept, strict=True):
        assert tokens.row == image.row and len(tokens.layout) == image.slots
        assert len(tokens.entries) == image.kept < image.slots
        assert (tokens.entries.diff() > 0).all() and 0 <= tokens.entries.min() <= tokens.entries.max() < image.slots
        if reducer in ("gridpool", "visionzip", "downsample"):
            assert set(tokens.owner.tolist()) - {-1} <= set(tokens.entries.tolist())
            patch = tokens.layout.kind == Kind.PATCH
            if (reducer, name) != ("downsample", "llava_next"):  # there a block's own cell may be unpadded away
                assert (tokens.owner[patch] >= 0).all(), "a merging method accounts for every patch"
        else:
            assert tokens.owner is None
        overlay([Image.new("RGB", (28, 28))] * tokens.layout.views, tokens.layout, tokens.entries, tokens.owner)


def test_downsample_groups_are_the_blocks_of_the_smaller_grid():
    model = build("llava", dtype=torch.float32)
    with vtc.patch(model, "downsample", keep=4) as handle, torch.no_grad():
        model(**make_inputs("llava", model))
        (tokens,) = handle.stats.kept
    owner = tokens.owner.view(4, 4)
    for rows in (slice(0, 2), slice(2, 4)):
        for cols in (slice(0, 2), slice(2, 4)):
            block = owner[rows, cols]
            assert block.unique().numel() == 1 and int(block[0, 0]) in tokens.entries.tolist()
    assert owner.unique().numel() == 4


def test_owner_follows_tokens_through_several_stages():
    # six slots: 0, 1 -> 1; 2, 3 -> 3; 4 discarded; 5 not a candidate. Then 3 is merged into 1, and 5 is dropped.
    first = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 3]), torch.tensor([0, 0, 1, 1, -1])
    second = torch.tensor([1, 3, 5]), torch.tensor([0]), torch.tensor([0, 0, -1])
    layout = Layout.flat(6)
    assert KeptTokens(0, layout, torch.tensor([1, 3, 5]), [first]).owner.tolist() == [1, 1, 3, 3, -1, 5]
    assert KeptTokens(0, layout, torch.tensor([1]), [first, second]).owner.tolist() == [1, 1, 1, 1, -1, -1]
    # a stage that only selects shows through the survivors
    assert KeptTokens(0, layout, torch.tensor([3]), [first]).owner.tolist() == [-1, -1, 3, 3, -1, -1]
    # padding patches of a tower have no slot
    padded = torch.tensor([-1, 0, 1]), torch.tensor([1]), torch.tensor([0, 0, 0])
    assert KeptTokens(0, Layout.flat(2), torch.tensor([0]), [padded]).owner.tolist() == [0, 0]
    assert KeptTokens(0, layout, torch.tensor([1])).owner is None


def test_merging_then_dropping_inside_the_decoder():
    model = build("llava", dtype=torch.float32)
    members = [vtc.create("gridpool", keep=8), vtc.create("fastv", keep=3)]
    with vtc.patch(model, members) as handle, torch.no_grad():
        model(**make_inputs("llava", model))
        (tokens,) = handle.stats.kept
    owner = tokens.owner
    assert len(tokens.entries) == 3 and set(owner.tolist()) == {-1, *tokens.entries.tolist()}
    assert (owner[tokens.entries] == tokens.entries).all()


def test_only_the_last_call_with_images_is_remembered():
    model = build("llava", dtype=torch.float32)
    inputs = make_inputs("llava", model)
    with vtc.patch(model, "uniform", keep=5) as handle, torch.no_grad():
        model(**inputs)
        first = handle.stats.kept
        model(**inputs)
        assert handle.stats.kept is not first
        second = handle.stats.kept
        text = inputs["input_ids"][~visual_of(inputs)][None]
        model(input_ids=text)
        assert handle.stats.last.text_only and handle.stats.kept is second
        handle.stats.clear()
        assert handle.stats.kept == []
