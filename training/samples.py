"""A place in a stored case -> one training sample: input, label, and for super-resolution the fine image and its grid.

Without super-resolution input and label are patches of one grid. With it there are three sources of fine truth
(`Configuration.sr_source`), keys of SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.acquisition import degrade, draw_thickness, offset, slices
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Acquisition, Configuration, Shape, Vector
from autoseg.preprocessing.degradation import centre, clip_late, input_moments, masked_channels
from autoseg.preprocessing.framed import FramedEntry
from autoseg.preprocessing.store import REFERENCE
from autoseg.training.augment import Augmentation, source_size
from autoseg.training.sampling import inside_mask, read_moved, read_patch
from autoseg.training.shapes import fine_patch, paired_grid, plane_patch

COVERED = 0.5  # share of a thick slice that must lie in the image; a slice with less is outside and zero, as a patch is
SHIFTS = 4  # input voxels by which a patch may be moved to a place where the middles of input and label meet


class Sample(NamedTuple):
    """One patch of a batch."""

    image: Tensor
    """(C, Z + 2 halo, Y, X) float32: the network's input."""
    label: Tensor
    """(1, Z, Y, X) int16, label values, on the output grid; of thick slices alone on the input's, without its halo."""
    truth: Tensor | None = None
    """(I, *grid.shape) float32, in the units of `image`; None without an image head or where no fine image is known."""
    grid: OutputGrid | None = None
    """The output grid; None without super-resolution."""
    reference: Tensor | None = None
    """(R, Z', Y', X') float32: channels on a grid of their own, over just the extent of `image` without its halo."""
    plane: Sample | None = None
    """Slices in the plane, from which the image alone is learned; see `Batch`."""


@dataclass(frozen=True)
class Place:
    """Where a patch is taken."""

    entry: FramedEntry
    start: Shape
    """First voxel on the image's grid; may lie before it."""
    previous: FramedEntry | None = None
    """The previous stage's labels of the same case (cascade)."""


class Draw(Protocol):
    """Draws places for the patches of one sample."""

    step: int

    def __call__(self, size: Shape, *, frames: Sequence[Shape] | None = None) -> Place:
        """A place for a patch of that many voxels, seen in one of `frames` (by default those of training)."""
        ...


Seed = Callable[[], None]  # sets the global generators that augmentation draws from


class Source(Protocol):
    """Makes the samples of one configuration; those of one step have the same shapes."""

    def __init__(self, configuration: Configuration, augmentation: Augmentation, *, augment: bool) -> None: ...

    def __call__(self, draw: Draw, seed: Seed, scale: Vector) -> Sample:
        """A sample at a place that `draw` gives, whose input voxels are `scale` times as large as the label's."""
        ...


class SameGrid:
    """Image and label are patches of one grid; a 2.5D image has its halo, beyond the edge the outermost slice again."""

    def __init__(self, configuration: Configuration, augmentation: Augmentation, *, augment: bool) -> None:
        self.patch, self.halo = configuration.patch_size, configuration.architecture.halo
        self.size = source_size(configuration) if augment else configuration.patch_size
        self.augmentation, self.augment = augmentation, augment
        self.reference = ReferencePatch(configuration, augmentation, augment=augment)

    def __call__(self, draw: Draw, seed: Seed, scale: Vector) -> Sample:
        """See `Source`; the scale is 1."""
        place = draw(self.patch)
        # what is read is larger on every side, so that patches at the image's border are trained on like all others
        z, y, x = _around(place.start, self.patch, self.size)
        deep, first, edges = (self.size[0] + 2 * self.halo, *self.size[1:]), z - self.halo, (0,) if self.halo else ()
        image = read_patch(place.entry, "image", (first, y, x), deep, replicate=edges)
        if place.previous is None:
            label = read_patch(place.entry, "label", (z, y, x), self.size)
        else:  # the previous stage's labels become input channels: they need the halo too
            known = read_patch(place.entry, "label", (first, y, x), deep)
            label = np.concatenate((known, read_patch(place.previous, "label", (first, y, x), deep, replicate=edges)))
        seed()
        patch = self.augmentation(_floats(image), _labels(label), augment=self.augment)
        reference = self.reference(place.entry, place.start, self.patch, scale, source=((z, y, x), self.size))
        return Sample(*patch, reference=reference)


class Degraded:
    """The store is fine; the input is what the forward model makes of a fine patch that was augmented in space."""

    def __init__(self, configuration: Configuration, augmentation: Augmentation, *, augment: bool) -> None:
        assert configuration.acquisition is not None, "check_plan asks for one"
        self.configuration, self.acquisition = configuration, configuration.acquisition
        self.patch, self.halo = configuration.patch_size, configuration.architecture.halo
        self.channels = configuration.architecture.image_channels
        self.masked = masked_channels(configuration)
        self.augmentation, self.augment = augmentation, augment
        self.reference = ReferencePatch(configuration, augmentation, augment=augment)

    def __call__(self, draw: Draw, seed: Seed, scale: Vector) -> Sample:
        """See `Source`."""
        fine = fine_patch(self.patch, scale, halo=self.halo)
        place = draw(fine.grid.shape)
        seed()
        stacked = (0,) if self.halo else ()
        place = on_whole_slices(place, self.patch, fine.grid, but=stacked, random=self.augment)
        size = source_size(self.configuration, fine.source) if self.augment else fine.source
        z, y, x = place.start
        start = _around((z - fine.first, y, x), fine.source, size)
        # beyond the edge lies the outermost voxel again, as the forward model has it at the end of an image
        edges = [axis for axis in range(3) if scale[axis] > 1 or (axis == 0 and self.halo)]
        image = _floats(read_patch(place.entry, "image", start, size, replicate=edges))
        inside = torch.from_numpy(inside_mask(place.entry.shape, start, size))
        if self.halo:  # beyond the ends of the volume a stack sees the outermost slice: no outside
            inside = inside.amax(1, keepdim=True).expand_as(inside).contiguous()
        label = _labels(_read_label(place.entry, start, size))
        moments = input_moments(place.entry.entry, self.configuration, scale, frame=place.entry.frame)
        seen = torch.cat((image, inside))
        if self.augment:
            seen, label = self.augmentation.turn(seen, label, size=fine.source)
        image, inside = seen[:-1], seen[-1:]
        channels = zip(image, self.masked, *moments, strict=True)
        truth = torch.stack([centre(c, mean, masked=m) / float(std) for c, m, mean, std in channels])
        low = thick_slices(truth, inside, scale, self.acquisition, random=self.augment)
        clip_late(low, self.configuration)
        clip_late(truth, self.configuration)
        if self.augment:
            low = self.augmentation.disturb(low)
        thick = [n * factor for n, factor in zip(self.patch, scale, strict=True)]
        begins = (z - fine.first, y, x)
        first = [begin + (n - t) / 2 for begin, n, t in zip(begins, fine.source, thick, strict=True)]
        reference = self.reference(place.entry, first, thick, scale, source=(start, size))
        asked = slice(fine.first, fine.first + fine.grid.shape[0])
        shown = (truth * inside)[: self.channels, asked].contiguous() if self.channels else None
        return Sample(low, label[:, asked].contiguous(), shown, fine.grid, reference)


class SelfSupervisedSlices(Degraded):
    """The store is thick: one step sees slices in whose plane one axis is degraded, the next slices through the planes.

    In the plane the fine truth is known. Through the planes, where the network will predict, only the thick image and
    its label are: the forward model brings the answer there (`training.losses`). What is learned in the plane says how
    edges look between the slices, what is learned through the planes how the anatomy looks from there.
    """

    def __call__(self, draw: Draw, seed: Seed, scale: Vector) -> Sample:
        """See `Source`; without augmentation always in the plane."""
        if not self.augment or draw.step % 2 == 0:
            return super().__call__(draw, seed, scale)
        place = draw(self.patch, frames=self.configuration.frames(training=False))
        z, y, x = place.start
        deep, edges = (self.patch[0] + 2 * self.halo, *self.patch[1:]), (0,) if self.halo else ()
        image = _floats(read_patch(place.entry, "image", (z - self.halo, y, x), deep, replicate=edges))
        label = _labels(_read_label(place.entry, place.start, self.patch))
        seed()
        image, label = self.augmentation.flip(image, label)
        grid = fine_patch(self.patch, scale, halo=self.halo).grid
        return Sample(self.augmentation.disturb(image), label.contiguous(), None, grid)


class SelfSupervisedVolumes:
    """The store is thick: each step sees a volume of it for the labels, and slices in its plane for the image.

    The thick label is all that is known of the labels, and the forward model brings the answer to it. The image is
    learned where its truth is known: in the plane, of which either axis is made thick in turn by chance.
    """

    def __init__(self, configuration: Configuration, augmentation: Augmentation, *, augment: bool) -> None:
        assert configuration.acquisition is not None, "check_plan asks for one"
        self.configuration, self.acquisition = configuration, configuration.acquisition
        self.patch, self.channels = configuration.patch_size, configuration.architecture.image_channels
        self.size = source_size(configuration) if augment else configuration.patch_size
        self.masked = masked_channels(configuration)
        self.augmentation, self.augment = augmentation, augment

    def __call__(self, draw: Draw, seed: Seed, scale: Vector) -> Sample:
        """See `Source`; without augmentation the label is brought to the output grid, and nothing is learned."""
        place = draw(self.patch, frames=self.configuration.frames(training=False))
        start = _around(place.start, self.patch, self.size)
        image = _floats(read_patch(place.entry, "image", start, self.size))
        label = _labels(_read_label(place.entry, start, self.size))
        seed()
        image, label = self.augmentation(image, label, augment=self.augment)
        grid = fine_patch(self.patch, scale).grid
        if not self.augment:
            return Sample(image, _nearest(label, grid), None, grid)
        plane = self._in_plane(draw, seed, scale) if self.channels else None
        return Sample(image, label, None, grid, plane=plane)

    def _in_plane(self, draw: Draw, seed: Seed, scale: Vector) -> Sample:
        patch = plane_patch(self.patch, scale)
        fine = fine_patch(patch, scale)
        place = draw(fine.source)
        seed()
        place = on_whole_slices(place, patch, fine.grid, random=True)
        image = _floats(read_patch(place.entry, "image", place.start, fine.source, replicate=(0,)))
        inside = torch.from_numpy(inside_mask(place.entry.shape, place.start, fine.source))
        moments = input_moments(place.entry.entry, self.configuration, scale, frame=place.entry.frame)
        seen, _ = self.augmentation.flip(torch.cat((image, inside)), inside.short())
        image, inside = seen[:-1], seen[-1:]
        channels = zip(image, self.masked, *moments, strict=True)
        truth = torch.stack([centre(c, mean, masked=m) / float(std) for c, m, mean, std in channels])
        low = thick_slices(truth, inside, scale, self.acquisition, random=True)
        return Sample(low, _NO_LABEL, (truth * inside).contiguous(), fine.grid)


_NO_LABEL = torch.zeros((1, 0, 0, 0), dtype=torch.int16)


def _nearest(label: Tensor, grid: OutputGrid) -> Tensor:
    """Labels (1, Z, Y, X) of an input's voxels -> on the grid: of the voxel that each lies in."""
    for axis, (voxels, scale, start) in enumerate(grid.axes()):
        where = ((torch.arange(voxels) + start + 0.5) / scale).floor().long().clamp(0, label.shape[axis + 1] - 1)
        label = label.index_select(axis + 1, where)
    return label


def on_whole_slices(place: Place, patch: Shape, grid: OutputGrid, *, but: Collection[int] = (), random: bool) -> Place:
    """A place in an image that is smaller than its patch of thick voxels, where the slices of both are the same ones.

    So prediction has them: whole slices of zeros are added, and of the image's own none is cut. `random` draws from
    torch's global generator how many of them lie before the image; else half of them do. Not along the axes in `but`.
    """
    start = list(place.start)
    for axis, (n, size, s, first) in enumerate(zip(place.entry.shape, patch, grid.scale, grid.start, strict=True)):
        if axis not in but and 1 < s <= n <= size * s:
            spare = size - slices(n, s)
            before = int(torch.randint(spare + 1, ())) if random else spare // 2
            start[axis] = round(offset(n, s) - before * s + first)
    return replace(place, start=(start[0], start[1], start[2]))


def thick_slices(fine: Tensor, inside: Tensor, scale: Vector, acquisition: Acquisition, *, random: bool) -> Tensor:
    """Fine (C, ...) after the forward model, zero where less than half of a slice lies `inside` (1, ...).

    `random` draws thickness and noise from torch's global generator; else the middle thickness and no noise.
    """
    generator = torch.default_generator if random else None
    share = draw_thickness(acquisition, generator)
    thick = degrade(fine, scale, acquisition, generator=generator, thickness=share)
    return torch.where(degrade(inside, scale, acquisition, thickness=share) > COVERED, thick, 0.0)


class Paired:
    """The label lies on a finer grid than the image; both are read around the same place.

    That is found with the case's own ratio of voxels. The answer is asked for at the planned one, which differs where
    the scale is not whole: by half a label voxel over the whole image, so by a quarter at the ends of a patch at most.
    """

    def __init__(self, configuration: Configuration, augmentation: Augmentation, *, augment: bool) -> None:
        self.patch, self.halo = configuration.patch_size, configuration.architecture.halo
        self.configuration, self.augmentation, self.augment = configuration, augmentation, augment
        self.reference = ReferencePatch(configuration, augmentation, augment=augment)

    def __call__(self, draw: Draw, seed: Seed, scale: Vector) -> Sample:
        """See `Source`."""
        place = draw(self.patch)
        grid = paired_grid(self.patch, scale)
        turns = self.augment and scale[1] == scale[2] == 1  # slices are turned where both grids have the same plane
        _, *plane = source_size(self.configuration) if turns else self.patch
        image_size = (self.patch[0], plane[0], plane[1])
        label_size = (grid.shape[0], plane[0], plane[1]) if turns else grid.shape
        voxels, finest = place.entry.shape, place.entry.shape_of("label") if place.entry.has("label") else None
        finer = scale if finest is None else [n / m for n, m in zip(finest, voxels, strict=True)]
        places = [common_middle(*axis) for axis in zip(place.start, self.patch, finer, grid.shape, strict=True)]
        first, fine_first = zip(*places, strict=True)
        z, y, x = _around(first, self.patch, image_size)
        deep, edges = (image_size[0] + 2 * self.halo, *image_size[1:]), (0,) if self.halo else ()
        image = _floats(read_patch(place.entry, "image", (z - self.halo, y, x), deep, replicate=edges))
        label = _labels(_read_label(place.entry, _around(fine_first, grid.shape, label_size), label_size))
        seed()
        if turns:
            image, label = self.augmentation.turn(image, label, size=self.patch)
        elif self.augment:
            image, label = self.augmentation.flip(image, label)
        if self.augment:
            image = self.augmentation.disturb(image)
        reference = self.reference(place.entry, first, self.patch, scale, source=((z, y, x), image_size))
        return Sample(image.contiguous(), label.contiguous(), None, grid, reference)


class ReferencePatch:
    """Reads the channels on a grid of their own behind a patch, moved in space as the patch was."""

    def __init__(self, configuration: Configuration, augmentation: Augmentation, *, augment: bool) -> None:
        self.patch, self.architecture = configuration.patch_size, configuration.architecture
        self.augmentation, self.augment = augmentation, augment

    def __call__(
        self,
        entry: FramedEntry,
        first: Sequence[float],
        extent: Sequence[float],
        scale: Vector,
        *,
        source: tuple[Shape, Shape],
    ) -> Tensor | None:
        """(R, Z', Y', X') float32; None for a network without references.

        The patch is `extent` voxels of the stored image long and begins `first` voxels after its outer face. Where it
        was turned, that was about the middle of the `source` that was read: its first voxel and its size.
        """
        if not self.architecture.reference_channels:
            return None
        motion, shape = self.augmentation.motion, self.architecture.reference_shape(self.patch, scale)
        finer = [n / m for n, m in zip(entry.shape_of(REFERENCE), entry.shape, strict=True)]
        if motion.matrix is None:
            turn, middle = np.eye(3), np.add(first, np.divide(extent, 2))
        else:
            turn, middle = motion.matrix, np.add(source[0], np.divide(source[1], 2))
        step = np.divide(extent, shape)  # image voxels from one voxel of the patch to the next
        step[list(motion.mirrored)] *= -1
        # a voxel of the patch -> its place from the middle, in image voxels -> turned -> a voxel of the reference
        matrix = np.diag(finer) @ turn @ np.diag(step)
        offset = np.multiply(finer, middle) - 0.5 - matrix @ (np.subtract(shape, 1) / 2)
        reference = read_moved(entry, REFERENCE, matrix, offset, shape)
        return self.augmentation.disturb_reference(reference) if self.augment else reference


def common_middle(start: int, size: int, finer: float, asked: int) -> tuple[int, int]:
    """Where `size` input voxels and `asked` label voxels, `finer` times as many, begin so that their middles meet.

    The input voxel nearest to `start` of those within SHIFTS from which on they meet best, to a tenth of a voxel.
    """

    def label_start(voxel: int) -> float:
        return (voxel + size / 2) * finer - asked / 2

    first = min(
        range(start - SHIFTS, start + SHIFTS + 1),
        key=lambda voxel: (round(abs(label_start(voxel) - round(label_start(voxel))), 1), abs(voxel - start)),
    )
    return first, round(label_start(first))


SOURCES: dict[str, type[Source]] = {
    "none": SameGrid,
    "degraded": Degraded,
    "self": SelfSupervisedSlices,
    "paired": Paired,
}


def build_source(configuration: Configuration, augmentation: Augmentation, *, augment: bool) -> Source:
    """The source of a configuration's samples: by `sr_source`, and for self-supervision by what its network sees."""
    volumes = configuration.sr_source == "self" and configuration.topology == "3d"
    make = SelfSupervisedVolumes if volumes else SOURCES[configuration.sr_source]
    return make(configuration, augmentation, augment=augment)


def _around(start: Sequence[int], patch: Shape, size: Shape) -> Shape:
    """Where a box of `size` begins that has the patch in its middle."""
    z, y, x = (f - (s // 2 - p // 2) for f, p, s in zip(start, patch, size, strict=True))
    return (z, y, x)


def _read_label(entry: FramedEntry, start: Shape, size: Shape) -> NDArray[np.generic]:
    """The label in a box; background where the case has none (image super-resolution needs none)."""
    return read_patch(entry, "label", start, size) if entry.has("label") else np.zeros((1, *size), np.int16)


def _floats(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _labels(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int16))
