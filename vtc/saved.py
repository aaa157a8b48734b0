"""A reducer's setting as a file beside a model: written by ``handle.save_pretrained``, put on again by :func:`vtc.patch_from`.

``vtc_config.json`` names reducers and options, never code: what it holds goes through the same checks as options in a call.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc import _window, doors
from vtc._version import __version__
from vtc.core import Compose, Reducer
from vtc.errors import ConfigError, InputFileError, UnknownArgumentError, short, shown
from vtc.registry import create, entries

if TYPE_CHECKING:
    from torch import nn

FILE = "vtc_config.json"
"""Name of the file."""
FORMAT = 1
"""What :func:`save` writes and :func:`load` reads; another number is a file of another vtc."""
BYTES = doors.MIB
"""Largest file that is read."""


def kind_of(model: nn.Module) -> str:
    """Return what a setting is for: ``config.model_type``, or the name of the class where there is none (timm)."""
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def save(reducer: Reducer, strict: bool, model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the setting into a folder, which is made; a file that was there is replaced in one step.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UnknownArgumentError
        The reducer is of no registered method, so that its name would mean nothing to the reader.
    InputFileError
        The folder cannot be written to.
    """
    members = reducer.members if isinstance(reducer, Compose) else (reducer,)
    reducers = [{"name": member.name, "options": _options(member)} for member in members]
    written = {
        "format": FORMAT,
        "vtc_version": __version__,
        "transformers_version": _window.installed("transformers"),
        "model_type": kind_of(model),
        "strict": strict,
        "reducers": reducers,
    }
    file = doors.place(folder) / FILE
    aside = file.with_name(f"{FILE}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise InputFileError(
            f"'{short(file)}' cannot be written ({error.strerror}): check the permissions and the space there"
        ) from None
    return file


def _options(reducer: Reducer) -> dict[str, Any]:
    known = entries().get(reducer.name)
    if known is None or type(reducer) is not known.cls:
        raise UnknownArgumentError(
            f"'{reducer.name}' is not a registered reducer, so a file cannot name it: register it (vtc.register) or keep it in code"
        )
    fields = [f for f in dataclasses.fields(reducer) if f.init and not f.name.startswith("_")]
    values = {f.name: getattr(reducer, f.name) for f in fields}
    return {name: value for name, value in values.items() if value is not None}


def is_saved(folder: object) -> bool:
    """Whether a name given for a reducer is that of a folder with a setting in it."""
    return (
        isinstance(folder, (str, os.PathLike)) and os.fspath(folder) not in entries() and (doors.place(folder) / FILE).is_file()
    )


def load(folder: str | os.PathLike[str], kind: str) -> tuple[Reducer, bool]:
    """Return the reducer a folder's file describes, and whether it is strict.

    Parameters
    ----------
    folder : path
        Of the file, or the file itself.
    kind : str
        :func:`kind_of` the model it is to be put on.

    Raises
    ------
    InputFileError
        There is no such file, or it is not one of :func:`save`'s.
    ConfigError
        It was written by another version of vtc, or for another kind of model.
    UnknownReducerError, UnknownArgumentError, BudgetError
        What it names does not exist here.
    """
    path = doors.place(folder)
    path = path if path.name == FILE else path / FILE
    try:
        data = json.loads(doors.read_text(path, BYTES, FILE))
    except FileNotFoundError:
        raise InputFileError(
            f"there is no {FILE} in '{short(folder)}': write one with handle.save_pretrained(folder)"
        ) from None
    except InputFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputFileError(f"'{short(path)}' cannot be read ({short(error)}): write it anew") from None
    if not isinstance(data, dict) or "format" not in data:
        raise InputFileError(f"'{short(path)}' is not a setting of vtc: write one with handle.save_pretrained(folder)")
    if data["format"] != FORMAT or isinstance(data["format"], bool):
        raise ConfigError(
            f"'{short(path)}' has format {shown(data['format'])} (written by vtc {shown(data.get('vtc_version'))}) and this is vtc "
            f"{__version__}, which reads format {FORMAT}: install that version or save the setting again"
        )
    if data.get("model_type") != kind:
        raise ConfigError(
            f"'{short(path)}' is a setting for models of type {shown(data.get('model_type'))} and this is one of '{kind}': make "
            "one for it with vtc.patch(...).save_pretrained(folder)"
        )
    listed, strict = data.get("reducers"), data.get("strict", True)
    fine = isinstance(listed, list) and listed and isinstance(strict, bool)
    if not fine or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("options"), dict) for one in listed
    ):
        raise InputFileError(f"'{short(path)}' does not name reducers and their options: write it anew")
    members = tuple(create(one["name"], **one["options"]) for one in listed)
    return members[0] if len(members) == 1 else Compose(keep=1.0, members=members), strict
