"""``vtc check``: how many visual tokens a picture becomes, by what the processor itself does; what is said of other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from models import where
from PIL import Image
from released import SIZES, checkpoints
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from vtc import cli, counts
from vtc.errors import UnsupportedModelError
from vtc.eval import models as outlines
from vtc.eval.config import ModelConfig
from vtc.inspect import examine, load_model

pytestmark = pytest.mark.filterwarnings("ignore:models of type")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """What a small copy of a model without an adapter does is not the matter here."""
    monkeypatch.setenv("VTC_VERIFY", "off")


@pytest.fixture
def call(capsys):
    """Run the command line; return exit code, standard output and standard error."""

    def go(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return go


def written(folder: Path, name: str, **files: Any) -> str:
    """A folder with the config of a released checkpoint, and other files."""
    content = {"config.json": checkpoints()[name]["config.json"], **{f"{k}.json": v for k, v in files.items()}}
    for file, data in content.items():
        (folder / file).write_text(json.dumps(data))
    return str(folder)


def settings(name: str) -> dict[str, Any]:
    return checkpoints()[name]["preprocessor_config.json"]


def tokenizer(**named: str) -> Any:
    """A tokenizer that knows special tokens and no word."""
    made = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    more = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)] + ["<global-img>", "<fake_token_around_image>"]
    out = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", extra_special_tokens=named)
    out.add_tokens([t for t in more if t not in named.values()], special_tokens=True)
    return out


# --------------------------------------------------------------------------------------------------- what the processor does
def test_settings_inside_those_of_the_processor_are_read(tmp_path):
    """transformers 5 saves no preprocessor_config.json: a large picture is not what the defaults of the class make of it."""
    name = "Qwen/Qwen2-VL-2B-Instruct"
    folder = written(
        tmp_path, name, processor_config={"image_processor": settings(name), "processor_class": "Qwen2VLProcessor"}
    )
    assert examine(folder, (2240, 1344)).count == counts.Count(80 * 48, 1, 1)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings(name)))
    assert examine(folder, (2240, 1344)).count.tokens == 80 * 48
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings(name) | {"max_pixels": 28 * 28 * 64}))
    assert examine(folder, (1000, 1000)).count.tokens == 64


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-2B-Instruct", "mistralai/Mistral-Small-3.2-24B-Instruct-2506"])
def test_without_settings_the_number_is_unknown(name, tmp_path, call):
    folder = written(tmp_path, name, processor_config={"processor_class": "AProcessor", "patch_size": 14})
    report = examine(folder, (640, 480))
    assert report.count.tokens is None and "preprocessor_config.json" in report.count.why
    code, out, _ = call("check", folder, "--image-size", "640x480")
    assert code == 0 and "unknown for an image of 640x480: it depends on the image processor" in " ".join(out.split())
    data = json.loads(call("check", folder, "--json")[1])
    assert data["visual_tokens"] is None and data["unknown_since"] == report.count.why
    outline = outlines.outline(ModelConfig(name=folder))
    assert outline.slots is None and report.count.why in outline.note


@pytest.mark.parametrize(
    ("name", "tiles", "each"), [("OpenGVLab/InternVL3-1B-hf", 13, 256), ("HuggingFaceTB/SmolVLM-256M-Instruct", 13, 64)]
)
def test_tiles_are_counted(name, tiles, each, tmp_path, call):
    folder = written(tmp_path, name, preprocessor_config=settings(name))
    assert examine(folder, (640, 480)).count == counts.Count(tiles * each, tiles, tiles)
    code, out, _ = call("check", folder, "--image-size", "640x480")
    assert code == 0 and f"{tiles * each} for an image of 640x480: {tiles} tiles of {each} (keep counts per tile)" in out
    data = json.loads(call("check", folder, "--image-size", "640x480", "--json")[1])
    assert (data["visual_tokens"], data["units"], data["tokens_per_unit"], data["unit"]) == (tiles * each, tiles, each, "tile")
    code, out, _ = call("check", folder, "fastv", "--keep", "0.5")
    assert code == 0 and f"{each} visual tokens -> {each // 2}" in out
    outline = outlines.outline(ModelConfig(name=folder))
    assert outline.slots == each and outline.pieces == examine(folder, (448, 448)).count.pieces


def test_pictures_too_large_and_processors_that_fail_are_unknown(tmp_path):
    name = "Qwen/Qwen2-VL-2B-Instruct"
    folder = written(tmp_path, name, preprocessor_config=settings(name))
    assert examine(folder, (20000, 20000)).count.why == "pictures of more than 50 megapixels are not counted"
    assert "its image processor refuses such a picture (" in examine(folder, (4000, 10)).count.why  # too long and narrow
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchImageProcessor"}')
    (tmp_path / "config.json").write_text(
        json.dumps(checkpoints()["mistralai/Mistral-Small-3.1-24B-Instruct-2503"]["config.json"])
    )
    assert examine(folder, (640, 480)).count.tokens is None or hf.__version__ >= "5"  # (which takes the class of the config)


# ------------------------------------------------------------------------------------- the same as whole processors
IMAGE = dict(image_token="<image>")
QWEN = dict(image_token="<|image_pad|>", video_token="<|video_pad|>", vision_start_token="<v>", vision_end_token="</v>")
TILES = dict(
    **{
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
)
PIXTRAL = dict(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
WHOLE: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("LlavaNext", IMAGE, dict(patch_size=14, vision_feature_select_strategy="default")),
    "Qwen/Qwen2-VL-7B-Instruct": ("Qwen2VL", QWEN, {}),
    "OpenGVLab/InternVL3-8B-hf": ("InternVL", TILES, dict(image_seq_length=256)),
    "HuggingFaceTB/SmolVLM-500M-Instruct": ("Idefics3", IMAGE, dict(image_seq_len=64)),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": ("Pixtral", PIXTRAL, dict(patch_size=14, spatial_merge_size=2)),
}
"""Checkpoint to its processor: class, special tokens by name, and what else it is made of."""


def whole_processor(name: str, folder: str) -> Any:
    kind, named, options = WHOLE[name]
    parts = {"image_processor": counts.image_processor(folder), "tokenizer": tokenizer(**named)}
    if kind in ("Qwen2VL", "InternVL"):
        parts["video_processor"] = getattr(hf, f"{kind}VideoProcessor")()
    if kind == "LlavaNext":
        options = options | {"num_additional_image_tokens": 1}
    if kind == "Pixtral":
        options = options | {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return getattr(hf, f"{kind}Processor")(**parts, **options)


# (4.57's Qwen2-VL processor takes no other tokenizer than its own, whose vocabulary is not here)
@pytest.mark.parametrize("name", [n for n in WHOLE if "Qwen2-VL" not in n or int(hf.__version__.split(".")[0]) >= 5])
def test_counts_are_those_of_the_whole_processor(name, tmp_path):
    folder = written(tmp_path, name, preprocessor_config=settings(name))
    processor = whole_processor(name, folder)
    image = processor.image_token
    token = processor.tokenizer.convert_tokens_to_ids(image)
    for size in SIZES:
        ids = processor(images=[Image.new("RGB", size, "white")], text=[image], return_tensors="pt")["input_ids"]
        assert examine(folder, size).count.tokens == int((ids == token).sum()), size


@where(hasattr(hf, "FastVlmConfig"))
def test_models_without_an_adapter_are_counted_by_their_processor(tmp_path):
    """Whose pictures no adapter knows: the placeholders in the prompt that the processor of the folder writes."""
    name = "KamilaMila/FastVLM-0.5B"
    config = checkpoints()[name]["config.json"]
    folder = written(tmp_path, name, preprocessor_config=settings(name))
    assert "its processor cannot be built or run here" in examine(folder, (640, 480)).count.why
    made = counts.image_processor(folder)
    known = tokenizer(image_token="<image>")
    config["image_token_id"] = known.convert_tokens_to_ids("<image>")
    options = {
        k: v for k, v in checkpoints()[name]["processor_config.json"].items() if k not in ("processor_class", "image_token")
    }
    hf.LlavaProcessor(image_processor=made, tokenizer=known, **options).save_pretrained(tmp_path)
    written(tmp_path, name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert examine(folder, (640, 480)).count.tokens == 256


# ------------------------------------------------------------------------------------------ other kinds of models and files
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (checkpoints()["Qwen/Qwen2.5-Omni-7B"]["config.json"], "patch `model.thinker`, a 'qwen2_5_omni_thinker'"),
        (checkpoints()["OpenGVLab/InternVL3_5-8B"]["config.json"], "needs Python code that comes with the model"),
        (checkpoints()["AIDC-AI/Ovis2-8B"]["config.json"], "needs Python code that comes with the model"),
        (
            {"model_type": "minicpmv", "auto_map": {"AutoConfig": "configuration_minicpm.C"}},
            "needs Python code that comes with",
        ),
        ({"model_type": "no_such_type"}, "which transformers"),
        ({"hidden_size": 8}, "has no model_type"),
        ({"model_type": "qwen2_vl", "text_config": {"hidden_size": 30, "num_attention_heads": 0}}, "not complete"),
        ({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model", "patch_size": 0}}, "not complete"),
        ({"model_type": "llava", "text_config": [1]}, "not complete"),
        ({"model_type": "bert"}, "not a vision-language model"),
    ],
)
def test_what_cannot_be_described_says_why(content, said, tmp_path, call, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run the folder's code"))
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError) as refusal:
        examine(str(tmp_path))
    assert said in str(refusal.value)
    code, out, err = call("check", str(tmp_path))
    assert code == 1 and out == "" and "unexpected" not in err and said in " ".join(err.split())


@where(int(hf.__version__.split(".")[0]) >= 5)  # earlier ones do not list it as a model that writes text about pictures
def test_video_llava_is_described(tmp_path, call):
    """Its towers have names of their own."""
    name = "LanguageBind/Video-LLaVA-7B-hf"
    folder = written(tmp_path, name)
    data = json.loads(call("check", folder, "--json")[1])
    assert data["tower"]["type"] == "clip_vision_model" and data["reducers"]["fastv"] == "" and not data["adapter"]


def test_retrievers_are_described(tmp_path, call):
    """ColPali writes no text; what it is good for is said."""
    folder = written(tmp_path, "vidore/colpali-v1.3-hf")
    data = json.loads(call("check", folder, "--json")[1])
    assert data["family"] == "colpali" and data["retriever"]
    assert data["reducers"]["hierpool"] == "" and "needs more than a document's vectors" in data["reducers"]["fastv"]
    code, out, _ = call("check", folder)
    assert code == 0 and "pool_vectors" in out
    assert call("check", folder, "hierpool")[0] == 0 and call("check", folder, "fastv")[0] == 1
    with pytest.raises(UnsupportedModelError, match="is a retriever and answers nothing"):
        load_model(folder)
    assert "is a retriever" in outlines.outline(ModelConfig(name=folder)).note
