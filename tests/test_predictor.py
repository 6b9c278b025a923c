"""Models: what is loaded, what is refused, and labels on the grid of the input."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    ONE_CLASS,
    REGIONS,
    TWO_CLASSES,
    fine_threshold_model,
    save_fold,
    small_plan,
    super_resolving,
    threshold_model,
)

import autoseg
from autoseg.acquisition import degrade
from autoseg.checkpoint import Checkpoint
from autoseg.errors import CheckpointError, DatasetError, PredictionError
from autoseg.files import write_json
from autoseg.geometry import outer_faces, turn_array, turn_grid, voxels_to_world
from autoseg.image import Grid, Image, write_image
from autoseg.inference.grids import bring_image
from autoseg.inference.package import export_model
from autoseg.inference.predictor import Model, PredictionSettings, load_model, predict_network_grid
from autoseg.networks import build_network
from autoseg.plan import Acquisition, Normalization
from autoseg.workspace import CHECKPOINT, Workspace


def volume(seed: int = 0, channels: int = 1, shape: tuple[int, int, int] = (10, 18, 15)) -> Image:
    array = np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32) + 5
    return Image(array, Grid(shape, (2.0, 1.1, 0.9), (3.0, -4.0, 5.0)))


def logits_of(model: Model, image: torch.Tensor) -> torch.Tensor:
    answer = predict_network_grid(model, image)
    assert answer.logits is not None and answer.image is None
    return answer.logits


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
    single = [logits_of(load_model(f, "cpu"), image).softmax(0) for f in folders]
    ensemble = load_model(tmp_path / "3d_fullres", "cpu")
    assert ensemble.folds == ("0", "1", "2")
    found = logits_of(ensemble, image).softmax(0)
    assert torch.allclose(found, torch.stack(single).mean(0), atol=1e-5)
    chosen = load_model(tmp_path / "3d_fullres", "cpu", folds=["2"])
    assert torch.allclose(logits_of(chosen, image).softmax(0), single[2])


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


# ---- 2.5D


class SumOfThree(torch.nn.Module):
    """Foreground where a slice and its two neighbours are above zero together; notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.shapes.append(tuple(x.shape))
        total = x[:, :, 2:] + x[:, :, 1:-1] + x[:, :, :-2]
        return [torch.cat((-total, total), dim=1)]


def stack_model(view_axis: int) -> Model:
    model = threshold_model()
    architecture = replace(
        model.configuration.architecture, context="stack", context_slices=3, strides=((1, 1, 1), (1, 2, 2))
    )
    configuration = replace(
        model.configuration, name="2.5d", topology="2.5d_stack", view_axis=view_axis, patch_size=(1, 16, 16),
        architecture=architecture, preprocessing=replace(model.configuration.preprocessing, spacing=(1.0, 1.0, 1.0)),
    )  # fmt: skip
    return replace(model, configuration=configuration, networks=(SumOfThree(),))


@pytest.mark.parametrize("view_axis", [0, 1, 2])
def test_a_stack_sees_neighbouring_slices_along_its_view_and_answers_in_place(view_axis):
    array = np.random.default_rng(0).normal(size=(1, 9, 12, 10)).astype(np.float32)
    model = stack_model(view_axis)
    labels = model.predict(Image(array, Grid((9, 12, 10)))).array
    z = (array - array.mean()) / array.std()
    edged = np.concatenate([z.take([0], view_axis + 1), z, z.take([-1], view_axis + 1)], view_axis + 1)
    n = array.shape[view_axis + 1]
    total = sum(edged.take(range(i, i + n), view_axis + 1) for i in range(3))
    assert np.array_equal(labels, np.where(total > 0, 3, 0))
    assert {shape[2] for shape in model.networks[0].shapes} == {3}


@pytest.mark.parametrize(("halo", "copies"), [(0, 4), (1, 8)])
def test_mirroring_along_slices_is_left_out_where_a_single_one_is_seen(halo, copies):
    seen = []

    class Noting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            seen.append(len(x))
            middle = x[:, :, halo : x.shape[2] - halo]
            return [torch.cat((middle, -middle), dim=1)]

    model = stack_model(0)
    architecture = replace(model.configuration.architecture, context_slices=2 * halo + 1)
    every = replace(model.configuration.training, mirror_axes=(0, 1, 2))
    configuration = replace(model.configuration, architecture=architecture, training=every)
    replace(model, configuration=configuration, networks=(Noting(),)).predict(volume(shape=(5, 12, 12)))
    assert sum(seen) == copies * model.preprocess(volume(shape=(5, 12, 12))).image.shape[1]


@pytest.mark.parametrize("view_axis", [0, 1, 2])
def test_a_volume_thinner_than_the_stack_is_refused_with_its_number_of_slices(view_axis):
    shape = [9, 12, 10]
    for slices, said in ((1, "1 slice"), (2, "2 slices"), (3, "")):
        shape[view_axis] = slices
        image = Image(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32), Grid(tuple(shape)))
        if not said:
            assert stack_model(view_axis).predict(image).grid == image.grid
            continue
        with pytest.raises(PredictionError, match=f"{said} along the axis of the stack, expected at least 3"):
            stack_model(view_axis).predict(image)


# ---- super-resolution


def thick_image(seed: int = 0) -> Image:
    """Seven slices of 4 mm; darkness at one end is cut away, six are what the network divides without padding."""
    array = np.random.default_rng(seed).uniform(50, 150, (1, 7, 9, 8)).astype(np.float32)
    array[:, :1] = 0
    return Image(array, Grid((7, 9, 8), (4.0, 1.0, 1.0), (3.0, -4.0, 5.0)))


def interpolated(array: np.ndarray, factor: int) -> np.ndarray:
    """(C, Z, Y, X) with `factor` times as many slices over the same extent, linear, clamped at the ends."""
    n = array.shape[1]
    place = np.clip((np.arange(n * factor) + 0.5) / factor - 0.5, 0, n - 1)
    low = np.minimum(place.astype(int), n - 2)
    share = (place - low)[:, None, None]
    return array[:, low] * (1 - share) + array[:, low + 1] * share


def test_a_super_resolving_model_answers_on_the_refined_grid():
    image, model = thick_image(), fine_threshold_model()
    labels = model.predict(image)
    assert labels.shape == (28, 9, 8) and labels.grid.spacing == (1.0, 1.0, 1.0)
    assert labels.grid.origin == (1.5, -4.0, 5.0), "half a thick slice less half a thin one before"
    inside = image.array[:, 1:]
    fine = interpolated(inside, 4)
    clear = np.abs(fine - inside.mean()) > 0.01
    expected = np.where(fine > inside.mean(), 3, 0)
    assert np.array_equal(labels.array[:, 4:][clear], expected[clear]) and not labels.array[:, :4].any()
    probabilities = model.predict_probabilities(image)
    assert probabilities.grid == labels.grid and np.array_equal(probabilities.array[1] > 0.5, labels.array[0] == 3)


@given(permutation=st.permutations([0, 1, 2]), flips=st.tuples(*[st.booleans()] * 3))
@settings(deadline=None, max_examples=12)
def test_the_refined_grid_has_the_orientation_of_the_input(permutation, flips):
    image, model = thick_image(), fine_threshold_model()
    turned = Image(turn_array(image.array, tuple(permutation), flips), turn_grid(image.grid, tuple(permutation), flips))
    straight, labels = model.predict(image), model.predict(turned)
    assert np.array_equal(labels.array, turn_array(straight.array, tuple(permutation), flips))
    np.testing.assert_allclose(
        labels.grid.origin, turn_grid(straight.grid, tuple(permutation), flips).origin, atol=1e-9
    )
    np.testing.assert_allclose(outer_faces(labels.grid), outer_faces(turned.grid), atol=1e-9)
    fine = model.predict_image(turned).array
    np.testing.assert_allclose(fine, turn_array(model.predict_image(image).array, tuple(permutation), flips), atol=1e-3)


@pytest.mark.parametrize("scheme", ["zscore", "ct", "none", "rescale"])
def test_the_super_resolved_image_has_the_units_of_the_input(scheme):
    image, model = thick_image(), fine_threshold_model()
    how = (Normalization(scheme, mean=100, std=20, lower=0, upper=1000),)
    settings_ = replace(model.configuration.preprocessing, normalization=how)
    model = replace(model, configuration=replace(model.configuration, preprocessing=settings_))
    fine = model.predict_image(image)
    assert fine.array.dtype == np.float32 and fine.grid == model.predict(image).grid
    np.testing.assert_allclose(fine.array[:, 4:], interpolated(image.array[:, 1:], 4), rtol=1e-4)
    assert not fine.array[:, :4].any(), "what was cut away was zero"


@pytest.mark.parametrize(
    ("distance", "answered"), [(8.0, 2.0), (4.0, 1.0), (3.2, 0.8), (3.0, 1.0), (2.0, 1.0), (1.0, 1.0), (0.5, 0.5)]
)
def test_an_image_much_thinner_than_planned_is_refined_to_the_planned_spacing_alone(distance, answered):
    slices = round(48 / distance)
    height = (np.arange(slices) + 0.5) * distance  # mm from the outer face: a ramp, which linear interpolation keeps
    array = np.broadcast_to(height[:, None, None], (slices, 9, 8)).astype(np.float32)
    image = Image(array[None] + 1, Grid((slices, 9, 8), (distance, 1.0, 1.0), (0.5 * distance, 2.0, 3.0)))
    fine = fine_threshold_model().predict_image(image)
    assert fine.grid.spacing == pytest.approx((answered, 1.0, 1.0)) and fine.shape == (round(48 / answered), 9, 8)
    np.testing.assert_allclose(outer_faces(fine.grid), outer_faces(image.grid), atol=1e-6)
    place = (np.arange(len(fine.array[0])) + 0.5) * answered
    inner = (place > 16) & (place < 32)  # splines ring near the ends
    np.testing.assert_allclose(fine.array[0, inner, 4, 4], place[inner] + 1, atol=0.15)


def test_on_the_native_grid_a_voxel_gets_the_class_of_the_largest_mean_probability():
    image, model = thick_image(), fine_threshold_model()
    labels = model.predict(image, native=True)
    assert labels.grid == image.grid
    fine = model.predict_probabilities(image).array[1, 4:].reshape(6, 4, 9, 8).mean(1)
    clear = np.abs(fine - 0.5) > 0.01
    assert np.array_equal(labels.array[0, 1:][clear], np.where(fine > 0.5, 3, 0)[clear])
    native = model.predict_probabilities(image, native=True)
    assert native.grid == image.grid
    np.testing.assert_allclose(native.array[1, 1:], fine, atol=1e-3)
    plain = threshold_model()
    assert np.array_equal(plain.predict(image, native=True).array, plain.predict(image).array)


def fine_image() -> Image:
    """48 slices of 1 mm, noise: what interpolation makes of it is far from what thick slices would show."""
    array = np.random.default_rng(0).uniform(50, 150, (1, 48, 9, 8)).astype(np.float32)
    return Image(array, Grid((48, 9, 8), (1.0, 1.0, 1.0)))


def test_a_scan_that_is_finer_than_the_network_reads_is_made_as_thick_as_in_training_first():
    image, model = fine_image(), fine_threshold_model()
    assert model.configuration.acquisition is not None and model.configuration.acquisition.profile == "gauss"
    thick = degrade(torch.from_numpy(image.array), (4.0, 1.0, 1.0), model.configuration.acquisition).numpy()
    np.testing.assert_allclose(model.preprocess(image).image, (thick - thick.mean()) / thick.std(), atol=1e-4)
    fine = model.predict_image(image)
    assert fine.grid == image.grid
    np.testing.assert_allclose(fine.array, interpolated(thick, 4), rtol=1e-4)
    merely_interpolated = replace(model.configuration, acquisition=Acquisition("dirac"))
    other = replace(model, configuration=merely_interpolated).preprocess(image).image
    assert np.abs(other - model.preprocess(image).image).max() > 1


def test_a_scan_as_fine_as_the_answer_gets_it_voxel_by_voxel_on_its_native_grid():
    image, model = fine_image(), fine_threshold_model()
    labels, native = model.predict(image), model.predict(image, native=True)
    assert labels.grid == native.grid == image.grid and len(np.unique(labels.array)) == 2
    assert np.array_equal(native.array, labels.array)


def test_a_real_super_resolving_network_predicts_in_tiles_what_it_predicts_at_once(tmp_path):
    torch.manual_seed(0)
    plan = small_plan()
    plan = replace(plan, configurations=(super_resolving(plan),))
    network = build_network(plan.configurations[0].architecture)
    Checkpoint(plan, "3d_sr", "0", network.state_dict()).save(tmp_path / "fold_0" / CHECKPOINT)
    model = load_model(tmp_path / "fold_0", "cpu")
    image = thick_image()
    labels, fine = model.predict(image), model.predict_image(image)
    assert labels.shape == fine.shape == (28, 9, 8)
    # an untrained head is an interpolation
    np.testing.assert_allclose(fine.array[:, 4:], interpolated(image.array[:, 1:], 4), rtol=1e-3)


def test_a_model_without_labels_gives_an_image_only_and_one_without_an_image_head_labels_only():
    image = thick_image()
    only_image = fine_threshold_model(labels=False)
    assert only_image.predict_image(image).shape == (28, 9, 8)
    with pytest.raises(PredictionError, match="trained without labels"):
        only_image.predict(image)
    only_labels = fine_threshold_model(image=False)
    assert only_labels.predict(image).shape == (28, 9, 8)
    for model in (only_labels, threshold_model()):
        with pytest.raises(PredictionError, match="no image head"):
            model.predict_image(image)


def test_self_supervised_slices_go_through_the_planes_in_both_directions():
    model = fine_threshold_model(
        topology="2d", patch_size=(1, 8, 16), sr_source="self", sr_scale=(1.0, 4.0, 1.0),
    )  # fmt: skip
    flat = replace(model.configuration.architecture, strides=((1, 1, 1), (1, 2, 2)), head_scale=(1.0, 4.0, 1.0))
    thick = replace(model.configuration.preprocessing, spacing=(4.0, 1.0, 1.0))
    model = replace(model, configuration=replace(model.configuration, architecture=flat, preprocessing=thick))
    image = thick_image()
    fine = model.predict_image(image)
    assert fine.shape == (28, 9, 8)
    np.testing.assert_allclose(fine.array[:, 4:], interpolated(image.array[:, 1:], 4), rtol=1e-4)
    network = model.networks[0]
    assert {shape[2:] for shape in network.shapes} == {(1, 6, 8), (1, 6, 10)}
    assert {grid.shape for grid in network.grids} == {(1, 24, 8), (1, 24, 9)}


ANY_SCALE = {"sr_range": (1.5, 6.0)}


def test_an_any_scale_model_reads_slices_as_far_apart_as_they_are(caplog):
    model = fine_threshold_model(**ANY_SCALE)
    for distance, slices in ((2.0, 6), (3.0, 7), (5.5, 4)):
        array = np.random.default_rng(0).uniform(50, 150, (1, slices, 9, 8)).astype(np.float32)
        image = Image(array, Grid((slices, 9, 8), (distance, 1.0, 1.0)))
        assert model.preprocess(image).image.shape == (1, slices, 9, 8)
        labels = model.predict(image)
        assert labels.grid.spacing == (1.0, 1.0, 1.0) and labels.shape == (slices * distance, 9, 8)
    far = Image(array, Grid((4, 9, 8), (9.0, 1.0, 1.0)))
    assert model.preprocess(far).image.shape == (1, 4, 9, 8)
    assert model.predict(far).grid.spacing == (1.5, 1.0, 1.0), "beyond its range the answer is coarser"
    assert "Slices of 9 mm are thicker than the 6 mm" in caplog.text and "it answers on 1.5 mm" in caplog.text
    fine = Image(array, Grid((4, 9, 8), (0.5, 1.0, 1.0)))
    assert model.predict(fine).grid == fine.grid


@pytest.mark.parametrize("distance", [0.7, 1.0, 1.6, 2.5])
def test_an_any_scale_model_answers_on_the_grid_that_is_asked_for(distance):
    image, model = thick_image(), fine_threshold_model(**ANY_SCALE)
    labels = model.predict(image, output_spacing=(distance, 1.0, 1.0))
    assert labels.grid.spacing == pytest.approx((distance, 1.0, 1.0)) and labels.shape[1:] == (9, 8)
    np.testing.assert_allclose(outer_faces(labels.grid)[0], outer_faces(image.grid)[0], atol=1e-9)
    fine = model.predict_image(image, output_spacing=(distance, 1.0, 1.0))
    z = labels.grid.origin[0] + distance * np.arange(labels.shape[0])
    inside = z > outer_faces(image.grid)[0][0] + 4 + distance
    centres = image.grid.origin[0] + 4 * np.arange(7)
    expected = np.apply_along_axis(lambda line: np.interp(z, centres[1:], line), 1, image.array[:, 1:])
    np.testing.assert_allclose(fine.array[:, inside], expected[:, inside], rtol=1e-3)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("slices", "scale"), [(5, 2.5), (7, 2.5), (3, 1.5), (7, 1.5)])
def test_the_last_slice_of_an_answer_at_a_scale_that_is_not_whole_is_filled(slices, scale, flipped):
    sides = ((-1.0 if flipped else 1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    array = np.full((1, slices, 12, 10), 150.0, np.float32)
    array[..., :5] = 50
    model = fine_threshold_model(sr_scale=(scale, 1.0, 1.0))
    image = Image(array, Grid((slices, 12, 10), (scale, 1.0, 1.0), direction=sides))
    labels, fine = model.predict(image).array[0], model.predict_image(image).array[0]
    assert len(labels) == math.floor(slices * scale + 0.5)
    assert (labels[..., 6:] == 3).all() and not labels[..., :4].any()
    assert (fine[..., 6:] > 110).all()  # towards the zeros, the mean, that fill the tile; a blank voxel has 0


@pytest.mark.parametrize("plane", [(0.5, 1.0), (0.8, 1.3), (2.0, 0.7)])
def test_an_output_spacing_may_differ_in_the_plane_too(plane):
    thick, model = thick_image(), fine_threshold_model(**ANY_SCALE)

    def ramp(grid: Grid) -> np.ndarray:  # of world coordinates: whoever shifts a voxel is seen
        voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1).reshape(-1, 3)
        return (voxels_to_world(grid, voxels) @ (0.7, 1.1, -1.3)).reshape(1, *grid.shape).astype(np.float32) + 100

    image = Image(
        turn_array(ramp(thick.grid), (2, 0, 1), (True, False, True)),
        turn_grid(thick.grid, (2, 0, 1), (True, False, True)),
    )
    spacing = [1.0, *plane]
    turned = tuple(spacing[axis] for axis in (2, 0, 1))
    asked = model.predict_image(image, output_spacing=turned)
    assert asked.grid.spacing == pytest.approx(turned)
    inner = tuple(slice(3, -3) if n > 12 else slice(1, -1) for n in asked.shape)
    np.testing.assert_allclose(asked.array[0][inner], ramp(asked.grid)[0][inner], atol=0.15)
    image = thick
    asked = model.predict_image(image, output_spacing=(1.0, *plane))
    np.testing.assert_allclose(outer_faces(asked.grid)[0], outer_faces(image.grid)[0], atol=1e-9)
    with pytest.raises(PredictionError, match=r"asks for \d+x\d+x\d+ voxels, at least .* ask for a coarser one"):
        model.predict(image, output_spacing=(1.0, 1e-5, 1e-5))
    labels = model.predict(image, output_spacing=(1.0, *plane))
    assert labels.grid == asked.grid and 0.2 < (labels.array == 3).mean() < 0.8


@pytest.mark.parametrize(
    ("spacing", "sentence"),
    [
        ((0.5, 1.0, 1.0), "0.5 mm along z, 8 times as fine.*1.5 to 6 times, 0.667 to 2.67 mm"),
        ((3.5, 1.0, 1.0), "3.5 mm along z, 1.14 times"),
        ((5.0, 1.0, 1.0), "5 mm along z, coarser than the image's 4 mm"),
        ((1.0, 1.0, 0.0), "three positive numbers"),
    ],
)
def test_an_output_spacing_that_the_model_cannot_answer_on_is_refused(spacing, sentence):
    with pytest.raises(PredictionError, match=sentence):
        fine_threshold_model(**ANY_SCALE).predict(thick_image(), output_spacing=spacing)


def test_models_of_one_scale_take_no_output_spacing():
    with pytest.raises(PredictionError, match="3d_sr answers on one refined grid only"):
        fine_threshold_model().predict(thick_image(), output_spacing=(1.0, 1.0, 1.0))
    with pytest.raises(PredictionError, match="3d_fullres answers on the image's own grid only"):
        threshold_model().predict(thick_image(), output_spacing=(1.0, 1.0, 1.0))


def test_an_image_on_slices_that_were_not_planned_for_is_answered_on_its_own_refined_grid():
    array = np.random.default_rng(0).uniform(50, 150, (1, 6, 9, 8)).astype(np.float32)
    image = Image(array, Grid((6, 9, 8), (5.0, 1.0, 1.0)))
    labels = fine_threshold_model().predict(image)
    assert labels.shape == (24, 9, 8) and labels.grid.spacing == (1.25, 1.0, 1.0)


@pytest.mark.parametrize("order", [("3d_fullres", "3d_sr"), ("3d_sr", "3d_fullres")])
def test_an_ensemble_with_a_super_resolving_member_answers_on_its_fine_grid(tmp_path, order):
    """Whichever member was chosen first: a finer grid and an image are what the other cannot give."""
    plan = small_plan(labels=ONE_CLASS)
    first = plan.configurations[0]
    as_acquired = replace(first.preprocessing, spacing=(4.0, 1.0, 1.0))
    native = replace(first, preprocessing=as_acquired, training=replace(first.training, mirror_axes=()))
    fine = super_resolving(plan, training=native.training)
    plan = replace(plan, configurations=(native, fine))
    place = Workspace(tmp_path / "ws")
    for name in order:
        save_fold(plan, place.models, name, "0")
    members = [{"configuration": name, "mirroring": False} for name in order]
    weights = {"3d_fullres": 0.25, "3d_sr": 0.75}
    chosen = {
        "members": members, "weights": [weights[name] for name in order], "temperature": 1.0, "cleaning": {},
    }  # fmt: skip
    write_json(tmp_path / "selection.json", {"version": 2, "chosen": chosen})
    export_model(place, order, tmp_path / "model.zip", selection=tmp_path / "selection.json")
    model, image = load_model(tmp_path / "model.zip", "cpu"), thick_image()
    alone = {name: load_model(place.models / name, "cpu") for name in order}
    joined = model.predict_probabilities(image)
    assert joined.grid == alone["3d_sr"].predict(image).grid and joined.grid.spacing == (1.0, 1.0, 1.0)
    coarse = bring_image(alone["3d_fullres"].predict_probabilities(image), joined.grid).array
    expected = 0.25 * coarse + 0.75 * alone["3d_sr"].predict_probabilities(image).array
    inner = (slice(None), slice(8, -8))  # what was cut away is background
    np.testing.assert_allclose(joined.array[inner], expected[inner], atol=0.02)
    assert model.predict_image(image).grid == joined.grid
    assert model.predict(image, native=True).grid == image.grid
