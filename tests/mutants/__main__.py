"""Put the bugs of the table in, one by one, and say which the tests notice: ``python tests/mutants [WORDS ...]``.

Works on a temporary copy of the tree. One process imports what all tests need; a child of it runs the tests of each bug, so that a
bug costs seconds. With words, only the bugs that have one of them in their description. Ends with 1 if a bug passed or a test fails
without any.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from bugs import TABLE, Mutant
from copies import alone, copy, place, run


def mutated(text: str, mutant: Mutant) -> str | None:
    """The text with the bug in; None where there is no place for it, or more than one."""
    pattern = mutant.old if mutant.regex else re.escape(mutant.old)
    if len(re.findall(pattern, text)) != 1:
        return None
    return re.sub(pattern, mutant.new if mutant.regex else lambda _: mutant.new, text)


def main(words: list[str]) -> int:
    """Run the table; return the exit status."""
    alone()
    import transformers

    chosen = [m for m in TABLE if not words or any(w.lower() in f"{m.what} {m.file}".lower() for w in words)]
    print(f"{len(chosen)} bugs, transformers {transformers.__version__}")
    found: dict[str, int] = {"noticed": 0, "PASSED": 0, "gone": 0, "BROKEN": 0}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        tests = tuple(dict.fromkeys(t for m in chosen for t in m.tests))
        status, said = run(root, tests, "-x")
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
                status, said = run(root, mutant.tests, "-x")
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
