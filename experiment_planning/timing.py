"""A small network on this machine -> how fast it trains, from a few real steps; no file is read or written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from autoseg.device import autocast_dtype
from autoseg.labels import Labels
from autoseg.plan import Architecture, Configuration, Shape
from autoseg.training.settings import RECIPES
from autoseg.training.shapes import blank_batch
from autoseg.training.step import build_training, training_step

PROBE_SECONDS = 0.6  # after the first step, the probe ends with the step that passes this
PROBE_STEPS = 2  # steps after the first one, which warms up
PROBE_VOXELS = 100_000  # of the probe's batch: about 0.1 s a step on two cores
# seconds grow with width ** 1.6: convolutions with its square, norms and copies with width itself (on two cores, from
# 16 to 32: 2.7 times in 2D, 3.1 in 3D); below the probe's width less, as oneDNN computes channels in blocks of 16
WIDTH_EXPONENT = 1.6
NARROW_EXPONENT = 0.6


@dataclass(frozen=True)
class Speed:
    """What the probe measured."""

    seconds: float
    """Of one training step of the probe."""
    width: int
    """Feature maps of the probe's first stage."""
    voxels: int
    """Of the probe's batch: batch size times patch."""
    device: str
    """Where it ran."""

    def seconds_per_step(self, width: int, voxels: int) -> float:
        """Forecast for the same topology at another width, batch and patch."""
        exponent = WIDTH_EXPONENT if width > self.width else NARROW_EXPONENT
        return self.seconds * voxels / self.voxels * float((width / self.width) ** exponent)


def probe_speed(
    architecture: Architecture,
    labels: Labels,
    *,
    recipe: str,
    patch_size: Shape,
    device: torch.device,
    configuration: Configuration | None = None,
) -> Speed:
    """Seconds of a real training step: `architecture` on random data, on a batch of about PROBE_VOXELS input voxels.

    The `configuration` says what a super-resolving network is trained on, and by what loss, as for `StepMeter`.
    """
    patch = _smaller_patch(patch_size, architecture.divisor)
    batch = max(1, PROBE_VOXELS // math.prod(patch))
    state = build_training(architecture, labels, RECIPES[recipe], device, configuration=configuration)
    data = blank_batch(architecture, batch, patch, configuration=configuration, device=device)
    image, precision = data.image.normal_(), autocast_dtype(device)
    seconds: list[float] = []
    while len(seconds) <= PROBE_STEPS and sum(seconds[1:]) < PROBE_SECONDS:
        began = time.perf_counter()
        loss = training_step(state, image, data.label, precision=precision, truth=data.truth, grid=data.grid)
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    # the quickest step: whatever else runs on the machine only adds to a step's time
    return Speed(min(seconds[1:]), architecture.features[0], batch * math.prod(patch), str(device))


def _smaller_patch(patch: Shape, divisor: Shape) -> Shape:
    """`patch` halved to at most PROBE_VOXELS voxels: divisible still, with more than one voxel in the bottleneck."""
    parts = [p // d for p, d in zip(patch, divisor, strict=True)]
    while math.prod(parts) * math.prod(divisor) > PROBE_VOXELS and math.prod(parts) > 3:
        axis = parts.index(max(parts))
        parts[axis] //= 2
    z, y, x = (part * d for part, d in zip(parts, divisor, strict=True))
    return z, y, x
