"""A configuration and the grid of an image -> the grid that its network reads, and the one that it answers on.

Along axes on which a network does not super-resolve both are the same. A fixed scale refines the image's own grid by
that scale; the grid of an image that is much finer than planned is refined less, to the spacing that was planned. An
any-scale network reads slices as far apart as they are and is asked for the spacing that was planned, or for any other
that its range of scales allows.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from autoseg.errors import PredictionError
from autoseg.executor import host_memory_bytes
from autoseg.image import Image, Triple
from autoseg.inference.grids import grid_between
from autoseg.plan import Configuration, PreprocessingSettings, Vector
from autoseg.preprocessing.case import WHOLE, CaseGeometry, find_geometry, fine_geometry
from autoseg.preprocessing.framed import turned, turned_back
from autoseg.units import format_bytes

log = logging.getLogger(__name__)

SAME_SPACING = 0.01  # as a share: a spacing this close to another is meant to be the same
THINNER = 1.3  # times as fine (or coarse) as planned: up to it a fixed scale splits every slice into equally many
AXES = "zyx"
BYTES_A_VOXEL = 8  # of an answer that is moved in the plane: an image, and labels or a probability


def planned_scale(configuration: Configuration) -> Vector:
    """Input spacing / output spacing along the network axes; of an any-scale network what was planned for."""
    scale: Vector = turned_back(configuration.sr_scale, configuration.frames(training=False)[0])
    return scale


def input_settings(configuration: Configuration, image: Image) -> PreprocessingSettings:
    """How `image` is brought to the grid that the network reads.

    For an any-scale network slices stay as far apart as they are, unless that is below its range.
    """
    settings = configuration.input_preprocessing
    if configuration.sr_range is None:
        return settings
    low, _ = configuration.sr_range
    own = find_geometry(image, replace(settings, crop_to_nonzero=False)).turned.spacing
    spacing = [
        planned if planned is None or scale == 1 else max(distance, low * planned / scale)
        for planned, scale, distance in zip(settings.spacing, planned_scale(configuration), own, strict=True)
    ]
    assert spacing[1] is not None and spacing[2] is not None
    return replace(settings, spacing=(spacing[0], spacing[1], spacing[2]))


def output_geometry(
    configuration: Configuration, geometry: CaseGeometry, output_spacing: Triple | None = None
) -> CaseGeometry:
    """Where the network answers about a case with this `geometry` of its input: on that, or on a refined one.

    `output_spacing` is in mm along the file's axes (z, y, x). Raises PredictionError where the network cannot answer
    on such a grid.
    """
    if output_spacing is not None:
        require_any_scale(configuration)
        return _asked_geometry(configuration, geometry, output_spacing)
    if not configuration.super_resolves:
        return geometry
    factor = _planned_factor(configuration, geometry)
    _warn_of_thick_slices(configuration, geometry, factor)
    if configuration.sr_range is None:
        return _fixed_geometry(geometry, factor, planned_scale(configuration))
    # rounding may give a voxel more than the network can be asked for; the way to the file's grid interpolates it
    limits = [math.floor(size * configuration.sr_range[1]) for size in geometry.network_shape]
    return _refined(configuration, geometry, factor, limits)


def check_spacing(output_spacing: Triple) -> None:
    """Raises PredictionError where no grid has such a spacing."""
    if not all(0 < spacing < math.inf for spacing in output_spacing):
        got = ", ".join(f"{spacing:g}" for spacing in output_spacing)
        raise PredictionError(f"The output spacing must be three positive numbers (z, y, x), got {got} mm.")


def require_any_scale(configuration: Configuration) -> None:
    """Raises PredictionError where the grid of the answer cannot be chosen."""
    if configuration.sr_range is None:
        where = "one refined grid" if configuration.super_resolves else "the image's own grid"
        raise PredictionError(
            f"Configuration {configuration.name} answers on {where} only, so no output spacing can be asked for; use "
            "an any-scale model, such as 3d_sr_any."
        )


def _planned_factor(configuration: Configuration, geometry: CaseGeometry) -> Vector:
    """How often the image's grid is refined to the planned spacing, once where it is finer itself.

    A fixed scale stays as it is for images that are coarser than planned, or hardly finer (THINNER).
    """
    most = math.inf if configuration.sr_range is not None else 1 / THINNER
    factor = []
    planned = configuration.input_preprocessing.spacing
    for scale, spacing, own in zip(planned_scale(configuration), planned, geometry.turned.spacing, strict=True):
        if scale == 1 or spacing is None or own >= most * spacing:
            factor.append(scale)
        else:
            highest = configuration.sr_range[1] if configuration.sr_range is not None else scale
            factor.append(min(max(1.0, own * scale / spacing), highest))
    return factor[0], factor[1], factor[2]


def _warn_of_thick_slices(configuration: Configuration, geometry: CaseGeometry, factor: Vector) -> None:
    """Tell of an image so coarse that nothing like it was planned for; its answer is as much coarser."""
    scales, planned = planned_scale(configuration), configuration.input_preprocessing.spacing
    for scale, spacing, own, f in zip(scales, planned, geometry.turned.spacing, factor, strict=True):
        highest, more = (scale, THINNER) if configuration.sr_range is None else (configuration.sr_range[1], 1.01)
        if scale > 1 and spacing is not None and own > more * spacing * highest / scale:
            log.warning(
                "Slices of %.4g mm are thicker than the %.4g mm that configuration %s was planned for: it answers on "
                "%.4g mm; do not rely on it.", own, spacing * highest / scale, configuration.name, own / f,
            )  # fmt: skip


def _fixed_geometry(geometry: CaseGeometry, factor: Vector, scale: Vector) -> CaseGeometry:
    """The grid refined by `factor`; the network answers at its own `scale`, whatever that is."""
    fine = fine_geometry(geometry, factor)
    shape = list(fine.network_shape)
    for axis, (f, s) in enumerate(zip(factor, scale, strict=True)):
        if f != s:
            (start, stop), (first, last) = geometry.crop[axis], fine.crop[axis]
            voxels = (last - first) / (f * (stop - start)) * geometry.network_shape[axis] * s
            shape[axis] = max(1, math.floor(voxels + WHOLE))
    return replace(fine, network_shape=(shape[0], shape[1], shape[2]))


def _asked_geometry(configuration: Configuration, geometry: CaseGeometry, output_spacing: Triple) -> CaseGeometry:
    check_spacing(output_spacing)
    scale, own = planned_scale(configuration), geometry.turned.spacing
    target: Vector = turned(output_spacing, geometry.permutation)
    for axis, (s, have, want) in enumerate(zip(scale, own, target, strict=True)):
        if s > 1 and want > have * (1 + SAME_SPACING):
            raise PredictionError(
                f"The output spacing is {want:g} mm along {AXES[geometry.permutation[axis]]}, coarser than the image's "
                f"{have:g} mm; ask for a finer one, or for the image's own grid with `--native`."
            )
    factor = [1.0 if s == 1 else have / want for s, have, want in zip(scale, own, target, strict=True)]
    fine = _refined(configuration, geometry, (factor[0], factor[1], factor[2]))
    _check_range(configuration, geometry, fine)
    return fine


def asked_plane(configuration: Configuration, geometry: CaseGeometry, output_spacing: Triple) -> CaseGeometry:
    """The grid of `output_geometry`, of the asked spacing along the axes too on which the network does not refine.

    There its answer is brought from the one to the other.
    """
    own, target = geometry.turned.spacing, turned(output_spacing, geometry.permutation)
    moved = [
        s == 1 and abs(have / want - 1) > SAME_SPACING
        for s, have, want in zip(planned_scale(configuration), own, target, strict=True)
    ]
    if not any(moved):
        return geometry
    z, y, x = (have / want if m else 1.0 for m, have, want in zip(moved, own, target, strict=True))
    fine = fine_geometry(geometry, (z, y, x))
    voxels = (last - first for first, last in fine.crop)
    z, y, x = (n if m else size for m, n, size in zip(moved, voxels, geometry.network_shape, strict=True))
    size, limit = BYTES_A_VOXEL * math.prod(fine.original.shape), host_memory_bytes()
    if size > limit:
        raise PredictionError(
            f"The output spacing asks for {'x'.join(map(str, fine.original.shape))} voxels, at least "
            f"{format_bytes(size)} where this machine has {format_bytes(limit)}; ask for a coarser one."
        )
    return replace(fine, network_shape=(z, y, x))


def _refined(
    configuration: Configuration, geometry: CaseGeometry, factor: Vector, limits: list[int] | None = None
) -> CaseGeometry:
    """The refined grid; where the network super-resolves it answers on the voxels of the file, at most `limits`."""
    fine = fine_geometry(geometry, factor)
    shape = []
    for axis, scale in enumerate(planned_scale(configuration)):
        start, stop = fine.crop[axis]
        voxels = fine.network_shape[axis] if scale == 1 else stop - start
        shape.append(voxels if limits is None or scale == 1 else min(voxels, limits[axis]))
    return replace(fine, network_shape=(shape[0], shape[1], shape[2]))


def _check_range(configuration: Configuration, geometry: CaseGeometry, fine: CaseGeometry) -> None:
    assert configuration.sr_range is not None
    low, high = configuration.sr_range
    scales = grid_between(geometry, fine).scale
    for axis, (scale, planned) in enumerate(zip(scales, planned_scale(configuration), strict=True)):
        if planned != 1 and not low * (1 - SAME_SPACING) <= scale <= high * (1 + SAME_SPACING):
            where, distance = AXES[geometry.permutation[axis]], geometry.network.spacing[axis]
            raise PredictionError(
                f"The output spacing is {fine.turned.spacing[axis]:.4g} mm along {where}, {scale:.3g} times as fine as "
                f"the input's {distance:.4g} mm; configuration {configuration.name} answers for {low:g} to {high:g} "
                f"times, {distance / high:.3g} to {distance / low:.3g} mm."
            )
