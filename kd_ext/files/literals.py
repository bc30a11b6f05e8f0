"""Expressions of literals and arithmetic, such as ``[(512, 3)] * 20``: what a setting may be, and no more."""

import ast
import operator
import warnings
from typing import Any, Callable, Dict, Iterator

MOST_CHARACTERS = 10_000
MOST_OPERATIONS = 1_000
MOST_ELEMENTS = 10_000  # of a computed value, with what is in it
MOST_BITS = 10_000  # of an integer

_UNARY: Dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_BINARY: Dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_NUMBERS = (int, float, complex)  # and bool, which is an int
_SEQUENCES = (str, bytes, list, tuple)


class NotALiteral(ValueError):
    """A text is no such expression, or its value is too large; the message says why, in a few words."""


def evaluate(text: str) -> Any:
    """The value of an expression of numbers, strings, containers of them, and ``+ - * / // % **`` on them.

    Nothing else is understood: no names, no calls, no attributes. Time and memory are bounded.

    Raises:
        NotALiteral: it is something else, or larger than any setting
    """
    if len(text) > MOST_CHARACTERS and not _is_shallow(text):
        raise NotALiteral(f"it has {len(text):,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, on how numbers are written
            tree = ast.parse(text.lstrip(" \t"), mode="eval")
        return _value(tree.body)
    except NotALiteral:
        raise
    except SyntaxError:
        raise NotALiteral("it is no expression") from None
    except (RecursionError, MemoryError):
        raise NotALiteral("it is nested too deep") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise NotALiteral(str(error).strip().splitlines()[0] if str(error).strip() else "it has no value") from None


def _is_shallow(text: str) -> bool:
    """Whether a long text, as a line of data can be, is too flat for the parser's stack: old Pythons overflow it."""
    return sum(map(text.count, "+-*/%~(.[{:@")) + text.count("not") + text.count(" if ") < MOST_OPERATIONS


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and node.value is not Ellipsis:
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        operand = _value(node.operand)
        _require(
            isinstance(operand, _NUMBERS) or isinstance(node.op, ast.Not), "there is a sign before what is no number"
        )
        return _UNARY[type(node.op)](operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _computed(node.op, _value(node.left), _value(node.right))
    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    if isinstance(node, ast.List):
        return list(map(_value, node.elts))
    if isinstance(node, ast.Set):
        return set(map(_value, node.elts))
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    raise NotALiteral(f"{type(node).__name__} is neither")


def _computed(kind: ast.operator, left: Any, right: Any) -> Any:
    """What an operation gives, if its size can be told before."""
    if isinstance(left, _NUMBERS) and isinstance(right, _NUMBERS):
        if isinstance(kind, ast.Pow) and isinstance(left, int) and isinstance(right, int):
            _require(left.bit_length() * right <= MOST_BITS, "a number in it is too large")
        result = _BINARY[type(kind)](left, right)
        _require(not isinstance(result, int) or result.bit_length() <= MOST_BITS, "a number in it is too large")
        return result
    times = [x for x in (left, right) if isinstance(x, int)]
    sequences = [x for x in (left, right) if isinstance(x, _SEQUENCES)]
    is_repeated = isinstance(kind, ast.Mult) and len(times) == len(sequences) == 1
    _require(is_repeated or (isinstance(kind, ast.Add) and len(sequences) == 2), "it computes with what is no number")
    size = len(sequences[0]) * times[0] if is_repeated else len(sequences[0]) + len(sequences[1])
    _require(size <= MOST_ELEMENTS, "a value in it is too large")
    result = _BINARY[type(kind)](left, right)
    for count, _ in enumerate(_elements(result)):  # [[0] * 1000] * 1000 * 1000 takes no memory, until it is used
        _require(count < MOST_ELEMENTS, "a value in it is too large")
    return result


def _elements(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, set)):
        for x in value:
            yield x
            yield from _elements(x)
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _elements(pair)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotALiteral(reason)
