"""An image, its reference and its prediction -> a PNG with both outlines on the slice that has the most foreground.

Slices are shown as radiologists look at them: the patient's right is on the left, the front is up, pixels have their
true proportions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoseg.files import atomic_path
from autoseg.geometry import canonical_axes, turn_array, turn_grid
from autoseg.image import Grid, Image
from autoseg.labels import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with every common colour blindness; those that stand out on grey come first
COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
PANEL_INCHES = 4.0
DPI = 110
WINDOW_PERCENTILES = (0.5, 99.5)  # the brightness range that is shown
CLOSE_UP_SHARE = 0.6  # where the structures fill less of the slice's width and height, they are shown enlarged
CLOSE_UP_MARGIN = 0.25  # around them, as a share of their size
LEGEND_ENTRIES = 13
LEGEND_COLUMNS = 7
TITLE_INCHES = 0.65  # above the panels, with their own titles
PLANES = ("axial", "coronal", "sagittal")  # along z, y, x of the canonical orientation
SIDES = (("R", "L"), ("R", "L"), ("A", "P"))  # what is at the left and the right of such a slice

Integers = NDArray[np.integer[Any]]
Box2D = tuple[slice, slice]


@dataclass(frozen=True)
class View:
    """One slice of a case, ready to draw; rows run down the picture."""

    image: NDArray[Any]
    """(rows, columns) grey values, or (rows, columns, 3) uint8 colours."""
    reference: Integers
    """(rows, columns); zeros without a reference."""
    prediction: Integers
    """(rows, columns); zeros without a prediction."""
    spacing: tuple[float, float]
    """Of rows and columns, in mm."""
    name: str
    """"axial slice 12 of 36"."""
    sides: tuple[str, str]
    """Letters at the left and the right edge; empty for planes without a patient."""


def draw_case(
    path: Path,
    *,
    image: Image,
    reference: Image | None,
    prediction: Image,
    labels: Labels | None = None,
    title: str = "",
) -> None:
    """Write a PNG with three panels: the slice, the reference, the prediction with the reference's outline.

    All images lie on the same grid. Needs no display. Raises StorageError where `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = view_of(image, reference, prediction)
    masks = _structures(view, labels)
    box = _close_up(view)
    height, width = (n * mm for n, mm in zip(view.image[box].shape[:2], view.spacing, strict=True))
    panel_height = PANEL_INCHES * min(max(height / width, 0.5), 1.3)
    legend = _legend_entries(masks)
    below = 0.15 + 0.25 * -(-len(legend) // LEGEND_COLUMNS)
    total = TITLE_INCHES + panel_height + below
    figure = Figure(figsize=(3 * PANEL_INCHES, total), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = {"wspace": 0.04, "left": 0.01, "right": 0.99, "top": 1 - TITLE_INCHES / total, "bottom": below / total}
    panels = figure.subplots(1, 3, gridspec_kw=grid)
    _draw_image(panels[0], view, _whole(view), view.name)
    if box != _whole(view):
        _draw_frame(panels[0], box)
    _draw_image(panels[1], view, box, "reference" if reference is not None else "no reference")
    _draw_image(panels[2], view, box, "prediction (dotted: reference)" if reference is not None else "prediction")
    for colour, (truth, answer) in zip(_colours(len(masks)), masks.values(), strict=True):
        _draw_outline(panels[1], truth, colour)
        _draw_outline(panels[2], answer, colour)
    for truth, _ in masks.values():
        _draw_dotted(panels[2], truth)
    if legend:
        columns = min(len(legend), LEGEND_COLUMNS)
        figure.legend(handles=legend, loc="lower center", ncol=columns, fontsize=10, frameon=False, borderaxespad=0.2)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", y=1 - 0.1 / total, va="top")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def best_median_worst(ranking: Sequence[str]) -> dict[str, str]:
    """ "best", "median" and "worst" of cases ranked from best to worst; fewer than three cases give fewer entries."""
    if not ranking:
        return {}
    picks = {"best": ranking[0], "median": ranking[len(ranking) // 2], "worst": ranking[-1]}
    chosen: dict[str, str] = {}
    for name in ("worst", "best", "median"):  # with few cases the same one would be drawn again
        if picks[name] not in chosen.values():
            chosen[name] = picks[name]
    return {name: chosen[name] for name in picks if name in chosen}


def view_of(image: Image, reference: Image | None, prediction: Image) -> View:
    """The slice across the coarsest axis that has the most reference (or, without one, predicted) foreground."""
    permutation, flips = canonical_axes(image.grid.direction)
    grid = turn_grid(image.grid, permutation, flips)
    axis = _slice_axis(grid)
    maps = [
        np.zeros(grid.shape, np.uint8) if one is None else turn_array(one.array, permutation, flips)[0]
        for one in (reference, prediction)
    ]
    index = _fullest_slice(maps, axis)
    picture = turn_array(image.array, permutation, flips)
    shown = picture if picture.shape[0] == 3 and picture.dtype == np.uint8 else picture[:1]
    rows, columns = (other for other in range(3) if other != axis)
    flat = image.grid.dimensions == 2
    return View(
        image=_upright(np.moveaxis(np.take(shown, index, axis + 1), 0, -1), rows).squeeze(),
        reference=_upright(np.take(maps[0], index, axis), rows),
        prediction=_upright(np.take(maps[1], index, axis), rows),
        spacing=(grid.spacing[rows], grid.spacing[columns]),
        name="image" if flat else f"{PLANES[axis]} slice {index + 1} of {grid.shape[axis]}",
        sides=("", "") if flat else SIDES[axis],
    )


def _slice_axis(grid: Grid) -> int:
    """The coarsest axis; the first one where all are alike, or the image is a plane."""
    if 1 in grid.shape:
        return grid.shape.index(1)
    coarsest = int(np.argmax(grid.spacing))
    return coarsest if grid.spacing[coarsest] > 1.2 * min(grid.spacing) else 0


def _fullest_slice(maps: Sequence[Integers], axis: int) -> int:
    others = tuple(other for other in range(3) if other != axis)
    for labels in maps:
        counts = np.count_nonzero(labels, axis=others)
        if counts.any():
            return int(np.argmax(counts))
    return int(maps[0].shape[axis] // 2)


def _upright(plane: NDArray[Any], rows: int) -> NDArray[Any]:
    """The head up: canonical z grows towards it, picture rows grow downwards."""
    return plane[::-1] if rows == 0 else plane


def _structures(view: View, labels: Labels | None) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Name -> its masks in reference and prediction, for every structure; those not on this slice are empty."""
    if labels is None:
        present = sorted({*np.unique(view.reference).tolist(), *np.unique(view.prediction).tolist()} - {0})
        return {str(value): (view.reference == value, view.prediction == value) for value in present}
    return {name: (labels.mask(view.reference, name), labels.mask(view.prediction, name)) for name in labels.names}


def _whole(view: View) -> Box2D:
    rows, columns = view.image.shape[:2]
    return (slice(0, rows), slice(0, columns))


def _close_up(view: View) -> Box2D:
    """The part of the slice around the structures, or all of it where they fill most of it."""
    foreground = (view.reference > 0) | (view.prediction > 0)
    if not foreground.any():
        return _whole(view)
    spans = [np.flatnonzero(foreground.any(axis=1 - axis)) for axis in range(2)]
    sizes_mm = [(span[-1] - span[0] + 1) * mm for span, mm in zip(spans, view.spacing, strict=True)]
    margin_mm = CLOSE_UP_MARGIN * max(sizes_mm)
    sides = []
    for span, mm, length in zip(spans, view.spacing, foreground.shape, strict=True):
        margin = int(np.ceil(margin_mm / mm))
        sides.append(slice(max(0, int(span[0]) - margin), min(length, int(span[-1]) + 1 + margin)))
    filled = max((side.stop - side.start) / n for side, n in zip(sides, foreground.shape, strict=True))
    return (sides[0], sides[1]) if filled < CLOSE_UP_SHARE else _whole(view)


def _draw_image(panel: Axes, view: View, box: Box2D, title: str) -> None:
    from matplotlib.patheffects import withStroke

    grey: dict[str, Any] = {}
    if view.image.ndim == 2:
        low, high = np.percentile(view.image, WINDOW_PERCENTILES)
        grey = {"cmap": "gray", "vmin": float(low), "vmax": float(high) if high > low else float(low) + 1}
    panel.imshow(view.image, aspect=view.spacing[0] / view.spacing[1], interpolation="nearest", **grey)
    rows, columns = (side.indices(n) for side, n in zip(box, view.image.shape[:2], strict=True))
    panel.set_xlim(columns[0] - 0.5, columns[1] - 0.5)
    panel.set_ylim(rows[1] - 0.5, rows[0] - 0.5)
    panel.set_title(title, fontsize=10)
    panel.set_xticks([])
    panel.set_yticks([])
    for letter, x, side in zip(view.sides, (0.02, 0.98), ("left", "right"), strict=True):
        panel.text(
            x,
            0.5,
            letter,
            transform=panel.transAxes,
            color="white",
            ha=side,
            va="center",
            fontsize=10,
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )


def _draw_frame(panel: Axes, box: Box2D) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = box
    size = (columns.stop - columns.start, rows.stop - rows.start)
    panel.add_patch(Rectangle((columns.start - 0.5, rows.start - 0.5), *size, fill=False, color="white", linewidth=1))


def _draw_outline(panel: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    if mask.any():
        field = _contour_field(mask)
        panel.contourf(*field, levels=[0.5, 2], colors=[colour], alpha=0.22)
        panel.contour(*field, levels=[0.5], colors=[colour], linewidths=1.8)


def _draw_dotted(panel: Axes, mask: NDArray[np.bool_]) -> None:
    if mask.any():
        # white dots on a dark line are seen on bright and dark images alike
        panel.contour(*_contour_field(mask), levels=[0.5], colors=["black"], linewidths=1.3, alpha=0.55)
        panel.contour(*_contour_field(mask), levels=[0.5], colors=["white"], linewidths=1.2, linestyles="dotted")


def _contour_field(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Columns, rows and heights for matplotlib; a rim of zeros closes outlines at the picture's edge."""
    rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
    return columns, rows, np.pad(mask.astype(float), 1)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _legend_entries(masks: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> list[Any]:
    """A coloured patch for each structure on this slice, in the order of the labels."""
    from matplotlib.patches import Patch

    shown = [
        Patch(facecolor=colour, edgecolor="none", label=name)
        for colour, (name, (truth, answer)) in zip(_colours(len(masks)), masks.items(), strict=True)
        if truth.any() or answer.any()
    ]
    rest = len(shown) - LEGEND_ENTRIES
    if rest > 0:
        more = Patch(facecolor="none", edgecolor="none", label=f"and {rest} more")
        return [*shown[:LEGEND_ENTRIES], more]
    return shown
