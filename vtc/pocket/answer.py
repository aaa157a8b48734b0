"""Ask a model the pocket questions and score the answers.

Nothing here is specific to the pocket model or to vtc: prompts come from the processor's chat template and answers from
``generate``, so a patched model, or any other chat model that takes one image per prompt, is scored by the same code.

Preparing inputs costs about as much as answering from few tokens does, and is the same for every reducer. To measure
many, prepare once with `encode_questions` and pass the result to `answer_questions` each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.doors import GREEDY, check_length, check_prompt, short
from vtc.pocket.errors import PocketError
from vtc.pocket.questions import Question

DEFAULT_BATCH_SIZE = 16  # on two CPU cores no size in 8..64 is clearly faster, and idle cores favour 8 and 16


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Attributes
    ----------
    id, type
        Those of the question.
    text
        The generated text, special tokens removed, stripped.
    gold
        The expected answer.
    correct
        Whether both agree exactly, after stripping and lower-casing.
    """

    id: str
    type: str
    text: str
    gold: str
    correct: bool


@dataclass(frozen=True)
class PreparedBatch:
    """Processor output for some questions, reusable for any number of runs.

    Attributes
    ----------
    questions
        The questions of this batch.
    positions
        Where each belongs in the list that was encoded.
    inputs
        Arguments of ``generate``, on the CPU: input_ids and attention_mask [b, t] padded on the left, pixel_values
        [b, 3, h, w].
    """

    questions: tuple[Question, ...]
    positions: tuple[int, ...]
    inputs: dict[str, Tensor] = field(repr=False)


class Batches(Sequence[PreparedBatch]):
    """Batches of some questions, each prepared when it is asked for.

    Pictures are decoded and processed for one batch at a time, so that a task of any size fits into memory; as many batches as fit
    into `room` bytes are kept for the next run. Questions are sorted by the length of their prompt, so that batches need little
    padding.

    Parameters
    ----------
    processor
        A transformers processor with a chat template.
    questions
        What to ask.
    batch_size
        Questions per batch; the last may be smaller.
    room
        Bytes of processed inputs to keep.

    Raises
    ------
    PocketError
        If `batch_size` is not positive.
    """

    def __init__(
        self, processor: Any, questions: Sequence[Question], batch_size: int = DEFAULT_BATCH_SIZE, room: int = 0
    ) -> None:
        if batch_size < 1:
            raise PocketError(f"batch_size must be positive, got {batch_size}")
        self.processor, self.questions, self.room = processor, questions, room
        self.prompts = [_chat_prompt(processor, question) for question in questions]
        order = sorted(range(len(questions)), key=lambda i: (len(self.prompts[i].split()), i))
        self.rows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.kept: dict[int, PreparedBatch] = {}
        self.last: tuple[int, PreparedBatch] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # IndexError beyond the end, which ends a loop
        if number in self.kept:
            return self.kept[number]
        if self.last is None or self.last[0] != number:
            self.last = None  # let go of it first: two batches of large pictures are one too many
            batch = self._prepare(self.rows[number])
            size = sum(t.nbytes for t in batch.inputs.values() if isinstance(t, Tensor))
            if size <= self.room:
                self.room -= size
                self.kept[number] = batch
                return batch
            self.last = (number, batch)
        return self.last[1]

    def _prepare(self, rows: Sequence[int]) -> PreparedBatch:
        inputs = self.processor(
            text=[self.prompts[i] for i in rows],
            images=[self.questions[i].image for i in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        return PreparedBatch(tuple(self.questions[i] for i in rows), tuple(rows), dict(inputs))


def encode_questions(
    processor: Any, questions: Sequence[Question], batch_size: int = DEFAULT_BATCH_SIZE
) -> list[PreparedBatch]:
    """Prepare batches for `answer_questions`, all at once; `Batches` prepares them as they are needed.

    Parameters
    ----------
    processor
        A transformers processor with a chat template.
    questions
        What to ask.
    batch_size
        Questions per batch; the last may be smaller.

    Returns
    -------
    list of PreparedBatch
        Covering every question once.

    Raises
    ------
    PocketError
        If `batch_size` is not positive.
    PromptError
        If a question holds the mark that stands for its picture.
    """
    return list(Batches(processor, questions, batch_size))


def _chat_prompt(processor: Any, question: Question) -> str:
    check_prompt(processor, question.prompt, f"the question '{short(question.id)}'")
    content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def answer_questions(
    model: Any,
    processor: Any,
    questions: Sequence[Question] | Sequence[PreparedBatch],
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_new_tokens: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> list[Answer]:
    """Answer questions greedily and score them.

    Parameters
    ----------
    model
        A generating model, patched or not; used as it is (mode, dtype and device are not changed).
    processor
        Its processor.
    questions
        Questions, or the batches that `encode_questions` or `Batches` made of them.
    batch_size
        Questions per ``generate`` call; ignored for prepared batches.
    max_new_tokens
        Longest answer in tokens. A batch stops as soon as every answer ended, for this model after two steps.
    seed
        Seed of torch's random state during the run, for whatever in a model draws from it; the state is restored.
    progress
        Called after each batch with the numbers of questions answered and in total.

    Returns
    -------
    list of Answer
        In the order of the questions given to this function or to `encode_questions`.

    Raises
    ------
    PocketError
        If prepared batches are incomplete or mixed with questions.
    PromptError
        If a question is longer than the model's context, before it is asked.
    """
    from vtc.engine import upstream

    batches = _as_batches(processor, questions, batch_size)
    total = sum(map(len, batches.rows)) if isinstance(batches, Batches) else sum(len(b.questions) for b in batches)
    answers: dict[int, Answer] = {}
    device, dtype = model.device, model.dtype
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in batches:
            real = batch.inputs.get(upstream.MASK, torch.ones_like(batch.inputs[upstream.IDS])).sum(1)
            for question, tokens in zip(batch.questions, real.tolist(), strict=True):
                check_length(model.config, tokens, f"the question '{short(question.id)}'")
            inputs = {
                name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
                for name, value in batch.inputs.items()
            }
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)
            new_tokens = output[:, inputs[upstream.IDS].shape[1] :]
            texts = processor.batch_decode(new_tokens, skip_special_tokens=True)
            for position, question, text in zip(batch.positions, batch.questions, texts, strict=True):
                answers[position] = _score(question, text)
            if progress is not None:
                progress(len(answers), total)
    if sorted(answers) != list(range(total)):
        raise PocketError("these prepared batches are not all of one encode_questions call: positions are missing")
    return [answers[position] for position in range(total)]


def _as_batches(processor: Any, questions: Sequence[Any], batch_size: int) -> Sequence[PreparedBatch]:
    if isinstance(questions, Batches):
        return questions
    prepared = [isinstance(item, PreparedBatch) for item in questions]
    if questions and all(prepared):
        return list(questions)
    if any(prepared):
        raise PocketError("pass questions or prepared batches, not a mixture")
    return Batches(processor, questions, batch_size)


def _score(question: Question, text: str) -> Answer:
    text = text.strip()
    correct = text.lower() == question.answer.strip().lower()
    return Answer(question.id, question.type, text, question.answer, correct)


def accuracy_by_type(answers: Iterable[Answer]) -> dict[str, float]:
    """Share of correct answers in 0..1 for each question type, in order of first appearance."""
    marks: dict[str, list[bool]] = {}
    for answer in answers:
        marks.setdefault(answer.type, []).append(answer.correct)
    return {kind: sum(values) / len(values) for kind, values in marks.items()}
