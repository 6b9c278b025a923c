"""An image and its place in the world: file -> `Image` -> file. The only module that knows SimpleITK's axis order.

Everywhere in autoseg arrays are `(C, Z, Y, X)` and spacing, origin and direction are in the same `(z, y, x)` order,
so that they line up with the array's axes; SimpleITK's `(x, y, z)` is turned round here, on the way in and out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError, StorageError, unknown_choice
from autoseg.files import atomic_path
from autoseg.integrity import CHECKS

Triple = tuple[float, float, float]

FORMATS = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".png": "PNGImageIO",
    ".tif": "TIFFImageIO",
    ".tiff": "TIFFImageIO",
    ".bmp": "BMPImageIO",
}
"""File ending -> the ITK reader and writer. One reader a format: ITK's own guess takes longer and prints."""

DETACHED_ENDINGS = (".mhd", ".nhdr")
"""Headers whose voxels are in a second file: read, but not written, since two files cannot be written atomically."""

PICTURE_ENDINGS = (".png", ".tif", ".tiff", ".bmp")
"""Formats of natural images: they know no place in the world, and one file may hold all channels (RGB)."""

SLICE_GAP_TOLERANCE = 0.1  # of the slice distance; DICOM positions are rounded, a missing slice makes a gap of 2


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
    references: tuple[Image, ...] = ()
    """Channels of the same case that lie on grids of their own, one image (1, Z, Y, X) each."""

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


def image_ending(path: Path | str) -> str | None:
    """The ending of `path` that says its format, as FORMATS has it; None where it has none of them."""
    name = str(path).lower()
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def read_image(path: Path) -> Image:
    """Read one file (NIfTI, MHA, NRRD; PNG, TIFF, BMP) or a folder with one DICOM series.

    RGB and vector files give one channel for each component; a transparency channel that says nothing is left out.
    Voxels keep the file's dtype. Raises DatasetError for a file that is missing, empty, truncated, damaged, of an
    unknown format, or 4D.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom(path)
    ending, reader = _open(path)
    CHECKS[FORMATS[ending]](path)
    itk_image = _execute(path, reader.Execute)
    image = from_itk(itk_image, path=path)
    return _plain_picture(image, path) if ending in PICTURE_ENDINGS else image


def read_grid(path: Path) -> Grid:
    """The grid of an image file or DICOM folder; of a file only the header is read.

    Raises DatasetError as `read_image` does, but does not see damage after the header.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom(path).grid
    ending, reader = _open(path)
    with _silent(True):
        _execute(path, reader.ReadImageInformation)
    size, spacing, origin = reader.GetSize(), reader.GetSpacing(), reader.GetOrigin()
    grid = _grid(path, size, spacing, origin, reader.GetDirection())
    return Grid(grid.shape, dimensions=grid.dimensions) if ending in PICTURE_ENDINGS else grid


def write_image(image: Image, path: Path) -> None:
    """Write `image` to `path` atomically, in the format of its ending, in the form (2D or 3D) of its grid.

    Raises StorageError where it cannot be written, and DatasetError where the format cannot hold it.
    """
    import SimpleITK as sitk

    path = Path(path)
    ending = image_ending(path)
    if ending is None:
        raise DatasetError(f"{path}: {unknown_choice('the file ending', path.suffix, FORMATS)}")
    if ending in DETACHED_ENDINGS:
        raise DatasetError(f"{path}: {ending} is not written; choose .mha or .nrrd, which hold header and voxels.")
    if image.array.dtype.kind == "f" and not np.isfinite(image.array).all():
        raise DatasetError(f"{path}: not written: the image has NaN or infinite voxels, which no reader would keep.")
    if ending in PICTURE_ENDINGS and image.shape[0] > 1:
        raise DatasetError(
            f"{path}: a volume of {image.shape[0]} slices is not written to {ending}, which holds a plane and no "
            "spacing; choose .nii.gz, .mha or .nrrd."
        )
    writer = sitk.ImageFileWriter()
    writer.SetImageIO(FORMATS[ending])
    writer.SetUseCompression(True)
    itk_image = to_itk(_for_picture(image, path) if ending in PICTURE_ENDINGS else image)
    with atomic_path(path) as temporary:
        writer.SetFileName(str(temporary))
        try:
            with _quiet_itk():
                writer.Execute(itk_image)
            # ITK does not notice a disk that is full
            CHECKS[FORMATS[ending]](temporary)
        except RuntimeError as error:
            raise StorageError(f"{path}: cannot be written ({_reason(error)}).") from error
        except DatasetError as cut_off:
            raise StorageError(
                f"{path}: could not be written completely; the disk is probably full. Free some space and try again."
            ) from cut_off


def from_itk(itk_image: Any, *, path: Path | str = "image") -> Image:
    """A SimpleITK image (2D or 3D, scalar or vector) as `Image`; `path` names it in errors. The voxels are copied.

    Raises DatasetError for 4D images, complex numbers, and grids that make no sense.
    """
    import SimpleITK as sitk

    if "complex" in itk_image.GetPixelIDTypeAsString():
        raise DatasetError(f"{path}: complex numbers cannot be used; save the magnitude instead.")
    grid = _grid(path, itk_image.GetSize(), itk_image.GetSpacing(), itk_image.GetOrigin(), itk_image.GetDirection())
    components = itk_image.GetNumberOfComponentsPerPixel()
    array = sitk.GetArrayFromImage(itk_image).reshape(*grid.shape, components)
    return Image(np.ascontiguousarray(np.moveaxis(array, -1, 0)), grid)


def to_itk(image: Image) -> Any:
    """`Image` as a SimpleITK image: 2D where its grid is a plane, a vector image where it has several channels."""
    import SimpleITK as sitk

    grid, array = image.grid, image.array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    first = 1 if grid.dimensions == 2 else 0
    if first and grid.shape[0] != 1:
        raise DatasetError(f"an image of shape {grid.shape} cannot be written as a plane; its first axis must be 1.")
    array = array[:, 0] if first else array
    vector = array.shape[0] > 1
    itk_image = sitk.GetImageFromArray(np.moveaxis(array, 0, -1) if vector else array[0], isVector=vector)
    itk_image.SetSpacing(grid.spacing[first:][::-1])
    itk_image.SetOrigin(grid.origin[first:][::-1])
    itk_image.SetDirection(np.asarray(grid.direction)[first:, first:][::-1, ::-1].ravel().tolist())
    return itk_image


def _open(path: Path) -> tuple[str, Any]:
    """The ending and a reader for `path`, which is there, not empty and of a known format."""
    import SimpleITK as sitk

    ending = image_ending(path)
    try:
        size = path.stat().st_size
        with open(path, "rb"):
            pass
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DatasetError(
            f"{path}: {'there is no such file' if missing else f'cannot be read ({error.strerror})'}."
        ) from error
    if ending is None:
        raise DatasetError(
            f"{path}: not a known image format; give one of {', '.join(FORMATS)} or a folder with a DICOM series."
        )
    if size == 0:
        raise DatasetError(f"{path}: the file is empty (0 bytes); copy it again.")
    reader = sitk.ImageFileReader()
    reader.SetImageIO(FORMATS[ending])
    reader.SetFileName(str(path))
    return ending, reader


def _execute(path: Path, call: Any) -> Any:
    try:
        with _quiet_itk(), _silent(FORMATS.get(image_ending(path) or "") == "TIFFImageIO"):
            return call()
    except (RuntimeError, UnicodeDecodeError) as error:  # the second where ITK's own message quotes the damage
        raise DatasetError(f"{path}: not a readable image, or damaged ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """The part of ITK's message that says what happened: its last line, without file names and addresses."""
    if isinstance(error, UnicodeDecodeError):
        return "its header is not text"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("): ", 1)[-1].removeprefix("ITK ERROR: ").rstrip(".") if lines else "no reason given"


@contextlib.contextmanager
def _quiet_itk() -> Iterator[None]:
    """ITK's warnings go to stderr by themselves; what matters of them is checked and said in a sentence."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


@contextlib.contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Nothing written to file descriptor 2: libtiff prints there, past Python and ITK."""
    if not wanted:
        yield
        return
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _grid(path: Path | str, size: Any, spacing: Any, origin: Any, direction: Any) -> Grid:
    """ITK's (x, y, z) geometry as a Grid; axes of length one beyond the third are dropped."""
    rank = len(size)
    if rank < 2 or min(size) < 1:
        raise DatasetError(f"{path}: not an image, or its header is damaged (size {tuple(size)}).")
    if any(length != 1 for length in size[3:]):
        raise DatasetError(
            f"{path}: a 4D image of size {tuple(size)}, expected 2D or 3D; split it into one file for each channel or "
            "time point."
        )
    used = min(rank, 3)
    matrix = np.asarray(direction, dtype=float).reshape(rank, rank)[:used, :used]
    values = np.concatenate([np.asarray(spacing[:used]), np.asarray(origin[:used]), matrix.ravel()])
    if not np.isfinite(values).all() or min(spacing[:used]) <= 0 or abs(np.linalg.det(matrix)) < 1e-3:
        raise DatasetError(
            f"{path}: the header's geometry makes no sense (spacing {tuple(spacing)}, origin {tuple(origin)}, "
            f"direction {tuple(direction)}); write the file again with a sound header."
        )
    whole = np.eye(3)
    whole[3 - used :, 3 - used :] = matrix[::-1, ::-1]
    pad = 3 - used
    return Grid(
        shape=_three(int, (1,) * pad + tuple(size[:used])[::-1]),
        spacing=_three(float, (1.0,) * pad + tuple(spacing[:used])[::-1]),
        origin=_three(float, (0.0,) * pad + tuple(origin[:used])[::-1]),
        direction=(_three(float, whole[0]), _three(float, whole[1]), _three(float, whole[2])),
        dimensions=used,
    )


def _three(kind: Any, values: Any) -> Any:
    z, y, x = values
    return (kind(z), kind(y), kind(x))


def _plain_picture(image: Image, path: Path) -> Image:
    """A picture without transparency, on a grid of unit spacing: resolution tags of pictures are not to be trusted."""
    grid = Grid(image.shape, dimensions=image.grid.dimensions)
    if image.channels == 3 and _has_palette(path) and (image.array == image.array[:1]).all():
        return Image(image.array[:1], grid)  # ITK gives the colours of a palette, here greys
    if image.channels not in (2, 4):
        return Image(image.array, grid)
    transparency = image.array[-1]
    if transparency.min() != transparency.max():
        raise DatasetError(
            f"{path}: has {image.channels} components, the last a transparency that varies; save it as grey or RGB, or "
            "one file for each channel."
        )
    return Image(image.array[:-1], grid)


def _has_palette(path: Path) -> bool:
    with open(path, "rb") as file:
        header = file.read(32)
    if header.startswith(b"BM"):
        return int.from_bytes(header[28:30], "little") <= 8  # bits per pixel
    return header.startswith(b"\x89PNG") and header[25] == 3  # colour type


def _for_picture(image: Image, path: Path) -> Image:
    """The voxels in a type that pictures have: 8 or 16 bits without sign."""
    array = image.array
    if array.dtype in (np.uint8, np.uint16) or path.suffix.lower().startswith(".tif"):
        return image
    if array.dtype.kind not in "biu" or (array.size and (array.min() < 0 or array.max() > 65535)):
        raise DatasetError(f"{path}: {path.suffix} holds whole numbers from 0 to 65535 only; write .tif or .nii.gz.")
    return replace(image, array=array.astype(np.uint8 if array.max(initial=0) < 256 else np.uint16))


def _read_dicom(folder: Path) -> Image:
    """The one DICOM series of a folder, its slices in the order of their positions."""
    import SimpleITK as sitk

    with _quiet_itk():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        files = {name: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name) for name in series}
    if not series:
        raise DatasetError(f"{folder}: the folder holds no DICOM series.")
    if len(series) > 1:
        found = "; ".join(
            f"{name} ({_series_description(files[name][0])}, {len(files[name])} files)" for name in series
        )
        raise DatasetError(
            f"{folder}: the folder holds {len(series)} DICOM series, expected one: {found}; "
            "put one of them in a folder of its own."
        )
    names = files[series[0]]
    _check_slices(folder, names)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(names)
    return from_itk(_execute(folder, reader.Execute), path=folder)


def _dicom_header(name: str) -> Any:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(name)
    _execute(Path(name), reader.ReadImageInformation)
    return reader


def _series_description(name: str) -> str:
    reader = _dicom_header(name)
    description = "0008|103e"
    return reader.GetMetaData(description).strip() if reader.HasMetaDataKey(description) else "without description"


def _check_slices(folder: Path, names: tuple[str, ...]) -> None:
    """Refuse a series with a slice missing, or a tilted gantry: ITK would stack it as if it were regular."""
    if len(names) < 2:
        return
    positions = np.array([_dicom_header(name).GetOrigin()[:3] for name in names])
    steps = np.diff(positions, axis=0)
    usual = np.median(np.linalg.norm(steps, axis=1))
    for before, step in enumerate(steps):
        distance = float(np.linalg.norm(step))
        if usual == 0 or abs(distance - usual) > SLICE_GAP_TOLERANCE * usual:
            raise DatasetError(
                f"{folder}: slices are not evenly spaced: {Path(names[before]).name} and "
                f"{Path(names[before + 1]).name} are {distance:.2f} mm apart, the others {usual:.2f} mm; "
                "a slice is missing or there twice."
            )
    normal = np.asarray(_dicom_header(names[0]).GetDirection()).reshape(3, 3)[:, 2]
    if abs(float(steps.mean(axis=0) @ normal)) < (1 - SLICE_GAP_TOLERANCE) * usual:
        raise DatasetError(f"{folder}: the slices are sheared (tilted gantry); resample the series to a regular grid.")
