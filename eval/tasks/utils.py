"""What the YAML files of this folder call: documents, images, prompts and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vtc.pocket import detail_questions, easy_vqa_questions, scene_questions
from vtc.pocket.easyvqa import load_image
from vtc.pocket.questions import Question
from vtc.pocket.scenes import render_scene, render_wide_scene

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


def questions_of(recipe: Mapping[str, Any]) -> list[Question]:
    """Return the questions a line of ``recipes.jsonl`` describes (keys: source, split, seed, types, n)."""
    if recipe["source"] == "easy":
        return easy_vqa_questions(recipe["split"], recipe["n"])
    make = {"scene": scene_questions, "wide": detail_questions}[recipe["source"]]
    return make(recipe["split"], recipe["n"], recipe["types"], recipe["seed"])


def load_questions(recipes: Dataset) -> Dataset:
    """Turn the recipes into the documents of one task; the split is named like the recipe (``process_docs``)."""
    from datasets import Dataset

    recipe = next(line for line in recipes if line["name"] == str(recipes.split))
    return Dataset.from_list(
        [{"id": q.id, "type": q.type, "question": q.prompt, "answer": q.answer} for q in questions_of(recipe)],
        split=recipes.split,
    )


@lru_cache(maxsize=2048)
def image_of(place: str) -> Image:
    """Draw (or read) the image of a question from its id without the last component."""
    source, split, *numbers = place.split("/")
    if source == "easy":
        return load_image(split, int(numbers[0]))
    render: Callable[..., Any] = {"scene": render_scene, "wide": render_wide_scene}[source]
    seed, index = map(int, numbers)
    return render(index, split, seed).image


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image]:
    """Return the image of a document, as the only element."""
    return [image_of(doc["id"].rpartition("/")[0])]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return the question, with the text that the model's prompt variant puts behind it."""
    return doc["question"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match of the first line, case and full stop aside; a second metric carries the question type."""
    said = results[0].strip().partition("\n")[0].strip().rstrip(".").lower()
    hit = float(said == doc["answer"])
    return {"exact_match": hit, f"exact_match_{doc['type']}": hit}
