"""Sliding window: exact where tiles overlap, sees every voxel, skips nothing that matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoseg.inference.sliding_window import empty_logits, mirror_flips, sliding_window_logits, tile_axis


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
    total = torch.zeros(padded)
    for start, share in zip(axis.starts, axis.weights, strict=True):
        total[start : start + axis.size] += share
    assert torch.allclose(total, torch.ones(padded), atol=1e-5)
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
