"""The name of a configuration and the dataset's grid -> its `Form`: all that is known before its size is.

2D, 2.5D, 3D and super-resolution are values of one form; nothing that sizes, trains or predicts asks for a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from autoseg.errors import PlanError
from autoseg.experiment_planning.fingerprint import Fingerprint
from autoseg.experiment_planning.grid import GridRules
from autoseg.experiment_planning.superresolution import SuperResolution
from autoseg.plan import PreprocessingSettings, Shape, Vector
from autoseg.plan_values import INTERPOLATING
from autoseg.preprocessing.case import WHOLE

STACK = 3  # slices of a 2.5D network: one on each side
DEEP_STACK = 5  # slices where the volumes are deep
DEEP_SLICES = 20  # of the median volume from which on it is deep: thinner ones would mostly repeat their edge
VIEWS = {"2.5d_axial": 0, "2.5d_coronal": 1, "2.5d_sagittal": 2}  # canonical axis along which the slices lie
CONTEXT_OF = {"2d": "none", "2.5d_stack": "stack", "2.5d_reduce": "reduce", "3d": "none"}


@dataclass(frozen=True)
class Form:
    """What a configuration is before its patch, batch and width are known."""

    name: str
    topology: str
    """One of `plan_values.TOPOLOGIES`."""
    preprocessing: PreprocessingSettings
    """Of the store."""
    spacing: Vector
    """Of the input grid in mm, in the order of the frame; along slices the nominal one."""
    median_shape: Shape
    """Of the cases on the input grid, in the order of the frame."""
    view_axis: int = 0
    """Network axis along which slices are taken; it comes first in the frame."""
    context_slices: int = 1
    previous_stage: str | None = None
    resolution: SuperResolution | None = None
    sr_scale: Vector = (1.0, 1.0, 1.0)
    """In the order of the frame."""
    sr_range: tuple[float, float] | None = None
    because: str = "the target spacing"
    """Why this grid."""

    @property
    def dimensions(self) -> int:
        """2 for networks of slices, 3 for volumes."""
        return 3 if self.topology == "3d" else 2

    @property
    def context(self) -> str:
        """How neighbouring slices enter; one of `plan_values.CONTEXTS`."""
        return CONTEXT_OF[self.topology]

    @property
    def head(self) -> str:
        """One of `plan_values.HEADS`; from thick labels alone a residual of the logits could not be learned."""
        if self.resolution is None:
            return "plain"
        return INTERPOLATING if self.resolution.source == "self" and self.dimensions == 3 else "subpixel"

    @property
    def halo(self) -> int:
        """Slices that are read before and after those that are answered."""
        return self.context_slices // 2

    @property
    def reference_scale(self) -> Vector:
        """Input spacing at `head_scale` / spacing of the channels on a grid of their own, in the order of the frame."""
        reference = self.preprocessing.reference
        if reference is None:
            return (1.0, 1.0, 1.0)
        spacing = in_frame(reference.spacing, frame_of(self.view_axis))
        largest = (own * head / s for own, head, s in zip(self.spacing, self.head_scale, self.sr_scale, strict=True))
        z, y, x = (float(f"{own / other:.6g}") for own, other in zip(largest, spacing, strict=True))
        return z, y, x

    @property
    def head_scale(self) -> Vector:
        """The largest scale that the head answers for, in the order of the frame."""
        if self.sr_range is None:
            return self.sr_scale
        z, y, x = (self.sr_range[1] if s > 1 else 1.0 for s in self.sr_scale)
        return z, y, x


def preprocessing_settings(grid: GridRules, spacing: Vector, *, dimensions: int) -> PreprocessingSettings:
    """How cases are brought to `spacing`; slices stay as they are in 2D."""
    target = (None, *spacing[1:]) if dimensions == 2 else spacing
    return PreprocessingSettings(target, grid.axis_order, grid.normalization, reference=grid.reference)


def slices_form(name: str, grid: GridRules, topology: str, context_slices: int = 1) -> Form:
    """2D and 2.5D along the through-plane axis: slices stay as they are, pixels take the target spacing."""
    settings = preprocessing_settings(grid, grid.spacing, dimensions=2)
    return Form(
        name,
        topology,
        settings,
        grid.spacing,
        grid.median_shape(settings.spacing),
        context_slices=context_slices,
        because="slices stay as they are, pixels take the target spacing",
    )


def view_form(name: str, grid: GridRules, context_slices: int) -> Form:
    """2.5D along one of three views, on the grid of 3d_fullres, so that the three can be averaged."""
    settings = preprocessing_settings(grid, grid.spacing, dimensions=3)
    view = grid.axis_order.index(VIEWS[name])
    frame = frame_of(view)
    return Form(
        name,
        "2.5d_stack",
        settings,
        in_frame(grid.spacing, frame),
        in_frame(grid.median_shape(settings.spacing), frame),
        view_axis=view,
        context_slices=context_slices,
        because=f"the grid of 3d_fullres; slices along canonical axis {'zyx'[VIEWS[name]]}",
    )


def volume_form(name: str, grid: GridRules, spacing: Vector, *, previous_stage: str | None = None) -> Form:
    """3D on any spacing."""
    settings = preprocessing_settings(grid, spacing, dimensions=3)
    coarsened = "coarsened by 3 % at a time until the patch sees a quarter of the median image"
    return Form(
        name,
        "3d",
        settings,
        spacing,
        grid.median_shape(spacing),
        previous_stage=previous_stage,
        because="the target spacing" if spacing == grid.spacing else coarsened,
    )


def stack_depths(
    grid: GridRules, axis: int, resolution: SuperResolution | None = None, *, views: bool = False
) -> list[int]:
    """Slices along a network axis that a network of stacks is shown of each case.

    Along the slices its own, along a view those of the grid of volumes; of a super-resolving one thick slices.
    """
    if resolution is None:
        own = [None, *grid.spacing[1:]] if axis == 0 and not views else grid.spacing
        return [grid.shape_on(case, own)[axis] for case in range(len(grid.shapes))]
    scale = resolution.scale[axis] if resolution.source == "degraded" else 1.0
    shapes = [grid.shape_on(case, resolution.store_spacing) for case in range(len(grid.shapes))]
    return [math.floor(shape[axis] / scale + WHOLE) for shape in shapes]


def context_slices(
    name: str, fingerprint: Fingerprint, grid: GridRules, resolution: SuperResolution | None = None
) -> int:
    """How many slices a 2.5D network sees: 5 where the median volume is deep and no case thinner than that, else 3.

    Raises PlanError naming the thinnest case where it has fewer slices than a stack of 3.
    """
    axis = grid.axis_order.index(VIEWS.get(name, grid.axis_order[0]))
    depths = stack_depths(grid, axis, resolution, views=name in VIEWS)
    thinnest = min(range(len(depths)), key=lambda case: depths[case])
    if depths[thinnest] < STACK:
        slices = "1 slice" if depths[thinnest] == 1 else f"{depths[thinnest]} slices"
        slices += "" if resolution is None else f" of {resolution.input_spacing[axis]:g} mm"
        raise PlanError(
            f"Case {fingerprint.cases[thinnest].identifier} of {fingerprint.dataset} has {slices}, {name} sees a stack "
            f"of {STACK}; leave the case out, or plan '2d' instead."
        )
    median = sorted(depths)[len(depths) // 2]
    return DEEP_STACK if median >= DEEP_SLICES and depths[thinnest] >= DEEP_STACK else STACK


# --- super-resolution ---------------------------------------------------------------------------------------------


def super_resolved_volume(name: str, grid: GridRules, resolution: SuperResolution) -> Form:
    """3D at a fixed scale; at any scale where `name` ends so."""
    if resolution.source == "self" and (name != "3d_sr" or not resolution.segments):
        raise PlanError(
            f"{name} needs {'images or labels' if resolution.segments else 'images'} as fine as its answer to learn "
            f"from, there are thick slices alone; plan {' or '.join(resolution.names(3))}, which learns in the plane."
        )
    anywhere = name.endswith("_any")
    if anywhere and sum(s > 1 for s in resolution.scale) != 1:
        raise PlanError(
            f"{name} takes any scale along one axis, the scale asked for is {_listed(resolution.scale)} along (z, y, "
            "x); plan 3d_sr instead."
        )
    store = preprocessing_settings(grid, resolution.store_spacing, dimensions=3)
    store = resolution.store_settings(store)
    return Form(
        name,
        "3d",
        store,
        resolution.input_spacing,
        grid.median_shape(resolution.input_spacing),
        resolution=resolution,
        sr_scale=resolution.scale,
        sr_range=resolution.any_range if anywhere else None,
        because="the input grid of super-resolution",
    )


def super_resolved_stack(name: str, grid: GridRules, resolution: SuperResolution, context: int) -> Form:
    """A stack of slices of the input grid -> the middle one, on the output grid."""
    volume = super_resolved_volume(name, grid, resolution)
    return replace(volume, topology="2.5d_stack", context_slices=context)


def super_resolved_slices(name: str, grid: GridRules, resolution: SuperResolution) -> Form:
    """2D: slices that hold every axis of which the scale is above 1; self-supervision learns in the plane."""
    if resolution.source == "self":
        return _self_supervised(name, grid, resolution)
    plain = [axis for axis in range(3) if resolution.scale[axis] == 1]
    if not plain:
        raise PlanError(
            f"{name} super-resolves along two axes at most, the scale asked for is {_listed(resolution.scale)} along "
            "(z, y, x); plan 3d_sr instead."
        )
    view = plain[0]
    frame = frame_of(view)
    store = preprocessing_settings(grid, resolution.store_spacing, dimensions=2 if view == 0 else 3)
    store = resolution.store_settings(store)
    spacing = (None, *resolution.input_spacing[1:]) if view == 0 else resolution.input_spacing
    return Form(
        name,
        "2d",
        store,
        in_frame(resolution.input_spacing, frame),
        in_frame(grid.median_shape(spacing), frame),
        view_axis=view,
        resolution=resolution,
        sr_scale=in_frame(resolution.scale, frame),
        because="the input grid of super-resolution",
    )


def _self_supervised(name: str, grid: GridRules, resolution: SuperResolution) -> Form:
    """Slices in the plane, made coarse along their first axis; through the planes the thick axis takes its place."""
    scale, pixel = resolution.scale[0], resolution.output_spacing[1]
    store = preprocessing_settings(grid, resolution.store_spacing, dimensions=3)
    z, y, x = grid.median_shape(store.spacing)
    return Form(
        name,
        "2d",
        store,
        (resolution.store_spacing[0], scale * pixel, pixel),
        (z, max(1, int(y / scale)), x),
        resolution=resolution,
        sr_scale=(1.0, scale, 1.0),
        because="pixels as they are along x, made as thick as slices along y",
    )


def frame_of(view_axis: int) -> Shape:
    """The order of the network axes in a patch: the view's first."""
    first, second = (axis for axis in range(3) if axis != view_axis)
    return view_axis, first, second


def in_frame(values: Any, frame: Shape) -> Any:
    """One value for each network axis, in the order of the frame."""
    return tuple(values[axis] for axis in frame)


def _listed(scale: Vector) -> str:
    return " x ".join(f"{s:g}" for s in scale)


# name -> what makes its form of a grid; 3d_lowres is made where its spacing is found
PLAIN_FORMS: dict[str, Callable[[GridRules, int], Form]] = {
    "2d": lambda grid, _: slices_form("2d", grid, "2d"),
    "2.5d_stack": lambda grid, k: slices_form("2.5d_stack", grid, "2.5d_stack", k),
    "2.5d_reduce": lambda grid, k: slices_form("2.5d_reduce", grid, "2.5d_reduce", k),
    "2.5d_axial": lambda grid, k: view_form("2.5d_axial", grid, k),
    "2.5d_coronal": lambda grid, k: view_form("2.5d_coronal", grid, k),
    "2.5d_sagittal": lambda grid, k: view_form("2.5d_sagittal", grid, k),
}
SUPER_RESOLVED_FORMS: dict[str, Callable[[GridRules, SuperResolution, int], Form]] = {
    "3d_sr": lambda grid, r, _: super_resolved_volume("3d_sr", grid, r),
    "3d_sr_any": lambda grid, r, _: super_resolved_volume("3d_sr_any", grid, r),
    "2d_sr": lambda grid, r, _: super_resolved_slices("2d_sr", grid, r),
    "2.5d_stack_sr": lambda grid, r, k: super_resolved_stack("2.5d_stack_sr", grid, r, k),
}
