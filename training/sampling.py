"""A store and a random generator -> which patch of which case is trained on next."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autoseg.acquisition import apply_along, interpolation_inside
from autoseg.plan import Shape, Vector
from autoseg.preprocessing.framed import NETWORK_AXES, SAME_GRID, FramedEntry
from autoseg.preprocessing.store import ANNOTATED, Store, StoreEntry
from autoseg.training.settings import FOREGROUND_FRACTION

SAME_FACE = 1e-3  # voxels by which a place may miss the face of an array and still be inside


@dataclass(frozen=True)
class Patch:
    """Where a patch is taken; `start` may lie before, and the end behind, the image (padded there)."""

    case: str
    start: Shape
    """First voxel on the grid of the case's preprocessed image, along the axes of `frame`."""
    frame: Shape = NETWORK_AXES
    """The order of the network axes in which the patch is seen."""


class PatchSampler:
    """Draws patches; a pure function of the generator it is given.

    A third of each batch is centred on foreground (nnU-Net). For these the class is drawn first, in proportion to the
    square root of the number of cases that show it, then a case that shows it, then one of its voxels: a class that
    few cases have gets its turn without its cases crowding out the others. All other patches lie anywhere in a case
    drawn evenly or, with an ignore label, around an annotated voxel. Of several frames each patch draws one.
    """

    def __init__(
        self,
        store: Store,
        cases: Sequence[str],
        *,
        batch_size: int,
        frames: Sequence[Shape] = (NETWORK_AXES,),
        label_scale: Vector = SAME_GRID,
    ) -> None:
        self.cases = tuple(sorted(cases))
        self.entries: Mapping[str, StoreEntry] = {case: store.entry(case) for case in self.cases}
        present: dict[str, list[str]] = {}
        for case in self.cases:
            for name in self.entries[case].present:
                present.setdefault(name, []).append(case)
        self.annotated = tuple(case for case, entry in self.entries.items() if len(entry.foreground(ANNOTATED)))
        self.having = {name: tuple(cases) for name, cases in sorted(present.items())}
        weights = np.sqrt([len(cases) for cases in self.having.values()])
        self.weights = weights / weights.sum() if len(weights) else weights
        self.frames, self.label_scale = tuple(frames), label_scale
        self.batch_size = batch_size
        self.forced_from = batch_size - max(1, round(batch_size * FOREGROUND_FRACTION))

    def draw(
        self, generator: np.random.Generator, *, index: int, size: Shape, frames: Sequence[Shape] | None = None
    ) -> Patch:
        """A patch of `size` voxels of the image for position `index` of a batch, in one of `frames` or of its own."""
        frames = self.frames if frames is None else frames
        frame = frames[0 if len(frames) == 1 else int(generator.integers(len(frames)))]
        single = self.batch_size == 1  # then it is a third of the batches
        forced = generator.random() < FOREGROUND_FRACTION if single else index >= self.forced_from
        if forced and self.having:
            name = tuple(self.having)[generator.choice(len(self.having), p=self.weights)]
            case = _pick(self.having[name], generator)
            return self._around(self.entry(case, frame), name, generator, size)
        if self.annotated:
            return self._around(self.entry(_pick(self.annotated, generator), frame), ANNOTATED, generator, size)
        case = _pick(self.cases, generator)
        shape = self.entry(case, frame).shape
        start = [_start_within(n, s, generator) for n, s in zip(shape, size, strict=True)]
        return Patch(case, (start[0], start[1], start[2]), frame)

    def entry(self, case: str, frame: Shape) -> FramedEntry:
        """A case as it is seen in `frame`."""
        return FramedEntry(self.entries[case], frame, self.label_scale)

    def _around(self, entry: FramedEntry, name: str, generator: np.random.Generator, size: Shape) -> Patch:
        voxels = entry.foreground(name)
        centre = voxels[generator.integers(len(voxels))]
        start = [_clip_start(int(c) - s // 2, n, s) for c, n, s in zip(centre, entry.shape, size, strict=True)]
        return Patch(entry.case, (start[0], start[1], start[2]), entry.frame)


def _pick(names: Sequence[str], generator: np.random.Generator) -> str:
    return names[int(generator.integers(len(names)))]


def _start_within(shape: int, size: int, generator: np.random.Generator) -> int:
    """Anywhere inside; centred where the image is smaller than the patch."""
    return int(generator.integers(shape - size + 1)) if shape > size else -((size - shape) // 2)


def _clip_start(start: int, shape: int, size: int) -> int:
    """Moved inside the image, so that no patch is spent on padding; centred where the image is smaller."""
    return min(max(start, 0), shape - size) if shape > size else -((size - shape) // 2)


def read_patch(
    entry: StoreEntry | FramedEntry, name: str, start: Shape, size: Shape, *, replicate: Collection[int] = ()
) -> NDArray[np.generic]:
    """The array `name` of a case in a box that may reach outside: (C, *size).

    Outside lie zeros, but along the axes in `replicate` the outermost slice again.
    """
    framed = entry if isinstance(entry, FramedEntry) else FramedEntry(entry)
    box, inside = [], []
    for axis, (first, length, shape) in enumerate(zip(start, size, framed.shape_of(name), strict=True)):
        low, high = max(first, 0), min(first + length, shape)
        if axis in replicate:
            low, high = min(low, shape - 1), max(high, 1)
        box.append(slice(low, high))
        inside.append(slice(low - first, high - first))
    part = framed.read(name, (box[0], box[1], box[2]))
    for axis in replicate:
        low, high = box[axis].start, box[axis].stop
        voxels = np.clip(np.arange(start[axis], start[axis] + size[axis]), low, high - 1) - low
        part = part.take(voxels, axis=axis + 1)
        inside[axis] = slice(None)
    if part.shape[1:] == tuple(size):
        return part
    whole = np.zeros((part.shape[0], *size), part.dtype)
    every_channel = slice(None)
    whole[every_channel, inside[0], inside[1], inside[2]] = part
    return whole


def read_moved(
    entry: FramedEntry, name: str, matrix: NDArray[np.float64], offset: NDArray[np.float64], shape: Shape
) -> Tensor:
    """The array `name` (C, Z, Y, X) at the voxels matrix @ (z, y, x) + offset of its grid: (C, *shape) float32.

    Linear; 0 outside of the array's outer faces. Only the box that is needed is read.
    """
    whole = entry.shape_of(name)
    if np.array_equal(matrix, np.diag(np.diag(matrix))):  # most patches are not turned: line by line, far cheaper
        steps = zip(shape, np.diag(matrix), offset, whole, strict=True)
        along = [interpolation_inside(np.arange(n) * step + start, size) for n, step, start, size in steps]
        straight = _read(entry, name, [side for side, _ in along])
        for axis, (_, weights) in enumerate(along):
            straight = apply_along(straight, weights, axis)
        return straight
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    rows = [float(r[0]) * z + float(r[1]) * y + float(r[2]) * x + float(o) for r, o in zip(matrix, offset, strict=True)]
    inside = torch.ones(shape, dtype=torch.bool)
    box = []
    for place, size in zip(rows, whole, strict=True):
        inside &= (place > -0.5 - SAME_FACE) & (place < size - 0.5 + SAME_FACE)
        low, high = place.aminmax()
        start = min(max(math.floor(low), 0), size - 1)
        box.append(slice(start, min(max(math.ceil(high) + 1, start + 1), size)))
    part = _read(entry, name, box)
    # as grid_sample has it: x first, from -1 to 1 between outer faces
    sides = zip(rows, box, strict=True)
    places = [(2 * (place - side.start) + 1) / (side.stop - side.start) - 1 for place, side in sides]
    where = torch.stack(places[::-1], dim=-1).float()
    moved = functional.grid_sample(part[None], where[None], "bilinear", padding_mode="border", align_corners=False)
    return moved[0] * inside


def _read(entry: FramedEntry, name: str, box: Sequence[slice]) -> Tensor:
    array = entry.read(name, (box[0], box[1], box[2]))
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def inside_mask(shape: Shape, start: Shape, size: Shape) -> NDArray[np.float32]:
    """1 where a box of `size` voxels from `start` on lies in an image of `shape` voxels, 0 outside: (1, *size)."""
    z, y, x = (
        ((voxels := np.arange(first, first + length)) >= 0) & (voxels < whole)
        for first, length, whole in zip(start, size, shape, strict=True)
    )
    mask: NDArray[np.float32] = (z[:, None, None] & y[:, None] & x).astype(np.float32)
    return mask[None]
