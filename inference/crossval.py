"""A trained fold + the preprocessed store -> `validation/`: held-out predictions, scores, pictures, probabilities.

    validation/CASE.nii.gz             labels on the grid of the case's label
    validation/summary.json            every score, by case and class
    validation/images.json             scores of super-resolved images, where the fine image is known
    validation/pictures/worst.png      and best.png, median.png
    validation/probabilities/          a store: arrays "plain" and "mirrored", (K, Z, Y, X) float16 on the network grid

The probabilities wait there until the selection of a configuration has used them.
Whatever grid a network answers on, it is scored on the label's own.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.checkpoint import checkpoint_id
from autoseg.dataset import Case, RawDataset
from autoseg.errors import AutosegError, CheckpointError, PlanError
from autoseg.files import read_json, write_json
from autoseg.image import Image, read_image, write_image
from autoseg.inference.cascade import held_out_cases, prepare_previous_stage
from autoseg.inference.evaluation import evaluate_pairs
from autoseg.inference.export import export_labels
from autoseg.inference.grids import bring_logits
from autoseg.inference.held_out import HeldOutCase, held_out_case
from autoseg.inference.pictures import best_median_worst, draw_case
from autoseg.inference.predictor import Model, NetworkAnswer, PredictionSettings, load_model, predict_network_grid
from autoseg.inference.scoring import ImageScores, Pair, score_image
from autoseg.inference.summary import Evaluation
from autoseg.labels import Labels
from autoseg.plan import Plan
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.store import Store
from autoseg.reading import read_case
from autoseg.workspace import CHECKPOINT, PICTURES, SCORED, SUMMARY, VALIDATION, Workspace

__all__ = ["prepare_previous_stage", "validate_fold"]  # training a cascade needs both

log = logging.getLogger(__name__)

ALL = "all"  # the fold that trains on every case
IMAGES = "images.json"
PROBABILITIES = "probabilities"
PLAIN, MIRRORED = "plain", "mirrored"
TRAINING_SCORES = (
    "These are training scores: fold 'all' holds no case out, so the model was trained on every case it is scored on; "
    "expect less on new images."
)
NOTHING_KNOWN = "No fine image of the held-out cases is known, so nothing can be scored: look at the predictions."
NO_LABELS = Labels((), ())


def validate_fold(
    dataset: RawDataset,
    plan: Plan,
    configuration: str,
    fold: str,
    *,
    workspace: Workspace,
    cases: Sequence[str] | None = None,
    device: str = "auto",
    mirroring: bool = True,
    workers: int = 1,
    pictures: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Predict the held-out `cases` (default: those of `folds.json`) with the fold's checkpoint and score them.

    Writes `validation/`. For fold `all`, which holds nothing out, every case of the store is predicted and the summary
    says that these are training scores. Cases that this very checkpoint has predicted already are kept.
    `progress(case, done, total)` is called after each prediction. A case that fails is named in the evaluation, the
    others are finished. Raises CheckpointError where the fold is not trained with this plan, PlanError where a case is
    not in the dataset.
    """
    folder = workspace.fold(configuration, fold)
    validation = folder / VALIDATION
    settings = plan.configuration(configuration)
    before = prepare_previous_stage(plan, configuration, workspace=workspace, workers=workers)
    previous = None if before is None else Store(before)
    store = Store(workspace.store(settings.preprocessing))
    labelled = settings.architecture.output_channels > 0
    chosen = _chosen_cases(dataset, _held_out(fold, store, workspace) if cases is None else cases, fold=fold)
    failed = _predict_missing(
        chosen, store, previous,
        folder=folder, plan=plan, ending=dataset.file_ending, labelled=labelled, device=device, mirroring=mirroring,
        progress=progress,
    )  # fmt: skip
    pairs = [
        Pair(case.identifier, _prediction(validation, case.identifier, dataset.file_ending), case.label)
        for case in chosen
        if labelled and case.identifier not in failed and case.label is not None
    ]
    images = _image_scores(validation / IMAGES, [case.identifier for case in chosen if case.identifier not in failed])
    note = TRAINING_SCORES if fold == ALL else "" if labelled or images else NOTHING_KNOWN
    labels = plan.labels if labelled else NO_LABELS
    evaluation = evaluate_pairs(pairs, labels=labels, workers=workers, note=note)
    evaluation = replace(evaluation, failed={**evaluation.failed, **failed}, images=images)
    if pictures and labelled:
        draw_predictions(evaluation, dataset, validation)
    # the last: where it is, everything is
    write_json(validation / SUMMARY, {**evaluation.to_json(), SCORED: checkpoint_id(folder / CHECKPOINT)})
    return evaluation


def draw_predictions(evaluation: Evaluation, dataset: RawDataset, folder: Path) -> list[Path]:
    """Write pictures of the best, median and worst prediction in `folder` to `folder/pictures`; their paths."""
    known = {case.identifier: case for case in (*dataset.cases, *dataset.test_cases)}
    paths = []
    for rank, identifier in best_median_worst(evaluation.ranking()).items():
        image, reference = read_case(known[identifier], dataset)
        if reference is not None and reference.shape != image.shape:  # a label on a finer grid of its own
            image = Image(resample_image(image.array, reference.shape, order=1), reference.grid)
        path = folder / PICTURES / f"{rank}.png"
        draw_case(
            path,
            image=image,
            reference=reference,
            prediction=read_image(_prediction(folder, identifier, dataset.file_ending)),
            labels=dataset.labels,
            title=f"{rank} of {len(evaluation.cases)}: {identifier}, {dice_sentence(evaluation, identifier)}",
        )
        paths.append(path)
    return paths


def dice_sentence(evaluation: Evaluation, case: str) -> str:
    """ "Dice 0.87 (anterior 0.86, posterior 0.88)"; the worst classes first where there are many."""
    scores = {name: metrics["dice"] for name, metrics in evaluation.cases[case].items() if metrics["dice"] >= 0}
    mean = sum(scores.values()) / len(scores)
    if len(scores) == 1:
        return f"Dice {mean:.3f}"
    shown = list(scores.items()) if len(scores) <= 4 else sorted(scores.items(), key=lambda item: item[1])[:4]
    rest = f", {len(scores) - 4} better ones" if len(scores) > 4 else ""
    return f"Dice {mean:.3f} ({', '.join(f'{name} {value:.2f}' for name, value in shown)}{rest})"


def _held_out(fold: str, store: Store, workspace: Workspace) -> Sequence[str]:
    if fold == ALL:
        return store.cases()
    folds = held_out_cases(workspace.folds)
    if not fold.isdigit() or int(fold) >= len(folds):
        raise PlanError(f"Fold '{fold}' is not there; choose one of 0 to {len(folds) - 1}, or all.")
    return folds[int(fold)]


def _chosen_cases(dataset: RawDataset, identifiers: Sequence[str], *, fold: str) -> list[Case]:
    known = {case.identifier: case for case in dataset.cases}
    unknown = [identifier for identifier in identifiers if identifier not in known]
    if unknown:
        raise PlanError(f"Fold {fold} holds out {', '.join(unknown[:5])}, which {dataset.root} does not have.")
    if not identifiers:
        raise PlanError(f"Fold {fold} holds out no case, so there is nothing to validate on.")
    return [known[identifier] for identifier in identifiers]


def _predict_missing(
    cases: Sequence[Case],
    store: Store,
    previous: Store | None,
    *,
    folder: Path,
    plan: Plan,
    ending: str,
    labelled: bool,
    device: str,
    mirroring: bool,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, str]:
    """Predict what this checkpoint has not predicted yet; case -> sentence of those that failed."""
    source = f"{_checksum(folder / CHECKPOINT)} {'mirrored' if mirroring else 'plain'}"
    validation = folder / VALIDATION
    kept = Store(validation / PROBABILITIES)
    todo = [
        case.identifier
        for case in cases
        if not _is_done(
            kept, case.identifier, source, label=_prediction(validation, case.identifier, ending) if labelled else None
        )
    ]
    log.info("%s: %d of %d cases are predicted already", validation, len(cases) - len(todo), len(cases))
    if not todo:
        return {}
    model = load_model(folder, device)
    if model.plan.id != plan.id:
        raise CheckpointError(
            f"{folder / CHECKPOINT}: was trained with another plan ({model.plan.id}) than that of the workspace "
            f"({plan.id}); train the fold anew, or plan into another --workspace."
        )
    failed: dict[str, str] = {}
    for number, case in enumerate(todo, start=1):
        try:
            before = None if previous is None else previous.entry(case)
            held_out = held_out_case(store.entry(case), model.configuration, plan.labels, previous=before)
            answer, probabilities = _predict(model, held_out, mirroring=mirroring)
            labels = None if answer.logits is None else export_labels(answer.logits, held_out.scored, plan.labels)
        except AutosegError as error:
            sentence = str(error)
            failed[case] = sentence if case in sentence else f"Case {case}: {sentence}"
            log.error("%s", failed[case])
        else:  # what cannot be written hits every case alike: a case that failed by a full disk would stay so
            if labels is not None:
                write_image(labels, _prediction(validation, case, ending))
            if answer.image is not None and held_out.truth is not None:
                _keep_image_score(validation / IMAGES, case, score_image(answer.image.numpy(), held_out.truth))
            kept.write(case, probabilities, held_out.scored, {}, source=source)
        if progress is not None:
            progress(case, number, len(todo))
    return failed


def _predict(
    model: Model, held_out: HeldOutCase, *, mirroring: bool
) -> tuple[NetworkAnswer, dict[str, NDArray[np.float16]]]:
    """What to export and to score, and the probabilities to keep: without mirroring, and with it where allowed."""
    regions = model.plan.labels.has_regions
    ways = {PLAIN: False, **({MIRRORED: True} if mirroring and model.configuration.training.mirror_axes else {})}
    kept: dict[str, NDArray[np.float16]] = {}
    for name, mirrored in ways.items():
        settings = PredictionSettings(mirroring=mirrored)
        answer = predict_network_grid(
            model,
            held_out.image,
            grid=held_out.grid,
            reference=held_out.reference,
            reference_grid=held_out.reference_grid,
            settings=settings,
        )
        if answer.logits is not None:
            logits = bring_logits(answer.logits, held_out.answered, held_out.scored, regions=regions)
            answer = answer._replace(logits=logits)
            kept[name] = _probabilities(logits, regions=regions)
    return answer, kept


def _probabilities(logits: Tensor, *, regions: bool) -> NDArray[np.float16]:
    """(K, Z, Y, X) float16, plane by plane: a second float32 copy of the logits might not fit."""
    result = np.empty(tuple(logits.shape), np.float16)
    with torch.inference_mode():
        for z in range(logits.shape[1]):
            plane = logits[:, z].float()
            result[:, z] = (plane.sigmoid() if regions else plane.softmax(0)).numpy()
    return result


def _keep_image_score(path: Path, case: str, scores: ImageScores) -> None:
    """An infinite or undefined score is kept as null."""
    finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
    write_json(path, {**_read_image_scores(path), case: finite})


def _image_scores(path: Path, cases: Sequence[str]) -> dict[str, ImageScores]:
    known = _read_image_scores(path)
    return {
        case: {name: math.nan if score is None else float(score) for name, score in known[case].items()}
        for case in sorted(cases)
        if case in known
    }


def _read_image_scores(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path, error=PlanError, what="scores of images", remedy="delete it and validate the fold again")
    return content if isinstance(content, dict) else {}


def _is_done(kept: Store, case: str, source: str, *, label: Path | None) -> bool:
    """Whether this checkpoint predicted the case; the probabilities are written last."""
    if not kept.has(case) or (label is not None and not label.is_file()):
        return False
    try:
        entry = kept.entry(case)
    except AutosegError:
        return False
    return bool(entry.source == source and entry.is_whole())


def _prediction(validation: Path, case: str, ending: str) -> Path:
    return validation / f"{case}{ending}"


def _checksum(path: Path) -> str:
    """Tells one checkpoint from another, so that predictions of an older one are made anew."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint; train the fold first.") from error
    return digest.hexdigest()[:16]
