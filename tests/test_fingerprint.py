"""What the fingerprint says about a dataset: shapes, intensities, classes, orientation, left and right."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoseg.dataset import RawDataset
from autoseg.errors import DatasetError
from autoseg.experiment_planning.fingerprint import (
    CaseFingerprint,
    Fingerprint,
    extract_fingerprint,
    find_mirrored_pairs,
    left_right_names,
    uniform_fingerprint,
)
from autoseg.image import Grid, Image, write_image
from autoseg.labels import Labels

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
# array axis z runs along y, y along -z, x along -x: a case stored in another orientation
TURNED = ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0))


def write_dataset(root: Path, cases, *, labels, channels=("MRI",), **more) -> RawDataset:
    """`cases`: for each its channels' arrays, its label array and its grid."""
    for number, (arrays, label, grid) in enumerate(cases):
        for channel, array in enumerate(arrays):
            write_image(Image(array[None], grid), root / "imagesTr" / f"c{number}_{channel:04d}.nii.gz")
        write_image(Image(label[None], grid), root / "labelsTr" / f"c{number}.nii.gz")
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **more,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return RawDataset.load(root)


def framed_case(*, direction=IDENTITY, spacing=(2.0, 1.0, 0.5), value=7.0):
    """10 x 8 x 6 voxels of which a box of 6 x 4 x 3 is not zero; in it two blocks of class 1 and one of class 2."""
    image = np.zeros((10, 8, 6), np.float32)
    image[2:8, 1:5, 2:5] = value
    label = np.zeros((10, 8, 6), np.uint8)
    label[2, 1:3, 2] = 1
    label[6, 4, 4] = 1
    label[4, 1:5, 3] = 2
    image[label == 2] = 20
    return (image,), label, Grid((10, 8, 6), spacing, direction=direction)


def test_shapes_are_those_after_cropping_to_what_is_not_zero(tmp_path):
    dataset = write_dataset(tmp_path, [framed_case()], labels={"background": 0, "a": 1, "b": 2})
    case = extract_fingerprint(dataset, workers=1).cases[0]
    assert case.shape == (6, 4, 3)
    assert case.size_before_cropping == (10, 8, 6)
    assert case.spacing == (2.0, 1.0, 0.5)
    assert case.orientation == "SPL"


def test_a_turned_file_is_measured_in_canonical_orientation(tmp_path):
    dataset = write_dataset(tmp_path, [framed_case(direction=TURNED)], labels={"background": 0, "a": 1, "b": 2})
    case = extract_fingerprint(dataset, workers=1).cases[0]
    assert case.shape == (4, 6, 3)
    assert case.spacing == (1.0, 2.0, 0.5)
    assert case.orientation != "SPL"


def test_classes_are_counted_with_volume_frequency_and_components(tmp_path):
    dataset = write_dataset(tmp_path, [framed_case()] * 2, labels={"background": 0, "a": 1, "b": 2, "c": 3})
    a, b, c = extract_fingerprint(dataset, workers=1).classes
    assert (a.cases, b.cases, c.cases) == (2, 2, 0)
    assert (a.median_components, b.median_components) == (2, 1)
    assert (a.median_volume_mm3, b.median_volume_mm3, c.median_volume_mm3) == (3, 4, 0)
    assert a.frequency == pytest.approx(3 / 72, rel=1e-3)
    assert c.intensities == ()


def test_intensities_are_those_of_the_foreground_of_each_channel_and_class(tmp_path):
    (first,), label, grid = framed_case()
    dataset = write_dataset(
        tmp_path,
        [((first, -first), label, grid)],
        labels={"background": 0, "a": 1, "b": 2},
        channels=("MRI", "CT"),
    )
    fingerprint = extract_fingerprint(dataset, workers=1)
    positive, negative = fingerprint.intensities
    assert positive.percentile_00_5 == 7 and positive.percentile_99_5 == 20
    assert positive.mean == pytest.approx((3 * 7 + 4 * 20) / 7, rel=0.02)
    assert negative.mean == pytest.approx(-positive.mean)
    assert [entry.median for entry in fingerprint.classes[0].intensities] == [7, -7]
    assert [entry.median for entry in fingerprint.classes[1].intensities] == [20, -20]
    assert fingerprint.classes[1].intensities[0].std == 0


def test_a_region_counts_the_voxels_of_all_its_values(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    dataset = write_dataset(tmp_path, [framed_case()], labels=labels, regions_class_order=[1, 2])
    assert extract_fingerprint(dataset, workers=1).cases[0].class_voxels == (7, 4)


def test_the_fingerprint_is_the_same_with_workers_and_twice(tiny_dataset):
    dataset = RawDataset.load(tiny_dataset(cases=4))
    alone, together = extract_fingerprint(dataset, workers=1), extract_fingerprint(dataset, workers=2)
    assert alone == together
    assert alone.id == together.id


def test_a_fingerprint_is_read_back_as_it_was_written(tiny_dataset, tmp_path):
    fingerprint = extract_fingerprint(RawDataset.load(tiny_dataset()), workers=1)
    fingerprint.save(tmp_path / "fingerprint.json")
    assert Fingerprint.load(tmp_path / "fingerprint.json") == fingerprint


def test_another_version_or_a_damaged_fingerprint_is_refused(tiny_dataset, tmp_path):
    path = tmp_path / "fingerprint.json"
    extract_fingerprint(RawDataset.load(tiny_dataset()), workers=1).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(DatasetError, match="version 99"):
        Fingerprint.load(path)
    path.write_text(json.dumps({**content, "anisotropy": "much"}))
    with pytest.raises(DatasetError, match="anisotropy"):
        Fingerprint.load(path)


def test_all_broken_cases_are_named_at_once_and_can_be_dropped(tiny_dataset):
    root = tiny_dataset(cases=4)
    for name in ("case_01", "case_03"):
        (root / "labelsTr" / f"{name}.nii.gz").write_bytes(b"")
    dataset = RawDataset.load(root)
    with pytest.raises(DatasetError, match="2 of 4") as refused:
        extract_fingerprint(dataset, workers=1)
    assert "case_01" in str(refused.value) and "case_03" in str(refused.value)
    fingerprint = extract_fingerprint(dataset, workers=1, drop_cases=("case_01", "case_03"))
    assert [case.identifier for case in fingerprint.cases] == ["case_00", "case_02"]
    assert fingerprint.dropped_cases == ("case_01", "case_03")


def test_a_case_to_drop_that_is_not_there_is_refused(tiny_dataset):
    with pytest.raises(DatasetError, match="case_77"):
        extract_fingerprint(RawDataset.load(tiny_dataset()), workers=1, drop_cases=("case_77",))


def test_planes_are_two_dimensional(tiny_dataset):
    root = tiny_dataset(shape=(1, 24, 20), spacing=(1.0, 1.0, 1.0), channels=("R", "G", "B"), ending=".png")
    fingerprint = extract_fingerprint(RawDataset.load(root), workers=1)
    assert fingerprint.dimensions == 2
    assert fingerprint.anisotropy == 1


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("left_kidney", "right_kidney", "liver"), (("left_kidney", "right_kidney"),)),
        (("Hippocampus_L", "Hippocampus_R"), (("Hippocampus_L", "Hippocampus_R"),)),
        (("L_lung", "R_lung"), (("L_lung", "R_lung"),)),
        (("kidneyRight", "kidneyLeft"), (("kidneyLeft", "kidneyRight"),)),
        (("femur left", "femur right"), (("femur left", "femur right"),)),
        (("vertebra_L1", "rib_R1"), ()),
        (("cleft", "bright"), ()),
        (("left_kidney",), ()),
        (("anterior", "posterior"), ()),
    ],
)
def test_left_right_pairs_are_found_in_names(names, pairs):
    assert left_right_names(names) == pairs


def paired_case(left, right):
    return CaseFingerprint("c", (9, 9, 9), (1.0, 1.0, 1.0), (9, 9, 9), "SPL", (1, 1), (1, 1), (left, right))


def test_a_pair_needs_names_and_centroids_that_one_axis_parts():
    names = ("left_kidney", "right_kidney")
    apart = [paired_case((5.0, 5.0, 8.0), (5.0, 4.0, 1.0))] * 9
    (pair,) = find_mirrored_pairs(names, apart)
    assert (pair.left, pair.right, pair.axis) == ("left_kidney", "right_kidney", 2)
    muddled = apart[:5] + [paired_case((5.0, 4.0, 1.0), (5.0, 5.0, 8.0))] * 4
    assert find_mirrored_pairs(names, muddled) == ()
    assert find_mirrored_pairs(names, [paired_case(None, (1.0, 1.0, 1.0))]) == ()
    assert find_mirrored_pairs(("a", "b"), apart) == ()


def test_the_parting_axis_is_found_where_the_files_lie_about_their_direction():
    sideways = [paired_case((5.0, 8.0, 5.0), (5.0, 1.0, 5.0))] * 3
    assert find_mirrored_pairs(("l_lung", "r_lung"), sideways)[0].axis == 1


def test_the_id_changes_with_the_content():
    labels = Labels.from_json({"background": 0, "a": 1})
    one = uniform_fingerprint("x", shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0), cases=2, labels=labels)
    assert replace(one, anisotropy=2.0).id != one.id


def test_measuring_cases_never_imports_torch():
    code = "import autoseg.experiment_planning.fingerprint, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=root).returncode == 0


def test_the_hippocampus_has_no_left_right_pair_and_even_voxels(shared_data):
    dataset = RawDataset.load(shared_data / "Dataset004_Hippocampus")
    few = replace(dataset, cases=dataset.cases[:8])
    fingerprint = extract_fingerprint(few, workers=1)
    assert fingerprint.median_spacing == (1.0, 1.0, 1.0)
    assert fingerprint.mirrored_pairs == ()
    assert all(entry.cases == 8 for entry in fingerprint.classes)
