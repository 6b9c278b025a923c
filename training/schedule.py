"""Learning rate as a function of progress in [0, 1], so that a budget in steps and one in seconds are the same code."""

from __future__ import annotations

import math
from collections.abc import Callable

WARMUP = 0.02  # share of the training in which the learning rate rises
DECAY_START = 0.5  # progress at which the constant part ends


def warmup_constant_decay(progress: float) -> float:
    """Rise, stay, fall to zero along 1 - sqrt (Haegele et al. 2024, arXiv:2405.18392)."""
    if progress < WARMUP:
        return max(progress, 1e-3 * WARMUP) / WARMUP
    if progress < DECAY_START:
        return 1.0
    return 1.0 - math.sqrt(min(1.0, (progress - DECAY_START) / (1.0 - DECAY_START)))


def poly(progress: float) -> float:
    """nnU-Net's polynomial decay, exponent 0.9."""
    return float((1.0 - min(progress, 1.0)) ** 0.9)


SCHEDULES: dict[str, Callable[[float], float]] = {"warmup_constant_decay": warmup_constant_decay, "poly": poly}


def learning_rate_factor(schedule: str, progress: float) -> float:
    """What the highest learning rate is multiplied with at `progress` in [0, 1]."""
    return SCHEDULES[schedule](progress)


def in_decay(schedule: str, progress: float) -> bool:
    """Whether the decay has begun; the state before it is kept, so that a longer training can go on from there."""
    return schedule == "warmup_constant_decay" and progress >= DECAY_START
