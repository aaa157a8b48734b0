"""The embedded model: files, inputs, answers, accuracy."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from models import where

from vtc.pocket import (
    POCKET_MODELS,
    PocketError,
    Question,
    accuracy_by_type,
    answer_questions,
    batches,
    detail_questions,
    easy_vqa_questions,
    encode_questions,
    load_pocket,
    majority_baseline,
    measure,
    model,
    pocket_path,
    recipes,
    scene_questions,
    scenes,
)
from vtc.pocket import answer as answer_module

CONFIGS = {"pocket": model.PocketConfig(), "pocket-next": model.PocketNextConfig()}


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
    recipe = recipes.RECIPES["refine"]
    for name, stage in (("pocket", recipe.stages[-2]), ("pocket-next", recipe.stages[-1])):
        made = json.loads((pocket_path(name) / "MANIFEST.json").read_text())["model.safetensors"]
        assert made["settings"] == json.loads(recipes.fingerprint(recipe, stage, 0))
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


def test_an_answer_takes_no_more_passes_than_it_has_tokens(pocket):
    """One pass of the tower for a batch of questions, one of the decoder for each token, of a single position after the first."""
    for name in POCKET_MODELS:
        loaded, processor = pocket if name == "pocket" else load_pocket(name)
        questions = scene_questions(n=3) if name == "pocket" else detail_questions(n=1)
        towers, lengths = [], []
        hooks = [
            loaded.model.vision_tower.register_forward_hook(lambda *_, towers=towers: towers.append(1)),
            loaded.model.language_model.layers[0].register_forward_pre_hook(
                lambda _m, args, kwargs, lengths=lengths: lengths.append(
                    (args[0] if args else kwargs["hidden_states"]).shape[1]
                ),
                with_kwargs=True,
            ),
        ]
        answers = answer_questions(loaded, processor, questions)
        for hook in hooks:
            hook.remove()
        assert len(answers) == len(questions) and len(towers) == 1
        assert 1 < len(lengths) <= 5 and lengths[0] > 196 and set(lengths[1:]) == {1}


@where(int(transformers.__version__.split(".")[0]) >= 5)  # earlier ones draw numbers before they read weights
def test_loading_reads_weights_and_makes_none_up():
    """No number is drawn for weights that are read from the file anyway, and every load has memory of its own."""
    load_pocket()  # what importing the classes draws is not meant
    before = torch.get_rng_state()
    first, second = load_pocket()[0], load_pocket()[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert first is not second and first.lm_head.weight.data_ptr() != second.lm_head.weight.data_ptr()


# ---------------------------------------------------------------------------------------------- inputs


def _chat_inputs(processor, image):
    content = [{"type": "image", **image}, {"type": "text", "text": "what color is the big shape?"}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize("name", POCKET_MODELS)
def test_an_image_may_come_as_a_path_or_as_text(name, tmp_path):
    """What a chat may hold in place of a picture gives the inputs of the picture itself."""
    processor = load_pocket(name)[1]
    picture = scenes.render_wide_scene(1).image
    path, stored = tmp_path / "scene.png", io.BytesIO()
    picture.save(path)
    picture.save(stored, "PNG")
    expected = _chat_inputs(processor, {"image": picture})
    assert int((expected["input_ids"] == processor.image_token_id).sum()) >= 196
    text = base64.b64encode(stored.getvalue()).decode()
    for image in ({"image": str(path)}, {"path": str(path)}, {"url": str(path)}, {"base64": text}):
        inputs = _chat_inputs(processor, image)
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected), image
    with pytest.raises(ValueError, match="a valid path to an image file"):  # transformers reads no file:// addresses
        _chat_inputs(processor, {"url": path.as_uri()})


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
        Question(scenes.render_scene(i, "test").image, prompt, answer, kind, f"{i}/{n}")
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
        Question(scene.image, prompt, answer, measure._DETAIL.get(f"wide_{kind}", f"wide_{kind}"), f"{prompt}{n}")
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
