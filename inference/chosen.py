"""`selection.json` -> what prediction needs of it: members, weights, temperature, cleaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoseg.errors import CheckpointError, PlanError
from autoseg.files import read_json
from autoseg.inference.postprocess import Cleaning
from autoseg.typed_json import from_json


@dataclass(frozen=True)
class Member:
    """A configuration, as it predicts."""

    configuration: str
    mirroring: bool


@dataclass(frozen=True)
class Chosen:
    """An ensemble, or a single configuration, and what is done to its answer."""

    members: tuple[Member, ...]
    weights: tuple[float, ...]
    """Of the members' probabilities; they sum to 1."""
    temperature: float = 1.0
    """Logits are divided by it."""
    cleaning: dict[str, Cleaning] = field(default_factory=dict)
    """By structure; those that are left as they are are not in it."""

    @classmethod
    def load(cls, path: Path) -> Chosen:
        """Read the entry "chosen" of `selection.json`. Raises CheckpointError where it cannot be used."""
        content = read_json(path, error=CheckpointError, what="selection")
        try:
            chosen = from_json(cls, content["chosen"] if isinstance(content, dict) else content, where=str(path))
        except (PlanError, KeyError) as error:
            raise CheckpointError(f"{path}: the selection cannot be used ({error}).") from error
        if not chosen.members or len(chosen.members) != len(chosen.weights) or chosen.temperature <= 0:
            raise CheckpointError(
                f"{path}: the selection needs members with a weight each and a temperature above 0, got "
                f"{len(chosen.members)} members, {len(chosen.weights)} weights and {chosen.temperature}."
            )
        return chosen
