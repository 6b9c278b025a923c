"""Fingerprint and budget -> `plan.json`: the rules in reading order, each value with its reason.

The rules are nnU-Net's (Isensee et al. 2021) where nothing better is known. What differs: memory is measured instead
of looked up, and on a slow machine the fold's time shapes width, batch and patch as the memory does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autoseg.errors import PlanError
from autoseg.experiment_planning import topology as rules
from autoseg.experiment_planning.draft import CASCADE, CONFIGURATIONS, draft_plan, first_choice
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.experiment_planning.forms import (
    PLAIN_FORMS,
    SUPER_RESOLVED_FORMS,
    VIEWS,
    Form,
    context_slices,
    frame_of,
    volume_form,
)
from autoseg.experiment_planning.grid import GridRules
from autoseg.experiment_planning.machine import GPU_FOLD_STEPS, MEMORY_SHARE, Machine, resolve_machine
from autoseg.experiment_planning.notes import Notes, sizes
from autoseg.experiment_planning.superresolution import (
    AUTOMATIC_SCALE,
    Asked,
    Ceiling,
    SuperResolution,
    snap,
    why_acquisition,
)
from autoseg.experiment_planning.topology import Topology
from autoseg.plan import (
    Acquisition,
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
from autoseg.preprocessing.degradation import INTERPOLATED, TOO_THICK
from autoseg.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from autoseg.experiment_planning.memory import MemoryEstimate, StepMeter
    from autoseg.experiment_planning.timing import Speed

ISOTROPIC = 1.5  # slices at most so many times as thick as pixels show as much along every view

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
WORTH_COARSER = 1.2  # times as much of the image must be seen for a coarser input grid to be taken
COMPRESSION = 0.7  # compressed by plain size of a float32 image and an int16 label in the store: an estimate


def plan_experiment(
    fingerprint: Fingerprint,
    budget: Budget,
    *,
    configurations: Sequence[str] | None = None,
    asked: Asked | None = None,
    ceiling: Ceiling | None = None,
    probe: bool = True,
) -> Plan:
    """The plan for a dataset and a budget.

    A budget of 0 bytes or 0 seconds means the default; device `auto` the best one that is there. `configurations`
    overrides the choice of the rules, `asked` the grids of super-resolution; `ceiling` measures what labels lose on a
    coarser grid (`superresolution.label_ceiling`), where a rule wants to know. Without `probe` no training step is run:
    nothing is shaped by time.

    Raises PlanError where a configuration is unknown or does not suit the images, or nothing fits the memory.
    """
    notes = Notes()
    machine = resolve_machine(budget, notes, probe=probe)
    draft = draft_plan(fingerprint, configurations, asked or Asked(), ceiling, notes)
    planner = Planner(fingerprint, draft.grid, machine, notes)
    planned = planner.plan_siblings(draft.flat_forms)
    if set(CASCADE) & set(draft.wanted):
        planned |= planner.plan_volumes(draft.wanted, asked=configurations is not None)
    if draft.resolution is not None:
        planned |= {form.name: planner.plan(form) for form in draft.super_resolved_forms}
    else:
        planned |= planner.plan_for_context(draft.wanted, asked=configurations is not None, task=draft.task)
    if draft.task != Asked().task and not any(configuration.super_resolves for configuration in planned.values()):
        raise PlanError(
            f"--task {draft.task}: nothing asks for super-resolution; give --input-spacing, --output-spacing or "
            "--sr-scale too."
        )
    notes.add("first_choice", *first_choice(planned))
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
    fingerprint: Fingerprint,
    configurations: Sequence[str] | None = None,
    asked: Asked | None = None,
    ceiling: Ceiling | None = None,
) -> tuple[PreprocessingSettings, ...]:
    """The stores that a plan will need whatever is measured: they can be filled while the networks are sized.

    Raises PlanError as `plan_experiment` does.
    """
    draft = draft_plan(fingerprint, configurations, asked or Asked(), ceiling, Notes())
    forms = [*draft.flat_forms, *draft.super_resolved_forms]
    if "3d_fullres" in draft.wanted:
        forms.append(volume_form("3d_fullres", draft.grid, draft.grid.spacing))
    return tuple(dict.fromkeys(form.preprocessing for form in forms))


# --- one configuration ------------------------------------------------------------------------------------------


@dataclass
class Planner:
    """Sizes the networks of one dataset; remembers what it measured."""

    fingerprint: Fingerprint
    grid: GridRules
    machine: Machine
    notes: Notes
    _full: Configuration | None = None
    _forms: dict[str, Form] = field(default_factory=dict)
    _meters: dict[Architecture, StepMeter] = field(default_factory=dict)
    _estimates: dict[tuple[Architecture, int, Shape], MemoryEstimate] = field(default_factory=dict)
    _speeds: dict[tuple[Any, ...], Speed] = field(default_factory=dict)

    def plan_siblings(self, forms: Sequence[Form]) -> dict[str, Configuration]:
        """Networks of slices: the search for the others begins with what the memory allowed the first one."""
        planned: dict[str, Configuration] = {}
        for form in forms:
            planned[form.name] = self.plan(form, sibling=next(iter(planned.values()), None))
        return planned

    def plan(
        self, form: Form, *, like: Configuration | None = None, sibling: Configuration | None = None
    ) -> Configuration:
        """One configuration: its patch and batch as the memory allows, then width, batch and patch as the time does.

        It begins with the patch of the configuration that it is `like`; the memory of its `sibling` is about its own.
        """
        name, dimensions = form.name, form.dimensions
        self._forms[name] = form
        median = form.median_shape
        self.notes.add(
            f"{name}.spacing", form.preprocessing.spacing, f"{form.because}; the median image is {sizes(median)}."
        )
        build = Builder(self.fingerprint, form)
        in_plane, shape = form.spacing[3 - dimensions :], median[3 - dimensions :]
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
        self._note_size(name, build, size, limit, shape)
        architecture = build.architecture(size.topology, size.width)
        self._note_network(form, architecture)
        return Configuration(
            name=name,
            topology=form.topology,
            preprocessing=form.preprocessing,
            median_shape=median,
            patch_size=rules.as_volume(size.topology.patch),
            batch_size=size.batch,
            architecture=architecture,
            training=self._training(form, size),
            previous_stage=form.previous_stage,
            view_axis=form.view_axis,
            sr_scale=form.sr_scale,
            sr_range=form.sr_range,
            sr_source="none" if form.resolution is None else form.resolution.source,
            acquisition=None if form.resolution is None else form.resolution.acquisition,
        )

    def _training(self, form: Form, size: Size) -> TrainingSettings:
        """Which axes may be mirrored, made coarse or turned through, in the order of the frame."""
        thick = form.dimensions == 3 and self._is_thick(form, size)
        frames = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)) if _is_self(form) else (frame_of(form.view_axis),)
        first = 3 - form.dimensions
        coarse = [axis for axis in range(1 if thick else first, 3) if form.sr_scale[axis] == 1]
        return TrainingSettings(
            mirror_axes=tuple(
                axis for axis in range(first, 3) if all(frame[axis] in self.grid.mirror_axes for frame in frames)
            ),
            low_resolution_axes=tuple(coarse),
            rotate_out_of_plane=form.dimensions == 3 and not thick and not _is_paired(form),
        )

    def _note_network(self, form: Form, architecture: Architecture) -> None:
        name = form.name
        self.notes.add(
            f"{name}.architecture",
            {"strides": architecture.strides, "kernels": architecture.kernels},
            "an axis is halved while at least 4 voxels are left and its spacing is within a factor 2 of the finest; "
            f"kernels are 1 along an axis until it is ({architecture.divisor[0]}x{architecture.divisor[1]}x"
            f"{architecture.divisor[2]} in all, {len(architecture.strides)} stages).",
        )
        if form.context != "none":
            axis = form.view_axis
            depths = [shape[axis] for shape in self.grid.shapes]
            self.notes.add(
                f"{name}.context_slices",
                form.context_slices,
                f"the thinnest case has {min(depths)} slices, the median one {int(sorted(depths)[len(depths) // 2])}: "
                f"{form.halo} on each side of the one that is labelled.",
            )
        if form.resolution is None:
            return
        low, high = form.sr_range or (1.0, 1.0)
        self.notes.add(
            f"{name}.sr_scale",
            form.sr_scale,
            f"the network reads {sizes(form.resolution.input_spacing)} mm and answers on "
            f"{sizes(form.resolution.output_spacing)} mm (slices first)"
            + (f"; it is trained for any scale from {low:g} to {high:g}." if form.sr_range else "."),
        )
        answers = ["labels"] * form.resolution.segments + ["image"] * form.resolution.restores_images
        self.notes.add(
            f"{name}.answers",
            answers,
            "the dataset has no labels."
            if not self.fingerprint.labels.names
            else "the task that was asked for, by default both."
            if form.resolution.source != "paired"
            else "labels are finer than the images, so there is no truth for an image.",
        )
        if form.resolution.acquisition is not None:
            because = why_acquisition(form.resolution.acquisition, self.fingerprint.image_channels)
            self.notes.add(f"{name}.acquisition", form.resolution.acquisition, because)
        thick = self._thick_cases(form.resolution)
        if thick:
            cases = len(self.grid.spacings)
            self.notes.add(
                f"{name}.training_cases",
                cases - thick,
                f"{thick} of {cases} cases were acquired more than {TOO_THICK:g} times as coarse as the answer and "
                "show nothing of what is missing: they are scored where they are held out, and not trained on.",
            )

    def _thick_cases(self, resolution: SuperResolution) -> int:
        """How many cases `degradation.is_thick` will leave out."""
        model, output = resolution.acquisition, resolution.output_spacing
        if resolution.source != "degraded" or model is None or model.profile == INTERPOLATED:
            return 0
        return sum(
            any(s > 1 and a > TOO_THICK * f for s, a, f in zip(resolution.scale, spacing, output, strict=True))
            for spacing in self.grid.spacings
        )

    def plan_volumes(self, wanted: Sequence[str], *, asked: bool) -> dict[str, Configuration]:
        """`3d_fullres` and, where the patch sees too little, the low resolution, its cascade and the three views."""
        planned: dict[str, Configuration] = {}
        full = self.plan(volume_form("3d_fullres", self.grid, self.grid.spacing))
        self._full = full
        if "3d_fullres" in wanted:
            planned["3d_fullres"] = full
        low = self.plan_lowres(full, asked=asked, wanted=wanted)
        if low is not None:
            planned["3d_lowres"] = low
            if not asked or "3d_cascade" in wanted:
                form = volume_form("3d_cascade", self.grid, self.grid.spacing, previous_stage="3d_lowres")
                planned["3d_cascade"] = self.plan(form, like=full)
        if not asked:
            planned |= self.plan_views(full)
        return planned

    def plan_views(self, full: Configuration) -> dict[str, Configuration]:
        """Axial, coronal and sagittal stacks, to be averaged: for even spacing where 3D sees too little."""
        anisotropy = self.grid.spacing[0] / min(self.grid.spacing[1:])
        seen = share_seen(full)
        if anisotropy >= ISOTROPIC or seen >= rules.LOWRES_SHARE:
            self.notes.add(
                "triplanar",
                False,
                f"slices are {anisotropy:.1f} times as thick as pixels and the 3D patch sees {seen:.0%} of the median "
                f"image; three views pay below {ISOTROPIC:g} times and {rules.LOWRES_SHARE:.0%}.",
            )
            return {}
        try:
            forms = [PLAIN_FORMS[n](self.grid, context_slices(n, self.fingerprint, self.grid)) for n in VIEWS]
        except PlanError as error:
            self.notes.add("triplanar", False, str(error))
            return {}
        self.notes.add(
            "triplanar",
            True,
            f"the 3D patch sees only {seen:.0%} of the median image, a slice all of its plane, and slices are "
            f"{anisotropy:.1f} times as thick as pixels: every view shows as much; the mean of the three predicts.",
        )
        return self.plan_siblings(forms)

    def plan_for_context(self, wanted: Sequence[str], *, asked: bool, task: str) -> dict[str, Configuration]:
        """`3d_sr` for its context: it reads a coarse grid, of which its patch sees enough, and answers on the fine one.

        Planned beside the cascade, and on request. Raises PlanError where it was asked for and no grids are known.
        """
        named = [name for name in wanted if name in SUPER_RESOLVED_FORMS]
        if not named and (asked or "3d_fullres" not in wanted):
            return {}
        full = self._full or self.plan(volume_form("3d_fullres", self.grid, self.grid.spacing))
        seen = share_seen(full)
        low = self.lowres_spacing(full, at_least_half=False) if seen < rules.LOWRES_SHARE else None
        if low is None or set(named) - {"3d_sr"}:
            if named:
                raise PlanError(
                    f"{named[0]} must know its grids, and neither the dataset nor the memory asks for any; give "
                    "--input-spacing, --output-spacing or --sr-scale."
                )
            enough = "that is enough" if seen >= rules.LOWRES_SHARE else "a coarser grid would save too little"
            because = f"the full-resolution patch sees {min(seen, 1):.0%} of the median image: {enough}."
            self.notes.add("super_resolution.for_context", False, because)
            return {}
        try:
            found = self._plan_context(low, task)
        except PlanError as error:  # a candidate that does not fit leaves the others as they are
            if named:
                raise
            self.notes.add("super_resolution.for_context", False, f"the patch sees {seen:.0%}, but {error}")
            return {}
        self.notes.add(
            "super_resolution.for_context",
            found.sr_scale,
            f"the full-resolution patch sees {seen:.0%} of the median image; on a grid {sizes(found.sr_scale)} times "
            f"coarser it sees {share_seen(found):.0%}, and one network answers on the fine grid (PFSeg: low resolution "
            "in, high resolution out scored 0.838 against 0.809 for upsampled answers).",
        )
        return {"3d_sr": found}

    def _plan_context(self, low: Vector, task: str) -> Configuration:
        """`3d_sr` at the smallest whole scale from that of `low` on at which its patch sees enough.

        What a patch may hold on the fine grid is limited too: a scale that lets it see hardly more is not taken.
        """

        def plan(scale: tuple[float, ...]) -> Configuration:
            z, y, x = scale
            resolution = SuperResolution("degraded", (z, y, x), self.grid.spacing, Acquisition("dirac"), task)
            return self.plan(SUPER_RESOLVED_FORMS["3d_sr"](self.grid, resolution, 1))

        factors = (math.ceil(snap(c / f)) for c, f in zip(low, self.grid.spacing, strict=True))
        found = plan(tuple(min(AUTOMATIC_SCALE, float(factor)) for factor in factors))
        while share_seen(found) < rules.LOWRES_SHARE and max(found.sr_scale) < AUTOMATIC_SCALE:
            coarser = plan(tuple(s + 1 if s > 1 else s for s in found.sr_scale))
            if share_seen(coarser) < WORTH_COARSER * share_seen(found):
                return plan(found.sr_scale)  # its reasons again
            found = coarser
        return found

    def plan_lowres(self, full: Configuration, *, asked: bool, wanted: Sequence[str]) -> Configuration | None:
        """The low resolution at which the patch sees a quarter of the median image, where that pays; else None."""
        requested = asked and bool({"3d_lowres", "3d_cascade"} & set(wanted))
        if asked and not requested:
            return None
        if self.grid.reference and not requested:
            self.notes.add("lowres", False, "a cascade does not take a reference channel on a grid of its own.")
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
        low = self.plan(volume_form("3d_lowres", self.grid, spacing))
        # a voxel of the coarser grid may need less memory, so that the patch is larger than was thought: try finer
        finer, halved = self._lowres_spacing(math.prod(low.patch_size), full_voxels, at_least_half=requested)
        if halved and finer < spacing:
            better = self.plan(volume_form("3d_lowres", self.grid, finer))
            if math.prod(better.patch_size) >= rules.LOWRES_SHARE * math.prod(better.median_shape):
                low, spacing = better, finer
            else:
                low = self.plan(volume_form("3d_lowres", self.grid, spacing))  # its reasons again
        because = "it was asked for" if requested else f"the full-resolution patch sees only {seen:.0%} of the image"
        self.notes.add("lowres", True, f"{because}; on {sizes(spacing)} mm it sees at least a quarter.")
        return low

    def lowres_spacing(self, full: Configuration, *, at_least_half: bool) -> Vector | None:
        """The finest spacing at which the full-resolution patch would see a quarter; None where that gains little."""
        patch_voxels, full_voxels = math.prod(full.patch_size), math.prod(full.median_shape)
        spacing, halved = self._lowres_spacing(patch_voxels, full_voxels, at_least_half=at_least_half)
        return spacing if halved else None

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
        channels = len(self.fingerprint.image_channels)
        spacing = configuration.preprocessing.spacing
        voxels = sum(math.prod(self.grid.shape_on(i, spacing)) for i in range(len(self.grid.shapes)))
        finer = math.prod(configuration.preprocessing.label_scale) if self.fingerprint.labels.names else 0
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
            disk_bytes=int(voxels * (4 * channels + 2 * finer) * COMPRESSION) + self._reference_bytes(configuration),
            step_flops=estimate.step_flops,
            seconds_per_step=round(seconds, 4),
            fold_seconds=round(fold, 1),
            parameters=estimate.parameters,
        )

    def _reference_bytes(self, configuration: Configuration) -> int:
        """What the channels on a grid of their own take in the store."""
        reference = configuration.preprocessing.reference
        if reference is None:
            return 0
        voxels = sum(math.prod(self.grid.shape_on(i, reference.spacing)) for i in range(len(self.grid.shapes)))
        return int(4 * len(reference.channels) * voxels * COMPRESSION)

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
        voxels = math.prod(build.form.median_shape) * len(self.grid.shapes)
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

    def _seconds_per_step(self, configuration: Configuration) -> float:
        if not self.machine.timed:
            return 0.0
        build = Builder(self.fingerprint, self._forms[configuration.name])
        dimensions = build.form.dimensions
        a = configuration.architecture
        cut = slice(3 - dimensions, 3)
        topology = Topology(
            configuration.patch_size[cut], tuple(s[cut] for s in a.strides), tuple(k[cut] for k in a.kernels)
        )
        return _seconds(self._speed(build, topology), Size(topology, a.features[0], configuration.batch_size))

    # --- reasons

    def _why_untimed(self) -> str:
        return "no GPU is here" if self.machine.budget.device == "gpu" else "probing was switched off"

    def _is_thick(self, form: Form, size: Size) -> bool:
        """Whether patches are not turned through the slices; where inputs are degraded, the fine ones are turned."""
        patch, spacing = size.topology.patch, form.spacing
        if form.resolution is not None and form.resolution.source == "degraded":
            patch = tuple(round(p * s) for p, s in zip(patch, form.sr_scale, strict=True))
            spacing = form.resolution.output_spacing
        ratio, flat = spacing[0] / min(spacing[1:]), max(patch) / patch[0]
        thick = ratio > rules.ANISOTROPIC or flat > rules.ANISOTROPIC
        self.notes.add(
            f"{form.name}.augmentation",
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
            head="plain" if resolution is None else "subpixel",
            head_scale=form.head_scale,
            image_channels=channels if resolution is not None and resolution.restores_images else 0,
            reference_channels=len(self.fingerprint.reference_channels),
            reference_scale=form.reference_scale,
        )


def share_seen(configuration: Configuration) -> float:
    """The share of the median image that a patch sees."""
    seen = zip(configuration.patch_size, configuration.median_shape, strict=True)
    return math.prod(min(p, m) for p, m in seen) / math.prod(configuration.median_shape)


def _is_self(form: Form) -> bool:
    return form.resolution is not None and form.resolution.source == "self"


def _is_paired(form: Form) -> bool:
    return form.resolution is not None and form.resolution.source == "paired"


def _seconds(speed: Speed, size: Size) -> float:
    return STEP_OVERHEAD * speed.seconds_per_step(size.width, size.batch * math.prod(size.topology.patch))
