"""What measures one cell: a model loaded once, the questions prepared once, an accuracy pass and a speed pass.

A worker knows nothing of stores, files on disk or other workers: it is given a job and returns plain data. The same object runs in
this process, in a process of its own, and as a Ray actor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import vtc
from vtc.core import Reducer
from vtc.engine import upstream
from vtc.errors import ConfigError, VtcError
from vtc.eval import env, flops, models, speed
from vtc.eval.cells import Cell
from vtc.eval.config import ModelConfig, SpeedConfig, TaskConfig
from vtc.eval.questions import digest, image_of, is_correct, task_questions
from vtc.families import family_of
from vtc.pocket import Batches, PreparedBatch, Question, answer_questions, encode_questions
from vtc.schedule import closest_count

MATCHED = 0.01
"""Largest relative distance from the FLOPs asked for that counts as equal."""

FEATURE_BYTES = 2 * 2**30
"""Most memory for vision features that cells share."""

BATCH_BYTES = 2**30
"""Most memory for processed questions that cells share; the others are decoded and processed again for every cell."""

_TOKENS = {"slots": "slots", "kept": "kept", "avg": "avg_tokens"}


@dataclass(frozen=True)
class Job:
    """One pass over one cell.

    Attributes
    ----------
    id : str
        Address of the cell.
    kind : {"accuracy", "speed"}
        Which pass.
    model, task : ModelConfig, TaskConfig
        What runs on what.
    cell : Cell
        Reducer and budget.
    seed : int
        Of torch's random state.
    batch_size, max_new_tokens : int
        Of the accuracy pass.
    threads : int or None
        CPU threads of torch.
    speed : SpeedConfig or None
        Settings of the speed pass.
    config : dict
        What the address of the cell stands for: a worker with other code, with other files of the model, or to which the task asks
        other questions or shows other pictures, refuses the job.
    keep : int or float or None
        Budget found for equal FLOPs by the accuracy pass.
    """

    id: str
    kind: Literal["accuracy", "speed"]
    model: ModelConfig
    task: TaskConfig
    cell: Cell
    seed: int
    batch_size: int
    max_new_tokens: int
    threads: int | None
    config: Mapping[str, Any]
    speed: SpeedConfig | None = None
    keep: int | float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a job: data, or why not.

    Attributes
    ----------
    data : dict
        ``{"metrics", "samples"}`` of an accuracy pass, the timings of a speed pass.
    env : dict
        Where it ran.
    error : str
        ``""`` if it went well.
    """

    data: dict[str, Any]
    env: dict[str, Any]
    error: str = ""


class Worker:
    """Runs jobs one after the other; the model and the questions of the last job stay loaded."""

    def __init__(self) -> None:
        self._model_of: tuple[ModelConfig, Any] | None = None
        self._task_of: tuple[TaskConfig, Any, int] | None = None
        self.model: Any = None
        self.processor: Any = None
        self.questions: list[Question] = []
        self.batches: Batches | None = None
        self.fixed: dict[str, Tensor] = {}
        self.features = SharedFeatures()
        self.refused: list[tuple[Any, str]] = []

    def run(self, job: Job, progress: Callable[[int], object] | None = None) -> Outcome:
        """Run a job; whatever goes wrong is in the outcome, so that other jobs can go on."""
        with threads(job.threads):
            try:
                if job.config["engine"] != env.engine_version():
                    raise VtcError(
                        "this worker has other vtc code than the machine that planned the sweep: install the same version on both"
                    )
                self.prepare(job)
                data = self.accuracy(job, progress) if job.kind == "accuracy" else self.speed(job, progress)
                return Outcome(data, env.describe(job.seed))
            except Exception as error:  # noqa: BLE001  recorded; the exit code tells
                if self.model is not None:
                    vtc.unpatch(self.model)
                return Outcome({}, env.describe(job.seed), f"{type(error).__name__}: {error}")

    # ----------------------------------------------------------------------------------------------------- preparation
    def prepare(self, job: Job) -> None:
        """Load the model and make the questions, unless the last job had them.

        Raises
        ------
        VtcError
            What is here is not what the job was planned with.
        """
        planned = (job.model, job.config["model"])
        if planned != self._model_of:
            self.model = self.processor = self._model_of = self._task_of = None
            self.features.clear()
            for model, reason in self.refused:
                if model == planned:  # not again in every cell: it takes minutes, and ends the same
                    raise VtcError(reason)
            try:
                self.model, self.processor = models.load(*planned)
            except Exception as error:
                reason = str(error) if isinstance(error, VtcError) else f"{type(error).__name__}: {error}"
                self.refused.append((planned, reason))
                raise
            self._model_of = planned
        wanted = (job.task, job.config["task"].get("questions"), job.batch_size)
        if wanted == self._task_of:
            return
        self._task_of, self.batches, self.questions = None, None, []
        self.features.clear()
        if job.task.kind == "lmms":
            self.fixed = _one_prompt(self.processor, standard_question(self.model.config))
        else:
            self.questions = task_questions(job.task)
            if digest(self.questions) != job.config["task"]["questions"]:
                raise ConfigError(
                    f"the questions or pictures of the task '{job.task.title}' are not those the sweep was planned with (changed "
                    "since, or others on this machine): run the sweep again, it measures the new ones under addresses of their own"
                )
            self.fixed = _one_prompt(self.processor, self.questions[0])
        self._task_of = wanted

    def resolved(self, job: Job) -> tuple[Cell, dict[str, Any] | None]:
        """Return the job's cell with its budget known, and how well it meets the FLOPs asked for."""
        if job.cell.flops is None:
            return job.cell, None
        if job.keep is not None:
            return job.cell.keeping(job.keep), None
        return equal_flops(self.model, self.fixed, job.cell)

    # --------------------------------------------------------------------------------------------------------- passes
    def accuracy(self, job: Job, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
        """Answer all questions under one reducer; count tokens, FLOPs and cache bytes."""
        start = time.perf_counter()
        cell, matched = self.resolved(job)
        if job.task.kind == "lmms":
            samples, scores, main = self._lmms(job, cell, progress)
        else:
            samples = self._answers(job, cell, progress)
            mean = sum(s["correct"] for s in samples) / len(samples)
            scores, main = {"accuracy": {"value": mean, "scale": 100, "higher_is_better": True}}, "accuracy"
        seconds = time.perf_counter() - start
        with patched(self.model, cell.reducer) as handle:
            counted = flops.count(self.model, _to(self.fixed, self.model), handle)
        metrics = {
            **_score(samples, scores[main]),
            "scores": scores,
            "main": main,
            "tokens": {key: sum(s[name] for s in samples) / len(samples) for key, name in _TOKENS.items()},
            "flops": {
                "counted": counted.counted.to_dict(),
                "formula": counted.formula.to_dict(),
                "mismatch": counted.mismatch,
                "tokens": dataclasses.asdict(counted.tokens),
            },
            "kv_bytes": speed.kv_cache_bytes(counted.cache),
            "seconds": seconds,
            "model": {
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "attention": upstream.attention_of(self.model.config.text_config),
                "device": self.model.device.type,
            },
        }
        return {"metrics": metrics | ({"flops_budget": matched} if matched else {}), "samples": samples}

    def _answers(self, job: Job, cell: Cell, progress: Callable[[int], object] | None) -> list[dict[str, Any]]:
        if self.batches is None:
            self.batches = Batches(self.processor, self.questions, job.batch_size, BATCH_BYTES)
        longest = job.task.max_new_tokens or job.max_new_tokens
        with self.sharing(cell.reducer):
            return ask(self.model, self.processor, job.task, self.batches, cell.reducer, longest, job.seed, progress)

    def sharing(self, reducer: Reducer | None) -> contextlib.AbstractContextManager[None]:
        """Share the vision features of other cells, where the reducer allows it."""
        return self.features.sharing(self.model) if may_share(self.model, reducer) else contextlib.nullcontext()

    def _lmms(
        self, job: Job, cell: Cell, progress: Callable[[int], object] | None
    ) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
        from vtc.eval.lmms import run_task

        with self.sharing(cell.reducer):
            found = run_task(
                self.model,
                self.processor,
                job.task.lmms,
                reducer=cell.reducer,
                batch_size=job.batch_size,
                limit=job.task.n,
                seed=job.seed,
                max_new_tokens=job.task.max_new_tokens,
                progress=None if progress is None else lambda done, _total: progress(done),
            )
        if not found.samples:
            raise VtcError(f"the task '{job.task.title}' has no questions: check its data set, or remove the task")
        if not found.metrics:
            raise VtcError(
                f"the task '{job.task.title}' has no metric, it only writes a file to submit somewhere: choose its validation split"
            )
        main = job.task.metric or next(iter(found.metrics))
        if main not in found.metrics:
            raise VtcError(
                f"the task '{job.task.title}' has no metric '{main}' (metrics: {', '.join(found.metrics)}): correct `metric`"
            )
        if not math.isfinite(found.metrics[main]["value"]):
            raise VtcError(
                f"the task '{job.task.title}' gave {found.metrics[main]['value']} for '{main}': choose another `metric`"
            )
        metrics = {name: m for name, m in found.metrics.items() if math.isfinite(m["value"])}
        samples = []
        for s in found.samples:
            score = None if s["score"] is None or math.isnan(s["score"]) else s["score"]
            samples.append({**s, "image": s.get("image") or s["id"], "score": score})
        return samples, metrics, main

    def speed(self, job: Job, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
        """Time one prompt under one reducer against the unreduced model."""
        settings = job.speed
        assert settings is not None
        cell, _ = self.resolved(job)
        inputs = {k: v.repeat(settings.batch_size, *[1] * (v.dim() - 1)) for k, v in self.fixed.items()}
        done = iter(range(1, 10**9))
        measured = speed.measure(
            self.model,
            inputs,
            cell.reducer,
            repeats=settings.repeats,
            warmup=settings.warmup,
            decode_steps=settings.decode_steps,
            progress=None if progress is None else lambda: progress(next(done)),
        )
        return {"settings": settings.model_dump(), "host": host(), "env": env.describe(job.seed), **measured}


# -------------------------------------------------------------------------------------------------------------- asking
def patched(model: nn.Module, reducer: Reducer | None) -> contextlib.AbstractContextManager[Any]:
    """Patch the model while the body runs; the handle is None without a reducer."""
    return contextlib.nullcontext() if reducer is None else vtc.patch(model, reducer)


def ask(
    model: Any,
    processor: Any,
    task: TaskConfig,
    batches: Sequence[PreparedBatch],
    reducer: Reducer | None,
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Answer prepared questions of a task under a reducer: one sample each, in order, with its mark and its tokens."""
    tokens: dict[int, dict[str, int | float]] = {}
    remaining = iter(batches)
    with patched(model, reducer) as handle:

        def after_batch(done: int, _total: int) -> None:
            batch = next(remaining)
            for row, position in enumerate(batch.positions):
                tokens[position] = _tokens(model, handle, batch.inputs[upstream.IDS], row)
            if progress is not None:
                progress(done)

        answers = answer_questions(model, processor, batches, max_new_tokens=max_new_tokens, seed=seed, progress=after_batch)
    samples = []
    for i, a in enumerate(answers):
        correct = is_correct(task, a.text, a.gold)
        named = {"id": a.id, "image": image_of(a.id), "type": a.type, "gold": a.gold, "answer": a.text}
        samples.append({**named, "correct": correct, "score": float(correct), **tokens[i]})
    return samples


def _tokens(model: Any, handle: Any, ids: Tensor, row: int) -> dict[str, int | float]:
    """Slots, tokens entering the last layer, and layer average of one question."""
    if handle is None:
        slots = int((ids[row] == model.config.image_token_id).sum())
        return {"slots": slots, "kept": slots, "avg_tokens": float(slots)}
    images = [i for i in handle.stats.last.images if i.row == row]
    return {name: sum(getattr(i, name) for i in images) for name in _TOKENS.values()}


# -------------------------------------------------------------------------------------------------------- equal FLOPs
def equal_flops(model: nn.Module, inputs: Mapping[str, Tensor], cell: Cell) -> tuple[Cell, dict[str, Any]]:
    """Find the budget with which a reducer's prefill costs the language model the share of FLOPs asked for.

    Counted are the decoder layers and the head on one prompt, by the closed formula, from the tokens that each layer ran on: what
    a reducer itself computes, and what it saves in the vision tower, is reported in the table but not traded against tokens.

    Parameters
    ----------
    model : Module
        Unpatched.
    inputs : mapping
        One prompt with one image.
    cell : Cell
        With ``flops``, the share of the unreduced prefill.

    Returns
    -------
    Cell, dict
        The cell with that budget, and ``{"target", "achieved", "keep", "matched"}``: shares of the unreduced FLOPs, and whether
        they agree within :data:`MATCHED`; whole tokens, or the coarse grids of some methods, may not allow it.

    Raises
    ------
    VtcError
        If even one token costs more: the layers before the cut run on every token.
    """
    assert cell.flops is not None
    family, config = family_of(model), model.config
    inputs = _to(inputs, model)
    total = inputs[upstream.IDS].shape[1]
    full = flops.language_flops(config, [total] * family.facts.layers).model
    slots = int(sum((inputs[upstream.IDS] == t).sum() for t in family.image_token_ids))

    @functools.cache
    def cost(tokens: int) -> float:
        reducer = cell.keeping(_keep(tokens)).reducer
        with vtc.patch(model, reducer) as handle, torch.no_grad():
            upstream.prefill(model, inputs)
            images = handle.stats.last.images
        text = total - sum(i.slots for i in images)
        layers = [text + sum(n) for n in zip(*(i.tokens_per_layer for i in images), strict=True)]
        return flops.language_flops(config, layers).model / full

    def _keep(tokens: int) -> int | float:
        return tokens if family.facts.tokens is not None else tokens / slots

    tokens = closest_count(cell.flops, slots, cost)
    achieved = cost(tokens)
    if tokens == 1 and achieved > cell.flops * (1 + MATCHED):
        raise VtcError(
            f"flops: {cell.flops:g} cannot be met by '{cell.label}': with one token left it still costs {achieved:.2f} of the "
            "prefill, since the layers before its cut run on every token; cut earlier, or ask for more"
        )
    matched = abs(achieved / cell.flops - 1) <= MATCHED
    keep = _keep(tokens)
    return cell.keeping(keep), {"target": cell.flops, "achieved": achieved, "keep": keep, "matched": matched}


# ---------------------------------------------------------------------------------------------------- shared features
def may_share(model: nn.Module, reducer: Reducer | None) -> bool:
    """Whether a reducer leaves the tower alone and looks at nothing inside it, so that features of another cell will do."""
    if reducer is None:
        return True
    parts = reducer.bind(family_of(model).facts).parts()
    return all(not p.stage.in_tower and all(n.source == "text" for n in p.needs) for p in parts)


class SharedFeatures:
    """Vision features by the pixels they came from, for accuracy passes: cells that don't touch the tower need it only once."""

    def __init__(self) -> None:
        self.held: dict[bytes, Any] = {}
        self.bytes = 0

    def clear(self) -> None:
        """Forget all features."""
        self.held, self.bytes = {}, 0

    @contextmanager
    def sharing(self, model: nn.Module) -> Iterator[None]:
        """Answer the feature method of this instance from memory where it can be."""
        base = family_of(model).base
        name = upstream.ENCODE[False]
        original = getattr(base, name)

        @functools.wraps(original)
        def shared(*args: Any, **kwargs: Any) -> Any:
            key = _pixels((*args, *(kwargs[k] for k in sorted(kwargs))))
            if key not in self.held:
                made = original(*args, **kwargs)
                size = sum(t.nbytes for t in _tensors(made))
                if self.bytes + size > FEATURE_BYTES:
                    return made
                self.held[key], self.bytes = _map(made, lambda t: t.detach().cpu()), self.bytes + size
                return made
            return _map(self.held[key], lambda t: t.to(model.device))

        object.__setattr__(base, name, shared)
        try:
            yield
        finally:
            object.__delattr__(base, name)


def _pixels(values: Sequence[Any]) -> bytes:
    total = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, Tensor):
            total.update(f"{tuple(value.shape)}{value.dtype}".encode())
            total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        else:
            total.update(repr(value).encode())
    return total.digest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild the containers of a model's output around changed tensors, so that nothing hung on one call's output stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)(**{k: _map(v, change) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change) for v in value)
    return value


# ------------------------------------------------------------------------------------------------------------ helpers
def standard_question(config: Any) -> Question:
    """Return the prompt on which FLOPs and speed are measured where a task brings its own pictures: smooth noise, one question."""
    from PIL import Image

    side = getattr(config.vision_config, "image_size", None) or 448
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.BICUBIC)
    return Question(image, "What is shown in this image?", "", "standard", "standard/0")


def _one_prompt(processor: Any, question: Question) -> dict[str, Tensor]:
    return encode_questions(processor, [question], 1)[0].inputs


def _score(samples: Sequence[Mapping[str, Any]], main: Mapping[str, Any]) -> dict[str, Any]:
    """Mean score in all and by type; where single answers have none (CIDEr and the like), the task's number and no types."""
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_type.setdefault(sample["type"], []).append(sample)
    if any(s["score"] is None for s in samples):
        return {"n": len(samples), "correct": None, "accuracy": main["value"] * main["scale"] / 100, "by_type": {}}

    def entry(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "n": len(some),
            "correct": sum(bool(s["correct"]) for s in some),
            "accuracy": sum(s["score"] for s in some) / len(some),
        }

    return {**entry(samples), "by_type": {kind: entry(some) for kind, some in by_type.items()}}


def host() -> dict[str, Any]:
    """The part of the environment that makes timings comparable."""
    found = env.machine()
    return {key: found[key] for key in ("cpu", "cores", "gpu")} | {"torch": torch.__version__}


def _to(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {k: v.to(model.device, model.dtype) if v.is_floating_point() else v.to(model.device) for k, v in inputs.items()}


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Set torch's CPU threads for a while, at most the cores this process may use."""
    before = torch.get_num_threads()
    if number is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or number
        torch.set_num_threads(min(number, cores))
    try:
        yield
    finally:
        torch.set_num_threads(before)
