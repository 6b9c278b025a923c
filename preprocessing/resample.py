"""An array and a shape, or a grid -> the array resampled to it: cubic for images, linear one-hot for labels.

Corner convention: input and output cover the same extent, from outer voxel face to outer voxel face, so output voxel
i lies at input position (i + 0.5) * input_size / output_size - 0.5 (scipy's `zoom(grid_mode=True)`, skimage's
`resize`, torch's `align_corners=False`). Beyond the border the outermost voxel is repeated.

Spline resampling is linear and separable: along each axis it is one matrix, applied by matrix products. The matrix is
scipy's own answer to unit impulses, so the result is scipy's, at a fraction of its time and memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.geometry import Direction, between_grids, canonical_axes, crop_grid, turn_array, turn_grid
from autoseg.image import Grid, Image

Shape = tuple[int, int, int]
Floats = NDArray[np.float64]

STRAIGHT = 1e-5  # voxels a voxel: grids that are turned by less are not; headers hold rounded numbers
SAME_FACE = 1e-3  # voxels by which a voxel's centre may miss the face of a grid and still be inside

MARGIN = 2  # voxels beyond an extent that cubic splines look at

NEGLIGIBLE = 1e-7  # weights below this share of a voxel are beyond float32 and left out
ROWS = 64  # output voxels along an axis computed by one matrix product: few enough that the band of weights is narrow


def resample_image(array: NDArray[Any], shape: Shape, order: int = 3) -> NDArray[np.float32]:
    """`array` (C, Z, Y, X) on a grid of `shape` (Z, Y, X) voxels over the same extent: (C, *shape) float32.

    Interpolates with splines of `order` (1 linear, 3 cubic) along all three axes and keeps each channel within the
    range of intensities that it had (a cubic spline overshoots at edges). The same values where the shape is the same.
    """
    resampled = np.empty((array.shape[0], *shape), dtype=np.float32)
    for channel, volume in zip(resampled, array, strict=True):
        volume = np.ascontiguousarray(volume, dtype=np.float32)
        channel[...] = _resample_volume(volume, shape, order)
        if order > 1 and volume.shape != tuple(shape):
            np.clip(channel, volume.min(), volume.max(), out=channel)
    return resampled


def resample_label(array: NDArray[Any], shape: Shape, values: Sequence[int] | None = None) -> NDArray[Any]:
    """`array` (1, Z, Y, X) of integers from 0 on a grid of `shape` voxels over the same extent: (1, *shape).

    Each value's 0/1 mask is interpolated linearly along all three axes, and every output voxel takes the value with
    the largest share, the smaller value in a tie. Keeps the dtype. `values` are those that may occur (default: those
    that do); others count as background. The same label where the shape is the same. One mask is held at a time, and
    only over the box in which its value occurs.
    """
    label: NDArray[Any] = array[0]
    if label.shape == tuple(shape):
        return np.array(array)
    boxes = _value_boxes(label, values)
    share = np.zeros(shape, dtype=np.float32)
    winner = np.zeros_like(label, shape=shape)
    for value, box in sorted(boxes.items()):
        mask = (label[box] == value).astype(np.float32)
        target = []
        for axis, (side, size, new_size) in enumerate(zip(box, label.shape, shape, strict=True)):
            weights, first = _rows_touching(size, new_size, side.start, side.stop)
            mask = _apply(weights, mask, axis)
            target.append(slice(first, first + len(weights)))
        where = tuple(target)
        larger = mask > share[where]
        share[where][larger] = mask[larger]
        winner[where][larger] = value
    return winner[None]


def resample_onto(image: Image, wanted: Grid, order: int = 3) -> NDArray[np.float32]:
    """The channels of `image` (C, Z, Y, X) as the voxels of `wanted` would show them: (C, *wanted.shape) float32.

    For grids that lie and are turned in any way; interpolated with splines of `order`, within the range of intensities
    of each channel. 0 outside of the outer faces of the image.
    """
    turn = canonical_axes(_relative_direction(image.grid, wanted))
    array, (matrix, offset) = turn_array(image.array, *turn), between_grids(wanted, turn_grid(image.grid, *turn))
    inside = _inside(matrix, offset, wanted.shape, array.shape[1:])
    resampled = np.zeros((array.shape[0], *wanted.shape), dtype=np.float32)
    if not inside.any():
        return resampled
    place = _place_straight if np.allclose(matrix, np.diag(np.diag(matrix)), rtol=0, atol=STRAIGHT) else _place_turned
    for channel, volume in zip(resampled, array, strict=True):
        volume = np.ascontiguousarray(volume, dtype=np.float32)
        channel[...] = place(volume, matrix, offset, wanted.shape, order)
        np.clip(channel, volume.min(), volume.max(), out=channel)
        channel[~inside] = 0
    return resampled


def crop_to_extent(image: Image, wanted: Grid) -> Image:
    """The box of `image` in which the extent of `wanted` lies, and a margin; all of it where it lies elsewhere."""
    matrix, offset = between_grids(wanted, image.grid)
    box = _box_reached(matrix, offset, wanted.shape, image.shape)
    if any(side.stop <= side.start for side in box):
        return image
    z, y, x = box
    return Image(image.array[:, z, y, x], crop_grid(image.grid, (z, y, x)))


def _relative_direction(grid: Grid, other: Grid) -> Direction:
    """How the axes of a grid run along those of another."""
    z, y, x = np.linalg.solve(np.asarray(other.direction), np.asarray(grid.direction)).tolist()
    return (tuple(z), tuple(y), tuple(x))


def _place_straight(
    volume: NDArray[np.float32], matrix: Floats, offset: Floats, shape: Shape, order: int
) -> NDArray[np.float32]:
    """The volume at positions matrix @ voxel + offset of a grid whose axes are not turned: axis by axis."""
    from scipy import ndimage

    for axis, (step, start) in enumerate(zip(np.diag(matrix), offset, strict=True)):
        size = volume.shape[axis]
        weights = ndimage.affine_transform(
            np.eye(size), [step, 1.0], [start, 0.0], (shape[axis], size), order=order, mode="nearest"
        )
        weights[np.abs(weights) < NEGLIGIBLE] = 0
        volume = _apply(weights.astype(np.float32), volume, axis)
    return volume


def _place_turned(
    volume: NDArray[np.float32], matrix: Floats, offset: Floats, shape: Shape, order: int
) -> NDArray[np.float32]:
    """The volume at positions matrix @ voxel + offset."""
    from scipy import ndimage

    placed: NDArray[np.float32] = ndimage.affine_transform(volume, matrix, offset, shape, order=order, mode="nearest")
    return placed


def _inside(matrix: Floats, offset: Floats, shape: Shape, other: Sequence[int]) -> NDArray[np.bool_]:
    """Which voxels (Z, Y, X) of one grid lie within the outer faces of another."""
    inside = np.ones(shape, dtype=bool)
    voxels = np.ogrid[tuple(slice(0, size) for size in shape)]
    for row, start, size in zip(matrix, offset, other, strict=True):
        place = start + sum(step * along for step, along in zip(row, voxels, strict=True))
        inside &= (place >= -0.5 - SAME_FACE) & (place <= size - 0.5 + SAME_FACE)
    return inside


def _box_reached(matrix: Floats, offset: Floats, shape: Shape, other: Sequence[int]) -> tuple[slice, ...]:
    """The box of another grid in which the extent of one lies, with what splines look at beyond it; may be empty."""
    corners = np.array(list(itertools.product(*((-0.5, size - 0.5) for size in shape))))
    places = corners @ matrix.T + offset
    ends = zip(places.min(axis=0) + 0.5, places.max(axis=0) + 0.5, other, strict=True)  # of faces
    return tuple(
        slice(max(0, math.floor(low) - MARGIN), min(size, math.ceil(high) + MARGIN)) for low, high, size in ends
    )


def _value_boxes(label: NDArray[Any], values: Sequence[int] | None) -> dict[int, tuple[slice, ...]]:
    """A box (z, y, x) around each value that occurs; background is taken to be everywhere."""
    from scipy import ndimage

    boxes: dict[int, tuple[slice, ...]] = {0: tuple(slice(0, size) for size in label.shape)}
    boxes |= {value: box for value, box in enumerate(ndimage.find_objects(label), start=1) if box is not None}
    return {value: box for value, box in boxes.items() if values is None or value in values}


def _resample_volume(volume: NDArray[np.float32], shape: Shape, order: int) -> NDArray[np.float32]:
    # axes that shrink come first: what is left to do is smaller, and so is what is held
    axes = sorted(range(3), key=lambda axis: shape[axis] / volume.shape[axis])
    for axis in axes:
        if volume.shape[axis] != shape[axis]:
            volume = _apply(_weights(volume.shape[axis], shape[axis], order), volume, axis)
    return volume


def _apply(weights: NDArray[np.float32], volume: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """The product of `weights` (new, old) with `volume` (Z, Y, X) along `axis`, over the band that is not zero."""
    shape = list(volume.shape)
    shape[axis] = len(weights)
    result = np.empty(shape, dtype=np.float32)
    for start in range(0, len(weights), ROWS):
        rows = slice(start, start + ROWS)
        columns = _band(weights[rows])
        band = np.ascontiguousarray(weights[rows, columns])
        if axis == 0:
            part = np.ascontiguousarray(volume[columns]).reshape(band.shape[1], -1)
            result[rows] = (band @ part).reshape(-1, *shape[1:])
        elif axis == 1:
            np.matmul(band, volume[:, columns], out=result[:, rows])
        else:
            np.matmul(volume[:, :, columns], band.T, out=result[:, :, rows])
    return result


def _band(rows: NDArray[np.float32]) -> slice:
    used = np.flatnonzero((rows != 0).any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)


def _rows_touching(size: int, new_size: int, start: int, stop: int) -> tuple[NDArray[np.float32], int]:
    """The linear weights (rows, stop - start) of the output voxels that start..stop reach, and the first such voxel."""
    if size == new_size:
        return np.eye(stop - start, dtype=np.float32), start
    weights = _weights(size, new_size, 1)[:, start:stop]
    rows = np.flatnonzero(weights.any(axis=1))
    if not len(rows):
        return weights[:0], 0
    return weights[rows[0] : rows[-1] + 1], int(rows[0])


@functools.lru_cache(maxsize=64)
def _weights(size: int, new_size: int, order: int) -> NDArray[np.float32]:
    """The matrix (new_size, size) that resamples a line: scipy's resampling of every unit impulse."""
    from scipy import ndimage

    if order == 1:
        # written out: for one axis scipy's zoom is not needed, and the matrix stays exact for every size
        position = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
        position = np.clip(position, 0, size - 1)
        left = np.minimum(np.floor(position).astype(int), max(size - 2, 0))
        matrix = np.zeros((new_size, size))
        rows = np.arange(new_size)
        matrix[rows, left] = 1 - (position - left)
        matrix[rows, np.minimum(left + 1, size - 1)] += position - left
    else:
        impulses = np.eye(size)
        matrix = ndimage.zoom(impulses, (new_size / size, 1), order=order, mode="nearest", grid_mode=True)
    matrix[np.abs(matrix) < NEGLIGIBLE] = 0
    return matrix.astype(np.float32)
