"""The single list of reducers. Tables, command line, docs, test matrix and config schema all come from here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import math
import numbers
import pkgutil
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vtc.core import Compose, Reducer, Schedule, amount
from vtc.errors import DuplicateReducerError, UnknownArgumentError, UnknownReducerError, did_you_mean, short, shown

ENTRY_POINT_GROUP = "vtc.reducers"
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
T = TypeVar("T", bound=type[Reducer])


@dataclass(frozen=True)
class Entry:
    """One registered method.

    Attributes
    ----------
    name : str
        Registry key, lower snake case.
    cls : type
        The reducer class.
    paper : str
        Source: ``"arXiv:NNNN.NNNNN"``, or ``"baseline"`` for the floors.
    code : str
        Official implementation and the commit it was compared with; ``""`` where none is public.
    licence : str
        Licence of the official implementation (ours is Apache-2.0 and written from the specification).
    presets : mapping
        Papers' settings: preset name to keyword arguments.
    """

    name: str
    cls: type[Reducer]
    paper: str
    code: str = ""
    licence: str = ""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the class docstring; empty where a plugin's class has none."""
        return next(iter((inspect.getdoc(self.cls) or "").splitlines()), "")

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages the method acts at, with a token budget that any model can meet."""
        if issubclass(self.cls, Schedule):
            return tuple(s.value for s in self.cls.stages)  # type: ignore[attr-defined]
        return (self.cls.stage.value,)

    @property
    def options(self) -> dict[str, Any]:
        """Option names with their defaults."""
        return {f.name: f.default for f in dataclasses.fields(self.cls) if f.init}


_ENTRIES: dict[str, Entry] = {}
_LOADED = False


def register(
    name: str,
    *,
    paper: str,
    code: str = "",
    licence: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[T], T]:
    """Class decorator that puts a reducer into the registry.

    Raises
    ------
    DuplicateReducerError
        If the name is taken.
    ValueError
        If the name is not lower snake case.
    """

    def add(cls: T) -> T:
        if not _NAME.match(name):
            raise ValueError(f"reducer name {name!r} is not lower snake case")
        known = _ENTRIES[name].cls if name in _ENTRIES else cls
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # a reloaded module may register again
            raise DuplicateReducerError(
                f"a reducer named '{name}' is already registered ({_ENTRIES[name].cls.__module__}): choose another name"
            )
        cls.name = name
        _ENTRIES[name] = Entry(name, cls, paper, code, licence, dict(presets or {}))
        return cls

    return add


def unregister(name: str) -> None:
    """Remove a reducer from the registry (for tests and interactive work)."""
    _load()
    _ENTRIES.pop(name, None)


def _load() -> None:
    """Import every module of :mod:`vtc.reducers` and every entry point, once; a plugin that fails costs a warning, not the list."""
    global _LOADED
    if _LOADED:
        return
    _LOADED = True
    import vtc.reducers

    try:
        for module in pkgutil.iter_modules(vtc.reducers.__path__):
            importlib.import_module(f"vtc.reducers.{module.name}")
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            before = dict(_ENTRIES)
            try:
                point.load()
            except (Exception, SystemExit) as error:  # noqa: BLE001  a stranger's module may raise anything, or try to end us
                _ENTRIES.clear()
                _ENTRIES.update(before)  # not the half of it that came before
                warnings.warn(plugin_failed("the reducers", point, error), RuntimeWarning, stacklevel=3)
    except BaseException:
        _LOADED = False  # the next call fails in the same way, instead of showing half a list
        raise


def plugin_failed(what: str, point: Any, error: BaseException) -> str:
    """Return the line that names a broken plugin, and the package to mend; ``what`` is missing because of it."""
    dist = getattr(point, "dist", None)
    owner = dist.name if dist is not None else point.value
    reason = "it tried to end the program" if isinstance(error, SystemExit) else f"{type(error).__name__}: {short(error)}"
    return f"{what} '{point.name}' of {owner} are missing ({reason}): reinstall or remove {owner}"


def entries() -> dict[str, Entry]:
    """Return all registered methods by name, sorted."""
    _load()
    return dict(sorted(_ENTRIES.items()))


def list_reducers() -> list[str]:
    """Return the names of all registered reducers."""
    return list(entries())


def info(name: str) -> Entry:
    """Return the registry entry of a method.

    Raises
    ------
    UnknownReducerError
        With the closest names.
    """
    known = entries()
    if name not in known:
        raise UnknownReducerError(
            f"no reducer named '{short(name, 80)}'{did_you_mean(name, known)} (`vtc list` shows all {len(known)})"
        )
    return known[name]


@functools.cache
def _hints(cls: type[Reducer]) -> dict[str, Any]:
    """Types of a reducer's options; none where a plugin's annotations cannot be read."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # noqa: BLE001  annotations are code
        return {}


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _checked(reducer: str, name: str, value: Any, hint: Any) -> Any:
    """Return an option's value, a list as the tuple it stands for.

    Raises
    ------
    UnknownArgumentError
        It is of another type than the option, NaN, or larger than 64 bits hold.
    """
    if name in ("keep", "avg_tokens"):
        value = amount(value)
        if not isinstance(value, int):
            return value  # budgets have their own sentences
    if isinstance(value, (list, tuple)) and _is_tuple(hint):
        value = tuple(value)
    if str(value) in (choices := _choices(hint)):
        value = str(value)  # a command line reads version=2 as a number
    seen = value if isinstance(value, tuple) else (value,)
    if any(isinstance(n, int) and not -(2**63) <= n < 2**63 for n in seen):
        raise UnknownArgumentError(f"{reducer}: {name}={shown(value)} is too large: use a number that 64 bits can hold")
    if any(isinstance(n, float) and math.isnan(n) for n in seen):
        raise UnknownArgumentError(f"{reducer}: {name}={shown(value)} is not a number: use one")
    if name not in ("keep", "avg_tokens") and not _fits(value, hint):
        known = f"one of {', '.join(choices)}" if choices else _described(hint)
        raise UnknownArgumentError(f"{reducer}: {name}={shown(value)} is not possible; use {known}")
    return value


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the strings an option may be, where it may be nothing else (but None)."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple(part for part in typing.get_args(hint) if isinstance(part, str))
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    return _choices(parts[0]) if len(parts) == 1 and typing.get_origin(hint) in (typing.Union, types.UnionType) else ()


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple or any(_is_tuple(part) for part in typing.get_args(hint) if part is not ...)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; whatever is annotated with something unusual fits."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, parts[0]) for v in value)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _described(hint: Any) -> str:
    """Return an annotated type in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(repr(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_described(part) for part in parts if part is not type(None)))
    if origin is tuple:
        return f"a list, each of it {_described(parts[0])}"
    return _KINDS.get(hint, f"a {getattr(hint, '__name__', hint)}")


def create(name: str, **options: Any) -> Reducer:
    """Build a reducer from its name, ``"method"`` or ``"method.preset"``, and options.

    Options that are ``None`` are dropped, so that a command line can pass everything. Options given override the preset's; a budget
    given in one form (``keep``, ``avg_tokens``) replaces the preset's in another.

    Raises
    ------
    UnknownReducerError
        Unknown method or preset, with close matches.
    UnknownArgumentError
        Unknown option, with the options there are.
    BudgetError
        A budget that makes no sense.
    """
    base, _, preset = name.partition(".")
    entry = info(base)
    kwargs: dict[str, Any] = {}
    if preset:
        if preset not in entry.presets:
            raise UnknownReducerError(
                f"'{base}' has no preset '{short(preset, 80)}'{did_you_mean(preset, entry.presets)}"
                f" (presets: {', '.join(entry.presets) or 'none'})"
            )
        kwargs.update(entry.presets[preset])
    given = {k: v for k, v in options.items() if v is not None}
    if set(entry.cls.budget_options) & set(given):
        kwargs = {k: v for k, v in kwargs.items() if k not in entry.cls.budget_options}
    kwargs.update(given)
    unknown = sorted(set(kwargs) - set(entry.options))
    if unknown:
        raise UnknownArgumentError(
            f"'{base}' has no option '{short(unknown[0], 80)}'{did_you_mean(unknown[0], entry.options)}"
            f" (options: {', '.join(entry.options)})"
        )
    hints = _hints(entry.cls)
    kwargs = {name: _checked(base, name, value, hints.get(name, Any)) for name, value in kwargs.items()}
    reducer = entry.cls(**kwargs)
    reducer.budget  # noqa: B018  a budget that makes no sense fails here, not in the middle of a forward
    return reducer


def resolve(reducer: str | Reducer | list[str | Reducer] | tuple[str | Reducer, ...], **options: Any) -> Reducer:
    """Turn what :func:`vtc.patch` accepts into one reducer.

    A list composes reducers of different stages. In a list, ``options`` go to every member that has them, and an option no member
    has raises; members that need different budgets are given as objects from :func:`create`.
    """
    if isinstance(reducer, Reducer):
        if options:
            raise UnknownArgumentError(
                f"options {sorted(options)} came with a ready-made reducer: set them when creating it, "
                f"vtc.create('{reducer.name}', ...)"
            )
        return reducer
    if isinstance(reducer, str):
        return create(reducer, **options)
    if isinstance(reducer, (list, tuple)):
        if not reducer:
            raise UnknownArgumentError("an empty list of reducers was given: name at least one")
        used: set[str] = set()
        members = []
        for member in reducer:
            if isinstance(member, Reducer):
                members.append(member)
                continue
            known = info(str(member).partition(".")[0]).options
            mine = {k: v for k, v in options.items() if k in known}
            used |= set(mine)
            members.append(create(member, **mine))
        unknown = sorted(set(options) - used)
        if unknown:
            raise UnknownArgumentError(f"none of the composed reducers takes the option '{short(unknown[0], 80)}'")
        if len(members) == 1:
            return members[0]
        return Compose(keep=1.0, members=tuple(members))
    raise UnknownReducerError(f"cannot make a reducer of a {type(reducer).__name__}: give a name, a Reducer or a list of them")
