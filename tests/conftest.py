"""Small synthetic datasets, and the real ones where they are at hand."""

from __future__ import annotations

import os

# one thread a process: small tensors gain nothing from more, and the tests start many processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from autoseg.image import Grid, Image, write_image

if TYPE_CHECKING:
    from autoseg.experiment_planning.memory import MemoryEstimate
    from autoseg.plan import Architecture, Shape

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real datasets beside the repository; the test is skipped where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real datasets in {folder}")
    return folder


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Callable[..., Path]:
    """A factory: `tiny_dataset(cases=4, shape=(12, 16, 14), ...)` writes a dataset folder and gives its path.

    Each case is noise with a bright ball (label 1) and a brighter one that touches it (label 2), never twice the same.
    """

    def make(
        *,
        name: str = "Dataset001_Tiny",
        cases: int = 3,
        shape: tuple[int, int, int] = (12, 16, 14),
        spacing: tuple[float, float, float] = (2.0, 1.0, 1.0),
        channels: tuple[str, ...] = ("MRI",),
        ending: str = ".nii.gz",
        seed: int = 0,
    ) -> Path:
        root = tmp_path / name
        plane = shape[0] == 1
        grid = Grid(shape, spacing, dimensions=2 if plane else 3)
        for number in range(cases):
            random = np.random.default_rng((seed, number))
            label = tiny_label(shape, random)
            for channel in range(len(channels)):
                brightness = 100.0 + 60.0 * (channel + 1) * label
                array = brightness + random.normal(0, 8, shape)
                array = np.clip(array, 1, 255).astype(np.uint8 if ending in (".png", ".bmp") else np.int16)
                write_image(Image(array[None], grid), root / "imagesTr" / f"case_{number:02d}_{channel:04d}{ending}")
            write_image(Image(label[None], grid), root / "labelsTr" / f"case_{number:02d}{ending}")
        content = {
            "channel_names": {str(number): channel for number, channel in enumerate(channels)},
            "labels": {"background": 0, "ball": 1, "core": 2},
            "numTraining": cases,
            "file_ending": ending,
        }
        (root / "dataset.json").write_text(json.dumps(content))
        return root

    return make


def tiny_label(shape: tuple[int, int, int], random: np.random.Generator) -> np.ndarray:
    """Two touching balls, values 1 and 2, as uint8 (Z, Y, X)."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in shape), indexing="ij")
    where = np.stack(axes)
    centre = random.uniform(-0.2, 0.2, 3) * (np.asarray(shape) > 1)
    outer = np.linalg.norm(where - centre[:, None, None, None], axis=0)
    inner = np.linalg.norm(where - centre[:, None, None, None] - 0.15, axis=0)
    label = np.zeros(shape, dtype=np.uint8)
    label[outer < 0.6] = 1
    label[inner < 0.3] = 2
    return label


def memory_by_formula(sizer: object, architecture: Architecture, batch: int, patch: Shape) -> MemoryEstimate:
    """In the place of `Sizer.measure`: about what a step on fake tensors would say, at once."""
    from autoseg.experiment_planning.memory import MemoryEstimate

    persistent, fine = 10**8, math.prod(patch) * math.prod(architecture.head_scale)
    answers = architecture.output_channels + architecture.image_channels
    each = 11 * architecture.features[0] * math.prod(patch) + 40 * answers * fine
    return MemoryEstimate(persistent + round(batch * each), persistent, 10**9, 10**6)
