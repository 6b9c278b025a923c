"""What each of the two processes of `tests/test_ddp.py` does; started by torchrun with the folder to work in."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from tiny_training import IGNORING, NAME, REGIONS, TWO_CLASSES, sr_configuration
from torch import Tensor

from autoseg.plan import Plan, TrainingSettings
from autoseg.training import loop
from autoseg.training.distributed import ALONE, World, joined
from autoseg.training.losses import build_loss
from autoseg.workspace import Workspace

STEPS, STOPPED = 20, 8
LABELS = {"classes": TWO_CLASSES, "ignore": IGNORING, "regions": REGIONS}
IMAGE_AND_LABELS = sr_configuration(training=TrainingSettings(steps=1, image_losses=("l1", "perceptual")))


def loss_and_gradients(batch: dict[str, Tensor], name: str, world: World = ALONE) -> dict[str, Tensor]:
    """The loss, and its gradients with respect to a factor of each logit and to its own weights."""
    factor = torch.ones(batch["logits"].shape[1], requires_grad=True)
    answers = [batch["logits"] * factor[:, None, None, None]]
    if name in LABELS:
        loss = build_loss(LABELS[name], world=world)
        value = loss(answers, batch["label"])
    else:
        configuration = IMAGE_AND_LABELS
        filters = torch.linspace(-1, 1, 27).reshape(1, 1, 3, 3, 3)
        loss = build_loss(
            TWO_CLASSES, configuration.architecture, configuration=configuration, filters=lambda: filters, world=world
        )
        value = loss(answers, batch["label"], batch["truth"], batch["image"])
    value.backward()
    parameters = [factor, *loss.parameters()]
    world.average_gradients(parameters)
    gradients = {f"gradient {i}": parameter.grad for i, parameter in enumerate(parameters)}
    return {"loss": world.mean(value.detach()), **gradients}  # type: ignore[dict-item]


def train(plan: Plan, workspace: Workspace, world: World = ALONE, **options: Any) -> loop.TrainedFold:
    """Fold 0 in float32, whatever the processor can do."""
    settings = {"device": "cpu", "workers": 0, "steps": STEPS, "seed": 3, "world": world, **options}
    with mock.patch.object(loop, "autocast_dtype", lambda device: None):
        return loop.train_fold(plan, NAME, "0", workspace=workspace, **settings)


def main(folder: Path) -> None:
    """The losses of both halves of some batches; a training; one that is stopped and goes on."""
    with joined(os.environ, "cpu") as world:
        for path in sorted((folder / "batches").iterdir()):
            half = {name: tensor.chunk(world.size)[world.rank] for name, tensor in load_file(path).items()}
            save_file(loss_and_gradients(half, path.stem, world), folder / f"{path.stem} {world.rank}")

        write = loop.save_tensors

        def save_tensors(path: Path, *content: Any) -> None:
            with open(folder / "saved.txt", "a", encoding="utf-8") as file:
                file.write(f"{path.parents[3].name} {world.rank}\n")
            write(path, *content)

        loop.save_tensors = save_tensors  # type: ignore[attr-defined]
        plan, asked = Plan.load(folder / "plan.json"), itertools.count()
        train(plan, Workspace(folder / "whole"), world)
        # the others would never stop, and their clocks run backwards: the first decides
        clock = itertools.count() if world.first else itertools.count(0, -1)
        stopped = train(
            plan,
            Workspace(folder / "resumed"),
            world,
            stop=lambda: world.first and next(asked) >= STOPPED,
            clock=lambda: float(next(clock)),
        )
        assert (stopped.steps, stopped.finished) == (STOPPED, False)
        train(plan, Workspace(folder / "resumed"), world, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
