"""Measure a pocket model: ``python -m vtc.pocket.measure --model pocket --out measured.json``.

Writes accuracy per question type with 95 % Wilson intervals, next to what the same questions yield without the right
image: answering by the question's type or wording alone (the chance level), a blank (mean gray) image, and another
scene's image. All questions about an image are packed behind it, which gives the answers of single prompts (a
test checks that) at a twentieth of the cost.

With ``--reducers`` and ``--keep`` it also asks single prompts under `vtc.patch`, which gives the pruning curves; with
``--fastv-layers`` it does so under FastV before each of these decoder layers, at the same shares.
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
from vtc.pocket.batches import Batch, prefix_tokens, validation_batches, wide_batch, wide_validation_batches
from vtc.pocket.easyvqa import easy_vqa_questions, question_texts
from vtc.pocket.model import GRID, decode_packed, encode_images, project
from vtc.pocket.objects import WIDE_SIZES, QuestionText
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
        if change is not None:
            batch = replace(batch, images=change(batch.images))
        visual = project(model, encode_images(model, batch.pixels(model.dtype))[0], batch.grid)
        hidden, _ = decode_packed(model, visual, prefix, batch.tokens, batch.segments, batch.positions)
        predicted = model.lm_head(hidden).argmax(-1)
        for kind, is_right in batch.marks(predicted):
            marks[_DETAIL.get(kind, kind)].append(is_right)
    return marks


def scaled_down(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Wide scenes as a LLaVA-1.5 model sees them: the thumbnail without the crops."""
    for batch in batches:
        assert batch.grid is not None
        rows, columns = batch.grid
        crops = GRID * rows * (GRID * columns + 1)  # visual tokens that are left out
        yield replace(batch, images=batch.images[:, 0], positions=(batch.positions - crops).clamp(min=0), grid=None)


def batches_to_ask(is_next: bool, split: str, scenes: int, wide: int, easy: int) -> list[Batch]:
    """Everything a model is asked: ordinary scenes, wide ones, easy-VQA."""
    if not is_next:
        return [*validation_batches(scenes, easy, split), *scaled_down(wide_validation_batches(wide, split))]
    ordinary = [
        wide_batch([render_scene(number, split) for number in range(start, min(start + 12, scenes))], prefix="")
        for start in range(0, scenes, 12)
    ]
    return [*ordinary, *wide_validation_batches(wide, split)]


def chance_levels(split: str, scenes: int = 600, wide: int = 240, learnt_from: int = 3000) -> dict[str, float]:
    """Accuracy per type of the better of two strategies that never look at the image.

    One always gives the answer most frequent among the questions of that type asked here: no constant answer does better.
    The other gives the most frequent training answer to the same prompt (to the type, where training asked that prompt
    fewer than twenty times), which pays where the wording tells something about the answer, as in easy-VQA.

    Parameters
    ----------
    split
        Asked about.
    scenes, wide
        How many of its scenes.
    learnt_from
        Training scenes, and a third as many wide ones.
    """
    by_prompt: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, prompt, answer in _texts("train", learnt_from, learnt_from // 3):
        by_prompt[kind, prompt][answer] += 1
        by_type[kind][answer] += 1
    hits: Counter[str] = Counter()
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, prompt, answer in _texts(split, scenes, wide):
        counts = by_prompt[kind, prompt]
        counts = counts if counts.total() >= 20 else by_type[kind]
        hits[kind] += answer == min(counts, key=lambda a: (-counts[a], a))
        asked[kind][answer] += 1
    return {kind: round(max(hits[kind], *answers.values()) / answers.total(), 4) for kind, answers in asked.items()}


def _texts(split: str, scenes: int, wide: int) -> Iterator[QuestionText]:
    """Type, prompt and answer of all questions about so many scenes of a split and of easy-VQA."""
    for number in range(scenes):
        yield from render_scene(number, split).questions
    for size in WIDE_SIZES:  # the scenes of wide_validation_batches
        for number in range(max(1, wide // len(WIDE_SIZES))):
            for kind, prompt, answer in render_wide_scene(number, split, size=size).questions:
                yield _DETAIL.get(f"wide_{kind}", f"wide_{kind}"), prompt, answer
    for _, text in question_texts(split):
        yield text


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
    parser.add_argument("--fastv-layers", nargs="*", type=int, default=[], help="decoder layers to prune before, by FastV")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.5, 0.25, 0.11, 0.056], help="shares of tokens")
    parser.add_argument("--questions", type=int, default=600, help="single prompts per point of a curve; of easy-VQA a quarter")
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
        "chance": chance_levels(values.split, values.scenes, values.wide),
        "curves": {},
    }
    asked_for = [(name, name, {}) for name in values.reducers]
    asked_for += [(f"fastv before layer {layer}", "fastv", {"layer": layer}) for layer in values.fastv_layers]
    if asked_for:
        import vtc

        questions = detail_questions(values.split, values.questions) if is_next else []
        questions += scene_questions(values.split, values.questions)
        questions += [] if is_next else easy_vqa_questions(values.split, values.questions // 4)
        prepared = encode_questions(processor, questions)
        result["curves"]["none"] = {"1": _marked(answer_questions(model, processor, prepared))}
        for label, name, options in asked_for:
            rows = result["curves"][label] = {}
            for keep in values.keep:
                with vtc.patch(model, name, keep=keep, **options):
                    rows[f"{keep:g}"] = _marked(answer_questions(model, processor, prepared))
    result["settings"] = {name: str(value) for name, value in vars(values).items() if name not in ("out", "threads")}
    result["seconds"] = round(time.perf_counter() - began, 1)
    values.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(accuracy_table(result))
    if result["curves"]:
        print(curve_table(result["curves"]))


def accuracy_table(result: Mapping[str, Any]) -> str:
    """Accuracies per type and their baselines as a Markdown table, in percent."""
    lines = ["| type | accuracy | 95 % interval | n | chance | blank image | wrong image |", "|---" * 7 + "|"]
    for kind, row in result["full"].items():
        low, high = row["interval"]
        chance = f"{100 * result['chance'][kind]:.1f}" if kind in result["chance"] else ""
        others = " | ".join(f"{100 * result[name][kind]['accuracy']:.1f}" for name in ("blank", "wrong"))
        share = f"{100 * row['accuracy']:.1f} | {100 * low:.1f} to {100 * high:.1f} | {row['n']}"
        lines.append(f"| {kind} | {share} | {chance} | {others} |")
    return "\n".join(lines)


def curve_table(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Pruning curves as a Markdown table, in percent; ``mean`` is over the types, easy-VQA counted as one."""
    kinds = [kind for kind in curves["none"]["1"] if not kind.startswith(("easy_", "detail_"))]
    lines = [f"| reducer | keep | mean | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for name, rows in curves.items():
        for keep, row in rows.items():
            shares = [row[kind]["accuracy"] for kind in kinds]
            cells = " | ".join(f"{100 * share:.1f}" for share in (sum(shares) / len(shares), *shares))
            lines.append(f"| {name} | {100 * float(keep):g} % | {cells} |")
    return "\n".join(lines)


def _load(name: str) -> tuple[Any, Any]:
    from vtc.pocket import POCKET_MODELS, load_pocket

    if name in POCKET_MODELS:
        return load_pocket(name)
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    return model.eval(), transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)


def _marked(answers: Iterable[Any]) -> dict[str, dict[str, Any]]:
    marks: Marks = defaultdict(list)
    for answer in answers:
        marks[answer.type].append(answer.correct)
    return summarise(marks)


if __name__ == "__main__":
    main()
