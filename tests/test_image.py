"""Every format comes back as it was written, and whatever is not whole is refused with a sentence."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.errors import DatasetError, StorageError
from autoseg.image import FORMATS, Grid, Image, from_itk, read_grid, read_image, to_itk, write_image

MEDICAL = (".nii.gz", ".nii", ".mha", ".nrrd")
DETACHED = (".mhd", ".nhdr")
PICTURES = (".png", ".tif", ".tiff", ".bmp")

OBLIQUE = Grid(
    shape=(5, 6, 7),
    spacing=(3.0, 0.8, 0.5),
    origin=(-12.0, 30.5, 7.25),
    direction=((0.8, 0.0, 0.6), (0.0, -1.0, 0.0), (0.6, 0.0, -0.8)),
)


def volume(grid: Grid = OBLIQUE, dtype: Any = np.int16, channels: int = 1) -> Image:
    random = np.random.default_rng(0)
    return Image(random.integers(0, 200, (channels, *grid.shape)).astype(dtype), grid)


def picture(channels: int = 1, dtype: Any = np.uint8) -> Image:
    return volume(Grid((1, 9, 11), dimensions=2), dtype, channels)


def assert_same_grid(found: Grid, expected: Grid) -> None:
    assert found.shape == expected.shape
    assert found.dimensions == expected.dimensions
    for name in ("spacing", "origin", "direction"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)


# ---- every format: the contract


@pytest.mark.parametrize("ending", MEDICAL)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_a_medical_format_keeps_voxels_dtype_and_oblique_geometry(tmp_path: Path, ending: str, dtype: Any) -> None:
    image, path = volume(dtype=dtype), tmp_path / f"case{ending}"
    write_image(image, path)
    found = read_image(path)
    np.testing.assert_array_equal(found.array, image.array)
    assert found.array.dtype == dtype
    assert_same_grid(found.grid, image.grid)
    assert_same_grid(read_grid(path), image.grid)


@pytest.mark.parametrize("ending", MEDICAL)
def test_a_plane_stays_a_plane_in_a_medical_format(tmp_path: Path, ending: str) -> None:
    image, path = volume(Grid((1, 6, 7), (1.0, 0.7, 0.4), (0.0, 2.0, 3.0), dimensions=2)), tmp_path / f"p{ending}"
    write_image(image, path)
    assert sitk.ReadImage(str(path)).GetDimension() == 2
    assert_same_grid(read_image(path).grid, image.grid)


@pytest.mark.parametrize("ending", PICTURES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_format_keeps_grey_and_colour_and_knows_no_place(tmp_path: Path, ending: str, channels: int) -> None:
    image, path = picture(channels), tmp_path / f"picture{ending}"
    write_image(image, path)
    found = read_image(path)
    np.testing.assert_array_equal(found.array, image.array)
    assert found.grid == read_grid(path) == Grid((1, 9, 11), dimensions=2)


@pytest.mark.parametrize("ending", sorted(FORMATS))
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.995])
def test_a_truncated_file_of_any_format_is_refused_and_named(
    tmp_path: Path, ending: str, kept: float, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"cut{ending}"
    sitk.WriteImage(to_itk(picture(3) if ending in PICTURES else volume(Grid((20, 30, 40)))), str(path), True)
    for part in tmp_path.iterdir():  # .mhd and .nhdr keep their voxels in a file beside
        whole = part.read_bytes()
        part.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DatasetError, match=f"cut{ending}"):
        read_image(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_one_flipped_bit_in_compressed_voxels_is_found_by_the_checksum(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"damaged{ending}"
    write_image(volume(Grid((20, 30, 40))), path)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="damaged"):
        read_image(path)


@pytest.mark.parametrize("ending", sorted(FORMATS))
def test_text_under_the_name_of_an_image_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"text{ending}"
    path.write_text("This is not an image. " * 100)
    with pytest.raises(DatasetError, match=f"text{ending}"):
        read_image(path)


def test_no_itk_reader_prints_when_it_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for ending in FORMATS:
        path = tmp_path / f"noise{ending}"
        path.write_bytes(np.random.default_rng(0).bytes(4000))
        with pytest.raises(DatasetError):
            read_image(path)
        with pytest.raises(DatasetError):
            read_grid(path)
    assert capfd.readouterr() == ("", "")


# ---- single refusals


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no such file"):
        read_image(tmp_path / "absent.nii.gz")


def test_an_unknown_ending_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "image.xyz").write_bytes(b"1234")
    with pytest.raises(DatasetError, match=r"\.nii\.gz.*DICOM"):
        read_image(tmp_path / "image.xyz")


@pytest.mark.parametrize("read", [read_image, read_grid])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_4d_file_is_refused_and_a_fourth_axis_of_one_is_not(
    tmp_path: Path, ending: str, read: Callable[[Path], Any]
) -> None:
    four = sitk.Image([4, 5, 6, 3], sitk.sitkInt16)
    sitk.WriteImage(four, str(tmp_path / f"four{ending}"))
    with pytest.raises(DatasetError, match="4D"):
        read(tmp_path / f"four{ending}")
    sitk.WriteImage(four[:, :, :, :1], str(tmp_path / f"one{ending}"))
    found = read(tmp_path / f"one{ending}")
    assert found.shape == (6, 5, 4)


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkComplexFloat32), str(tmp_path / "complex.nii"))
    with pytest.raises(DatasetError, match="complex.nii.*magnitude"):
        read_image(tmp_path / "complex.nii")


@pytest.mark.parametrize("ending", DETACHED)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_header_is_read_with_its_data_file_refused_without_and_never_written(
    tmp_path: Path, ending: str, compressed: bool
) -> None:
    path = tmp_path / f"case{ending}"
    sitk.WriteImage(to_itk(volume()), str(path), compressed)
    np.testing.assert_array_equal(read_image(path).array, volume().array)
    (data,) = set(tmp_path.iterdir()) - {path}
    data.unlink()
    with pytest.raises(DatasetError, match=f"only a header.*{data.name}"):
        read_image(path)
    with pytest.raises(DatasetError, match="not written"):
        write_image(volume(), path)


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}, {"bigtiff": True}])
def test_a_tiff_with_its_directory_in_front_is_refused_when_truncated(
    tmp_path: Path, options: dict[str, Any], kept: float
) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "front.tif"
    tifffile.imwrite(path, np.random.default_rng(0).integers(0, 255, (64, 80), np.uint8), **options)
    assert read_image(path).shape == (1, 64, 80)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DatasetError, match="front.tif"):
        read_image(path)


def test_a_nifti_whose_unpacked_voxels_are_too_few_is_refused_though_its_gzip_stream_is_whole(tmp_path: Path) -> None:
    write_image(volume(), tmp_path / "whole.nii")
    content = (tmp_path / "whole.nii").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(content[:-10]))
    with pytest.raises(DatasetError, match="truncated"):
        read_image(tmp_path / "cut.nii.gz")


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_gzip_stream_without_its_checksum_is_truncated_though_every_voxel_is_there(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.nii.gz"
    write_image(volume(), path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DatasetError, match="truncated: the compressed data ends too early"):
        read_image(path)


def test_gzip_members_in_a_row_and_zero_padding_are_one_stream(tmp_path: Path) -> None:
    image = volume()
    write_image(image, tmp_path / "whole.nii")
    content = (tmp_path / "whole.nii").read_bytes()
    parts = gzip.compress(content[:400]) + gzip.compress(content[400:]) + bytes(512)
    (tmp_path / "parts.nii.gz").write_bytes(parts)
    np.testing.assert_array_equal(read_image(tmp_path / "parts.nii.gz").array, image.array)


def test_an_uncompressed_nifti_named_gz_is_read(tmp_path: Path) -> None:
    write_image(volume(), tmp_path / "plain.nii")
    os.rename(tmp_path / "plain.nii", tmp_path / "plain.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "plain.nii.gz").array, volume().array)


def test_an_opaque_transparency_channel_is_dropped_and_a_varying_one_refused(tmp_path: Path) -> None:
    colours = picture(4).array.copy()
    colours[3] = 255
    for name, values in (("opaque.png", colours), ("varying.png", picture(4).array)):
        itk_image = sitk.GetImageFromArray(np.moveaxis(values[:, 0], 0, -1), isVector=True)
        sitk.WriteImage(itk_image, str(tmp_path / name))
    np.testing.assert_array_equal(read_image(tmp_path / "opaque.png").array, colours[:3])
    with pytest.raises(DatasetError, match="transparency"):
        read_image(tmp_path / "varying.png")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("anatomical.nii", (25, 41, 33)),  # big-endian
        ("standard.nii.gz", (7, 5, 4)),
        ("example4d.nii.gz", "4D"),
        ("functional.nii", "4D"),
        ("example_nifti2.nii.gz", "NIfTI-2"),
        ("nifti1.hdr", "not a known image format"),
        ("test.mgz", "not a known image format"),
        ("minc2_baddim.mnc", "not a known image format"),
    ],
)
def test_odd_inputs_are_read_or_refused(
    shared_data: Path, name: str, expected: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_data / "odd_inputs" / name
    if isinstance(expected, tuple):
        image = read_image(path)
        assert image.shape == read_grid(path).shape == expected
        np.testing.assert_array_equal(image.array[0], sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    else:
        with pytest.raises(DatasetError, match=f"{name}.*{expected}"):
            read_image(path)
    assert capfd.readouterr() == ("", "")


def test_odd_inputs_are_all_in_the_table_above(shared_data: Path) -> None:
    assert len(list((shared_data / "odd_inputs").iterdir())) == 8


# ---- DICOM


def write_series(folder: Path, slices: int, *, series: str = "1.2.3", skip: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(slices):
        if number == skip:
            continue
        plane = sitk.GetImageFromArray(np.full((1, 8, 9), number, np.int16))
        plane.SetSpacing((0.5, 0.7, 2.5))
        for tag, value in {
            "0008|0060": "CT",
            "0008|103e": f"Series {series}",
            "0020|000d": "1.2.826.0.1.1",
            "0020|000e": series,
            "0020|0052": "1.2.826.0.1.2",
            "0020|0032": f"-10\\-20\\{30 + 2.5 * number}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
            "0018|0050": "2.5",
        }.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        plane.SetMetaData("0008|0018", f"{series}.{number + 1}")
        # names against the order of positions
        writer.SetFileName(str(folder / f"{series}_{slices - number:03d}.dcm"))
        writer.Execute(plane)


def test_a_dicom_series_is_stacked_by_position_on_its_grid(tmp_path: Path) -> None:
    write_series(tmp_path / "series", 6)
    image = read_image(tmp_path / "series")
    np.testing.assert_array_equal(image.array[0, :, 0, 0], np.arange(6))
    assert_same_grid(image.grid, Grid((6, 8, 9), (2.5, 0.7, 0.5), (30.0, -20.0, -10.0)))
    assert read_grid(tmp_path / "series") == image.grid


def test_two_dicom_series_in_a_folder_are_refused_and_both_named(tmp_path: Path) -> None:
    write_series(tmp_path / "series", 3, series="1.2.3")
    write_series(tmp_path / "series", 4, series="1.2.4")
    with pytest.raises(DatasetError, match=r"2 DICOM series.*Series 1\.2\.3, 3 files.*Series 1\.2\.4, 4 files"):
        read_image(tmp_path / "series")


def test_a_dicom_series_with_a_slice_missing_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "series", 6, skip=3)
    with pytest.raises(DatasetError, match=r"5\.00 mm apart, the others 2\.50 mm"):
        read_image(tmp_path / "series")


def test_a_folder_without_dicom_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(DatasetError, match="no DICOM series"):
        read_image(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_dicom_example_is_read(shared_data: Path) -> None:
    image = read_image(shared_data / "ct_example" / "dicom")
    assert image.array.shape == (1, 20, 512, 512)
    np.testing.assert_allclose(image.grid.spacing, (2.0, 0.9765625, 0.9765625))


# ---- in memory, and writing


def test_to_itk_and_from_itk_undo_each_other() -> None:
    for image in (volume(), volume(channels=3), picture(), picture(3)):
        found = from_itk(to_itk(image))
        np.testing.assert_array_equal(found.array, image.array)
        assert_same_grid(found.grid, image.grid)


def test_itk_sees_the_voxels_where_the_grid_says() -> None:
    image = volume()
    itk_image = to_itk(image)
    where = itk_image.TransformIndexToPhysicalPoint((3, 2, 1))
    steps = np.asarray(image.grid.direction) * np.asarray(image.grid.spacing)
    expected = np.asarray(image.grid.origin) + steps @ np.array([1, 2, 3])
    np.testing.assert_allclose(where[::-1], expected)


def test_booleans_are_written_as_bytes(tmp_path: Path) -> None:
    write_image(Image(volume().array > 50, OBLIQUE), tmp_path / "mask.nii.gz")
    assert read_image(tmp_path / "mask.nii.gz").array.dtype == np.uint8


def test_labels_are_written_to_png_as_bytes_and_fractions_are_refused(tmp_path: Path) -> None:
    write_image(picture(dtype=np.int16), tmp_path / "label.png")
    assert read_image(tmp_path / "label.png").array.dtype == np.uint8
    with pytest.raises(DatasetError, match="whole numbers"):
        write_image(picture(dtype=np.float32), tmp_path / "label.png")


def test_writing_where_a_file_stands_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_image(volume(), tmp_path / "file" / "image.nii.gz")


def test_a_full_disk_leaves_no_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = sitk.ImageFileWriter.Execute

    def runs_out_of_space(writer: Any, *arguments: Any) -> None:
        execute(writer, *arguments)
        written = Path(writer.GetFileName())
        written.write_bytes(written.read_bytes()[:-20])  # what ITK leaves behind, without complaint

    monkeypatch.setattr(sitk.ImageFileWriter, "Execute", runs_out_of_space)
    with pytest.raises(StorageError, match="disk is probably full"):
        write_image(volume(), tmp_path / "image.nii.gz")
    assert list(tmp_path.iterdir()) == []
