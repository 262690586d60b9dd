"""Expressions over parameters, such as ``width * depth <= 128``: checked when they are written, then compiled."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "len": len,
    "log": math.log,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
    "sum": sum,
}
# Who writes `model == mlp` or `bias == true` means Hydra's spelling.
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None}
_ALLOWED = (
    ast.Expression,
    ast.BoolOp,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.IfExp,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Load,
    ast.boolop,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)


class ExpressionError(ValueError):
    """An expression that cannot be read; the message quotes it and says what would be right."""


class Expression:
    """A side-effect-free expression over named parameters.

    Args:
        text: Python's arithmetic, comparisons, ``and``/``or``/``not``, ``in``, ``a if b else c``, and the
            functions abs, ceil, floor, len, log, log2, max, min, round, sqrt, sum. A parameter is written
            with its dots, ``model.width``; one whose name is no Python name as ``params['db@backup']``.
        names: The parameters that there are.

    Raises:
        ExpressionError: If it does not parse, or names what is not there.

    Example:
        >>> Expression("model.width * depth <= 128", ["model.width", "depth"])({"model.width": 32, "depth": 4})
        True
    """

    def __init__(self, text: str, names: Mapping[str, Any] | list[str]) -> None:
        self.text = text
        self.names: set[str] = set()
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError as error:
            raise ExpressionError(f"{text!r} is no expression: {error.msg}; e.g. 'width * depth <= 128'") from error
        known = set(names)
        tree = ast.fix_missing_locations(_Resolver(text, known, self.names).visit(tree))
        self._code = compile(tree, "<expression>", "eval")

    def __call__(self, params: Mapping[str, Any]) -> Any:
        """Return its value; an inactive parameter counts as ``None``."""
        values = {name: params.get(name) for name in self.names}
        return eval(self._code, {"__builtins__": {}, "params": values, **FUNCTIONS})

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


class _Resolver(ast.NodeTransformer):
    """Turns ``model.width`` into ``params['model.width']``; what could do more than compute does not pass."""

    def __init__(self, text: str, known: set[str], used: set[str]) -> None:
        self._text = text
        self._known = known
        self._used = used

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._parameter(_dotted(node), node)
        if isinstance(node, ast.Subscript):
            if isinstance(node.value, ast.Name) and node.value.id == "params" and isinstance(node.slice, ast.Constant):
                return self._parameter(str(node.slice.value), node)
            raise self._error("only params['name'] may be subscripted")
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or node.keywords:
                raise self._error(f"of functions there are {', '.join(FUNCTIONS)}")
            node.args = [self.visit(argument) for argument in node.args]
            return node
        if not isinstance(node, _ALLOWED):
            raise self._error(f"{type(node).__name__} is not allowed here")
        return self.generic_visit(node)

    def _parameter(self, name: str | None, node: ast.AST) -> ast.expr:
        if name is not None and name in _WORDS:
            return ast.Constant(_WORDS[name])
        if name is None or name not in self._known:
            raise self._error(f"{name!r} is no parameter; there are {', '.join(sorted(self._known))}")
        self._used.add(name)
        return ast.Subscript(ast.Name("params", ast.Load()), ast.Constant(name), ast.Load())

    def _error(self, reason: str) -> ExpressionError:
        return ExpressionError(f"{self._text!r}: {reason}")


def _dotted(node: ast.AST) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])
