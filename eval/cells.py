"""The cells of a sweep: one row of the table for every reducer and budget, checked as far as that goes without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import vtc
from vtc import doors
from vtc.core import Reducer
from vtc.errors import ConfigError, VtcError
from vtc.eval import env
from vtc.eval.config import ALL, BASELINES, UNREDUCED, KeyPath, ReducerConfig, SweepConfig

CELLS = 50_000
"""Most cells of a sweep, models, tasks and seeds counted; such a store takes hours to read."""


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


def reducer_identity(name: str, reducer: Reducer | None, flops: float | None = None) -> dict[str, Any] | None:
    """Return what makes results of a reducer comparable (name, options, code) as plain data that JSON gives back unchanged."""
    if reducer is None:
        return None
    options = asdict(reducer)
    if members := getattr(reducer, "members", ()):
        options["members"] = [{"name": m.name, **asdict(m)} for m in members]
    if flops is not None:
        options["flops"] = flops
    return {"name": name, "options": json.loads(json.dumps(options)), "code": env.reducer_version(reducer)}


def unlisted(reducers: Sequence[ReducerConfig]) -> list[str]:
    """Return the registered reducers that ``all`` stands for: those that are neither listed nor mandatory baselines."""
    listed = {r.name for r in reducers}
    return [n for n in vtc.list_reducers() if n not in listed and n not in BASELINES]


def _bounded(config: SweepConfig, wanted: Sequence[tuple[ReducerConfig, KeyPath]]) -> None:
    """Refuse products that nobody can have meant."""
    used = {b.text for r, _ in wanted for b in r.budgets or ()} | {b.text for b in config.budgets}
    rows = 1 + len(BASELINES) * len(used) + sum(len(r.budgets or config.budgets) for r, _ in wanted)
    total = rows * len(config.all_models) * len(config.all_tasks) * len(config.all_seeds)
    if total > CELLS:
        raise ConfigError(
            f"{config.place(('reducers',))}: with all models, tasks, seeds and budgets these are {total:,} cells, and a sweep may "
            f"have {CELLS:,}: cut it into several files"
        )


def cells(config: SweepConfig) -> list[Cell]:
    """Expand a sweep into its cells, unreduced first, then by budget: mandatory baselines, then the file's reducers.

    Raises
    ------
    ConfigError
        For an unknown reducer or option, an impossible budget, or two rows with one name.
    """
    place = config.place
    wanted: list[tuple[ReducerConfig, KeyPath]] = []
    for i, r in enumerate(config.reducers):
        if r.name == ALL:
            if r.options or r.members:
                raise ConfigError(f"{place(('reducers', i))}: '{ALL}' takes no options: list the reducer that should have them")
            wanted += [(ReducerConfig(name=n, budgets=r.budgets), ("reducers", i)) for n in unlisted(config.reducers)]
        else:
            wanted.append((r, ("reducers", i)))
    _bounded(config, wanted)
    used = {b.text: b for b in config.budgets} | {b.text: b for r in config.reducers for b in r.budgets or ()}
    budgets = list(used)
    asked: dict[str, KeyPath] = {b.text: ("budgets", j) for j, b in enumerate(config.budgets)}
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
            leaf: KeyPath = key
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
                reason = doors.short(error)
                raise ConfigError(f"{place((*key, 'options'))}: '{reducer.name}' refuses these options: {reason}") from None
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
