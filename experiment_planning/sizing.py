"""The form of a configuration and a machine -> the `Size` of its network, as memory and then time allow, with reasons.

Memory is measured on fake tensors, each network once; time is scaled from real steps of a small network. No file is
read or written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autoseg.errors import PlanError
from autoseg.experiment_planning import topology as rules
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.experiment_planning.forms import Form
from autoseg.experiment_planning.machine import MEMORY_SHARE, Machine
from autoseg.experiment_planning.notes import Notes, sizes
from autoseg.experiment_planning.topology import Topology
from autoseg.plan import Architecture, Configuration, Shape, TrainingSettings
from autoseg.plan_values import INTERPOLATING
from autoseg.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from autoseg.experiment_planning.memory import MemoryEstimate, StepMeter
    from autoseg.experiment_planning.timing import Speed

# --- what a fold's time should give
WIDE_STEPS = 5000  # steps that a network wider than 16 must leave room for: it gains from long trainings alone
TARGET_STEPS = 1500  # steps for which a big patch is made smaller
FEWEST_STEPS = 100  # steps for which the network is made narrower than 16
BATCH_STEPS = 10_000  # the batch grows only while the fold still gives so many steps
STEP_OVERHEAD = 1.15  # augmentation and data loading share a CPU's cores with the network
# --- the network
WIDTHS = (32, 24, 16, 8)  # feature maps of the first stage; none between 8 and 16: oneDNN computes them in blocks of 16
PROBE_WIDTH = 16
MAX_FEATURES = {2: 512, 3: 320}  # nnU-Net's
CONVS = 2  # convolutions of each encoder and decoder stage (nnU-Net's)
MIN_BATCH = {2: 12, 3: 2}  # smallest batch that the time may ask for; a 2D batch of 2 slices sees too little
NARROWEST_WIDE_PATCH = 16  # below this width the patch shrinks first, down to ...
SMALLEST_PATCH_VOXELS = {2: 160**2, 3: 48**3}  # ... so many voxels
DATASET_SHARE = 0.05  # of the dataset's voxels that a batch may hold (nnU-Net's)


@dataclass(frozen=True)
class Size:
    """What memory and time decide."""

    topology: Topology
    width: int
    """Feature maps of the first stage."""
    batch: int


@dataclass(frozen=True)
class Builder:
    """Makes the architecture of a form for any topology and width."""

    fingerprint: Fingerprint
    form: Form

    @property
    def smallest_patch_voxels(self) -> float:
        """Input voxels below which a patch is not shrunk; they hold as many output voxels for every network."""
        return SMALLEST_PATCH_VOXELS[self.form.dimensions] / math.prod(self.form.head_scale)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two networks of the same kernels differ in time."""
        form, resolution = self.form, self.form.resolution
        answers = None if resolution is None else (resolution.segments, resolution.restores_images)
        kind = form.dimensions, form.previous_stage, form.context, form.context_slices, form.head_scale, answers
        return (*kind, form.preprocessing.reference, form.reference_scale)

    def architecture(self, topology: Topology, width: int) -> Architecture:
        """The U-Net of a topology: features double with each stage, two convolutions each."""
        form, resolution = self.form, self.form.resolution
        labels, stages = self.fingerprint.labels, topology.stages
        channels = len(self.fingerprint.image_channels)
        segments = resolution is None or resolution.segments
        restores = resolution is not None and resolution.restores_images
        return Architecture(
            input_channels=channels + (len(labels.names) if form.previous_stage else 0),
            output_channels=labels.output_channels if segments else 0,
            features=tuple(min(width * 2**i, MAX_FEATURES[form.dimensions]) for i in range(stages)),
            strides=tuple(rules.as_volume(stride) for stride in topology.strides),
            kernels=tuple(rules.as_volume(kernel) for kernel in topology.kernels),
            encoder_convs=(CONVS,) * stages,
            decoder_convs=(CONVS,) * (stages - 1),
            context=form.context,
            context_slices=form.context_slices,
            head=form.head,
            head_scale=form.head_scale,
            image_channels=channels if restores else 0,
            image_body="slices" if restores and form.head == INTERPOLATING else "shared",
            reference_channels=len(self.fingerprint.reference_channels),
            reference_scale=form.reference_scale,
        )


@dataclass
class Sizer:
    """Sizes the networks of one dataset; remembers what it measured."""

    fingerprint: Fingerprint
    cases: int
    """Training cases of the dataset."""
    machine: Machine
    notes: Notes
    _meters: dict[Architecture, StepMeter] = field(default_factory=dict)
    _estimates: dict[tuple[Architecture, int, Shape], MemoryEstimate] = field(default_factory=dict)
    _speeds: dict[tuple[Any, ...], Speed] = field(default_factory=dict)

    def choose(self, form: Form, *, like: Configuration | None = None, sibling: Configuration | None = None) -> Size:
        """Patch and batch as the memory allows, then width, batch and patch as the time does.

        It begins with the patch of the configuration that it is `like`; the memory of its `sibling` is about its own.
        Raises PlanError where not even the smallest network fits.
        """
        build = Builder(self.fingerprint, form)
        cut = slice(3 - form.dimensions, 3)
        in_plane, shape = form.spacing[cut], form.median_shape[cut]
        start = rules.plan_topology(in_plane, rules.first_patch(in_plane, shape))
        if like is not None:
            start = rules.plan_topology(in_plane, like.patch_size)
        limit = Size(start, WIDTHS[0], self._largest_batch(build, start))
        if sibling is not None and not (self.machine.timed and self.machine.budget.fold_seconds):
            each = math.prod(start.patch) / math.prod(sibling.patch_size)
            batch = max(2, min(limit.batch, int(sibling.batch_size / each)))
            limit = self._confirm(build, Size(start, sibling.architecture.features[0], batch))
        size = self._fit_time(build, limit, in_plane, shape)
        if not self._fits(build, size):  # on a slow machine the time asks for so little that this is the exception
            limit = self._fit_memory(build, start, in_plane, shape)
            size = self._confirm(build, self._fit_time(build, limit, in_plane, shape))
        self._note_size(form.name, build, size, limit, shape)
        return size

    # --- memory

    def measure(self, architecture: Architecture, batch: int, patch: Shape) -> MemoryEstimate:
        """Memory and operations of a step; measured once."""
        from autoseg.experiment_planning.memory import StepMeter

        key = (architecture, batch, patch)
        if key not in self._estimates:
            if architecture not in self._meters:
                self._meters = {  # only the last one is kept: it is the one that is asked about again
                    architecture: StepMeter(
                        architecture,
                        self.fingerprint.labels,
                        recipe=TrainingSettings().recipe,
                        precision=self.machine.precision,
                        threads=None if self.machine.budget.device == "cpu" else 1,  # a GPU plan is the same everywhere
                    )
                }
            self._estimates[key] = self._meters[architecture].measure(batch, patch)
        return self._estimates[key]

    def _fit_memory(self, build: Builder, topology: Topology, spacing: Sequence[float], shape: Sequence[int]) -> Size:
        """The largest patch whose step fits with the smallest batch, then the batch that should fit, at full width."""
        width, batch = WIDTHS[0], 2
        while True:
            estimate = self._measure_size(build, Size(topology, width, batch))
            if estimate.peak_bytes <= self.machine.usable_bytes:
                break
            goal = (self.machine.usable_bytes - estimate.persistent_bytes) / max(1, estimate.moving_bytes)
            voxels = (
                math.prod(topology.patch) * goal * 1.02
            )  # memory follows the voxels closely, so most steps are skipped
            while True:
                smaller = rules.shrink(topology, spacing, shape)
                if smaller is None or math.prod(smaller.patch) < build.smallest_patch_voxels:
                    return self._fit_narrow(build, topology)
                topology = smaller
                if math.prod(topology.patch) <= max(voxels, 1):
                    break
        return Size(topology, width, self._batch_that_fits(build, Size(topology, width, batch)))

    def _batch_that_fits(self, build: Builder, size: Size) -> int:
        """About the largest batch that fits: two steps along the line through what was measured."""
        most, usable = self._largest_batch(build, size.topology), self.machine.usable_bytes
        estimate = self._measure_size(build, size)
        each, batch, peak = estimate.moving_bytes / size.batch, size.batch, estimate.peak_bytes
        for _ in range(2):
            larger = min(most, batch + int((usable - peak) / each))
            if larger <= batch:
                break
            found = self._measure_size(build, replace(size, batch=larger)).peak_bytes
            each, batch, peak = (found - peak) / (larger - batch), larger, found
        return batch

    def _fit_narrow(self, build: Builder, topology: Topology) -> Size:
        for width in WIDTHS[1:]:
            if self._measure_size(build, Size(topology, width, 2)).peak_bytes <= self.machine.usable_bytes:
                return Size(topology, width, 2)
        least = self._measure_size(build, Size(topology, WIDTHS[-1], 2)).peak_bytes
        raise PlanError(
            f"No network fits in {format_bytes(self.machine.budget.gpu_memory_bytes)}: the smallest one needs "
            f"{format_bytes(int(least / MEMORY_SHARE))}; give more with --gpu-memory."
        )

    def _fits(self, build: Builder, size: Size) -> bool:
        return self._measure_size(build, size).peak_bytes <= self.machine.usable_bytes

    def _confirm(self, build: Builder, size: Size) -> Size:
        """`size` with the batch that does fit: memory is close to linear in the batch, not exactly."""
        while size.batch > 2:
            peak = self._measure_size(build, size).peak_bytes
            if peak <= self.machine.usable_bytes:
                break
            size = replace(size, batch=max(2, min(size.batch - 1, int(size.batch * self.machine.usable_bytes / peak))))
        return size

    def _largest_batch(self, build: Builder, topology: Topology) -> int:
        voxels = math.prod(build.form.median_shape) * self.cases
        return max(2, round(DATASET_SHARE * voxels / math.prod(topology.patch)))

    def _measure_size(self, build: Builder, size: Size) -> MemoryEstimate:
        architecture = build.architecture(size.topology, size.width)
        return self.measure(architecture, size.batch, rules.as_volume(size.topology.patch))

    # --- time

    def _fit_time(self, build: Builder, limit: Size, spacing: Sequence[float], shape: Sequence[int]) -> Size:
        """The widest network, then the largest batch up to `limit`, with which the fold's time gives enough steps."""
        fold = self.machine.budget.fold_seconds
        if not self.machine.timed or not fold:
            return limit
        base = min(MIN_BATCH[build.form.dimensions], limit.batch)
        topology = limit.topology
        speed = self._speed(build, topology)
        for width in (w for w in WIDTHS if NARROWEST_WIDE_PATCH <= w <= limit.width):
            size = Size(topology, width, base)
            if fold / _seconds(speed, size) >= (WIDE_STEPS if width > NARROWEST_WIDE_PATCH else TARGET_STEPS):
                break
        else:
            start, least = Size(topology, limit.width, base), build.smallest_patch_voxels
            size = self._shrink_for_time(speed, spacing, shape, start, least=least)
        if _seconds(speed, size) * BATCH_STEPS < fold:
            batch = int(size.batch * fold / BATCH_STEPS / _seconds(speed, size))
            size = replace(size, batch=max(size.batch, min(batch, limit.batch)))
        return size

    def _shrink_for_time(
        self, speed: Speed, spacing: Sequence[float], shape: Sequence[int], size: Size, *, least: float
    ) -> Size:
        """A smaller patch first, where it is big, then a narrower network, then a smaller batch."""
        fold = self.machine.budget.fold_seconds
        size = replace(size, width=min(size.width, NARROWEST_WIDE_PATCH))
        while fold / _seconds(speed, size) < TARGET_STEPS:
            smaller = rules.shrink(size.topology, spacing, shape)
            if smaller is None or math.prod(smaller.patch) < least:
                break
            size = replace(size, topology=smaller)
        for width in (w for w in WIDTHS if w <= size.width):
            size = replace(size, width=width)
            if fold / _seconds(speed, size) >= FEWEST_STEPS:
                return size
        while size.batch > 2 and fold / _seconds(speed, size) < FEWEST_STEPS:
            size = replace(size, batch=size.batch - 1)
        return size

    def _speed(self, build: Builder, topology: Topology) -> Speed:
        import torch

        from autoseg.experiment_planning.timing import probe_speed

        key = (build.key, topology.kernels)
        if key not in self._speeds:
            self._speeds[key] = probe_speed(
                build.architecture(topology, PROBE_WIDTH),
                self.fingerprint.labels,
                recipe=TrainingSettings().recipe,
                patch_size=rules.as_volume(topology.patch),
                device=torch.device(self.machine.budget.device),
            )
        return self._speeds[key]

    def seconds_per_step(self, configuration: Configuration, form: Form) -> float:
        """Of a configuration that was made of `form`; 0 where steps are not timed."""
        if not self.machine.timed:
            return 0.0
        build, cut = Builder(self.fingerprint, form), slice(3 - form.dimensions, 3)
        a = configuration.architecture
        topology = Topology(
            configuration.patch_size[cut], tuple(s[cut] for s in a.strides), tuple(k[cut] for k in a.kernels)
        )
        return _seconds(self._speed(build, topology), Size(topology, a.features[0], configuration.batch_size))

    # --- reasons

    def _note_size(self, name: str, build: Builder, size: Size, limit: Size, shape: Sequence[int]) -> None:
        estimate = self._measure_size(build, size)
        needs = (
            f"a step of batch {size.batch} needs {format_bytes(estimate.peak_bytes)} of "
            f"{format_bytes(self.machine.budget.gpu_memory_bytes)}"
        )
        fold = self.machine.budget.fold_seconds
        patch, median = sizes(size.topology.patch), sizes(shape)
        seen = math.prod(min(p, m) for p, m in zip(size.topology.patch, shape, strict=True)) / math.prod(shape)
        fits = (
            f"patch {patch}: the median image {median} fits whole"
            if seen >= 0.99
            else (f"patch {patch} sees {seen:.0%} of the median image {median}")
        )
        shortened = size.topology.patch != limit.topology.patch
        self.notes.add(
            f"{name}.patch_size",
            rules.as_volume(size.topology.patch),
            f"{fits}, and {needs}"
            + (f"; {sizes(limit.topology.patch)} would take too much of the fold's time." if shortened else "."),
        )
        timed = self.machine.timed and fold
        if timed and size.width < limit.width:
            need = WIDE_STEPS if size.width >= NARROWEST_WIDE_PATCH else FEWEST_STEPS
            because = (
                f"of {', '.join(map(str, WIDTHS))} feature maps {size.width} are the most that pay in "
                f"{format_seconds(fold)} a fold: wider networks need {need} steps."
            )
        else:
            because = f"{size.width} feature maps, the widest of {', '.join(map(str, WIDTHS))} (nnU-Net's is 32), fit."
        self.notes.add(f"{name}.features", size.width, because)
        most = self._largest_batch(build, size.topology)
        if timed and (shortened or size.width < limit.width or size.batch < limit.batch):
            because = (
                f"{needs}; the time decides: the batch grows only while the fold's "
                f"{format_seconds(fold)} give {BATCH_STEPS} steps."
            )
        elif size.batch == most:
            because = f"{size.batch} patches are {DATASET_SHARE:.0%} of the dataset's voxels; {needs}."
        else:
            because = f"the most that fits: {needs}, of which {1 - MEMORY_SHARE:.0%} are kept free."
        self.notes.add(f"{name}.batch_size", size.batch, because)


def _seconds(speed: Speed, size: Size) -> float:
    return STEP_OVERHEAD * speed.seconds_per_step(size.width, size.batch * math.prod(size.topology.patch))
