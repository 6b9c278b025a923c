"""Plans and models small enough for tests: a network of a few hundred weights, and one that thresholds its input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoseg.checkpoint import Checkpoint
from autoseg.inference.predictor import Model
from autoseg.labels import Labels
from autoseg.networks import build_network
from autoseg.networks.upsampling import OutputGrid, interpolate
from autoseg.plan import (
    Acquisition,
    Architecture,
    Budget,
    Configuration,
    Normalization,
    Plan,
    PreprocessingSettings,
    TrainingSettings,
)
from autoseg.workspace import CHECKPOINT

ONE_CLASS = Labels(("bright",), ((3,),))
TWO_CLASSES = Labels(("a", "b"), ((1,), (2,)))
REGIONS = Labels(("whole", "core"), ((1, 2), (2,)), region_order=(1, 2))


def small_plan(
    *,
    labels: Labels = TWO_CLASSES,
    channels: tuple[str, ...] = ("MRI",),
    flat: bool = False,
    file_ending: str = ".nii.gz",
) -> Plan:
    """`3d_fullres`, `3d_lowres` and a cascade on it; with `flat` only `2d`."""
    z = 1 if flat else 2
    architecture = Architecture(
        input_channels=len(channels),
        output_channels=labels.output_channels,
        features=(4, 8),
        strides=((1, 1, 1), (z, 2, 2)),
        kernels=((2 * z - 1, 3, 3),) * 2,
        encoder_convs=(1, 1),
        decoder_convs=(1,),
    )
    normalization = tuple(Normalization("zscore") for _ in channels)
    fine = Configuration(
        name="2d" if flat else "3d_fullres",
        topology="2d" if flat else "3d",
        preprocessing=PreprocessingSettings((None if flat else 1.5, 1.0, 1.0), (0, 1, 2), normalization),
        median_shape=(8, 16, 16),
        patch_size=(1 if flat else 8, 16, 16),
        batch_size=2,
        architecture=architecture,
        training=TrainingSettings(mirror_axes=(1, 2)),
    )
    coarse = replace(fine, name="3d_lowres", preprocessing=replace(fine.preprocessing, spacing=(3.0, 2.0, 2.0)))
    with_previous = replace(architecture, input_channels=len(channels) + len(labels.names))
    cascade = replace(fine, name="3d_cascade", architecture=with_previous, previous_stage="3d_lowres")
    return Plan(
        dataset="Dataset999_Small",
        channels=channels,
        labels=labels,
        file_ending=file_ending,
        budget=Budget(2**30, 60.0),
        configurations=(fine,) if flat else (fine, coarse, cascade),
        forecasts={},
        decisions=(),
        fingerprint="0",
    )


def save_fold(plan: Plan, models: Path, configuration: str, fold: str, *, seed: int = 0, finished: bool = True) -> Path:
    """A fold with random weights under `models`; returns its folder."""
    torch.manual_seed(seed)
    network = build_network(plan.configuration(configuration).architecture)
    folder = models / configuration / f"fold_{fold}"
    Checkpoint(plan, configuration, fold, network.state_dict(), {"finished": finished}).save(folder / CHECKPOINT)
    return folder


class Threshold(nn.Module):
    """Foreground where the first channel is above zero: after z-scoring, brighter than the image's mean."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat((-x[:, :1], x[:, :1]), dim=1) * 10]


def threshold_model(*, channels: tuple[str, ...] = ("MRI",), flat: bool = False, file_ending: str = ".nii.gz") -> Model:
    """A model whose answer is known: label 3 where the first channel is brighter than its mean."""
    plan = small_plan(labels=ONE_CLASS, channels=channels, flat=flat, file_ending=file_ending)
    network = Threshold()
    return Model(plan, plan.configurations[0], (network,), ("0",), torch.device("cpu"))  # type: ignore[arg-type]


class FineThreshold(nn.Module):
    """`Threshold` of the image interpolated to the grid that is asked for, and that image; notes what it was asked."""

    def __init__(self, *, labels: bool = True, image: bool = True) -> None:
        super().__init__()
        self.labels, self.image = labels, image
        self.shapes: list[tuple[int, ...]] = []
        self.grids: list[OutputGrid] = []

    def forward(self, x: torch.Tensor, grid: OutputGrid) -> list[torch.Tensor]:
        self.shapes.append(tuple(x.shape))
        self.grids.append(grid)
        fine = interpolate(x[:, :1], grid)
        return [torch.cat([-10 * fine, 10 * fine] * self.labels + [fine] * self.image, dim=1)]


def super_resolving(plan: Plan, *, labels: bool = True, image: bool = True, **changes: Any) -> Configuration:
    """`3d_sr`: slices of 4 mm in, of 1 mm out, with the first configuration's network."""
    first = plan.configurations[0]
    architecture = replace(
        first.architecture,
        output_channels=plan.labels.output_channels if labels else 0,
        head="subpixel",
        head_scale=(4.0, 1.0, 1.0),
        image_channels=len(plan.channels) if image else 0,
    )
    changes = {"sr_scale": (4.0, 1.0, 1.0), "sr_source": "degraded", "acquisition": Acquisition(), **changes}
    fine = replace(first.preprocessing, spacing=(1.0, 1.0, 1.0))
    return replace(first, name="3d_sr", preprocessing=fine, architecture=architecture, **changes)


def fine_threshold_model(*, labels: bool = True, image: bool = True, **changes: Any) -> Model:
    """A super-resolving model whose answer is known: label 3 where the interpolated image is above its mean."""
    plan = small_plan(labels=ONE_CLASS)
    configuration = super_resolving(plan, labels=labels, image=image, **changes)
    network = FineThreshold(labels=labels, image=image)
    return Model(plan, configuration, (network,), ("0",), torch.device("cpu"))  # type: ignore[arg-type]
