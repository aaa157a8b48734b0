"""YAML of other people: plain data of a bounded size, or one sentence.

The loader is PyYAML's safe one, which makes no objects. What it leaves open is closed here: aliases that multiply (nine lists of
nine are 387 million entries), nodes that contain themselves, nesting that ends the interpreter's stack, numbers and dates that are
none, and characters that no text needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vtc import doors
from vtc.errors import ConfigError, InputFileError

FILE_BYTES = 256 * 1024
"""Largest file; the longest that vtc ships has a twentieth of it."""

ENTRIES = 50_000
"""Most entries, those of aliases counted wherever they stand."""

DEPTH = 32
"""Deepest nesting."""


def read_yaml(path: Path, what: str) -> str:
    """Return the text of a YAML file.

    Raises
    ------
    FileNotFoundError
        It is not there: the caller knows better what to suggest.
    ConfigError
        It is no ordinary file of UTF-8 text, or too large; ``what`` names its kind.
    """
    try:
        return doors.read_text(path, FILE_BYTES, what)
    except FileNotFoundError:
        raise
    except InputFileError as error:
        raise ConfigError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{doors.short(path)} cannot be read as UTF-8 text ({error}): give the path of a YAML file") from None


def parse_yaml(text: str, source: str) -> tuple[yaml.Node | None, Any]:
    """Parse one YAML document.

    Parameters
    ----------
    text : str
        YAML.
    source : str
        Name of the file, for messages.

    Returns
    -------
    Node or None, object
        The tree with its lines, and the plain data; ``None`` for both where there is nothing.

    Raises
    ------
    ConfigError
        With the line, where it has one.
    """
    if len(text) > FILE_BYTES:
        raise ConfigError(f"{source} is longer than such a file may be ({FILE_BYTES // 1024} KiB): split it")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _Measure(source).of(node, 1)
            return node, loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "syntax error"
        raise ConfigError(
            f"{source}{where}: this is not valid YAML ({doors.short(problem)}): check indentation, quotes and brackets"
        ) from None
    except RecursionError:
        raise ConfigError(f"{source} is nested more than {DEPTH} levels deep: write it flat") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # of PyYAML's numbers and dates
        raise ConfigError(
            f"{source}: a number or a date in it is none ({doors.short(error)}): correct it, or put it in quotes"
        ) from None


class _Measure:
    """Counts the entries below a node as often as aliases repeat them, and looks at every text."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.known: dict[int, tuple[int, int]] = {}
        self.above: set[int] = set()

    def of(self, node: yaml.Node, depth: int) -> tuple[int, int]:
        """Return entries and height of a node."""
        where = f"{self.source} line {node.start_mark.line + 1}"
        if depth > DEPTH:
            raise ConfigError(f"{where}: this is nested more than {DEPTH} levels deep: write it flat")
        if isinstance(node, yaml.ScalarNode):
            if bad := doors.unprintable(node.value):
                raise ConfigError(f"{where}: a text holds the character {bad}, which nothing here needs: remove it")
            return 1, 0
        if id(node) in self.above:
            raise ConfigError(f"{where}: an alias (*name) stands inside what it names: write the values out")
        if id(node) not in self.known:
            self.above.add(id(node))
            children = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
            found = [self.of(child, depth + 1) for child in children]
            self.known[id(node)] = 1 + sum(n for n, _ in found), 1 + max((h for _, h in found), default=0)
            self.above.discard(id(node))
        entries, height = self.known[id(node)]
        if entries > ENTRIES:
            raise ConfigError(f"{where}: with its aliases (*name) this has more than {ENTRIES:,} entries: write fewer")
        if depth + height > DEPTH + 1:
            raise ConfigError(f"{where}: with its aliases (*name) this is nested more than {DEPTH} levels deep: write it flat")
        return entries, height
