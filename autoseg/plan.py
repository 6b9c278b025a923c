"""The plan: what the planner decided and why. Frozen dataclasses <-> `plan.json`, versioned, unknown keys refused.

A plan may be edited by hand: `Plan.load` checks every value (`plan_values`) before anything is built from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.errors import PlanError, unknown_choice
from autoseg.files import read_json, write_json
from autoseg.labels import Labels
from autoseg.plan_values import UNCLIPPED, check_plan
from autoseg.typed_json import SPARSE, from_json, to_json

PLAN_VERSION = 2

Vector = tuple[float, float, float]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Decision:
    """One derived value and the sentence that explains it."""

    name: str
    """What was decided, as a path: "3d_fullres.patch_size"."""
    value: Any
    """The value, as JSON holds it."""
    kind: str
    """`fixed` (never changes), `rule` (from fingerprint and budget) or `empirical` (from experiments)."""
    because: str
    """One sentence with the numbers in it."""


@dataclass(frozen=True)
class Normalization:
    """How one channel's intensities are normalised; see `autoseg.preprocessing.normalize`."""

    scheme: str
    """Key of NORMALIZERS: ct, ct_unclipped (clipped once made thick), zscore, masked_zscore, none, rescale, rgb;
    "n4+" before it corrects the bias field."""
    mean: float = 0.0
    """Mean of the dataset's foreground intensities (used by ct)."""
    std: float = 1.0
    """Standard deviation of the dataset's foreground intensities (used by ct)."""
    lower: float = 0.0
    """0.5th percentile of the dataset's foreground intensities (used by ct)."""
    upper: float = 1.0
    """99.5th percentile of the dataset's foreground intensities (used by ct)."""


@dataclass(frozen=True)
class ReferenceGrid:
    """Channels that lie on a grid of their own, and the grid that they are brought to: the image's extent, as fine."""

    channels: tuple[int, ...]
    """Their numbers among the plan's channels, rising."""
    spacing: Vector
    """Target (z, y, x) in mm after `axis_order`."""


@dataclass(frozen=True)
class PreprocessingSettings:
    """Raw case -> array the network sees. Equal settings share one store."""

    spacing: tuple[float | None, float, float]
    """Target (z, y, x) spacing in mm after `axis_order`; z is None where slices are left as they are (2D)."""
    axis_order: Shape
    """Which canonical axis comes first, second, third: puts the coarsest axis first."""
    normalization: tuple[Normalization, ...]
    """One for each channel, references included."""
    crop_to_nonzero: bool = True
    """Whether the border in which every channel is zero is cut away."""
    image_order: int = 3
    """Spline order for images."""
    label_scale: Vector = (1.0, 1.0, 1.0)
    """Image spacing / label spacing along (z, y, x): above 1 where labels lie on a finer grid than the image's."""
    reference: ReferenceGrid | None = dataclasses.field(default=None, metadata=SPARSE)
    """Channels on a grid of their own; None where all share one."""

    @property
    def image_normalization(self) -> tuple[Normalization, ...]:
        """Of the channels that share the image's grid."""
        apart = self.reference.channels if self.reference else ()
        return tuple(n for number, n in enumerate(self.normalization) if number not in apart)

    @property
    def reference_normalization(self) -> tuple[Normalization, ...]:
        """Of the channels on a grid of their own."""
        return tuple(self.normalization[number] for number in (self.reference.channels if self.reference else ()))

    @property
    def store_id(self) -> str:
        """Name of the store folder: a hash of these settings."""
        text = json.dumps(to_json(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Acquisition:
    """How a scanner makes thick slices of thin ones along one axis: the forward model of `autoseg.acquisition`."""

    profile: str = "gauss"
    """Slice profile: gauss, rect, sinc (k-space truncation) or dirac (every s-th slice, interpolated)."""
    thickness: tuple[float, float] = (1.0, 1.0)
    """Slice thickness (gauss: FWHM) / low-resolution spacing: drawn between these two; equal where it is known."""
    gap: float = 0.0
    """Between slices, as a share of the low-resolution spacing; rect only."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise that is added, as a share of the image's standard deviation."""


@dataclass(frozen=True)
class Architecture:
    """Everything `autoseg.networks` needs to build the network."""

    input_channels: int
    """Image channels, plus one for each foreground class of the previous stage in a cascade."""
    output_channels: int
    """Channels of the logits (`Labels.output_channels`)."""
    features: tuple[int, ...]
    """Feature maps of each stage, from full resolution to the bottleneck."""
    strides: tuple[Shape, ...]
    """Downsampling (z, y, x) on entering each stage; the first is (1, 1, 1)."""
    kernels: tuple[Shape, ...]
    """Convolution kernel (z, y, x) of each stage; all of them 1 along z in a 2D network."""
    encoder_convs: tuple[int, ...]
    """Convolutions of each encoder stage."""
    decoder_convs: tuple[int, ...]
    """Convolutions of each decoder stage, from the coarsest to full resolution (one fewer than stages)."""
    block: str = "plain"
    """Key of `networks.blocks.BLOCKS`."""
    deep_supervision: bool = True
    """Whether training also scores the coarser decoder stages."""
    context: str = "none"
    """How neighbouring slices enter a 2.5D network: "none"; "stack", as channels; "reduce", through 3x3x3 convolutions
    that are not padded along z."""
    context_slices: int = 1
    """Odd number of slices that are seen to label the middle one; the input is `halo` slices longer at each end."""
    head: str = "plain"
    """plain: logits on the input grid; interpolating: those, interpolated; or a key of `networks.upsampling.HEADS`."""
    head_scale: Vector = (1.0, 1.0, 1.0)
    """Largest input spacing / output spacing along (z, y, x) that the head answers for."""
    image_channels: int = 0
    """Super-resolved image channels, which follow the class logits in the finest output; 0: no image head."""
    image_body: str = dataclasses.field(default="shared", metadata=SPARSE)
    """What the image comes from: "shared", the labels' features; "slices", a 2D U-Net of its own (`in_slices`)."""
    reference_channels: int = 0
    """Channels of an image on a grid of its own that joins through the fusion block; 0: none."""
    reference_scale: Vector = dataclasses.field(default=(1.0, 1.0, 1.0), metadata=SPARSE)
    """Input spacing / reference spacing along (z, y, x) at `head_scale`: above 1 where the reference is finer."""

    @property
    def halo(self) -> int:
        """Slices that the network reads before and after those it answers for."""
        return self.context_slices // 2

    @property
    def in_slices(self) -> Architecture:
        """Of the network that brings an image up slice by slice: rows are axis 0, columns one axis of the plane."""
        return dataclasses.replace(
            self,
            input_channels=self.image_channels,
            output_channels=0,
            kernels=tuple((1, z, min(y, x)) for z, y, x in self.kernels),
            strides=tuple((1, z, min(y, x)) for z, y, x in self.strides),
            deep_supervision=False,
            head="subpixel",
            head_scale=(1.0, self.head_scale[0], 1.0),
            image_body="shared",
        )

    @property
    def divisor(self) -> Shape:
        """What a patch must be divisible by along (z, y, x)."""
        product = [1, 1, 1]
        for stride in self.strides:
            product = [p * s for p, s in zip(product, stride, strict=True)]
        return (product[0], product[1], product[2])

    def reference_shape(self, patch: Shape, scale: Vector) -> Shape:
        """Reference voxels (z, y, x) over a patch of the input grid, without its halo, that is answered at `scale`."""
        sizes = zip(patch, self.reference_scale, scale, self.head_scale, strict=True)
        z, y, x = (max(1, round(size * finer * s / largest)) for size, finer, s, largest in sizes)
        return (z, y, x)


@dataclass(frozen=True)
class TrainingSettings:
    """What the planner decided about training this configuration; the rest is fixed in `training/settings.py`."""

    recipe: str = "adamw"
    """Key of `training.settings.RECIPES`."""
    steps: int = 0
    """Optimiser steps that the budget is forecast to allow; 0: not forecast."""
    seconds: float = 0.0
    """Time budget of one fold in seconds; 0: none, train for `steps`."""
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    """Array axes (z, y, x) along which mirroring changes no label; for augmentation and for prediction."""
    low_resolution_axes: tuple[int, ...] = (0, 1, 2)
    """Axes along which augmentation may simulate a lower resolution (not along thick slices)."""
    rotate_out_of_plane: bool = True
    """Whether augmentation may rotate around in-plane axes (not with thick slices)."""
    image_losses: tuple[str, ...] = ("l1",)
    """Terms of the image branch (super-resolution): keys of `training.losses.IMAGE_LOSSES`."""


@dataclass(frozen=True)
class Configuration:
    """One way to train: a grid, a patch, a network."""

    name: str
    """2d, 3d_fullres, 3d_lowres, 3d_cascade, 2.5d_stack, 2.5d_axial, 3d_sr ...; free for edited plans."""
    topology: str
    """2d, 2.5d_stack and 2.5d_reduce: patches with z = 1; 3d."""
    preprocessing: PreprocessingSettings
    median_shape: Shape
    """Median (z, y, x) shape of the training cases on the configuration's grid."""
    patch_size: Shape
    """(z, y, x) voxels of a training patch on the input grid, without the halo of 2.5D; z = 1 for 2D and 2.5D.

    This, `median_shape`, the architecture and the axes in `training` are in the order of a frame: `view_axis` first.
    """
    batch_size: int
    architecture: Architecture
    training: TrainingSettings
    previous_stage: str | None = None
    """The configuration whose predicted labels are further input channels (cascade)."""
    view_axis: int = 0
    """Network axis along which slices are taken (2D, 2.5D): 0, 1 or 2; it becomes the first axis of every patch."""
    sr_scale: Vector = (1.0, 1.0, 1.0)
    """Input spacing / output spacing along (z, y, x) of the patch; of an any-scale network the one planned for."""
    sr_range: tuple[float, float] | None = None
    """Smallest and largest scale that an any-scale network is trained for, on the axis where `sr_scale` is above 1."""
    sr_source: str = "none"
    """Where the fine truth comes from: none (no super-resolution); degraded (the store is fine, inputs are made by the
    forward model); paired (labels are finer than images); self (only thick slices: learned in the plane, applied
    through the planes; labels of volumes from the thick ones, through the forward model)."""
    acquisition: Acquisition | None = None
    """The forward model, for sources `degraded` and `self` and for the consistency loss."""

    @property
    def super_resolves(self) -> bool:
        """Whether the output grid is finer than the input grid."""
        return self.sr_source != "none"

    @property
    def input_preprocessing(self) -> PreprocessingSettings:
        """How a raw image is brought to the network's input grid for prediction.

        Other than `preprocessing`, the store's, where the store holds the fine grid that inputs are degraded from. What
        is clipped after that in training is clipped here.
        """
        if self.sr_source != "degraded":
            return self.preprocessing
        scale = [self.sr_scale[self.frames(training=False)[0].index(axis)] for axis in range(3)]
        z, y, x = self.preprocessing.spacing
        spacing = (None if z is None else z * scale[0], y * scale[1], x * scale[2])
        normalization = tuple(
            dataclasses.replace(n, scheme="ct") if n.scheme == UNCLIPPED else n
            for n in self.preprocessing.normalization
        )
        return dataclasses.replace(self.preprocessing, spacing=spacing, normalization=normalization)

    def frames(self, *, training: bool) -> tuple[Shape, ...]:
        """Orders of the network axes in which patches are seen: entry i is the axis that becomes patch axis i.

        One, the view's, but for self-supervision: it trains on slices in the plane, in which either axis may be the
        one that is degraded, and predicts through the planes, where the thick axis takes its place: patch axis 1 of
        slices, 0 of volumes. Predictions of several frames are averaged.
        """
        if self.sr_source == "self" and self.topology == "3d":
            return ((1, 0, 2), (2, 0, 1)) if training else ((0, 1, 2),)
        if self.sr_source == "self":
            return ((0, 1, 2), (0, 2, 1)) if training else ((1, 0, 2), (2, 0, 1))
        first, second = (axis for axis in range(3) if axis != self.view_axis)
        return ((self.view_axis, first, second),)


@dataclass(frozen=True)
class Forecast:
    """What a configuration will cost on this machine."""

    memory_bytes: int
    """Peak device memory of a training step, measured on fake tensors."""
    disk_bytes: int
    """Size of the preprocessed store."""
    step_flops: int
    """Floating-point operations of one training step (forward and backward)."""
    seconds_per_step: float
    """From a few real steps on this machine, scaled by counted operations; 0 where not measured."""
    fold_seconds: float
    """Time of one fold."""
    parameters: int
    """Trainable parameters."""


@dataclass(frozen=True)
class Budget:
    """What the planner was given."""

    gpu_memory_bytes: int
    """Memory that a training step may take."""
    fold_seconds: float
    """Training time of one fold."""
    device: str = "cpu"
    """The device that the forecast was measured on."""


@dataclass(frozen=True)
class Plan:
    """The answer of the planner to one dataset and one budget."""

    dataset: str
    """Name of the dataset."""
    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    budget: Budget
    configurations: tuple[Configuration, ...]
    forecasts: dict[str, Forecast]
    """By configuration name."""
    decisions: tuple[Decision, ...]
    fingerprint: str
    """Hash of the fingerprint that the plan was made from."""
    version: int = PLAN_VERSION

    @property
    def reference_channels(self) -> tuple[int, ...]:
        """Numbers of the channels that lie on grids of their own."""
        reference = self.configurations[0].preprocessing.reference
        return reference.channels if reference else ()

    def configuration(self, name: str) -> Configuration:
        """The configuration of that name. Raises PlanError listing the planned ones."""
        for configuration in self.configurations:
            if configuration.name == name:
                return configuration
        raise PlanError(unknown_choice("Configuration", name, [c.name for c in self.configurations]))

    def stores(self, configurations: Iterable[str] | None = None) -> tuple[PreprocessingSettings, ...]:
        """The distinct preprocessings of these configurations (default: all). Raises PlanError for an unknown one."""
        names = [c.name for c in self.configurations] if configurations is None else configurations
        return tuple(dict.fromkeys(self.configuration(name).preprocessing for name in names))

    @property
    def id(self) -> str:
        """Hash of everything that a model depends on; forecasts and reasons are left out."""
        content = to_json(self)
        for key in ("forecasts", "decisions", "budget"):
            del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write `plan.json`, atomically."""
        write_json(path, to_json(self))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read and check `plan.json`. Raises PlanError naming the file and the value at fault."""
        remedy = "correct it, or plan again with `autoseg plan-and-preprocess`"
        return cls.from_json(read_json(path, error=PlanError, what="plan", remedy=remedy), where=str(path))

    @classmethod
    def from_json(cls, content: Any, *, where: str) -> Plan:
        """A checked plan from JSON content; `where` (a file) begins the sentence of an error."""
        version = content.get("version") if isinstance(content, dict) else None
        if version != PLAN_VERSION:
            raise PlanError(
                f"{where}: plan version {version} cannot be read, this autoseg reads version {PLAN_VERSION}; "
                "plan again with `autoseg plan-and-preprocess`."
            )
        plan = from_json(cls, content, where=where)
        check_plan(plan, where=where)
        return plan
