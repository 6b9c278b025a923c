"""Decisions of the planner, in the order in which they were taken, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from autoseg.plan import Decision
from autoseg.typed_json import to_json


class Notes:
    """Every decision, in the order in which it was taken."""

    def __init__(self) -> None:
        self._taken: dict[str, Decision] = {}

    def add(self, name: str, value: Any, because: str, *, kind: str = "rule") -> None:
        """Write down a decision; a later one of the same name takes its place."""
        self._taken[name] = Decision(name, to_json(value), kind, because)

    def reason(self, name: str) -> str:
        """Why the decision `name` was taken."""
        return self._taken[name].because

    def without(self, configurations: Collection[str]) -> tuple[Decision, ...]:
        """All but those that concern one of `configurations`, which were tried and not planned."""
        prefixes = tuple(f"{name}." for name in configurations)
        return tuple(d for d in self._taken.values() if not d.name.startswith(prefixes))


def sizes(values: Sequence[float]) -> str:
    """Numbers as a size: 40x56x40."""
    return "x".join(f"{v:g}" for v in values)
