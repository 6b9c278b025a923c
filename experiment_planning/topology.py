"""Spacing and shape of an image -> patch, strides and kernels of a U-Net. Pure functions; nothing is read or written.

The rules are nnU-Net's published ones (Isensee et al. 2021, supplementary note 4); axes are in the order of the given
spacing, two of them for 2D and three for 3D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoseg.plan import Shape, Vector

MIN_BOTTLENECK = 4  # voxels that are left along an axis after pooling it (nnU-Net's)
SPACING_FACTOR = 2.0  # axes within this factor of the finest spacing count as even (nnU-Net's)
FEWEST_VOXELS_ALONE = 3 * MIN_BOTTLENECK  # an axis is pooled as the only one while it has at least so many (nnU-Net's)
START_VOXELS = {2: 2048**2, 3: 256**3}  # of the first patch that is tried; memory shrinks it (nnU-Net's)


@dataclass(frozen=True)
class Topology:
    """The part of an architecture that follows from the grid."""

    patch: tuple[int, ...]
    """Voxels of the patch, divisible by `divisor`."""
    strides: tuple[tuple[int, ...], ...]
    """Downsampling on entering each stage, the first all 1."""
    kernels: tuple[tuple[int, ...], ...]
    """Convolution kernel of each stage."""

    @property
    def divisor(self) -> tuple[int, ...]:
        """What the patch is divisible by: the product of the strides."""
        return tuple(math.prod(along) for along in zip(*self.strides, strict=True))

    @property
    def stages(self) -> int:
        """Resolutions of the U-Net."""
        return len(self.strides)


def plan_topology(spacing_mm: Sequence[float], patch: Sequence[int]) -> Topology:
    """Strides and kernels for a patch, and the patch made divisible by them (never smaller than asked for).

    An axis is halved while at least 4 voxels are left and its spacing is within a factor 2 of the finest one that
    can still be halved; kernels are 1 along an axis until its spacing is within a factor 2 of the finest, or the
    bottleneck is reached.
    """
    spacing, size = [float(s) for s in spacing_mm], [int(p) for p in patch]
    axes = range(len(size))
    kernel = [1] * len(size)
    strides, kernels = [(1,) * len(size)], []
    while True:
        kernel = [
            3 if k == 3 or spacing[a] < SPACING_FACTOR * min(spacing) else 1 for a, k in zip(axes, kernel, strict=True)
        ]
        kernels.append(tuple(kernel))
        pooled = _axes_to_pool(spacing, size)
        if not pooled:
            break
        strides.append(tuple(2 if a in pooled else 1 for a in axes))
        spacing = [s * 2 if a in pooled else s for a, s in zip(axes, spacing, strict=True)]
        size = [math.ceil(p / 2) if a in pooled else p for a, p in zip(axes, size, strict=True)]
    kernels[-1] = (3,) * len(size)  # the bottleneck sees along every axis (nnU-Net's)
    found = Topology(tuple(int(p) for p in patch), tuple(strides), tuple(kernels))
    return Topology(round_up(found.patch, found.divisor), found.strides, found.kernels)


def _axes_to_pool(spacing: Sequence[float], size: Sequence[int]) -> list[int]:
    large = [a for a in range(len(size)) if size[a] >= 2 * MIN_BOTTLENECK]
    if not large:
        return []
    finest = min(spacing[a] for a in large)
    even = [a for a in large if spacing[a] < SPACING_FACTOR * finest]
    return even if len(even) > 1 or size[even[0]] >= FEWEST_VOXELS_ALONE else []


def first_patch(spacing_mm: Sequence[float], median_shape: Sequence[int]) -> tuple[int, ...]:
    """The patch to begin with: isotropic in mm, 256^3 (2D: 2048^2) voxels, no longer than the median image.

    In the plane it has at least 4 voxels however small the image is: a norm needs more than one.
    """
    dimensions = len(spacing_mm)
    edge_mm = (START_VOXELS[dimensions] * math.prod(spacing_mm)) ** (1 / dimensions)
    longest = [min(round(edge_mm / s), int(length)) for s, length in zip(spacing_mm, median_shape, strict=True)]
    return tuple(max(1 if axis < dimensions - 2 else MIN_BOTTLENECK, edge) for axis, edge in enumerate(longest))


def shrink(topology: Topology, spacing_mm: Sequence[float], median_shape: Sequence[int]) -> Topology | None:
    """The next smaller topology: the axis that is longest relative to the median image loses one step of the divisor.

    None where no axis can be shortened any more.
    """
    relative = [p / m for p, m in zip(topology.patch, median_shape, strict=True)]
    for axis in sorted(range(len(relative)), key=lambda a: (relative[a], a), reverse=True):
        patch = list(topology.patch)
        step = topology.divisor[axis]
        # after losing one step the axis may be pooled less often; a finer step then keeps the patch longer
        shorter = patch[axis] - step
        if shorter < MIN_BOTTLENECK:
            continue
        patch[axis] = shorter
        candidate = plan_topology(spacing_mm, patch)
        finer = plan_topology(
            spacing_mm, [*patch[:axis], patch[axis] + step - candidate.divisor[axis], *patch[axis + 1 :]]
        )
        for found in (finer, candidate):
            if math.prod(found.patch) < math.prod(topology.patch):
                return found
    return None


def round_up(size: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """The smallest size not below `size` that is divisible."""
    return tuple(math.ceil(s / d) * d for s, d in zip(size, divisor, strict=True))


def as_volume(values: Sequence[int], *, fill: int = 1) -> Shape:
    """A value for each of (z, y, x) from two (y, x) or three."""
    z, y, x = (fill, *values) if len(values) == 2 else values
    return int(z), int(y), int(x)


# --- grids ------------------------------------------------------------------------------------------------------

ANISOTROPIC = 3.0  # coarsest by finest spacing beyond which an axis counts as strongly anisotropic (nnU-Net's)
COARSE_PERCENTILE = 10  # of the spacings along such an axis becomes the target (nnU-Net's)
LOWRES_STEP = 1.03  # factor by which the spacing grows until the patch sees enough (nnU-Net's)
LOWRES_SHARE = 0.25  # of the median image that the patch must see; less asks for a low resolution (nnU-Net's)
LOWRES_GAIN = 2.0  # the low resolution must have so many times fewer voxels than the full one (nnU-Net's)


def coarsest_first(spacing_mm: Sequence[float], shape: Sequence[int]) -> Shape:
    """The order of the axes that puts the coarsest first and keeps the others' order; in 2D the axis of length 1."""
    flat = [axis for axis in range(3) if shape[axis] == 1]
    first = flat[0] if flat else max(range(3), key=lambda axis: (round(spacing_mm[axis], 4), -axis))
    rest = [axis for axis in range(3) if axis != first]
    return first, rest[0], rest[1]


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> Shape:
    """Voxels of an image on another spacing, at least one along each axis."""
    z, y, x = (max(1, round(n * s / t)) for n, s, t in zip(shape, spacing_mm, target_mm, strict=True))
    return z, y, x


def coarser(spacing_mm: Sequence[float]) -> Vector:
    """One step towards a low resolution: the fine axes first, until all are within a factor 2 of the coarsest."""
    coarsest = max(spacing_mm)
    fine = [coarsest / s > SPACING_FACTOR for s in spacing_mm]
    z, y, x = (s * LOWRES_STEP if f or not any(fine) else s for s, f in zip(spacing_mm, fine, strict=True))
    return z, y, x
