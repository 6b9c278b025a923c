"""A prediction file and its reference -> the scores of one case, taken on the reference's grid.

A prediction on another grid of the same extent is brought there as validation does; one that shows another place is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import PredictionError
from autoseg.geometry import HALF_A_VOXEL, corner_distance, extent_distance
from autoseg.image import Grid, Image, read_image
from autoseg.labels import Labels
from autoseg.metrics import IMAGE_METRICS, score_images, score_masks

GRID_TOLERANCE = 0.5  # voxels (the smaller ones) by which corners may be apart; beyond it the files show other places

Scores = dict[str, dict[str, float]]  # class -> metric -> score
ImageScores = dict[str, float]  # metric -> score
Box = tuple[slice, slice, slice]
Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Pair:
    """A prediction and what it should be."""

    case: str
    prediction: Path
    reference: Path


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
    if apart > HALF_A_VOXEL:
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


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


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
