"""A raw dataset and a time budget -> everything: plan, store, trained folds, what was chosen, model, report.

State is the artefacts on disk: whatever is finished and still right is not made again, so a run that was stopped or
killed is simply started again. Two runs never work in one workspace. `autoseg.contest` says what comes next.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import math
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.dataset import RawDataset
from autoseg.errors import PlanError
from autoseg.executor import Executor, Files, LocalExecutor, Needs
from autoseg.files import remove_leftovers
from autoseg.locks import alone
from autoseg.plan import Plan
from autoseg.stages import plan_and_preprocess, train, validate, workspace_of
from autoseg.training.loggers import NO_LOGS, Logs, require_reachable
from autoseg.units import format_seconds
from autoseg.workspace import CHECKPOINT, HISTORY, RESUME, Workspace

if TYPE_CHECKING:
    from autoseg.agenda import Agenda
    from autoseg.contest import Contest, Round, Row, Task
    from autoseg.experiment_planning.superresolution import Asked
    from autoseg.forecast import Pace
    from autoseg.inference.rungs import Length
    from autoseg.inference.selection import Selection
    from autoseg.training.folds import Fold
    from autoseg.training.loop import Progress

log = logging.getLogger(__name__)

TRAINING_SHARE = 0.85  # of a run's time that trains; the rest plans, preprocesses, predicts held-out cases and reports
PLANNED_OTHERWISE = 3.0  # times as long or as short as planned: a fold's network would be another one
AIMED_SHARE = 0.98  # of the time for everything at which a run means to end
LEAST_FOLD_SECONDS = 10.0  # what a fold gets even where the time is spent
CORES_BESIDE_GPU = 4  # that prepare patches for it
PROCESS_BYTES = 2 * 10**9  # of memory that a training takes beside its step: libraries, patches that wait


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
    loaders: int | None = None
    """Processes that prepare patches; None: by the cores of the machine."""
    seed: int = 0
    logs: Logs = NO_LOGS
    """What is told of the training besides history.csv."""
    before: Length | None = None
    """The length of a fork that was trained first: a training with this budget goes on with the one of the job."""
    is_fork: bool = False
    """Whether this is such a fork: it is predicted without mirroring and pictures."""
    cases: tuple[str, ...] | None = None
    """Of the held-out ones, those that are predicted; all of them by default."""

    def __str__(self) -> str:
        return f"{self.configuration}, fold {self.fold}" + (", a part of its training" if self.is_fork else "")


@dataclass(frozen=True)
class JobDone:
    """What became of a job, and the seconds that it took."""

    job: Job
    finished: bool
    """False where a stop signal ended the training before its budget did; it is not predicted then."""
    starting_seconds: float = 0.0
    """To start the training and to end it, beside the steps."""
    predicting_seconds: float = 0.0
    """To predict and score what was held out; 0 where that was there already."""


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
    asked: Asked | None = None,
    drop_broken: bool = False,
    group_by: str | None = None,
    folds: Path | None = None,
    licence: str | None = None,
    device: str = "auto",
    workers: int = 1,
    executor: Executor | None = None,
    seed: int = 0,
    logs: Logs = NO_LOGS,
    clock: Callable[[], float] = time.monotonic,
    on_part: Callable[[str], None] = lambda part: None,
    on_step: Callable[[Progress], None] | None = None,
    on_rows: Callable[[Sequence[Row], Collection[Task]], None] = lambda rows, running: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Plan, preprocess, train and validate the folds of every candidate, choose, export and report.

    `seconds` is the time for everything, that of runs before which were ended too; it is divided over the folds that
    are left, anew for each of them. `asked` are the grids of super-resolution. `steps` trains each fold for so many
    steps instead. Without either the plan's own length of a fold holds. A plan that is there stays, unless something
    else is asked for. Candidates that are beaten are trained no further. `on_rows` is told how every fold stands and
    which are being trained. Cases are preprocessed and folds are trained by the `executor`, by default on this machine.
    `stop` is asked after each step and each part: when it says yes the run ends where it is, to be started again.
    Raises what the parts raise, and StorageError where another run works in the workspace.
    """
    began, timed = clock(), seconds is not None and steps is None
    watch = _Watch(on_part, on_step, on_rows, stop, clock)
    dataset_root, trainers = Path(dataset_root).resolve(), executor or LocalExecutor(workers)
    require_reachable(logs, trainers.machines())
    place = workspace_of(dataset_root, workspace)
    with alone(place.lock, what=f"{place.root}: another run works here"):
        remove_leftovers(place.root)
        on_part("planning and preprocessing")
        planned = plan_and_preprocess(
            dataset_root,
            workspace=workspace,
            gpu_memory_bytes=gpu_memory_bytes,
            fold_seconds=_fold_seconds(place, seconds),
            configurations=configurations,
            asked=asked,
            drop_broken=drop_broken,
            group_by=group_by,
            folds=folds,
            reuse_plan=True,
            device=device,
            workers=workers,
            executor=executor,
        )
        from autoseg.contest import Contest
        from autoseg.forecast import Pace

        plan = planned.plan
        split = find_folds(plan, place, drop_cases=planned.dropped)
        contest = Contest(plan, place, split, steps, timed, tuple(configurations or ()))
        contest.require_length()
        contest.require_seed(seed)
        pace = Pace(plan, workers)
        ends = began + AIMED_SHARE * seconds - _spent(contest) if timed and seconds is not None else None
        if timed and seconds is not None and not _spent(contest):
            _warn_of_other_length(contest, _fold_time(contest, pace, seconds))

        form = Job(dataset_root, place.root, "", "", device=device, workers=workers, seed=seed, logs=logs)
        for now in contest.rounds():
            if stop():
                return Outcome(plan, place, None, finished=False)
            left = None if ends is None else ends - clock()
            if now.rung is not None and now.rung.forks and not now.rung.lengths:
                contest.begin_forks(now.rung, fold_seconds=None if left is None else _fold_time(contest, pace, left))
            elif now.tasks:
                jobs = _next_jobs(form, now, contest, pace, left, trainers)
                if not _train_folds(jobs, contest, pace, trainers, device, watch):
                    return Outcome(plan, place, None, finished=False)
            elif now.rung is not None:
                _compare(now, contest, pace, dataset_root, watch, workers=workers)
        on_rows(contest.rows(), ())
        on_part("choosing")
        selection = _select(dataset_root, contest, workers=workers)
        on_part("exporting the model and writing the report")
        _deliver(place, selection, licence=licence)
        return Outcome(plan, place, selection, finished=True)


def outlook(
    dataset_root: Path,
    *,
    workspace: Path | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    gpu_memory_bytes: int | None = None,
    configurations: Sequence[str] | None = None,
    asked: Asked | None = None,
    drop_broken: bool = False,
    group_by: str | None = None,
    folds: Path | None = None,
    device: str = "auto",
    workers: int = 1,
    seed: int = 0,
    keep: bool = True,
) -> tuple[Contest, Agenda]:
    """What `run` with these arguments has before it; it is planned as that would, and nothing is preprocessed.

    The plan is kept where none is there, or with `keep`; then nobody else may work in the workspace. Raises what
    planning raises, and what `run` does before it trains.
    """
    timed = seconds is not None and steps is None
    place = workspace_of(dataset_root, workspace)
    save = keep or not place.plan.exists()
    with alone(place.lock, what=f"{place.root}: another run works here") if save else contextlib.nullcontext():
        planned = plan_and_preprocess(
            dataset_root,
            workspace=workspace,
            gpu_memory_bytes=gpu_memory_bytes,
            fold_seconds=_fold_seconds(place, seconds),
            configurations=configurations,
            asked=asked,
            fill_store=False,
            save=save,
            drop_broken=drop_broken,
            reuse_plan=True,
            group_by=group_by,
            folds=folds,
            device=device,
            workers=workers,
        )

    from autoseg.agenda import agenda
    from autoseg.contest import Contest
    from autoseg.forecast import Pace
    from autoseg.preprocessing.store import Store
    from autoseg.training.folds import load_folds, make_folds

    plan, names = planned.plan, [case.identifier for case in planned.cases]
    split = planned.folds or (load_folds(place.folds, names) if place.folds.exists() else make_folds(names))
    contest = Contest(plan, place, require_held_out(split, place), steps, timed, tuple(configurations or ()))
    contest.require_length()
    contest.require_seed(seed)
    pace = Pace(plan, workers)
    missing = [one for one in plan.stores() if not all(map(Store(place.store(one)).has, names))]
    preprocessing = len(missing) * pace.preprocessing([case.shape for case in planned.cases])
    whole = None
    if timed and seconds is not None:
        whole = _fold_time(contest, pace, AIMED_SHARE * seconds - _spent(contest) - preprocessing)
    return contest, agenda(contest, pace, fold_seconds=whole, preprocessing=preprocessing)


def _next_jobs(
    form: Job, now: Round, contest: Contest, pace: Pace, left: float | None, executor: Executor
) -> list[Job]:
    """As many of a round as can be done at the same time, each with its device; one without, where it is done here.

    A configuration at a time, since its needs are its own.
    """
    from autoseg.training.batches import default_workers

    first = now.tasks[0].configuration
    tasks = [task for task in now.tasks if task.configuration == first]
    needs = needs_of(contest.plan, first, form.device)
    places = executor.places(form.device, needs)
    loaders = needs.cores if needs.gpus else default_workers(cores=needs.cores)
    forms = [replace(form, device=device, workers=needs.cores, loaders=loaders) for device in places] or [form]
    turns = math.ceil(len(tasks) / len(forms))
    chosen = zip(forms, tasks, strict=False)
    return [_job(one, task, now, contest, pace, left, at_once=len(tasks) / turns) for one, task in chosen]


def needs_of(plan: Plan, configuration: str, device: str) -> Needs:
    """What a fold takes: a GPU or the threads that a training here would have, and the memory of the forecast."""
    import torch

    from autoseg.device import resolve_device

    threads, forecast = torch.get_num_threads(), plan.forecasts.get(configuration)
    if resolve_device(device).type == "cuda":
        return Needs(CORES_BESIDE_GPU, 1, PROCESS_BYTES)
    return Needs(threads, 0, PROCESS_BYTES + (forecast.memory_bytes if forecast is not None else 0), threads)


def files_of(plan: Plan, place: Workspace, dataset: Path) -> Files:
    """What jobs read and write."""

    def below(folder: Path, pattern: str) -> str:
        return f"{glob.escape(str(folder))}/{pattern}"

    def reads(job: Job) -> list[str]:
        settings = plan.configuration(job.configuration)
        stage = place.models / settings.previous_stage if settings.previous_stage else None
        return [
            below(dataset, "**"),
            below(place.root, "*.json"),
            below(place.store(settings.preprocessing), "*"),
            *([below(stage, "*/validation/*"), below(stage, "next_stage/**")] if stage is not None else []),
            *writes(job),
        ]

    def writes(job: Job) -> list[str]:
        return [below(place.fold(job.configuration, job.fold), "**")]

    return Files((dataset, place.root), reads, writes)


@dataclass(frozen=True)
class _Watch:
    """Who is told of a run, and who may stop it; see `run`."""

    on_part: Callable[[str], None]
    on_step: Callable[[Progress], None] | None
    on_rows: Callable[[Sequence[Row], Collection[Task]], None]
    stop: Callable[[], bool]
    clock: Callable[[], float]


def _train_folds(
    jobs: Sequence[Job], contest: Contest, pace: Pace, executor: Executor, device: str, watch: _Watch
) -> bool:
    """Train folds, at the same time where there are places for it; False where the run was told to stop."""
    from autoseg.contest import Task

    left = {Task(job.configuration, job.fold) for job in jobs}
    watch.on_rows(contest.rows(), left)
    watch.on_part("; ".join(map(str, jobs)))
    with contextlib.closing(_done(jobs, contest.plan, executor, device, watch)) as ended:
        for done in ended:
            if not done.finished:
                return False
            _take_note(done, contest, pace)
            left.discard(Task(done.job.configuration, done.job.fold))
            if left:
                watch.on_rows(contest.rows(), left)
    return True


def _compare(now: Round, contest: Contest, pace: Pace, dataset: Path, watch: _Watch, *, workers: int) -> None:
    """Decide who of a round goes on."""
    assert now.rung is not None
    watch.on_part(f"comparing {len(now.contenders)} candidates: {now.rung.name}")
    start = watch.clock()
    decided = contest.judged(now, RawDataset.load(dataset), workers=workers)
    decided.save(contest.place)
    pace.compared(len(now.contenders), decided.cases, watch.clock() - start)
    for decision in decided.decisions():
        watch.on_part(f"{decision.name}: {decision.because}")


def _done(
    jobs: Sequence[Job], plan: Plan, executor: Executor, device: str, watch: _Watch
) -> Generator[JobDone, None, None]:
    """Each job when it is done; `device` is what the user asked for.

    Raises the error of the first that fails; the others are ended.
    """
    first = jobs[0]
    needs = needs_of(plan, first.configuration, device)
    if not executor.places(device, needs):
        yield run_job(first, on_step=watch.on_step, stop=watch.stop, clock=watch.clock)
        return
    from autoseg.inference.cascade import prepare_previous_stage

    place = Workspace(first.workspace)
    prepare_previous_stage(plan, first.configuration, workspace=place, workers=first.workers)  # once, for all of them
    results = executor.map(
        run_job,
        jobs,
        names=[f"{job}" for job in jobs],
        needs=needs,
        files=files_of(plan, place, first.dataset),
        stop=watch.stop,
    )
    count = 0
    with contextlib.closing(results):
        for _, result in results:
            if isinstance(result, Exception):
                raise result
            count += 1
            yield result
    if count < len(jobs):  # it was told to stop
        yield JobDone(first, finished=False)


def _job(one: Job, task: Task, now: Round, contest: Contest, pace: Pace, left: float | None, *, at_once: float) -> Job:
    """The job of a task of a round; `left` are the seconds of the time for everything, if that was asked for."""
    job = replace(one, configuration=task.configuration, fold=task.fold)
    fork = contest.fork_length(task)
    if fork is not None and now.forks(task):
        cases = contest.fork_cases(task, pace)
        return replace(job, steps=fork.steps, seconds=fork.seconds, is_fork=True, cases=cases)
    if left is None:
        length = contest.length(task.configuration)
        return replace(job, steps=length.steps, seconds=length.seconds, before=fork)
    seconds = max(_fold_time(contest, pace, left, at_once=at_once), contest.least_seconds(task))
    return replace(job, seconds=seconds, before=fork)


def _take_note(done: JobDone, contest: Contest, pace: Pace) -> None:
    """What a job took is what the next ones will."""
    job = done.job
    pace.starting = max(pace.starting, done.starting_seconds)
    if done.predicting_seconds:
        cases = len(job.cases or contest.folds[int(job.fold)].validation)
        pace.predicted(job.configuration, cases, done.predicting_seconds, mirroring=not job.is_fork)


def _fold_time(contest: Contest, pace: Pace, left: float, *, at_once: float = 1) -> float:
    """Seconds that a whole fold may train, when all that is still to be done shall end in `left` seconds.

    `at_once`: folds that are trained at the same time, on the average.
    """
    from autoseg.forecast import fold_seconds

    names = [name for contender in contest.round().contenders for name in contender.members]
    cases = sum(len(fold.validation) for fold in contest.folds)
    seconds = fold_seconds(at_once * (left - pace.finishing(names, cases)), contest.works(pace))
    if seconds < LEAST_FOLD_SECONDS:
        log.warning(
            "%s: the time is spent; each fold that is left trains for %d s, and the run ends later than was asked.",
            contest.place.root, LEAST_FOLD_SECONDS,
        )  # fmt: skip
    return max(LEAST_FOLD_SECONDS, seconds)


def _warn_of_other_length(contest: Contest, fold_seconds: float) -> None:
    """Tell that the plan, which nobody has trained by yet, was made for folds much longer or shorter than these."""
    planned = contest.plan.budget.fold_seconds
    if planned and not 1 / PLANNED_OTHERWISE < fold_seconds / planned < PLANNED_OTHERWISE:
        log.warning(
            "%s was made for folds of %s, and this time leaves each about %s; delete it to have one made for that.",
            contest.place.plan, format_seconds(planned), format_seconds(fold_seconds),
        )  # fmt: skip


def _spent(contest: Contest) -> float:
    """About the seconds that earlier runs, which were ended, have worked: from what they trained."""
    return sum(contest.trained_seconds().values()) / TRAINING_SHARE


def find_folds(plan: Plan, place: Workspace, *, drop_cases: Collection[str] = ()) -> tuple[Fold, ...]:
    """The folds; they are made if missing. Raises PlanError where one holds nothing out: it could not be compared."""
    from autoseg.preprocessing.store import Store
    from autoseg.training.folds import load_or_make_folds

    store = Store(place.store(plan.configurations[0].preprocessing))
    return require_held_out(
        load_or_make_folds(place.folds, [case for case in store.cases() if case not in drop_cases]), place
    )


def require_held_out(folds: Sequence[Fold], place: Workspace) -> tuple[Fold, ...]:
    """The folds. Raises PlanError where one holds nothing out: it could not be compared."""
    idle = next((str(number) for number, fold in enumerate(folds) if not fold.validation), None)
    if idle is not None:
        raise PlanError(
            f"{place.folds}: fold {idle} holds out no case, and a run chooses by held-out cases; leave it out of "
            "the file, or train it with `autoseg train-fold` alone."
        )
    return tuple(folds)


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
    from autoseg.contest import is_of_length, standing_of

    place = Workspace(job.workspace)
    plan = Plan.load(place.plan)
    folder = place.fold(job.configuration, job.fold)
    began = clock()
    standing = standing_of(plan, folder)
    if standing is None:  # what is there is of a run that was ended before it had a model: it begins anew
        for left in (HISTORY, RESUME):
            (folder / left).unlink(missing_ok=True)
    forked = standing is not None and job.before is not None and is_of_length(standing, job.before)
    timer = _Timer(clock, on_step)
    if standing is None or forked or not standing.finished:
        trained = train(
            plan,
            job.configuration,
            job.fold,
            workspace=place,
            device=job.device,
            seconds=job.seconds if standing is None or forked else None,
            steps=job.steps,
            resume=standing is not None,
            seed=job.seed,
            workers=job.loaders,
            logs=job.logs,
            on_step=timer,
            stop=stop,
        )
        if not trained.finished:
            return JobDone(job, finished=False)
    middle = clock()
    if stop():
        return JobDone(job, finished=False)
    validate(
        job.dataset,
        plan,
        job.configuration,
        job.fold,
        workspace=place,
        cases=job.cases,
        mirroring=not job.is_fork,
        pictures=not job.is_fork,
        device=job.device,
        workers=job.workers,
    )
    return JobDone(job, True, max(0.0, middle - began - timer.training_seconds), clock() - middle)


class _Timer:
    """Passes a training's progress on, and takes the time between its first and its last step."""

    def __init__(self, clock: Callable[[], float], on_step: Callable[[Progress], None] | None) -> None:
        self._clock, self._on_step = clock, on_step
        self._first: float | None = None
        self.training_seconds = 0.0

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if self._first is None:
            self._first = now
        self.training_seconds = now - self._first
        if self._on_step is not None:
            self._on_step(progress)


def _select(root: Path, contest: Contest, *, workers: int) -> Selection:
    from autoseg.inference.image_selection import select_by_image
    from autoseg.inference.selection import select

    plan, place = contest.plan, contest.place
    if contest.contenders:
        names = [name for contender in contest.round().contenders for name in contender.members]
        selection = select(RawDataset.load(root), plan, names, workspace=place, rungs=contest.rungs(), workers=workers)
    else:
        selection = select_by_image(plan, contest.configurations, workspace=place)
    selection.save(place.selection)
    return selection


def _deliver(place: Workspace, selection: Selection, *, licence: str | None) -> None:
    """Model and report; without a `licence` that of the model which is there holds on."""
    from autoseg.inference.package import NO_LICENCE, export_model, licence_of
    from autoseg.report import write_report

    names = [member.configuration for member in selection.chosen.members]
    licence = licence or licence_of(place.model) or NO_LICENCE
    for output in (place.model, place.model.with_suffix(".zip")):
        export_model(place, names, output, licence=licence, selection=place.selection, replace=True)
    write_report(place)


def _fold_seconds(place: Workspace, seconds: float | None) -> Callable[[Sequence[str]], float] | float | None:
    """Training time of one fold: that of the plan that is there, else a share of the run's, by its candidates."""
    if seconds is None:
        return None
    if place.plan.exists():
        with contextlib.suppress(PlanError):
            plan = Plan.load(place.plan)
            if any(place.models.glob(f"*/fold_*/{CHECKPOINT}")):
                return plan.budget.fold_seconds or None
    return functools.partial(_planned_fold_seconds, seconds)


def _planned_fold_seconds(seconds: float, candidates: Sequence[str]) -> float:
    """What a fold is planned for, before anything is measured: half of the candidates are trained to the end."""
    from autoseg.inference.halving import FORK_SHARE
    from autoseg.training.folds import FOLDS

    count = len(candidates)
    forks = count * FORK_SHARE / 2 if count > 1 else 0.0
    return seconds * TRAINING_SHARE / (forks + FOLDS * math.ceil(count / 2))
