"""Arm A2 of the super-resolution protocol: a network on the thick grid learns the share that each class has of a voxel.

What a thick voxel holds of each class is what the forward model makes of the fine label. autoseg itself has no such
labels (it learns on the fine grid instead), so this arm is no command: it takes autoseg's samples, optimiser step,
schedule and prediction, and a loss of its own. Used by superresolution.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from paced import PACE, PACE_SECONDS, Pace, Training
from torch import Tensor, nn
from torch.nn import functional as F

from autoseg.checkpoint import Checkpoint
from autoseg.device import autocast_dtype
from autoseg.labels import Labels
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Acquisition, Plan
from autoseg.preprocessing.store import Store
from autoseg.training.batches import Samples, batches
from autoseg.training.folds import load_folds, select_fold
from autoseg.training.losses import SMOOTH, made_thick
from autoseg.training.schedule import learning_rate_factor
from autoseg.training.settings import RECIPES
from autoseg.training.step import build_training, training_step
from autoseg.workspace import CHECKPOINT, Workspace


class SoftDiceCrossEntropy(nn.Module):
    """Cross-entropy minus Dice, both for shares, at every scale of the decoder, halved with each coarser one.

    The Dice has squares in its denominator (Milletari et al. 2016), since without them it is best not where the answer
    is the share but where it is 0 or 1.
    """

    def __init__(self, labels: Labels, acquisition: Acquisition) -> None:
        super().__init__()
        assert not labels.has_regions and labels.ignore is None, "the protocol's labels are plain classes"
        assert labels.values == tuple((k,) for k in range(1, len(labels.values) + 1)), "values are channels"
        self.channels, self.acquisition = labels.output_channels, acquisition

    def forward(
        self, outputs: Sequence[Tensor], label: Tensor, truth: Tensor | None, image: Tensor, grid: OutputGrid
    ) -> Tensor:
        """Logits (B, K, Z, Y, X) on the thick grid, finest first, and the label on the fine one -> scalar."""
        onehot = F.one_hot(label[:, 0].long(), self.channels).movedim(-1, 1).float()
        share = made_thick(onehot, grid, image.shape[2:], self.acquisition)
        weights = [0.5**i for i in range(len(outputs))]
        parts = [w / sum(weights) * self._at(logits.float(), share) for w, logits in zip(weights, outputs, strict=True)]
        return torch.stack(parts).sum()

    def _at(self, logits: Tensor, share: Tensor) -> Tensor:
        target, log = F.adaptive_avg_pool3d(share, logits.shape[2:]), F.log_softmax(logits, dim=1)
        p, t, axes = log[:, 1:].exp(), target[:, 1:], (0, 2, 3, 4)
        dice = (2 * (p * t).sum(axes) + SMOOTH) / (p.square().sum(axes) + t.square().sum(axes) + SMOOTH)
        return -(target * log).sum(1).mean() - dice.mean()


@dataclass(frozen=True)
class SoftTraining:
    """The network that is planned for the thick slices (`low`), on samples of the fine dataset (`high`)."""

    low: Training
    high: Training
    seed: int

    def train(self, seconds: float, steps: int | None = None) -> tuple[int, float]:
        """Train the fold that `low` would, as a checkpoint in its place; the steps, and the seconds of one."""
        pace = self.pace
        steps = steps or round(seconds / pace)
        place, plan = Workspace(self.low.root), Plan.load(self.low.root / "plan.json")
        c = plan.configuration(self.low.configuration)
        predictor = self._steps(steps)
        weights = {name: tensor.detach().cpu() for name, tensor in predictor.state_dict().items()}
        folder = place.fold(c.name, self.low.fold)
        summary = {"steps": steps, "seconds": steps * pace, "finished": True, "seed": self.seed}
        Checkpoint(plan, c.name, self.low.fold, weights, summary).save(folder / CHECKPOINT)
        return steps, pace

    @property
    def pace(self) -> float:
        """Seconds of a step."""
        return self._pace.of(self.time_steps)

    def time_steps(self) -> None:
        """Add the seconds of a step, after the first third of a short training, to what is known."""
        ends: list[float] = []

        def note() -> bool:
            ends.append(time.monotonic())
            return ends[-1] - ends[0] > PACE_SECONDS

        self._steps(10**6, stop=note)
        late = ends[len(ends) // 3 :]
        self._pace.add((late[-1] - late[0]) / (len(late) - 1))

    @property
    def _pace(self) -> Pace:
        return Pace(self.low.root / f"soft_{PACE}")

    def _steps(self, steps: int, *, stop: Callable[[], bool] = lambda: False) -> nn.Module:
        plan, fine = (Plan.load(training.root / "plan.json") for training in (self.low, self.high))
        c, degraded = plan.configuration(self.low.configuration), fine.configuration(self.high.configuration)
        assert degraded.acquisition is not None, "3d_sr is trained on degraded images"
        degraded = replace(degraded, patch_size=c.patch_size, batch_size=c.batch_size)
        place = Workspace(self.high.root)
        store = Store(place.store(degraded.preprocessing))
        other = Workspace(self.low.root).folds.read_text(encoding="utf-8")
        assert place.folds.read_text(encoding="utf-8") == other, "what one trains on the other must not hold out"
        assert c.preprocessing.axis_order == degraded.preprocessing.axis_order, "both see the same axes first"
        split = select_fold(load_folds(place.folds, store.cases()), self.high.fold, store.cases())
        samples = Samples(store, split.train, degraded, plan.labels, seed=self.seed)
        torch.manual_seed(self.seed)
        state = build_training(c.architecture, plan.labels, RECIPES[c.training.recipe])
        state.loss = SoftDiceCrossEntropy(plan.labels, degraded.acquisition)
        precision = autocast_dtype(torch.device("cpu"))
        with contextlib.closing(batches(samples, batch_size=c.batch_size, first_step=0, workers=0)) as stream:  # type: ignore[type-var]
            while state.step < steps and not stop():
                factor = learning_rate_factor(state.recipe.schedule, state.step / steps)
                for group in state.optimizer.param_groups:
                    group["lr"] = state.recipe.learning_rate * factor
                training_step(state, next(stream), precision=precision)
        return state.predictor
