"""What bad input gets: one sentence that names the fix, the right error class, exit code 1, and nothing half-done."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import threading
from typing import ClassVar

import pytest
import torch
import transformers
from cases import CASES
from models import IMAGE_TOKEN, PAD, build, make_inputs, shared, visual_of
from PIL import Image

import vtc
from vtc import cli, registry
from vtc.core import Need, Scorer, Stage
from vtc.engine.patch import handle_of
from vtc.errors import PatchError
from vtc.inspect import InputFileError, open_image
from vtc.signals import cls_attn

NAN = float("nan")
BUDGETS = [
    (0, "keep at least one visual token"),
    (-3, "keep at least one visual token"),
    (NAN, "a float is a share in (0, 1]"),
    (float("inf"), "a float is a share in (0, 1]"),
    (1.5, "a float is a share in (0, 1], an int is a number of tokens"),
    (0.0, "a float is a share in (0, 1]"),
    (-0.5, "a float is a share in (0, 1]"),
    (True, "use tokens, as in 64, or a share, as in 0.25 or 25%"),
    ("many", "use tokens, as in 64, or a share, as in 0.25 or 25%"),
    ("17", "use at most 16, or a share such as keep=0.25"),
    (17, "use at most 16, or a share such as keep=0.25"),
]
REQUESTS = [
    (("fastvv", {"keep": 4}), vtc.UnknownReducerError, "did you mean 'fastv'"),
    (("fastv.papers", {"keep": 4}), vtc.UnknownReducerError, "did you mean 'paper'"),
    (("fastv", {"keep": 4, "layr": 2}), vtc.UnknownArgumentError, "did you mean 'layer'"),
    (("fastv", {"keep": 4, "layer": 5}), vtc.UnknownArgumentError, "use 1..4"),
    (("fastv", {"keep": 4, "layer": 0}), vtc.UnknownArgumentError, "act at the boundary"),
    (("fastv", {"keep": 4, "layer": -1}), vtc.UnknownArgumentError, "use 1..4"),
    (("fastv", {"keep": 4, "positions": "packed"}), vtc.UnknownArgumentError, "use one of original, compact"),
    (("fastv", {"keep": 4, "newlines": "some"}), vtc.UnknownArgumentError, "use one of compete"),
    (("fastv", {}), vtc.BudgetError, "give exactly one of keep="),
    (("fastv", {"keep": 4, "avg_tokens": 8}), vtc.BudgetError, "give exactly one of keep="),
    (([], {"keep": 4}), vtc.UnknownArgumentError, "name at least one"),
    ((["random", "uniform"], {"keep": 4}), vtc.UnknownArgumentError, "compose reducers of different stages"),
    ((["random", "fastv"], {"keep": 4, "layr": 2}), vtc.UnknownArgumentError, "takes the option 'layr'"),
    ((3, {"keep": 4}), vtc.UnknownReducerError, "give a name, a Reducer or a list"),
]


def one_sentence(error: BaseException) -> str:
    """Check the form of a message and return it."""
    text = str(error)
    assert isinstance(error, vtc.VtcError)
    assert "\n" not in text and len(text) > 20 and not text.endswith(".") and "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def model():
    return build("llava", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(model):
    return make_inputs("llava", model)


def state(model) -> list[tuple[str, list[str], int]]:
    """Instance attributes and hooks of every module."""
    return [(n, sorted(vars(m)), len(m._forward_hooks) + len(m._forward_pre_hooks)) for n, m in model.named_modules()]


@pytest.fixture
def untouched(model, inputs):
    """The model is as bare after the test as before, and computes the same."""
    before = state(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    yield
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


# ------------------------------------------------------------------------------------------------- budgets and requests
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("keep", "fix"), BUDGETS, ids=lambda v: repr(v) if not isinstance(v, str) or len(v) < 5 else "")
@pytest.mark.parametrize("reducer", ["uniform", "fastv"])
def test_bad_budget(model, reducer, keep, fix):
    with pytest.raises(vtc.BudgetError) as caught:
        vtc.patch(model, reducer, keep=keep)
    assert fix in one_sentence(caught.value) and "keep=" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [0, NAN, 1.5, True])
def test_bad_average(model, value):
    with pytest.raises(vtc.BudgetError, match="avg_tokens="):
        vtc.patch(model, "uniform", avg_tokens=value)


def test_an_average_that_the_layers_before_already_exceed(model, inputs):
    """Known only when the image is there: 16 tokens in layers 0..3 of 5 average above 4 whatever follows."""
    handle = vtc.patch(model, "fastv", avg_tokens=4, layer=4)
    try:
        with pytest.raises(vtc.BudgetError) as caught:
            model(**inputs)
        assert "or an earlier layer" in one_sentence(caught.value)
        least = int(one_sentence(caught.value).split("use at least ")[1].split()[0])
    finally:
        handle.remove()
    with vtc.patch(model, "fastv", avg_tokens=least, layer=4) as handle, torch.no_grad():
        model(**inputs)  # the number named works
        assert handle.stats.last.images[0].avg_tokens <= least


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("request_", "kind", "fix"), REQUESTS)
def test_bad_request(model, request_, kind, fix):
    reducer, options = request_
    with pytest.raises(kind) as caught:
        vtc.patch(model, reducer, **options)
    assert fix in one_sentence(caught.value)


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 4, "layer": 9}, {"keep": 4, "nosuch": 1}, {"keep": 99}])
def test_a_refused_patch_leaves_the_previous_one_in_force(model, inputs, options):
    with vtc.patch(model, "uniform", keep=6) as handle, torch.no_grad():
        before = state(model)
        expected = model(**inputs).logits
        with pytest.raises(vtc.VtcError):
            vtc.patch(model, "fastv", **options)
        assert handle_of(model) is handle and handle.active and state(model) == before
        assert torch.equal(model(**inputs).logits, expected)
        assert handle.stats.last.images[0].kept == 6
    assert handle_of(model) is None


# -------------------------------------------------------------------------------------------------------------- models
def test_unsupported_family():
    config = transformers.Blip2Config()
    config.vision_config.num_hidden_layers = config.qformer_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        other = transformers.Blip2ForConditionalGeneration(config)
    before = state(other)
    with pytest.raises(vtc.UnsupportedModelError) as caught:
        vtc.patch(other, "uniform", keep=4)
    text = one_sentence(caught.value)
    assert "'blip-2'" in text and all(name in text for name in vtc.list_families())
    assert state(other) == before and isinstance(caught.value, TypeError)


def test_not_a_transformers_model():
    with pytest.raises(vtc.UnsupportedModelError) as caught:
        vtc.patch(torch.nn.Linear(2, 2), "uniform", keep=4)
    assert "AutoModelForImageTextToText.from_pretrained" in one_sentence(caught.value)


def test_unsupported_tower():
    from transformers import Dinov2Config, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**small, vocab_size=32)
    config = LlavaConfig(vision_config=Dinov2Config(**small, image_size=28, patch_size=14), text_config=text)
    with pytest.raises(vtc.UnsupportedModelError) as caught:
        vtc.patch(LlavaForConditionalGeneration(config), "uniform", keep=2)
    assert "CLIP, SigLIP and Pixtral towers are" in one_sentence(caught.value)


@pytest.fixture
def needs_cls():
    """A reducer that works only with a class token."""

    @registry.register("needs_cls", paper="baseline")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NeedsCls(Scorer):
        """Test."""

        stage: ClassVar[Stage] = Stage.BOUNDARY

        @property
        def needs(self) -> tuple[Need, ...]:
            return (cls_attn(-2, substitute=False),)

        def score(self, signals):
            return signals.cls_attn

    yield "needs_cls"
    registry.unregister("needs_cls")


def test_a_signal_this_model_lacks(needs_cls):
    tower = build("llava_siglip", dtype=torch.float32)
    before = state(tower)
    with pytest.raises(vtc.UnsupportedSignalError) as caught:
        vtc.patch(tower, needs_cls, keep=4)
    text = one_sentence(caught.value)
    assert "signal 'cls_attn' needs 'cls'" in text, "says which"
    usable = text.split("work here: ")[1].split(", ")
    assert needs_cls not in usable and len(usable) >= 3
    assert state(tower) == before
    inputs = make_inputs("llava_siglip", tower)
    for name in usable:  # and these do work
        with vtc.patch(tower, name, keep=0.5) as handle, torch.no_grad():
            tower(**inputs)
            assert handle.stats.last.fired


def test_a_stage_this_model_refuses():
    full = build("llava", dtype=torch.float32, vision_feature_select_strategy="full")
    before = state(full)
    with pytest.raises(vtc.UnsupportedFeatureError) as caught:
        vtc.patch(full, "visionzip", keep=4)
    assert "stage 'vision'" in one_sentence(caught.value) and "vision_feature_select_strategy='full'" in str(caught.value)
    assert state(full) == before


# ------------------------------------------------------------------------------------------------------ during a call
@pytest.mark.parametrize("action", ["patch", "unpatch", "remove"])
def test_patching_while_generate_runs(model, inputs, action):
    handle = vtc.patch(model, "uniform", keep=5)
    caught: list[BaseException] = []

    def meddle(*_) -> None:
        try:
            {
                "patch": lambda: vtc.patch(model, "fastv", keep=3),
                "unpatch": lambda: vtc.unpatch(model),
                "remove": handle.remove,
            }[action]()
        except PatchError as error:
            caught.append(error)

    class Meddle(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            meddle()
            thread = threading.Thread(target=meddle)  # another thread is refused, too
            thread.start()
            thread.join()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    try:
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False, stopping_criteria=[Meddle()])
        assert len(caught) == 8 and "between calls" in one_sentence(caught[0])
        assert torch.equal(output, expected) and handle.active, "the running call and its patch are intact"
    finally:
        handle.remove()  # idle again: allowed
    assert handle_of(model) is None


def test_patching_while_a_forward_runs(model, inputs):
    handle = vtc.patch(model, "uniform", keep=5)
    caught: list[BaseException] = []

    def meddle(*_) -> None:
        try:
            vtc.patch(model, "fastv", keep=3)
        except PatchError as error:
            caught.append(error)

    hook = model.model.language_model.layers[1].register_forward_hook(meddle)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    assert len(caught) == 1 and handle.active and handle.stats.last.images[0].kept == 5
    with vtc.patch(model, "fastv", keep=3):
        assert not handle.active


# -------------------------------------------------------------------------------------- inputs that are fine but special
@pytest.mark.parametrize("reducer", ["uniform", "fastv", "visionzip"])
def test_text_only_prompt_passes_and_is_reported(model, inputs, reducer):
    text = {"input_ids": inputs["input_ids"][~visual_of(inputs)][None]}
    with torch.no_grad():
        expected = model(**text).logits
        with vtc.patch(model, reducer, keep=5) as handle:
            assert torch.equal(model(**text).logits, expected)
            assert handle.stats.last.text_only and not handle.stats.last.images and not handle.stats.last.fired
            assert handle.stats.last.to_dict()["text_only"]
            model(**inputs)
            assert not handle.stats.last.text_only and handle.stats.last.fired


@pytest.mark.parametrize("reducer", vtc.list_reducers())
def test_an_image_with_fewer_tokens_than_the_budget_is_kept_whole(reducer):
    model = build("llava_next", dtype=torch.float32)
    inputs = make_inputs("llava_next", model, sizes=[[56, 30]])
    tokens = int(visual_of(inputs).sum())
    most = vtc.families.family_of(model).facts.max_tokens
    assert tokens < 80 < most, "the budget is possible on this model, just not for this image"
    with torch.no_grad():
        expected = model(**inputs).logits
        with vtc.patch(model, reducer, **{**CASES[reducer].whole, "keep": 80}) as handle:
            logits = model(**inputs).logits
    image = handle.stats.last.images[0]
    if not handle.reducer.parts()[-1].decides_itself:
        assert image.kept == image.slots == tokens
        torch.testing.assert_close(logits, expected)
    assert image.stages[0].before == image.stages[0].after == tokens
    assert image.stages[0].note == "fewer tokens than the budget: kept whole", "and reported"
    with vtc.patch(model, reducer, **CASES[reducer].whole) as handle, torch.no_grad():
        model(**inputs)
    assert handle.stats.last.images[0].stages[0].note == "", "a budget that is met exactly is nothing to report"


# --------------------------------------------------------------------------------------------- every reducer, odd pictures
reducers = pytest.mark.parametrize("reducer", vtc.list_reducers())


@reducers
@pytest.mark.parametrize(("family", "value"), [("llava", NAN), ("llava_next", float("inf"))])
def test_pixels_that_are_no_numbers_are_named(reducer, family, value):
    model = shared(family, dtype=torch.float32)
    inputs = make_inputs(family, model, 2)
    inputs["pixel_values"][-1, ..., :3, :3] = value
    with vtc.patch(model, reducer, **CASES[reducer].mild), torch.no_grad(), pytest.raises(vtc.InvalidSignalError) as caught:
        model(**inputs)
    text = one_sentence(caught.value)
    where = r"(the image|the vision tower's output|the boundary|tower layer \d|decoder layer \d)"
    assert (
        re.match(rf"signal '\w+'( of '{reducer}')? at {where}", text) and f"'{reducer}'" in text and "check the input" in text
    )


@pytest.mark.parametrize("reducer", [n for n, e in registry.entries().items() if "decoder" in e.stages])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_states_that_are_no_numbers_are_named_with_their_layer(reducer, value):
    family = "llava_next" if reducer == "flowcut" else "llava"  # its cut in the language model is for AnyRes models
    model = shared(family, dtype=torch.float32)
    inputs = make_inputs(family, model, 2)

    def spoil(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, 7] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = model.model.language_model.layers[0].register_forward_hook(spoil)
    try:
        with vtc.patch(model, reducer, **CASES[reducer].mild), torch.no_grad():
            with pytest.raises(vtc.InvalidSignalError, match=rf"signal '\w+' at decoder layer \d \('{reducer}'\)"):
                model(**inputs)
    finally:
        hook.remove()


@functools.cache
def picture_model(side: int, alike: bool):
    """LLaVA whose pictures have ``side`` x ``side`` tokens; ``alike``: all of them the same (no positions, a blank picture)."""
    model = build("llava", dtype=torch.float32, vision={"image_size": 7 * side})
    picture = [IMAGE_TOKEN] * (side * side)
    rows = [[1, 5, *picture, 7, 8, 9, 10, 11, 12], [1, *picture, 6, *picture, 20, 21, 22, 23, 24, 25]]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    pixels = torch.randn(3, 3, 7 * side, 7 * side, generator=torch.Generator().manual_seed(side))
    if alike:
        tower = model.model.vision_tower
        torch.nn.init.zeros_(getattr(tower, "vision_model", tower).embeddings.position_embedding.weight)
        pixels = torch.full_like(pixels, 0.3)
    return model, {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


@reducers
@pytest.mark.parametrize(("side", "alike"), [(1, False), (5, False), (4, True)], ids=["one-token", "5x5", "alike"])
def test_odd_grids_one_token_and_identical_tokens(reducer, side, alike):
    model, inputs = picture_model(side, alike)
    for keep in (1, 0.4, 1.0):
        try:
            handle = vtc.patch(model, reducer, **{**CASES[reducer].mild, "keep": keep})
        except vtc.BudgetError as refusal:  # a method that cannot go so low says how far it can
            assert keep == 1
            keep = int(re.search(r"keep at least (\d+) tokens", one_sentence(refusal))[1])
            handle = vtc.patch(model, reducer, **{**CASES[reducer].mild, "keep": keep})
        with handle, torch.no_grad():
            logits = model(**inputs).logits
        assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
        for image in handle.stats.last.images:
            assert image.slots == side * side and image.kept == image.tokens_per_layer[-1] == image.stages[-1].after
            for stage in image.stages:
                if stage.requested is not None and CASES[reducer].count != "all":
                    room = min(stage.requested, stage.before)
                    assert stage.after == room if CASES[reducer].count == "exact" else 0 <= stage.after <= room


# -------------------------------------------------------------------------------------------------------- image files
def test_image_files(tmp_path):
    good = tmp_path / "good.png"
    pixels = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(good)
    assert open_image(good).size == (64, 64)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    flipped = tmp_path / "flipped.png"
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 0xFF
    flipped.write_bytes(data)
    for path, said in (
        (tmp_path / "missing.png", "there is no image file"),
        (tmp_path, "there is no image file"),
        (text, "convert it to PNG or JPEG"),
        (empty, "convert it to PNG or JPEG"),
        (cut, "is damaged"),
        (flipped, "is damaged"),
    ):
        with pytest.raises(InputFileError) as caught:
            open_image(path)
        assert said in one_sentence(caught.value) and path.name in str(caught.value)


# --------------------------------------------------------------------------------------------------------- command line
@pytest.fixture
def refused(capsys, monkeypatch):
    """Run the command line; check that it refuses in one sentence before a model runs, and return the sentence."""

    def ran(*_, **__):
        raise AssertionError("a model ran")

    monkeypatch.setattr("vtc.trial.trial", ran)

    def go(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 1 and out == "" and err.startswith("error: ")
        assert err.count("\n") == 1 and "Traceback" not in err and "unexpected" not in err
        return err

    return go


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (20, 20), (10, 200, 30)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("keep", "fix"),
    [
        ("0", "keep at least one"),
        ("-2", "keep at least one"),
        ("nan", "share in (0, 1]"),
        ("1.5", "share in (0, 1]"),
        ("True", "is not a number"),
        ("many", "is not a number"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_command_line_budgets(refused, image, command, keep, fix):
    start = (
        ("check", "pocket", "fastv") if command == "check" else ("run", "--image", image, "--prompt", "x", "--reducer", "fastv")
    )
    assert fix in refused(*start, f"--keep={keep}")


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("--reducer", "fastvv", "--keep", "9"), "did you mean 'fastv'"),
        (("--reducer", "fastv.papers"), "did you mean 'paper'"),
        (("--reducer", "fastv", "--keep", "9", "--avg-tokens", "9"), "give exactly one of"),
        (("--reducer", "fastv", "--keep", "9", "-o", "layr=2"), "did you mean 'layer'"),
        (("--reducer", "fastv", "--keep", "9", "-o", "layer"), "is not name=value"),
        (("--reducer", "fastv", "--keep", "9", "--model", "/no/such/folder"), "there is no folder"),
        (("--reducer", "fastv", "--keep", "9", "--model", "no/model"), "hub id that is in the local cache"),
        (("--reducer", "fastv", "--keep", "9", "--device", "warp"), "use --device auto or cpu"),
        (("--reducer", "fastv", "--keep", "9", "--dtype", "int8"), "use auto, float32"),
        (("--reducer", "fastv", "--keep", "9", "--show", "kept.txt"), "use a name such as kept.png"),
        (("--reducer", "fastv", "--keep", "9", "--show", "image.png/kept.png"), "its folder cannot be made"),
    ],
)
def test_command_line_requests(refused, image, tmp_path, monkeypatch, arguments, fix):
    monkeypatch.chdir(tmp_path)
    assert fix in refused("run", "--image", image, "--prompt", "x", *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"], "nothing half-written"


def test_command_line_budget_above_the_tokens_there_are(image, capsys):
    for arguments in (("check", "pocket", "fastv"), ("run", "--image", image, "--prompt", "x", "--reducer", "fastv")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--keep", "197"])
        assert stop.value.code == 1
        assert "use at most 196, or a share such as --keep 0.25" in capsys.readouterr().err


def test_command_line_layer_out_of_range(image, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--image", image, "--prompt", "x", "--reducer", "fastv", "--keep", "9", "-o", "layer=6"])
    assert stop.value.code == 1 and "layer 6 is out of range, use 1..5" in capsys.readouterr().err


def test_command_line_images(refused, tmp_path, image):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    for path in (str(tmp_path / "missing.png"), str(broken)):
        said = refused("run", "--image", path, "--prompt", "x", "--reducer", "fastv", "--keep", "9")
        assert path.rsplit("/", 1)[1] in said


def test_command_line_models(refused, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refused("check", str(empty))
    transformers.LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    assert "is not a vision-language model" in refused("check", str(tmp_path / "llama"))
    config = transformers.Blip2Config()
    config.vision_config.num_hidden_layers = config.qformer_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    config.save_pretrained(tmp_path / "blip")
    assert "models of type 'blip-2' are not supported" in refused("check", str(tmp_path / "blip"))
    small = {"text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1]}}
    small["vision_config"] = {"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    transformers.MllamaConfig(**small).save_pretrained(tmp_path / "mllama")
    said = refused("check", str(tmp_path / "mllama"))
    reason = "look at pictures through cross-attention, so no visual tokens stand in the prompt"
    if transformers.__version__.startswith("4."):  # which cannot build the class from this configuration
        reason = "is not complete, or cannot be read by this transformers"
    assert reason in said and "did you mean" not in said
    (empty / "config.json").write_text('{"model_type": "from_the_future"}')
    assert "does not have: use a release that has it" in refused("check", str(empty))
    (empty / "config.json").write_text("{")
    assert "config.json of" in refused("check", str(empty))
    assert "write for example --image-size 672x448" in refused("check", "pocket", "--image-size", "672")


@pytest.mark.parametrize(
    ("command", "content", "fix"),
    [
        (("sweep", "{tmp}/missing.yaml"), None, "missing.yaml"),
        (("sweep", "{tmp}/file.yaml"), "nosuchkey: 1\n", "nosuchkey"),
        (("sweep", "{tmp}/file.yaml"), "{}\n", "file.yaml"),
        (("table", "{tmp}/nothing"), None, "nothing"),
    ],
)
def test_command_line_of_the_harness(refused, tmp_path, monkeypatch, command, content, fix):
    """The harness's own tests have the details; here: exit code 1, one sentence, and no results folder left behind."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "file.yaml").write_text(content)
    assert fix in refused(*(part.format(tmp=tmp_path) for part in command))
    assert {p.name for p in tmp_path.iterdir()} <= {"file.yaml"}


def test_results_of_another_version_are_refused(refused, tmp_path):
    from vtc.eval.store import Store

    Store(tmp_path / "store", create=True)
    marker = tmp_path / "store" / "store.json"
    data = json.loads(marker.read_text())
    (key,) = [k for k, v in data.items() if "schema" in k and isinstance(v, int)]
    marker.write_text(json.dumps(data | {key: data[key] + 1}))
    assert "version" in refused("table", str(tmp_path / "store"))
