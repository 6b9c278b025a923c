"""Grid -> Grid: where voxels lie after an image is turned, flipped, cropped or resampled. Pure functions.

World coordinates are ITK's (LPS), in the order (z, y, x); array axes are (z, y, x) as well. The canonical orientation
is the one with the identity as direction: the first array axis runs to superior, the second to posterior, the third
to left. A box is three slices along (z, y, x).

acvl_utils has functions for boxes, but importing them takes torch along, which workers that only read do without.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.image import Grid, Triple

Shape = tuple[int, int, int]
Permutation = tuple[int, int, int]
Flips = tuple[bool, bool, bool]
Box = tuple[slice, slice, slice]
Direction = tuple[Triple, Triple, Triple]

OVERLAP_POINTS = 24  # along each axis at which it is asked whether one grid covers another
SAME_FACE = 1e-3  # voxels: headers hold rounded numbers
ROUNDING = 1e-6  # by which a product of a size and a factor may miss a number
HALF_A_VOXEL = 0.501  # by which grids over one extent may differ where their voxels do not divide it; headers round
POSITIVE_ENDS = "SPL"  # where world axes z, y, x (LPS) point to
NEGATIVE_ENDS = "IAR"


def canonical_axes(direction: Direction) -> tuple[Permutation, Flips]:
    """The permutation and flips that bring an array nearest to the canonical orientation.

    `permutation[i]` is the array axis that becomes canonical axis i, `flips[i]` whether canonical axis i is reversed
    after that. Of the six permutations the one is taken whose axes lie closest to the world's, so that oblique
    acquisitions of any angle get one; ties are broken by the order of `itertools.permutations`.
    """
    matrix = np.asarray(direction, dtype=float)

    def closeness(permutation: tuple[int, ...]) -> float:
        # rounded, so that 45-degree ties do not hang on the last bit of a header
        return round(float(sum(abs(matrix[world, axis]) for world, axis in enumerate(permutation))), 6)

    best = max(itertools.permutations(range(3)), key=closeness)
    permutation = (best[0], best[1], best[2])
    flips = tuple(bool(matrix[world, axis] < 0) for world, axis in enumerate(permutation))
    return permutation, (flips[0], flips[1], flips[2])


def reorder_axes(permutation: Permutation, flips: Flips, order: Sequence[int]) -> tuple[Permutation, Flips]:
    """`canonical_axes` followed by putting canonical axes in `order`, as one permutation and its flips."""
    a, b, c = order
    return (permutation[a], permutation[b], permutation[c]), (flips[a], flips[b], flips[c])


def inverse_permutation(permutation: Permutation) -> Permutation:
    """The permutation that undoes `permutation`."""
    inverse = [permutation.index(axis) for axis in range(3)]
    return (inverse[0], inverse[1], inverse[2])


def orientation_code(direction: Direction) -> str:
    """Where the array axes (z, y, x) run to, as three letters; "SPL" is canonical; oblique axes by the nearest."""
    permutation, flips = canonical_axes(direction)
    letters = [""] * 3
    for world, axis in enumerate(permutation):
        letters[axis] = (NEGATIVE_ENDS if flips[world] else POSITIVE_ENDS)[world]
    return "".join(letters)


def turn_array(array: NDArray[Any], permutation: Permutation, flips: Flips) -> NDArray[Any]:
    """A view of `array` (C, Z, Y, X) with its axes permuted, then flipped; any dtype."""
    turned = np.transpose(array, (0, *(axis + 1 for axis in permutation)))
    return np.flip(turned, _flipped_axes(flips))


def turn_array_back(array: NDArray[Any], permutation: Permutation, flips: Flips) -> NDArray[Any]:
    """A view of `array` (C, Z, Y, X) that undoes `turn_array` of the same permutation and flips."""
    unflipped = np.flip(array, _flipped_axes(flips))
    return np.transpose(unflipped, (0, *(axis + 1 for axis in inverse_permutation(permutation))))


def turn_grid(grid: Grid, permutation: Permutation, flips: Flips) -> Grid:
    """The grid of `turn_array`: every voxel keeps its place in the world."""
    return flip_grid(permute_grid(grid, permutation), flips)


def permute_grid(grid: Grid, permutation: Permutation) -> Grid:
    """The grid after new axis i is old axis `permutation[i]`."""
    a, b, c = permutation
    rows = [(row[a], row[b], row[c]) for row in grid.direction]
    return replace(
        grid,
        shape=(grid.shape[a], grid.shape[b], grid.shape[c]),
        spacing=(grid.spacing[a], grid.spacing[b], grid.spacing[c]),
        direction=(rows[0], rows[1], rows[2]),
    )


def flip_grid(grid: Grid, flips: Flips) -> Grid:
    """The grid after the axes marked in `flips` are reversed: the last voxel becomes the first."""
    last = [size - 1 if flip else 0 for size, flip in zip(grid.shape, flips, strict=True)]
    sign = np.where(flips, -1.0, 1.0)
    return replace(grid, origin=_world(grid, last), direction=_direction(np.asarray(grid.direction) * sign))


def crop_grid(grid: Grid, box: Box) -> Grid:
    """The grid of the voxels inside `box`."""
    shape = box_shape(box)
    return replace(grid, shape=shape, origin=_world(grid, [side.start for side in box]))


def resample_grid(grid: Grid, shape: Shape) -> Grid:
    """The grid with `shape` voxels over the same extent, measured from outer voxel face to outer voxel face."""
    factor = np.asarray(grid.shape, dtype=float) / np.asarray(shape, dtype=float)
    spacing = np.asarray(grid.spacing) * factor
    return replace(grid, shape=shape, spacing=_triple(spacing), origin=_world(grid, (factor - 1) / 2))


def nearest_up(value: float) -> int:
    """The nearest whole number; of two that are as near the larger."""
    return math.floor(value + 0.5 + ROUNDING)


def nearest_down(value: float) -> int:
    """The nearest whole number; of two that are as near the smaller."""
    return math.ceil(value - 0.5 - ROUNDING)


def refine_grid(grid: Grid, factor: Sequence[float]) -> Grid:
    """The grid with its spacing divided by `factor` (z, y, x), exactly; the first voxel's outer face stays.

    As many voxels as come nearest to the extent, of two numbers the larger: the last face moves by half a new voxel at
    most.
    """
    z, y, x = (max(1, nearest_up(size * f)) for size, f in zip(grid.shape, factor, strict=True))
    fine = np.asarray(factor, dtype=float)
    spacing = np.asarray(grid.spacing) / fine
    return replace(grid, shape=(z, y, x), spacing=_triple(spacing), origin=_world(grid, (1 / fine - 1) / 2))


def shape_at_spacing(grid: Grid, spacing: Triple) -> Shape:
    """Voxels along (z, y, x) that cover the grid's extent at about `spacing` (mm); at least one an axis."""
    z, y, x = (
        max(1, round(size * old / new)) for size, old, new in zip(grid.shape, grid.spacing, spacing, strict=True)
    )
    return (z, y, x)


def voxels_to_world(grid: Grid, voxels: NDArray[Any]) -> NDArray[np.float64]:
    """World coordinates (N, 3) in mm, (z, y, x), of voxel positions (N, 3), which may lie between voxels."""
    steps = np.asarray(grid.direction) * np.asarray(grid.spacing)
    return np.asarray(np.asarray(grid.origin) + np.asarray(voxels, dtype=float) @ steps.T, dtype=np.float64)


def corner_distance(grid: Grid, other: Grid) -> float:
    """How far apart corresponding corner voxels of two grids of equal shape lie, in voxels of `grid`; the largest.

    One number for differences of spacing, origin and direction, in the unit in which they matter.
    """
    corners = np.array(list(itertools.product(*((0, size - 1) for size in grid.shape))), dtype=float)
    apart = voxels_to_world(grid, corners) - voxels_to_world(other, corners)
    return float(np.linalg.norm(apart, axis=1).max() / min(grid.spacing))


def outer_faces(grid: Grid) -> tuple[Triple, Triple]:
    """World coordinates (z, y, x) in mm of the outer corner of the first voxel, and of that of the last."""
    return _world(grid, [-0.5] * 3), _world(grid, [size - 0.5 for size in grid.shape])


def extent_distance(grid: Grid, other: Grid) -> float:
    """How far apart the outer corners of two grids lie, in voxels of `other`; the largest along any of its axes.

    Small for grids that cover the same piece of the world, turned alike, whatever their numbers of voxels.
    """
    corners = np.array(list(itertools.product(*((0.0, 1.0),) * 3)))
    here = voxels_to_world(grid, corners * np.asarray(grid.shape) - 0.5)
    there = voxels_to_world(other, corners * np.asarray(other.shape) - 0.5)
    steps = np.asarray(other.direction) * np.asarray(other.spacing)
    return float(np.abs(np.linalg.solve(steps, (here - there).T)).max())


def between_grids(grid: Grid, other: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(matrix, offset) that take a voxel position of `grid` to the same place as a position of `other`.

    position of other = matrix (3, 3) @ position of grid + offset (3,); both count from the first voxel's centre.
    """
    steps = np.asarray(grid.direction) * np.asarray(grid.spacing)
    other_steps = np.asarray(other.direction) * np.asarray(other.spacing)
    matrix = np.linalg.solve(other_steps, steps)
    offset = np.linalg.solve(other_steps, np.subtract(grid.origin, other.origin))
    return np.asarray(matrix, dtype=np.float64), np.asarray(offset, dtype=np.float64)


def share_covered(grid: Grid, other: Grid) -> float:
    """The share of the extent of `grid` that lies within the outer faces of `other`, 0 to 1; to about 1 %."""
    along = (np.arange(OVERLAP_POINTS) + 0.5) / OVERLAP_POINTS
    points = np.stack(np.meshgrid(*(along * size - 0.5 for size in grid.shape), indexing="ij"), -1).reshape(-1, 3)
    matrix, offset = between_grids(grid, other)
    places = points @ matrix.T + offset
    inside = (places >= -0.5 - SAME_FACE) & (places <= np.asarray(other.shape) - 0.5 + SAME_FACE)
    return float(inside.all(axis=1).mean())


def first_face_and_spacing(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Along each array axis where the first voxel's outer face lies, in mm from the world's origin, and the spacing.

    Numbers of grids with the same direction can be compared.
    """
    spacing = np.asarray(grid.spacing, dtype=np.float64)
    along = np.linalg.solve(np.asarray(grid.direction, dtype=np.float64), np.asarray(grid.origin, dtype=np.float64))
    return along - spacing / 2, spacing


def box_shape(box: Box) -> Shape:
    """Voxels along (z, y, x) inside a box."""
    z, y, x = (side.stop - side.start for side in box)
    return (z, y, x)


def whole_box(shape: Sequence[int]) -> Box:
    """The box that holds an array of `shape` (z, y, x) entirely."""
    z, y, x = shape
    return (slice(0, z), slice(0, y), slice(0, x))


def nonzero_box(array: NDArray[Any]) -> Box:
    """The smallest box that holds every non-zero voxel of `array` (C, Z, Y, X) in any channel; all of it if none is."""
    shape = array.shape[1:]
    # one pass over the volume leaves a plane and a line: big volumes need no mask in memory
    plane = np.zeros(shape[1:], dtype=bool)
    line = np.zeros(shape[0], dtype=bool)
    for z in range(shape[0]):
        occupied = (array[:, z] != 0).any(axis=0)
        line[z] = occupied.any()
        plane |= occupied
    if not line.any():
        return whole_box(shape)
    return (_side(line), _side(np.any(plane, axis=1)), _side(np.any(plane, axis=0)))


def _flipped_axes(flips: Flips) -> tuple[int, ...]:
    """The axes of a (C, Z, Y, X) array that `flips` reverses."""
    return tuple(axis + 1 for axis, flip in enumerate(flips) if flip)


def _side(occupied: NDArray[np.bool_]) -> slice:
    where = np.flatnonzero(occupied)
    return slice(int(where[0]), int(where[-1]) + 1)


def _world(grid: Grid, voxel: Any) -> Triple:
    return _triple(voxels_to_world(grid, np.asarray(voxel, dtype=float)[None])[0])


def _triple(values: Any) -> Triple:
    z, y, x = (float(value) for value in values)
    return (z, y, x)


def _direction(matrix: NDArray[np.float64]) -> Direction:
    return (_triple(matrix[0]), _triple(matrix[1]), _triple(matrix[2]))
