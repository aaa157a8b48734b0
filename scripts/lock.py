"""``make lock``: write requirements/test.txt and requirements/demo.txt, what ``make test`` and ``make demo`` install.

One file serves Python 3.10 to 3.13 on every platform: ``uv pip compile --universal``. It holds versions and markers and nothing of
the machine it was made on: where packages come from is asked of pip's configuration there and left out of the result.

Needs uv (``python -m pip install uv``) and nothing else outside the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
OLDEST_PYTHON = "3.10"
EXTRAS = {"test": ("dev",), "demo": ("pocket", "plot")}
"""Lock to the extras it covers. The second is made of versions of the first, so that one environment can hold both."""

HEADER = "# What `make {name}` installs, for Python 3.10 to 3.13. Made by `make lock`; do not edit.\n"
_PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]*)(\[[a-z0-9,_-]+\])?==(?P<version>[\w.!]+)(\+[\w.]+)?(?P<marker> ; [^#]+)?")


def pip_settings(listed: str) -> dict[str, str]:
    """Translate what ``pip config list`` prints into the environment variables uv reads.

    Parameters
    ----------
    listed : str
        Lines like ``global.index-url='...'``; the process's own variables come as ``:env:.index-url``.
    """
    found: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        found[key.rpartition(".")[2]] = value.strip().strip("'\"")
    said = {
        "UV_DEFAULT_INDEX": found.get("index-url"),
        "UV_INDEX": found.get("extra-index-url"),
        "UV_FIND_LINKS": ",".join(found.get("find-links", "").split()),
        "UV_CONSTRAINT": found.get("constraint"),
        "SSL_CERT_FILE": found.get("cert"),
        "UV_HTTP_TIMEOUT": found.get("default-timeout") or found.get("timeout"),
    }
    # pip takes the best version of all indexes, uv by default that of the first index that knows the name
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **{name: value for name, value in said.items() if value}}


def cleaned(text: str) -> str:
    """Reduce what uv wrote to ``name==version ; marker`` lines.

    Raises
    ------
    ValueError
        A line that is no pinned version: a URL, a path, an option.
    """
    lines = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _PIN.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"not a pinned version: {line!r}")
        lines.append(f"{match['name']}=={match['version']}{match['marker'] or ''}\n")
    return "".join(lines)


def pins(text: str) -> dict[str, set[str]]:
    """Versions by package of a lock; several where they depend on Python or platform."""
    found: dict[str, set[str]] = {}
    for line in cleaned(text).splitlines():
        name, _, version = line.partition(" ;")[0].partition("==")
        found.setdefault(name, set()).add(version)
    return found


def compile_lock(project: Path, extras: Iterable[str], *, prefer: Path | None = None, within: Path | None = None) -> str:
    """Resolve a project for all Pythons and platforms.

    Parameters
    ----------
    project : Path
        Its pyproject.toml.
    extras : iterable of str
        Extras to include.
    prefer : Path, optional
        A lock whose versions are kept where they fit; the newest of everything without.
    within : Path, optional
        A lock whose versions are the only ones allowed.

    Returns
    -------
    str
        Pinned versions, one a line.

    Raises
    ------
    RuntimeError
        No set of versions fits, or uv is missing; says what uv said.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    build = re.search(r"^requires = \[(.*?)\]", project.read_text(), re.MULTILINE | re.DOTALL)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out.txt")
        if prefer is not None and prefer.exists():
            shutil.copy(prefer, out)
        command = [sys.executable, "-m", "uv", "pip", "compile", str(project), "-", "--universal", "--quiet"]
        command += ["--python-version", OLDEST_PYTHON, "--prerelease", "disallow", "--no-header", "--no-annotate"]
        command += [f"--extra={extra}" for extra in extras] + ([f"--constraint={within}"] if within else [])
        # what builds the package is locked, too: nothing is fetched at build time
        done = subprocess.run(
            [*command, f"--output-file={out}"],
            input="\n".join(re.findall(r'"([^"]+)"', build[1])) if build else "",
            env=environment(os.environ, pip_settings(listed)),
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the lock cannot be made:\n{done.stderr.strip()}")
        return cleaned(out.read_text())


def environment(own: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for uv: settings of the user's go before those found in pip's configuration."""
    return {**found, **own}


def write(text: str, project: Path = ROOT / "pyproject.toml", folder: Path = FOLDER) -> None:
    """Write both locks, the larger one as given."""
    folder.mkdir(exist_ok=True)
    test = folder / "test.txt"
    test.write_text(HEADER.format(name="test") + text)
    demo = compile_lock(project, EXTRAS["demo"], within=test)
    (folder / "demo.txt").write_text(HEADER.format(name="demo") + demo)


def main() -> None:
    """Compile the locks again, by default with as few changes as the ranges of pyproject.toml ask for."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest of everything inside the ranges")
    upgrade = parser.parse_args().upgrade
    before = {p.name: p.read_text() for p in FOLDER.glob("*.txt")}
    write(compile_lock(ROOT / "pyproject.toml", EXTRAS["test"], prefer=None if upgrade else FOLDER / "test.txt"))
    for name in ("test.txt", "demo.txt"):
        print(f"requirements/{name}: {'as before' if before.get(name) == (FOLDER / name).read_text() else 'written'}")


if __name__ == "__main__":
    main()
