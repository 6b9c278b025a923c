"""Every fixed number of training in one place; what the planner decides is in `plan.TrainingSettings`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """An optimiser with its learning-rate schedule."""

    optimizer: str
    """`sgd` (Nesterov) or `adamw`."""
    learning_rate: float
    """The highest learning rate."""
    weight_decay: float
    schedule: str
    """Key of `schedule.SCHEDULES`."""
    momentum: float = 0.0
    """Of SGD."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW."""
    clip_norm: float = 12.0
    """Largest norm of the gradient (nnU-Net's 12)."""
    ema: bool = True
    """Whether predictions come from averaged weights."""


RECIPES: dict[str, Recipe] = {
    # nnU-Net's: SGD with Nesterov momentum and a polynomial schedule
    "sgd": Recipe("sgd", learning_rate=1e-2, weight_decay=3e-5, schedule="poly", momentum=0.99, ema=False),
    "adamw": Recipe("adamw", learning_rate=3e-3, weight_decay=1e-2, schedule="warmup_constant_decay"),
}

FOREGROUND_FRACTION = 1 / 3  # of a batch's patches are centred on a foreground voxel (nnU-Net's 33 %)
CURRICULUM_STEPS = 200  # of an any-scale training see whole scales alone
EMA_WIDTH = 0.05  # averaging window of the weights as a fraction of the steps so far
HISTORY_ROWS = 50  # rows of history.csv in a whole training
VALIDATION_PATCHES = 16  # held-out patches behind the online Dice of one row
VALIDATION_BYTES = 256 * 2**20  # they are kept in memory; of large patches fewer are taken
VALIDATION_SHARE = 0.03  # of the training time that the online Dice may take; rows beyond it go without
SLOW_SHARE = 0.5  # of the steps that were forecast: who gets fewer is told
SAVE_SECONDS = 60.0  # so far apart in time the saved states lie at least, ...
SAVE_SHARE = 0.02  # ... and so far in progress, ...
MOST_UNSAVED_SECONDS = 600.0  # ... but in a long training no further than this in time
PREFETCH_BATCHES = 4  # batches that wait ready for the optimiser
