"""The lmms-eval plugin in one process: what it builds, refuses, counts and caches; the table of benchmarks; the offline tasks."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
import types
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import transformers
from clocks import Script
from PIL import Image

import vtc
from vtc.errors import ConfigError, UnknownArgumentError, UnknownReducerError
from vtc.eval.lmms import Benchmark, check_task, known_tasks, run_task
from vtc.eval.lmms.benchmarks import JUDGES, TASKS
from vtc.eval.lmms.locks import own_locks
from vtc.eval.tasks import utils as offline
from vtc.pocket import DETAIL_QUESTION_TYPES, QUESTION_TYPES, load_pocket, pocket_path, scene_questions
from vtc.reducers.uniform import Uniform

LIMIT = 12
POCKET = str(pocket_path())


@pytest.fixture(scope="module")
def manager():
    """lmms-eval's index with ours."""
    from vtc.eval.lmms.run import _manager

    return _manager(True)


@pytest.fixture(scope="module")
def pocket():
    return load_pocket()


def evaluate(model, args="", task="vtc_scenes", limit=LIMIT, **kwargs):
    """What `lmms-eval --model MODEL --model_args ARGS --tasks TASK` calls."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, model_name=str(model))
    with own_locks():  # other tests of this process use locks, too
        return simple_evaluate(
            model=model, model_args=args, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, **kwargs
        )


def samples(result, task="vtc_scenes"):
    return result["samples"][task]


def answers(rows):
    return [row["filtered_resps"][0] for row in rows]


def counts(rows, *keys):
    return [tuple(row["token_counts"][0][key] for key in keys) for row in rows]


@pytest.fixture(scope="module")
def reduced():
    """The rows of the plain command line's path, with a reducer."""
    return evaluate("vtc", "pretrained=pocket,reducer=fastv,keep=49", batch_size=5)


# ------------------------------------------------------------------------------------------------------------- entry
def test_both_models_come_through_the_entry_point():
    from lmms_eval import models

    assert models.get_model("vtc").__name__ == "PatchedChat" and not models.get_model("vtc").is_simple
    assert models.get_model("vtc", force_simple=True).is_simple
    assert models.get_model("vtc_hf").__name__ == "ChatModel"


def test_the_entry_point_and_the_table_import_nothing_heavy(tmp_path):
    code = (
        "import sys, vtc.eval.lmms.plugin, vtc.eval.lmms.commands\n"
        "from vtc.eval.lmms import known_tasks; known_tasks()\n"
        "heavy = {'lmms_eval', 'transformers', 'datasets', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# ------------------------------------------------------------------------------------------------- counting, answering
def test_counts_and_times_of_every_sample_are_logged(reduced):
    rows = samples(reduced)
    assert len(rows) == LIMIT
    assert counts(rows, "slots", "kept", "avg_tokens") == [(196, 49, 98.0)] * LIMIT  # 2 layers of 196, then 4 of 49
    for row in rows:
        record = row["token_counts"][0]
        assert record["input_tokens"] == record["prompt_tokens"] - 147 and record["output_tokens"] == record["new_tokens"] > 0
        assert 0 < record["ttft_s"] <= record["generate_s"] and record["batch"] in (5, LIMIT % 5)
    assert reduced["efficiency"]["overall"]["total_input_tokens"] == sum(r["token_counts"][0]["input_tokens"] for r in rows)
    assert reduced["throughput"]["total_gen_tokens"] == sum(r["token_counts"][0]["output_tokens"] for r in rows)


def test_a_batch_answers_as_single_questions_do(reduced):
    single = samples(evaluate("vtc", "pretrained=pocket,reducer=fastv,keep=49", batch_size=1))
    assert answers(single) == answers(samples(reduced))
    assert counts(single, "slots", "kept", "prompt_tokens") == counts(samples(reduced), "slots", "kept", "prompt_tokens")


def test_a_class_of_lmms_eval_is_patched_as_ours_is(reduced):
    args = f"base=llava_hf,pretrained={POCKET},prompts=default,reducer=fastv,keep=49"
    stock = samples(evaluate("vtc", args, batch_size=1, device="cpu"))
    assert answers(stock) == answers(samples(reduced))
    assert counts(stock, "slots", "kept", "avg_tokens") == counts(samples(reduced), "slots", "kept", "avg_tokens")


@pytest.fixture
def bases():
    """Two classes in lmms-eval's registry: a batching one of its older kind, and one that asks a server."""
    from lmms_eval import models
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest

    class Simple(lmms):
        def __init__(self, pretrained, batch_size=1):
            super().__init__()
            self.model, self.processor = load_pocket(pretrained)
            self.batch_size = int(batch_size)

        def generate_until(self, requests):
            said = []
            for start in range(0, len(requests), self.batch_size):
                contexts, _, to_visual, numbers, tasks, splits = zip(
                    *(r.args for r in requests[start : start + self.batch_size]), strict=True
                )
                # the first function for all documents of one task: how many classes of lmms-eval do it
                images = [to_visual[0](self.task_dict[tasks[0]][splits[0]][n])[0] for n in numbers]
                text = [f"<s>user : <image> {c} assistant :" for c in contexts]
                inputs = self.processor(text=text, images=images, return_tensors="pt", padding=True, padding_side="left")
                output = self.model.generate(**inputs, max_new_tokens=2, do_sample=False)
                new = output[:, inputs["input_ids"].shape[1] :]
                said += self.processor.batch_decode(new, skip_special_tokens=True)
            return said

        loglikelihood = generate_until_multi_round = None

    class Remote(Simple):
        def __init__(self, pretrained):
            lmms.__init__(self)

    module = types.ModuleType("vtc_test_bases")
    module.Simple, module.Remote = Simple, Remote
    sys.modules[module.__name__] = module
    for name in ("Simple", "Remote"):
        models.MODEL_REGISTRY_V2.register_manifest(
            ModelManifest(f"test_{name.lower()}", simple_class_path=f"{module.__name__}.{name}")
        )
    yield
    del sys.modules[module.__name__]
    for name in ("test_simple", "test_remote"):
        models.MODEL_REGISTRY_V2._manifests.pop(name)
        models.MODEL_REGISTRY_V2._alias_to_model_id.pop(name)


def test_a_class_of_the_older_kind_is_counted_in_batches(bases, reduced):
    args = "base=test_simple,pretrained=pocket,reducer=fastv,keep=49"
    rows = samples(evaluate("vtc", args, batch_size=5, force_simple=True))
    assert answers(rows) == answers(samples(reduced))
    assert counts(rows, "slots", "kept", "prompt_tokens") == counts(samples(reduced), "slots", "kept", "prompt_tokens")


def test_a_class_without_a_model_here_is_refused(bases):
    from vtc.eval.lmms.model import build

    with pytest.raises(ConfigError, match="base=test_remote keeps no transformers model in this process"):
        build({"base": "test_remote", "pretrained": "x"}, force_simple=True)


def test_tasks_use_the_prompts_of_the_base_class():
    args = f"base=llava_hf,pretrained={POCKET}"
    result = evaluate("vtc", args, limit=1, batch_size=1, device="cpu")
    assert samples(result)[0]["arguments"][0].endswith("Answer the question using a single word or phrase.")


def test_the_embedded_model_is_asked_the_bare_question(reduced):
    assert samples(reduced)[0]["arguments"][0] == scene_questions("test", 1)[0].prompt


def test_one_object_serves_many_runs_and_reducers(reduced):
    from vtc.eval.lmms.model import build

    lm = build({"pretrained": "pocket"}, {"batch_size": 5})
    full = evaluate(lm)
    lm.reduce("fastv", keep=49)
    again = evaluate(lm)
    lm.reduce(None)
    assert answers(samples(again)) == answers(samples(reduced))
    assert counts(samples(again), "kept") == [(49,)] * LIMIT
    assert counts(samples(full), "slots", "kept") == [(196, 196)] * LIMIT
    assert answers(samples(evaluate(lm))) == answers(samples(full)) != answers(samples(again))
    assert "generate" not in vars(lm.model)
    lm.close()
    assert not hasattr(lm, "_model")


def test_batches_hold_any_number_of_images():
    from vtc.eval.lmms.model import build

    lm = build({"pretrained": "pocket", "reducer": "uniform", "keep": 20})
    questions = scene_questions("test", 3)

    def ask(*picked):
        content = [{"type": "image", "url": q.image} for q in picked]
        return [{"role": "user", "content": [*content, {"type": "text", "text": questions[0].prompt}]}]

    asked = [ask(questions[0]), ask(), ask(*questions)]
    together = lm._inputs(asked)
    assert together["pixel_values"].shape[0] == 4 and together["input_ids"].shape[0] == 3
    output = lm.model.generate(**together, **lm._generation({"max_new_tokens": 2}, "x"))
    assert sorted((i.row, i.kept) for i in lm.handle.stats.last.images) == [(0, 20), (2, 20), (2, 20), (2, 20)]
    for row, one in enumerate(asked):
        alone = lm._inputs([one])
        single = lm.model.generate(**alone, **lm._generation({"max_new_tokens": 2}, "x"))
        assert torch.equal(single[0, alone["input_ids"].shape[1] :], output[row, together["input_ids"].shape[1] :])


def comparing(kind):
    """A processor that compares pictures and prompts row by row, with the embedded model's words."""
    extra = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"} if kind == "gemma3" else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(POCKET, extra_special_tokens=extra)
    mark = "<boi>" if kind == "gemma3" else "<image>"
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}" + mark + " "
        "{% endif %}{% endfor %}{% endfor %}"
    )
    if kind == "gemma3":
        images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
    return transformers.Idefics3Processor(images, tokenizer, chat_template=template, image_seq_len=4)


@pytest.mark.parametrize("kind", ["gemma3", "idefics3"])
def test_a_batch_may_hold_a_question_without_a_picture(kind, pocket):
    from vtc.eval.lmms.model import ChatModel

    lm = ChatModel(pocket[0], comparing(kind))

    def ask(*colors):
        pictures = [{"type": "image", "url": Image.new("RGB", (28, 28), color)} for color in colors]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": "what color is it ?"}]}]

    asked = [ask("red"), ask(), ask("green", "blue")]
    together, alone = lm._inputs(asked), [lm._inputs([one]) for one in asked]
    for row, one in enumerate(alone):
        real = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row, real], one["input_ids"][0])
    assert "pixel_values" not in alone[1]
    size = together["pixel_values"].shape[-3:]
    pixels = together["pixel_values"].reshape(-1, *size)
    pixels = pixels[pixels.flatten(1).any(1)]  # where rows are padded to the same number of pictures, by zeros
    assert torch.equal(pixels, torch.cat([alone[row]["pixel_values"].reshape(-1, *size) for row in (0, 2)]))


# ------------------------------------------------------------------------------------------------------- stop strings
@pytest.mark.parametrize(
    ("until", "answer"),
    [
        (["ASSISTANT:", "Q:"], "a red one\n\nand "),
        ("Q:", "a red one\n\nand "),
        (["red", "a "], ""),
        (["\n\n"], "a red one\n\nand Q: ASSISTANT: more"),
        ([""], "a red one\n\nand Q: ASSISTANT: more"),
        ([], "a red one\n\nand Q: ASSISTANT: more"),
        (None, "a red one\n\nand Q: ASSISTANT: more"),
    ],
)
def test_an_answer_ends_where_the_first_stop_string_begins(until, answer):
    from vtc.eval.lmms.model import _stops, before

    assert before("a red one\n\nand Q: ASSISTANT: more", _stops({"until": until})) == answer


@pytest.mark.parametrize("until", [3, [3], {"a": 1}])
def test_stop_strings_that_are_none_are_refused(until):
    from vtc.eval.lmms.model import _stops

    with pytest.raises(ConfigError, match="until=.* of this task is neither a text nor a list"):
        _stops({"until": until})


def test_the_stop_strings_of_a_task_end_its_answers(pocket):
    """A word, and a special token that decoding leaves out."""
    from vtc.eval.lmms.model import ChatModel, _Chat

    model, processor = pocket
    lm = ChatModel(model, processor, batch_size=2)
    said = torch.tensor([[processor.tokenizer.convert_tokens_to_ids(w) for w in ("green", "red", "<image>", "blue")]])
    model.generate = lambda input_ids, **_: torch.cat([input_ids, said.expand(len(input_ids), -1)], 1)
    lm.task_dict = {"t": {"test": scene_questions("test", 2)}}

    def to_messages(question):
        shown = [{"type": "image", "url": question.image}, {"type": "text", "text": question.prompt}]
        return [{"role": "user", "content": shown}]

    def answers(until):
        requests = [types.SimpleNamespace(args=("", to_messages, {"until": until}, n, "t", "test")) for n in (0, 1)]
        return [a.split() for a in _Chat.generate_until(lm, requests)]

    try:
        assert answers(["blue", "<image>"]) == [["green", "red"]] * 2
        assert answers("red") == [["green"]] * 2
        assert answers(None) == [["green", "red", "blue"]] * 2
    finally:
        del model.generate


# --------------------------------------------------------------------------------------------------------- likelihood
def likelihoods(lm, answers, questions):
    """What lmms-eval asks of a simple model for tasks of several choices."""
    lm.task_dict = {"t": {"test": questions}}
    requests = [
        types.SimpleNamespace(args=(question.prompt, answer, lambda q: [q.image], number, "t", "test"))
        for number, question in enumerate(questions)
        for answer in answers
    ]
    return [result.text for result in lm.loglikelihood(requests)]


@pytest.mark.parametrize("reducer", [{}, {"reducer": "fastv", "keep": 20}, {"reducer": "cdpruner", "keep": 20}])
def test_an_answer_is_as_likely_as_generating_it(reducer):
    """The reducer sees the question and never the answer: the numbers are those of the logits that generate gives."""
    from vtc.eval.lmms.model import build

    lm = build({"pretrained": "pocket", **reducer}, force_simple=True)
    assert lm.is_simple
    for question in scene_questions("test", 3):
        inputs = lm._inputs([lm._turn([question.image], question.prompt)])
        out = lm.model.generate(**inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        said = lm.tokenizer.decode(new[:1])
        other = "red" if said.strip() != "red" else "blue"
        (loss, greedy), (worse, not_greedy) = likelihoods(lm, [" " + said.strip(), " " + other], [question])
        assert greedy and not not_greedy and loss < worse
        assert abs(loss - float(torch.nn.functional.cross_entropy(out.logits[0].float(), new[:1]))) < 1e-4
    assert lm.handle is None or lm.handle.prompt_length is None


def test_answers_of_several_tokens_are_averaged_and_empty_ones_refused():
    from vtc.eval.lmms.model import build

    lm = build({"pretrained": "pocket", "reducer": "fastv", "keep": 20}, force_simple=True)
    (question,) = scene_questions("test", 1)
    (both, _), (first, _) = likelihoods(lm, [" red blue", " red"], [question])
    inputs = lm._inputs([lm._turn([question.image], question.prompt)])
    ids = torch.tensor([[lm.tokenizer.convert_tokens_to_ids(w) for w in ("red", "blue")]])
    lm.handle.prompt_length = inputs["input_ids"].shape[1]
    inputs |= {"input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
    with torch.no_grad():
        second = torch.nn.functional.cross_entropy(lm.model(**inputs).logits[0, -2].float(), ids[0, 1])
    assert abs(2 * both - first - float(second)) < 1e-4
    with pytest.raises(ConfigError, match="has no tokens"):
        likelihoods(lm, [""], [question])
    with pytest.raises(ConfigError, match="acc_mutual_info"):
        lm.loglikelihood([types.SimpleNamespace(args=("", "red"))])


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """A task of several choices, in a folder of its own."""
    folder = tmp_path_factory.mktemp("choices")
    rows = [{"n": n, "choices": ["red", "blue", "green"], "answer": n % 3} for n in range(4)]
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "utils.py").write_text(
        "from vtc.pocket import scene_questions\n"
        "def visual(doc):\n    return [scene_questions('test', 4)[doc['n']].image]\n"
        "def text(doc):\n    return scene_questions('test', 4)[doc['n']].prompt\n"
        "def options(doc):\n    return doc['choices']\n"
        "def target(doc):\n    return doc['answer']\n"
    )
    (folder / "vtc_test_choices.yaml").write_text(
        "task: vtc_test_choices\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.json}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_visual: !function utils.visual\ndoc_to_text: !function utils.text\n"
        "doc_to_choice: !function utils.options\ndoc_to_target: !function utils.target\nmetric_list: [{metric: acc}]\n"
    )
    return folder


def test_a_task_of_several_choices_runs_in_lmms_eval(choices):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(choices), include_defaults=False, model_name="vtc")
    with own_locks():
        result = simple_evaluate(
            model="vtc", model_args="pretrained=pocket,reducer=fastv,keep=49", tasks=["vtc_test_choices"],
            task_manager=manager, bootstrap_iters=0, force_simple=True,
        )  # fmt: skip
    rows = samples(result, "vtc_test_choices")
    assert len(rows) == 4 and 0 <= result["results"]["vtc_test_choices"]["acc,none"] <= 1
    assert all(len(row["filtered_resps"]) == 3 for row in rows)


def test_a_sweep_says_how_to_run_a_task_that_is_scored_by_likelihood(choices, monkeypatch):
    from lmms_eval.tasks import TaskManager

    from vtc.eval.lmms import run

    manager = TaskManager(include_path=str(choices), include_defaults=False, model_name="default")
    monkeypatch.setattr(run, "_manager", lambda everything: manager)
    with pytest.raises(ConfigError, match="is of type multiple_choice, and sweeps ask for generated answers: .*--force_simple"):
        run.load_task.__wrapped__("vtc_test_choices")


# --------------------------------------------------------------------------------------------------------------- video
@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A film of 20 frames, 10 a second, that gets brighter."""
    import av

    path = str(tmp_path_factory.mktemp("clip") / "clip.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def onevision():
    """A tiny random LLaVA-OneVision that speaks the embedded model's words."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(POCKET)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "video")}
    text = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids["image"],
        video_token_index=ids["video"],
        image_grid_pinpoints=[[28, 28]],
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    size = {"height": 28, "width": 28}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[28, 28]]),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template="{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}"
        "<{{ c['type'] }}> {% endif %}{% endfor %}{% endfor %}",
    )
    return model, processor


def test_videos_are_sampled_evenly_and_answered_in_batches(clip):
    from vtc.eval.lmms.model import ChatModel, _video

    frames, times = _video(clip, 4)
    assert frames.shape == (4, 64, 64, 3) and list(times.frames_indices) == [0, 5, 10, 15] and times.fps == 10
    assert np.abs(frames.mean((1, 2, 3)) - [0, 50, 100, 150]).max() < 8
    lm = ChatModel(*onevision(), max_frames=4)

    def ask(*media):
        return [{"role": "user", "content": [*media, {"type": "text", "text": "what color is it ?"}]}]

    film = {"type": "video", "url": clip}
    stills = {"type": "video", "url": [Image.new("RGB", (64, 64), (9 * i, 9, 9)) for i in range(4)]}
    image = {"type": "image", "url": Image.new("RGB", (28, 28))}
    inputs = lm._inputs([ask(film), ask(stills), ask(image, film)])
    assert inputs["pixel_values_videos"].shape[:2] == (3, 4) and inputs["pixel_values"].shape[0] == 1
    output = lm.model.generate(**inputs, **lm._generation({"max_new_tokens": 3}, "x"))
    assert output.shape == (3, inputs["input_ids"].shape[1] + 3)
    with pytest.raises(ConfigError, match="shows the model audio"):
        lm._inputs([ask({"type": "audio", "url": "x.wav"})])


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.fixture
def breaking():
    """A reducer that fails on the third image it sees."""
    from vtc.registry import unregister

    seen = []

    @vtc.register("breaking", paper="baseline")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Breaking(Uniform):
        """Fail."""

        max_frames: int = 0

        def select(self, signals):
            seen.append(1)
            if len(seen) == 3:
                raise ZeroDivisionError("the third image")
            return Uniform.select(self, signals)

    yield seen
    unregister("breaking")


@pytest.mark.parametrize("base", ["vtc_hf", "llava_hf"])
def test_an_error_inside_generate_fails_the_run_at_once(breaking, base):
    """The stock class would log it, and answer this and every later question with an empty string."""
    from vtc.eval.lmms.model import build

    arguments = {"base": base, "pretrained": POCKET, "prompts": "default", "reducer": "breaking", "keep": 9}
    lm = build(arguments, {"batch_size": 1, "device": "cpu"})
    with pytest.raises(RuntimeError, match=r"document \d+ of task 'vtc_scenes'.*ZeroDivisionError: the third image") as caught:
        evaluate(lm)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and len(breaking) == 3
    lm.reduce("uniform", keep=9)  # the object is as good as before
    assert counts(samples(evaluate(lm, limit=2)), "kept") == [(9,), (9,)]


def test_on_the_command_line_an_error_ends_the_process(monkeypatch):
    """lmms-eval prints exceptions and exits with 0; tests/test_eval_lmms_cli.py has the real process."""
    from vtc.eval.lmms import model

    monkeypatch.setattr(model, "_caller", lambda function: sys._getframe())
    with pytest.raises(SystemExit, match="vtc: no reducer named 'fastw'; did you mean 'fastv'"):
        model.PatchedChat.create_from_arg_string("pretrained=pocket,reducer=fastw,keep=4")


def test_rows_that_cannot_be_told_apart_are_an_error(pocket):
    from vtc.eval.lmms.meter import GenerateFailedError, Meter

    model, processor = pocket
    meter = Meter(model, None)
    documents = meter.documents({"task": {"test": ["a", "b"]}})
    assert documents["task"]["test"][0] == "a"
    inputs = processor(text=["user : yes"] * 2, return_tensors="pt")
    with meter.watching(), pytest.raises(GenerateFailedError):
        model.generate(**inputs, max_new_tokens=1)
    assert "read 1 documents and called generate with 2 rows" in str(meter.error)
    with meter.watching():
        for _ in range(2):  # read for the image and again for the text: still one row
            documents["task"]["test"][1]
        model.generate(**processor(text=["user : yes"], return_tensors="pt"), max_new_tokens=1)
    assert meter.records["task", "test", 1]["slots"] == 0


def test_the_first_token_and_the_whole_answer_are_timed(pocket, monkeypatch):
    """Both from the call of generate on; the first token once, however many follow."""
    from vtc.eval.lmms import meter

    model, processor = pocket
    watch = meter.Meter(model, None)
    documents, inputs = watch.documents({"task": {"test": ["a"]}}), processor(text=["user : yes"], return_tensors="pt")
    for length in (3, 1):
        documents["task"]["test"][0]
        clock = Script(1, 3, 10).put_into(monkeypatch, meter)
        with watch.watching():
            model.generate(**inputs, max_new_tokens=length, min_new_tokens=length)
        record = watch.records["task", "test", 0]
        assert (record["ttft_s"], record["generate_s"], clock.looks, record["new_tokens"]) == (2, 9, 3, length)


# ------------------------------------------------------------------------------------------------------------ arguments
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("pretrained=pocket,reducer=flowcutt,keep=9", UnknownReducerError, "did you mean 'flowcut'"),
        ("pretrained=pocket,reducer=flowcut.papr", UnknownReducerError, "has no preset 'papr'"),
        ("pretrained=pocket,reducer=flowcut,kep=9", UnknownArgumentError, "has an option 'kep'; did you mean 'keep'"),
        (
            "pretrained=pocket,keep=9",
            UnknownArgumentError,
            "neither the reducer 'none' nor the model 'vtc_hf' has an option 'keep'",
        ),
        ('pretrained=pocket,reducer_args={"keep":9}', UnknownArgumentError, "keep: there is no reducer"),
        ("pretrained=pocket,reducer=flowcut,keep=0", vtc.BudgetError, "keep=0 is out of range"),
        ("pretrained=pocket,reducer=flowcut,reducer_args={keep}", ConfigError, "write a JSON object"),
        ("pretrained=./nowhere", ConfigError, r"pretrained=./nowhere: .*\(give pocket or pocket-next, a local folder"),
        ("reducer=flowcut,keep=9", ConfigError, "which model"),
        ("base=llava_hff,pretrained=pocket", ConfigError, "base=llava_hff.*did you mean 'llava_hf'"),
        ("base=vtc,pretrained=pocket", ConfigError, "no such model"),
    ],
)
def test_bad_arguments_are_named_with_the_fix(arguments, error, message):
    from vtc.eval.lmms.model import PatchedChat

    with pytest.raises(error, match=message):
        PatchedChat.create_from_arg_string(arguments)


@pytest.mark.parametrize("size", [0, -3, "auto"])
def test_a_batch_size_is_a_positive_number(size):
    from vtc.eval.lmms.model import ChatModel

    with pytest.raises(ConfigError, match=f"batch_size={size}"):
        ChatModel.create_from_arg_string("pretrained=pocket", {"batch_size": size})


def test_a_base_that_cannot_be_imported_names_what_is_missing(monkeypatch):
    from vtc.eval.lmms.model import build

    monkeypatch.setitem(sys.modules, "decord", None)
    for name in [
        n for n in sys.modules if n.startswith(("lmms_eval.models.chat.llava_hf", "lmms_eval.models.simple.llava_hf"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="base=llava_hf cannot be imported .*pip install decord, or use base=vtc_hf"):
        build({"base": "llava_hf", "pretrained": POCKET})


def test_options_go_to_the_reducer_or_the_model_and_conflicts_are_refused(breaking):
    from vtc.eval.lmms.model import build

    lm = build({"pretrained": "pocket", "reducer": "fastv", "layer": 3, "reducer_args": '{"keep": 0.25}', "max_frames": 2})
    assert (lm.reducer.layer, lm.reducer.keep, lm.max_frames) == (3, 0.25, 2)
    with pytest.raises(UnknownArgumentError, match="both 'breaking' and 'vtc_hf' have an option 'max_frames'"):
        build({"pretrained": "pocket", "reducer": "breaking", "keep": 9, "max_frames": 2})
    assert (
        build({"pretrained": "pocket", "reducer": "breaking", "reducer_args": {"keep": 9, "max_frames": 1}}).reducer.max_frames
        == 1
    )


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    from vtc.eval.lmms.model import build

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU=true"):
        build({"pretrained": "pocket"})


# ---------------------------------------------------------------------------------------------------------------- cache
def test_cached_answers_belong_to_reducer_options_and_code(tmp_path, monkeypatch):
    from vtc.eval import env

    def run(keep, **kwargs):
        rows = samples(
            evaluate("vtc", f"pretrained=pocket,reducer=uniform,keep={keep}", limit=3, use_cache=str(tmp_path), **kwargs)
        )
        return answers(rows), [row["token_counts"][0] is None for row in rows]  # a cached answer has no counts

    first = run(40)
    assert first[1] == [False] * 3
    assert run(40) == (first[0], [True] * 3), "a second run is served from the cache"
    assert run(41)[1] == [False] * 3, "another budget is not"
    monkeypatch.setattr(env, "reducer_version", lambda reducer: "changed")
    assert run(40)[1] == [False] * 3, "nor is other code"


def test_answers_of_a_class_that_writes_into_its_arguments_are_found_again(tmp_path):
    arguments = f"base=llava_hf,pretrained={POCKET},reducer=uniform,keep=40"
    runs = [samples(evaluate("vtc", arguments, limit=2, batch_size=1, device="cpu", use_cache=str(tmp_path))) for _ in range(2)]
    assert answers(runs[0]) == answers(runs[1])
    assert [[row["token_counts"][0] is None for row in rows] for rows in runs] == [[False] * 2, [True] * 2]


def test_an_object_names_itself_by_reducer_options_and_code(monkeypatch):
    from vtc.eval import env
    from vtc.eval.lmms.model import build

    lm = build({"pretrained": "pocket"})
    seen = {str(lm)}
    for reducer, options in (
        ("uniform", {"keep": 9}),
        ("uniform", {"keep": 10}),
        ("fastv", {"keep": 9}),
        ("fastv", {"keep": 9, "layer": 3}),
    ):
        lm.reduce(reducer, **options)
        seen.add(str(lm))
    lm.reduce("uniform", keep=9)
    assert str(lm) in seen and len(seen) == 5
    monkeypatch.setattr(env, "engine_version", lambda: "changed")
    lm.reduce("uniform", keep=9)
    assert str(lm) not in seen


def test_results_say_what_was_patched(reduced):
    identity = reduced["configs"]["vtc_scenes"]["metadata"]["vtc"]
    assert identity["reducer"] == "fastv" and identity["options"]["keep"] == 49 and identity["pretrained"] == "pocket"
    json.dumps(identity)


# ---------------------------------------------------------------------------------------------------------------- table
@pytest.mark.parametrize("name", sorted(known_tasks()))
def test_the_table_agrees_with_the_installed_lmms_eval(name, manager):
    from lmms_eval.utils import load_yaml_config

    benchmark = known_tasks()[name]
    entry = manager.task_index[name]
    names = [name] if entry["type"] == "task" else load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    for member in names:
        config = load_yaml_config(manager.task_index[member]["yaml_path"], mode="simple")
        metrics = {m["metric"]: m["higher_is_better"] for m in config["metric_list"]}
        assert set(benchmark.metrics) <= set(metrics)
        assert {metrics[m] for m in benchmark.metrics} == {benchmark.higher_is_better}
        assert benchmark.filter in ([f["name"] for f in config.get("filter_list", ())] or ["none"])
        splits = config.get("test_split"), config.get("validation_split")
        length = (config.get("generation_kwargs") or {}).get("max_new_tokens")
        assert length or benchmark.max_new_tokens, "an answer must end somewhere"
        if benchmark.kind == "offline":
            assert config["dataset_path"] == "json" and config["test_split"] in config["dataset_kwargs"]["data_files"]
        else:
            assert config["dataset_path"] == benchmark.dataset and benchmark.split in splits
            if member == name:
                assert (config.get("dataset_name") or "") == benchmark.config
    assert benchmark.n > 0 and benchmark.scale in (1, 100, 1000) and benchmark.judge in ("", *JUDGES)


def test_every_offline_task_is_in_the_table():
    assert {p.stem for p in TASKS.glob("*.yaml")} == {b.name for b in known_tasks().values() if b.kind == "offline"}


# -------------------------------------------------------------------------------------------------------- offline tasks
@pytest.mark.parametrize("name", [b.name for b in known_tasks().values() if b.kind == "offline"])
def test_offline_questions_are_those_of_the_held_out_splits(name):
    from vtc.eval.lmms.run import load_task

    (task,) = load_task(name)
    docs = task.eval_docs_no_media
    assert len(docs) == known_tasks()[name].n
    source = {"vtc_easy_vqa": "easy", "vtc_details": "wide"}.get(name, "scene")
    seed = name[-1] if name[-1].isdigit() else "0"
    assert all(i.startswith(f"{source}/test/" if source == "easy" else f"{source}/test/{seed}/") for i in docs["id"])
    metrics = set(task.aggregation())
    assert {f"exact_match_{t}" for t in docs["type"]} <= metrics, "a new type of question needs a line in questions.inc"
    wanted = {"color": {"color_big", "color"}, "shape": {"shape_big", "shape"}, "count": {"count", "count_sub"}}
    part = name.removeprefix("vtc_scenes_")
    if part != name and not part.startswith("seed"):
        assert set(docs["type"]) == wanted.get(part, {part})
    elif name == "vtc_details":
        assert set(docs["type"]) == set(DETAIL_QUESTION_TYPES)
    elif source == "scene":
        assert set(docs["type"]) == set(QUESTION_TYPES)


def test_offline_images_are_those_of_the_questions():
    from vtc.pocket import detail_questions, easy_vqa_questions

    for question in (scene_questions("test", 3)[2], detail_questions("test", 2, seed=1)[1], easy_vqa_questions("test", 2)[1]):
        (image,) = offline.doc_to_visual({"id": question.id})
        assert image.tobytes() == question.image.tobytes()


@pytest.mark.parametrize(("said", "hit"), [("green", 1), (" Green.\n", 1), ("green\nblue", 1), ("dark green", 0), ("", 0)])
def test_offline_scores(said, hit):
    assert offline.process_results({"answer": "green", "type": "color"}, [said]) == {
        "exact_match": hit,
        "exact_match_color": hit,
    }


# ------------------------------------------------------------------------------------------------------------- run_task
def test_run_task_returns_rows_metrics_and_versions(pocket):
    model, processor = pocket
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    seen = []
    run = run_task(
        model, processor, "vtc_scenes", reducer=vtc.create("fastv", keep=49), batch_size=5, limit=24, seed=3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    asked = scene_questions("test", 24)
    assert [(s["id"], s["type"], s["question"], s["gold"]) for s in run.samples] == [
        (q.id, q.type, q.prompt, q.answer) for q in asked
    ]
    for s in run.samples:
        assert s["correct"] == (s["answer"] == s["gold"]) and s["score"] == float(s["correct"])
        assert (s["slots"], s["kept"], s["avg_tokens"]) == (196, 49, 98.0) and s["seconds"] > 0
    name, headline = next(iter(run.metrics.items()))
    right = sum(s["correct"] for s in run.samples)
    assert name == "exact_match" and headline == {"value": right / 24, "scale": 100, "higher_is_better": True} and 12 < right
    assert set(run.metrics) == {"exact_match", *(f"exact_match_{t}" for t in QUESTION_TYPES)}
    assert set(run.versions) == {"task", "lmms-eval", "datasets"}
    assert seen == [(5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]
    assert not hasattr(model, "_vtc_handle") and "generate" not in vars(model)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_run_task_leaves_file_locks_as_they_were(pocket, tmp_path):
    run_task(*pocket, "vtc_scenes", reducer=None, batch_size=1, limit=1, seed=0)
    with filelock.FileLock(tmp_path / "lock"), pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / "lock", timeout=0).acquire()


def test_lmms_eval_gets_the_locks_it_wants_in_every_evaluation(pocket, tmp_path):
    """It puts them in place once per process; the second evaluation must have them, too, or nested loading ends in a deadlock."""
    tried = []

    def take_twice(done, total):
        place = str(tmp_path / f"lock{len(tried)}")
        with filelock.FileLock(place), filelock.FileLock(place, timeout=0):
            tried.append(done)

    for _ in range(2):
        run_task(*pocket, "vtc_scenes", reducer=None, batch_size=1, limit=1, seed=0, progress=take_twice)
    assert tried == [1, 1]
    with filelock.FileLock(tmp_path / "lock"), pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / "lock", timeout=0).acquire()


@pytest.mark.parametrize("version", ["4.3.1", "3.12.4"])
def test_a_filelock_that_lmms_eval_breaks_on_is_refused_before_anything_is_loaded(monkeypatch, version):
    """Its evaluator imports a private module of filelock while it runs; the extra `eval` bounds filelock for it."""
    from vtc.eval.lmms.model import ChatModel

    monkeypatch.setattr("vtc._window.installed", lambda name: version)
    said = rf"cannot run with filelock {version} .*private module.*: pip install 'filelock>=3.20,<4.3'"
    with pytest.raises(ConfigError, match=said):
        check_task("vtc_scenes")
    with pytest.raises(ConfigError, match=said):
        ChatModel.create_from_arg_string("pretrained=no/such-model")


def test_where_data_sets_lie_is_what_lmms_evals_variable_says(monkeypatch):
    from vtc.eval.lmms.run import _data_folder

    monkeypatch.delenv("LMMS_EVAL_DATASETS_CACHE", raising=False)
    assert _data_folder() is None
    monkeypatch.setenv("HERE", "/data")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", " $HERE/sets ")
    assert _data_folder() == "/data/sets"


def test_run_task_without_a_reducer_answers_as_the_pocket_code_does(pocket):
    model, processor = pocket
    run = run_task(model, processor, "vtc_easy_vqa", reducer=None, batch_size=4, limit=10, seed=0)
    from vtc.pocket import answer_questions, easy_vqa_questions

    wanted = answer_questions(model, processor, easy_vqa_questions("test", 10), batch_size=4)
    assert [(s["id"], s["answer"], s["correct"]) for s in run.samples] == [(a.id, a.text, a.correct) for a in wanted]
    assert {(s["slots"], s["kept"]) for s in run.samples} == {(196, 196)}


def test_run_task_cuts_answers_where_told(pocket):
    run = run_task(*pocket, "vtc_scenes", reducer=None, batch_size=4, limit=4, seed=0, max_new_tokens=1)
    again = run_task(*pocket, "vtc_scenes", reducer=None, batch_size=4, limit=4, seed=0)
    assert [s["answer"] for s in run.samples] == [s["answer"] for s in again.samples]  # one word, then the end: nothing to cut


@pytest.fixture
def pope(tmp_path, monkeypatch):
    """A prepared cache that holds eight questions as lmms-lab-encoder/POPE."""
    import datasets
    from lmms_eval.api import task as api

    from vtc.eval.lmms import run

    text = datasets.Value("string")
    features = {k: text for k in ("id", "question_id", "question", "answer", "image_source", "category")} | {
        "image": datasets.Image()
    }
    rows = [
        {"id": q.id, "question_id": q.id, "question": q.prompt, "answer": q.answer, "image": q.image}
        | {"image_source": "", "category": "random"}
        for q in scene_questions("test", 8, ["presence"])
    ]
    file = tmp_path / "pope.parquet"
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(str(file))
    cache = tmp_path / "cache"
    datasets.load_dataset("parquet", data_files={"test": str(file)}, cache_dir=str(cache))
    (made,) = (p.parent for p in cache.glob("parquet/*/*/*/dataset_info.json"))
    place = cache / "lmms-lab-encoder___pope" / "default" / "0.0.0" / ("0" * 40)
    place.parent.mkdir(parents=True)
    made.rename(place)
    (place / "parquet-test.arrow").rename(place / "pope-test.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "pope", "config_name": "default"}))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(cache))
    for cached in (api._resolve_hf_datasets_cache_dir, run._require_data, run.load_task):
        cached.cache_clear()
    yield
    for cached in (api._resolve_hf_datasets_cache_dir, run._require_data, run.load_task):
        cached.cache_clear()


def test_a_task_of_lmms_eval_runs_from_a_prepared_cache(pope, pocket):
    run = run_task(*pocket, "pope", reducer=vtc.create("uniform", keep=98), batch_size=4, limit=None, seed=0)
    assert len(run.samples) == 8 and {s["type"] for s in run.samples} == {"random"}
    assert next(iter(run.metrics)) == "pope_f1_score" and run.metrics["pope_accuracy"]["scale"] == 100
    right = [s["gold"] == s["answer"] for s in run.samples]
    assert [s["correct"] for s in run.samples] == right and run.metrics["pope_accuracy"]["value"] == sum(right) / 8
    assert {(s["slots"], s["kept"]) for s in run.samples} == {(196, 98)}


# ------------------------------------------------------------------------------------------------------------ bad input
def test_unknown_tasks_are_refused_with_close_matches(manager):
    with pytest.raises(UnknownArgumentError, match="there is no task 'vtc_scene'; did you mean 'vtc_scenes'"):
        check_task("vtc_scene")
    with pytest.raises(
        UnknownArgumentError, match="there is no task 'refcoco_bbox_rec_vall'; did you mean 'refcoco_bbox_rec_val'"
    ):
        check_task("refcoco_bbox_rec_vall")
    assert check_task("countbench", data=False).dataset == "vikhyatk/CountBenchQA"  # any task of lmms-eval will do
    assert check_task("ai2d_lite", data=False).filter == "flexible-extract"


def test_a_data_set_that_is_not_there_is_explained(monkeypatch):
    from vtc.eval.lmms import benchmarks, run

    missing = Benchmark("somewhere", "S", ("exact_match",), 1, 1, dataset="vtc-nobody/nothing")
    monkeypatch.setattr(run, "known_tasks", lambda: {"somewhere": missing})
    assert check_task("somewhere", data=False) is missing
    with pytest.raises(ConfigError, match="vtc-nobody/nothing is not in the cache.*vtc tasks --prepare somewhere.*HF_HOME"):
        check_task("somewhere")
    judged = dataclasses.replace(benchmarks.known_tasks()["vtc_scenes"], judge="openai")
    monkeypatch.setattr(run, "known_tasks", lambda: {"vtc_scenes": judged})
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        check_task("vtc_scenes")


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    from vtc.eval.lmms import run

    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "vtc-reducers\[eval\]"'):
        check_task("vtc_scenes")


def test_no_question_is_refused_and_a_meaningless_limit_warned_of(pocket, monkeypatch):
    from vtc.eval.lmms import run

    with pytest.raises(ConfigError, match="limit=0: ask at least one question"):
        run_task(*pocket, "vtc_scenes", reducer=None, batch_size=1, limit=0, seed=0)
    whole = dataclasses.replace(known_tasks()["vtc_scenes"], limit_ok=False, note="all or nothing")
    monkeypatch.setattr(run, "known_tasks", lambda: {"vtc_scenes": whole})
    with pytest.warns(UserWarning, match="first 2 questions .all or nothing"):
        run_task(*pocket, "vtc_scenes", reducer=None, batch_size=2, limit=2, seed=0)


# -------------------------------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize(
    ("value", "score"),
    [
        (0.3, 0.3),
        (True, 1.0),
        ({"question_id": "1", "category": "x", "score": 1.0}, 1.0),  # mme, pope, mmstar, mvbench
        ({"pred": "B", "answer": "B"}, 1.0),  # seedbench
        ({"pred": 2, "ground_truth": "2"}, 1.0),  # egoschema
        ({"prediction": "A. a cat", "answer": "A"}, 1.0),  # mmbench
        ({"prediction": "a cat", "answer": "A"}, 1.0),
        ({"prediction": "Apple", "answer": "A"}, 0.0),
        ({"pred_answer": "C", "answer": "D"}, 0.0),  # videomme, mlvu, mme-realworld
        ({"parsed_pred": ["B"], "answer": "B"}, 1.0),  # mmmu
        ({"parsed_pred": "7", "answer": ["7", "seven"]}, 1.0),
        ({"gpt_score": 0}, 0.0),  # hrbench
        ({"pred": [0.1, 0.2, 0.5, 0.5], "answer": "x", "bbox": []}, None),  # refcoco
        ({"image_id": 1, "caption": "a cat"}, None),  # captions
        (None, None),
    ],
)
def test_scores_of_single_answers(value, score):
    from vtc.eval.lmms.run import _score

    assert _score(value) == score


class _Task:
    """As much of a task as the results need."""

    def __init__(self, name, *filters):
        self.task_name = name
        self.config = types.SimpleNamespace(filter_list=[{"name": f} for f in filters] or None)


def _row(doc_id, **scores):
    record = {"slots": 10, "kept": 5, "avg_tokens": 7.5, "generate_s": 2.0, "batch": 4}
    return {"doc_id": doc_id, "doc": {"category": "c"}, "target": "x", "arguments": ["q"], "filtered_resps": ["y"],
            "token_counts": [record], **scores}  # fmt: skip


def test_sums_groups_and_filters_make_one_headline():
    from vtc.eval.lmms.run import _task_run

    mme = known_tasks()["mme"]
    numbers = {
        "mme_perception_score,none": 1500.0,
        "mme_cognition_score,none": 300.0,
        "mme_cognition_score_stderr,none": "N/A",
        "alias": "mme",
    }
    better = {"mme_perception_score": True, "mme_cognition_score": True}
    rows = [_row(1, mme_cognition_score={"score": 0.0}), _row(0, mme_perception_score={"score": 1.0})]
    run = _task_run(
        mme,
        (_Task("mme", "none"),),
        {"results": {"mme": numbers}, "higher_is_better": {"mme": better}, "samples": {"mme": rows}, "versions": {"mme": 0.0}},
    )
    assert list(run.metrics)[0] == "mme_perception_score+mme_cognition_score"
    assert [m["value"] for m in run.metrics.values()] == [1800, 1500, 300]
    assert [(s["id"], s["type"], s["correct"], s["seconds"]) for s in run.samples] == [
        ("mme/0", "c", True, 0.5),
        ("mme/1", "c", False, 0.5),
    ]

    group = known_tasks()["mvbench"]
    members = tuple(_Task(f"mvbench_{n}", "none") for n in "ab")
    result = {
        "results": {"mvbench_a": {"mvbench_accuracy,none": 40.0}, "mvbench_b": {"mvbench_accuracy,none": 60.0}},
        "higher_is_better": {m.task_name: {"mvbench_accuracy": True} for m in members},
        "samples": {m.task_name: [_row(0, mvbench_accuracy={"score": 1})] for m in members},
        "versions": {m.task_name: 0.0 for m in members},
    }
    run = _task_run(group, members, result)
    assert run.metrics == {"mvbench_accuracy": {"value": 50.0, "scale": 1, "higher_is_better": True}} and len(run.samples) == 2

    two = dataclasses.replace(known_tasks()["ai2d"], filter="flexible-extract")
    rows = [_row(0, exact_match=0.0), _row(1, exact_match=0.0), _row(0, exact_match=1.0), _row(1, exact_match=0.0)]
    result = {
        "results": {"ai2d": {"exact_match,strict": 0.0, "exact_match,flexible-extract": 0.5}},
        "higher_is_better": {"ai2d": {"exact_match": True}}, "samples": {"ai2d": rows}, "versions": {"ai2d": 0.0},
    }  # fmt: skip
    run = _task_run(two, (_Task("ai2d", "strict", "flexible-extract"),), result)
    assert run.metrics["exact_match"]["value"] == 0.5 and [s["score"] for s in run.samples] == [1.0, 0.0]


def test_a_task_without_a_number_is_refused_and_single_answers_may_have_none():
    from vtc.eval.lmms.run import _task_run

    unknown = Benchmark("captions", "C", (), 1, 0)
    result = {
        "results": {"t": {"submission,none": None}},
        "higher_is_better": {"t": {}},
        "samples": {"t": []},
        "versions": {"t": 0},
    }
    with pytest.raises(ConfigError, match="gave no number .*file for a server"):
        _task_run(unknown, (_Task("t", "none"),), result)
    result["results"]["t"] = {"CIDEr,none": 0.7}
    result["samples"]["t"] = [_row(0, CIDEr={"caption": "a"})]
    run = _task_run(unknown, (_Task("t", "none"),), result)
    assert run.metrics == {"CIDEr": {"value": 0.7, "scale": 1, "higher_is_better": True}}
    assert run.samples[0]["correct"] is None and math.isnan(run.samples[0]["score"])


# -------------------------------------------------------------------------------------------------------------- command
def test_vtc_tasks_lists_finds_and_prepares(capsys):
    from vtc.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["tasks", *arguments])
        return left.value.code, capsys.readouterr()

    code, said = run()
    assert code == 0 and all(name in said.out for name in known_tasks()) and "OPENAI_API_KEY" in said.out
    code, said = run("video", "--json")
    assert {row["kind"] for row in json.loads(said.out)} == {"video"}
    code, said = run("--path")
    assert Path(said.out.strip()) == TASKS
    code, said = run("gqaa")
    assert code == 1 and "did you mean 'gqa'" in said.err
    code, said = run("vtc_scenes_word", "--prepare")
    assert code == 0 and "vtc_scenes_word: ready" in said.out
