"""A channel on a grid of its own: from the dataset's form to the predicted labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import memory_by_formula
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference_data import SAGITTAL, THICK, THIN, describe, reference_dataset, shown, world
from scipy.spatial.transform import Rotation
from tiny_training import architecture, preprocessed, tiny_configuration, tiny_plan
from torch import Tensor

from autoseg.checkpoint import Checkpoint
from autoseg.dataset import RawDataset
from autoseg.errors import DatasetError, PlanError, PredictionError
from autoseg.experiment_planning.fingerprint import Fingerprint, extract_fingerprint, uniform_fingerprint
from autoseg.experiment_planning.planner import plan_experiment
from autoseg.experiment_planning.sizing import Sizer
from autoseg.experiment_planning.superresolution import Asked
from autoseg.experiment_planning.verify import fix_dataset, verify_dataset
from autoseg.geometry import resample_grid
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.inference.crossval import validate_fold
from autoseg.inference.held_out import held_out_case
from autoseg.inference.package import export_model
from autoseg.inference.predictor import load_model
from autoseg.inference.run import predict_files
from autoseg.inference.sliding_window import sliding_window_logits
from autoseg.networks.fusion import covering, resample
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import (
    Acquisition,
    Budget,
    Configuration,
    Normalization,
    Plan,
    PreprocessingSettings,
    ReferenceGrid,
    TrainingSettings,
    Vector,
)
from autoseg.plan_values import check_plan
from autoseg.preprocessing.case import preprocess_case
from autoseg.preprocessing.store import REFERENCE, Store
from autoseg.reading import read_case
from autoseg.training import augment
from autoseg.training.batches import Samples
from autoseg.training.loop import train_fold
from autoseg.training.sampling import Patch
from autoseg.typed_json import from_json, to_json
from autoseg.workspace import Workspace

AS_IT_IS = (Normalization("none"),) * 2


def place_code(place: NDArray[np.float64]) -> NDArray[np.float32]:
    """A different number at every place (3, ...) in the world, far above 0, linear."""
    z, y, x = place
    return (1000 + 7 * z + 3 * y - 5 * x).astype(np.float32)


def coded(grid: Grid, reference: Grid) -> Image:
    """An image that says at every voxel where it is, with a reference that does too."""
    return replace(shown(place_code, grid), references=(shown(place_code, reference),))


def reference_settings(own: float = 1.0, **changes: Any) -> PreprocessingSettings:
    chosen = PreprocessingSettings(
        (4.0, 1.0, 1.0), (0, 1, 2), AS_IT_IS, image_order=1, reference=ReferenceGrid((1,), (own, own, own))
    )
    return replace(chosen, **changes)


# ---- the dataset's form


def test_a_channel_on_a_grid_of_its_own_is_read_as_a_reference_of_the_image(tmp_path: Path) -> None:
    dataset = RawDataset.load(reference_dataset(tmp_path / "Dataset001_R", cases=1))
    image, label = read_case(dataset.cases[0], dataset)
    assert dataset.reference_channels == (1,) and image.channels == 1 and image.shape == THICK.shape
    assert label is not None and label.grid == image.grid
    (reference,) = image.references
    np.testing.assert_array_equal(reference.array, read_image(dataset.cases[0].images[1]).array)
    assert reference.array.dtype == np.float32 and np.allclose(reference.grid.direction, SAGITTAL)
    assert verify_dataset(dataset.root, workers=1).sound


@pytest.mark.parametrize(
    ("grids", "sentence"),
    [
        ({"2": "own"}, "channel '2'"),
        ({"1": "apart"}, "grid 'apart'"),
        ({"0": "own", "1": "own"}, "leave at least one"),
        (["own"], "must be an object"),
    ],
)
def test_grids_of_channels_that_cannot_be_are_refused(tmp_path: Path, grids: Any, sentence: str) -> None:
    root = reference_dataset(tmp_path / "Dataset001_R", cases=1)
    describe(root, channel_grids=grids)
    with pytest.raises(DatasetError, match=sentence):
        RawDataset.load(root)


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ((200.0, 0.0, 0.0), "does not overlap the image"),
        ((-1.0, -2.0, -20.0), r"covers 1?\d % of the image|covers \d+%"),
    ],
)
def test_a_reference_that_lies_elsewhere_is_named_with_both_places(
    tmp_path: Path, origin: Vector, sentence: str
) -> None:
    root = reference_dataset(tmp_path / "Dataset001_R", cases=2)
    path = root / "imagesTr" / "case_1_0001.nii.gz"
    write_image(Image(read_image(path).array, replace(THIN, origin=origin)), path)
    report = verify_dataset(root, workers=1)
    (problem,) = report.errors
    assert problem.case == "case_1" and path.name in problem.sentence
    with pytest.raises(DatasetError, match=sentence) as error:
        extract_fingerprint(RawDataset.load(root), workers=1)
    assert "case_1" in str(error.value) and f"({origin[0] - 0.5:g}, " in str(error.value) and "-0.5" in str(error.value)


def test_a_repaired_copy_keeps_the_reference_where_it_lies(tmp_path: Path) -> None:
    root = reference_dataset(tmp_path / "Dataset001_R", cases=2)
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**content, "numTraining": 7}))
    assert fix_dataset(root, tmp_path / "fixed").repairs
    copied = read_image(tmp_path / "fixed" / "imagesTr" / "case_0_0001.nii.gz")
    assert copied.grid == read_image(root / "imagesTr" / "case_0_0001.nii.gz").grid


# ---- the store


@settings(max_examples=25, deadline=None)
@given(
    turn=st.tuples(st.floats(-180, 180), st.floats(-90, 90), st.floats(-180, 180)),
    spacing=st.tuples(*(st.floats(0.6, 3.0),) * 3),
    shift=st.tuples(*(st.floats(-4.0, 4.0),) * 3),
    own=st.sampled_from([1.0, 1.7, 0.5]),
    order=st.sampled_from([(0, 1, 2), (2, 0, 1)]),
)
def test_every_voxel_of_the_stored_reference_shows_its_place_however_the_files_lie(
    turn: Vector, spacing: Vector, shift: Vector, own: float, order: tuple[int, int, int]
) -> None:
    matrix = Rotation.from_euler("zyx", turn, degrees=True).as_matrix()
    direction = tuple(tuple(row) for row in matrix.tolist())
    shape = tuple(int(np.ceil(60 / s)) for s in spacing)
    # its middle near that of the image, which it covers whole however it is turned
    middle = np.array([11.5, 9.5, 8.5]) + shift
    origin = middle - matrix @ ((np.array(shape) - 1) / 2 * spacing)
    reference = Grid(shape, spacing, tuple(origin.tolist()), direction)  # type: ignore[arg-type]
    flipped = Grid(THICK.shape, THICK.spacing, (21.5, 0.0, 17.0), ((-1.0, 0, 0), (0, 1.0, 0), (0, 0, -1.0)))
    wanted = reference_settings(own, axis_order=order, spacing=(2.0, 1.0, 1.0))
    done = preprocess_case(coded(flipped, reference), None, wanted, None)
    assert done.reference is not None
    there = resample_grid(done.geometry.cropped, done.reference.shape[1:])
    assert there.spacing == pytest.approx((own,) * 3, rel=0.1)
    np.testing.assert_allclose(done.reference[0], place_code(world(there)), atol=0.02)


def test_what_lies_outside_of_the_reference_is_zero_after_normalisation() -> None:
    image = coded(THICK, replace(THIN, shape=(22, 60, 24), origin=(7.0, -2.0, -3.0)))
    image.references[0].array[0][:, 40:] = 1e6  # far above the image
    settings = reference_settings(normalization=(Normalization("none"), Normalization("zscore")))
    done = preprocess_case(image, None, settings, None)
    assert done.reference is not None
    there = world(resample_grid(done.geometry.cropped, done.reference.shape[1:]))[0]
    assert (done.reference[0][there < 6.5] == 0).all() and (done.reference[0][there > 6.5] != 0).mean() > 0.9
    # by what of it lies in the image, not by the whole file
    assert abs(float(done.reference[0][there > 6.5].mean())) < 0.3 and done.reference.std() > 0.5


def test_the_border_is_cut_by_the_image_alone_and_the_reference_covers_what_is_left() -> None:
    image = coded(THICK, THIN)
    image.array[:, :2] = 0
    image.array[:, :, :, 15:] = 0
    done = preprocess_case(image, None, reference_settings(), None)
    assert done.geometry.crop == ((2, 6), (0, 20), (0, 15)) and done.reference is not None
    assert done.reference.shape == (1, 16, 20, 15)
    there = resample_grid(done.geometry.cropped, (16, 20, 15))
    np.testing.assert_allclose(done.reference[0], place_code(world(there)), atol=0.01)


def test_settings_without_a_reference_keep_the_name_of_their_store() -> None:
    plain = PreprocessingSettings((1.0, 1.0, 1.0), (0, 1, 2), (Normalization("zscore"),))
    assert "reference" not in to_json(plain)
    assert "reference_scale" not in to_json(architecture())
    with_one = reference_settings()
    assert with_one.store_id != replace(with_one, reference=ReferenceGrid((1,), (2.0, 1.0, 1.0))).store_id
    assert from_json(PreprocessingSettings, json.loads(json.dumps(to_json(with_one))), where="x") == with_one


# ---- samples of training


def sample_configuration(
    *,
    source: str = "none",
    patch: tuple[int, int, int] = (8, 12, 12),
    scale: Vector = (1.0, 1.0, 1.0),
    finer: Vector = (2.0, 1.0, 1.0),
    slices: int = 1,
    view: int = 0,
) -> Configuration:
    """A configuration on voxels of 1 mm (`paired`: with labels `scale` times as fine), its reference `finer`."""
    flat = patch[0] == 1
    plain = tiny_configuration(patch_size=patch)
    network = replace(
        architecture(outputs=2, flat=flat),
        strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)),
        context="stack" if slices > 1 else "none",
        context_slices=slices,
        head="plain" if source == "none" else "subpixel",
        head_scale=scale,
        image_channels=int(source == "degraded"),
        reference_channels=1,
        reference_scale=finer,
    )
    label_scale = scale if source == "paired" else (1.0, 1.0, 1.0)
    store = PreprocessingSettings(
        (1.0, 1.0, 1.0), (0, 1, 2), AS_IT_IS, label_scale=label_scale, reference=ReferenceGrid((1,), (1.0, 1.0, 1.0))
    )
    return replace(
        plain,
        topology="3d" if not flat else "2d" if slices == 1 else "2.5d_stack",
        preprocessing=store,
        architecture=network,
        view_axis=view,
        sr_scale=scale,
        sr_source=source,
        acquisition=Acquisition("dirac"),
        training=TrainingSettings(steps=8, rotate_out_of_plane=source != "paired" and patch[0] > 1),
    )


def coded_store(folder: Path, *, scale: Vector, reference: tuple[int, int, int]) -> Store:
    """One case of 40 x 44 x 48 voxels that say where they are, with a reference of any shape over the same extent."""
    grid = Grid((40, 44, 48))
    done = preprocess_case(
        coded(grid, grid), None, reference_settings(spacing=(1.0, 1.0, 1.0), axis_order=(0, 1, 2)), None
    )
    fine = tuple(round(n * s) for n, s in zip(grid.shape, scale, strict=True))
    label = np.zeros((1, *fine), np.int16)
    arrays = {"image": done.image, "label": label, REFERENCE: place_code(world(resample_grid(grid, reference)))[None]}
    store = Store(folder)
    label_geometry = replace(done.geometry, network_shape=fine)
    store.write("case", arrays, done.geometry, {}, label_geometry=label_geometry)
    return store


def only_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn and mirror every patch, and leave intensities alone."""
    monkeypatch.setattr(augment, "SPATIAL_PROBABILITY", 1.0)
    monkeypatch.setattr(augment.Augmentation, "disturb", lambda self, image: image)
    monkeypatch.setattr(augment.Augmentation, "disturb_reference", lambda self, reference: reference)
    monkeypatch.setattr(augment, "_intensity", lambda configuration: augment.ComposeTransforms([]))


SAMPLES = {
    "3d": sample_configuration(),
    "2d": sample_configuration(patch=(1, 12, 16)),
    "2.5d": sample_configuration(patch=(1, 12, 12), slices=3, view=1),
    "degraded": sample_configuration(
        source="degraded", patch=(4, 12, 12), scale=(3.0, 1.0, 1.0), finer=(6.0, 1.0, 2.0)
    ),
    "degraded, 2.5 times": sample_configuration(source="degraded", patch=(5, 12, 12), scale=(2.5, 1.0, 1.0)),
    "any scale": replace(
        sample_configuration(source="degraded", patch=(4, 12, 12), scale=(3.0, 1.0, 1.0), finer=(6.0, 1.0, 2.0)),
        sr_range=(1.5, 3.0),
    ),
    "degraded stack": sample_configuration(source="degraded", patch=(1, 12, 12), scale=(1.0, 2.0, 1.0), slices=3),
    "paired": sample_configuration(source="paired", patch=(4, 12, 12), scale=(3.0, 1.0, 1.0), finer=(4.0, 0.7, 1.0)),
}


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("kind", SAMPLES)
def test_the_reference_of_a_sample_shows_the_same_places_as_its_image_however_it_was_turned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, augmented: bool
) -> None:
    configuration = SAMPLES[kind]
    only_space(monkeypatch)
    store = coded_store(tmp_path, scale=configuration.preprocessing.label_scale, reference=(53, 44, 96))
    samples = Samples(store, ["case"], configuration, tiny_plan().labels, seed=3, augment=augmented)
    halo = configuration.architecture.halo
    for step in range(6):
        middle = Patch("case", (14 + step, 15, 17), configuration.frames(training=True)[0])
        monkeypatch.setattr(samples.sampler, "draw", lambda *_, patch=middle, **__: patch)
        sample = samples[step, 0]
        assert sample.reference is not None
        image = sample.image[None, :, halo : sample.image.shape[1] - halo]
        expected = configuration.architecture.reference_shape(configuration.patch_size, samples.scale(step))
        assert sample.reference.shape == (1, *expected)
        where = OutputGrid(image.shape[2:], (1.0, 1.0, 1.0))
        there = resample(sample.reference[None], covering(sample.reference[None], image), where)
        # at the ends of the patch the reference may have no neighbour to interpolate with
        ends = slice(1, -1) if image.shape[2] > 2 else slice(None)
        apart = (there - image)[:, :, ends, 2:-2, 2:-2].abs()
        assert float(image.min()) > 500 and float(apart.max()) < 0.02, (step, samples.augmentation.motion)


# ---- prediction


def shows_the_reference(x: Tensor, grid: OutputGrid | None, reference: Tensor) -> list[Tensor]:
    """A network that answers with the reference, on the grid that is asked for."""
    asked = grid or OutputGrid(x.shape[2:], (1.0, 1.0, 1.0))
    return [resample(reference, covering(reference, x), asked)]


@pytest.mark.parametrize("mirrored", [(), (0, 1, 2)])
@pytest.mark.parametrize(
    ("shape", "scale", "start"),
    [
        ((44, 20, 31), (4.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
        ((50, 25, 34), (4.0, 1.0, 1.0), (-2.5, -3.0, -1.25)),
        ((30, 10, 40), (2.7, 0.5, 1.25), (-1.0, 0.0, -0.5)),
    ],
)
def test_every_tile_is_given_what_of_the_reference_lies_in_it(
    shape: tuple[int, int, int], scale: Vector, start: Vector, mirrored: tuple[int, ...]
) -> None:
    image = torch.randn(1, 11, 20, 31)
    grid = OutputGrid(shape, scale, start)
    # the reference says where its voxels lie, in voxels of the image
    z, y, x = (((first + torch.arange(float(n)) + 0.5) / s - 0.5) for n, s, first in grid.axes())
    reference = (100 + 3 * z[:, None, None] + 2 * y[:, None] - x)[None]
    answer = sliding_window_logits(
        shows_the_reference, image, patch_size=(4, 8, 8), reference=reference, reference_grid=grid, mirror_axes=mirrored
    )
    z, y, x = (torch.arange(float(n)) for n in image.shape[1:])
    apart = (answer[0] - (100 + 3 * z[:, None, None] + 2 * y[:, None] - x)).abs()
    # beyond the outermost centres of either nothing can be interpolated
    assert float(apart[1:-1, 2:-2, 2:-2].median()) < 0.1
    assert float(apart[2:-2, 3:-3, 3:-3].max()) < (1.5 if min(scale) < 1 else 0.3)


def test_a_constant_tile_is_not_taken_for_another_with_another_reference() -> None:
    reference = torch.arange(16.0)[None, :, None, None].expand(1, 16, 8, 8).contiguous()
    answer = sliding_window_logits(
        shows_the_reference, torch.zeros(1, 16, 8, 8), patch_size=(4, 8, 8), reference=reference, stretch=1.0
    )
    torch.testing.assert_close(answer, reference)


@pytest.mark.parametrize("source", ["none", "degraded", "paired"])
def test_a_held_out_case_comes_with_its_reference_where_it_lies(tmp_path: Path, source: str) -> None:
    scale = (1.0, 1.0, 1.0) if source == "none" else (3.0, 1.0, 1.0)
    configuration = sample_configuration(source=source, scale=scale, patch=(4, 12, 12))
    store = coded_store(tmp_path, scale=configuration.preprocessing.label_scale, reference=(53, 44, 96))
    held_out = held_out_case(store.entry("case"), configuration, tiny_plan().labels)
    assert held_out.reference is not None and held_out.reference.shape == (1, 53, 44, 96)
    answer = sliding_window_logits(
        shows_the_reference,
        torch.from_numpy(held_out.image),
        patch_size=(4, 12, 12),
        reference=torch.from_numpy(held_out.reference),
        reference_grid=held_out.reference_grid,
    )
    inside = answer[:, 1:-1, 2:-2, 2:-2].numpy()
    np.testing.assert_allclose(inside, held_out.image[:, 1:-1, 2:-2, 2:-2], atol=1.5)  # 40 slices hold 13 of 3 mm
    assert abs(float((inside - held_out.image[:, 1:-1, 2:-2, 2:-2]).mean())) < 0.05


# ---- the plan


def planned(root: Path, *configurations: str, asked: Asked | None = None) -> tuple[Plan, Fingerprint]:
    fingerprint = extract_fingerprint(RawDataset.load(root), workers=1)
    budget = Budget(4 * 10**8, 60.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sizer, "measure", memory_by_formula)
        plan = plan_experiment(fingerprint, budget, configurations=configurations or None, asked=asked, probe=False)
    return Plan.from_json(json.loads(json.dumps(to_json(plan))), where="plan.json"), fingerprint


def test_no_rule_but_its_own_looks_at_the_reference(tmp_path: Path) -> None:
    plan, fingerprint = planned(reference_dataset(tmp_path / "Dataset001_R", cases=2), "3d_fullres", "2d", "2.5d_stack")
    assert fingerprint.median_spacing == (4.0, 1.0, 1.0) and fingerprint.image_channels == ("FLAIR",)
    assert fingerprint.intensities[1].mean > fingerprint.intensities[0].mean + 50  # the ball is bright in T1 alone
    full = plan.configuration("3d_fullres")
    assert full.preprocessing.spacing == (4.0, 1.0, 1.0)
    assert full.preprocessing.reference == ReferenceGrid((1,), (1.0, 1.0, 1.0))
    assert full.architecture.input_channels == 1 and full.architecture.reference_channels == 1
    assert {c.name: c.architecture.reference_scale for c in plan.configurations} == dict.fromkeys(
        ("3d_fullres", "2d", "2.5d_stack"), (4.0, 1.0, 1.0)
    )
    (decision,) = (d for d in plan.decisions if d.name == "reference")
    assert "'T1'" in decision.because and "1x1x1 mm" in decision.because and "4x1x1 mm" in decision.because


def test_memory_and_disk_count_the_reference(tmp_path: Path) -> None:
    root = reference_dataset(tmp_path / "Dataset001_R", cases=2)
    plan, _ = planned(root, "3d_fullres")
    configuration = plan.configuration("3d_fullres")
    alone = replace(configuration.architecture, reference_channels=0)
    from autoseg.experiment_planning.memory import training_memory

    def needed(configuration: Configuration) -> int:
        return training_memory(configuration, plan.labels, batch_size=2).moving_bytes

    width, patch = configuration.architecture.features[0], configuration.patch_size
    features = 2 * width * np.prod(configuration.architecture.reference_shape(patch, (1.0, 1.0, 1.0))) * 2  # bf16
    assert needed(configuration) > needed(replace(configuration, architecture=alone)) + 2 * features
    assert plan.forecasts["3d_fullres"].disk_bytes > 2 * 0.7 * (4 + 2 + 4 * 4) * np.prod(THICK.shape) * 0.99


def test_thick_slices_in_use_beside_a_reference_that_stays_fine(tmp_path: Path) -> None:
    thin = Grid((24, 20, 18))
    root = reference_dataset(tmp_path / "Dataset001_R", cases=2, image=thin, channels=("MRI", "CT"))
    plan, _ = planned(root, asked=Asked(input_spacing=(4.0, 1.0, 1.0)))
    (sr,) = plan.configurations
    assert (sr.name, sr.sr_source, sr.sr_scale) == ("3d_sr", "degraded", (4.0, 1.0, 1.0))
    assert sr.preprocessing.spacing == (1.0, 1.0, 1.0) and sr.architecture.reference_scale == (4.0, 1.0, 1.0)
    assert sr.architecture.image_channels == 1
    assert sr.acquisition is not None and sr.acquisition.profile == "gauss"  # of the MRI, the CT is not degraded
    finer = reference_dataset(tmp_path / "Dataset002_R", cases=2, label=Grid((24, 20, 18)))
    paired = planned(finer)[0].configuration("3d_sr")
    assert paired.sr_source == "paired" and paired.architecture.reference_scale == (4.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("configurations", "asked", "sentence"),
    [
        (("3d_cascade",), None, "3d_cascade does not take a reference channel"),
        ((), Asked(output_spacing=(1.0, 1.0, 1.0)), "self-supervision alone, which does not take a reference"),
    ],
)
def test_what_cannot_have_a_reference_is_refused(
    tmp_path: Path, configurations: tuple[str, ...], asked: Asked | None, sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        planned(reference_dataset(tmp_path / "Dataset001_R", cases=2), *configurations, asked=asked)


def test_a_volume_too_big_for_a_patch_gets_no_cascade_beside_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sizer, "measure", memory_by_formula)
    alone = uniform_fingerprint(
        "Dataset001_R",
        shape=(300, 400, 400),
        spacing=(1.0, 1.0, 1.0),
        cases=20,
        labels=tiny_plan().labels,
        channels=("T2", "T1"),
    )
    cases = tuple(replace(case, reference_spacing=(0.5, 2.0, 1.0)) for case in alone.cases)
    beside = replace(alone, reference_channels=(1,), cases=cases)
    budget = Budget(4 * 10**9, 0.0)
    assert {"3d_lowres", "3d_cascade"} <= {c.name for c in plan_experiment(alone, budget, probe=False).configurations}
    plan = plan_experiment(beside, budget, probe=False)
    assert {"3d_fullres", "3d_sr"} <= {c.name for c in plan.configurations}
    assert not {"3d_lowres", "3d_cascade"} & {c.name for c in plan.configurations}
    (decision,) = (d for d in plan.decisions if d.name == "lowres")
    assert "does not take a reference channel" in decision.because
    sagittal = plan.configuration("2.5d_sagittal").architecture  # slices along x: the axes of its patches are x, z, y
    assert sagittal.reference_scale == (1.0, 2.0, 0.5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: replace(c, architecture=replace(c.architecture, reference_channels=2)),
            "reference_channels must be 1",
        ),
        (lambda c: replace(c, preprocessing=replace(c.preprocessing, reference=None)), "reference_channels must be 0"),
        (
            lambda c: replace(
                c, preprocessing=replace(c.preprocessing, reference=ReferenceGrid((5,), (1.0, 1.0, 1.0)))
            ),
            "must be numbers of channels",
        ),
        (
            lambda c: replace(c, architecture=replace(c.architecture, reference_scale=(0.0, 1.0, 1.0))),
            "must be positive",
        ),
    ],
)
def test_a_plan_whose_parts_disagree_about_the_reference_is_refused(
    change: Callable[[Configuration], Configuration], sentence: str
) -> None:
    sound = replace(tiny_plan(sample_configuration()), labels=tiny_plan().labels)
    only = replace(
        sound.configurations[0], architecture=replace(sound.configurations[0].architecture, output_channels=3)
    )
    check_plan(replace(sound, configurations=(only,)), where="plan.json")
    with pytest.raises(PlanError, match=sentence):
        check_plan(replace(sound, configurations=(change(only),)), where="plan.json")


# ---- from end to end


def small(plan: Plan) -> Plan:
    """The plan with narrow networks."""
    narrowed = [
        replace(c, architecture=replace(c.architecture, features=tuple(min(8, f) for f in c.architecture.features)))
        for c in plan.configurations
    ]
    return replace(plan, configurations=tuple(narrowed))


@pytest.mark.parametrize("label", [None, Grid((24, 20, 18))], ids=["thick labels", "thin labels"])
def test_a_structure_that_the_reference_alone_shows_is_learned_and_found_where_it_is(
    tmp_path: Path, label: Grid | None
) -> None:
    root = reference_dataset(tmp_path / "Dataset001_R", cases=6, label=label)
    name = "3d_sr" if label else "3d_fullres"
    plan = small(planned(root, name)[0])
    workspace: Workspace = preprocessed(root, plan, tmp_path / "workspace")
    train_fold(plan, name, "0", workspace=workspace, steps=60, device="cpu", workers=0)
    scores = validate_fold(
        RawDataset.load(root), plan, name, "0", workspace=workspace, device="cpu", mirroring=False, pictures=False
    )
    dice = [case["ball"]["dice"] for case in scores.cases.values()]
    assert min(dice) > (0.7 if label else 0.6), dice


@pytest.mark.parametrize("name", ["2d", "2.5d_stack", "2.5d_coronal", "2.5d_stack_sr", "2d_sr", "3d_sr_any"])
def test_every_topology_trains_and_predicts_beside_a_reference(tmp_path: Path, name: str) -> None:
    root = reference_dataset(tmp_path / "Dataset001_R", cases=3, image=Grid((24, 20, 18)))
    asked = Asked(input_spacing=(3.0, 1.0, 1.0)) if "sr" in name else None
    plan = small(planned(root, name, asked=asked)[0])
    workspace: Workspace = preprocessed(root, plan, tmp_path / "workspace")
    fold = train_fold(plan, name, "0", workspace=workspace, steps=2, device="cpu", workers=0)
    scores = validate_fold(RawDataset.load(root), plan, name, "0", workspace=workspace, device="cpu", pictures=False)
    assert not scores.failed
    model = load_model(fold.checkpoint.parent, "cpu")
    image = coded(replace(THICK, shape=(8, 20, 18), spacing=(3.0, 1.0, 1.0)) if asked else Grid((24, 20, 18)), THIN)
    assert model.predict(image).shape == (24, 20, 18)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset, and a fold trained on thick slices of it beside its reference; the fusion is opened by force."""
    folder = tmp_path_factory.mktemp("trained")
    root = reference_dataset(folder / "Dataset001_R", cases=3, image=Grid((24, 20, 18)))
    plan = small(planned(root, asked=Asked(input_spacing=(4.0, 1.0, 1.0)))[0])
    workspace: Workspace = preprocessed(root, plan, folder / "workspace")
    fold = train_fold(plan, "3d_sr", "0", workspace=workspace, steps=3, device="cpu", workers=0)
    checkpoint = Checkpoint.load(fold.checkpoint)
    for name, weights in checkpoint.weights.items():
        if name.startswith("fusion.last"):
            torch.nn.init.normal_(weights)
    checkpoint.save(fold.checkpoint)
    return root, fold.checkpoint.parent


def prediction_cases(folder: Path, root: Path) -> Path:
    """A sound case of thick slices, one without its reference, one whose reference lies elsewhere, one that differs."""
    thin = read_image(root / "imagesTr" / "case_0_0001.nii.gz")
    thick = Image(np.random.default_rng(1).normal(100, 10, (1, *THICK.shape)).astype(np.float32), THICK)
    references = {
        "sound": thin,
        "lacking": None,
        "elsewhere": replace(thin, grid=replace(thin.grid, origin=(90.0, 0.0, 0.0))),
        "other": thin.with_array(np.asarray(thin.array[:, ::-1])),
    }
    for name, reference in references.items():
        write_image(thick, folder / f"{name}_0000.nii.gz")
        if reference is not None:
            write_image(reference, folder / f"{name}_0001.nii.gz")
    return folder


def test_prediction_uses_the_reference_and_names_the_cases_that_lack_it(
    tmp_path: Path, trained: tuple[Path, Path]
) -> None:
    root, fold = trained
    model = load_model(fold, "cpu")
    outcome = predict_files(model, prediction_cases(tmp_path / "in", root), tmp_path / "out")
    assert outcome.done == ("other", "sound")
    assert "has the channels [0]" in outcome.failed["lacking"] and "_0001" in outcome.failed["lacking"]
    assert "elsewhere_0001.nii.gz" in outcome.failed["elsewhere"]
    assert "does not overlap the image" in outcome.failed["elsewhere"]
    sound = read_image(tmp_path / "out" / "sound.nii.gz")
    assert sound.grid.spacing == pytest.approx((1.0, 1.0, 1.0)) and sound.shape == (24, 20, 18)
    given = [tmp_path / "in" / f"sound_{number:04d}.nii.gz" for number in range(2)]
    first = model.predict_probabilities(given).array
    other = model.predict_probabilities([given[0], tmp_path / "in" / "other_0001.nii.gz"]).array
    assert float(np.abs(first - other).max()) > 0.01


def test_an_image_in_memory_brings_its_reference_along(trained: tuple[Path, Path]) -> None:
    model = load_model(trained[1], "cpu")
    image, reference = coded(THICK, THIN), shown(place_code, THIN)
    assert model.predict(image).shape == (24, 20, 18)
    with pytest.raises(PredictionError, match=r"0 reference channels .* expected 1 \(T1\)"):
        model.predict(Image(image.array, image.grid))
    far = replace(image, references=(replace(reference, grid=replace(THIN, origin=(0.0, 99.0, 0.0))),))
    with pytest.raises(PredictionError, match="'T1': the reference channel does not overlap the image"):
        model.predict(far)


def test_an_exported_model_says_which_channel_lies_on_a_grid_of_its_own(
    tmp_path: Path, trained: tuple[Path, Path]
) -> None:
    exported = export_model(Workspace(trained[1].parents[2]), "3d_sr", tmp_path / "model", folds=("0",))
    described = json.loads((exported / "dataset.json").read_text())
    assert described["channel_grids"] == {"1": "own"} and described["channel_names"]["1"] == "T1"
    assert load_model(exported, "cpu").predict(coded(THICK, THIN)).shape == (24, 20, 18)
