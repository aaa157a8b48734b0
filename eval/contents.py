"""What the files of a results store may hold.

Checksums say that a file is the one that was written, not that it is right: a store may come from somebody else, from another
version, or from a copy that went wrong. So the shape of everything is checked, no number may be NaN or infinite, and the metrics
of a cell must follow from the answers beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vtc.errors import short, shown
from vtc.eval.cells import CELLS

SCHEMA = 1
"""Version of the store's layout and of the contents below."""

ADDRESS = r"[0-9a-f]{16}(-[0-9a-f]{8})?"
"""Pattern of a cell's address: hashes of its settings and of the code that measured it."""

SAMPLES = 500_000
"""Most answers of one cell: twice the questions of the largest benchmark."""

_TOLERANCE = 1e-9
_TOKENS = {"slots": "slots", "kept": "kept", "avg": "avg_tokens"}
"""Names of the token counts in the metrics and in an answer."""


class ContentError(ValueError):
    """Contents that cannot be what a sweep wrote; the message is part of a sentence."""


class _Open(BaseModel):
    """Keys that are named must be right; others may be there."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(max_length=1000)]
"""What tables show of a record: names and labels."""


# ----------------------------------------------------------------------------------------------------------------- cells
class _Commit(_Open):
    id: Text | None
    dirty: bool | None


class _Machine(_Open):
    cpu: Text
    gpu: Text | None
    cores: int | None
    torch_threads: int


class _Versions(_Open):
    python: Text
    torch: Text
    transformers: Text
    vtc: Text


class _Env(_Open):
    commit: _Commit
    machine: _Machine
    versions: _Versions
    seed: int


class _Sample(_Open):
    id: str
    image: str
    type: str
    correct: bool | None = None
    score: float | None = None
    gold: str = ""
    answer: str = ""
    question: str = ""
    slots: Amount = 0
    kept: Amount = 0
    avg_tokens: Amount = 0


class _Marks(_Open):
    n: Annotated[int, Field(ge=1)]
    correct: Count | None
    accuracy: float


class _Score(_Open):
    value: float
    scale: float | None = 1
    higher_is_better: bool = True


class _Tokens(_Open):
    slots: Amount
    kept: Amount
    avg: Amount


class _Counted(_Open):
    total: Amount


class _Layers(_Open):
    decoder: list[Amount] | None = None


class _Flops(_Open):
    counted: _Counted
    mismatch: Amount = 0.0
    tokens: _Layers = _Layers()


class _Searched(_Marks):
    """Metrics of a budget search."""

    seconds: Amount


class _Metrics(_Marks):
    """Metrics of a sweep."""

    tokens: _Tokens
    by_type: dict[str, _Marks] = Field(default_factory=dict)
    scores: dict[str, _Score] = Field(default_factory=dict)
    main: str = ""
    flops: _Flops | None = None
    kv_bytes: Count | None = None
    seconds: Amount = 0.0


class _Interval(_Open):
    value: float
    low: float
    high: float


class _Timings(_Open):
    vision_ms: _Interval
    prefill_ms: _Interval
    ttft_ms: _Interval
    decode_ms: _Interval
    reducer_ms: _Interval
    kv_bytes: Count | None = None


class _Ratios(_Open):
    prefill: _Interval
    ttft: _Interval


class _Repeats(_Open):
    repeats: Count
    warmup: Count


class _Speed(_Open):
    settings: _Repeats
    host: dict[str, Any]
    env: _Env
    batch_size: Count
    prompt_tokens: Count
    unreduced: _Timings
    reduced: _Timings
    speedup: _Ratios


class _Status(_Open):
    schema_: int = Field(alias="schema")
    state: Annotated[str, Field(pattern="^(done|failed)$")]
    error: str
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]


_ANSWERS = TypeAdapter(list[_Sample])


# --------------------------------------------------------------------------------------------------------------- sweeps
class _Listed(_Open):
    id: Annotated[str, Field(pattern=f"^{ADDRESS}$")]
    label: Text
    reducer: Text
    budget: Text
    model: Text | None = None
    task: Text | None = None
    seed: int = 0


class _Bootstrap(_Open):
    resamples: Annotated[int, Field(ge=1, le=100_000)]
    confidence: Annotated[float, Field(gt=0, lt=1)]


class _Config(_Open):
    seed: Annotated[int, Field(ge=0)] = 0
    bootstrap: _Bootstrap


class _Model(_Open):
    name: Text
    parameters: Count | None = None
    decoder_layers: Count | None = None
    visual_tokens: Count | None = None


class _Record(_Open):
    schema_: int = Field(alias="schema")
    source: Text | None = None
    written: Text | None = None
    config: _Config
    env: _Env
    model: _Model
    models: list[_Model] | None = None
    constant_guess: dict[Text, float] | None = None
    cells: Annotated[list[_Listed], Field(max_length=CELLS)]


# ------------------------------------------------------------------------------------------------------------- checking
def parse(data: bytes) -> Any:
    """Read JSON; NaN, infinities and numbers beyond all bounds are refused.

    Raises
    ------
    ContentError
        It is no JSON in UTF-8.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except ContentError:
        raise
    except (ValueError, RecursionError) as error:
        raise ContentError(f"no JSON: {short(error)}") from None


def parse_lines(data: bytes) -> list[Any]:
    """Read one JSON value from every line."""
    try:
        lines = [line for line in data.decode("utf-8").split("\n") if line]  # an answer may hold other line breaks
    except UnicodeDecodeError as error:
        raise ContentError(f"no UTF-8: {short(error)}") from None
    if len(lines) > SAMPLES:
        raise ContentError(f"more than {SAMPLES:,} lines")
    return parse(f"[{','.join(lines)}]".encode())


def _refuse(name: str) -> float:
    raise ContentError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ContentError(f"{text[:20]} is no number")
    return value


def _shaped(kind: type[BaseModel], value: Any, name: str) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        where, problem = _first(error)
        raise ContentError(f"{name}: {short('.'.join(map(str, where)))}{': ' if where else ''}{problem}") from None


def _first(error: ValidationError) -> tuple[tuple[Any, ...], str]:
    """Where the first problem of a validation is, and what it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    problem = str(first["msg"])
    return first["loc"], f"{problem[:1].lower()}{problem[1:]}"


def _current(schema: int, name: str) -> None:
    if schema != SCHEMA:
        raise ContentError(f"{name} has schema version {shown(schema)}, and this vtc reads version {SCHEMA}")


def check_status(status: Any) -> dict[str, Any]:
    """Check ``status.json`` and return it."""
    _current(_shaped(_Status, status, "status.json").schema_, "status.json")
    return status


def check_cell(config: Any, env: Any = None, metrics: Any = None, samples: list[Any] | None = None, speed: Any = None) -> None:
    """Check what is stored of a cell; of one that failed there is only the config.

    Raises
    ------
    ContentError
        Keys are missing, have another type, or the metrics do not follow from the samples.
    """
    if not isinstance(config, dict):
        raise ContentError("config.json holds no settings")
    _current(config.get("schema", SCHEMA), "config.json")
    if metrics is None:
        return
    _shaped(_Env, env, "env.json")
    searched = config.get("kind") == "tune"
    found = _shaped(_Searched if searched else _Metrics, metrics, "metrics.json")
    samples = samples or []
    try:
        _ANSWERS.validate_python(samples)
    except ValidationError as error:
        (number, *key), problem = _first(error)
        where = short(".".join(map(str, key)))
        raise ContentError(f"samples.jsonl line {number + 1}: {where}{': ' if where else ''}{problem}") from None
    for number, sample in enumerate(samples, 1):
        if not {"correct", "score"} & set(sample):
            raise ContentError(f"samples.jsonl line {number}: neither correct nor score is there")
    _follow(found, samples)
    if not searched:
        _follow_tokens(metrics["tokens"], samples)
    if speed is not None:
        _shaped(_Speed, speed, "speed.json")


def check_speed(speed: Any) -> None:
    """Check ``speed.json``; see :func:`check_cell`."""
    _shaped(_Speed, speed, "speed.json")


def check_sweep(record: Any) -> None:
    """Check the record of a sweep; see :func:`check_cell`."""
    _current(_shaped(_Record, record, "it").schema_, "it")


def score_of(sample: Mapping[str, Any]) -> float:
    """Score of a sample in 0..1: its ``score`` where answers are graded, else whether it is correct; NaN without either."""
    score = sample["score"] if sample.get("score") is not None else sample.get("correct")
    return math.nan if score is None else float(score)


def _follow(metrics: _Marks, samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse marks that are not those of the answers."""
    if metrics.n != len(samples):
        raise ContentError(f"metrics.json counts {metrics.n} answers, and samples.jsonl holds {len(samples)}")
    if len({s["id"] for s in samples}) != len(samples):
        raise ContentError("samples.jsonl: two answers have one id")
    scores = [score_of(s) for s in samples]
    if any(math.isnan(s) for s in scores):  # of some tasks only the whole has a number
        return
    by_type: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_type.setdefault(sample["type"], []).append(i)
    given: dict[str, _Marks] = getattr(metrics, "by_type", {})
    if given and set(given) != set(by_type):
        raise ContentError("metrics.json: by_type names other question types than samples.jsonl")
    for name, marks, rows in [("", metrics, range(len(samples))), *((t, m, by_type[t]) for t, m in given.items())]:
        right, mean = sum(bool(samples[i].get("correct")) for i in rows), sum(scores[i] for i in rows) / len(rows)
        if marks.n != len(rows) or marks.correct != right or abs(marks.accuracy - mean) > _TOLERANCE:
            raise ContentError(f"metrics.json{f': by_type.{short(name)}' if name else ''} does not follow from samples.jsonl")


def _follow_tokens(tokens: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
    for key, name in _TOKENS.items():
        if samples and all(name in s for s in samples):
            mean = sum(s[name] for s in samples) / len(samples)
            if abs(tokens[key] - mean) > _TOLERANCE * max(1.0, mean):
                raise ContentError(f"metrics.json: tokens.{key} does not follow from samples.jsonl")
