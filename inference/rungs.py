"""Candidates and where they were compared on the way: `models/rungs/N.json`, one file for each rung of a run.

A file without standings is a rung that has begun: it fixes how long its forks train. With standings it is decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autoseg.errors import PlanError
from autoseg.files import read_json, write_json
from autoseg.plan import Configuration, Decision, Plan
from autoseg.typed_json import SPARSE, from_json, to_json
from autoseg.units import format_seconds
from autoseg.workspace import Workspace

RUNGS = "rungs"  # the folder, in `models/`, so that it is put aside with them


@dataclass(frozen=True)
class Contender:
    """What can win a place in the selection: a configuration, or the views of a volume together."""

    members: tuple[str, ...]
    """Configurations whose probabilities are averaged; most often one."""
    stages: tuple[str, ...] = ()
    """Previous stages of the members, which are trained only for them."""

    @property
    def name(self) -> str:
        """`3d_fullres`, `2.5d_axial + 2.5d_coronal + 2.5d_sagittal`."""
        return " + ".join(self.members)

    @property
    def configurations(self) -> tuple[str, ...]:
        """All that live and die with it, in the order of training."""
        return (*self.stages, *self.members)


@dataclass(frozen=True)
class Length:
    """How long a fold is trained."""

    steps: int | None = None
    seconds: float | None = None

    def share(self, part: float) -> Length:
        """A part of it, at least a step."""
        steps = None if self.steps is None else max(1, round(self.steps * part))
        return Length(steps, None if self.seconds is None else self.seconds * part)


@dataclass(frozen=True)
class Standing:
    """A contender at a rung, beside the leader."""

    contender: str
    dice: float
    """Mean over the structures of their mean over the cases, without mirroring."""
    difference: float
    """Mean paired difference from the leader; 0 for the leader itself."""
    low: float
    """Lower end of its 95 % interval over the cases."""
    high: float
    dropped: bool
    trained_seconds: float
    """Of all of its folds so far."""
    spared: str = field(default="", metadata=SPARSE)
    """Why it goes on, though it is beaten."""


@dataclass(frozen=True)
class Rung:
    """A comparison of the contenders that were left, on folds that none of them trained on."""

    number: int
    plan: str
    """Id of the plan."""
    share: float
    """Of a fold's training that each had: below 1 a fork, decayed early, while the training itself goes on later."""
    folds: tuple[str, ...]
    """Whose held-out cases they were scored on."""
    lengths: dict[str, Length]
    """Of the forks, by configuration; empty where whole folds were compared."""
    cases: int = 0
    leader: str = ""
    standings: tuple[Standing, ...] = ()
    """The best first; empty where it is not decided yet."""

    @property
    def forks(self) -> bool:
        """Whether forks are compared, not whole folds."""
        return self.share < 1

    @property
    def decided(self) -> bool:
        """Whether the contenders were compared."""
        return bool(self.standings)

    @property
    def dropped(self) -> frozenset[str]:
        """Contenders that were stopped here."""
        return frozenset(standing.contender for standing in self.standings if standing.dropped)

    @property
    def name(self) -> str:
        """`fold 0 at 25 % of its training`, `folds 0 to 2`."""
        some = f"fold {self.folds[0]}" if len(self.folds) == 1 else f"folds {self.folds[0]} to {self.folds[-1]}"
        return f"{some} at {100 * self.share:.0f} % of its training" if self.forks else some

    def decisions(self) -> list[Decision]:
        """Who was stopped here, with the numbers."""
        best = next((s for s in self.standings if s.contender == self.leader), None)
        return [
            Decision(
                f"{s.contender}.dropped",
                True,
                "empirical",
                f"{self.name}: mean Dice {s.dice:.4f}, the leader {self.leader} has {best.dice:.4f}; the paired "
                f"difference {s.difference:+.4f} ({s.low:+.4f} to {s.high:+.4f} over {self.cases} cases) lies below "
                f"zero, so it is trained no further than the {format_seconds(s.trained_seconds)} it had.",
            )
            for s in self.standings
            if s.dropped and best is not None
        ]

    def save(self, workspace: Workspace) -> None:
        """Write `models/rungs/N.json`, atomically."""
        write_json(_path(workspace, self.number), to_json(self))


def read_rung(number: int, plan: Plan, workspace: Workspace) -> Rung | None:
    """The rung of that number; None where it has not begun with this plan. Raises PlanError naming the file."""
    path = _path(workspace, number)
    if not path.exists():
        return None
    rung = from_json(Rung, read_json(path, error=PlanError, what="rung", remedy="delete it"), where=str(path))
    return rung if rung.plan == plan.id else None


def _path(workspace: Workspace, number: int) -> Path:
    return workspace.models / RUNGS / f"{number}.json"


def find_contenders(plan: Plan, asked: Sequence[str] = ()) -> list[Contender]:
    """All that predict labels for themselves; views of one volume are one contender, a cascade brings its stage.

    Of the configurations that were asked for, if any were: a stage that is asked for alone is one too.
    """
    chosen = [c for c in plan.configurations if not asked or c.name in asked]
    stages = {c.previous_stage for c in chosen}
    names = [c.name for c in chosen if c.architecture.output_channels and c.name not in stages]
    together = {name: views for views in find_views([plan.configuration(name) for name in names]) for name in views}
    members = list(dict.fromkeys(together.get(name, (name,)) for name in names))
    return [Contender(some, _stages(some, plan)) for some in members]


def _stages(members: Sequence[str], plan: Plan) -> tuple[str, ...]:
    before = (plan.configuration(name).previous_stage for name in members)
    return tuple(dict.fromkeys(stage for stage in before if stage is not None))


def find_views(configurations: Sequence[Configuration]) -> list[tuple[str, ...]]:
    """Names of the configurations that see one and the same volume along different axes: they are meant as one."""
    groups: dict[object, dict[int, str]] = {}
    for c in configurations:
        if c.topology != "3d":
            groups.setdefault((c.topology, c.preprocessing, c.sr_scale), {})[c.view_axis] = c.name
    return [tuple(views.values()) for views in groups.values() if len(views) > 1]


def beaten(rungs: Sequence[Rung]) -> frozenset[str]:
    """Contenders that some rung stopped."""
    return frozenset().union(*(rung.dropped for rung in rungs))


def total_seconds(contender: Contender, seconds: Mapping[str, float]) -> float:
    """Training time of all of a contender's configurations."""
    return sum(seconds.get(name, 0.0) for name in contender.configurations)
