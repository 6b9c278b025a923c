"""Plans, stores and networks small enough that a test trains in a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.dataset import RawDataset
from autoseg.image import Grid
from autoseg.labels import Labels
from autoseg.plan import (
    Acquisition,
    Architecture,
    Budget,
    Configuration,
    Normalization,
    Plan,
    PreprocessingSettings,
    Shape,
    TrainingSettings,
    Vector,
)
from autoseg.preprocessing.case import CaseGeometry
from autoseg.preprocessing.run import preprocess, sample_foreground
from autoseg.preprocessing.store import Store
from autoseg.workspace import Workspace

TWO_CLASSES = Labels.from_json({"background": 0, "ball": 1, "core": 2})
REGIONS = Labels.from_json({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
IGNORING = Labels.from_json({"background": 0, "ball": 1, "core": 2, "ignore": 3})
NAME = "3d_fullres"


def architecture(*, inputs: int = 1, outputs: int = 3, flat: bool = False) -> Architecture:
    """Three stages of 4 to 8 features; `flat` is a 2D network."""
    z = 1 if flat else 2
    return Architecture(
        input_channels=inputs,
        output_channels=outputs,
        features=(4, 8, 8),
        strides=((1, 1, 1), (z, 2, 2), (1, 2, 2)),
        kernels=((1, 3, 3), (1, 3, 3), (1, 3, 3)) if flat else ((3, 3, 3),) * 3,
        encoder_convs=(1, 1, 1),
        decoder_convs=(1, 1),
    )


def tiny_configuration(
    *,
    patch_size: Shape = (8, 12, 12),
    batch_size: int = 2,
    channels: int = 1,
    labels: Labels = TWO_CLASSES,
    training: TrainingSettings | None = None,
    previous_stage: str | None = None,
) -> Configuration:
    """A configuration that leaves the tiny dataset on its grid."""
    flat = patch_size[0] == 1
    inputs = channels + (len(labels.names) if previous_stage else 0)
    return Configuration(
        name=NAME,
        topology="2d" if flat else "3d",
        preprocessing=PreprocessingSettings((2.0, 1.0, 1.0), (0, 1, 2), (Normalization("zscore"),) * channels),
        median_shape=(12, 16, 14),
        patch_size=patch_size,
        batch_size=batch_size,
        architecture=architecture(inputs=inputs, outputs=labels.output_channels, flat=flat),
        training=training or TrainingSettings(steps=8),
        previous_stage=previous_stage,
    )


def stack_configuration(
    *, slices: int = 3, context: str = "stack", view_axis: int = 0, patch_size: Shape = (1, 12, 12), channels: int = 1
) -> Configuration:
    """A 2.5D configuration that sees `slices` slices along `view_axis`."""
    flat = tiny_configuration(patch_size=patch_size, batch_size=4, channels=channels)
    network = replace(flat.architecture, context=context, context_slices=slices)
    return replace(flat, topology=f"2.5d_{context}", architecture=network, view_axis=view_axis)


def sr_configuration(
    *,
    scale: Vector = (2.0, 1.0, 1.0),
    source: str = "degraded",
    patch_size: Shape = (6, 12, 12),
    image: bool = True,
    labels: Labels = TWO_CLASSES,
    segments: bool = True,
    sr_range: tuple[float, float] | None = None,
    slices: int = 1,
    acquisition: Acquisition | None = None,
    normalization: Normalization | None = None,
    training: TrainingSettings | None = None,
) -> Configuration:
    """A configuration that answers `scale` times as fine as it reads; of a stack of `slices` where that is above 1."""
    flat = patch_size[0] == 1
    topology = "3d" if not flat else "2d" if slices == 1 else "2.5d_stack"
    plain = tiny_configuration(patch_size=patch_size, training=training)
    thick = source == "self" and not flat  # volumes: labels through the forward model, the image slice by slice
    largest = scale if sr_range is None else tuple(sr_range[1] if s > 1 else 1.0 for s in scale)
    network = replace(
        plain.architecture,
        output_channels=labels.output_channels if segments else 0,
        strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)),
        context="none" if slices == 1 else "stack",
        context_slices=slices,
        head="interpolating" if thick else "subpixel",
        head_scale=largest,  # type: ignore[arg-type]
        image_channels=1 if image else 0,
        image_body="slices" if thick and image else "shared",
    )
    preprocessing = replace(
        plain.preprocessing,
        normalization=(normalization or Normalization("zscore"),),
        label_scale=scale if source == "paired" else (1.0, 1.0, 1.0),
    )
    return replace(
        plain,
        topology=topology,
        architecture=network,
        preprocessing=preprocessing,
        sr_scale=scale,
        sr_range=sr_range,
        sr_source=source,
        acquisition=acquisition or Acquisition(),
    )


def tiny_plan(configuration: Configuration | None = None, *, labels: Labels = TWO_CLASSES) -> Plan:
    """A plan of one configuration."""
    chosen = configuration or tiny_configuration(labels=labels)
    return Plan(
        dataset="Dataset001_Tiny",
        channels=("MRI",) * len(chosen.preprocessing.normalization),
        labels=labels,
        file_ending=".nii.gz",
        budget=Budget(2**30, 60.0),
        configurations=(chosen,),
        forecasts={},
        decisions=(),
        fingerprint="",
    )


def with_recipe(plan: Plan, recipe: str) -> Plan:
    """The plan, trained by another recipe."""
    (only,) = plan.configurations
    return replace(plan, configurations=(replace(only, training=replace(only.training, recipe=recipe)),))


def preprocessed(dataset: Path, plan: Plan, workspace: Path) -> Workspace:
    """The workspace of a raw dataset, its store filled by the real preprocessing."""
    place = Workspace(workspace)
    preprocess(RawDataset.load(dataset), plan.stores(), place)
    return place


def store_of(
    folder: Path,
    cases: Mapping[str, NDArray[np.integer]],
    labels: Labels = TWO_CLASSES,
    *,
    images: Mapping[str, NDArray[np.float32]] | None = None,
) -> Store:
    """A store of label maps (Z, Y, X); the image (C, Z, Y, X) repeats the label where none is given.

    Such an image may lie on a coarser grid.
    """
    store = Store(folder)
    for case, label in cases.items():
        volume = label[None].astype(np.int16)
        image = images[case] if images else volume.astype(np.float32)
        shape = image.shape[1:]
        whole = tuple((0, size) for size in shape)
        grid = Grid(shape, (1.0, 1.0, 1.0))
        geometry = CaseGeometry(grid, (0, 1, 2), (False,) * 3, whole, shape)  # type: ignore[arg-type]
        store.write(case, {"image": image, "label": volume}, geometry, sample_foreground(volume, labels))
    return store
