"""A plan and what was measured so far -> how long the tasks of a run take, and what is left for training a fold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from autoseg.plan import Configuration, Plan

FORWARD_SHARE = 1 / 3  # of a training step's operations that prediction takes: no gradients of features, nor of weights
TILE_STEP = 0.5  # of a patch, from one tile to the next
TILE_STRETCH = 1.25  # an axis so much longer than the patch still is one tile (`inference.sliding_window.STRETCH`)
START_SECONDS = 4.0  # to import torch, build a network, start the workers, and to draw the curve in the end
CASE_SECONDS = 0.1  # to read a held-out case, write its prediction and score it, beside the network's work
CASE_SECONDS_PER_MEGAVOXEL = 1.5  # the same for its size
PREPROCESS_SECONDS = 0.03  # to read, normalise and store a case however small
PREPROCESS_SECONDS_PER_MEGAVOXEL = 0.8  # the same for its size, with splines for a new spacing
SCORE_SECONDS_PER_MEGAVOXEL = 0.3  # to bring a candidate's probabilities for a case to the label's grid, each structure
SCORE_SECONDS = 0.003  # the same for a case however small
CANDIDATES_EXAMINED = 8  # as much as scoring so many candidates costs a closer look at the chosen one
DELIVER_SECONDS = 10.0  # to export the model and to write the report


@dataclass(frozen=True)
class Work:
    """A fold that waits for its training."""

    share: float = 1.0
    """Of a fold's training that it is given."""
    credit: float = 0.0
    """Seconds of that training that it had already."""
    left: float | None = None
    """Seconds, where it was begun and keeps the budget that it has."""
    beside: float = 0.0
    """Seconds to start, predict and score."""
    chance: float = 1.0
    """That it will be trained at all."""


def fold_seconds(left: float, works: Sequence[Work]) -> float:
    """How long a whole fold may train so that all `works` end when `left` seconds are over; below 0: they cannot.

    Infinite where all of them have their budget already.
    """
    known = sum(work.chance * (work.beside + (work.left or 0.0)) for work in works)
    credit = sum(work.chance * work.credit for work in works if work.left is None)
    shares = sum(work.chance * work.share for work in works if work.left is None)
    return (left - known + credit) / shares if shares else math.inf


@dataclass
class Pace:
    """Seconds of what is not training: forecast from the plan, then as measured."""

    plan: Plan
    workers: int = 1
    starting: float = START_SECONDS
    """To start a training and to end it."""
    passes: dict[str, float] = field(default_factory=dict)
    """By configuration: measured seconds to predict a case once and to score it."""
    scoring: float | None = None
    """Measured seconds to score a candidate on a case."""

    def predicting(self, configuration: str, cases: int, *, mirroring: bool = True) -> float:
        """Predict and score the held-out cases of a fold."""
        settings = self.plan.configuration(configuration)
        each = self.passes.get(configuration)
        if each is None:
            forecast = self.plan.forecasts.get(configuration)
            step = forecast.seconds_per_step if forecast is not None else 0.0
            each = tiles(settings) * FORWARD_SHARE * step / settings.batch_size
            each += (CASE_SECONDS + CASE_SECONDS_PER_MEGAVOXEL * _megavoxels(settings)) / self.workers
        return cases * each * ways(settings, mirroring=mirroring)

    def predicted(self, configuration: str, cases: int, seconds: float, *, mirroring: bool = True) -> None:
        """Take note of how long it took; the slowest counts."""
        each = seconds / max(1, cases) / ways(self.plan.configuration(configuration), mirroring=mirroring)
        self.passes[configuration] = max(each, self.passes.get(configuration, 0.0))

    def comparing(self, candidates: int, cases: int, configurations: Sequence[str]) -> float:
        """Score candidates of these configurations on held-out cases."""
        each = self.scoring
        if each is None:
            largest = max((_megavoxels(self.plan.configuration(name)) for name in configurations), default=0.0)
            channels = self.plan.labels.output_channels
            each = (SCORE_SECONDS + SCORE_SECONDS_PER_MEGAVOXEL * channels * largest) / self.workers
        return candidates * cases * each

    def compared(self, candidates: int, cases: int, seconds: float) -> None:
        """Take note of how long it took."""
        self.scoring = seconds / max(1, candidates * cases)

    def preprocessing(self, shapes: Sequence[tuple[int, int, int]]) -> float:
        """Bring cases of these shapes to one grid."""
        voxels = sum(math.prod(shape) for shape in shapes) / 1e6
        each = PREPROCESS_SECONDS * len(shapes) + PREPROCESS_SECONDS_PER_MEGAVOXEL * voxels * len(self.plan.channels)
        return each / self.workers

    def finishing(self, configurations: Sequence[str], cases: int) -> float:
        """Choose among configurations, export and report."""
        count = len(configurations)
        both = sum(ways(self.plan.configuration(name)) > 1 for name in configurations)
        ensembles = 3 * math.comb(count, 2) + (count > 2)
        candidates = count + both + ensembles + CANDIDATES_EXAMINED
        return self.comparing(candidates, cases, configurations) + DELIVER_SECONDS


def ways(configuration: Configuration, *, mirroring: bool = True) -> int:
    """How many times a held-out case is predicted: as it is, and each mirrored copy of it."""
    axes = len(configuration.training.mirror_axes) if mirroring else 0
    return 1 + 2**axes if axes else 1


def tiles(configuration: Configuration) -> int:
    """Patches that a median case is predicted in."""
    count = 1
    for size, patch in zip(configuration.median_shape, configuration.patch_size, strict=True):
        if size > patch * TILE_STRETCH:
            count *= math.ceil((size - patch) / max(1.0, patch * TILE_STEP)) + 1
    return count


def _megavoxels(configuration: Configuration) -> float:
    return math.prod(configuration.median_shape) * math.prod(configuration.sr_scale) / 1e6
