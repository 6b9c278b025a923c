"""A raw dataset folder -> plan and store; plan and store -> a trained and scored fold. What the commands call."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.dataset import RawDataset, list_cases
from autoseg.errors import CheckpointError, DatasetError, PlanError, StorageError
from autoseg.executor import host_memory_bytes, start_workers, stop_workers
from autoseg.labels import Labels
from autoseg.locks import alone
from autoseg.plan import Budget, Configuration, Plan, PreprocessingSettings, Vector
from autoseg.typed_json import to_json
from autoseg.units import format_bytes, format_seconds
from autoseg.workspace import CHECKPOINT, MODELS, Workspace

if TYPE_CHECKING:
    from autoseg.executor import Executor
    from autoseg.experiment_planning.fingerprint import CaseFingerprint, Fingerprint
    from autoseg.experiment_planning.superresolution import Asked
    from autoseg.inference.summary import Evaluation
    from autoseg.training.distributed import World
    from autoseg.training.folds import Fold
    from autoseg.training.loggers import Logs
    from autoseg.training.loop import Progress, TrainedFold

log = logging.getLogger(__name__)

LOCK_TRIES = 10  # seconds that a training which is being ended may still hold its fold
PATIENCE_SECONDS = 2.0  # that the last cases may take of fewer workers, before all of them start again


@dataclass(frozen=True)
class Planned:
    """What `plan_and_preprocess` did."""

    plan: Plan
    workspace: Workspace
    configurations: tuple[str, ...]
    """The preprocessed ones."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Broken cases that were left out, with the sentence that says why."""
    cases: tuple[CaseFingerprint, ...] = ()
    """Those that were measured, unless the plan was kept unseen."""
    folds: tuple[Fold, ...] = ()
    """That are written, or would be; none where those that are there stay."""

    def summary(self) -> str:
        """The forecast, one line for each configuration, and what to type next."""
        lines = [f"{self.workspace.plan}"]
        for name in self.configurations:
            settings, forecast = self.plan.configuration(name), self.plan.forecasts.get(name)
            patch = "x".join(map(str, settings.patch_size))
            cost = ""
            if forecast is not None:
                cost = f", {format_bytes(forecast.memory_bytes)} a step"
                if forecast.fold_seconds:  # 0 where no step was timed, because the plan is for another machine
                    cost += f", {format_seconds(forecast.fold_seconds)} a fold"
            lines.append(f"  {name}: patch {patch}, batch {settings.batch_size}{cost}")
        return "\n".join(lines)


def plan_and_preprocess(
    dataset_root: Path,
    *,
    workspace: Path | None = None,
    gpu_memory_bytes: int | None = None,
    fold_seconds: float | Callable[[Sequence[str]], float] | None = None,
    configurations: Sequence[str] | None = None,
    asked: Asked | None = None,
    fill_store: bool = True,
    save: bool = True,
    drop_broken: bool = False,
    replan: bool = False,
    keep_plan: bool = False,
    reuse_plan: bool = False,
    group_by: str | None = None,
    folds: Path | None = None,
    device: str = "auto",
    workers: int = 1,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Planned:
    """Fingerprint, plan and store of a raw dataset; what is there already and still right is not made again.

    `fold_seconds` may be a function of the names of what will be planned, the low resolution of a cascade aside.
    `asked` are the grids of super-resolution. Without `fill_store` nothing is preprocessed, without `save` nothing is
    written at all.

    `drop_broken` leaves broken cases out instead of refusing the dataset. A
    plan that would change under trained models is refused unless `replan`, which puts them aside. `keep_plan`
    preprocesses for the plan.json that is there; `reuse_plan` where that was made of this very dataset and answers
    what is asked. `group_by` names what must not be parted by a fold: a JSON file of
    case: patient, or "prefix" for cases whose names differ in their last part alone. `folds` is a file of folds, such
    as nnU-Net's splits_final.json, that is taken as it is. Raises DatasetError, PlanError, StorageError.
    """
    changing = {
        "--gpu-memory": gpu_memory_bytes,
        "--fold-time": fold_seconds,
        "--replan": replan,
        "--input-spacing, --output-spacing, --sr-scale or --task": asked,
    }
    useless = next((option for option, given in changing.items() if keep_plan and given), None)
    if useless is not None:
        raise PlanError(
            f"--keep-plan takes the plan as it is, so {useless} would change nothing; leave one of them out."
        )
    start_workers(workers)  # they start while this process does
    if not keep_plan:
        # sizing networks needs torch, whose import takes as long as measuring a small dataset: one beside the other
        threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    dropped: dict[str, str] = {}
    if drop_broken:
        dataset, dropped = _without_broken_cases(Path(dataset_root), workers=workers)
    else:
        dataset = _whole_dataset(Path(dataset_root), workers=workers)
    place = Workspace.of(dataset.root, workspace)
    if save:
        _check_writable(place)

    from autoseg.preprocessing.run import preprocess

    fill = functools.partial(
        preprocess,
        dataset,
        workspace=place,
        workers=workers,
        executor=executor,
        drop_cases=list(dropped),
        progress=progress,
    )
    filled: tuple[PreprocessingSettings, ...] = ()
    cases: tuple[CaseFingerprint, ...] = ()
    split: tuple[Fold, ...] = ()
    if keep_plan:
        plan, _ = load_plan(dataset.root, workspace)
        if group_by or folds:
            _write_folds(dataset, place, workers=workers, drop_cases=list(dropped), group_by=group_by, given=folds)
    else:
        plan, filled, cases, split = _plan(
            dataset,
            place,
            Budget(gpu_memory_bytes or 0, 0.0 if callable(fold_seconds) else fold_seconds or 0.0, device),
            fold_seconds=fold_seconds if callable(fold_seconds) else None,
            configurations=configurations,
            asked=asked,
            replan=replan,
            reuse=reuse_plan,
            workers=workers,
            drop_cases=[case.identifier for case in dataset.cases if case.identifier in dropped],
            group_by=group_by,
            given_folds=folds,
            fill=fill if fill_store and save else None,
            save=save,
        )
    planned = [configuration.name for configuration in plan.configurations]  # a cascade brings its low resolution along
    names = tuple(configurations) if keep_plan and configurations else tuple(planned)
    left = [store for store in plan.stores(names) if store not in filled]
    if left and fill_store and save:
        fill(left)
    return Planned(plan, place, names, dropped, cases, split)


def _plan(
    dataset: RawDataset,
    place: Workspace,
    budget: Budget,
    *,
    fold_seconds: Callable[[Sequence[str]], float] | None,
    configurations: Sequence[str] | None,
    asked: Asked | None,
    replan: bool,
    reuse: bool,
    workers: int,
    drop_cases: Sequence[str],
    group_by: str | None,
    given_folds: Path | None,
    fill: Callable[..., bool] | None,
    save: bool,
) -> tuple[Plan, tuple[PreprocessingSettings, ...], tuple[CaseFingerprint, ...], tuple[Fold, ...]]:
    """The plan, the stores that were filled while it was made, and the cases and folds that it was made for."""
    from autoseg.experiment_planning.draft import draft_plan
    from autoseg.experiment_planning.fingerprint import extract_fingerprint
    from autoseg.experiment_planning.folds import plan_folds
    from autoseg.experiment_planning.label_ceiling import label_ceiling
    from autoseg.experiment_planning.notes import Notes
    from autoseg.experiment_planning.planner import first_stores, plan_experiment
    from autoseg.experiment_planning.superresolution import Asked
    from autoseg.training.folds import write_folds

    fingerprint = extract_fingerprint(dataset, workers=workers, drop_cases=drop_cases)
    folds = plan_folds(
        dataset.root,
        fingerprint,
        place.folds,
        group_by=group_by,
        given=given_folds,
        before=_fingerprint_before(place),
        trained=bool(_trained(place)) and not replan,
    )
    kept = None if replan else Plan.load(place.plan) if reuse and place.plan.exists() else _plan_of_models(place)
    if kept is not None and kept.fingerprint == fingerprint.id and _answers(kept, budget, configurations, asked):
        log.info("%s: nothing that was asked differs from this plan; it stays.", place.plan)
        if folds and save:  # the file was deleted
            write_folds(place.folds, folds)
        return kept, (), fingerprint.cases, tuple(folds)
    ceiling = functools.cache(functools.partial(label_ceiling, dataset, workers=workers, drop_cases=tuple(drop_cases)))
    if fold_seconds is not None:
        draft = draft_plan(fingerprint, configurations, asked or Asked(), ceiling, Notes())
        budget = replace(budget, fold_seconds=fold_seconds(draft.wanted))
    early: tuple[PreprocessingSettings, ...] = ()
    unfilled = fill is not None and not _trained(place)
    if unfilled and workers > 1:  # what trained models were made from stays until the plan may change
        early = first_stores(fingerprint, configurations, asked, ceiling)
    with _beside(fill, early, workers=workers) as filling:
        plan = plan_experiment(fingerprint, budget, configurations=configurations, asked=asked, ceiling=ceiling)
    _put_models_aside(plan, place, replan=replan)
    _tell_what_was_asked_in_vain(plan, asked)
    if save:
        if folds:
            write_folds(place.folds, folds)
        fingerprint.save(place.fingerprint)
        plan.save(place.plan)
    filled = early if filling is not None and filling.result() else ()
    return plan, filled, fingerprint.cases, tuple(folds)


def _tell_what_was_asked_in_vain(plan: Plan, asked: Asked | None) -> None:
    decided = next((d for d in plan.decisions if d.name == "super_resolution"), None)
    if asked is not None and asked.anything and decided is not None and decided.value is False:
        log.warning("%s: no super-resolution is planned: %s", plan.dataset, decided.because)


def _write_folds(
    dataset: RawDataset,
    place: Workspace,
    *,
    workers: int,
    drop_cases: Sequence[str],
    group_by: str | None,
    given: Path | None,
) -> None:
    """The folds that are asked for beside a plan that stays; it may have been made elsewhere, so cases are measured."""
    from autoseg.experiment_planning.fingerprint import extract_fingerprint
    from autoseg.experiment_planning.folds import plan_folds
    from autoseg.training.folds import write_folds

    fingerprint = extract_fingerprint(dataset, workers=workers, drop_cases=drop_cases)
    trained = bool(_trained(place))
    folds = plan_folds(dataset.root, fingerprint, place.folds, group_by=group_by, given=given, trained=trained)
    if folds:
        write_folds(place.folds, folds)


@contextlib.contextmanager
def _beside(
    fill: Callable[..., bool] | None, stores: tuple[PreprocessingSettings, ...], *, workers: int
) -> Iterator[Future[bool] | None]:
    """Fill `stores` while the `with` block sizes networks: it takes one core, the workers the others.

    When the block ends, what is not filled within a moment is left to all of them. Gives whether everything is there,
    in the end.
    """
    if not stores or fill is None:
        yield None
        return
    ended = threading.Event()
    stop_workers(keep=workers - 1)  # their memory is better used by what the block does
    with ThreadPoolExecutor(1) as thread:
        filling = thread.submit(fill, stores, stop=ended.is_set, workers=workers - 1, beside=True)
        try:
            yield filling
            with contextlib.suppress(TimeoutError):
                filling.result(timeout=PATIENCE_SECONDS)
        finally:
            ended.set()
    if not filling.result():
        start_workers(workers)


def _fingerprint_before(place: Workspace) -> Fingerprint | None:
    """The fingerprint of the planning before; None where there is none, or it cannot be read."""
    from autoseg.experiment_planning.fingerprint import Fingerprint

    with contextlib.suppress(DatasetError):
        return Fingerprint.load(place.fingerprint)
    return None


def _plan_of_models(place: Workspace) -> Plan | None:
    """The plan that is there, where folds are trained; None where there is neither or it cannot be read."""
    if not place.plan.exists() or not _trained(place):
        return None
    try:
        return Plan.load(place.plan)
    except PlanError:
        return None


def asked_super_resolution(
    *,
    input_spacing: Sequence[float] | None,
    output_spacing: Sequence[float] | None,
    scale: Sequence[float] | None,
    task: str,
) -> Asked | None:
    """What the user wants of super-resolution; None where nothing was said. Raises PlanError naming the option."""
    from autoseg.experiment_planning.superresolution import Asked

    asked = Asked(_vector(input_spacing), _vector(output_spacing), tuple(scale) if scale else None, task)
    asked.check()
    return None if asked == Asked() else asked


def _vector(values: Sequence[float] | None) -> Vector | None:
    if values is None:
        return None
    z, y, x = values
    return z, y, x


def _trained(place: Workspace) -> list[Path]:
    """The checkpoints that are there."""
    return sorted(place.models.glob(f"*/fold_*/{CHECKPOINT}"))


def _answers(plan: Plan, budget: Budget, configurations: Sequence[str] | None, asked: Asked | None) -> bool:
    """Whether a plan was made for what is asked now; what was not given (0 or None) may be anything."""
    known = next((d.value for d in plan.decisions if d.name == "super_resolution.asked"), None)
    return (
        (asked is None or to_json(asked) == known)
        and budget.gpu_memory_bytes in (0, plan.budget.gpu_memory_bytes)
        and budget.fold_seconds in (0.0, plan.budget.fold_seconds)
        and {configuration.name for configuration in plan.configurations} >= set(configurations or ())
    )


def workspace_of(dataset_root: Path, workspace: Path | None = None) -> Workspace:
    """The place of a dataset's artefacts; nothing is made. Raises DatasetError where `dataset_root` is no dataset."""
    return Workspace.of(list_cases(Path(dataset_root)).dataset.root, workspace)


def load_plan(dataset_root: Path, workspace: Path | None = None) -> tuple[Plan, Workspace]:
    """The plan of a dataset and the place of its artefacts.

    Raises PlanError where there is none, or where the workspace belongs to another dataset.
    """
    dataset = list_cases(Path(dataset_root)).dataset
    place = Workspace.of(dataset.root, workspace)
    if not place.plan.exists():
        raise PlanError(
            f"{place.plan}: there is no plan yet; run `autoseg plan-and-preprocess {dataset_root}`, with the same "
            "--workspace if you use one."
        )
    plan = Plan.load(place.plan)
    for what, planned, found in (
        ("name", plan.dataset, dataset.name),
        ("channels", plan.channels, dataset.channels),
        ("channels on grids of their own", plan.reference_channels, dataset.reference_channels),
        ("labels", plan.labels, dataset.labels),
        ("file ending", plan.file_ending, dataset.file_ending),
    ):
        if planned != found:
            raise PlanError(
                f"{place.root}: this workspace belongs to another dataset (its {what}: {_shown(planned)}; of "
                f"{dataset.root}: {_shown(found)}); choose another --workspace, or plan anew."
            )
    return plan, place


def trained_configuration(plan: Plan, place: Workspace) -> str:
    """The configuration of which folds are trained, if there is one; a cascade counts for both of its stages.

    Raises PlanError where there is none, or several that must be chosen from.
    """
    trained = [c for c in plan.configurations if list(place.fold(c.name, "0").parent.glob(f"fold_*/{CHECKPOINT}"))]
    stages = {c.previous_stage for c in trained}
    names = [c.name for c in trained if c.name not in stages]
    if not names:
        raise PlanError(f"{place.root}: no fold is trained yet; run `autoseg train-fold` first.")
    if len(names) > 1:
        raise PlanError(f"{place.root}: several configurations are trained; choose one of {', '.join(names)}.")
    return names[0]


def _shown(value: object) -> str:
    if isinstance(value, Labels):
        pairs = zip(value.names, value.values, strict=False)  # of a plan that was edited, perhaps
        return ", ".join(f"{name} {'+'.join(map(str, values))}" for name, values in pairs)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _put_models_aside(plan: Plan, place: Workspace, *, replan: bool) -> None:
    """Refuse to change the plan under trained models, or move them to a folder that is named after their plan."""
    models = place.models
    trained = _trained(place)
    if not trained or not place.plan.exists():
        return
    try:
        before = Plan.load(place.plan).id
    except PlanError:
        before = "damaged_plan"
    if before == plan.id:
        return
    if not replan:
        raise PlanError(
            f"{place.root}: {len(trained)} folds are trained by another plan ({trained[0].parent} is one); choose "
            "another --workspace, or --replan to put them aside and plan anew."
        )
    aside = place.root / f"{MODELS}_of_plan_{before}"
    number = 1
    while aside.exists():
        number += 1
        aside = place.root / f"{MODELS}_of_plan_{before}_{number}"
    try:
        os.replace(models, aside)
    except OSError as error:
        raise StorageError(f"{models}: cannot be put aside ({error.strerror}).") from error
    log.warning("The models of the plan before are in %s now.", aside)


def _whole_dataset(root: Path, *, workers: int) -> RawDataset:
    """The dataset, if no file is missing; else every broken case is named at once, those with damaged files too."""
    listing = list_cases(root)
    if listing.problems:
        from autoseg.experiment_planning.verify import verify_dataset

        training = {case.identifier for case in listing.dataset.cases} | set(listing.problems)
        errors = [p for p in verify_dataset(root, workers=workers).errors if not p.case or p.case in training]
        broken = {problem.case for problem in errors if problem.case}
        sentences = "\n".join(f"  {_naming(problem.case, problem.sentence)}" for problem in errors)
        raise DatasetError(
            f"{root}: {len(broken)} of {len(training)} training cases cannot be used; add or repair their files, or "
            f"leave them out with --drop-cases:\n{sentences}"
        )
    return RawDataset.load(root)


def _naming(case: str, sentence: str) -> str:
    return sentence if not case or case in sentence else f"Case {case}: {sentence}"


def _without_broken_cases(root: Path, *, workers: int) -> tuple[RawDataset, dict[str, str]]:
    from autoseg.experiment_planning.verify import verify_dataset

    report = verify_dataset(root, workers=workers)
    for problem in report.errors:
        if not problem.case:
            raise DatasetError(problem.sentence)
    dataset = list_cases(root).dataset
    broken = {problem.case: problem.sentence for problem in report.errors if problem.case in report.cases}
    if all(case.identifier in broken for case in dataset.cases):
        raise DatasetError(f"{root}: every training case is broken; see `autoseg verify {root}`.")
    return dataset, broken


def _check_writable(place: Workspace) -> None:
    """Refuse a workspace that cannot be written before hours of work. Raises StorageError."""
    from autoseg.files import write_text

    probe = place.root / ".writable"
    try:
        write_text(probe, "")
    except StorageError as error:
        raise StorageError(str(error).replace(str(probe), str(place.root))) from error
    probe.unlink(missing_ok=True)


def require_current_store(dataset_root: Path, plan: Plan, configuration: str, *, workspace: Workspace) -> None:
    """Refuse to train on a store that was made from other files than the dataset has now. Raises PlanError."""
    from autoseg.preprocessing.run import outdated_cases

    dataset = list_cases(Path(dataset_root)).dataset
    changed, gone = outdated_cases(dataset, plan.configuration(configuration).preprocessing, workspace)
    if changed or gone:
        what = [f"{', '.join(names[:5])} ({word})" for names, word in ((changed, "changed"), (gone, "gone")) if names]
        raise PlanError(
            f"{workspace.root}: the files of {len(changed) + len(gone)} cases are not those that were preprocessed: "
            f"{'; '.join(what)}; run `autoseg plan-and-preprocess` again."
        )


def require_folds(dataset_root: Path, *, workspace: Workspace) -> None:
    """Make the folds as planning does where their file was deleted, so that equal images still share one."""
    from autoseg.experiment_planning.folds import plan_folds
    from autoseg.training.folds import write_folds

    before = _fingerprint_before(workspace)
    if before is not None and not workspace.folds.exists():
        folds = plan_folds(Path(dataset_root), before, workspace.folds)
        if folds:
            write_folds(workspace.folds, folds)


def _require_memory(configuration: Configuration, device: str) -> None:
    """Refuse a step that cannot fit, before the system ends the process without a word. Raises PlanError.

    What is counted is certainly needed: the parameters with gradients and two moments, and what the convolutions at
    full resolution keep for the backward pass, in bf16. A GPU says itself that it is full.
    """
    from autoseg.device import resolve_device

    if resolve_device(device).type != "cpu":
        return
    a, voxels = configuration.architecture, configuration.batch_size * math.prod(configuration.patch_size)
    weights = sum(n * math.prod(k) * f * f for n, k, f in zip(a.encoder_convs, a.kernels, a.features, strict=True))
    finest = a.encoder_convs[0] + sum(a.decoder_convs[-1:])
    needed, limit = 16 * weights + 2 * 2 * voxels * a.features[0] * finest, host_memory_bytes()
    if needed > limit:
        raise PlanError(
            f"Configuration {configuration.name}: a step of batch {configuration.batch_size} with patch "
            f"{list(configuration.patch_size)} needs at least {format_bytes(needed)}, this machine has "
            f"{format_bytes(limit)}; take a smaller batch, patch or network."
        )


def train(
    plan: Plan,
    configuration: str,
    fold: str,
    *,
    workspace: Workspace,
    device: str = "auto",
    seconds: float | None = None,
    steps: int | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int | None = None,
    world: World | None = None,
    logs: Logs | None = None,
    on_step: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainedFold:
    """Train one fold; a cascade first brings the held-out predictions of its previous stage into a store.

    `world` are the processes that train it together; by default this one alone. `logs` are told of every row of
    history.csv. Raises what the two parts raise: PlanError, CheckpointError, StorageError, WorkerError.
    """
    _require_memory(plan.configuration(configuration), device)
    from autoseg.inference.cascade import prepare_previous_stage
    from autoseg.training.distributed import ALONE
    from autoseg.training.loggers import NO_LOGS
    from autoseg.training.loop import train_fold

    world = world or ALONE
    with world.one_after_another():
        previous = prepare_previous_stage(plan, configuration, workspace=workspace, workers=workers or 1)
    lock, what = workspace.fold_lock(configuration, fold), f"{configuration}, fold {fold}: another training works on it"
    with alone(lock, what=what, tries=LOCK_TRIES) if world.first else contextlib.nullcontext():
        return train_fold(
            plan,
            configuration,
            fold,
            workspace=workspace,
            device=device,
            seconds=seconds,
            steps=steps,
            resume=resume,
            seed=seed,
            workers=workers,
            previous=previous,
            world=world,
            logs=logs or NO_LOGS,
            on_step=on_step,
            stop=stop,
        )


def is_of_split(plan: Plan, configuration: str, fold: str, *, workspace: Workspace) -> bool:
    """Whether a fold is, or would be, trained on the very cases that `folds.json` names for it now."""
    from autoseg.preprocessing.store import Store
    from autoseg.training.folds import load_or_make_folds, select_fold
    from autoseg.training.loop import read_standing

    standing = read_standing(workspace.fold(configuration, fold))
    cases = Store(workspace.store(plan.configuration(configuration).preprocessing)).cases()
    split = select_fold(load_or_make_folds(workspace.folds, cases), fold, cases)
    return standing is None or standing.cases == split.id


def validate(
    dataset_root: Path,
    plan: Plan,
    configuration: str,
    fold: str,
    *,
    workspace: Workspace,
    cases: Sequence[str] | None = None,
    mirroring: bool = True,
    pictures: bool = True,
    device: str = "auto",
    workers: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation | None:
    """Predict and score the cases that a trained fold held out, or some of them; None for a fold without any."""
    from autoseg.inference.cascade import held_out_cases
    from autoseg.inference.crossval import validate_fold
    from autoseg.training.folds import ALL

    if fold == ALL or (fold.isdigit() and held_out_cases(workspace.folds)[int(fold) :][:1] == [[]]):
        return None
    if not is_of_split(plan, configuration, fold, workspace=workspace):
        raise CheckpointError(
            f"{workspace.fold(configuration, fold)}: this fold was trained on other cases than {workspace.folds} names "
            "now, so it may know those that it holds out; restore that file, or delete the folder and train it anew."
        )
    dataset = list_cases(Path(dataset_root)).dataset
    return validate_fold(
        dataset,
        plan,
        configuration,
        fold,
        workspace=workspace,
        cases=cases,
        device=device,
        mirroring=mirroring,
        workers=workers,
        pictures=pictures,
        progress=progress,
    )
