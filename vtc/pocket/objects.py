"""What a pocket scene is made of: colours, shapes, words, and what one object is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "val", "test"]
Focus = Literal["places", "reading", "words"]

IMAGE_SIZE = 112
"""Side of an image in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}  # easy-VQA's palette, so that both data sources share their words
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "rectangle", "triangle", "cross")
PLURALS = ("circles", "rectangles", "triangles", "crosses")
RELATIONS = ("left of", "right of", "above", "below")
WORDS = tuple(
    "cat dog sun moon tree fish bird milk door rain leaf gold king ship book star wolf jam zoo hut pen key box map".split()
)

N_COMBINATIONS = len(COLOR_NAMES) * len(SHAPES)
"""Number of (colour, shape) pairs; pair ``c * len(SHAPES) + s`` is colour ``c`` with shape ``s``."""

WIDE_SIZES: tuple[tuple[int, int], ...] = ((224, 224), (112, 224), (224, 112))
"""(height, width) of wide scenes."""

QuestionText = tuple[str, str, str]
"""(type, prompt, answer)."""

Mention = tuple[int, tuple[int, ...]]
"""A noun phrase of a prompt: place of its last word (of the prompt split at blanks), indices of the objects it fits."""


@dataclass(frozen=True)
class SceneObject:
    """What one object of a scene is; fields that do not apply are None.

    Attributes
    ----------
    color, shape
        Indices into `COLOR_NAMES` and `SHAPES`, for a drawn shape.
    digit
        0..9, for a handwritten digit.
    word
        Index into `WORDS`, for a printed word.
    partner
        For a digit: the (colour, shape) pair number of the shape next to it.
    center
        (x, y) in pixels.
    big
        True for the one big shape.
    """

    color: int | None = None
    shape: int | None = None
    digit: int | None = None
    word: int | None = None
    partner: int | None = None
    center: tuple[float, float] | None = None
    big: bool = False

    @property
    def combination(self) -> int:
        """Number of the (colour, shape) pair of a drawn shape."""
        if self.color is None or self.shape is None:
            raise ValueError("only drawn shapes have a colour and a shape")
        return self.color * len(SHAPES) + self.shape

    @property
    def name(self) -> str:
        """Colour and shape in words, for a drawn shape."""
        color, shape = divmod(self.combination, len(SHAPES))
        return f"{COLOR_NAMES[color]} {SHAPES[shape]}"


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes
    ----------
    image
        RGB, 112x112 unless wide.
    label_map
        uint8 array [height, width]: 0 is background, k is ``objects[k - 1]``.
    objects
        In drawing order.
    questions
        (type, prompt, answer) triples, shuffled; empty for a dense scene.
    mentions
        For each question, what its noun phrases refer to: an auxiliary training target.
    """

    image: Image.Image = field(repr=False)
    label_map: np.ndarray = field(repr=False)
    objects: tuple[SceneObject, ...]
    questions: tuple[QuestionText, ...]
    mentions: tuple[tuple[Mention, ...], ...] = ()
