"""Small changes of a module: comparisons, arithmetic, constants, conditions, statements that are left out.

What only words a message, a type or a documentation is left as it is.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.MatMult: ast.Mult,
}  # fmt: skip
_LEFT_OUT = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete)
#: Calls of which the arguments are words.
_SAYING = {"warn", "warnings.warn", "pytest.skip", "TypeVar"}


@dataclass(frozen=True)
class Mutant:
    """A change of one node of a module's tree.

    Attributes:
        path: the file, relative to the repository.
        where: the qualified name of the function or class that it is in.
        line, column: where the node is.
        lines: lines by which tests that run it are found; ``None`` for what runs when the module is imported.
        at_import: whether it runs when the module is imported: outside of functions, or a default of one.
        node: its number, in the order of ``ast.walk``.
        kind: what sort of change it is.
        change: the code before and after.
        nth: which one it is of those of its place that read the same.
        of: a digest of the function that it is in, or of its statement: what was found of it holds as long as this
            does.
    """

    path: str
    where: str
    line: int
    column: int
    lines: tuple[int, int] | None
    at_import: bool
    node: int
    kind: str
    change: str
    nth: int
    of: str

    @property
    def is_words(self) -> bool:
        """Whether it changes a text of several words, which is part of a message somewhere."""
        return self.kind == "constant" and self.change[0] in "'\"" and " " in self.change.split(" -> ")[0]

    @property
    def name(self) -> str:
        """By which it is found again, wherever in its file the function has moved to."""
        return f"{self.path} {self.where}: {self.change}" + (f" ({self.nth})" if self.nth > 1 else "")

    def tree(self, root: Path) -> ast.Module:
        """The changed module."""
        tree = ast.parse((root / self.path).read_text())
        for number, node in enumerate(ast.walk(tree)):
            if number == self.node:
                for kind, change in _changes(node):
                    if kind == self.kind:
                        parents = _parents(tree)
                        changed = ast.copy_location(change(), node)
                        _put(parents[node], node, changed)
                        return ast.fix_missing_locations(tree)
        raise LookupError(f"{self.path} has changed: {self.name}")


def mutants_of(path: str, root: Path) -> Iterator[Mutant]:
    """Every change of a file."""
    source = (root / path).read_text()
    tree = ast.parse(source)
    parents = _parents(tree)
    lines = source.splitlines()
    seen: Counter[tuple[str, str]] = Counter()
    for number, node in enumerate(ast.walk(tree)):
        if not hasattr(node, "lineno") or node not in parents or _is_words(node, parents):
            continue
        if any("pragma: no cover" in lines[one.lineno - 1] for one in _above(node, parents) if hasattr(one, "lineno")):
            continue
        for kind, change in _changes(node):
            before, after = _code(node), _code(change())
            if before != after:
                place, found, change = _where(node, parents), _lines(node, parents), f"{before} -> {after}"
                seen[place, change] += 1
                yield Mutant(path, place, node.lineno, node.col_offset, *found, number, kind, change,
                             seen[place, change], _digest(node, parents))  # fmt: skip


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], ast.AST]]]:
    """The kinds of change of a node, each with what makes the new one."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        other = _COMPARED[type(node.ops[0])]()
        yield "comparison", lambda: ast.Compare(node.left, [other, *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        yield "arithmetic", lambda: ast.BinOp(node.left, _COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _COMPUTED:
        yield "arithmetic", lambda: ast.AugAssign(node.target, _COMPUTED[type(node.op)](), node.value)
    elif isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", lambda: ast.BoolOp(other_op, node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "boolean", lambda: node.operand
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "arithmetic", lambda: node.operand
    elif isinstance(node, ast.IfExp):
        yield "condition", lambda: ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield "constant", lambda: ast.Constant(not value)
        elif isinstance(value, int):
            yield "constant", lambda: ast.Constant(value + 1)
        elif isinstance(value, float):
            yield "constant", lambda: ast.Constant(value * 2 + 1)
        elif isinstance(value, str):
            yield "constant", lambda: ast.Constant(f"XX{value}")
    elif isinstance(node, ast.Break):
        yield "statement", ast.Continue
    elif isinstance(node, ast.Continue):
        yield "statement", ast.Break
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "return", lambda: ast.Return(ast.Constant(None))
    if isinstance(node, ast.If):
        yield "condition", lambda: ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    if isinstance(node, _LEFT_OUT):
        yield "statement", ast.Pass


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _above(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    """The node and what it is in, from the inside."""
    yield node
    while node in parents:
        node = parents[node]
        yield node


def _is_words(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a change would be one of a message, a type, a documentation or a declaration."""
    for one, above in zip(_above(node, parents), list(_above(node, parents))[1:], strict=False):
        if isinstance(above, ast.Raise | ast.JoinedStr | ast.FormattedValue):
            return True
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
            return True
        if isinstance(above, ast.Call) and ast.unparse(above.func) in _SAYING:
            return True
        if isinstance(above, ast.AnnAssign | ast.arg) and one is above.annotation:
            return True
        if isinstance(above, ast.FunctionDef) and (one is above.returns or one in above.decorator_list):
            return True
        if isinstance(above, ast.ClassDef) and one not in above.body:
            return True
        if isinstance(above, ast.If) and ast.unparse(above.test) == "TYPE_CHECKING":
            return True
        if isinstance(above, ast.Assign) and ast.unparse(above.targets[0]) in ("__all__", "__slots__"):
            return True
    first = next((one for one in _above(node, parents) if isinstance(one, ast.stmt)), None)
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Call) and ast.unparse(first.value.func) in _SAYING:
        return node is not first
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__slots__")


def _put(parent: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list) and any(one is old for one in value):
            value[[one is old for one in value].index(True)] = new


def _code(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(node)).splitlines()
    return text[0][:100]


def _where(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    named = [one.name for one in _above(node, parents) if isinstance(one, ast.FunctionDef | ast.ClassDef)]
    return ".".join(reversed(named)) or "module"


def _digest(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    """Of the code of the outermost function that it is in, or else of its statement."""
    above = list(_above(node, parents))
    functions = [one for one in above if isinstance(one, ast.FunctionDef)]
    own = functions[-1] if functions else next(one for one in above if isinstance(one, ast.stmt))
    return hashlib.sha256(ast.unparse(own).encode()).hexdigest()[:12]


def _lines(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> tuple[tuple[int, int] | None, bool]:
    """The lines by which tests are found, and whether they run when the module is imported."""
    above = list(_above(node, parents))
    functions = [one for one in above if isinstance(one, ast.FunctionDef | ast.Lambda)]
    if not functions:
        return None, True
    inner, outer = functions[0], functions[-1]
    statement = next(one for one in above if isinstance(one, ast.stmt))
    at_import = statement is outer or (isinstance(outer, ast.Lambda) and len(functions) == 1)
    if statement is inner:  # a default
        return (inner.lineno, inner.end_lineno or inner.lineno), at_import
    last = node.test.end_lineno if isinstance(node, ast.If) else getattr(node, "end_lineno", None)
    return (statement.lineno, max(statement.lineno, last or statement.lineno)), at_import
