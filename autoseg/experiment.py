"""A raw dataset and a time budget -> everything: plan, store, trained folds, what was chosen, model, report.

State is the artefacts on disk: whatever is finished and still right is not made again, so a run that was stopped or
killed is simply started again. Two runs never work in one workspace.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.dataset import RawDataset
from autoseg.errors import PlanError
from autoseg.files import remove_leftovers
from autoseg.locks import alone
from autoseg.pipeline import is_of_split, plan_and_preprocess, train, validate, workspace_of
from autoseg.plan import Plan
from autoseg.workspace import CHECKPOINT, HISTORY, SUMMARY, VALIDATION, Workspace

if TYPE_CHECKING:
    from autoseg.inference.selection import Selection
    from autoseg.training.loop import Progress

log = logging.getLogger(__name__)

TRAINING_SHARE = 0.85  # of a run's time that trains; the rest plans, preprocesses, predicts held-out cases and reports
LEAST_FOLD_SECONDS = 10.0  # what a fold gets even where the time is spent


@dataclass(frozen=True)
class Task:
    """One fold of one configuration."""

    configuration: str
    fold: str

    def __str__(self) -> str:
        return f"{self.configuration}, fold {self.fold}"


@dataclass(frozen=True)
class Job:
    """A fold to be trained to a budget, predicted and scored: plain values, so that any process can be given it."""

    dataset: Path
    """The raw dataset."""
    workspace: Path
    """`<workspace>/<dataset name>/`, with plan.json, folds.json and the filled store."""
    configuration: str
    fold: str
    seconds: float | None = None
    """Training time; what was begun keeps the time that it was begun with."""
    steps: int | None = None
    """Or steps; without either the plan says how long."""
    device: str = "auto"
    workers: int = 1
    """Processes that score the predictions."""
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.configuration}, fold {self.fold}"


@dataclass(frozen=True)
class JobDone:
    """What became of a job, and the seconds that it took."""

    job: Job
    finished: bool
    """False where a stop signal ended the training before its budget did; it is not predicted then."""
    training_seconds: float
    """With the start of the training and the end of its files."""
    predicting_seconds: float
    """To predict and score what was held out."""


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    plan: Plan
    workspace: Workspace
    selection: Selection | None
    """None where the run was stopped before every fold was there."""
    finished: bool

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.workspace.model.with_suffix(".zip")


def run(
    dataset_root: Path,
    *,
    workspace: Path | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    gpu_memory_bytes: int | None = None,
    configurations: Sequence[str] | None = None,
    drop_broken: bool = False,
    group_by: str | None = None,
    folds: Path | None = None,
    licence: str = "not stated",
    device: str = "auto",
    workers: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    on_part: Callable[[str], None] = lambda part: None,
    on_step: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Plan, preprocess, train and validate every fold, choose by cross-validation, export and report.

    `seconds` is the time for everything, divided over the folds that are left; `steps` trains each fold for so many
    steps instead. Without either the plan's own budget of a fold holds. `stop` is asked after each step and each part:
    when it says yes the run ends where it is, to be started again. Raises what the parts raise, and StorageError where
    another run works in the workspace.
    """
    began = clock()
    place = workspace_of(dataset_root, workspace)
    with alone(place.lock, what=f"{place.root}: another run works here"):
        remove_leftovers(place.root)
        on_part("planning and preprocessing")
        planned = plan_and_preprocess(
            dataset_root,
            workspace=workspace,
            gpu_memory_bytes=gpu_memory_bytes,
            fold_seconds=_fold_seconds(place, seconds, configurations),
            configurations=configurations,
            drop_broken=drop_broken,
            group_by=group_by,
            folds=folds,
            device=device,
            workers=workers,
        )
        plan = planned.plan
        tasks = find_tasks(plan, place, drop_cases=planned.dropped)
        predicting = 0.0  # seconds of the longest predictions so far
        for number, task in enumerate(tasks):
            if is_done(task, plan, place):
                continue
            on_part(f"{task} ({number + 1} of {len(tasks)})")
            waiting = [other for other in tasks[number:] if not is_done(other, plan, place)]
            budget = None
            if seconds is not None and steps is None:
                left = seconds * (1 + TRAINING_SHARE) / 2 - (clock() - began)
                budget = max(LEAST_FOLD_SECONDS, left / len(waiting) - predicting)
            job = Job(
                Path(dataset_root), place.root, task.configuration, task.fold,
                seconds=budget, steps=steps, device=device, workers=workers, seed=seed,
            )  # fmt: skip
            done = run_job(job, on_step=on_step, stop=stop, clock=clock)
            if not done.finished or stop():
                return Outcome(plan, place, None, finished=False)
            predicting = max(predicting, done.predicting_seconds)
        on_part("choosing")
        selection = _select(Path(dataset_root), plan, place, workers=workers)
        on_part("exporting the model and writing the report")
        _deliver(place, selection, licence=licence)
        return Outcome(plan, place, selection, finished=True)


def find_tasks(plan: Plan, place: Workspace, *, drop_cases: Sequence[str] | dict[str, str] = ()) -> list[Task]:
    """Every fold of every configuration, a previous stage before the one that needs it; folds are made if missing."""
    from autoseg.preprocessing.store import Store
    from autoseg.training.folds import load_or_make_folds

    order = sorted(plan.configurations, key=lambda c: c.previous_stage is not None)
    cases = [case for case in Store(place.store(order[0].preprocessing)).cases() if case not in set(drop_cases)]
    folds = load_or_make_folds(place.folds, cases)
    return [Task(c.name, str(fold)) for c in order for fold in range(len(folds))]


def is_done(task: Task, plan: Plan, place: Workspace) -> bool:
    """Whether a fold is trained to its end by this plan and its held-out cases are scored."""
    from autoseg.training.loop import read_standing

    folder = place.fold(task.configuration, task.fold)
    summary, checkpoint = folder / VALIDATION / SUMMARY, folder / CHECKPOINT
    standing = read_standing(folder)
    if standing is None or not standing.finished or standing.plan != plan.id:
        return False
    if not is_of_split(plan, task.configuration, task.fold, workspace=place):
        return False
    return summary.is_file() and checkpoint.is_file() and summary.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns


def run_job(
    job: Job,
    *,
    on_step: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> JobDone:
    """Train a fold, or go on with it, then predict and score its held-out cases: only what is missing on the disk.

    A job needs of others only that the folds of its previous stage are done, so jobs may run at the same time, in any
    process and on any machine that sees both folders; no two of them on one fold. A job that was killed is run again,
    here or elsewhere. Raises PlanError, CheckpointError, StorageError, WorkerError.
    """
    from autoseg.training.loop import read_standing

    place = Workspace(job.workspace)
    plan = Plan.load(place.plan)
    folder = place.fold(job.configuration, job.fold)
    began = clock()
    standing = read_standing(folder)
    if standing is None:
        (folder / HISTORY).unlink(missing_ok=True)  # of a run that was killed before it could save: it begins anew
    if standing is None or not standing.finished:
        trained = train(
            plan,
            job.configuration,
            job.fold,
            workspace=place,
            device=job.device,
            seconds=job.seconds if standing is None else None,
            steps=job.steps,
            resume=standing is not None,
            seed=job.seed,
            on_step=on_step,
            stop=stop,
        )
        if not trained.finished:
            return JobDone(job, False, clock() - began, 0.0)
    middle = clock()
    if not stop():
        validate(
            job.dataset, plan, job.configuration, job.fold, workspace=place, device=job.device, workers=job.workers
        )
    return JobDone(job, not stop(), middle - began, clock() - middle)


def _select(root: Path, plan: Plan, place: Workspace, *, workers: int) -> Selection:
    from autoseg.inference.selection import select

    stages = {c.previous_stage for c in plan.configurations}
    labelled = [c.name for c in plan.configurations if c.architecture.output_channels and c.name not in stages]
    if not labelled:
        raise PlanError(f"{place.plan}: no configuration predicts labels, so there is nothing to choose by Dice.")
    selection = select(RawDataset.load(root), plan, labelled, workspace=place, workers=workers)
    selection.save(place.selection)
    return selection


def _deliver(place: Workspace, selection: Selection, *, licence: str) -> None:
    from autoseg.inference.package import export_model
    from autoseg.report import write_report

    names = [member.configuration for member in selection.chosen.members]
    for output in (place.model, place.model.with_suffix(".zip")):
        export_model(place, names, output, licence=licence, selection=place.selection, replace=True)
    write_report(place)


def _fold_seconds(place: Workspace, seconds: float | None, configurations: Sequence[str] | None) -> float | None:
    """Training time of one fold: that of the plan that is there, else an even share of the run's."""
    from autoseg.training.folds import FOLDS

    if seconds is None:
        return None
    if place.plan.exists():
        with contextlib.suppress(PlanError):
            plan = Plan.load(place.plan)
            if any(place.models.glob(f"*/fold_*/{CHECKPOINT}")):
                return plan.budget.fold_seconds or None
    return seconds * TRAINING_SHARE / (FOLDS * len(configurations or ("one",)))
