"""Folders of predictions are scored case by case, and what cannot be scored is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from autoseg.errors import PredictionError
from autoseg.geometry import refine_grid, resample_grid, turn_array, turn_grid, voxels_to_world
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.inference.evaluation import evaluate_folders, evaluate_image_folders, evaluate_pairs
from autoseg.inference.scoring import Pair
from autoseg.labels import Labels

SPACING = (3.0, 1.0, 1.0)
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def label_map(*, shape=(6, 12, 12), shift=0, lesion=True) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[1:5, 2:8, 2 + shift : 8 + shift] = 1
    if lesion:
        array[2:4, 3:5, 3 + shift : 5 + shift] = 2
    return array


def write(path: Path, array: np.ndarray, *, spacing=SPACING, origin=(0.0, 0.0, 0.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(Image(array[None], Grid(array.shape, spacing, origin)), path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four predictions, shifted by 0, 1, 2, 3 mm against their references; dataset.json above the references."""
    for case in range(4):
        write(tmp_path / "labelsTr" / f"case_{case}.nii.gz", label_map())
        write(tmp_path / "predictions" / f"case_{case}.nii.gz", label_map(shift=case))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    return tmp_path / "predictions", tmp_path / "labelsTr"


def test_classes_are_named_and_scored_as_the_shift_says(folders):
    evaluation = evaluate_folders(*folders)
    assert evaluation.classes == ("organ", "lesion")
    assert evaluation.complete
    assert evaluation.cases["case_0"]["organ"]["dice"] == 1
    assert evaluation.cases["case_1"]["lesion"]["dice"] == pytest.approx(0.5)
    assert evaluation.cases["case_2"]["lesion"]["dice"] == 0
    assert evaluation.cases["case_3"]["lesion"]["hd95"] == pytest.approx(3)
    assert evaluation.cases["case_3"]["organ"]["volume_error_ml"] == 0
    assert evaluation.ranking() == ("case_0", "case_1", "case_2", "case_3")
    lesion = [scores["lesion"]["dice"] for scores in evaluation.cases.values()]
    assert evaluation.by_class["lesion"]["dice"].mean == pytest.approx(np.mean(lesion))
    assert evaluation.by_class["lesion"]["dice"].median == pytest.approx(np.median(lesion))
    assert evaluation.mean["dice"].mean == pytest.approx(
        np.mean([evaluation.by_class[name]["dice"].mean for name in evaluation.classes])
    )


def test_workers_change_nothing(folders):
    assert evaluate_folders(*folders, workers=2) == evaluate_folders(*folders, workers=1)


def test_json_has_no_nan_and_keeps_the_scores(folders, tmp_path):
    write(folders[0] / "case_1.nii.gz", label_map(lesion=False))
    write(folders[1] / "case_1.nii.gz", label_map(lesion=False))  # nothing to score: nan
    write(folders[0] / "case_2.nii.gz", label_map(lesion=False))  # lesion missed: infinite distance
    evaluation = evaluate_folders(*folders)
    evaluation.save(tmp_path / "summary.json")
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    summary = json.loads(text)
    assert summary["cases"]["case_1"]["lesion"]["dice"] is None
    assert summary["cases"]["case_2"]["lesion"]["hd95"] is None
    assert summary["by_class"]["lesion"]["hd95"]["infinite"] == 1
    assert summary["by_class"]["lesion"]["dice"]["cases"] == 3
    assert summary["mean"]["dice"]["mean"] == pytest.approx(evaluation.mean["dice"].mean)
    assert "empty: lesion 1" in evaluation.table()


def test_the_table_shows_every_class_with_its_interval(folders):
    lines = evaluate_folders(*folders).table().splitlines()
    assert "Dice" in lines[0] and "HD95 [mm]" in lines[0]
    assert [line.split()[0] for line in lines[1:7:2]] == ["organ", "lesion", "mean"]
    assert ".." in lines[2]


def test_the_interval_holds_the_mean_and_narrows_with_more_cases(tmp_path):
    spread = []
    for count in (6, 60):
        pairs = []
        for case in range(count):
            reference = write(tmp_path / f"r{count}_{case}.nii.gz", label_map())
            pairs.append(
                Pair(str(case), write(tmp_path / f"p{count}_{case}.nii.gz", label_map(shift=case % 3)), reference)
            )
        dice = evaluate_pairs(pairs, labels=Labels.from_json(LABELS)).mean["dice"]
        assert dice.low < dice.mean < dice.high
        spread.append(dice.high - dice.low)
    assert spread[1] < spread[0] / 2


def test_without_dataset_json_every_value_is_a_class(folders):
    (folders[1].parent / "dataset.json").unlink()
    write(folders[0] / "case_0.nii.gz", np.where(label_map() == 2, 7, label_map()).astype(np.uint8))
    evaluation = evaluate_folders(*folders)
    assert evaluation.classes == ("1", "2", "7")
    assert evaluation.cases["case_0"]["7"]["dice"] == 0
    assert math.isnan(evaluation.cases["case_1"]["7"]["dice"])


def test_regions_are_scored_as_unions(folders):
    labels = Labels.from_json({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    scores = evaluate_folders(*folders, labels=labels).cases["case_1"]
    shifted, original = label_map(shift=1) > 0, label_map() > 0
    assert scores["whole"]["dice"] == pytest.approx(2 * (shifted & original).sum() / (shifted.sum() + original.sum()))


def test_voxels_with_the_ignore_label_do_not_count(folders):
    labels = Labels.from_json({"background": 0, "organ": 1, "lesion": 2, "ignore": 3})
    reference = label_map()
    reference[:, :, 8:] = 3  # nobody annotated what the shifted prediction has beyond the organ
    write(folders[1] / "case_1.nii.gz", reference)
    scores = evaluate_folders(*folders, labels=labels).cases["case_1"]
    union = (label_map(shift=1) > 0) & (reference != 3), label_map() > 0
    expected = 2 * (union[0] & (label_map() == 1) & (label_map(shift=1) == 1)).sum()
    total = ((label_map(shift=1) == 1) & (reference != 3)).sum() + (label_map() == 1).sum()
    assert scores["organ"]["dice"] == pytest.approx(expected / total)
    assert scores["organ"]["volume_error_ml"] < 0


def test_what_cannot_be_scored_is_named_and_the_rest_is_finished(folders):
    predictions, references = folders
    write(predictions / "case_0.nii.gz", label_map(shape=(6, 12, 13)))
    (predictions / "case_1.nii.gz").write_bytes(b"broken")
    (predictions / "case_2.nii.gz").unlink()
    write(predictions / "other.nii.gz", label_map())
    (predictions / "best.png").write_bytes(b"a picture is no prediction")
    evaluation = evaluate_folders(predictions, references)
    assert list(evaluation.cases) == ["case_3"]
    assert not evaluation.complete
    assert "6x12x13" in evaluation.failed["case_0"] and "6x12x12" in evaluation.failed["case_0"]
    assert "case_1" in evaluation.failed["case_1"]
    assert evaluation.missing == ("case_2",) and evaluation.extra == ("other",)
    assert len(evaluation.problems()) == 4


@pytest.mark.parametrize(
    ("array", "options", "words"),
    [
        (label_map(), {"origin": (0.0, 5.0, 0.0)}, "lies elsewhere in the world"),
        (label_map(), {"spacing": (1.0, 1.0, 1.0)}, "lies elsewhere in the world"),
        (label_map().astype(np.float32) / 2, {}, "must be a whole number"),
        (label_map() * np.int16(-1), {}, "labels start at 0"),
        (label_map() * np.uint8(3), {}, "dataset.json does not know; it lists 0, 1, 2"),
    ],
)
def test_a_prediction_that_does_not_fit_is_refused_in_a_sentence(folders, array, options, words):
    write(folders[0] / "case_0.nii.gz", array, **options)
    evaluation = evaluate_folders(*folders)
    assert words in evaluation.failed["case_0"] and "case_0" in evaluation.failed["case_0"]
    assert len(evaluation.cases) == 3


# ---- predictions on a grid of their own

OBLIQUE = ((0.0, 0.6, 0.8), (0.0, -0.8, 0.6), (1.0, 0.0, 0.0))  # columns: array axes z, y, x in the world's (z, y, x)


def ball(grid: Grid) -> np.ndarray:
    """Each voxel's value at its place in the world: a ball of 13 mm, with one of 5 mm in it."""
    apart = voxels_to_world(grid, np.argwhere(np.ones(grid.shape))) - (31.0, 29.0, 30.0)
    radius = np.linalg.norm(apart, axis=1).reshape(grid.shape)
    return ((radius < 13) + 1 * (radius < 5)).astype(np.uint8)


def compare(tmp_path: Path, prediction: Grid, reference: Grid, *, turn=None):
    """The evaluation of the ball on one grid against the ball on another."""
    for name, grid in (("answer", prediction), ("truth", reference)):
        image = Image(ball(grid)[None], grid)
        if turn is not None and name == "answer":
            image = Image(turn_array(image.array, *turn), turn_grid(grid, *turn))
        (tmp_path / name).mkdir(exist_ok=True)
        write_image(image, tmp_path / name / "ball.nii.gz")
    return evaluate_folders(tmp_path / "answer", tmp_path / "truth", labels=Labels.from_json(LABELS))


@pytest.mark.parametrize("direction", [((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)), OBLIQUE])
@pytest.mark.parametrize("turn", [None, ((2, 0, 1), (True, False, True))])
@pytest.mark.parametrize(
    ("factor", "least"), [((4, 1, 1), 0.95), ((2.5, 1.5, 1), 0.93), ((0.5, 0.5, 1), 0.82), ((2, 0.5, 1), 0.9)]
)
def test_a_prediction_on_another_grid_is_scored_on_that_of_its_reference(tmp_path, direction, turn, factor, least):
    middle = voxels_to_world(Grid((15, 30, 30), (4.0, 2.0, 2.0), direction=direction), np.array([[7, 14.5, 14.5]]))[0]
    truth = Grid((15, 30, 30), (4.0, 2.0, 2.0), tuple(np.array((31.0, 29.0, 30.0)) - middle), direction)
    answer = resample_grid(truth, tuple(round(n * f) for n, f in zip(truth.shape, factor, strict=True)))
    evaluation = compare(tmp_path, answer, truth, turn=turn)
    assert evaluation.complete, evaluation.problems()
    assert evaluation.cases["ball"]["organ"]["dice"] > least
    assert evaluation.cases["ball"]["organ"]["assd"] < 1  # mm; taken on the reference's grid
    shape = answer.shape if turn is None else tuple(answer.shape[axis] for axis in turn[0])
    assert f"{shape[0]}x{shape[1]}x{shape[2]} voxels of " in evaluation.brought["ball"]
    assert evaluation.table().splitlines()[-1].startswith("Scored on the references' grids; 1 of 1 predictions lie on")
    assert evaluation.to_json()["brought_to_the_reference_grid"] == evaluation.brought


@pytest.mark.parametrize("slices", [1, 7])
def test_an_answer_at_a_scale_that_is_not_whole_is_scored_though_its_last_face_is_half_a_voxel_off(tmp_path, slices):
    """7 slices of 4 mm are 17.5 of 1.6 mm: the refined grid has one more half."""
    thick = Grid((slices, 12, 12), (4.0, 1.0, 1.0), (3.3, 0.0, 0.0))
    for folder, grid in (("answer", refine_grid(thick, (2.5, 1.0, 1.0))), ("truth", thick)):
        label = np.zeros(grid.shape, np.uint8)
        label[:, 3:9, 3:9] = 1
        write_image(Image(label[None], grid), tmp_path / folder / "case.nii.gz")
    for answer, truth in (("answer", "truth"), ("truth", "answer")):
        evaluation = evaluate_folders(tmp_path / answer, tmp_path / truth)
        assert evaluation.complete, evaluation.problems()
        assert evaluation.cases["case"]["1"]["dice"] == 1


def test_a_fine_prediction_fills_a_voxel_where_it_fills_most_of_it(tmp_path):
    fine = np.zeros((8, 4, 4), np.uint8)
    fine[1:4] = 1  # three quarters of the first thick slice
    fine[4:6] = 2  # half of the second: background has as much
    thick = np.zeros((2, 4, 4), np.uint8)
    thick[0] = 1
    write(tmp_path / "answer" / "case.nii.gz", fine, spacing=(1.0, 1.0, 1.0))
    write(tmp_path / "truth" / "case.nii.gz", thick, spacing=(4.0, 1.0, 1.0), origin=(1.5, 0.0, 0.0))
    evaluation = evaluate_folders(tmp_path / "answer", tmp_path / "truth")
    assert evaluation.cases["case"]["1"]["dice"] == 1 and list(evaluation.cases["case"]) == ["1"]
    assert evaluation.cases["case"]["1"]["volume_error_ml"] == 0


def test_predictions_on_the_reference_grid_are_said_to_be_nothing_else(folders):
    evaluation = evaluate_folders(*folders)
    assert not evaluation.brought and "brought" not in str(evaluation.to_json()) + evaluation.table()


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (Grid((24, 12, 12), (0.75, 1.0, 1.0)), "1.5 voxels apart"),  # equal origins: outer faces differ
        (Grid((24, 12, 12), (0.75, 1.0, 1.0)), "the origins are equal"),
        (Grid((22, 12, 12), (0.75, 1.0, 1.0), (-1.125, 0.0, 0.0)), "2.0 voxels apart"),
        (Grid((24, 12, 12), (0.75, 1.0, 1.0), (98.875, 0.0, 0.0)), "133.3 voxels apart"),
        (Grid((24, 12, 12), (0.75, 1.0, 1.0), (-1.125, 0.0, 0.0), OBLIQUE), "lies elsewhere in the world"),
    ],
)
def test_a_prediction_of_another_extent_is_refused_in_a_sentence(folders, grid, words):
    write_image(Image(np.zeros((1, *grid.shape), np.uint8), grid), folders[0] / "case_0.nii.gz")
    evaluation = evaluate_folders(*folders)
    assert words in evaluation.failed["case_0"] and f"{grid.shape[0]}x12x12 voxels" in evaluation.failed["case_0"]
    assert len(evaluation.cases) == 3 and "\n" not in evaluation.failed["case_0"]


def test_whole_numbers_stored_as_floats_are_labels(folders):
    write(folders[0] / "case_0.nii.gz", label_map().astype(np.float32))
    assert evaluate_folders(*folders).cases["case_0"]["organ"]["dice"] == 1


def test_two_files_are_compared_whatever_their_names(folders, tmp_path):
    other = write(tmp_path / "mine.nii.gz", label_map(shift=1))
    evaluation = evaluate_folders(other, folders[1] / "case_0.nii.gz")
    assert evaluation.cases["case_0"]["lesion"]["dice"] == pytest.approx(0.5)


@pytest.mark.parametrize("predictions", ["nowhere", "empty", "others"])
def test_folders_without_anything_to_compare_are_refused(folders, tmp_path, predictions):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "others" / "stranger.nii.gz", label_map())
    with pytest.raises(PredictionError, match=predictions):
        evaluate_folders(tmp_path / predictions, folders[1])


def test_planes_are_scored(tmp_path):
    reference = np.zeros((1, 20, 20), np.uint8)
    reference[0, 5:15, 5:15] = 1
    for folder, array in (("a", np.roll(reference, 2, axis=2)), ("b", reference)):
        path = tmp_path / folder / "plane.png"
        path.parent.mkdir()
        write_image(Image(array[None], Grid((1, 20, 20), dimensions=2)), path)
    scores = evaluate_folders(tmp_path / "a", tmp_path / "b").cases["plane"]["1"]
    assert scores["dice"] == pytest.approx(0.8)
    assert scores["hd95"] == pytest.approx(2)


def test_sparse_label_values_are_found(tmp_path):
    array = label_map().astype(np.uint16) * 30000
    for folder in ("a", "b"):
        write(tmp_path / folder / "case.nii.gz", array)
    scores = evaluate_folders(tmp_path / "a", tmp_path / "b").cases["case"]
    assert list(scores) == ["30000", "60000"]
    assert scores["60000"]["dice"] == scores["30000"]["dice"] == 1


# ---- super-resolved images


@pytest.fixture
def image_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three predicted images with more and more noise beside predicted labels, and the true ones."""
    for case in range(3):
        random = np.random.default_rng(case)
        truth = random.normal(size=(6, 14, 14)).cumsum(2).astype(np.float32)
        write(tmp_path / "imagesTs" / f"case_{case}_0000.nii.gz", truth)
        write(
            tmp_path / "out" / f"case_{case}_image.nii.gz",
            truth + np.float32(case) * random.normal(size=truth.shape).astype(np.float32),
        )
        write(tmp_path / "out" / f"case_{case}.nii.gz", label_map())
    return tmp_path / "out", tmp_path / "imagesTs"  # fmt: skip


def test_images_are_scored_by_psnr_and_ssim(image_folders, tmp_path):
    evaluation = evaluate_image_folders(*image_folders)
    assert list(evaluation.images) == ["case_0", "case_1", "case_2"] and evaluation.complete
    assert evaluation.images["case_0"] == {"psnr": math.inf, "ssim": pytest.approx(1)}
    assert evaluation.images["case_1"]["psnr"] > evaluation.images["case_2"]["psnr"]
    assert evaluation.image_mean["psnr"].cases == 2 and evaluation.image_mean["ssim"].cases == 3
    table = evaluation.table()
    assert "PSNR" in table and "dB" in table and "SSIM" in table and "Dice" not in table
    evaluation.save(tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["images"]["cases"]["case_0"]["psnr"] is None
    assert content["images"]["mean"]["ssim"]["mean"] == pytest.approx(evaluation.image_mean["ssim"].mean)
    assert content["images"]["metrics"]["psnr"]["unit"] == "dB"


def test_two_image_files_are_compared_whatever_their_names(image_folders):
    one = evaluate_image_folders(image_folders[0] / "case_1_image.nii.gz", image_folders[1] / "case_1_0000.nii.gz")
    assert list(one.images) == ["case_1"]


def test_images_that_do_not_fit_are_named_and_the_others_scored(image_folders):
    write(image_folders[1] / "case_1_0000.nii.gz", np.zeros((6, 14, 13), np.float32))
    write(image_folders[1] / "case_7_0000.nii.gz", np.zeros((6, 14, 13), np.float32))
    (image_folders[1] / "case_2_0000.nii.gz").unlink()
    evaluation = evaluate_image_folders(*image_folders)
    assert list(evaluation.images) == ["case_0"] and "6x14x14" in evaluation.failed["case_1"]
    assert evaluation.missing == ("case_7",) and evaluation.extra == ("case_2",)
    with pytest.raises(PredictionError, match="same name"):
        evaluate_image_folders(image_folders[0], write(image_folders[1] / "x" / "z.nii.gz", label_map()).parent)


def test_a_finer_image_is_compared_by_its_means_over_the_voxels_of_the_true_one(image_folders, tmp_path):
    truth = read_image(image_folders[1] / "case_0_0000.nii.gz")
    fine = np.repeat(truth.array[0], 3, axis=0) + np.tile(np.float32([-1, 0, 1]), 6)[:, None, None]
    path = image_folders[0] / "case_0_image.nii.gz"
    write(path, fine.astype(np.float32), spacing=(1.0, 1.0, 1.0), origin=(-1.0, 0.0, 0.0))
    evaluation = evaluate_image_folders(*image_folders)
    assert evaluation.images["case_0"]["psnr"] > 100  # the means are exact but for rounding
    assert evaluation.brought == {"case_0": "18x14x14 voxels of 1x1x1 mm"}
    assert "1 of 3 predictions" in evaluation.table()


def test_images_beside_predicted_labels_are_no_predictions_too_many(folders):
    write(folders[0] / "case_1_image.nii.gz", np.zeros((24, 12, 12), np.float32))
    evaluation = evaluate_folders(*folders)
    assert evaluation.complete and not evaluation.images and "images" not in evaluation.to_json()
