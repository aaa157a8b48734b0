"""Pictures of what a reducer kept: surviving tokens in colour, dropped ones dimmed, merged groups outlined.

The picture shows what the vision tower was given (resized, cropped, cut into views), undone from ``pixel_values``: every token then
sits exactly on the patch it stands for, whatever the processor did to the original. Needs Pillow and torch only.

>>> kept = handle.stats.kept[0]
>>> views = unprocess(inputs["pixel_values"], processor.image_processor)
>>> overlay(views, kept.layout, kept.entries, kept.owner).save("kept.png")
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vtc.core import Kind, Layout

CELL = 24
"""Smallest side of one token's cell in pixels; small inputs are enlarged to it."""
_GROUND = (24, 26, 31)
_PAPER = (255, 255, 255)
_INK = (40, 42, 48)
_KEPT_EDGE = (255, 255, 255)
_NEWLINE, _NO_NEWLINE = (255, 196, 46), (225, 226, 230)
_DIM = 0.76  # share of the ground colour in a dropped cell
_SHADE = 0.40  # the same in a cell that was merged into another
_GAP, _MARGIN, _LINE = 16, 12, 22


@dataclass(frozen=True, eq=False)
class _Panel:
    """One picture with a token grid on it."""

    picture: Image.Image
    rows: int
    cols: int
    slots: Tensor  # (n,) slots drawn here
    row: Tensor  # (n,) their cells
    col: Tensor
    newline: Tensor  # (n,) bool: drawn in the strip to the right of the grid
    title: str


def unprocess(pixel_values: Tensor, image_processor: Any) -> list[Image.Image]:
    """Turn a processor's output back into pictures, one per view.

    Parameters
    ----------
    pixel_values : Tensor
        ``(V, 3, H, W)`` views of one image, or ``(1, V, 3, H, W)`` (AnyRes; views beyond the layout's are padding).
    image_processor : object
        Its ``do_normalize``, ``image_mean`` and ``image_std`` are undone.

    Returns
    -------
    list of Image
        RGB.
    """
    pixels = pixel_values.detach().float().cpu()
    if pixels.dim() == 5:
        pixels = pixels[0]
    if getattr(image_processor, "do_normalize", True):
        mean = torch.tensor(getattr(image_processor, "image_mean", None) or [0.0, 0.0, 0.0]).view(1, 3, 1, 1)
        std = torch.tensor(getattr(image_processor, "image_std", None) or [1.0, 1.0, 1.0]).view(1, 3, 1, 1)
        pixels = pixels * std + mean
    if getattr(image_processor, "do_rescale", True):
        pixels = pixels * 255
    data = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(view.numpy()) for view in data]


def overlay(
    image: Image.Image | Sequence[Image.Image],
    layout: Layout,
    entries: Tensor,
    owner: Tensor | None = None,
    *,
    caption: str = "",
    show_input: bool = True,
) -> Image.Image:
    """Draw which tokens of one image survived.

    Parameters
    ----------
    image : Image or sequence of Image
        The view (or views, thumbnail first) as the vision tower was given them, see :func:`unprocess`.
    layout : Layout
        Slot layout of the image.
    entries : Tensor
        ``(n,)`` surviving slots.
    owner : Tensor or None
        ``(slots,)`` the surviving slot each slot was merged into, -1 if dropped; ``None``: nothing was merged.
    caption : str
        Line of text below the picture.
    show_input : bool
        Whether the untouched picture stands next to the marked one (plain images; for AnyRes the thumbnail and the stitched crops
        are marked side by side).

    Returns
    -------
    Image
        RGB.

    Raises
    ------
    ValueError
        If there are fewer pictures than views.
    """
    views = [image] if isinstance(image, Image.Image) else list(image)
    if len(views) < layout.views:
        raise ValueError(f"the layout has {layout.views} views and {len(views)} were given: pass all views, thumbnail first")
    fate = _Fate.of(entries.cpu(), owner)
    panels = _panels(views, layout)
    pictures = [(panel.title, _draw(panel, fate)) for panel in panels]
    if fate.homeless:
        caption += f" ({fate.homeless} of the tokens stand{'s' * (fate.homeless == 1)} for no patch)"
    if show_input and len(panels) == 1:
        pictures.insert(0, ("what the vision tower sees", panels[0].picture))
    return _assemble(pictures, caption)


# ------------------------------------------------------------------------------------------------------------- panels
def _panels(views: list[Image.Image], layout: Layout) -> list[_Panel]:
    """Lay the views out: thumbnail and stitched crops, or every view for itself."""
    slots = torch.arange(len(layout))
    newline = layout.kind == Kind.NEWLINE
    patch = layout.kind == Kind.PATCH
    if not layout.thumbnail:
        panels = []
        for view, (rows, cols) in enumerate(layout.grids):
            here = patch & (layout.view == view)
            mine = here | newline if layout.views == 1 else here
            at = torch.where(newline, layout.y, layout.row)
            title = "kept tokens" if layout.views == 1 else f"view {view + 1}"
            picture = _enlarge(views[view], rows, cols)
            panels.append(_Panel(picture, rows, cols, slots[mine], at[mine], layout.col[mine], newline[mine], title))
        return panels
    rows, cols = layout.grids[0]
    first = patch & (layout.view == 0)
    thumb = _enlarge(views[0], rows, cols)
    row, col = layout.row[first], layout.col[first]
    panels = [_Panel(thumb, rows, cols, slots[first], row, col, torch.zeros_like(row, dtype=torch.bool), "thumbnail")]
    # the crops, put together; what unpadding removed has no slot and is cut off
    crops = patch & (layout.view > 0)
    y, x = layout.y[crops], layout.x[crops]
    top, left, high, wide = int(y.min()), int(x.min()), int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1
    height, width = views[0].height // rows, views[0].width // cols
    stitched = Image.new("RGB", (wide * width, high * height), _GROUND)
    for view in range(1, layout.views):
        of = layout.view == view
        if bool(of.any()):
            corner = int((layout.x - layout.col)[of][0]) - left, int((layout.y - layout.row)[of][0]) - top
            stitched.paste(views[view], (corner[0] * width, corner[1] * height))
    mine = crops | newline
    picture = _enlarge(stitched, high, wide)
    where = (layout.y - top)[mine], (layout.x - left)[mine]
    panels.append(_Panel(picture, high, wide, slots[mine], *where, newline[mine], "crops, stitched and unpadded"))
    return panels


def _enlarge(picture: Image.Image, rows: int, cols: int) -> Image.Image:
    """Scale so that every cell has the same whole number of pixels, at least :data:`CELL`."""
    cell = max(CELL, math.ceil(picture.width / cols), math.ceil(picture.height / rows))
    return picture.convert("RGB").resize((cols * cell, rows * cell), Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------------------ drawing
@dataclass(frozen=True, eq=False)
class _Fate:
    """What became of every slot.

    Attributes
    ----------
    alive : set of int
        Slots that hold a token.
    shown : set of int
        Slots whose own patch is a token of its own: drawn in full colour.
    group : dict
        Slot to the head of the group it was merged into; groups of at least two.
    heads : set of int
        Heads that are members of their own group: drawn with a dot.
    colours : dict
        Colour of every head's group; hues a golden angle apart, so that neighbours differ.
    homeless : int
        Tokens that stand for no patch at all, such as class tokens.
    """

    alive: set[int]
    shown: set[int]
    group: dict[int, int]
    heads: set[int]
    colours: dict[int, tuple[int, int, int]]
    homeless: int

    @staticmethod
    def of(entries: Tensor, owner: Tensor | None) -> _Fate:
        """Read survivors and owners. A merging method may put a token into a slot other than that of the patch it came from."""
        alive = set(entries.tolist())
        if owner is None:
            return _Fate(alive, alive, {}, set(), {}, 0)
        members: dict[int, list[int]] = {head: [] for head in sorted(alive)}
        for slot, head in enumerate(owner.tolist()):
            if head >= 0:
                members[head].append(slot)
        groups = {head: slots for head, slots in members.items() if len(slots) > 1}
        return _Fate(
            alive,
            {slots[0] for slots in members.values() if len(slots) == 1},
            {slot: head for head, slots in groups.items() for slot in slots},
            {head for head, slots in groups.items() if head in slots},
            {
                head: tuple(round(255 * c) for c in colorsys.hls_to_rgb(n * 0.618034 % 1.0, 0.58, 0.85))  # type: ignore[misc]
                for n, head in enumerate(groups)
            },
            sum(not slots for slots in members.values()),
        )


def _draw(panel: _Panel, fate: _Fate) -> Image.Image:
    """Mark one panel."""
    cell = panel.picture.width // panel.cols
    strip = max(6, cell // 3) if bool(panel.newline.any()) else 0
    ground = Image.new("RGB", panel.picture.size, _GROUND)
    dropped = Image.blend(panel.picture.convert("L").convert("RGB"), ground, _DIM)
    merged = Image.blend(panel.picture, ground, _SHADE)
    out = Image.new("RGB", (panel.picture.width + strip, panel.picture.height), _PAPER)
    out.paste(dropped, (0, 0))
    draw = ImageDraw.Draw(out)
    thick = max(1, cell // 16)
    group: dict[tuple[int, int], int] = {}
    dots: list[tuple[int, int, int]] = []
    for slot, row, col, newline in zip(
        panel.slots.tolist(), panel.row.tolist(), panel.col.tolist(), panel.newline.tolist(), strict=True
    ):
        if newline:
            box = (panel.picture.width + 2, row * cell + 2, panel.picture.width + strip - 1, (row + 1) * cell - 3)
            draw.rectangle(box, fill=_NEWLINE if slot in fate.alive else _NO_NEWLINE)
            continue
        box = (col * cell, row * cell, (col + 1) * cell, (row + 1) * cell)
        if slot in fate.shown or slot in fate.heads:
            out.paste(panel.picture.crop(box), box)
        elif slot in fate.group:
            out.paste(merged.crop(box), box)
        if slot in fate.shown:
            draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_KEPT_EDGE, width=1)
        if slot in fate.group:
            group[row, col] = fate.group[slot]
        if slot in fate.heads:
            dots.append((slot, row, col))
    for (row, col), head in group.items():
        same = [group.get((row + dr, col + dc)) == head for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        _outline(draw, row, col, cell, max(2, 2 * thick), fate.colours[head], same)
    for slot, row, col in dots:
        size = max(3, cell // 6)
        x, y = col * cell + cell // 2, row * cell + cell // 2
        draw.ellipse((x - size, y - size, x + size, y + size), fill=fate.colours[slot], outline=_KEPT_EDGE, width=thick)
    return out


def _outline(
    draw: ImageDraw.ImageDraw, row: int, col: int, cell: int, width: int, colour: tuple[int, int, int], same: list[bool]
) -> None:
    """Draw the sides (top, bottom, left, right) of a cell whose neighbour is not of the ``same`` group."""
    x0, y0, x1, y1 = col * cell, row * cell, (col + 1) * cell - 1, (row + 1) * cell - 1
    inner = width - 1
    sides = ((x0, y0, x1, y0 + inner), (x0, y1 - inner, x1, y1), (x0, y0, x0 + inner, y1), (x1 - inner, y0, x1, y1))
    for side, joined in zip(sides, same, strict=True):
        if not joined:
            draw.rectangle(side, fill=colour)


def _assemble(pictures: list[tuple[str, Image.Image]], caption: str) -> Image.Image:
    """Put panels side by side on white, titles above, the caption below."""
    width = sum(p.width for _, p in pictures) + _GAP * (len(pictures) - 1) + 2 * _MARGIN
    height = max(p.height for _, p in pictures)
    lines = _wrap(caption, width - 2 * _MARGIN) if caption else []
    page = Image.new("RGB", (width, height + 2 * _MARGIN + _LINE * (1 + len(lines))), _PAPER)
    draw = ImageDraw.Draw(page)
    x = _MARGIN
    for title, picture in pictures:
        draw.text((x, _MARGIN - 2), title, fill=_INK, font=_font())
        page.paste(picture, (x, _MARGIN + _LINE))
        x += picture.width + _GAP
    for n, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + _LINE * (1 + n) + height + 6), line, fill=_INK, font=_font())
    return page


def _wrap(text: str, width: int) -> list[str]:
    """Break a caption into lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font() -> Any:
    try:
        return ImageFont.load_default(size=14)
    except TypeError:  # Pillow 10.0 has one size only
        return ImageFont.load_default()
