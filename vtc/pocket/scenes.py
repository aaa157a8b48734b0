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
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from vtc.pocket.asking import Asker
from vtc.pocket.errors import PocketError
from vtc.pocket.objects import N_COMBINATIONS, SHAPES, WIDE_SIZES, Focus, Scene, Split
from vtc.pocket.painter import NoRoomError, Painter, check_split
from vtc.pocket.questions import Question

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

_STREAM_STRIDE = 1_000_000_007
_VAL_OFFSET = 1 << 62  # far above every train and test stream with a legal seed
_MAX_SEED = 1 << 30
_WIDE_OFFSET = 1 << 63  # wide scenes have streams of their own
_PHOTO_OFFSET = 1 << 64  # the streams that choose a photograph leave those of the objects alone


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
    painter = Painter(rng, random.Random(stream + _PHOTO_OFFSET), split)
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
    painter = Painter(rng, random.Random(stream + _PHOTO_OFFSET), split, height, width)
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
    painter: Painter,
    steps: Sequence[Callable[[], None]],
    split: Split,
    asking: bool,
    focus: Focus | None = None,
) -> Scene:
    """Draw what finds room, ask, and wrap up."""
    for step in steps:
        try:
            step()
        except NoRoomError:
            continue
    asked = Asker(rng, painter.objects, asking_all=split == "train").ask(focus) if asking else []
    return Scene(
        painter.image,
        painter.label_map(),
        tuple(painter.objects),
        tuple(question for question, _ in asked),
        tuple(mentions for _, mentions in asked),
    )


def _stream_seed(index: int, split: str, seed: int) -> int:
    """Seed of one scene; no two (index, split, seed) share one."""
    check_split(split)
    if not 0 <= index < _STREAM_STRIDE:
        raise PocketError(f"scene index {index} is out of range 0..{_STREAM_STRIDE - 1}")
    if not 0 <= seed < _MAX_SEED:
        raise PocketError(f"seed {seed} is out of range 0..{_MAX_SEED - 1}")
    if split == "val":
        return _VAL_OFFSET + seed * _STREAM_STRIDE + index
    return (seed * 2 + (split == "test")) * _STREAM_STRIDE + index


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
