"""The single list of reducers. Tables, command line, docs, test matrix and config schema all come from here."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vtc.core import Compose, Reducer, Schedule
from vtc.errors import DuplicateReducerError, UnknownArgumentError, UnknownReducerError, did_you_mean

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
        """First line of the class docstring."""
        return (inspect.getdoc(self.cls) or "").splitlines()[0]

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
    """Import every module of :mod:`vtc.reducers` and every entry point, once."""
    global _LOADED
    if _LOADED:
        return
    _LOADED = True
    import vtc.reducers

    try:
        for module in pkgutil.iter_modules(vtc.reducers.__path__):
            importlib.import_module(f"vtc.reducers.{module.name}")
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            point.load()
    except BaseException:
        _LOADED = False  # the next call fails in the same way, instead of showing half a list
        raise


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
        raise UnknownReducerError(f"no reducer named '{name}'{did_you_mean(name, known)} (`vtc list` shows all {len(known)})")
    return known[name]


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
                f"'{base}' has no preset '{preset}'{did_you_mean(preset, entry.presets)}"
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
            f"'{base}' has no option '{unknown[0]}'{did_you_mean(unknown[0], entry.options)}"
            f" (options: {', '.join(entry.options)})"
        )
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
            raise UnknownArgumentError(f"none of the composed reducers takes the option '{unknown[0]}'")
        if len(members) == 1:
            return members[0]
        return Compose(keep=1.0, members=tuple(members))
    raise UnknownReducerError(f"cannot make a reducer of a {type(reducer).__name__}: give a name, a Reducer or a list of them")
