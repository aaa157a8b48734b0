"""Small changes of a Python file: comparisons, arithmetic, logic, numbers, conditions, statements with an effect.

What no number hangs on is left alone: annotations, decorators, docstrings, what is said when something is raised or warned of.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}  # fmt: skip
_PAIRS = (("min", "max"), ("any", "all"), ("argmin", "argmax"), ("floor", "ceil"), ("amin", "amax"), ("sum", "mean"))
NAMES = dict(_PAIRS) | {new: old for old, new in _PAIRS}
UNCHANGED = (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)


@dataclass(frozen=True)
class Change:
    """One change of a text.

    Attributes
    ----------
    start, end : int
        Bytes that are replaced.
    new : bytes
        What stands there instead.
    line, first : int
        Line of the change, and the first of its statement.
    kind : str
        In words.
    body : bool
        Whether it lies in a function: elsewhere it runs when the file is imported.
    """

    start: int
    end: int
    new: bytes
    line: int
    first: int
    kind: str
    body: bool

    def __call__(self, text: bytes) -> bytes:
        """The text with the change."""
        return text[: self.start] + self.new + text[self.end :]


def changes(text: bytes) -> list[Change]:
    """All changes of a file, in order."""
    return sorted(set(_Finder(text).found()), key=lambda c: (c.start, c.end, c.new))


class _Finder:
    def __init__(self, text: bytes) -> None:
        self.text, self.tree = text, ast.parse(text)
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def begin(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def found(self) -> Iterator[Change]:
        yield from self.walk(self.tree, 1, False)

    def walk(self, node: ast.AST, first: int, body: bool) -> Iterator[Change]:
        if isinstance(node, UNCHANGED) or _speaks(node):
            return
        first = node.lineno if isinstance(node, ast.stmt) else first
        for start, end, new, kind in self.of(node):
            line = self.text.count(b"\n", 0, start) + 1
            yield Change(start, end, new.encode(), line, first, kind, body)
        inside = body or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_comment"):
                continue
            # defaults are computed when the function is made
            deeper = body if name == "args" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else inside
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.walk(child, first, deeper)

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str, kind: str) -> Iterator[tuple[int, int, str, str]]:
        """Replace the operator between two operands."""
        start, end = self.end(left), self.begin(right)
        gap = re.sub(rb"#[^\n]*", lambda m: b" " * len(m[0]), self.text[start:end])
        hit = re.search(rb"\s+".join(re.escape(w.encode()) for w in old.split()), gap)
        if hit:
            yield start + hit.start(), start + hit.end(), new, kind

    def of(self, node: ast.AST) -> Iterator[tuple[int, int, str, str]]:
        if isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from self.between(left, right, *COMPARISONS[type(op)], "comparison")
        elif (
            isinstance(node, ast.BinOp)
            and type(node.op) in ARITHMETIC
            and not isinstance(node.left, ast.Constant | ast.JoinedStr)
        ):
            yield from self.between(node.left, node.right, *ARITHMETIC[type(node.op)], "arithmetic")
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node.left):
            yield from self.between(node.left, node.right, *ARITHMETIC[type(node.op)], "arithmetic")
        elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            yield from self.between(node.target, node.value, f"{old}=", f"{new}=", "arithmetic")
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from self.between(left, right, old, new, "logic")
        elif isinstance(node, ast.UnaryOp):
            yield self.begin(node), self.begin(node.operand), " " if isinstance(node.op, ast.Not) else "", "sign"
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            value = node.value
            new = (
                repr(not value)
                if isinstance(value, bool)
                else str(value + 1)
                if isinstance(value, int)
                else repr(value * 2 or 1.0)
            )
            yield self.begin(node), self.end(node), new, "number"
        elif isinstance(node, (ast.If, ast.IfExp)):
            start, end = self.begin(node.test), self.end(node.test)
            yield start, end, f"(not ({self.text[start:end].decode()}))", "condition"
        elif isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in NAMES and not (name in ("sum", "mean") and isinstance(function, ast.Name)):
                end = self.end(function)
                yield end - len(name), end, NAMES[name], "name"
        if _acts(node):
            yield self.begin(node), self.end(node), "pass", "statement"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _other(value: bool | float) -> str:
    """Another number."""
    if isinstance(value, bool):
        return repr(not value)
    return repr(value + 1) if isinstance(value, int) else repr(2 * value or 1.0)


def _acts(node: ast.AST) -> bool:
    """Whether a statement is a call, or stores into an object, and can be left out."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.Assign) and all(isinstance(t, (ast.Attribute, ast.Subscript)) for t in node.targets)


def _speaks(node: ast.AST) -> bool:
    """Whether it only warns, or states types."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).endswith(("warn", "cast", "TypeVar"))
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
