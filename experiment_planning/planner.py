"""Fingerprint and budget -> `plan.json`: the rules in reading order, each value with its reason.

The rules are nnU-Net's (Isensee et al. 2021) where nothing better is known. What differs: memory is measured instead
of looked up, and on a slow machine the fold's time shapes width, batch and patch as the memory does (`sizing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
    stack_depths,
    volume_form,
)
from autoseg.experiment_planning.grid import GridRules
from autoseg.experiment_planning.machine import GPU_FOLD_STEPS, Machine, resolve_machine
from autoseg.experiment_planning.notes import Notes, sizes
from autoseg.experiment_planning.sizing import Builder, Size, Sizer
from autoseg.experiment_planning.superresolution import (
    AUTOMATIC_SCALE,
    Asked,
    Ceiling,
    SuperResolution,
    snap,
    why_acquisition,
)
from autoseg.plan import (
    Acquisition,
    Architecture,
    Budget,
    Configuration,
    Forecast,
    Plan,
    PreprocessingSettings,
    TrainingSettings,
    Vector,
)
from autoseg.preprocessing.degradation import INTERPOLATED, TOO_THICK
from autoseg.units import format_bytes, format_seconds

ISOTROPIC = 1.5  # slices at most so many times as thick as pixels show as much along every view
MIRROR_STEPS = 10_000  # with fewer, a network has no time to learn each orientation: no mirroring
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
    coarser grid (`label_ceiling`), where a rule wants to know. Without `probe` no training step is run: nothing is
    shaped by time.

    Raises PlanError where a configuration is unknown or does not suit the images, or nothing fits the memory.
    """
    notes = Notes()
    machine = resolve_machine(budget, notes, probe=probe)
    draft = draft_plan(fingerprint, configurations, asked or Asked(), ceiling, notes)
    sizer = Sizer(fingerprint, len(draft.grid.shapes), machine, notes)
    planner = Planner(fingerprint, draft.grid, machine, sizer, notes)
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
    """Plans the configurations of one dataset; one that sees too little asks for further ones."""

    fingerprint: Fingerprint
    grid: GridRules
    machine: Machine
    sizer: Sizer
    notes: Notes
    _full: Configuration | None = None
    _forms: dict[str, Form] = field(default_factory=dict)

    def plan_siblings(self, forms: Sequence[Form]) -> dict[str, Configuration]:
        """Networks of slices: the search for the others begins with what the memory allowed the first one."""
        planned: dict[str, Configuration] = {}
        for form in forms:
            planned[form.name] = self.plan(form, sibling=next(iter(planned.values()), None))
        return planned

    def plan(
        self, form: Form, *, like: Configuration | None = None, sibling: Configuration | None = None
    ) -> Configuration:
        """One configuration of the size that memory and time allow; for `like` and `sibling` see `Sizer.choose`."""
        name, median = form.name, form.median_shape
        self._forms[name] = form
        self.notes.add(
            f"{name}.spacing", form.preprocessing.spacing, f"{form.because}; the median image is {sizes(median)}."
        )
        size = self.sizer.choose(form, like=like, sibling=sibling)
        architecture = Builder(self.fingerprint, form).architecture(size.topology, size.width)
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
            depths = stack_depths(self.grid, axis, form.resolution, views=name in VIEWS)
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
        estimate = self.sizer.measure(configuration.architecture, configuration.batch_size, configuration.patch_size)
        channels = len(self.fingerprint.image_channels)
        spacing = configuration.preprocessing.spacing
        voxels = sum(math.prod(self.grid.shape_on(i, spacing)) for i in range(len(self.grid.shapes)))
        finer = math.prod(configuration.preprocessing.label_scale) if self.fingerprint.labels.names else 0
        seconds = self.sizer.seconds_per_step(configuration, self._forms[configuration.name])
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


def share_seen(configuration: Configuration) -> float:
    """The share of the median image that a patch sees."""
    seen = zip(configuration.patch_size, configuration.median_shape, strict=True)
    return math.prod(min(p, m) for p, m in seen) / math.prod(configuration.median_shape)


def _is_self(form: Form) -> bool:
    return form.resolution is not None and form.resolution.source == "self"


def _is_paired(form: Form) -> bool:
    return form.resolution is not None and form.resolution.source == "paired"
