"""What a raw dataset may look like, and with which sentence everything else is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.dataset import Case, RawDataset, list_cases, require_foreground
from autoseg.errors import DatasetError
from autoseg.geometry import refine_grid
from autoseg.image import Grid, Image, read_image, to_itk, write_image
from autoseg.reading import label_values, read_case, read_case_noting

Factory = Callable[..., Path]


def describe(root: Path, **changes: Any) -> None:
    """Change entries of dataset.json; None removes one."""
    content = {**json.loads((root / "dataset.json").read_text()), **changes}
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change(path: Path, edit: Callable[[Image], Image]) -> None:
    write_image_unchecked(edit(read_image(path)), path)


def write_image_unchecked(image: Image, path: Path) -> None:
    """As other programs write: `write_image` would refuse NaN."""
    sitk.WriteImage(to_itk(image), str(path), useCompression=True)


def with_voxel(value: float, dtype: Any = np.float32) -> Callable[[Image], Image]:
    def edit(image: Image) -> Image:
        array = image.array.astype(dtype)
        array[0, 0, 0, 0] = value
        return replace(image, array=array)

    return edit


def on_grid(**changes: Any) -> Callable[[Image], Image]:
    return lambda image: replace(image, grid=replace(image.grid, **changes))


# ---- listing


def test_a_dataset_lists_its_cases_sorted_with_their_files(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3, channels=("T1", "CT"))
    dataset = RawDataset.load(root)
    assert dataset.name == root.name
    assert dataset.channels == ("T1", "CT")
    assert dataset.labels.names == ("ball", "core")
    assert [case.identifier for case in dataset.cases] == ["case_00", "case_01", "case_02"]
    assert dataset.cases[1] == Case(
        "case_01",
        (root / "imagesTr/case_01_0000.nii.gz", root / "imagesTr/case_01_0001.nii.gz"),
        root / "labelsTr/case_01.nii.gz",
    )


def test_the_name_is_that_of_the_folder_wherever_one_stands(
    tiny_dataset: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_dataset(name="Dataset007_Here"))
    assert RawDataset.load(Path(".")).name == "Dataset007_Here"


def test_the_older_key_modality_names_channels_too(tiny_dataset: Factory) -> None:
    root = tiny_dataset()
    describe(root, channel_names=None, modality={"0": "CT"})
    assert RawDataset.load(root).channels == ("CT",)


def test_more_than_ten_channels_stay_in_numeric_order(tiny_dataset: Factory) -> None:
    names = tuple(f"channel {number}" for number in range(11))
    dataset = RawDataset.load(tiny_dataset(cases=1, shape=(2, 4, 4), channels=names))
    assert dataset.channels == names
    assert dataset.cases[0].images[10].name == "case_00_0010.nii.gz"


def test_explicit_file_lists_are_relative_to_the_dataset(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=2)
    (root / "elsewhere").mkdir()
    shutil.move(root / "imagesTr/case_00_0000.nii.gz", root / "elsewhere/scan.nii.gz")
    describe(root, dataset={"p": {"images": ["elsewhere/scan.nii.gz"], "label": "labelsTr/case_00.nii.gz"}})
    dataset = RawDataset.load(root)
    assert [case.identifier for case in dataset.cases] == ["p"]
    image, label = read_case(dataset.cases[0], dataset)
    assert image.shape == label.shape  # type: ignore[union-attr]


def test_test_cases_come_with_their_label_where_there_is_one(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=2)
    shutil.copytree(root / "imagesTr", root / "imagesTs")
    (root / "labelsTs").mkdir()
    shutil.copy(root / "labelsTr/case_01.nii.gz", root / "labelsTs/case_01.nii.gz")
    dataset = RawDataset.load(root)
    assert [case.label is not None for case in dataset.test_cases] == [False, True]


def test_files_that_belong_to_no_case_are_listed_and_hidden_and_json_files_are_not(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=1)
    for name in ("imagesTr/readme.txt", "imagesTr/.hidden", "imagesTr/case_00.json", "labelsTr/other.nii.gz"):
        (root / name).write_text("")
    assert list_cases(root).stray_files == (root / "imagesTr/readme.txt", root / "labelsTr/other.nii.gz")


def test_every_incomplete_case_is_named_with_the_file_that_is_missing(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=4, channels=("T1", "T2"))
    (root / "imagesTr/case_01_0001.nii.gz").unlink()
    (root / "labelsTr/case_03.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"2 cases.*case_01: .*case_01_0001\.nii\.gz.*case_03: .*case_03\.nii\.gz"):
        RawDataset.load(root)
    assert [case.identifier for case in list_cases(root).dataset.cases] == ["case_00", "case_02"]


@pytest.mark.parametrize("name", ["../../evil", "site/case1", ".hidden", "c:evil"])
def test_a_case_whose_name_leads_elsewhere_is_refused(tiny_dataset: Factory, name: str) -> None:
    root = tiny_dataset(cases=1)
    files = {"images": ["imagesTr/case_00_0000.nii.gz"], "label": "labelsTr/case_00.nii.gz"}
    describe(root, dataset={name: files})
    with pytest.raises(DatasetError, match="cannot be the name of a case"):
        RawDataset.load(root)


def test_a_channel_too_many_is_refused(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=1, channels=("T1", "T2"))
    describe(root, channel_names={"0": "T1"})
    with pytest.raises(DatasetError, match="case_00.*names only 1"):
        RawDataset.load(root)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"channel_names": None}, '"channel_names" must be'),
        ({"channel_names": {"1": "T1"}}, "numbered from 0 without gaps"),
        ({"channel_names": ["T1"]}, '"channel_names" must be'),
        ({"channel_names": {"0": 5}}, '"channel_names" must be'),
        ({"labels": None}, '"labels" must be'),
        ({"labels": {"0": "background", "1": "ball"}}, "turn it round"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "regions_class_order"),
        ({"file_ending": None}, '"file_ending" is missing'),
        ({"file_ending": ".nii.gs"}, "Did you mean '.nii.gz'"),
        ({"file_ending": ".mha"}, "no training case found"),
        ({"label_grid": "fine"}, "label_grid 'fine' is not known; choose one of image, own"),
        ({"dataset": ["a"]}, '"dataset" must be'),
        ({"dataset": {"a": {"images": []}}}, "case a must be"),
        ({"dataset": {"a": {"images": ["x.nii.gz"], "label": "y.nii.gz"}}}, "case a: .*x.nii.gz is missing"),
    ],
)
def test_a_dataset_json_that_makes_no_sense_is_refused(
    tiny_dataset: Factory, changes: dict[str, Any], sentence: str
) -> None:
    root = tiny_dataset()
    describe(root, **changes)
    with pytest.raises(DatasetError, match=sentence):
        RawDataset.load(root)


@pytest.mark.parametrize(
    ("content", "sentence"), [("{", "not valid JSON"), ("[]", "must be a JSON object"), ("\xff", "dataset.json")]
)
def test_a_broken_dataset_json_is_refused(tiny_dataset: Factory, content: str, sentence: str) -> None:
    root = tiny_dataset()
    (root / "dataset.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DatasetError, match=sentence):
        RawDataset.load(root)


def test_missing_folders_are_refused(tiny_dataset: Factory, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such dataset folder"):
        RawDataset.load(tmp_path / "absent")
    root = tiny_dataset()
    shutil.rmtree(root / "imagesTr")
    with pytest.raises(DatasetError, match="imagesTr: there is no such folder"):
        RawDataset.load(root)
    (root / "dataset.json").unlink()
    with pytest.raises(DatasetError, match="no such dataset description"):
        RawDataset.load(root)


# ---- reading a case


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_a_case_stacks_its_channels_as_float32_and_its_label_as_integers(tiny_dataset: Factory, ending: str) -> None:
    root = tiny_dataset(cases=1, channels=("T1", "T2"), ending=ending)
    dataset = RawDataset.load(root)
    image, label = read_case(dataset.cases[0], dataset)
    assert image.array.shape == (2, 12, 16, 14) and image.array.dtype == np.float32
    assert label is not None and label.array.shape == (1, 12, 16, 14) and label.array.dtype == np.int16
    for number, path in enumerate(dataset.cases[0].images):
        np.testing.assert_array_equal(image.array[number], read_image(path).array[0])
    assert set(label_values(label.array)) == {0, 1, 2}
    assert label.grid == image.grid


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_one_rgb_picture_is_three_channels(tiny_dataset: Factory, ending: str) -> None:
    root = tiny_dataset(cases=1, shape=(1, 16, 14), channels=("R", "G", "B"), ending=ending)
    files = [root / f"imagesTr/case_00_{number:04d}{ending}" for number in range(3)]
    colours = np.concatenate([read_image(path).array for path in files])
    for path in files:
        path.unlink()
    write_image(Image(colours, Grid((1, 16, 14), dimensions=2)), files[0])
    dataset = RawDataset.load(root)
    np.testing.assert_array_equal(read_case(dataset.cases[0], dataset)[0].array, colours.astype(np.float32))
    describe(root, channel_names={"0": "grey"})
    dataset = RawDataset.load(root)
    with pytest.raises(DatasetError, match="Case case_00: .*3 components a voxel, expected 1"):
        read_case(dataset.cases[0], dataset)


def test_pictures_with_one_file_for_each_channel_are_stacked(tiny_dataset: Factory) -> None:
    dataset = RawDataset.load(tiny_dataset(cases=1, shape=(1, 16, 14), channels=("R", "G", "B"), ending=".png"))
    assert read_case(dataset.cases[0], dataset)[0].array.shape == (3, 1, 16, 14)


IMAGE, SECOND, LABEL = "imagesTr/case_01_0000.nii.gz", "imagesTr/case_01_0001.nii.gz", "labelsTr/case_01.nii.gz"
FLIPPED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("file", "edit", "sentence"),
    [
        (IMAGE, with_voxel(np.nan), "1 of 2688 voxels are NaN or infinite"),
        (SECOND, with_voxel(np.inf), "1 of 2688 voxels are NaN or infinite"),
        (SECOND, with_voxel(1e300, np.float64), "1 infinite of"),  # beyond float32
        (LABEL, with_voxel(np.nan), "1 of 2688 voxels are NaN or infinite"),
        (LABEL, with_voxel(0.5), "fractional label in 1 voxel .such as 0.5."),
        (LABEL, with_voxel(7, np.uint8), r"label value 7 \(1 voxel\) not in dataset.json, expected 0, 1, 2"),
        (LABEL, with_voxel(-1, np.int16), "label value -1"),
        (LABEL, with_voxel(3e9), "label value 16777216"),
        (LABEL, with_voxel(70000, np.int32), "label value 70000"),
        (LABEL, on_grid(spacing=(2.0, 1.0, 1.5)), r"spacing \(2, 1, 1.5\) mm differs from \(2, 1, 1\) mm"),
        (LABEL, on_grid(origin=(0.0, 3.0, 0.0)), r"origin \(0, 3, 0\) mm differs from \(0, 0, 0\) mm"),
        (LABEL, on_grid(direction=FLIPPED), "direction"),
        (SECOND, on_grid(spacing=(3.0, 1.0, 1.0)), "spacing"),
        (LABEL, lambda i: Image(i.array[:, 1:], Grid((11, 16, 14), i.grid.spacing)), r"size \(11, 16, 14\) voxels"),
        (
            LABEL,
            lambda i: Image(np.repeat(i.array, 2, 1), refine_grid(i.grid, (2, 1, 1))),
            r'size \(24, 16, 14\).*; resample one of them, or, where a finer grid is meant, .* "label_grid": "own"',
        ),
        (SECOND, lambda i: Image(i.array[..., 1:], Grid((12, 16, 13), i.grid.spacing)), r"size \(12, 16, 13\)"),
        (LABEL, lambda i: Image(np.repeat(i.array, 2, 0), i.grid), "2 components a voxel, expected 1"),
        (IMAGE, lambda i: Image(np.repeat(i.array, 3, 0), i.grid), "3 components a voxel, expected 1"),
    ],
)
def test_a_case_that_is_not_sound_is_refused_with_its_name_and_file(
    tiny_dataset: Factory, file: str, edit: Callable[[Image], Image], sentence: str
) -> None:
    root = tiny_dataset(cases=2, channels=("T1", "T2"))
    change(root / file, edit)
    dataset = RawDataset.load(root)
    read_case(dataset.cases[0], dataset)
    with pytest.raises(DatasetError, match=f"^Case case_01: .*{Path(file).name}.*{sentence}"):
        read_case(dataset.cases[1], dataset)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxels_that_are_no_numbers_are_refused_in_every_format(
    tiny_dataset: Factory, ending: str, value: float, dtype: Any
) -> None:
    root = tiny_dataset(cases=1, ending=ending)
    dataset = RawDataset.load(root)
    change(dataset.cases[0].images[0], with_voxel(0, dtype))
    read_case(dataset.cases[0], dataset)
    sound = read_image(dataset.cases[0].images[0])
    sound.array[0, -1, -1, -1] = value  # the last voxel: nothing may be left out
    write_image_unchecked(sound, dataset.cases[0].images[0])
    with pytest.raises(DatasetError, match="Case case_00: .*(NaN|infinite)"):
        read_case(dataset.cases[0], dataset)


@pytest.mark.parametrize("file", [IMAGE, LABEL])
def test_damaged_files_and_4d_files_are_refused_with_the_case(tiny_dataset: Factory, file: str) -> None:
    for damage, sentence in (
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "truncated"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: sitk.WriteImage(sitk.Image([4, 4, 4, 2], sitk.sitkUInt8), str(path)), "4D"),
        (lambda path: path.unlink(), "no such file"),
    ):
        root = tiny_dataset(cases=2)
        dataset = RawDataset.load(root)
        damage(root / file)
        with pytest.raises(DatasetError, match=f"^Case case_01: .*{Path(file).name}.*{sentence}"):
            read_case(dataset.cases[1], dataset)


def test_a_label_of_whole_floats_is_taken_as_integers_and_noted(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=1)
    dataset = RawDataset.load(root)
    before = read_case(dataset.cases[0], dataset)[1]
    change(dataset.cases[0].label, lambda i: replace(i, array=i.array.astype(np.float32)))  # type: ignore[arg-type]
    _, label, notes = read_case_noting(dataset.cases[0], dataset)
    np.testing.assert_array_equal(label.array, before.array)  # type: ignore[union-attr]
    assert label.array.dtype == np.int16  # type: ignore[union-attr]
    assert len(notes) == 1 and "float32" in notes[0]


def test_a_tiny_difference_of_geometry_is_accepted_noted_and_the_image_decides(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=2)
    dataset = RawDataset.load(root)
    change(root / "labelsTr/case_01.nii.gz", on_grid(origin=(0.01, 0.0, 0.0)))
    assert read_case_noting(dataset.cases[0], dataset)[2] == ()
    image, label, notes = read_case_noting(dataset.cases[1], dataset)
    assert label is not None and label.grid == image.grid
    assert len(notes) == 1 and "origin (0.01, 0, 0) mm differs slightly" in notes[0]


def test_rounding_of_a_header_is_no_difference_at_all(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=1)
    change(root / "labelsTr/case_00.nii.gz", on_grid(spacing=(2.000002, 1.0, 1.0), origin=(1e-5, 0.0, 0.0)))
    dataset = RawDataset.load(root)
    assert read_case_noting(dataset.cases[0], dataset)[2] == ()


def finer(factor: int, *, shift: float = 0.0, slices: int | None = None) -> Callable[[Image], Image]:
    """The label on slices `factor` times as thin over the same extent; moved by `shift` mm; `slices` of them."""

    def edit(image: Image) -> Image:
        array = image.array.repeat(factor, 1)[:, :slices]
        thickness = image.grid.spacing[0] / factor
        origin = (image.grid.origin[0] - image.grid.spacing[0] / 2 + thickness / 2 + shift, *image.grid.origin[1:])
        return Image(array, replace(image.grid, shape=array.shape[1:], spacing=(thickness, 1.0, 1.0), origin=origin))

    return edit


def test_a_label_on_a_finer_grid_is_read_on_it_where_the_dataset_says_so(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=2)
    on_image = read_case(RawDataset.load(root).cases[1], RawDataset.load(root))[1]
    change(root / LABEL, finer(4))
    undeclared = RawDataset.load(root)
    with pytest.raises(DatasetError, match=r"Case case_01: .*size \(48, 16, 14\) voxels"):
        read_case(undeclared.cases[1], undeclared)
    describe(root, label_grid="own")
    dataset = RawDataset.load(root)
    assert dataset.label_grid == "own"
    image, label = read_case(dataset.cases[1], dataset)
    assert image.shape == (12, 16, 14) and label is not None and label.shape == (48, 16, 14)
    assert label.grid.spacing == (0.5, 1.0, 1.0)
    np.testing.assert_array_equal(label.array[:, ::4], on_image.array)  # type: ignore[union-attr]
    same = read_case(dataset.cases[0], dataset)[1]
    assert same is not None and same.shape == (12, 16, 14), "a label that lies on the image's grid may stay there"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (finer(4, shift=0.3), r"covers \(-0.7, -0.5, -0.5\) to \(23.3, 15.5, 13.5\) mm .* \(-1, -0.5, -0.5\) to \(23,"),
        (finer(4, slices=47), r"covers .* to \(22.5, 15.5, 13.5\) mm"),
        (on_grid(direction=FLIPPED), "covers"),
        (lambda i: Image(i.array[:, ::2], Grid((6, 16, 14), (4.0, 1.0, 1.0), (1.0, 0.0, 0.0))), "fewer than"),
    ],
)  # fmt: skip
def test_a_label_on_an_unrelated_or_coarser_grid_is_refused_with_both_extents(
    tiny_dataset: Factory, edit: Callable[[Image], Image], sentence: str
) -> None:
    root = tiny_dataset(cases=2)
    change(root / LABEL, edit)
    describe(root, label_grid="own")
    dataset = RawDataset.load(root)
    with pytest.raises(DatasetError, match=f"^Case case_01: .*case_01.nii.gz: .*{sentence}"):
        read_case(dataset.cases[1], dataset)


def test_half_a_fine_voxel_of_rounding_is_the_same_extent(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=2)
    change(root / LABEL, finer(4, shift=0.2))
    describe(root, label_grid="own")
    dataset = RawDataset.load(root)
    assert read_case(dataset.cases[1], dataset)[1].shape == (48, 16, 14)  # type: ignore[union-attr]


def test_a_case_without_label_is_read(tiny_dataset: Factory) -> None:
    dataset = RawDataset.load(tiny_dataset(cases=1))
    assert read_case(replace(dataset.cases[0], label=None), dataset)[1] is None


def test_large_finite_values_are_not_mistaken_for_infinity(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=1)
    change(root / "imagesTr/case_00_0000.nii.gz", lambda i: replace(i, array=np.full_like(i.array, 3e38, np.float32)))
    dataset = RawDataset.load(root)
    assert np.isfinite(read_case(dataset.cases[0], dataset)[0].array).all()


def test_a_dataset_without_any_foreground_is_refused_and_its_cases_named(tiny_dataset: Factory) -> None:
    dataset = RawDataset.load(tiny_dataset(cases=2))
    require_foreground(dataset, ["case_01"])
    with pytest.raises(DatasetError, match="case_00, case_01"):
        require_foreground(dataset, [])


@pytest.mark.parametrize(
    "label",
    [
        np.zeros((2, 3, 4), np.uint8),
        np.arange(24, dtype=np.int16).reshape(2, 3, 4),
        np.array([[[-3, -3, 70000]]], dtype=np.int32),
        np.zeros((0, 3, 4), np.uint8),
    ],
)
def test_label_values_counts_every_voxel(label: np.ndarray) -> None:
    values, counts = np.unique(label, return_counts=True)
    assert label_values(label) == dict(zip(values.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "cases", "shape"),
    [
        ("Dataset004_Hippocampus", 200, None),
        ("Dataset010_SunnybrookLV", 30, None),
        ("Dataset020_Nuclei2D", 30, (3, 1, 256, 320)),
    ],
)
def test_real_datasets_are_listed_and_read(shared_data: Path, name: str, cases: int, shape: Any) -> None:
    dataset = RawDataset.load(shared_data / name)
    assert len(dataset.cases) == cases
    for case in dataset.cases[:3]:
        image, label = read_case(case, dataset)
        assert shape is None or image.array.shape == shape
        assert label is not None and label.array.any()
