"""Between grids of one case: every voxel at its place in the world, and shares that stay means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.geometry import corner_distance, turn_array, turn_grid, voxels_to_world
from autoseg.image import Grid, Image
from autoseg.inference.grids import bring_image, bring_label, bring_logits, grid_between, moving_matrix, turn_like
from autoseg.preprocessing.case import CaseGeometry, fine_geometry


@st.composite
def geometries(draw: st.DrawFn) -> CaseGeometry:
    """Any orientation, flips, crop and resampling."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    shape = draw(st.tuples(*[st.integers(1, 12)] * 3))
    rows = tuple(tuple(float(v) for v in row) for row in rotation)
    grid = Grid(shape, draw(st.tuples(*[st.floats(0.3, 6)] * 3)), draw(st.tuples(*[st.floats(-200, 200)] * 3)), rows)
    permutation = tuple(draw(st.permutations(range(3))))
    crop = []
    for axis in permutation:
        start = draw(st.integers(0, shape[axis] - 1))
        crop.append((start, draw(st.integers(start + 1, shape[axis]))))
    network = draw(st.tuples(*[st.integers(1, 12)] * 3))
    return CaseGeometry(grid, permutation, draw(st.tuples(*[st.booleans()] * 3)), tuple(crop), network)


SCALES = st.tuples(*[st.one_of(st.sampled_from([1.0, 2.0, 4.0]), st.floats(1, 6))] * 3)


@settings(max_examples=100, deadline=None)
@given(geometries(), SCALES)
def test_the_voxels_that_are_asked_for_lie_where_the_fine_network_grid_has_them(geometry, scale):
    fine = fine_geometry(geometry, scale)
    grid = grid_between(geometry, fine)
    voxels = np.argwhere(np.ones(grid.shape))
    position = (np.asarray(grid.start) + voxels + 0.5) / grid.scale - 0.5  # in voxels of the network's input
    np.testing.assert_allclose(
        voxels_to_world(geometry.network, position), voxels_to_world(fine.network, voxels), atol=1e-5
    )
    assert all(asked <= s * (1 + 1e-6) or n == 1 for asked, s, n in zip(grid.scale, scale, grid.shape, strict=True))


@settings(max_examples=40, deadline=None)
@given(geometries(), st.tuples(*[st.integers(1, 4)] * 3))
def test_whole_scales_ask_for_exactly_that_scale_from_the_first_face_on(geometry, scale):
    grid = grid_between(geometry, fine_geometry(geometry, tuple(map(float, scale))))
    assert grid.scale == scale and grid.start == (0.0, 0.0, 0.0)
    assert grid.shape == tuple(n * s for n, s in zip(geometry.network_shape, scale, strict=True))


def test_grids_that_are_turned_differently_are_not_compared():
    geometry = CaseGeometry(Grid((4, 4, 4)), (0, 1, 2), (False,) * 3, ((0, 4),) * 3, (4, 4, 4))
    with pytest.raises(ValueError, match="turned"):
        grid_between(geometry, replace(geometry, permutation=(1, 0, 2)))


@settings(deadline=None)
@given(inputs=st.integers(1, 30), outputs=st.integers(1, 30), scale=st.floats(0.2, 5), start=st.floats(-3, 3))
def test_moving_values_is_a_mean_with_weights_that_sum_to_one(inputs, outputs, scale, start):
    matrix = moving_matrix(inputs, outputs, scale, start)
    assert matrix.shape == (outputs, inputs) and bool((matrix >= 0).all())
    assert torch.allclose(matrix.sum(1), torch.ones(outputs), atol=1e-5)


def test_a_coarser_voxel_is_the_mean_of_what_it_covers_and_a_finer_one_is_interpolated():
    down = moving_matrix(6, 2, 1 / 3, 0.0)
    assert torch.allclose(down, torch.tensor([[1 / 3] * 3 + [0] * 3, [0] * 3 + [1 / 3] * 3]))
    uneven = moving_matrix(5, 2, 0.4, 0.0)
    assert torch.allclose(uneven[0], torch.tensor([0.4, 0.4, 0.2, 0.0, 0.0]))
    up = moving_matrix(2, 4, 2.0, 0.0)
    assert torch.allclose(up[:, 1], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert torch.equal(moving_matrix(4, 4, 1.0, 0.0), torch.eye(4))


def fine_and_coarse() -> tuple[CaseGeometry, CaseGeometry]:
    coarse = CaseGeometry(
        Grid((6, 5, 4), (4.0, 1.0, 1.0)), (0, 1, 2), (True, False, False), ((1, 6), (0, 5), (0, 4)), (5, 5, 4)
    )
    return fine_geometry(coarse, (4.0, 1.0, 1.0)), coarse


@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_are_averaged_over_each_coarse_voxel(regions):
    fine, coarse = fine_and_coarse()
    logits = torch.randn(3, *fine.network_shape)
    probabilities = logits.sigmoid() if regions else logits.softmax(0)
    brought = bring_logits(logits, fine, coarse, regions=regions)
    expected = probabilities.unflatten(1, (5, 4)).mean(2)
    assert torch.allclose(brought.sigmoid() if regions else brought.softmax(0), expected, atol=1e-4)


def test_on_the_same_grid_logits_are_returned_as_they_are():
    fine, coarse = fine_and_coarse()
    logits = torch.randn(2, *fine.network_shape)
    assert bring_logits(logits, fine, replace(fine), regions=False) is logits
    there = bring_logits(torch.randn(2, *coarse.network_shape), coarse, fine, regions=False)
    assert there.shape == (2, *fine.network_shape)


def test_a_label_comes_to_a_coarser_grid_as_the_probabilities_of_validation_do():
    rng = np.random.default_rng(1)
    fine, coarse = Grid((12, 9, 10), (1.0, 1.0, 2.0)), Grid((3, 6, 10), (4.0, 1.5, 2.0), (1.5, 0.25, 0.0))
    array = rng.integers(0, 3, fine.shape).astype(np.uint8)
    brought = bring_label(Image(array[None], fine), coarse)
    source, target = (
        CaseGeometry(grid, (0, 1, 2), (False,) * 3, tuple((0, n) for n in grid.shape), grid.shape)
        for grid in (fine, coarse)
    )
    sure = torch.from_numpy(np.eye(3, dtype=np.float32)[array]).permute(3, 0, 1, 2) * 50
    shares = bring_logits(sure, source, target, regions=False).softmax(0)
    first, second = shares.topk(2, dim=0).values
    clear = (first - second > 1e-3).numpy()  # elsewhere two values share the voxel, and the smaller one is taken
    assert 0.5 < clear.mean() < 1
    np.testing.assert_array_equal(brought.array[0][clear], shares.argmax(0).numpy()[clear])


def test_the_smaller_value_wins_a_tie():
    label = np.array([3, 1, 0, 2, 2, 0], np.uint8).reshape(1, 6, 1, 1)
    brought = bring_label(Image(label, Grid((6, 1, 1))), Grid((3, 1, 1), (2.0, 1.0, 1.0), (0.5, 0.0, 0.0)))
    assert brought.array.ravel().tolist() == [1, 0, 0] and brought.array.dtype == np.uint8


def test_an_image_comes_to_a_coarser_grid_by_means_and_to_a_finer_one_by_interpolation():
    ramp = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    coarse = Grid((2, 1, 1), (4.0, 1.0, 1.0), (1.5, 0.0, 0.0))
    down = bring_image(Image(ramp, Grid((8, 1, 1))), coarse)
    assert down.array.ravel().tolist() == [1.5, 5.5]
    shifted = bring_image(Image(ramp, Grid((8, 1, 1), origin=(0.25, 0.0, 0.0))), coarse)
    assert shifted.array.ravel().tolist() == [(0 * 1.25 + 1 + 2 + 3 * 0.75) / 4, (3 * 0.25 + 4 + 5 + 6 + 7 * 0.75) / 4]
    up = bring_image(down, Grid((8, 1, 1)))
    assert up.array.ravel().tolist() == [1.5, 1.5, 2, 3, 4, 5, 5.5, 5.5]


@settings(max_examples=50, deadline=None)
@given(geometries(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_an_image_turned_like_another_has_every_voxel_where_it_was(geometry, permutation, flips):
    grid = geometry.original
    array = np.random.default_rng(0).normal(size=(1, *grid.shape))
    turned = Image(turn_array(array, permutation, flips), turn_grid(grid, permutation, flips))
    back = turn_like(turned, grid)
    np.testing.assert_array_equal(back.array, array)
    assert back.grid.shape == grid.shape and corner_distance(grid, back.grid) < 1e-6
