"""Verdicts that are remembered, and the check that :func:`vtc.patch` makes once where nobody made it before."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vtc._window import TESTED, outside
from vtc.core import Reducer, Stage
from vtc.errors import UnknownArgumentError, UnsupportedModelError, UnverifiableError
from vtc.families import adapters

if TYPE_CHECKING:
    from vtc.families.base import Family
    from vtc.verify.verdict import Verdict

BUSY: ContextVar[bool] = ContextVar("vtc_verify_busy", default=False)
"""Whether a check runs: what it patches is not checked again."""
VARIABLE = "VTC_VERIFY"
MODES = ("off", "once", "always")
_LARGEST = 1 << 20  # bytes of a remembered verdict: anything longer is none
_told: set[str] = set()


def ensure(model: nn.Module, family: Family, reducer: Reducer) -> None:
    """Check a model before it is patched, where neither its family nor the installed version vouches for it.

    With ``VTC_VERIFY=once`` (the default) that is so for a model without an adapter and for a version of transformers outside the
    tested window; the verdict is kept in the user's cache folder for this class and structure of model, stage of the reducer, and
    versions. ``always`` checks every time, whatever the model and the versions; ``off`` never does.

    Parameters
    ----------
    model, family, reducer : Module, Family, Reducer
        What is about to be patched, and with what (bound to the model).

    Raises
    ------
    UnsupportedModelError
        The check failed: the message says what was wrong.
    UnknownArgumentError
        The variable has another value.

    Warns
    -----
    UserWarning
        Once, if it could not be checked, or if only what it does with clips is wrong.
    """
    mode, doubts = _mode(), _doubts(model)
    if mode == "off" or BUSY.get() or (mode == "once" and not doubts):
        return
    for stage, policies in _asked(reducer).items():
        _judge(_verdict(model, stage, trust=mode == "once").about({stage}, policies), stage, doubts)


def refusals(model: nn.Module, reducers: Mapping[str, Reducer]) -> dict[str, str]:
    """Return why :func:`vtc.patch` would refuse reducers (bound to the model) after the check that it makes, by name.

    Only a model without an adapter is looked at here: whoever describes it has not run it. Empty where all is well, or where the
    check is switched off.
    """
    from vtc.verify.check import STAGES

    mode, doubts, out = _mode(), _doubts(model), {}
    if mode == "off" or BUSY.get() or not doubts:
        return out
    verdicts = {stage: _verdict(model, stage, trust=mode == "once") for stage in STAGES}
    for name, reducer in reducers.items():
        for stage, policies in _asked(reducer).items():
            try:
                _judge(verdicts[stage].about({stage}, policies), stage, doubts)
            except UnsupportedModelError as error:
                out[name] = str(error)
    return out


def _mode() -> str:
    mode = os.environ.get(VARIABLE) or "once"
    if mode not in MODES:
        raise UnknownArgumentError(f"{VARIABLE}={mode!r} is not known: use one of {', '.join(MODES)}")
    return mode


def _doubts(model: nn.Module) -> list[str]:
    """Why a model is to be checked before it is patched."""
    kind = getattr(getattr(model, "config", None), "model_type", "?")
    return [w for w in (outside("transformers"), "" if kind in adapters() else f"models of type '{kind}' have no adapter") if w]


def _asked(reducer: Reducer) -> dict[str, set[str]]:
    """Stages of a reducer and the position policies it has there."""
    found: dict[str, set[str]] = {}
    for part in reducer.parts():
        found.setdefault("decoder" if part.stage is Stage.DECODER else "boundary", set()).add(part.position_policy)
    return dict(sorted(found.items()))


def _judge(verdict: Verdict, stage: str, doubts: list[str]) -> None:
    """Refuse, warn, or say nothing."""
    why = f", which was checked since {' and '.join(doubts)}" if doubts else ""
    wrong = [i for i in verdict.failed if not i.optional]
    if wrong:
        oldest, newest = TESTED["transformers"]
        raise UnsupportedModelError(
            f"a small copy of {verdict.model}{why}, gives wrong results with reducers at the stage '{stage}' on this machine "
            f"({wrong[0].name}: {wrong[0].line}): use transformers {oldest} to {newest} with a model that vtc has an adapter for, "
            f"report this, or set {VARIABLE}=off to patch it all the same"
        )
    if verdict.failed:
        clips = verdict.failed[0]
        _tell(
            f"a small copy of {verdict.model} gives wrong results with clips ({clips.name}: {clips.line}): use this patch with "
            "images only, and report this"
        )
    elif not verdict.ok:
        _tell(
            f"vtc could not check whether reducers at the stage '{stage}' work with {verdict.model}{why} ({verdict.reason}): "
            "compare answers with and without the patch before relying on them"
        )


def _tell(message: str) -> None:
    """Warn once in a process."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=5)


# --------------------------------------------------------------------------------------------------------------- memory
def _verdict(model: nn.Module, stage: str, trust: bool) -> Verdict:
    """Return the remembered verdict about a model, or make one and remember it."""
    key = _key(model, stage)
    known = _recall(key) if trust else None
    if known is None:
        from vtc.verify.check import verify

        known = verify(model, stages=(stage,))
        _remember(key, known)
    return known


def folder() -> Path:
    """Where verdicts are kept: ``vtc/verify`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vtc" / "verify"


def _key(model: nn.Module, stage: str) -> dict[str, Any]:
    """What a verdict is about."""
    from vtc.verify.check import versions
    from vtc.verify.twin import shrink

    config: Any = model.config
    try:
        structure = json.dumps(shrink(config).to_dict(), sort_keys=True, default=str)
    except UnverifiableError as error:
        structure = str(error)
    wanted = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    kind = type(model)
    return {
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "model_type": str(config.model_type),
        "text_type": str(config.get_text_config().model_type),
        "structure": hashlib.sha256(f"{structure} {wanted}".encode()).hexdigest(),
        "stage": stage,
        "versions": versions(),
        "sources": _sources(),
    }


@cache
def _sources() -> str:
    """Digest of the code that decides: a version says what it is only once it is released."""
    import vtc

    digest = hashlib.sha256()
    root = Path(vtc.__file__).parent
    for path in sorted(p for part in ("engine", "families", "verify") for p in (root / part).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _file(key: dict[str, Any]) -> Path:
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _recall(key: dict[str, Any]) -> Verdict | None:
    """Return a remembered verdict; None where there is none that can be read."""
    from vtc.verify.verdict import Verdict

    try:
        path = _file(key)
        if path.stat().st_size > _LARGEST:
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        return Verdict.from_dict(data["verdict"]) if data["key"] == key else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _remember(key: dict[str, Any], verdict: Verdict) -> None:
    """Keep a verdict: written aside and renamed; where that cannot be done, it is made again next time."""
    temporary = None
    try:
        path = _file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            json.dump({"key": key, "verdict": verdict.to_dict()}, file, indent=1)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        _tell(f"the verdict of vtc.verify could not be kept ({error}): it is made again for every process")
