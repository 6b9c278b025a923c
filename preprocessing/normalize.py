"""One channel of raw intensities and its `Normalization` -> intensities a network can learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import PlanError, unknown_choice
from autoseg.image import Triple
from autoseg.plan import Normalization
from autoseg.plan_values import BIAS_CORRECTION, UNCLIPPED

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]

SMALLEST_SPREAD = 1e-8  # below it a channel counts as constant and is only shifted, never divided by almost nothing
N4_VOXELS = 128**3  # the bias field is smooth: it is fitted on about this many voxels at most
RGB_MAXIMUM = 255.0


def normalize(
    volume: NDArray[Any], normalization: Normalization, *, nonzero: Callable[[], Mask], spacing: Triple
) -> Volume:
    """The channel `volume` (Z, Y, X) of any numeric type, normalised as `normalization` says: float32, same shape.

    `nonzero` gives the mask (Z, Y, X) of the voxels that belong to the image, for the schemes that ask for it;
    `spacing` (z, y, x) is in mm. A constant channel becomes a constant, never NaN. Raises PlanError for an unknown
    scheme.
    """
    corrects_bias = normalization.scheme.startswith(BIAS_CORRECTION)
    scheme = normalization.scheme.removeprefix(BIAS_CORRECTION)
    if scheme not in NORMALIZERS:
        raise PlanError(unknown_choice("Normalization scheme", normalization.scheme, NORMALIZERS))
    result = np.array(volume, dtype=np.float32)
    if corrects_bias:
        result = correct_bias_field(result, nonzero(), spacing)
    return NORMALIZERS[scheme](result, normalization, nonzero)


def intensity_units(volume: NDArray[Any], normalization: Normalization) -> tuple[float, float] | None:
    """(offset, factor) that undo `normalize` of the channel `volume` (Z, Y, X): raw = offset + factor * normalised.

    What is clipped or rounded away stays so. None where there is no such pair: a bias field was divided out, or what
    lies outside of a mask was set to zero.
    """
    undo = UNITS.get(normalization.scheme)
    return None if undo is None else undo(volume, normalization)


def _zscore_units(volume: NDArray[Any], n: Normalization) -> tuple[float, float]:
    mean, std = _moments(np.asarray(volume, dtype=np.float32))
    return mean, _divisor(std)


def _rescale_units(volume: NDArray[Any], n: Normalization) -> tuple[float, float]:
    lowest = float(volume.min())
    return lowest, _divisor(float(volume.max()) - lowest)


UNITS: dict[str, Callable[[NDArray[Any], Normalization], tuple[float, float]]] = {
    "ct": lambda volume, n: (n.mean, _divisor(n.std)),
    UNCLIPPED: lambda volume, n: (n.mean, _divisor(n.std)),
    "zscore": _zscore_units,
    "none": lambda volume, n: (0.0, 1.0),
    "rescale": _rescale_units,
    "rgb": lambda volume, n: (0.0, RGB_MAXIMUM),
}


def _ct(volume: Volume, n: Normalization, nonzero: Callable[[], Mask]) -> Volume:
    """Clip to the percentiles of the dataset's foreground, then z-score: a CT value means the same in every scan."""
    np.clip(volume, n.lower, n.upper, out=volume)
    return _ct_unclipped(volume, n, nonzero)


def _ct_unclipped(volume: Volume, n: Normalization, nonzero: Callable[[], Mask]) -> Volume:
    """The same in units and mean, to be clipped to `late_limits` once thick slices are made of it."""
    volume -= n.mean
    return _divide(volume, n.std)


def late_limits(n: Normalization) -> tuple[float, float] | None:
    """Between what a channel that was normalised without clipping is to be clipped; None where there is no need."""
    if n.scheme != UNCLIPPED:
        return None
    return (n.lower - n.mean) / _divisor(n.std), (n.upper - n.mean) / _divisor(n.std)


def _zscore(volume: Volume, n: Normalization, nonzero: Callable[[], Mask]) -> Volume:
    """Mean 0 and standard deviation 1 over the whole image."""
    mean, std = _moments(volume)
    volume -= mean
    return _divide(volume, std)


def _masked_zscore(volume: Volume, n: Normalization, nonzero: Callable[[], Mask]) -> Volume:
    """Mean 0 and standard deviation 1 inside the nonzero mask; 0 outside of it (skull-stripped brains)."""
    mask = nonzero()
    if mask.any():
        mean, std = _moments(volume[mask])
        volume -= mean
        _divide(volume, std)
    volume[~mask] = 0
    return volume


def _none(volume: Volume, n: Normalization, nonzero: Callable[[], Mask]) -> Volume:
    """The intensities as they are."""
    return volume


def _rescale(volume: Volume, n: Normalization, nonzero: Callable[[], Mask]) -> Volume:
    """From 0 at the image's minimum to 1 at its maximum."""
    volume -= volume.min()
    return _divide(volume, float(volume.max()))


def _rgb(volume: Volume, n: Normalization, nonzero: Callable[[], Mask]) -> Volume:
    """8-bit colours to 0..1."""
    return _divide(volume, RGB_MAXIMUM)


NORMALIZERS: dict[str, Callable[[Volume, Normalization, Callable[[], Mask]], Volume]] = {
    "ct": _ct,
    UNCLIPPED: _ct_unclipped,
    "zscore": _zscore,
    "masked_zscore": _masked_zscore,
    "none": _none,
    "rescale": _rescale,
    "rgb": _rgb,
}


def _moments(values: NDArray[np.float32]) -> tuple[float, float]:
    # float32 sums of a big volume lose digits; one slice at a time in float64 keeps memory small
    mean = float(values.mean(dtype=np.float64))
    squares = sum(float(np.square(part - np.float32(mean), dtype=np.float64).sum()) for part in np.atleast_2d(values))
    return mean, (squares / values.size) ** 0.5


def _divide(volume: Volume, by: float) -> Volume:
    volume /= _divisor(by)
    return volume


def _divisor(by: float) -> float:
    return by if by > SMALLEST_SPREAD else 1.0


def correct_bias_field(volume: Volume, mask: Mask, spacing: Triple) -> Volume:
    """`volume` (Z, Y, X) float32 divided by its slowly varying bias field (N4ITK, Tustison et al. 2010).

    The field is fitted inside `mask` on a thinned grid and evaluated on the full one; `spacing` (z, y, x) in mm.
    Outside the mask, and where nothing can be fitted (a constant or an empty image), intensities stay as they are.
    """
    import SimpleITK as sitk

    if not mask.any() or float(np.ptp(volume[mask])) <= SMALLEST_SPREAD:
        return volume
    axes = [axis for axis in range(3) if volume.shape[axis] > 1]
    if len(axes) < 2:  # N4 fits surfaces and volumes
        return volume
    # N4 works on logarithms: intensities must be positive
    lowest = float(volume[mask].min())
    positive = volume + np.float32(1 - lowest if lowest <= 0 else 0)
    image, region = (sitk.GetImageFromArray(np.squeeze(a)) for a in (positive, mask.astype(np.uint8)))
    for grid in (image, region):
        grid.SetSpacing([spacing[axis] for axis in reversed(axes)])
    factor = max(1, round((volume.size / N4_VOXELS) ** (1 / len(axes))))
    shrink = [max(1, min(factor, size // 4)) for size in image.GetSize()]
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.Execute(sitk.Shrink(image, shrink), sitk.Shrink(region, shrink))
    field = np.exp(sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image)))
    corrected = positive / field.reshape(volume.shape) - (positive - volume)
    return np.where(mask, corrected, volume).astype(np.float32)
