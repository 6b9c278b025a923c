"""One held-out case as thick slices, interpolated and segmented (B), super-resolved and segmented (D), and as it is.

python benchmarks/superresolution.py ../shared/data/Dataset004_Hippocampus --axis 0 --scales 4 --arms B D --folder arms
python benchmarks/superresolution_figure.py ../shared/data/Dataset004_Hippocampus arms --axis 0 --scale 4 --output x.png

It draws what the arms left in their --folder, in the plane that holds the degraded axis, where the labels are largest.
The case is the one whose Dice under D is the median, unless --case names one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sr_data import Array, Degradation, HighCase, cubic, read_cases

from autoseg.image import read_image
from autoseg.metrics import dice

COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7")  # Okabe and Ito's
PANEL_INCHES = 2.6


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--axis", type=int, default=0, choices=(0, 1, 2))
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--case")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    source, cases = read_cases(options.dataset)
    degradation = Degradation(options.axis, options.scale)
    where = f"axis{options.axis}_x{options.scale:g}"
    joint = options.folder / f"D_{where}" / f"predicted_3d_sr_{options.scale:g}"
    workspace = options.folder / f"B_{where}" / "interpolated" / "workspace_3d_fullres" / source.name
    interpolating = workspace / "models" / "3d_fullres" / "fold_0" / "validation"
    high = {case.name: degradation.crop(case) for case in cases}
    answered = [name for name in high if (joint / f"{name}.nii.gz").exists()]
    if not answered:
        parser.error(f"{joint} has no predictions")

    values = [value for value in source.labels.known_values if value]

    def score(label: Array, case: HighCase) -> float:
        return float(np.nanmean([dice(label == value, case.label == value) for value in values]))

    def read(path: Path) -> Array:
        found: Array = read_image(path).array[0]
        return found

    ranked = sorted(answered, key=lambda name: score(read(joint / f"{name}.nii.gz"), high[name]))
    name = options.case or ranked[len(ranked) // 2]
    case = high[name]
    low = degradation.low(case)
    shape = case.image.shape
    by_b, by_d = (read(folder / f"{name}.nii.gz") for folder in (interpolating, joint))
    panels = [
        ("thick slices", degradation.up_nearest(low.image, shape[options.axis]), None),
        (f"B: interpolate, segment\nDice {score(by_b, case):.3f}", cubic(low.image, shape), by_b),
        (f"D: joint\nDice {score(by_d, case):.3f}", read(joint / f"{name}_image.nii.gz"), by_d),
        ("the truth", case.image, case.label),
    ]
    draw(panels, case, options.axis, f"{name}, axis {options.axis}, x{options.scale:g}", options.output)
    print(f"{options.output}: {name}")


def draw(panels: list[tuple[str, Array, Array | None]], case: HighCase, axis: int, title: str, output: Path) -> None:
    """Panels of (name, image, label), each (Z, Y, X), side by side, with the labels' outlines."""
    through = 2 if axis != 2 else 1  # the axis along which the shown slice is taken
    sizes = (case.label > 0).sum(axis=tuple(a for a in range(3) if a != through))
    middle = int(np.argmax(sizes))
    rows, columns = (case.grid.spacing[a] for a in range(3) if a != through)
    low, high = np.percentile(case.image, (0.5, 99.5))
    figure = Figure(figsize=(PANEL_INCHES * len(panels), PANEL_INCHES * 1.25), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, image, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        shown = np.take(image, middle, axis=through)[::-1]
        axes.imshow(shown, cmap="gray", vmin=low, vmax=high, aspect=rows / columns, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
        if label is not None:
            outline = np.take(label, middle, axis=through)[::-1]
            for value, colour in zip(np.unique(case.label[case.label > 0]), COLOURS, strict=False):
                if (outline == value).any():
                    axes.contour(outline == value, levels=[0.5], colors=[colour], linewidths=1.2)
    figure.savefig(output, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
