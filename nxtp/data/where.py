"""What is used of a source: samples by a condition on the fields of their JSON, and the field that is the caption."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from nxtp.errors import UserError, printable

FILTERED = "filtered"  # the kind of the samples that `where` skips: they are not damaged

Value = Callable[[Mapping[str, Any]], Any]  # of a part of a condition, for a sample's JSON
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}
_ALLOWED = "a condition has names of JSON fields, numbers, 'strings', [lists], True, False, None, "
_ALLOWED += "== != < <= > >= in, and, or, not"


@dataclass(frozen=True)
class Selection:
    """``caption_key`` is the JSON field that is the caption, or parquet:COLUMN; ``where`` a condition on fields; or ''.

    Raises:
        UserError: ``where`` is no condition, with the place where it is wrong; no column is named; pyarrow is missing.
    """

    caption_key: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        if self.where:
            condition(self.where)
        if self.caption_key == "parquet:":
            raise UserError("data.caption_key=parquet: names no column: write parquet:COLUMN.")
        if self.column and find_spec("pyarrow") is None:
            raise UserError(f"data.caption_key={self.caption_key} needs pyarrow: pip install 'nxtp[parquet]'.")

    @property
    def column(self) -> str:
        """Of the table beside a shard, in which the captions are; '' if there is none."""
        return self.caption_key.removeprefix("parquet:") if self.caption_key.startswith("parquet:") else ""

    def takes(self, record: Mapping[str, Any]) -> bool:
        """Whether a sample of this JSON is used."""
        return not self.where or bool(condition(self.where)(record))


@lru_cache
def condition(where: str) -> Value:
    """The condition as a function of a sample's JSON. A field that is missing is None, which has no size: None > 0 is
    false, and None < 0 is false.

    Raises:
        UserError: see :class:`Selection`.
    """
    where = where.replace("\n", " ").strip()
    try:
        tree = ast.parse(where, mode="eval").body
        if not isinstance(tree, ast.BoolOp | ast.UnaryOp | ast.Compare | ast.Name):
            raise _wrong(where, f"no comparison: {_ALLOWED}", where)
        return _value(tree, where)
    except SyntaxError as error:
        raise _wrong(where, error.msg, where[error.offset - 1 :] if error.offset else "") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL byte; too deep
        raise _wrong(where, str(error) or "nested too deeply", "") from None


def _value(node: ast.expr, where: str) -> Value:
    match node:
        case ast.BoolOp(op, values):
            parts, over = [_value(value, where) for value in values], all if isinstance(op, ast.And) else any
            return lambda record: over(part(record) for part in parts)
        case ast.UnaryOp(ast.Not(), operand):
            part = _value(operand, where)
            return lambda record: not part(record)
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
            return lambda record: -number
        case ast.Compare(left, ops, others) if all(type(op) in _COMPARISONS for op in ops):
            parts, checks = [_value(each, where) for each in (left, *others)], [_COMPARISONS[type(op)] for op in ops]
            return lambda record: _holds(checks, [part(record) for part in parts])
        case ast.Name(name) if name not in ("true", "false", "null"):
            return lambda record: record.get(name)
        case ast.Constant(None | int() | float() | str() as constant):
            return lambda record: constant
        case ast.Tuple(elements) | ast.List(elements):
            parts = [_value(element, where) for element in elements]
            return lambda record: [part(record) for part in parts]
    raise _wrong(where, f"not allowed: {_ALLOWED}", ast.get_source_segment(where, node) or "")


def _holds(checks: list[Callable[[Any, Any], Any]], values: list[Any]) -> bool:
    try:
        return all(check(*pair) for check, pair in zip(checks, pairwise(values), strict=True))
    except TypeError:  # of kinds that cannot be compared
        return False


def _wrong(where: str, reason: str, place: str) -> UserError:
    at = f"at '{printable(place[:40])}'" if place else "at its end"
    return UserError(f'data.where="{printable(where[:200])}" is wrong {at}: {reason}.')
