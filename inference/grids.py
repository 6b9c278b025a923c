"""Two grids of one case -> what lies between them: the grid to ask for; probabilities, labels and images moved over.

A network reads one grid and may answer on a finer one; an ensemble has members that answer on several; labels may be
asked for on the image's own grid, and are compared on that of the true ones. All of these are grids over the same piece
of the world, and what is on one comes to another in one way: means over coarser voxels, linear interpolation elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.acquisition import apply_along
from autoseg.geometry import canonical_axes, first_face_and_spacing, turn_array, turn_grid
from autoseg.image import Grid, Image
from autoseg.inference.sliding_window import DECIMALS, MAX_RAM_BYTES, empty_logits
from autoseg.networks.upsampling import OutputGrid
from autoseg.preprocessing.case import CaseGeometry

SMALLEST = 1e-6  # probabilities are kept this far from 0 and 1, so that their logarithm stays a number float16 holds
SAME_VOXELS = 1e-4  # positions this close are the same
TIE = 1e-5  # shares of a voxel this close are equal: sums of float32


def grid_between(source: CaseGeometry, target: CaseGeometry) -> OutputGrid:
    """The voxels of `target`'s network grid, seen from `source`'s: what a network that reads the one is asked for.

    Both are of one case; ValueError where they are turned differently.
    """
    if (source.permutation, source.flips) != (target.permutation, target.flips):
        raise ValueError(f"axes are turned by {source.permutation} {source.flips} and {target.permutation}")
    return _between(source.network, target.network)


def _between(source: Grid, target: Grid) -> OutputGrid:
    """The voxels of `target` seen from `source`, which is turned alike."""
    face, spacing = first_face_and_spacing(source)
    target_face, target_spacing = first_face_and_spacing(target)
    sz, sy, sx = (round(float(s), DECIMALS) for s in spacing / target_spacing)
    z, y, x = (round(float(s), DECIMALS) for s in (target_face - face) / target_spacing)
    return OutputGrid(target.shape, (sz, sy, sx), (z, y, x))


def bring_logits(
    logits: Tensor,
    source: CaseGeometry,
    target: CaseGeometry,
    *,
    regions: bool,
    max_ram_bytes: int = MAX_RAM_BYTES,
) -> Tensor:
    """`logits` (K, Z, Y, X) on `source`'s network grid, as logits (K, ...) on `target`'s.

    Their probabilities (softmax, with `regions` sigmoid) are moved: along an axis on which the target is coarser they
    are averaged over each of its voxels, the forward model of a scanner with a slice as thick as its distance;
    elsewhere they are interpolated linearly. Where both grids are the same, the logits are returned as they are.
    """
    grid = grid_between(source, target)
    if _is_same(grid, source):
        return logits
    z, y, x = (moving_matrix(n, *axis) for n, axis in zip(logits.shape[1:], grid.axes(), strict=True))
    result = empty_logits((len(logits), *grid.shape), max_ram_bytes=max_ram_bytes)
    with torch.inference_mode():
        for plane, moved in zip(range(grid.shape[0]), _moved_planes(logits, z, y, x, regions=regions), strict=True):
            mean = moved.clamp(SMALLEST, 1 - SMALLEST)
            result[:, plane] = mean.logit() if regions else mean.log()
    return result


def turn_like(image: Image, grid: Grid) -> Image:
    """The same voxels with array axes in the order and the senses of those of `grid`, or as nearly as there are."""
    relative = np.linalg.solve(np.asarray(grid.direction), np.asarray(image.grid.direction))
    turn = canonical_axes(relative.tolist())
    return Image(turn_array(image.array, *turn), turn_grid(image.grid, *turn))


def bring_image(image: Image, grid: Grid) -> Image:
    """Every channel (Z, Y, X) of an image on another grid, turned alike: float32."""
    matrices = _matrices(image, grid)
    array = np.empty((image.channels, *grid.shape), np.float32)
    for channel, volume in zip(array, image.array, strict=True):
        moved = torch.from_numpy(np.ascontiguousarray(volume, np.float32))
        for axis, matrix in enumerate(matrices):
            moved = apply_along(moved, matrix, axis)
        channel[...] = moved.numpy()
    return Image(array, grid)


def bring_label(label: Image, grid: Grid) -> Image:
    """A label (1, Z, Y, X) of integers from 0 on another grid, turned alike: the value with the largest share.

    The shares are what `bring_logits` makes of probabilities that are 0 or 1; the smaller value wins a tie.
    """
    from scipy import sparse

    z, *plane = (matrix.numpy() for matrix in _matrices(label, grid))
    y, x = (sparse.csr_array(matrix) for matrix in plane)
    result = np.zeros(grid.shape, label.array.dtype)
    for row, winner in zip(z, result, strict=True):
        used = np.flatnonzero(row)
        band, share = label.array[0, used[0] : used[-1] + 1], np.zeros(grid.shape[1:], np.float32)
        for value in np.unique(band):
            mean = np.tensordot(row[used[0] : used[-1] + 1], (band == value).astype(np.float32), 1)
            moved = (x @ (y @ mean).T).T
            larger = moved > share + TIE
            share[larger], winner[larger] = moved[larger], value
    return Image(result[None], grid)


def _matrices(image: Image, grid: Grid) -> list[Tensor]:
    """What moves values along each axis; the directions may differ by rounding."""
    source = replace(image.grid, direction=grid.direction)
    axes = _between(source, grid).axes()
    return [moving_matrix(size, *axis) for size, axis in zip(image.shape, axes, strict=True)]


def moving_matrix(inputs: int, outputs: int, scale: float, start: float) -> Tensor:
    """The weights (outputs, inputs) float32 that move values along one axis; each row sums to one.

    `scale` is input spacing / output spacing, `start` the first output voxel's outer face in output voxels. Means over
    the voxel where the output is coarser, linear interpolation elsewhere; beyond the input its last voxel is repeated.
    """
    faces = (start + np.arange(outputs + 1, dtype=np.float64)) / scale
    if scale < 1 - SAME_VOXELS:
        return torch.from_numpy(_means(faces, inputs).astype(np.float32))
    position = np.clip((faces[:-1] + faces[1:]) / 2 - 0.5, 0, inputs - 1)
    lower = np.minimum(position.astype(np.int64), max(inputs - 2, 0))
    matrix, rows = np.zeros((outputs, inputs), np.float32), np.arange(outputs)
    matrix[rows, lower] = 1 - (position - lower)
    matrix[rows, np.minimum(lower + 1, inputs - 1)] += (position - lower).astype(np.float32)
    return torch.from_numpy(matrix)


def _means(faces: NDArray[np.float64], inputs: int) -> NDArray[np.float64]:
    """The share of each input voxel in the voxels between consecutive `faces` (in input voxels)."""
    voxels = np.arange(inputs)
    low, high = faces[:-1, None], faces[1:, None]
    shares = np.clip(np.minimum(high, voxels + 1) - np.maximum(low, voxels), 0, None)
    # what lies before the first voxel or after the last is taken to be like it
    shares[:, 0] += np.clip(np.minimum(high, 0) - low, 0, None)[:, 0]
    shares[:, -1] += np.clip(high - np.maximum(low, inputs), 0, None)[:, 0]
    means: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
    return means


def _moved_planes(logits: Tensor, z: Tensor, y: Tensor, x: Tensor, *, regions: bool) -> Iterator[Tensor]:
    """For each output plane the moved probabilities (K, Y, X) float32; few input planes are held at a time."""
    for row in z:
        used = torch.nonzero(row)[:, 0]
        band = slice(int(used[0]), int(used[-1]) + 1)
        values = logits[:, band].float()
        probabilities = values.sigmoid() if regions else values.softmax(0)
        plane = torch.einsum("d,kdyx->kyx", row[band], probabilities)
        yield y @ plane @ x.T


def _is_same(grid: OutputGrid, source: CaseGeometry) -> bool:
    if grid.shape != source.network_shape:
        return False
    apart = [n * abs(scale - 1) + abs(start) for n, scale, start in grid.axes()]
    return max(apart) < SAME_VOXELS
