"""Drawing pocket scenes: backgrounds, shapes, handwritten digits, printed words.

The 24 words are a closed set rendered with one font (Aileron, CC0, Pillow's default) whose masks are stored in the
package: text metrics, and with them every later random draw of a scene, would otherwise vary with Pillow's FreeType.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from vtc.pocket import pocket_path
from vtc.pocket.errors import MissingPocketDataError, PocketError
from vtc.pocket.objects import COLOR_NAMES, COLORS, IMAGE_SIZE, SHAPES, WORDS, SceneObject, Split

WORD_SIZES = (11, 12, 13, 14)
"""Font sizes of printed words, in pixels."""

_DIGIT_RANGES: dict[str, slice] = {"test": slice(0, 400), "val": slice(400, 600), "train": slice(600, None)}
_PHOTO_SHARE = 0.25
_PHOTO_COLUMNS: dict[str, tuple[int, int]] = {"train": (0, 384), "val": (384, 512), "test": (512, 640)}


class NoRoomError(Exception):
    """No free place was found for the next object; the scene goes on without it."""


def check_split(split: str) -> Split:
    """Return the name of a split; raise `PocketError` for anything else."""
    if split not in _DIGIT_RANGES:
        raise PocketError(f"unknown split {split!r}: expected 'train', 'val' or 'test'")
    return split  # type: ignore[return-value]


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
    return tuple(int(i) for i in _load_digits()[2][_DIGIT_RANGES[check_split(split)]])


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


class Painter:
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
        NoRoomError
            After thirty attempts.
        """
        for _ in range(30):
            x = 1 + int(self.rng.random() * (self.width - width - 2))
            y = 1 + int(self.rng.random() * (self.height - height - 2))
            right, bottom = x + width + 3, y + height + 3
            if not any(right >= b[0] and b[2] + 3 >= x and bottom >= b[1] and b[3] + 3 >= y for b in self._boxes):
                self._boxes.append((x, y, x + width, y + height))
                return x, y
        raise NoRoomError

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
