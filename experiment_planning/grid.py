"""A fingerprint -> how raw cases are turned, resampled, normalised and mirrored: the rules that need no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoseg.experiment_planning import topology as rules
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.experiment_planning.notes import Notes, sizes
from autoseg.plan import Normalization, ReferenceGrid, Shape, Vector

MASK_SHARE = 0.25  # of the voxels removed by cropping from which on z-scores are taken inside the mask (nnU-Net's)
NORMALIZATION_OF = {
    "ct": "ct",
    "nonorm": "none",
    "none": "none",
    "zscore": "zscore",
    "rescale": "rescale",
    "rescale_0_1": "rescale",
    "rescale_to_0_1": "rescale",
    "rgb_to_0_1": "rgb",
}
COLOURS = {"r", "g", "b", "red", "green", "blue"}


@dataclass(frozen=True)
class GridRules:
    """What all configurations share: how a raw case is turned and normalised."""

    axis_order: Shape
    spacing: Vector
    """Full-resolution target (z, y, x) in mm after `axis_order`."""
    normalization: tuple[Normalization, ...]
    shapes: tuple[Shape, ...]
    """Cropped cases after `axis_order`, on their own spacing."""
    spacings: tuple[Vector, ...]
    """Of the cases, after `axis_order`."""
    mirror_axes: tuple[int, ...]
    reference: ReferenceGrid | None = None
    """Channels on a grid of their own."""

    def median_shape(self, spacing: Sequence[float | None]) -> Shape:
        """Median (z, y, x) of the cases on a target spacing; None leaves an axis as it is."""
        found = np.median([self.shape_on(i, spacing) for i in range(len(self.shapes))], axis=0)
        z, y, x = (max(1, round(float(v))) for v in found)
        return z, y, x

    def shape_on(self, case: int, spacing: Sequence[float | None]) -> Shape:
        """Voxels of a case on a target spacing."""
        own = self.spacings[case]
        target = [o if t is None else t for t, o in zip(spacing, own, strict=True)]
        return rules.resampled_shape(self.shapes[case], own, target)


def plan_grid(fingerprint: Fingerprint, notes: Notes, *, expected: Vector | None = None) -> GridRules:
    """Axis order, target spacing, normalisation and mirroring.

    `expected` is the canonical spacing of the images that will be met in use, where these are coarser than the
    dataset's: their coarsest axis comes first.
    """
    z, y, x = (max(pair) for pair in zip(expected or (0.0, 0.0, 0.0), fingerprint.median_spacing, strict=True))
    met = (z, y, x)  # what is finer than the dataset says nothing of its axes
    order = rules.coarsest_first(met, fingerprint.median_shape)
    median = _ordered(fingerprint.median_spacing, order)
    if expected is not None and fingerprint.dimensions == 3:
        because = (
            f"images of {sizes(_ordered(expected, order))} mm are expected: canonical axis {'zyx'[order[0]]} first."
        )
    elif fingerprint.dimensions == 2:
        because = "the images are planes: the axis of length 1 comes first."
    elif median[0] > 1.001 * max(median[1:]):
        others = f"{median[1]:g} and {median[2]:g} mm"
        because = f"canonical axis {'zyx'[order[0]]} is the coarsest: {median[0]:g} mm against {others}."
    else:
        because = f"no axis is coarser than the others ({sizes(median)} mm): the canonical order stays."
    notes.add("axis_order", order, because)
    shapes = tuple(_ordered(case.shape, order) for case in fingerprint.cases)
    spacings = tuple(_ordered(case.spacing, order) for case in fingerprint.cases)
    spacing = target_spacing(spacings, shapes, dimensions=fingerprint.dimensions, notes=notes)
    return GridRules(
        axis_order=order,
        spacing=spacing,
        normalization=choose_normalization(fingerprint, notes),
        shapes=shapes,
        spacings=spacings,
        mirror_axes=choose_mirroring(fingerprint, order, notes),
        reference=plan_reference(fingerprint, order, notes),
    )


def plan_reference(fingerprint: Fingerprint, order: Shape, notes: Notes) -> ReferenceGrid | None:
    """The grid of the channels that lie on grids of their own: the median of their spacings; None without any."""
    spacings = [case.reference_spacing for case in fingerprint.cases if case.reference_spacing is not None]
    if not spacings:
        return None
    z, y, x = (float(f"{np.median([s[axis] for s in spacings]):.6g}") for axis in order)
    named = " and ".join(f"'{fingerprint.channels[number]}'" for number in fingerprint.reference_channels)
    images = sizes(_ordered(fingerprint.median_spacing, order))
    notes.add(
        "reference",
        {"channels": fingerprint.reference_channels, "spacing": (z, y, x)},
        f"dataset.json says that {named} lies on a grid of its own: it is kept at {sizes((z, y, x))} mm, the median of "
        f"{len(spacings)} cases, over the extent of the images ({images} mm), and joins the network's features "
        "on the output grid; no other rule looks at it.",
    )
    return ReferenceGrid(fingerprint.reference_channels, (z, y, x))


def target_spacing(spacings: Sequence[Vector], shapes: Sequence[Shape], *, dimensions: int, notes: Notes) -> Vector:
    """The spacing of the full resolution: the median, finer along a strongly anisotropic axis (nnU-Net's rule)."""
    table = np.asarray(spacings, dtype=float)
    z, y, x = (float(f"{v:.6g}") for v in np.median(table, axis=0))
    shape = np.median(shapes, axis=0)
    finest_other = max(y, x)
    strong = z > rules.ANISOTROPIC * finest_other and shape[0] * rules.ANISOTROPIC < min(shape[1:])
    if dimensions == 3 and strong:
        tenth = float(np.percentile(table[:, 0], rules.COARSE_PERCENTILE))
        median, z = z, float(f"{max(tenth, finest_other):.6g}")
        because = (
            f"the axes in the plane take the median; along the slices, {median / finest_other:.1f} times coarser, the "
            f"{rules.COARSE_PERCENTILE}th percentile of {len(table)} cases is {z:g} mm (median {median:g} mm), so that "
            "fine cases lose little."
        )
    else:
        because = f"the median of {len(table)} cases."
    notes.add("spacing", (z, y, x), because)
    return z, y, x


def choose_normalization(fingerprint: Fingerprint, notes: Notes) -> tuple[Normalization, ...]:
    """One scheme for each channel, chosen by the channel's name as nnU-Net does."""
    if not fingerprint.labels.names:
        notes.add(
            "intensities",
            "above the lowest value",
            "the dataset has no labels: statistics of intensities are taken from the voxels above each image's lowest "
            "value, which fills what lies outside.",
        )
    chosen = []
    names = {name.lower() for name in fingerprint.channels}
    colours = fingerprint.dimensions == 2 and len(names) == 3 and names <= COLOURS
    bright = max(statistics.percentile_99_5 for statistics in fingerprint.intensities)
    masked = fingerprint.cropped_share >= MASK_SHARE
    for index, name in enumerate(fingerprint.channels):
        scheme = NORMALIZATION_OF.get(name.strip().lower())
        if scheme:
            because = f"the channel is named '{name}'."
        elif colours and bright <= 255:
            scheme = "rgb"
            because = f"red, green and blue of a natural image with values up to {bright:g}: divided by 255."
        elif masked:
            scheme = "masked_zscore"
            because = (
                f"cropping to non-zero removes {fingerprint.cropped_share:.0%} of a median case: mean and standard "
                "deviation are taken where the image is not zero."
            )
        else:
            scheme = "zscore"
            because = f"nothing is known about the intensities of '{name}': mean 0, standard deviation 1 in each image."
        statistics = fingerprint.intensities[index]
        if scheme == "ct":
            entry = Normalization(
                scheme, statistics.mean, statistics.std, statistics.percentile_00_5, statistics.percentile_99_5
            )
            because = (
                f"the channel is named '{name}', so a value means the same in every case: clipped to the "
                f"{'foreground' if fingerprint.labels.names else 'image'}'s percentiles [{entry.lower:g}, "
                f"{entry.upper:g}], mean {entry.mean:.4g} and deviation {entry.std:.4g}."
            )
        else:
            entry = Normalization(scheme)
        notes.add(f"normalization.{name}", scheme, because)
        chosen.append(entry)
    return tuple(chosen)


def choose_mirroring(fingerprint: Fingerprint, order: Shape, notes: Notes) -> tuple[int, ...]:
    """The network axes along which mirroring changes no label."""
    parted = {order.index(pair.axis): pair for pair in fingerprint.mirrored_pairs}
    axes = tuple(axis for axis in range(3) if axis not in parted)
    if parted:
        pair = next(iter(parted.values()))
        because = (
            f"'{pair.left}' and '{pair.right}' lie on two sides of axis {', '.join(map(str, parted))}: "
            "a mirrored image would show them under the wrong name."
        )
    else:
        because = "no labels are a left/right pair: mirroring changes none of them."
        if not fingerprint.labels.names:
            because = "the dataset has no labels: no structure can be mistaken for its mirror image."
    notes.add("mirror_axes", axes, because)
    return axes


def _ordered(values: Sequence[Any], order: Shape) -> Any:
    return tuple(values[axis] for axis in order)
