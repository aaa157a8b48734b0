"""The embedded model's data: scenes, their questions, easy-VQA."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vtc.pocket import (
    DETAIL_QUESTION_TYPES,
    QUESTION_TYPES,
    MissingPocketDataError,
    PocketError,
    detail_questions,
    easy_vqa_questions,
    easyvqa,
    majority_baseline,
    model,
    objects,
    painter,
    scene_questions,
    scenes,
)

# Questions of the first 20 test scenes and of the first 6 wide ones, as they were when the checkpoints were trained.
QUESTIONS_SHA256 = "6f61115d0a103ebed44294887e5ecf859bf7c1d48998d6efc275e593f7932ab7"


def test_scene_stream_is_the_one_trained_on():
    digest = hashlib.sha256()
    shown = [scenes.render_scene(i, "test") for i in range(20)] + [scenes.render_wide_scene(i, "test") for i in range(6)]
    for index, scene in enumerate(shown):
        for kind, prompt, answer in scene.questions:
            digest.update(f"{index}|{kind}|{prompt}|{answer}\n".encode())
    assert digest.hexdigest() == QUESTIONS_SHA256


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_scenes_are_deterministic(split):
    first, again = scenes.render_scene(7, split, seed=3), scenes.render_scene(7, split, seed=3)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.objects, first.questions) == (again.objects, again.questions)
    assert first.image.tobytes() != scenes.render_scene(8, split, seed=3).image.tobytes()
    assert first.image.tobytes() != scenes.render_scene(7, split, seed=4).image.tobytes()
    for index, size in enumerate(objects.WIDE_SIZES):
        wide, same = scenes.render_wide_scene(index, split), scenes.render_wide_scene(index, split)
        assert wide.image.tobytes() == same.image.tobytes() and wide.questions == same.questions
        assert wide.label_map.shape == size == wide.image.size[::-1]


def test_splits_do_not_overlap():
    digits = {split: set(painter.digit_indices(split)) for split in ("train", "val", "test")}
    assert [len(digits[split]) for split in ("train", "val", "test")] == [1197, 200, 400]
    assert len(set.union(*digits.values())) == 1797
    images = [
        scenes.render_scene(index, split, seed).image.tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in range(40)
    ]
    images += [
        scenes.render_wide_scene(index, split, seed).image.tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in range(12)
    ]
    images += [
        easyvqa.load_image(split, number).tobytes()
        for split in ("train", "val", "test")
        for number in list(easyvqa.image_numbers(split))[:20]
    ]
    assert len(set(images)) == len(images)
    seeds = [scenes._stream_seed(i, s, k) for s in ("train", "val", "test") for k in range(3) for i in (0, 10**9 + 6)]
    assert len(set(seeds)) == len(seeds)
    assert not set(easyvqa.image_numbers("train")) & set(easyvqa.image_numbers("val"))


def test_scene_questions_are_even_and_prefix_stable():
    questions = scene_questions(n=95)
    assert [q.id for q in scene_questions(n=40)] == [q.id for q in questions[:40]]
    assert len({q.id for q in questions}) == 95
    counts = Counter(q.type for q in questions)
    assert set(counts) == set(QUESTION_TYPES) and max(counts.values()) - min(counts.values()) <= 1
    assert len({(id(q.image), q.prompt) for q in questions}) == 95
    vocabulary = model.build_vocabulary()
    assert all(q.answer in vocabulary and q.image.size == (112, 112) for q in questions)
    words = {word for q in questions for word in q.prompt.replace("?", " ?").split()}
    assert words <= set(vocabulary)
    some = scene_questions(n=9, types=("word", "count"))
    assert Counter(q.type for q in some) == {"count": 5, "word": 4}
    assert scene_questions(n=5, seed=1) != scene_questions(n=5, seed=2)
    assert scene_questions(n=0) == []


def test_detail_questions():
    questions = detail_questions(n=30)
    assert questions[:9] == detail_questions(n=9)
    assert Counter(q.type for q in questions) == dict.fromkeys(DETAIL_QUESTION_TYPES, 10)
    assert {q.image.size for q in questions} == {(w, h) for h, w in objects.WIDE_SIZES}
    assert {q.answer for q in questions} <= set(model.build_vocabulary())
    with pytest.raises(PocketError, match="unknown question types"):
        detail_questions(types=("digit",))


def test_answers_follow_from_the_objects():
    """Every answer is recomputed from what the scene says it shows, by its mentions."""
    checked = Counter()
    for index in range(60):
        scene = scenes.render_scene(index, "train")
        for (kind, prompt, answer), mentions in zip(scene.questions, scene.mentions, strict=True):
            words = prompt.replace("?", " ?").split()
            named = [[scene.objects[number] for number in numbers] for _, numbers in mentions]
            checked[kind] += 1
            if kind == "presence":
                assert (len(named[0]) == 1) == (answer == "yes")
                assert all(o.name == " ".join(words[3:5]) for o in named[0])
            elif kind in ("count", "count_sub"):
                assert str(len(named[0])) == answer
            elif kind == "compare":
                assert (len(named[0]) > len(named[1])) == (answer == "yes")
            elif kind in ("color", "color_big"):
                assert objects.COLOR_NAMES[named[0][0].color] == answer
            elif kind in ("shape", "shape_big"):
                assert objects.SHAPES[named[0][0].shape] == answer
            elif kind == "digit":
                partner = named[0][0].combination
                assert [str(o.digit) for o in scene.objects if o.partner == partner] == [answer]
            elif kind == "lookup":
                assert objects.COLOR_NAMES[named[0][0].partner // len(objects.SHAPES)] == answer
            elif kind == "word":
                assert objects.WORDS[named[0][-1].word] == answer
            else:
                axis = 0 if "left" in words or "right" in words else 1
                first, second = (o[0].center[axis] for o in named)
                assert (first < second) == ((answer == "yes") == ("left" in words or "above" in words))
            for place, numbers in mentions:  # the phrase ends with a word that fits every object it means
                ends = {words[place], words[place].rstrip("s")}
                assert all(
                    scene.objects[n].shape is None
                    or ends & {objects.SHAPES[scene.objects[n].shape], "shape", "shapes", "object"}
                    or words[place] == "crosses"
                    for n in numbers
                )
    assert set(checked) == set(QUESTION_TYPES)


def test_focused_training_scenes_ask_what_they_are_for():
    for focus, types in (("places", {"spatial"}), ("reading", {"digit", "lookup", "word"})):
        asked = [scenes.render_scene(i, "train", focus=focus) for i in range(12)]
        assert {kind for scene in asked for kind, _, _ in scene.questions} == types
        assert all(len({prompt for _, prompt, _ in scene.questions}) == len(scene.questions) for scene in asked)
    digits = sum(o.digit is not None for scene in asked for o in scene.objects)
    assert digits > 3 * len(asked)


def test_backgrounds_hold_photographs_of_the_split_s_own_columns():
    assert painter._PHOTO_COLUMNS["train"][1] <= painter._PHOTO_COLUMNS["val"][0]
    assert painter._PHOTO_COLUMNS["val"][1] <= painter._PHOTO_COLUMNS["test"][0]
    photos = [np.asarray(photo, np.float32) for photo in painter._photographs()]
    assert [photo.shape for photo in photos] == [(427, 640, 3)] * 2
    for split, (first, end) in painter._PHOTO_COLUMNS.items():
        canvas = painter.Painter(random.Random(0), random.Random(1), split)
        for _ in range(3):
            window = canvas._cut_photograph()
            places = [
                (top, left)
                for photo in photos
                for top, left in zip(*np.nonzero((photo[:-111, :-111] == window[0, 0]).all(-1)), strict=True)
                if np.array_equal(photo[top : top + 112, left : left + 112], window)
            ]
            assert places and all(first <= left <= end - 112 for _, left in places)


def test_photographs_leave_objects_and_questions_alone(monkeypatch):
    def shown():
        return [scenes.render_scene(i, "test") for i in range(60)]

    mixed = shown()
    monkeypatch.setattr(painter, "_PHOTO_SHARE", 0.0)
    plain = shown()
    assert [(s.objects, s.questions) for s in mixed] == [(s.objects, s.questions) for s in plain]
    differ = [a.image.tobytes() != b.image.tobytes() for a, b in zip(mixed, plain, strict=True)]
    assert 6 <= sum(differ) <= 26  # a quarter


def test_answers_are_balanced():
    """No answer of a type is so frequent that giving it always would pay."""
    limits = {"count": 0.30, "count_sub": 0.45, "presence": 0.60, "spatial": 0.58, "compare": 0.58, "shape": 0.34}
    counts: dict[str, Counter[str]] = {}
    for question in scene_questions("val", n=12 * 200):
        counts.setdefault(question.type, Counter())[question.answer] += 1
    for kind, answers in counts.items():
        limit = limits.get(kind, 0.36 if kind == "shape_big" else 0.20)
        assert max(answers.values()) <= limit * sum(answers.values()), kind


def test_bad_requests_are_refused():
    with pytest.raises(PocketError, match="unknown split"):
        scene_questions("dev")
    with pytest.raises(PocketError, match="unknown question types"):
        scene_questions(types=("colour",))
    with pytest.raises(PocketError, match="empty"):
        scene_questions(types=())
    with pytest.raises(PocketError, match="negative"):
        scene_questions(n=-1)
    with pytest.raises(PocketError, match="out of range"):
        scene_questions(seed=-1)
    with pytest.raises(PocketError, match="out of range"):
        scenes.render_scene(-1)
    with pytest.raises(PocketError, match="unknown split"):
        easy_vqa_questions("dev")
    with pytest.raises(PocketError, match="must lie in 0..9673"):
        easy_vqa_questions(n=10**6)


def test_easy_vqa_questions():
    questions = easy_vqa_questions(n=60)
    assert questions[:20] == easy_vqa_questions(n=20)
    assert {q.type for q in questions} == {"easy_open", "easy_yesno"}
    assert all((q.answer in ("yes", "no")) == (q.type == "easy_yesno") for q in questions)
    assert questions[0].image.size == (112, 112) and questions[0].image.mode == "RGB"
    assert len(easyvqa.question_texts("test")) == 9673
    assert len(easyvqa.question_texts("train")) + len(easyvqa.question_texts("val")) == 38575


@pytest.mark.parametrize("package", ["easy_vqa", "sklearn.datasets"])
def test_missing_packages_name_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    painter._load_digits.cache_clear()
    easyvqa.question_texts.cache_clear()
    with pytest.raises(MissingPocketDataError, match=r"pip install 'vtc-reducers\[pocket\]'"):
        easy_vqa_questions(n=1) if package == "easy_vqa" else painter.digit_indices("test")


def test_majority_baseline():
    question = scene_questions(n=1, types=("count",))[0]
    learn = [replace(question, answer=a) for a in ("2", "3", "3")] + [replace(question, answer="red", type="color")]
    ask = [replace(question, answer=a) for a in ("3", "3", "1", "2")] + [replace(question, type="word", answer="cat")]
    assert majority_baseline(learn, ask) == {"count": 0.5, "word": 0.0}
