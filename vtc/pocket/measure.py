"""Measure a pocket model: ``python -m vtc.pocket.measure --model pocket --out measured.json``.

Writes accuracy per question type with 95 % Wilson intervals, next to what the same questions yield without the right
image: the most frequent training answer, a blank (mean gray) image, and another scene's image. All questions about an
image are packed behind it, which gives the answers of single prompts (a test checks that) at a twentieth of the cost.

With ``--reducers`` and ``--keep`` it also asks single prompts under `vtc.patch`, which gives the pruning curves.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.pocket.answer import answer_questions, encode_questions
from vtc.pocket.batches import IGNORE, Batch, prefix_tokens, validation_batches, wide_batch, wide_validation_batches
from vtc.pocket.easyvqa import easy_vqa_questions, question_texts
from vtc.pocket.model import arrange_crops, decode_packed, encode_images
from vtc.pocket.scenes import detail_questions, render_scene, render_wide_scene, scene_questions

_Z = 1.959964  # 95 %
_DETAIL = {"wide_digit": "detail_digit", "wide_lookup": "detail_lookup", "wide_word": "detail_word"}
_GRAY = 128

Marks = dict[str, list[bool]]


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, in 0..1.

    Raises
    ------
    ValueError
        If `n` is not positive or `hits` lies outside 0..n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"an interval needs n >= 1 and 0 <= hits <= n, got {hits} of {n}")
    share, spread = hits / n, _Z * _Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / n / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(marks: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, Any]]:
    """Hits, n, accuracy and interval per type, with ``easy`` and ``detail`` for all types of that family together."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for kind, values in sorted(marks.items()):
        groups[kind] += values
        if kind.startswith(("easy_", "detail_")):
            groups[kind.partition("_")[0]] += values
    return {
        kind: {
            "hits": sum(values),
            "n": len(values),
            "accuracy": round(sum(values) / len(values), 4),
            "interval": [round(bound, 4) for bound in wilson_interval(sum(values), len(values))],
        }
        for kind, values in groups.items()
    }


# ---------------------------------------------------------------------------------------------- packed questions


def blank(images: Tensor) -> Tensor:
    """Gray images in place of these."""
    return torch.full_like(images, _GRAY)


def swapped(images: Tensor) -> Tensor:
    """Each image replaced by its neighbour's in the batch."""
    return images.roll(1, dims=0)


@torch.no_grad()
def packed_marks(model: Any, batches: Iterable[Batch], change: Callable[[Tensor], Tensor] | None = None) -> Marks:
    """Whether the model's first answer token is right, per question type.

    Parameters
    ----------
    model
        A pocket model, not patched.
    batches
        Of `vtc.pocket.batches`; a LLaVA model takes those without crops, a LLaVA-NeXT model those with.
    change
        Applied to the images, for the baselines.
    """
    marks: Marks = defaultdict(list)
    prefix = prefix_tokens()
    for batch in batches:
        images = batch.images if change is None else change(batch.images)
        pixels = images.flatten(0, -4).permute(0, 3, 1, 2).to(model.dtype) / 127.5 - 1
        features, _ = encode_images(model, pixels)
        visual = model.model.multi_modal_projector(features)
        if batch.grid is not None:
            visual = arrange_crops(model, visual.unflatten(0, (len(batch.images), -1)), *batch.grid)
        hidden, _ = decode_packed(model, visual, prefix, batch.tokens, batch.segments, batch.positions)
        predicted = model.lm_head(hidden).argmax(-1)
        for row, types in enumerate(batch.question_types):
            # Two targets per question: the answer, and the end after it.
            places = (batch.answer_targets[row] != IGNORE).nonzero()[::2, 0].tolist()
            for place, kind in zip(places, types, strict=True):
                marks[_DETAIL.get(kind, kind)].append(bool(predicted[row, place] == batch.answer_targets[row, place]))
    return marks


def scaled_down(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Wide scenes as a LLaVA-1.5 model sees them: the thumbnail without the crops."""
    for batch in batches:
        shift = batch.images.shape[1] - 1
        assert batch.grid is not None
        rows, columns = batch.grid
        text = 14 * rows * (14 * columns + 1) if shift else 0
        yield replace(batch, images=batch.images[:, 0], positions=(batch.positions - text).clamp(min=0), grid=None)


def batches_to_ask(is_next: bool, split: str, scenes: int, wide: int, easy: int) -> list[Batch]:
    """Everything a model is asked: ordinary scenes, wide ones, easy-VQA."""
    if not is_next:
        return [*validation_batches(scenes, easy, split), *scaled_down(wide_validation_batches(wide, split))]
    ordinary = [
        wide_batch([render_scene(number, split) for number in range(start, min(start + 12, scenes))], prefix="")
        for start in range(0, scenes, 12)
    ]
    return [*ordinary, *wide_validation_batches(wide, split)]


def majority_shares(marked: Mapping[str, Sequence[bool]], split: str) -> dict[str, float]:
    """Share of the most frequent training answer of each type among the questions of `split`, for chance levels."""
    learnt, asked = (_answer_counts(part, n) for part, n in (("train", 1500), (split, 600)))
    shares = {}
    for kind in marked:
        answer = min(learnt[kind], key=lambda a: (-learnt[kind][a], a))
        shares[kind] = round(asked[kind][answer] / sum(asked[kind].values()), 4)
    return shares


def _answer_counts(split: str, n_scenes: int) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(n_scenes):
        for kind, _, answer in render_scene(number, split).questions:
            counts[kind][answer] += 1
    for number in range(n_scenes // 3):
        for kind, _, answer in render_wide_scene(number, split).questions:
            counts[_DETAIL.get(f"wide_{kind}", f"wide_{kind}")][answer] += 1
    for _, _, answer in question_texts(split):
        counts["easy_yesno" if answer in ("yes", "no") else "easy_open"][answer] += 1
    return counts


# ---------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser("python -m vtc.pocket.measure", description="Measure a pocket model.")
    parser.add_argument("--model", default="pocket", help="an embedded model's name, or a from_pretrained folder")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--scenes", type=int, default=500, help="scenes to ask about")
    parser.add_argument("--wide", type=int, default=240, help="wide scenes to ask about")
    parser.add_argument("--easy", type=int, default=1000, help="easy-VQA images to ask about")
    parser.add_argument("--reducers", nargs="*", default=[], help="registered reducers for the pruning curves")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.5, 0.25, 0.11, 0.056], help="shares of tokens")
    parser.add_argument("--questions", type=int, default=600, help="single prompts per point of a curve, of each source")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    values = parser.parse_args(arguments)
    torch.set_num_threads(values.threads)
    model, processor = _load(values.model)
    is_next = hasattr(model.model, "image_newline")
    began = time.perf_counter()
    batches = batches_to_ask(is_next, values.split, values.scenes, values.wide, values.easy)
    full = packed_marks(model, batches)
    result: dict[str, Any] = {
        "full": summarise(full),
        "blank": summarise(packed_marks(model, batches, blank)),
        "wrong": summarise(packed_marks(model, batches, swapped)),
        "majority": majority_shares(full, values.split),
        "curves": {},
    }
    if values.reducers:
        import vtc

        questions = detail_questions(values.split, values.questions) if is_next else []
        questions += scene_questions(values.split, values.questions)
        questions += [] if is_next else easy_vqa_questions(values.split, values.questions)
        prepared = encode_questions(processor, questions)
        result["curves"]["none"] = {"1": _marked(answer_questions(model, processor, prepared))}
        for name in values.reducers:
            rows = result["curves"][name] = {}
            for keep in values.keep:
                with vtc.patch(model, name, keep=keep):
                    rows[f"{keep:g}"] = _marked(answer_questions(model, processor, prepared))
    result["settings"] = {name: str(value) for name, value in vars(values).items() if name not in ("out", "threads")}
    result["seconds"] = round(time.perf_counter() - began, 1)
    values.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kind, row in result["full"].items():
        chance = result["majority"].get(kind, float("nan"))
        others = "  ".join(f"{name} {result[name][kind]['accuracy']:.3f}" for name in ("blank", "wrong"))
        print(f"{kind:14} {row['accuracy']:.3f}  n={row['n']:<5} chance {chance:.3f}  {others}")


def _load(name: str) -> tuple[Any, Any]:
    from vtc.pocket import POCKET_MODELS, load_pocket

    if name in POCKET_MODELS:
        return load_pocket(name)
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    return model.eval(), transformers.AutoProcessor.from_pretrained(name)


def _marked(answers: Iterable[Any]) -> dict[str, dict[str, Any]]:
    marks: Marks = defaultdict(list)
    for answer in answers:
        marks[answer.type].append(answer.correct)
    return summarise(marks)


if __name__ == "__main__":
    main()
