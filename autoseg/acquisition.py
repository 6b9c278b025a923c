"""Thin slices -> the thick slices that a scanner would make of them, and the way back: one small matrix for each axis.

`A(x) = sample(conv1d(x, profile))` along an axis, for any float scale (thick spacing / thin spacing). Every row of a
matrix is one thick slice: its weights sum to 1, and what falls outside of the image counts for the voxel at the edge.
Thick slices are centred: of `fine` voxels they cover the middle `slices(fine, scale) * scale`. Lengths are in fine
voxels, whatever a voxel measures. torch is imported by what needs it, so that workers can weigh slices without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import PlanError, unknown_choice
from autoseg.plan import Acquisition, Vector

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Floats = NDArray[np.float64]
Weights = NDArray[np.float32]

FWHM_IN_SIGMA = 2 * math.sqrt(2 * math.log(2))
ROUNDING = 1e-6  # how far a size may miss a whole number of slices and still hold it
GAUSS_REACH = 5.0  # sigmas after which a Gaussian is cut: 6e-7 of it lies beyond
SINC_LOBES = 16  # of the low-pass on each side; its edge is then as sharp as a ninth of the new Nyquist frequency
KAISER_BETA = 6.0  # of its window: 60 dB of what lies above is stopped


def slices(fine: int, scale: float) -> int:
    """How many thick slices lie within `fine` voxels. Raises PlanError where not one does."""
    if not scale >= 1:
        raise PlanError(f"A thick slice must be at least one voxel thick, got scale {scale:g}.")
    count = math.floor(fine / scale + ROUNDING)
    if count < 1:
        raise PlanError(f"An axis of {fine} voxels holds no slice of {scale:g} voxels; choose a smaller scale.")
    return count


def offset(fine: int, scale: float) -> float:
    """Fine voxels before the outer face of the first thick slice: half of what the thick slices do not cover."""
    return (fine - slices(fine, scale) * scale) / 2


Place = tuple[int, float]
"""How many thick slices, and fine voxels before the outer face of the first."""


def slice_matrix(
    fine: int, scale: float, acquisition: Acquisition, *, thickness: float | None = None, place: Place | None = None
) -> Tensor:
    """What each thick slice takes from each fine voxel: (thick slices, fine), float32, rows sum to 1.

    Row i is centred at fine position `offset + (i + 0.5) * scale - 0.5`; without a `place` there are slices(fine,
    scale) of them, centred. `thickness` is that of a slice / its spacing; None: the middle of the acquisition's range.
    Raises PlanError for a scale below 1 and an axis thinner than a slice.
    """
    import torch

    return torch.tensor(slice_weights(fine, scale, acquisition, thickness=thickness, place=place))


def slice_weights(
    fine: int, scale: float, acquisition: Acquisition, *, thickness: float | None = None, place: Place | None = None
) -> Weights:
    """`slice_matrix` as a NumPy array that must not be written to; takes no torch."""
    if acquisition.profile not in PROFILES:
        raise PlanError(unknown_choice("Profile", acquisition.profile, PROFILES))
    share = middle_thickness(acquisition) if thickness is None else thickness
    count, first = (slices(fine, scale), offset(fine, scale)) if place is None else place
    return _slice_weights(fine, float(scale), acquisition.profile, float(share), acquisition.gap, count, float(first))


def middle_thickness(acquisition: Acquisition) -> float:
    """The middle of the acquisition's range of thicknesses, as a share of the spacing of thick slices."""
    return sum(acquisition.thickness) / 2


def draw_thickness(acquisition: Acquisition, generator: torch.Generator | None) -> float:
    """A thickness drawn evenly from the acquisition's range; without a generator the middle of it."""
    lower, upper = acquisition.thickness
    if generator is None or lower == upper:
        return middle_thickness(acquisition)
    import torch

    share = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    return lower + (upper - lower) * float(share)


def apply_along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """(..., Z, Y, X) with spatial axis `axis` (0, 1, 2) multiplied by `matrix` (new, old); dtype and device of `x`.

    Differentiable; the product is taken in the type of `x`, under autocast too.
    """
    import torch

    if axis not in (0, 1, 2):
        raise ValueError(f"A spatial axis is 0, 1 or 2, got {axis}.")
    weights = matrix.to(device=x.device, dtype=x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if axis == 2:
            return x @ weights.T
        if axis == 1:
            return weights @ x
        moved = weights @ x.flatten(-2)
        return moved.reshape(*moved.shape[:-1], *x.shape[-2:])


def adjoint_along(y: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """The adjoint of `apply_along` with the same matrix: <A x, y> = <x, adjoint y>."""
    return apply_along(y, matrix.T, axis)


def degrade(
    x: Tensor,
    scale: Vector,
    acquisition: Acquisition,
    *,
    generator: torch.Generator | None = None,
    thickness: float | None = None,
) -> Tensor:
    """Fine (..., Z, Y, X), floating -> thick slices along every axis whose scale is above 1; differentiable.

    One-hot labels become soft partial-volume labels. With a generator the thickness is drawn from the acquisition's
    range, unless it is given, and the acquisition's noise is added; without one there is no noise and the thickness is
    the middle of the range. Raises PlanError where an axis is thinner than a slice.
    """
    share = draw_thickness(acquisition, generator) if thickness is None else thickness
    for axis, factor in enumerate(scale):
        if factor != 1:
            matrix = slice_matrix(x.shape[axis - 3], factor, acquisition, thickness=share)
            x = apply_along(x, matrix, axis)
    if generator is not None and acquisition.noise > 0:
        import torch

        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
        x = x + acquisition.noise * x.std(dim=(-3, -2, -1), keepdim=True, correction=0) * noise
    return x


def positions(outputs: int, scale: float, start: float) -> Floats:
    """Where `outputs` voxels lie on an input axis: (start + j + 0.5) / scale - 0.5, in input voxels.

    `scale` is input spacing / output spacing, `start` output voxels from the input's outer face to the output's.
    """
    places: Floats = (start + np.arange(outputs, dtype=np.float64) + 0.5) / scale - 0.5
    return places


def interpolation_matrix(inputs: int, outputs: int, scale: float, start: float = 0.0) -> Tensor:
    """Linear interpolation to `positions(outputs, scale, start)`, clamped to the input: (outputs, inputs), float32."""
    import torch

    return torch.tensor(_interpolation_weights(inputs, outputs, float(scale), float(start)))


def interpolation_inside(places: Floats, inputs: int) -> tuple[slice, Tensor]:
    """Linear interpolation at any places, in input voxels: the voxels that are looked at, and their weights.

    (len(places), voxels), float32. Up to the input's outer faces its edge is repeated, beyond them weights are 0.
    """
    import torch

    held = np.clip(places, 0, inputs - 1)
    lower = np.minimum(held.astype(np.intp), max(inputs - 2, 0))
    first, last = int(lower.min()), min(int(lower.max()) + 1, inputs - 1)
    weights, rows = np.zeros((len(places), last - first + 1), np.float32), np.arange(len(places))
    weights[rows, lower - first] = 1 - (held - lower)
    weights[rows, np.minimum(lower + 1, inputs - 1) - first] += (held - lower).astype(np.float32)
    weights[(places < -0.5 - ROUNDING) | (places > inputs - 0.5 + ROUNDING)] = 0
    return slice(first, last + 1), torch.from_numpy(weights)


def resampling_matrix(inputs: int, outputs: int, scale: float, start: float = 0.0) -> Tensor:
    """`interpolation_matrix` where the output is finer; where it is coarser each voxel is the mean of what it covers.

    (outputs, inputs), float32, rows sum to 1; voxels beyond the input repeat its edge.
    """
    import torch

    if scale >= 1:
        return interpolation_matrix(inputs, outputs, scale, start)
    return torch.tensor(_averaging_weights(inputs, outputs, float(scale), float(start)))


# The width of a profile is in fine voxels: its full width at half maximum, but for dirac, which has none. A profile is
# a function of the distances (slices, taps) of voxels from the slice's centre; weights need not sum to 1.


def _gauss(distance: Floats, width: float) -> Floats:
    exponent = -0.5 * (distance * FWHM_IN_SIGMA / width) ** 2
    # the nearest voxel has weight 1, so that a slice far thinner than a voxel does not vanish between two of them
    weights: Floats = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return weights


def _rect(distance: Floats, width: float) -> Floats:
    """How much of each voxel lies within the slice."""
    end = np.minimum(distance + 0.5, width / 2)
    begin = np.maximum(distance - 0.5, -width / 2)
    weights: Floats = np.clip(end - begin, 0, None)
    return weights


def _sinc(distance: Floats, width: float) -> Floats:
    """k-space cut off at the Nyquist frequency of voxels as wide as the slice, in a Kaiser window."""
    period = max(width, 1.0)  # nothing lies above the fine grid's own Nyquist frequency
    inside = np.clip(1 - (distance / (SINC_LOBES * period)) ** 2, 0, None)
    weights: Floats = np.sinc(distance / period) * np.i0(KAISER_BETA * np.sqrt(inside)) * (inside > 0)
    return weights


def _dirac(distance: Floats, width: float) -> Floats:
    """No thickness: linear interpolation at the centre."""
    weights: Floats = np.clip(1 - np.abs(distance), 0, None)
    return weights


def _gauss_reach(width: float) -> float:
    return GAUSS_REACH * width / FWHM_IN_SIGMA


def _rect_reach(width: float) -> float:
    return width / 2


def _sinc_reach(width: float) -> float:
    return SINC_LOBES * max(width, 1.0)


def _dirac_reach(width: float) -> float:
    return 1.0


# each profile, and how far from the centre it has weight
PROFILES: dict[str, tuple[Callable[[Floats, float], Floats], Callable[[float], float]]] = {
    "gauss": (_gauss, _gauss_reach),
    "rect": (_rect, _rect_reach),
    "sinc": (_sinc, _sinc_reach),
    "dirac": (_dirac, _dirac_reach),
}


@functools.lru_cache(maxsize=256)
def _slice_weights(
    fine: int, scale: float, profile: str, thickness: float, gap: float, count: int, first: float
) -> Weights:
    centres = first + (np.arange(count, dtype=np.float64) + 0.5) * scale - 0.5
    width = scale * thickness * (1 - gap if profile == "rect" else 1)
    return _weights(centres, fine, profile, width)


@functools.lru_cache(maxsize=1024)
def _interpolation_weights(inputs: int, outputs: int, scale: float, start: float) -> Weights:
    return _weights(np.clip(positions(outputs, scale, start), 0, inputs - 1), inputs, "dirac", 0.0)


@functools.lru_cache(maxsize=1024)
def _averaging_weights(inputs: int, outputs: int, scale: float, start: float) -> Weights:
    return _weights(np.clip(positions(outputs, scale, start), 0, inputs - 1), inputs, "rect", 1 / scale)


def _weights(centres: Floats, inputs: int, profile: str, width: float) -> Weights:
    """(len(centres), inputs): the profile around each centre; what falls outside is added to the voxel at the edge."""
    weigh, reach = PROFILES[profile]
    first = np.floor(centres - reach(width))[:, None]
    voxels = first + np.arange(math.ceil(2 * reach(width)) + 2)
    weights = weigh(voxels - centres[:, None], width)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((len(centres), inputs))
    rows = np.arange(len(centres))[:, None]
    np.add.at(matrix, (rows, np.clip(voxels, 0, inputs - 1).astype(np.intp)), weights)
    result = matrix.astype(np.float32)
    result.setflags(write=False)
    return result
