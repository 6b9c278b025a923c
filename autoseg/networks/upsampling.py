"""Features on the input grid -> logits and image on the output grid: the heads of super-resolving networks."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.plan import Shape, Vector


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
