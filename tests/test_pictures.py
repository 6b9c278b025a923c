"""Pictures show the right slice, upright and in true proportions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from autoseg.geometry import turn_array, turn_grid
from autoseg.image import Grid, Image
from autoseg.inference.pictures import COLOURS, best_median_worst, draw_case, view_of
from autoseg.labels import Labels

LABELS = Labels.from_json({"background": 0, "liver": 1, "tumour": 2})
AXIAL = Grid((9, 30, 40), (3.0, 1.0, 1.0))


def case(grid: Grid = AXIAL) -> tuple[Image, Image, Image]:
    """An image, its reference (most of it on slice 6) and a prediction shifted by two voxels."""
    random = np.random.default_rng(0)
    label = np.zeros((1, *AXIAL.shape), np.uint8)
    label[0, 4:7, 10:20, 5:15] = 1
    label[0, 6, 8:22, 3:18] = 1
    label[0, 5:7, 12:16, 8:12] = 2
    image = random.normal(0, 10, label.shape) + 100 * (label > 0)
    return Image(image, grid), Image(label, grid), Image(np.roll(label, 2, axis=3), grid)


def test_the_slice_with_the_most_foreground_is_shown():
    image, reference, prediction = case()
    view = view_of(image, reference, prediction)
    assert view.name == "axial slice 7 of 9"
    np.testing.assert_array_equal(view.reference, reference.array[0, 6])
    np.testing.assert_array_equal(view.prediction, prediction.array[0, 6])


@pytest.mark.parametrize(
    ("permutation", "flips"),
    [((0, 1, 2), (True, True, True)), ((2, 1, 0), (False, True, False)), ((1, 2, 0), (True, False, True))],
)
def test_the_picture_is_the_same_however_the_file_is_stored(permutation, flips):
    stored = [
        Image(turn_array(one.array, permutation, flips), turn_grid(one.grid, permutation, flips)) for one in case()
    ]
    view, expected = view_of(*stored), view_of(*case())
    np.testing.assert_array_equal(view.image, expected.image)
    np.testing.assert_array_equal(view.reference, expected.reference)
    assert (view.spacing, view.name, view.sides) == (expected.spacing, expected.name, expected.sides)


def test_slices_lie_across_the_coarsest_axis_with_the_head_up():
    grid = Grid((20, 9, 15), (1.0, 4.0, 1.0))
    label = np.zeros((1, 20, 9, 15), np.uint8)
    label[0, 15:19, 3, 2:5] = 1  # high up, at the patient's right
    view = view_of(Image(label.astype(float), grid), Image(label, grid), Image(label, grid))
    assert view.name == "coronal slice 4 of 9" and view.sides == ("R", "L")
    rows, columns = np.nonzero(view.reference)
    assert rows.max() < 10 and columns.max() < 7


def test_without_a_reference_the_prediction_chooses_the_slice():
    image, reference, _ = case()
    assert view_of(image, None, reference).name == "axial slice 7 of 9"
    nothing = reference.with_array(np.zeros_like(reference.array))
    assert view_of(image, nothing, nothing).name == "axial slice 5 of 9"


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (5.0, 2.0, 1.0)])
def test_the_png_has_outlines_in_the_colours_of_the_classes(tmp_path: Path, spacing):
    image, reference, prediction = case(Grid(AXIAL.shape, spacing))
    path = tmp_path / "deep" / "picture.png"
    draw_case(path, image=image, reference=reference, prediction=prediction, labels=LABELS, title="best of 1")
    pixels = (matplotlib_image.imread(path)[..., :3] * 255).round().astype(int)
    assert pixels.shape[1] == 3 * 440
    for colour in COLOURS[:2]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - wanted).max(axis=2) < 3).sum() > 100, colour


def test_pixels_keep_their_proportions(tmp_path: Path):
    """A structure that is square in mm is square in the picture, though its pixels are not."""
    grid = Grid((3, 20, 40), (5.0, 2.0, 1.0))
    label = np.zeros((1, 3, 20, 40), np.uint8)
    label[0, 1, 2:18, 4:36] = 1  # 32 mm x 32 mm
    blank = Image(np.zeros(label.shape), grid)
    draw_case(
        tmp_path / "p.png", image=blank, reference=Image(label, grid), prediction=Image(label, grid), labels=LABELS
    )
    pixels = (matplotlib_image.imread(tmp_path / "p.png")[..., :3] * 255).round().astype(int)
    orange = np.array([int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    middle = pixels[:-60, 440:880]  # the panel of the reference, without the legend
    rows, columns = np.nonzero(np.abs(middle - orange).max(axis=2) < 3)
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.03)


def test_colour_images_and_planes_are_drawn(tmp_path: Path):
    grid = Grid((1, 32, 24), dimensions=2)
    colours = np.random.default_rng(0).integers(0, 255, (3, 1, 32, 24), dtype=np.uint8)
    label = np.zeros((1, 1, 32, 24), np.uint8)
    label[0, 0, 4:9, 4:9] = 1
    view = view_of(Image(colours, grid), Image(label, grid), Image(label, grid))
    assert view.image.shape == (32, 24, 3) and view.name == "image" and view.sides == ("", "")
    draw_case(tmp_path / "p.png", image=Image(colours, grid), reference=None, prediction=Image(label, grid))
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_an_empty_case_of_constant_brightness_is_drawn(tmp_path: Path):
    nothing = Image(np.zeros((1, *AXIAL.shape), np.uint8), AXIAL)
    draw_case(tmp_path / "p.png", image=nothing, reference=nothing, prediction=nothing, labels=LABELS)
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_many_classes_fit_into_the_legend(tmp_path: Path):
    label = np.zeros((1, *AXIAL.shape), np.uint8)
    label[0, 4] = np.arange(30 * 40).reshape(30, 40) // 40
    both = Image(label, AXIAL)
    draw_case(tmp_path / "p.png", image=both, reference=both, prediction=both)
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_best_median_and_worst_are_picked_once_each():
    assert best_median_worst(["a", "b", "c", "d", "e"]) == {"best": "a", "median": "c", "worst": "e"}
    assert best_median_worst(["a", "b"]) == {"best": "a", "worst": "b"}
    assert best_median_worst(["a"]) == {"worst": "a"}
    assert best_median_worst([]) == {}
