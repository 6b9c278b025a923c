"""The plan: what the planner decided and why. Frozen dataclasses <-> `plan.json`, versioned, unknown keys refused.

A plan may be edited by hand: `Plan.load` checks every value before anything is built from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autoseg.errors import PlanError, unknown_choice
from autoseg.files import read_json, write_json
from autoseg.labels import Labels

PLAN_VERSION = 2

Vector = tuple[float, float, float]
Shape = tuple[int, int, int]

KINDS = ("fixed", "rule", "empirical")
TOPOLOGIES = ("2d", "2.5d_stack", "2.5d_reduce", "3d")
CONTEXTS = ("none", "stack", "reduce")
HEADS = ("plain", "subpixel", "implicit", "filters")
SR_SOURCES = ("none", "degraded", "paired", "self")
PROFILES = ("gauss", "rect", "sinc", "dirac")
IMAGE_LOSSES = ("l1", "high_frequency", "perceptual", "consistency")
# keys of the stages' dicts, which the core does not import; a test holds them together
BLOCKS = ("plain", "residual")
RECIPES = ("adamw", "sgd")
SCHEMES = ("ct", "ct_unclipped", "zscore", "masked_zscore", "none", "rescale", "rgb")
UNCLIPPED = "ct_unclipped"  # what thick slices are made of: a scanner averages before anybody clips
BIAS_CORRECTION = "n4+"  # before a scheme's name: the bias field is corrected first
MOST_VOXELS = 2**31  # of a batch; no GPU holds the features of so many
LARGEST_SCALE = 8.0  # of super-resolution: the largest that has been shown to work at all (Dual-ArbNet)
HIGHEST_ORDER = 5  # of the splines that scipy has
# no network that trains anywhere comes near these; beyond them building one takes for ever
MOST_STAGES, MOST_CONVOLUTIONS, MOST_FEATURES, LARGEST_KERNEL = 32, 64, 2**14, 31
SPACINGS = (1e-6, 1e6)  # mm; from microscopes to more than a patient
SPARSE = {"sparse": True}  # of a field that is not written where it has its default: plans without it keep their id


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
    """Key of `networks.upsampling.HEADS`: plain (logits on the input grid), subpixel, implicit, filters."""
    head_scale: Vector = (1.0, 1.0, 1.0)
    """Largest input spacing / output spacing along (z, y, x) that the head answers for."""
    image_channels: int = 0
    """Super-resolved image channels, which follow the class logits in the finest output; 0: no image head."""
    reference_channels: int = 0
    """Channels of an image on a grid of its own that joins through the fusion block; 0: none."""
    reference_scale: Vector = dataclasses.field(default=(1.0, 1.0, 1.0), metadata=SPARSE)
    """Input spacing / reference spacing along (z, y, x) at `head_scale`: above 1 where the reference is finer."""

    @property
    def halo(self) -> int:
        """Slices that the network reads before and after those it answers for."""
        return self.context_slices // 2

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
    through the planes)."""
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
        one that is degraded (patch axis 1), and predicts slices through the planes, whose axis 1 is the thick one;
        predictions of several frames are averaged.
        """
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


def check_plan(plan: Plan, *, where: str) -> None:
    """Refuse what cannot be built or trained. Raises PlanError naming the configuration and the value."""
    names = [configuration.name for configuration in plan.configurations]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice:
        raise PlanError(f"{where}: " + (f"two configurations are named '{twice}'." if twice else "no configuration."))
    if plan.budget.gpu_memory_bytes < 0 or not 0 <= plan.budget.fold_seconds < math.inf:
        raise PlanError(f"{where}: the budget must not be negative, got {to_json(plan.budget)}.")
    for decision in plan.decisions:
        if decision.kind not in KINDS:
            raise PlanError(f"{where}: decision {decision.name}: {unknown_choice('kind', decision.kind, KINDS)}")
    for configuration in plan.configurations:
        checks = (_stage_problem, _network_problem, _preprocessing_problem, _training_problem)
        problem = next((found for check in checks if (found := check(configuration, plan))), None)
        if problem:
            raise PlanError(f"{where}: configuration {configuration.name}: {problem.rstrip('.')}.")


def _network_problem(c: Configuration, plan: Plan) -> str | None:
    a = c.architecture
    stages = len(a.features)
    if c.topology not in TOPOLOGIES:
        return unknown_choice("topology", c.topology, TOPOLOGIES)
    if a.block not in BLOCKS:
        return unknown_choice("block", a.block, BLOCKS)
    if stages < 1 or any(len(v) != stages for v in (a.strides, a.kernels, a.encoder_convs)):
        return (
            f"features, strides, kernels and encoder_convs must have one entry a stage, "
            f"got {stages}, {len(a.strides)}, {len(a.kernels)} and {len(a.encoder_convs)}"
        )
    if len(a.decoder_convs) != stages - 1:
        return f"decoder_convs must have {stages - 1} entries, one fewer than stages, got {len(a.decoder_convs)}"
    if min(a.features) < 1 or min(a.encoder_convs) < 1 or min(a.decoder_convs, default=1) < 1:
        return "features, encoder_convs and decoder_convs must be at least 1"
    kernel = max(k for kernel in a.kernels for k in kernel)
    largest = (stages, max(*a.encoder_convs, *a.decoder_convs, 1), max(a.features), kernel)
    limits = (MOST_STAGES, MOST_CONVOLUTIONS, MOST_FEATURES, LARGEST_KERNEL)
    if any(value > limit for value, limit in zip(largest, limits, strict=True)):
        return f"stages, convolutions, features and kernels may be up to {limits}, got {largest}"
    if a.strides[0] != (1, 1, 1) or any(s < 1 for stride in a.strides for s in stride):
        return f"strides must be at least 1 and begin with [1, 1, 1], got {list(a.strides)}"
    if any(k < 1 or k % 2 == 0 for kernel in a.kernels for k in kernel):
        return f"kernels must be odd, got {list(a.kernels)}"
    if min(c.patch_size) < 1 or any(p % d for p, d in zip(c.patch_size, a.divisor, strict=True)):
        return f"patch_size {list(c.patch_size)} must be divisible by {list(a.divisor)}, the product of the strides"
    if c.patch_size == a.divisor:
        return f"patch_size {list(c.patch_size)} leaves one voxel after {stages} stages, which cannot be normalised"
    problem = _topology_problem(c)
    if problem:
        return problem
    if c.batch_size < 1:
        return f"batch_size must be at least 1, got {c.batch_size}"
    if c.batch_size * math.prod(c.patch_size) > MOST_VOXELS:
        return f"batch_size {c.batch_size} with patch_size {list(c.patch_size)} is more than {MOST_VOXELS} voxels"
    if not plan.labels.names and (a.output_channels or not a.image_channels):
        return (
            "a dataset without labels needs output_channels of 0 and image_channels above 0, got "
            f"{a.output_channels} and {a.image_channels}"
        )
    labelled = (0, plan.labels.output_channels) if a.image_channels else (plan.labels.output_channels,)
    if a.output_channels not in labelled:
        return f"output_channels must be {plan.labels.output_channels} for these labels, got {a.output_channels}"
    problem = _reference_problem(c)
    if problem:
        return problem
    expected = len(plan.channels) - a.reference_channels + (len(plan.labels.names) if c.previous_stage else 0)
    if a.input_channels != expected:
        return f"input_channels must be {expected}, got {a.input_channels}"
    return _super_resolution_problem(c, plan)


def _reference_problem(c: Configuration) -> str | None:
    """Whether network and store agree on the channels that lie on a grid of their own, and both can have them."""
    a, grid = c.architecture, c.preprocessing.reference
    planned = len(grid.channels) if grid else 0
    if a.reference_channels != planned:
        return f"reference_channels must be {planned}, as preprocessing has it, got {a.reference_channels}"
    if grid is None:
        return None
    if sorted(set(grid.channels)) != list(grid.channels) or not set(grid.channels) <= set(
        range(len(c.preprocessing.normalization))
    ):
        return f"reference channels must be numbers of channels, rising, got {list(grid.channels)}"
    if not all(0 < s < math.inf for s in (*grid.spacing, *a.reference_scale)):
        return f"reference spacing and reference_scale must be positive, got {list(grid.spacing)}"
    if c.previous_stage or c.sr_source == "self":
        which = "a cascade" if c.previous_stage else "self-supervision"
        return f"{which} does not take a reference channel on a grid of its own"
    return None


def _topology_problem(c: Configuration) -> str | None:
    a = c.architecture
    flat = c.topology != "3d"
    if flat and (c.patch_size[0] != 1 or any(kernel[0] != 1 for kernel in a.kernels)):
        return f"a {c.topology} configuration needs patch_size and kernels of 1 along z, got patch {list(c.patch_size)}"
    expected = {"2.5d_stack": "stack", "2.5d_reduce": "reduce"}.get(c.topology, "none")
    if a.context != expected:
        return f"a {c.topology} configuration needs context '{expected}', got '{a.context}'"
    if a.context_slices < 1 or a.context_slices % 2 == 0 or (a.context_slices > 1) != (expected != "none"):
        least = "1" if expected == "none" else "an odd number from 3"
        return f"context_slices of a {c.topology} configuration must be {least}, got {a.context_slices}"
    if c.view_axis not in (0, 1, 2) or (c.view_axis and not flat):
        return f"view_axis must be 0, 1 or 2, and 0 for 3d, got {c.view_axis}"
    return None


def _super_resolution_problem(c: Configuration, plan: Plan) -> str | None:
    a = c.architecture
    if c.sr_source not in SR_SOURCES:
        return unknown_choice("sr_source", c.sr_source, SR_SOURCES)
    if a.head not in HEADS:
        return unknown_choice("head", a.head, HEADS)
    if any(not 1 <= s <= LARGEST_SCALE for s in (*c.sr_scale, *a.head_scale, *(c.sr_range or ()))):
        given = f"{list(c.sr_scale)} and {list(a.head_scale)}" + (f", range {list(c.sr_range)}" if c.sr_range else "")
        return f"scales must be from 1 to {LARGEST_SCALE:g}, got {given}"
    if any(s > h + 1e-6 for s, h in zip(c.sr_scale, a.head_scale, strict=True)):
        return f"sr_scale {list(c.sr_scale)} must not exceed head_scale {list(a.head_scale)}"
    if (c.sr_source == "none") != (a.head == "plain"):
        return f"sr_source '{c.sr_source}' does not go with head '{a.head}'"
    own_channels = len(plan.channels) - a.reference_channels
    if a.image_channels not in (0, own_channels):
        return f"image_channels must be 0 or the image's {own_channels}, got {a.image_channels}"
    unknown = next((name for name in c.training.image_losses if name not in IMAGE_LOSSES), None)
    if unknown is not None:
        return unknown_choice("image loss", unknown, IMAGE_LOSSES)
    return _source_problem(c) or _acquisition_problem(c)


def _source_problem(c: Configuration) -> str | None:
    """Whether grids, labels and scales are those that the source of fine truth has."""
    label_scale = [c.preprocessing.label_scale[axis] for axis in c.frames(training=True)[0]]
    if any(not 1 <= s <= LARGEST_SCALE for s in label_scale):
        return f"label_scale must be from 1 to {LARGEST_SCALE:g}, got {list(c.preprocessing.label_scale)}"
    expected = list(c.sr_scale) if c.sr_source == "paired" else [1.0, 1.0, 1.0]
    if any(not math.isclose(s, e, abs_tol=1e-3) for s, e in zip(label_scale, expected, strict=True)):
        return (
            f"label_scale along the axes of a patch must be {expected} for sr_source '{c.sr_source}', got {label_scale}"
        )
    refined = [axis for axis, s in enumerate(c.sr_scale) if s > 1]
    if not c.super_resolves and (c.architecture.image_channels or c.sr_range or max(c.architecture.head_scale) > 1):
        return "image_channels, sr_range and head_scale above 1 need a sr_source"
    if c.super_resolves and not refined:
        return f"sr_source '{c.sr_source}' needs a sr_scale above 1 along an axis, got {list(c.sr_scale)}"
    if c.sr_source == "self" and (c.topology == "3d" or refined != [1] or c.view_axis):
        return (
            "sr_source 'self' needs slices along axis 0 and a sr_scale above 1 along axis 1 alone, "
            f"got a {c.topology} configuration along axis {c.view_axis} with sr_scale {list(c.sr_scale)}"
        )
    if c.sr_range is not None:
        largest = max(c.architecture.head_scale[axis] for axis in refined)
        if not c.sr_range[0] <= c.sr_range[1] <= largest + 1e-6:
            return f"sr_range must rise and end within head_scale {largest:g}, got {list(c.sr_range)}"
    return None


def _acquisition_problem(c: Configuration) -> str | None:
    model = c.acquisition
    if model is None:
        reason = f"sr_source '{c.sr_source}'" if c.sr_source in ("degraded", "self") else ""
        reason = reason or ("the image loss 'consistency'" if "consistency" in c.training.image_losses else "")
        return f"{reason} needs an acquisition" if reason else None
    if model.profile not in PROFILES:
        return unknown_choice("profile", model.profile, PROFILES)
    if not 0 < model.thickness[0] <= model.thickness[1] < math.inf:
        return f"thickness must rise from above 0, got {list(model.thickness)}"
    if not 0 <= model.gap < 1 or not 0 <= model.noise < math.inf:
        return f"gap must be from 0 to below 1 and noise not negative, got {model.gap} and {model.noise}"
    return None


def _preprocessing_problem(c: Configuration, plan: Plan) -> str | None:
    if len(c.preprocessing.normalization) != len(plan.channels):
        return f"normalization needs one entry for each of the {len(plan.channels)} channels"
    if sorted(c.preprocessing.axis_order) != [0, 1, 2]:
        return f"axis_order must be a permutation of [0, 1, 2], got {list(c.preprocessing.axis_order)}"
    if any(s is not None and not SPACINGS[0] <= s <= SPACINGS[1] for s in c.preprocessing.spacing):
        low, high = SPACINGS
        return f"spacing must be positive, from {low:g} to {high:g} mm, got {list(c.preprocessing.spacing)}"
    if not all(1 <= n <= MOST_VOXELS for n in c.median_shape):
        return f"median_shape must be three numbers of voxels, got {list(c.median_shape)}"
    if not 0 <= c.preprocessing.image_order <= HIGHEST_ORDER:
        return f"image_order must be from 0 to {HIGHEST_ORDER}, got {c.preprocessing.image_order}"
    for n in c.preprocessing.normalization:
        if n.scheme.removeprefix(BIAS_CORRECTION) not in SCHEMES:
            return unknown_choice("normalization scheme", n.scheme, SCHEMES)
        if not all(map(math.isfinite, (n.mean, n.std, n.lower, n.upper))) or n.std < 0 or n.lower > n.upper:
            return f"normalization needs finite numbers with std from 0 and lower up to upper, got {to_json(n)}"
    return None


def _training_problem(c: Configuration, plan: Plan) -> str | None:
    t = c.training
    if t.recipe not in RECIPES:
        return unknown_choice("recipe", t.recipe, RECIPES)
    if t.steps < 0 or not 0 <= t.seconds < math.inf:
        return f"steps and seconds must not be negative, got {t.steps} and {t.seconds}"
    for name, axes in (("mirror_axes", t.mirror_axes), ("low_resolution_axes", t.low_resolution_axes)):
        if not set(axes) <= {0, 1, 2} or len(set(axes)) < len(axes):
            return f"{name} must be among 0, 1, 2, each once, got {list(axes)}"
    if not re.fullmatch(r"\w[\w.-]*", c.name):
        return "the name is that of a folder too: letters, digits, '_', '-' and '.', the first a letter or digit"
    return None


def _stage_problem(c: Configuration, plan: Plan) -> str | None:
    before = next((other for other in plan.configurations if other.name == c.previous_stage), None)
    if c.previous_stage is not None and before is None:
        return f"previous_stage '{c.previous_stage}' is not a configuration of this plan"
    if before is not None and before.previous_stage:
        return f"previous_stage '{before.name}' has a previous stage itself; a cascade has two stages"
    return None


T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and dicts as plain JSON content."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = (
            f for f in dataclasses.fields(value) if "sparse" not in f.metadata or getattr(value, f.name) != f.default
        )
        return {f.name: to_json(getattr(value, f.name)) for f in kept}
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return value


def from_json(kind: type[T], content: Any, *, where: str) -> T:
    """JSON content as the dataclass `kind`; every type is checked. Raises PlanError naming the key."""
    return typing.cast(T, _read(kind, content, where))


def _read(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return content
    if origin in (typing.Union, types.UnionType):
        if content is None and type(None) in arguments:
            return None
        return _read(next(a for a in arguments if a is not type(None)), content, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, content, where)
    if origin is tuple:
        if not isinstance(content, list):
            raise PlanError(f"{where} must be a list, got {content!r}.")
        if len(arguments) == 2 and arguments[1] is ...:
            return tuple(_read(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(content))
        if len(content) != len(arguments):
            raise PlanError(f"{where} must have {len(arguments)} entries, got {content!r}.")
        pairs = zip(arguments, content, strict=True)
        return tuple(_read(a, entry, f"{where}[{i}]") for i, (a, entry) in enumerate(pairs))
    if origin is dict:
        if not isinstance(content, dict):
            raise PlanError(f"{where} must be an object, got {content!r}.")
        return {key: _read(arguments[1], entry, f"{where}.{key}") for key, entry in content.items()}
    if kind is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content)
    if not isinstance(content, kind) or (kind is int and isinstance(content, bool)):
        raise PlanError(f"{where} must be of type {kind.__name__}, got {content!r}.")
    return content


def _read_dataclass(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise PlanError(f"{where} must be an object, got {content!r}.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            raise PlanError(f"{where}: {unknown_choice('key', key, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise PlanError(f"{where}: key '{missing[0]}' is missing.")
    return kind(**{key: _read(hints[key], entry, f"{where}: {key}") for key, entry in content.items()})
