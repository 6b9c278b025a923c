"""Sliding window: exact where tiles overlap, sees every voxel, skips nothing that matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoseg.inference.sliding_window import (
    empty_logits,
    mirror_flips,
    mirrored_grid,
    sliding_window_logits,
    tile_axis,
)
from autoseg.networks.upsampling import HEADS, OutputGrid, interpolate


class Pointwise(nn.Module):
    """Two logits from each voxel alone, so every tiling must give the same answer; notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.shapes.append(tuple(x.shape))
        return [torch.cat((2 * x[:, :1] + 1, -x[:, :1]), dim=1)]


@given(
    length=st.integers(1, 300),
    patch_units=st.integers(1, 12),
    divisor=st.sampled_from([1, 2, 4, 8, 16]),
    step=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    stretch=st.sampled_from([1.0, 1.25]),
)
@settings(deadline=None)
def test_tiles_cover_the_axis_and_their_shares_sum_to_one(length, patch_units, divisor, step, stretch):
    patch = patch_units * divisor
    axis = tile_axis(length, patch=patch, divisor=divisor, step=step, stretch=stretch)
    padded = length + sum(axis.padding)
    total = torch.zeros(length)
    for tile, (side, share) in enumerate(zip(axis.outputs, axis.weights, strict=True)):
        total[side] += share
        seen = axis.seen(tile)
        assert 0 <= seen.start < seen.stop <= axis.size and axis.starts[tile] + axis.size <= padded
    assert torch.allclose(total, torch.ones(length), atol=1e-5)
    assert axis.size % divisor == 0 and axis.size <= max(patch * stretch, divisor)
    assert max(np.diff(axis.starts), default=0) <= max(1, axis.size * step) + 1
    assert min(axis.padding) >= 0 and (sum(axis.padding) < max(divisor, 2) or padded == axis.size)


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    batch=st.integers(1, 9),
    mirror_axes=st.sets(st.integers(0, 2)),
    max_ram=st.sampled_from([2**30, 2**14, 1]),
)
@settings(deadline=None, max_examples=40)
def test_any_tiling_of_a_pointwise_network_gives_the_pointwise_answer(shape, batch, mirror_axes, max_ram):
    image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    logits = sliding_window_logits(
        Pointwise(),
        image,
        patch_size=(8, 4, 8),
        divisor=(4, 2, 4),
        mirror_axes=tuple(mirror_axes),
        batch_size=batch,
        max_ram_bytes=max_ram,
    )
    assert torch.allclose(logits.float(), torch.cat((2 * image + 1, -image)), atol=2e-2)


def test_two_dimensional_patches_pass_slices_as_a_batch():
    network = Pointwise()
    sliding_window_logits(
        network, torch.randn(1, 6, 9, 7), patch_size=(1, 16, 16), divisor=(1, 8, 8), mirror_axes=(1, 2), batch_size=12
    )
    assert network.shapes == [(12, 1, 1, 16, 8)] * 2


def test_an_image_smaller_than_the_patch_is_padded_to_the_divisor_only():
    network = Pointwise()
    sliding_window_logits(network, torch.randn(1, 9, 9, 9), patch_size=(32, 32, 32), divisor=(4, 8, 16), mirror_axes=())
    assert network.shapes == [(1, 1, 12, 16, 16)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 8, 8)])
def test_an_image_no_larger_than_the_divisor_is_padded_to_the_patch_so_that_it_can_be_normalised(shape):
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.AvgPool3d((4, 8, 8)), nn.InstanceNorm3d(2), nn.Upsample((8, 16, 16)))
    logits = sliding_window_logits(network, torch.randn(1, *shape), patch_size=(8, 16, 16), divisor=(4, 8, 8))
    assert logits.shape == (2, *shape)


def test_mirrored_copies_are_turned_back_and_averaged():
    def coordinate(x: torch.Tensor) -> torch.Tensor:  # answers with the position along x, whatever it sees
        return torch.arange(x.shape[-1], dtype=torch.float32).expand(len(x), 1, *x.shape[2:])

    logits = sliding_window_logits(coordinate, torch.randn(1, 2, 2, 8), patch_size=(2, 2, 8), mirror_axes=(2,))
    assert torch.allclose(logits, torch.full((1, 2, 2, 8), 3.5))
    assert mirror_flips((0, 2)) == [(), (2,), (4,), (2, 4)]


@pytest.mark.parametrize("max_ram", [2**30, 1])
def test_constant_tiles_are_computed_once_and_exactly(max_ram):
    calls = []

    def padded_convolution(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return nn.functional.conv3d(x, torch.ones(1, 1, 3, 3, 3), padding=1)

    image = torch.zeros(1, 4, 4, 64)
    image[..., 56:] = torch.randn(4, 4, 8)
    options = {"patch_size": (4, 4, 8), "step_size": 0.5, "batch_size": 1, "max_ram_bytes": max_ram}
    skipped = sliding_window_logits(padded_convolution, image, **options)
    assert len(calls) == 3  # thirteen empty tiles share one call, two see the end
    image_without_constant_tiles = image.clone()
    image_without_constant_tiles[..., ::4] += 1e-12
    whole = sliding_window_logits(padded_convolution, image_without_constant_tiles, **options)
    assert torch.allclose(whole.float(), skipped.float(), atol=1e-5) and len(calls) == 3 + 15


def test_the_middle_of_a_tile_counts_more_than_its_border():
    order = iter(range(10))

    def number_of_the_tile(x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), 1, *x.shape[2:]), float(next(order)))

    logits = sliding_window_logits(number_of_the_tile, torch.randn(1, 1, 1, 12), patch_size=(1, 1, 8), step_size=0.5)
    assert logits[0, 0, 0, 0] == 0 and logits[0, 0, 0, -1] == 1
    assert logits[0, 0, 0, 4] < 0.1 and logits[0, 0, 0, 7] > 0.9


@pytest.mark.parametrize(("max_ram", "dtype"), [(2**20, torch.float32), (2**13, torch.float16), (2**10, torch.float16)])
def test_logits_shrink_and_go_to_disk_as_memory_gets_short(max_ram, dtype):
    room = empty_logits((2, 4, 8, 8), max_ram_bytes=max_ram)
    room[:] = 1.5
    assert room.dtype == dtype and room.shape == (2, 4, 8, 8) and bool((room == 1.5).all())


# ---- a halo of slices


class MiddleSlices(nn.Module):
    """What a network of 2.5D does: each slice is answered by the sum of those around it."""

    def __init__(self, halo: int) -> None:
        super().__init__()
        self.halo = halo
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.shapes.append(tuple(x.shape))
        return [x.unfold(2, 2 * self.halo + 1, 1).sum(-1)]


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    halo=st.integers(0, 3),
    patch=st.sampled_from([(1, 4, 8), (2, 4, 4), (4, 4, 4)]),
    mirror_axes=st.sets(st.integers(0, 2)),
    batch=st.integers(1, 5),
)
@settings(deadline=None, max_examples=40)
def test_tiles_see_a_halo_of_slices_and_beyond_the_image_its_outermost_one(shape, halo, patch, mirror_axes, batch):
    image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    network = MiddleSlices(halo)
    logits = sliding_window_logits(
        network, image, patch_size=patch, halo=halo, mirror_axes=tuple(mirror_axes), batch_size=batch
    )
    edges = [image[:, :1]] * halo, [image[:, -1:]] * halo
    expected = torch.cat([*edges[0], image, *edges[1]], dim=1).unfold(1, 2 * halo + 1, 1).sum(-1)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert all(size[2] == network.shapes[0][2] for size in network.shapes)


# ---- a finer output grid


class Interpolating(nn.Module):
    """Answers on the grid that is asked for with the interpolated image and twice of it."""

    def __init__(self) -> None:
        super().__init__()
        self.grids: list[OutputGrid] = []
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor, grid: OutputGrid) -> list[torch.Tensor]:
        self.grids.append(grid)
        self.shapes.append(tuple(x.shape))
        fine = interpolate(x, grid)
        return [torch.cat((fine, 2 * fine), dim=1), x]


OUTPUTS = st.tuples(st.floats(1, 5), st.integers(0, 6), st.floats(-2, 2))  # scale, voxels more or less, start


@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 14)),
    outputs=st.tuples(OUTPUTS, OUTPUTS, OUTPUTS),
    divisor=st.sampled_from([(1, 1, 1), (2, 2, 4)]),
    mirror_axes=st.sets(st.integers(0, 2)),
    batch=st.integers(1, 6),
    max_ram=st.sampled_from([2**30, 1]),
)
@settings(deadline=None, max_examples=60)
def test_seams_are_not_seen_an_interpolation_gives_the_same_in_any_tiles(
    shape, outputs, divisor, mirror_axes, batch, max_ram
):
    image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    asked = tuple(max(1, round(n * scale) + more - 3) for n, (scale, more, _) in zip(shape, outputs, strict=True))
    grid = OutputGrid(asked, tuple(o[0] for o in outputs), tuple(o[2] for o in outputs))
    tiled = sliding_window_logits(
        Interpolating(),
        image,
        patch_size=(4, 6, 4),
        divisor=divisor,
        grid=grid,
        mirror_axes=tuple(mirror_axes),
        batch_size=batch,
        max_ram_bytes=max_ram,
    )
    axes = [tile_axis(n, patch=p, divisor=d) for n, p, d in zip(shape, (4, 6, 4), divisor, strict=True)]
    if tuple(axis.size for axis in axes) == divisor:  # padded to the patch
        axes = [tile_axis(n, patch=p, divisor=p) for n, p in zip(shape, (4, 6, 4), strict=True)]
    padded = nn.functional.pad(image, [width for axis in reversed(axes) for width in axis.padding])
    start = tuple(o[2] + axis.padding[0] * o[0] for o, axis in zip(outputs, axes, strict=True))
    whole = interpolate(padded[None], OutputGrid(asked, grid.scale, start))[0]
    assert tiled.shape == (2, *asked)
    assert torch.allclose(tiled.float(), torch.cat((whole, 2 * whole)), atol=1e-4 if max_ram > 1 else 2e-2)


@pytest.mark.parametrize("head", ["subpixel", "filters"])
@pytest.mark.parametrize("scale", [(4.0, 1.0, 1.0), (2.5, 1.0, 2.0)])
def test_seams_are_not_seen_in_what_an_up_head_adds_either(head, scale):
    torch.manual_seed(0)
    up = HEADS[head](1, 1, scale=scale, dimensions=3).eval()
    for name, weight in up.named_parameters():
        torch.nn.init.normal_(weight)
        if weight.ndim == 5 and name.startswith(("last", "first")):  # each voxel by itself, so that tiles must agree
            middle = tuple(n // 2 for n in weight.shape[2:])
            kept = weight.data[(..., *middle)].clone()
            weight.data.zero_()[(..., *middle)] = kept

    def network(x: torch.Tensor, grid: OutputGrid) -> list[torch.Tensor]:
        return [interpolate(x, grid) + up(x, grid)]

    image = torch.randn((1, 16, 12, 8))
    grid = OutputGrid.of((16, 12, 8), scale)
    tiled = sliding_window_logits(network, image, patch_size=(8, 6, 4), grid=grid, stretch=1.0)
    whole = sliding_window_logits(network, image, patch_size=(16, 12, 8), grid=grid)
    added = whole - interpolate(image[None], grid)[0]
    assert added.std() > 0.1 and tiled.shape == whole.shape == (1, *grid.shape)
    assert (tiled - whole).abs().max() < 0.02 * added.abs().max()


@given(
    length=st.integers(1, 60),
    patch=st.integers(1, 16),
    step=st.sampled_from([0.25, 0.5, 1.0]),
    scale=st.floats(1, 6),
    start=st.floats(-4, 4),
    more=st.integers(-6, 6),
)
@settings(deadline=None)
def test_every_output_voxel_has_shares_that_sum_to_one_and_tiles_that_hold_it(length, patch, step, scale, start, more):
    voxels = max(1, round(length * scale) + more)
    axis = tile_axis(length, patch=patch, step=step, asked=(voxels, scale, start))
    total = torch.zeros(voxels)
    for tile, (side, share) in enumerate(zip(axis.outputs, axis.weights, strict=True)):
        total[side] += share
        asked, same_scale, first = axis.grid(tile)
        assert (asked, same_scale) == (side.stop - side.start, scale)
        places = (first + np.arange(asked) + 0.5) / scale  # from the tile's outer face
        low = -np.inf if tile == 0 else -1e-5
        high = np.inf if tile == len(axis.starts) - 1 else axis.size + 1e-5
        assert ((places >= low) & (places <= high)).all()
        in_image = places + axis.starts[tile] - axis.padding[0]
        np.testing.assert_allclose(in_image, (start + np.arange(side.start, side.stop) + 0.5) / scale, atol=1e-5)
    assert torch.allclose(total, torch.ones(voxels), atol=1e-5)


def test_tiles_are_as_large_as_without_super_resolution_and_share_one_grid():
    network = Interpolating()
    image = torch.randn(1, 8, 12, 12)
    grid = OutputGrid((32, 12, 12), (4.0, 1.0, 1.0))
    sliding_window_logits(network, image, patch_size=(4, 12, 12), grid=grid, mirror_axes=(1, 2), batch_size=16)
    assert network.shapes == [(12, 1, 4, 12, 12)]  # three tiles and their mirrored copies at once
    assert set(network.grids) == {OutputGrid((16, 12, 12), (4.0, 1.0, 1.0))}


def test_outside_of_the_image_a_super_resolving_network_sees_zeros_as_it_did_in_training():
    seen = []

    class Noting(Interpolating):
        def forward(self, x: torch.Tensor, grid: OutputGrid) -> list[torch.Tensor]:
            seen.append(x)
            return super().forward(x, grid)

    image = torch.full((1, 5, 5, 5), 7.0)
    grid = OutputGrid((10, 5, 5), (2.0, 1.0, 1.0))
    logits = sliding_window_logits(Noting(), image, patch_size=(8, 8, 8), divisor=(8, 8, 8), grid=grid)
    assert torch.allclose(logits[0, 1:-1], torch.full((8, 5, 5), 7.0))
    (tile,) = seen
    assert bool((tile[0, 0, 1:6, 1:6, 1:6] == 7).all()) and tile.sum() == 7 * 5 * 5 * 5


@given(n=st.integers(1, 9), voxels=st.integers(1, 20), scale=st.floats(1, 4), start=st.floats(-2, 2), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_mirrored_grid_asks_for_the_same_places_of_the_mirrored_input(n, voxels, scale, start, data):
    grid = OutputGrid((voxels, 1, 1), (scale, 1.0, 1.0), (start, 0.0, 0.0))
    mirrored = mirrored_grid(grid, (n, 1, 1), [0])
    image = torch.randn((1, 1, n, 1, 1), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    there = interpolate(image.flip(2), mirrored).flip(2)
    assert torch.allclose(there, interpolate(image, grid), atol=1e-4)
    assert mirrored_grid(grid, (n, 1, 1), []) == grid


def test_constant_tiles_are_kept_apart_by_the_grid_that_is_asked_for():
    grid = OutputGrid((130, 1, 1), (2.5, 1.0, 1.0), (0.5, 0.0, 0.0))  # tiles of this scale begin between voxels
    network = Interpolating()
    logits = sliding_window_logits(network, torch.ones(1, 52, 1, 1), patch_size=(8, 1, 1), grid=grid)
    assert torch.allclose(logits[0], torch.ones(130, 1, 1))
    assert 2 <= len(network.grids) < 12
