"""A fingerprint, a grid and what the user asked -> whether super-resolution is planned, from what truth, at what scale.

Scales and spacings are along the network axes, coarsest first, but for what the user writes: that follows the axes of
the raw files' arrays, (z, y, x). No file is read; what labels lose on a coarser grid is measured in `label_ceiling`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoseg.errors import PlanError, unknown_choice
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.experiment_planning.grid import GridRules
from autoseg.experiment_planning.notes import Notes, sizes
from autoseg.plan import Acquisition, PreprocessingSettings, Vector
from autoseg.plan_values import LARGEST_SCALE, UNCLIPPED
from autoseg.preprocessing.degradation import INTERPOLATED
from autoseg.typed_json import to_json

NAMES = ("3d_sr", "3d_sr_any", "2d_sr", "2.5d_stack_sr")
IMAGES_ALONE = "super_resolution"
TASKS = ("joint", "segmentation", IMAGES_ALONE)

SNAP = 0.05  # a scale so close to a whole number, relative to it, takes that
SMALLEST_SCALE = 1.3  # below it interpolation loses nothing that a network could give back
ROUNDING = 1e-5  # spacings are kept to six digits
AUTOMATIC_SCALE = 4.0  # the largest that is planned without being asked for
SHOWN_SCALE = 6.0  # Dual-ArbNet trains and tests up to it and calls more out of distribution
SMALLEST_ANY_SCALE = 1.5  # of an any-scale network (Dual-ArbNet's)
PAYS_BELOW = 0.95  # C from which on labels lose nothing that super-resolution could give back
THICK = 3.0  # through-plane by in-plane spacing from which on a dataset counts as thick slices only
TWICE = 2.0  # a case so many times as fine as the target domain can show what is missing there
FINE_CASES, FINE_SHARE = 10, 0.2  # such cases that a training needs: so many, and this share of all
SPREAD = 0.10  # of the slice spacing between cases, relative to the median, beyond which one scale is too few
THICKNESS_UNKNOWN = (0.5, 1.1)  # of the spacing: from which the slice thickness is drawn where nothing is known of it

CT = re.compile(r"(?<![a-z])ct(?![a-z])")
MRI = re.compile(r"mri|flair|(?<![a-z])(?:mr(?![a-z])|t[12](?!\d)|pdw?(?![a-z])|adc|dwi|swi)")
WORLD_AXIS = {"S": 0, "I": 0, "P": 1, "A": 1, "L": 2, "R": 2}  # letter of an orientation -> canonical axis

Ceiling = Callable[[Vector], float]
"""C: what `label_ceiling.label_ceiling` says of a spacing in mm along the canonical axes, 0 where it stays."""


@dataclass(frozen=True)
class Asked:
    """What the user wants of super-resolution; spacings and scales along the axes (z, y, x) of the files' arrays."""

    input_spacing: Vector | None = None
    """Of the images that will be met in use, in mm."""
    output_spacing: Vector | None = None
    """Of the labels (and images) that are wanted, in mm."""
    scale: tuple[float, ...] | None = None
    """Input / output spacing: one number, along the coarsest axis, or three."""
    task: str = "joint"
    """One of TASKS: labels and image, labels alone, image alone."""

    @property
    def anything(self) -> bool:
        """Whether grids were asked for."""
        return bool(self.input_spacing or self.output_spacing or self.scale)

    def check(self) -> None:
        """Raises PlanError naming the option whose value cannot be."""
        if self.task not in TASKS:
            raise PlanError(unknown_choice("--task", self.task, TASKS))
        for option, spacing in (("--input-spacing", self.input_spacing), ("--output-spacing", self.output_spacing)):
            if spacing is not None and not all(0 < s < math.inf for s in spacing):
                raise PlanError(f"{option} {_text(spacing)}: a spacing is above 0 mm along each of (z, y, x).")
        if self.scale is not None and len(self.scale) not in (1, 3):
            raise PlanError(f"--sr-scale {_text(self.scale)}: give one number, or three for (z, y, x).")
        for s in self.scale or ():
            if not 1 <= s <= LARGEST_SCALE:
                raise PlanError(
                    f"--sr-scale {_text(self.scale or ())}: a scale, input / output spacing, is from 1 to "
                    f"{LARGEST_SCALE:g}, got {s:g}."
                )


@dataclass(frozen=True)
class SuperResolution:
    """From which grid to which, and where the truth comes from."""

    source: str
    """degraded, paired or self; see `plan_values.SR_SOURCES`."""
    scale: Vector
    """Input spacing / output spacing; of `self` the one along the thick axis."""
    output_spacing: Vector
    """In mm."""
    acquisition: Acquisition | None
    task: str = "joint"
    spread: tuple[float, float] | None = None
    """Smallest and largest scale between the cases that will be met, where they differ by more than 10 %."""

    @property
    def input_spacing(self) -> Vector:
        """In mm."""
        z, y, x = (float(f"{s * f:.6g}") for s, f in zip(self.output_spacing, self.scale, strict=True))
        return z, y, x

    @property
    def store_spacing(self) -> Vector:
        """Of the preprocessed images in mm: fine where inputs are made of them, else that of the inputs."""
        return self.output_spacing if self.source == "degraded" else self.input_spacing

    @property
    def any_range(self) -> tuple[float, float]:
        """The scales that an any-scale network is trained for."""
        largest = max(self.scale)
        return self.spread or (min(SMALLEST_ANY_SCALE, largest), largest)

    @property
    def segments(self) -> bool:
        """Whether labels are answered."""
        return self.task != IMAGES_ALONE

    @property
    def restores_images(self) -> bool:
        """Whether images are answered; finer labels alone are no truth for an image."""
        return self.task != "segmentation" and self.source != "paired"

    def store_settings(self, settings: PreprocessingSettings) -> PreprocessingSettings:
        """Settings of a store that keeps what is the truth: finer labels, or CT that thick slices can be made of."""
        if self.source == "paired":
            return replace(settings, label_scale=self.scale)
        if self.source != "degraded" or self.acquisition is None or self.acquisition.profile == INTERPOLATED:
            return settings
        apart = settings.reference.channels if settings.reference else ()
        normalization = tuple(
            replace(n, scheme=UNCLIPPED) if n.scheme == "ct" and channel not in apart else n
            for channel, n in enumerate(settings.normalization)
        )
        return replace(settings, normalization=normalization)

    def names(self, dimensions: int) -> tuple[str, ...]:
        """The configurations that are planned for it where none is named."""
        if dimensions == 2 or (self.source == "self" and not self.segments):
            return ("2d_sr",)
        return ("3d_sr_any",) if self.spread else ("3d_sr",)


def task_of(fingerprint: Fingerprint, asked: Asked) -> str:
    """What super-resolution answers: what was asked for, images alone where there are no labels. Raises PlanError."""
    if fingerprint.labels.names:
        return asked.task
    if asked.task == "segmentation":
        raise PlanError(f"--task segmentation needs labels, {fingerprint.dataset} has none; leave it out.")
    return IMAGES_ALONE


def choose_super_resolution(
    fingerprint: Fingerprint,
    grid: GridRules,
    asked: Asked,
    *,
    named: bool,
    ceiling: Ceiling | None,
    notes: Notes,
) -> SuperResolution | None:
    """The super-resolution that the user or the dataset asks for; None where neither does.

    `named`: a super-resolving configuration was asked for by its name, so scales up to 8 count and C may be high.
    Raises PlanError where what was asked for cannot be.
    """
    asked.check()
    ceiling = ceiling if fingerprint.labels.names else None
    question = _Question(fingerprint, grid, task_of(fingerprint, asked), named, ceiling)
    if asked.anything:
        notes.add("super_resolution.asked", to_json(asked), "given on the command line.", kind="fixed")
        found: _Answer = _from_the_user(question, asked)
    else:
        against = []
        for rule in (_from_finer_labels, _from_finer_cases, _from_the_plane):
            found = rule(question)
            if not isinstance(found, str):
                break
            against.append(found)
        else:
            found = "; ".join(against)
    thin = None if isinstance(found, str) else _thinner_than_a_slice(question, found[0])
    if thin and (named or asked.anything):
        raise PlanError(f"{thin}; leave the case out, or ask for a smaller scale.")
    found = thin or found
    if isinstance(found, str):
        notes.add("super_resolution", False, found + ".")
        return None
    resolution, because = found
    if not (resolution.segments or resolution.restores_images):
        raise PlanError(
            f"--task {resolution.task} needs fine images, {fingerprint.dataset} has finer labels alone; leave it out."
        )
    because += question.says_ceiling(resolution)
    largest = max(resolution.scale)
    if largest > SHOWN_SCALE:
        because += (
            f"; a scale above {SHOWN_SCALE:g}, here {largest:g}, is outside what has been shown to work: look at the "
            "results"
        )
    notes.add("super_resolution", resolution.scale, because + ".")
    notes.add("super_resolution.source", resolution.source, _SOURCES[resolution.source])
    spacing = f"from {sizes(resolution.input_spacing)} to {sizes(resolution.output_spacing)} mm (slices first)"
    notes.add("super_resolution.output_spacing", resolution.output_spacing, f"{spacing}.")
    return resolution


def _thinner_than_a_slice(question: _Question, resolution: SuperResolution) -> str | None:
    """The first case of which not one input slice can be made; None where all are thick enough."""
    grid, spacing = question.grid, resolution.store_spacing
    largest = max((*resolution.scale, *(resolution.spread or ())))
    factors = {
        "degraded": [largest if s > 1 else 1.0 for s in resolution.scale] if resolution.spread else resolution.scale,
        "self": (1.0, largest, largest),
    }.get(resolution.source, (1.0, 1.0, 1.0))
    for number, case in enumerate(question.fingerprint.cases):
        for axis, (size, factor) in enumerate(zip(grid.shape_on(number, spacing), factors, strict=True)):
            if size < factor:
                return (
                    f"Case {case.identifier} of {question.fingerprint.dataset} has {size} voxels of {spacing[axis]:g} "
                    f"mm along {'zyx'[grid.axis_order[axis]]}, fewer than the {factor:g} of one input slice of "
                    f"{factor * spacing[axis]:g} mm"
                )
    return None


_SOURCES = {
    "degraded": "the training images are as fine as the output: thick ones are made of them by the forward model.",
    "paired": "labels lie on a finer grid than images: they are the truth as they are.",
    "self": "only thick slices are there: what they miss is learned in the plane and applied through the planes.",
}

_NO_REFERENCE = "does not take a reference channel on a grid of its own"

_Answer = tuple[SuperResolution, str] | str
"""A super-resolution with its reason, or why there is none; both without the full stop."""


@dataclass(frozen=True)
class _Question:
    """What every rule looks at."""

    fingerprint: Fingerprint
    grid: GridRules
    task: str
    named: bool
    ceiling: Ceiling | None

    @property
    def limit(self) -> float:
        return LARGEST_SCALE if self.named else AUTOMATIC_SCALE

    def measure(self, spacing: Vector) -> float:
        """C of a spacing in mm along the network axes, 0 where labels stay as they are; nan where it is not known."""
        if self.ceiling is None:
            return math.nan
        z, y, x = (spacing[self.grid.axis_order.index(axis)] for axis in range(3))
        return self.ceiling((z, y, x))

    def measure_in_plane(self, spacing: float) -> float:
        """The mean of C for either axis of the plane, made as coarse as slices are."""
        known = [c for axis in (1, 2) if not math.isnan(c := self.measure(_along(axis, spacing)))]
        return sum(known) / len(known) if known else math.nan

    def says_ceiling(self, resolution: SuperResolution) -> str:
        """What C says of a super-resolution, as the end of a sentence; nothing where it is not known."""
        if not resolution.segments:
            return ""
        if resolution.source == "self":
            c, how = self.measure_in_plane(resolution.input_spacing[0]), "made as coarse in the plane"
        else:
            spacing = zip(resolution.input_spacing, resolution.scale, strict=True)
            c = self.measure(_vector([mm if s > 1 else 0.0 for mm, s in spacing]))
            how = "brought down to the input grid and up again"
        if math.isnan(c):
            return ""
        pays = "thin structures will gain" if c < PAYS_BELOW else "structures are bulky and gain little"
        return f"; labels {how} keep a Dice of {c:.3f}: {pays}"

    def fine_cases(self, target_mm: float) -> list[int]:
        """Cases whose slices are twice as thin as `target_mm`, where they are enough to learn from."""
        spacings = self.grid.spacings
        fine = [case for case, spacing in enumerate(spacings) if spacing[0] * TWICE <= target_mm * (1 + SNAP)]
        return fine if len(fine) >= max(FINE_CASES, FINE_SHARE * len(spacings)) else []


def _from_the_user(question: _Question, asked: Asked) -> _Answer:
    """Input and output grid from what was given; what was not is the dataset's."""
    fingerprint, grid = question.fingerprint, question.grid
    data = grid.spacing
    given_input = _to_network(asked.input_spacing, fingerprint, grid)
    given_output = _to_network(asked.output_spacing, fingerprint, grid)
    scale = _scale_on_network(asked, fingerprint, grid)
    wanted, output = given_input, given_output
    if scale is not None:
        if wanted is not None and output is not None:
            _check_consistent(wanted, output, scale)
        elif wanted is not None:
            output = _divide(wanted, scale)
        elif output is not None:
            wanted = _multiply(output, scale)
        elif data[0] >= THICK * min(data[1:]) and all(s == 1 for s in scale[1:]):
            wanted, output = data, _divide(data, scale)  # thick slices: finer ones are asked for
        else:
            wanted, output = _multiply(data, scale), data
    if output is None:
        output = _finest_truth(question, wanted or data)
    if wanted is None:
        wanted = data
    explicit = given_output is not None and scale is None
    factors = tuple(_scale_of(i, o, explicit=explicit) for i, o in zip(wanted, output, strict=True))
    if fingerprint.dimensions == 2:
        factors = (1.0, *factors[1:])
    if max(factors) == 1:
        axes = range(3 - fingerprint.dimensions, 3)
        ratio = max(wanted[axis] / output[axis] for axis in axes)
        which = "voxels" if fingerprint.dimensions == 3 else "pixels"
        shown = (sizes([spacing[axis] for axis in axes]) for spacing in (wanted, output))
        return (
            f"input {which} of {next(shown)} mm are {ratio:.2g} times as coarse as the output's {next(shown)} mm: "
            f"below {SMALLEST_SCALE:g} resampling loses nothing"
        )
    resolution = SuperResolution("degraded", _vector(factors), output, None, question.task)
    because = f"asked for: images of {sizes(resolution.input_spacing)} mm, answers on {sizes(output)} mm"
    return _with_source(question, resolution, because)


def _with_source(question: _Question, resolution: SuperResolution, because: str) -> _Answer:
    """The source that the dataset has for the grids asked for. Raises PlanError where it has none."""
    data, scale, output = question.grid.spacing, resolution.scale, resolution.output_spacing
    scaled = [axis for axis in range(3) if scale[axis] > 1]
    paired = _label_scale(question)
    if all(paired[axis] >= scale[axis] * (1 - SNAP) for axis in scaled):
        return replace(resolution, source="paired"), because
    thin = bool(question.fine_cases(output[0] * TWICE))  # along the slices some cases may show what most do not
    if all(data[axis] <= output[axis] * (1 + SNAP) or (axis == 0 and thin) for axis in scaled):
        return replace(resolution, acquisition=choose_acquisition(question.fingerprint.image_channels, scale)), because
    pixel = max(data[1:])
    if question.fingerprint.dimensions == 3 and scaled == [0] and pixel <= output[0] * SMALLEST_SCALE:
        if question.fingerprint.reference_channels:
            raise PlanError(
                f"Answers on {sizes(output)} mm (slices first) could be learned from {question.fingerprint.dataset} by "
                f"self-supervision alone, which {_NO_REFERENCE}; leave that channel out, or give finer labels."
            )
        return _self_supervised(question, scale[0], output[0]), because
    raise PlanError(
        f"Answers on {sizes(output)} mm (slices first) cannot be learned from {question.fingerprint.dataset}: its "
        f"images are {sizes(data)} mm, no axis shows so much; ask for a coarser --output-spacing."
    )


def _from_finer_labels(question: _Question) -> _Answer:
    """Paired data: the median case's label is finer than its image."""
    scale = _label_scale(question)
    if not question.fingerprint.labels.names:
        return "there are no labels"
    if max(scale) == 1:
        return "labels lie on the images' grid"
    if max(scale) > LARGEST_SCALE:
        return f"labels are {max(scale):g} times as fine as images, beyond the limit of {LARGEST_SCALE:g}"
    output = _divide(question.grid.spacing, scale)
    because = f"labels lie on a grid {sizes(scale)} times as fine as the images' (slices first)"
    return SuperResolution("paired", scale, output, None, question.task), because


def _from_finer_cases(question: _Question) -> _Answer:
    """Mixed data: enough cases are twice as fine as the median one."""
    spacings = [spacing[0] for spacing in question.grid.spacings]
    median = float(np.median(spacings))
    fine = question.fine_cases(median)
    count = sum(s * TWICE <= median * (1 + SNAP) for s in spacings)
    if not fine or question.fingerprint.dimensions == 2:
        needed = f"at least {FINE_CASES} and {FINE_SHARE:.0%} are needed"
        return f"{count} of {len(spacings)} cases have slices twice as thin as the median's {median:g} mm ({needed})"
    target = float(f"{np.median([spacings[case] for case in fine]):.6g}")
    thick = sorted({s for s in spacings if s > target * SMALLEST_SCALE})
    scale = snap(median / target)
    if scale > question.limit:
        return f"the finest cases are {scale:g} times as fine as the median, beyond the limit of {question.limit:g}"
    # the scale that is planned for is within: it may be snapped upwards, or lie between thin and thick cases
    low, high = min(scale, max(1.0, thick[0] / target)), max(scale, min(thick[-1] / target, LARGEST_SCALE))
    spread = (round(low, 4), round(high, 4)) if (thick[-1] - thick[0]) / median > SPREAD else None
    output = (target, *question.grid.spacing[1:])
    factors = (scale, 1.0, 1.0)
    acquisition = choose_acquisition(question.fingerprint.image_channels, factors)
    because = (
        f"{count} of {len(spacings)} cases have slices of about {target:g} mm, twice as thin as the median's "
        f"{median:g} mm or thinner: they show what the others miss"
    )
    if spread:
        because += f"; the others differ, from {thick[0]:g} to {thick[-1]:g} mm: one network for any scale"
    return SuperResolution("degraded", factors, output, acquisition, question.task, spread), because


def _from_the_plane(question: _Question) -> _Answer:
    """Thick slices only: what is degraded in the plane must be worth giving back."""
    spacing, pixel = question.grid.spacing, max(question.grid.spacing[1:])
    if question.fingerprint.dimensions == 2:
        return "the images are planes"
    if question.fingerprint.reference_channels:
        return f"self-supervision {_NO_REFERENCE}"
    ratio = spacing[0] / min(spacing[1:])
    if ratio < THICK:
        return f"slices are {ratio:.1f} times as thick as pixels, thick ones are from {THICK:g} times"
    scale = snap(spacing[0] / pixel)
    if scale > question.limit:
        beyond = "beyond the limit" if question.named else "automatic up to"
        return f"slices are {scale:.1f} times as thick as pixels, {beyond} {question.limit:g}"
    thick = f"all slices are {ratio:.1f} times as thick as pixels"
    if not question.fingerprint.labels.names:
        return _self_supervised(question, scale, pixel), f"{thick}, and there are no labels to lose by it: images alone"
    c = question.measure_in_plane(scale * pixel)
    if math.isnan(c) and not question.named:
        return f"slices are {ratio:.1f} times as thick as pixels; what labels lose by that was not measured"
    if c >= PAYS_BELOW and not question.named:
        kept = f"labels made as coarse in the plane keep a Dice of {c:.3f}"
        return f"{kept}, from {PAYS_BELOW:g} on there is little to give back"
    return _self_supervised(question, scale, pixel), thick + (", asked for by name" if question.named else "")


def _self_supervised(question: _Question, scale: float, pixel: float) -> SuperResolution:
    channels, factors = question.fingerprint.image_channels, (scale, 1.0, 1.0)
    output = (pixel, pixel, pixel)
    return SuperResolution("self", factors, output, choose_acquisition(channels, factors), question.task)


def choose_acquisition(channels: Sequence[str], scale: Vector) -> Acquisition:
    """The slice profile that goes with the channels' names.

    CT averages over the slice; 2D MRI has a roughly Gaussian profile as wide as the slice is thick, 3D MRI cuts k-space
    off (ECLARE, UniRes). MRI that is coarse along one axis counts as 2D unless its name says 3D.
    """
    names = [name.lower() for name in channels]
    if all(CT.search(name) for name in names):
        return Acquisition("rect")
    if all(MRI.search(name) for name in names):
        volumes = sum(s > 1 for s in scale) > 1 or all("3d" in name for name in names)
        return Acquisition("sinc" if volumes else "gauss")
    return Acquisition("gauss", thickness=THICKNESS_UNKNOWN)


def why_acquisition(acquisition: Acquisition, channels: Sequence[str]) -> str:
    """The reason of `choose_acquisition`, as a sentence."""
    named = " and ".join(f"'{name}'" for name in channels)
    low, high = acquisition.thickness
    return {
        "rect": f"the channels are named {named}: CT averages over the slice.",
        "sinc": f"the channels are named {named}, coarse as a volume: 3D MRI leaves the outer k-space out.",
        "dirac": "thin images are brought to the input grid by interpolation: no scanner's slice is imitated.",
        "gauss": f"the channels are named {named}: slices of 2D MRI have a Gaussian profile as wide as they are thick."
        if low == high
        else f"nothing is known of how {named} is acquired: the thickness is drawn from {low:g} to {high:g} of the "
        "spacing.",
    }[acquisition.profile]


def snap(scale: float) -> float:
    """The whole number within 5 % of a scale, if there is one."""
    whole = max(1, round(scale))
    return float(whole) if abs(scale - whole) <= SNAP * whole else float(f"{scale:.6g}")


def expected_spacing(fingerprint: Fingerprint, asked: Asked) -> Vector | None:
    """Canonical (z, y, x) spacing of the images that the user says will be met; None where nothing is said."""
    asked.check()
    if asked.input_spacing is not None:
        return to_canonical(asked.input_spacing, fingerprint)
    if asked.scale is not None and len(asked.scale) == 3:
        scale = to_canonical(_vector(asked.scale), fingerprint)
        base = fingerprint.median_spacing
        if asked.output_spacing is not None:
            base = to_canonical(asked.output_spacing, fingerprint)
        return _multiply(base, scale)
    return None


def to_canonical(values: Vector, fingerprint: Fingerprint) -> Vector:
    """Values along the files' array axes, along the canonical ones; of most cases where they lie differently."""
    (code, _), *_ = Counter(case.orientation for case in fingerprint.cases).most_common(1)
    z, y, x = (values[[WORLD_AXIS[letter] for letter in code].index(axis)] for axis in range(3))
    return z, y, x


def _to_network(values: Vector | None, fingerprint: Fingerprint, grid: GridRules) -> Vector | None:
    if values is None:
        return None
    canonical = to_canonical(values, fingerprint)
    return _vector([canonical[axis] for axis in grid.axis_order])


def _scale_on_network(asked: Asked, fingerprint: Fingerprint, grid: GridRules) -> Vector | None:
    if asked.scale is None:
        return None
    if len(asked.scale) == 3:
        return _to_network(_vector(asked.scale), fingerprint, grid)
    (s,) = asked.scale
    return (1.0, s, s) if fingerprint.dimensions == 2 else (s, 1.0, 1.0)


def _finest_truth(question: _Question, wanted: Vector) -> Vector:
    """The output grid where none is given: the dataset's, or that of its fine cases where the inputs are the median."""
    data = question.grid.spacing
    if _pays(wanted[0] / data[0]):
        return data
    fine = question.fine_cases(wanted[0])
    if not fine:
        return data
    return float(f"{np.median([question.grid.spacings[case][0] for case in fine]):.6g}"), data[1], data[2]


def _scale_of(input_mm: float, output_mm: float, *, explicit: bool) -> float:
    """The scale along one axis. Raises PlanError where the output is coarser than the input, or the scale too large."""
    ratio = input_mm / output_mm
    if explicit and ratio < 1 - SNAP:
        raise PlanError(
            f"The output spacing {output_mm:g} mm is coarser than the input's {input_mm:g} mm; ask for one that is as "
            "fine at least, or resample the labels afterwards."
        )
    scale = snap(max(1.0, ratio))
    if scale > LARGEST_SCALE:
        raise PlanError(
            f"From {input_mm:g} mm to {output_mm:g} mm is a scale of {scale:g}, the limit is {LARGEST_SCALE:g}; ask "
            f"for an output of {input_mm / LARGEST_SCALE:g} mm or coarser."
        )
    return scale if _pays(scale) else 1.0


def _pays(scale: float) -> bool:
    """Whether a scale is large enough; a ratio of spacings is rounded."""
    return scale >= SMALLEST_SCALE * (1 - ROUNDING)


def _check_consistent(wanted: Vector, output: Vector, scale: Vector) -> None:
    if any(abs(i / o - s) > SNAP * s for i, o, s in zip(wanted, output, scale, strict=True)):
        raise PlanError(
            f"--sr-scale says {_text(scale)}, but the input's {_text(wanted)} mm and the output's {_text(output)} mm "
            f"make it {_text(_divide(wanted, output))} (slices first); give two of the three."
        )


def _label_scale(question: _Question) -> Vector:
    """Image by label spacing of the median case, along the network axes; snapped, 1 below the smallest scale."""
    median = np.median([case.label_scale for case in question.fingerprint.cases], axis=0)
    found = [snap(float(median[axis])) for axis in question.grid.axis_order]
    return _vector([s if _pays(s) else 1.0 for s in found])


def _along(axis: int, spacing: float) -> Vector:
    return _vector([spacing if a == axis else 0.0 for a in range(3)])


def _multiply(a: Vector, b: Vector) -> Vector:
    return _vector([float(f"{x * y:.6g}") for x, y in zip(a, b, strict=True)])


def _divide(a: Vector, b: Vector) -> Vector:
    return _vector([float(f"{x / y:.6g}") for x, y in zip(a, b, strict=True)])


def _vector(values: Sequence[float]) -> Vector:
    z, y, x = (float(v) for v in values)
    return z, y, x


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{v:g}" for v in values)
