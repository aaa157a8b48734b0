"""easy-VQA (Victor Zhou, MIT licence) as pocket questions; its images and questions come inside the PyPI package.

One coloured shape per 64x64 image, 13 answers, three quarters of the questions yes/no. The package has its own train
and test parts; ``"val"`` is the last 500 training images, which `vtc.pocket.train` holds out. The shipped checkpoint
predates that and trained on all 4,000 training images; its test part is clean.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vtc.pocket.errors import MissingPocketDataError, PocketError
from vtc.pocket.objects import IMAGE_SIZE, QuestionText
from vtc.pocket.questions import Question

_IMAGES = {"train": range(3500), "val": range(3500, 4000), "test": range(1000)}


def _data_folder(split: str) -> Path:
    """Folder of the package's part that holds a split."""
    if split not in _IMAGES:
        raise PocketError(f"unknown split {split!r}: expected 'train', 'val' or 'test'")
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingPocketDataError("easy-vqa", "easy-VQA questions") from error
    return Path(easy_vqa.__file__).parent / "data" / ("test" if split == "test" else "train")


def image_numbers(split: str) -> range:
    """Image numbers of a split, within the package's part that holds it."""
    _data_folder(split)
    return _IMAGES[split]


@lru_cache(maxsize=5000)
def load_image(split: str, number: int) -> Image.Image:
    """Load one image as RGB at 112x112 (bilinear, so that no processor has to resize it)."""
    with Image.open(_data_folder(split) / "images" / f"{number}.png", formats=("PNG",)) as image:
        return image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.BILINEAR)


@lru_cache(maxsize=3)
def question_texts(split: str) -> tuple[tuple[int, QuestionText], ...]:
    """Image number and text of every question of a split, in the package's order."""
    numbers = _IMAGES.get(split, range(0))
    stored = json.loads((_data_folder(split) / "questions.json").read_text(encoding="utf-8"))
    return tuple(
        (number, ("easy_yesno" if answer in ("yes", "no") else "easy_open", prompt, answer))
        for prompt, answer, number in stored
        if number in numbers
    )


def easy_vqa_questions(split: str = "test", n: int | None = None) -> list[Question]:
    """Return questions of easy-VQA, in a fixed shuffled order.

    Parameters
    ----------
    split
        ``"train"``, ``"val"`` or ``"test"``.
    n
        How many; all (9,673 for test) when None. A shorter list is a prefix of a longer one.

    Returns
    -------
    list of Question
        Types are ``"easy_yesno"`` and ``"easy_open"``, mixed as in the data set.

    Raises
    ------
    PocketError
        For an unknown split, or `n` outside 0..size of the split.
    MissingPocketDataError
        If easy-vqa is not installed.
    """
    texts = question_texts(split)
    if n is not None and not 0 <= n <= len(texts):
        raise PocketError(f"n must lie in 0..{len(texts)} for the easy-VQA split {split!r}, got {n}")
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    questions = []
    for row in order[:n]:
        number, (kind, prompt, answer) = texts[row]
        questions.append(Question(load_image(split, number), prompt, answer, kind, f"easy/{split}/{number}/{row}"))
    return questions
