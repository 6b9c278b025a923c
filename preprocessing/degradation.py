"""A stored fine image -> the thick-slice image that a scanner would have given, normalised as that would have been.

What the store holds was normalised as a fine image. A thick-slice image has less contrast, so its own mean and
standard deviation differ; where the scheme depends on the image they are taken from the whole degraded image.
torch is imported by what needs it, so that this module costs workers that only preprocess nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.acquisition import degrade, offset, slice_weights
from autoseg.errors import PlanError
from autoseg.plan import Acquisition, Configuration, Shape, Vector
from autoseg.plan_values import BIAS_CORRECTION
from autoseg.preprocessing.case import CaseGeometry
from autoseg.preprocessing.framed import FramedEntry, turned_back
from autoseg.preprocessing.normalize import SMALLEST_SPREAD, late_limits
from autoseg.preprocessing.store import Store, StoreEntry

if TYPE_CHECKING:
    from autoseg.networks.upsampling import OutputGrid

Volume = NDArray[np.float64]

MOMENT_VOXELS = 2**22  # of an image; larger ones are not degraded whole, but in boxes
MOMENT_BOXES = 16
MOMENT_BOX = 64  # voxels along each side of a box
MOMENT_DIGITS = 6  # significant: the same whatever number of threads took the sums
SCALE_STEP = 0.125  # any-scale networks: moments are taken at multiples of it, which differ by less than 1 %
KNOWN_MOMENTS = 65536  # that a process remembers
MASKED = "masked_zscore"
INTERPOLATED = "dirac"  # the profile of inputs that imitate no scanner
FINER = 1.3  # times as fine as what a network reads: from there on a scan is made as thick
TOO_THICK = 1.3  # times as thick as the store's slices: as interpolation loses nothing below it (see the planner)


class Moments(NamedTuple):
    """What a degraded image is normalised with: (x - mean) / std."""

    mean: NDArray[np.float64]
    """(C,), in the units of the stored image."""
    std: NDArray[np.float64]
    """(C,), above zero."""


class DegradedImage(NamedTuple):
    """A stored image as thick slices."""

    image: NDArray[np.float32]
    """(C, Z, Y, X) in the prediction frame, normalised."""
    grid: OutputGrid
    """All voxels of the stored image, relative to the thick slices."""
    moments: Moments
    """What `image` was normalised with."""


def degrade_entry(entry: StoreEntry, configuration: Configuration) -> DegradedImage:
    """The whole image of a case at the configuration's `sr_scale`, in its prediction frame.

    Without noise, with the middle of the thicknesses; what was acquired as thick slices is only brought to their grid.
    Raises StorageError; PlanError where an axis is thinner than a slice.
    """
    import torch

    from autoseg.networks.upsampling import OutputGrid

    frame = configuration.frames(training=False)[0]
    if is_thick(entry, configuration):
        configuration = replace(configuration, acquisition=Acquisition(INTERPOLATED))
    scale, acquisition = configuration.sr_scale, _acquisition(configuration)
    moments = input_moments(entry, configuration, scale)
    fine = FramedEntry(entry, frame).read("image").astype(np.float32, copy=False)
    channels = []
    for channel, masked, mean, std in zip(fine, masked_channels(configuration), *moments, strict=True):
        centred = torch.from_numpy(np.ascontiguousarray(centre(channel, mean, masked=masked)))
        channels.append((degrade(centred, scale, acquisition) / float(std)).numpy())
    z, y, x = fine.shape[1:]
    start = [-offset(size, factor) if factor != 1 else 0.0 for size, factor in zip((z, y, x), scale, strict=True)]
    grid = OutputGrid((z, y, x), scale, (start[0], start[1], start[2]))
    image = np.stack(channels)
    clip_late(image, configuration)
    return DegradedImage(image, grid, moments)


def as_acquired(image: NDArray[Any], geometry: CaseGeometry, configuration: Configuration) -> NDArray[Any]:
    """Raw channels (C, Z, Y, X) as a scanner with the slices that the network reads would have given them.

    Along the axes on which a network that was trained on degraded images refines, where those given are finer than what
    it reads (FINER); elsewhere and for other networks as they are. float32 where anything was done.
    """
    if configuration.sr_source != "degraded" or _acquisition(configuration).profile == INTERPOLATED:
        return image
    scale = turned_back(configuration.sr_scale, configuration.frames(training=False)[0])
    thick = image
    for axis, (s, fine, slices) in enumerate(zip(scale, image.shape[1:], geometry.network_shape, strict=True)):
        if s > 1 and fine > FINER * slices:
            weights = slice_weights(fine, fine / slices, _acquisition(configuration), place=(slices, 0.0))
            moved = np.tensordot(weights, thick.astype(np.float32, copy=False), axes=(1, axis + 1))
            thick = np.moveaxis(moved, 0, axis + 1)
    return thick


def is_thick(entry: StoreEntry, configuration: Configuration) -> bool:
    """Whether a case was acquired too coarse to show what thick slices lack, and was only interpolated to the store.

    Asked where slices of a scanner are imitated; inputs that are merely interpolated have no such truth (`dirac`).
    """
    if configuration.sr_source != "degraded" or _acquisition(configuration).profile == INTERPOLATED:
        return False
    scale = turned_back(configuration.sr_scale, configuration.frames(training=False)[0])
    stored, acquired = entry.geometry.network.spacing, entry.geometry.cropped.spacing
    return any(s > 1 and a > TOO_THICK * f for s, a, f in zip(scale, acquired, stored, strict=True))


def fine_cases(store: Store, cases: Sequence[str], configuration: Configuration) -> list[str]:
    """Those of `cases` that a network may be trained on: not the thick ones. Raises PlanError where none is left."""
    kept = [case for case in cases if not is_thick(store.entry(case), configuration)]
    if cases and not kept:
        raise PlanError(
            f"Configuration {configuration.name} learns from slices as thin as its answer; each of the {len(cases)} "
            f"cases to train on ({', '.join(cases[:5])}) was acquired more than {TOO_THICK:g} times as coarse."
        )
    return kept


def centre(channel: Any, mean: float, *, masked: bool) -> Any:
    """A channel (array or tensor) minus its mean; where the scheme is masked, zeros are outside and stay zero."""
    centred = channel - float(mean)  # a Python number: the channel keeps its type
    return centred * (channel != 0) if masked else centred


def clip_late(image: Any, configuration: Configuration) -> None:
    """Clip the channels of an image (C, Z, Y, X), array or tensor, that were stored without: where they lie."""
    for channel, normalization in zip(image, configuration.preprocessing.image_normalization, strict=True):
        limits = late_limits(normalization)
        if limits is not None:
            channel[...] = channel.clip(*limits)


def masked_channels(configuration: Configuration) -> tuple[bool, ...]:
    """Whether the image's channels have an outside, which is zero (skull-stripped brains)."""
    return tuple(scheme == MASKED for scheme in _schemes(configuration))


def input_moments(
    entry: StoreEntry, configuration: Configuration, scale: Vector, *, frame: Shape | None = None
) -> Moments:
    """Mean and standard deviation (C,) of the whole image of a case, as stored, after the forward model.

    `scale` is along the axes of `frame`, by default the prediction's. For `rescale` they are the lowest intensity and
    the range; for `masked_zscore` those of the inside; for schemes that do not depend on the image (ct, none, rgb)
    0 and 1. Exact for images of up to MOMENT_VOXELS, else from boxes at fixed random places. Remembered by the process.
    """
    axes = configuration.frames(training=False)[0] if frame is None else frame
    if configuration.sr_range is not None:
        scale = tuple(max(1.0, round(s / SCALE_STEP) * SCALE_STEP) for s in scale)  # type: ignore[assignment]
    return _measured(
        entry.folder,
        entry.case,
        entry.arrays["image"].frame_checksum,
        _schemes(configuration),
        turned_back(scale, axes),
        _acquisition(configuration),
    )


def _schemes(configuration: Configuration) -> tuple[str, ...]:
    return tuple(n.scheme.removeprefix(BIAS_CORRECTION) for n in configuration.preprocessing.image_normalization)


def _acquisition(configuration: Configuration) -> Acquisition:
    assert configuration.acquisition is not None, "check_plan asks for one where images are degraded"
    return configuration.acquisition


@functools.lru_cache(maxsize=KNOWN_MOMENTS)
def _measured(
    folder: Path, case: str, checksum: int, schemes: tuple[str, ...], scale: Vector, acquisition: Acquisition
) -> Moments:
    """The moments of a stored image; `checksum` tells a rewritten one from the one that was measured before."""
    means, stds = np.zeros(len(schemes)), np.ones(len(schemes))
    if any(scheme in MEASURES for scheme in schemes):
        entry = Store(folder).entry(case)
        parts = [_Part(entry.read("image", box), scale, acquisition) for box in _boxes(entry.shape)]
        for channel, scheme in enumerate(schemes):
            if scheme in MEASURES:
                try:
                    mean, spread = MEASURES[scheme](parts, channel)
                except PlanError as error:
                    raise PlanError(f"Case {case}: {error}") from error
                means[channel] = _rounded(mean)
                stds[channel] = _rounded(spread) if spread > SMALLEST_SPREAD else 1.0
    means.setflags(write=False)
    stds.setflags(write=False)
    return Moments(means, stds)


def _rounded(value: float) -> float:
    return float(f"{value:.{MOMENT_DIGITS}g}")


def _boxes(shape: Shape) -> list[tuple[slice, slice, slice]]:
    """The whole image where it is small, else boxes at fixed random places."""
    if int(np.prod(shape)) <= MOMENT_VOXELS:
        return [(slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))]
    random = np.random.default_rng(0)
    boxes = []
    for _ in range(MOMENT_BOXES):
        sides = []
        for size in shape:
            length = min(size, MOMENT_BOX)
            start = int(random.integers(size - length + 1))
            sides.append(slice(start, start + length))
        boxes.append((sides[0], sides[1], sides[2]))
    return boxes


@dataclass(frozen=True)
class _Part:
    """A box of the stored image, to be degraded channel by channel."""

    image: NDArray[np.float32]
    """(C, Z, Y, X) in network axes."""
    scale: Vector
    acquisition: Acquisition

    def thick(self, channel: int) -> Volume:
        """The channel after the forward model."""
        return self._degraded(self.image[channel])

    def inside(self, channel: int) -> NDArray[np.float64]:
        """The channel after the forward model, where at least half of a voxel lies inside the mask."""
        return self.thick(channel)[self._degraded(self.image[channel] != 0) > 0.5]

    def _degraded(self, volume: NDArray[Any]) -> Volume:
        import torch

        fine = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float64))
        thick: Volume = degrade(fine, self.scale, self.acquisition).numpy()
        return thick


def _whole(parts: list[_Part], channel: int) -> tuple[float, float]:
    values = np.concatenate([part.thick(channel).ravel() for part in parts])
    return float(values.mean()), float(values.std())


def _inside(parts: list[_Part], channel: int) -> tuple[float, float]:
    values = np.concatenate([part.inside(channel) for part in parts])
    return (float(values.mean()), float(values.std())) if len(values) else (0.0, 1.0)


def _range(parts: list[_Part], channel: int) -> tuple[float, float]:
    thick = [part.thick(channel) for part in parts]
    lowest, highest = min(float(part.min()) for part in thick), max(float(part.max()) for part in thick)
    return lowest, highest - lowest


# the schemes that depend on the image; see `autoseg.preprocessing.normalize`
MEASURES: dict[str, Callable[[list[_Part], int], tuple[float, float]]] = {
    "zscore": _whole,
    MASKED: _inside,
    "rescale": _range,
}
