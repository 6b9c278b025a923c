"""Labels of the training cases -> C: what is left of them on a coarser grid, brought down to it and up again.

It is what a perfect answer on the coarse grid would score: where it is low, super-resolution has much to give back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.acquisition import offset, slice_weights, slices
from autoseg.dataset import Case, RawDataset
from autoseg.executor import map_cases
from autoseg.geometry import canonical_axes, turn_array, turn_grid
from autoseg.labels import Labels
from autoseg.metrics import dice
from autoseg.plan import Acquisition, Vector
from autoseg.reading import read_label

CEILING_CASES = 20  # whose labels are brought down and up again: seconds, and close to the mean over all


def label_ceiling(
    dataset: RawDataset, spacing: Vector, *, workers: int, drop_cases: Collection[str] = (), profile: str = "gauss"
) -> float:
    """C: mean Dice of training labels against themselves, brought down to a grid of `spacing` and up again.

    `spacing` is in mm along the canonical axes; labels that are as coarse already do not count. Down goes the share
    of each value in each thick slice and the largest wins; up the nearest slice. It is what a perfect answer on the
    coarse grid would score. At most 20 cases, evenly spaced. Raises what reading a label raises; nan where no case has
    a structure.
    """
    cases = [case for case in dataset.cases if case.identifier not in set(drop_cases)]
    cases = [cases[round(i)] for i in np.linspace(0, len(cases) - 1, min(CEILING_CASES, len(cases)))]
    measure = functools.partial(_case_ceiling, dataset=dataset, spacing=spacing, acquisition=Acquisition(profile))
    found: list[float] = []
    for _, result in map_cases(measure, cases, workers=workers, names=[case.identifier for case in cases]):
        if isinstance(result, Exception):
            raise result
        found += result
    return sum(found) / len(found) if found else math.nan


def _case_ceiling(case: Case, *, dataset: RawDataset, spacing: Vector, acquisition: Acquisition) -> list[float]:
    """The Dice of each structure that a case shows."""
    label = read_label(case, None, dataset, [])
    permutation, flips = canonical_axes(label.grid.direction)
    array = turn_array(label.array, permutation, flips)[0]
    own = turn_grid(label.grid, permutation, flips).spacing
    z, y, x = (max(1.0, float(f"{mm / have:.6g}")) for mm, have in zip(spacing, own, strict=True))
    scale = (z, y, x)
    if max(scale) == 1:  # as coarse already: it cannot tell
        return []
    if any(size < s for size, s in zip(array.shape, scale, strict=True)):
        return []
    fine, restored = down_and_up(array, scale, acquisition)
    return structure_dice(restored, fine, dataset.labels)


def down_and_up(
    label: NDArray[np.integer[Any]], scale: Vector, acquisition: Acquisition
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The part of a label (Z, Y, X) that the thick slices cover, and what is left of it after going down and up."""
    coarse = coarse_label(label, scale, acquisition)
    inside, nearest = [], []
    for size, s in zip(label.shape, scale, strict=True):
        begin = offset(size, s)
        voxels = np.arange(math.ceil(begin - 1e-6), math.floor(begin + slices(size, s) * s + 1e-6))
        inside.append(voxels)
        nearest.append(np.clip(((voxels + 0.5 - begin) / s).astype(int), 0, slices(size, s) - 1))
    return label[np.ix_(*inside)], coarse[np.ix_(*nearest)]


def coarse_label(label: NDArray[np.integer[Any]], scale: Vector, acquisition: Acquisition) -> NDArray[Any]:
    """A label (Z, Y, X) on a grid coarser by `scale`: the value with the largest share, background in a tie."""
    from scipy import ndimage

    weights = [None if s == 1 else slice_weights(n, s, acquisition) for n, s in zip(label.shape, scale, strict=True)]
    shape = tuple(n if w is None else len(w) for n, w in zip(label.shape, weights, strict=True))
    background, winner = np.ones(shape, np.float32), np.zeros(shape, label.dtype)
    largest = np.zeros(shape, np.float32)
    for value, box in enumerate(ndimage.find_objects(label.astype(np.int32)), start=1):
        if box is None:
            continue
        share, where = (label[box] == value).astype(np.float32), []
        for axis, (matrix, side) in enumerate(zip(weights, box, strict=True)):
            if matrix is None:
                where.append(side)
                continue
            reached = matrix[:, side]
            rows = np.flatnonzero(reached.any(axis=1))
            rows = np.arange(rows[0], rows[-1] + 1) if len(rows) else rows
            share = np.moveaxis(np.tensordot(reached[rows], share, axes=(1, axis)), 0, axis)
            where.append(slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0))
        part = tuple(where)
        background[part] -= share
        more = share > largest[part] + 1e-5
        largest[part] = np.where(more, share, largest[part])
        winner[part] = np.where(more, value, winner[part])
    winner[background >= largest - 1e-5] = 0
    return winner


def structure_dice(prediction: NDArray[Any], reference: NDArray[Any], labels: Labels) -> list[float]:
    """Dice of each structure that the reference shows."""
    found = [dice(labels.mask(prediction, name), labels.mask(reference, name)) for name in labels.names]
    return [score for score in found if not math.isnan(score)]
