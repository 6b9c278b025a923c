"""Predicted and reference label files -> `Evaluation`: scores by case and class, means with intervals, JSON, table.

Reads label maps in any format of `autoseg.image`, and super-resolved images with the true fine ones. Scores are taken
on the reference's grid: a prediction on another grid of the same extent is brought there as validation does. The JSON
holds no NaN: what has no value (both masks empty, or an infinite distance because one is) is null.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.dataset import DATASET_JSON
from autoseg.errors import AutosegError, DatasetError, PredictionError
from autoseg.executor import map_cases
from autoseg.files import read_json, write_json
from autoseg.geometry import corner_distance, extent_distance
from autoseg.image import Grid, Image, read_image
from autoseg.labels import Labels
from autoseg.metrics import IMAGE_METRICS, METRICS, TOLERANCE_MM, Metric, score_images, score_masks

log = logging.getLogger(__name__)

ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".png", ".tif", ".tiff", ".bmp")
RESAMPLES = 2000  # bootstrap samples of the cases
CONFIDENCE = 0.95
SEED = 0  # the same scores give the same intervals
GRID_TOLERANCE = 0.5  # voxels (the smaller ones) by which corners may be apart; beyond it the files show other places
TABLE_COLUMNS = ("dice", "iou", "nsd", "hd95", "assd", "volume_error_ml", "volume_error_ratio")

IMAGE_SUFFIX, FIRST_CHANNEL = "_image", "_0000"  # CASE_image.nii.gz is compared with CASE_0000.nii.gz or CASE.nii.gz

Scores = dict[str, dict[str, float]]  # class -> metric -> score
ImageScores = dict[str, float]  # metric -> score
Box = tuple[slice, slice, slice]
Integers = NDArray[np.integer[Any]]
Scored = TypeVar("Scored")


@dataclass(frozen=True)
class Pair:
    """A prediction and what it should be."""

    case: str
    prediction: Path
    reference: Path


@dataclass(frozen=True)
class Statistic:
    """One score over the cases in which it is defined and finite."""

    mean: float
    """nan where there is no such case."""
    low: float
    """Lower end of the 95 % bootstrap interval of the mean."""
    high: float
    """Upper end."""
    median: float
    cases: int
    """Cases that count."""
    infinite: int = 0
    """Cases left out because one of the two masks is empty and the distance infinite."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of predictions."""

    classes: tuple[str, ...]
    """Classes or regions, without background and ignore."""
    cases: dict[str, Scores]
    """By case, class and metric; nan where both masks are empty, inf for distances to an empty mask."""
    by_class: dict[str, dict[str, Statistic]]
    """By class and metric."""
    mean: dict[str, Statistic]
    """By metric: the mean over the classes of their means over the cases (nnU-Net's foreground mean)."""
    failed: dict[str, str]
    """Cases that could not be scored, with the sentence that says why."""
    missing: tuple[str, ...]
    """References without a prediction."""
    extra: tuple[str, ...]
    """Predictions without a reference."""
    tolerance_mm: float
    """Tolerance of NSD."""
    note: str = ""
    """What a reader of the scores must know."""
    images: dict[str, ImageScores] = field(default_factory=dict)
    """Of super-resolved images, by case and metric; nan where there is nothing to compare, inf where they are equal."""
    brought: dict[str, str] = field(default_factory=dict)
    """Cases whose prediction lay on another grid than its reference, with that grid; scored on the reference's."""

    @property
    def image_mean(self) -> dict[str, Statistic]:
        """Of super-resolved images, by metric; empty without them."""
        draws = _resampled_counts(len(self.images))
        values = {name: [[scores[name]] for scores in self.images.values()] for name in IMAGE_METRICS}
        return {name: _statistic(np.array(column), draws) for name, column in values.items() if column}

    @property
    def complete(self) -> bool:
        """Whether every reference has a scored prediction and every prediction a reference."""
        return not (self.failed or self.missing or self.extra)

    def ranking(self, metric: str = "dice") -> tuple[str, ...]:
        """Cases from best to worst mean score over their classes; cases with nothing to score are left out."""
        scores = {case: _mean([scores[name][metric] for name in scores]) for case, scores in self.cases.items()}
        ranked = [case for case in scores if not math.isnan(scores[case])]
        sign = -1 if METRICS[metric].better == "higher" else 1
        return tuple(sorted(ranked, key=lambda case: (sign * scores[case], case)))

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        content = {
            "note": self.note,
            "metrics": _descriptions(METRICS),
            "nsd_tolerance_mm": self.tolerance_mm,
            "confidence": CONFIDENCE,
            "mean": {metric: vars(statistic) for metric, statistic in self.mean.items()},
            "by_class": {
                name: {metric: vars(statistic) for metric, statistic in row.items()}
                for name, row in self.by_class.items()
            },
            "cases": self.cases,
            "failed": self.failed,
            "missing": list(self.missing),
            "extra": list(self.extra),
        }
        if self.brought:
            content["brought_to_the_reference_grid"] = self.brought
        if self.images:
            mean = {metric: vars(statistic) for metric, statistic in self.image_mean.items()}
            content["images"] = {"metrics": _descriptions(IMAGE_METRICS), "mean": mean, "cases": self.images}
        cleaned: dict[str, Any] = _finite(content)
        return cleaned

    def save(self, path: Path) -> None:
        """Write `summary.json`, atomically."""
        write_json(path, self.to_json())

    def table(self) -> str:
        """Means with their intervals, two lines for each class, then those of the images, as plain text."""
        rows = [(name, self.by_class[name]) for name in self.classes]
        if len(rows) > 1:
            rows.append(("mean", self.mean))
        if not rows and not self.images and self.note:
            return self.note
        tables = [_table(rows, self.tolerance_mm)] if rows or not self.images else []
        tables += [_image_table(self.image_mean)] if self.images else []
        return "\n\n".join([*tables, *([self._brought_line()] if self.brought else [])])

    def _brought_line(self) -> str:
        case, grid = next(iter(self.brought.items()))
        return (
            f"Scored on the references' grids; {len(self.brought)} of {len(self.cases or self.images)} predictions lie "
            f"on others and were brought there, such as {case} ({grid})."
        )

    def problems(self) -> tuple[str, ...]:
        """One sentence for each case that was not scored."""
        sentences = list(self.failed.values())
        sentences += [f"Case {case}: there is no prediction for this reference." for case in self.missing]
        sentences += [f"Case {case}: there is no reference for this prediction." for case in self.extra]
        return tuple(sentences)


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


def score_image_pair(pair: Pair) -> tuple[ImageScores, str]:
    """The scores of one super-resolved image by metric; and its grid where it was brought to the reference's, or "".

    Raises DatasetError or PredictionError where a file cannot be read or the two do not fit together.
    """
    reference, prediction = read_image(pair.reference), read_image(pair.prediction)
    if prediction.channels != reference.channels:
        raise PredictionError(
            f"Case {pair.case}: the image {pair.prediction} has {prediction.channels} channels, its reference "
            f"{reference.channels}; compare the same channels."
        )
    prediction, brought = _on_grid_of(reference, prediction, pair, labels=False)
    return score_image(prediction.array, reference.array), brought


def score_image(prediction: NDArray[Any], reference: NDArray[Any]) -> ImageScores:
    """PSNR and SSIM of an image (C, Z, Y, X) against its reference, the mean over the channels, by metric."""
    channels = [score_images(truth, answer) for truth, answer in zip(reference, prediction, strict=True)]
    return {name: sum(scores[name] for scores in channels) / len(channels) for name in IMAGE_METRICS}


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
    by_class, mean = _statistics(cases, classes)
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


def score_pair(pair: Pair, *, labels: Labels | None, tolerance_mm: float) -> tuple[Scores, str]:
    """The scores of one case by class and metric; and its grid where it was brought to the reference's, or "".

    Voxels with the ignore label are left out of both. Raises DatasetError or PredictionError where a file cannot be
    read or the two do not fit together.
    """
    reference, prediction = read_image(pair.reference), read_image(pair.prediction)
    _check_channels(pair, prediction, reference)
    truth = _whole_numbers(reference, pair.case, pair.reference, labels)
    answer = _whole_numbers(prediction, pair.case, pair.prediction, labels)
    on_grid, brought = _on_grid_of(reference, prediction.with_array(answer), pair, labels=True)
    answer = on_grid.array[0]
    if labels is not None and labels.ignore is not None:
        ignored = truth == labels.ignore
        truth, answer = np.where(ignored, 0, truth), np.where(ignored, 0, answer)
    groups = _groups(labels, truth, answer)
    boxes = _value_boxes(truth, answer)
    plane = truth.shape[0] == 1
    scores: Scores = {}
    for name, values in groups.items():
        box = _enclosing([boxes[value] for value in values if value in boxes])
        scores[name] = score_masks(
            _mask(answer[box], values),
            _mask(truth[box], values),
            reference.grid.spacing,
            tolerance_mm=tolerance_mm,
            plane=plane,
        )
    return scores, brought


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


def _named(case: str, sentence: str) -> str:
    return sentence if case in sentence else f"Case {case}: {sentence}"


def _check_channels(pair: Pair, prediction: Image, reference: Image) -> None:
    if prediction.channels != 1 or reference.channels != 1:
        broken, image = (pair.prediction, prediction) if prediction.channels != 1 else (pair.reference, reference)
        raise PredictionError(
            f"Case {pair.case}: {broken} has {image.channels} channels, a label file has one; is it an image?"
        )


def _on_grid_of(reference: Image, prediction: Image, pair: Pair, *, labels: bool) -> tuple[Image, str]:
    """The prediction on the reference's grid; and its own, in words, where that is another one of the same extent.

    Raises PredictionError where the two show different places.
    """
    if _is_same_grid(prediction.grid, reference.grid):
        return prediction, ""
    # torch is imported only where a grid differs
    from autoseg.inference.grids import bring_image, bring_label, turn_like

    turned, wanted = turn_like(prediction, reference.grid), reference.grid
    apart = max(extent_distance(turned.grid, wanted), extent_distance(wanted, turned.grid))
    if apart > GRID_TOLERANCE:
        hint = "the origins are equal, where the outer faces should be; " if _is_at_origin(turned.grid, wanted) else ""
        raise PredictionError(
            f"Case {pair.case}: the prediction {pair.prediction} lies elsewhere in the world than its reference: their "
            f"outer faces are {apart:.1f} voxels apart, up to {GRID_TOLERANCE:g} is allowed ({_grid(prediction.grid)}; "
            f"reference {_grid(wanted)}); {hint}predict on the image that was labelled, or resample one of them."
        )
    if not _is_same_grid(turned.grid, wanted):
        turned = bring_label(turned, wanted) if labels else bring_image(turned, wanted)
    return turned, _grid(prediction.grid)


def _is_same_grid(grid: Grid, other: Grid) -> bool:
    return grid.shape == other.shape and corner_distance(other, grid) <= GRID_TOLERANCE


def _is_at_origin(grid: Grid, other: Grid) -> bool:
    return grid.spacing != other.spacing and bool(np.allclose(grid.origin, other.origin))


def _grid(grid: Grid) -> str:
    return f"{_by(grid.shape)} voxels of {'x'.join(f'{spacing:.4g}' for spacing in grid.spacing)} mm"


def _whole_numbers(image: Image, case: str, path: Path, labels: Labels | None) -> Integers:
    """The label map `(Z, Y, X)` as integers, with values that the labels know."""
    array: NDArray[Any] = image.array[0]
    if not np.issubdtype(array.dtype, np.integer):
        rounded = np.rint(array)
        if not np.array_equal(rounded, array):  # NaN differs from itself
            odd = array[~(rounded == array)].flat[0]
            raise PredictionError(f"Case {case}: {path} holds {odd}, a label must be a whole number.")
        array = rounded.astype(np.int64)
    if array.size and int(array.min()) < 0:
        raise PredictionError(f"Case {case}: {path} holds {int(array.min())}, labels start at 0.")
    if labels is not None:
        unknown = sorted(set(_values(array)) - set(labels.known_values))
        if unknown:
            raise PredictionError(
                f"Case {case}: {path} holds the label {unknown[0]}, which dataset.json does not know; "
                f"it lists {', '.join(map(str, labels.known_values))}."
            )
    return array


def _values(array: Integers) -> list[int]:
    # counting is much faster than sorting for the small numbers that labels are
    if array.size and int(array.max()) < 2**16:
        return [int(value) for value in np.flatnonzero(np.bincount(array.ravel()))]
    return [int(value) for value in np.unique(array)]


def _groups(labels: Labels | None, *arrays: Integers) -> dict[str, tuple[int, ...]]:
    """Class or region -> its values."""
    if labels is not None:
        return dict(zip(labels.names, labels.values, strict=True))
    present = sorted({value for array in arrays for value in _values(array)} - {0})
    return {str(value): (value,) for value in present}


def _value_boxes(*arrays: Integers) -> dict[int, Box]:
    """For every value that occurs the box that holds it in all arrays: found in one pass over each."""
    from scipy import ndimage

    found: dict[int, list[Box]] = {}
    for array in arrays:
        values = np.array(_values(array))
        # a sparse numbering (60000) is made dense, because find_objects makes an entry for every number up to the last
        dense = array if values.size and values[-1] < 1000 else np.searchsorted(values, array)
        names = range(int(values[-1]) + 1) if dense is array else values.tolist()
        for place, box in enumerate(ndimage.find_objects(dense)):
            if box is not None:
                found.setdefault(names[place + 1], []).append(box)
    return {value: _enclosing(boxes) for value, boxes in found.items()}


def _enclosing(boxes: Sequence[Box]) -> Box:
    if not boxes:
        return (slice(0, 0), slice(0, 0), slice(0, 0))
    z, y, x = (slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3))
    return (z, y, x)


def _mask(array: Integers, values: tuple[int, ...]) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = array == values[0] if len(values) == 1 else np.isin(array, values)
    return mask


def _occurring_classes(cases: Any) -> tuple[str, ...]:
    return tuple(sorted({name for scores in cases for name in scores}, key=int))


def _with_absent_classes(scores: Scores, classes: Sequence[str]) -> Scores:
    absent = {metric: 0.0 if metric == "volume_error_ml" else math.nan for metric in METRICS}
    return {name: scores.get(name, absent) for name in classes}


def _statistics(
    cases: Mapping[str, Scores], classes: Sequence[str]
) -> tuple[dict[str, dict[str, Statistic]], dict[str, Statistic]]:
    """Statistics by class and metric, and over all classes by metric."""
    by_class: dict[str, dict[str, Statistic]] = {name: {} for name in classes}
    mean: dict[str, Statistic] = {}
    draws = _resampled_counts(len(cases))
    for metric in METRICS:
        values = np.array([[scores[name][metric] for name in classes] for scores in cases.values()])
        values = values.reshape(len(cases), len(classes))
        for column, name in enumerate(classes):
            by_class[name][metric] = _statistic(values[:, [column]], draws)
        mean[metric] = _statistic(values, draws)
    return by_class, mean


def _resampled_counts(cases: int) -> NDArray[np.float64]:
    """How often each case is drawn in each bootstrap sample, `(RESAMPLES, cases)`."""
    if not cases:
        return np.zeros((RESAMPLES, 0))
    draws = np.random.default_rng(SEED).multinomial(cases, [1 / cases] * cases, size=RESAMPLES)
    return draws.astype(np.float64)


def _statistic(values: NDArray[np.float64], draws: NDArray[np.float64]) -> Statistic:
    """The mean over classes of the mean over cases of `(cases, classes)`, with its percentile bootstrap interval.

    Cases are drawn as a whole, with all their classes (Efron and Tibshirani 1993, chapter 13).
    """
    finite = np.isfinite(values)
    infinite = int(np.isinf(values).any(axis=1).sum())
    if not finite.any():
        return Statistic(math.nan, math.nan, math.nan, math.nan, 0, infinite)
    filled = np.where(finite, values, 0.0)
    mean = _mean([float(filled[:, k].sum() / finite[:, k].sum()) for k in range(values.shape[1]) if finite[:, k].any()])
    with np.errstate(invalid="ignore"):  # a sample may hold no case with this class
        sampled = (draws @ filled) / (draws @ finite)
    weight = np.isfinite(sampled)
    kept = weight.any(axis=1)
    means = np.where(weight, sampled, 0.0).sum(axis=1)[kept] / weight.sum(axis=1)[kept]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    per_case = [_mean(row[ok].tolist()) for row, ok in zip(values, finite, strict=True) if ok.any()]
    return Statistic(mean, float(low), float(high), float(np.median(per_case)), len(per_case), infinite)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _finite(content: Any) -> Any:
    """The same content with None for what JSON has no literal for."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content


def _table(rows: Sequence[tuple[str, Mapping[str, Statistic]]], tolerance_mm: float) -> str:
    header = ["", "cases"]
    for metric in TABLE_COLUMNS:
        unit = METRICS[metric].unit
        title = f"{METRICS[metric].title} {tolerance_mm:g} mm" if metric == "nsd" else METRICS[metric].title
        header.append(f"{title} [{unit}]" if unit else title)
    lines = [header]
    for name, row in rows:
        lines.append([name, str(row["dice"].cases), *[_number(row[metric].mean) for metric in TABLE_COLUMNS]])
        lines.append(["", "", *[_interval(row[metric]) for metric in TABLE_COLUMNS]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(line, widths, strict=True)] for line in lines)
    ]
    feet = [f"Below each mean: its {CONFIDENCE:.0%} bootstrap interval over the cases."]
    without = [f"{name} {row['hd95'].infinite}" for name, row in rows[:-1] or rows if row["hd95"].infinite]
    if without:
        feet.append(f"Cases without HD95 and ASSD, since prediction or reference is empty: {', '.join(without)}.")
    return "\n".join([*(text.rstrip() for text in texts), *feet])


def _descriptions(metrics: Mapping[str, Metric]) -> dict[str, dict[str, str]]:
    return {name: {"title": m.title, "unit": m.unit, "better": m.better} for name, m in metrics.items()}


def _image_table(mean: Mapping[str, Statistic]) -> str:
    """One line for each score of the images, its interval behind it."""
    lines = ["Super-resolved images:"]
    for name, metric in IMAGE_METRICS.items():
        statistic = mean[name]
        unit = f" {metric.unit}" if metric.unit else ""
        interval = _interval(statistic)
        lines.append(
            f"{metric.title}  {_number(statistic.mean)}{unit}  {f'({interval})' if interval else ''}, "
            f"{statistic.cases} cases".replace("  ,", ",")
        )
    return "\n".join(lines)


def _interval(statistic: Statistic) -> str:
    return "" if math.isnan(statistic.mean) else f"{_number(statistic.low)}..{_number(statistic.high)}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
