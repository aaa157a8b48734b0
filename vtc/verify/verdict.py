"""What came out of a check: one item per question, and all of them as text, table or JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["ok", "failed", "not checked"]
STYLES = {"ok": "green", "failed": "bold red", "not checked": "yellow"}


@dataclass(frozen=True)
class Item:
    """One question and its answer.

    Attributes
    ----------
    name : str
        The question.
    state : {"ok", "failed", "not checked"}
        The answer.
    text : str
        What was measured, what went wrong, or why it was not checked.
    stage : str
        Stage of the reducer it was asked with; empty where it does not matter.
    positions : str
        Its position policy; empty where it does not matter.
    error, limit : float or None
        Largest difference from the reference, and what is allowed.
    optional : bool
        Whether the verdict is one also without this answer: about clips, or something that does not exist for this model.
    """

    name: str
    state: State
    text: str = ""
    stage: str = ""
    positions: str = ""
    error: float | None = None
    limit: float | None = None
    optional: bool = False

    @property
    def line(self) -> str:
        """Text with the numbers."""
        numbers = "" if self.error is None else f"error {self.error:.1e}"
        numbers += "" if self.error is None or self.limit is None else f" (limit {self.limit:.1e})"
        return "; ".join(part for part in (self.text, numbers) if part)


@dataclass(frozen=True)
class Verdict:
    """All answers about one model.

    Attributes
    ----------
    model, model_type, text_type : str
        Class of the model, ``config.model_type``, and that of its language model.
    items : tuple of Item
        The answers.
    versions : dict
        Of vtc, transformers, torch and Python.
    seconds : float
        How long it took.
    """

    model: str
    model_type: str
    text_type: str
    items: tuple[Item, ...]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> tuple[Item, ...]:
        """Answers that are wrong."""
        return tuple(i for i in self.items if i.state == "failed")

    @property
    def missing(self) -> tuple[Item, ...]:
        """Questions without an answer that a verdict needs."""
        return tuple(i for i in self.items if i.state == "not checked" and not i.optional)

    @property
    def ok(self) -> bool:
        """Whether everything was checked that can be, and nothing is wrong. Without any answer: no."""
        return not self.failed and not self.missing and any(i.state == "ok" for i in self.items)

    @property
    def state(self) -> State:
        """The verdict in a word."""
        return "failed" if self.failed else "ok" if self.ok else "not checked"

    def about(self, stages: set[str], policies: set[str]) -> Verdict:
        """Return the part that concerns reducers of these stages with these position policies."""
        mine = [i for i in self.items if (not i.stage or i.stage in stages) and (not i.positions or i.positions in policies)]
        return dataclasses.replace(self, items=tuple(mine))

    @property
    def reason(self) -> str:
        """What is wrong, or why there is no answer; empty where all is well."""
        first = next(iter((*self.failed, *self.missing)), None)
        if first is None:
            return "" if self.ok else "nothing was checked"
        return f"{first.name}: {first.line}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"ok": self.ok, "state": self.state, "reason": self.reason, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        """Read what :meth:`to_dict` gave; raise ``KeyError`` or ``TypeError`` where it is something else."""
        names = [f.name for f in dataclasses.fields(cls)]
        kept = {name: data[name] for name in names}
        return cls(**kept | {"items": tuple(Item(**item) for item in data["items"])})

    def table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for item in self.items:
            table.add_row(Text(item.state, STYLES[item.state]), item.name, Text(item.line))
        return table

    @property
    def headline(self) -> str:
        """The verdict in a sentence."""
        with_ = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        said = {
            "ok": "verified on this machine",
            "failed": f"FAILED ({len(self.failed)} of {len(self.items)})",
            "not checked": "not verified",
        }
        return f"{self.model} ({self.model_type}, {self.text_type}): {said[self.state]}, {with_}, {self.seconds:.1f} s"

    def __str__(self) -> str:
        """Show everything as plain text."""
        wide = max((len(i.name) for i in self.items), default=0)
        return "\n".join([self.headline, *(f"  {i.state:<11}  {i.name:<{wide}}  {i.line}".rstrip() for i in self.items)])
