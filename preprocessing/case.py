"""Raw image and label of a case <-> the arrays a network sees: the way there and its exact inverse, side by side.

There: nearest canonical orientation and the plan's axis order, crop to what is not zero, normalise, resample.
Back: resample the label linearly, put it into the box it was cropped from, turn it to the original orientation.

A label may lie on a finer grid than its image: it has a `CaseGeometry` of its own, of the same crop and orientation.
So has the answer of a super-resolving network (`fine_geometry`): the way back from it ends on a refined grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import AutosegError, DatasetError, StorageError
from autoseg.executor import host_memory_bytes
from autoseg.geometry import (
    HALF_A_VOXEL,
    Box,
    box_shape,
    canonical_axes,
    crop_grid,
    extent_distance,
    nearest_down,
    nearest_up,
    nonzero_box,
    permute_grid,
    refine_grid,
    reorder_axes,
    resample_grid,
    shape_at_spacing,
    turn_array,
    turn_array_back,
    turn_grid,
    whole_box,
)
from autoseg.image import Grid, Image
from autoseg.labels import Labels
from autoseg.plan import PreprocessingSettings, Vector
from autoseg.preprocessing.normalize import intensity_units, normalize
from autoseg.preprocessing.resample import crop_to_extent, resample_image, resample_label, resample_onto
from autoseg.typed_json import from_json, to_json
from autoseg.units import format_bytes

Shape = tuple[int, int, int]

WHOLE = 1e-6  # voxels: what is this close to a whole number was meant to be one


@dataclass(frozen=True)
class CaseGeometry:
    """How one case came from its file's grid to the network's grid: all that is needed to go there and back."""

    original: Grid
    """The grid of the file."""
    permutation: Shape
    """Array axis of the file that becomes network axis 0, 1, 2."""
    flips: tuple[bool, bool, bool]
    """Whether network axis 0, 1, 2 is reversed, after the permutation."""
    crop: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """First voxel and the voxel after the last, along the turned image's (z, y, x), of what was kept."""
    network_shape: Shape
    """Voxels (z, y, x) after resampling: what the network sees."""

    @property
    def box(self) -> Box:
        """`crop` as three slices of the turned image."""
        z, y, x = (slice(start, stop) for start, stop in self.crop)
        return (z, y, x)

    @property
    def turned(self) -> Grid:
        """The original grid after permutation and flips."""
        return turn_grid(self.original, self.permutation, self.flips)

    @property
    def cropped(self) -> Grid:
        """The grid just before resampling."""
        return crop_grid(self.turned, self.box)

    @property
    def network(self) -> Grid:
        """The grid that the network sees."""
        return resample_grid(self.cropped, self.network_shape)

    def to_json(self) -> Any:
        """Plain JSON content."""
        return to_json(self)

    @classmethod
    def from_json(cls, content: Any, *, where: str) -> CaseGeometry:
        """The inverse of `to_json`. Raises StorageError that begins with `where`."""
        try:
            return from_json(cls, content, where=where)
        except AutosegError as error:
            raise StorageError(str(error)) from error


Acquire = Callable[[NDArray[Any], CaseGeometry], NDArray[Any]]
"""Cropped raw channels (C, Z, Y, X) and where they lie -> what another scanner would have made of them."""


@dataclass(frozen=True)
class PreprocessedCase:
    """A case on the network's grid."""

    image: NDArray[np.float32]
    """(C, Z, Y, X) float32, normalised."""
    label: NDArray[np.int16] | None
    """(1, Z, Y, X) int16, the values of dataset.json; None where the case has no label."""
    geometry: CaseGeometry
    """Of the image."""
    label_geometry: CaseGeometry | None = None
    """Of the label: the image's, or that of its own grid; None where the case has no label."""
    reference: NDArray[np.float32] | None = None
    """(R, Z, Y, X) float32, normalised: the channels on a grid of their own, over just the extent of `image`."""


def preprocess_case(
    image: Image,
    label: Image | None,
    settings: PreprocessingSettings,
    labels: Labels | None,
    *,
    geometry: CaseGeometry | None = None,
    acquire: Acquire | None = None,
) -> PreprocessedCase:
    """A raw case on the network's grid; `labels` names the label's values, if known.

    `label` lies on the image's grid or on a finer one over the same extent; it is brought to `label_scale` times the
    image's voxels. `geometry` is `find_geometry(image, settings, label)` where that is at hand. `acquire` imitates
    another acquisition before anything else is done with the voxels.

    Intensities are normalised before they are resampled, so that interpolation invents none that count. Raises
    DatasetError where the label's extent or the number of channels does not fit, or the grid does not fit into memory.
    """
    for what, found, planned in (
        ("channels", image.channels, settings.image_normalization),
        ("reference channels on grids of their own", len(image.references), settings.reference_normalization),
    ):
        if found != len(planned):
            raise DatasetError(
                f"The image has {found} {what}, the plan expects {len(planned)}; "
                "give one file for each channel of the dataset."
            )
    if label is not None and label.shape != image.shape and _covers_another_extent(label, image):
        raise DatasetError(
            f"The label's shape {label.shape} differs from the image's {image.shape}, and they do not cover the same "
            "extent; they must be equal."
        )
    geometry = geometry or find_geometry(image, settings, label)
    _check_size(geometry, image.channels)
    cropped = _acquired(image, geometry, acquire)
    nonzero = functools.lru_cache(maxsize=1)(lambda: _nonzero_mask(cropped))
    normalized = np.empty(cropped.shape, dtype=np.float32)
    for channel, result, how in zip(cropped, normalized, settings.image_normalization, strict=True):
        result[...] = normalize(channel, how, nonzero=nonzero, spacing=geometry.cropped.spacing)
    resampled = resample_image(normalized, geometry.network_shape, settings.image_order)
    reference = bring_references(image.references, geometry, settings)
    if label is None:
        return PreprocessedCase(resampled, None, geometry, reference=reference)
    values = labels.known_values if labels else None
    where = find_label_geometry(label, geometry, settings.label_scale)
    return PreprocessedCase(resampled, bring_label(label, where, values=values), geometry, where, reference)


def _check_size(geometry: CaseGeometry, channels: int) -> None:
    """Refuse a grid that no memory holds: one wrong number in a header can ask for it. Raises DatasetError."""
    before, after = geometry.cropped, geometry.network
    size, limit = 4 * channels * math.prod(after.shape), host_memory_bytes()
    if size > limit:
        raise DatasetError(
            f"{_voxels_of(before)} become {_voxels_of(after)} on the grid of the plan, {format_bytes(size)} where this "
            f"machine has {format_bytes(limit)}; correct the spacing in the file's header, or use a machine with more "
            "memory."
        )


def _voxels_of(grid: Grid) -> str:
    return f"{'x'.join(map(str, grid.shape))} voxels of {'x'.join(f'{mm:.4g}' for mm in grid.spacing)} mm"


def find_geometry(image: Image, settings: PreprocessingSettings, label: Image | None = None) -> CaseGeometry:
    """What `settings` do to the grid of `image`; the voxels are looked at only to find the border to cut away.

    With a `label` on a finer grid of its own, the border is cut where faces of voxels of both grids meet.
    """
    permutation, flips = canonical_axes(image.grid.direction)
    permutation, flips = reorder_axes(permutation, flips, settings.axis_order)
    turned = turn_array(image.array, permutation, flips)
    box = nonzero_box(turned) if settings.crop_to_nonzero else whole_box(turned.shape[1:])
    if label is not None:
        box = _on_common_faces(box, turned.shape[1:], permute_grid(label.grid, permutation).shape)
    z, y, x = ((side.start, side.stop) for side in box)
    geometry = CaseGeometry(image.grid, permutation, flips, (z, y, x), box_shape(box))
    cropped = geometry.cropped
    spacing_z = cropped.spacing[0] if settings.spacing[0] is None else settings.spacing[0]
    shape = shape_at_spacing(cropped, (spacing_z, *settings.spacing[1:]))
    return replace(geometry, network_shape=shape)


def bring_references(
    references: Sequence[Image], geometry: CaseGeometry, settings: PreprocessingSettings
) -> NDArray[np.float32] | None:
    """Channels on grids of their own, at the planned spacing over the extent that the network sees: (R, Z, Y, X).

    The image's crop and orientation, from outer face to outer face, however the references lie; normalised by what of
    them lies there, before they are resampled. 0 where a reference shows nothing. None where there is none.
    """
    if settings.reference is None:
        return None
    wanted = resample_grid(geometry.cropped, shape_at_spacing(geometry.cropped, settings.reference.spacing))
    brought = np.empty((len(references), *wanted.shape), dtype=np.float32)
    for reference, result, how in zip(references, brought, settings.reference_normalization, strict=True):
        part = crop_to_extent(reference, wanted)
        nonzero = functools.lru_cache(maxsize=1)(functools.partial(_nonzero_mask, part.array))
        normalized = normalize(part.array[0], how, nonzero=nonzero, spacing=part.grid.spacing)
        result[...] = resample_onto(part.with_array(normalized), wanted, settings.image_order)[0]
    return brought


def find_label_geometry(label: Image, geometry: CaseGeometry, scale: Vector = (1.0, 1.0, 1.0)) -> CaseGeometry:
    """How `label` comes to the network: the image's `geometry` on the label's own grid, `scale` times as fine.

    The box that is kept is the image's; the network's shape is that of the image times `scale`, rounded.
    """
    shape = _times(geometry.network_shape, scale)
    if label.shape == geometry.original.shape:
        return replace(geometry, network_shape=shape)
    own = permute_grid(label.grid, geometry.permutation).shape
    crop = [
        (round(start * n / m), round(stop * n / m))
        for (start, stop), n, m in zip(geometry.crop, own, geometry.turned.shape, strict=True)
    ]
    return replace(geometry, original=label.grid, crop=(crop[0], crop[1], crop[2]), network_shape=shape)


def fine_geometry(geometry: CaseGeometry, scale: Vector) -> CaseGeometry:
    """The grid that a super-resolving network answers on, and the way from there to a refined original grid.

    `scale` (network axes z, y, x) is how many times finer, from 1; any float. The original grid has exactly 1 / scale
    of its spacing, and its first voxel's outer face stays where it was. Where the scale is whole, the box and the
    network's grid are split voxel by voxel; elsewhere the box is the nearest that the refined grid has, and the
    network's grid has as many voxels as fit into it at a spacing no finer than its input's, divided by `scale`. With
    a scale of 1 everything stays as it is.
    """
    factor = [scale[geometry.permutation.index(axis)] for axis in range(3)]
    original = refine_grid(geometry.original, factor)
    turned = permute_grid(original, geometry.permutation).shape
    crop, shape = [], []
    for axis, (start, stop) in enumerate(geometry.crop):
        whole = turned[axis]
        # an axis that is reversed begins with the original's last face, which the refined grid may have moved
        moved = whole - geometry.turned.shape[axis] * scale[axis] if geometry.flips[axis] else 0.0
        first = min(max(nearest_down(start * scale[axis] + moved), 0), whole - 1)
        last = min(max(nearest_up(stop * scale[axis] + moved), first + 1), whole)
        crop.append((first, last))
        shape.append(max(1, math.floor((last - first) * geometry.network_shape[axis] / (stop - start) + WHOLE)))
    network_shape = (shape[0], shape[1], shape[2])
    return replace(geometry, original=original, crop=(crop[0], crop[1], crop[2]), network_shape=network_shape)


def find_units(
    image: Image, geometry: CaseGeometry, settings: PreprocessingSettings, *, acquire: Acquire | None = None
) -> tuple[tuple[float, float] | None, ...]:
    """For each channel (offset, factor) with which raw = offset + factor * normalised; None: it cannot be undone.

    `acquire` as for `preprocess_case`.
    """
    cropped = _acquired(image, geometry, acquire)
    return tuple(
        intensity_units(channel, how) for channel, how in zip(cropped, settings.image_normalization, strict=True)
    )


def bring_label(label: Image, geometry: CaseGeometry, *, values: tuple[int, ...] | None = None) -> NDArray[np.int16]:
    """A label on the original grid brought to the network's grid: (1, Z, Y, X) int16; linear one-hot resampling."""
    return resample_label(_cut(label.array, geometry).astype(np.int16), geometry.network_shape, values)


def restore_label(array: NDArray[Any], geometry: CaseGeometry) -> Image:
    """A label (Z, Y, X) on the network's grid brought back to the original grid; 0 outside of the crop. Same dtype."""
    on_cropped = resample_label(array[None], geometry.cropped.shape)
    return Image(place(on_cropped, geometry, 0), geometry.original)


def place(array: NDArray[Any], geometry: CaseGeometry, fill: float) -> NDArray[Any]:
    """`array` (C, Z, Y, X) at the shape before resampling, un-cropped and turned back: (C, ...) on the original grid.

    Voxels outside of the crop get `fill`. Same dtype.
    """
    turned = np.full((array.shape[0], *geometry.turned.shape), fill, dtype=array.dtype)
    inside = (slice(None), *geometry.box)
    turned[inside] = array
    return np.ascontiguousarray(turn_array_back(turned, geometry.permutation, geometry.flips))


def _cut(array: NDArray[Any], geometry: CaseGeometry) -> NDArray[Any]:
    """A view of `array` (C, Z, Y, X) on the original grid: turned and cropped."""
    inside = (slice(None), *geometry.box)
    return turn_array(array, geometry.permutation, geometry.flips)[inside]


def _acquired(image: Image, geometry: CaseGeometry, acquire: Acquire | None) -> NDArray[Any]:
    cropped = _cut(image.array, geometry)
    return cropped if acquire is None else acquire(cropped, geometry)


def _covers_another_extent(label: Image, image: Image) -> bool:
    return extent_distance(image.grid, label.grid) > HALF_A_VOXEL


def _on_common_faces(box: Box, shape: Sequence[int], finer: Sequence[int]) -> Box:
    """The smallest box around `box` whose faces are faces of voxels of both grids, `shape` and `finer` voxels wide."""
    sides = []
    for side, size, other in zip(box, shape, finer, strict=True):
        step = size // math.gcd(size, other)
        sides.append(slice(side.start // step * step, min(-(-side.stop // step) * step, size)))
    return (sides[0], sides[1], sides[2])


def _times(shape: Shape, scale: Vector) -> Shape:
    z, y, x = (max(1, round(size * s)) for size, s in zip(shape, scale, strict=True))
    return (z, y, x)


def _nonzero_mask(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Where any channel of `array` (C, Z, Y, X) is not zero: (Z, Y, X). Enclosed zeros count too."""
    from scipy import ndimage

    empty, _ = ndimage.label(~(array != 0).any(axis=0))
    outside = {0}
    for axis in range(3):
        for end in (0, -1):
            outside.update(np.unique(empty.take(end, axis)).tolist())
    return ~np.isin(empty, list(outside - {0}))
