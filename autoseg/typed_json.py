"""Frozen dataclasses <-> plain JSON content: every type is checked, unknown and missing keys are refused by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from autoseg.errors import PlanError, unknown_choice

SPARSE = {"sparse": True}  # of a field that is not written where it has its default: plans without it keep their id

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and dicts as plain JSON content."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = (
            f for f in dataclasses.fields(value) if "sparse" not in f.metadata or getattr(value, f.name) != f.default
        )
        return {f.name: to_json(getattr(value, f.name)) for f in kept}
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return value


def from_json(kind: type[T], content: Any, *, where: str) -> T:
    """JSON content as the dataclass `kind`; every type is checked. Raises PlanError naming the key."""
    return typing.cast(T, _read(kind, content, where))


def _read(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return content
    if origin in (typing.Union, types.UnionType):
        if content is None and type(None) in arguments:
            return None
        return _read(next(a for a in arguments if a is not type(None)), content, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, content, where)
    if origin is tuple:
        if not isinstance(content, list):
            raise PlanError(f"{where} must be a list, got {content!r}.")
        if len(arguments) == 2 and arguments[1] is ...:
            return tuple(_read(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(content))
        if len(content) != len(arguments):
            raise PlanError(f"{where} must have {len(arguments)} entries, got {content!r}.")
        pairs = zip(arguments, content, strict=True)
        return tuple(_read(a, entry, f"{where}[{i}]") for i, (a, entry) in enumerate(pairs))
    if origin is dict:
        if not isinstance(content, dict):
            raise PlanError(f"{where} must be an object, got {content!r}.")
        return {key: _read(arguments[1], entry, f"{where}.{key}") for key, entry in content.items()}
    if kind is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content)
    if not isinstance(content, kind) or (kind is int and isinstance(content, bool)):
        raise PlanError(f"{where} must be of type {kind.__name__}, got {content!r}.")
    return content


def _read_dataclass(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise PlanError(f"{where} must be an object, got {content!r}.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            raise PlanError(f"{where}: {unknown_choice('key', key, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise PlanError(f"{where}: key '{missing[0]}' is missing.")
    return kind(**{key: _read(hints[key], entry, f"{where}: {key}") for key, entry in content.items()})
