"""The synthetic dataset is what the demo and the tests need: small, sound, and hard for a pipeline with mistakes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from conftest import memory_by_formula
from typer.testing import CliRunner

import autoseg.demo as demo
from autoseg.cli import app
from autoseg.dataset import RawDataset
from autoseg.demo import LABELS, run_demo, synthetic_case, write_synthetic_dataset
from autoseg.errors import StorageError
from autoseg.experiment_planning.sizing import Sizer
from autoseg.experiment_planning.verify import verify_dataset
from autoseg.geometry import canonical_axes, orientation_code, turn_array, turn_grid
from autoseg.image import Image, read_image
from autoseg.reading import read_case

SHAPE = (10, 36, 36)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> RawDataset:
    return RawDataset.load(
        write_synthetic_dataset(tmp_path_factory.mktemp("demo") / "Dataset900_Demo", cases=12, shape=SHAPE)
    )


def canonical(image: Image) -> Image:
    turn = canonical_axes(image.grid.direction)
    return Image(turn_array(image.array, *turn), turn_grid(image.grid, *turn))


def canonical_cases(dataset: RawDataset) -> list[tuple[Image, Image]]:
    return [tuple(canonical(one) for one in read_case(case, dataset)) for case in dataset.cases]


def test_it_is_a_sound_dataset_in_nnunet_layout(dataset):
    assert len(dataset.cases) == 12 and len(dataset.test_cases) == 4
    assert all(case.label is not None and case.label.is_file() for case in dataset.test_cases)
    assert dataset.labels.names == tuple(LABELS)[1:]
    report = verify_dataset(dataset.root, workers=1)
    assert not report.errors
    assert all("orientation" in problem.sentence for problem in report.problems)  # it warns of those, rightly


def test_the_same_seed_gives_the_same_cases_whatever_their_number(dataset, tmp_path):
    again = RawDataset.load(write_synthetic_dataset(tmp_path / "again", cases=2, test_cases=0, shape=SHAPE))
    other = RawDataset.load(write_synthetic_dataset(tmp_path / "other", cases=2, test_cases=0, shape=SHAPE, seed=1))
    for number in range(2):
        image = read_image(dataset.cases[number].images[0])
        same = read_image(again.cases[number].images[0])
        np.testing.assert_array_equal(same.array, image.array)
        assert same.grid == image.grid
        assert not np.array_equal(read_image(other.cases[number].images[0]).array, image.array)


def test_training_and_test_cases_differ(dataset):
    first, test = (read_image(cases[0].images[0]) for cases in (dataset.cases, dataset.test_cases))
    assert first.shape != test.shape or not np.array_equal(first.array, test.array)


def test_shapes_spacings_and_orientations_vary(dataset):
    grids = [read_image(case.images[0]).grid for case in dataset.cases]
    assert len({grid.shape for grid in grids}) > 6 and len({grid.spacing for grid in grids}) > 6
    assert len({orientation_code(grid.direction) for grid in grids}) == 4
    for image, _ in canonical_cases(dataset):
        assert image.grid.spacing[0] > 2 * image.grid.spacing[1]


def test_every_class_is_in_every_case_and_the_organ_parts_touch(dataset):
    for _, label in canonical_cases(dataset):
        volume = label.array[0]
        assert set(np.unique(volume)) == set(LABELS.values())
        front, back = volume == LABELS["organ_front"], volume == LABELS["organ_back"]
        assert (front[:, :-1] & back[:, 1:]).sum() > 10  # back lies behind front: y grows to the back


def test_left_is_on_the_left_of_the_patient_in_the_world(dataset):
    for _, label in canonical_cases(dataset):
        left, right = (
            np.argwhere(label.array[0] == LABELS[name])[:, 2].mean() for name in ("gland_left", "gland_right")
        )
        assert left > right  # canonical x runs to the patient's left


def test_the_glands_look_alike_so_that_only_the_side_tells_them_apart(dataset):
    ratios = []
    for image, label in canonical_cases(dataset):
        left, right = (image.array[0][label.array[0] == LABELS[name]].mean() for name in ("gland_left", "gland_right"))
        ratios.append(left / right)
    assert 0.75 < np.mean(ratios) < 1.33
    assert min(ratios) < 1 < max(ratios)


def test_brightness_alone_does_not_find_the_structures(dataset):
    """The best threshold of each image, told the truth, still misses: noise, decoys and the bias field."""
    best = []
    for image, label in canonical_cases(dataset):
        voxels, truth = image.array[0], label.array[0] > 0
        dice = [
            2 * (truth & (voxels > limit)).sum() / (truth.sum() + (voxels > limit).sum())
            for limit in np.percentile(voxels, np.arange(70, 100, 1))
        ]
        best.append(max(dice))
    assert np.mean(best) < 0.85


def test_image_units_differ_between_patients_and_some_have_an_empty_border():
    cases = [
        synthetic_case(np.random.default_rng(number), number, shape=SHAPE, spacing=(3, 1, 1)) for number in range(8)
    ]
    brightness = [float(image.array.mean()) for image, _ in cases]
    assert max(brightness) > 1.5 * min(brightness)
    assert [bool((image.array[0, :, :2] == 0).all()) for image, _ in cases][3]


def test_the_demo_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "precious.txt").write_text("data")
    with pytest.raises(StorageError, match="not empty"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_the_body_has_no_landmark_that_tells_left_from_right(dataset):
    """Else a network could learn "the gland beside the organ", and mirroring would go unpunished."""
    sides = []
    for _, label in canonical_cases(dataset):
        organ = np.isin(label.array[0], (LABELS["organ_front"], LABELS["organ_back"]))
        glands = [np.argwhere(label.array[0] == LABELS[name])[:, 2].mean() for name in ("gland_left", "gland_right")]
        sides.append(np.argwhere(organ)[:, 2].mean() / np.mean(glands) - 1)
    assert abs(np.mean(sides)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--time", "2s"], []], ids=["timed", "by steps"])
def test_the_command_tells_the_whole_story(tmp_path, monkeypatch, options):
    smaller = functools.partial(write_synthetic_dataset, cases=6, test_cases=1, shape=SHAPE)
    monkeypatch.setattr(demo, "write_synthetic_dataset", smaller)
    monkeypatch.setattr(Sizer, "measure", memory_by_formula)
    monkeypatch.setattr(demo, "STEPS", 2)
    told = CliRunner().invoke(app, ["demo", str(tmp_path / "demo"), *options, "--device", "cpu"])
    assert told.exit_code == 0, told.output
    assert options or "Trained 2 steps" in told.stdout
    assert "mean Dice" in told.stdout and all(name in told.stdout for name in tuple(LABELS)[1:])
    root = tmp_path / "demo"
    (case,) = RawDataset.load(root / demo.NAME).test_cases
    predicted = read_image(root / "predictions" / f"{case.identifier}.nii.gz")
    assert predicted.grid.shape == read_image(case.label).grid.shape
    pictures = [line.split()[-1] for line in told.stdout.splitlines() if line.startswith("picture")]
    assert pictures and all(Path(path).read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_time_that_is_none_is_refused(tmp_path):
    told = CliRunner().invoke(app, ["demo", str(tmp_path / "demo"), "--time", "soon"])
    assert told.exit_code == 2 and "--time soon: a duration is a number with a unit" in told.stderr
    assert not list(tmp_path.iterdir())
