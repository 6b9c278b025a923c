"""The values that a plan may hold: choices, limits, and the check of a whole plan, which may be edited by hand.

What cannot be built or trained is refused in a sentence that names the configuration and the value.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from autoseg.errors import PlanError, unknown_choice
from autoseg.typed_json import to_json

if TYPE_CHECKING:
    from autoseg.plan import Configuration, Plan

KINDS = ("fixed", "rule", "empirical")
TOPOLOGIES = ("2d", "2.5d_stack", "2.5d_reduce", "3d")
CONTEXTS = ("none", "stack", "reduce")
INTERPOLATING = "interpolating"
HEADS = ("plain", INTERPOLATING, "subpixel", "implicit", "filters")
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
    volume = c.topology == "3d"
    if c.sr_source == "self" and (refined != [0 if volume else 1] or c.view_axis):
        return (
            "sr_source 'self' needs a sr_scale above 1 along axis 0 of a volume or axis 1 of slices along axis 0, "
            f"got a {c.topology} configuration along axis {c.view_axis} with sr_scale {list(c.sr_scale)}"
        )
    thick = c.sr_source == "self" and volume
    if (c.architecture.head == INTERPOLATING) != thick:
        return f"head '{INTERPOLATING}' is that of volumes with sr_source 'self', got '{c.architecture.head}'"
    body = "slices" if thick and c.architecture.image_channels else "shared"
    if c.architecture.image_body != body:
        return f"image_body must be '{body}' here, got '{c.architecture.image_body}'"
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
    if model.gap and model.profile != "rect":
        return f"a gap goes with profile rect alone, got {model.gap} with {model.profile}; give a smaller thickness"
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
    if before is not None and c.super_resolves:
        return f"a configuration that super-resolves cannot have a previous stage, got '{before.name}'"
    if before is not None and before.previous_stage:
        return f"previous_stage '{before.name}' has a previous stage itself; a cascade has two stages"
    return None
