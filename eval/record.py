"""What a sweep's record must look like before anything is made of it: it may come from somebody else, or from a damaged disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtc.eval.cells import CELLS
from vtc.eval.config import BootstrapConfig

Text = Annotated[str, Field(max_length=1000)]


class _Open(BaseModel):
    """Keys that are read, with their types; a later vtc may write more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Commit(_Open):
    id: Text | None
    dirty: bool | None


class _Machine(_Open):
    cpu: Text
    gpu: Text | None
    torch_threads: int


class Environment(_Open):
    """Where something ran."""

    commit: _Commit
    machine: _Machine
    versions: dict[Text, Text]


class _Model(_Open):
    name: Text
    parameters: int | None = None
    decoder_layers: int | None = None
    visual_tokens: int | None = None


class _Settings(_Open):
    seed: int = 0
    bootstrap: BootstrapConfig


class _Cell(_Open):
    id: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,80}$")]  # the name of a folder: nothing that leads out of the store
    label: Text
    reducer: Text
    budget: Text
    model: Text | None = None
    task: Text | None = None
    seed: int = 0


class _Record(_Open):
    config: _Settings
    env: Environment
    model: _Model
    models: list[_Model] | None = None
    cells: Annotated[list[_Cell], Field(max_length=CELLS)]
    constant_guess: dict[str, float] | None = None
    source: Text | None = None
    written: Text | None = None


def problem_of(record: Any) -> str:
    """Return what is wrong with a record (contents of ``sweep.json``), as ``"cells[3].label: ..."``; ``""`` where nothing is."""
    if not isinstance(record, Mapping):
        return f"it holds a {type(record).__name__}"
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        at = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
        return f"{at}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ""
