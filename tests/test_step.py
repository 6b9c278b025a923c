"""One optimiser step, and a few of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_training import REGIONS, TWO_CLASSES, architecture, sr_configuration, stack_configuration
from torch import Tensor

from autoseg.labels import Labels
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Configuration, TrainingSettings
from autoseg.training.settings import EMA_WIDTH, RECIPES, Recipe
from autoseg.training.shapes import Batch, sample_shapes
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
    losses = [training_step(state, Batch(image, label), precision=precision).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.5
    assert state.step == 30


@pytest.mark.parametrize(("labels", "flat"), [(REGIONS, False), (TWO_CLASSES, True)], ids=["regions", "2d"])
def test_the_loss_falls_with_regions_and_in_2d(labels: Labels, flat: bool) -> None:
    state, (image, label) = training(ADAMW, labels=labels, flat=flat), problem()
    losses = [training_step(state, Batch(image, label), precision=None).item() for _ in range(25)]
    assert losses[-1] < losses[0] - 0.4


def test_a_step_returns_a_number_without_a_graph_and_weights_stay_single_precision() -> None:
    state, (image, label) = training(ADAMW), problem()
    loss = training_step(state, Batch(image, label), precision=torch.bfloat16)
    assert loss.shape == () and not loss.requires_grad
    assert all(p.dtype == torch.float32 for p in state.network.parameters())


def test_two_trainings_from_one_seed_are_bit_identical() -> None:
    states = training(ADAMW), training(ADAMW)
    for state in states:
        for _ in range(3):
            training_step(state, Batch(*problem()), precision=None)
    first, second = (state.predictor.state_dict() for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_gradient_is_clipped_to_the_recipes_norm() -> None:
    gentle = replace(SGD, clip_norm=1e-3, momentum=0.0, weight_decay=0.0, learning_rate=1.0)
    gentle_state = training(replace(gentle, momentum=1e-12))
    before = [p.detach().clone() for p in gentle_state.network.parameters()]
    training_step(gentle_state, Batch(*problem()), precision=None)
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
        training_step(state, Batch(*problem()), precision=None)
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
    losses = [training_step(state, Batch(image, label), precision=None).item() for _ in range(8)]
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]


# ---- 2.5D and super-resolution


def fine_problem(configuration: Configuration) -> tuple[Tensor, Tensor, Tensor, OutputGrid]:
    """Thick slices, and the label and image behind them."""
    shapes = sample_shapes(configuration.architecture, configuration.patch_size, configuration=configuration)
    assert shapes.grid is not None
    label = torch.zeros((2, 1, *shapes.label), dtype=torch.int16)
    z, y, x = (size // 4 for size in shapes.label)
    label[:, :, z:-z, y:-y, x:-x] = 1
    label[:, :, 2 * z : -z, 2 * y : -y, 2 * x : -x] = 2
    truth = label.float()
    image = torch.nn.functional.interpolate(truth, shapes.image, mode="area")
    return image, label, truth, shapes.grid


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("terms", [("l1",), ("l1", "high_frequency", "perceptual", "consistency")])
def test_the_loss_of_super_resolution_falls(recipe: Recipe, terms: tuple[str, ...]) -> None:
    configuration = sr_configuration(training=TrainingSettings(image_losses=terms))
    torch.manual_seed(0)
    state = build_training(configuration.architecture, TWO_CLASSES, recipe, configuration=configuration)
    image, label, truth, grid = fine_problem(configuration)
    losses = [training_step(state, Batch(image, label, truth, grid), precision=None).item() for _ in range(25)]
    assert losses[-1] < losses[0] - 0.5
    assert state.loss.weights.abs().min() > 1e-3  # type: ignore[union-attr,operator]  # both weights are learned


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_an_image_alone_is_learned_and_any_grid_is_answered_on(precision: torch.dtype | None) -> None:
    configuration = sr_configuration(scale=(3.0, 1.0, 1.0), sr_range=(2.0, 3.0), segments=False, patch_size=(4, 12, 12))
    torch.manual_seed(0)
    state = build_training(configuration.architecture, TWO_CLASSES, ADAMW, configuration=configuration)
    for scale in (2.0, 2.5, 3.0):
        planned = replace(configuration, sr_scale=(scale, 1.0, 1.0), sr_range=None)
        image, label, truth, grid = fine_problem(planned)
        losses = [training_step(state, Batch(image, label, truth, grid), precision=precision).item() for _ in range(8)]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("context", ["stack", "reduce"])
def test_the_loss_falls_on_slices_with_their_neighbours(context: str) -> None:
    configuration = stack_configuration(context=context)
    torch.manual_seed(0)
    state = build_training(configuration.architecture, TWO_CLASSES, ADAMW)
    label = torch.zeros((4, 1, 1, 12, 12), dtype=torch.int16)
    label[..., 3:9, 3:9] = 1
    label[..., 5:7, 5:7] = 2
    image = label.float().expand(4, 1, 3, 12, 12) + 0.1 * torch.randn(4, 1, 3, 12, 12)
    losses = [training_step(state, Batch(image, label), precision=None).item() for _ in range(25)]
    assert losses[-1] < losses[0] - 0.4


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_task_weights_are_optimised_without_decay(recipe: Recipe) -> None:
    configuration = sr_configuration()
    state = build_training(configuration.architecture, TWO_CLASSES, recipe, configuration=configuration)
    (weights,) = state.loss.parameters()
    (group,) = [g for g in state.optimizer.param_groups if any(p is weights for p in g["params"])]
    assert group["weight_decay"] == 0
    names = dict(state.network.named_parameters())
    assert sum(len(g["params"]) for g in state.optimizer.param_groups) == len(names) + 1


def test_the_network_is_no_part_of_its_loss() -> None:
    configuration = sr_configuration(training=TrainingSettings(image_losses=("perceptual",)))
    state = build_training(configuration.architecture, TWO_CLASSES, ADAMW, configuration=configuration)
    assert list(state.loss.state_dict()) == ["weights"]
