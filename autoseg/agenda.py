"""A plan -> what a run of it will do: every task, what it waits for and how long it takes; or as plain commands.

Nothing is trained. For the live state of a run see `autoseg.contest`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.contest import Contest, Task
from autoseg.forecast import Pace
from autoseg.inference.halving import FORK_SHARE
from autoseg.inference.rungs import Contender, Length
from autoseg.training.loggers import NO_LOGS, Logs
from autoseg.units import format_seconds

PREPROCESS, CHOOSE = "preprocess", "choose, export, report"


@dataclass(frozen=True)
class Item:
    """One task of a run."""

    name: str
    after: tuple[str, ...]
    """Names of the tasks that must be done before; of what is done already they are left out."""
    seconds: float
    """0 where nothing tells."""


@dataclass(frozen=True)
class Agenda:
    """Every task that is left, in the order of one machine."""

    items: tuple[Item, ...]
    most_seconds: float
    """Where no candidate is dropped."""
    least_seconds: float
    """Where all but one are dropped at the first comparison that can."""

    def table(self) -> str:
        """A line for each task, numbered, with the numbers of those it waits for; then the time in all."""
        numbers = {item.name: str(number) for number, item in enumerate(self.items, start=1)}
        rows = [("", "task", "after", "about")]
        for item in self.items:
            after = _ranges([int(numbers[name]) for name in item.after if name in numbers])
            rows.append((numbers[item.name], item.name, after, format_seconds(item.seconds) if item.seconds else "?"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        most = format_seconds(self.most_seconds)
        total = f"{most} in all"
        if self.least_seconds < self.most_seconds:
            total = f"{format_seconds(self.least_seconds)} to {most} in all, by how many candidates are dropped"
        return "\n".join((*lines, total))


def _ranges(numbers: Sequence[int]) -> str:
    """`2, 4-6`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def agenda(contest: Contest, pace: Pace, *, fold_seconds: float | None, preprocessing: float) -> Agenda:
    """What is left of a run: `fold_seconds` that a whole fold trains, where the time for everything gives it.

    `preprocessing`: seconds of it; 0 where it is done.
    """
    items = [Item(PREPROCESS, (), preprocessing)] if preprocessing else []
    now = contest.round()
    left = list(now.contenders)
    chains = {contender.name: _stage_items(contest, pace, contender, fold_seconds) for contender in left}
    items += [item for chain in chains.values() for item in chain]
    gates = {contender.name: tuple(item.name for item in chains[contender.name]) for contender in left}
    seen: set[str] = {item.name for item in items}
    for rung in contest.open_rungs() if len(left) > 1 else []:
        before: list[str] = []
        for contender in left:
            for task in (Task(name, fold) for name in contender.members for fold in rung.folds):
                name = f"{task}, {100 * rung.share:.0f} % of its training" if rung.forks else f"{task}"
                if name in seen or contest.is_done(task) or (rung.forks and contest.is_forked(task)):
                    continue
                seen.add(name)
                before.append(name)
                items.append(_fold_item(contest, pace, task, name, gates[contender.name], fold_seconds, rung.share))
        compare = f"compare: {rung.name}"
        cases = sum(len(contest.folds[int(fold)].validation) for fold in rung.folds)
        members = [name for contender in left for name in contender.members]
        waits = tuple(before) or tuple(name for gate in gates.values() for name in gate)
        items.append(Item(compare, tuple(dict.fromkeys(waits)), pace.comparing(len(left), cases, members)))
        gates = {contender.name: (compare,) for contender in left}
    for contender in (*left, *contest.others):
        for task in (Task(name, fold) for name in contender.members for fold in contest.names):
            if f"{task}" not in seen and not contest.is_done(task):
                gate = gates.get(contender.name, ())
                items.append(_fold_item(contest, pace, task, f"{task}", gate, fold_seconds, 1.0))
    members = [name for contender in left for name in contender.members]
    cases = sum(len(fold.validation) for fold in contest.folds)
    items.append(Item(CHOOSE, tuple(item.name for item in items), pace.finishing(members, cases)))
    most = sum(item.seconds for item in items)
    can_drop = [f"compare: {rung.name}" for rung in contest.open_rungs() if contest.can_drop(rung, left, fold_seconds)]
    return Agenda(tuple(items), most, most - _saved(items, left, can_drop))


def _stage_items(contest: Contest, pace: Pace, contender: Contender, fold_seconds: float | None) -> list[Item]:
    """Every fold of a previous stage: the next stage is given their predictions."""
    tasks = [Task(name, fold) for name in contender.stages for fold in contest.names]
    return [
        _fold_item(contest, pace, task, f"{task}", (PREPROCESS,), fold_seconds, 1.0)
        for task in tasks
        if not contest.is_done(task)
    ]


def _fold_item(
    contest: Contest, pace: Pace, task: Task, name: str, after: Sequence[str], fold_seconds: float | None, share: float
) -> Item:
    length = Length(seconds=fold_seconds) if fold_seconds else contest.length(task.configuration)
    training = length.share(share)
    forecast = contest.plan.forecasts.get(task.configuration)
    each = forecast.seconds_per_step if forecast is not None else 0.0
    seconds = training.seconds if training.seconds is not None else (training.steps or 0) * each
    if share == 1 and contest.is_after_fork(task):
        seconds *= 1 - FORK_SHARE / 2
    cases = len(contest.folds[int(task.fold)].validation)
    beside = pace.starting + pace.predicting(task.configuration, cases, mirroring=share == 1)
    return Item(name, tuple(after) or (PREPROCESS,), seconds + beside if seconds else 0.0)


def _saved(items: Sequence[Item], contenders: Sequence[Contender], can_drop: Sequence[str]) -> float:
    """Seconds of what comes after the first comparison that can drop, of all contenders but the cheapest to keep."""
    first = next((i for i, item in enumerate(items) if item.name in can_drop), len(items))
    later = items[first + 1 :]
    own = [
        sum(item.seconds for item in later if item.name.partition(",")[0] in contender.members)
        for contender in contenders
    ]
    return sum(own) - min(own, default=0.0) + sum(item.seconds for item in later if item.name.startswith("compare: "))


def commands(
    contest: Contest,
    dataset: Path,
    workspace: Path | None,
    *,
    device: str,
    seed: int,
    logs: Logs = NO_LOGS,
    drop_cases: bool = False,
    licence: str | None = None,
) -> list[str]:
    """The plain commands of a run, for a scheduler of the user's own: preprocess, every fold, then the choice.

    The folds of a previous stage come before those of the next one. Candidates are all trained to their end.
    """
    place = ["--workspace", str(workspace)] if workspace is not None else []
    where = [*place, *(["--device", device] if device != "auto" else [])]
    length = _steps_options(contest)
    same = ["--seed", str(seed)] if seed else []
    same += [word for name in logs.names for word in ("--log", name)]
    same += ["--mlflow-uri", logs.mlflow_uri] if logs.mlflow_uri else []
    names = [name for contender in contest.contenders for name in contender.configurations]
    names += [name for name in contest.configurations if name not in names]
    drop = ["--drop-cases"] if drop_cases else []
    lines = [["autoseg", "plan-and-preprocess", str(dataset), "--keep-plan", *drop, *place]]
    lines += [
        ["autoseg", "train-fold", str(dataset), name, fold, *_length_options(contest, Task(name, fold)), *same, *where]
        for name in names
        for fold in contest.names
        if not contest.is_done(Task(name, fold))
    ]
    candidates = ["--configurations", ",".join(contest.asked)] if contest.asked else []
    terms = ["--licence", licence] if licence else []
    lines.append(["autoseg", "run", str(dataset), *candidates, *length, *drop, *terms, *same, *where])
    return [shlex.join(words) for words in lines]


def _steps_options(contest: Contest) -> list[str]:
    return ["--steps", str(contest.steps)] if contest.steps is not None else []


def _length_options(contest: Contest, task: Task) -> list[str]:
    """Of a fold's training. What was begun goes on to the length that it has, a fork to that of a whole fold."""
    if not contest.is_begun(task):
        return _steps_options(contest)
    if not contest.is_fork(task):
        return ["--continue"]
    whole = contest.length(task.configuration)
    if whole.seconds is None:
        return ["--continue", "--steps", f"{whole.steps}"]
    return ["--continue", "--time", f"{max(whole.seconds, contest.least_seconds(task)):g}s"]
