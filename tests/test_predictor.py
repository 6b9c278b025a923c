"""Models: what is loaded, what is refused, and labels on the grid of the input."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import REGIONS, TWO_CLASSES, save_fold, small_plan, threshold_model

import autoseg
from autoseg.errors import CheckpointError, DatasetError, PredictionError
from autoseg.geometry import turn_array, turn_grid
from autoseg.image import Grid, Image, write_image
from autoseg.inference.predictor import PredictionSettings, load_model, predict_network_grid


def volume(seed: int = 0, channels: int = 1, shape: tuple[int, int, int] = (10, 18, 15)) -> Image:
    array = np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32) + 5
    return Image(array, Grid(shape, (2.0, 1.1, 0.9), (3.0, -4.0, 5.0)))


def cube_image() -> Image:
    """A bright box in darkness, off centre."""
    array = np.full((1, 12, 20, 16), 10.0, dtype=np.float32)
    array[0, 3:9, 4:10, 8:14] = 200
    return Image(array, Grid((12, 20, 16), (1.5, 1.0, 1.0), (3.0, -4.0, 5.0)))


@given(permutation=st.permutations([0, 1, 2]), flips=st.tuples(*[st.booleans()] * 3))
@settings(deadline=None, max_examples=12)
def test_labels_keep_geometry_and_orientation_of_the_input(permutation, flips):
    image = cube_image()
    turned = Image(turn_array(image.array, tuple(permutation), flips), turn_grid(image.grid, tuple(permutation), flips))
    labels = threshold_model().predict(turned)
    assert labels.grid == turned.grid and labels.array.dtype == np.uint8
    assert np.array_equal(labels.array, np.where(turned.array > 100, 3, 0))


def test_a_file_an_image_and_an_array_give_the_same_labels(tmp_path):
    image, model = cube_image(), threshold_model()
    write_image(image, tmp_path / "scan.nii.gz")
    from_file = model.predict(tmp_path / "scan.nii.gz").array
    assert np.array_equal(from_file, model.predict(str(tmp_path / "scan.nii.gz")).array)
    assert np.array_equal(from_file, model.predict(image).array)
    assert np.array_equal(from_file, model.predict(image.array[0], image.grid.spacing).array)
    assert np.array_equal(from_file, model.predict(image.array.astype(np.int16), spacing=image.grid.spacing).array)
    assert set(np.unique(from_file)) == {0, 3}


def test_probabilities_and_labels_agree(tmp_path):
    save_fold(small_plan(), tmp_path, "3d_fullres", "0")
    model = load_model(tmp_path / "3d_fullres", "cpu")
    image = volume()
    probabilities = model.predict_probabilities(image)
    assert probabilities.grid == image.grid and probabilities.array.shape == (3, *image.shape)
    assert np.array_equal(probabilities.array.argmax(0), model.predict(image).array[0])


def test_several_folds_average_their_probabilities(tmp_path):
    plan = small_plan()
    folders = [save_fold(plan, tmp_path, "3d_fullres", str(k), seed=k) for k in range(3)]
    image = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    single = [predict_network_grid(load_model(f, "cpu"), image).softmax(0) for f in folders]
    ensemble = load_model(tmp_path / "3d_fullres", "cpu")
    assert ensemble.folds == ("0", "1", "2")
    found = predict_network_grid(ensemble, image).softmax(0)
    assert torch.allclose(found, torch.stack(single).mean(0), atol=1e-5)
    chosen = load_model(tmp_path / "3d_fullres", "cpu", folds=["2"])
    assert torch.allclose(predict_network_grid(chosen, image).softmax(0), single[2])


def test_mirroring_uses_the_axes_of_the_plan_and_can_be_switched_off(tmp_path):
    seen = []

    class Noting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            seen.append(len(x))
            return [torch.cat((x, -x), dim=1)]

    model = replace(threshold_model(), networks=(Noting(),))
    model.predict(volume(shape=(4, 12, 12)))
    assert sum(seen) == 4  # axes 1 and 2
    seen.clear()
    model.predict(volume(shape=(4, 12, 12)), settings=PredictionSettings(mirroring=False))
    assert sum(seen) == 1


def test_a_cascade_sees_the_labels_of_its_previous_stage(tmp_path):
    plan = small_plan()
    save_fold(plan, tmp_path, "3d_lowres", "0", seed=1)
    save_fold(plan, tmp_path, "3d_lowres", "1", seed=2)
    save_fold(plan, tmp_path, "3d_cascade", "0", seed=3)
    model = load_model(tmp_path / "3d_cascade", "cpu")
    assert model.previous is not None and model.previous.folds == ("0", "1")
    seen = []
    network = model.networks[0]
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    image = volume()
    labels = model.predict(image, settings=PredictionSettings(mirroring=False))
    assert labels.grid == image.grid
    masks = torch.cat(seen)[:, 1:]
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert np.array_equal(
        labels.array, load_model(tmp_path, "cpu").predict(image, settings=PredictionSettings(mirroring=False)).array
    )


def test_labels_of_the_previous_stage_enter_as_one_mask_a_structure_in_their_order(tmp_path):
    plan = small_plan(labels=REGIONS)
    save_fold(plan, tmp_path, "3d_lowres", "0")
    save_fold(plan, tmp_path, "3d_cascade", "0")
    model = load_model(tmp_path / "3d_cascade", "cpu")
    array = np.random.default_rng(0).uniform(1, 2, (1, 6, 8, 8)).astype(np.float32)
    image = Image(array, Grid((6, 8, 8), (1.5, 1.0, 1.0)))
    coarse = np.zeros((1, 6, 8, 8), dtype=np.uint8)
    coarse[:, :3], coarse[:, :2] = 1, 2
    case = model.preprocess(image)
    joined = model.with_previous_labels(case.image, image.with_array(coarse), case.geometry)
    assert joined.dtype == np.float32 and np.array_equal(joined[:1], case.image)
    assert np.array_equal(joined[1], coarse[0] > 0) and np.array_equal(joined[2], coarse[0] == 2)


def test_a_cascade_without_its_previous_stage_is_refused(tmp_path):
    save_fold(small_plan(), tmp_path, "3d_cascade", "0")
    with pytest.raises(CheckpointError, match="3d_lowres"):
        load_model(tmp_path / "3d_cascade", "cpu")


def test_regions_are_written_in_their_order(tmp_path):
    save_fold(small_plan(labels=REGIONS), tmp_path, "3d_fullres", "all")
    model = load_model(tmp_path / "3d_fullres" / "fold_all", "cpu")
    image = volume()
    whole, core = model.predict_probabilities(image).array > 0.5
    expected = np.where(core, 2, np.where(whole, 1, 0))
    assert np.mean(model.predict(image).array[0] == expected) > 0.999


def test_two_dimensional_models_take_volumes_and_pictures(tmp_path):
    plan = small_plan(flat=True, channels=("R", "G", "B"), file_ending=".png")
    save_fold(plan, tmp_path, "2d", "0")
    model = load_model(tmp_path / "2d", "cpu")
    picture = Image(
        np.random.default_rng(0).integers(0, 255, (3, 1, 30, 40), dtype=np.uint8), Grid((1, 30, 40), dimensions=2)
    )
    write_image(picture, tmp_path / "picture.png")
    labels = model.predict(tmp_path / "picture.png")
    assert labels.grid == picture.grid
    stack = volume(channels=3)
    assert model.predict(stack).grid == stack.grid


def test_every_folder_that_holds_a_model_is_understood(tmp_path):
    plan = small_plan()
    fold = save_fold(plan, tmp_path / "models", "3d_fullres", "0")
    image = volume()
    expected = load_model(fold, "cpu").predict(image).array
    for path in (fold / "checkpoint.safetensors", fold.parent, fold.parent.parent, tmp_path):
        assert np.array_equal(autoseg.load_model(path, device="cpu").predict(image).array, expected)


def test_a_fold_whose_training_is_not_finished_is_left_out_unless_it_is_asked_for_or_alone(tmp_path):
    save_fold(small_plan(), tmp_path, "3d_fullres", "0", finished=False)
    alone = load_model(tmp_path / "3d_fullres", "cpu")
    save_fold(small_plan(), tmp_path, "3d_fullres", "1")
    assert alone.folds == ("0",)
    assert load_model(tmp_path / "3d_fullres", "cpu").folds == ("1",)
    assert load_model(tmp_path / "3d_fullres", "cpu", folds=["0", "1"]).folds == ("0", "1")
    assert load_model(tmp_path / "3d_fullres" / "fold_0", "cpu").folds == ("0",)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such model"):
        load_model(tmp_path / "nowhere", "cpu")
    with pytest.raises(CheckpointError, match="no finished fold"):
        load_model(tmp_path, "cpu")
    save_fold(small_plan(), tmp_path, "3d_fullres", "0")
    save_fold(small_plan(labels=TWO_CLASSES, channels=("CT",)), tmp_path, "3d_fullres", "1")
    with pytest.raises(CheckpointError, match="another plan"):
        load_model(tmp_path / "3d_fullres", "cpu")
    with pytest.raises(CheckpointError, match="fold 7 is not finished; finished are 0, 1"):
        load_model(tmp_path / "3d_fullres", "cpu", folds=["7"])
    save_fold(small_plan(), tmp_path, "3d_lowres", "0")
    with pytest.raises(CheckpointError, match="several models"):
        load_model(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (volume(channels=2), "2 channels, expected 1"),
        (Image(np.zeros((1, 1, 8, 8)), Grid((1, 8, 8), dimensions=2)), "a plane"),
        (Image(np.full((1, 4, 4, 4), np.nan), Grid((4, 4, 4))), "NaN"),
        (Image(np.zeros((1, 4, 4, 4), dtype=complex), Grid((4, 4, 4))), "complex"),
    ],
)
def test_images_that_do_not_fit_are_refused(image, sentence):
    with pytest.raises(PredictionError, match=sentence):
        threshold_model().predict(image)


def test_arrays_need_their_spacing():
    with pytest.raises(PredictionError, match="spacing"):
        threshold_model().predict(np.zeros((4, 4, 4)))
    with pytest.raises(PredictionError, match="shape"):
        threshold_model().predict(np.zeros((4, 4)), spacing=(1.0, 1.0, 1.0))
    with pytest.raises(PredictionError, match="step size"):
        PredictionSettings(step_size=0)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"scan\.nii\.gz"):
        threshold_model().predict(tmp_path / "scan.nii.gz")
    Path(tmp_path / "scan.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"Case scan: .*empty"):
        threshold_model().predict(tmp_path / "scan.nii.gz")


def test_network_grid_prediction_checks_channels():
    with pytest.raises(PredictionError, match="takes 1 channels, got 2"):
        predict_network_grid(threshold_model(), torch.zeros(2, 4, 4, 4))


def test_a_model_is_a_value():
    assert dataclasses.is_dataclass(threshold_model())
    assert replace(threshold_model(), settings=PredictionSettings(mirroring=False)).settings.mirroring is False
