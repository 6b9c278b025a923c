"""A case of a raw dataset -> its image and label, voxels checked: what planning and preprocessing begin with.

Planning, preprocessing, prediction and verify refuse the same things with the same sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.dataset import DATASET_JSON, Case, RawDataset, main_image
from autoseg.errors import DatasetError, listed
from autoseg.geometry import HALF_A_VOXEL, corner_distance, extent_distance, outer_faces, share_covered
from autoseg.image import Grid, Image, read_image

SAME_PLACE_VOXELS = 1e-3
"""Corners of two grids that lie closer than this, in voxels, are the same: headers hold rounded numbers (NIfTI has
32-bit floats, and quaternions for directions)."""

NEAR_PLACE_VOXELS = 0.05
"""Up to here the grids of image and label count as one (half a voxel would be a voxel wrongly labelled); verify says
so and can repair it."""

SAME_EXTENT_VOXELS = HALF_A_VOXEL
"""Labels on a grid of their own: how far its outer corners may lie from the image's, in voxels of the label."""

LEAST_OVERLAP = 0.5
"""Share of the image that a channel on a grid of its own must cover: less is a wrong header or another body part."""

FLOAT32_EXACT = 2**24  # whole numbers up to here keep their value as float32


def read_case(case: Case, dataset: RawDataset) -> tuple[Image, Image | None]:
    """The image of a case, all channels stacked `(C, Z, Y, X)` float32, and its label `(1, Z, Y, X)` int16 or None.

    The label is on the image's grid, or on its own where the dataset says so (`RawDataset.label_grid`). Every check
    that needs the voxels is made here, so that planning, preprocessing and verify refuse the same things with the same
    sentence. Raises DatasetError naming the case and the file: geometry of channels and label differ, NaN or Inf,
    fractional or unknown label values, wrong number of channels.
    """
    return read_case_noting(case, dataset)[:2]


def read_case_noting(case: Case, dataset: RawDataset) -> tuple[Image, Image | None, tuple[str, ...]]:
    """`read_case`, and what is not right but can be used: sentences without the name of the case."""
    notes: list[str] = []
    try:
        image = read_channels(case, dataset, notes)
        label = None if case.label is None else read_label(case, image.grid, dataset, notes)
    except DatasetError as error:
        raise DatasetError(f"Case {case.identifier}: {error}") from error
    return image, label, tuple(notes)


def read_channels(case: Case, dataset: RawDataset, notes: list[str]) -> Image:
    """All channels (C, Z, Y, X) as float32 on the grid of the first; what is odd but usable is added to `notes`.

    Those that lie on grids of their own are `references` of the image. Raises DatasetError naming the file.
    """
    files, expected = case.images, len(dataset.channels)
    if len(files) not in (1, expected) or (dataset.reference_channels and len(files) != expected):
        raise DatasetError(f"{len(files)} image files, expected {expected} ({', '.join(dataset.channels)}).")
    references = [_read_reference(files[number], dataset) for number in dataset.reference_channels]
    files = tuple(path for number, path in enumerate(files) if number not in dataset.reference_channels)
    expected = len(files) if references else expected
    first = read_image(files[0])
    components = expected if len(files) == 1 else 1
    _check_components(files[0], first, components, dataset)
    stacked = np.empty((expected, *first.shape), dtype=np.float32)
    for number, path in enumerate(files):
        image = first if number == 0 else read_image(path)
        if number:
            _check_components(path, image, 1, dataset)
            _check_same_place(path, image.grid, files[0], first.grid, notes)
        _check_finite(path, image.array)
        with np.errstate(over="ignore"):
            stacked[number : number + image.channels] = image.array
        _check_finite(path, stacked[number : number + image.channels])
    for number, reference in zip(dataset.reference_channels, references, strict=True):
        check_overlap(first.grid, reference.grid, str(case.images[number]))
    return Image(stacked, first.grid, tuple(references))


def _read_reference(path: Path, dataset: RawDataset) -> Image:
    """A channel (1, Z, Y, X) float32 on its own grid."""
    image = read_image(path)
    _check_components(path, image, 1, dataset)
    _check_finite(path, image.array)
    with np.errstate(over="ignore"):
        array = image.array.astype(np.float32)
    _check_finite(path, array)
    return Image(array, image.grid)


def check_overlap(image: Grid, reference: Grid, name: str) -> None:
    """Refuse a reference that does not cover most of the image; `name` begins the sentence. Raises DatasetError."""
    share = share_covered(image, reference)
    if share >= LEAST_OVERLAP:
        return
    (first, last), (first_of_image, last_of_image) = outer_faces(reference), outer_faces(image)
    much = "does not overlap the image" if share == 0 else f"covers {share:.0%} of the image"
    raise DatasetError(
        f"{name}: the reference channel {much}, expected at least {LEAST_OVERLAP:.0%}: it lies from {_rounded(first)} "
        f"to {_rounded(last)} mm (z, y, x), the image from {_rounded(first_of_image)} to {_rounded(last_of_image)} mm; "
        "correct the header, or register both."
    )


def _check_components(path: Path, image: Image, expected: int, dataset: RawDataset) -> None:
    if image.channels != expected:
        raise DatasetError(
            f"{path}: has {image.channels} {'component' if image.channels == 1 else 'components'} a voxel, expected "
            f"{expected}; {DATASET_JSON} names the channels {', '.join(dataset.channels)}."
        )


def _check_finite(path: Path, array: NDArray[Any]) -> None:
    # one NaN or infinity makes the sum so, and the sum needs no mask in memory
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):
            return
    nans, infinities = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if nans or infinities:
        kinds = [f"{count} {kind}" for count, kind in ((nans, "NaN"), (infinities, "infinite")) if count]
        raise DatasetError(
            f"{path}: {' and '.join(kinds)} of {array.size} voxels; replace them by a value that makes sense for the "
            "image."
        )


def _hint(grid: Grid, reference: Grid) -> str:
    """What else can be done with a file that covers the same extent on a finer grid."""
    finer = all(n >= m for n, m in zip(grid.shape, reference.shape, strict=True))
    if not finer or extent_distance(reference, grid) > SAME_EXTENT_VOXELS:
        return ""
    return (
        ', or, where a finer grid is meant, say so in dataset.json: "label_grid": "own" for labels, "channel_grids" '
        "for a channel"
    )


def _check_same_place(path: Path, grid: Grid, reference_path: Path, reference: Grid, notes: list[str]) -> None:
    """Refuse a file whose voxels lie elsewhere than those of the case's first channel; note a tiny difference."""
    if grid.shape != reference.shape:
        raise DatasetError(
            f"{path}: size {grid.shape} voxels (z, y, x) differs from {reference.shape} of {reference_path.name}; "
            f"resample one of them{_hint(grid, reference)}."
        )
    distance = corner_distance(reference, grid)
    if distance <= SAME_PLACE_VOXELS:
        return
    what, got, expected = _largest_difference(grid, reference)
    if distance > NEAR_PLACE_VOXELS:
        raise DatasetError(
            f"{path}: {what} {got} differs from {expected} of {reference_path.name} (corners {distance:.3g} voxels "
            "apart); correct the header or resample one of them."
        )
    notes.append(
        f"{path}: {what} {got} differs slightly from {expected} of {reference_path.name} (corners {distance:.2g} "
        "voxels apart); taken as equal"
    )


def _check_same_extent(path: Path, grid: Grid, reference_path: Path, reference: Grid) -> None:
    """Refuse a label on a grid of its own that covers another piece of the world than the image, or is coarser."""
    (first, last), (first_of_image, last_of_image) = outer_faces(grid), outer_faces(reference)
    if extent_distance(reference, grid) > SAME_EXTENT_VOXELS:
        raise DatasetError(
            f"{path}: the label covers {_rounded(first)} to {_rounded(last)} mm (z, y, x), the image "
            f"{reference_path.name} {_rounded(first_of_image)} to {_rounded(last_of_image)} mm; they must agree within "
            "half a voxel of the label: correct the header, or cut both to the same extent."
        )
    if any(size < expected for size, expected in zip(grid.shape, reference.shape, strict=True)):
        raise DatasetError(
            f"{path}: the label has {grid.shape} voxels (z, y, x), fewer than the {reference.shape} of "
            f"{reference_path.name}; a label on a grid of its own must be finer, so resample it to the image's grid."
        )


def _largest_difference(grid: Grid, reference: Grid) -> tuple[str, str, str]:
    """The part of the geometry that moves the corners most: its name, its value, the expected one."""
    extent = max(n * s for n, s in zip(reference.shape, reference.spacing, strict=True))
    spacing = np.abs(np.subtract(grid.spacing, reference.spacing)) * np.asarray(reference.shape)
    moved = {
        "spacing": float(spacing.max()),
        "origin": float(np.abs(np.subtract(grid.origin, reference.origin)).max()),
        "direction": float(np.abs(np.subtract(grid.direction, reference.direction)).max()) * extent,
    }
    what = max(moved, key=lambda name: moved[name])
    if what == "direction":
        return what, _rounded(np.ravel(grid.direction)), _rounded(np.ravel(reference.direction))
    unit = " mm"
    return what, _rounded(getattr(grid, what)) + unit, _rounded(getattr(reference, what)) + unit


def _rounded(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def read_label(case: Case, grid: Grid | None, dataset: RawDataset, notes: list[str]) -> Image:
    """The label (1, Z, Y, X) int16 on the image's `grid` (None: not to be compared); oddities are added to `notes`.

    Where the dataset's labels have grids of their own it stays on that, which must cover the extent of `grid`. Raises
    DatasetError naming the file.
    """
    assert case.label is not None
    path, known = case.label, dataset.labels.known_values
    label = read_image(path)
    if label.channels != 1:
        raise DatasetError(
            f"{path}: the label has {label.channels} components a voxel, expected 1; save it as one channel of "
            "integers."
        )
    own_grid = dataset.label_grid == "own"
    if grid is not None and own_grid:
        _check_same_extent(path, label.grid, main_image(case, dataset), grid)
    elif grid is not None:
        _check_same_place(path, label.grid, main_image(case, dataset), grid, notes)
    array = label.array
    if array.dtype.kind == "f":
        _check_finite(path, array)
        array = _whole_numbers(path, array)
        notes.append(f"{path}: the label holds whole numbers as {label.array.dtype}; taken as integers")
    values = label_values(array)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise DatasetError(
            f"{path}: label value{'s' if len(unknown) > 1 else ''} {listed(unknown)} "
            f"({_voxels(sum(values[value] for value in unknown))}) not in {DATASET_JSON}, expected {listed(known)}; "
            "correct the label or name the value."
        )
    return Image(array.astype(np.int16), label.grid if own_grid or grid is None else grid)


def _whole_numbers(path: Path, array: NDArray[Any]) -> NDArray[np.int32]:
    whole = np.rint(array)
    fractional = array != whole
    if fractional.any():
        example = float(array[fractional][0])
        raise DatasetError(
            f"{path}: fractional label in {_voxels(int(fractional.sum()))} (such as {example:.6g}), expected whole "
            "numbers; it may have been resampled as an image: make the label again with nearest-neighbour or label "
            "interpolation."
        )
    return np.asarray(np.clip(whole, -FLOAT32_EXACT, FLOAT32_EXACT), dtype=np.int32)


def label_values(label: NDArray[Any]) -> dict[int, int]:
    """Each value of an integer label map (any shape) and its number of voxels, sorted by value."""
    lowest, highest = int(label.min(initial=0)), int(label.max(initial=0))
    if lowest < 0 or highest > np.iinfo(np.uint16).max:
        values, counts = np.unique(label, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    # counting in slabs: bincount takes eight bytes a voxel
    total = np.zeros(highest + 1, dtype=np.int64)
    for slab in label.reshape(-1, label.shape[-1] if label.ndim < 2 else label.shape[-1] * label.shape[-2]):
        total += np.bincount(slab, minlength=highest + 1)
    return {int(value): int(total[value]) for value in np.flatnonzero(total)}


def _voxels(count: int) -> str:
    return "1 voxel" if count == 1 else f"{count} voxels"
