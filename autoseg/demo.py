"""A seed -> the embedded synthetic dataset, as raw files in nnU-Net v2 layout; and the whole story, told with it.

The dataset is a small imitation of an abdominal MRI: thick slices, an organ of two touching parts in the middle, and a
pair of glands that look alike. Left and right of the body are drawn from the same distribution, so that nothing but
the side tells one gland from the other: a pipeline that mirrors left and right, mixes up axes or ignores the
orientation of a file scores visibly worse.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.dataset import DATASET_JSON, RawDataset
from autoseg.errors import StorageError
from autoseg.files import write_json
from autoseg.geometry import Flips, Permutation, turn_array, turn_grid
from autoseg.image import Grid, Image, write_image
from autoseg.workspace import SUMMARY

if TYPE_CHECKING:
    from autoseg.inference.summary import Evaluation
    from autoseg.training.loop import Progress

NAME = "Dataset900_Demo"
LABELS = {"background": 0, "organ_front": 1, "organ_back": 2, "gland_left": 3, "gland_right": 4}
FILE_ENDING = ".nii.gz"
DEMO_CONFIGURATION = "3d_fullres"
STEPS = 250
PLANNED_SECONDS = 60.0  # of the training, which the network is sized for

Floats = NDArray[np.float64]
Shape = tuple[int, int, int]
Triple = tuple[float, float, float]

FINE = 3  # thick slices are averaged from this many thin ones: the partial-volume effect of real slices
AIR, TISSUE, FRONT, BACK, GLAND, DECOY, SPINE = 0.03, 0.42, 0.62, 0.80, 0.72, 0.74, 0.15  # mean brightness
NOISE = 0.05  # standard deviation of the noise, in the same unit
BIAS = 0.25  # strength of the bias field: about +-25 % across the image


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo made, and where it is."""

    dataset: Path
    """The raw dataset."""
    workspace: Path
    """Fingerprint, plan, preprocessed cases and the model."""
    model: Path
    """The trained fold, which `autoseg predict --model` takes."""
    predictions: Path
    """Label files of the test cases, and `summary.json` with their scores."""
    pictures: tuple[Path, ...]
    """The best, median and worst of them."""
    held_out: Evaluation
    """Scores of the training cases that the fold held out."""
    test: Evaluation
    """Scores of the test cases, which the training never saw."""
    steps: int
    """Training steps that were taken."""
    seconds: dict[str, float]
    """How long each part took, in order."""

    def summary(self) -> str:
        """The whole story in plain text."""
        took = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.seconds.items())
        dice = self.held_out.mean["dice"]
        lines = [
            f"Trained {self.steps} steps; mean Dice {dice.mean:.3f} on the {dice.cases} held-out cases.",
            f"The {len(self.test.cases)} test cases:",
            "",
            self.test.table(),
            "",
            f"raw data     {self.dataset}",
            f"workspace    {self.workspace}",
            f"model        {self.model}",
            f"predictions  {self.predictions}",
            *(f"picture      {path}" for path in self.pictures),
            f"took         {sum(self.seconds.values()):.0f} s: {took}",
        ]
        return "\n".join(lines)


def run_demo(
    folder: Path,
    *,
    workspace: Path | None = None,
    seconds: float | None = None,
    device: str = "auto",
    workers: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    on_part: Callable[[str], None] = lambda part: None,
    on_step: Callable[[Progress], None] | None = None,
) -> DemoOutcome:
    """From raw files to scored predictions and pictures of them, with the functions that the commands call.

    Trains one fold for `seconds`, or for STEPS: about a minute of a laptop, longer where that does something else
    meanwhile. The network is sized by steps that are timed in planning, so a machine that is busy then gets a narrower
    one. `on_part` is told what begins, `on_step` where the training stands. Raises StorageError where `folder` is in
    use, because nothing that is there shall be lost.
    """
    from autoseg.inference.crossval import draw_predictions
    from autoseg.inference.evaluation import evaluate_folders
    from autoseg.inference.predictor import load_model
    from autoseg.inference.run import predict_files
    from autoseg.stages import plan_and_preprocess, train, validate

    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder}: is not empty; delete it, or give the demo another folder.")
    parts = _Parts(clock, on_part)

    parts.begin("raw data")
    root = write_synthetic_dataset(folder / NAME, seed=seed)

    parts.begin("plan and preprocess")
    planned = plan_and_preprocess(
        root,
        workspace=workspace or folder / "workspace",
        fold_seconds=seconds or PLANNED_SECONDS,
        configurations=[DEMO_CONFIGURATION],
        device=device,
        workers=workers,
    )
    plan, place = planned.plan, planned.workspace

    parts.begin("training")
    trained = train(
        plan,
        DEMO_CONFIGURATION,
        "0",
        workspace=place,
        device=device,
        seconds=seconds,
        steps=None if seconds else STEPS,
        seed=seed,
        on_step=on_step,
    )

    parts.begin("held-out cases")
    held_out = validate(root, plan, DEMO_CONFIGURATION, "0", workspace=place, device=device, workers=workers)
    assert held_out is not None  # only fold `all` holds nothing out

    parts.begin("prediction")
    model, predictions = place.fold(DEMO_CONFIGURATION, "0"), folder / "predictions"
    predict_files(load_model(model, device), root / "imagesTs", predictions)

    parts.begin("scores and pictures")
    test = evaluate_folders(predictions, root / "labelsTs", labels=plan.labels, workers=workers)
    test.save(predictions / SUMMARY)
    pictures = draw_predictions(test, RawDataset.load(root), predictions)
    return DemoOutcome(
        dataset=root,
        workspace=place.root,
        model=model,
        predictions=predictions,
        pictures=tuple(pictures),
        held_out=held_out,
        test=test,
        steps=trained.steps,
        seconds=parts.ended(),
    )


class _Parts:
    """Announces the parts of the story and notes how long each takes."""

    def __init__(self, clock: Callable[[], float], on_part: Callable[[str], None]) -> None:
        self._clock, self._on_part = clock, on_part
        self._began: dict[str, float] = {}

    def begin(self, part: str) -> None:
        """The part before is over."""
        self._began[part] = self._clock()
        self._on_part(part)

    def ended(self) -> dict[str, float]:
        """Seconds of each part."""
        marks = [*self._began.values(), self._clock()]
        return {part: after - mark for part, mark, after in zip(self._began, marks, marks[1:], strict=False)}


def write_synthetic_dataset(
    root: Path,
    *,
    cases: int = 16,
    test_cases: int = 4,
    seed: int = 0,
    shape: Shape = (16, 56, 56),
    spacing: Triple = (3.0, 1.0, 1.0),
) -> Path:
    """Write a dataset folder (dataset.json, imagesTr, labelsTr, imagesTs, labelsTs) and give back `root`.

    `shape` (voxels) and `spacing` (mm) are nominal, along (z, y, x); every case differs a little from them. Every
    third case is stored in another orientation, every fourth has a border of zeros. The same seed gives the same
    voxels, whatever the number of cases. Raises StorageError where `root` cannot be written.
    """
    root = Path(root)
    splits = [("Tr", index) for index in range(cases)] + [("Ts", index) for index in range(test_cases)]
    for split, index in splits:
        random = np.random.default_rng([seed, index, split == "Ts"])
        image, label = synthetic_case(random, index, shape=shape, spacing=spacing)
        name = f"demo{'' if split == 'Tr' else '_test'}_{index:03d}"
        write_image(image, root / f"images{split}" / f"{name}_0000{FILE_ENDING}")
        write_image(label, root / f"labels{split}" / f"{name}{FILE_ENDING}")
    write_json(
        root / DATASET_JSON,
        {
            "name": NAME,
            "channel_names": {"0": "MRI"},
            "labels": LABELS,
            "numTraining": cases,
            "file_ending": FILE_ENDING,
        },
    )
    return root


def synthetic_case(random: np.random.Generator, index: int, *, shape: Shape, spacing: Triple) -> tuple[Image, Image]:
    """One patient: image `(1, Z, Y, X)` int16 in arbitrary units and label `(1, Z, Y, X)` uint8 on the same grid."""
    grid = _varied_grid(random, shape, spacing)
    body = _Body.drawn(random)
    fine_shape = (grid.shape[0] * FINE, *grid.shape[1:])
    brightness, _ = body.painted(_coordinates(fine_shape, body))
    _, label = body.painted(_coordinates(grid.shape, body))
    voxels = _acquired(brightness.reshape(grid.shape[0], FINE, *grid.shape[1:]).mean(axis=1), random)
    if index % 4 == 3:
        _zero_border(voxels)
        _zero_border(label)
    image = Image(voxels[None], grid), Image(label[None], grid)
    if index % 3 == 2:
        turn = ORIENTATIONS[(index // 3) % len(ORIENTATIONS)]
        return _reoriented(image[0], *turn), _reoriented(image[1], *turn)
    return image


@dataclass(frozen=True)
class _Ellipsoid:
    """A blob in body coordinates: (z, y, x) from -1 to 1 across the image."""

    centre: Floats
    radii: Floats
    tilt: float
    """Rotation in the slice plane, in radians."""

    def depth(self, where: Floats) -> Floats:
        """Positive inside, 0 on the surface; for coordinates `(3, Z, Y, X)`."""
        z, y, x = where - self.centre.reshape(3, 1, 1, 1)
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        turned = np.stack([z, cos * y - sin * x, sin * y + cos * x]) / self.radii.reshape(3, 1, 1, 1)
        depth: Floats = 1 - np.sqrt((turned**2).sum(axis=0))
        return depth


@dataclass(frozen=True)
class _Body:
    """The anatomy of one patient. World x grows towards the patient's left, y towards the back (LPS)."""

    trunk: _Ellipsoid
    spine: _Ellipsoid
    organ: _Ellipsoid
    left: _Ellipsoid
    right: _Ellipsoid
    decoys: tuple[_Ellipsoid, ...]
    """As bright as the glands, but no part of them: brightness alone does not find a gland."""
    cut: Floats
    """Where and how steeply the organ is divided into front and back: (offset, slope z, slope x, wave)."""
    warp: Floats
    """Coarse displacement field `(3, 3, 4, 4)` in body coordinates: no two organs have the same outline."""

    @classmethod
    def drawn(cls, random: np.random.Generator) -> _Body:
        """A random patient."""

        def blob(centre: Triple, radii: Triple, *, spread: float = 0.05) -> _Ellipsoid:
            return _Ellipsoid(
                np.array(centre) + random.normal(0, spread, 3),
                np.array(radii) * random.uniform(0.85, 1.18, 3),
                random.normal(0, 0.25),
            )

        return cls(
            trunk=blob((0, 0, 0), (1.9, 0.82, 0.88), spread=0.02),
            spine=blob((0, 0.55, 0), (3.0, 0.14, 0.13), spread=0.02),
            organ=blob((0.05, -0.22, 0), (0.62, 0.42, 0.32)),
            left=blob((-0.1, 0.32, 0.46), (0.50, 0.21, 0.18)),
            right=blob((-0.1, 0.32, -0.46), (0.50, 0.21, 0.18)),
            decoys=tuple(
                blob((random.uniform(-0.6, 0.6), y, side * x), (0.35, 0.07, 0.07))
                for y, x, side in zip((-0.3, 0.0), (0.52, 0.6), random.choice([-1, 1], 2), strict=True)
            ),
            cut=np.array([random.normal(0, 0.06), *random.normal(0, 0.25, 2), random.uniform(0.02, 0.06)]),
            warp=random.normal(0, 0.05, (3, 3, 4, 4)),
        )

    def painted(self, where: Floats) -> tuple[Floats, NDArray[np.uint8]]:
        """Brightness and label `(Z, Y, X)` at body coordinates `(3, Z, Y, X)`."""
        brightness = np.full(where.shape[1:], AIR)
        label = np.zeros(where.shape[1:], np.uint8)
        brightness[self.trunk.depth(where) > 0] = TISSUE
        brightness[self.spine.depth(where) > 0] = SPINE
        for decoy in self.decoys:
            brightness[decoy.depth(where) > 0] = DECOY
        offset, slope_z, slope_x, wave = self.cut
        z, y, x = where - self.organ.centre.reshape(3, 1, 1, 1)
        behind = y > offset + slope_z * z + slope_x * x + wave * np.sin(9 * x)  # y grows towards the back
        organ = self.organ.depth(where) > 0
        for inside, value, shade in (
            (organ & ~behind, "organ_front", FRONT),
            (organ & behind, "organ_back", BACK),
            (self.left.depth(where) > 0, "gland_left", GLAND),
            (self.right.depth(where) > 0, "gland_right", GLAND),
        ):
            brightness[inside] = shade
            label[inside] = LABELS[value]
        return brightness, label


def _coordinates(shape: Shape, body: _Body) -> Floats:
    """Body coordinates `(3, Z, Y, X)` of every voxel centre, bent by the patient's own warp."""
    axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in shape]
    straight = np.stack(np.meshgrid(*axes, indexing="ij"))
    nodes = np.stack(
        np.meshgrid(
            *[(axis + 1) / 2 * (n - 1) for axis, n in zip(axes, body.warp.shape[1:], strict=True)], indexing="ij"
        )
    )
    bent = [ndimage.map_coordinates(part, nodes, order=2, mode="nearest") for part in body.warp]
    coordinates: Floats = straight + np.stack(bent)
    return coordinates


def _acquired(brightness: Floats, random: np.random.Generator) -> NDArray[np.int16]:
    """What a scanner makes of it: blur, bias field, texture, Rician noise, and units of its own for every patient."""
    shape = brightness.shape
    blurred = ndimage.gaussian_filter(brightness, (0, 0.5, 0.5))
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    a, b, c, d, e = random.uniform(-1, 1, 5)
    bias = np.exp(BIAS * (a * x + b * y + 0.5 * c * z + 0.7 * d * x * y + 0.7 * e * (x**2 - y**2)))
    texture = ndimage.gaussian_filter(random.normal(0, 1, shape), (0.5, 1.2, 1.2))
    signal = blurred * bias * (1 + 0.12 * texture / max(float(texture.std()), 1e-9))
    noisy = np.hypot(signal + random.normal(0, NOISE, shape), random.normal(0, NOISE, shape))
    voxels: NDArray[np.int16] = np.rint(noisy * random.uniform(300, 900)).astype(np.int16)
    return voxels


def _varied_grid(random: np.random.Generator, shape: Shape, spacing: Triple) -> Grid:
    size = tuple(max(4, int(round(n * random.uniform(0.9, 1.12)))) for n in shape)
    in_plane = random.uniform(0.94, 1.06)  # pixels stay square
    steps = (spacing[0] * random.choice([0.85, 1.0, 1.0, 1.2]), spacing[1] * in_plane, spacing[2] * in_plane)
    origin = random.uniform(-60, 60, 3)
    angle = np.deg2rad(random.uniform(-8, 8))  # the patient lies a little askew
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return Grid(
        shape=(size[0], size[1], size[2]),
        spacing=(float(steps[0]), float(steps[1]), float(steps[2])),
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=((1.0, 0.0, 0.0), (0.0, cos, -sin), (0.0, sin, cos)),
    )


# (new order of the axes, which are reversed then): x reversed; feet first, y reversed; slices last, as sagittal files
ORIENTATIONS: tuple[tuple[Permutation, Flips], ...] = (
    ((0, 1, 2), (False, False, True)),
    ((0, 1, 2), (True, True, False)),
    ((1, 2, 0), (True, False, False)),
)


def _reoriented(image: Image, permutation: Permutation, flips: Flips) -> Image:
    """The same voxels at the same places in the world, stored in another order."""
    array = np.ascontiguousarray(turn_array(image.array, permutation, flips))
    return Image(array, turn_grid(image.grid, permutation, flips))


def _zero_border(array: NDArray[Any]) -> None:
    """Set the outermost voxels of every slice to zero, as a scanner's reconstruction leaves them."""
    for axis in (1, 2):
        margin = max(1, array.shape[axis] // 14)
        for edge in (slice(0, margin), slice(-margin, None)):
            array[(slice(None),) * axis + (edge,)] = 0
