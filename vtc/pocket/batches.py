"""Training batches of the pocket model: targets for every patch, questions packed behind their image.

A batch is a function of (seed, stage, step) alone, so a resumed run sees exactly what an uninterrupted one sees.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc.pocket import easyvqa
from vtc.pocket.model import (
    BOS,
    EOS,
    GRID,
    MENTION_TARGET_SIZES,
    N_CONTENTS,
    N_PATCHES,
    PATCH_SIZE,
    PATCH_TARGET_SIZES,
    RELATION_TARGETS,
    build_vocabulary,
)
from vtc.pocket.objects import (
    IMAGE_SIZE,
    N_COMBINATIONS,
    SHAPES,
    WIDE_SIZES,
    Focus,
    Mention,
    QuestionText,
    Scene,
    SceneObject,
    Split,
)
from vtc.pocket.scenes import render_scene, render_wide_scene

IGNORE = -100
"""Target value that no loss counts."""

TEXT_BUDGET = 192
"""Packed text tokens per image; questions that do not fit are left out."""

_PREFIX_WORDS = (BOS, "user", ":")
_CONTEXT = len(_PREFIX_WORDS) + N_PATCHES  # position of the first packed token
_FOCUSES: dict[str, tuple[Focus | None, ...]] = {
    "G": (None, "places", "reading"),
    "H": (None, None, "reading"),
    "I": (None, None, "reading", "words"),
}
_MIN_DISTANCE = 7  # pixels; less is no relation
_MIN_OBJECT_PIXELS = 8  # of a patch's 64; below, the patch counts neither as object nor as background
# Each stage starts far down the train stream, on scenes that the ones before it never reach.
_STAGE_OFFSETS = {
    "A": 0,
    "B": 500_000_000,
    "C": 700_000_000,
    "D": 800_000_000,
    "E": 850_000_000,
    "F": 870_000_000,
    "G": 600_000_000,
    "H": 650_000_000,
    "I": 670_000_000,
    "N": 900_000_000,
}


@dataclass(frozen=True)
class Batch:
    """Tensors of one training or validation step.

    Attributes
    ----------
    images
        uint8 [b, 112, 112, 3], or [b, 1 + rows * columns, 112, 112, 3] (thumbnail and crops) for AnyRes.
    patch_targets
        int64 [b, 196, 6]: a class per patch and kind of target, see ``PATCH_TARGET_SIZES``; `IGNORE` where unknown.
    contents
        float32 [b, n]: 1 for each thing the image shows, -1 throughout where unknown (easy-VQA).
    tokens, segments, positions, answer_targets
        int64 [b, t]: packed questions as `vtc.pocket.model.decode_packed` reads them, and the token to be predicted
        at each place (the answer, then the end), `IGNORE` elsewhere.
    mention_targets
        int64 [b, t, 6]: classes per noun phrase at its last word, see ``MENTION_TARGET_SIZES``; `IGNORE` elsewhere.
    relation_targets
        int64 [b, t, 5]: 0 or 1 at the last word of the second noun phrase of a spatial question, see
        ``RELATION_TARGETS``; `IGNORE` elsewhere.
    question_types
        Types of the packed questions of each image, in order.
    grid
        Rows and columns of AnyRes crops.
    """

    images: Tensor
    patch_targets: Tensor
    contents: Tensor
    tokens: Tensor
    segments: Tensor
    positions: Tensor
    answer_targets: Tensor
    mention_targets: Tensor
    relation_targets: Tensor
    question_types: tuple[tuple[str, ...], ...]
    grid: tuple[int, int] | None = None

    def pixels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images (thumbnails and crops in a row) in -1..1 as the vision tower takes them, [n, 3, 112, 112]."""
        return (self.images.flatten(0, -4).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1).contiguous()

    def marks(self, predicted: Tensor) -> Iterator[tuple[str, bool]]:
        """For every packed question its type, and whether the token predicted for its answer, of [b, t], is right."""
        for row, types in enumerate(self.question_types):
            # Two targets per question: the answer, and the end after it.
            places = (self.answer_targets[row] != IGNORE).nonzero()[::2, 0]
            right = predicted[row, places] == self.answer_targets[row, places]
            yield from zip(types, right.tolist(), strict=True)


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, int]:
    return build_vocabulary()


def prefix_tokens() -> Tensor:
    """Token ids in front of the image, [3]."""
    return torch.tensor([_vocabulary()[word] for word in _PREFIX_WORDS])


def patch_targets(scene: Scene) -> np.ndarray:
    """Per-patch classes of a scene, int64 [196, 6]; the object with most pixels in a patch wins."""
    blocks = scene.label_map.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).transpose(0, 2, 1, 3).reshape(N_PATCHES, -1)
    classes = np.zeros((len(scene.objects) + 1, 5), np.int64)
    targets = np.zeros((N_PATCHES, len(PATCH_TARGET_SIZES)), np.int64)
    for number, item in enumerate(scene.objects, start=1):
        fields = (item.color, item.shape, item.digit, item.word, item.partner)
        classes[number] = [0 if value is None else value + 1 for value in fields]
        if item.center is not None:
            x, y = item.center
            targets[int(y) // PATCH_SIZE * GRID + int(x) // PATCH_SIZE, 5] = 1
    if scene.objects:
        area = np.stack([(blocks == number).sum(1) for number in range(1, len(classes))], axis=1)
        largest, pixels = area.argmax(1) + 1, area.max(1)
        targets[:, :5] = np.where((pixels >= _MIN_OBJECT_PIXELS)[:, None], classes[largest], 0)
        targets[(pixels > 0) & (pixels < _MIN_OBJECT_PIXELS), :5] = IGNORE
    return targets


def content_vector(scene: Scene) -> np.ndarray:
    """Which (colour, shape) pairs, digits and words a scene shows, float32 [n] of 0 and 1."""
    contents = np.zeros(N_CONTENTS, np.float32)
    for item in scene.objects:
        if item.shape is not None:
            contents[item.combination] = 1
        elif item.digit is not None:
            contents[N_COMBINATIONS + item.digit] = 1
        elif item.word is not None:
            contents[N_COMBINATIONS + 10 + item.word] = 1
    return contents


def crop_scene(scene: Scene, left: int, top: int) -> Scene:
    """Cut a 112x112 window out of a wide scene, without questions; objects outside lose what the tower should name."""
    box = (left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)
    labels = scene.label_map[top : box[3], left : box[2]]
    objects = []
    for number, item in enumerate(scene.objects, start=1):
        if not (labels == number).any():
            objects.append(SceneObject())
            continue
        x, y = item.center[0] - left, item.center[1] - top
        inside = 0 <= x < IMAGE_SIZE and 0 <= y < IMAGE_SIZE
        objects.append(replace(item, center=(x, y) if inside else None))
    return Scene(scene.image.crop(box), labels, tuple(objects), ())


def mention_classes(scene: Scene, numbers: Sequence[int]) -> list[int]:
    """Targets of a noun phrase that fits the objects `numbers` of a scene."""
    classes = [min(len(numbers), MENTION_TARGET_SIZES[0] - 1), *[IGNORE] * (len(MENTION_TARGET_SIZES) - 1)]
    if len(numbers) != 1:
        return classes
    item = scene.objects[numbers[0]]
    width, height = scene.image.size
    classes[1], classes[2] = int(item.center[0] * GRID / width), int(item.center[1] * GRID / height)
    if item.shape is not None:
        digits = [o.digit for o in scene.objects if o.partner == item.combination]
        classes[3] = digits[0] if digits else IGNORE
        classes[4:] = item.color, item.shape
    elif item.partner is not None:
        classes[4:] = divmod(item.partner, len(SHAPES))
    return classes


def relation_classes(scene: Scene, mentions: Sequence[Mention], prompt: str, answer: str) -> list[int]:
    """Targets of the second noun phrase of a spatial question; on an axis with little distance there is none."""
    (x, y), (other_x, other_y) = (scene.objects[numbers[0]].center for _, numbers in mentions)
    differences = (x - other_x, y - other_y)
    sides = [IGNORE if abs(difference) < _MIN_DISTANCE else int(difference > 0) for difference in differences]
    words = prompt.split()
    vertical, far = "above" in words or "below" in words, "right" in words or "below" in words
    return [*sides, int(vertical), int(far), int(answer == "yes")]


def pack_questions(
    questions: Sequence[QuestionText], scene: Scene | None = None, budget: int = TEXT_BUDGET, context: int = _CONTEXT
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Lay questions one after the other behind an image.

    Parameters
    ----------
    questions
        What to ask.
    scene
        The scene that they and its mentions belong to, if there is one.
    budget
        Tokens per image; questions that do not fit are left out.
    context
        Position of the first token.

    Returns
    -------
    packed
        int64 [15, t]: tokens, segments, positions, answer targets, six mention targets and five relation targets.
    types
        Types of the questions that fitted.
    """
    vocabulary = _vocabulary()
    packed = np.zeros((4 + len(MENTION_TARGET_SIZES) + RELATION_TARGETS, budget), np.int64)
    packed[1], packed[3:] = -1, IGNORE
    mentions: Sequence[tuple[Mention, ...]] = scene.mentions if scene is not None else [()] * len(questions)
    start, types = 0, []
    for number, (kind, prompt, answer) in enumerate(questions):
        words = [*prompt.lower().replace("?", " ?").split(), "assistant", ":", answer]
        end = start + len(words)
        if end > budget:
            break
        packed[0, start:end] = [vocabulary[word] for word in words]
        packed[1, start:end] = number
        packed[2, start:end] = context + np.arange(len(words))
        packed[3, end - 2 : end] = vocabulary[answer], vocabulary[EOS]
        for place, numbers in mentions[number]:
            packed[4:-RELATION_TARGETS, start + place] = mention_classes(scene, numbers)
        if kind == "spatial":
            packed[-RELATION_TARGETS:, start + mentions[number][1][0]] = relation_classes(
                scene, mentions[number], prompt, answer
            )
        start = end
        types.append(kind)
    return packed, tuple(types)


def _text_fields(packs: Sequence[tuple[np.ndarray, tuple[str, ...]]], prefix: str = "") -> dict[str, Any]:
    """Fields of a `Batch` from the packed questions of its images; `prefix` goes in front of their types."""
    text = torch.from_numpy(np.stack([pack for pack, _ in packs], axis=1))
    return {
        **dict(zip(("tokens", "segments", "positions", "answer_targets"), text[:4], strict=True)),
        "mention_targets": text[4:-RELATION_TARGETS].permute(1, 2, 0).contiguous(),
        "relation_targets": text[-RELATION_TARGETS:].permute(1, 2, 0).contiguous(),
        "question_types": tuple(tuple(prefix + kind for kind in types) for _, types in packs),
    }


def make_batch(scenes: Sequence[Scene], easy: Sequence[tuple[np.ndarray, Sequence[QuestionText]]] = ()) -> Batch:
    """Stack scenes and easy-VQA images (with their questions) into one batch, scenes first."""
    images = [np.asarray(scene.image) for scene in scenes] + [image for image, _ in easy]
    unknown_patches = np.full((N_PATCHES, len(PATCH_TARGET_SIZES)), IGNORE, np.int64)
    targets = [patch_targets(scene) for scene in scenes] + [unknown_patches] * len(easy)
    contents = [content_vector(scene) for scene in scenes] + [np.full(N_CONTENTS, -1, np.float32)] * len(easy)
    packs = [pack_questions(scene.questions, scene) for scene in scenes] + [pack_questions(asked) for _, asked in easy]
    return Batch(*(torch.from_numpy(np.stack(field)) for field in (images, targets, contents)), **_text_fields(packs))


@lru_cache(maxsize=3)
def _easy_by_image(split: str) -> dict[int, list[QuestionText]]:
    grouped: dict[int, list[QuestionText]] = {}
    for number, text in easyvqa.question_texts(split):
        grouped.setdefault(number, []).append(text)
    return grouped


def _easy_item(split: str, number: int, rng: random.Random) -> tuple[np.ndarray, list[QuestionText]]:
    questions = list(_easy_by_image(split)[number])
    rng.shuffle(questions)
    return np.asarray(easyvqa.load_image(split, number)), questions


def training_batch(stage: str, step: int, n_scenes: int, n_easy: int, seed: int, rank: int = 0, ranks: int = 1) -> Batch:
    """Return the batch of one training step, or the part of it that one of several processes handles.

    Parameters
    ----------
    stage
        ``"A"``: mostly dense scenes and parts of wide ones, and nothing is asked. ``"B"`` to ``"F"``: ordinary scenes
        with questions. ``"G"`` to ``"I"``: also scenes with one focus (see `render_scene`), in ``"G"`` a third about
        places and a third about reading, in ``"H"`` a third about reading, in ``"I"`` a quarter each about reading and
        with many words. ``"N"``: wide scenes with questions, cut into crops.
    step
        From 0.
    n_scenes, n_easy
        Images per batch from the scenes and from easy-VQA, over all processes.
    seed
        Selects the stream.
    rank, ranks
        This process takes every `ranks`-th image from number `rank`.
    """
    if stage == "N":
        return _wide_training_batch(step, n_scenes, seed, rank, ranks)
    first = step * n_scenes + _STAGE_OFFSETS[stage]
    scenes = []
    for j in range(rank, n_scenes, ranks):
        if stage in _FOCUSES:
            focus = _FOCUSES[stage][(first + j) % len(_FOCUSES[stage])]
            scenes.append(render_scene(first + j, "train", seed, focus=focus))
        elif stage != "A":
            scenes.append(render_scene(first + j, "train", seed))
        elif j % 5 == 4:
            corner = random.Random(first + j)
            wide = render_wide_scene(first + j, "train", seed, (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
            scenes.append(crop_scene(wide, corner.choice((0, IMAGE_SIZE)), corner.choice((0, IMAGE_SIZE))))
        else:
            scene = render_scene(first + j, "train", seed, dense=j % 5 != 0)
            scenes.append(replace(scene, questions=(), mentions=()))
    if not n_easy:
        return make_batch(scenes)
    numbers = easyvqa.image_numbers("train")
    easy = []
    for j in range(rank, n_easy, ranks):
        rng = random.Random(((seed * 7919 + first) * 8 + j) * 2 + 1)
        easy.append(_easy_item("train", rng.choice(numbers), rng))
    return make_batch(scenes, easy)


def wide_batch(scenes: Sequence[Scene], prefix: str = "wide_") -> Batch:
    """Stack scenes of one size, cut up as LLaVA-NeXT's processor does, types named with `prefix`; no targets for the tower."""
    width, height = scenes[0].image.size
    rows, columns = height // IMAGE_SIZE, width // IMAGE_SIZE
    images = []
    for scene in scenes:
        pixels = np.asarray(scene.image).reshape(rows, IMAGE_SIZE, columns, IMAGE_SIZE, 3).swapaxes(1, 2)
        thumbnail = np.asarray(scene.image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BILINEAR))
        images.append(np.concatenate([thumbnail[None], pixels.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)]))
    context = _CONTEXT + rows * GRID * (columns * GRID + 1)
    packs = [pack_questions(scene.questions, scene, context=context) for scene in scenes]
    return Batch(
        torch.from_numpy(np.stack(images)),
        torch.full((len(scenes), N_PATCHES, len(PATCH_TARGET_SIZES)), IGNORE),
        torch.full((len(scenes), N_CONTENTS), -1.0),
        **_text_fields(packs, prefix),
        grid=(rows, columns),
    )


def _wide_training_batch(step: int, n_scenes: int, seed: int, rank: int, ranks: int) -> Batch:
    """Three of four steps have wide scenes, of one size each; the fourth has ordinary ones."""
    numbers = range(step * n_scenes + rank + _STAGE_OFFSETS["N"], (step + 1) * n_scenes + _STAGE_OFFSETS["N"], ranks)
    if step % 4 == 3:
        return wide_batch([render_scene(number, "train", seed) for number in numbers])
    return wide_batch([render_wide_scene(number, "train", seed, WIDE_SIZES[step % 4]) for number in numbers])


def wide_validation_batches(n_scenes: int, split: Split = "val", size: int = 6) -> list[Batch]:
    """Batches of wide scenes, a third of `n_scenes` of each size, always the same."""
    each = max(1, n_scenes // len(WIDE_SIZES))
    return [
        wide_batch([render_wide_scene(number, split, size=shape) for number in range(start, min(start + size, each))])
        for shape in WIDE_SIZES
        for start in range(0, each, size)
    ]


def validation_batches(n_scenes: int, n_easy: int, split: Split = "val", size: int = 24) -> list[Batch]:
    """Batches of scenes, then of easy-VQA images, always the same."""
    rng = random.Random(5)
    batches = [
        make_batch([render_scene(i, split) for i in range(start, min(start + size, n_scenes))])
        for start in range(0, n_scenes, size)
    ]
    numbers = list(easyvqa.image_numbers(split))[:n_easy] if n_easy else []
    easy = [_easy_item(split, number, rng) for number in numbers]
    return batches + [make_batch([], easy[start : start + size]) for start in range(0, len(easy), size)]
