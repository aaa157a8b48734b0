"""Sweep files: what a YAML file may say, checked before anything runs.

Every problem becomes one :class:`vtc.errors.ConfigError` that names the file, the line, the key and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

import vtc
from vtc.core import Reducer, check_amount
from vtc.errors import ConfigError, VtcError, did_you_mean

UNREDUCED = "none"
"""Label of the row without a reducer."""

BASELINES = ("random", "uniform", "downsample")
"""Rows that every table has at every budget, besides the unreduced one: the floors a method has to clear."""

Path_ = tuple[str | int, ...]


def _amount(value: Any) -> Any:
    check_amount("budget", value)
    return value


Amount = Annotated[int | float, BeforeValidator(_amount)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SceneData(_Strict):
    """Questions of the scene generator.

    Attributes
    ----------
    n : int
        How many, spread evenly over the types.
    split : {"test", "val"}
        Held-out streams.
    types : list of str or None
        Subset of :data:`vtc.pocket.QUESTION_TYPES`; all when None.
    seed : int
        Stream of the split.
    """

    n: int = Field(ge=1)
    split: Literal["test", "val"] = "test"
    types: list[str] | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0)


class EasyVqaData(_Strict):
    """Questions of the public easy-VQA set.

    Attributes
    ----------
    n : int or None
        How many, as a prefix of a fixed shuffle; all when None.
    split : {"test", "val"}
        ``"val"`` is held out of the public training set.
    """

    n: int | None = Field(default=None, ge=1)
    split: Literal["test", "val"] = "test"


class DataConfig(_Strict):
    """Where the questions come from; at least one source."""

    scenes: SceneData | None = None
    easy_vqa: EasyVqaData | None = None

    @model_validator(mode="after")
    def _any(self) -> DataConfig:
        if self.scenes is None and self.easy_vqa is None:
            raise ValueError("name at least one source of questions: `scenes: {n: 330}` or `easy_vqa: {n: 170}`")
        return self


class BudgetConfig(_Strict):
    """One budget: a bare number means ``keep``.

    Attributes
    ----------
    keep : int or float or None
        Visual tokens (int) or share of them (float in (0, 1]) that enter the reducer's stage.
    avg_tokens : int or float or None
        The same averaged over the decoder layers.
    """

    keep: Amount | None = None
    avg_tokens: Amount | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return value if isinstance(value, (Mapping, BudgetConfig)) else {"keep": value}

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if (self.keep is None) == (self.avg_tokens is None):
            raise ValueError("give a number, or exactly one of {keep: N} and {avg_tokens: N}")
        return self

    @property
    def options(self) -> dict[str, int | float]:
        """Keyword argument of the reducer."""
        return {"keep": self.keep} if self.keep is not None else {"avg_tokens": self.avg_tokens}  # type: ignore[dict-item]

    @property
    def text(self) -> str:
        """How tables print it: ``49``, ``0.25``, ``avg 49``."""
        return f"{self.keep}" if self.keep is not None else f"avg {self.avg_tokens}"


class ReducerConfig(_Strict):
    """One row per budget: a bare name, or a mapping.

    Attributes
    ----------
    name : str
        Registered name, or ``name.preset``.
    label : str or None
        Name in tables; by default the name and the options given.
    options : dict
        The reducer's own options.
    budgets : list or None
        Replaces the sweep's budgets for this reducer.
    """

    name: str
    label: str | None = Field(default=None, min_length=1, max_length=60)
    options: dict[str, Any] = Field(default_factory=dict)
    budgets: list[BudgetConfig] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def title(self) -> str:
        """The label, or what tells this row from others of the same method."""
        if self.label is not None:
            return self.label
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


class BootstrapConfig(_Strict):
    """Confidence intervals.

    Attributes
    ----------
    resamples : int
        Bootstrap draws.
    confidence : float
        Level of the intervals.
    """

    resamples: int = Field(default=2000, ge=100, le=100_000)
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)


class SpeedConfig(_Strict):
    """The speed pass.

    Attributes
    ----------
    repeats, warmup : int
        Timed and discarded pairs of an unreduced and a reduced run.
    decode_steps : int
        Tokens decoded after the prefill in every run.
    batch_size : int
        Copies of the prompt in one call.
    threads : int
        CPU threads of torch during this pass. One by default: a second thread makes small models wait for the slower of two cores,
        and timings depend on whatever else the machine does.
    """

    repeats: int = Field(default=10, ge=3, le=1000)
    warmup: int = Field(default=2, ge=1, le=100)
    decode_steps: int = Field(default=6, ge=1, le=512)
    batch_size: int = Field(default=1, ge=1, le=256)
    threads: int = Field(default=1, ge=1, le=1024)


class SweepConfig(_Strict):
    """A sweep: reducers x budgets on one model and one set of questions.

    Attributes
    ----------
    model : str
        Embedded model (a name of :data:`vtc.pocket.POCKET_MODELS`).
    data : DataConfig
        Questions.
    budgets : list of BudgetConfig
        Budgets of every reducer without its own, and of the mandatory baselines.
    reducers : list of ReducerConfig
        Rows; the mandatory baselines are added where missing.
    batch_size : int
        Questions per ``generate`` call of the accuracy pass.
    max_new_tokens : int
        Longest answer.
    seed : int
        Seed of torch's random state and of the bootstrap.
    threads : int or None
        CPU threads of torch in the accuracy pass (at most the cores there are); as they are when None.
    bootstrap : BootstrapConfig
        Confidence intervals.
    speed : SpeedConfig or False
        Settings of the speed pass; ``false`` leaves it out.
    """

    model: str = "pocket"
    data: DataConfig
    budgets: list[BudgetConfig] = Field(min_length=1)
    reducers: list[ReducerConfig]
    batch_size: int = Field(default=16, ge=1, le=1024)
    max_new_tokens: int = Field(default=4, ge=1, le=256)
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1, le=1024)
    bootstrap: BootstrapConfig = BootstrapConfig()
    speed: SpeedConfig | Literal[False] = SpeedConfig()


@dataclass(frozen=True)
class Cell:
    """One row of the table: a reducer at a budget.

    Attributes
    ----------
    label : str
        Name in tables.
    reducer : Reducer or None
        ``None`` for the unreduced run.
    name : str
        Registered name (without preset), ``"none"`` for the unreduced run.
    budget : str
        The budget as tables print it, ``""`` for the unreduced run.
    key, budget_key : str
        Where in the file reducer and budget come from, for error messages.
    """

    label: str
    reducer: Reducer | None
    name: str
    budget: str
    key: str = ""
    budget_key: str = ""


# ----------------------------------------------------------------------------------------------------------- reading
def load_sweep(path: Path | str, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read and check a sweep file.

    Parameters
    ----------
    path : Path or str
        YAML file.
    overrides : sequence of str
        ``a.b=value`` each; the value is YAML. List items are addressed by number (``reducers.0.name=divprune``).

    Returns
    -------
    SweepConfig
        With every reducer and budget known to be valid (bounds of the model apart).

    Raises
    ------
    ConfigError
        With file, line, key path and what to write instead.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"there is no sweep file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text ({error}): give the path of a YAML file") from None
    return parse_sweep(text, overrides, source=str(path))


def parse_sweep(text: str, overrides: Sequence[str] = (), source: str = "the sweep file") -> SweepConfig:
    """Check the text of a sweep file; see :func:`load_sweep`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "syntax error"
        raise ConfigError(
            f"{source}{where}: this is not valid YAML ({problem}): check indentation, quotes and brackets"
        ) from None
    _refuse_duplicates(node, source)
    if data is None:
        raise ConfigError(f"{source} is empty: write at least the keys data, budgets and reducers (see configs/smoke.yaml)")
    if not isinstance(data, dict):
        raise ConfigError(f"{source} holds a {type(data).__name__}: write a mapping with the keys data, budgets and reducers")
    for item in overrides:
        _override(data, item)
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, node, source, data)) from None
    cells(config, lambda key: _place(node, key, source))
    return config


def _refuse_duplicates(node: yaml.Node | None, source: str) -> None:
    for mapping in _mappings(node):
        seen: dict[str, int] = {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(
                    f"{source} line {line}: the key '{key.value}' appears a second time (first on line {seen[key.value]}): "
                    "remove one of them"
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
    steps = key.split(".")
    if not equals or not all(steps):
        raise ConfigError(f"--set {item!r} is not of the form KEY=VALUE: write for example --set data.scenes.n=110")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item!r}: the value is not valid YAML") from None
    at: Any = data
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(at, list):
            if not step.isdecimal() or int(step) >= len(at):
                raise ConfigError(
                    f"--set {item!r}: '{'.'.join(steps[:i])}' is a list of {len(at)}, so '{step}' must be a number below that"
                )
            index: Any = int(step)
        elif isinstance(at, dict):
            index = step
            if not last and at.get(step) is None:
                at[step] = {}
        else:
            raise ConfigError(f"--set {item!r}: '{'.'.join(steps[:i])}' is a plain value and has no key '{step}'")
        if last:
            at[index] = value
        else:
            at = at[index]


# ---------------------------------------------------------------------------------------------------- error messages
def _dotted(key: Path_) -> str:
    out = ""
    for step in key:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else step
    return out


def _place(node: yaml.Node | None, key: Path_, source: str) -> str:
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
    return f"{source}{f' line {line}' if line else ''}: {_dotted(key)}"


def _model_at(data: Any, key: Path_) -> list[str]:
    """Names of the fields allowed at a key."""
    known: dict[str, type[BaseModel]] = {
        "": SweepConfig,
        "data": DataConfig,
        "data.scenes": SceneData,
        "data.easy_vqa": EasyVqaData,
        "bootstrap": BootstrapConfig,
        "speed": SpeedConfig,
    }
    kind = known.get(_dotted(key))
    if kind is None and key and key[-1] == "budgets" or len(key) > 1 and key[-2] == "budgets":
        kind = BudgetConfig
    elif kind is None and len(key) == 2 and key[0] == "reducers":
        kind = ReducerConfig
    return list(kind.model_fields) if kind is not None else []


def _explain(error: ValidationError, node: yaml.Node | None, source: str, data: Any) -> str:
    """One sentence for the first problem of a validation."""
    # members of a union report under the union's branch; those names are not part of the file
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] != "missing"))
    key = tuple(s for s in first["loc"] if not (isinstance(s, str) and (s in ("SpeedConfig", "int", "float") or "[" in s)))
    where = _place(node, key, source)
    if first["type"] == "extra_forbidden":
        known = _model_at(data, key[:-1])
        name = str(key[-1])
        inside = f" in '{_dotted(key[:-1])}'" if len(key) > 1 else ""
        listed = f" (known: {', '.join(known)})" if known else ""
        return f"{where}: unknown key '{name}'{inside}{did_you_mean(name, known)}{listed}"
    if first["type"] == "missing":
        return f"{where}: the key '{key[-1]}' is missing: add it (see configs/smoke.yaml for a complete file)"
    if key == ("speed",):
        return f"{where}: give a mapping such as {{repeats: 10}}, or false to leave the speed pass out"
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[0].lower() + message[1:]
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) or message.startswith("budget=") else f" (it is {given!r})"
    return f"{where}: {message}{shown}"


# ------------------------------------------------------------------------------------------------------------- cells
def cells(config: SweepConfig, place: Any = None) -> list[Cell]:
    """Expand a sweep into its cells, unreduced first, then by budget: mandatory baselines, then the file's reducers.

    Raises
    ------
    ConfigError
        For an unknown reducer or option, an impossible budget, or two rows with one name.
    """
    if place is None:

        def place(key: Path_) -> str:
            return _dotted(key)

    wanted: list[tuple[ReducerConfig, Path_]] = [(r, ("reducers", i)) for i, r in enumerate(config.reducers)]
    used = {b.text: b for b in config.budgets} | {b.text: b for r in config.reducers for b in r.budgets or ()}
    budgets = list(used)
    asked: dict[str, Path_] = {b.text: ("budgets", j) for j, b in enumerate(config.budgets)}
    for r, key in wanted:
        for j, b in enumerate(r.budgets or ()):
            asked.setdefault(b.text, (*key, "budgets", j))
    for name in BASELINES:  # every budget in use gets its floors
        there = {b.text for r, _ in wanted if r.name == name and not r.options for b in r.budgets or config.budgets}
        if added := [b for text, b in used.items() if text not in there]:
            wanted.append((ReducerConfig(name=name, budgets=added), ()))
    ordered = sorted(wanted, key=lambda item: BASELINES.index(item[0].name) if item[0].name in BASELINES else len(BASELINES))
    found: dict[tuple[str, str], Cell] = {}
    for reducer, key in ordered:
        if reducer.name == UNREDUCED:
            raise ConfigError(f"{place((*key, 'name'))}: the unreduced row '{UNREDUCED}' is always there: remove it")
        forbidden = sorted({"keep", "avg_tokens"} & set(reducer.options))
        if forbidden:
            raise ConfigError(f"{place((*key, 'options', forbidden[0]))}: a budget is not an option: write it under 'budgets'")
        for budget in reducer.budgets or config.budgets:
            leaf: Path_ = key
            try:
                made = vtc.create(reducer.name, **reducer.options, **budget.options)
            except VtcError as error:
                if isinstance(error, vtc.UnknownReducerError):
                    leaf = (*key, "name")
                elif isinstance(error, vtc.BudgetError):
                    leaf = asked[budget.text]
                elif reducer.options:
                    leaf = (*key, "options")
                raise ConfigError(f"{place(leaf)}: {error}") from None
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{place((*key, 'options'))}: '{reducer.name}' refuses these options: {error}") from None
            name = (reducer.title, budget.text)
            if name in found:
                raise ConfigError(
                    f"{place(key)}: two rows are called '{reducer.title}' at budget {budget.text}: give one of them a `label`"
                )
            where = place(key or asked[budget.text]), place(asked[budget.text])
            found[name] = Cell(reducer.title, made, reducer.name.partition(".")[0], budget.text, *where)
    rows = sorted(found.values(), key=lambda c: budgets.index(c.budget))  # stable: keeps the order of the reducers
    return [Cell(UNREDUCED, None, UNREDUCED, "", "the unreduced row"), *rows]
