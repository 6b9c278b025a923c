"""Logits on the network's grid -> labels or probabilities on the image's own grid, in bounded memory.

Logits are interpolated linearly (trilinear, voxel extents aligned) and the class is chosen afterwards, but classes x
full-resolution floats are never held. Interpolation is a weighted mean of eight neighbours with weights that are
positive and sum to one; so where all eight agree on the class, that class is the answer of the interpolation and
nothing needs to be computed. Only voxels near boundaries are interpolated, plane by plane: along z the whole
low-resolution plane, then in the plane the rows that are needed. The same holds for regions, where the decision is
"the last region in the order whose logit is positive".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autoseg.errors import PredictionError
from autoseg.geometry import turn_array
from autoseg.image import Image
from autoseg.inference.sliding_window import MAX_RAM_BYTES, room
from autoseg.labels import Labels

if TYPE_CHECKING:
    from autoseg.preprocessing.case import CaseGeometry

EVERY = slice(None)
MIXED = -1  # in a map of decisions: the corners of this cell disagree
ROW_BYTES = 2**23  # interpolated rows at a time; stays in the processor's cache


@dataclass(frozen=True)
class LinearAxis:
    """Between which voxels of the low-resolution axis each output voxel lies."""

    lower: Tensor
    """(N,) int64: the voxel before; also the number of the cell."""
    upper: Tensor
    """(N,) int64: the voxel after, the same one at the end of the axis."""
    fraction: Tensor
    """(N,) float32: how far from `lower` to `upper`, from 0 to 1."""

    def places(self, part: slice) -> Iterator[tuple[int, int, float]]:
        """`lower`, `upper` and `fraction` of some output voxels, one after the other."""
        yield from zip(self.lower[part].tolist(), self.upper[part].tolist(), self.fraction[part].tolist(), strict=True)


def linear_axis(length: int, output_length: int) -> LinearAxis:
    """Linear interpolation from `length` to `output_length` voxels over the same extent (align_corners=False)."""
    place = (torch.arange(output_length, dtype=torch.float64) + 0.5) * (length / output_length) - 0.5
    place = place.clamp(0, length - 1)
    lower = place.floor().long()
    return LinearAxis(lower, (lower + 1).clamp(max=length - 1), (place - lower).float())


def resampled_decisions(
    logits: Tensor,
    shape: Sequence[int],
    part: slice = EVERY,
    *,
    regions: bool,
    row_bytes: int = ROW_BYTES,
) -> Iterator[NDArray[np.int16]]:
    """For each output plane along z the decision (Y, X) int16 that interpolated `logits` (K, Z, Y, X) would give.

    A decision is the class of the largest logit; with `regions` it is 0 where no logit is positive and k + 1 where
    region k is the last positive one. Exact up to the rounding of sums in float32. `part` chooses some of the planes;
    `row_bytes` of interpolated logits are held at a time.
    """
    z, y, x = (linear_axis(n, m) for n, m in zip(logits.shape[1:], shape, strict=True))
    planes = _Planes(logits, regions=regions)
    for lower, upper, fraction in z.places(part):
        decision = planes.cells(lower, upper)[y.lower][:, x.lower]
        mixed = torch.nonzero(decision == MIXED, as_tuple=True)
        if len(mixed[0]):
            table = planes.rows(lower)
            if fraction > 0:
                table = torch.lerp(table, planes.rows(upper), fraction)
            width = logits.shape[3]
            decision[mixed] = _interpolated(table, width, (y, x), mixed, regions=regions, row_bytes=row_bytes)
        yield decision.numpy()


class _Planes:
    """Low-resolution planes as they are needed: channels last, their decisions, the cells between two of them."""

    def __init__(self, logits: Tensor, *, regions: bool) -> None:
        self._logits = logits
        self._regions = regions
        self._rows: dict[int, Tensor] = {}
        self._decisions: dict[int, Tensor] = {}
        self._cells: tuple[int, int, Tensor] | None = None

    def rows(self, z: int) -> Tensor:
        """Logits of plane z as (Y * X, K) float32."""
        if z not in self._rows:
            if len(self._rows) >= 2:
                del self._rows[min(self._rows)]
            plane = self._logits[:, z].float()[None].contiguous(memory_format=torch.channels_last)
            self._rows[z] = plane[0].permute(1, 2, 0).flatten(0, 1)
        return self._rows[z]

    def cells(self, lower: int, upper: int) -> Tensor:
        """For each cell (Y, X) between two planes the decision of its eight corners, or MIXED; int16."""
        if self._cells is None or self._cells[:2] != (lower, upper):
            below, above = self._decision(lower), self._decision(upper)
            self._cells = (lower, upper, torch.where(below == above, below, MIXED))
            for axis in (0, 1):
                cells = self._cells[2]
                following = torch.cat((cells.narrow(axis, 1, cells.shape[axis] - 1), cells.narrow(axis, -1, 1)), axis)
                self._cells = (lower, upper, torch.where(cells == following, cells, MIXED))
        return self._cells[2]

    def _decision(self, z: int) -> Tensor:
        if z not in self._decisions:
            if len(self._decisions) >= 2:
                del self._decisions[min(self._decisions)]
            shape = self._logits.shape[2:]
            self._decisions[z] = decide(self.rows(z), regions=self._regions).reshape(shape)
        return self._decisions[z]


def decide(rows: Tensor, *, regions: bool) -> Tensor:
    """The decision (N,) int16 of logits (N, K); see `resampled_decisions`."""
    if not regions:
        return rows.argmax(1).short()
    number = torch.arange(1, rows.shape[1] + 1, dtype=torch.int16)
    return ((rows > 0) * number).amax(1)


def _interpolated(
    table: Tensor,
    width: int,
    axes: tuple[LinearAxis, LinearAxis],
    places: tuple[Tensor, ...],
    *,
    regions: bool,
    row_bytes: int,
) -> Tensor:
    """The decisions (N,) at output `places` (rows, columns) of a plane, its logits as a `table` (Y * X, K)."""
    y, x = axes
    rows, columns = places
    at_once = max(1, row_bytes // (4 * table.shape[1]))
    decisions = torch.empty(len(rows), dtype=torch.int16)
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        i, j = rows[part], columns[part]
        above, below, left, right = y.lower[i] * width, y.upper[i] * width, x.lower[j], x.upper[j]
        neighbours = torch.stack((above + left, above + right, below + left, below + right), dim=1)
        v, u = y.fraction[i], x.fraction[j]
        weights = torch.stack(((1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u), dim=1)
        values = functional.embedding_bag(neighbours, table, per_sample_weights=weights, mode="sum")
        decisions[part] = decide(values, regions=regions)
    return decisions


def decision_values(labels: Labels) -> NDArray[np.integer[Any]]:
    """The label value of each decision, in the smallest unsigned integer type that holds them."""
    values = (0, *labels.region_order) if labels.has_regions else (0, *(group[0] for group in labels.values))
    return np.asarray(values, dtype=np.min_scalar_type(max(labels.known_values + values)))


def resampled_probabilities(
    logits: Tensor, shape: Sequence[int], part: slice = EVERY, *, regions: bool
) -> Iterator[NDArray[np.float32]]:
    """For each output plane along z the probabilities (K, Y, X) float32 of the interpolated `logits` (K, Z, Y, X).

    `part` chooses some of the planes.
    """
    for plane in resampled_planes(logits, shape, part):
        yield (plane.sigmoid() if regions else plane.softmax(0)).numpy()


def resampled_planes(values: Tensor, shape: Sequence[int], part: slice = EVERY) -> Iterator[Tensor]:
    """For each output plane along z (C, Y, X) float32 of `values` (C, Z, Y, X), any float dtype, interpolated linearly.

    `part` chooses some of the planes.
    """
    z = linear_axis(values.shape[1], shape[0])
    for lower, upper, fraction in z.places(part):
        plane = values[:, lower].float()
        if fraction > 0:
            plane = torch.lerp(plane, values[:, upper].float(), fraction)
        size = (shape[1], shape[2])
        if size != tuple(plane.shape[1:]):
            plane = functional.interpolate(plane[None], size=size, mode="bilinear", align_corners=False)[0]
        yield plane


def export_labels(
    logits: Tensor, geometry: CaseGeometry, labels: Labels, *, max_ram_bytes: int = MAX_RAM_BYTES
) -> Image:
    """Labels on the grid and in the orientation of the image that was read.

    `logits` (K, Z, Y, X), any float dtype, on the network's grid. The result's voxels are (1, Z, Y, X) in the
    smallest unsigned integer type that holds the labels; outside the crop it is background. Peak memory is the
    result, a few low-resolution planes and `ROW_BYTES`, whatever the number of classes. Raises PredictionError where
    the logits are not those of this case.
    """
    _check(logits, geometry, labels)
    values = decision_values(labels)
    result = np.zeros((1, *geometry.original.shape), dtype=values.dtype)
    inside = _crop_view(result, geometry)[0]
    row_bytes = min(ROW_BYTES, max_ram_bytes)

    def fill(planes: slice) -> None:
        with torch.inference_mode():
            decisions = resampled_decisions(
                logits, inside.shape, planes, regions=labels.has_regions, row_bytes=row_bytes
            )
            for z, plane in zip(range(planes.start, planes.stop), decisions, strict=True):
                inside[z] = values[plane]

    _in_threads(fill, len(inside))
    return Image(result, geometry.original)


def export_probabilities(
    logits: Tensor, geometry: CaseGeometry, labels: Labels, *, max_ram_bytes: int = MAX_RAM_BYTES
) -> Image:
    """Probabilities (K, Z, Y, X) float32 on the grid and in the orientation of the image that was read.

    Channels are background and the classes (they sum to one), or the regions (each from 0 to 1), in the order of
    `Labels`. Outside the crop it is background with probability one. Interpolated plane by plane; a result larger
    than half of `max_ram_bytes` lies in a nameless file on disk and is paged in as it is read. Raises PredictionError
    where the logits are not those of this case.
    """
    _check(logits, geometry, labels)
    shape = (labels.output_channels, *geometry.original.shape)
    result = room(shape, np.float32, in_memory=int(np.prod(shape, dtype=np.int64)) * 4 <= max_ram_bytes // 2)
    result[:] = 0
    if not labels.has_regions:
        result[0] = 1
    inside = _crop_view(result, geometry)

    def fill(planes: slice) -> None:
        with torch.inference_mode():
            slabs = resampled_probabilities(logits, inside.shape[1:], planes, regions=labels.has_regions)
            for z, plane in zip(range(planes.start, planes.stop), slabs, strict=True):
                inside[:, z] = plane

    _in_threads(fill, inside.shape[1])
    return Image(result, geometry.original)


def export_image(
    image: Tensor,
    geometry: CaseGeometry,
    units: Sequence[tuple[float, float] | None] = (),
    *,
    max_ram_bytes: int = MAX_RAM_BYTES,
) -> Image:
    """A super-resolved image (C, Z, Y, X) float32 on the original grid of `geometry`, in its orientation.

    `image` (C, Z, Y, X), any float dtype, lies on the network's grid. `units` has for each channel (offset, factor)
    that undo its normalisation, or None where it stays normalised. Outside of the crop every channel was zero and is.
    """
    shape = (len(image), *geometry.original.shape)
    result = room(shape, np.float32, in_memory=int(np.prod(shape, dtype=np.int64)) * 4 <= max_ram_bytes // 2)
    result[:] = 0
    inside = _crop_view(result, geometry)
    known = [pair or (0.0, 1.0) for pair in units] or [(0.0, 1.0)] * len(image)
    offset, factor = (torch.tensor(values)[:, None, None] for values in zip(*known, strict=True))

    def fill(planes: slice) -> None:
        with torch.inference_mode():
            slabs = resampled_planes(image, inside.shape[1:], planes)
            for z, plane in zip(range(planes.start, planes.stop), slabs, strict=True):
                inside[:, z] = (plane * factor + offset).numpy()

    _in_threads(fill, inside.shape[1])
    return Image(result, geometry.original)


def _in_threads(fill: Callable[[slice], None], planes: int) -> None:
    """Call `fill` on equal parts of the output planes, one thread each, as many as torch computes with.

    Inside, torch computes with one thread: split over cores, its small operations would wait for each other (on a busy
    machine twenty times as long as they compute).
    """
    threads = min(torch.get_num_threads(), planes)
    edges = [planes * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads, "export", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(fill, map(slice, edges[:-1], edges[1:])):
            pass
    torch.set_num_threads(torch.get_num_threads())  # the number for threads that start later; this thread has its own


def _check(logits: Tensor, geometry: CaseGeometry, labels: Labels) -> None:
    expected = (labels.output_channels, *geometry.network_shape)
    if tuple(logits.shape) != expected:
        raise PredictionError(
            f"The logits have the shape {tuple(logits.shape)}, expected {expected} (classes, z, y, x) for this case; "
            "they belong to another case or model."
        )


def _crop_view(array: NDArray[Any], geometry: CaseGeometry) -> NDArray[Any]:
    """The part of `array` (C, Z, Y, X, on the original grid) inside the crop, in the network's orientation; a view."""
    z, y, x = geometry.box
    return turn_array(array, geometry.permutation, geometry.flips)[:, z, y, x]
