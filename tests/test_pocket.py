"""The embedded model: files, data, answers and training."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from vtc.pocket import (
    DETAIL_QUESTION_TYPES,
    POCKET_MODELS,
    QUESTION_TYPES,
    MissingPocketDataError,
    PocketError,
    accuracy_by_type,
    answer_questions,
    batches,
    detail_questions,
    easy_vqa_questions,
    easyvqa,
    encode_questions,
    load_pocket,
    majority_baseline,
    measure,
    model,
    pocket_path,
    scene_questions,
    scenes,
    train,
)
from vtc.pocket import answer as answer_module

# Questions of the first 20 test scenes and of the first 6 wide ones, as they were when the checkpoints were trained.
QUESTIONS_SHA256 = "6f61115d0a103ebed44294887e5ecf859bf7c1d48998d6efc275e593f7932ab7"


CONFIGS = {"pocket": model.PocketConfig(), "pocket-next": model.PocketNextConfig()}

# The processor of the package's own loader; torchvision's would resample differently.
PIL_BACKEND = {"use_fast": False} if int(transformers.__version__.split(".")[0]) < 5 else {"backend": "pil"}


@pytest.fixture(scope="module")
def pocket():
    return load_pocket()


# ---------------------------------------------------------------------------------------------- loading


def test_import_needs_no_heavy_package(tmp_path):
    code = (
        "import sys, vtc.pocket as p; p.pocket_path(); "
        "bad = {'transformers', 'sklearn', 'easy_vqa'} & set(sys.modules); "
        "assert not bad, bad"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_public_names_resolve():
    import vtc.pocket

    assert all(getattr(vtc.pocket, name) is not None for name in vtc.pocket.__all__)
    assert set(vtc.pocket.__all__) <= set(dir(vtc.pocket))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = vtc.pocket.nonsense


def test_unknown_model_names_the_close_match():
    with pytest.raises(PocketError, match="did you mean 'pocket'"):
        load_pocket("poket")
    with pytest.raises(ValueError, match="available: pocket"):
        pocket_path("zzz")


@pytest.mark.parametrize("name", POCKET_MODELS)
def test_files_match_manifest_and_writer(name):
    folder, config = pocket_path(name), CONFIGS[name]
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for file, expected in manifest["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == expected, file
    for file, text in model.folder_files(config).items():
        assert (folder / file).read_text(encoding="utf-8") == text, f"{file} differs from vtc.pocket.model"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_500_000
    weights = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    assert {"start", "train", "validate"} <= {entry["kind"] for entry in weights}


def test_shipped_weights_are_the_recipes_last_stages():
    """The settings in the manifests are those of the recipe in this repository."""
    recipe = train.RECIPES["refine"]
    for name, stage in (("pocket", recipe.stages[-2]), ("pocket-next", recipe.stages[-1])):
        made = json.loads((pocket_path(name) / "MANIFEST.json").read_text())["model.safetensors"]
        assert made["settings"] == json.loads(train._fingerprint(recipe, stage, 0))
        assert made["provenance"] == {"stage": stage.name, "step": stage.length, "seed": 0}


def test_loads_in_eval_mode_on_request(pocket):
    loaded, processor = pocket
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert processor.tokenizer.padding_side == "left"
    half, _ = load_pocket(dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    assert half.dtype == torch.bfloat16
    assert half.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("name", POCKET_MODELS)
def test_plain_from_pretrained_reads_everything(name):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    plain, info = AutoModelForImageTextToText.from_pretrained(pocket_path(name), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert plain.dtype == torch.float32
    weights = plain.state_dict()
    loaded, _ = load_pocket(name)
    assert all(torch.equal(weights[key], value) for key, value in loaded.state_dict().items())
    processor = AutoProcessor.from_pretrained(pocket_path(name))
    assert processor.tokenizer.get_vocab() == model.build_vocabulary()


def _best_seconds(action, attempts=3):
    """Shortest of a few runs: on a shared machine a single one says more about its neighbours."""
    seconds = []
    for _ in range(attempts):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def test_loading_and_answering_are_quick(pocket):  # the fixture has paid for importing transformers
    question = scene_questions(n=1)
    assert _best_seconds(load_pocket) < 2  # 0.05 s on an idle core
    assert _best_seconds(lambda: answer_questions(*pocket, question)) < 0.5  # 0.02 s
    crops = load_pocket("pocket-next")
    wide = detail_questions(n=1)
    assert _best_seconds(lambda: answer_questions(*crops, wide)) < 0.5


# ---------------------------------------------------------------------------------------------- data


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
    for index, size in enumerate(scenes.WIDE_SIZES):
        wide, same = scenes.render_wide_scene(index, split), scenes.render_wide_scene(index, split)
        assert wide.image.tobytes() == same.image.tobytes() and wide.questions == same.questions
        assert wide.label_map.shape == size == wide.image.size[::-1]


def test_splits_do_not_overlap():
    digits = {split: set(scenes.digit_indices(split)) for split in ("train", "val", "test")}
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
    assert {q.image.size for q in questions} == {(w, h) for h, w in scenes.WIDE_SIZES}
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
                assert scenes.COLOR_NAMES[named[0][0].color] == answer
            elif kind in ("shape", "shape_big"):
                assert scenes.SHAPES[named[0][0].shape] == answer
            elif kind == "digit":
                partner = named[0][0].combination
                assert [str(o.digit) for o in scene.objects if o.partner == partner] == [answer]
            elif kind == "lookup":
                assert scenes.COLOR_NAMES[named[0][0].partner // len(scenes.SHAPES)] == answer
            elif kind == "word":
                assert scenes.WORDS[named[0][-1].word] == answer
            else:
                axis = 0 if "left" in words or "right" in words else 1
                first, second = (o[0].center[axis] for o in named)
                assert (first < second) == ((answer == "yes") == ("left" in words or "above" in words))
            for place, numbers in mentions:  # the phrase ends with a word that fits every object it means
                ends = {words[place], words[place].rstrip("s")}
                assert all(
                    scene.objects[n].shape is None
                    or ends & {scenes.SHAPES[scene.objects[n].shape], "shape", "shapes", "object"}
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
    assert scenes._PHOTO_COLUMNS["train"][1] <= scenes._PHOTO_COLUMNS["val"][0]
    assert scenes._PHOTO_COLUMNS["val"][1] <= scenes._PHOTO_COLUMNS["test"][0]
    photos = [np.asarray(photo, np.float32) for photo in scenes._photographs()]
    assert [photo.shape for photo in photos] == [(427, 640, 3)] * 2
    for split, (first, end) in scenes._PHOTO_COLUMNS.items():
        painter = scenes._Painter(random.Random(0), random.Random(1), split)
        for _ in range(3):
            window = painter._cut_photograph()
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
    monkeypatch.setattr(scenes, "_PHOTO_SHARE", 0.0)
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
    scenes._load_digits.cache_clear()
    easyvqa.question_texts.cache_clear()
    with pytest.raises(MissingPocketDataError, match=r"pip install 'vtc-reducers\[pocket\]'"):
        easy_vqa_questions(n=1) if package == "easy_vqa" else scenes.digit_indices("test")


def test_majority_baseline():
    question = scene_questions(n=1, types=("count",))[0]
    learn = [replace(question, answer=a) for a in ("2", "3", "3")] + [replace(question, answer="red", type="color")]
    ask = [replace(question, answer=a) for a in ("3", "3", "1", "2")] + [replace(question, type="word", answer="cat")]
    assert majority_baseline(learn, ask) == {"count": 0.5, "word": 0.0}


# ---------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def measured(pocket):
    """Scene and easy-VQA questions, their prepared batches and the model's answers."""
    questions = scene_questions(n=330) + easy_vqa_questions(n=100)
    prepared = encode_questions(pocket[1], questions)
    return questions, prepared, answer_questions(*pocket, prepared)


def test_accuracy_is_above_the_floor(measured):
    questions, _, answers = measured
    assert [a.id for a in answers] == [q.id for q in questions]
    accuracy = accuracy_by_type(answers)
    easy = [a.correct for a in answers if a.type.startswith("easy")]
    assert sum(easy) / len(easy) >= 0.95
    # 27 questions per type; the model card has the figures of several hundred.
    floors = {"color_big": 0.95, "shape_big": 0.95, "color": 0.80, "shape": 0.85, "presence": 0.85, "count": 0.70}
    floors |= {"count_sub": 0.85, "compare": 0.65, "digit": 0.75, "lookup": 0.80, "word": 0.75, "spatial": 0.85}
    assert {kind: accuracy[kind] for kind, floor in floors.items() if accuracy[kind] < floor} == {}


def test_answers_depend_on_the_image(pocket, measured):
    questions, _, answers = measured
    rows = [row for row, q in enumerate(questions) if q.type not in ("spatial", "presence", "count_sub", "compare")][:120]
    shifted = [replace(questions[row], image=questions[rows[k - 40]].image) for k, row in enumerate(rows)]
    right = sum(answers[row].correct for row in rows) / len(rows)
    wrong_image = sum(a.correct for a in answer_questions(*pocket, shifted)) / len(rows)
    assert wrong_image < right - 0.3
    chance = majority_baseline(scene_questions("train", n=1100), [questions[row] for row in rows])
    assert sum(chance[questions[row].type] for row in rows) / len(rows) < right - 0.3


def test_answers_do_not_depend_on_batching(pocket, measured):
    questions, _, answers = measured
    rows = list(range(0, 330, 9))
    alone = answer_questions(*pocket, [questions[row] for row in rows], batch_size=3)
    assert [a.text for a in alone] == [answers[row].text for row in rows]


def test_prepared_batches_and_progress(pocket):
    loaded, processor = pocket
    questions = scene_questions(n=10)
    prepared = encode_questions(processor, questions, batch_size=4)
    assert [len(batch.questions) for batch in prepared] == [4, 4, 2]
    assert sorted(p for batch in prepared for p in batch.positions) == list(range(10))
    assert prepared[0].inputs["input_ids"][0, -1] == model.build_vocabulary()[":"]
    seen = []
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = answer_questions(loaded, processor, prepared, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state must be left alone"
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert first == answer_questions(loaded, processor, prepared)
    assert answer_questions(loaded, processor, []) == []
    with pytest.raises(PocketError, match="mixture"):
        answer_questions(loaded, processor, [prepared[0], questions[0]])
    with pytest.raises(PocketError, match="missing"):
        answer_questions(loaded, processor, prepared[1:])
    with pytest.raises(PocketError, match="batch_size"):
        encode_questions(processor, questions, batch_size=0)


def test_score_is_exact_match_after_cleaning():
    question = scene_questions(n=1, types=("color",))[0]
    assert answer_module._score(question, f" {question.answer.upper()} ").correct
    assert not answer_module._score(question, f"{question.answer} {question.answer}").correct


# ---------------------------------------------------------------------------------------------- measuring


def test_wilson_interval():
    low, high = measure.wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Newcombe 1998, by hand
    assert measure.wilson_interval(0, 5)[0] == 0 and measure.wilson_interval(5, 5)[1] == 1
    with pytest.raises(ValueError, match="needs n"):
        measure.wilson_interval(3, 2)


def test_packed_marks_equal_single_prompts(pocket):
    batch = batches.make_batch([scenes.render_scene(i, "test") for i in range(4)])
    asked = [
        scenes.Question(scenes.render_scene(i, "test").image, prompt, answer, kind, f"{i}/{n}")
        for i in range(4)
        for n, (kind, prompt, answer) in enumerate(scenes.render_scene(i, "test").questions)
    ]
    marks = measure.packed_marks(pocket[0], [batch])
    assert sum(map(len, marks.values())) == len(asked) >= 30
    alone = answer_questions(*pocket, asked)
    for kind, values in marks.items():
        assert values == [a.correct for a in alone if a.type == kind], kind
    blank = measure.packed_marks(pocket[0], [batch], measure.blank)
    assert sum(map(sum, blank.values())) < sum(map(sum, marks.values()))


def test_scaled_down_wide_scenes_equal_what_the_processor_does(pocket):
    wide = [scenes.render_wide_scene(i, "val", size=(112, 224)) for i in range(2)]
    marks = measure.packed_marks(pocket[0], measure.scaled_down([batches.wide_batch(wide)]))
    asked = [
        scenes.Question(scene.image, prompt, answer, measure._DETAIL.get(f"wide_{kind}", f"wide_{kind}"), f"{prompt}{n}")
        for scene in wide
        for n, (kind, prompt, answer) in enumerate(scene.questions)
    ]
    alone = answer_questions(*pocket, asked)
    assert {k: v for k, v in marks.items()} == {k: [a.correct for a in alone if a.type == k] for k in marks}


def test_chance_is_what_the_wording_gives_away(monkeypatch):
    asked = {
        "train": [("a", "p", "yes")] * 30 + [("a", "q", "no")] * 50 + [("a", "rare", "yes")]
        + [("b", "p", "yes")] * 30 + [("b", "q", "no")] * 40,
        "test": [("a", "p", "yes"), ("a", "q", "yes"), ("a", "rare", "no"), ("a", "new", "no"), ("b", "p", "no"), ("b", "q", "no")],
    }  # fmt: skip
    monkeypatch.setattr(measure, "_texts", lambda split, *_: iter(asked[split]))
    assert measure.chance_levels("test") == {"a": 0.75, "b": 1.0}


def test_measure_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "chance_levels", partial(measure.chance_levels, learnt_from=60))
    arguments = ["--scenes", "6", "--wide", "3", "--easy", "4", "--questions", "12", "--keep", "0.25"]
    arguments += ["--fastv-layers", "1", "4"]
    measure.main([*arguments, "--reducers", "uniform", "--out", str(tmp_path / "m.json")])
    result = json.loads((tmp_path / "m.json").read_text())
    assert set(result["full"]) == set(result["blank"]) == set(result["wrong"])
    assert {"easy", "detail", "digit", "wide_count"} <= set(result["full"])
    assert set(result["curves"]) == {"none", "uniform", "fastv before layer 1", "fastv before layer 4"}
    assert all(rows["0.25"]["count"]["n"] == 1 for name, rows in result["curves"].items() if name != "none")
    assert set(result["full"]) - {"easy", "detail"} <= set(result["chance"])
    out = capsys.readouterr().out
    assert f"| count | {100 * result['full']['count']['accuracy']:.1f} | " in out
    assert "| fastv before layer 4 | 25 % | " in out


# ---------------------------------------------------------------------------------------------- training


def test_packed_decoding_equals_single_prompts(pocket):
    """The training forward gives each question the logits that the plain model gives it alone."""
    loaded, processor = pocket
    scene = scenes.render_scene(0, "test")
    batch = batches.make_batch([scene])
    with torch.no_grad():
        features, pooled = model.encode_images(loaded, batch.images.permute(0, 3, 1, 2) / 127.5 - 1)
        visual = loaded.model.multi_modal_projector(features)
        text = (batch.tokens, batch.segments, batch.positions)
        packed, states = model.decode_packed(loaded, visual, batches.prefix_tokens(), *text)
        places = (batch.answer_targets[0] != batches.IGNORE).nonzero()[::2, 0]
        logits = loaded.lm_head(packed[0, places])
        asked = [
            scenes.Question(scene.image, prompt, answer, kind, str(number))
            for number, (kind, prompt, answer) in enumerate(scene.questions[: len(places)])
        ]
        for number, question in enumerate(asked):
            inputs = encode_questions(processor, [question])[0].inputs
            torch.testing.assert_close(loaded(**inputs).logits[0, -1], logits[number], rtol=1e-3, atol=1e-3)
    assert pooled.shape == (1, 128) and len(places) >= 8
    assert len(states) == 7 and all(state.shape == packed.shape for state in states)


def test_targets_describe_the_scene():
    scene = scenes.render_scene(3, "train", dense=True)
    targets, contents = batches.patch_targets(scene), batches.content_vector(scene)
    assert targets.shape == (196, 6) and scene.questions == ()
    shown = {(o.color, o.shape) for o in scene.objects if o.shape is not None}
    assert {(c - 1, s - 1) for c, s in targets[:, :2] if c > 0} <= shown
    assert contents.sum() == len(shown) + len({(o.digit, o.word) for o in scene.objects if o.shape is None})
    assert targets[:, 5].sum() <= sum(o.center is not None for o in scene.objects)


def test_relation_targets_say_where_the_first_object_lies():
    seen = Counter()
    for index in range(30):
        scene = scenes.render_scene(index, "train", focus="places")
        packed, types = batches.pack_questions(scene.questions, scene)
        places = np.nonzero(packed[-1] != batches.IGNORE)[0]
        assert len(places) == len(types)
        for place, (_, prompt, answer), mentions in zip(places, scene.questions, scene.mentions, strict=False):
            assert packed[4, place] != batches.IGNORE and packed[1, place] == list(places).index(place)
            (x, y), (u, v) = (scene.objects[numbers[0]].center for _, numbers in mentions)
            truths = {"right of": x > u, "left of": x < u, "below": y > v, "above": y < v}
            assert packed[-1, place] == (answer == "yes") == next(t for r, t in truths.items() if r in prompt)
            assert packed[-3, place] == ("above" in prompt or "below" in prompt)
            assert packed[-2, place] == ("right of" in prompt or "below" in prompt)
            for target, distance in zip(packed[-5:-3, place], (x - u, y - v), strict=True):
                assert target == (batches.IGNORE if abs(distance) < 7 else int(distance > 0))
                seen[int(target)] += 1
    assert min(seen.values()) > 10 and len(seen) == 3


def test_read_outs_learn_first():
    recipe = train.RECIPES["smoke"]
    stage = replace(recipe.stages[1], vision_rates=((0, 1.0),), warm_heads=2, relation_weight=1.0, position_weight=0.3)
    trainer = train.Trainer(recipe, stage, seed=0, weights=None)
    batch = batches.training_batch("G", 0, 4, 1, seed=0)
    start = trainer.weights()
    losses = [trainer.train_step(batch) for _ in range(2)]
    assert set(losses[0]) == {"patch", "content", "answer", "mention", "relation", "position"}
    warmed = trainer.weights()
    assert all(torch.equal(value, start["model"][name]) for name, value in warmed["model"].items())
    for part in ("heads", "mentions", "relations", "positions"):
        assert all(not torch.equal(value, start[part][name]) for name, value in warmed[part].items()), part
    trainer.train_step(batch)
    after = trainer.weights()["model"]
    assert any(not torch.equal(value, start["model"][name]) for name, value in after.items() if "vision_tower" in name)


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_training_repeats_resumes_and_exports(tmp_path, capsys):
    recipe = train.RECIPES["smoke"]
    once = train.run_recipe(recipe, tmp_path / "once")
    assert _weights(once) == _weights(train.run_recipe(recipe, tmp_path / "again"))
    assert _weights(once) != _weights(train.run_recipe(recipe, tmp_path / "other", seed=1))

    # Stop inside both stages: in B while the tower is frozen, so that its optimizer state waits too.
    out = tmp_path / "stopped"
    train.run_stage(recipe, "A", out, options=train.RunOptions(stop_at=3))
    with pytest.raises(PocketError, match="resume it first"):
        train.run_stage(recipe, "B", out)
    train.main(["--recipe", "smoke", "--stage", "A", "--out", str(out), "--resume"])
    train.run_stage(recipe, "B", out, options=train.RunOptions(stop_at=3))
    resumed = train.run_recipe(recipe, out, resume=True)
    assert _weights(resumed) == _weights(once)
    steps = [json.loads(line) for line in (out / "B" / "log.jsonl").read_text().splitlines()]
    assert [(entry["kind"], entry["step"]) for entry in steps] == [
        ("start", 0), ("train", 3), ("validate", 3), ("start", 3), ("train", 6), ("validate", 6),
    ]  # fmt: skip
    assert capsys.readouterr().out.count('"kind": "validate"') == 9 + 5

    with pytest.raises(PocketError, match="exists"):
        train.run_stage(recipe, "A", out)
    with pytest.raises(PocketError, match="another recipe or seed"):
        train.run_stage(recipe, "A", out, seed=5, resume=True)

    from transformers import AutoProcessor, LlavaForConditionalGeneration

    trained, info = LlavaForConditionalGeneration.from_pretrained(once, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert trained.config.text_config.hidden_size == 32
    answers = answer_questions(trained.eval(), AutoProcessor.from_pretrained(once), scene_questions(n=4))
    assert len(answers) == 4
    manifest = json.loads((once / "MANIFEST.json").read_text())
    assert manifest["sha256"]["model.safetensors"] == hashlib.sha256(_weights(once)).hexdigest()


def test_next_stage_sees_what_the_library_shows():
    """Thumbnail, crops and newlines of the training forward equal those of LLaVA-NeXT's processor and model."""
    from transformers import AutoProcessor

    config = model.PocketNextConfig(width=32, vision_layers=2, text_layers=2)
    loaded = model.build_model(config).eval()
    processor = AutoProcessor.from_pretrained(pocket_path("pocket-next"), **PIL_BACKEND)
    shown = [scenes.render_wide_scene(i, "val") for i in range(3)] + [scenes.render_scene(1, "val")]
    for scene in shown:
        batch = batches.wide_batch([scene])
        with torch.no_grad():
            features, _ = model.encode_images(loaded, batch.images.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1)
            visual = loaded.model.multi_modal_projector(features).unflatten(0, (1, -1))
            visual = model.arrange_crops(loaded, visual, *batch.grid)
            text = (batch.tokens, batch.segments, batch.positions)
            hidden, _ = model.decode_packed(loaded, visual, batches.prefix_tokens(), *text)
            place = (batch.answer_targets[0] != batches.IGNORE).nonzero()[0, 0]
            kind, prompt, answer = scene.questions[0]
            question = scenes.Question(scene.image, prompt, answer, kind, "x")
            inputs = encode_questions(processor, [question])[0].inputs
            expected = loaded(**inputs).logits[0, -1]
        torch.testing.assert_close(loaded.lm_head(hidden[0, place]), expected, rtol=1e-4, atol=1e-4)


def test_grown_model_answers_as_the_small_one_did():
    config = model.PocketConfig(width=32, vision_layers=2)
    small = model.build_model(replace(config, text_layers=4), seed=3).eval()
    kept = [n for w, n in model.build_vocabulary().items() if w not in model._NEW_WORDS]
    state = {model.portable_name(name): value for name, value in small.state_dict().items()}
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        state[name] = state[name][kept]
    grown = model.build_model(config, seed=4).eval()
    grown.load_state_dict(model.grow(state, config, seed=4))
    batch = batches.make_batch([scenes.render_scene(5, "val")])
    pixels = batch.images.permute(0, 3, 1, 2) / 127.5 - 1
    text = (batches.prefix_tokens(), batch.tokens, batch.segments, batch.positions)
    asked = batch.answer_targets != batches.IGNORE
    logits = []
    for each in (small, grown):
        with torch.no_grad():
            visual = each.model.multi_modal_projector(model.encode_images(each, pixels)[0])
            logits.append(each.lm_head(model.decode_packed(each, visual, *text)[0][asked])[:, kept])
    usable = ~torch.isin(batch.tokens[asked], torch.tensor([model.build_vocabulary()[w] for w in model._NEW_WORDS]))
    compare = torch.tensor([t == "compare" for t in batch.question_types[0] for _ in range(2)])
    torch.testing.assert_close(logits[0][usable & ~compare], logits[1][usable & ~compare], rtol=1e-4, atol=1e-5)
    with pytest.raises(PocketError, match="has no weight"):
        model.grow({}, config)
    with pytest.raises(PocketError, match="grows to 6"):
        model.grow(state, replace(config, text_layers=4))


def test_a_recipe_may_go_on_from_an_exported_checkpoint(tmp_path):
    recipe = train.RECIPES["smoke"]
    model.write_folder(model.build_model(recipe.model, seed=7).state_dict(), tmp_path, recipe.model)
    path = tmp_path / "model.safetensors"
    pinned = replace(recipe, start_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    weights = train._grown_weights(pinned, path, seed=0)["model"]
    expected = model.build_model(recipe.model, seed=7).state_dict()
    assert set(weights) == set(expected)
    assert all(torch.equal(value, expected[name].half().float()) for name, value in weights.items())


def test_the_start_files_are_the_pinned_ones():
    folder = Path(__file__).parents[1] / "results"
    for name, file in (("grow", "pocket-first.safetensors"), ("refine", "pocket-grown.safetensors")):
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == train.RECIPES[name].start_sha256


def test_growing_needs_the_pinned_checkpoint(tmp_path):
    (tmp_path / "wrong.safetensors").write_bytes(b"")
    with pytest.raises(PocketError, match="pass it with --start"):
        train.run_stage(replace(train.RECIPES["grow"], ranks=1), "B", tmp_path)
    with pytest.raises(PocketError, match="pass it with --start"):
        train._grown_weights(train.RECIPES["grow"], tmp_path / "wrong.safetensors", 0)


def test_a_stage_may_end_early_and_another_restore_the_tower(tmp_path, monkeypatch):
    config = model.PocketConfig(width=32, vision_layers=2, text_layers=1)
    first = {"model": model.build_model(config, seed=9).state_dict()}
    monkeypatch.setattr(train, "_grown_weights", lambda *_: first)
    common = {"batch_size": 2, "learning_rate": 1e-2, "mention_weight": 1.0, "position_weight": 0.3}
    stages = (
        train.Stage("B", steps=40, end=2, **common),
        train.Stage("E", steps=1, vision_rates=((0, 0.0),), restore_tower=True, **common),
    )
    recipe = train.Recipe(config, stages, start_sha256="x", validation_scenes=1, dtype="float32")
    saved = [
        torch.load(train.run_stage(recipe, stage.name, tmp_path), weights_only=True)["weights"]["model"] for stage in stages
    ]
    tower = [name for name in first["model"] if "vision_tower" in name and "patch_embedding" in name]
    assert all(not torch.equal(saved[0][name], first["model"][name]) for name in tower)
    assert tower and all(torch.equal(saved[1][name], first["model"][name]) for name in tower)
    lines = (tmp_path / "B" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 2]


def test_two_processes_average_their_gradients(tmp_path):
    recipe = replace(train.RECIPES["smoke"], ranks=2, stages=(train.Stage("A", steps=2, batch_size=2, learning_rate=1e-3),))
    train.run_stage(recipe, "A", tmp_path / "one")
    train.run_stage(recipe, "A", tmp_path / "two")
    one, two = (torch.load(tmp_path / n / "A" / "checkpoint.pt", weights_only=True) for n in ("one", "two"))
    weights = [next(v for n, v in c["weights"]["model"].items() if n.endswith("class_embedding")) for c in (one, two)]
    assert torch.equal(*weights) and one["step"] == 2


def test_crops_keep_their_objects():
    scene = scenes.render_wide_scene(0, "train", size=(224, 224))
    crops = [batches.crop_scene(scene, left, top) for top in (0, 112) for left in (0, 112)]
    inside = [sum(o.center is not None for o in crop.objects) for crop in crops]
    assert sum(inside) == len(scene.objects)
    whole = np.block([[crops[0].label_map, crops[1].label_map], [crops[2].label_map, crops[3].label_map]])
    assert np.array_equal(whole, scene.label_map)
    assert all(batches.patch_targets(crop)[:, 5].sum() <= n for crop, n in zip(crops, inside, strict=True))


def test_freezing_leaves_the_tower_alone():
    recipe = train.RECIPES["smoke"]
    trainer = train.Trainer(recipe, recipe.stages[1], seed=0, weights=None)
    batch = batches.training_batch("B", 0, 2, 1, seed=0)
    trainer.step = 2  # the first frozen step
    before = trainer.weights()["model"]
    losses = trainer.train_step(batch)
    after = trainer.weights()["model"]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert set(losses) == {"answer", "mention"}
    assert changed and not any("vision_tower" in name for name in changed)


def test_training_batches_depend_on_the_step_only():
    one, two = (batches.training_batch("B", 5, 2, 1, seed=0) for _ in range(2))
    assert torch.equal(one.images, two.images) and torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.images, batches.training_batch("B", 6, 2, 1, seed=0).images)
    assert not torch.equal(one.images, batches.training_batch("B", 5, 2, 1, seed=1).images)
    dense = batches.training_batch("A", 0, 2, 0, seed=0)
    assert dense.question_types[1] == () and np.all(dense.answer_targets[1].numpy() == batches.IGNORE)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(PocketError, match="multiple of 32"):
        model.PocketConfig(width=100)
    with pytest.raises(PocketError, match="at least one scene"):
        train.Stage("A", steps=1, batch_size=2, easy_images=2, learning_rate=1e-3)
    with pytest.raises(PocketError, match="does not exist"):
        train.run_stage(train.RECIPES["smoke"], "B", tmp_path)
    with pytest.raises(PocketError, match="no stage"):
        train.run_stage(train.RECIPES["smoke"], "C", tmp_path)
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--stop-at", "3"])
