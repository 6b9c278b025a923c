"""Raw image and label of a case <-> the arrays a network sees: the way there and its exact inverse, side by side.

There: nearest canonical orientation and the plan's axis order, crop to what is not zero, normalise, resample.
Back: resample the label linearly, put it into the box it was cropped from, turn it to the original orientation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import AutosegError, DatasetError, StorageError
from autoseg.geometry import (
    Box,
    box_shape,
    canonical_axes,
    crop_grid,
    nonzero_box,
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
from autoseg.plan import PreprocessingSettings, from_json, to_json
from autoseg.preprocessing.normalize import normalize
from autoseg.preprocessing.resample import resample_image, resample_label

Shape = tuple[int, int, int]


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


@dataclass(frozen=True)
class PreprocessedCase:
    """A case on the network's grid."""

    image: NDArray[np.float32]
    """(C, Z, Y, X) float32, normalised."""
    label: NDArray[np.int16] | None
    """(1, Z, Y, X) int16, the values of dataset.json; None where the case has no label."""
    geometry: CaseGeometry


def preprocess_case(
    image: Image,
    label: Image | None,
    settings: PreprocessingSettings,
    labels: Labels | None,
    *,
    geometry: CaseGeometry | None = None,
) -> PreprocessedCase:
    """A raw case on the network's grid. `label` lies on the image's grid; `labels` names its values, if known.

    `geometry` is `find_geometry(image, settings)` where that is at hand.

    Intensities are normalised before they are resampled, so that interpolation invents none that count. Raises
    DatasetError where the label's shape or the number of channels does not fit.
    """
    if image.channels != len(settings.normalization):
        raise DatasetError(
            f"The image has {image.channels} channels, the plan expects {len(settings.normalization)}; "
            "give one file for each channel of the dataset."
        )
    if label is not None and label.shape != image.shape:
        raise DatasetError(
            f"The label's shape {label.shape} differs from the image's {image.shape}; they must be equal."
        )
    geometry = geometry or find_geometry(image, settings)
    cropped = _cut(image.array, geometry)
    nonzero = functools.lru_cache(maxsize=1)(lambda: _nonzero_mask(cropped))
    normalized = np.empty(cropped.shape, dtype=np.float32)
    for channel, result, how in zip(cropped, normalized, settings.normalization, strict=True):
        result[...] = normalize(channel, how, nonzero=nonzero, spacing=geometry.cropped.spacing)
    resampled = resample_image(normalized, geometry.network_shape, settings.image_order)
    if label is None:
        return PreprocessedCase(resampled, None, geometry)
    values = labels.known_values if labels else None
    return PreprocessedCase(resampled, bring_label(label, geometry, values=values), geometry)


def find_geometry(image: Image, settings: PreprocessingSettings) -> CaseGeometry:
    """What `settings` do to the grid of `image`; the voxels are looked at only to find the border to cut away."""
    permutation, flips = canonical_axes(image.grid.direction)
    permutation, flips = reorder_axes(permutation, flips, settings.axis_order)
    turned = turn_array(image.array, permutation, flips)
    box = nonzero_box(turned) if settings.crop_to_nonzero else whole_box(turned.shape[1:])
    z, y, x = ((side.start, side.stop) for side in box)
    geometry = CaseGeometry(image.grid, permutation, flips, (z, y, x), box_shape(box))
    cropped = geometry.cropped
    spacing_z = cropped.spacing[0] if settings.spacing[0] is None else settings.spacing[0]
    shape = shape_at_spacing(cropped, (spacing_z, *settings.spacing[1:]))
    return replace(geometry, network_shape=shape)


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


def _nonzero_mask(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Where any channel of `array` (C, Z, Y, X) is not zero: (Z, Y, X). Enclosed zeros count too."""
    from scipy import ndimage

    empty, _ = ndimage.label(~(array != 0).any(axis=0))
    outside = {0}
    for axis in range(3):
        for end in (0, -1):
            outside.update(np.unique(empty.take(end, axis)).tolist())
    return ~np.isin(empty, list(outside - {0}))
