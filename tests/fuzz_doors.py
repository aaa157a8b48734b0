"""Coverage-guided fuzzing of the doors, by hand: ``pip install atheris``, then ``python tests/fuzz_doors.py DOOR``: sweep, table,
picture or store.

The inputs that reached something new are kept in ``tests/fuzz_corpus/DOOR``; the suite runs them again. Arguments behind the door's
name go to the fuzzer, such as ``-max_total_time=600``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

_EVAL = ("vtc.eval.yamlfile", "vtc.eval.questions", "vtc.eval.contents", "vtc.eval.store")
CORPUS = Path(__file__).parent / "fuzz_corpus"


def doors(folder: Path, own: Path) -> dict[str, Callable[[bytes], None]]:
    """Return every door as a function of bytes.

    Parameters
    ----------
    folder : Path
        Where inputs are put.
    own : Path
        Folder made by :func:`door_cases.question_folder`.
    """
    import door_cases as cases

    folder.mkdir(parents=True, exist_ok=True)
    stored: list[cases.StoreDoor] = []

    def store(data: bytes) -> None:
        if not stored:
            stored.append(cases.StoreDoor(folder / "stores"))
        number, content = (data[0], data[1:]) if data else (0, b"")
        stored[0]([(cases.STORED[number % len(cases.STORED)], content)], True, go_on=False)

    return {
        "store": store,
        "sweep": lambda data: cases.sweep_door(data.decode("utf-8", "replace"), [], folder),
        "table": lambda data: cases.table_door(data.decode("utf-8", "replace"), None, own),
        "picture": lambda data: cases.picture_door(data, folder / "a.png"),
    }


def main() -> None:
    """Run the fuzzer on one door until it is stopped, or finds something."""
    import atheris

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in ("sweep", "table", "picture", "store"):
        sys.exit("which door? sweep, table, picture or store")
    with atheris.instrument_imports(include=["yaml", "PIL", "csv", "json", "vtc.doors", "vtc.files", *_EVAL]):
        import door_cases as cases
    root = Path(tempfile.mkdtemp())
    cases.question_folder(root / "own")
    run = doors(root / "in", root / "own")[name]
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], str(CORPUS / name), *sys.argv[2:]], run)
    run(b"")  # makes what the door needs
    with cases.no_programs():
        atheris.Fuzz()


if __name__ == "__main__":
    main()
