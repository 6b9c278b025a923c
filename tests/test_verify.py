"""verify finds what is wrong with any case, names all of it, and repairs in a copy what is safe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoseg.dataset import RawDataset
from autoseg.errors import DatasetError, StorageError
from autoseg.experiment_planning import verify as verify_module
from autoseg.experiment_planning.verify import VerifyReport, fix_dataset, verify_dataset
from autoseg.geometry import turn_array, turn_grid
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.reading import label_values, read_case, read_case_noting

Factory = Callable[..., Path]


def verify(root: Path) -> VerifyReport:
    return verify_dataset(root, workers=1)


def sentences(report: VerifyReport, severity: str, case: str | None = None) -> list[str]:
    return [p.sentence for p in report.problems if p.severity == severity and case in (None, p.case)]


def describe(root: Path, **changes: object) -> None:
    content = {**json.loads((root / "dataset.json").read_text()), **changes}
    (root / "dataset.json").write_text(json.dumps(content))


def change(path: Path, edit: Callable[[Image], Image]) -> None:
    write_image(edit(read_image(path)), path)


def voxels(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Image], Image]:
    return lambda image: replace(image, array=edit(image.array))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_sound_dataset_has_no_problem(tiny_dataset: Factory) -> None:
    report = verify(tiny_dataset(cases=4, channels=("T1", "T2")))
    assert report.problems == ()
    assert report.sound
    assert report.cases == ("case_00", "case_01", "case_02", "case_03")
    assert report.table() == "Dataset001_Tiny: 4 training cases: 0 errors, 0 warnings."


def test_every_broken_case_is_named_with_all_that_is_wrong(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=5)
    (root / "imagesTr/case_01_0000.nii.gz").write_bytes(b"")
    change(root / "labelsTr/case_01.nii.gz", voxels(lambda a: a + 5))
    (root / "labelsTr/case_02.nii.gz").unlink()
    change(root / "labelsTr/case_04.nii.gz", voxels(lambda a: a * 0.5))
    report = verify(root)
    assert report.broken_cases == ("case_01", "case_02", "case_04")
    assert not report.sound
    image, label = sentences(report, "error", "case_01")
    assert "empty" in image and "5, 6, 7" in label
    assert "missing" in sentences(report, "error", "case_02")[0]
    assert "fractional" in sentences(report, "error", "case_04")[0]
    assert report.cases == ("case_00", "case_01", "case_02", "case_03", "case_04")
    assert all(f"case_0{number}" in report.table() for number in (1, 2, 4))


def test_verify_refuses_with_the_sentence_that_reading_refuses_with(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3)
    change(root / "labelsTr/case_01.nii.gz", lambda i: replace(i, grid=replace(i.grid, origin=(9.0, 0.0, 0.0))))
    dataset = RawDataset.load(root)
    with pytest.raises(DatasetError) as refused:
        read_case(dataset.cases[1], dataset)
    (sentence,) = sentences(verify(root), "error")
    assert str(refused.value) == f"Case case_01: {sentence}"


def test_the_report_is_json(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3)
    describe(root, numTraining=7)
    content = json.loads(json.dumps(verify(root).to_json()))
    assert content["sound"] is True
    assert content["problems"] == [
        {
            "case": "",
            "severity": "warning",
            "sentence": '"numTraining" in dataset.json is 7, but there are 3 training cases.',
            "fixable": True,
        }
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"channel_names": {"0": "T1"}, "file_ending": ".nii.gz"}'])
def test_a_broken_dataset_json_is_an_error_of_the_report(tiny_dataset: Factory, content: str) -> None:
    root = tiny_dataset()
    (root / "dataset.json").write_text(content)
    (error,) = verify(root).errors
    assert "dataset.json" in error.sentence


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such dataset folder"):
        verify(tmp_path / "absent")


def test_the_same_image_twice_is_found_even_under_another_header(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3)
    shutil.copy(root / "imagesTr/case_00_0000.nii.gz", root / "imagesTr/case_02_0000.nii.gz")
    (sentence,) = sentences(verify(root), "warning", "case_02")
    assert "same as that of case case_00" in sentence


def test_a_test_image_that_is_a_training_image_is_found(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3)
    (root / "imagesTs").mkdir()
    shutil.copy(root / "imagesTr/case_01_0000.nii.gz", root / "imagesTs/new_0000.nii.gz")
    report = verify(root)
    assert report.test_cases == ("new",)
    (problem,) = report.warnings
    assert problem.case == "imagesTs/new" and "case_01" in problem.sentence


def test_a_broken_test_case_is_an_error_under_its_own_name(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3, channels=("T1", "T2"))
    shutil.copytree(root / "imagesTr", root / "imagesTs")
    (root / "imagesTs/case_00_0001.nii.gz").unlink()
    (root / "imagesTs/case_02_0000.nii.gz").write_bytes(b"")
    report = verify(root)
    assert report.broken_cases == ("imagesTs/case_00", "imagesTs/case_02")
    assert report.cases == report.test_cases == ("case_00", "case_01", "case_02")


def test_a_case_without_foreground_is_a_warning_and_a_dataset_without_is_an_error(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3)
    change(root / "labelsTr/case_01.nii.gz", voxels(np.zeros_like))
    report = verify(root)
    assert report.sound
    assert "no foreground voxel" in sentences(report, "warning", "case_01")[0]
    for number in (0, 2):
        change(root / f"labelsTr/case_0{number}.nii.gz", voxels(np.zeros_like))
    (error,) = verify(root).errors
    assert all(case in error.sentence for case in ("case_00", "case_01", "case_02"))


def test_a_class_that_no_case_shows_is_named(tiny_dataset: Factory) -> None:
    root = tiny_dataset()
    describe(root, labels={"background": 0, "ball": 1, "core": 2, "ghost": 3})
    assert any('"ghost" (3) occurs in no case' in sentence for sentence in sentences(verify(root), "warning"))


def test_a_constant_channel_is_named(tiny_dataset: Factory) -> None:
    root = tiny_dataset(channels=("T1", "T2"))
    change(root / "imagesTr/case_01_0001.nii.gz", voxels(lambda a: np.full_like(a, 7)))
    (sentence,) = sentences(verify(root), "warning", "case_01")
    assert "channel 1 (T2) has the same value 7 everywhere" in sentence


def test_a_spacing_far_from_the_others_is_named(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=4)
    for path in (root / "imagesTr/case_03_0000.nii.gz", root / "labelsTr/case_03.nii.gz"):
        change(path, lambda i: replace(i, grid=replace(i.grid, spacing=(20.0, 1.0, 1.0))))
    (sentence,) = sentences(verify(root), "warning", "case_03")
    assert "(20, 1, 1) mm" in sentence and "(2, 1, 1) mm" in sentence


def test_an_orientation_unlike_the_others_is_named(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=4)
    turn = ((0, 2, 1), (False, True, False))
    for path in (root / "imagesTr/case_02_0000.nii.gz", root / "labelsTr/case_02.nii.gz"):
        change(path, lambda i: Image(turn_array(i.array, *turn), turn_grid(i.grid, *turn)))
    (sentence,) = sentences(verify(root), "warning", "case_02")
    assert "orientation" in sentence and "differs from SPL" in sentence


def test_left_and_right_swapped_in_one_case_is_found(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=5)
    describe(root, labels={"background": 0, "left_kidney": 1, "right_kidney": 2})
    for number in range(5):
        label = np.zeros((12, 16, 14), np.uint8)
        label[4:8, 4:8, 1:4], label[4:8, 5:9, 10:13] = (1, 2) if number != 3 else (2, 1)
        change(root / f"labelsTr/case_0{number}.nii.gz", voxels(lambda a, label=label: label[None]))
    warned = {p.case: p.sentence for p in verify(root).warnings}
    assert list(warned) == ["case_03"]
    assert '"left_kidney" and "right_kidney" lie the other way round' in warned["case_03"]


def test_left_and_right_are_compared_in_the_world_not_in_the_file(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=4)
    describe(root, labels={"background": 0, "left_kidney": 1, "right_kidney": 2})
    turn = ((2, 0, 1), (True, False, False))  # x first, and reversed
    for number in range(4):
        label = np.zeros((12, 16, 14), np.uint8)
        label[4:8, 5:9, 1:4], label[4:8, 4:8, 10:13] = 1, 2
        change(root / f"labelsTr/case_0{number}.nii.gz", voxels(lambda a, label=label: label[None]))
        if number == 2:  # stored otherwise, but the same in the world: no swap
            for path in (root / "imagesTr/case_02_0000.nii.gz", root / "labelsTr/case_02.nii.gz"):
                change(path, lambda i: Image(turn_array(i.array, *turn), turn_grid(i.grid, *turn)))
    assert not any("other way round" in sentence for sentence in sentences(verify(root), "warning"))


def test_files_of_no_case_and_a_wrong_count_are_warnings(tiny_dataset: Factory) -> None:
    root = tiny_dataset()
    (root / "imagesTr/notes.txt").write_text("")
    describe(root, numTraining=9)
    first, second = sorted(sentences(verify(root), "warning"))
    assert "numTraining" in first and "notes.txt belongs to no case" in second


def test_workers_find_the_same(tiny_dataset: Factory) -> None:
    root = tiny_dataset(cases=3)
    (root / "labelsTr/case_01.nii.gz").write_bytes(b"")
    assert verify_dataset(root, workers=2) == verify(root)


# ---- the repaired copy


def test_float_labels_small_offsets_and_gaps_in_numbering_are_repaired_in_a_copy(
    tiny_dataset: Factory, tmp_path: Path
) -> None:
    root = tiny_dataset(cases=3, channels=("T1", "T2"))
    describe(root, labels={"background": 0, "ball": 3, "core": 7, "ignore": 9}, numTraining=5, licence="free")
    for number in range(3):
        change(root / f"labelsTr/case_0{number}.nii.gz", voxels(lambda a: np.array([0, 3, 7], np.uint8)[a]))
    change(root / "labelsTr/case_00.nii.gz", voxels(lambda a: a.astype(np.float32)))
    moved = {"origin": (0.02, 0.0, 0.0)}
    for file in ("labelsTr/case_01.nii.gz", "imagesTr/case_01_0001.nii.gz"):
        change(root / file, lambda i: replace(i, grid=replace(i.grid, **moved)))
    before = content_of(root)

    report = fix_dataset(root, tmp_path / "fixed")

    assert content_of(root) == before
    assert report.remaining == () and len(report.repairs) == 5
    assert verify(tmp_path / "fixed").problems == ()
    old, new = RawDataset.load(root), RawDataset.load(tmp_path / "fixed")
    assert new.labels.names == old.labels.names
    assert new.labels.values == ((1,), (2,)) and new.labels.ignore == 3
    for a, b in zip(old.cases, new.cases, strict=True):
        (image, label), (fixed_image, fixed_label) = read_case(a, old), read_case(b, new)
        np.testing.assert_array_equal(image.array, fixed_image.array)
        for name in old.labels.names:
            np.testing.assert_array_equal(
                old.labels.mask(label.array, name),  # type: ignore[union-attr]
                new.labels.mask(fixed_label.array, name),  # type: ignore[union-attr]
            )
        assert read_case_noting(b, new)[2] == ()
        assert read_image(b.label).array.dtype == np.uint8  # type: ignore[arg-type]
    assert json.loads((tmp_path / "fixed/dataset.json").read_text())["licence"] == "free"
    assert (tmp_path / "fixed/imagesTr/case_00_0000.nii.gz").read_bytes() == before["imagesTr/case_00_0000.nii.gz"]


def test_regions_keep_their_meaning_when_values_are_renumbered(tiny_dataset: Factory, tmp_path: Path) -> None:
    root = tiny_dataset(cases=2)
    describe(root, labels={"background": 0, "whole": [2, 5], "core": 5}, regions_class_order=[2, 5])
    for number in range(2):
        change(root / f"labelsTr/case_0{number}.nii.gz", voxels(lambda a: np.array([0, 2, 5], np.uint8)[a]))
    fix_dataset(root, tmp_path / "fixed")
    fixed = RawDataset.load(tmp_path / "fixed")
    assert fixed.labels.values == ((1, 2), (2,)) and fixed.labels.region_order == (1, 2)
    assert set(label_values(read_image(fixed.cases[0].label).array)) == {0, 1, 2}  # type: ignore[arg-type]


def test_explicit_lists_become_the_usual_layout(tiny_dataset: Factory, tmp_path: Path) -> None:
    root = tiny_dataset(cases=2)
    describe(root, dataset={"p": {"images": ["imagesTr/case_01_0000.nii.gz"], "label": "labelsTr/case_01.nii.gz"}})
    fix_dataset(root, tmp_path / "fixed")
    (case,) = RawDataset.load(tmp_path / "fixed").cases
    assert case.images == (tmp_path / "fixed/imagesTr/p_0000.nii.gz",)


def test_what_is_not_safe_is_refused_and_nothing_is_written(tiny_dataset: Factory, tmp_path: Path) -> None:
    root = tiny_dataset(cases=3)
    change(root / "labelsTr/case_02.nii.gz", lambda i: Image(i.array[:, 1:], Grid((11, 16, 14), i.grid.spacing)))
    with pytest.raises(DatasetError, match="(?s)cannot be repaired safely.*case_02: .*size"):
        fix_dataset(root, tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


def test_a_dataset_with_nothing_to_repair_is_not_copied(tiny_dataset: Factory, tmp_path: Path) -> None:
    assert fix_dataset(tiny_dataset(), tmp_path / "fixed").repairs == ()
    assert not (tmp_path / "fixed").exists()


def test_an_output_folder_that_is_used_or_inside_the_dataset_is_refused(tiny_dataset: Factory, tmp_path: Path) -> None:
    root = tiny_dataset()
    for out in (root, root / "fixed"):
        with pytest.raises(DatasetError, match="never written to"):
            fix_dataset(root, out)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("precious")
    with pytest.raises(DatasetError, match="not an empty folder"):
        fix_dataset(root, tmp_path / "used")
    assert (tmp_path / "used/file").read_text() == "precious"


def test_an_empty_output_folder_is_used(tiny_dataset: Factory, tmp_path: Path) -> None:
    root = tiny_dataset()
    describe(root, numTraining=9)
    (tmp_path / "fixed").mkdir()
    fix_dataset(root, tmp_path / "fixed")
    assert verify(tmp_path / "fixed").problems == ()


def test_a_copy_that_fails_half_way_leaves_nothing(
    tiny_dataset: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_dataset()
    describe(root, numTraining=9)
    whole = verify_module.copy_case

    def full_disk(job: verify_module.CopyJob, **options: object) -> None:
        if job.case.identifier == "case_02":
            raise OSError(28, os.strerror(28))
        whole(job, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(verify_module, "copy_case", full_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="disk is full"):
        fix_dataset(root, tmp_path / "fixed")
    assert sorted(tmp_path.iterdir()) == before


def test_real_datasets_are_sound(shared_data: Path) -> None:
    for name in ("Dataset010_SunnybrookLV", "Dataset020_Nuclei2D"):
        assert verify(shared_data / name).problems == ()
