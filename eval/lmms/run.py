"""Running one task with a model in memory: lmms-eval's own evaluator, its answers as plain rows."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vtc.core import Reducer
from vtc.errors import ConfigError, UnknownArgumentError, did_you_mean
from vtc.eval.lmms.benchmarks import JUDGES, TASKS, Benchmark, known_tasks
from vtc.eval.lmms.locks import own_locks, require_locks

INSTALL = 'pip install "vtc-reducers[eval]"'


@dataclass(frozen=True)
class TaskRun:
    """What a model answered to one task.

    Attributes
    ----------
    task : str
        Its name.
    samples : list of dict
        One per question, in the order of the data set: ``id``, ``type``, ``question``, ``gold``, ``answer``, ``correct`` (None
        where a single answer is neither right nor wrong), ``score`` (NaN where only the whole task has one), ``slots``, ``kept``,
        ``avg_tokens`` (visual tokens of all images), ``seconds`` (the sample's share of ``generate``).
    metrics : dict
        Name -> ``value`` (lmms-eval's number), ``scale`` (factor to the number of papers), ``higher_is_better``; the headline
        first.
    versions : dict
        Of the task and of what scored it.
    """

    task: str
    samples: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    versions: dict[str, str]


def run_task(
    model: Any,
    processor: Any,
    task: str,
    *,
    reducer: Reducer | None,
    batch_size: int,
    limit: int | None,
    seed: int,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> TaskRun | None:
    """Answer one task, with a reducer or without.

    Parameters
    ----------
    model, processor
        A transformers vision-language model and its processor. A patch that is on the model is taken off.
    task : str
        A name of :func:`known_tasks`, or any other task of lmms-eval.
    reducer : Reducer or None
        What to patch for the duration; ``None`` for the model as it is.
    batch_size : int
        Questions per ``generate`` call.
    limit : int or None
        Only the first questions.
    seed : int
        Of Python's, NumPy's and torch's random states during the run; they are restored.
    max_new_tokens : int, optional
        Longest answer, in place of what the task says.
    progress : callable, optional
        Called after each batch with the numbers of questions answered and in total.

    Returns
    -------
    TaskRun or None
        Under ``accelerate launch`` or ``torchrun`` the questions are dealt to the processes; the first gets all answers, the others
        None.

    Raises
    ------
    UnknownArgumentError, ConfigError
        See :func:`check_task`.
    RuntimeError
        At the first error inside ``generate``.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: ask at least one question, or None for all")
    benchmark = check_task(task)
    if limit is not None and not benchmark.limit_ok:
        warnings.warn(f"the number of '{task}' means nothing on the first {limit} questions ({benchmark.note})", stacklevel=2)
    from lmms_eval.evaluator import simple_evaluate

    from vtc.eval.lmms.model import ChatModel, prompts_for

    lm = ChatModel(model, processor, batch_size=batch_size, max_new_tokens=max_new_tokens)
    lm.progress = progress or (lambda done, total: None)
    lm.identity = {"model": model.config.name_or_path}
    members = load_task(task, prompts_for(model))
    lm.reduce(reducer)
    try:
        with _seeded(seed), _no_bars(), own_locks(), tempfile.TemporaryDirectory() as scratch:
            result = simple_evaluate(
                model=lm,
                tasks=list(members),
                task_manager=_manager(False),  # or it indexes all its tasks again
                batch_size=batch_size,
                limit=limit,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                # where tasks that write files for a server put them; and images are not decoded again for scoring
                cli_args=argparse.Namespace(
                    output_path=scratch, process_with_media=False, reasoning_tags=None, agentic_trace_mode="basic"
                ),
            )
    finally:
        lm.reduce(None)
    return None if result is None else _task_run(benchmark, members, result)


def check_task(name: str, *, data: bool = True) -> Benchmark:
    """Return what is known of a task, having made sure that it can be run.

    Parameters
    ----------
    name : str
        A name of :func:`known_tasks`, or any other task or group of lmms-eval (its first metric is the headline then).
    data : bool, default True
        Whether the questions must be there as well; ``False`` for a plan that runs on another machine.

    Raises
    ------
    UnknownArgumentError
        No such task; close matches are named.
    ConfigError
        lmms-eval is not installed or cannot run with what is, the data set is neither in the cache nor to be had, or the task's
        scoring lacks something; the message says what to prepare.
    """
    benchmark = known_tasks().get(name)
    _require_lmms_eval()
    if benchmark is None:
        index = _manager(True).task_index
        if name not in index:
            hint = did_you_mean(name, known_tasks()) or did_you_mean(name, index)
            raise UnknownArgumentError(
                f"there is no task '{name}'{hint} (`vtc tasks` lists those with a known headline number)"
            )
        benchmark = _from_index(name, index[name])
    if data:
        missing = {"openai": "OPENAI_API_KEY" not in os.environ, "java": shutil.which("java") is None}
        if missing.get(benchmark.judge):
            raise ConfigError(f"task '{name}' is scored with {JUDGES[benchmark.judge]}, or leave the task out")
        if benchmark.dataset:
            _require_data(benchmark)
    return benchmark


def _from_index(name: str, entry: Mapping[str, Any]) -> Benchmark:
    """Describe a task that is not in the table by its YAML file."""
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(entry["yaml_path"], mode="simple") if entry["type"] == "task" else {}
    local = {"data_files", "load_from_disk"} & set(config.get("dataset_kwargs") or {})
    filters = [f["name"] for f in config.get("filter_list") or ()]
    return Benchmark(
        name,
        name,
        metrics=(),
        scale=1,
        n=0,
        dataset="" if local else config.get("dataset_path", ""),
        config=config.get("dataset_name") or "",
        filter=filters[0] if filters else "none",
    )


def _require_lmms_eval() -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(f"tasks need lmms-eval, which is not installed: {INSTALL}")
    require_locks()


@lru_cache(maxsize=64)
def _require_data(benchmark: Benchmark) -> None:
    """Ask for the data set's description: from the hub, or from the cache where there is no network."""
    import datasets

    try:
        datasets.load_dataset_builder(benchmark.dataset, benchmark.config or None, cache_dir=_data_folder())
    except ConnectionError as error:
        raise ConfigError(
            f"task '{benchmark.name}': the data set {benchmark.dataset} is not in the cache and the hub cannot be reached: run "
            f"`vtc tasks --prepare {benchmark.name}` on a machine with network, and copy its Hugging Face cache (HF_HOME) here"
        ) from error
    except Exception as error:  # noqa: BLE001  gated, moved, damaged: hub, files and HTTP client each have their own
        raise ConfigError(
            f"task '{benchmark.name}': the data set {benchmark.dataset} cannot be opened, mend this first: "
            f"{type(error).__name__}: {error}"
        ) from error


def _data_folder() -> str | None:
    """Folder lmms-eval keeps data sets in: the one its variable names, else that of ``datasets`` (None).

    Where the latter is on a network file system, lmms-eval may take a scratch folder of the machine instead, by rules of its own: a
    data set that is missing there only is found missing when the task is loaded.
    """
    named = os.environ.get("LMMS_EVAL_DATASETS_CACHE", "").strip()
    return os.path.expanduser(os.path.expandvars(named)) or None


@lru_cache(maxsize=2)
def _manager(everything: bool) -> Any:
    """Return the index of our tasks, and of lmms-eval's own if asked for (takes seconds)."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=everything, model_name="default")


@lru_cache(maxsize=8)
def load_task(name: str, prompts: str = "default") -> tuple[Any, ...]:
    """Load the questions of a task (of all its members, for a group) with the prompts meant for a model class."""
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    from vtc.eval.lmms.model import leaves

    known = known_tasks().get(name)
    manager = _manager(known is None or known.kind != "offline")
    manager.model_name = prompts
    try:
        found = tuple(leaves(get_task_dict([name], manager, "chat")))
    except Exception as error:  # noqa: BLE001  tasks run code of their own while loading
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        raise ConfigError(
            f"task '{name}' cannot be loaded: {type(cause).__name__}: {cause} (`vtc tasks {name}` says what it needs)"
        ) from cause
    if scored := sorted({task.OUTPUT_TYPE for task in found} & {"loglikelihood", "multiple_choice"}):
        raise ConfigError(
            f"task '{name}' is of type {scored[0]}, and sweeps ask for generated answers: run it as lmms-eval --model vtc "
            f"--force_simple --model_args pretrained=MODEL,reducer=NAME,keep=N --tasks {name}"
        )
    return found


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every random state and put it back."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class _Silent(tqdm):
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence lmms-eval's progress bars for a while; it has no switch for them, and the caller shows its own."""
    from lmms_eval import evaluator
    from lmms_eval.api import task

    before = evaluator.tqdm, task.tqdm
    evaluator.tqdm = task.tqdm = _Silent
    try:
        yield
    finally:
        evaluator.tqdm, task.tqdm = before


# ------------------------------------------------------------------------------------------------------------- results
_PAIRS = (
    ("pred", "answer"),
    ("pred", "ground_truth"),
    ("prediction", "answer"),
    ("pred_answer", "answer"),
    ("parsed_pred", "answer"),
)
"""Fields of a logged score that hold the parsed answer and the right one."""


def _task_run(benchmark: Benchmark, members: tuple[Any, ...], result: Mapping[str, Any]) -> TaskRun:
    names = [task.task_name for task in members]
    metrics = _metrics(benchmark, names, result)
    scored_by = benchmark.sample or benchmark.metrics or tuple(metrics)[:1]
    samples = [
        _sample(benchmark, task.task_name, row, scored_by)
        for task in members
        for row in _rows(benchmark, task, result["samples"][task.task_name])
    ]
    versions = {"task": ", ".join(sorted({str(result["versions"][n]) for n in names}))}
    for package in ("lmms-eval", "datasets"):
        versions[package] = importlib.metadata.version(package)
    return TaskRun(benchmark.name, samples, metrics, versions)


def _metrics(benchmark: Benchmark, names: list[str], result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every number of the task, the headline first; those of a group's members are averaged."""
    found: dict[str, list[float]] = {}
    better: dict[str, bool] = {}
    for name in names:
        for key, value in result["results"][name].items():
            metric, _, kept_by = key.partition(",")
            if (
                kept_by != benchmark.filter
                or metric.endswith(_ERRORS)
                or isinstance(value, bool)
                or not isinstance(value, (int, float))
            ):
                continue
            found.setdefault(metric, []).append(float(value))
            better[metric] = result["higher_is_better"][name].get(metric) is not False
    headline = benchmark.metrics or tuple(found)[:1]
    missing = [m for m in headline if m not in found]
    if missing or not headline:
        raise ConfigError(
            f"task '{benchmark.name}' gave no number{f' for {missing[0]!r}' if missing else ''} (it gave: "
            f"{', '.join(found) or 'none'}): tasks that only write a file for a server cannot be compared here"
        )
    means = {metric: sum(values) / len(values) for metric, values in found.items()}
    top = "+".join(headline)
    ordered = {top: sum(means[m] for m in headline), **{m: v for m, v in means.items() if m != top}}
    return {
        m: {
            "value": value,
            "scale": benchmark.scale,
            "higher_is_better": benchmark.higher_is_better if m == top else better[m],
        }
        for m, value in ordered.items()
    }


_ERRORS = ("_stderr", "_stderr_clt", "_stderr_clustered")


def _rows(benchmark: Benchmark, task: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one filter, by document; a task logs each document once per filter, in the order of its filters."""
    filters = [f["name"] for f in task.config.filter_list or ({"name": "none"},)]
    wanted = filters.index(benchmark.filter) if benchmark.filter in filters else 0
    by_document: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_document.setdefault(row["doc_id"], []).append(row)
    return [by_document[i][min(wanted, len(by_document[i]) - 1)] for i in sorted(by_document)]


def _sample(benchmark: Benchmark, task: str, row: Mapping[str, Any], scored_by: tuple[str, ...]) -> dict[str, Any]:
    doc, counts = row["doc"], row["token_counts"][0] or {}
    answer = _text(row["filtered_resps"][0])
    score = next((_score(row[key]) for key in scored_by if key in row), None)
    offline = benchmark.kind == "offline"
    return {
        "id": doc["id"] if offline else f"{task}/{row['doc_id']}",
        "type": str(doc.get(benchmark.type_field) or task),
        "question": _text(row["arguments"][0]),
        "gold": _text(row["target"]),
        "answer": answer,
        "correct": None if score is None else score >= 0.5,
        "score": math.nan if score is None else score,
        "slots": counts["slots"],
        "kept": counts["kept"],
        "avg_tokens": counts["avg_tokens"],
        "seconds": counts["generate_s"] / counts["batch"],
    }


def _text(value: Any) -> str:
    return _text(value[0]) if isinstance(value, (list, tuple)) and len(value) == 1 else str(value).strip()


def _score(value: Any) -> float | None:
    """Score of one answer from what a task logs about it; None where only the whole task has a number."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, Mapping):
        return None
    for key in ("score", "gpt_score"):
        if isinstance(value.get(key), (bool, int, float)):
            return float(value[key])
    for said, right in _PAIRS:
        if said in value and right in value:
            return _agree(value[said], value[right])
    return None


def _agree(said: Any, right: Any) -> float | None:
    """Whether a parsed answer is the right one; a bare letter may be followed by its option's text."""
    if isinstance(said, (list, tuple)):
        said = said[0] if len(said) == 1 else None
    rights = right if isinstance(right, (list, tuple)) else [right]
    if not isinstance(said, (str, int)) or not all(isinstance(r, (str, int)) for r in rights):
        return None
    text = str(said).strip().lower()
    letter = text[:1] if not text[1:2].isalnum() else text
    return float(any(str(r).strip().lower() in (text, letter) for r in rights))
