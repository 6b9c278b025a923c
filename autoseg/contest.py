"""A plan and the folder of its models -> who is still in the contest, and what is to be trained next.

A run trains its candidates in rounds and compares them after each: first a fork of fold 0, trained a part of the way;
then fold 0 to its end, fold 1, and so on, each time on the held-out cases of all folds so far. Whoever is beaten beyond
noise is trained no further (`inference.halving`). Everything is read from the disk whenever it is asked for: finished
folds, and the rungs that are decided (`models/rungs/`). So it does not matter who trained what, or what was killed.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoseg.checkpoint import checkpoint_id
from autoseg.dataset import RawDataset
from autoseg.errors import PlanError
from autoseg.files import read_json
from autoseg.forecast import Pace, Work
from autoseg.inference.halving import FORK_SHARE, LEAST_CASES, LEAST_GROWTH, LEAST_STEPS, judge
from autoseg.inference.rungs import RUNGS, Contender, Length, Rung, find_contenders, read_rung
from autoseg.plan import Plan
from autoseg.stages import is_of_split
from autoseg.training.folds import Fold
from autoseg.training.loop import Standing, read_standing
from autoseg.workspace import CHECKPOINT, SCORED, SUMMARY, VALIDATION, Workspace

log = logging.getLogger(__name__)

MOST_FORK_PREDICTION = (
    1.0  # of a timed fork's training time that predicting its held-out cases may take; else fewer ...
)
FEW_CASES = 12  # ... of them, but not fewer than these


@dataclass(frozen=True)
class Task:
    """One fold of one configuration."""

    configuration: str
    fold: str

    def __str__(self) -> str:
        return f"{self.configuration}, fold {self.fold}"


@dataclass(frozen=True)
class Row:
    """A fold in the table of a run."""

    task: Task
    state: str
    """`waiting`, `fork` (trained a part of the way, for a first comparison), `done` or `dropped`."""
    dice: float | None = None
    """Mean held-out Dice, where it is scored."""


@dataclass(frozen=True)
class Round:
    """What is to be done before the contenders that are left are compared, or in the end chosen from."""

    contenders: tuple[Contender, ...]
    tasks: tuple[Task, ...]
    """That may be done now, in any order or at the same time."""
    rung: Rung | None
    """The comparison that follows; None where the choice does."""

    def forks(self, task: Task) -> bool:
        """Whether a task is a fork, and not a fold of a previous stage that is trained to its end."""
        return self.rung is not None and task.configuration in self.rung.lengths

    @property
    def is_over(self) -> bool:
        """Whether nothing is left but to choose."""
        return not self.tasks and self.rung is None


@dataclass(frozen=True)
class Contest:
    """The candidates of a plan, how long each fold trains, and where their models are."""

    plan: Plan
    place: Workspace
    folds: tuple[Fold, ...]
    steps: int | None = None
    """Of each fold, where they were asked for."""
    timed: bool = False
    """Whether the time for everything was asked for, which leaves the length of a fold open."""
    asked: tuple[str, ...] = ()
    """The candidates that were asked for; empty: all that are planned."""

    @property
    def contenders(self) -> list[Contender]:
        """All of them; first those that wait for no previous stage."""
        return sorted(find_contenders(self.plan, self.asked), key=lambda contender: bool(contender.stages))

    @property
    def others(self) -> list[Contender]:
        """What answers with images alone, which Dice does not tell apart: trained in the end, never dropped."""
        known = {name for contender in self.contenders for name in contender.configurations}
        names = [c.name for c in self.plan.configurations if not self.asked or c.name in self.asked]
        return [Contender((name,)) for name in names if name not in known]

    @property
    def configurations(self) -> list[str]:
        """Of all candidates, in the order of the plan; those of previous stages too."""
        candidates = (*self.contenders, *self.others)
        names = {name for contender in candidates for name in contender.configurations}
        return [c.name for c in self.plan.configurations if c.name in names]

    @property
    def names(self) -> tuple[str, ...]:
        """The folds."""
        return tuple(str(number) for number in range(len(self.folds)))

    # ---- what comes next

    def round(self) -> Round:
        """What comes next."""
        left = self.contenders
        for rung in self._rungs():
            if rung.decided:
                left = [contender for contender in left if contender.name not in rung.dropped]
                continue
            if len(left) < 2 or all(self.is_complete(contender) for contender in left):
                break
            return Round(tuple(left), tuple(self._tasks(left, rung)), rung)
        rest = Rung(len(self.folds), self.plan.id, 1.0, self.names, {})
        return Round(tuple(left), tuple(self._tasks([*left, *self.others], rest)), None)

    def rounds(self) -> Iterator[Round]:
        """What comes next, until nothing is left but to choose; somebody does it before the next one is asked for."""
        while not (now := self.round()).is_over:
            yield now

    def rungs(self) -> list[Rung]:
        """Those that are decided."""
        return [rung for rung in self._rungs() if rung.decided]

    def open_rungs(self) -> list[Rung]:
        """Those that are not."""
        return [rung for rung in self._rungs() if not rung.decided]

    def _rungs(self) -> Iterator[Rung]:
        """Every comparison in its order, as it stands on the disk; there is none of fewer than LEAST_CASES."""
        cases = 0
        fork = self._fork()
        if fork is not None and len(self.folds[0].validation) >= LEAST_CASES:
            yield fork
        for number, fold in enumerate(self.folds[:-1], start=1):
            cases += len(fold.validation)
            if cases >= LEAST_CASES:
                new = Rung(number, self.plan.id, 1.0, self.names[:number], {})
                yield read_rung(number, self.plan, self.place) or new

    def _fork(self) -> Rung | None:
        """The rung of the forks; None where trainings began without it, or are too short to be divided."""
        begun = read_rung(0, self.plan, self.place)
        if begun is not None:
            return begun
        members = [name for contender in self.contenders for name in contender.members]
        if any(self._standing(Task(name, "0")) is not None for name in members):
            return None
        lengths = [] if self.timed else [self.length(name) for name in members]
        if any(length.share(FORK_SHARE) == length for length in lengths):
            return None
        return Rung(0, self.plan.id, FORK_SHARE, ("0",), {})

    def begin_forks(self, rung: Rung, *, fold_seconds: float | None) -> None:
        """Fix how long the forks of a rung train, as a share of what whole folds do."""
        lengths = {
            name: (Length(seconds=fold_seconds) if fold_seconds else self.length(name)).share(rung.share)
            for contender in self.contenders
            for name in contender.members
        }
        replace(rung, lengths=lengths).save(self.place)

    def _tasks(self, contenders: Sequence[Contender], rung: Rung) -> Iterator[Task]:
        """What these contenders lack for a rung and wait for nothing else."""
        for contender in contenders:
            stages = [Task(name, fold) for name in contender.stages for fold in self.names]
            open_stages = [task for task in stages if not self.is_done(task)]
            yield from open_stages
            if open_stages:
                continue
            for task in (Task(name, fold) for name in contender.members for fold in rung.folds):
                if not (self.is_done(task) or (rung.forks and self.is_forked(task))):
                    yield task

    def length(self, configuration: str) -> Length:
        """How long a fold trains, where that is not a share of the time for everything."""
        training = self.plan.configuration(configuration).training
        if self.steps is not None:
            return Length(steps=self.steps)
        return Length(seconds=training.seconds) if training.seconds else Length(steps=training.steps)

    def fork_length(self, task: Task) -> Length | None:
        """How long the task's fork is trained; None where it has none."""
        begun = read_rung(0, self.plan, self.place) if task.fold == "0" else None
        return None if begun is None else begun.lengths.get(task.configuration)

    def least_seconds(self, task: Task) -> float:
        """Seconds that a whole fold trains at least, where it goes on from a fork; else 0."""
        fork = self.fork_length(task)
        return LEAST_GROWTH * fork.seconds if fork is not None and fork.seconds else 0.0

    def is_after_fork(self, task: Task) -> bool:
        """Whether a fold goes on from a fork, there is one already or not."""
        first = next(self._rungs(), None)
        contested = len(self.contenders) > 1 and any(task.configuration in c.members for c in self.contenders)
        return task.fold == "0" and contested and first is not None and first.forks

    def require_length(self) -> None:
        """Hold the steps that are asked for against what is there. Raises PlanError where forks took as many already.

        Folds that ended after others are warned of: they stay as they are.
        """
        if self.steps is None or self.timed:
            return
        tasks = [Task(name, fold) for name in self.configurations for fold in self.names]
        forks = [fork.steps for task in tasks if (fork := self.fork_length(task)) is not None and fork.steps]
        if max(forks, default=0) >= self.steps:
            raise PlanError(
                f"{self.place.models / RUNGS}: the forks that are compared first have {max(forks)} steps, so whole "
                f"folds need more than {self.steps}; give the --steps that it was begun with, or delete "
                f"{self.place.models} to begin anew."
            )
        others = [
            f"{task} ({standing.limits.steps or 'no number of'} steps)"
            for task in tasks
            if self.is_done(task)
            and (standing := self._standing(task)) is not None
            and standing.limits.steps != self.steps
        ]
        if others:
            log.warning(
                "%s: --steps %d holds for the folds that are left; trained to their end, and kept, are %s.",
                self.place.root, self.steps, "; ".join(others),
            )  # fmt: skip

    def require_seed(self, seed: int) -> None:
        """Hold the seed against those of what is there. Raises PlanError where a begun fold has another.

        Folds that ended with another are warned of: they stay as they are.
        """
        tasks = [Task(name, fold) for name in self.configurations for fold in self.names]
        standings = {task: standing for task in tasks if (standing := self._standing(task)) is not None}
        other = {task: standing.seed for task, standing in standings.items() if standing.seed != seed}
        begun = next((task for task in other if not self.is_done(task)), None)
        if begun is not None:
            raise PlanError(
                f"{self.place.fold(begun.configuration, begun.fold)}: this training was begun with --seed "
                f"{other[begun]}, now it is {seed}; give the same, or delete the folder to begin it anew."
            )
        others = [f"{task} (seed {before})" for task, before in other.items()]
        if others:
            log.warning(
                "%s: --seed %d holds for the folds that are left; trained to their end, and kept, are %s.",
                self.place.root, seed, "; ".join(others),
            )  # fmt: skip

    # ---- what is there

    def _standing(self, task: Task) -> Standing | None:
        return standing_of(self.plan, self.place.fold(task.configuration, task.fold))

    def is_done(self, task: Task) -> bool:
        """Whether a fold is trained to its end by this plan and its held-out cases are scored."""
        standing = self._standing(task)
        if standing is None or is_of_length(standing, self.fork_length(task)):
            return False
        return self._is_scored(task, standing)

    def is_begun(self, task: Task) -> bool:
        """Whether a training of the fold is there."""
        return self._standing(task) is not None

    def is_fork(self, task: Task) -> bool:
        """Whether what is there of a fold is its fork, trained to the end of that or not."""
        standing = self._standing(task)
        return standing is not None and is_of_length(standing, self.fork_length(task))

    def is_forked(self, task: Task) -> bool:
        """Whether the fork of a fold is trained and scored."""
        standing = self._standing(task)
        if standing is None or not is_of_length(standing, self.fork_length(task)):
            return False
        return self._is_scored(task, standing)

    def _is_scored(self, task: Task, standing: Standing) -> bool:
        if not standing.finished or standing.plan != self.plan.id:
            return False
        folder = self.place.fold(task.configuration, task.fold)
        summary, checkpoint = folder / VALIDATION / SUMMARY, folder / CHECKPOINT
        if not summary.is_file() or not checkpoint.is_file():
            return False
        content = read_json(summary, error=PlanError, what="summary of scores", remedy="delete it")
        if not isinstance(content, dict) or content.get(SCORED) != checkpoint_id(checkpoint):
            return False
        return is_of_split(self.plan, task.configuration, task.fold, workspace=self.place)

    def is_complete(self, contender: Contender) -> bool:
        """Whether every fold of all of its configurations is done."""
        return all(self.is_done(Task(name, fold)) for name in contender.configurations for fold in self.names)

    def trained_seconds(self) -> dict[str, float]:
        """Of each configuration, over all of its folds."""
        standings = {c.name: [self._standing(Task(c.name, f)) for f in self.names] for c in self.plan.configurations}
        return {name: sum(s.seconds for s in found if s is not None) for name, found in standings.items()}

    def rows(self) -> list[Row]:
        """Every fold of every configuration, as it stands."""
        left = {name for contender in self.round().contenders for name in contender.configurations}
        given_up = {name for contender in self.contenders for name in contender.configurations} - left
        return [
            self._row(Task(name, fold), dropped=name in given_up) for name in self.configurations for fold in self.names
        ]

    def _row(self, task: Task, *, dropped: bool) -> Row:
        if self.is_done(task):
            return Row(task, "done", self._dice(task))
        if self.is_forked(task):
            return Row(task, "dropped" if dropped else "fork", self._dice(task))
        return Row(task, "dropped" if dropped else "waiting")

    def _dice(self, task: Task) -> float | None:
        path = self.place.fold(task.configuration, task.fold) / VALIDATION / SUMMARY
        mean = read_json(path, error=PlanError, what="summary of scores").get("mean", {})
        return mean.get("dice", {}).get("mean")

    # ---- how long it takes

    def works(self, pace: Pace) -> list[Work]:
        """All that is still to be trained and compared; before the first rung half of the contenders, it is thought."""
        now = self.round()
        forking = now.rung is not None and now.rung.forks
        chance = math.ceil(len(now.contenders) / 2) / len(now.contenders) if forking and now.contenders else 1.0
        found: list[Work] = []
        for contender in (*now.contenders, *self.others):
            stays = forking and contender in now.contenders and self._forks_few_steps(contender)
            for name in contender.configurations:
                forks = forking and name in contender.members and contender in now.contenders
                for fold in self.names:
                    likely = chance if forks and not (stays and fold == "0") else 1.0
                    found += self._works_of(Task(name, fold), pace, chance=likely, forks=forks and fold == "0")
        rungs = self.open_rungs() if now.rung is not None else []
        configurations = [name for contender in now.contenders for name in contender.members]
        for rung in rungs:
            cases = sum(len(self.folds[int(fold)].validation) for fold in rung.folds)
            found.append(Work(left=pace.comparing(len(now.contenders), cases, configurations), chance=chance))
        return found

    def _forks_few_steps(self, contender: Contender, fold_seconds: float | None = None) -> bool:
        """Whether a contender's fork will hardly have taken LEAST_STEPS, so that only a whole fold can drop it."""
        return any(self._expected_steps(name, fold_seconds) < LEAST_STEPS for name in contender.members)

    def _expected_steps(self, configuration: str, fold_seconds: float | None) -> float:
        """Of its fork, by the forecast; infinite where nothing tells. Without the length of a fold that of the plan."""
        whole = Length(seconds=fold_seconds) if fold_seconds else self.length(configuration)
        length = self.fork_length(Task(configuration, "0")) or whole.share(FORK_SHARE)
        if length.steps is not None:
            return length.steps
        forecast = self.plan.forecasts.get(configuration)
        each = forecast.seconds_per_step if forecast is not None else 0.0
        return (length.seconds or 0.0) / each if each else math.inf

    def can_drop(self, rung: Rung, contenders: Sequence[Contender], fold_seconds: float | None = None) -> bool:
        """Whether a comparison may end with candidates dropped; not where all of their forks are too short for it."""
        return not rung.forks or not all(self._forks_few_steps(one, fold_seconds) for one in contenders)

    def _works_of(self, task: Task, pace: Pace, *, chance: float, forks: bool) -> list[Work]:
        """What a fold still needs: the fork that is compared first, and the rest."""
        if self.is_done(task):
            return []
        cases = len(self.folds[int(task.fold)].validation)
        beside = pace.starting + pace.predicting(task.configuration, cases)
        beside_fork = pace.starting + pace.predicting(task.configuration, cases, mirroring=False)
        standing, fork = self._standing(task), self.fork_length(task)
        if standing is None and not forks:
            return [Work(beside=beside, chance=chance)]
        if standing is None:
            first = Work(share=FORK_SHARE, beside=beside_fork, left=None if fork is None else fork.seconds)
            return [first, Work(share=1 - FORK_SHARE / 2, beside=beside, chance=chance)]
        if fork is None or not is_of_length(standing, fork):
            return [Work(left=max(0.0, (standing.limits.seconds or 0.0) - standing.seconds), beside=beside)]
        rest = Work(credit=(fork.seconds or 0.0) / 2, beside=beside, chance=chance)
        if self.is_forked(task):
            return [rest]
        return [Work(left=max(0.0, (fork.seconds or 0.0) - standing.seconds), beside=beside_fork), rest]

    def fork_cases(self, task: Task, pace: Pace) -> tuple[str, ...] | None:
        """The held-out cases that a fork predicts: fewer where that takes longer than it was trained; None: all."""
        names, fork = self.folds[int(task.fold)].validation, self.fork_length(task)
        if fork is None or not fork.seconds:
            return None
        each = pace.predicting(task.configuration, 1, mirroring=False)
        most = max(FEW_CASES, int(MOST_FORK_PREDICTION * fork.seconds / each)) if each else len(names)
        if most >= len(names):
            return None
        drawn = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:most]
        return tuple(
            sorted(drawn)
        )  # not the first ones, which may all be of one hospital; of any two draws one is part

    # ---- who goes on

    def judged(self, now: Round, dataset: RawDataset, *, workers: int) -> Rung:
        """The rung of a round whose tasks are done, decided.

        Who has nothing left to train is not dropped, nor whose fork has taken few steps.
        """
        assert now.rung is not None
        kept = {one.name: "nothing is left to train" for one in now.contenders if self.is_complete(one)}
        if now.rung.forks:
            few = f"its fork has taken fewer than {LEAST_STEPS} steps"
            kept |= {one.name: few for one in now.contenders if self._is_new(one)}
        return judge(
            now.rung,
            now.contenders,
            dataset=dataset,
            plan=self.plan,
            workspace=self.place,
            keep=kept,
            trained_seconds=self.trained_seconds(),
            workers=workers,
        )

    def _is_new(self, contender: Contender) -> bool:
        """Whether a contender has trained for fewer than LEAST_STEPS."""
        found = [self._standing(Task(name, self.names[0])) for name in contender.members]
        return min(0 if standing is None else standing.steps for standing in found) < LEAST_STEPS


def standing_of(plan: Plan, folder: Path) -> Standing | None:
    """Where a fold's training stands.

    None where there is none, or one that was stopped before its first step and belongs to a plan before: only trained
    folds hold a plan fast.
    """
    standing = read_standing(folder)
    if standing is None or standing.plan == plan.id or (folder / CHECKPOINT).exists():
        return standing
    return None


def is_of_length(standing: Standing, length: Length | None) -> bool:
    """Whether a training has just this budget."""
    return length == Length(standing.limits.steps, standing.limits.seconds)
