"""A predicted label map -> the same without what cross-validation found to be mostly false: islands, specks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.image import Image
from autoseg.labels import Labels

CONNECTIVITY = 26  # neighbours of a voxel


@dataclass(frozen=True)
class Cleaning:
    """What is removed from the predicted mask of a structure."""

    largest_only: bool = False
    """Everything but its largest component (26 neighbours)."""
    smallest_mm3: float = 0.0
    """Components below this volume (2D images: mm2)."""


def clean(mask: NDArray[np.bool_], cleaning: Cleaning, *, voxel_mm3: float) -> NDArray[np.bool_]:
    """`mask` (Z, Y, X) without what `cleaning` removes."""
    import cc3d

    if cleaning == Cleaning() or not mask.any():
        return mask
    components = cc3d.connected_components(np.ascontiguousarray(mask).view(np.uint8), connectivity=CONNECTIVITY)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    kept = np.flatnonzero(sizes * voxel_mm3 >= max(cleaning.smallest_mm3, voxel_mm3))
    if cleaning.largest_only:
        kept = np.array([sizes.argmax()])
    return np.isin(components, kept)


def clean_labels(image: Image, cleaning: Mapping[str, Cleaning], labels: Labels) -> Image:
    """A label map (1, Z, Y, X) with each structure cleaned as `cleaning` says; what is removed is background.

    Regions are cleaned as regions and written again in their order: where an island of an inner one goes, the outer
    one stays.
    """
    if not cleaning:
        return image
    before, voxel = image.array[0], math.prod(image.grid.spacing)
    after = np.zeros_like(before)
    written = labels.region_order or tuple(values[0] for values in labels.values)
    for name, value in zip(labels.names, written, strict=True):
        mask = labels.mask(before, name)
        after[clean(mask, cleaning.get(name, Cleaning()), voxel_mm3=voxel)] = value
    return image.with_array(after[None])
