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
from autoseg.pipeline import plan_and_preprocess, train, validate, workspace_of
from autoseg.plan import Plan
from autoseg.workspace import CHECKPOINT, HISTORY, RESUME, SUMMARY, VALIDATION, Workspace

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
            device=device,
            workers=workers,
        )
        plan = planned.plan
        tasks = find_tasks(plan, place, drop_cases=planned.dropped)
        validating = 0.0  # seconds of the longest validation so far
        for number, task in enumerate(tasks):
            if is_done(task, plan, place):
                continue
            on_part(f"{task} ({number + 1} of {len(tasks)})")
            waiting = [other for other in tasks[number:] if not is_done(other, plan, place)]
            budget = None
            if seconds is not None and steps is None:
                left = seconds * (1 + TRAINING_SHARE) / 2 - (clock() - began)
                budget = max(LEAST_FOLD_SECONDS, left / len(waiting) - validating)
            trained = _train(plan, task, place, budget, steps, device=device, seed=seed, on_step=on_step, stop=stop)
            if not trained or stop():
                return Outcome(plan, place, None, finished=False)
            start = clock()
            validate(dataset_root, plan, task.configuration, task.fold, workspace=place, device=device, workers=workers)
            validating = max(validating, clock() - start)
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
    from autoseg.checkpoint import Checkpoint

    folder = place.fold(task.configuration, task.fold)
    summary = folder / VALIDATION / SUMMARY
    if not summary.is_file() or not (folder / CHECKPOINT).is_file():
        return False
    if summary.stat().st_mtime_ns < (folder / CHECKPOINT).stat().st_mtime_ns:
        return False
    checkpoint = Checkpoint.load(folder / CHECKPOINT)
    return bool(checkpoint.plan.id == plan.id and checkpoint.summary.get("finished"))


def _train(
    plan: Plan,
    task: Task,
    place: Workspace,
    seconds: float | None,
    steps: int | None,
    *,
    device: str,
    seed: int,
    on_step: Callable[[Progress], None] | None,
    stop: Callable[[], bool],
) -> bool:
    """Train a fold, or go on with it; whether it came to its end."""
    folder = place.fold(task.configuration, task.fold)
    resume = (folder / RESUME).exists()
    if not resume and (folder / HISTORY).exists():
        (folder / HISTORY).unlink()  # of a run that was killed before it could save: it begins anew
    if resume and _is_trained(folder):
        return True
    trained = train(
        plan,
        task.configuration,
        task.fold,
        workspace=place,
        device=device,
        seconds=None if resume and steps is None else seconds,  # what was begun keeps its budget
        steps=steps,
        resume=resume,
        seed=seed,
        on_step=on_step,
        stop=stop,
    )
    return trained.finished


def _is_trained(folder: Path) -> bool:
    from autoseg.checkpoint import Checkpoint

    path = folder / CHECKPOINT
    return path.is_file() and bool(Checkpoint.load(path).summary.get("finished"))


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
