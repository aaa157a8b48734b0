"""The questions of built-in tasks and of the user's own data: a folder of images and a CSV file."""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from vtc import doors
from vtc.errors import ConfigError, InputFileError, UnknownArgumentError, did_you_mean
from vtc.eval.config import BUILT_IN, TaskConfig
from vtc.eval.pictures import FileQuestion, Picture, look_at
from vtc.pocket import Question, detail_questions, easy_vqa_questions, scene_questions

COLUMNS = ("image", "question", "answer")
"""Columns a CSV file of questions must have; ``type`` and ``id`` may be there."""


def check_task(task: TaskConfig) -> None:
    """Refuse tasks that nobody knows and files that are not there; quick, no question is made.

    Raises
    ------
    ConfigError
        With close matches, or the package to install.
    """
    if task.kind == "files":
        _rows(task)
    if task.kind != "lmms":
        return
    from vtc.eval import lmms

    known = lmms.known_tasks()
    if task.lmms in known:
        return
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(
            f"there is no task '{doors.short(task.name, 80)}'{did_you_mean(task.lmms, [*BUILT_IN, *known])} (built in: "
            f"{', '.join(BUILT_IN)}; `vtc tasks` lists those of lmms-eval, further ones need: pip install 'vtc-reducers[eval]')"
        )
    try:
        lmms.check_task(task.lmms, data=False)
    except UnknownArgumentError as error:
        near = did_you_mean(task.name, BUILT_IN)
        raise ConfigError(f"{error}{near}" if near else str(error)) from None


def question_count(task: TaskConfig) -> int | None:
    """Return how many questions a task of lmms-eval has, as far as that is known without its data."""
    from vtc.eval import lmms

    benchmark = lmms.known_tasks().get(task.lmms)
    if benchmark is None:
        return task.n
    return min(benchmark.n, task.n) if task.n else benchmark.n


def clips(task: TaskConfig) -> bool:
    """Whether a task shows videos."""
    from vtc.eval import lmms

    return task.kind == "lmms" and getattr(lmms.known_tasks().get(task.lmms), "kind", "") == "video"


def check_data(task: TaskConfig) -> None:
    """Make sure that a task of lmms-eval can be run here: the package is installed and the data set is there, or can be had.

    Raises
    ------
    VtcError
        With what to prepare.
    """
    from vtc.eval import lmms

    lmms.check_task(task.lmms)


def task_questions(task: TaskConfig) -> list[Question]:
    """Return the questions of a built-in task or of the user's own data.

    Raises
    ------
    ConfigError
        Unknown types, missing files, a line that makes no sense, a picture outside its folder, or no question at all.
    """
    found = _own(task) if task.kind == "files" else _made(task)
    found = found[: task.n] if task.n else found
    if not found:
        raise ConfigError(f"the task '{task.title}' has no questions: add some, or remove the task")
    return found


def _made(task: TaskConfig) -> list[Question]:
    sources, found = task.sources, []
    # of the single-task form, keys of the file; of a task, its own
    prefix = "data." if task.data is not None else ""
    for name, make in (("scenes", scene_questions), ("details", detail_questions)):
        if (wanted := getattr(sources, name)) is not None:
            try:
                found += make(wanted.split, wanted.n, wanted.types, wanted.seed)
            except ValueError as error:
                raise ConfigError(f"{prefix}{name}: {error}") from None
    if (easy := sources.easy_vqa) is not None:
        try:
            found += easy_vqa_questions(easy.split, easy.n)
        except ValueError as error:
            raise ConfigError(f"{prefix}easy_vqa: {error}") from None
    return found


TABLE_BYTES = 128 * doors.MIB
"""Largest CSV file of questions."""

TABLE_ROWS = 500_000
"""Most lines of one: twice those of the largest benchmarks."""

TEXT = 20_000
"""Most characters of a question or an answer."""

TYPES = 200
"""Most question types of one file: tables have a column for each."""

_LENGTHS = {"image": 1000, "question": TEXT, "answer": TEXT, "type": 60, "id": 200}


def _rows(task: TaskConfig) -> list[tuple[int, dict[str, str]]]:
    """Lines of the user's CSV file with their numbers, checked as far as that goes without reading images."""
    path, folder = doors.place(task.questions or ""), doors.place(task.folder or "")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder of images {doors.short(folder)}: correct `folder`")
    shown = doors.short(path)
    try:
        text = doors.read_text(path, TABLE_BYTES, "file of questions")
    except FileNotFoundError:
        raise ConfigError(f"there is no file of questions {shown}: correct `questions`") from None
    except InputFileError as error:
        raise ConfigError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown} cannot be read as CSV in UTF-8 ({error}): save it anew") from None
    if bad := doors.unprintable(text):
        line = text[: text.index(ast.literal_eval(bad))].count("\n") + 1
        raise ConfigError(f"{shown} line {line}: it holds the character {bad}, which no text needs: remove it")
    rows, last = [], 0
    try:
        reader = csv.reader(io.StringIO(text), strict=True)
        header = next(reader, [])
        loose = any(name != name.lstrip() for name in header)  # written with a blank behind every comma
        names = [name.strip() for name in header]
        _check_header(names, shown)
        last = reader.line_num
        for values in reader:
            line, last = last + 1, reader.line_num  # a quoted text may go over several lines: the first one counts
            if not values:
                continue
            if len(rows) == TABLE_ROWS:
                raise ConfigError(f"{shown} line {line}: more than {TABLE_ROWS:,} questions: split the file")
            rows.append((line, _row(names, values, loose, f"{shown} line {line}")))
    except csv.Error as error:
        raise ConfigError(f"{shown} line {last + 1}: this is not valid CSV ({error}): correct its quotes") from None
    if not rows:
        raise ConfigError(f"{shown} holds no questions: add lines below its header")
    kinds = {row.get("type", "") for _, row in rows}
    if len(kinds) > TYPES:
        raise ConfigError(f"{shown}: {len(kinds):,} different types, and a table has room for {TYPES}: merge some")
    return rows


def _check_header(names: list[str], shown: str) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ConfigError(
            f"{shown} line 1: the column '{missing[0]}' is missing{did_you_mean(missing[0], names)} (needed: "
            f"{', '.join(COLUMNS)}; there: {doors.short(', '.join(names)) or 'none'})"
        )
    twice = [name for name in (*COLUMNS, "type", "id") if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{shown} line 1: the column '{twice[0]}' appears a second time: remove one of them")


def _row(names: list[str], values: list[str], loose: bool, where: str) -> dict[str, str]:
    """One line by column; a comma that should have been quoted is refused, because it shifts question and answer."""
    if len(values) != len(names):
        raise ConfigError(
            f'{where}: {len(values)} values for {len(names)} columns: put a text that has a comma in it into quotes, "like, this", '
            "and give every column a value (an empty one will do for type and id)"
        )
    if not loose and (late := next((v for v in values if v != v.lstrip()), None)) is not None:
        raise ConfigError(
            f"{where}: the value '{doors.short(late)}' begins with a blank: if it is the rest of a text with a comma, put the "
            "whole text into quotes; otherwise remove the blank"
        )
    row = {name: value.strip() for name, value in zip(names, values, strict=True)}
    for name in COLUMNS:
        if not row[name]:
            raise ConfigError(f"{where}: the {name} is empty: fill it in, or remove the line")
    for name, most in _LENGTHS.items():
        if len(row.get(name, "")) > most:
            raise ConfigError(f"{where}: the {name} has {len(row[name]):,} characters, and may have {most:,}: shorten it")
    return row


def _own(task: TaskConfig) -> list[Question]:
    rows = _rows(task)
    images: dict[str, Picture] = {}
    seen: set[str] = set()
    found: list[Question] = []
    for line, row in rows[: task.n]:
        name = row["image"]
        if name not in images:
            try:
                images[name] = look_at(doors.inside(Path(task.folder or ""), name))
            except InputFileError as error:
                raise ConfigError(f"{doors.short(task.questions)} line {line}: {error}") from None
        identity = f"{name}/{row.get('id') or line}"
        if identity in seen:
            raise ConfigError(
                f"{doors.short(task.questions)} line {line}: the id '{row['id']}' appears a second time: ids must differ"
            )
        seen.add(identity)
        found.append(FileQuestion(images[name], row["question"], row["answer"], row.get("type") or "all", identity))
    return found


def is_correct(task: TaskConfig, answer: str, gold: str) -> bool:
    """Whether an answer is right: equal to the expected one but for case; in own data also but for a final full stop.

    Own data may list several accepted answers, separated by ``|``.
    """
    if task.kind != "files":
        return answer.strip().lower() == gold.strip().lower()
    return _plain(answer) in {_plain(g) for g in gold.split("|")}


def _plain(text: str) -> str:
    return text.strip().rstrip(".!").strip().lower()


def digest(questions: Sequence[Question]) -> str:
    """Hash of what is asked, pictures included: another generator, another file make other cells."""
    total = hashlib.sha256()
    for q in questions:
        if isinstance(q, FileQuestion):
            total.update("\0".join((q.id, q.type, q.prompt, q.answer, q.picture.digest)).encode() + b"\0")
        else:
            total.update("\0".join((q.id, q.type, q.prompt, q.answer, str(q.image.size))).encode() + q.image.tobytes())
    return total.hexdigest()[:16]


def image_of(question: str) -> str:
    """Image part of a question's id (all but the last component)."""
    return question.rpartition("/")[0] or question
