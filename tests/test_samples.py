"""Samples of 2.5D and of super-resolution: what is read, what is made of it, and where it lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import TWO_CLASSES, sr_configuration, stack_configuration, store_of, tiny_configuration

from autoseg.acquisition import degrade, offset, slices
from autoseg.errors import PlanError
from autoseg.inference.sliding_window import tile_axis
from autoseg.labels import Labels
from autoseg.networks import build_network
from autoseg.plan import Acquisition, Architecture, Configuration, Normalization, Shape, TrainingSettings
from autoseg.preprocessing.degradation import degrade_entry, input_moments
from autoseg.preprocessing.store import Store
from autoseg.training.augment import Augmentation
from autoseg.training.batches import Samples, _seed_everything, collate
from autoseg.training.samples import common_middle
from autoseg.training.sampling import read_patch
from autoseg.training.settings import CURRICULUM_STEPS
from autoseg.training.shapes import blank_batch, fine_patch, paired_grid, sample_shapes

MANY = Labels.from_json({"background": 0, **{f"slice_{i}": i for i in range(1, 31)}})
STILL = TrainingSettings(mirror_axes=())


def samples_of(
    folder: Path,
    configuration: Configuration,
    label: np.ndarray,
    *,
    image: np.ndarray | None = None,
    labels: Labels = TWO_CLASSES,
    augment: bool = False,
) -> Samples:
    images: Mapping[str, np.ndarray] | None = None if image is None else {"a": image.astype(np.float32)}
    store = store_of(folder, {"a": label}, labels, images=images)
    return Samples(store, ["a"], configuration, labels, seed=0, augment=augment)


def random_volume(shape: Shape, seed: int = 0) -> np.ndarray:
    """Smooth structure, some noise, mean 0 and standard deviation 1."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=[-(-s // 3) for s in shape])
    volume = np.kron(coarse, np.ones((3, 3, 3)))[: shape[0], : shape[1], : shape[2]] + random.normal(0, 0.3, shape)
    return ((volume - volume.mean()) / volume.std()).astype(np.float32)


def blobs(shape: Shape) -> np.ndarray:
    label = np.zeros(shape, np.int16)
    label[tuple(slice(s // 4, s - s // 4) for s in shape)] = 1
    label[tuple(slice(s // 3, s // 2) for s in shape)] = 2
    return label


# ---- 2.5D


@pytest.mark.parametrize("view_axis", [0, 1, 2])
@pytest.mark.parametrize("slices_seen", [3, 5])
def test_the_middle_slice_of_a_stack_is_the_labelled_one_and_edges_are_repeated(
    tmp_path: Path, view_axis: int, slices_seen: int
) -> None:
    configuration = stack_configuration(slices=slices_seen, view_axis=view_axis, patch_size=(1, 8, 8))
    shape = [12, 13, 14]
    shape[view_axis] = 6
    number = np.arange(1, 7).reshape([-1 if axis == view_axis else 1 for axis in range(3)])
    label = np.broadcast_to(number, shape).astype(np.int16)
    samples = samples_of(tmp_path, configuration, label, labels=MANY)
    halo, seen = slices_seen // 2, set()
    for step in range(30):
        sample = samples[step, 0]
        assert sample.image.shape == (1, slices_seen, 8, 8) and sample.label.shape == (1, 1, 8, 8)
        (middle,) = sample.label.unique().tolist()
        stack = [min(max(middle + k, 1), 6) for k in range(-halo, halo + 1)]
        assert sample.image[0].amin((1, 2)).tolist() == sample.image[0].amax((1, 2)).tolist() == stack
        seen.add(middle)
    assert seen == set(range(1, 7))


@pytest.mark.parametrize("view_axis", [0, 1, 2])
def test_a_stack_lines_up_with_its_label_voxel_by_voxel(tmp_path: Path, view_axis: int) -> None:
    label = np.random.default_rng(0).integers(0, 3, (9, 15, 16)).astype(np.int16)
    samples = samples_of(tmp_path, stack_configuration(view_axis=view_axis), label)
    for step in range(20):
        sample = samples[step, step % 4]
        assert torch.equal(sample.image[:, 1:2], sample.label.float())


def test_an_augmented_stack_turns_as_one_and_stays_in_its_plane(tmp_path: Path) -> None:
    configuration = replace(stack_configuration(slices=5, patch_size=(1, 16, 16)), training=STILL)
    pattern = np.random.default_rng(0).integers(0, 2, (6, 6)).repeat(6, 0).repeat(6, 1)
    label = np.stack([pattern] * 7).astype(np.int16)  # the same in every slice
    image = (label * np.arange(1, 8)[:, None, None])[None].astype(np.float32)
    samples = samples_of(tmp_path, configuration, label, image=image, augment=True)
    samples.augmentation.intensity = lambda **sample: sample  # type: ignore[assignment]
    turned = 0
    for step in range(40):
        sample = samples[step, 3]
        peaks = sample.image[0].amax((1, 2))
        if peaks.min() < 1:  # no structure in it
            continue
        shapes = sample.image[0] / peaks[:, None, None]
        torch.testing.assert_close(shapes, shapes[:1].expand_as(shapes), atol=1e-5, rtol=0)
        turned += bool(((shapes > 0.02) & (shapes < 0.98)).any())
        assert ((shapes[2] > 0.6) <= (sample.label[0, 0] == 1)).all()
        middle = peaks[2].round().item()
        assert peaks.round().tolist() == [min(max(middle + k, 1), 7) for k in (-2, -1, 0, 1, 2)]
    assert turned > 5


def test_intensities_of_a_stack_change_alike_in_all_its_slices(tmp_path: Path) -> None:
    configuration = replace(stack_configuration(slices=3, patch_size=(1, 16, 16)), training=STILL)
    image = np.broadcast_to(np.random.default_rng(0).normal(1, 0.3, (40, 40)), (1, 5, 40, 40))
    samples = samples_of(tmp_path, configuration, np.zeros((5, 40, 40), np.int16), image=image, augment=True)
    noisy = 0
    for step in range(60):
        stack = samples[step, 0].image[0]
        same = torch.allclose(stack, stack[:1].expand_as(stack), atol=1e-4)
        noisy += not same
    assert noisy < 20  # noise, drawn for a tenth of the samples, is all that differs from slice to slice


def test_a_mirrored_stack_is_reversed_with_its_slices(tmp_path: Path) -> None:
    training = TrainingSettings(mirror_axes=(0,))
    configuration = replace(stack_configuration(slices=3), training=training)
    label = np.broadcast_to(np.arange(1, 10)[:, None, None], (9, 30, 30)).astype(np.int16)
    samples = samples_of(tmp_path, configuration, label, labels=MANY, augment=True)
    samples.augmentation.intensity = lambda **sample: sample  # type: ignore[assignment]
    steps = set()
    for step in range(30):
        sample = samples[step, 0]
        values, middle = sample.image[0, :, 6, 6].round(), sample.label[0, 0, 6, 6]
        assert values[1] == middle
        if 1 < middle < 9:
            steps.add((values[2] - values[1]).item())
    assert steps == {-1.0, 1.0}


def test_the_previous_stage_reaches_a_stack_too(tmp_path: Path) -> None:
    stack = stack_configuration()
    configuration = replace(
        stack, architecture=replace(stack.architecture, input_channels=3), previous_stage="3d_lowres"
    )
    label = np.random.default_rng(0).integers(0, 3, (5, 16, 16)).astype(np.int16)
    store = store_of(tmp_path, {"a": label})
    for augment in (False, True):
        samples = Samples(store, ["a"], configuration, TWO_CLASSES, seed=0, previous=store, augment=augment)
        sample = samples[0, 0]
        assert sample.image.shape == (3, 3, 12, 12) and sample.label.shape == (1, 1, 12, 12)
        if not augment:
            assert torch.equal(sample.image[1:, 1], torch.cat([sample.label[0] == value for value in (1, 2)]).float())


# ---- grids


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 40),
    scale=st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0, 1.5, 2.5]), st.floats(1, 8)),
    halo=st.integers(0, 3),
)
def test_a_fine_patch_holds_exactly_the_thick_slices_that_are_asked_for(size: int, scale: float, halo: int) -> None:
    fine = fine_patch((size, 8, 8), (scale, 1.0, 1.0), halo=halo)
    assert slices(fine.source[0], scale) == size + 2 * halo
    shape, start = fine.grid.shape[0], fine.grid.start[0]
    assert fine.grid.shape[1:] == (8, 8) and fine.grid.start[1:] == (0, 0)
    # fine voxel `first` of the source is the first that is asked for, `start` from the face of the first thick slice
    assert math.isclose(fine.first, offset(fine.source[0], scale) + halo * scale + start, abs_tol=1e-9)
    assert -1 <= start <= 0.5 and shape >= size * scale - 1e-6 and shape < size * scale + 1
    assert fine.first >= 0 and fine.first + shape <= fine.source[0]
    if scale >= 2 or not halo:  # there is a voxel more to be centred with
        assert math.isclose(start, -offset(shape, scale), abs_tol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(-20, 100),
    size=st.integers(1, 40),
    scale=st.one_of(st.sampled_from([1.0, 2.0, 1.5, 2.5, 1.25]), st.floats(1, 8)),
    more=st.floats(-0.01, 0.01),
)
def test_paired_patches_have_their_middles_in_the_same_place(start: int, size: int, scale: float, more: float) -> None:
    grid = paired_grid((size, 8, 8), (scale, 1.0, 1.0))
    assert math.isclose(grid.shape[0] + 2 * grid.start[0], size * scale, abs_tol=1e-6)
    first, fine_first = common_middle(start, size, scale + more, grid.shape[0])
    assert abs(first - start) <= 4
    apart = abs((first + size / 2) * (scale + more) - fine_first - grid.shape[0] / 2)
    assert apart <= 0.5 + 1e-9
    if more == 0 and (size * scale).is_integer() and (scale * 4).is_integer():
        assert apart == 0
    if more == 0 and scale.is_integer():
        assert (first, fine_first) == (start, start * scale)


SHAPES: dict[str, Configuration] = {
    "2d": tiny_configuration(patch_size=(1, 12, 12)),
    "stack": stack_configuration(),
    "reduce": stack_configuration(context="reduce", slices=5),
    "x2": sr_configuration(),
    "x2.5 any": sr_configuration(scale=(2.5, 1.0, 1.0), sr_range=(2.0, 4.0)),
    "in plane": sr_configuration(scale=(1.0, 1.5, 3.0), patch_size=(1, 12, 8)),
    "stack sr": sr_configuration(scale=(3.0, 1.0, 1.0), patch_size=(1, 12, 12), slices=3),
    "self": sr_configuration(scale=(1.0, 2.0, 1.0), source="self", patch_size=(1, 8, 12)),
    "self, volumes": sr_configuration(source="self", patch_size=(4, 8, 12)),
    "self, labels alone": sr_configuration(source="self", patch_size=(4, 8, 12), image=False),
    "paired": sr_configuration(source="paired", image=False),
    "image only": sr_configuration(segments=False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_samples_have_the_shapes_that_are_foretold_and_the_network_answers_on_their_grid(
    tmp_path: Path, name: str
) -> None:
    configuration = SHAPES[name]
    if configuration.sr_range is not None:
        configuration = replace(configuration, sr_scale=(4.0, 1.0, 1.0), sr_range=None)
    label = blobs((24, 30, 30))
    image = random_volume((12, 30, 30))[None] if name == "paired" else None
    for augment in (False, True):
        samples = samples_of(tmp_path, configuration, label, image=image, augment=augment)
        batch = collate([samples[0, i] for i in range(2)])
        blank = blank_batch(SHAPES[name].architecture, 2, configuration.patch_size, configuration=SHAPES[name])
        thick = name.startswith("self, ") and not augment  # nothing is learned: the label is brought to the answer
        assert thick or len(batch.parts) == len(blank.parts) == (2 if name == "self, volumes" else 1)
        for part, expected in zip(batch.parts, blank.parts, strict=not thick):
            assert part.image.shape == expected.image.shape and part.grid == expected.grid
            assert part.label.shape == expected.label.shape or (thick and part.label.shape[2:] == (8, 8, 12))
            assert (part.truth is None) == (expected.truth is None)
            assert part.truth is None or expected.truth is None or part.truth.shape == expected.truth.shape
            assert (part.label.dtype, part.image.dtype) == (expected.label.dtype, expected.image.dtype)
        network = build_network(SHAPES[name].architecture).eval()
        answer = network(batch.image, batch.grid)[0]
        classes = configuration.architecture.output_channels + configuration.architecture.image_channels
        assert answer.shape == (2, classes, *(batch.label.shape[2:] if batch.grid is None else batch.grid.shape))


def test_without_a_configuration_a_network_is_shown_the_scale_of_its_head() -> None:
    architecture: Architecture = SHAPES["x2.5 any"].architecture
    shapes = sample_shapes(architecture, (6, 12, 12))
    assert shapes.label == (24, 12, 12) and shapes.truth_channels == 1 and shapes.grid is not None


# ---- degraded


def standardised(samples: Samples, scale: float) -> tuple[float, float]:
    moments = input_moments(samples.sampler.entries["a"], samples.configuration, (scale, 1.0, 1.0))
    return float(moments.mean[0]), float(moments.std[0])


@pytest.mark.parametrize("scale", [2.0, 3.0, 2.5, 4.0])
def test_the_degraded_input_is_what_the_forward_model_makes_of_the_truth(tmp_path: Path, scale: float) -> None:
    configuration = sr_configuration(scale=(scale, 1.0, 1.0), patch_size=(4, 12, 12))
    volume = random_volume((30, 20, 20))
    samples = samples_of(tmp_path, configuration, blobs((30, 20, 20)), image=volume[None])
    mean, std = standardised(samples, scale)
    for step in range(8):
        sample = samples[step, 0]
        assert sample.truth is not None and sample.grid is not None
        size = sample.grid.shape
        patch = samples.sampler.draw(np.random.default_rng((0, step, 0)), index=0, size=size)
        stored = read_patch(samples.sampler.entries["a"], "image", patch.start, size)
        torch.testing.assert_close(sample.truth, torch.from_numpy((stored - mean) / std).float())
        drawn = read_patch(samples.sampler.entries["a"], "label", patch.start, size)
        assert np.array_equal(sample.label.numpy(), drawn)
        assert sample.image.shape == (1, 4, 12, 12)
        assert configuration.acquisition is not None
        expected = degrade(sample.truth, sample.grid.scale, configuration.acquisition)
        torch.testing.assert_close(sample.image, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("voxels", "scale", "spare"),
    [(11, 3.0, 4), (10, 2.0, 4), (14, 4.0, 4), (13, 2.5, 4), (36, 4.0, 1), (36, 4.0, 3), (9, 3.0, 1), (12, 4.0, 0)],
)
def test_a_patch_around_a_whole_case_shows_what_held_out_validation_shows(
    tmp_path: Path, voxels: int, scale: float, spare: int
) -> None:
    volume = random_volume((voxels, 12, 12))
    inputs, first = slices(voxels, scale), spare // 2
    # as many slices more at each end, or one more behind: slices of the patch and of the case lie in the same places
    configuration = sr_configuration(scale=(scale, 1.0, 1.0), patch_size=(inputs + spare, 12, 12))
    samples = samples_of(tmp_path, configuration, blobs((voxels, 12, 12)), image=volume[None])
    sample = samples[0, 0]
    whole = degrade_entry(samples.sampler.entries["a"], configuration)
    assert whole.image.shape == (1, inputs, 12, 12)
    shown = sample.image[:, first : first + inputs]
    np.testing.assert_allclose(shown.numpy(), whole.image, atol=1e-5)
    outside = (sample.image[:, :first], sample.image[:, first + inputs :])  # as a padded tile has it
    assert not any(part.any() for part in outside)
    tiles = tile_axis(inputs, patch=inputs + spare, divisor=inputs + spare)
    assert tiles.padding == (first, spare - first)
    assert sample.truth is not None and sample.grid is not None
    # from the first fine voxel of the patch to the first slice, and from there back to the first voxel of the case
    before = round(first * scale - sample.grid.start[0] + whole.grid.start[0])
    assert not sample.truth[:, :before].any() and sample.truth[:, before : before + voxels].all()


def test_an_image_that_is_smaller_than_its_patch_lies_anywhere_in_it_by_whole_slices(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0), patch_size=(5, 12, 12))
    still = replace(configuration, training=replace(configuration.training, mirror_axes=()))
    samples = samples_of(tmp_path, still, blobs((12, 12, 12)), image=random_volume((12, 12, 12))[None], augment=True)
    samples.augmentation.intensity = lambda **sample: sample  # type: ignore[assignment]

    def not_turned(*arrays: torch.Tensor, size: Shape) -> list[torch.Tensor]:
        for axis, n in enumerate(size, start=1):
            arrays = tuple(array.narrow(axis, array.shape[axis] // 2 - n // 2, n) for array in arrays)
        return list(arrays)

    samples.augmentation.turn = not_turned  # type: ignore[assignment]
    found = set()
    for step in range(30):
        seen = samples[step, 0].image[0].flatten(1).any(1)
        found.add("".join("x" if one else "." for one in seen))
    assert found == {"xxx..", ".xxx.", "..xxx"}


def test_an_augmented_pair_still_fits_together(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(2.0, 1.0, 1.0), patch_size=(6, 12, 12))
    samples = samples_of(
        tmp_path, configuration, blobs((40, 40, 40)), image=random_volume((40, 40, 40))[None], augment=True
    )
    samples.augmentation.intensity = lambda **sample: sample  # type: ignore[assignment]
    inner, truths = slice(3, -3), set()
    for step in range(20):
        sample = samples[step, 1]
        assert sample.truth is not None and sample.grid is not None and configuration.acquisition is not None
        expected = degrade(sample.truth, sample.grid.scale, configuration.acquisition)
        torch.testing.assert_close(sample.image[:, :, inner, inner], expected[:, :, inner, inner], atol=2e-2, rtol=0)
        truths.add(sample.truth.numpy().tobytes())
    assert len(truths) == 20


def test_with_an_image_to_answer_with_brightness_and_contrast_of_the_input_stay() -> None:
    low = torch.from_numpy(random_volume((6, 12, 12)))[None]
    steepest: dict[bool, float] = {}
    for image in (True, False):
        augmentation = Augmentation(sr_configuration(image=image))
        slopes = []
        for seed in range(80):
            _seed_everything(seed)
            disturbed = augmentation.disturb(low.clone())
            assert disturbed.shape == low.shape
            slopes.append((((disturbed - disturbed.mean()) * (low - low.mean())).mean() / low.var(correction=0)).item())
        assert len(set(slopes)) > 15
        steepest[image] = max(slopes)
    assert steepest[True] < 1.05 < 1.1 < steepest[False]


def test_a_drawn_thickness_varies_from_sample_to_sample(tmp_path: Path) -> None:
    wide = Acquisition(thickness=(0.2, 1.5), noise=0.0)
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0), patch_size=(4, 12, 12), acquisition=wide)
    volume = np.random.default_rng(0).normal(size=(1, 40, 40, 40))
    samples = samples_of(tmp_path, configuration, blobs((40, 40, 40)), image=volume, augment=True)
    samples.augmentation.intensity = lambda **sample: sample  # type: ignore[assignment]
    spreads = [samples[step, 0].image.std().item() for step in range(20)]
    assert max(spreads) > 1.2 * min(spreads)


@pytest.mark.parametrize("slices_seen", [3, 5])
def test_a_super_resolving_stack_sees_the_thick_slices_around_those_it_answers_for(
    tmp_path: Path, slices_seen: int
) -> None:
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0), patch_size=(1, 12, 12), slices=slices_seen)
    volume = random_volume((24, 16, 16))
    samples = samples_of(tmp_path, configuration, blobs((24, 16, 16)), image=volume[None])
    mean, std = standardised(samples, 4.0)
    halo = slices_seen // 2
    acquisition = configuration.acquisition
    assert acquisition is not None
    for step in range(20):
        sample = samples[step, 0]
        assert sample.grid is not None and sample.truth is not None and sample.grid.shape == (4, 12, 12)
        assert sample.grid.start == (0, 0, 0)
        patch = samples.sampler.draw(np.random.default_rng((0, step, 0)), index=0, size=(4, 12, 12))
        z, y, x = patch.start
        wide = np.pad(volume, ((30, 30), (0, 0), (0, 0)), mode="edge")
        deep = wide[30 + z - 4 * halo : 30 + z + 4 * (halo + 1), y : y + 12, x : x + 12]
        expected = degrade(torch.from_numpy((deep[None] - mean) / std).float(), (4.0, 1.0, 1.0), acquisition)
        torch.testing.assert_close(sample.image, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            sample.truth, torch.from_numpy((volume[None, z : z + 4, y : y + 12, x : x + 12] - mean) / std).float()
        )


def test_in_plane_super_resolution_takes_unequal_factors(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(1.0, 1.5, 3.0), patch_size=(1, 12, 8))
    samples = samples_of(tmp_path, configuration, blobs((5, 30, 40)), image=random_volume((5, 30, 40))[None])
    sample = samples[0, 0]
    assert sample.grid is not None and sample.grid.shape == (1, 18, 24) and configuration.acquisition is not None
    assert sample.truth is not None
    expected = degrade(sample.truth, (1.0, 1.5, 3.0), configuration.acquisition)
    torch.testing.assert_close(sample.image, expected, atol=1e-5, rtol=1e-5)


# ---- self-supervision


def test_self_supervision_degrades_either_axis_of_the_plane(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(1.0, 2.0, 1.0), source="self", patch_size=(1, 8, 12))
    y, x = np.meshgrid(np.arange(30), np.arange(30), indexing="ij")
    fast_y = np.broadcast_to((-1.0) ** y, (6, 30, 30))  # alternates along y: gone once y is degraded
    samples = samples_of(tmp_path, configuration, blobs((6, 30, 30)), image=fast_y[None])
    seen = set()
    for step in range(30):
        sample = samples[step, 0]
        assert sample.truth is not None and sample.image.shape == (1, 1, 8, 12) and sample.truth.shape == (1, 1, 16, 12)
        along_degraded = bool(sample.truth[0, 0].diff(dim=0).abs().max() > 0.1)
        contrast = sample.image.std() / sample.truth.std()
        assert (contrast < 0.5) == along_degraded
        # in units of the degraded image along that axis, which has next to no contrast left
        assert (sample.truth.std() > 3) == along_degraded
        seen.add(along_degraded)
    assert seen == {True, False}


def test_every_second_step_of_self_supervision_sees_thick_slices_and_their_label_as_they_are(tmp_path: Path) -> None:
    configuration = sr_configuration(
        scale=(1.0, 2.0, 1.0), source="self", patch_size=(1, 8, 12), training=replace(STILL, image_losses=("l1",))
    )
    label = np.broadcast_to(np.arange(1, 21)[:, None, None], (20, 30, 30)).astype(np.int16)  # tells the slices apart
    samples = samples_of(tmp_path, configuration, label, labels=MANY, augment=True)
    shape = samples[0, 0].label.shape
    for step in range(12):
        sample = samples[step, 0]
        if step % 2:  # patch axis 1 runs through the planes, in steps of one slice
            assert sample.truth is None and sample.label.shape == (1, 1, 8, 12)
            assert sample.grid is not None and sample.grid.shape == shape[1:]
            slices = sample.label[0, 0]
            assert (slices == slices[:, :1]).all() and (slices[:, 0].diff() == 1).all()
        else:
            assert sample.truth is not None and sample.label.shape == shape
            assert len(sample.label.unique()) == 1  # one slice, in its plane


def test_self_supervised_volumes_are_labelled_thick_and_their_image_is_learned_in_slices_of_the_plane(
    tmp_path: Path,
) -> None:
    thick = replace(STILL, image_losses=("l1",), rotate_out_of_plane=False)
    configuration = sr_configuration(source="self", patch_size=(4, 16, 12), training=thick)
    label = np.broadcast_to(np.arange(1, 21)[:, None, None], (20, 30, 30)).astype(np.int16)  # tells the slices apart
    y = np.arange(30)[:, None]
    fast_y = np.broadcast_to((-1.0) ** y, (20, 30, 30))  # alternates along y: gone once y is made thick
    samples = samples_of(tmp_path, configuration, label, labels=MANY, image=fast_y[None], augment=True)
    seen = set()
    for step in range(20):
        sample = samples[step, 0]
        assert sample.truth is None and sample.label.shape == (1, 4, 16, 12) == sample.image.shape
        assert sample.grid is not None and sample.grid.shape == (8, 16, 12)
        shown = [set(one.unique().tolist()) - {0} for one in sample.label[0]]
        assert all(len(one) <= 1 for one in shown), "slices are turned in their plane"
        present = [one.pop() for one in shown if one]
        assert present == list(range(present[0], present[0] + len(present)))
        plane = sample.plane
        assert plane is not None and plane.truth is not None and plane.grid is not None and not plane.label.numel()
        # thick rows, slices, columns; of 16 pixels 8 slices
        assert plane.image.shape == (1, 4, 8, 12) and plane.truth.shape == (1, *plane.grid.shape) == (1, 8, 8, 12)
        made_thick = bool(plane.truth[0].diff(dim=0).abs().max() > 0.1)
        assert bool(plane.truth[0].diff(dim=2).abs().max() > 0.1) == (not made_thick)
        assert plane.truth[0].diff(dim=1).abs().max() < 1e-6, "axis 1 is the thick one of the scanner"
        assert (plane.image.std() / plane.truth.std() < 0.5) == made_thick
        seen.add(made_thick)
    assert seen == {True, False}


# ---- paired


@pytest.mark.parametrize("scale", [(2.0, 1.0, 1.0), (4.0, 1.0, 1.0), (2.5, 1.0, 1.0), (1.0, 2.0, 3.0)])
def test_a_paired_label_lies_where_the_image_says(tmp_path: Path, scale: tuple[float, float, float]) -> None:
    configuration = sr_configuration(source="paired", scale=scale, image=False, patch_size=(4, 8, 8))
    shape = (10, 16, 18)
    fine = [round(n * s) for n, s in zip(shape, scale, strict=True)]
    # the image holds its own coordinates; the label, at every fine voxel, the nearest whole one along the scaled axis
    axis = int(np.argmax(scale))
    where = (np.arange(fine[axis]) + 0.5) / scale[axis] - 0.5
    label = np.round(where).clip(0).astype(np.int16).reshape([-1 if a == axis else 1 for a in range(3)])
    label = np.broadcast_to(label, fine)
    image = np.arange(shape[axis], dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    image = np.broadcast_to(image, shape)[None]
    samples = samples_of(tmp_path, configuration, label, image=image, labels=MANY)
    for step in range(20):
        sample = samples[step, 1]
        assert sample.truth is None and sample.grid is not None
        size, factor, start = sample.grid.shape[axis], sample.grid.scale[axis], sample.grid.start[axis]
        positions = (start + np.arange(size) + 0.5) / factor - 0.5
        line = np.moveaxis(sample.image[0].numpy(), axis, 0)[:, 0, 0]
        expected = np.interp(positions, np.arange(len(line)), line)
        found = np.moveaxis(sample.label[0].numpy(), axis, 0)[:, 0, 0]
        inside = (positions >= 0) & (positions <= len(line) - 1) & (found > 0)
        assert np.abs(expected - found)[inside].max() <= 0.5 + 1e-6


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("scale", "patch"), [(2.4, 4), (2.5, 3), (1.6, 5), (2.7, 8)])
def test_a_paired_label_that_is_no_whole_number_of_times_finer_stays_in_place(
    tmp_path: Path, scale: float, patch: int, augment: bool
) -> None:
    voxels, fine = 9, round(9 * scale)
    configuration = sr_configuration(source="paired", scale=(scale, 1.0, 1.0), image=False, patch_size=(patch, 8, 8))
    label = np.broadcast_to(np.arange(1, fine + 1, dtype=np.int16)[:, None, None], (fine, 8, 8))
    image = np.broadcast_to(np.arange(1, voxels + 1, dtype=np.float32)[:, None, None], (voxels, 8, 8))
    samples = samples_of(tmp_path, configuration, label, image=image[None], labels=MANY, augment=augment)
    samples.augmentation.intensity = lambda **sample: sample  # type: ignore[assignment]
    worst, mirrored = 0.0, 0
    for step in range(40):
        sample = samples[step, 0]
        assert sample.grid is not None
        place = (sample.grid.start[0] + np.arange(sample.grid.shape[0]) + 0.5) / scale - 0.5  # in voxels of the patch
        line, found = sample.image[0, :, 4, 4].numpy(), sample.label[0, :, 4, 4].numpy()
        shown = np.interp(place, np.arange(patch), line > 0) == 1  # beyond the image there are zeros
        inside = shown & (place >= 0) & (place <= patch - 1) & (found > 0)
        here = np.interp(place, np.arange(patch), line) - 1  # in voxels of the image
        there = (found - 0.5) * voxels / fine - 0.5
        worst = max(worst, float(np.abs(here - there)[inside].max()) * scale)
        mirrored += line[line > 0][0] > line[line > 0][-1]
    assert worst < 0.15  # label voxels
    assert bool(mirrored) == augment


def test_an_augmented_paired_sample_lines_up(tmp_path: Path) -> None:
    configuration = sr_configuration(source="paired", scale=(4.0, 1.0, 1.0), image=False, patch_size=(3, 16, 16))
    coarse = np.random.default_rng(0).integers(0, 2, (9, 10, 10)).repeat(6, 1).repeat(6, 2)
    label = coarse.repeat(4, 0).astype(np.int16)
    samples = samples_of(tmp_path, configuration, label, image=coarse[None].astype(np.float32), augment=True)
    samples.augmentation.intensity = lambda **sample: sample  # type: ignore[assignment]
    turned = 0
    for step in range(40):
        sample = samples[step, 1]
        assert sample.image.shape == (1, 3, 16, 16) and sample.label.shape == (1, 12, 16, 16)
        fine = sample.image[0].repeat_interleave(4, 0)
        differs = (fine > 0.5) != (sample.label[0] == 1)
        assert not (differs & ((fine < 0.4) | (fine > 0.6))).any()
        turned += bool(((fine > 0.05) & (fine < 0.95)).any())
    assert turned > 5


# ---- any scale


def test_any_scale_training_begins_with_whole_scales_and_keeps_one_a_batch(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(2.5, 1.0, 1.0), sr_range=(1.5, 4.0), patch_size=(4, 8, 8))
    samples = samples_of(
        tmp_path, configuration, blobs((40, 20, 20)), image=random_volume((40, 20, 20))[None], augment=True
    )
    early = [samples.scale(step) for step in range(CURRICULUM_STEPS)]
    late = [samples.scale(CURRICULUM_STEPS + step) for step in range(300)]
    assert set(early) == {(2.0, 1.0, 1.0), (3.0, 1.0, 1.0), (4.0, 1.0, 1.0)}
    assert all(1.5 <= z <= 4 and y == x == 1 for z, y, x in late)
    assert len(set(late)) == 300 and np.std([z for z, _, _ in late]) > 0.6
    for step in (0, CURRICULUM_STEPS + 3):
        batch = collate([samples[step, index] for index in range(3)])
        assert batch.grid is not None and batch.truth is not None and batch.grid.scale == samples.scale(step)
        assert batch.image.shape == (3, 1, 4, 8, 8) and batch.truth.shape[2:] == batch.grid.shape
        assert batch.grid.shape[0] == math.ceil(4 * batch.grid.scale[0] - 1e-6)
    samples.seed = 1
    assert [samples.scale(CURRICULUM_STEPS + step) for step in range(300)] != late
    held_out = replace_augment(samples)
    assert {held_out.scale(step) for step in (0, 500)} == {(2.5, 1.0, 1.0)}


def replace_augment(samples: Samples) -> Samples:
    store = Store(samples.sampler.entries["a"].folder)
    return Samples(store, ["a"], samples.configuration, TWO_CLASSES, seed=0, augment=False)


def test_a_range_without_whole_scales_is_drawn_from_at_once(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(1.5, 1.0, 1.0), sr_range=(1.2, 1.8))
    samples = samples_of(tmp_path, configuration, blobs((40, 20, 20)), augment=True)
    assert len({samples.scale(step) for step in range(20)}) == 20


# ---- datasets of another kind


def test_images_without_labels_are_super_resolved(tmp_path: Path) -> None:
    configuration = sr_configuration(segments=False)
    volume = random_volume((20, 20, 20))[None]
    labelled = store_of(tmp_path / "labelled", {"a": blobs((20, 20, 20))}, images={"a": volume}).entry("a")
    Store(tmp_path).write("a", {"image": volume}, labelled.geometry, {})
    sample = Samples(Store(tmp_path), ["a"], configuration, TWO_CLASSES, seed=0)[0, 1]
    assert sample.truth is not None and sample.truth.any() and not sample.label.any()


def test_a_cascade_that_super_resolves_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"a": blobs((20, 20, 20))})
    with pytest.raises(PlanError, match="3d_fullres super-resolves, so it cannot have a previous stage"):
        Samples(store, ["a"], sr_configuration(), TWO_CLASSES, seed=0, previous=store)


def test_a_volume_thinner_than_a_slice_is_refused_with_its_name(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0))
    samples = samples_of(tmp_path, configuration, blobs((3, 20, 20)), image=random_volume((3, 20, 20))[None])
    with pytest.raises(PlanError, match="Case a: An axis of 3 voxels holds no slice of 4 voxels"):
        samples[0, 0]


def test_schemes_that_do_not_depend_on_the_image_keep_its_units(tmp_path: Path) -> None:
    ct = Normalization("ct", mean=3.0, std=2.0, lower=-5, upper=9)
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0), normalization=ct, patch_size=(4, 12, 12))
    volume = random_volume((30, 20, 20))[None] * 5 + 2
    sample = samples_of(tmp_path, configuration, blobs((30, 20, 20)), image=volume)[0, 0]
    assert sample.truth is not None and np.isin(sample.truth.numpy().ravel(), volume.ravel()).all()
