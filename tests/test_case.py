"""A case to the network's grid and back: any orientation, spacing and crop."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.errors import DatasetError, StorageError
from autoseg.geometry import outer_faces, refine_grid, voxels_to_world
from autoseg.image import Grid, Image
from autoseg.labels import Labels
from autoseg.plan import Normalization, PreprocessingSettings
from autoseg.preprocessing.case import (
    CaseGeometry,
    bring_label,
    find_geometry,
    find_label_geometry,
    find_units,
    fine_geometry,
    place,
    preprocess_case,
    restore_label,
)

LABELS = Labels(("ball",), ((1,),))
AS_IT_IS = Normalization("none")


def preprocessing(
    spacing: tuple[float | None, float, float] = (1.0, 1.0, 1.0), axis_order=(0, 1, 2), channels: int = 1, **more
) -> PreprocessingSettings:
    return PreprocessingSettings(spacing, axis_order, (AS_IT_IS,) * channels, **more)


@st.composite
def directions(draw) -> np.ndarray:
    """Any rotation, half of them near the axes, and any handedness."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    matrix = np.eye(3)[list(draw(st.permutations(range(3))))] * draw(st.tuples(*[st.sampled_from([1, -1])] * 3))
    if draw(st.booleans()):
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        matrix = rotation @ matrix
    return matrix


@st.composite
def grids(draw) -> Grid:
    shape = draw(st.tuples(*[st.integers(1, 12)] * 3))
    spacing = draw(st.tuples(*[st.floats(0.3, 6)] * 3))
    origin = draw(st.tuples(*[st.floats(-200, 200)] * 3))
    matrix = draw(directions())
    rows = tuple(tuple(float(v) for v in row) for row in matrix)
    return Grid(shape, spacing, origin, rows)


@st.composite
def cases(draw) -> tuple[Image, Image]:
    """An image whose border is zero on some sides, and a label inside of what is not zero."""
    grid = draw(grids())
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    array = rng.integers(1, 100, (1, *grid.shape)).astype(np.float32)
    label = rng.integers(0, 2, (1, *grid.shape)).astype(np.int16)
    box = []
    for size in grid.shape:
        start = draw(st.integers(0, size - 1))
        box.append(slice(start, draw(st.integers(start + 1, size))))
    outside = np.ones(grid.shape, dtype=bool)
    outside[tuple(box)] = False
    array[0][outside] = 0
    label[0][outside] = 0
    return Image(array, grid), Image(label, grid)


ORDERS = st.permutations(range(3)).map(tuple)
SPACINGS = st.tuples(*[st.floats(0.4, 5)] * 3)


@settings(max_examples=50, deadline=None)
@given(cases(), ORDERS)
def test_without_resampling_labels_come_back_bit_by_bit(case, order):
    image, label = case
    geometry = find_geometry(image, preprocessing(axis_order=order))
    there = preprocess_case(image, label, preprocessing(geometry.cropped.spacing, order), LABELS)
    assert there.geometry.network_shape == there.geometry.cropped.shape
    back = restore_label(there.label[0], there.geometry)
    assert back.grid == label.grid
    np.testing.assert_array_equal(back.array, label.array)
    np.testing.assert_array_equal(place(there.image, there.geometry, 0), image.array)


@settings(max_examples=50, deadline=None)
@given(cases(), ORDERS, SPACINGS)
def test_any_spacing_and_orientation_comes_back_on_the_original_grid(case, order, spacing):
    image, label = case
    there = preprocess_case(image, label, preprocessing(spacing, order), LABELS)
    geometry = there.geometry
    assert there.image.shape == (1, *geometry.network_shape) and there.image.dtype == np.float32
    assert there.label.shape == (1, *geometry.network_shape) and there.label.dtype == np.int16
    assert geometry.network.shape == geometry.network_shape
    back = restore_label(there.label[0], geometry)
    assert back.grid == image.grid and back.array.shape == (1, *image.shape)
    assert set(np.unique(back.array)) <= {0, 1}
    everywhere = restore_label(np.ones(geometry.network_shape, np.int16), geometry).array[0]
    np.testing.assert_array_equal(everywhere == 1, place(np.ones((1, *geometry.cropped.shape)), geometry, 0)[0] == 1)
    assert (everywhere[image.array[0] != 0] == 1).all(), "the crop loses nothing that is not zero"


@settings(max_examples=50, deadline=None)
@given(cases(), ORDERS)
def test_every_voxel_keeps_its_place_in_the_world(case, order):
    image, label = case
    settings_ = preprocessing(find_geometry(image, preprocessing(axis_order=order)).cropped.spacing, order)
    there = preprocess_case(image, label, settings_, LABELS)
    network = there.geometry.network
    voxels = np.argwhere(np.ones(network.shape))
    world = voxels_to_world(network, voxels)
    original = np.argwhere(np.ones(image.shape))
    values = {tuple(np.round(p, 3)): i for i, p in enumerate(voxels_to_world(image.grid, original))}
    for voxel, point in list(zip(voxels, world, strict=True))[:: max(1, len(voxels) // 20)]:
        near = [values[key] for key in _around(point) if key in values]
        assert near, "no voxel of the file lies where the network's voxel lies"
        assert any(image.array[0][tuple(original[i])] == there.image[0][tuple(voxel)] for i in near)
        assert any(label.array[0][tuple(original[i])] == there.label[0][tuple(voxel)] for i in near)


def _around(point: np.ndarray) -> set[tuple[float, ...]]:
    """Rounded coordinates of a point, with those that rounding may have missed."""
    return {tuple(np.round(point + np.array([a, b, c]) * 2e-4, 3)) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)}


@settings(max_examples=50, deadline=None)
@given(grids(), SPACINGS)
def test_the_network_sees_the_same_extent(grid, spacing):
    image = Image(np.ones((1, *grid.shape), np.float32), grid)
    geometry = find_geometry(image, preprocessing(spacing))
    for corner in (-0.5, 0.5):
        faces = [
            np.array([[corner if corner < 0 else n - 0.5 for n in g.shape]])
            for g in (geometry.cropped, geometry.network)
        ]
        before, after = (
            voxels_to_world(g, f) for g, f in zip((geometry.cropped, geometry.network), faces, strict=True)
        )
        np.testing.assert_allclose(before, after, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(cases(), ORDERS, SPACINGS)
def test_the_geometry_survives_json(case, order, spacing):
    geometry = find_geometry(case[0], preprocessing(spacing, order))
    content = json.loads(json.dumps(geometry.to_json()))
    assert CaseGeometry.from_json(content, where="x.json") == geometry


def test_broken_json_of_a_geometry_is_refused_naming_the_file():
    with pytest.raises(StorageError, match="x.json.*missing"):
        CaseGeometry.from_json({"original": {"shape": [1, 2, 3]}}, where="x.json")


def test_axis_order_puts_the_named_canonical_axis_first():
    # canonical z, y, x are array axes 2, 0, 1 here
    direction = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    grid = Grid((4, 5, 6), (1.0, 2.0, 3.0), direction=direction)
    image = Image(np.ones((1, 4, 5, 6), np.float32), grid)
    assert find_geometry(image, preprocessing((3.0, 1.0, 2.0))).network_shape == (6, 4, 5)
    assert find_geometry(image, preprocessing((1.0, 2.0, 3.0), (1, 2, 0))).network_shape == (4, 5, 6)


def test_slices_are_left_as_they_are_for_2d():
    grid = Grid((7, 10, 10), (8.0, 1.0, 1.0))
    image = Image(np.random.default_rng(0).normal(size=(1, 7, 10, 10)).astype(np.float32), grid)
    there = preprocess_case(image, None, preprocessing((None, 0.5, 0.5)), None)
    assert there.image.shape == (1, 7, 20, 20) and there.label is None
    alone = preprocess_case(
        Image(image.array[:, 3:4], Grid((1, 10, 10), (8.0, 1.0, 1.0))), None, preprocessing((None, 0.5, 0.5)), None
    )
    # each slice by itself, but for the range that it is clipped to
    inside = (alone.image[0, 0] > alone.image.min()) & (alone.image[0, 0] < alone.image.max())
    assert inside.mean() > 0.9
    np.testing.assert_allclose(there.image[0, 3][inside], alone.image[0, 0][inside], atol=1e-5)


def test_a_plane_stays_a_plane():
    grid = Grid((1, 9, 8), dimensions=2)
    image = Image(np.ones((3, 1, 9, 8), np.uint8), grid)
    there = preprocess_case(image, None, preprocessing((None, 1.0, 1.0), channels=3), None)
    assert there.image.shape == (3, 1, 9, 8)
    assert restore_label(np.zeros((1, 9, 8), np.uint8), there.geometry).grid == grid


def test_intensities_are_normalised_before_they_are_resampled():
    array = np.zeros((1, 4, 4, 4), np.float32)
    array[0, 2:] = 1000
    how = Normalization("ct", mean=0, std=1, lower=0, upper=10)
    there = preprocess_case(
        Image(array, Grid((4, 4, 4))), None, PreprocessingSettings((0.5, 0.5, 0.5), (0, 1, 2), (how,), False), None
    )
    middle = there.image[0, 3, 0, 0]  # clipped first: about a quarter of the way from 0 to 10
    assert 1 < middle < 4


def test_the_crop_is_shared_by_all_channels():
    array = np.zeros((2, 5, 6, 7), np.float32)
    array[0, 1, 2, 3] = 1
    array[1, 3, 4, 5] = 1
    geometry = find_geometry(Image(array, Grid((5, 6, 7))), preprocessing(channels=2))
    assert geometry.crop == ((1, 4), (2, 5), (3, 6))
    kept = find_geometry(Image(array, Grid((5, 6, 7))), preprocessing(channels=2, crop_to_nonzero=False))
    assert kept.network_shape == (5, 6, 7)


def test_an_image_of_zeros_is_not_cropped_away():
    image = Image(np.zeros((1, 4, 5, 6), np.float32), Grid((4, 5, 6)))
    assert preprocess_case(image, None, preprocessing(), None).image.shape == (1, 4, 5, 6)


def test_masked_zscore_counts_zeros_inside_the_brain_to_it():
    array = np.random.default_rng(0).normal(100, 10, (1, 9, 9, 9)).astype(np.float32)
    array[0, 4, 4, 4] = 0  # a ventricle
    array[0, :2] = array[0, :, :2] = 0  # outside, but not all of a face
    array[0, 0, 8, 8] = 50
    how = Normalization("masked_zscore")
    there = preprocess_case(
        Image(array, Grid((9, 9, 9))), None, PreprocessingSettings((1, 1, 1), (0, 1, 2), (how,)), None
    )
    assert there.image.shape == (1, 9, 7, 9)  # rows 0 and 1 are empty throughout
    assert there.image[0, 4, 2, 4] < -3
    assert there.image[0, 0, 0, 0] == 0


def test_a_label_is_brought_to_the_grid_of_its_case():
    grid = Grid((6, 6, 6), (2.0, 1.0, 1.0), direction=((-1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)))
    image = Image(np.ones((1, 6, 6, 6), np.float32), grid)
    label = Image(np.zeros((1, 6, 6, 6), np.uint8), grid)
    label.array[0, :2] = 3
    geometry = find_geometry(image, preprocessing())
    brought = bring_label(label, geometry)
    assert brought.shape == (1, 12, 6, 6)
    assert (brought[0, 8:] == 3).all() and (brought[0, :8] == 0).all()


def test_what_does_not_fit_is_refused_in_a_sentence():
    image = Image(np.ones((2, 4, 4, 4), np.float32), Grid((4, 4, 4)))
    with pytest.raises(DatasetError, match="2 channels, the plan expects 1"):
        preprocess_case(image, None, preprocessing(), None)
    other = Image(np.ones((1, 4, 4, 5), np.int16), Grid((4, 4, 5)))
    with pytest.raises(DatasetError, match="label's shape"):
        preprocess_case(image, other, preprocessing(channels=2), LABELS)


# ---- finer grids


SCALES = st.tuples(*[st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0]), st.floats(1, 6))] * 3)


@settings(max_examples=80, deadline=None)
@given(cases(), ORDERS, SPACINGS, SCALES)
def test_a_fine_geometry_refines_the_file_exactly_and_the_network_nearly_so(case, order, spacing, scale):
    geometry = find_geometry(case[0], preprocessing(spacing, order))
    fine = fine_geometry(geometry, scale)
    factor = [scale[geometry.permutation.index(axis)] for axis in range(3)]
    np.testing.assert_allclose(np.asarray(fine.original.spacing) * factor, geometry.original.spacing, rtol=1e-12)
    np.testing.assert_allclose(outer_faces(fine.original)[0], outer_faces(geometry.original)[0], atol=1e-7)
    assert fine.network.shape == fine.network_shape
    for axis in range(3):
        start, stop = fine.crop[axis]
        assert 0 <= start < stop <= fine.turned.shape[axis]
        planned = geometry.network.spacing[axis] / scale[axis]
        assert fine.network_shape[axis] == 1 or fine.network.spacing[axis] >= planned * (1 - 1e-6)
        assert fine.network.spacing[axis] < 2 * planned or fine.network_shape[axis] == 1
    # the same piece of the world, but for the rounding of the box
    for before, after in zip(outer_faces(geometry.cropped), outer_faces(fine.cropped), strict=True):
        apart = np.linalg.solve(np.asarray(fine.turned.direction), np.subtract(after, before))
        assert (np.abs(apart) <= np.asarray(fine.turned.spacing) * 0.5 + 1e-6).all()


@settings(max_examples=80, deadline=None)
@given(cases(), ORDERS, SPACINGS, st.tuples(*[st.integers(1, 4)] * 3))
def test_with_whole_scales_every_voxel_is_split_where_it_is(case, order, spacing, scale):
    geometry = find_geometry(case[0], preprocessing(spacing, order))
    fine = fine_geometry(geometry, tuple(float(s) for s in scale))
    assert fine.network_shape == tuple(n * s for n, s in zip(geometry.network_shape, scale, strict=True))
    voxels = np.argwhere(np.ones(fine.network_shape))
    inside = (voxels + 0.5) / scale - 0.5  # in voxels of the network's input
    np.testing.assert_allclose(
        voxels_to_world(fine.network, voxels), voxels_to_world(geometry.network, inside), atol=1e-6
    )
    # a label painted there lies in the file's voxels that its coarse voxels came from
    coarse = np.zeros(geometry.network_shape, np.uint8)
    coarse[0] = 1
    painted = restore_label(np.repeat(np.repeat(np.repeat(coarse, scale[0], 0), scale[1], 1), scale[2], 2), fine)
    if geometry.network_shape == geometry.cropped.shape:
        blocks = restore_label(coarse, geometry).array[0]
        for axis in range(3):
            blocks = blocks.repeat(scale[geometry.permutation.index(axis)], axis)
        np.testing.assert_array_equal(painted.array[0], blocks)
    assert painted.grid == fine.original


@settings(max_examples=30, deadline=None)
@given(cases(), ORDERS, SPACINGS)
def test_a_scale_of_one_changes_nothing(case, order, spacing):
    geometry = find_geometry(case[0], preprocessing(spacing, order))
    assert fine_geometry(geometry, (1.0, 1.0, 1.0)) == geometry


@settings(max_examples=60, deadline=None)
@given(cases(), ORDERS, st.tuples(*[st.integers(1, 4)] * 3))
def test_a_label_on_a_finer_grid_of_its_own_is_brought_where_it_was(case, order, factor):
    image, coarse = case
    spacing = find_geometry(image, preprocessing(axis_order=order)).cropped.spacing
    array = coarse.array
    for axis in range(3):
        array = array.repeat(factor[axis], axis + 1)
    label = Image(array, refine_grid(image.grid, factor))
    geometry = find_geometry(image, preprocessing(spacing, order))
    scale = tuple(float(factor[axis]) for axis in geometry.permutation)
    there = preprocess_case(image, label, preprocessing(spacing, order, label_scale=scale), LABELS)
    assert there.image.shape == (1, *geometry.network_shape)
    assert there.label.shape == (1, *(round(n * s) for n, s in zip(geometry.network_shape, scale, strict=True)))
    back = restore_label(there.label[0], there.label_geometry)
    assert back.grid == label.grid
    np.testing.assert_array_equal(back.array, label.array)
    on_image = preprocess_case(image, label, preprocessing(spacing, order), LABELS)
    assert on_image.label.shape == on_image.image.shape, "without a label scale it comes to the image's grid"


@settings(max_examples=40, deadline=None)
@given(cases(), ORDERS, st.tuples(*[st.integers(0, 9)] * 3))
def test_the_border_is_cut_where_voxels_of_both_grids_meet(case, order, more):
    image, _ = case
    shape = tuple(n + m for n, m in zip(image.shape, more, strict=True))
    spacing = [s * n / m for s, n, m in zip(image.grid.spacing, image.shape, shape, strict=True)]
    shifted = voxels_to_world(
        image.grid, np.array([[(n / m - 1) / 2 for n, m in zip(image.shape, shape, strict=True)]])
    )
    grid = Grid(shape, tuple(spacing), tuple(shifted[0]), image.grid.direction)
    label = Image(np.ones((1, *shape), np.int16), grid)
    geometry = find_geometry(image, preprocessing(axis_order=order), label)
    own = find_label_geometry(label, geometry)
    for face, own_face in zip(outer_faces(geometry.cropped), outer_faces(own.cropped), strict=True):
        np.testing.assert_allclose(face, own_face, atol=1e-6)
    tight = find_geometry(image, preprocessing(axis_order=order)).crop
    assert all(a <= b and c >= d for (a, c), (b, d) in zip(geometry.crop, tight, strict=True))


@pytest.mark.parametrize("scheme", ["ct", "zscore", "none", "rescale", "rgb"])
def test_the_units_of_a_channel_undo_its_normalisation(scheme):
    array = np.random.default_rng(0).uniform(20, 90, (1, 5, 6, 7)).astype(np.float32)
    array[:, 0] = 0  # is cut away
    how = Normalization(scheme, mean=50, std=20, lower=0, upper=100)
    settings_ = PreprocessingSettings((1, 1, 1), (0, 1, 2), (how,))
    image = Image(array, Grid((5, 6, 7)))
    there = preprocess_case(image, None, settings_, None)
    ((offset, factor),) = find_units(image, there.geometry, settings_)
    np.testing.assert_allclose(offset + factor * there.image, array[:, 1:], rtol=1e-5)


@pytest.mark.parametrize("scheme", ["masked_zscore", "n4+zscore"])
def test_what_cannot_be_undone_has_no_units(scheme):
    image = Image(np.ones((1, 4, 4, 4), np.float32), Grid((4, 4, 4)))
    settings_ = PreprocessingSettings((1, 1, 1), (0, 1, 2), (Normalization(scheme),))
    assert find_units(image, find_geometry(image, settings_), settings_) == (None,)
