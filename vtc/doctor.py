"""``vtc doctor``: is this installation complete, does it fit together, and what can it do. What it calls ok, it has run."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vtc import _window
from vtc.errors import VtcError

DISTRIBUTION = "vtc-reducers"
_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+).*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"]")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes
    ----------
    state : {"ok", "note", "problem"}
        ``"note"``: something optional is missing; ``"problem"``: something vtc needs does not work.
    what : str
        What was looked at.
    text : str
        What was found, and what to do about it.
    """

    state: Literal["ok", "note", "problem"]
    what: str
    text: str


def diagnose() -> list[Finding]:
    """Run every check; one that crashes becomes a problem of its own instead of ending the diagnosis."""
    findings: list[Finding] = []
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _optional,
        _devices,
        _kernels,
        _kernels_package,
        _registries,
        _commands,
        _pocket,
        _verified,
        _lmms,
        _extras,
    )
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding("problem", check.__name__.strip("_"), f"{type(error).__name__}: {error}"))
    return findings


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    return _window.installed(distribution)


def _found(distribution: str, module: str) -> Finding:
    """Import an installed package, and say whether its version is one vtc was tested with."""
    version = version_of(distribution)
    try:
        importlib.import_module(module)
    except Exception as error:
        return Finding(
            "problem",
            distribution,
            f"{version} cannot be imported ({type(error).__name__}: {error}): pip install --force-reinstall {distribution}",
        )
    if distribution not in _window.TESTED:
        return Finding("ok", distribution, f"{version}")
    if said := _window.outside(distribution):
        return Finding("note" if "newer" in said else "problem", distribution, said)
    return Finding("ok", distribution, f"{version} (tested: {' to '.join(_window.TESTED[distribution])})")


def _versions() -> Iterator[Finding]:
    """Everything vtc cannot do without."""
    from vtc._version import __version__

    yield Finding("ok", "vtc", __version__)
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("torch", "torchvision", "transformers", "filelock"):
        yield _found(name, name)


def _optional() -> Iterator[Finding]:
    """Packages that make more possible."""
    uses = {
        "triton": "fast GPU kernels",
        "accelerate": "device_map, big checkpoints",
        "timm": "its vision transformers",
        "lmms-eval": "public benchmarks",
        "matplotlib": "plots",
    }
    for name, use in uses.items():
        if version_of(name):
            yield _found(name, name.replace("-", "_"))
        else:
            yield Finding("note", name, f"not installed ({use})")


def _devices() -> Iterator[Finding]:
    """Where models can run, and what serves attention there."""
    import torch

    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        yield Finding("note", "devices", f"CPU only, {threads} threads")
    else:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "devices", f"CPU, {threads} threads; {', '.join(names)} (CUDA {torch.version.cuda})")
    from vtc.engine import upstream

    yield Finding("ok", "attention", ", ".join(upstream.implementations()))


def _kernels() -> Iterator[Finding]:
    """Which implementation of vtc's own arithmetic serves here, and what a GPU did not get from Triton so far in this process."""
    import torch

    from vtc import kernels

    chosen = kernels.backend()
    if not torch.cuda.is_available():
        state, text = "ok", f"torch (no GPU; {len(kernels.ACCELERATED)} ops have a Triton version)"
        if chosen == "triton":
            state, text = "problem", "VTC_KERNELS=triton, and there is no GPU: unset it"
    elif chosen == "torch":
        state, text = "note", "torch, since VTC_KERNELS=torch: unset it for Triton on the GPU"
    elif kernels.unavailable():
        state, text = "problem" if chosen == "triton" else "note", f"torch on the GPU, too: {kernels.unavailable()}"
    else:
        state, text = "ok", f"Triton for {len(kernels.ACCELERATED)} ops on the GPU, torch for the others (VTC_KERNELS={chosen})"
    yield Finding(state, "kernels in use", text)  # type: ignore[arg-type]
    for (op, why), times in kernels.fallbacks().items():
        yield Finding("note", "kernels in use", f"'{op}' ran in torch on the GPU {times} times: {why}")


def _kernels_package() -> Iterator[Finding]:
    """Our folder ``kernels/`` must not pass for Hugging Face's package of that name (it would, from the root of a checkout)."""
    import vtc.kernels

    spec = importlib.util.find_spec("kernels")
    if spec is None:
        yield Finding("ok", "kernels", "the Hugging Face package 'kernels' is not installed; nothing shadows it")
        return
    places = [Path(p).resolve() for p in spec.submodule_search_locations or [Path(spec.origin or ".").parent]]
    ours = Path(vtc.kernels.__file__).resolve().parent
    owner = version_of("kernels")
    if ours in places:  # harmless only as long as transformers does not find the other package's metadata
        yield Finding(
            "note" if owner is None else "problem",
            "kernels",
            "the checkout's folder kernels/ is importable as 'kernels' and would hide the Hugging Face package: run `vtc` instead "
            "of `python -m vtc`, use `python -P`, or change to another folder",
        )
    elif owner is None:
        yield Finding(
            "note", "kernels", f"a package 'kernels' that is not Hugging Face's lies in {places[0]}: transformers may import it"
        )
    else:
        yield Finding("ok", "kernels", f"Hugging Face kernels {owner}; ours is vtc.kernels")


def _registries() -> Iterator[Finding]:
    """Reducers and families."""
    from vtc.families import list_families
    from vtc.registry import entries

    names, families = list(entries()), list_families()
    for what, found in (("reducers", names), ("families", families)):
        if found:
            yield Finding("ok", what, f"{len(found)}: {', '.join(found)}")
        else:
            yield Finding("problem", what, f"none found: reinstall, pip install --force-reinstall {DISTRIBUTION}")


def _commands() -> Iterator[Finding]:
    """Commands that other packages add."""
    from vtc.cli import COMMANDS

    points = list(importlib.metadata.entry_points(group=COMMANDS))
    if not points:
        place = importlib.metadata.distribution(DISTRIBUTION).locate_file("")
        yield Finding(
            "problem",
            "commands",
            f"sweep, table and report are not registered in the metadata found in {place}: reinstall {DISTRIBUTION}, and delete a "
            "left-over *.egg-info there",
        )
    for point in points:
        try:
            point.load()
        except Exception as error:
            yield Finding(
                "problem", "commands", f"'{point.value}' cannot be loaded ({type(error).__name__}: {error}): reinstall it"
            )
        else:
            yield Finding("ok", "commands", point.value)


def _pocket() -> Iterator[Finding]:
    """The embedded model loads and can be patched."""
    import vtc

    model, _ = vtc.load_pocket()
    with vtc.patch(model, vtc.list_reducers()[0], keep=0.5):
        pass
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    yield Finding("ok", "pocket model", f"loads and can be patched ({parameters:.1f} M parameters)")


def _verified() -> Iterator[Finding]:
    """The embedded model's reductions equal the slow reference, with the versions installed here."""
    import vtc

    verdict = vtc.verify(vtc.load_pocket()[0])
    state, text = ("ok", verdict.headline) if verdict.ok else ("problem", str(verdict))
    yield Finding(state, "verified", text)  # type: ignore[arg-type]


def _lmms() -> Iterator[Finding]:
    """Our plugin answers a question inside lmms-eval's own evaluator: that all of it can be imported is not enough."""
    if version_of("lmms-eval") is None:
        return
    points = [p for p in importlib.metadata.entry_points(group="lmms_eval.models") if p.name == "vtc"]
    if not points:
        yield Finding("problem", "lmms-eval plugin", f"not registered in the installed metadata: reinstall {DISTRIBUTION}")
        return
    check = importlib.import_module(points[0].module).check  # by entry point: vtc never imports its harness
    try:
        yield Finding("ok", "lmms-eval plugin", check())
    except Exception as error:
        said = str(error) if isinstance(error, VtcError) else f"{type(error).__name__}: {error}"
        yield Finding("problem", "lmms-eval plugin", said)


def _extras() -> Iterator[Finding]:
    """Optional dependencies by extra, as the installed metadata declare them."""
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        match = _REQUIREMENT.match(line)
        if match and match["name"] != DISTRIBUTION:
            extras.setdefault(match["extra"], []).append(match["name"])
    for extra, packages in extras.items():
        missing = [p for p in packages if version_of(p) is None]
        if missing:
            yield Finding("note", f"extra {extra}", f"missing {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'")
        else:
            yield Finding("ok", f"extra {extra}", f"installed: {', '.join(dict.fromkeys(packages))}")
