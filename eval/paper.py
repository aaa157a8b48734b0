"""Published numbers beside ours: ``configs/paper/*.yaml``, every number with its source.

A published number comes from another machine, another harness and often another set of questions; the table says whose it is and
puts it next to what the store measured, without judging the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vtc import doors
from vtc.errors import ConfigError, did_you_mean
from vtc.eval.config import UNREDUCED
from vtc.eval.formats import MISSING, Grid, Line, csv_text, format_grids
from vtc.eval.results import Results, Row
from vtc.eval.yamlfile import parse_yaml, read_yaml

FOLDER = Path("configs/paper")
"""Where names are looked up, below the current folder."""

TOLERANCE = 0.1
"""A row of ours stands beside a published one if its tokens differ by at most this share."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where numbers were published.

    Attributes
    ----------
    cite : str
        Paper or repository.
    where : str
        Table or section in it.
    kind : {"paper", "readme", "second-hand"}
        ``"second-hand"``: read in somebody's notes about the paper, not in the paper.
    """

    cite: str = Field(min_length=1)
    where: str = Field(min_length=1)
    kind: Literal["paper", "readme", "second-hand"]


class PaperColumn(_Strict):
    """A benchmark and what of ours stands beside it.

    Attributes
    ----------
    task : str or None
        Our task; ``None``: we have nothing to compare.
    scale : float or None
        What a mean score of 1 is in the paper's numbers; ``None``: the paper prints the benchmark's own metric, and so do we.
    """

    task: str | None
    scale: float | None = 100.0


class Number(_Strict):
    """A number with a source of its own."""

    value: float
    source: str


class PaperRow(_Strict):
    """One published row.

    Attributes
    ----------
    method : str
        Registered name of ours, or the paper's name for what we do not have.
    label : str or None
        What the table calls it; the method by default.
    tokens : int or None
        Visual tokens, averaged over the layers where the paper says so; ``None`` where it names no count.
    source : str
        Key of ``sources``, for every number without one of its own.
    values : dict
        Numbers by column.
    average : float or None
        The paper's average of its benchmarks, relative to its unreduced model, in per cent.
    """

    method: str
    label: str | None = None
    tokens: int | None = Field(default=None, ge=1)
    source: str
    values: dict[str, Number | float] = Field(default_factory=dict)
    average: float | None = None

    @field_validator("values", mode="before")
    @classmethod
    def _no_text(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and (bad := [k for k, v in value.items() if isinstance(v, (str, bool))]):
            raise ValueError(f"the value of '{bad[0]}' is not a number")
        return value

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.label or self.method


class Paper(_Strict):
    """A file of published numbers: one model, some sources, rows in table order."""

    title: str
    model: str
    sources: dict[str, Source] = Field(min_length=1)
    columns: dict[str, PaperColumn]
    rows: list[PaperRow] = Field(min_length=1)

    @model_validator(mode="after")
    def _known(self) -> Paper:
        for i, row in enumerate(self.rows):
            for column, value in row.values.items():
                if column not in self.columns:
                    raise ValueError(f"rows[{i}]: there is no column '{column}'{did_you_mean(column, self.columns)}")
                if isinstance(value, Number) and value.source not in self.sources:
                    raise ValueError(f"rows[{i}]: '{column}' names the unknown source '{value.source}'")
            if row.source not in self.sources:
                raise ValueError(f"rows[{i}]: unknown source '{row.source}'{did_you_mean(row.source, self.sources)}")
        return self


def load_paper(name: str) -> Paper:
    """Read a file of published numbers.

    Parameters
    ----------
    name : str
        Path of a YAML file, or the name of one in ``configs/paper/``.

    Raises
    ------
    ConfigError
        If there is none, or it is not valid; a number without a known source is not.
    """
    path, shown = doors.place(name), doors.short(name)
    if not path.exists():
        named = FOLDER / f"{name}.yaml"
        if not doors.place(named).is_file():
            known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
            listed = f" (in {FOLDER}/: {', '.join(known)})" if known else ""
            raise ConfigError(f"there is no file of published numbers '{shown}'{did_you_mean(name, known)}{listed}")
        path = named
    _, data = parse_yaml(read_yaml(path, "file of published numbers"), doors.short(path))
    try:
        return Paper.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(step) for step in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{doors.short(path)}: {at + ': ' if at else ''}{message[0].lower()}{message[1:]}") from None


@dataclass(frozen=True)
class Match:
    """A published row and ours beside it, one per model that has one."""

    published: PaperRow
    ours: Row | None


def match(paper: Paper, results: Results) -> list[Match]:
    """Find our row for every published one: the same method, and the nearest token count (last layer or layer average)."""
    out = []
    for published in paper.rows:
        mine = [r for r in results.rows if r.reducer == published.method and r.accuracy is not None]
        if published.method != UNREDUCED:
            near = [(_distance(r, published.tokens), i) for i, r in enumerate(mine)]
            near = [(d, i) for d, i in near if d <= TOLERANCE]
            mine = [mine[min(near)[1]]] if near else []
        out.append(Match(published, mine[0] if mine else None))
    return out


def _distance(row: Row, tokens: int | None) -> float:
    if tokens is None:
        return float("inf")
    return min(abs(n - tokens) / tokens for n in (row.kept or 0.0, row.avg or 0.0))


def render_paper(
    paper: Paper, results: Results, fmt: str, *, width: int | None = None, color: bool = False, name: str = ""
) -> str:
    """Render published numbers beside ours; one table per model of ours."""
    models = results.models
    matched = {model: match(paper, results.of(model)) for model in models}
    numbers = {key: i for i, key in enumerate(paper.sources, 1)}
    if fmt == "csv":
        return _csv(paper, matched)
    shared = [c for c, about in paper.columns.items() if about.task in results.tasks]
    titles = ["method", "tokens"]
    for column in paper.columns:
        titles += [column, f"{column} ours"] if column in shared else [column]
    titles += ["average %", "of full % ours", "source"]
    grids = []
    for model in models:
        groups: list[list[Line]] = []
        last: Any = object()
        for m in matched[model]:
            if (key := m.published.source) != last or m.published.method == UNREDUCED:
                groups.append([])
                last = key
            groups[-1].append(_line(paper, m, shared, numbers))
        heading = f"Published: {paper.model}. Ours: {model}."
        grids.append(Grid(tuple(titles), (True,) + (False,) * (len(titles) - 1), groups, heading))
    return format_grids(grids, _notes(paper, results, numbers, name), fmt, warnings=results.warnings, width=width, color=color)


def _line(paper: Paper, m: Match, shared: list[str], numbers: Mapping[str, int]) -> Line:
    row = m.published
    entries = [row.title, MISSING if row.tokens is None else str(row.tokens)]
    used = [row.source]
    for column, about in paper.columns.items():
        value = row.values.get(column)
        if isinstance(value, Number):
            used.append(value.source)
            value = value.value
        entries.append(MISSING if value is None else f"{value:.1f}" if value < 1000 else f"{value:g}")
        if column in shared:
            ours = m.ours.tasks.get(about.task) if m.ours is not None else None
            if ours is None:
                entries.append(MISSING)
            elif about.scale is None:
                entries.append(MISSING if ours.reported is None else f"{ours.reported:.1f}")
            else:
                low, high = about.scale * ours.accuracy.low, about.scale * ours.accuracy.high
                entries.append(f"{about.scale * ours.accuracy.value:.1f} [{low:.0f}–{high:.0f}]")
    ratio = m.ours.paired.ratio if m.ours is not None and m.ours.paired is not None else None
    entries += [
        MISSING if row.average is None else f"{row.average:.1f}",
        MISSING if ratio is None else f"{100 * ratio.value:.1f} [{100 * ratio.low:.0f}–{100 * ratio.high:.0f}]",
        " ".join(f"({numbers[s]})" for s in dict.fromkeys(used)),
    ]
    return Line(tuple(entries), (0,) * len(entries), "full" if row.method == UNREDUCED else "method")


def _notes(paper: Paper, results: Results, numbers: Mapping[str, int], name: str) -> list[str]:
    notes = [
        f"{paper.title}{f' ({name})' if name else ''}. Published numbers are quoted, not reproduced; ours are this store's, with "
        "bootstrap intervals. They come from different harnesses and question sets: compare each with its own unreduced row.",
        "ours: the same method with the nearest token count (last layer or layer average), at most "
        f"{100 * TOLERANCE:.0f} % away; {MISSING} where the store has none.",
    ]
    absent = [c for c, about in paper.columns.items() if about.task is not None and about.task not in results.tasks]
    if absent:
        notes.append(f"This store has no results on {', '.join(f'{c} (task {paper.columns[c].task})' for c in absent)}.")
    for key, source in paper.sources.items():
        notes.append(f"({numbers[key]}) {source.cite}, {source.where} [{source.kind}].")
    return notes


def _csv(paper: Paper, matched: Mapping[str, list[Match]]) -> str:
    names = ["model", "published_model", "method", "tokens", "column", "published", "source", "ours", "ours_low", "ours_high"]
    rows: list[list[Any]] = []
    for model, found in matched.items():
        for m in found:
            head = [model, paper.model, m.published.title, m.published.tokens]
            for column, value in m.published.values.items():
                about = paper.columns[column]
                number, source = (value.value, value.source) if isinstance(value, Number) else (value, m.published.source)
                ours = m.ours.tasks.get(about.task) if m.ours is not None and about.task is not None else None
                mine: list[float | None] = [None] * 3
                if ours is not None and about.scale is None:
                    mine[0] = ours.reported
                elif ours is not None:
                    mine = [about.scale * v for v in ours.accuracy.to_dict().values()]
                rows.append([*head, column, number, paper.sources[source].cite, *mine])
            if m.published.average is not None:
                ratio = m.ours.paired.ratio if m.ours is not None and m.ours.paired is not None else None
                mine = [None] * 3 if ratio is None else [100 * v for v in ratio.to_dict().values()]
                cite = paper.sources[m.published.source].cite
                rows.append([*head, "average of full", m.published.average, cite, *mine])
    return csv_text(names, rows)
