"""A stored case -> what a network is given of it in validation, what it is asked for, and where it is scored.

That depends on where a super-resolving network's fine truth comes from (`SOURCES`): the store holds the fine image, of
which thick slices are made; or thick slices, with labels on a finer grid or with no finer truth at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoseg.inference.answer_grid import planned_scale
from autoseg.inference.grids import grid_between
from autoseg.labels import Labels
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Configuration
from autoseg.preprocessing.case import CaseGeometry, fine_geometry
from autoseg.preprocessing.degradation import centre, clip_late, degrade_entry, is_thick, masked_channels
from autoseg.preprocessing.framed import FramedEntry, turned_back
from autoseg.preprocessing.store import REFERENCE, StoreEntry


@dataclass(frozen=True)
class HeldOutCase:
    """What the network is given of a case, and what its answer is measured by."""

    image: NDArray[np.float32]
    """(C, Z, Y, X) that the network reads."""
    answered: CaseGeometry
    """Whose network grid the network answers on."""
    scored: CaseGeometry
    """Where the labels are brought: the label's network grid, and from there to the grid of its file."""
    grid: OutputGrid | None = None
    """What is asked for of a super-resolving network, along the network axes."""
    truth: NDArray[np.float32] | None = None
    """The fine image (I, *grid.shape), in the units of `image`, where it is known."""
    reference: NDArray[np.float32] | None = None
    """(R, Z', Y', X'): channels on a grid of their own."""
    reference_grid: OutputGrid | None = None
    """Where the reference lies, seen from `image`; None: it covers just that."""


def held_out_case(
    entry: StoreEntry, configuration: Configuration, labels: Labels, *, previous: StoreEntry | None = None
) -> HeldOutCase:
    """What the network is given of a stored case; in a cascade, after the image, where `previous` saw each structure.

    Raises StorageError where the store is damaged, PlanError where the case is too thin to be degraded.
    """
    held_out = SOURCES[configuration.sr_source](entry, configuration)
    if configuration.preprocessing.reference is not None:
        held_out = replace(held_out, reference=np.asarray(entry.read(REFERENCE), dtype=np.float32))
    if previous is None:
        return held_out
    seen = previous.read("label")[0]
    masks = np.stack([labels.mask(seen, name) for name in labels.names]).astype(np.float32)
    return replace(held_out, image=np.concatenate([held_out.image, masks]))


def _stored(entry: StoreEntry, configuration: Configuration) -> HeldOutCase:
    """The stored image as it is."""
    scored = entry.label_geometry or entry.geometry
    return HeldOutCase(_stored_image(entry), scored, scored)


def _paired(entry: StoreEntry, configuration: Configuration) -> HeldOutCase:
    """The stored image, answered on the finer grid of its label."""
    scored = entry.label_geometry or entry.geometry
    scale = [fine / n for fine, n in zip(entry.label_shape, entry.shape, strict=True)]
    grid = OutputGrid(entry.label_shape, (scale[0], scale[1], scale[2]))
    return HeldOutCase(_stored_image(entry), scored, scored, grid)


def _thickened(entry: StoreEntry, configuration: Configuration) -> HeldOutCase:
    """Thick slices made of the stored fine image, which is the truth; or those that were acquired, without one."""
    degraded = degrade_entry(entry, configuration)
    frame = configuration.frames(training=False)[0]
    image = degraded.image.transpose(0, *(frame.index(axis) + 1 for axis in range(3)))
    asked = degraded.grid
    shape, scale, start = (turned_back(values, frame) for values in (asked.shape, asked.scale, asked.start))
    grid = OutputGrid(shape, scale, start)
    apart = None
    if REFERENCE in entry.arrays:
        voxels = FramedEntry(entry).shape_of(REFERENCE)
        finer = [n / m for n, m in zip(voxels, shape, strict=True)]  # than the stored image, which both grids cover
        scales, starts = zip(
            *((f * s, f * first) for f, s, first in zip(finer, scale, start, strict=True)), strict=True
        )
        apart = OutputGrid(voxels, scales, starts)
    fine = zip(_stored_image(entry), masked_channels(configuration), *degraded.moments, strict=True)
    truth = np.stack([centre(channel, mean, masked=masked) / np.float32(std) for channel, masked, mean, std in fine])
    clip_late(truth, configuration)
    answered = scored = entry.label_geometry or entry.geometry
    known: NDArray[np.float32] | None = truth[: configuration.architecture.image_channels]
    if is_thick(entry, configuration):  # the answer comes to the slices of its label, as it would in use
        known, scored = None, replace(answered, network_shape=answered.cropped.shape)
    return HeldOutCase(np.ascontiguousarray(image), answered, scored, grid, known, reference_grid=apart)


def _through_planes(entry: StoreEntry, configuration: Configuration) -> HeldOutCase:
    """The stored thick slices; no finer truth is known, so the answer is brought back to them to be scored."""
    fine = fine_geometry(entry.geometry, planned_scale(configuration))
    scored = entry.label_geometry or entry.geometry
    return HeldOutCase(_stored_image(entry), fine, scored, grid_between(entry.geometry, fine))


SOURCES: dict[str, Callable[[StoreEntry, Configuration], HeldOutCase]] = {
    "none": _stored,
    "paired": _paired,
    "degraded": _thickened,
    "self": _through_planes,
}


def _stored_image(entry: StoreEntry) -> NDArray[np.float32]:
    return np.asarray(entry.read("image"), dtype=np.float32)
