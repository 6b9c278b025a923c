"""Held-out predictions of a stage -> what the next stage of a cascade is given: label maps on its own network grid.

Every case is taken from the fold that did not train on it, so the next stage learns from errors as it will meet them.
Written as a store `models/<stage>/next_stage/<store id>/` whose array "label" lines up with the next stage's images.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.errors import AutosegError, PlanError, StorageError
from autoseg.executor import map_cases
from autoseg.files import read_json
from autoseg.image import read_image
from autoseg.labels import Labels
from autoseg.plan import Configuration, Plan
from autoseg.preprocessing.case import bring_label
from autoseg.preprocessing.store import Store
from autoseg.workspace import VALIDATION, Workspace

log = logging.getLogger(__name__)

NEXT_STAGE = "next_stage"


@dataclass(frozen=True)
class HeldOut:
    """A case and the prediction of the fold that held it out."""

    case: str
    prediction: Path

    @property
    def source(self) -> str:
        """Tells one prediction from another: its size and time."""
        status = self.prediction.stat()
        return f"{status.st_size}-{status.st_mtime_ns}"


def prepare_previous_stage(
    plan: Plan,
    configuration: str,
    *,
    workspace: Workspace,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path | None:
    """The store with the previous stage's labels for every training case; None where there is no previous stage.

    Cases that are there and up to date are left as they are. `progress(done, total)` is called after each case.
    Raises PlanError naming every fold of the previous stage that is not trained or not predicted.
    """
    settings = plan.configuration(configuration)
    if settings.previous_stage is None:
        return None
    store = Store(next_stage_folder(workspace, settings))
    source = Store(workspace.store(settings.preprocessing))
    held_out = find_held_out(plan, settings.previous_stage, source.cases(), workspace=workspace)
    todo = [one for one in held_out if not _is_current(store, one)]
    log.info("%s: %d of %d cases are up to date", store.folder, len(held_out) - len(todo), len(held_out))
    bring = functools.partial(bring_to_next_stage, store=store, source=source, labels=plan.labels)
    for done, (_, result) in enumerate(
        map_cases(bring, todo, workers=workers, names=[one.case for one in todo]), start=1
    ):
        if isinstance(result, Exception):
            raise result  # a cascade cannot be trained with a part of its cases
        if progress is not None:
            progress(done, len(todo))
    return store.folder


def next_stage_folder(workspace: Workspace, configuration: Configuration) -> Path:
    """Where the previous stage's labels for this configuration are."""
    assert configuration.previous_stage is not None
    models = workspace.fold(configuration.previous_stage, "0").parent
    return models / NEXT_STAGE / configuration.preprocessing.store_id


def find_held_out(plan: Plan, stage: str, cases: Sequence[str], *, workspace: Workspace) -> list[HeldOut]:
    """For every case its held-out prediction. Raises PlanError with one sentence naming all that are missing."""
    folds = held_out_cases(workspace.folds)
    predictions = {
        case: workspace.fold(stage, str(fold)) / VALIDATION / f"{case}{plan.file_ending}"
        for fold, held_out in enumerate(folds)
        for case in held_out
    }
    unfinished = {
        fold: absent
        for fold, held_out in enumerate(folds)
        if (absent := [case for case in held_out if case in cases and not predictions[case].is_file()])
    }
    if unfinished:
        named = ", ".join(
            f"{fold} ({len(absent)} of {len(folds[fold])} cases not predicted)" for fold, absent in unfinished.items()
        )
        commands = "; ".join(f"`autoseg train-fold DATASET {stage} {fold}`" for fold in unfinished)
        raise PlanError(
            f"A cascade needs the held-out predictions of every fold of {stage}; missing in {workspace.root} are those "
            f"of fold {named}: run {commands}."
        )
    never = [case for case in cases if case not in predictions]
    if never:
        some = ", ".join(never[:5]) + (" ..." if len(never) > 5 else "")
        raise PlanError(
            f"{workspace.folds}: no fold holds out {some}, so {stage} has no unbiased prediction for the next stage; "
            "use folds that hold out every case once."
        )
    return [HeldOut(case, predictions[case]) for case in sorted(cases)]


def bring_to_next_stage(one: HeldOut, *, store: Store, source: Store, labels: Labels) -> None:
    """Read one prediction and write it to `store` on the grid that the case has in `source`. Runs in a worker."""
    entry = source.entry(one.case)
    geometry = entry.label_geometry or entry.geometry
    prediction = read_image(one.prediction)
    if prediction.shape != geometry.original.shape:
        raise StorageError(
            f"Case {one.case}: {one.prediction} has {prediction.shape} voxels (z, y, x), the image "
            f"{geometry.original.shape}; delete it and run `autoseg train-fold` again to predict it anew."
        )
    label = bring_label(prediction, geometry, values=_written_values(labels))
    store.write(one.case, {"label": label}, geometry, {}, source=one.source)


def _written_values(labels: Labels) -> tuple[int, ...]:
    """The values that a prediction may hold."""
    return (0, *labels.region_order) if labels.has_regions else (0, *labels.foreground_values)


def _is_current(store: Store, one: HeldOut) -> bool:
    if not store.has(one.case):
        return False
    try:
        entry = store.entry(one.case)
    except AutosegError:
        return False
    return bool(entry.source == one.source and entry.is_whole())


def held_out_cases(path: Path) -> list[list[str]]:
    """The held-out cases of each fold, from `folds.json`. Raises PlanError where it is missing or broken."""
    content = read_json(path, error=PlanError, what="fold file (the first `autoseg train-fold` makes it)")
    try:
        return [[str(case) for case in fold["val"]] for fold in content]
    except (TypeError, KeyError) as error:
        raise PlanError(f'{path}: expected a list of {{"train": [cases], "val": [cases]}}.') from error
