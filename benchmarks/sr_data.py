"""A thin-slice dataset -> the thick-slice datasets of the super-resolution protocol, and what can be had without a net.

Degradation is that of `autoseg.acquisition`: along one axis of the raw file's array, on cases that are cropped in the
middle to what the thick slices cover.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.acquisition import slice_weights
from autoseg.dataset import RawDataset
from autoseg.experiment_planning.label_ceiling import coarse_label
from autoseg.geometry import crop_grid, resample_grid
from autoseg.image import Grid, Image, write_image
from autoseg.metrics import dice, score_images
from autoseg.plan import Acquisition, Vector
from autoseg.preprocessing.resample import resample_image
from autoseg.reading import read_case

Array = NDArray[Any]

ACQUISITION = Acquisition("gauss")  # FWHM = slice thickness = slice spacing, no gap: the protocol's primary one
LARGEST_PART = 12  # denominator of a scale: 2.5 is 5/2
LINEAR_TAPS = (4, 1, 1)  # thick slices on each side, and voxels on each side in the plane, of the linear filter


@dataclass(frozen=True)
class HighCase:
    """One case as it is, and as thick slices."""

    name: str
    image: Array
    """(Z, Y, X) float32."""
    label: Array
    """(Z, Y, X) integers."""
    grid: Grid


@dataclass(frozen=True)
class LowCase:
    """The thick slices of a `HighCase`."""

    image: Array
    label: Array
    """The value with the largest share of each thick voxel."""
    grid: Grid


@dataclass(frozen=True)
class Degradation:
    """Along which axis of the arrays, and how much."""

    axis: int
    scale: float

    @property
    def factors(self) -> Vector:
        """Along (z, y, x)."""
        z, y, x = (self.scale if axis == self.axis else 1.0 for axis in range(3))
        return z, y, x

    def crop(self, case: HighCase) -> HighCase:
        """The middle of a case that whole thick slices cover."""
        step = Fraction(self.scale).limit_denominator(LARGEST_PART).numerator
        size = case.image.shape[self.axis]
        kept = size // step * step
        box = [slice(0, n) for n in case.image.shape]
        box[self.axis] = slice((size - kept) // 2, (size - kept) // 2 + kept)
        inside = (box[0], box[1], box[2])
        return HighCase(case.name, case.image[inside], case.label[inside], crop_grid(case.grid, inside))

    def low(self, case: HighCase) -> LowCase:
        """The thick slices of a cropped case."""
        image = down(case.image, self)
        shape = (image.shape[0], image.shape[1], image.shape[2])
        label = coarse_label(case.label, self.factors, ACQUISITION)
        return LowCase(image, label, resample_grid(case.grid, shape))

    def up_nearest(self, array: Array, size: int) -> Array:
        """`array` on `size` fine voxels along the axis: each that of the thick slice it lies in."""
        where = np.minimum(((np.arange(size) + 0.5) / self.scale).astype(int), array.shape[self.axis] - 1)
        found: Array = np.take(array, where, axis=self.axis)
        return found


def down(array: Array, degradation: Degradation) -> Array:
    """A(x) of (Z, Y, X): float32."""
    weights = slice_weights(array.shape[degradation.axis], degradation.scale, ACQUISITION)
    thick = np.tensordot(weights, array.astype(np.float32), axes=(1, degradation.axis))
    return np.ascontiguousarray(np.moveaxis(thick, 0, degradation.axis), dtype=np.float32)


def read_cases(root: Path) -> tuple[RawDataset, list[HighCase]]:
    """The dataset and all its training cases."""
    dataset = RawDataset.load(root)
    cases = []
    for case in dataset.cases:
        image, label = read_case(case, dataset)
        assert label is not None
        cases.append(HighCase(case.identifier, image.array[0].astype(np.float32), label.array[0], image.grid))
    return dataset, cases


def write_dataset(
    root: Path, source: RawDataset, cases: Iterable[tuple[str, Array, Array, Grid]], **extra: object
) -> Path:
    """A dataset folder of (name, image, label, grid) with the channels and labels of `source`; its path."""
    number = 0
    for name, image, label, grid in cases:
        write_image(Image(image[None].astype(np.float32), grid), root / "imagesTr" / f"{name}_0000.nii.gz")
        write_image(Image(label[None].astype(np.uint8), grid), root / "labelsTr" / f"{name}.nii.gz")
        number += 1
    content = json.loads((source.root / "dataset.json").read_text(encoding="utf-8"))
    content |= {"numTraining": number, "file_ending": ".nii.gz", **extra}
    (root / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return root


# the dataset of each arm: what a network is trained on
DATASETS: dict[str, Callable[[HighCase, Degradation], tuple[str, Array, Array, Grid]]] = {
    "high": lambda case, _: (case.name, case.image, case.label, case.grid),
    "whole": lambda case, _: (case.name, case.image, case.label, case.grid),
    "low": lambda case, d: (case.name, d.low(case).image, d.low(case).label, d.low(case).grid),
    "interpolated": lambda case, d: (case.name, cubic(d.low(case).image, case.image.shape), case.label, case.grid),
}


def cubic(image: Array, shape: Sequence[int]) -> Array:
    """(Z, Y, X) on a finer grid over the same extent, by cubic splines."""
    z, y, x = shape
    found: Array = resample_image(image[None], (z, y, x), 3)[0]
    return found


# --- without a network ----------------------------------------------------------------------------------------------


def floors(source: RawDataset, cases: Sequence[HighCase], degradation: Degradation) -> dict[str, float]:
    """Cubic interpolation, the best linear filter, and what perfect thick-slice labels score."""
    cropped = [degradation.crop(case) for case in cases]
    lows = [degradation.low(case) for case in cropped]
    linear = linear_filter(cropped, lows, degradation)
    rows: dict[str, list[float]] = {}
    values = [value for value in source.labels.known_values if value]
    for case, low in zip(cropped, lows, strict=True):
        shape = case.image.shape
        for name, image in (("cubic", cubic(low.image, shape)), ("linear filter", linear(low.image, shape))):
            for metric, score in score_images(case.image, image).items():
                rows.setdefault(f"{name} {metric}", []).append(score)
        hard = degradation.up_nearest(low.label, shape[degradation.axis])
        shares = [cubic(down(case.label == value, degradation), shape) for value in (0, *values)]
        soft = np.array((0, *values))[np.argmax(shares, axis=0)]
        for name, label in (("A0 cap", hard), ("A2 cap", soft)):
            scores = [dice(label == value, case.label == value) for value in values]
            rows.setdefault(f"{name} Dice", []).append(float(np.nanmean(scores)))
    return {name: float(np.mean(scores)) for name, scores in rows.items()}


def linear_filter(
    cases: Sequence[HighCase], lows: Sequence[LowCase], degradation: Degradation
) -> Callable[[Array, Sequence[int]], Array]:
    """The linear filter with the least squared error over all cases, one for each place within a thick slice.

    Each fine voxel is a weighted sum of the thick voxels around it: 9 along the axis, 3 x 3 in the plane.
    """
    scale = degradation.scale
    phases = round(scale) if scale == round(scale) else 0
    if not phases:
        raise SystemExit("The best linear filter is there for whole scales alone.")
    size = int(np.prod([2 * taps + 1 for taps in LINEAR_TAPS])) + 1
    normal, moment = np.zeros((size, size)), np.zeros((size, phases))
    for case, low in zip(cases, lows, strict=True):
        # every case counts the same, as in the mean PSNR: errors are relative to its peak
        peak = float(np.percentile(case.image, 99.5) - np.percentile(case.image, 0.5))
        known = _neighbours(low.image, degradation.axis) / peak
        wanted = _by_phase(case.image, degradation.axis, phases) / peak
        normal += known.T @ known / len(known)
        moment += known.T @ wanted / len(known)
    weights = np.linalg.solve(normal + 1e-9 * np.eye(size), moment)

    def apply(image: Array, shape: Sequence[int]) -> Array:
        answer = _neighbours(image, degradation.axis) @ weights
        lines = np.moveaxis(image, degradation.axis, 0).shape
        fine = answer.reshape(*lines, phases).transpose(0, 3, 1, 2).reshape(-1, *lines[1:])
        found: Array = np.moveaxis(fine, 0, degradation.axis)
        assert found.shape == tuple(shape)
        return found

    return apply


def _neighbours(image: Array, axis: int) -> Array:
    """(voxels, taps + 1): the neighbourhood of each thick voxel, and a 1 for the mean."""
    lines = np.moveaxis(image, axis, 0).astype(np.float64)
    padded = np.pad(lines, [(taps, taps) for taps in LINEAR_TAPS], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, [2 * taps + 1 for taps in LINEAR_TAPS])
    flat = windows.reshape(lines.size, -1)
    return np.concatenate([flat, np.full((len(flat), 1), image.mean())], axis=1)


def _by_phase(image: Array, axis: int, phases: int) -> Array:
    """(thick voxels, phases): the fine voxels within each thick one."""
    lines = np.moveaxis(image, axis, 0)
    found: Array = lines.reshape(-1, phases, *lines.shape[1:]).transpose(0, 2, 3, 1).reshape(-1, phases)
    return found.astype(np.float64)
