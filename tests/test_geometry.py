"""A voxel keeps its place in the world whatever is done to its grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from autoseg.geometry import (
    canonical_axes,
    corner_distance,
    crop_grid,
    extent_distance,
    first_face_and_spacing,
    flip_grid,
    inverse_permutation,
    nonzero_box,
    orientation_code,
    outer_faces,
    permute_grid,
    refine_grid,
    reorder_axes,
    resample_grid,
    shape_at_spacing,
    turn_array,
    turn_array_back,
    turn_grid,
    voxels_to_world,
    whole_box,
)
from autoseg.image import Grid

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def as_direction(matrix: np.ndarray) -> tuple:
    return tuple(tuple(float(value) for value in row) for row in matrix)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any shape, spacing, origin and orientation, left-handed ones too."""
    shape = draw(st.tuples(*[st.integers(1, 9)] * 3))
    spacing = draw(st.tuples(*[st.floats(0.1, 12)] * 3))
    origin = draw(st.tuples(*[st.floats(-500, 500)] * 3))
    angles = draw(st.tuples(*[st.floats(-180, 180)] * 3))
    matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    if draw(st.booleans()):
        matrix[:, draw(st.integers(0, 2))] *= -1
    return Grid(shape, spacing, origin, as_direction(matrix))


def places(grid: Grid) -> np.ndarray:
    """World coordinates (1, Z, Y, X, 3) of every voxel."""
    index = np.indices(grid.shape).reshape(3, -1).T
    return voxels_to_world(grid, index).reshape(1, *grid.shape, 3)


permutations = st.permutations(range(3)).map(tuple)
flips = st.tuples(*[st.booleans()] * 3)


@given(grids(), permutations, flips)
def test_every_voxel_keeps_its_place_when_axes_are_turned(grid: Grid, permutation: tuple, flip: tuple) -> None:
    moved = np.stack([turn_array(places(grid)[..., w], permutation, flip) for w in range(3)], axis=-1)
    np.testing.assert_allclose(moved, places(turn_grid(grid, permutation, flip)), atol=1e-8)


@given(grids(), permutations, flips)
def test_turning_back_undoes_turning(grid: Grid, permutation: tuple, flip: tuple) -> None:
    array = np.arange(2 * np.prod(grid.shape)).reshape(2, *grid.shape)
    np.testing.assert_array_equal(turn_array_back(turn_array(array, permutation, flip), permutation, flip), array)
    turned = turn_grid(grid, permutation, flip)
    back = permute_grid(flip_grid(turned, flip), inverse_permutation(permutation))
    assert back.shape == grid.shape
    assert corner_distance(grid, back) < 1e-6


@given(grids())
def test_canonical_axes_lie_along_the_world_axes_of_any_orientation(grid: Grid) -> None:
    turned = turn_grid(grid, *canonical_axes(grid.direction))
    matrix = np.asarray(turned.direction)
    assert (np.diag(matrix) >= 0).all()
    # no other assignment of axes lies closer
    best = max(np.abs(matrix)[[0, 1, 2], list(p)].sum() for p in itertools.permutations(range(3)))
    assert np.trace(matrix) >= best - 1e-5
    assert canonical_axes(turned.direction) == ((0, 1, 2), (False, False, False)) or np.diag(matrix).min() < 1e-5


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_all_48_axis_aligned_orientations_become_the_identity(permutation: tuple, signs: tuple) -> None:
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(permutation, signs, strict=True)):
        matrix[world, axis] = sign
    grid = Grid((2, 3, 4), (1.0, 2.0, 3.0), (5.0, 6.0, 7.0), as_direction(matrix))
    turned = turn_grid(grid, *canonical_axes(grid.direction))
    np.testing.assert_array_equal(turned.direction, IDENTITY)


def test_orientation_codes_name_the_world_end_that_each_axis_runs_to() -> None:
    assert orientation_code(IDENTITY) == "SPL"
    assert orientation_code(as_direction(-np.eye(3))) == "IAR"
    assert orientation_code(as_direction(np.eye(3)[:, [2, 1, 0]])) == "LPS"


@given(grids(), permutations)
def test_one_permutation_does_what_turning_and_reordering_do(grid: Grid, order: tuple) -> None:
    permutation, flip = canonical_axes(grid.direction)
    both = turn_grid(grid, *reorder_axes(permutation, flip, order))
    stepwise = permute_grid(turn_grid(grid, permutation, flip), order)
    assert both.shape == stepwise.shape
    assert corner_distance(both, stepwise) < 1e-6


@given(grids(), st.data())
def test_every_voxel_keeps_its_place_when_a_grid_is_cropped(grid: Grid, data: st.DataObject) -> None:
    box = []
    for size in grid.shape:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    cropped = crop_grid(grid, tuple(box))
    np.testing.assert_allclose(places(cropped)[0], places(grid)[0][tuple(box)], atol=1e-8)


@given(grids(), st.tuples(*[st.integers(1, 20)] * 3))
def test_a_resampled_grid_covers_the_same_extent(grid: Grid, shape: tuple) -> None:
    resampled = resample_grid(grid, shape)
    for corner in (np.zeros(3), np.ones(3)):  # outer faces of the first and the last voxel
        before = voxels_to_world(grid, corner * np.asarray(grid.shape)[None] - 0.5)
        after = voxels_to_world(resampled, corner * np.asarray(shape)[None] - 0.5)
        np.testing.assert_allclose(before, after, atol=1e-8)
    assert corner_distance(grid, resample_grid(resampled, grid.shape)) < 1e-6


@given(grids(), st.tuples(*[st.floats(0.5, 8)] * 3))
def test_a_refined_grid_has_the_exact_spacing_and_keeps_the_first_outer_face(grid: Grid, factor: tuple) -> None:
    fine = refine_grid(grid, factor)
    np.testing.assert_allclose(np.asarray(fine.spacing) * factor, grid.spacing, rtol=1e-12)
    np.testing.assert_allclose(outer_faces(fine)[0], outer_faces(grid)[0], atol=1e-8)
    beyond = np.asarray(fine.shape) * fine.spacing - np.asarray(grid.shape) * grid.spacing
    assert (np.abs(beyond) <= np.asarray(fine.spacing) * 0.5 + 1e-6).all() or min(fine.shape) == 1
    assert refine_grid(grid, (1.0, 1.0, 1.0)) == grid


@given(grids(), st.tuples(*[st.integers(1, 4)] * 3))
def test_grids_over_the_same_extent_are_no_distance_apart(grid: Grid, factor: tuple) -> None:
    fine = refine_grid(grid, factor)
    assert extent_distance(grid, fine) < 1e-6
    shifted = flip_grid(crop_grid(fine, whole_box(fine.shape)), (True, False, False))
    assert extent_distance(grid, shifted) == pytest.approx(fine.shape[0], rel=1e-6)


def test_extents_are_compared_in_voxels_of_the_second_grid() -> None:
    grid = Grid((4, 10, 10), (4.0, 1.0, 1.0))
    assert extent_distance(grid, Grid((16, 10, 10), (1.0, 1.0, 1.0), (-1.5, 0.0, 0.0))) < 1e-9
    assert extent_distance(grid, Grid((16, 10, 10), (1.0, 1.0, 1.0), (-1.0, 0.0, 0.0))) == pytest.approx(0.5)
    assert extent_distance(grid, Grid((15, 10, 10), (1.0, 1.0, 1.0), (-1.5, 0.0, 0.0))) == pytest.approx(1.0)


@given(grids(), permutations)
def test_faces_along_the_axes_tell_how_grids_of_one_direction_lie(grid: Grid, permutation: tuple) -> None:
    fine = refine_grid(grid, (2.0, 3.0, 1.5))
    face, spacing = first_face_and_spacing(permute_grid(grid, permutation))
    fine_face, fine_spacing = first_face_and_spacing(permute_grid(fine, permutation))
    np.testing.assert_allclose(fine_face, face, atol=1e-8)
    np.testing.assert_allclose(spacing / fine_spacing, np.array([2.0, 3.0, 1.5])[list(permutation)])


def test_shape_at_spacing_keeps_the_extent_and_at_least_one_voxel() -> None:
    grid = Grid((10, 100, 4), (5.0, 0.5, 1.0))
    assert shape_at_spacing(grid, (2.5, 1.0, 1.0)) == (20, 50, 4)
    assert shape_at_spacing(grid, (500.0, 0.5, 1.0)) == (1, 100, 4)


def test_corner_distance_is_in_voxels() -> None:
    grid = Grid((11, 11, 11), (2.0, 1.0, 1.0))
    assert corner_distance(grid, Grid((11, 11, 11), (2.0, 1.0, 1.0), (3.0, 4.0, 0.0))) == pytest.approx(5.0)
    assert corner_distance(grid, Grid((11, 11, 11), (2.1, 1.0, 1.0))) == pytest.approx(1.0)


# ---- boxes


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 8)] * 3), st.integers(1, 3))
def test_the_nonzero_box_holds_all_and_cannot_be_smaller(seed: int, shape: tuple, channels: int) -> None:
    random = np.random.default_rng(seed)
    array = (random.random((channels, *shape)) < 0.05).astype(np.int16)
    box = nonzero_box(array)
    occupied = array.any(axis=0)
    if not occupied.any():
        assert box == whole_box(shape)
        return
    assert array[(slice(None), *box)].sum() == array.sum()
    for axis in range(3):
        inside = np.moveaxis(occupied[box], axis, 0)
        assert inside[0].any() and inside[-1].any()
