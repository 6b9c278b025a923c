"""Predicted and reference label files -> `Evaluation`: which file belongs to which, and every case scored in parallel.

Reads label maps in any format of `autoseg.image`, and super-resolved images with the true fine ones; one case is scored
in `scoring`, all of them are brought together in `summary`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from autoseg.dataset import DATASET_JSON
from autoseg.errors import AutosegError, DatasetError, PredictionError
from autoseg.executor import map_cases
from autoseg.files import read_json
from autoseg.inference.scoring import Pair, Scores, score_image_pair, score_pair
from autoseg.inference.summary import Evaluation, statistics
from autoseg.labels import Labels
from autoseg.metrics import METRICS, TOLERANCE_MM

log = logging.getLogger(__name__)

ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".png", ".tif", ".tiff", ".bmp")

IMAGE_SUFFIX, FIRST_CHANNEL = "_image", "_0000"  # CASE_image.nii.gz is compared with CASE_0000.nii.gz or CASE.nii.gz

Scored = TypeVar("Scored")


def evaluate_folders(
    predictions: Path,
    references: Path,
    *,
    labels: Labels | None = None,
    workers: int = 1,
    tolerance_mm: float = TOLERANCE_MM,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score every prediction that has a reference of the same name; two files may be given instead of folders.

    Without `labels`, the dataset.json in the references' folder, in the one above it, or beside the predictions says
    what the values mean; without any, every value that occurs is a class. `progress` is called with each case that is
    done. Raises PredictionError where a folder is missing or no prediction has a reference.
    """
    predictions, references = Path(predictions), Path(references)
    labels = labels or find_labels(references, predictions)
    if labels is not None and not labels.names:
        raise PredictionError(
            f"{references}: {DATASET_JSON} names no structure to score; compare images, with `--images`."
        )
    expected, given = _label_files(references, "references"), _label_files(predictions, "predictions")
    if references.is_file() and predictions.is_file():
        case = next(iter(expected))
        given = {case: next(iter(given.values()))}
    pairs = [Pair(case, given[case], expected[case]) for case in sorted(expected) if case in given]
    if not pairs:
        raise PredictionError(
            f"None of the {len(given)} predictions in {predictions} has a reference of the same name in {references} "
            f"({len(expected)} files, such as {next(iter(expected.values())).name}); check the two folders."
        )
    kinds = {_ending(path) for path in expected.values()}
    return evaluate_pairs(
        pairs,
        labels=labels,
        workers=workers,
        tolerance_mm=tolerance_mm,
        progress=progress,
        missing=[case for case in sorted(expected) if case not in given],
        # pictures and the like beside the predictions are not predictions
        extra=[
            case
            for case in sorted(given)
            if case not in expected and _ending(given[case]) in kinds and not _is_image_of(case, expected)
        ],
    )


def evaluate_image_folders(
    predictions: Path, references: Path, *, workers: int = 1, progress: Callable[[str], None] | None = None
) -> Evaluation:
    """Score super-resolved images against the true fine ones: PSNR and SSIM, in two folders or two files.

    CASE_image.nii.gz, or CASE.nii.gz where there is none, is compared with CASE.nii.gz or CASE_0000.nii.gz. A case that
    cannot be scored is named, the others are finished. Raises PredictionError where there is nothing to compare.
    """
    expected = _image_files(references, "references", (FIRST_CHANNEL,))
    given = _image_files(predictions, "predictions", (IMAGE_SUFFIX, FIRST_CHANNEL))
    if references.is_file() and predictions.is_file():
        given = {next(iter(expected)): predictions}
    pairs = [Pair(case, given[case], expected[case]) for case in sorted(expected) if case in given]
    if not pairs:
        raise PredictionError(
            f"None of the {len(given)} images in {predictions} has a reference of the same name in {references} "
            f"({len(expected)} files, such as {next(iter(expected.values())).name}); check the two folders."
        )
    images, brought, failed = _score_all(score_image_pair, pairs, workers=workers, progress=progress)
    return Evaluation(
        classes=(),
        cases={},
        by_class={},
        mean={},
        failed=dict(sorted(failed.items())),
        missing=tuple(case for case in sorted(expected) if case not in given),
        extra=tuple(case for case in sorted(given) if case not in expected),
        tolerance_mm=TOLERANCE_MM,
        images=dict(sorted(images.items())),
        brought=brought,
    )


def evaluate_pairs(
    pairs: Sequence[Pair],
    *,
    labels: Labels | None,
    workers: int = 1,
    tolerance_mm: float = TOLERANCE_MM,
    progress: Callable[[str], None] | None = None,
    missing: Sequence[str] = (),
    extra: Sequence[str] = (),
    note: str = "",
) -> Evaluation:
    """Score the pairs, in parallel; a case that cannot be scored is named, the others are finished."""
    score = partial(score_pair, labels=labels, tolerance_mm=tolerance_mm)
    cases, brought, failed = _score_all(score, pairs, workers=workers, progress=progress)
    classes = labels.names if labels else _occurring_classes(cases.values())
    cases = {case: _with_absent_classes(cases[case], classes) for case in sorted(cases)}
    by_class, mean = statistics(cases, classes)
    return Evaluation(
        classes=classes,
        cases=cases,
        by_class=by_class,
        mean=mean,
        failed=dict(sorted(failed.items())),
        missing=tuple(missing),
        extra=tuple(extra),
        tolerance_mm=tolerance_mm,
        note=note,
        brought=brought,
    )


def _score_all(
    score: Callable[[Pair], tuple[Scored, str]],
    pairs: Sequence[Pair],
    *,
    workers: int,
    progress: Callable[[str], None] | None,
) -> tuple[dict[str, Scored], dict[str, str], dict[str, str]]:
    """The scores of each case, in parallel; what was brought from which grid; the sentence of each that failed."""
    scored: dict[str, Scored] = {}
    brought: dict[str, str] = {}
    failed: dict[str, str] = {}
    for index, result in map_cases(score, pairs, workers=workers, names=[pair.case for pair in pairs]):
        case = pairs[index].case
        if isinstance(result, AutosegError):
            failed[case] = _named(case, str(result))
            log.warning("%s", failed[case])
        elif isinstance(result, Exception):
            raise result
        else:
            scored[case], grid = result
            brought |= {case: grid} if grid else {}
        if progress:
            progress(case)
    return scored, dict(sorted(brought.items())), failed


def _named(case: str, sentence: str) -> str:
    return sentence if case in sentence else f"Case {case}: {sentence}"


def _occurring_classes(cases: Any) -> tuple[str, ...]:
    return tuple(sorted({name for scores in cases for name in scores}, key=int))


def _with_absent_classes(scores: Scores, classes: Sequence[str]) -> Scores:
    absent = {metric: 0.0 if metric == "volume_error_ml" else math.nan for metric in METRICS}
    return {name: scores.get(name, absent) for name in classes}


def find_labels(*folders: Path) -> Labels | None:
    """What the values mean, from a dataset.json in one of these folders or the one above it; None without any.

    Raises DatasetError where a dataset.json is broken.
    """
    for folder in folders:
        folder = folder.parent if folder.is_file() else folder
        for path in (folder / DATASET_JSON, folder.resolve().parent / DATASET_JSON):
            if path.is_file():
                content = read_json(path, error=DatasetError, what="dataset description")
                if not isinstance(content, dict):
                    raise DatasetError(f"{path}: the dataset description must be an object, got {content!r}.")
                try:
                    return Labels.from_json(content.get("labels"), content.get("regions_class_order"))
                except DatasetError as error:
                    raise DatasetError(f"{path}: {error}") from error
    return None


def _label_files(folder: Path, what: str) -> dict[str, Path]:
    """Case -> file; where a case has several, the first of ENDINGS wins."""
    if folder.is_file():
        return {_case(folder): folder}
    if not folder.is_dir():
        raise PredictionError(f"{folder}: there is no such file or folder of {what}.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and _ending(path):
            case = _case(path)
            if case not in files or ENDINGS.index(_ending(path)) < ENDINGS.index(_ending(files[case])):
                files[case] = path
    if not files:
        raise PredictionError(
            f"{folder}: there are no {what} in this folder; it must hold label files such as CASE.nii.gz "
            f"({', '.join(ENDINGS)})."
        )
    return files


def _image_files(folder: Path, what: str, suffixes: Sequence[str]) -> dict[str, Path]:
    """Case -> file. Where some names end with one of `suffixes`, those are the images, and what is beside is not."""
    files = _label_files(folder, what)
    for suffix in suffixes:
        marked = {case.removesuffix(suffix): path for case, path in files.items() if case.endswith(suffix)}
        if marked:
            return marked
    return files


def _is_image_of(case: str, expected: Mapping[str, Path]) -> bool:
    """Whether a file beside the predicted labels is the super-resolved image of one of the cases."""
    return case.endswith(IMAGE_SUFFIX) and case.removesuffix(IMAGE_SUFFIX) in expected


def _ending(path: Path) -> str:
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")


def _case(path: Path) -> str:
    return path.name[: len(path.name) - len(_ending(path))] or path.name
