"""Fingerprint and budget -> `plan.json`: the rules in reading order, each value with its reason.

The rules are nnU-Net's (Isensee et al. 2021) where nothing better is known. What differs: memory is measured instead
of looked up, and on a slow machine the fold's time shapes width, batch and patch as the memory does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autoseg.errors import PlanError, unknown_choice
from autoseg.experiment_planning import topology as rules
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.experiment_planning.grid import GridRules, plan_grid
from autoseg.experiment_planning.machine import GPU_FOLD_STEPS, MEMORY_SHARE, Machine, resolve_machine
from autoseg.experiment_planning.notes import Notes, sizes
from autoseg.experiment_planning.topology import Topology
from autoseg.plan import (
    Architecture,
    Budget,
    Configuration,
    Forecast,
    Plan,
    PreprocessingSettings,
    Shape,
    TrainingSettings,
    Vector,
)
from autoseg.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from autoseg.experiment_planning.memory import MemoryEstimate, StepMeter
    from autoseg.experiment_planning.timing import Speed

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade")

# --- what a fold's time should give
WIDE_STEPS = 5000  # steps that a network wider than 16 must leave room for: it gains from long trainings alone
TARGET_STEPS = 1500  # steps for which a big patch is made smaller
FEWEST_STEPS = 100  # steps for which the network is made narrower than 16
BATCH_STEPS = 10_000  # the batch grows only while the fold still gives so many steps
MIRROR_STEPS = 10_000  # with fewer, a network has no time to learn each orientation: no mirroring
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
COMPRESSION = 0.7  # compressed by plain size of a float32 image and an int16 label in the store: an estimate


def plan_experiment(
    fingerprint: Fingerprint, budget: Budget, *, configurations: Sequence[str] | None = None, probe: bool = True
) -> Plan:
    """The plan for a dataset and a budget.

    A budget of 0 bytes or 0 seconds means the default; device `auto` the best one that is there. `configurations`
    overrides the choice of the rules. Without `probe` no training step is run: nothing is shaped by time.

    Raises PlanError where a configuration is unknown or does not suit the images, or nothing fits the memory.
    """
    notes = Notes()
    machine = resolve_machine(budget, notes, probe=probe)
    grid = plan_grid(fingerprint, notes)
    wanted = choose_configurations(fingerprint, grid, configurations, notes)
    planner = Planner(fingerprint, grid, machine, notes)
    planned: dict[str, Configuration] = {}
    if "2d" in wanted:
        planned["2d"] = planner.plan("2d", spacing=grid.spacing, dimensions=2)
    if {"3d_fullres", "3d_lowres", "3d_cascade"} & set(wanted):
        full = planner.plan("3d_fullres", spacing=grid.spacing, dimensions=3)
        if "3d_fullres" in wanted:
            planned["3d_fullres"] = full
        low = planner.plan_lowres(full, asked=configurations is not None, wanted=wanted)
        if low is not None:
            planned["3d_lowres"] = low
            if configurations is None or "3d_cascade" in wanted:
                planned["3d_cascade"] = planner.plan(
                    "3d_cascade", spacing=grid.spacing, dimensions=3, previous_stage="3d_lowres", like=full
                )
    forecasts = {name: planner.forecast(configuration) for name, configuration in planned.items()}
    finished = {name: planner.with_length(configuration, forecasts[name]) for name, configuration in planned.items()}
    return Plan(
        dataset=fingerprint.dataset,
        channels=fingerprint.channels,
        labels=fingerprint.labels,
        file_ending=fingerprint.file_ending,
        budget=machine.budget,
        configurations=tuple(finished.values()),
        forecasts=forecasts,
        decisions=notes.without(set(CONFIGURATIONS) - set(finished)),
        fingerprint=fingerprint.id,
    )


def first_stores(
    fingerprint: Fingerprint, configurations: Sequence[str] | None = None
) -> tuple[PreprocessingSettings, ...]:
    """The stores that a plan will need whatever is measured: they can be filled while the networks are sized.

    Raises PlanError as `plan_experiment` does.
    """
    notes = Notes()
    grid = plan_grid(fingerprint, notes)
    wanted = choose_configurations(fingerprint, grid, configurations, notes)
    return tuple(
        preprocessing_settings(grid, grid.spacing, dimensions=dimensions)
        for name, dimensions in (("2d", 2), ("3d_fullres", 3))
        if name in wanted
    )


def preprocessing_settings(grid: GridRules, spacing: Vector, *, dimensions: int) -> PreprocessingSettings:
    """How cases are brought to `spacing`; slices stay as they are in 2D."""
    target = (None, *spacing[1:]) if dimensions == 2 else spacing
    return PreprocessingSettings(target, grid.axis_order, grid.normalization)


def choose_configurations(
    fingerprint: Fingerprint, grid: GridRules, asked: Sequence[str] | None, notes: Notes
) -> tuple[str, ...]:
    """Which configurations are planned; whether a low resolution pays is decided later, when the patch is known."""
    for name in asked or ():
        if name not in CONFIGURATIONS:
            raise PlanError(unknown_choice("Configuration", name, CONFIGURATIONS))
        if fingerprint.dimensions == 2 and name != "2d":
            raise PlanError(
                f"Configuration {name} needs volumes; the images of {fingerprint.dataset} are 2D, plan '2d' instead."
            )
    anisotropy = grid.spacing[0] / min(grid.spacing[1:])
    if asked is not None:
        if not asked:
            raise PlanError(f"No configuration was asked for; choose among {', '.join(CONFIGURATIONS)}.")
        wanted, because = tuple(asked), "they were asked for."
    elif fingerprint.dimensions == 2:
        wanted, because = ("2d",), "the images are 2D."
    elif anisotropy > rules.ANISOTROPIC:
        wanted = ("2d", "3d_fullres")
        because = (
            f"slices are {anisotropy:.1f} times thicker than pixels: a 2D network may win, cross-validation decides."
        )
    else:
        wanted = ("3d_fullres",)
        because = f"volumes whose slices are {anisotropy:.1f} times as thick as pixels: 3D sees more."
    notes.add("configurations", wanted, because)
    return wanted


# --- one configuration ------------------------------------------------------------------------------------------


@dataclass
class Planner:
    """Sizes the networks of one dataset; remembers what it measured."""

    fingerprint: Fingerprint
    grid: GridRules
    machine: Machine
    notes: Notes
    _meters: dict[Architecture, StepMeter] = field(default_factory=dict)
    _estimates: dict[tuple[Architecture, int, Shape], MemoryEstimate] = field(default_factory=dict)
    _speeds: dict[tuple[Any, ...], Speed] = field(default_factory=dict)

    def plan(
        self,
        name: str,
        *,
        spacing: Vector,
        dimensions: int,
        previous_stage: str | None = None,
        like: Configuration | None = None,
    ) -> Configuration:
        """One configuration: its patch and batch as the memory allows, then width, batch and patch as the time does."""
        preprocessing = preprocessing_settings(self.grid, spacing, dimensions=dimensions)
        median = self.grid.median_shape(preprocessing.spacing)
        self.notes.add(f"{name}.spacing", preprocessing.spacing, self._why_spacing(name, median))
        build = Builder(self.fingerprint, dimensions, previous_stage is not None, math.prod(median))
        in_plane, shape = spacing[3 - dimensions :], median[3 - dimensions :]
        start = rules.plan_topology(in_plane, rules.first_patch(in_plane, shape))
        if like is not None:
            start = rules.plan_topology(in_plane, like.patch_size)
        limit = Size(start, WIDTHS[0], self._largest_batch(build, start))
        size = self._fit_time(build, limit, in_plane, shape)
        if not self._fits(build, size):  # on a slow machine the time asks for so little that this is the exception
            limit = self._fit_memory(build, start, in_plane, shape)
            size = self._confirm(build, self._fit_time(build, limit, in_plane, shape))
        self._note_size(name, build, size, limit, shape)
        thick = dimensions == 3 and self._is_thick(name, spacing, size)
        architecture = build.architecture(size.topology, size.width)
        self.notes.add(
            f"{name}.architecture",
            {"strides": architecture.strides, "kernels": architecture.kernels},
            "an axis is halved while at least 4 voxels are left and its spacing is within a factor 2 of the finest; "
            f"kernels are 1 along an axis until it is ({architecture.divisor[0]}x{architecture.divisor[1]}x"
            f"{architecture.divisor[2]} in all, {len(architecture.strides)} stages).",
        )
        return Configuration(
            name=name,
            topology="2d" if dimensions == 2 else "3d",
            preprocessing=preprocessing,
            median_shape=median,
            patch_size=rules.as_volume(size.topology.patch),
            batch_size=size.batch,
            architecture=architecture,
            training=TrainingSettings(
                mirror_axes=tuple(axis for axis in self.grid.mirror_axes if axis >= 3 - dimensions),
                low_resolution_axes=(1, 2) if thick or dimensions == 2 else (0, 1, 2),
                rotate_out_of_plane=dimensions == 3 and not thick,
            ),
            previous_stage=previous_stage,
        )

    def plan_lowres(self, full: Configuration, *, asked: bool, wanted: Sequence[str]) -> Configuration | None:
        """The low resolution at which the patch sees a quarter of the median image, where that pays; else None."""
        requested = asked and bool({"3d_lowres", "3d_cascade"} & set(wanted))
        if asked and not requested:
            return None
        patch_voxels, full_voxels = math.prod(full.patch_size), math.prod(full.median_shape)
        seen = patch_voxels / full_voxels
        if seen >= rules.LOWRES_SHARE and not requested:
            self.notes.add(
                "lowres",
                False,
                f"the full-resolution patch sees {min(seen, 1):.0%} of the median image: that is enough.",
            )
            return None
        spacing, halved = self._lowres_spacing(patch_voxels, full_voxels, at_least_half=requested)
        if not halved:
            gain = full_voxels / math.prod(self.grid.median_shape(spacing))
            self.notes.add(
                "lowres",
                False,
                f"the patch sees {seen:.0%} of the median image, but the low resolution that would mend it has only "
                f"{gain:.1f} times fewer voxels: too little to gain.",
            )
            return None
        low = self.plan("3d_lowres", spacing=spacing, dimensions=3)
        # a voxel of the coarser grid may need less memory, so that the patch is larger than was thought: try finer
        finer, halved = self._lowres_spacing(math.prod(low.patch_size), full_voxels, at_least_half=requested)
        if halved and finer < spacing:
            better = self.plan("3d_lowres", spacing=finer, dimensions=3)
            if math.prod(better.patch_size) >= rules.LOWRES_SHARE * math.prod(better.median_shape):
                low, spacing = better, finer
            else:
                low = self.plan("3d_lowres", spacing=spacing, dimensions=3)  # its reasons again
        because = "it was asked for" if requested else f"the full-resolution patch sees only {seen:.0%} of the image"
        self.notes.add("lowres", True, f"{because}; on {sizes(spacing)} mm it sees at least a quarter.")
        return low

    def _lowres_spacing(self, patch_voxels: int, full_voxels: int, *, at_least_half: bool) -> tuple[Vector, bool]:
        """The finest spacing at which a patch of so many voxels sees a quarter; whether it has half the voxels."""
        spacing = self.grid.spacing
        while True:
            spacing = rules.coarser(spacing)
            shape = self.grid.median_shape(spacing)
            topology = rules.plan_topology(spacing, rules.first_patch(spacing, shape))
            while math.prod(topology.patch) > patch_voxels:
                smaller = rules.shrink(topology, spacing, shape)
                if smaller is None:
                    break
                topology = smaller
            enough = math.prod(topology.patch) >= rules.LOWRES_SHARE * math.prod(shape)
            halved = full_voxels >= rules.LOWRES_GAIN * math.prod(shape)
            if enough and (halved or not at_least_half):
                z, y, x = (float(f"{s:.6g}") for s in spacing)
                return (z, y, x), halved

    def forecast(self, configuration: Configuration) -> Forecast:
        """What a configuration will cost."""
        estimate = self.measure(configuration.architecture, configuration.batch_size, configuration.patch_size)
        channels = len(self.fingerprint.channels)
        spacing = configuration.preprocessing.spacing
        voxels = sum(math.prod(self.grid.shape_on(i, spacing)) for i in range(len(self.grid.shapes)))
        seconds = self._seconds_per_step(configuration)
        fold = self.machine.budget.fold_seconds or seconds * GPU_FOLD_STEPS
        self.notes.add(
            f"{configuration.name}.forecast",
            {"memory_bytes": estimate.peak_bytes, "seconds_per_step": round(seconds, 4)},
            f"a step needs {format_bytes(estimate.peak_bytes)} (counted on fake tensors) and "
            f"{estimate.step_flops / 1e9:.3g} GFLOP; "
            + (
                f"{seconds:.2g} s a step is scaled from real steps of a small network on {self.machine.budget.device}; "
                if seconds
                else f"its time was not measured, because {self._why_untimed()}; "
            )
            + f"the store's size assumes that compression leaves {COMPRESSION:.0%}.",
        )
        return Forecast(
            memory_bytes=estimate.peak_bytes,
            disk_bytes=int(voxels * (4 * channels + 2) * COMPRESSION),
            step_flops=estimate.step_flops,
            seconds_per_step=round(seconds, 4),
            fold_seconds=round(fold, 1),
            parameters=estimate.parameters,
        )

    def with_length(self, configuration: Configuration, forecast: Forecast) -> Configuration:
        """The configuration with the length of its training written in."""
        seconds = self.machine.budget.fold_seconds
        if not seconds:
            steps, because = GPU_FOLD_STEPS, "the default length of a fold where no time is given."
        elif forecast.seconds_per_step:
            steps = max(1, int(seconds / forecast.seconds_per_step))
            because = f"{format_seconds(seconds)} a fold at {forecast.seconds_per_step:.2g} s a step."
        else:
            steps, because = 0, "the time of a step was not measured; the fold's time decides."
        self.notes.add(f"{configuration.name}.steps", steps, because)
        training = replace(configuration.training, steps=steps, seconds=seconds)
        if training.mirror_axes and 0 < steps < MIRROR_STEPS:
            training = replace(training, mirror_axes=())
            because = (
                f"about {steps} steps are too few to learn each orientation: below {MIRROR_STEPS} neither training nor "
                "prediction mirrors."
            )
            self.notes.add(f"{configuration.name}.mirror_axes", (), because)
        return replace(configuration, training=training)

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
                if smaller is None or math.prod(smaller.patch) < SMALLEST_PATCH_VOXELS[build.dimensions]:
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
        voxels = build.median_voxels * len(self.grid.shapes)
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
        base = min(MIN_BATCH[build.dimensions], limit.batch)
        topology = limit.topology
        speed = self._speed(build, topology)
        for width in (w for w in WIDTHS if NARROWEST_WIDE_PATCH <= w <= limit.width):
            size = Size(topology, width, base)
            if fold / _seconds(speed, size) >= (WIDE_STEPS if width > NARROWEST_WIDE_PATCH else TARGET_STEPS):
                break
        else:
            size = self._shrink_for_time(speed, spacing, shape, Size(topology, limit.width, base))
        if _seconds(speed, size) * BATCH_STEPS < fold:
            batch = int(size.batch * fold / BATCH_STEPS / _seconds(speed, size))
            size = replace(size, batch=max(size.batch, min(batch, limit.batch)))
        return size

    def _shrink_for_time(self, speed: Speed, spacing: Sequence[float], shape: Sequence[int], size: Size) -> Size:
        """A smaller patch first, where it is big, then a narrower network, then a smaller batch."""
        fold = self.machine.budget.fold_seconds
        size = replace(size, width=min(size.width, NARROWEST_WIDE_PATCH))
        least = SMALLEST_PATCH_VOXELS[len(shape)]
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

        key = (build.dimensions, build.cascade, topology.kernels)
        if key not in self._speeds:
            self._speeds[key] = probe_speed(
                build.architecture(topology, PROBE_WIDTH),
                self.fingerprint.labels,
                recipe=TrainingSettings().recipe,
                patch_size=rules.as_volume(topology.patch),
                device=torch.device(self.machine.budget.device),
            )
        return self._speeds[key]

    def _seconds_per_step(self, configuration: Configuration) -> float:
        if not self.machine.timed:
            return 0.0
        dimensions = 2 if configuration.topology == "2d" else 3
        build = Builder(self.fingerprint, dimensions, cascade=configuration.previous_stage is not None)
        a = configuration.architecture
        cut = slice(3 - dimensions, 3)
        topology = Topology(
            configuration.patch_size[cut], tuple(s[cut] for s in a.strides), tuple(k[cut] for k in a.kernels)
        )
        return _seconds(self._speed(build, topology), Size(topology, a.features[0], configuration.batch_size))

    # --- reasons

    def _why_untimed(self) -> str:
        return "no GPU is here" if self.machine.budget.device == "gpu" else "probing was switched off"

    def _why_spacing(self, name: str, median: Shape) -> str:
        if name == "3d_lowres":
            return (
                f"coarsened by 3 % at a time until the patch sees a quarter of the median image, here {sizes(median)}."
            )
        if name == "2d":
            return f"slices stay as they are, pixels take the target spacing; the median image is {sizes(median)}."
        return f"the target spacing; the median image is {sizes(median)}."

    def _is_thick(self, name: str, spacing: Vector, size: Size) -> bool:
        patch = size.topology.patch
        ratio, flat = spacing[0] / min(spacing[1:]), max(patch) / patch[0]
        thick = ratio > rules.ANISOTROPIC or flat > rules.ANISOTROPIC
        self.notes.add(
            f"{name}.augmentation",
            "in the plane" if thick else "in all directions",
            f"slices are {ratio:.1f} times as thick as pixels and the patch is {flat:.1f} times as long as it is deep"
            + (": turning it through the slices would invent voxels." if thick else "."),
        )
        return thick

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


@dataclass(frozen=True)
class Size:
    """What memory and time decide."""

    topology: Topology
    width: int
    """Feature maps of the first stage."""
    batch: int


@dataclass(frozen=True)
class Builder:
    """Makes the architecture of a dataset for any topology and width."""

    fingerprint: Fingerprint
    dimensions: int
    cascade: bool = False
    median_voxels: int = 0
    """Of the median image on the configuration's grid."""

    def architecture(self, topology: Topology, width: int) -> Architecture:
        """The U-Net of a topology: features double with each stage, two convolutions each."""
        labels, stages = self.fingerprint.labels, topology.stages
        return Architecture(
            input_channels=len(self.fingerprint.channels) + (len(labels.names) if self.cascade else 0),
            output_channels=labels.output_channels,
            features=tuple(min(width * 2**i, MAX_FEATURES[self.dimensions]) for i in range(stages)),
            strides=tuple(rules.as_volume(stride) for stride in topology.strides),
            kernels=tuple(rules.as_volume(kernel) for kernel in topology.kernels),
            encoder_convs=(CONVS,) * stages,
            decoder_convs=(CONVS,) * (stages - 1),
        )


def _seconds(speed: Speed, size: Size) -> float:
    return STEP_OVERHEAD * speed.seconds_per_step(size.width, size.batch * math.prod(size.topology.patch))
