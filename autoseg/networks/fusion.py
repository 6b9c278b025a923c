"""A reference image on a grid of its own -> a residual on the output grid, gated by what the network has seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoseg.acquisition import apply_along, resampling_matrix
from autoseg.networks.blocks import ConvNormAct, GridConv, Stage, slices_as_batch, slices_as_volumes
from autoseg.networks.upsampling import OutputGrid, interpolate
from autoseg.plan import Architecture


class ReferenceFusion(nn.Module):
    """Encodes the reference where it lies, brings it and the network's features to the output grid and gates it.

    Only what passes the gate, one 1x1 convolution and a sigmoid over both, is added. The last layer starts at zero.
    """

    def __init__(self, architecture: Architecture, *, dimensions: int) -> None:
        super().__init__()
        a = architecture
        width = a.features[0]
        self.dimensions = dimensions
        self.encode = Stage(
            ConvNormAct,
            a.reference_channels,
            width,
            convs=2,
            kernel=a.kernels[0],
            stride=(1, 1, 1),
            dimensions=dimensions,
        )
        self.project = GridConv(width, width, 1, dimensions=dimensions)
        self.gate = GridConv(2 * width, width, 1, dimensions=dimensions)
        self.last = GridConv(2 * width, a.output_channels + a.image_channels, 1, dimensions=dimensions)

    def forward(self, features: Tensor, reference: Tensor, reference_grid: OutputGrid, grid: OutputGrid) -> Tensor:
        """Features (B, F, Z, Y, X) of the input, a reference (B, R, *its grid) -> residual (B, K + I, *grid.shape)."""
        encoded = slices_as_volumes(
            self.encode(slices_as_batch(reference, self.dimensions)), reference.shape[0], self.dimensions
        )
        known = resample(encoded, reference_grid, grid)
        own = interpolate(self.project(features), grid)
        gate = torch.sigmoid(self.gate(torch.cat((own, known), dim=1)))
        residual: Tensor = self.last(torch.cat((own, gate * known), dim=1))
        return residual.float()


def resample(x: Tensor, grid: OutputGrid, wanted: OutputGrid) -> Tensor:
    """(B, C, *grid.shape) -> (B, C, *wanted.shape): both grids are relative to the same input.

    Linear where the wanted voxels are smaller, averages where they are larger; beyond the grid its edge is repeated.
    """
    for axis, (there, here) in enumerate(zip(wanted.axes(), grid.axes(), strict=True)):
        outputs, relative = there[0], there[1] / here[1]
        start = there[2] - here[2] * relative
        if (outputs, relative, start) != (x.shape[axis + 2], 1, 0):
            x = apply_along(x, resampling_matrix(x.shape[axis + 2], outputs, relative, start), axis)
    return x


def covering(reference: Tensor, inputs: Tensor) -> OutputGrid:
    """The grid of a reference (B, R, Z', Y', X') that covers exactly what the input (B, C, Z, Y, X) does."""
    shape = (reference.shape[2], reference.shape[3], reference.shape[4])
    z, y, x = (own / other for own, other in zip(shape, inputs.shape[2:], strict=True))
    return OutputGrid(shape, (z, y, x))
