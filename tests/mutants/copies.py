"""A copy of the tree to put bugs into, and tests run on it in children of one process."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def alone() -> None:
    """Let neither this process nor its children find anything but the copy, and import once what all of them need."""
    sys.path[:] = [p for p in sys.path if Path(p).resolve() not in (ROOT, HERE)]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pandas  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)


def copy(target: Path) -> None:
    """Lay the tree out as installed, so that the copy's ``vtc`` is found before an editable install of the original."""
    skip = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
    shutil.copytree(ROOT / "vtc", target / "vtc", ignore=skip)
    for name in ("eval", "kernels"):
        shutil.copytree(ROOT / name, target / "vtc" / name, ignore=skip)
    for name in ("tests", "configs"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", target)


def place(root: Path, file: str) -> Path:
    """Where a file of the repository lies in the copy."""
    return root / "vtc" / file if file.startswith(("eval/", "kernels/")) else root / file


def run(root: Path, tests: Sequence[str], *options: str, plugins: Sequence[object] = (), seconds: int = 0) -> tuple[int, str]:
    """Run tests in a child of this process.

    Parameters
    ----------
    root : Path
        The copy.
    tests : sequence of str
        Node ids below ``tests/``.
    *options : str
        More of pytest's options.
    plugins : sequence of object
        Plugins of pytest.
    seconds : int
        CPU time after which the child is killed; 0: none.

    Returns
    -------
    int, str
        pytest's exit status (below zero: the signal that ended the child), and what it printed.
    """
    said = root / "said.txt"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(root)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
            sys.path.insert(0, str(root))
            if seconds:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            import pytest

            given = ["-p", "no:cacheprovider", "--rootdir", str(root), "-W", "ignore", "--tb=line", *options]
            status = int(pytest.main([*given, *[f"tests/{t}" for t in tests]], plugins=list(plugins)))
            import vtc

            assert Path(vtc.__file__).is_relative_to(root), "the copy was not what ran"
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), said.read_text(errors="replace")
