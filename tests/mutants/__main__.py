"""Put the bugs of the table in, one by one, and say which the tests notice: ``python tests/mutants [WORDS ...]``.

Works on a temporary copy of the tree. One process imports what all tests need; a child of it runs the tests of each bug, so that a
bug costs seconds. With words, only the bugs that have one of them in their description. Ends with 1 if a bug passed or a test fails
without any.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from bugs import TABLE, Mutant

ROOT = Path(__file__).parents[2]
sys.path[:] = [p for p in sys.path if Path(p).resolve() not in (ROOT, Path(__file__).parent)]  # children see the copy alone


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


def run(root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run tests in a child of this process; return pytest's exit status and what it printed."""
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
            import pytest

            where = [f"tests/{t}" for t in tests]
            status = int(
                pytest.main(["-x", "-p", "no:cacheprovider", "--rootdir", str(root), "-W", "ignore", "--tb=line", *where])
            )
            import vtc

            assert Path(vtc.__file__).is_relative_to(root), "the copy was not what ran"
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), said.read_text(errors="replace")


def mutated(text: str, mutant: Mutant) -> str | None:
    """The text with the bug in; None where there is no place for it, or more than one."""
    pattern = mutant.old if mutant.regex else re.escape(mutant.old)
    if len(re.findall(pattern, text)) != 1:
        return None
    return re.sub(pattern, mutant.new if mutant.regex else lambda _: mutant.new, text)


def main(words: list[str]) -> int:
    """Run the table; return the exit status."""
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import numpy  # noqa: F401  what all children need, once
    import pandas  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)
    chosen = [m for m in TABLE if not words or any(w.lower() in f"{m.what} {m.file}".lower() for w in words)]
    print(f"{len(chosen)} bugs, transformers {transformers.__version__}")
    found: dict[str, int] = {"noticed": 0, "PASSED": 0, "gone": 0, "BROKEN": 0}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        tests = tuple(dict.fromkeys(t for m in chosen for t in m.tests))
        status, said = run(root, tests)
        if status:
            print(f"the tests fail without any bug:\n{said}")
            return 1
        for mutant in chosen:
            path = place(root, mutant.file)
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            wrong = mutated(text, mutant)
            if wrong is None:
                verdict, why = (
                    "gone",
                    f"its place in {mutant.file} is not found (once): bring tests/mutants/bugs.py up to date",
                )
            else:
                path.write_text(wrong, encoding="utf-8")
                status, said = run(root, mutant.tests)
                path.write_text(text, encoding="utf-8")
                # 1: tests failed; 0: none did; anything else: they did not run
                verdict = {0: "PASSED", 1: "noticed"}.get(status, "BROKEN")
                why = (
                    ""
                    if verdict == "noticed"
                    else said[-1500:]
                    if verdict == "BROKEN"
                    else f"not noticed by {', '.join(mutant.tests)}"
                )
            found[verdict] += 1
            print(f"{verdict:<8} {mutant.file:<34} {mutant.what}{f'  ({why})' if why else ''}", flush=True)
    print(", ".join(f"{count} {verdict.lower()}" for verdict, count in found.items()))
    return int(found["PASSED"] + found["BROKEN"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
