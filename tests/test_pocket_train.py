"""Training of the embedded model: batches, recipes, stages, checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from vtc.pocket import (
    PocketError,
    Question,
    answer_questions,
    batches,
    encode_questions,
    load_pocket,
    model,
    pocket_path,
    recipes,
    scene_questions,
    scenes,
    train,
)
from vtc.pocket.trainer import Trainer

# The processor of the package's own loader; torchvision's would resample differently.
PIL_BACKEND = {"use_fast": False} if int(transformers.__version__.split(".")[0]) < 5 else {"backend": "pil"}


def test_packed_decoding_equals_single_prompts():
    """The training forward gives each question the logits that the plain model gives it alone."""
    loaded, processor = load_pocket()
    scene = scenes.render_scene(0, "test")
    batch = batches.make_batch([scene])
    with torch.no_grad():
        features, pooled = model.encode_images(loaded, batch.pixels())
        visual = model.project(loaded, features)
        text = (batch.tokens, batch.segments, batch.positions)
        packed, states = model.decode_packed(loaded, visual, batches.prefix_tokens(), *text)
        places = (batch.answer_targets[0] != batches.IGNORE).nonzero()[::2, 0]
        logits = loaded.lm_head(packed[0, places])
        asked = [
            Question(scene.image, prompt, answer, kind, str(number))
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
    recipe = recipes.RECIPES["smoke"]
    stage = replace(recipe.stages[1], vision_rates=((0, 1.0),), warm_heads=2, relation_weight=1.0, position_weight=0.3)
    trainer = Trainer(recipe, stage, seed=0, weights=None)
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
    recipe = recipes.RECIPES["smoke"]
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
            features, _ = model.encode_images(loaded, batch.pixels())
            visual = model.project(loaded, features, batch.grid)
            text = (batch.tokens, batch.segments, batch.positions)
            hidden, _ = model.decode_packed(loaded, visual, batches.prefix_tokens(), *text)
            place = (batch.answer_targets[0] != batches.IGNORE).nonzero()[0, 0]
            kind, prompt, answer = scene.questions[0]
            question = Question(scene.image, prompt, answer, kind, "x")
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
    pixels = batch.pixels()
    text = (batches.prefix_tokens(), batch.tokens, batch.segments, batch.positions)
    asked = batch.answer_targets != batches.IGNORE
    logits = []
    for each in (small, grown):
        with torch.no_grad():
            visual = model.project(each, model.encode_images(each, pixels)[0])
            logits.append(each.lm_head(model.decode_packed(each, visual, *text)[0][asked])[:, kept])
    usable = ~torch.isin(batch.tokens[asked], torch.tensor([model.build_vocabulary()[w] for w in model._NEW_WORDS]))
    compare = torch.tensor([t == "compare" for t in batch.question_types[0] for _ in range(2)])
    torch.testing.assert_close(logits[0][usable & ~compare], logits[1][usable & ~compare], rtol=1e-4, atol=1e-5)
    with pytest.raises(PocketError, match="has no weight"):
        model.grow({}, config)
    with pytest.raises(PocketError, match="grows to 6"):
        model.grow(state, replace(config, text_layers=4))


def test_a_recipe_may_go_on_from_an_exported_checkpoint(tmp_path):
    recipe = recipes.RECIPES["smoke"]
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
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == recipes.RECIPES[name].start_sha256


def test_growing_needs_the_pinned_checkpoint(tmp_path):
    (tmp_path / "wrong.safetensors").write_bytes(b"")
    with pytest.raises(PocketError, match="pass it with --start"):
        train.run_stage(replace(recipes.RECIPES["grow"], ranks=1), "B", tmp_path)
    with pytest.raises(PocketError, match="pass it with --start"):
        train._grown_weights(recipes.RECIPES["grow"], tmp_path / "wrong.safetensors", 0)


def test_a_stage_may_end_early_and_another_restore_the_tower(tmp_path, monkeypatch):
    config = model.PocketConfig(width=32, vision_layers=2, text_layers=1)
    first = {"model": model.build_model(config, seed=9).state_dict()}
    monkeypatch.setattr(train, "_grown_weights", lambda *_: first)
    common = {"batch_size": 2, "learning_rate": 1e-2, "mention_weight": 1.0, "position_weight": 0.3}
    stages = (
        recipes.Stage("B", steps=40, end=2, **common),
        recipes.Stage("E", steps=1, vision_rates=((0, 0.0),), restore_tower=True, **common),
    )
    recipe = recipes.Recipe(config, stages, start_sha256="x", validation_scenes=1, dtype="float32")
    saved = [
        torch.load(train.run_stage(recipe, stage.name, tmp_path), weights_only=True)["weights"]["model"] for stage in stages
    ]
    tower = [name for name in first["model"] if "vision_tower" in name and "patch_embedding" in name]
    assert all(not torch.equal(saved[0][name], first["model"][name]) for name in tower)
    assert tower and all(torch.equal(saved[1][name], first["model"][name]) for name in tower)
    lines = (tmp_path / "B" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 2]


def test_two_processes_average_their_gradients(tmp_path):
    recipe = replace(recipes.RECIPES["smoke"], ranks=2, stages=(recipes.Stage("A", steps=2, batch_size=2, learning_rate=1e-3),))
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
    recipe = recipes.RECIPES["smoke"]
    trainer = Trainer(recipe, recipe.stages[1], seed=0, weights=None)
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
        recipes.Stage("A", steps=1, batch_size=2, easy_images=2, learning_rate=1e-3)
    with pytest.raises(PocketError, match="does not exist"):
        train.run_stage(recipes.RECIPES["smoke"], "B", tmp_path)
    with pytest.raises(PocketError, match="no stage"):
        train.run_stage(recipes.RECIPES["smoke"], "C", tmp_path)
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--stop-at", "3"])
