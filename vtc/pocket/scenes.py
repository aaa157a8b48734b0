"""Deterministic procedural scenes with questions: everything is a function of (seed, split, index).

A scene is a 112x112 image with a noisy, cluttered background holding at most one big shape, one to three pairs of a
small shape and a real handwritten digit next to it, at most one printed word, and up to three free small shapes. A
quarter of the backgrounds hold a pale window of one of scikit-learn's two photographs, each split its own columns. About
a quarter of its 196 patches show an object, so a reducer that keeps the right 50 of them loses little.

A *wide* scene is drawn on two or four such canvases (112x224, 224x112 or 224x224 pixels): big and free shapes are twice
as large, digits, their shapes and words are not, so a model that sees the whole image scaled to 112x112 cannot read
them and one that sees crops can. `detail_questions` asks about those.

Splits differ in their random streams *and* in their handwritten digits (scikit-learn's ``load_digits``):

===== =================== ======================================================
split digits (permuted)   remark
===== =================== ======================================================
test  first 400           for final measurements only, never watched in training
val   next 200            watched during training
train the other 1,197     scenes and digits used for training
===== =================== ======================================================

Answers are balanced within each type, so that no strategy that ignores the image beats the most frequent answer by
much: digits, colours and shapes are uniform, yes and no equally frequent, counts drawn nearly uniformly.

The 24 words are a closed set rendered with one font (Aileron, CC0, Pillow's default) whose masks are stored in the
package: text metrics, and with them every later random draw of a scene, would otherwise vary with Pillow's FreeType.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from vtc.pocket import pocket_path
from vtc.pocket.errors import MissingPocketDataError, PocketError
from vtc.pocket.questions import Question

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
WORD_SIZES = (11, 12, 13, 14)
"""Font sizes of printed words, in pixels."""

N_COMBINATIONS = len(COLOR_NAMES) * len(SHAPES)
"""Number of (colour, shape) pairs; pair ``c * len(SHAPES) + s`` is colour ``c`` with shape ``s``."""

QUESTION_TYPES: tuple[str, ...] = (
    "color_big",
    "shape_big",
    "color",
    "shape",
    "presence",
    "count",
    "count_sub",
    "digit",
    "lookup",
    "word",
    "spatial",
    "compare",
)
"""Types of scene questions."""

DETAIL_QUESTION_TYPES: tuple[str, ...] = ("detail_digit", "detail_lookup", "detail_word")
"""Types of questions about wide scenes that need more pixels than the scaled-down image has."""

WIDE_SIZES: tuple[tuple[int, int], ...] = ((224, 224), (112, 224), (224, 112))
"""(height, width) of wide scenes."""

_STREAM_STRIDE = 1_000_000_007
_VAL_OFFSET = 1 << 62  # far above every train and test stream with a legal seed
_MAX_SEED = 1 << 30
_DIGIT_RANGES: dict[str, slice] = {"test": slice(0, 400), "val": slice(400, 600), "train": slice(600, None)}
_WIDE_OFFSET = 1 << 63  # wide scenes have streams of their own
_PHOTO_OFFSET = 1 << 64  # the streams that choose a photograph leave those of the objects alone
_PHOTO_SHARE = 0.25
_PHOTO_COLUMNS: dict[str, tuple[int, int]] = {"train": (0, 384), "val": (384, 512), "test": (512, 640)}
_TEST_PER_TYPE = {"presence": 2}  # asked about one val or test scene; 1 for every other type
# Hard types come first in the training mix, because only so many questions fit behind one image.
_TRAIN_PRIORITY = {"digit": 0.6, "spatial": 0.6, "lookup": 0.5, "presence": 0.5, "count_sub": 0.5, "word": 0.5}
_DEFAULT_PRIORITY = 0.3
_COUNT_SHARE = {2: 0.8, 3: 0.6, 4: 0.6, 5: 0.8}

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


class _NoRoomError(Exception):
    """No free place was found for the next object; the scene goes on without it."""


# ---------------------------------------------------------------------------------------------- sources of pixels


@lru_cache(maxsize=1)
def _load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [n, 8, 8] in 0..16, classes [n], and the fixed permutation that defines the splits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPocketDataError("scikit-learn", "The handwritten digits of the pocket scenes") from error
    data = load_digits()
    return data.images, data.target, np.random.RandomState(0).permutation(len(data.target))


def digit_indices(split: Split) -> tuple[int, ...]:
    """Rows of ``sklearn.datasets.load_digits`` that the scenes of a split may show.

    Raises
    ------
    MissingPocketDataError
        If scikit-learn is missing.
    """
    return tuple(int(i) for i in _load_digits()[2][_DIGIT_RANGES[_check_split(split)]])


@lru_cache(maxsize=1)
def _photographs() -> tuple[Image.Image, ...]:
    """The two photographs of scikit-learn, 640x427."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise MissingPocketDataError("scikit-learn", "The photographs behind pocket scenes") from error
    return tuple(Image.fromarray(photo) for photo in load_sample_images().images)


@lru_cache(maxsize=3)
def _digit_images(split: Split) -> tuple[tuple[np.ndarray, ...], ...]:
    """Digit images of a split: ten tuples, one per class."""
    images, classes, _ = _load_digits()
    rows = digit_indices(split)
    return tuple(tuple(images[i] for i in rows if classes[i] == digit) for digit in range(10))


@lru_cache(maxsize=1)
def _word_masks() -> dict[tuple[int, int], Image.Image]:
    """Masks (mode L) of every word at every size, keyed by (word index, font size)."""
    with np.load(pocket_path() / "word_masks.npz", allow_pickle=False) as stored:
        pixels, shapes = stored["pixels"], stored["shapes"]
    masks, start = {}, 0
    for word in range(len(WORDS)):
        for column, size in enumerate(WORD_SIZES):
            height, width = (int(v) for v in shapes[word, column])
            block = pixels[start : start + height * width].reshape(height, width)
            masks[word, size] = Image.fromarray(block)
            start += height * width
    return masks


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """Unit-variance noise [256, 256, 1] to cut backgrounds from: drawing it per scene would dominate the cost."""
    return np.random.RandomState(1).normal(0, 1, (256, 256, 1)).astype(np.float32)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: int, box: tuple[int, int, int, int], fill: object) -> None:
    """Draw a shape of `SHAPES` into the box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    if shape == 0:
        canvas.ellipse(box, fill=fill)
    elif shape == 1:
        canvas.rectangle(box, fill=fill)
    elif shape == 2:
        canvas.polygon([((x0 + x1) / 2, y0), (x0, y1), (x1, y1)], fill=fill)
    else:
        half = max(2, round((x1 - x0) * 0.17))
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        canvas.rectangle((cx - half, y0, cx + half, y1), fill=fill)
        canvas.rectangle((x0, cy - half, x1, cy + half), fill=fill)


# ---------------------------------------------------------------------------------------------- rendering


class _Painter:
    """Draws one scene. The order of the random draws defines the stream: never reorder the calls."""

    def __init__(
        self,
        rng: random.Random,
        photo_rng: random.Random,
        split: Split,
        height: int = IMAGE_SIZE,
        width: int = IMAGE_SIZE,
    ) -> None:
        self.rng = rng
        self.photo_rng = photo_rng
        self.split = split
        self.height, self.width = height, width
        self.objects: list[SceneObject] = []
        self._boxes: list[tuple[int, int, int, int]] = []
        self._labels = Image.new("L", (width, height), 0)
        self._label_canvas = ImageDraw.Draw(self._labels)
        self._paint_background()

    def _paint_background(self) -> None:
        """Light colour with a linear gradient and noise, maybe a pale photograph, then low-contrast lines and rings."""
        rng, height, width = self.rng, self.height, self.width
        base = [rng.randint(205, 250) for _ in range(3)]
        slope_x, slope_y = rng.uniform(-14, 14), rng.uniform(-14, 14)
        columns, rows = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in (width, height))
        left, top = rng.randint(0, 255 - width), rng.randint(0, 255 - height)
        noise = _noise()[top : top + height, left : left + width] * rng.uniform(1, 5)
        gradient = slope_x * columns[None, :, None] + slope_y * rows[:, None, None]
        pixels = np.array(base, np.float32) + gradient + noise
        if self.photo_rng.random() < _PHOTO_SHARE:
            strength = self.photo_rng.uniform(0.15, 0.4)
            pixels = (1 - strength) * pixels + strength * self._cut_photograph()
        self.image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        self._canvas = ImageDraw.Draw(self.image)
        for _ in range(rng.randint(1, 6) * (height * width // IMAGE_SIZE**2)):
            shift = rng.choice((-1, 1)) * rng.randint(10, 30)
            color = tuple(max(0, min(255, channel + shift)) for channel in base)
            if rng.random() < 0.5:
                ends = [rng.randint(0, width), rng.randint(0, height), rng.randint(0, width), rng.randint(0, height)]
                self._canvas.line(ends, fill=color, width=rng.randint(1, 2))
            else:
                x, y, diameter = rng.randint(0, width), rng.randint(0, height), rng.randint(2, 9)
                self._canvas.ellipse((x, y, x + diameter, y + diameter), outline=color)

    def _cut_photograph(self) -> np.ndarray:
        """Window of a photograph, from the columns that belong to the split, scaled to the scene."""
        photo, (first, end) = self.photo_rng.choice(_photographs()), _PHOTO_COLUMNS[self.split]
        left = self.photo_rng.randint(first, end - IMAGE_SIZE)
        top = self.photo_rng.randint(0, photo.height - IMAGE_SIZE)
        window = photo.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
        return np.asarray(window.resize((self.width, self.height), Image.BILINEAR), np.float32)

    def place(self, width: int, height: int) -> tuple[int, int]:
        """Reserve a free box at least three pixels from the others and return its top-left corner.

        Raises
        ------
        _NoRoomError
            After thirty attempts.
        """
        for _ in range(30):
            x = 1 + int(self.rng.random() * (self.width - width - 2))
            y = 1 + int(self.rng.random() * (self.height - height - 2))
            right, bottom = x + width + 3, y + height + 3
            if not any(right >= b[0] and b[2] + 3 >= x and bottom >= b[1] and b[3] + 3 >= y for b in self._boxes):
                self._boxes.append((x, y, x + width, y + height))
                return x, y
        raise _NoRoomError

    def add_shape(self, x: int, y: int, width: int, height: int, combination: int, big: bool = False) -> None:
        """Draw a shape in a slightly jittered version of its colour."""
        color, shape = divmod(combination, len(SHAPES))
        fill = tuple(max(0, min(255, v + self.rng.randint(-12, 12))) for v in COLORS[COLOR_NAMES[color]])
        box = (x, y, x + width, y + height)
        _draw_shape(self._canvas, shape, box, fill)
        self.objects.append(SceneObject(color=color, shape=shape, center=(x + width / 2, y + height / 2), big=big))
        _draw_shape(self._label_canvas, shape, box, len(self.objects))

    def add_placed_shape(self, width: int, height: int, combination: int, big: bool = False) -> None:
        """Draw a shape where there is room."""
        self.add_shape(*self.place(width, height), width, height, combination, big)

    def add_free_shape(self, combination: int, scale: int = 1) -> None:
        """Draw a small shape without a digit, `scale` times as large as those with one."""
        size = scale * self.rng.randint(12, 16)
        self.add_placed_shape(size, size, combination)

    def _dark_ink(self) -> tuple[int, ...]:
        return tuple(self.rng.randint(0, 90) for _ in range(3))

    def add_pair(self, combination: int, digit: int) -> None:
        """Draw a small shape with a handwritten digit right of, left of, below or above it."""
        rng = self.rng
        size, digit_size, gap = rng.randint(12, 16), rng.randint(16, 19), 3
        arrangement = rng.randint(0, 3)
        length, breadth = size + gap + digit_size, max(size, digit_size)
        x, y = self.place(length, breadth) if arrangement < 2 else self.place(breadth, length)
        shape_at, digit_at = (
            ((x, y), (x + size + gap, y)),
            ((x + digit_size + gap, y), (x, y)),
            ((x, y), (x, y + size + gap)),
            ((x, y + digit_size + gap), (x, y)),
        )[arrangement]
        self.add_shape(*shape_at, size, size, combination)
        strokes = rng.choice(_digit_images(self.split)[digit])
        mask = Image.fromarray((strokes * 15.9).astype(np.uint8)).resize((digit_size, digit_size), Image.BILINEAR)
        self.image.paste(self._dark_ink(), digit_at, mask)
        center = (digit_at[0] + digit_size / 2, digit_at[1] + digit_size / 2)
        self.objects.append(SceneObject(digit=digit, partner=combination, center=center))
        box = (digit_at[0] + 1, digit_at[1], digit_at[0] + digit_size - 1, digit_at[1] + digit_size)
        self._labels.paste(len(self.objects), box)

    def add_word(self) -> None:
        """Print a random word in dark ink."""
        word = self.rng.randrange(len(WORDS))
        mask = _word_masks()[word, self.rng.randint(WORD_SIZES[1], WORD_SIZES[-1])]
        x, y = self.place(*mask.size)
        self.image.paste(self._dark_ink(), (x, y), mask)
        self.objects.append(SceneObject(word=word, center=(x + mask.size[0] / 2, y + mask.size[1] / 2)))
        self._labels.paste(len(self.objects), (x, y, x + mask.size[0], y + mask.size[1]))

    def label_map(self) -> np.ndarray:
        """uint8 array [height, width] with object numbers from 1."""
        return np.asarray(self._labels)


def render_scene(index: int, split: Split = "test", seed: int = 0, dense: bool = False, focus: Focus | None = None) -> Scene:
    """Render scene `index` of a split.

    Parameters
    ----------
    index
        Position in the stream, 0 <= index < 1,000,000,007.
    split
        ``"train"``, ``"val"`` or ``"test"``; see the module's table.
    seed
        Selects one of many disjoint streams of the split, 0 <= seed < 2**30.
    dense
        Draw more objects and ask nothing: for pre-training the vision tower, where every labelled patch counts.
    focus
        For training on what is hard: ``"places"`` asks spatial questions only; ``"reading"`` draws more digits and asks
        only about them and the word; ``"words"`` draws more words, for the tower's targets, and asks about digits only.

    Returns
    -------
    Scene
        The same for the same arguments (pixels may differ in the last bits between Pillow versions; objects and
        questions may not).

    Raises
    ------
    PocketError
        For an unknown split, or an index or seed out of range.
    MissingPocketDataError
        If scikit-learn is missing.
    """
    stream = _stream_seed(index, split, seed)
    rng = random.Random(stream)
    painter = _Painter(rng, random.Random(stream + _PHOTO_OFFSET), split)
    combinations = _choose_combinations(rng)
    digits = rng.sample(range(10), 6)
    # A dense scene shows either many digits or many words: both would not fit.
    n_pairs, n_words, n_free = rng.choice((1, 1, 2, 2, 2, 3)), int(rng.random() < 0.6), rng.randint(0, 3)
    if dense:
        n_pairs, n_words, n_free = rng.choice(((5, 1, 1), (1, 6, 1), (3, 2, 3)))
    elif focus == "reading":
        n_pairs, n_words, n_free = 4, 1, 0
    elif focus == "words":
        n_pairs, n_words, n_free = 1, 5, 1
    steps: list[Callable[[], None]] = []
    if rng.random() < (0.2 if dense else 0.5):
        width = rng.randint(28, 40)
        height = width if rng.random() < 0.6 else rng.randint(26, 40)
        steps.append(lambda: painter.add_placed_shape(width, height, combinations[15], big=True))
    steps += [partial(painter.add_pair, combinations[k], digits[k]) for k in range(n_pairs)]
    steps += [painter.add_word] * n_words
    steps += [partial(painter.add_free_shape, combinations[6 + k]) for k in range(n_free)]
    return _finish(rng, painter, steps, split, asking=not dense, focus=focus)


def render_wide_scene(index: int, split: Split = "test", seed: int = 0, size: tuple[int, int] | None = None) -> Scene:
    """Render wide scene `index` of a split.

    Parameters
    ----------
    index, split, seed
        As for `render_scene`; the streams differ from those of ordinary scenes.
    size
        (height, width), one of `WIDE_SIZES`; ``WIDE_SIZES[index % 3]`` when None.

    Returns
    -------
    Scene
        The same for the same arguments. Its types of questions are those of ordinary scenes.

    Raises
    ------
    PocketError, MissingPocketDataError
        As for `render_scene`.
    """
    stream = _stream_seed(index, split, seed) + _WIDE_OFFSET
    rng = random.Random(stream)
    height, width = size or WIDE_SIZES[index % len(WIDE_SIZES)]
    painter = _Painter(rng, random.Random(stream + _PHOTO_OFFSET), split, height, width)
    combinations = _choose_combinations(rng)
    digits = rng.sample(range(10), 6)
    steps: list[Callable[[], None]] = []
    if rng.random() < 0.7:
        side = rng.randint(56, 80)
        steps.append(lambda: painter.add_placed_shape(side, side, combinations[15], big=True))
    steps += [partial(painter.add_pair, combinations[k], digits[k]) for k in range(rng.randint(1, 3))]
    steps += [painter.add_word] * int(rng.random() < 0.6)
    steps += [partial(painter.add_free_shape, combinations[6 + k], 2) for k in range(rng.randint(0, 3))]
    return _finish(rng, painter, steps, split, asking=True)


def _choose_combinations(rng: random.Random) -> list[int]:
    """Sixteen different (colour, shape) pairs; in most scenes one shape or colour is frequent, so that counts vary."""
    pairs = rng.sample(range(N_COMBINATIONS), N_COMBINATIONS)
    draw = rng.random()
    if draw < 0.6:
        favourite = rng.choice(pairs)
        if draw < 0.4:
            frequent = [p for p in pairs if p % len(SHAPES) == favourite % len(SHAPES)]
        else:
            frequent = [p for p in pairs if p // len(SHAPES) == favourite // len(SHAPES)]
        others = [p for p in pairs if p not in frequent]
        pairs = []
        while frequent and others:
            pairs.append((frequent if rng.random() < 0.5 else others).pop())
        pairs += frequent + others
    return pairs[:16]


def _finish(
    rng: random.Random,
    painter: _Painter,
    steps: Sequence[Callable[[], None]],
    split: Split,
    asking: bool,
    focus: Focus | None = None,
) -> Scene:
    """Draw what finds room, ask, and wrap up."""
    for step in steps:
        try:
            step()
        except _NoRoomError:
            continue
    asked = _Questions(rng, painter.objects, asking_all=split == "train").ask(focus) if asking else []
    return Scene(
        painter.image,
        painter.label_map(),
        tuple(painter.objects),
        tuple(question for question, _ in asked),
        tuple(mentions for _, mentions in asked),
    )


def _check_split(split: str) -> Split:
    if split not in _DIGIT_RANGES:
        raise PocketError(f"unknown split {split!r}: expected 'train', 'val' or 'test'")
    return split  # type: ignore[return-value]


def _stream_seed(index: int, split: str, seed: int) -> int:
    """Seed of one scene; no two (index, split, seed) share one."""
    _check_split(split)
    if not 0 <= index < _STREAM_STRIDE:
        raise PocketError(f"scene index {index} is out of range 0..{_STREAM_STRIDE - 1}")
    if not 0 <= seed < _MAX_SEED:
        raise PocketError(f"seed {seed} is out of range 0..{_MAX_SEED - 1}")
    if split == "val":
        return _VAL_OFFSET + seed * _STREAM_STRIDE + index
    return (seed * 2 + (split == "test")) * _STREAM_STRIDE + index


# ---------------------------------------------------------------------------------------------- questions


class _Questions:
    """Asks about one scene.

    Prompts are written with their noun phrases in braces; each phrase comes with the objects that it fits.
    """

    def __init__(self, rng: random.Random, objects: Sequence[SceneObject], asking_all: bool) -> None:
        self.rng = rng
        self.objects = objects
        self.asking_all = asking_all
        self.shapes = [o for o in objects if o.shape is not None]
        self.digits = [o for o in objects if o.digit is not None]
        self.words = [o for o in objects if o.word is not None]
        self._asked: list[tuple[QuestionText, tuple[Mention, ...]]] = []

    def ask(self, focus: Focus | None = None) -> list[tuple[QuestionText, tuple[Mention, ...]]]:
        """Ask questions of every type that the scene allows, each at most once, in random order.

        A val or test scene gets one or two per type, a training scene all that fit its objects, hard types first.
        With a focus, only types of that focus are asked.
        """
        if focus in ("reading", "words"):
            self._ask_digits()
            if focus == "reading":
                self._ask_word()
            self.rng.shuffle(self._asked)
            return self._asked
        if focus == "places":
            self._ask_spatial(attempts=24, wanted=14)
            return list({question[1]: (question, mentions) for question, mentions in self._asked}.values())
        self._ask_about_big_shape()
        self._ask_properties()
        self._ask_presence()
        self._ask_counts()
        self._ask_digits()
        self._ask_word()
        self._ask_spatial()
        self.rng.shuffle(self._asked)
        kept, prompts, per_type = [], set(), defaultdict(int)
        for (kind, prompt, answer), mentions in self._asked:
            limit = 99 if self.asking_all else _TEST_PER_TYPE.get(kind, 1)
            if prompt not in prompts and per_type[kind] < limit:
                prompts.add(prompt)
                per_type[kind] += 1
                kept.append(((kind, prompt, answer), mentions))
        if self.asking_all:
            kept.sort(key=lambda q: -self.rng.random() - _TRAIN_PRIORITY.get(q[0][0], _DEFAULT_PRIORITY))
        return kept

    def _add(self, kind: str, template: str, answer: str, *fitting: Sequence[SceneObject]) -> None:
        """Add a question; `fitting` holds, for each phrase in braces, the objects it fits."""
        places = [place for place, word in enumerate(template.replace("?", " ?").split()) if word.endswith("}")]
        numbers = [tuple(next(i for i, o in enumerate(self.objects) if o is target) for target in f) for f in fitting]
        prompt = template.replace("{", "").replace("}", "")
        self._asked.append(((kind, prompt, answer), tuple(zip(places, numbers, strict=True))))

    def _ask_about_big_shape(self) -> None:
        for big in (o for o in self.shapes if o.big):
            noun = self.rng.choice((SHAPES[big.shape], "shape"))
            self._add("color_big", f"what color is the {{big {noun}}}?", COLOR_NAMES[big.color], [big])
            self._add("shape_big", "what shape is the {big object}?", SHAPES[big.shape], [big])

    def _ask_properties(self) -> None:
        """Ask for a property only where the words single out one small object."""
        for target in (o for o in self.shapes if not o.big):
            if sum(p.shape == target.shape for p in self.shapes) == 1:
                self._add("color", f"what color is the {{{SHAPES[target.shape]}}}?", COLOR_NAMES[target.color], [target])
            if sum(p.color == target.color for p in self.shapes) == 1:
                self._add("shape", f"what is the {{{COLOR_NAMES[target.color]} shape}}?", SHAPES[target.shape], [target])

    def _ask_presence(self) -> None:
        """Ask for objects that are there, and for some that are not but share a colour or shape with one that is."""
        rng, present = self.rng, {(o.color, o.shape) for o in self.shapes}
        for _ in range(4 if self.asking_all else 2):
            if self.shapes and rng.random() < 0.5:
                target = rng.choice(self.shapes)
                self._add("presence", f"is there a {{{target.name}}}?", "yes", [target])
                continue
            while True:
                color, shape = rng.randrange(len(COLOR_NAMES)), rng.randrange(len(SHAPES))
                if self.shapes and rng.random() < 0.7:
                    if rng.random() < 0.5:
                        color = rng.choice(self.shapes).color
                    else:
                        shape = rng.choice(self.shapes).shape
                if (color, shape) not in present:
                    break
            self._add("presence", f"is there a {{{COLOR_NAMES[color]} {SHAPES[shape]}}}?", "no", [])

    def _ask_counts(self) -> None:
        rng = self.rng
        # The frequent totals are asked for less often, so that the answers 2 to 6 come up about equally often.
        if self.asking_all or rng.random() < _COUNT_SHARE.get(len(self.shapes), 1.0):
            self._add("count", "how many {shapes} are there?", str(len(self.shapes)), self.shapes)
        by_kind = [[o for o in self.shapes if o.shape == kind] for kind in range(len(SHAPES))]
        by_count: dict[int, list[int]] = defaultdict(list)
        for kind, fitting in enumerate(by_kind):
            by_count[len(fitting)].append(kind)
        for wanted in range(4) if self.asking_all else (rng.randrange(4),):
            if by_count[wanted]:
                kind = rng.choice(by_count[wanted])
                self._add("count_sub", f"how many {{{PLURALS[kind]}}} are there?", str(wanted), by_kind[kind])
        first, second = rng.sample(range(len(SHAPES)), 2)
        if len(by_kind[first]) != len(by_kind[second]):
            prompt = f"are there more {{{PLURALS[first]}}} than {{{PLURALS[second]}}}?"
            answer = "yes" if len(by_kind[first]) > len(by_kind[second]) else "no"
            self._add("compare", prompt, answer, by_kind[first], by_kind[second])

    def _ask_digits(self) -> None:
        for target in self.digits:
            color, shape = divmod(target.partner, len(SHAPES))
            partner = next(o for o in self.shapes if (o.color, o.shape) == (color, shape))
            name = partner.name
            self._add("digit", f"which digit is next to the {{{name}}}?", str(target.digit), [partner])
            prompt = f"what color is the shape next to the {{digit {target.digit}}}?"
            self._add("lookup", prompt, COLOR_NAMES[color], [target])

    def _ask_word(self) -> None:
        if self.words:
            self._add("word", "what does the {word} say?", WORDS[self.words[-1].word], self.words)

    def _ask_spatial(self, attempts: int = 6, wanted: int = 4) -> None:
        """Ask how two shapes lie to each other, if they are at least 14 pixels apart along the axis."""
        if len(self.shapes) < 2:
            return
        for _ in range(attempts):
            first, second = self.rng.sample(self.shapes, 2)
            relation = self.rng.randrange(len(RELATIONS))
            axis = 0 if relation < 2 else 1
            distance = first.center[axis] - second.center[axis]
            if abs(distance) < 14:
                continue
            answer = "yes" if (distance < 0) == (relation in (0, 2)) else "no"
            prompt = f"is the {{{first.name}}} {RELATIONS[relation]} the {{{second.name}}}?"
            self._add("spatial", prompt, answer, [first], [second])
            if not self.asking_all or sum(q[0][0] == "spatial" for q in self._asked) == wanted:
                return


def scene_questions(split: Split = "test", n: int = 300, types: Sequence[str] | None = None, seed: int = 0) -> list[Question]:
    """Return `n` questions about scenes, spread evenly over the types.

    The r-th round takes the r-th question of each type in the split's stream, so the result is deterministic, the
    counts of two types never differ by more than one, and a shorter list is a prefix of a longer one. A question that
    a scene repeats word for word is taken once.

    Parameters
    ----------
    split
        ``"train"``, ``"val"`` or ``"test"``; see the module's table.
    n
        Number of questions, at least 0.
    types
        Subset of `QUESTION_TYPES`; all when None. The order given does not matter.
    seed
        Selects one of many disjoint streams of the split.

    Returns
    -------
    list of Question
        Questions about one scene share one image object.

    Raises
    ------
    PocketError
        For an unknown split or type, a negative `n`, or a seed out of range.
    MissingPocketDataError
        If scikit-learn is missing.
    """
    return _take(split, n, types, seed, QUESTION_TYPES, _questions_of_scene)


def detail_questions(split: Split = "test", n: int = 300, types: Sequence[str] | None = None, seed: int = 0) -> list[Question]:
    """Return `n` questions about small details of wide scenes, spread evenly over the types.

    Parameters, order and errors are those of `scene_questions`; the types are `DETAIL_QUESTION_TYPES`. Images are
    112x224, 224x112 or 224x224 pixels: a LLaVA-1.5 processor scales them down, a LLaVA-NeXT one cuts crops.
    """
    return _take(split, n, types, seed, DETAIL_QUESTION_TYPES, _questions_of_wide_scene)


def _take(
    split: Split,
    n: int,
    types: Sequence[str] | None,
    seed: int,
    known: tuple[str, ...],
    questions_of: Callable[[int, Split, int], Iterator[Question]],
) -> list[Question]:
    """Take `n` questions from a stream of scenes, the types in turn."""
    if n < 0:
        raise PocketError(f"n must not be negative, got {n}")
    unknown = sorted(set(types or ()) - set(known))
    if unknown:
        raise PocketError(f"unknown question types {unknown}: expected a subset of {list(known)}")
    wanted = [kind for kind in known if types is None or kind in types]
    if not wanted:
        raise PocketError("types must not be empty")
    _stream_seed(0, split, seed)
    waiting: dict[str, deque[Question]] = defaultdict(deque)
    taken: list[Question] = []
    index = 0
    while len(taken) < n:
        kind = wanted[len(taken) % len(wanted)]
        while not waiting[kind]:
            for question in questions_of(index, split, seed):
                waiting[question.type].append(question)
            index += 1
        taken.append(waiting[kind].popleft())
    return taken


def _questions_of_scene(index: int, split: Split, seed: int) -> Iterator[Question]:
    scene = render_scene(index, split, seed)
    for position, (kind, prompt, answer) in enumerate(scene.questions):
        yield Question(scene.image, prompt, answer, kind, f"scene/{split}/{seed}/{index}/{position}")


def _questions_of_wide_scene(index: int, split: Split, seed: int) -> Iterator[Question]:
    scene = render_wide_scene(index, split, seed)
    for position, (kind, prompt, answer) in enumerate(scene.questions):
        if f"detail_{kind}" in DETAIL_QUESTION_TYPES:
            yield Question(scene.image, prompt, answer, f"detail_{kind}", f"wide/{split}/{seed}/{index}/{position}")
