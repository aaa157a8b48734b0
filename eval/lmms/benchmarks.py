"""The benchmarks of the field as a table: lmms-eval's task, where its headline number is, how it compares to the one in papers.

Names, keys and scales are those of lmms-eval 0.7.3 (a test compares them with the installed release); ``n`` is the number of
questions of the split by its data set card. The offline tasks of :mod:`vtc.eval.tasks` are in the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from vtc.pocket import DETAIL_QUESTION_TYPES, QUESTION_TYPES

TASKS = Path(__file__).resolve().parents[1] / "tasks"
"""Folder of the offline tasks: what ``lmms-eval --include_path`` wants."""

JUDGES = {
    "openai": "GPT as a judge: set OPENAI_API_KEY",
    "java": "METEOR of pycocoevalcap: install java",
    "nltk": "NLTK data, which the task fetches when it is imported",
}
"""What the scoring of some tasks needs, and how to have it."""

Kind = Literal["offline", "image", "video", "caption", "grounding"]


@dataclass(frozen=True)
class Benchmark:
    """One task and its headline number.

    Attributes
    ----------
    name : str
        Task (or group) of lmms-eval.
    title : str
        What papers call it.
    metrics : tuple of str
        Keys of the headline number in lmms-eval's results, without the filter; several are added up.
    scale : float
        Factor from lmms-eval's number to the one of the papers.
    n : int
        Questions of the split.
    kind : str
        ``"offline"`` (nothing to download), ``"image"``, ``"video"``, ``"caption"`` or ``"grounding"``.
    dataset : str
        Repository on the hub; "" for offline tasks.
    config, split : str
        Its configuration and split.
    filter : str
        lmms-eval's filter of the key.
    higher_is_better : bool
        Direction of the number.
    sample : tuple of str
        Keys of a logged sample that hold its score, the first present counts; ``metrics`` where empty.
    type_field : str
        Field of a document that names the type of question; "" where there is none.
    max_new_tokens : int or None
        What the runner sets, for tasks that leave it to the model class (a reducer that loses the end token would never stop).
    judge : str
        What scoring needs beside the answers, a key of :data:`JUDGES`; "" for nothing.
    limit_ok : bool
        Whether the number means anything on the first questions alone.
    note : str
        What to know when comparing with papers.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    scale: float
    n: int
    kind: Kind = "image"
    dataset: str = ""
    config: str = ""
    split: str = "test"
    filter: str = "none"
    higher_is_better: bool = True
    sample: tuple[str, ...] = ()
    type_field: str = ""
    max_new_tokens: int | None = None
    judge: str = ""
    limit_ok: bool = True
    note: str = ""


def _offline(name: str, title: str, n: int, note: str) -> Benchmark:
    return Benchmark(name, title, ("exact_match",), 100, n, "offline", split="test", type_field="type", note=note)


_TABLE: tuple[Benchmark, ...] = (
    _offline("vtc_scenes", "Scenes", 1200, f"{len(QUESTION_TYPES)} types of questions in turn; seed 0 of the test stream"),
    _offline("vtc_scenes_seed1", "Scenes (seed 1)", 1200, "the same with other scenes"),
    _offline("vtc_scenes_seed2", "Scenes (seed 2)", 1200, "the same with other scenes"),
    _offline("vtc_scenes_color", "Scenes: colour", 200, "of the big shape, or of a small one"),
    _offline("vtc_scenes_shape", "Scenes: shape", 200, "of the big shape, or of a small one"),
    _offline("vtc_scenes_presence", "Scenes: presence", 200, "is there a red circle? (yes/no)"),
    _offline("vtc_scenes_count", "Scenes: count", 200, "of all shapes, or of one kind"),
    _offline("vtc_scenes_spatial", "Scenes: spatial", 200, "left of, right of, above, below (yes/no)"),
    _offline("vtc_scenes_digit", "Scenes: digit", 200, "a real handwritten digit next to a shape"),
    _offline("vtc_scenes_lookup", "Scenes: lookup", 200, "the colour of the shape next to a digit"),
    _offline("vtc_scenes_word", "Scenes: word", 200, "a printed word out of 24"),
    _offline("vtc_scenes_compare", "Scenes: compare", 200, "more circles than crosses? (yes/no)"),
    _offline(
        "vtc_details",
        "Details",
        600,
        f"{len(DETAIL_QUESTION_TYPES)} types; wide scenes, readable at full size only (for AnyRes models)",
    ),
    _offline("vtc_easy_vqa", "easy-VQA", 9673, "test split of the easy-vqa package (outside data)"),
    Benchmark(
        "gqa",
        "GQA",
        ("exact_match",),
        100,
        12578,
        dataset="lmms-lab-encoder/GQA",
        config="testdev_balanced_instructions",
        split="testdev",
        note="also loads its images (testdev_balanced_images)",
    ),
    Benchmark(
        "mmbench_en_dev_static",
        "MMBench (EN)",
        ("gpt_eval_score",),
        1,
        4329,
        dataset="lmms-lab-encoder/MMBench",
        config="en",
        split="dev",
        type_field="category",
        note="no GPT matching of answers that cannot be parsed",
    ),
    Benchmark(
        "mmbench_cn_dev",
        "MMBench (CN)",
        ("gpt_eval_score",),
        1,
        4329,
        dataset="lmms-lab-encoder/MMBench",
        config="cn",
        split="dev",
        type_field="category",
        judge="openai",
    ),
    Benchmark(
        "mme",
        "MME (sum)",
        ("mme_perception_score", "mme_cognition_score"),
        1,
        2374,
        dataset="lmms-lab-encoder/MME",
        type_field="category",
        limit_ok=False,
        note="at most 2800; papers that give perception alone (at most 2000) are not comparable; scored by image, so no limit",
    ),
    Benchmark(
        "pope",
        "POPE",
        ("pope_f1_score",),
        100,
        9000,
        dataset="lmms-lab-encoder/POPE",
        sample=("pope_accuracy",),
        type_field="category",
        note="F1; some papers give accuracy",
    ),
    Benchmark(
        "scienceqa_img",
        "ScienceQA-IMG",
        ("exact_match",),
        100,
        2017,
        dataset="lmms-lab-encoder/ScienceQA",
        config="ScienceQA-IMG",
    ),
    Benchmark(
        "vqav2_val",
        "VQAv2",
        ("exact_match",),
        100,
        214354,
        dataset="lmms-lab-encoder/VQAv2",
        split="validation",
        type_field="answer_type",
        note="papers: test-dev of the server",
    ),
    Benchmark(
        "textvqa_val",
        "TextVQA",
        ("exact_match",),
        100,
        5000,
        dataset="lmms-lab-encoder/textvqa",
        split="validation",
        max_new_tokens=16,
        note="no OCR tokens in the prompt; LLaVA-1.5's 58.2 had them",
    ),
    Benchmark(
        "vizwiz_vqa_val",
        "VizWiz",
        ("exact_match",),
        100,
        4319,
        dataset="lmms-lab-encoder/VizWiz-VQA",
        split="val",
        max_new_tokens=16,
        note="papers: test set of the server",
    ),
    Benchmark(
        "seedbench",
        "SEED-Bench (image)",
        ("seed_image",),
        100,
        17990,
        dataset="lmms-lab-encoder/SEED-Bench",
        sample=("seed_image", "seed_video"),
        type_field="data_type",
        max_new_tokens=16,
        note="the 14,232 questions about images count; frames of video are asked as well",
    ),
    Benchmark(
        "mmmu_val",
        "MMMU",
        ("mmmu_acc",),
        100,
        900,
        dataset="lmms-lab-encoder/MMMU",
        split="validation",
        type_field="question_type",
    ),
    Benchmark("mmvet", "MM-Vet", ("gpt_eval_score",), 1, 218, dataset="lmms-lab-encoder/MMVet", judge="openai"),
    Benchmark(
        "llava_in_the_wild",
        "LLaVA-Bench (wild)",
        ("gpt_eval_llava_all",),
        1,
        60,
        dataset="lmms-lab-encoder/llava-bench-in-the-wild",
        split="train",
        type_field="category",
        judge="openai",
    ),
    Benchmark("ai2d", "AI2D", ("exact_match",), 100, 3088, dataset="lmms-lab-encoder/ai2d", filter="flexible-extract"),
    Benchmark("chartqa", "ChartQA", ("relaxed_overall",), 100, 2500, dataset="lmms-lab-encoder/ChartQA", type_field="type"),
    Benchmark(
        "docvqa_val", "DocVQA", ("anls",), 100, 5349, dataset="lmms-lab-encoder/DocVQA", config="DocVQA", split="validation"
    ),
    Benchmark(
        "infovqa_val",
        "InfoVQA",
        ("anls",),
        100,
        2801,
        dataset="lmms-lab-encoder/DocVQA",
        config="InfographicVQA",
        split="validation",
    ),
    Benchmark(
        "ocrbench",
        "OCRBench",
        ("ocrbench_accuracy",),
        1000,
        1000,
        dataset="echo840/OCRBench",
        type_field="question_type",
        limit_ok=False,
        note="lmms-eval divides by 1000 whatever the number of questions",
    ),
    Benchmark(
        "mmstar",
        "MMStar",
        ("average",),
        100,
        1500,
        dataset="Lin-Chen/MMStar",
        split="val",
        type_field="category",
        max_new_tokens=16,
    ),
    Benchmark("realworldqa", "RealWorldQA", ("exact_match",), 100, 765, dataset="lmms-lab-encoder/RealWorldQA"),
    Benchmark(
        "hallusion_bench_image",
        "HallusionBench",
        ("aAcc",),
        1,
        951,
        dataset="lmms-lab-encoder/HallusionBench",
        split="image",
        type_field="subcategory",
        judge="openai",
    ),
    Benchmark(
        "vstar_bench",
        "V*",
        ("vstar_overall_acc",),
        1,
        191,
        dataset="lmms-lab-encoder/vstar-bench",
        type_field="category",
    ),
    Benchmark(
        "hrbench4k",
        "HR-Bench 4K",
        ("average",),
        100,
        800,
        dataset="DreamMr/HR-Bench",
        config="hrbench_version_split",
        split="hrbench_4k",
        type_field="category",
        max_new_tokens=16,
        judge="openai",
    ),
    Benchmark(
        "mmerealworld_lite",
        "MME-RealWorld-lite",
        ("mme_realworld_score",),
        100,
        1919,
        dataset="yifanzhang114/MME-RealWorld-lite-lmms-eval",
        split="train",
    ),
    Benchmark(
        "ok_vqa_val2014",
        "OK-VQA",
        ("exact_match",),
        100,
        5046,
        dataset="lmms-lab-encoder/OK-VQA",
        split="val2014",
        max_new_tokens=16,
    ),
    Benchmark(
        "nocaps_val",
        "NoCaps",
        ("nocaps_CIDEr",),
        100,
        4500,
        "caption",
        "lmms-lab-encoder/NoCaps",
        split="validation",
        judge="java",
    ),
    Benchmark(
        "flickr30k_test", "Flickr30k", ("flickr_CIDEr",), 100, 31783, "caption", "lmms-lab-encoder/flickr30k", judge="java"
    ),
    Benchmark(
        "coco2017_cap_val",
        "COCO caption",
        ("coco_CIDEr",),
        100,
        5000,
        "caption",
        "lmms-lab-encoder/COCO-Caption2017",
        split="val",
        judge="java",
    ),
    Benchmark(
        "refcoco_bbox_rec_val",
        "RefCOCO (REC)",
        ("refcoco_ACC@0.5",),
        100,
        8811,
        "grounding",
        "lmms-lab-encoder/RefCOCO",
        split="val",
        max_new_tokens=32,
        note="also _testA and _testB, refcoco+ and refcocog",
    ),
    Benchmark(
        "naturalbench",
        "NaturalBench",
        ("naturalbench_G_ACC",),
        100,
        7600,
        dataset="BaiqiL/NaturalBench-lmms-eval",
        limit_ok=False,
        note="a group of four questions counts when all are right",
    ),
    Benchmark(
        "videomme",
        "Video-MME (w/o subtitles)",
        ("videomme_perception_score",),
        1,
        2700,
        "video",
        "lmms-eval/Video-MME",
        type_field="duration",
    ),
    Benchmark(
        "mlvu_dev",
        "MLVU",
        ("mlvu_percetion_score",),
        1,
        2174,
        "video",
        "sy1998/MLVU_dev",
        type_field="task_type",
        note="the key is misspelt in lmms-eval",
    ),
    Benchmark(
        "mvbench",
        "MVBench",
        ("mvbench_accuracy",),
        1,
        4000,
        "video",
        "OpenGVLab/MVBench",
        config="action_sequence",
        split="train",
        note="mean of its 20 tasks, which lmms-eval does not form",
    ),
    Benchmark(
        "egoschema_subset",
        "EgoSchema (subset)",
        ("score",),
        100,
        500,
        "video",
        "lmms-eval/egoschema",
        config="Subset",
        note="the full set (5,031) is scored by a server",
    ),
    Benchmark(
        "longvideobench_val_v",
        "LongVideoBench",
        ("lvb_acc",),
        100,
        1337,
        "video",
        "longvideobench/LongVideoBench",
        split="validation",
    ),
    Benchmark(
        "nextqa_mc_test",
        "NExT-QA (MC)",
        ("exact_match",),
        100,
        8564,
        "video",
        "lmms-eval/NExTQA",
        config="MC",
        max_new_tokens=16,
        judge="nltk",
    ),
    Benchmark(
        "activitynetqa",
        "ActivityNet-QA",
        ("gpt_eval_accuracy",),
        1,
        8000,
        "video",
        "lmms-eval/ActivityNetQA",
        judge="openai",
    ),
    Benchmark(
        "perceptiontest_val_mc",
        "PerceptionTest (MC)",
        ("accuracy",),
        100,
        19140,
        "video",
        "lmms-eval/PerceptionTest_Val",
        config="mc_question_val",
        split="validation",
        max_new_tokens=16,
    ),
    Benchmark("lvbench", "LVBench", ("lvbench_score",), 100, 1549, "video", "lmms-eval/LVBench", split="train"),
)


@cache
def _by_name() -> dict[str, Benchmark]:
    return {b.name: b for b in _TABLE}


def known_tasks() -> Mapping[str, Benchmark]:
    """Return the table by task name: offline tasks first, then images, captions, grounding, video."""
    return dict(_by_name())
