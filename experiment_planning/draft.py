"""A fingerprint and what was asked -> grid, super-resolution and the configurations to plan, before any is sized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoseg.errors import PlanError, unknown_choice
from autoseg.experiment_planning import topology as rules
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.experiment_planning.forms import PLAIN_FORMS, SUPER_RESOLVED_FORMS, Form, context_slices
from autoseg.experiment_planning.grid import GridRules, plan_grid
from autoseg.experiment_planning.notes import Notes
from autoseg.experiment_planning.superresolution import (
    Asked,
    Ceiling,
    SuperResolution,
    choose_super_resolution,
    expected_spacing,
    task_of,
)
from autoseg.plan import Configuration

CASCADE = ("3d_fullres", "3d_lowres", "3d_cascade")
CONFIGURATIONS = (*PLAIN_FORMS, *CASCADE, *SUPER_RESOLVED_FORMS)
SLICES = ("2d", "2.5d_stack", "2.5d_reduce")  # candidates beside 3D where slices are thick


@dataclass(frozen=True)
class Draft:
    """What is decided before any network is sized."""

    fingerprint: Fingerprint
    grid: GridRules
    wanted: tuple[str, ...]
    """The configurations to plan; what needs the size of a patch to be decided comes later."""
    resolution: SuperResolution | None
    """Super-resolution that the dataset or the user asks for."""
    task: str
    """Of a super-resolution that the budget asks for."""

    @property
    def flat_forms(self) -> list[Form]:
        """2D and 2.5D without super-resolution."""
        return [make(self.grid, self._slices(name)) for name, make in PLAIN_FORMS.items() if name in self.wanted]

    @property
    def super_resolved_forms(self) -> list[Form]:
        """All that super-resolve by this draft's scale."""
        if self.resolution is None:
            return []
        names = [name for name in SUPER_RESOLVED_FORMS if name in self.wanted]
        return [SUPER_RESOLVED_FORMS[name](self.grid, self.resolution, self._slices(name)) for name in names]

    def _slices(self, name: str) -> int:
        if not name.startswith("2.5d"):
            return 1
        refined = self.resolution if name in SUPER_RESOLVED_FORMS else None
        return context_slices(name, self.fingerprint, self.grid, refined)


def draft_plan(
    fingerprint: Fingerprint, configurations: Sequence[str] | None, asked: Asked, ceiling: Ceiling | None, notes: Notes
) -> Draft:
    """Grid, super-resolution and the configurations to plan. Raises PlanError."""
    check_names(fingerprint, configurations)
    grid = plan_grid(fingerprint, notes, expected=expected_spacing(fingerprint, asked))
    named = any(name in SUPER_RESOLVED_FORMS for name in configurations or ())
    resolution = None
    if configurations is None or named or asked.anything:
        resolution = choose_super_resolution(fingerprint, grid, asked, named=named, ceiling=ceiling, notes=notes)
    if resolution is None and not fingerprint.labels.names:
        raise PlanError(
            f"{fingerprint.dataset} has no labels, so only super-resolution can be planned, and nothing asks for it "
            f"({notes.reason('super_resolution').removesuffix('.')}); give --input-spacing, --output-spacing or "
            "--sr-scale."
        )
    wanted = choose_configurations(fingerprint, grid, configurations, resolution, asked, notes)
    return Draft(fingerprint, grid, wanted, resolution, task_of(fingerprint, asked))


def check_names(fingerprint: Fingerprint, configurations: Sequence[str] | None) -> None:
    """Refuse configurations that are not known or need volumes. Raises PlanError."""
    if configurations is None:
        return
    if not configurations:
        raise PlanError(f"No configuration was asked for; choose among {', '.join(CONFIGURATIONS)}.")
    for name in configurations:
        if name not in CONFIGURATIONS:
            raise PlanError(unknown_choice("Configuration", name, CONFIGURATIONS))
        if not fingerprint.labels.names and name not in SUPER_RESOLVED_FORMS:
            raise PlanError(
                f"Configuration {name} answers with labels alone, and {fingerprint.dataset} has none; plan "
                f"{' or '.join(SUPER_RESOLVED_FORMS)} instead."
            )
        if fingerprint.reference_channels and name == "3d_cascade":
            raise PlanError(
                f"Configuration 3d_cascade does not take a reference channel on a grid of its own, and "
                f"{fingerprint.dataset} has one; plan 3d_fullres or 3d_sr instead."
            )
        if fingerprint.dimensions == 2 and name not in ("2d", "2d_sr"):
            raise PlanError(
                f"Configuration {name} needs volumes; the images of {fingerprint.dataset} are 2D, plan '2d' instead."
            )


def choose_configurations(
    fingerprint: Fingerprint,
    grid: GridRules,
    names: Sequence[str] | None,
    resolution: SuperResolution | None,
    asked: Asked,
    notes: Notes,
) -> tuple[str, ...]:
    """Which configurations are planned; what a patch must be known for is decided later."""
    if names is not None:
        wanted, because = tuple(names), "they were asked for."
        if asked.anything and resolution is not None and not set(names) & set(SUPER_RESOLVED_FORMS):
            wanted = (*wanted, *resolution.names(fingerprint.dimensions))
            because = "they were asked for, and super-resolution with them."
    else:
        wanted, because = _by_the_rules(fingerprint, grid)
        if resolution is not None:
            planned = resolution.names(fingerprint.dimensions)
            if not fingerprint.labels.names:
                wanted, because = planned, "the dataset has no labels: images are super-resolved, nothing else."
            elif asked.anything:
                wanted = planned
                because = (
                    "images in use are coarser than the dataset's: networks that need its fine images could not be "
                    "used."
                    if resolution.source == "degraded" and asked.output_spacing is None
                    else "answers on a finer grid than the images' were asked for, and no other network gives them."
                )
            else:
                wanted = (*wanted, *planned)
                because = because.removesuffix(".") + "; and super-resolution, for which there is a reason of its own."
        possible = CONFIGURATIONS if fingerprint.labels.names else tuple(SUPER_RESOLVED_FORMS)
        rest = [name for name in possible if name not in wanted]
        notes.add("configurations.on_request", rest, "planned where a rule asks for them, or with --configurations.")
    notes.add("configurations", wanted, because)
    return wanted


def _by_the_rules(fingerprint: Fingerprint, grid: GridRules) -> tuple[tuple[str, ...], str]:
    """The plain configurations for these images and the reason."""
    if fingerprint.dimensions == 2:
        return ("2d",), "the images are 2D."
    anisotropy = grid.spacing[0] / min(grid.spacing[1:])
    if anisotropy <= rules.ANISOTROPIC:
        return ("3d_fullres",), f"volumes whose slices are {anisotropy:.1f} times as thick as pixels: 3D sees more."
    thick = f"slices are {anisotropy:.1f} times thicker than pixels: a 2D network"
    try:
        context_slices("2.5d_stack", fingerprint, grid)
    except PlanError as error:
        return ("2d", "3d_fullres"), f"{thick} may win, cross-validation decides; no stack of slices: {error}"
    return (
        (*SLICES, "3d_fullres"),
        f"{thick} or one that sees its neighbours too may win (stacks did on 1 of 5 datasets of Vu et al. 2020), "
        "cross-validation decides.",
    )


def first_choice(planned: Mapping[str, Configuration]) -> tuple[str, str]:
    """The configuration to train first where there is time for one, and why."""
    hybrid = (
        "kernels in the plane until spacing is even, then 3D, beat both 2D and 3D (Dice 85.7 against 80.4 and 83.6; "
        "Wang et al. 2019); cross-validation may overrule it."
    )
    if len(planned) == 1:
        return next(iter(planned)), "it is the only one planned."
    order = {
        "3d_fullres": hybrid,
        "3d_sr": "it is what was asked for, at one scale.",
        "3d_sr_any": "it is what was asked for, at any scale.",
    }
    for name, because in order.items():
        if name in planned:
            return name, because
    return next(iter(planned)), "it is the first of those planned."
