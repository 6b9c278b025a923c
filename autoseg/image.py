"""An image and its place in the world: file -> `Image` -> file. The only module that knows SimpleITK's axis order.

Everywhere in autoseg arrays are `(C, Z, Y, X)` and spacing, origin and direction are in the same `(z, y, x)` order,
so that they line up with the array's axes; SimpleITK's `(x, y, z)` is turned round here, on the way in and out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an image lie."""

    shape: tuple[int, int, int]
    """Voxels along (z, y, x); a 2D image has z = 1."""
    spacing: Triple = (1.0, 1.0, 1.0)
    """Distance between voxel centres along (z, y, x), in mm."""
    origin: Triple = (0.0, 0.0, 0.0)
    """World coordinates (z, y, x) of the first voxel's centre, in mm (ITK's LPS axes, reversed)."""
    direction: tuple[Triple, Triple, Triple] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    """`direction[w][a]`: component along world axis w (z, y, x) of the unit vector of array axis a (z, y, x)."""
    dimensions: int = 3
    """2 for a file that is a plane (PNG, 2D NIfTI), 3 for a volume; decides the form that is written."""


@dataclass(frozen=True)
class Image:
    """Voxels with their grid. All channels share the grid."""

    array: NDArray[np.generic]
    """(C, Z, Y, X), any numeric dtype."""
    grid: Grid = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (z, y, x)."""
        return self.grid.shape

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.array.shape[0])

    def with_array(self, array: NDArray[np.generic]) -> Image:
        """The same grid with other voxels, `(C, Z, Y, X)` or `(Z, Y, X)`."""
        return replace(self, array=array if array.ndim == 4 else array[None])


def read_image(path: Path) -> Image:
    """Read one file (NIfTI, MHA, NRRD; PNG, TIFF, BMP) or a folder with one DICOM series.

    RGB and vector files give one channel for each component. Voxels keep the file's dtype. Raises DatasetError for
    a file that is missing, empty, truncated, of an unknown format, or 4D.
    """
    import SimpleITK as sitk

    itk_image = sitk.ReadImage(str(path))
    return from_itk(itk_image)


def write_image(image: Image, path: Path) -> None:
    """Write `image` to `path` atomically, in the format of its ending, in the form (2D or 3D) of its grid."""
    import SimpleITK as sitk

    from autoseg.files import atomic_path

    with atomic_path(path) as temporary:
        sitk.WriteImage(to_itk(image), str(temporary), useCompression=True)
