"""The question type shared by all pocket data sources, and the chance level."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Question:
    """One single-turn question about one image.

    Attributes
    ----------
    image
        RGB image, 112x112 pixels. Questions about the same scene share one object: treat it as read-only.
    prompt
        The question in plain words, without chat markup.
    answer
        The expected answer: one lower-case word of the model's vocabulary.
    type
        What is asked for (a name of `vtc.pocket.QUESTION_TYPES`, ``"easy_open"`` or ``"easy_yesno"``).
    id
        Unique and stable: names source, split, image and question.
    """

    image: Image = field(repr=False, compare=False)
    prompt: str
    answer: str
    type: str
    id: str


def majority_baseline(questions_train: Iterable[Question], questions_test: Iterable[Question]) -> dict[str, float]:
    """Accuracy, per type, of always giving the most frequent training answer of that type.

    This is the level that a model reaches without looking at the image or at the words of the question.

    Parameters
    ----------
    questions_train
        Questions from which the most frequent answer of each type is taken; ties go to the answer that sorts
        first, so that the result does not depend on the order.
    questions_test
        Questions on which it is scored. A type that never occurs in training scores 0.

    Returns
    -------
    dict
        Accuracy in 0..1 for each type of `questions_test`.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions_train:
        counts[question.type][question.answer] += 1
    majority = {kind: min(c, key=lambda answer: (-c[answer], answer)) for kind, c in counts.items()}
    hits: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for question in questions_test:
        totals[question.type] += 1
        hits[question.type] += question.answer == majority.get(question.type)
    return {kind: hits[kind] / totals[kind] for kind in totals}
