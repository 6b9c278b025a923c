"""Spacing and shape -> patch, strides, kernels: nnU-Net's published examples, and what holds for any grid."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.experiment_planning.topology import (
    MIN_BOTTLENECK,
    Topology,
    coarser,
    coarsest_first,
    first_patch,
    plan_topology,
    resampled_shape,
    shrink,
)

spacings = st.floats(0.2, 10.0, allow_nan=False)
lengths = st.integers(1, 400)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[float, ...], tuple[int, ...]]:
    dimensions = draw(st.sampled_from([2, 3]))
    return (
        tuple(draw(spacings) for _ in range(dimensions)),
        tuple(draw(lengths) for _ in range(dimensions)),
    )


# what nnU-Net 2.8.1 plans (stages, axes that are not pooled everywhere, stages with flat kernels)
@pytest.mark.parametrize(
    ("spacing", "patch", "divisor", "stages", "flat_kernels"),
    [
        ((1.0, 1.0, 1.0), (128, 128, 128), (32, 32, 32), 6, 0),
        ((1.37, 1.25, 1.25), (64, 192, 192), (16, 32, 32), 6, 0),
        ((3.6, 0.62, 0.62), (20, 320, 256), (4, 64, 64), 7, 2),
        ((10.0, 1.56, 1.56), (10, 256, 224), (2, 32, 32), 6, 2),
        ((2.5, 0.8, 0.8), (40, 224, 224), (8, 32, 32), 6, 1),
        ((2.5, 0.8, 0.8), (56, 320, 320), (8, 64, 64), 7, 1),
        ((1.0, 1.0, 1.0), (40, 56, 40), (8, 8, 8), 4, 0),
        ((1.0, 1.0), (640, 640), (128, 128), 8, 0),
    ],
)
def test_well_known_grids_get_nnunets_strides_and_kernels(spacing, patch, divisor, stages, flat_kernels):
    topology = plan_topology(spacing, patch)
    assert topology.patch == patch
    assert topology.divisor == divisor
    assert topology.stages == stages
    assert sum(kernel[0] == 1 for kernel in topology.kernels) == flat_kernels


@settings(max_examples=200, deadline=None)
@given(grids())
def test_any_grid_gets_a_patch_that_divides_and_keeps_four_voxels(grid):
    spacing, shape = grid
    topology = plan_topology(spacing, shape)
    assert all(p % d == 0 for p, d in zip(topology.patch, topology.divisor, strict=True))
    assert all(p >= n for p, n in zip(topology.patch, shape, strict=True))
    for p, d in zip(topology.patch, topology.divisor, strict=True):
        assert d == 1 or p // d >= MIN_BOTTLENECK
    assert set(topology.strides[0]) == {1}
    assert all(stride in (1, 2) for strides in topology.strides for stride in strides)
    assert len(topology.kernels) == len(topology.strides)


@settings(max_examples=200, deadline=None)
@given(grids())
def test_kernels_are_flat_along_an_axis_only_until_its_spacing_is_even(grid):
    spacing, shape = grid
    topology = plan_topology(spacing, shape)
    current = list(spacing)
    wide = [False] * len(spacing)
    for strides, kernels in zip(topology.strides[:-1], topology.kernels[:-1], strict=True):
        current = [s * stride for s, stride in zip(current, strides, strict=True)]
        wide = [w or s < 2 * min(current) for w, s in zip(wide, current, strict=True)]
        assert kernels == tuple(3 if w else 1 for w in wide)
    assert set(topology.kernels[-1]) == {3}, "the bottleneck sees along every axis"


@settings(max_examples=100, deadline=None)
@given(grids())
def test_shrinking_ends_and_every_step_is_smaller_and_sound(grid):
    spacing, shape = grid
    topology: Topology | None = plan_topology(spacing, first_patch(spacing, shape))
    steps = 0
    while topology is not None:
        smaller = shrink(topology, spacing, shape)
        if smaller is not None:
            assert math.prod(smaller.patch) < math.prod(topology.patch)
            assert all(p % d == 0 for p, d in zip(smaller.patch, smaller.divisor, strict=True))
        topology = smaller
        steps += 1
        assert steps < 2000


@settings(max_examples=100, deadline=None)
@given(grids())
def test_the_first_patch_is_never_longer_than_an_image_of_four_voxels_or_more(grid):
    spacing, shape = grid
    assert all(1 <= p <= max(n, 4) for p, n in zip(first_patch(spacing, shape), shape, strict=True))


@pytest.mark.parametrize("slices", range(1, 8))
def test_fewer_than_eight_slices_are_not_pooled(slices):
    topology = plan_topology((8.0, 1.25, 1.25), (slices, 256, 256))
    assert topology.divisor[0] == 1
    assert topology.patch[0] == slices


def test_thick_slices_get_kernels_in_the_plane_until_spacing_is_even():
    topology = plan_topology((5.0, 1.0, 1.0), (16, 128, 128))
    # in the plane 1, 2, 4 mm: from 4 mm on the 5 mm slices are within a factor 2
    assert topology.kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert topology.strides[:4] == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))


def test_the_first_patch_is_isotropic_in_millimetres():
    assert first_patch((4.0, 1.0, 1.0), (1000, 1000, 1000)) == (102, 406, 406)


def test_the_relatively_longest_axis_loses_a_step_first():
    topology = plan_topology((1.0, 1.0, 1.0), (128, 128, 128))
    smaller = shrink(topology, (1.0, 1.0, 1.0), (138, 170, 128))
    assert smaller is not None and smaller.patch == (128, 128, 112)


@pytest.mark.parametrize(
    ("spacing", "shape", "order"),
    [
        ((1.0, 1.0, 1.0), (30, 30, 30), (0, 1, 2)),
        ((1.0, 5.0, 1.0), (30, 30, 30), (1, 0, 2)),
        ((0.5, 0.5, 3.0), (30, 30, 30), (2, 0, 1)),
        ((1.0, 1.0, 9.0), (1, 30, 30), (0, 1, 2)),  # a plane
        ((1.0, 1.0, 9.0), (30, 30, 1), (2, 0, 1)),  # a sagittal plane
    ],
)
def test_the_coarsest_axis_or_a_planes_only_slice_comes_first(spacing, shape, order):
    assert coarsest_first(spacing, shape) == order


def test_a_low_resolution_coarsens_the_fine_axes_first():
    spacing = (3.0, 1.0, 1.0)
    assert coarser(spacing) == (3.0, 1.03, 1.03)
    assert coarser((1.5, 1.0, 1.0)) == (1.5 * 1.03, 1.03, 1.03)


def test_a_resampled_shape_keeps_the_extent():
    assert resampled_shape((10, 100, 100), (5.0, 1.0, 1.0), (2.5, 2.0, 1.0)) == (20, 50, 100)
    assert resampled_shape((1, 4, 4), (1.0, 1.0, 1.0), (50.0, 50.0, 50.0)) == (1, 1, 1)
