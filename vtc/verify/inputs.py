"""Prompts for a twin: what its own ``get_image_features`` takes, found from the signature and the configuration.

A prompt is tried on the unpatched twin before anybody relies on it: the features must stand where the placeholders are.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.errors import UnsupportedModelError, UnverifiableError
from vtc.families.base import Family
from vtc.verify.twin import GRID, Twin, levels, said, side_of, vision_of

_START = {
    1: ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index", "im_start_id"),
    2: ("video_start_token_id", "vision_start_token_id"),
}
_END = {
    1: ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index", "im_end_id"),
    2: ("video_end_token_id", "vision_end_token_id"),
}
IMAGE, VIDEO = 1, 2
"""Kinds of token beside text (0), as several models are told them."""


@dataclass(eq=False)
class Prompt:
    """A batch of prompts, left padded.

    Attributes
    ----------
    name : str
        What it holds.
    call : dict
        Arguments of ``forward`` and ``generate``.
    images : list of (int, Tensor)
        Batch row and columns of every image's (or clip's) placeholders, in order.
    kinds : Tensor
        ``(B, S)``: 0 text, 1 image, 2 video.
    per_token : callable
        Token ids, their kinds and the length of the prompt, to the arguments with one entry per token.
    """

    name: str
    call: dict[str, Any]
    images: list[tuple[int, Tensor]]
    kinds: Tensor
    per_token: Callable[[Tensor, Tensor, int], dict[str, Tensor]]

    @property
    def real(self) -> Tensor:
        """``(B, S)`` bool: not padding."""
        return self.call["attention_mask"].bool()

    def followed_by(self, tokens: Tensor) -> dict[str, Any]:
        """Arguments of ``forward`` for the prompt and the text ``tokens (B, n)`` after it."""
        ids = torch.cat([self.call["input_ids"], tokens], 1)
        mask = torch.cat([self.call["attention_mask"], torch.ones_like(tokens)], 1)
        kinds = torch.cat([self.kinds, torch.zeros_like(tokens)], 1)
        more = {"input_ids": ids, "attention_mask": mask, **self.per_token(ids, kinds, self.kinds.shape[1])}
        return {**self.call, **more}


@dataclass(eq=False)
class _Pixels:
    """Arguments that hold pictures.

    Attributes
    ----------
    call : dict
        By the names ``forward`` has for them.
    frames : list of int or None
        Frames of each clip.
    lengths : list of int or None
        Slots of each image, where they follow from the arguments.
    """

    call: dict[str, Any]
    frames: list[int] | None = None
    lengths: list[int] | None = None


def prompt_for(twin: Twin, family: Family, rows: Sequence[int], video: bool = False) -> Prompt:
    """Return a prompt with so many images (or clips) in each row.

    Raises
    ------
    UnverifiableError
        No arguments were found that the twin can run on; the message says what was tried.
    """
    return _Feeding(twin, family, list(rows), video).prompt()


class _Feeding:
    """Finds the arguments of one twin."""

    def __init__(self, twin: Twin, family: Family, rows: list[int], video: bool) -> None:
        self.twin, self.family, self.rows, self.video = twin, family, rows, video
        self.model: Any = twin.model
        self.config = twin.model.config
        self.what = "get_video_features" if video else "get_image_features"
        self.make = getattr(family.base, self.what)
        self.takes = inspect.signature(self.make).parameters
        self.forward = inspect.signature(twin.model.forward).parameters
        self.vision = vision_of(self.config) or self.config
        self.dtype = next(twin.model.parameters()).dtype
        self.generator = torch.Generator().manual_seed(7)

    def prompt(self) -> Prompt:
        """Try what is possible, in order; return the first that runs."""
        why: list[str] = []
        for pixels in self.drafts():
            try:
                lengths = self.lengths(pixels)
            except UnsupportedModelError:
                raise
            except Exception as error:
                why.append(f"{self.what}({', '.join(pixels.call)}) raised {said(error)}")
                continue
            more = (0, 1) if self.video else (0,)  # some models add one token behind what get_video_features returns
            for style, extra in itertools.product(self.styles(pixels), more):
                prompt = self.written(pixels, [n + extra for n in lengths], style)
                try:
                    self.try_out(prompt)
                except Exception as error:
                    why.append(f"with {', '.join(pixels.call)} the model raised {said(error)}")
                    continue
                return prompt
        kind = type(self.model).__name__
        raise UnverifiableError(
            f"no prompt with {'clips' if self.video else 'images'} was found for a small {kind}: "
            + ("; ".join(dict.fromkeys(why)) or f"{self.what} of it takes nothing vtc knows")
        )

    # ------------------------------------------------------------------------------------------------------- pixels
    def drafts(self) -> Iterator[_Pixels]:
        """Yield arguments that may be what the model takes, likely ones first."""
        unknown = [
            n
            for n, p in self.takes.items()
            if self.asks(n) and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n not in _KNOWN
        ]
        if unknown:
            raise UnverifiableError(
                f"{self.what} of {type(self.model).__name__} asks for '{unknown[0]}', which vtc.verify cannot make"
            )
        grids = next((n for n in self.takes if n.endswith("grid_thw")), None)
        if grids is not None:
            yield from self.packed(grids)
        elif "num_frames_per_video" in self.takes:
            yield self.placed_frames()
        elif self.video:
            yield from self.clips()
        elif "image_sizes" in self.takes and getattr(self.config, "image_grid_pinpoints", None):
            yield self.anyres()
        elif "pixtral" in str(getattr(self.vision, "model_type", "")) or self.asks("image_sizes"):
            yield self.of_mixed_sizes()
        elif "image_position_ids" in self.takes:
            yield self.placed_patches()
        elif "spatial_shapes" in self.takes:
            yield self.shaped_patches()
        elif "pixel_attention_mask" in self.takes:
            yield self.rows_of_tiles()
        else:
            yield self.plain()
            yield self.rows_of_tiles()

    def asks(self, name: str) -> bool:
        """Whether the model's function cannot do without an argument."""
        return name in self.takes and self.takes[name].default is inspect.Parameter.empty

    @property
    def count(self) -> int:
        return sum(self.rows)

    @property
    def patch(self) -> int:
        return side_of(_field(self.config, "patch_size", "spatial_patch_size")) or 14

    @property
    def merge(self) -> int:
        value = _field(self.config, "spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")
        return side_of(value) or 1

    @property
    def side(self) -> int:
        return side_of(vars(self.vision).get("image_size")) or side_of(_field(self.config, "image_size")) or GRID * self.patch

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def plain(self) -> _Pixels:
        """Pictures of one size."""
        call: dict[str, Any] = {"pixel_values": self.draw(self.count, 3, self.side, self.side)}
        if "high_res_pixel_values" in self.takes:
            high = next((vars(c).get("image_size") for p, c in levels(self.config).items() if "high" in p), None)
            big = side_of(high) or self.side
            call["high_res_pixel_values"] = self.draw(self.count, 3, big, big)
        return _Pixels(call)

    def rows_of_tiles(self) -> _Pixels:
        """Pictures of one size by batch row, filled up with empty ones."""
        pixels = torch.zeros(len(self.rows), max(self.rows), 3, self.side, self.side, dtype=self.dtype)
        for row, n in enumerate(self.rows):
            pixels[row, :n] = self.draw(n, 3, self.side, self.side)
        return _Pixels({"pixel_values": pixels})

    def anyres(self) -> _Pixels:
        """Pictures of several shapes, each cut into a thumbnail and crops, filled up with empty ones."""
        side, points = self.side, self.config.image_grid_pinpoints
        shapes = [(round(1.45 * side), 2 * side), (2 * side, round(1.1 * side)), (round(1.45 * side), 2 * side)]
        sizes = [list(shapes[i % 3]) for i in range(self.count)]
        views = [int(sys.modules[type(self.family.base).__module__].image_size_to_num_patches(s, points, side)) for s in sizes]
        pixels = torch.zeros(self.count, max(views), 3, side, side, dtype=self.dtype)
        for i, n in enumerate(views):
            pixels[i, :n] = self.draw(n, 3, side, side)
        return _Pixels({"pixel_values": pixels, "image_sizes": torch.tensor(sizes)})

    def of_mixed_sizes(self) -> _Pixels:
        """Pictures of several sizes in one tensor, filled up at the right and below."""
        step = self.patch * self.merge
        full, half = GRID * step, GRID // 2 * step
        sizes = list(itertools.islice(itertools.cycle([[full, full], [half, full], [full, half]]), self.count))
        return _Pixels({"pixel_values": self.draw(self.count, 3, full, full), "image_sizes": torch.tensor(sizes)})

    def patches(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Grids of pictures of several sizes, and their patches ``(pictures, most, 3 * patch ** 2)``, filled up behind."""
        wide, low = GRID * self.merge, GRID // 2 * self.merge
        grids = list(itertools.islice(itertools.cycle([(wide, wide), (low, wide), (wide, low)]), self.count))
        pixels = torch.zeros(self.count, max(h * w for h, w in grids), 3 * self.patch**2, dtype=self.dtype)
        for i, (h, w) in enumerate(grids):
            pixels[i, : h * w] = self.draw(h * w, 3 * self.patch**2).sigmoid()
        return grids, pixels

    def placed_patches(self) -> _Pixels:
        """Patches of pictures of several sizes, told where they were."""
        grids, pixels = self.patches()
        places = torch.full((*pixels.shape[:2], 2), -1)
        for i, (h, w) in enumerate(grids):
            at = torch.arange(h * w)
            places[i, : h * w] = torch.stack([at % w, at // w], -1)
        return _Pixels({"pixel_values": pixels, "image_position_ids": places})

    def placed_frames(self) -> _Pixels:
        """Patches of clips of two frames, told where they were."""
        made = self.placed_patches().call
        twice = {n: v.repeat_interleave(2, 0) for n, v in made.items()}
        twice = {"pixel_values_videos": twice["pixel_values"], "video_position_ids": twice["image_position_ids"]}
        return _Pixels(twice | {"num_frames_per_video": torch.full((self.count,), 2)}, [2] * self.count)

    def shaped_patches(self) -> _Pixels:
        """Patches of pictures of several sizes, told the shapes."""
        grids, pixels = self.patches()
        mask = torch.stack([torch.arange(pixels.shape[1]) < h * w for h, w in grids]).long()
        return _Pixels({"pixel_values": pixels, "spatial_shapes": torch.tensor(grids), "pixel_attention_mask": mask})

    def packed(self, grids: str) -> Iterator[_Pixels]:
        """Patches of pictures (or clips) of several sizes in one sequence."""
        wide, low = GRID * self.merge, GRID // 2 * self.merge
        shapes = (
            [[2, low, low], [2, low, wide], [2, low, low]] if self.video else [[1, wide, wide], [1, low, wide], [1, wide, low]]
        )
        used = list(itertools.islice(itertools.cycle(shapes), self.count))
        thw = torch.tensor(used)
        name = "pixel_values_videos" if self.video else "pixel_values"
        more: dict[str, Any] = {grids: thw}
        for extra in ("image_merge_sizes", "video_merge_sizes"):
            if extra in self.takes:
                more[extra] = torch.full((self.count,), self.merge)
        if self.video and "second_per_grid_ts" in self.forward:
            more["second_per_grid_ts"] = torch.ones(self.count)
        rows, frames = int(thw.prod(1).sum()), [t for t, _, _ in used]
        lengths = [t * (h // self.merge) * (w // self.merge) for t, h, w in used]
        square = (3, self.patch, self.patch)
        deep = int(_field(self.config, "temporal_patch_size", "patch_temporal") or 1)
        for shape in dict.fromkeys([(self.width(),), (deep * math.prod(square),), (math.prod(square),), square]):  # as filters
            if shape[0]:
                yield _Pixels({name: self.draw(rows, *shape), **more}, frames if self.video else None, lengths)

    def width(self) -> int:
        """Numbers in one patch, as the tower's first filter takes them; 0 where there is none."""
        first = (m for m in self.family.tower.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)))
        found = next(first, None)
        return 0 if found is None else found.weight[0].numel()

    def clips(self) -> Iterator[_Pixels]:
        """Clips of three frames of one size."""
        for t in (3, 8):
            yield _Pixels({"pixel_values_videos": self.draw(self.count, t, 3, self.side, self.side)}, [t] * self.count)

    # ------------------------------------------------------------------------------------------------------- features
    def features(self, pixels: Mapping[str, Any]) -> list[Tensor]:
        """What the model makes of pictures: one tensor ``(slots, D)`` per entry of what it returns."""
        call = {k: v for k, v in pixels.items() if k in self.takes}
        if "image_sizes" in pixels and any(p.kind is p.VAR_KEYWORD for p in self.takes.values()):
            call["image_sizes"] = pixels["image_sizes"]  # 4.57's LLaVA hands them to its tower
        if "pixel_values_videos" in pixels and "pixel_values_videos" not in self.takes:
            call["pixel_values"] = pixels["pixel_values_videos"]
        for key in ("vision_feature_layer", "vision_feature_select_strategy"):
            if self.asks(key):
                call[key] = getattr(self.config, key)
        with torch.no_grad():
            out = self.make(**call)
        for name in ("pooler_output", "last_hidden_state"):
            if getattr(out, name, None) is not None:
                out = getattr(out, name)
                break
        if isinstance(out, Mapping):
            raise UnsupportedModelError(
                f"{self.what} of {type(self.model).__name__} returns features for decoder layers ({', '.join(out)}) and none for "
                "the placeholders, which vtc would have to shorten with them: this model is not supported"
            )
        if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], list):  # features, and those of deeper layers
            out = out[0]
        if isinstance(out, Tensor) and out.dim() == 2:
            return [out]
        return [f.reshape(-1, f.shape[-1]) for f in out]

    def lengths(self, pixels: _Pixels) -> list[int]:
        """Number of slots of every image."""
        made = [len(f) for f in self.features(pixels.call)]
        total, count = sum(made), self.count
        if len(made) == count:
            return made
        if pixels.lengths is not None and sum(pixels.lengths) == total:
            return pixels.lengths
        if len(made) == len(self.rows) and all(m % n == 0 for m, n in zip(made, self.rows, strict=True)):
            return [m // n for m, n in zip(made, self.rows, strict=True) for _ in range(n)]
        if total % count or len(made) % count and len(made) != 1:
            raise UnverifiableError(f"{total} features in {len(made)} parts for {count} pictures")
        return [total // count] * count

    # ---------------------------------------------------------------------------------------------------------- text
    def styles(self, pixels: _Pixels) -> list[tuple[bool, bool]]:
        """Ways to write placeholders: with the token of images, and in a run for each frame.

        Models that want one run for a clip fail with several; some that want several take one without a word.
        """
        several = self.video and pixels.frames is not None
        return [(False, True), (False, False), (True, True), (True, False)] if several else [(False, False)]

    def marks(self, table: dict[int, tuple[str, ...]], kind: int) -> list[int]:
        values = (getattr(self.config, n, None) for n in table[kind])
        return [next((v for v in values if isinstance(v, int)), -1)]

    def run(self, slots: int, frames: int, style: tuple[bool, bool]) -> tuple[list[int], list[int]]:
        """Token ids and kinds of one image or clip, with the tokens that begin and end it where there are such."""
        kind = VIDEO if self.video else IMAGE
        of_images, each = style
        token = (self.family.video_token_ids if self.video and not of_images else self.family.image_token_ids)[0]
        start, end = ([i for i in self.marks(table, kind) if i >= 0] for table in (_START, _END))
        pieces = frames if each else 1
        ids = (start + [token] * (slots // pieces) + end) * pieces
        kinds = ([0] * len(start) + [kind] * (slots // pieces) + [0] * len(end)) * pieces
        return ids, kinds

    def written(self, pixels: _Pixels, lengths: list[int], style: tuple[bool, bool]) -> Prompt:
        """Write a prompt around pictures."""
        words = itertools.cycle(self.twin.words)
        frames = iter(pixels.frames or [1] * self.count)
        sizes = iter(lengths)
        rows: list[tuple[list[int], list[int]]] = []
        for row, n in enumerate(self.rows):
            first = 9 if len(self.rows) == 1 else 3 if row else 6
            ids, kinds = list(itertools.islice(words, first)), [0] * first
            for _ in range(n):
                run, marks = self.run(next(sizes), next(frames), style)
                ids, kinds = [*ids, *run, *itertools.islice(words, 2)], [*kinds, *marks, 0, 0]
            tail = 7 if row == 0 else 5
            rows.append(([*ids, *itertools.islice(words, tail)], [*kinds, *[0] * tail]))
        longest = max(len(ids) for ids, _ in rows)
        pads = [longest - len(ids) for ids, _ in rows]
        ids = torch.tensor([[0] * n + r for n, (r, _) in zip(pads, rows, strict=True)])
        kinds = torch.tensor([[0] * n + r for n, (_, r) in zip(pads, rows, strict=True)])
        mask = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long()
        call = {"input_ids": ids, "attention_mask": mask, **pixels.call, **self.per_token(ids, kinds, longest)}
        images, (at_row, at_column), start = [], (kinds > 0).nonzero(as_tuple=True), 0
        for n in lengths:
            images.append((int(at_row[start]), at_column[start : start + n]))
            start += n
        what = ("clip" if self.video else "image") + ("s" if self.count > 1 else "")
        return Prompt(f"{len(rows)} row{'s' * (len(rows) > 1)}, {self.count} {what}", call, images, kinds, self.per_token)

    def per_token(self, ids: Tensor, kinds: Tensor, prompt: int) -> dict[str, Tensor]:
        """Arguments with one entry per token that this model's ``forward`` names."""
        made: dict[str, Tensor] = {}
        if "mm_token_type_ids" in self.forward:
            made["mm_token_type_ids"] = kinds.int()
        if "moe_mm_token_type_ids" in self.forward:
            made["moe_mm_token_type_ids"] = (kinds > 0).int()
        if "token_type_ids" in self.forward:
            if "paligemma" in str(getattr(self.config, "model_type", "")):  # 0: a prefix that sees itself both ways
                made["token_type_ids"] = (torch.arange(ids.shape[1]) >= prompt).long().expand_as(ids).contiguous()
            else:
                made["token_type_ids"] = (kinds == IMAGE).long()
        return made

    # --------------------------------------------------------------------------------------------------------- try out
    def try_out(self, prompt: Prompt) -> None:
        """Run the model once; raise where it fails, or where the features are not at the placeholders."""
        embeds = self.embeds(prompt)
        features = torch.cat(self.features(prompt.call)).to(embeds.dtype)
        if features.shape[1] == embeds.shape[2]:
            self.check_places(features, embeds[prompt.kinds > 0])
        else:  # they are projected later
            self.check_first(embeds, prompt)

    def embeds(self, prompt: Prompt) -> Tensor:
        """Input embeddings ``(B, S, D)`` that the text model is given."""
        caught: list[Tensor | None] = []

        def look(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(kwargs.get("inputs_embeds"))

        hook = self.family.text.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.no_grad():
                last = {"logits_to_keep": 1} if "logits_to_keep" in self.forward else {}
                out = self.model(**prompt.call, **last)
        finally:
            hook.remove()
        if not out.logits.isfinite().all():
            raise UnverifiableError("its logits are not finite")
        if not caught or caught[0] is None:
            raise UnverifiableError("its text model is not given inputs_embeds")
        return caught[0]

    def check_first(self, embeds: Tensor, prompt: Prompt) -> None:
        """Another first picture changes the placeholders of the first image, and nothing else."""
        name = next(n for n in prompt.call if n.startswith("pixel_values"))
        other = prompt.call[name].clone()
        other[0] = other[0].flip(-1) + 0.5
        changed = (self.embeds(dataclasses.replace(prompt, call=prompt.call | {name: other})) != embeds).any(-1)
        row, columns = prompt.images[0]
        allowed = torch.zeros_like(changed)
        allowed[row, columns] = True
        if not changed.any() or bool((changed & ~allowed).any()):
            raise UnverifiableError("another picture changes other tokens than its placeholders")

    def check_places(self, features: Tensor, embeds: Tensor) -> None:
        """Placeholders in order hold the features in order, but for a factor that is the same for all."""
        if len(features) == len(embeds):
            alike = torch.cosine_similarity(features, embeds, dim=1)
            if bool((alike > 0.999).all()):
                return
        elif len(features) < len(embeds):  # the model adds to what get_video_features returns, such as a newline
            near = torch.nn.functional.normalize(embeds, dim=1) @ torch.nn.functional.normalize(features, dim=1).T
            if bool((near.amax(0) > 0.999).all()):
                return
        raise UnverifiableError(f"what {self.what} returns is not what stands at the placeholders")


_KNOWN = {
    "pixel_values",
    "pixel_values_videos",
    "high_res_pixel_values",
    "image_grid_thw",
    "video_grid_thw",
    "image_merge_sizes",
    "video_merge_sizes",
    "image_sizes",
    "image_position_ids",
    "video_position_ids",
    "num_frames_per_video",
    "spatial_shapes",
    "pixel_attention_mask",
    "vision_feature_layer",
    "vision_feature_select_strategy",
}


def _field(config: Any, *names: str) -> Any:
    """First of these fields that any part of a configuration has."""
    for level in levels(config).values():
        for name in names:
            if vars(level).get(name) is not None:
                return vars(level)[name]
    return None
