"""Two masks and their spacing -> scores: overlap, surface distances, volumes, lesions. Two images -> PSNR and SSIM.

Masks are `(Z, Y, X)`, spacing is `(z, y, x)` in mm. A volume with Z = 1 is a plane: its surface is the outline.

What a score is when a mask is empty, everywhere the same:

====================  ==============================  ===========================================
score                 both empty                      one of them empty
====================  ==============================  ===========================================
Dice, IoU, NSD, F1    nan (nothing to score; means    0
                      leave it out, as nnU-Net does)
HD95, ASSD            nan                             inf
volume error, ml      0                               the signed volume
volume error, ratio   nan                             -1 (no prediction), inf (no reference)
====================  ==============================  ===========================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Image = NDArray[Any]
Triple = tuple[float, float, float]
Box = tuple[slice, slice, slice]

PEAK_PERCENTILES = (0.5, 99.5)  # of the reference: a few bright voxels must not make every image look good
SSIM_SIGMA = 1.5  # voxels; with the two constants those of Wang et al. 2004
SSIM_REACH = 5  # voxels on each side: 11 in all
SSIM_CONSTANTS = (0.01, 0.03)  # of the peak, for luminance and for contrast
TOLERANCE_MM = 1.0  # how far two surfaces may be apart to count as the same in NSD


@dataclass(frozen=True)
class Metric:
    """How a score is read."""

    title: str
    """Its name in tables."""
    unit: str
    """"mm", "ml", or "" for a ratio."""
    better: str
    """`higher`, `lower`, or `zero` (signed errors)."""


METRICS = {
    "dice": Metric("Dice", "", "higher"),
    "iou": Metric("IoU", "", "higher"),
    "nsd": Metric("NSD", "", "higher"),
    "hd95": Metric("HD95", "mm", "lower"),
    "assd": Metric("ASSD", "mm", "lower"),
    "volume_error_ml": Metric("Volume error", "ml", "zero"),
    "volume_error_ratio": Metric("Relative", "", "zero"),
    "lesion_f1": Metric("Lesion F1", "", "higher"),
}

IMAGE_METRICS = {
    "psnr": Metric("PSNR", "dB", "higher"),
    "ssim": Metric("SSIM", "", "higher"),
}


def score_masks(
    prediction: Mask,
    reference: Mask,
    spacing: Triple,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    plane: bool | None = None,
) -> dict[str, float]:
    """Every score of METRICS for one structure of one case.

    The work is done inside the box that holds both masks, once for all scores. `plane` says whether the image that
    the masks were cut from is a plane; None: it is where Z = 1. Raises ValueError where the shapes differ.
    """
    _check_shapes(prediction, reference)
    plane = prediction.shape[0] == 1 if plane is None else plane
    box = union_box(prediction, reference)
    prediction, reference = prediction[box], reference[box]
    surfaces = _surface_distances(prediction, reference, spacing, plane=plane)
    overlap, predicted, expected = _count(prediction & reference), _count(prediction), _count(reference)
    volume_ml = math.prod(spacing) / 1000
    return {
        "dice": _ratio(2 * overlap, predicted + expected),
        "iou": _ratio(overlap, predicted + expected - overlap),
        "nsd": surfaces.nsd(tolerance_mm),
        "hd95": surfaces.hd95(),
        "assd": surfaces.assd(),
        "volume_error_ml": (predicted - expected) * volume_ml,
        "volume_error_ratio": _relative(predicted - expected, expected),
        "lesion_f1": lesion_f1(prediction, reference),
    }


def dice(prediction: Mask, reference: Mask) -> float:
    """Dice coefficient 2 |A and B| / (|A| + |B|), from 0 to 1; nan where both are empty."""
    _check_shapes(prediction, reference)
    return _ratio(2 * _count(prediction & reference), _count(prediction) + _count(reference))


def iou(prediction: Mask, reference: Mask) -> float:
    """Intersection over union (Jaccard index), from 0 to 1; nan where both are empty."""
    _check_shapes(prediction, reference)
    return _ratio(_count(prediction & reference), _count(prediction | reference))


def nsd(prediction: Mask, reference: Mask, spacing: Triple, *, tolerance_mm: float = TOLERANCE_MM) -> float:
    """Normalised surface Dice: the share of both surfaces that lies within `tolerance_mm` of the other one.

    Counted over surface voxels. Nikolov et al. 2018, arXiv:1809.04430.
    """
    return surface_distances(prediction, reference, spacing).nsd(tolerance_mm)


def hd95(prediction: Mask, reference: Mask, spacing: Triple) -> float:
    """95th percentile of the Hausdorff distance in mm: the larger of the two directed 95th percentiles."""
    return surface_distances(prediction, reference, spacing).hd95()


def assd(prediction: Mask, reference: Mask, spacing: Triple) -> float:
    """Average symmetric surface distance in mm: the mean over the voxels of both surfaces."""
    return surface_distances(prediction, reference, spacing).assd()


def volume_error(prediction: Mask, reference: Mask, spacing: Triple) -> tuple[float, float]:
    """Predicted minus reference volume: in ml, and as a ratio of the reference volume."""
    _check_shapes(prediction, reference)
    expected = _count(reference)
    difference = _count(prediction) - expected
    return difference * math.prod(spacing) / 1000, _relative(difference, expected)


def lesion_f1(prediction: Mask, reference: Mask) -> float:
    """F1 score over connected components (26 neighbours): a component counts as found where it touches the other mask.

    The harmonic mean of the share of reference components that were found and of predicted components that are true.
    """
    _check_shapes(prediction, reference)
    if not prediction.any() and not reference.any():
        return math.nan
    found, lesions = _touched_components(reference, prediction)
    true, predicted = _touched_components(prediction, reference)
    if not found or not true:
        return 0.0
    sensitivity, precision = found / lesions, true / predicted
    return 2 * sensitivity * precision / (sensitivity + precision)


def score_images(
    reference: Image, image: Image, *, peak: float | None = None, region: Box | Mask | None = None
) -> dict[str, float]:
    """Every score of IMAGE_METRICS for one channel of one case; arguments as for `psnr`."""
    peak = intensity_peak(reference) if peak is None else peak
    return {
        "psnr": psnr(reference, image, peak=peak, region=region),
        "ssim": ssim(reference, image, peak=peak, region=region),
    }


def intensity_peak(reference: Image) -> float:
    """What stands for the peak of an image's intensities: its 99.5th minus its 0.5th percentile."""
    lower, upper = np.percentile(reference, PEAK_PERCENTILES)
    return float(upper - lower)


def psnr(reference: Image, image: Image, *, peak: float | None = None, region: Box | Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB of an image (Z, Y, X) against its reference: 10 log10(peak^2 / mean error^2).

    `peak` by default that of the whole reference (`intensity_peak`), `region` a mask or a box of the voxels that
    count. inf where the images are equal; nan where the peak is not above zero or the region is empty. Raises
    ValueError where the shapes differ.
    """
    _check_images(reference, image)
    peak = intensity_peak(reference) if peak is None else peak
    error = np.square(np.subtract(image, reference, dtype=np.float64))[... if region is None else region]
    if not error.size or not peak > 0:
        return math.nan
    mean = float(error.mean())
    return 10 * math.log10(peak**2 / mean) if mean else math.inf


def ssim(reference: Image, image: Image, *, peak: float | None = None, region: Box | Mask | None = None) -> float:
    """Structural similarity of an image (Z, Y, X) and its reference, at most 1: the mean of its map over the region.

    Statistics in a Gaussian window of 11 voxels (sigma 1.5), in three dimensions, in a plane (Z = 1) in two; the image
    is mirrored at its edges. Intensities count from the reference's 0.5th percentile, so that the unit in which an
    image is given (raw, z-scored, HU) changes nothing. `peak`, `region`, nan and errors as for `psnr`.
    Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """
    _check_images(reference, image)
    peak = intensity_peak(reference) if peak is None else peak
    if not peak > 0:
        return math.nan
    darkest = np.percentile(reference, PEAK_PERCENTILES[0])
    first, second = (np.asarray(volume, dtype=np.float64) - darkest for volume in (reference, image))
    mean, other = _window_mean(first), _window_mean(second)
    variance = _window_mean(first * first) - mean * mean
    other_variance = _window_mean(second * second) - other * other
    covariance = _window_mean(first * second) - mean * other
    luminance, contrast = ((constant * peak) ** 2 for constant in SSIM_CONSTANTS)
    similarity = (2 * mean * other + luminance) * (2 * covariance + contrast)
    norm = (mean * mean + other * other + luminance) * (variance + other_variance + contrast)
    scored = (similarity / norm)[... if region is None else region]
    return float(scored.mean()) if scored.size else math.nan


def _window_mean(image: Floats) -> Floats:
    from scipy import ndimage

    result: Floats = ndimage.gaussian_filter(image, SSIM_SIGMA, mode="reflect", radius=SSIM_REACH)
    return result


@dataclass(frozen=True)
class SurfaceDistances:
    """How far each surface is from the other, in mm. An empty mask has no surface."""

    from_prediction: Floats
    """For every surface voxel of the prediction the distance to the reference's surface; inf where that is empty."""
    from_reference: Floats
    """The other way round."""

    def nsd(self, tolerance_mm: float) -> float:
        """Share of surface voxels within the tolerance."""
        # a rounding error must not push a distance of exactly the tolerance out
        limit = tolerance_mm * (1 + 1e-9)
        within = _count(self.from_prediction <= limit) + _count(self.from_reference <= limit)
        return _ratio(within, self.from_prediction.size + self.from_reference.size)

    def hd95(self) -> float:
        """The larger of the two directed 95th percentiles."""
        if not self.from_prediction.size or not self.from_reference.size:
            return self._without_overlap()
        return float(max(np.percentile(self.from_prediction, 95), np.percentile(self.from_reference, 95)))

    def assd(self) -> float:
        """Mean over both surfaces."""
        if not self.from_prediction.size or not self.from_reference.size:
            return self._without_overlap()
        total = self.from_prediction.sum() + self.from_reference.sum()
        return float(total / (self.from_prediction.size + self.from_reference.size))

    def _without_overlap(self) -> float:
        return math.inf if self.from_prediction.size or self.from_reference.size else math.nan


def surface_distances(prediction: Mask, reference: Mask, spacing: Triple) -> SurfaceDistances:
    """The distances between the surface voxels (those with a face towards the outside) of two masks `(Z, Y, X)`."""
    _check_shapes(prediction, reference)
    box = union_box(prediction, reference)
    return _surface_distances(prediction[box], reference[box], spacing, plane=prediction.shape[0] == 1)


def union_box(*masks: Mask) -> Box:
    """The smallest box that holds every foreground voxel of the masks; empty slices where there is none."""
    slices = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(np.logical_or.reduce([mask.any(axis=others) for mask in masks]))
        slices.append(slice(int(occupied[0]), int(occupied[-1]) + 1) if occupied.size else slice(0, 0))
    return (slices[0], slices[1], slices[2])


def surface(mask: Mask, *, plane: bool = False) -> Mask:
    """The voxels of `mask` with a face towards the outside; what is beyond the image counts as outside.

    With `plane` the faces along z do not count.
    """
    inner = mask.copy()
    for axis in range(1 if plane else 0, 3):
        length = mask.shape[axis]
        for here, neighbour in ((slice(1, None), slice(0, -1)), (slice(0, -1), slice(1, None))):
            inner[_along(axis, here)] &= mask[_along(axis, neighbour)]
        for edge in (0, length - 1) if length else ():
            inner[_along(axis, slice(edge, edge + 1))] = False
    result: Mask = mask & ~inner
    return result


def _surface_distances(prediction: Mask, reference: Mask, spacing: Triple, *, plane: bool) -> SurfaceDistances:
    # A k-d tree of the surface voxels is exact too, and ten times faster than a distance transform of the whole box.
    from scipy.spatial import cKDTree

    points = [np.argwhere(surface(mask, plane=plane)) * np.array(spacing) for mask in (prediction, reference)]
    if not len(points[0]) or not len(points[1]):
        return SurfaceDistances(*[np.full(len(own), math.inf) for own in points])
    trees = [cKDTree(own, balanced_tree=False, compact_nodes=False) for own in points]
    return SurfaceDistances(trees[1].query(points[0])[0], trees[0].query(points[1])[0])


def _touched_components(mask: Mask, other: Mask) -> tuple[int, int]:
    """How many components of `mask` touch `other`, and how many there are."""
    import cc3d

    if not mask.any():
        return 0, 0
    # as numbers: cc3d 4.1 fails on some boolean rows of a single line ("maximum length exception")
    numbers = np.ascontiguousarray(mask).view(np.uint8)
    components: NDArray[Any] = cc3d.connected_components(numbers, connectivity=26)
    return _count(np.unique(components[other])), int(components.max())


def _along(axis: int, part: slice) -> Box:
    box = [slice(None), slice(None), slice(None)]
    box[axis] = part
    return (box[0], box[1], box[2])


def _count(array: NDArray[Any]) -> int:
    return int(np.count_nonzero(array))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _relative(difference: float, expected: float) -> float:
    if expected:
        return float(difference / expected)
    return math.inf if difference else math.nan


def _check_images(reference: Image, image: Image) -> None:
    if reference.shape != image.shape or reference.ndim != 3 or not reference.size:
        raise ValueError(f"Two images (Z, Y, X) of the same shape are needed, got {reference.shape} and {image.shape}.")


def _check_shapes(prediction: Mask, reference: Mask) -> None:
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"Two masks (Z, Y, X) of the same shape are needed, got {prediction.shape} and {reference.shape}."
        )
