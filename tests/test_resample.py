"""Resampling: scipy's values for images, linear one-hot for labels, extents kept."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from autoseg.preprocessing.resample import resample_image, resample_label

SHAPES = st.tuples(*[st.integers(1, 17)] * 3)


def by_scipy(volume: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    zoom = [new / old for new, old in zip(shape, volume.shape, strict=True)]
    result = ndimage.zoom(volume.astype(np.float64), zoom, order=order, mode="nearest", grid_mode=True)
    assert result.shape == tuple(shape)
    return result


@settings(max_examples=60, deadline=None)
@given(SHAPES, SHAPES, st.sampled_from([1, 3]), st.integers(0, 1000))
def test_images_get_the_values_of_scipy_within_their_range(old, new, order, seed):
    image = np.random.default_rng(seed).normal(5, 30, (2, *old)).astype(np.float32)
    resampled = resample_image(image, new, order)
    assert resampled.dtype == np.float32 and resampled.shape == (2, *new)
    for volume, result in zip(image, resampled, strict=True):
        expected = np.clip(by_scipy(volume, new, order), volume.min(), volume.max())
        np.testing.assert_allclose(result, expected, atol=3e-4)  # of intensities around 100


def test_a_long_axis_gets_the_values_of_scipy_too():
    image = np.random.default_rng(0).normal(size=(1, 3, 300, 4)).astype(np.float32)
    expected = np.clip(by_scipy(image[0], (3, 411, 4), 3), image.min(), image.max())
    np.testing.assert_allclose(resample_image(image, (3, 411, 4))[0], expected, atol=1e-5)


def test_the_same_shape_gives_the_same_values_in_an_array_of_its_own():
    image = np.random.default_rng(0).normal(size=(1, 5, 6, 7)).astype(np.float32)
    resampled = resample_image(image, (5, 6, 7))
    np.testing.assert_array_equal(resampled, image)
    assert not np.shares_memory(resampled, image)
    label = np.random.default_rng(0).integers(0, 4, (1, 5, 6, 7)).astype(np.int16)
    np.testing.assert_array_equal(resample_label(label, (5, 6, 7)), label)


def test_views_that_are_flipped_and_permuted_are_read_right():
    image = np.random.default_rng(0).normal(size=(1, 5, 6, 7)).astype(np.float32)
    view = image.transpose(0, 3, 1, 2)[:, ::-1, :, ::-1]
    np.testing.assert_array_equal(resample_image(view, (9, 4, 6)), resample_image(view.copy(), (9, 4, 6)))


def test_a_ramp_keeps_its_place_in_the_world():
    # voxel centres of 10 voxels of 2 mm, then of 20 voxels of 1 mm over the same 20 mm
    coarse = (np.arange(10) + 0.5) * 2
    fine = np.arange(20) + 0.5
    image = np.broadcast_to(coarse[:, None, None], (10, 3, 3))[None].astype(np.float32)
    inside = resample_image(image, (20, 3, 3), 1)[0, 1:-1, 0, 0]
    np.testing.assert_allclose(inside, fine[1:-1], atol=1e-5)


def one_hot_by_scipy(label: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The winning value of each voxel, and how far ahead of the second it is."""
    values = np.unique(label)
    shares = np.stack([by_scipy(label == value, shape, 1) for value in values])
    ordered = np.sort(shares, axis=0)
    margin = ordered[-1] - ordered[-2] if len(values) > 1 else np.ones(shape)
    return values[shares.argmax(axis=0)], margin


@settings(max_examples=60, deadline=None)
@given(SHAPES, SHAPES, st.integers(1, 6), st.integers(0, 1000))
def test_labels_are_the_winners_of_linear_one_hot_resampling(old, new, classes, seed):
    rng = np.random.default_rng(seed)
    label = ndimage.zoom(
        rng.integers(0, classes, (3, 3, 3)), [size / 3 for size in old], order=0, grid_mode=True, mode="nearest"
    )
    label = np.where(rng.random(label.shape) < 0.1, rng.integers(0, classes, label.shape), label).astype(np.int16)
    if label.shape != old:
        label = np.resize(label, old)
    result = resample_label(label[None], new)
    assert result.dtype == np.int16 and result.shape == (1, *new)
    if old == new:
        return
    expected, margin = one_hot_by_scipy(label, new)
    clear = margin > 1e-5
    np.testing.assert_array_equal(result[0][clear], expected[clear])


def test_a_tie_goes_to_the_smaller_value():
    label = np.array([2, 1], dtype=np.uint8).reshape(1, 2, 1, 1)
    assert resample_label(label, (1, 1, 1)).item() == 1


def test_labels_are_not_resampled_by_nearest_neighbour_along_thick_slices():
    # a slanted edge: with nearest neighbours the new slices would be copies of the old ones
    label = (np.arange(24)[None, None, :] < 10 + np.arange(4)[:, None, None]).astype(np.int16)
    edges = resample_label(label[None], (16, 1, 96))[0].sum(axis=(1, 2))
    assert len(set(edges.tolist())) > 8
    assert (np.diff(edges) >= 0).all()


def test_values_that_are_not_asked_for_count_as_background():
    label = np.array([0, 1, 7, 7], dtype=np.int16).reshape(1, 4, 1, 1)
    assert set(resample_label(label, (8, 1, 1), [0, 1]).ravel().tolist()) == {0, 1}


def test_labels_of_many_classes_take_the_memory_of_one():
    label = np.zeros((1, 40, 40, 40), dtype=np.int16)
    label[0] = np.arange(64).reshape(4, 4, 4).repeat(10, 0).repeat(10, 1).repeat(10, 2)
    shape = (80, 80, 80)
    tracemalloc.start()
    resample_label(label, shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 4 * np.prod(shape), "about one float for each voxel and the result, not one for each class"


def test_resampling_does_not_import_torch():
    code = (
        "import sys, numpy, autoseg.preprocessing.run as run\n"
        "from autoseg.preprocessing.resample import resample_image\n"
        "resample_image(numpy.zeros((1, 3, 3, 3)), (4, 4, 4)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("order", [1, 3])
def test_one_voxel_becomes_many_equal_ones(order):
    np.testing.assert_allclose(resample_image(np.full((1, 1, 1, 1), 3.5), (4, 2, 3), order), 3.5, rtol=1e-6)
