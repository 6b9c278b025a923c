"""A stored case -> the same case as a configuration sees it: its axes in the order of a frame, coordinates on one grid.

The store keeps every case in network axes; a frame is a permutation of them (`Configuration.frames`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.plan import Shape, Vector
from autoseg.preprocessing.store import Box, StoreEntry

NETWORK_AXES: Shape = (0, 1, 2)
SAME_GRID: Vector = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class FramedEntry:
    """A view of a stored case; reading it reads what lies behind it in the store, and nothing else."""

    entry: StoreEntry
    frame: Shape = NETWORK_AXES
    """Network axis that is seen as axis 0, 1, 2."""
    label_scale: Vector = SAME_GRID
    """Image spacing / label spacing along the network axes."""

    @property
    def case(self) -> str:
        """The case's identifier."""
        return self.entry.case

    @property
    def shape(self) -> Shape:
        """Voxels of the image along the frame's axes."""
        return self.shape_of("image")

    def has(self, name: str) -> bool:
        """Whether the case has an array `name`."""
        return name in self.entry.arrays

    def shape_of(self, name: str) -> Shape:
        """Voxels of the array `name` along the frame's axes."""
        return turned(self.entry.arrays[name].shape[1:], self.frame)

    def foreground(self, name: str) -> NDArray[np.int32]:
        """Voxels (N, 3) int32 of the image's grid in which a class, a region or "annotated" is found, in the frame."""
        voxels = self.entry.foreground(name)
        if self.label_scale != SAME_GRID:  # labels that are finer: the image's voxel around the label's
            voxels = ((voxels + 0.5) / np.asarray(self.label_scale)).astype(np.int32)
            voxels = np.minimum(voxels, np.asarray(self.entry.shape, np.int32) - 1)
        return voxels if self.frame == NETWORK_AXES else voxels[:, list(self.frame)]

    def read(self, name: str, box: Box | None = None) -> NDArray[Any]:
        """The array `name` (C, *axes of the frame), or the part inside `box`. Raises StorageError as the store does."""
        if self.frame == NETWORK_AXES:
            return self.entry.read(name, box)
        sides = [slice(None)] * 3 if box is None else [box[self.frame.index(axis)] for axis in range(3)]
        array = self.entry.read(name, (sides[0], sides[1], sides[2]))
        return array.transpose(0, *(axis + 1 for axis in self.frame))


def turned(values: tuple[Any, ...], frame: Shape) -> Any:
    """Three values along the network axes -> the same along the axes of `frame`."""
    return (values[frame[0]], values[frame[1]], values[frame[2]])


def turned_back(values: tuple[Any, ...], frame: Shape) -> Any:
    """The inverse of `turned`."""
    return (values[frame.index(0)], values[frame.index(1)], values[frame.index(2)])
