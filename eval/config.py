"""Sweep files: what a YAML file may say, checked before anything runs.

Every problem becomes one :class:`vtc.errors.ConfigError` that names the file, the line, the key and the fix.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

import vtc
from vtc.core import Reducer, check_amount
from vtc.errors import ConfigError, UnknownArgumentError, VtcError, did_you_mean
from vtc.registry import resolve

UNREDUCED = "none"
"""Label of the row without a reducer."""

ALL = "all"
"""In the place of a reducer's name: every registered one that the file does not list."""

BASELINES = ("random", "uniform", "downsample")
"""Rows that every table has at every budget, besides the unreduced one: the floors a method has to clear."""

BUILT_IN = ("scenes", "details", "easy_vqa")
"""Tasks whose questions vtc makes or finds itself; any other name is one of lmms-eval's."""

DATA = "questions"
"""Label of the task that the key ``data`` describes."""

_QUESTIONS = 300
"""Questions of a generated task that does not say how many."""

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
    """Where the questions of one task come from; at least one source.

    Attributes
    ----------
    scenes, details : SceneData or None
        Generated scenes, and small details of wide ones (see :func:`vtc.pocket.detail_questions`).
    easy_vqa : EasyVqaData or None
        The public easy-VQA set.
    """

    scenes: SceneData | None = None
    details: SceneData | None = None
    easy_vqa: EasyVqaData | None = None

    @model_validator(mode="after")
    def _any(self) -> DataConfig:
        if self.scenes is None and self.details is None and self.easy_vqa is None:
            raise ValueError("name at least one source of questions: `scenes: {n: 330}` or `easy_vqa: {n: 170}`")
        return self


class ModelConfig(_Strict):
    """One model: a bare name, or a mapping.

    Attributes
    ----------
    name : str
        An embedded model (:data:`vtc.pocket.POCKET_MODELS`), a folder, or a hub id.
    label : str or None
        Name in tables; the name by default.
    dtype : str
        Name of a torch dtype; ``"auto"`` takes the checkpoint's (float32 for embedded models).
    device : str
        A torch device; ``"auto"`` takes a GPU if there is one.
    attention : str or None
        Attention implementation (``"sdpa"``, ``"flash_attention_2"`` ...); transformers' default when None.
    revision : str or None
        Branch, tag or commit of a hub id.
    processor : dict
        Arguments of ``AutoProcessor.from_pretrained``, such as ``max_pixels``.
    """

    name: str = Field(min_length=1)
    label: str | None = Field(default=None, min_length=1, max_length=60)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    attention: str | None = None
    revision: str | None = None
    processor: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.label or self.name


class TaskConfig(_Strict):
    """One task: a bare name, or a mapping.

    Attributes
    ----------
    name : str
        One of :data:`BUILT_IN`, a task of lmms-eval (``"gqa"``; ``"lmms:easy_vqa"`` where a name is both), or any name for a
        task with ``data`` or with ``folder`` and ``questions``.
    label : str or None
        Name in tables; the name by default.
    n : int or None
        How many questions, at most.
    split, types, seed
        Of generated questions, see :class:`SceneData`.
    data : DataConfig or None
        A mixture of sources as one task.
    folder, questions : str or None
        Your own data: a folder of images, and a CSV file with the columns ``image``, ``question``, ``answer`` and optionally
        ``type`` and ``id``. Relative to the sweep file.
    max_new_tokens : int or None
        Longest answer; the sweep's (built-in and own data) or the task's own (lmms-eval) when None.
    metric : str or None
        Metric that tables show, where a task of lmms-eval has several; its main one when None.
    """

    name: str = Field(min_length=1)
    label: str | None = Field(default=None, min_length=1, max_length=60)
    n: int | None = Field(default=None, ge=1)
    split: Literal["test", "val"] = "test"
    types: list[str] | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0)
    data: DataConfig | None = None
    folder: str | None = None
    questions: str | None = None
    max_new_tokens: int | None = Field(default=None, ge=1, le=32768)
    metric: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> TaskConfig:
        if (self.folder is None) != (self.questions is None):
            raise ValueError("your own data need both `folder` (of images) and `questions` (a CSV file)")
        if self.data is not None and self.folder is not None:
            raise ValueError("give `data`, or `folder` and `questions`, not both")
        made = self.data is None and self.name in ("scenes", "details")
        if not made and (self.types is not None or self.seed):
            raise ValueError("`types` and `seed` belong to the generated tasks scenes and details: remove them here")
        if not made and self.split != "test" and self.name != "easy_vqa":
            raise ValueError("`split` belongs to the tasks scenes, details and easy_vqa: remove it here")
        if self.metric is not None and self.kind != "lmms":
            raise ValueError("`metric` belongs to tasks of lmms-eval, the others have accuracy only: remove it here")
        return self

    @property
    def kind(self) -> Literal["questions", "files", "lmms"]:
        """Whether the questions are vtc's, the user's, or lmms-eval's."""
        if self.folder is not None:
            return "files"
        return "questions" if self.data is not None or self.name in BUILT_IN else "lmms"

    @property
    def lmms(self) -> str:
        """Name of the task in lmms-eval."""
        return self.name.removeprefix("lmms:")

    @property
    def sources(self) -> DataConfig:
        """Sources of a task of the kind ``"questions"``."""
        if self.data is not None:
            return self.data
        if self.name == "easy_vqa":
            return DataConfig(easy_vqa=EasyVqaData(n=self.n, split=self.split))
        return DataConfig(**{self.name: SceneData(n=self.n or _QUESTIONS, split=self.split, types=self.types, seed=self.seed)})

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.label or self.name.removeprefix("lmms:")


class BudgetConfig(_Strict):
    """One budget: a bare number (or ``"22%"``) means ``keep``.

    Attributes
    ----------
    keep : int or float or None
        Visual tokens (int) or share of them (float in (0, 1]) that enter the reducer's stage.
    avg_tokens : int or float or None
        The same averaged over the decoder layers.
    flops : float or None
        Share of the FLOPs of the language model's unreduced prefill: every method gets the number of tokens that costs it as
        much, whether it cuts before the first layer or after some.
    label : str or None
        How tables print it.
    """

    keep: Amount | None = None
    avg_tokens: Amount | None = None
    flops: float | None = Field(default=None, gt=0.0, le=1.0)
    label: str | None = Field(default=None, min_length=1, max_length=20)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        if isinstance(value, BudgetConfig):
            return value
        given = dict(value) if isinstance(value, Mapping) else {"keep": value}
        for name in ("keep", "avg_tokens", "flops"):
            text = given.get(name)
            if isinstance(text, str) and text.strip().endswith("%"):
                try:
                    given[name] = float(text.strip()[:-1]) / 100
                except ValueError:
                    continue  # reported as what it is: not a number
                prefix = {"keep": "", "avg_tokens": "avg ", "flops": "flops "}[name]
                given.setdefault("label", prefix + text.replace(" ", ""))
        return given

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if sum(x is not None for x in (self.keep, self.avg_tokens, self.flops)) != 1:
            raise ValueError("give a number, or exactly one of {keep: N}, {avg_tokens: N} and {flops: SHARE}")
        return self

    @property
    def options(self) -> dict[str, int | float]:
        """Keyword argument of the reducer; for equal FLOPs, a budget to be replaced when the model is there."""
        if self.flops is not None:
            return {"keep": 0.5}
        return {"keep": self.keep} if self.keep is not None else {"avg_tokens": self.avg_tokens}  # type: ignore[dict-item]

    @property
    def text(self) -> str:
        """How tables print it: ``49``, ``0.25``, ``22%``, ``avg 49``, ``flops 0.25``."""
        if self.label is not None:
            return self.label
        if self.flops is not None:
            return f"flops {self.flops:g}"
        return f"{self.keep}" if self.keep is not None else f"avg {self.avg_tokens}"


class MemberConfig(_Strict):
    """One member of a composition: a bare name, or a mapping.

    Attributes
    ----------
    name : str
        Registered name, or ``name.preset``.
    options : dict
        The member's own options; with ``keep`` or ``avg_tokens`` among them, the sweep's budgets pass it by.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ReducerConfig(_Strict):
    """One row per budget: a bare name, a list of names (a composition), or a mapping.

    Attributes
    ----------
    name : str
        Registered name, or ``name.preset``; ``all`` for every one not listed. In a file also a list: a composition.
    members : list or None
        Members of a composition.
    label : str or None
        Name in tables; by default the name and the options given.
    options : dict
        The reducer's own options; of a composition, those of every member that has them.
    budgets : list or None
        Replaces the sweep's budgets for this reducer.
    """

    name: str
    members: list[MemberConfig] | None = Field(default=None, min_length=1)
    label: str | None = Field(default=None, min_length=1, max_length=60)
    options: dict[str, Any] = Field(default_factory=dict)
    budgets: list[BudgetConfig] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        given = value if isinstance(value, Mapping) else {"name": value}
        names = given.get("name")
        if isinstance(names, list):
            parts = [m.get("name") if isinstance(m, Mapping) else m for m in names]
            return {**given, "name": "+".join(str(p) for p in parts), "members": names}
        return given if isinstance(value, (Mapping, str, list)) else value

    @property
    def title(self) -> str:
        """The label, or what tells this row from others of the same method."""
        if self.label is not None:
            return self.label
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def method(self) -> str:
        """Registered name without presets; of a composition, the members' joined by ``+``."""
        return "+".join(m.name.partition(".")[0] for m in self.members or [self])

    def build(self, amount: Mapping[str, int | float], seed: int | None = None) -> Reducer:
        """Create the reducer.

        Parameters
        ----------
        amount : mapping
            ``{"keep": ...}`` or ``{"avg_tokens": ...}``.
        seed : int or None
            Given to every reducer that draws and whose options do not fix its seed.

        Raises
        ------
        VtcError
            An unknown name or option, or an impossible budget.
        """
        made, used = [], set()
        members = self.members if self.members is not None else [MemberConfig(name=self.name)]
        free = [m for m in members if not {"keep", "avg_tokens"} & set(m.options)]
        if not free:
            raise UnknownArgumentError(
                f"every member of '{self.name}' sets its own budget: leave `keep` out of one, it gets the sweep's"
            )
        for member in members:
            known = vtc.info(member.name.partition(".")[0]).options
            shared = self.options if self.members is None else {k: v for k, v in self.options.items() if k in known}
            used |= set(shared)
            options = {**shared, **member.options, **(amount if member in free else {})}
            if seed is not None and "seed" in known:
                options.setdefault("seed", seed)
            made.append(vtc.create(member.name, **options))
        if unknown := sorted(set(self.options) - used):
            raise UnknownArgumentError(f"no member of '{self.name}' has the option '{unknown[0]}'")
        return resolve(made)


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


def _listed(value: Any) -> Any:
    return [value] if value == ALL else value


class SweepConfig(_Strict):
    """A sweep: models x tasks x seeds x reducers x budgets.

    Attributes
    ----------
    model, models : str or ModelConfig; list of them
        The model, or several; the embedded one by default.
    data : DataConfig or None
        Questions of the one task; or:
    tasks : list of TaskConfig or None
        Several tasks.
    budgets : list of BudgetConfig
        Budgets of every reducer without its own, and of the mandatory baselines.
    reducers : list of ReducerConfig
        Rows; the mandatory baselines are added where missing. ``all`` stands for every registered one.
    batch_size : int
        Questions per ``generate`` call of the accuracy pass.
    max_new_tokens : int
        Longest answer.
    seed, seeds : int; list of int or None
        Seed of torch's random state and of reducers that draw; every cell is repeated for every one of ``seeds``. ``seed`` is
        also the bootstrap's.
    threads : int or None
        CPU threads of torch in the accuracy pass (at most the cores there are); as they are when None.
    bootstrap : BootstrapConfig
        Confidence intervals.
    speed : SpeedConfig or False
        Settings of the speed pass; ``false`` leaves it out.
    """

    model: ModelConfig | None = None
    models: list[ModelConfig] | None = Field(default=None, min_length=1)
    data: DataConfig | None = None
    tasks: list[TaskConfig] | None = Field(default=None, min_length=1)
    budgets: list[BudgetConfig] = Field(min_length=1)
    reducers: Annotated[list[ReducerConfig], BeforeValidator(_listed)]
    batch_size: int = Field(default=16, ge=1, le=1024)
    max_new_tokens: int = Field(default=4, ge=1, le=32768)
    seed: int = Field(default=0, ge=0)
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    threads: int | None = Field(default=None, ge=1, le=1024)
    bootstrap: BootstrapConfig = BootstrapConfig()
    speed: SpeedConfig | Literal[False] = SpeedConfig()
    _place: Any = PrivateAttr(default=None)  # where in the file a key is, for messages

    @property
    def all_models(self) -> list[ModelConfig]:
        """Every model of the sweep."""
        return self.models or [self.model or ModelConfig(name="pocket")]

    @property
    def all_tasks(self) -> list[TaskConfig]:
        """Every task of the sweep."""
        return self.tasks or [TaskConfig(name=DATA, data=self.data)]

    @property
    def all_seeds(self) -> list[int]:
        """Every seed of the sweep."""
        return self.seeds or [self.seed]


@dataclass(frozen=True)
class Cell:
    """One row of the table: a reducer at a budget.

    Attributes
    ----------
    label : str
        Name in tables.
    reducer : Reducer or None
        ``None`` for the unreduced run. Where ``flops`` is given, its budget is still to be found.
    name : str
        Registered name (without preset), ``"none"`` for the unreduced run.
    budget : str
        The budget as tables print it, ``""`` for the unreduced run.
    key, budget_key : str
        Where in the file reducer and budget come from, for error messages.
    flops : float or None
        Share of the unreduced prefill's FLOPs that the budget stands for.
    spec : ReducerConfig or None
        What the reducer is built from.
    amount : tuple
        Budget given to it, ``(("keep", 49),)``.
    seed : int or None
        Seed given to it.
    optional : bool
        Comes from ``all``: left out where the model refuses it.
    """

    label: str
    reducer: Reducer | None
    name: str
    budget: str
    key: str = ""
    budget_key: str = ""
    flops: float | None = None
    spec: ReducerConfig | None = None
    amount: tuple[tuple[str, int | float], ...] = ()
    seed: int | None = None
    optional: bool = False

    def seeded(self, seed: int) -> Cell:
        """Return this cell with another seed for reducers that draw."""
        if self.spec is None:
            return self
        return replace(self, seed=seed, reducer=self.spec.build(dict(self.amount), seed))

    def keeping(self, keep: int | float) -> Cell:
        """Return this cell with another number of tokens (for equal FLOPs)."""
        assert self.spec is not None
        return replace(self, amount=(("keep", keep),), reducer=self.spec.build({"keep": keep}, self.seed))


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
    return parse_sweep(text, overrides, source=str(path), folder=path.parent)


def parse_sweep(
    text: str, overrides: Sequence[str] = (), source: str = "the sweep file", folder: Path | None = None
) -> SweepConfig:
    """Check the text of a sweep file whose relative paths start at ``folder``; see :func:`load_sweep`."""
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
    _absolute(data, folder)
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, node, source)) from None

    config._place = place = functools.partial(_place, node, source)
    _check_whole(config, place)
    cells(config)
    return config


def _absolute(data: dict[str, Any], folder: Path | None) -> None:
    """Make the paths of a user's own data absolute: they are relative to the sweep file."""
    for task in data.get("tasks") or () if isinstance(data.get("tasks"), list) else ():
        for name in ("folder", "questions"):
            if isinstance(task, dict) and isinstance(task.get(name), str):
                task[name] = str((folder or Path()).resolve() / Path(task[name]).expanduser())


def _check_whole(config: SweepConfig, place: Any) -> None:
    """Refuse what no single key is to blame for, and names that nothing has."""
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
    from vtc.eval.models import check_model

    for i, model in enumerate(config.all_models):
        key: Path_ = ("model",) if config.models is None else ("models", i)
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


def _place(node: yaml.Node | None, source: str, key: Path_) -> str:
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
}


def _fields_at(key: Path_) -> list[str]:
    """Names of the fields allowed at a key."""
    steps = [str(s) if isinstance(s, str) else "[]" for s in key]
    path = ".".join(steps).replace(".[]", "[]")
    kind = _SECTIONS.get(path) or _NESTED.get(path.rpartition(".")[2])
    return list(kind.model_fields) if kind is not None else []


def _explain(error: ValidationError, node: yaml.Node | None, source: str) -> str:
    """One sentence for the first problem of a validation."""
    # members of a union report under the union's branch; those names are not part of the file
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] != "missing"))
    key = tuple(s for s in first["loc"] if not (isinstance(s, str) and (s in ("SpeedConfig", "int", "float") or "[" in s)))
    where = _place(node, source, key)
    if first["type"] == "extra_forbidden":
        known = _fields_at(key[:-1])
        name = str(key[-1])
        inside = f" in '{_dotted(key[:-1])}'" if len(key) > 1 else ""
        listed = f" (known: {', '.join(known)})" if known else ""
        return f"{where}: unknown key '{name}'{inside}{did_you_mean(name, known)}{listed}"
    if first["type"] == "missing":
        return f"{where}: the key '{key[-1]}' is missing: add it (see configs/smoke.yaml for a complete file)"
    if key == ("speed",):
        return f"{where}: give a mapping such as {{repeats: 10}}, or false to leave the speed pass out"
    if first["type"] == "model_type" and key[0] in ("model", "models"):
        return f"{where}: give a model's name as a string, or a mapping such as {{name: pocket, dtype: float32}}"
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[0].lower() + message[1:]
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) or message.startswith("budget=") else f" (it is {given!r})"
    return f"{where}: {message}{shown}"


# ------------------------------------------------------------------------------------------------------------- cells
def cells(config: SweepConfig) -> list[Cell]:
    """Expand a sweep into its cells, unreduced first, then by budget: mandatory baselines, then the file's reducers.

    Raises
    ------
    ConfigError
        For an unknown reducer or option, an impossible budget, or two rows with one name.
    """
    place = config._place or _dotted
    wanted: list[tuple[ReducerConfig, Path_]] = []
    listed = {r.name for r in config.reducers}
    for i, r in enumerate(config.reducers):
        if r.name == ALL:
            if r.options or r.members:
                raise ConfigError(f"{place(('reducers', i))}: '{ALL}' takes no options: list the reducer that should have them")
            rest = [n for n in vtc.list_reducers() if n not in listed and n not in BASELINES]
            wanted += [(ReducerConfig(name=n, budgets=r.budgets), ("reducers", i)) for n in rest]
        else:
            wanted.append((r, ("reducers", i)))
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
        optional = bool(key) and config.reducers[key[1]].name == ALL  # type: ignore[index]
        for budget in reducer.budgets or config.budgets:
            leaf: Path_ = key
            try:
                made = reducer.build(budget.options)
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
            found[name] = Cell(
                reducer.title,
                made,
                reducer.method,
                budget.text,
                place(key or asked[budget.text]),
                place(asked[budget.text]),
                budget.flops,
                reducer,
                tuple(budget.options.items()),
                None,
                optional,
            )
    rows = sorted(found.values(), key=lambda c: budgets.index(c.budget))  # stable: keeps the order of the reducers
    return [Cell(UNREDUCED, None, UNREDUCED, "", "the unreduced row"), *rows]
