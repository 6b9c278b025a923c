"""A raw dataset -> `fingerprint.json`: its shapes, spacings, intensities, classes, orientation, left/right pairs.

Everything is measured in the canonical orientation (array axes z, y, x along superior, posterior, left) and after
cropping to the region in which some channel is not zero, because that is what the network will see.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.dataset import Case, RawDataset, require_foreground
from autoseg.errors import AutosegError, DatasetError
from autoseg.executor import map_cases
from autoseg.files import read_json, write_json
from autoseg.geometry import (
    canonical_axes,
    crop_grid,
    nonzero_box,
    orientation_code,
    permute_grid,
    turn_array,
    turn_grid,
)
from autoseg.image import Grid, Image
from autoseg.labels import Labels
from autoseg.plan import Shape, Vector
from autoseg.preprocessing.resample import resample_onto
from autoseg.reading import read_case
from autoseg.typed_json import SPARSE, from_json, to_json

FINGERPRINT_VERSION = 1
INTENSITY_SEED = 1234  # of the voxels drawn for the statistics
CASE_SAMPLES = 10_000  # foreground voxels drawn from a case for a channel; as nnU-Net, equally many from every case
CLASS_SAMPLES = 1_000  # voxels drawn from a class of a case for a channel
TOTAL_SAMPLES = 4_000_000  # voxels kept for a channel over all cases: bounds the memory (16 MB a channel)
CONSISTENT_SHARE = 0.9  # of the cases in which left must lie on the same side of right
CONNECTIVITY = 26  # components touch at corners too: a thin oblique vessel stays one


@dataclass(frozen=True)
class IntensityStatistics:
    """Intensities of one channel over all foreground voxels, or over those of one class."""

    mean: float
    std: float
    percentile_00_5: float
    median: float
    percentile_99_5: float


@dataclass(frozen=True)
class CaseFingerprint:
    """One training case."""

    identifier: str
    shape: Shape
    """Voxels (z, y, x) in canonical orientation after cropping."""
    spacing: Vector
    """(z, y, x) in mm, in canonical orientation."""
    size_before_cropping: Shape
    """Voxels (z, y, x) in canonical orientation before cropping."""
    orientation: str
    """Where the file's (z, y, x) axes run to: "SPL" is the canonical orientation."""
    class_voxels: tuple[int, ...]
    """Voxels of each structure, in the order of `Labels.names`."""
    class_components: tuple[int, ...]
    """Connected components (26 neighbours) of each structure."""
    class_centroids_mm: tuple[Vector | None, ...]
    """Centre (z, y, x) of each structure in mm from the cropped corner; None where the case does not have it."""
    image_checksum: int = 0
    """CRC-32 of the voxels: equal in cases whose images are the same, which must not be parted by a fold."""
    label_scale: Vector = (1.0, 1.0, 1.0)
    """Image / label spacing (z, y, x), in canonical orientation: above 1 where labels lie on a finer grid."""
    reference_spacing: Vector | None = field(default=None, metadata=SPARSE)
    """(z, y, x) in mm, in canonical orientation, of the channels on grids of their own: along each axis the finest."""


@dataclass(frozen=True)
class ClassFingerprint:
    """One foreground structure over all cases."""

    name: str
    cases: int
    """Cases that show it."""
    frequency: float
    """Its share of all voxels after cropping."""
    median_volume_mm3: float
    """Median over the cases that show it; 0 where none does. Square mm for 2D images."""
    median_components: float
    """Median number of connected components over the cases that show it."""
    intensities: tuple[IntensityStatistics, ...]
    """One for each channel; empty where no case shows it."""


@dataclass(frozen=True)
class MirroredPair:
    """Two structures that are each other's mirror image: `left_kidney`, `right_kidney`."""

    left: str
    right: str
    axis: int
    """The canonical axis (0, 1, 2 for z, y, x) that parts them: 2 where the files' directions are right."""


@dataclass(frozen=True)
class Fingerprint:
    """What the dataset is; all that the planner knows about it."""

    dataset: str
    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    dimensions: int
    """2 where every image is one slice, 3 otherwise."""
    median_shape: Shape
    """Median (z, y, x) over the cases, cropped, on their own spacing."""
    median_spacing: Vector
    """Median (z, y, x) in mm."""
    anisotropy: float
    """Coarsest by finest median spacing."""
    cropped_share: float
    """Median share of a case's voxels that cropping to nonzero removes."""
    intensities: tuple[IntensityStatistics, ...]
    """Foreground intensities of each channel; without labels those above each image's lowest value."""
    classes: tuple[ClassFingerprint, ...]
    """In the order of `Labels.names`."""
    mirrored_pairs: tuple[MirroredPair, ...]
    cases: tuple[CaseFingerprint, ...]
    dropped_cases: tuple[str, ...] = ()
    """Left out because the user said so."""
    reference_channels: tuple[int, ...] = field(default=(), metadata=SPARSE)
    """Numbers of the channels that lie on grids of their own; no rule but their own looks at their geometry."""
    version: int = FINGERPRINT_VERSION

    @property
    def image_channels(self) -> tuple[str, ...]:
        """The channels that share the image's grid."""
        return tuple(name for number, name in enumerate(self.channels) if number not in self.reference_channels)

    @cached_property
    def id(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write `fingerprint.json`, atomically."""
        write_json(path, to_json(self))

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Read `fingerprint.json`. Raises DatasetError naming the file and what is wrong in it."""
        content = read_json(path, error=DatasetError, what="fingerprint")
        version = content.get("version") if isinstance(content, dict) else None
        if version != FINGERPRINT_VERSION:
            raise DatasetError(
                f"{path}: fingerprint version {version} cannot be read, this autoseg reads version "
                f"{FINGERPRINT_VERSION}; make it anew with `autoseg plan-and-preprocess`."
            )
        try:
            return from_json(cls, content, where=str(path))
        except AutosegError as error:
            raise DatasetError(str(error)) from error


def extract_fingerprint(dataset: RawDataset, *, workers: int, drop_cases: Collection[str] = ()) -> Fingerprint:
    """The fingerprint of a raw dataset; every training case is read once, in parallel.

    Raises DatasetError naming every broken case at once, so that none of them is met one by one.
    """
    unknown = sorted(set(drop_cases) - {case.identifier for case in dataset.cases})
    if unknown:
        raise DatasetError(f"{dataset.root}: there is no training case '{unknown[0]}' to drop.")
    cases = [case for case in dataset.cases if case.identifier not in set(drop_cases)]
    if not cases:
        raise DatasetError(f"{dataset.root}: there is no training case to plan from.")
    quota = min(CASE_SAMPLES, TOTAL_SAMPLES // len(cases))
    class_quota = max(10, min(CLASS_SAMPLES, TOTAL_SAMPLES // (len(cases) * max(1, len(dataset.labels.names)))))
    measure = partial(measure_case, dataset=dataset, quota=quota, class_quota=class_quota)
    found = _all_or_refuse(dataset, cases, measure, workers=workers)
    return summarize(dataset, found, dropped=tuple(sorted(drop_cases)))


@dataclass(frozen=True)
class CaseMeasurement:
    """What a worker sends back for one case: its fingerprint and a bounded sample of its intensities."""

    case: CaseFingerprint
    dimensions: int
    foreground: NDArray[np.float32]
    """(C, N) intensities drawn from the foreground, without labels from what is not padding; N = 0 without any."""
    classes: Mapping[str, NDArray[np.float32]]
    """(C, N) intensities drawn from each structure that the case shows."""


def measure_case(case: Case, *, dataset: RawDataset, quota: int, class_quota: int) -> CaseMeasurement:
    """Read one case and measure it. Raises DatasetError naming the case."""
    image, label = read_case(case, dataset)
    if label is None and dataset.labels.names:
        raise DatasetError(f"Case {case.identifier}: a training case needs a label, none is there.")
    permutation, flips = canonical_axes(image.grid.direction)
    pixels = turn_array(image.array, permutation, flips)
    before, box = pixels.shape[1:], nonzero_box(pixels)
    pixels = pixels[(slice(None), *box)]
    if label is None:
        labelled = before
        mask = np.zeros(pixels.shape[1:], np.int16)
        counted = above_padding(pixels)
    else:
        whole = turn_array(label.array, permutation, flips)
        labelled = whole.shape[1:]
        mask = _on_grid(whole, before)[(slice(None), *box)][0]
        counted = np.isin(mask, dataset.labels.foreground_values)
    spacing = tuple(float(image.grid.spacing[axis]) for axis in permutation)
    if image.references:
        grid = crop_grid(turn_grid(image.grid, permutation, flips), box)
        pixels = _with_references(pixels, image.references, grid, dataset.reference_channels)
    random = np.random.default_rng(INTENSITY_SEED)
    structures = [_structure(pixels, mask, dataset.labels, name, class_quota, random) for name in dataset.labels.names]
    return CaseMeasurement(
        case=CaseFingerprint(
            identifier=case.identifier,
            shape=_triple(pixels.shape[1:]),
            spacing=(spacing[0], spacing[1], spacing[2]),
            size_before_cropping=_triple(before),
            orientation=orientation_code(image.grid.direction),
            class_voxels=tuple(s.voxels for s in structures),
            class_components=tuple(s.components for s in structures),
            class_centroids_mm=tuple(
                None if s.centroid is None else _millimetres(s.centroid, spacing) for s in structures
            ),
            image_checksum=zlib.crc32(np.ascontiguousarray(image.array).data),
            label_scale=_ratio(labelled, before),
            reference_spacing=_finest_spacing(image.references),
        ),
        dimensions=2 if min(before) == 1 else 3,
        foreground=_draw(pixels, counted, quota, random),
        classes={
            name: s.sample for name, s in zip(dataset.labels.names, structures, strict=True) if s.sample is not None
        },
    )


def above_padding(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Where some channel of an image (C, Z, Y, X) is above its lowest value: (Z, Y, X).

    The lowest value is what a scanner or a skull-stripper fills the outside with; without labels nothing more is known
    of the background.
    """
    lowest = pixels.min(axis=(1, 2, 3), keepdims=True)
    found: NDArray[np.bool_] = (pixels > lowest).any(axis=0)
    return found


def _with_references(
    pixels: NDArray[Any], references: Sequence[Image], grid: Grid, numbers: Sequence[int]
) -> NDArray[np.float32]:
    """All channels (C, Z, Y, X) in the dataset's order; those of `numbers` as they show on the image's `grid`."""
    own, brought = iter(pixels), (resample_onto(reference, grid, order=1)[0] for reference in references)
    channels = range(len(pixels) + len(references))
    return np.stack([next(brought) if number in numbers else next(own) for number in channels])


def _finest_spacing(references: Sequence[Image]) -> Vector | None:
    """Along each canonical axis the finest of the references' spacings, in mm; None without any."""
    if not references:
        return None
    found = [permute_grid(r.grid, canonical_axes(r.grid.direction)[0]).spacing for r in references]
    z, y, x = (float(s) for s in np.min(found, axis=0))
    return z, y, x


@dataclass(frozen=True)
class _Structure:
    voxels: int = 0
    components: int = 0
    centroid: tuple[float, ...] | None = None
    sample: NDArray[np.float32] | None = None


def _structure(
    pixels: NDArray[Any], mask: NDArray[Any], labels: Labels, name: str, quota: int, random: np.random.Generator
) -> _Structure:
    import cc3d

    present = labels.mask(mask, name)
    if not present.any():
        return _Structure()
    box = nonzero_box(present[None])
    present = present[box]
    counts = [present.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1))]
    voxels = int(counts[0].sum())
    components = cc3d.connected_components(present.view(np.uint8), connectivity=CONNECTIVITY, return_N=True)[1]
    return _Structure(
        voxels=voxels,
        components=int(components),
        centroid=tuple(float(c @ np.arange(len(c))) / voxels + b.start for c, b in zip(counts, box, strict=True)),
        sample=_draw(pixels[(slice(None), *box)], present, quota, random),
    )


def _draw(
    pixels: NDArray[Any], mask: NDArray[np.bool_], count: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """`count` intensities (C, count) drawn with replacement from the voxels of `mask`; (C, 0) where it is empty."""
    counts = mask.sum(axis=(1, 2))
    if not counts.any():
        return np.empty((pixels.shape[0], 0), np.float32)
    ends = np.cumsum(counts)
    ranks = np.sort(random.integers(0, ends[-1], count))
    drawn = []
    for z in np.flatnonzero(counts):  # plane by plane: the indices of a whole big volume would take 8 bytes a voxel
        first, last = np.searchsorted(ranks, (ends[z] - counts[z], ends[z]))
        if first < last:
            inside = np.flatnonzero(mask[z])[ranks[first:last] - (ends[z] - counts[z])]
            rows, columns = np.divmod(inside, mask.shape[2])
            drawn.append(pixels[:, z, rows, columns])
    return np.concatenate(drawn, axis=1, dtype=np.float32)


def _all_or_refuse(
    dataset: RawDataset, cases: Sequence[Case], measure: Callable[[Case], CaseMeasurement], *, workers: int
) -> list[CaseMeasurement]:
    names = [case.identifier for case in cases]
    found: dict[int, CaseMeasurement] = {}
    broken: dict[int, str] = {}
    for index, result in map_cases(measure, cases, workers=workers, names=names):
        if isinstance(result, AutosegError):
            broken[index] = str(result)
        elif isinstance(result, Exception):
            raise result
        else:
            found[index] = result
    if broken:
        raise DatasetError(
            f"{dataset.root}: {len(broken)} of {len(cases)} training cases cannot be used; repair their "
            "files, or leave them out with --drop-cases:\n"
            + "\n".join(f"  {broken[index]}" for index in sorted(broken))
        )
    return [found[index] for index in range(len(cases))]


def summarize(
    dataset: RawDataset, measurements: Sequence[CaseMeasurement], *, dropped: tuple[str, ...] = ()
) -> Fingerprint:
    """The fingerprint of all cases from what was measured in each."""
    cases = tuple(m.case for m in measurements)
    foreground = np.concatenate([m.foreground for m in measurements], axis=1)
    if foreground.shape[1] == 0 and dataset.labels.names:
        require_foreground(dataset, annotated=())
    if foreground.shape[1] == 0:
        raise DatasetError(f"{dataset.root}: every image has the same value everywhere; there is nothing to learn.")
    spacing = np.median([case.spacing for case in cases], axis=0)
    dimensions = max(m.dimensions for m in measurements)
    shape = np.median([case.shape for case in cases], axis=0)
    measured = spacing[shape > 1] if dimensions == 2 else spacing  # the thickness of a plane says nothing
    removed = [1 - math.prod(case.shape) / math.prod(case.size_before_cropping) for case in cases]
    return Fingerprint(
        dataset=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        file_ending=dataset.file_ending,
        dimensions=dimensions,
        median_shape=_triple(shape),
        median_spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        anisotropy=round(float(max(measured, default=1.0) / min(measured, default=1.0)), 4),
        cropped_share=round(float(np.median(removed)), 4),
        intensities=_statistics(foreground),
        classes=_classes(dataset.labels, measurements),
        mirrored_pairs=find_mirrored_pairs(dataset.labels.names, cases),
        cases=cases,
        dropped_cases=dropped,
        reference_channels=dataset.reference_channels,
    )


def _classes(labels: Labels, measurements: Sequence[CaseMeasurement]) -> tuple[ClassFingerprint, ...]:
    total = sum(math.prod(m.case.shape) for m in measurements)
    classes = []
    for index, name in enumerate(labels.names):
        showing = [m for m in measurements if m.case.class_voxels[index]]
        samples = [m.classes[name] for m in showing]
        volumes = [m.case.class_voxels[index] * math.prod(m.case.spacing) for m in showing]
        components = [m.case.class_components[index] for m in showing]
        classes.append(
            ClassFingerprint(
                name=name,
                cases=len(showing),
                frequency=float(f"{sum(m.case.class_voxels[index] for m in showing) / total:.4g}"),
                median_volume_mm3=round(float(np.median(volumes)), 2) if showing else 0.0,
                median_components=float(np.median(components)) if showing else 0.0,
                intensities=_statistics(np.concatenate(samples, axis=1)) if showing else (),
            )
        )
    return tuple(classes)


def _statistics(sample: NDArray[np.float32]) -> tuple[IntensityStatistics, ...]:
    """Statistics of each row of `sample` (C, N)."""
    low, middle, high = np.percentile(sample, (0.5, 50, 99.5), axis=1)
    mean, std = sample.mean(axis=1, dtype=np.float64), sample.std(axis=1, dtype=np.float64)
    columns = zip(mean, std, low, middle, high, strict=True)
    return tuple(IntensityStatistics(*(float(f"{value:.7g}") for value in column)) for column in columns)


def uniform_fingerprint(
    name: str,
    *,
    shape: Shape,
    spacing: Vector,
    cases: int,
    labels: Labels,
    channels: tuple[str, ...] = ("MRI",),
    file_ending: str = ".nii.gz",
) -> Fingerprint:
    """The fingerprint of `cases` equal cases with intensities from 0 to 1: for questions of the kind "what if"."""
    absent = tuple(0 for _ in labels.names)
    statistics = IntensityStatistics(0.5, 0.25, 0.0, 0.5, 1.0)
    dimensions = 2 if min(shape) == 1 else 3
    measured = [s for s, n in zip(spacing, shape, strict=True) if dimensions == 3 or n > 1]
    return Fingerprint(
        dataset=name,
        channels=channels,
        labels=labels,
        file_ending=file_ending,
        dimensions=dimensions,
        median_shape=shape,
        median_spacing=spacing,
        anisotropy=round(max(measured, default=1.0) / min(measured, default=1.0), 4),
        cropped_share=0.0,
        intensities=(statistics,) * len(channels),
        classes=tuple(ClassFingerprint(structure, 0, 0.0, 0.0, 0.0, ()) for structure in labels.names),
        mirrored_pairs=(),
        cases=tuple(
            CaseFingerprint(f"case_{i:04d}", shape, spacing, shape, "SPL", absent, absent, (None,) * len(absent))
            for i in range(cases)
        ),
    )


# --- left and right ---------------------------------------------------------------------------------------------

_SIDE = re.compile(r"(?<![a-z])(left|right|l|r|lt|rt)(?![a-z])")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # kidneyLeft -> kidney_Left
_OTHER_SIDE = {"left": "right", "l": "r", "lt": "rt"}


def left_right_names(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Names that differ by left/right alone: `left_kidney` and `right_kidney`, `Hippocampus_L` and `Hippocampus_R`."""
    plain = {name: _CAMEL.sub("_", name).lower() for name in names}
    known = {text: name for name, text in plain.items()}
    pairs = []
    for name, text in plain.items():
        mirrored = _SIDE.sub(lambda m: _OTHER_SIDE.get(m.group(1), m.group(1)), text)
        if mirrored != text and mirrored in known:
            pairs.append((name, known[mirrored]))
    return tuple(pairs)


def find_mirrored_pairs(names: Sequence[str], cases: Sequence[CaseFingerprint]) -> tuple[MirroredPair, ...]:
    """The left/right names whose structures do lie on two sides: one axis parts them, the same way in every case.

    The axis is found from the centroids, so that a dataset whose files lie about their direction still has the right
    axis kept from mirroring.
    """
    pairs = []
    for left, right in left_right_names(names):
        axis = _parting_axis(list(names).index(left), list(names).index(right), cases)
        if axis is not None:
            pairs.append(MirroredPair(left, right, axis))
    return tuple(pairs)


def _parting_axis(left: int, right: int, cases: Sequence[CaseFingerprint]) -> int | None:
    both = [(case.class_centroids_mm[left], case.class_centroids_mm[right]) for case in cases]
    apart = np.array([np.subtract(a, b) for a, b in both if a is not None and b is not None])
    if len(apart) == 0:
        return None
    axis = int(np.argmax(np.abs(np.median(apart, axis=0))))
    same_side = np.mean(np.sign(apart[:, axis]) == np.sign(np.median(apart[:, axis])))
    return axis if np.median(apart[:, axis]) != 0 and same_side >= CONSISTENT_SHARE else None


def _millimetres(position: Sequence[float], spacing: Sequence[float]) -> Vector:
    z, y, x = (round(p * s, 2) for p, s in zip(position, spacing, strict=True))
    return z, y, x


def _on_grid(mask: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """A label (1, Z, Y, X) on a grid of `shape` voxels over the same extent: the nearest voxel's value."""
    if mask.shape[1:] == tuple(shape):
        return mask
    nearest = [((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(shape, mask.shape[1:], strict=True)]
    found: NDArray[Any] = mask[np.ix_(range(mask.shape[0]), *nearest)]
    return found


def _ratio(finer: Sequence[int], shape: Sequence[int]) -> Vector:
    z, y, x = (float(f"{f / n:.6g}") for f, n in zip(finer, shape, strict=True))
    return z, y, x


def _triple(values: Any) -> Shape:
    z, y, x = (int(round(float(v))) for v in values)
    return z, y, x
