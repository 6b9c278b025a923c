"""A fold's held-out cases are predicted, scored and drawn; a cascade is given what its previous stage predicted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoseg.checkpoint import Checkpoint
from autoseg.dataset import RawDataset
from autoseg.demo import write_synthetic_dataset
from autoseg.errors import CheckpointError, PlanError, StorageError
from autoseg.files import write_json
from autoseg.geometry import refine_grid
from autoseg.image import Image, read_image, write_image
from autoseg.inference import crossval
from autoseg.inference.crossval import prepare_previous_stage, validate_fold
from autoseg.inference.predictor import load_model
from autoseg.metrics import score_images
from autoseg.networks import build_network
from autoseg.networks.upsampling import interpolate
from autoseg.plan import (
    Acquisition,
    Architecture,
    Budget,
    Configuration,
    Normalization,
    Plan,
    PreprocessingSettings,
    TrainingSettings,
)
from autoseg.preprocessing.degradation import degrade_entry
from autoseg.preprocessing.run import preprocess
from autoseg.preprocessing.store import Store
from autoseg.workspace import CHECKPOINT, Workspace


def configuration(dataset: RawDataset, name: str, *, spacing: float, previous: str | None = None) -> Configuration:
    classes = len(dataset.labels.names)
    return Configuration(
        name=name,
        topology="3d",
        preprocessing=PreprocessingSettings((3.0, spacing, spacing), (0, 1, 2), (Normalization("zscore"),)),
        median_shape=(6, 20, 20),
        patch_size=(4, 16, 16),
        batch_size=2,
        architecture=Architecture(
            input_channels=1 + (classes if previous else 0),
            output_channels=dataset.labels.output_channels,
            features=(4, 8),
            strides=((1, 1, 1), (1, 2, 2)),
            kernels=((1, 3, 3), (3, 3, 3)),
            encoder_convs=(1, 1),
            decoder_convs=(1,),
        ),
        training=TrainingSettings(steps=4, mirror_axes=(0, 1)),
        previous_stage=previous,
    )


class Project:
    """A dataset of four cases with its plan, store and folds, and untrained networks as models.

    `finer` splits the slices of the labels, which then lie on grids of their own; `changes` are made to 3d_fullres, and
    `architecture` to its network.
    """

    def __init__(
        self, root: Path, *, finer: int = 1, architecture: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        write_synthetic_dataset(root / "Dataset900_Demo", cases=4, test_cases=0, shape=(6, 22, 22))
        if finer > 1:
            _split_labels(root / "Dataset900_Demo", finer)
        self.dataset = RawDataset.load(root / "Dataset900_Demo")
        self.workspace = Workspace.of(self.dataset.root)
        self.plan = Plan(
            dataset=self.dataset.name,
            channels=self.dataset.channels,
            labels=self.dataset.labels,
            file_ending=self.dataset.file_ending,
            budget=Budget(2**30, 60.0),
            configurations=(
                _changed(configuration(self.dataset, "3d_fullres", spacing=1.1), architecture or {}, changes),
                configuration(self.dataset, "3d_lowres", spacing=2.0),
                configuration(self.dataset, "3d_cascade", spacing=1.1, previous="3d_lowres"),
            ),
            forecasts={},
            decisions=(),
            fingerprint="none",
        )
        preprocess(self.dataset, self.plan.stores(), self.workspace)
        self.cases = [case.identifier for case in self.dataset.cases]
        self.folds = [self.cases[:2], self.cases[2:]]
        split = [{"train": self.folds[1 - k], "val": held_out} for k, held_out in enumerate(self.folds)]
        write_json(self.workspace.folds, split)

    def train(self, name: str, fold: str, *, seed: int = 0) -> Path:
        """A checkpoint with random weights."""
        torch.manual_seed(seed)
        network = build_network(self.plan.configuration(name).architecture)
        folder = self.workspace.fold(name, fold)
        Checkpoint(self.plan, name, fold, network.state_dict()).save(folder / CHECKPOINT)
        return folder

    def validate(self, name: str, fold: str, **options):
        return validate_fold(self.dataset, self.plan, name, fold, workspace=self.workspace, device="cpu", **options)


def _changed(planned: Configuration, architecture: dict[str, Any], changes: dict[str, Any]) -> Configuration:
    return replace(planned, architecture=replace(planned.architecture, **architecture), **changes)


def _split_labels(root: Path, factor: int) -> None:
    for path in (root / "labelsTr").iterdir():
        label = read_image(path)
        thick = int(np.argmax(label.grid.spacing))
        factors = [factor if axis == thick else 1 for axis in range(3)]
        write_image(Image(label.array.repeat(factor, thick + 1), refine_grid(label.grid, factors)), path)
    content = json.loads((root / "dataset.json").read_text())
    write_json(root / "dataset.json", {**content, "label_grid": "own"})


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_held_out_cases_are_predicted_scored_and_drawn(project):
    folder = project.train("3d_fullres", "1") / "validation"
    seen = []
    evaluation = project.validate("3d_fullres", "1", progress=lambda *step: seen.append(step))
    assert sorted(evaluation.cases) == project.folds[1]
    assert seen == [(project.folds[1][0], 1, 2), (project.folds[1][1], 2, 2)]
    summary = json.loads((folder / "summary.json").read_text())
    assert sorted(summary["cases"]) == project.folds[1] and summary["note"] == ""
    for case in project.folds[1]:
        raw = next(c for c in project.dataset.cases if c.identifier == case)
        label, prediction = read_image(raw.label), read_image(folder / f"{case}.nii.gz")
        assert prediction.shape == label.shape
        np.testing.assert_allclose(prediction.grid.direction, label.grid.direction, atol=1e-6)
        assert set(np.unique(prediction.array)) <= {0, 1, 2, 3, 4}
    assert {path.name for path in (folder / "pictures").iterdir()} == {"best.png", "worst.png"}


def test_a_fold_counts_as_scored_only_when_its_pictures_are_there(project, monkeypatch):
    folder = project.train("3d_fullres", "1") / "validation"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crossval, "draw_predictions", killed)
        with pytest.raises(KeyboardInterrupt):
            project.validate("3d_fullres", "1")
    assert not (folder / "summary.json").exists()
    project.validate("3d_fullres", "1")
    assert (folder / "summary.json").exists() and list((folder / "pictures").iterdir())


def test_probabilities_are_kept_with_and_without_mirroring(project):
    folder = project.train("3d_fullres", "0")
    project.validate("3d_fullres", "0", pictures=False)
    case = project.folds[0][0]
    entry = Store(folder / "validation" / "probabilities").entry(case)
    preprocessed = Store(project.workspace.store(project.plan.configuration("3d_fullres").preprocessing)).entry(case)
    plain, mirrored = entry.read("plain"), entry.read("mirrored")
    assert plain.dtype == mirrored.dtype == np.float16
    assert plain.shape == mirrored.shape == (5, *preprocessed.shape)
    np.testing.assert_allclose(mirrored.astype(float).sum(axis=0), 1, atol=5e-3)
    assert np.abs(plain.astype(float) - mirrored.astype(float)).max() > 1e-3
    assert entry.geometry == preprocessed.geometry


def test_the_written_labels_are_those_of_the_model_on_the_raw_image(project):
    folder = project.train("3d_fullres", "0")
    project.validate("3d_fullres", "0", pictures=False)
    raw = project.dataset.cases[0]
    predicted = load_model(folder, "cpu").predict(raw.images[0])
    written = read_image(folder / "validation" / f"{raw.identifier}.nii.gz")
    assert (predicted.array == written.array).mean() > 0.999  # the store keeps what preprocessing made
    assert len(np.unique(written.array)) > 1


def test_a_second_run_predicts_nothing_and_a_new_checkpoint_everything(project):
    folder = project.train("3d_fullres", "0")
    first = project.validate("3d_fullres", "0", pictures=False)
    seen: list[str] = []
    again = project.validate("3d_fullres", "0", pictures=False, progress=lambda case, *_: seen.append(case))
    assert seen == [] and again == first
    (folder / "validation" / f"{project.folds[0][1]}.nii.gz").unlink()
    project.validate("3d_fullres", "0", pictures=False, progress=lambda case, *_: seen.append(case))
    assert seen == project.folds[0][1:]
    project.train("3d_fullres", "0", seed=1)
    seen.clear()
    project.validate("3d_fullres", "0", pictures=False, progress=lambda case, *_: seen.append(case))
    assert seen == project.folds[0]


def test_fold_all_says_that_its_scores_are_training_scores(project):
    folder = project.train("3d_fullres", "all")
    evaluation = project.validate("3d_fullres", "all", pictures=False)
    assert sorted(evaluation.cases) == project.cases
    assert "training scores" in json.loads((folder / "validation" / "summary.json").read_text())["note"]


def test_a_damaged_case_is_named_and_the_others_are_finished(project):
    project.train("3d_fullres", "0")
    store = project.workspace.store(project.plan.configuration("3d_fullres").preprocessing)
    broken, sound = project.folds[0]
    (store / f"{broken}.image.b2nd").write_bytes(b"broken")
    evaluation = project.validate("3d_fullres", "0", pictures=False)
    assert list(evaluation.cases) == [sound]
    assert broken in evaluation.failed[broken] and not evaluation.complete


def test_a_checkpoint_of_another_plan_is_refused(project):
    project.train("3d_fullres", "0")
    project.plan = replace(project.plan, fingerprint="another")
    with pytest.raises(CheckpointError, match="another plan"):
        project.validate("3d_fullres", "0")


@pytest.mark.parametrize("fold", ["7", "none"])
def test_an_untrained_or_unknown_fold_is_refused(project, fold):
    with pytest.raises(PlanError, match="not there"):
        project.validate("3d_fullres", fold)
    with pytest.raises(CheckpointError, match="train the fold first"):
        project.validate("3d_fullres", "0")


def test_cases_that_the_dataset_lacks_are_named(project):
    project.train("3d_fullres", "0")
    with pytest.raises(PlanError, match="stranger"):
        project.validate("3d_fullres", "0", cases=["stranger"])


def test_a_cascade_without_its_previous_stage_names_every_missing_fold(project):
    with pytest.raises(PlanError, match=r"fold 0 .*, 1 .*train-fold DATASET 3d_lowres 0`; `.* 3d_lowres 1`"):
        prepare_previous_stage(project.plan, "3d_cascade", workspace=project.workspace)
    project.train("3d_lowres", "0")
    project.validate("3d_lowres", "0", pictures=False)
    with pytest.raises(PlanError, match=r"fold 1 \(2 of 2 cases not predicted\)"):
        prepare_previous_stage(project.plan, "3d_cascade", workspace=project.workspace)


def test_configurations_without_a_previous_stage_need_nothing(project):
    assert prepare_previous_stage(project.plan, "3d_fullres", workspace=project.workspace) is None


def test_the_next_stage_is_given_held_out_labels_on_its_own_grid(project):
    _pretend_validated(project)
    folder = prepare_previous_stage(project.plan, "3d_cascade", workspace=project.workspace)
    assert folder is not None
    given = Store(folder)
    images = Store(project.workspace.store(project.plan.configuration("3d_cascade").preprocessing))
    assert given.cases() == tuple(project.cases)
    for case in project.cases:
        entry = given.entry(case)
        label = images.entry(case).read("label")
        assert entry.read("label").shape == label.shape
        np.testing.assert_array_equal(entry.read("label"), label)  # the references served as predictions


def test_only_changed_predictions_are_brought_anew(project):
    _pretend_validated(project)
    done: list[tuple[int, int]] = []

    def run() -> None:
        done.clear()
        prepare_previous_stage(
            project.plan, "3d_cascade", workspace=project.workspace, progress=lambda *step: done.append(step)
        )

    run()
    assert len(done) == 4
    run()
    assert done == []
    path = project.workspace.fold("3d_lowres", "0") / "validation" / f"{project.cases[0]}.nii.gz"
    prediction = read_image(path)
    write_image(Image(np.zeros_like(prediction.array), prediction.grid), path)
    run()
    assert done == [(1, 1)]


def test_a_prediction_of_another_shape_is_refused(project):
    _pretend_validated(project)
    path = project.workspace.fold("3d_lowres", "0") / "validation" / f"{project.cases[0]}.nii.gz"
    prediction = read_image(path)
    cut = prediction.array[:, 1:]
    write_image(Image(cut, replace(prediction.grid, shape=cut.shape[1:])), path)
    with pytest.raises(StorageError, match=project.cases[0]):
        prepare_previous_stage(project.plan, "3d_cascade", workspace=project.workspace)


def test_cases_that_no_fold_holds_out_are_named(project):
    _pretend_validated(project)
    write_json(project.workspace.folds, [{"train": project.folds[1], "val": project.folds[0]}])
    with pytest.raises(PlanError, match=project.cases[3]):
        prepare_previous_stage(project.plan, "3d_cascade", workspace=project.workspace)


def test_a_cascade_is_validated_with_its_previous_stage(project, monkeypatch):
    _pretend_validated(project)
    project.train("3d_cascade", "0")
    given = []
    predict = crossval.predict_network_grid

    def watch(model, image, **options):
        given.append(np.asarray(image))
        return predict(model, image, **options)

    monkeypatch.setattr(crossval, "predict_network_grid", watch)
    project.validate("3d_cascade", "0", pictures=False)
    store = Store(project.workspace.store(project.plan.configuration("3d_cascade").preprocessing))
    label = store.entry(project.folds[0][0]).read("label")[0]
    assert given[0].shape == (5, *label.shape)
    for channel, value in enumerate((1, 2, 3, 4), start=1):
        np.testing.assert_array_equal(given[0][channel] > 0, label == value)


def _pretend_validated(project: Project) -> None:
    """Both folds of the low-resolution stage, with the references as their perfect predictions."""
    for fold, held_out in enumerate(project.folds):
        folder = project.train("3d_lowres", str(fold))
        for case in project.dataset.cases:
            if case.identifier in held_out:
                write_image(read_image(case.label), folder / "validation" / f"{case.identifier}.nii.gz")


# ---- super-resolution

HEAD = {"head": "subpixel", "head_scale": (2.5, 1.0, 1.0), "image_channels": 1}
DEGRADED = {"sr_source": "degraded", "sr_scale": (2.5, 1.0, 1.0), "acquisition": Acquisition()}


def test_thick_slices_are_made_of_stored_fine_images_and_the_answer_is_scored_on_all_fine_voxels(tmp_path):
    project = Project(tmp_path, architecture=HEAD, **DEGRADED)
    validation = project.train("3d_fullres", "0") / "validation"
    evaluation = project.validate("3d_fullres", "0")
    assert sorted(evaluation.cases) == project.folds[0] and evaluation.complete
    planned = project.plan.configuration("3d_fullres")
    store = Store(project.workspace.store(planned.preprocessing))
    for case in project.folds[0]:
        entry = store.entry(case)
        kept = Store(validation / "probabilities").entry(case)
        assert kept.read("plain").shape == (5, *entry.shape) and kept.geometry == entry.geometry
        label = read_image(next(c.label for c in project.dataset.cases if c.identifier == case))
        assert read_image(validation / f"{case}.nii.gz").shape == label.shape
        # an untrained head is linear interpolation of what the forward model made
        degraded = degrade_entry(entry, planned)
        assert degraded.image.shape[1] == int(entry.shape[0] / 2.5)
        fine = interpolate(torch.from_numpy(degraded.image)[None], degraded.grid)[0, 0].numpy()
        expected = score_images((entry.read("image")[0] - degraded.moments.mean[0]) / degraded.moments.std[0], fine)
        assert evaluation.images[case] == pytest.approx(expected, rel=1e-3)
    summary = json.loads((validation / "summary.json").read_text())
    assert sorted(summary["images"]["cases"]) == project.folds[0] and "PSNR" in evaluation.table()
    assert {path.name for path in (validation / "pictures").iterdir()} == {"best.png", "worst.png"}


def test_scores_of_images_are_remembered_with_the_predictions(tmp_path):
    project = Project(tmp_path, architecture=HEAD, **DEGRADED)
    project.train("3d_fullres", "0")
    first = project.validate("3d_fullres", "0", pictures=False)
    seen: list[str] = []
    again = project.validate("3d_fullres", "0", pictures=False, progress=lambda case, *_: seen.append(case))
    assert seen == [] and again == first and all(math.isfinite(s["ssim"]) for s in again.images.values())


def test_a_model_of_images_alone_is_scored_by_its_images(tmp_path):
    project = Project(tmp_path, architecture={**HEAD, "output_channels": 0}, **DEGRADED)
    folder = project.train("3d_fullres", "0")
    evaluation = project.validate("3d_fullres", "0")
    assert sorted(evaluation.images) == project.folds[0] and not evaluation.cases and not evaluation.problems()
    assert not (folder / "validation" / f"{project.folds[0][0]}.nii.gz").exists()
    seen: list[str] = []
    project.validate("3d_fullres", "0", progress=lambda case, *_: seen.append(case))
    assert seen == []


def test_an_answer_on_the_labels_finer_grid_is_scored_there(tmp_path):
    preprocessing = PreprocessingSettings(
        (3.0, 1.1, 1.1), (0, 1, 2), (Normalization("zscore"),), label_scale=(2.0, 1.0, 1.0)
    )
    head = {**HEAD, "head_scale": (2.0, 1.0, 1.0)}
    project = Project(
        tmp_path, finer=2, architecture=head, preprocessing=preprocessing, sr_source="paired", sr_scale=(2.0, 1.0, 1.0)
    )
    folder = project.train("3d_fullres", "0")
    evaluation = project.validate("3d_fullres", "0")
    assert sorted(evaluation.cases) == project.folds[0] and evaluation.complete
    assert not evaluation.images, "the fine image is not known"
    raw = project.dataset.cases[0]
    label, written = read_image(raw.label), read_image(folder / "validation" / f"{raw.identifier}.nii.gz")
    image = read_image(raw.images[0])
    assert written.shape == label.shape and math.prod(label.shape) == 2 * math.prod(image.shape)
    entry = Store(project.workspace.store(preprocessing)).entry(raw.identifier)
    kept = Store(folder / "validation" / "probabilities").entry(raw.identifier)
    assert kept.read("plain").shape[1:] == entry.label_shape == (2 * entry.shape[0], *entry.shape[1:])
    predicted = load_model(folder, "cpu").predict(raw.images[0])
    assert predicted.shape == written.shape and (predicted.array == written.array).mean() > 0.99


def test_a_plain_model_is_scored_on_the_labels_finer_grid_too(tmp_path):
    project = Project(tmp_path, finer=2)
    folder = project.train("3d_fullres", "0")
    evaluation = project.validate("3d_fullres", "0")
    assert sorted(evaluation.cases) == project.folds[0] and evaluation.complete
    raw = project.dataset.cases[0]
    assert read_image(folder / "validation" / f"{raw.identifier}.nii.gz").shape == read_image(raw.label).shape


def test_a_self_supervised_answer_is_brought_back_to_the_thick_slices_that_are_labelled(tmp_path):
    flat = {
        "kernels": ((1, 3, 3), (1, 3, 3)), "head": "subpixel", "head_scale": (1.0, 3.0, 1.0), "image_channels": 1,
    }  # fmt: skip
    project = Project(
        tmp_path, architecture=flat, topology="2d", patch_size=(1, 16, 16), sr_source="self",
        sr_scale=(1.0, 3.0, 1.0), acquisition=Acquisition(),
    )  # fmt: skip
    folder = project.train("3d_fullres", "0")
    evaluation = project.validate("3d_fullres", "0", pictures=False)
    assert sorted(evaluation.cases) == project.folds[0] and evaluation.complete and not evaluation.images
    raw = project.dataset.cases[0]
    model = load_model(folder, "cpu")
    image = read_image(raw.images[0])
    assert math.prod(model.predict(raw.images[0]).shape) == 3 * math.prod(image.shape)
    native = model.predict(raw.images[0], native=True)
    written = read_image(folder / "validation" / f"{raw.identifier}.nii.gz")
    assert written.shape == native.shape == image.shape and (native.array == written.array).mean() > 0.999
