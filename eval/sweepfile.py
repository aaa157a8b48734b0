"""Reading sweep files: YAML, overrides, checks.

Every problem becomes one :class:`vtc.errors.ConfigError` that names the file, the line, the key and the fix.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vtc import doors
from vtc.errors import ConfigError, VtcError, did_you_mean
from vtc.eval.cells import cells
from vtc.eval.config import (
    MADE,
    BootstrapConfig,
    BudgetConfig,
    DataConfig,
    EasyVqaData,
    KeyPath,
    MemberConfig,
    ModelConfig,
    ProcessorConfig,
    ReducerConfig,
    SceneData,
    SpeedConfig,
    SweepConfig,
    TaskConfig,
    dotted,
)
from vtc.eval.yamlfile import parse_yaml, read_yaml


def load_sweep(path: Path | str, overrides: Sequence[str] = (), *, trust_remote_code: bool = False) -> SweepConfig:
    """Read and check a sweep file.

    Parameters
    ----------
    path : Path or str
        YAML file.
    overrides : sequence of str
        ``a.b=value`` each; the value is YAML. List items are addressed by number (``reducers.0.name=divprune``).
    trust_remote_code : bool
        Whether Python code that comes with the models may run. Only who runs the sweep can say so: the file cannot.

    Returns
    -------
    SweepConfig
        With every reducer and budget known to be valid (bounds of the model apart).

    Raises
    ------
    ConfigError
        With file, line, key path and what to write instead.
    """
    path = doors.place(path)
    if doors.unprintable(path.name):
        raise ConfigError(f"the name of the sweep file {doors.short(path)} is not plain UTF-8 text: rename it")
    try:
        text = read_yaml(path, "sweep file")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"there is no sweep file {doors.short(path)}{hint}") from None
    config = parse_sweep(text, overrides, source=str(path), folder=path.parent)
    return config.trusting() if trust_remote_code else config


def parse_sweep(
    text: str, overrides: Sequence[str] = (), source: str = "the sweep file", folder: Path | None = None
) -> SweepConfig:
    """Check the text of a sweep file whose relative paths start at ``folder``; see :func:`load_sweep`."""
    node, data = parse_yaml(text, source)
    _refuse_duplicates(node, source)
    if data is None:
        raise ConfigError(f"{source} is empty: write at least the keys data, budgets and reducers (see configs/smoke.yaml)")
    if not isinstance(data, dict):
        raise ConfigError(f"{source} holds a {type(data).__name__}: write a mapping with the keys data, budgets and reducers")
    for item in overrides:
        _override(data, item)
    _absolute(data, folder, source)
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, node, data, source)) from None

    config._place = functools.partial(_place, node, source)
    _check_whole(config)
    cells(config)
    return config


def _absolute(data: dict[str, Any], folder: Path | None, source: str) -> None:
    """Make the paths of a user's own data absolute: they are relative to the sweep file."""
    for i, task in enumerate(data.get("tasks") or () if isinstance(data.get("tasks"), list) else ()):
        for name in ("folder", "questions"):
            if isinstance(task, dict) and isinstance(task.get(name), str):
                try:
                    task[name] = str((folder or Path()).resolve() / doors.place(task[name]))
                except VtcError as error:
                    raise ConfigError(f"{source}: {dotted(('tasks', i, name))}: {error}") from None


def _check_whole(config: SweepConfig) -> None:
    """Refuse what no single key is to blame for, and names that nothing has."""
    place = config.place
    if config.data is not None and config.tasks is not None:
        raise ConfigError(f"{place(('tasks',))}: give `data` (one task) or `tasks` (a list), not both")
    if config.data is None and config.tasks is None:
        raise ConfigError(
            f"{place(('data',))}: the questions are missing: add `data` (one task) or `tasks` (a list), see configs/smoke.yaml "
            "for a complete file"
        )
    if config.model is not None and config.models is not None:
        raise ConfigError(f"{place(('models',))}: give `model` or `models`, not both")
    if config.seeds is not None and len(set(config.seeds)) != len(config.seeds):
        raise ConfigError(f"{place(('seeds',))}: a seed appears twice: remove it")
    for name, items in (("models", config.models), ("tasks", config.tasks)):
        seen: set[str] = set()
        for i, item in enumerate(items or ()):
            if item.title in seen:
                raise ConfigError(f"{place((name, i))}: two {name} are called '{item.title}': give one of them a `label`")
            seen.add(item.title)
    if sum(task.made for task in config.all_tasks) > 2 * MADE:
        raise ConfigError(
            f"{place(('tasks',))}: more than {2 * MADE} questions would have to be made: lower the `n` of some tasks"
        )
    from vtc.eval.models import check_model

    for i, model in enumerate(config.all_models):
        key: KeyPath = ("model",) if config.models is None else ("models", i)
        try:
            check_model(model)
        except VtcError as error:
            raise ConfigError(f"{place(key)}: {error}") from None
    from vtc.eval.questions import check_task

    for i, task in enumerate(config.tasks or ()):
        try:
            check_task(task)
        except VtcError as error:
            raise ConfigError(f"{place(('tasks', i))}: {error}") from None


def _refuse_duplicates(node: yaml.Node | None, source: str) -> None:
    for mapping in _mappings(node):
        seen: dict[str, int] = {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(
                    f"{source} line {line}: the key '{doors.short(key.value, 80)}' appears a second time (first on line "
                    f"{seen[key.value]}): remove one of them"
                )
            seen[key.value] = line


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for key, value in node.value:
            yield from _mappings(key)
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _override(data: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    shown = doors.short(item)
    steps = key.split(".")
    if not equals or not all(steps):
        raise ConfigError(f"--set {shown!r} is not of the form KEY=VALUE: write for example --set data.scenes.n=110")
    if len(steps) > 16 or doors.unprintable(key):
        raise ConfigError(f"--set {shown!r}: no key of a sweep file is like that")
    _, value = parse_yaml(text, f"--set {shown!r}")
    at: Any = data
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        above, this = doors.short(".".join(steps[:i])), doors.short(step, 40)
        if isinstance(at, list):
            if not (step.isdecimal() and len(step) < 10) or int(step) >= len(at):
                raise ConfigError(f"--set {shown!r}: '{above}' is a list of {len(at)}, so '{this}' must be a number below that")
            index: Any = int(step)
        elif isinstance(at, dict):
            index = step
            if not last and at.get(step) is None:
                at[step] = {}
        else:
            raise ConfigError(f"--set {shown!r}: '{above}' is a plain value and has no key '{this}'")
        if last:
            at[index] = value
        else:
            at = at[index]


# ---------------------------------------------------------------------------------------------------- error messages
def _place(node: yaml.Node | None, source: str, key: KeyPath) -> str:
    """``"file line 7: reducers[2].name"``; the line is that of the deepest part of the key that is in the file."""
    line = None
    at = node
    for step in key:
        if isinstance(at, yaml.MappingNode):
            pair = next(((k, v) for k, v in at.value if k.value == str(step)), None)
            if pair is None:
                break
            line, at = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(at, yaml.SequenceNode) and isinstance(step, int) and step < len(at.value):
            at = at.value[step]
            line = at.start_mark.line + 1
        else:
            break
    return f"{source}{f' line {line}' if line else ''}: {doors.short(dotted(key), 200)}"


_SECTIONS: dict[str, type[BaseModel]] = {
    "": SweepConfig,
    "model": ModelConfig,
    "models[]": ModelConfig,
    "data": DataConfig,
    "tasks[]": TaskConfig,
    "reducers[]": ReducerConfig,
    "bootstrap": BootstrapConfig,
    "speed": SpeedConfig,
}
_NESTED: dict[str, type[BaseModel]] = {
    "scenes": SceneData,
    "details": SceneData,
    "easy_vqa": EasyVqaData,
    "data": DataConfig,
    "budgets[]": BudgetConfig,
    "members[]": MemberConfig,
    "processor": ProcessorConfig,
}


def _fields_at(key: KeyPath) -> list[str]:
    """Names of the fields allowed at a key."""
    steps = [str(s) if isinstance(s, str) else "[]" for s in key]
    path = ".".join(steps).replace(".[]", "[]")
    kind = _SECTIONS.get(path) or _NESTED.get(path.rpartition(".")[2])
    return list(kind.model_fields) if kind is not None else []


def _written(loc: KeyPath, data: Any, missing: bool) -> KeyPath:
    """Return the steps of a validation's place that are in the file: a union reports under its branch, a bare name as a mapping."""
    key: list[str | int] = []
    for i, step in enumerate(loc):
        if isinstance(data, list) and isinstance(step, int) and step < len(data) or isinstance(data, dict) and step in data:
            data = data[step]
        elif not (missing and i == len(loc) - 1):
            continue
        key.append(step)
    return tuple(key)


def _explain(error: ValidationError, node: yaml.Node | None, data: Any, source: str) -> str:
    """One sentence for the first problem of a validation."""
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] != "missing"))
    key = _written(first["loc"], data, first["type"] == "missing")
    where = _place(node, source, key)
    if first["type"] == "extra_forbidden":
        known = _fields_at(key[:-1])
        name = doors.short(first["loc"][-1], 80)
        inside = f" in '{doors.short(dotted(key[:-1]), 200)}'" if len(key) > 1 else ""
        listed = f" (known: {', '.join(known)})" if known else ""
        return f"{where}: unknown key '{name}'{inside}{did_you_mean(name, known)}{listed}"
    if first["type"] == "missing":
        return f"{where}: the key '{key[-1]}' is missing: add it (see configs/smoke.yaml for a complete file)"
    if key == ("speed",):
        return f"{where}: give a mapping such as {{repeats: 10}}, or false to leave the speed pass out"
    if first["type"] == "model_type" and first["loc"][0] in ("model", "models"):
        return f"{where}: give a model's name as a string, or a mapping such as {{name: pocket, dtype: float32}}"
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = doors.short(message[0].lower() + message[1:], 400)
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) or message.startswith("budget=") else f" (it is {doors.short(repr(given))})"
    return f"{where}: {message}{shown}"
