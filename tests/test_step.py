"""One optimiser step, and a few of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_training import REGIONS, TWO_CLASSES, architecture
from torch import Tensor

from autoseg.labels import Labels
from autoseg.training.settings import EMA_WIDTH, RECIPES, Recipe
from autoseg.training.step import TrainingState, build_training, training_step, update_average

ADAMW = Recipe("adamw", learning_rate=5e-3, weight_decay=1e-2, schedule="poly")
SGD = Recipe("sgd", learning_rate=1e-2, weight_decay=3e-5, schedule="poly", momentum=0.9, ema=False)


def problem() -> tuple[Tensor, Tensor]:
    """Two patches in which brightness tells the class."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros((2, 1, 8, 8, 8), dtype=torch.int16)
    label[:, :, 2:6, 2:6, 2:6] = 1
    label[:, :, 3:5, 3:5, 3:5] = 2
    return label.float() + 0.1 * torch.randn(label.shape, generator=generator), label


def training(recipe: Recipe, *, labels: Labels = TWO_CLASSES, flat: bool = False) -> TrainingState:
    torch.manual_seed(0)
    return build_training(architecture(outputs=labels.output_channels, flat=flat), labels, recipe)


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_loss_falls_on_a_tiny_problem(recipe: Recipe, precision: torch.dtype | None) -> None:
    state, (image, label) = training(recipe), problem()
    losses = [training_step(state, image, label, precision=precision).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.5
    assert state.step == 30


@pytest.mark.parametrize(("labels", "flat"), [(REGIONS, False), (TWO_CLASSES, True)], ids=["regions", "2d"])
def test_the_loss_falls_with_regions_and_in_2d(labels: Labels, flat: bool) -> None:
    state, (image, label) = training(ADAMW, labels=labels, flat=flat), problem()
    losses = [training_step(state, image, label, precision=None).item() for _ in range(25)]
    assert losses[-1] < losses[0] - 0.4


def test_a_step_returns_a_number_without_a_graph_and_weights_stay_single_precision() -> None:
    state, (image, label) = training(ADAMW), problem()
    loss = training_step(state, image, label, precision=torch.bfloat16)
    assert loss.shape == () and not loss.requires_grad
    assert all(p.dtype == torch.float32 for p in state.network.parameters())


def test_two_trainings_from_one_seed_are_bit_identical() -> None:
    states = training(ADAMW), training(ADAMW)
    for state in states:
        for _ in range(3):
            training_step(state, *problem(), precision=None)
    first, second = (state.predictor.state_dict() for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_gradient_is_clipped_to_the_recipes_norm() -> None:
    gentle = replace(SGD, clip_norm=1e-3, momentum=0.0, weight_decay=0.0, learning_rate=1.0)
    gentle_state = training(replace(gentle, momentum=1e-12))
    before = [p.detach().clone() for p in gentle_state.network.parameters()]
    training_step(gentle_state, *problem(), precision=None)
    moved = torch.cat([(p - b).ravel() for p, b in zip(gentle_state.network.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_norms_and_biases_are_not_decayed_under_adamw() -> None:
    state = training(ADAMW)
    weights, others = state.optimizer.param_groups
    assert weights["weight_decay"] == ADAMW.weight_decay and others["weight_decay"] == 0
    assert all(p.ndim > 1 for p in weights["params"]) and all(p.ndim == 1 for p in others["params"])
    assert len(weights["params"]) + len(others["params"]) == len(list(state.network.parameters()))


def test_predictions_come_from_averaged_weights_where_the_recipe_says_so() -> None:
    state = training(ADAMW)
    assert state.predictor is state.ema and state.ema is not None
    assert not state.ema.training and not any(p.requires_grad for p in state.ema.parameters())
    for _ in range(40):
        training_step(state, *problem(), precision=None)
    pairs = list(zip(state.ema.parameters(), state.network.parameters(), strict=True))
    assert any(not torch.equal(average, now) for average, now in pairs)
    plain = training(SGD)
    assert plain.predictor is plain.network


def test_the_average_window_is_a_share_of_the_steps_so_far() -> None:
    average, network = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    steps = 4000
    for step in range(1, steps + 1):
        torch.nn.init.constant_(network.weight, step)
        update_average(average, network, step=step)
    lag = steps - average.weight.item()
    assert lag == pytest.approx(steps * EMA_WIDTH / (1 + EMA_WIDTH), rel=0.05)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_of_the_settings_trains(name: str) -> None:
    state = training(RECIPES[name])
    image, label = problem()
    losses = [training_step(state, image, label, precision=None).item() for _ in range(8)]
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]
