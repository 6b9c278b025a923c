"""An input patch -> what else a training step sees: the output grid, the label and the fine image; their shapes alone.

Apart from the samples themselves, so that who measures a step needs none of what augments one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Architecture, Configuration, Shape, Vector
from autoseg.plan_values import INTERPOLATING

ROUNDING = 1e-6  # by which a product of a size and a scale may exceed a whole number and still be one


@dataclass(frozen=True)
class Batch:
    """What one optimiser step sees."""

    image: Tensor
    """(B, C, Z + 2 halo, Y, X) float32."""
    label: Tensor
    """(B, 1, Z, Y, X) int16, label values, on the output grid; of thick slices alone on the input's."""
    truth: Tensor | None = None
    """(B, I, *grid.shape) float32, the fine image in the units of the input; None where there is none."""
    grid: OutputGrid | None = None
    """The output grid, the same for the whole batch; None without super-resolution."""
    reference: Tensor | None = None
    """(B, R, Z', Y', X') float32: channels on a grid of their own, over just the extent of `image` without its halo."""
    plane: Batch | None = None
    """Slices in the plane, one axis made thick along axis 0, from which the image alone is learned: no label."""

    @property
    def parts(self) -> tuple[Batch, ...]:
        """What is answered one after another in a step."""
        return (self,) if self.plane is None else (self, self.plane)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        plane = None if self.plane is None else self.plane.to(device)
        image, label = self.image.to(device), self.label.to(device)
        return Batch(image, label, moved(self.truth), self.grid, moved(self.reference), plane)


@dataclass(frozen=True)
class FinePatch:
    """The fine voxels behind an input patch, and those that the network is asked for."""

    source: Shape
    """Fine voxels that the forward model makes the input of, with its halo."""
    first: int
    """Of `source` along axis 0: where the voxels begin that are asked for."""
    grid: OutputGrid
    """What is asked for."""


def fine_patch(patch: Shape, scale: Vector, *, halo: int = 0) -> FinePatch:
    """The smallest fine patch that holds just `patch` thick voxels (and the halo), centred as `acquisition` has it."""
    sizes = [math.ceil(size * factor - ROUNDING) for size, factor in zip(patch, scale, strict=True)]
    source = math.ceil((patch[0] + 2 * halo) * scale[0] - ROUNDING)
    if (source - sizes[0]) % 2 and math.floor((source + 1) / scale[0] + ROUNDING) == patch[0] + 2 * halo:
        source += 1  # both have their middle in the same place
    first = (source - sizes[0]) // 2
    before = (source - patch[0] * scale[0]) / 2  # fine voxels before the patch without its halo
    starts = [first - before, *(-(n - p * s) / 2 for n, p, s in zip(sizes[1:], patch[1:], scale[1:], strict=True))]
    grid = OutputGrid((sizes[0], sizes[1], sizes[2]), scale, (starts[0], starts[1], starts[2]))
    return FinePatch((source, sizes[1], sizes[2]), first, grid)


def paired_grid(patch: Shape, scale: Vector) -> OutputGrid:
    """The label's voxels behind an input patch; both have their middle in the same place, mirrored or not."""
    z, y, x = (math.ceil(size * factor - ROUNDING) for size, factor in zip(patch, scale, strict=True))
    starts = [-(n - size * factor) / 2 for n, size, factor in zip((z, y, x), patch, scale, strict=True)]
    return OutputGrid((z, y, x), scale, (starts[0], starts[1], starts[2]))


def output_grid(patch: Shape, scale: Vector, *, halo: int, source: str) -> OutputGrid | None:
    """The grid on which the label of an input patch lies; None where it is the input's."""
    if source == "none":
        return None
    return paired_grid(patch, scale) if source == "paired" else fine_patch(patch, scale, halo=halo).grid


def has_fine_image(architecture: Architecture, source: str) -> bool:
    """Whether samples come with the image that the image head should answer with."""
    return architecture.image_channels > 0 and source in ("degraded", "self")


def plane_patch(patch: Shape, scale: Vector) -> Shape:
    """Of slices in the plane, beside a patch of a thick volume: (thick rows, slices, columns), of about its extent."""
    return (patch[0], max(1, round(patch[1] / scale[0])), patch[2])


@dataclass(frozen=True)
class SampleShapes:
    """What a training sample looks like, channels left out."""

    image: Shape
    """Of the input, with its halo."""
    label: Shape
    truth_channels: int
    """Of the fine image; 0 where samples have none."""
    grid: OutputGrid | None
    reference: Shape
    """Of the channels on a grid of their own, where there are any."""
    plane: Shape | None = None
    """Of the input of slices in the plane, where an image is learned from them."""


def sample_shapes(
    architecture: Architecture, patch_size: Shape, *, configuration: Configuration | None = None
) -> SampleShapes:
    """The shapes that `samples.SOURCES` give for an input patch; of an any-scale network those of its largest scale.

    Without a configuration, truth is taken to be degraded, at the head's scale.
    """
    if configuration is None:
        source, scale = _SOURCE_OF.get(architecture.head, "degraded"), architecture.head_scale
    else:
        source, scale = configuration.sr_source, largest_scale(configuration)
    grid = output_grid(patch_size, scale, halo=architecture.halo, source=source)
    image = (patch_size[0] + 2 * architecture.halo, *patch_size[1:])
    reference = architecture.reference_shape(patch_size, scale)
    if source == "self" and architecture.head == INTERPOLATING:  # thick labels; the fine image is known in the plane
        plane = plane_patch(patch_size, scale) if architecture.image_channels else None
        return SampleShapes(image, patch_size, 0, grid, reference, plane)
    channels = architecture.image_channels if has_fine_image(architecture, source) else 0
    return SampleShapes(image, patch_size if grid is None else grid.shape, channels, grid, reference)


_SOURCE_OF = {"plain": "none", INTERPOLATING: "self"}  # where only an architecture is known


def at_scale(configuration: Configuration, scale: float) -> Vector:
    """`scale` along the axes that the configuration refines, 1 along the others."""
    z, y, x = (scale if planned > 1 else 1.0 for planned in configuration.sr_scale)
    return (z, y, x)


def largest_scale(configuration: Configuration) -> Vector:
    """The scale of a configuration's samples that needs most memory."""
    if configuration.sr_range is None:
        return configuration.sr_scale
    return at_scale(configuration, configuration.sr_range[1])


def blank_batch(
    architecture: Architecture,
    batch_size: int,
    patch_size: Shape,
    *,
    configuration: Configuration | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Zeros of the shapes that a training sees: what a step needs and takes is measured with them."""
    shapes = sample_shapes(architecture, patch_size, configuration=configuration)
    image = torch.zeros((batch_size, architecture.input_channels, *shapes.image), device=device)
    label = torch.zeros((batch_size, 1, *shapes.label), dtype=torch.int16, device=device)
    fine = (batch_size, shapes.truth_channels, *shapes.label)
    truth = torch.zeros(fine, device=device) if shapes.truth_channels else None
    apart = (batch_size, architecture.reference_channels, *shapes.reference)
    reference = torch.zeros(apart, device=device) if architecture.reference_channels else None
    plane = None
    if shapes.plane is not None:
        fine = fine_patch(shapes.plane, shapes.grid.scale)
        channels = architecture.image_channels
        plane = Batch(
            torch.zeros((batch_size, channels, *shapes.plane), device=device),
            torch.zeros((batch_size, 1, 0, 0, 0), dtype=torch.int16, device=device),
            torch.zeros((batch_size, channels, *fine.grid.shape), device=device),
            fine.grid,
        )
    return Batch(image, label, truth, shapes.grid, reference, plane)
