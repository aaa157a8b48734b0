"""Sweep files: what a YAML file may say, key by key. :mod:`vtc.eval.sweepfile` reads one, :mod:`vtc.eval.cells` expands it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

import vtc
from vtc.core import Reducer, check_amount
from vtc.doors import short
from vtc.errors import UnknownArgumentError
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

MADE = 50_000
"""Most questions of a generated task: making them takes a minute or two and gigabytes."""

ASKED = 10_000_000
"""Most questions of any other task."""

SEEDS = 2**32 - 1
"""Largest seed that every random generator takes."""

SCENE_SEEDS = 2**30 - 1
"""Largest seed of the scene generator."""

KeyPath = tuple[str | int, ...]
"""Where in a sweep file something is: ``("reducers", 2, "name")``."""


def dotted(key: KeyPath) -> str:
    """Return a key path as text: ``reducers[2].name``."""
    out = ""
    for step in key:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else step
    return out


def _amount(value: Any) -> Any:
    check_amount("budget", value)
    return value


def _one_line(value: str) -> str:
    if any(c in value for c in "\n\r\t"):
        raise ValueError("a name is one line of text: leave line breaks and tabs out")
    return value


def _attention(value: str) -> str:
    if not re.fullmatch(r"\w{1,60}", value, re.ASCII):
        raise ValueError(
            "give the name of an attention implementation of transformers, such as sdpa; code from the hub is not run"
        )
    return value


def _device(value: str) -> str:
    if value == "meta" or not re.fullmatch(r"[a-z]{2,12}(:\d{1,3})?", value, re.ASCII):
        raise ValueError("give a torch device that computes, such as cpu, cuda or cuda:1, or auto")
    return value


def _revision(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", value) or ".." in value:
        raise ValueError("give a branch, a tag or a commit of the hub repository")
    return value


Amount = Annotated[int | float, BeforeValidator(_amount)]
Name = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_one_line)]
Label = Annotated[str, Field(min_length=1, max_length=60), AfterValidator(_one_line)]
Seed = Annotated[int, Field(ge=0, le=SEEDS)]
Pixels = Annotated[int, Field(ge=1, le=2**30)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Named(_Strict):
    """Something with a name and settings; the bare name will do."""

    name: Name

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


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

    n: int = Field(ge=1, le=MADE)
    split: Literal["test", "val"] = "test"
    types: list[Name] | None = Field(default=None, min_length=1, max_length=100)
    seed: int = Field(default=0, ge=0, le=SCENE_SEEDS)


class EasyVqaData(_Strict):
    """Questions of the public easy-VQA set.

    Attributes
    ----------
    n : int or None
        How many, as a prefix of a fixed shuffle; all when None.
    split : {"test", "val"}
        ``"val"`` is held out of the public training set.
    """

    n: int | None = Field(default=None, ge=1, le=ASKED)
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


class ProcessorConfig(_Strict):
    """Settings of a model's processor that a sweep file may change: how large pictures are, and how they are cut up.

    Anything else ``from_pretrained`` takes is not for a file to say: where it looks, what it runs.

    Attributes
    ----------
    min_pixels, max_pixels : int or None
        Bounds of a picture's area (Qwen-VL and its kin).
    size : int or dict or None
        Side, or sides by name (``{shortest_edge: 336}``, ``{height: 448, width: 448}``).
    do_resize, do_center_crop, do_pad : bool or None
        Steps of the image processor.
    do_image_splitting : bool or None
        Whether large pictures are cut into crops (Idefics3, SmolVLM).
    crop_to_patches, min_patches, max_patches : bool, int, int or None
        The same of InternVL.
    do_pan_and_scan : bool or None
        The same of Gemma 3.
    use_fast : bool or None
        Which of two image processors transformers takes, where there are two.
    """

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    size: Pixels | dict[Name, Pixels] | None = None
    do_resize: bool | None = None
    do_center_crop: bool | None = None
    do_pad: bool | None = None
    do_image_splitting: bool | None = None
    crop_to_patches: bool | None = None
    min_patches: Annotated[int, Field(ge=1, le=64)] | None = None
    max_patches: Annotated[int, Field(ge=1, le=64)] | None = None
    do_pan_and_scan: bool | None = None
    use_fast: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that the file names."""
        return self.model_dump(exclude_none=True)


class ModelConfig(_Named):
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
    processor : ProcessorConfig
        Settings of its processor, such as ``max_pixels``.
    """

    label: Label | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Annotated[str, AfterValidator(_device)] = "auto"
    attention: Annotated[str, AfterValidator(_attention)] | None = None
    revision: Annotated[str, Field(max_length=200), AfterValidator(_revision)] | None = None
    processor: ProcessorConfig = ProcessorConfig()
    _trusted: bool = PrivateAttr(default=False)

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.label or self.name

    @property
    def trusted(self) -> bool:
        """Whether Python code that comes with the model may run: the user's word, never the file's."""
        return self._trusted

    def trusting(self) -> ModelConfig:
        """Return the same model with leave to run the Python code that comes with it."""
        out = self.model_copy()
        out._trusted = True
        return out


class TaskConfig(_Named):
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

    label: Label | None = None
    n: int | None = Field(default=None, ge=1, le=ASKED)
    split: Literal["test", "val"] = "test"
    types: list[Name] | None = Field(default=None, min_length=1, max_length=100)
    seed: int = Field(default=0, ge=0, le=SCENE_SEEDS)
    data: DataConfig | None = None
    folder: Annotated[str, Field(min_length=1, max_length=4000)] | None = None
    questions: Annotated[str, Field(min_length=1, max_length=4000)] | None = None
    max_new_tokens: int | None = Field(default=None, ge=1, le=32768)
    metric: Name | None = None

    @model_validator(mode="after")
    def _one(self) -> TaskConfig:
        if (self.folder is None) != (self.questions is None):
            raise ValueError("your own data need both `folder` (of images) and `questions` (a CSV file)")
        if self.data is not None and self.folder is not None:
            raise ValueError("give `data`, or `folder` and `questions`, not both")
        made = self.data is None and self.name in ("scenes", "details")
        if made and (self.n or 0) > MADE:
            raise ValueError(f"n: {self.n} is more than a generated task may have: ask for at most {MADE}")
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

    @property
    def made(self) -> int:
        """How many questions have to be made for it."""
        if self.kind != "questions":
            return 0
        return sum(part.n for part in (self.sources.scenes, self.sources.details) if part is not None)


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
    label: Annotated[str, Field(min_length=1, max_length=20), AfterValidator(_one_line)] | None = None

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


class MemberConfig(_Named):
    """One member of a composition: a bare name, or a mapping.

    Attributes
    ----------
    name : str
        Registered name, or ``name.preset``.
    options : dict
        The member's own options; with ``keep`` or ``avg_tokens`` among them, the sweep's budgets pass it by.
    """

    options: dict[str, Any] = Field(default_factory=dict)


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

    name: Name
    members: list[MemberConfig] | None = Field(default=None, min_length=1, max_length=20)
    label: Label | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    budgets: list[BudgetConfig] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        given = value if isinstance(value, Mapping) else {"name": value}
        names = given.get("name")
        if isinstance(names, list):
            parts = [m.get("name") if isinstance(m, Mapping) else m for m in names]
            return {**given, "name": "+".join(str(p) for p in parts) or "nothing", "members": names}
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
            raise UnknownArgumentError(f"no member of '{self.name}' has the option '{short(unknown[0], 80)}'")
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
    seed: Seed = 0
    seeds: list[Seed] | None = Field(default=None, min_length=1)
    threads: int | None = Field(default=None, ge=1, le=1024)
    bootstrap: BootstrapConfig = BootstrapConfig()
    speed: SpeedConfig | Literal[False] = SpeedConfig()
    _place: Callable[[KeyPath], str] = PrivateAttr(default_factory=lambda: dotted)

    def trusting(self) -> SweepConfig:
        """Return the same sweep with leave to run the Python code that comes with its models (:meth:`ModelConfig.trusting`)."""
        models = [m.trusting() for m in self.models] if self.models is not None else None
        return self.model_copy(update={"model": self.model.trusting() if self.model is not None else None, "models": models})

    def place(self, key: KeyPath) -> str:
        """Return where a key is, for messages; with file and line where the sweep was read from a file."""
        return self._place(key)

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
