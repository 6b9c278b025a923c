"""Datasets with a channel on a grid of its own: thick FLAIR slices, and a thin T1 that alone shows the structure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.geometry import voxels_to_world
from autoseg.image import Grid, Image, write_image

SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
"""Direction of an array whose axes run to left, superior and posterior."""
THICK = Grid((6, 20, 18), (4.0, 1.0, 1.0), (1.5, 0.0, 0.0))
THIN = Grid((22, 26, 24), (1.0, 1.0, 1.0), (-1.0, -2.0, -3.0), SAGITTAL)


def world(grid: Grid) -> NDArray[np.float64]:
    """World coordinates (3, Z, Y, X) in mm of every voxel."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1).reshape(-1, 3)
    return voxels_to_world(grid, voxels).T.reshape(3, *grid.shape)


def shown(what: Callable[[NDArray[np.float64]], NDArray[np.generic]], grid: Grid) -> Image:
    """What a function of world coordinates (3, ...) looks like on a grid."""
    return Image(np.asarray(what(world(grid)))[None], grid)


def ball(centre: NDArray[np.float64], radius: float = 5.0) -> Callable[[NDArray[np.float64]], NDArray[np.uint8]]:
    """1 within a ball."""
    return lambda place: (np.linalg.norm(place - centre[:, None, None, None], axis=0) < radius).astype(np.uint8)


def reference_dataset(
    root: Path,
    *,
    cases: int = 5,
    image: Grid = THICK,
    reference: Grid = THIN,
    label: Grid | None = None,
    channels: tuple[str, str] = ("FLAIR", "T1"),
) -> Path:
    """`cases` cases; the first channel is noise, the second shows the ball that is to be found; label on its own grid.

    Without a label grid that is the image's.
    """
    for number in range(cases):
        random = np.random.default_rng(number)
        centre = np.array([11.0, 9.5, 8.5]) + random.uniform(-4, 4, 3)
        thick = random.normal(100, 10, image.shape).astype(np.float32)
        thin = shown(lambda place, c=centre: 100 + 100.0 * ball(c)(place), reference)  # type: ignore[misc]
        thin = thin.with_array((thin.array + random.normal(0, 5, thin.array.shape)).astype(np.float32))
        write_image(Image(thick[None], image), root / "imagesTr" / f"case_{number}_0000.nii.gz")
        write_image(thin, root / "imagesTr" / f"case_{number}_0001.nii.gz")
        write_image(shown(ball(centre), label or image), root / "labelsTr" / f"case_{number}.nii.gz")
    describe(root, channels=channels, own_label=label is not None)
    return root


def describe(
    root: Path, *, channels: tuple[str, ...] = ("FLAIR", "T1"), own_label: bool = False, **more: object
) -> None:
    """Write dataset.json; the last channel lies on a grid of its own."""
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "channel_grids": {str(len(channels) - 1): "own"},
        "labels": {"background": 0, "ball": 1},
        "file_ending": ".nii.gz",
        **({"label_grid": "own"} if own_label else {}),
        **more,
    }
    (root / "dataset.json").write_text(json.dumps(content))
