"""One optimiser step: what the planner measures is exactly what the loop runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.labels import Labels
from autoseg.networks import UNet, build_network
from autoseg.plan import Architecture, Configuration
from autoseg.training.distributed import ALONE, World
from autoseg.training.losses import build_loss, first_filters
from autoseg.training.settings import EMA_WIDTH, Recipe
from autoseg.training.shapes import Batch


@dataclass
class TrainingState:
    """The parts of a training that change with each step."""

    network: UNet
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    ema: UNet | None
    """Averaged weights, or None."""
    world: World = ALONE
    """The processes that take each step together."""
    step: int = 0
    """Steps taken."""

    @property
    def predictor(self) -> UNet:
        """The network to predict with: averaged weights where there are any."""
        return self.ema if self.ema is not None else self.network


def build_training(
    architecture: Architecture,
    labels: Labels,
    recipe: Recipe,
    device: torch.device | str = "cpu",
    *,
    configuration: Configuration | None = None,
    world: World = ALONE,
) -> TrainingState:
    """Network, loss, optimiser and averaged weights, ready for the first step; equal in all processes of `world`.

    The loss of a super-resolving network is that of its `configuration`; without one see `build_loss`.
    """
    with torch.device(device):  # built where they live: the planner's fake tensors could not be moved there, nor copied
        network = build_network(architecture)
        filters = functools.partial(first_filters, network, architecture)
        loss = build_loss(labels, architecture, configuration=configuration, filters=filters, world=world)
        ema = build_network(architecture).eval().requires_grad_(False) if recipe.ema else None
    if ema is not None:
        ema.load_state_dict(network.state_dict())
    return TrainingState(network, loss, build_optimizer(network, recipe, loss=loss), recipe, ema, world)


def build_optimizer(network: nn.Module, recipe: Recipe, *, loss: nn.Module | None = None) -> torch.optim.Optimizer:
    """The recipe's optimiser; norms, biases and the task weights of the loss are not decayed under AdamW."""
    task_weights = list(loss.parameters()) if loss is not None else []
    if recipe.optimizer == "sgd":
        undecayed: list[dict[str, Any]] = [{"params": task_weights, "weight_decay": 0.0}] if task_weights else []
        return torch.optim.SGD(
            [{"params": list(network.parameters())}, *undecayed],
            recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=True,
            weight_decay=recipe.weight_decay,
        )
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": [*others, *task_weights], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay)


def training_step(
    state: TrainingState,
    batch: Batch,
    *,
    precision: torch.dtype | None,
) -> Tensor:
    """Forward, backward, clip, update, average; of several processes each with its part of the batch.

    The batch lies on the network's device; `precision` is the autocast dtype or None for float32. What is learned in
    the plane comes after the rest, so that the activations of one are gone before those of the other are made. Returns
    the loss (scalar, detached); its mean over all processes is that of the batch.
    """
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=batch.image.device)
    for part in batch.parts:
        with torch.autocast(part.image.device.type, dtype=precision, enabled=precision is not None):
            if part is batch:
                outputs = state.network(part.image, part.grid, part.reference)
            else:
                assert part.grid is not None, "what is learned in the plane has one"
                outputs = [state.network.restore(part.image, part.grid, across=1)]
        loss: Tensor = state.loss(outputs, part.label, part.truth, part.image, part.grid)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        del outputs, loss
    state.world.average_gradients([*state.network.parameters(), *state.loss.parameters()])
    nn.utils.clip_grad_norm_(state.network.parameters(), state.recipe.clip_norm)
    state.optimizer.step()
    state.step += 1
    if state.ema is not None:
        update_average(state.ema, state.network, step=state.step)
    return total


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, *, step: int) -> None:
    """Move `average` towards `network`; the window is a fixed share of the steps so far, so it suits any budget.

    The idea of power-function averages (Karras et al. 2024, arXiv:2312.02696), here with weight 1 / (width * step).
    """
    weight = min(1.0, 1.0 / (EMA_WIDTH * step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)
