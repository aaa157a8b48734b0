"""Index-preserving pruning of document pages: blocks without text never reach the language model, the others keep their places."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vtc.core import Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import compacted, topk_mask
from vtc.registry import register
from vtc.signals import PixelTap

BLOCK = 28
"""Side of a classified block in pixels: 2 x 2 patches of 14."""


class PatchClassifier(nn.Module):
    """Does a block of pixels show text? Layer norm over the block, one convolution as large as it, GELU, one linear layer.

    Parameters
    ----------
    features : int, default 256
        Channels of the convolution.
    size : int, default 28
        Side of a block in pixels.
    channels : int, default 3
        Colour channels.
    eps : float, default 1e-5
        Of the layer norm.
    """

    def __init__(self, features: int = 256, size: int = BLOCK, channels: int = 3, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((channels, size, size), eps=eps)
        self.conv = nn.Conv2d(channels, features, size, stride=size)
        self.fc = nn.Linear(features, 1)

    def forward(self, blocks: Tensor) -> Tensor:
        """Return logits ``(M,)`` of normalised blocks ``(M, channels, size, size)``; above 0 means text."""
        return self.fc(F.gelu(self.conv(self.norm(blocks)).flatten(1)))[:, 0]


def fit(
    classifier: nn.Module,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    epochs: int = 1000,
    batch: int = 256,
    rate: float = 1e-4,
    seed: int = 0,
) -> float:
    """Train a classifier as the authors do, and leave it with the weights that did best on the held-out blocks.

    AdamW, binary cross-entropy, batches drawn so that both classes are equally frequent, gradients clipped at norm 5. Blocks must
    be normalised as the model's image processor does, channels in its order; augment them beforehand (the authors use dropout of
    small squares, blur, noise and JPEG).

    Parameters
    ----------
    train, held_out : (Tensor, Tensor)
        Blocks ``(M, channels, size, size)`` and labels ``(M,)``, 1 for text; both classes must occur in ``train``.

    Returns
    -------
    float
        Best accuracy on the held-out blocks.
    """
    blocks, labels = train[0], train[1].to(train[0].dtype)
    generator = torch.Generator().manual_seed(seed)
    size = torch.bincount(labels.long().cpu(), minlength=2).to(torch.float32)
    if len(size) != 2 or not bool((size > 0).all()):
        raise ValueError("the training blocks must have labels 0 and 1, and some of each")
    weight = (1 / size)[labels.long().cpu()]
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate)
    best, state = -1.0, None
    for _ in range(epochs):
        classifier.train()
        order = torch.multinomial(weight, len(weight), replacement=True, generator=generator)
        for at in order.split(batch):
            loss = F.binary_cross_entropy_with_logits(classifier(blocks[at].float()), labels[at])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 5.0)
            optimizer.step()
        classifier.eval()
        with torch.no_grad():
            right = float(((classifier(held_out[0]) > 0) == (held_out[1] > 0)).double().mean())
        if right > best:
            best, state = right, copy.deepcopy(classifier.state_dict())
    if state is not None:
        classifier.load_state_dict(state)
    return best


class TextClassifier(nn.Module):
    """Does a block of pixels show text? Three small convolutions, each behind a GELU their mean and maximum, one linear layer.

    vtc's default is of this kind, since strokes look the same wherever in a block they are, which :class:`PatchClassifier`, whose
    one convolution is as large as the block, has to learn place by place.

    Parameters
    ----------
    widths : tuple of int, default (24, 40, 56)
        Channels of the convolutions.
    eps : float, default 1e-2
        Added to the variance when a block is scaled to mean 0 and variance 1: noise on blank paper stays small.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 40, 56), eps: float = 1e-2) -> None:
        super().__init__()
        self.eps = eps
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1)
            for before, after, stride in zip((3, *widths[:-1]), widths, (2, 2, 1), strict=True)
        )
        self.fc = nn.Linear(2 * widths[-1], 1)

    def forward(self, blocks: Tensor) -> Tensor:
        """Return logits ``(M,)`` of normalised blocks ``(M, 3, size, size)``; above 0 means text."""
        x = F.layer_norm(blocks, blocks.shape[1:], eps=self.eps)
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.fc(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))[:, 0]


@functools.lru_cache(maxsize=8)
def trained(device: str = "cpu") -> TextClassifier:
    """Return the classifier that comes with vtc, for inference; one copy per device (its card: ``vtc/assets/docprune``)."""
    from safetensors.torch import load

    weights = load((resources.files("vtc") / "assets" / "docprune" / "classifier.safetensors").read_bytes())
    classifier = TextClassifier(tuple(len(weights[f"convs.{i}.bias"]) for i in range(3)))
    classifier.load_state_dict(weights)
    return classifier.float().requires_grad_(False).eval().to(device)


def contrast(blocks: Tensor) -> Tensor:
    """Stand-in for a trained classifier: logarithm of ten times the standard deviation of a block's brightness, ``(M,)``.

    Above 0 where the normalised pixels vary by more than 0.1; a blank block has about -7.
    """
    return torch.log(10 * blocks.mean(1).flatten(1).std(1, correction=0) + 1e-3)


_NOTES = {
    "trained": "no classifier given: vtc's own, trained on generated pages, is used",
    "contrast": "the contrast of the blocks stands in for a classifier",
}
"""What the statistics say, by classifier."""


@dataclass(frozen=True)
class _TextBlocks:
    """Logits of the blocks of every view; the same number for the 2 x 2 patches of a block."""

    classifier: nn.Module | Literal["trained", "contrast"]
    dilate: bool

    def __call__(self, tap: PixelTap) -> Tensor:
        """Return ``(V, P, 2)``: the block's own logit, and the largest of it and its neighbours."""
        rows, cols = tap.grid
        wide = tap.pixels.float()
        high, across = -(-rows // 2), -(-cols // 2)
        if wide.shape[-2:] != (14 * rows, 14 * cols):
            wide = F.interpolate(wide, (14 * rows, 14 * cols), mode="bilinear", align_corners=False)
        wide = F.pad(wide, (0, BLOCK * across - 14 * cols, 0, BLOCK * high - 14 * rows), mode="replicate")
        views, channels = wide.shape[:2]
        blocks = wide.view(views, channels, high, BLOCK, across, BLOCK).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        if self.classifier == "contrast":
            logits = contrast(blocks)
        else:
            classifier = trained(str(blocks.device)) if self.classifier == "trained" else self.classifier
            like = next(classifier.parameters(), blocks)
            each = blocks.to(like.device, like.dtype).split(
                high * across
            )  # a view at a time: rounding must not depend on others
            logits = torch.cat([classifier(view) for view in each]).to(blocks.device, blocks.dtype)
        logits = logits.view(views, 1, high, across)
        near = F.max_pool2d(logits, 3, stride=1, padding=1) if self.dilate else logits
        both = torch.cat([logits, near], 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :rows, :cols]
        return both.flatten(2).transpose(1, 2)


@register(
    "docprune",
    paper="arXiv:2509.06415",
    code="https://github.com/jaeminSon/index-preserving-lightweight-token-pruning @ 5314b25",
    licence="none found",
    presets={"paper": {"keep": 1.0}, "mask-only": {"keep": 1.0, "dilate": False}},
)
@dataclass(frozen=True, kw_only=True)
class DocPrune(Reducer):
    """Drop the blocks of a page that show no text, judged by their pixels alone, and leave the others at their own positions.

    A small classifier looks at every block of 28 x 28 pixels (2 x 2 patches of 14; other patch sizes are resampled to that). A
    block stays if its logit, or that of one of its eight neighbours in the view, is above ``threshold``. The tokens of the other
    blocks are dropped before the language model, and survivors keep their RoPE positions, without which the authors find the
    method of little use. Newline tokens stay, on top of the budget. How many tokens stay depends on the page; ``keep`` is the
    most. If more blocks qualify, those with the highest logits of their own stay; if none does, the token with the highest.

    The authors publish no weights. vtc brings a classifier of its own (:class:`TextClassifier`, 30 thousand weights, trained on
    generated pages; the statistics say so): on held-out generated pages its precision is 91.7 % [90.7-92.7] and its recall 92.3 %
    [91.2-93.3], where the authors' architecture trained likewise has 75.2 % and 76.9 %, and the contrast of a block
    (:func:`contrast`, ``classifier="contrast"``), which takes lines and photographs for text, 36.3 % and 97.2 %. The card in
    ``vtc/assets/docprune`` has data, limits and the command. Any module may take its place; :func:`fit` trains the authors'
    (:class:`PatchClassifier`).

    Deviates: the release prunes before the vision tower of Qwen2.5-VL and thus saves work there; here the tower sees the whole
    page, and the language model alone gets fewer tokens. 1-D positions are kept as they are (not tested by the authors). The
    helpers for the release's own model (:func:`kept_tokens`, :func:`window_order`, :func:`shorten_prompt`) match it index for
    index. The release fails on pages without any text and handles one prompt at a time. Its training script reads blocks in BGR
    order and its inference in RGB; train with the processor's order.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per image entering the language model, newline tokens not counted; 1.0: as many as the classifier wants.
    classifier : Module or {"trained", "contrast"}, default "trained"
        Gives logits ``(M,)`` of blocks ``(M, 3, 28, 28)`` of the normalised picture: vtc's own, the block's contrast, or yours.
    threshold : float, default 0.0
        Logit above which a block counts as text; minus infinity: no limit but ``keep``, which is then met exactly.
    dilate : bool, default True
        Whether the neighbours of text blocks stay.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "all"
    classifier: nn.Module | Literal["trained", "contrast"] = "trained"
    threshold: float = 0.0
    dilate: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot classify."""
        super().__post_init__()
        if not isinstance(self.classifier, nn.Module) and self.classifier not in _NOTES:
            raise UnknownArgumentError(
                f"docprune: classifier={self.classifier!r} is not possible; use one of {', '.join(_NOTES)}, or pass a torch module"
            )
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or self.threshold != self.threshold:
            raise UnknownArgumentError(f"docprune: threshold={self.threshold!r} is not a number; use a logit such as 0.0")

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """Whether the number of tokens follows from the page."""
        return self.threshold > -math.inf

    @property
    def needs(self) -> tuple[Need, ...]:
        """Logits of the blocks, from the pixels."""
        return (Need("text_blocks", "vision", -1, _TextBlocks(self.classifier, self.dilate), of="pixels"),)

    def select(self, signals: Signals) -> Selection:
        """Keep the tokens of text blocks."""
        with torch.no_grad():
            own, near = signals.text_blocks.unbind(2)
            wanted = near > self.threshold
            score = torch.where(wanted, own, torch.full_like(own, -torch.inf))
            score = torch.where(wanted.any(1, keepdim=True), score, own)
            kept = topk_mask(score, wanted.sum(1).clamp(min=1, max=signals.budget))
            index, valid = compacted(kept, None if self.decides_itself else signals.budget)
        note = "" if isinstance(self.classifier, nn.Module) else _NOTES[self.classifier]
        return Selection(index, valid=valid, note=note)


# ------------------------------------------------------------------------------------------------- the release's own model
def token_blocks(pixel_values: Tensor, patch: int, *, merge: int = 2, temporal: int = 2) -> Tensor:
    """Cut the patches a Qwen2-VL processor makes into the blocks its tokens show, slice after slice of each token.

    Parameters
    ----------
    pixel_values : Tensor
        ``(P, C * temporal * patch * patch)``, the ``merge * merge`` patches of a token one after the other, in raster order.

    Returns
    -------
    Tensor
        ``(P / merge^2 * temporal, C, merge * patch, merge * patch)``.
    """
    blocks = pixel_values.view(-1, merge, merge, pixel_values.shape[1] // (temporal * patch * patch), temporal, patch, patch)
    return blocks.permute(0, 4, 3, 1, 5, 2, 6).reshape(-1, blocks.shape[3], merge * patch, merge * patch)


def frames(grid_thw: Tensor, merge: int) -> Iterator[tuple[int, int, int]]:
    """Yield first token, rows and columns (in tokens) of every frame of every image."""
    start = 0
    for t, h, w in grid_thw.tolist():
        for _ in range(t):
            yield start, h // merge, w // merge
            start += h // merge * (w // merge)


def kept_tokens(
    logits: Tensor,
    grid_thw: Tensor,
    *,
    threshold: float = 0.0,
    merge: int = 2,
    temporal: int = 2,
    dilate: bool = True,
    official: bool = False,
) -> Tensor:
    """Return the tokens ``(K,)`` that stay, ascending over all images together.

    Parameters
    ----------
    logits : Tensor
        ``(tokens * temporal,)``, the slices of a token one after the other.
    grid_thw : Tensor
        ``(images, 3)`` frames, rows and columns of patches.
    official : bool, default False
        As released: every ``temporal``-th hit stands for a token, which presumes that its slices agree, and nothing may stay.
        Otherwise a token stays if one of its slices is hit, and an image without text keeps its likeliest token.
    """
    slices, hits = logits.view(-1, temporal), []
    for start, rows, cols in frames(grid_thw, merge):
        mask = (slices[start : start + rows * cols] > threshold).float().T.view(1, temporal, rows, cols)
        if dilate:
            mask = F.max_pool2d(mask, 3, stride=1, padding=1)
        hits.append(mask.view(temporal, -1).T > 0)
    hit = torch.cat(hits)
    if official:
        return hit.flatten().nonzero()[::temporal, 0] // temporal
    hit, start = hit.any(1), 0
    for size in (grid_thw.prod(1) // merge**2).tolist():
        if size and not bool(hit[start : start + size].any()):
            hit[start + int(slices[start : start + size].max(1).values.argmax())] = True
        start += size
    return hit.nonzero()[:, 0]


def window_order(kept: Tensor, grid_thw: Tensor, *, merge: int = 2, window: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept tokens in the order of the tower's attention windows.

    Parameters
    ----------
    kept : Tensor
        ``(K,)`` ascending tokens.
    window : int
        Side of a window in tokens.

    Returns
    -------
    index : Tensor
        ``(K,)`` the tokens, window by window.
    rank : Tensor
        ``(K,)`` their places among the kept ones.
    bounds : Tensor
        Patches before each window and at the end, a leading 0 included. A grid that windows divide has one more, empty, row and
        column of them, as in the release.
    """
    pieces, counts = [], []
    for start, rows, cols in frames(grid_thw, merge):
        mine = kept[(kept >= start) & (kept < start + rows * cols)] - start
        high, across = rows // window + 1, cols // window + 1
        number = mine // cols // window * across + mine % cols // window
        pieces.append(mine[torch.sort(number, stable=True).indices] + start)
        counts.append(torch.bincount(number, minlength=high * across))
    index = torch.cat(pieces)
    bounds = F.pad(torch.cat(counts).cumsum(0) * merge**2, (1, 0))
    return index, torch.searchsorted(kept, index), bounds


def shorten_prompt(
    input_ids: Tensor, kept: Tensor, grid_thw: Tensor, image_token: int, *, merge: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shorten the images' runs of placeholders, and give every token its position in time, height and width.

    Kept tokens have the positions of the full grid; text goes on after the largest of them.

    Parameters
    ----------
    input_ids : Tensor
        ``(1, L)`` prompt with one placeholder per visual token.

    Returns
    -------
    ids : Tensor
        ``(1, L')``.
    positions : Tensor
        ``(3, 1, L')``.
    delta : Tensor
        ``(1, 1)`` what to add to the length to get the next position.
    per_image : Tensor
        ``(images,)`` kept tokens.
    """
    ids, visual = input_ids[0], input_ids[0] == image_token
    size = (grid_thw.prod(1) // merge**2).tolist()
    if int(visual.sum()) != sum(size):
        raise ValueError(f"the prompt has {int(visual.sum())} placeholders, the images {sum(size)} tokens")
    token = visual.cumsum(0) - 1
    alive = torch.zeros(sum(size), dtype=torch.bool, device=ids.device).index_fill(0, kept, True)
    stay = torch.where(visual, alive[token.clamp(min=0)], True)
    first = [0, *itertools.accumulate(size)]
    positions, after, done = [], 0, 0
    for image, (_, h, w) in enumerate(grid_thw.tolist()):
        begin = int((visual & (token == first[image])).nonzero()[0])
        text = torch.arange(begin - done, device=ids.device) + after
        positions.append(text.expand(3, -1))
        after += begin - done
        mine = kept[(kept >= first[image]) & (kept < first[image + 1])] - first[image]
        rows, cols = h // merge, w // merge
        place = torch.stack([mine // (rows * cols), mine // cols % rows, mine % cols]) + after
        positions.append(place)
        after, done = int(place.max()) + 1 if place.numel() else after, begin + size[image]
    rest = torch.arange(len(ids) - done, device=ids.device) + after
    positions.append(rest.expand(3, -1))
    out = torch.cat(positions, 1)[:, None]
    short = ids[stay][None]
    delta = out.max().view(1, 1) + 1 - short.shape[1]
    per_image = torch.stack([((kept >= a) & (kept < b)).sum() for a, b in itertools.pairwise(first)])
    return short, out, delta, per_image
