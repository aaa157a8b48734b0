"""Deterministic procedural scenes with questions: everything is a function of (seed, split, index).

A scene is a 112x112 image with a noisy, cluttered background holding at most one big shape, one to three pairs of a
small shape and a real handwritten digit next to it, at most one printed word, and up to three free small shapes. About
45 of its 196 patches show an object, so a reducer that keeps the right 50 of them loses nothing.

Splits differ in their random streams *and* in their handwritten digits (scikit-learn's ``load_digits``):

===== =================== =====================================================================================
split digits (permuted)   remark
===== =================== =====================================================================================
test  first 400           never trained on. Seed 0 was watched while the shipped checkpoint was developed, so it
                          is a development set; other seeds give unwatched scenes from the same held-out digits
val   next 200            held out by `vtc.pocket.train`, but *not* by the shipped checkpoint, which predates it
train the other 1,197     scenes and digits used for training
===== =================== =====================================================================================

The 24 words are a closed set rendered with one font (Aileron, CC0, Pillow's default) whose masks are stored in the
package: text metrics, and with them every later random draw of a scene, would otherwise vary with Pillow's FreeType.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from vtc.pocket import pocket_path
from vtc.pocket.errors import MissingPocketDataError, PocketError
from vtc.pocket.questions import Question

Split = Literal["train", "val", "test"]

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
)
"""Types of scene questions. The shipped checkpoint never learnt ``"spatial"``: it answers it at chance."""

_STREAM_STRIDE = 1_000_000_007
_VAL_OFFSET = 1 << 62  # far above every train and test stream with a legal seed
_MAX_SEED = 1 << 30
_DIGIT_RANGES: dict[str, slice] = {"test": slice(0, 400), "val": slice(400, 600), "train": slice(600, None)}
# Hard types come first in the training mix, because only so many questions fit behind one image.
_TRAIN_PRIORITY = {"digit": 0.9, "presence": 0.8, "spatial": 0.8, "word": 0.7, "shape": 0.7}
_DEFAULT_PRIORITY = 0.4

QuestionText = tuple[str, str, str]
"""(type, prompt, answer)."""


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
        (x, y) in pixels; None for a word.
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
        RGB, 112x112.
    label_map
        uint8 array [112, 112]: 0 is background, k is ``objects[k - 1]``.
    objects
        In drawing order.
    questions
        (type, prompt, answer) triples, shuffled; empty for a dense scene.
    """

    image: Image.Image = field(repr=False)
    label_map: np.ndarray = field(repr=False)
    objects: tuple[SceneObject, ...]
    questions: tuple[QuestionText, ...]


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

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split
        self.objects: list[SceneObject] = []
        self._boxes: list[tuple[int, int, int, int]] = []
        self._labels = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
        self._label_canvas = ImageDraw.Draw(self._labels)
        self._paint_background()

    def _paint_background(self) -> None:
        """Light colour with a linear gradient and noise, then a few low-contrast lines and rings as clutter."""
        rng = self.rng
        base = [rng.randint(205, 250) for _ in range(3)]
        slope_x, slope_y = rng.uniform(-14, 14), rng.uniform(-14, 14)
        ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE, dtype=np.float32)
        left, top = rng.randint(0, 255 - IMAGE_SIZE), rng.randint(0, 255 - IMAGE_SIZE)
        noise = _noise()[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] * rng.uniform(1, 5)
        gradient = slope_x * ramp[None, :, None] + slope_y * ramp[:, None, None]
        # The grouping of this sum is part of the stream: pixels round differently otherwise.
        pixels = np.array(base, np.float32) + gradient + noise
        self.image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        self._canvas = ImageDraw.Draw(self.image)
        for _ in range(rng.randint(1, 6)):
            shift = rng.choice((-1, 1)) * rng.randint(10, 30)
            color = tuple(max(0, min(255, channel + shift)) for channel in base)
            if rng.random() < 0.5:
                ends = [rng.randint(0, IMAGE_SIZE) for _ in range(4)]
                self._canvas.line(ends, fill=color, width=rng.randint(1, 2))
            else:
                x, y, diameter = rng.randint(0, IMAGE_SIZE), rng.randint(0, IMAGE_SIZE), rng.randint(2, 9)
                self._canvas.ellipse((x, y, x + diameter, y + diameter), outline=color)

    def place(self, width: int, height: int) -> tuple[int, int]:
        """Reserve a free box at least three pixels from the others and return its top-left corner.

        Raises
        ------
        _NoRoomError
            After thirty attempts.
        """
        for _ in range(30):
            x = 1 + int(self.rng.random() * (IMAGE_SIZE - width - 2))
            y = 1 + int(self.rng.random() * (IMAGE_SIZE - height - 2))
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

    def _dark_ink(self) -> tuple[int, ...]:
        return tuple(self.rng.randint(0, 90) for _ in range(3))

    def add_pair(self, combination: int, digit: int) -> None:
        """Draw a small shape with a handwritten digit right of, left of, below or above it."""
        rng = self.rng
        size, digit_size, gap = rng.randint(11, 15), rng.randint(13, 16), 3
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
        mask = _word_masks()[word, self.rng.randint(WORD_SIZES[0], WORD_SIZES[-1])]
        x, y = self.place(*mask.size)
        self.image.paste(self._dark_ink(), (x, y), mask)
        self.objects.append(SceneObject(word=word))
        self._labels.paste(len(self.objects), (x, y, x + mask.size[0], y + mask.size[1]))

    def label_map(self) -> np.ndarray:
        """uint8 array [112, 112] with object numbers from 1."""
        return np.asarray(self._labels)


def render_scene(index: int, split: Split = "test", seed: int = 0, dense: bool = False) -> Scene:
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
    rng = random.Random(_stream_seed(index, split, seed))
    painter = _Painter(rng, split)
    combinations = rng.sample(range(N_COMBINATIONS), 16)
    digits = rng.sample(range(10), 6)
    try:
        if rng.random() < (0.3 if dense else 0.6):
            width = rng.randint(30, 42)
            height = width if rng.random() < 0.6 else rng.randint(26, 42)
            painter.add_shape(*painter.place(width, height), width, height, combinations[15], big=True)
        for k in range(5 if dense else rng.choice((1, 1, 2, 2, 2, 3))):
            painter.add_pair(combinations[k], digits[k])
    except _NoRoomError:
        pass
    try:
        for _ in range(3 if dense else int(rng.random() < 0.6)):
            painter.add_word()
        for k in range(3 if dense else rng.randint(0, 3)):
            size = rng.randint(11, 15)
            painter.add_shape(*painter.place(size, size), size, size, combinations[6 + k])
    except _NoRoomError:
        pass
    questions: list[QuestionText] = []
    if not dense:
        questions = _ask(rng, painter.objects)
        if split == "train":
            questions = _training_mix(rng, painter.objects, questions)
    return Scene(painter.image, painter.label_map(), tuple(painter.objects), tuple(questions))


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


def _ask(rng: random.Random, objects: Sequence[SceneObject]) -> list[QuestionText]:
    """All questions about a scene, shuffled. The order of the random draws defines the stream."""
    shapes = [o for o in objects if o.shape is not None]
    digits = [o for o in objects if o.digit is not None]
    words = [o for o in objects if o.word is not None]
    asked: list[QuestionText] = []
    for big in (o for o in shapes if o.big):
        noun = rng.choice((SHAPES[big.shape], "shape"))
        asked.append(("color_big", f"what color is the big {noun}?", COLOR_NAMES[big.color]))
        asked.append(("shape_big", "what shape is the big object?", SHAPES[big.shape]))

    # A property is asked for only where the words single out one small object.
    small = [o for o in shapes if not o.big]
    unique = [o for o in small if sum(p.shape == o.shape for p in shapes) == 1]
    if unique:
        target = rng.choice(unique)
        asked.append(("color", f"what color is the {SHAPES[target.shape]}?", COLOR_NAMES[target.color]))
    unique = [o for o in small if sum(p.color == o.color for p in shapes) == 1]
    if unique:
        target = rng.choice(unique)
        asked.append(("shape", f"what is the {COLOR_NAMES[target.color]} shape?", SHAPES[target.shape]))

    if shapes:
        rng.choice(shapes)  # unused, kept because it advances the stream
    for _ in range(2):
        asked.append(_ask_presence(rng, shapes))
    asked.append(("count", "how many shapes are there?", str(len(shapes))))
    asked.append(_ask_count_of_kind(rng, shapes, len(digits)))
    if digits:
        target = rng.choice(digits)
        asked.append(_digit_question(target))
        target = rng.choice(digits)
        color = COLOR_NAMES[target.partner // len(SHAPES)]
        asked.append(("lookup", f"what color is the shape next to the digit {target.digit}?", color))
    if words:
        asked.append(("word", "what does the word say?", WORDS[words[-1].word]))
    asked.extend(_ask_spatial(rng, shapes))
    rng.shuffle(asked)
    return asked


def _digit_question(digit: SceneObject) -> QuestionText:
    color, shape = divmod(digit.partner, len(SHAPES))
    return "digit", f"which digit is next to the {COLOR_NAMES[color]} {SHAPES[shape]}?", str(digit.digit)


def _ask_presence(rng: random.Random, shapes: Sequence[SceneObject]) -> QuestionText:
    """Ask for an object that is there, or for one that is not but shares a colour or shape with one that is."""
    if shapes and rng.random() < 0.5:
        return "presence", f"is there a {rng.choice(shapes).name}?", "yes"
    present = {(o.color, o.shape) for o in shapes}
    while True:
        color, shape = rng.randrange(len(COLOR_NAMES)), rng.randrange(len(SHAPES))
        if shapes and rng.random() < 0.7:
            if rng.random() < 0.5:
                color = rng.choice(shapes).color
            else:
                shape = rng.choice(shapes).shape
        if (color, shape) not in present:
            return "presence", f"is there a {COLOR_NAMES[color]} {SHAPES[shape]}?", "no"


def _ask_count_of_kind(rng: random.Random, shapes: Sequence[SceneObject], n_digits: int) -> QuestionText:
    """Ask for the number of shapes of one kind, or of digits."""
    if rng.random() < 0.5:
        kinds = [o.shape for o in shapes]
        kind = rng.choice(kinds) if (kinds and rng.random() < 0.7) else rng.randrange(len(SHAPES))
        return "count_sub", f"how many {PLURALS[kind]} are there?", str(kinds.count(kind))
    return "count_sub", "how many digits are there?", str(n_digits)


def _ask_spatial(rng: random.Random, shapes: Sequence[SceneObject]) -> Iterator[QuestionText]:
    """Ask how two shapes lie to each other, if a pair at least 12 pixels apart along the axis is drawn in six tries."""
    if len(shapes) < 2:
        return
    for _ in range(6):
        first, second = rng.sample(shapes, 2)
        relation = rng.randrange(len(RELATIONS))
        axis = 0 if relation < 2 else 1
        distance = first.center[axis] - second.center[axis]
        if abs(distance) < 12:
            continue
        holds = (distance < 0) == (relation in (0, 2))
        yield "spatial", f"is the {first.name} {RELATIONS[relation]} the {second.name}?", "yes" if holds else "no"
        return


def _training_mix(rng: random.Random, objects: Sequence[SceneObject], asked: list[QuestionText]) -> list[QuestionText]:
    """Ask about every digit and move the hard types to the front; the test and val streams are left as they are."""
    prompts = {prompt for _, prompt, _ in asked}
    extra = [_digit_question(o) for o in objects if o.digit is not None]
    mix = asked + [q for q in extra if q[1] not in prompts]

    def rank(question: QuestionText) -> float:
        return -rng.random() - _TRAIN_PRIORITY.get(question[0], _DEFAULT_PRIORITY)

    return sorted(mix, key=rank)


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
    if n < 0:
        raise PocketError(f"n must not be negative, got {n}")
    unknown = sorted(set(types or ()) - set(QUESTION_TYPES))
    if unknown:
        raise PocketError(f"unknown question types {unknown}: expected a subset of {list(QUESTION_TYPES)}")
    wanted = [kind for kind in QUESTION_TYPES if types is None or kind in types]
    if not wanted:
        raise PocketError("types must not be empty")
    _stream_seed(0, split, seed)
    waiting: dict[str, deque[Question]] = defaultdict(deque)
    taken: list[Question] = []
    index = 0
    while len(taken) < n:
        kind = wanted[len(taken) % len(wanted)]
        while not waiting[kind]:
            for question in _questions_of_scene(index, split, seed):
                waiting[question.type].append(question)
            index += 1
        taken.append(waiting[kind].popleft())
    return taken


def _questions_of_scene(index: int, split: Split, seed: int) -> Iterator[Question]:
    scene = render_scene(index, split, seed)
    seen: set[str] = set()
    for position, (kind, prompt, answer) in enumerate(scene.questions):
        if prompt not in seen:
            seen.add(prompt)
            yield Question(scene.image, prompt, answer, kind, f"scene/{split}/{seed}/{index}/{position}")
