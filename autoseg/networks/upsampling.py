"""Features on the input grid -> logits and image on the output grid: the heads of super-resolving networks.

A head answers with a residual that is added to the interpolated logits and image. Its last layer starts at zero, so
that training starts from interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoseg.acquisition import apply_along, interpolation_matrix, positions
from autoseg.errors import PlanError, unknown_choice
from autoseg.networks.blocks import LEAKY_SLOPE, GridConv
from autoseg.plan import Architecture, Shape, Vector
from autoseg.plan_values import INTERPOLATING

PREDICTOR_WIDTH = 32  # hidden units of the network that predicts filters
LEAST_FILTERS = 4  # that predicted filters are mixed from
ROUNDING = 1e-6  # by which a scale may exceed a whole number and still be one


@dataclass(frozen=True)
class OutputGrid:
    """The voxels that are asked for, relative to the first voxel of the network's input (without its halo).

    Along each axis output voxel j lies at input position (start + j + 0.5) / scale - 0.5, in voxels of the input.
    """

    shape: Shape
    """Output voxels (z, y, x)."""
    scale: Vector
    """Input spacing / output spacing."""
    start: Vector = (0.0, 0.0, 0.0)
    """In output voxels, from the outer face of the input's first voxel to that of the first output voxel."""

    @classmethod
    def of(cls, inputs: Shape, scale: Vector) -> OutputGrid:
        """The grid over the extent of an input of that shape, up to rounding at the far end."""
        z, y, x = (max(1, round(size * factor)) for size, factor in zip(inputs, scale, strict=True))
        return cls((z, y, x), scale)

    def axes(self) -> list[tuple[int, float, float]]:
        """Output voxels, scale and start of each axis."""
        return list(zip(self.shape, self.scale, self.start, strict=True))

    def turned(self, order: Sequence[int]) -> OutputGrid:
        """The same grid of an input whose axis i was axis `order[i]`."""
        shape, scale, start = zip(*(self.axes()[axis] for axis in order), strict=True)
        return OutputGrid(shape, scale, start)

    def without(self, axes: Sequence[int], inputs: Sequence[int]) -> OutputGrid:
        """The grid with these axes left as they are in an input of shape (z, y, x)."""
        entries = [(inputs[i], 1.0, 0.0) if i in axes else entry for i, entry in enumerate(self.axes())]
        shape, scale, start = zip(*entries, strict=True)
        return OutputGrid(shape, scale, start)


def interpolate(x: Tensor, grid: OutputGrid, *, finer: Vector = (1.0, 1.0, 1.0)) -> Tensor:
    """(B, C, Z, Y, X) -> (B, C, *grid.shape), linear along each axis, clamped at the edges, in the type of `x`.

    `finer` says how much finer than the grid's input `x` is. Axes on which `x` already lies on the grid are left.
    """
    for axis, (outputs, scale, start) in enumerate(grid.axes()):
        inputs, relative = x.shape[axis + 2], scale / finer[axis]
        if (outputs, relative, start) != (inputs, 1, 0):
            x = apply_along(x, interpolation_matrix(inputs, outputs, relative, start), axis)
    return x


class UpHead(nn.Module):
    """What every up head has: `head(features, grid)` answers with a residual on the grid."""

    last: GridConv
    """The layer that starts at zero."""

    def __init__(self, features: int, outputs: int, *, scale: Vector, dimensions: int) -> None:
        super().__init__()


class SubpixelHead(UpHead):
    """A convolution to as many channels as the largest scale needs, shuffled into place (Shi et al. 2016), resized."""

    def __init__(self, features: int, outputs: int, *, scale: Vector, dimensions: int) -> None:
        super().__init__(features, outputs, scale=scale, dimensions=dimensions)
        self.factors = _whole(scale)
        self.last = GridConv(features, outputs * math.prod(self.factors), 3, dimensions=dimensions)

    def forward(self, features: Tensor, grid: OutputGrid) -> Tensor:
        """(B, features, Z, Y, X) -> (B, outputs, *grid.shape), float32."""
        z, y, x = self.factors
        fine = self.last(features).unflatten(1, (-1, z, y, x)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        shuffled = fine.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return interpolate(shuffled.float(), grid, finer=(float(z), float(y), float(x)))


class ImplicitHead(UpHead):
    """Features at each output voxel, its sub-voxel offset and the scale -> residual (LIIF, Chen et al. 2021).

    The first layer is linear, so it is taken on the input grid and its answer interpolated.
    """

    def __init__(self, features: int, outputs: int, *, scale: Vector, dimensions: int) -> None:
        super().__init__(features, outputs, scale=scale, dimensions=dimensions)
        self.axes = _upscaled(scale)
        self.first = GridConv(features, features, 3, dimensions=dimensions)
        self.coordinates = nn.ModuleList(nn.Linear(2, features, bias=False) for _ in self.axes)
        self.hidden = GridConv(features, features, 1, dimensions=dimensions)
        self.last = GridConv(features, outputs, 1, dimensions=dimensions)
        self.act = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)

    def forward(self, features: Tensor, grid: OutputGrid) -> Tensor:
        """(B, features, Z, Y, X) -> (B, outputs, *grid.shape), float32."""
        hidden = interpolate(self.first(features), grid)
        for axis, layer in zip(self.axes, self.coordinates, strict=True):
            where, _ = _coordinates(features, grid, axis)
            along = [1, -1, 1, 1, 1]
            along[axis + 2] = len(where)
            hidden = hidden + layer(where).to(hidden.dtype).T.reshape(along)
        residual: Tensor = self.last(self.act(self.hidden(self.act(hidden))))
        return residual.float()


class FilterHead(UpHead):
    """Filters predicted for each output voxel from the scale and its sub-voxel offsets (Meta-SR, Hu et al. 2019).

    The last layer of the network that predicts them is linear: a predicted filter is a mixture of learned ones, whose
    weights are products of one prediction along each axis. So the learned filters are applied on the input grid, at the
    voxel nearest to each output voxel, and what the weights mix are their answers: the same, but far cheaper, and for
    any scale.
    """

    def __init__(self, features: int, outputs: int, *, scale: Vector, dimensions: int) -> None:
        super().__init__(features, outputs, scale=scale, dimensions=dimensions)
        self.axes = _upscaled(scale)
        self.filters = max(LEAST_FILTERS, math.prod(_whole(scale)))
        self.predictors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2, PREDICTOR_WIDTH), nn.LeakyReLU(LEAKY_SLOPE), nn.Linear(PREDICTOR_WIDTH, self.filters)
            )
            for _ in self.axes
        )
        self.last = GridConv(features, outputs * self.filters, 3, dimensions=dimensions)

    def forward(self, features: Tensor, grid: OutputGrid) -> Tensor:
        """(B, features, Z, Y, X) -> (B, outputs, *grid.shape), float32."""
        residual = self.last(features).unflatten(1, (-1, self.filters)).flatten(0, 1)
        for axis, predictor in zip(self.axes, self.predictors, strict=True):
            where, nearest = _coordinates(features, grid, axis)
            chosen = F.one_hot(nearest, features.shape[axis + 2]).to(residual.dtype)
            weights = predictor(where).to(residual.dtype).T[:, :, None] * chosen
            residual = _mix_along(residual, weights, axis, contract=axis == self.axes[-1])
        if not self.axes:
            residual = residual.sum(1)
        residual = residual.unflatten(0, (features.shape[0], -1)).float()
        return interpolate(residual, grid.without(self.axes, residual.shape[2:]))


def _mix_along(x: Tensor, weights: Tensor, axis: int, *, contract: bool) -> Tensor:
    """(B, M, Z, Y, X) with spatial axis `axis` multiplied by weights (M, new, old), a matrix for each of M filters.

    With `contract` the filters are summed: (B, Z, Y, X).
    """
    lines = x.movedim(axis + 2, 2)
    others = lines.shape[3:]
    if contract:
        mixed = weights.transpose(0, 1).flatten(1) @ lines.flatten(3).flatten(1, 2)
        return mixed.reshape(*mixed.shape[:2], *others).movedim(1, axis + 1)
    moved = weights @ lines.flatten(3)
    return moved.reshape(*moved.shape[:3], *others).movedim(2, axis + 2)


def _coordinates(features: Tensor, grid: OutputGrid, axis: int) -> tuple[Tensor, Tensor]:
    """Of each output voxel along an axis: (sub-voxel offset, 1 / scale), (outputs, 2); and the nearest input voxel."""
    outputs, scale, start = grid.axes()[axis]
    inputs = features.shape[axis + 2]
    exact = np.clip(positions(outputs, scale, start), 0, inputs - 1)
    nearest = np.floor(exact + 0.5)  # ties always upwards, so that offsets repeat
    where = np.stack((exact - nearest, np.full(outputs, 1 / scale)), axis=1)
    return (
        torch.tensor(where.astype(np.float32), device=features.device),
        torch.tensor(nearest.astype(np.int64), device=features.device),
    )


def _upscaled(scale: Vector) -> tuple[int, ...]:
    return tuple(axis for axis in range(3) if scale[axis] > 1)


def _whole(scale: Vector) -> Shape:
    z, y, x = (math.ceil(factor - ROUNDING) for factor in scale)
    return (z, y, x)


WITHOUT_RESIDUAL = ("plain", INTERPOLATING)
HEADS: dict[str, type[UpHead]] = {
    "subpixel": SubpixelHead,
    "implicit": ImplicitHead,
    "filters": FilterHead,
}


def build_head(architecture: Architecture, *, dimensions: int) -> UpHead | None:
    """The up head of an architecture; None where there is no residual to add. Raises PlanError for an unknown one."""
    if architecture.head in WITHOUT_RESIDUAL:
        return None
    if architecture.head not in HEADS:
        raise PlanError(unknown_choice("Head", architecture.head, (*WITHOUT_RESIDUAL, *HEADS)))
    outputs = architecture.output_channels + architecture.image_channels
    return HEADS[architecture.head](
        architecture.features[0], outputs, scale=architecture.head_scale, dimensions=dimensions
    )
