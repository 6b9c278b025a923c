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
from autoseg.training.shapes import Batch, blank_batch
from autoseg.training.step import TrainingState, build_training, training_step

PROBE_SECONDS = 0.4  # after the first step, a probe ends with the step that passes this
PROBE_STEPS = 2  # steps after the first one, which warms up
PROBE_VOXELS = (4_000, 50_000)  # of the two batches that are timed: on two cores about 0.03 and 0.1 s a step
# a processor computes channels in blocks of 16 (oneDNN): 24 feature maps cost about what 32 do, 8 nearly what 16 do
CHANNEL_BLOCK = 16
WIDTH_EXPONENT = 1.7  # seconds grow with width ** 1.7: convolutions with its square, norms and copies with width itself
NARROW_EXPONENT = 0.6  # the same below the probe's width


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
    overhead: float = 0.0
    """Seconds of a step that do not grow with the voxels: the optimiser's, and those of starting every operation."""

    def seconds_per_step(self, width: int, voxels: int) -> float:
        """Forecast for the same topology at another width, batch and patch."""
        growing = (self.seconds - self.overhead) * voxels / self.voxels
        if width <= self.width:
            return self.overhead + growing * float((width / self.width) ** NARROW_EXPONENT)
        blocks = math.ceil(width / CHANNEL_BLOCK) / math.ceil(self.width / CHANNEL_BLOCK)
        return self.overhead + growing * float(blocks**WIDTH_EXPONENT)


def probe_speed(
    architecture: Architecture,
    labels: Labels,
    *,
    recipe: str,
    patch_size: Shape,
    device: torch.device,
    configuration: Configuration | None = None,
) -> Speed:
    """Seconds of a real training step: `architecture` on random data, on a very small and on a larger batch.

    The `configuration` says what a super-resolving network is trained on, and by what loss, as for `StepMeter`.
    """
    state = build_training(architecture, labels, RECIPES[recipe], device, configuration=configuration)
    seconds, voxels = [], []
    for most in PROBE_VOXELS:
        patch = _smaller_patch(patch_size, architecture.divisor, most)
        batch = max(1, most // math.prod(patch))
        data = blank_batch(architecture, batch, patch, configuration=configuration, device=device)
        data.image.normal_()
        seconds.append(_quickest_step(state, data))
        voxels.append(batch * math.prod(patch))
    slope = max(0.0, seconds[1] - seconds[0]) / max(1, voxels[1] - voxels[0])
    overhead = min(max(0.0, seconds[1] - slope * voxels[1]), seconds[1] / 2)
    return Speed(seconds[1], architecture.features[0], voxels[1], str(device), overhead)


def _quickest_step(state: TrainingState, data: Batch) -> float:
    """Whatever else runs on the machine only adds to a step's time, so the quickest of a few tells most."""
    precision = autocast_dtype(data.image.device)
    seconds: list[float] = []
    while len(seconds) <= PROBE_STEPS and sum(seconds[1:]) < PROBE_SECONDS:
        began = time.perf_counter()
        loss = training_step(state, data, precision=precision)
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _smaller_patch(patch: Shape, divisor: Shape, most: int) -> Shape:
    """`patch` halved to at most `most` voxels: divisible still, with more than one voxel in the bottleneck."""
    parts = [p // d for p, d in zip(patch, divisor, strict=True)]
    while math.prod(parts) * math.prod(divisor) > most and math.prod(parts) > 3:
        axis = parts.index(max(parts))
        parts[axis] //= 2
    z, y, x = (part * d for part, d in zip(parts, divisor, strict=True))
    return z, y, x
