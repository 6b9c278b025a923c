"""Images without labels: what may stand in the dataset, what is planned and trained, what comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import memory_by_formula
from small_models import fine_threshold_model
from tiny_training import sr_configuration
from typer.testing import CliRunner, Result

from autoseg.cli import app
from autoseg.dataset import RawDataset, list_cases
from autoseg.errors import DatasetError, PlanError, PredictionError
from autoseg.experiment_planning.fingerprint import Fingerprint, extract_fingerprint, uniform_fingerprint
from autoseg.experiment_planning.planner import plan_experiment
from autoseg.experiment_planning.sizing import Sizer
from autoseg.experiment_planning.superresolution import Asked
from autoseg.experiment_planning.verify import fix_dataset, verify_dataset
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.inference.export import export_labels
from autoseg.inference.grids import bring_logits
from autoseg.inference.held_out import held_out_case
from autoseg.inference.image_selection import select_by_image
from autoseg.inference.predictor import load_model
from autoseg.inference.run import PredictOptions, find_tasks, predict_files
from autoseg.labels import Labels
from autoseg.plan import Budget, Plan
from autoseg.preprocessing.case import preprocess_case
from autoseg.preprocessing.degradation import fine_cases
from autoseg.preprocessing.store import Store
from autoseg.workspace import Workspace

NOTHING, TWO = Labels((), ()), Labels.from_json({"background": 0, "anterior": 1, "posterior": 2})
GB = 10**9
Make = Callable[..., Path]


@pytest.fixture
def images_alone(tiny_dataset: Make) -> Make:
    """A factory like `tiny_dataset`, without labels."""

    def make(**options: Any) -> Path:
        root = tiny_dataset(**options)
        shutil.rmtree(root / "labelsTr")
        describe(root, labels={})
        return root

    return make


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory by a formula and not by a step on fake tensors, which takes a second."""
    monkeypatch.setattr(Sizer, "measure", memory_by_formula)


def describe(root: Path, **changes: Any) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def autoseg(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    """Output of a command that must succeed."""
    result = autoseg(*words)
    assert result.exit_code == 0, result.output
    return result.output


def fingerprint(spacing=(1.0, 1.0, 1.0), shape=(36, 50, 35)) -> Fingerprint:
    return uniform_fingerprint("Dataset001_Any", shape=shape, spacing=spacing, cases=20, labels=NOTHING)


def planned(found: Fingerprint, **options: Any) -> Plan:
    return plan_experiment(found, Budget(GB, 0.0, "auto"), probe=False, **options)


# --- the dataset


@pytest.mark.parametrize("labels", [{}, {"background": 0}])
def test_a_dataset_that_names_no_structure_has_images_alone(images_alone: Make, labels: dict[str, int]) -> None:
    root = images_alone(cases=2)
    describe(root, labels=labels)
    dataset = RawDataset.load(root)
    assert dataset.labels == NOTHING
    assert [case.label for case in dataset.cases] == [None, None]
    assert verify_dataset(root, workers=1).problems == ()


def test_explicit_lists_need_no_label(images_alone: Make) -> None:
    root = images_alone(cases=2)
    describe(root, dataset={"p": {"images": ["imagesTr/case_00_0000.nii.gz"]}}, numTraining=1)
    (case,) = RawDataset.load(root).cases
    assert (case.identifier, case.label) == ("p", None)
    entry = {"images": ["imagesTr/case_00_0000.nii.gz"], "label": "labelsTr/case_00.nii.gz"}
    describe(root, dataset={"p": entry})
    with pytest.raises(DatasetError, match='case p has a label, but "labels" names no structure'):
        list_cases(root)


def test_labels_of_which_nobody_says_what_they_mean_are_refused(tiny_dataset: Make) -> None:
    root = tiny_dataset(cases=2)
    describe(root, labels={})
    with pytest.raises(DatasetError, match=r'"labels" names no structure, but labelsTr holds case_00.nii.gz \(1 of 2'):
        list_cases(root)


def test_labels_that_are_named_but_not_there_are_missed_in_one_sentence(tiny_dataset: Make) -> None:
    root = tiny_dataset(cases=2)
    shutil.rmtree(root / "labelsTr")
    with pytest.raises(DatasetError, match=r'labelsTr: there is no such folder.*"labels": \{\}') as caught:
        list_cases(root)
    assert "\n" not in str(caught.value)


def test_the_repaired_copy_has_no_folder_of_labels_either(images_alone: Make, tmp_path: Path) -> None:
    root = images_alone(cases=2)
    describe(root, numTraining=7)
    fix_dataset(root, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["dataset.json", "imagesTr"]
    assert len(RawDataset.load(tmp_path / "copy").cases) == 2


def test_intensities_are_those_above_the_lowest_value(images_alone: Make) -> None:
    root = images_alone(cases=2, channels=("CT",))
    for path in (root / "imagesTr").iterdir():
        image = read_image(path)
        padded = np.where(image.array > 120, image.array, -1000).astype(np.int16)
        write_image(Image(padded, image.grid), path)
    found = extract_fingerprint(RawDataset.load(root), workers=1)
    assert found.classes == () and found.intensities[0].percentile_00_5 > 120
    (case, *_) = found.cases
    assert case.class_voxels == () and case.label_scale == (1.0, 1.0, 1.0)
    (why,) = [d for d in planned(found, asked=Asked(scale=(2.0,))).decisions if d.name == "intensities"]
    assert "above each image's lowest value" in why.because


def test_images_of_one_value_have_nothing_to_learn(images_alone: Make) -> None:
    root = images_alone(cases=2)
    for path in (root / "imagesTr").iterdir():
        image = read_image(path)
        write_image(Image(np.full_like(image.array, 7), image.grid), path)
    with pytest.raises(DatasetError, match="every image has the same value everywhere"):
        extract_fingerprint(RawDataset.load(root), workers=1)
    (error,) = verify_dataset(root, workers=1).errors
    assert error.sentence.startswith("Every image has the same value everywhere")


# --- the plan


def test_only_super_resolution_of_images_is_planned() -> None:
    plan = planned(fingerprint(), asked=Asked(input_spacing=(4.0, 1.0, 1.0)))
    (c,) = plan.configurations
    assert c.name == "3d_sr" and c.sr_source == "degraded"
    assert (c.architecture.output_channels, c.architecture.image_channels) == (0, 1)
    reasons = {d.name: d.because for d in plan.decisions}
    assert "no labels" in reasons["configurations"] and "no labels" in reasons["3d_sr.answers"]


def test_a_plan_without_labels_survives_its_file(tmp_path: Path) -> None:
    plan = planned(fingerprint(), asked=Asked(scale=(2.0,)), configurations=["3d_sr", "2d_sr", "3d_sr_any"])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    c = plan.configurations[0]
    edited = replace(plan, configurations=(replace(c, architecture=replace(c.architecture, output_channels=1)),))
    edited.save(tmp_path / "edited.json")
    with pytest.raises(PlanError, match="without labels needs output_channels of 0 and image_channels above 0, got 1"):
        Plan.load(tmp_path / "edited.json")


def test_thick_slices_alone_learn_in_the_plane_without_being_asked() -> None:
    def measured(scale: object) -> float:
        raise AssertionError("there are no labels to measure")

    plan = planned(fingerprint((4.0, 1.0, 1.0), (12, 60, 60)), ceiling=measured)
    (c,) = plan.configurations
    assert (c.name, c.sr_source, c.architecture.output_channels) == ("2d_sr", "self", 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "has no labels, so only super-resolution can be planned.*give --input-spacing"),
        ({"asked": Asked(task="super_resolution")}, "nothing asks for it"),
        ({"asked": Asked(scale=(1.2,))}, "below 1.3 resampling loses nothing"),
        ({"configurations": ["3d_sr"]}, "nothing asks for it"),
        ({"configurations": ["3d_fullres"]}, "3d_fullres answers with labels alone, and Dataset001_Any has none"),
        ({"asked": Asked(scale=(2.0,), task="segmentation")}, "--task segmentation needs labels"),
    ],
)
def test_what_needs_labels_is_refused_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence) as caught:
        planned(fingerprint(), **options)
    assert "\n" not in str(caught.value)


# --- from the dataset to the image


def test_thin_images_train_a_network_that_refines_thick_ones(images_alone: Make, tmp_path: Path) -> None:
    root, place = images_alone(cases=4, shape=(16, 16, 14), spacing=(1.0, 1.0, 1.0)), tmp_path / "ws"
    asked = ("--input-spacing", "2,1,1", "--gpu-memory", "1GB", "--workspace", place, "--workers", 0)
    assert "3d_sr" in done("plan-and-preprocess", root, *asked)
    assert "labels" in done("explain", root, "--workspace", place)
    said = done("train-fold", root, "3d_sr", 0, "--steps", 3, "--workspace", place, "--device", "cpu")
    assert "PSNR" in said and "Dice" not in said
    workspace = Workspace.of(root, place)
    summary = json.loads((workspace.fold("3d_sr", "0") / "validation" / "summary.json").read_text())
    assert summary["cases"] == {} and summary["by_class"] == {}
    (scores,) = summary["images"]["cases"].values()
    assert 0 < scores["psnr"] < 100 and -1 < scores["ssim"] <= 1

    thick = Image(
        np.random.default_rng(0).normal(100, 20, (1, 8, 16, 14)).astype(np.float32), Grid((8, 16, 14), (2, 1, 1))
    )
    write_image(thick, tmp_path / "thick.nii.gz")
    done("predict", tmp_path / "thick.nii.gz", tmp_path / "out", "--model", workspace.fold("3d_sr", "0"))
    (written,) = (tmp_path / "out").iterdir()
    fine = read_image(written)
    assert fine.grid.shape == (16, 16, 14) and fine.grid.spacing == (1.0, 1.0, 1.0)
    assert 50 < fine.array.mean() < 150, "in the units of the image"

    page = Path(done("report", root, "--workspace", place).strip()).read_text(encoding="utf-8")
    assert "Super-resolved images" in page and "PSNR [dB]" in page
    done("export", root, tmp_path / "model.zip", "--workspace", place)
    assert not load_model(tmp_path / "model.zip", "cpu").predicts_labels


def test_a_run_on_thick_slices_ends_with_the_only_model_there_is(images_alone: Make, tmp_path: Path) -> None:
    root, place = images_alone(cases=2, shape=(6, 24, 24), spacing=(3.0, 1.0, 1.0)), tmp_path / "ws"
    said = done("run", root, "--steps", 2, "--gpu-memory", "1GB", "--workspace", place, "--workers", 0)
    assert "2d_sr" in said and "no fine image is known" in said
    model = load_model(Workspace.of(root, place).root / "model.zip", "cpu")
    image = read_image(root / "imagesTr" / "case_00_0000.nii.gz")
    assert model.predict_image(image).grid.spacing == (1.0, 1.0, 1.0)


def test_the_highest_mean_psnr_chooses(tmp_path: Path) -> None:
    plan = planned(fingerprint(), asked=Asked(scale=(2.0,)), configurations=["3d_sr", "2d_sr"])
    place = Workspace(tmp_path)
    place.folds.write_text(json.dumps([{"train": ["b"], "val": ["a"]}, {"train": ["a"], "val": ["b"]}]))

    def scored(name: str, fold: int, case: str, psnr: float) -> None:
        path = place.fold(name, str(fold)) / "validation" / "summary.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"images": {"cases": {case: {"psnr": psnr, "ssim": 0.5}}}}))

    scored("3d_sr", 0, "a", 30.0)
    scored("3d_sr", 1, "b", 34.0)
    with pytest.raises(PlanError, match="no held-out image is scored for all of 3d_sr, 2d_sr"):
        select_by_image(plan, ["3d_sr", "2d_sr"], workspace=place)
    scored("2d_sr", 0, "a", 33.0)
    scored("2d_sr", 1, "b", 32.0)
    chosen = select_by_image(plan, ["3d_sr", "2d_sr"], workspace=place)
    assert [member.configuration for member in chosen.chosen.members] == ["2d_sr"] and chosen.cases == 2
    assert "3d_sr 32.00 dB, 2d_sr 32.50 dB" in chosen.decisions[0].because


def test_labels_cannot_be_evaluated_where_none_are_named(images_alone: Make) -> None:
    root = images_alone(cases=2)
    result = autoseg("evaluate", root / "imagesTr", root / "imagesTr")
    assert result.exit_code == 2 and "names no structure to score" in result.stderr


# --- thin and thick images together


def test_thick_cases_are_scored_and_not_trained_on(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0), segments=False, labels=NOTHING, patch_size=(6, 12, 12))
    store, random = Store(tmp_path), np.random.default_rng(0)
    acquired = {}
    for name, spacing in (("thin", 2.0), ("less_thin", 2.5), ("thick", 8.0)):
        slices = round(48 / spacing)
        acquired[name] = random.uniform(1, 2, slices)
        array = np.broadcast_to(acquired[name][:, None, None], (1, slices, 12, 12))
        image = Image(array, Grid((slices, 12, 12), (spacing, 1.0, 1.0)))
        case = preprocess_case(image, None, configuration.preprocessing, None)
        store.write(name, {"image": case.image}, case.geometry, {})
    assert fine_cases(store, ["less_thin", "thick", "thin"], configuration) == ["less_thin", "thin"]
    with pytest.raises(PlanError, match=r"each of the 1 cases to train on \(thick\) was acquired more than 1.3 times"):
        fine_cases(store, ["thick"], configuration)

    held_out = {name: held_out_case(store.entry(name), configuration, NOTHING) for name in ("thin", "thick")}
    assert held_out["thin"].truth is not None and held_out["thick"].truth is None
    slices = acquired["thick"]
    expected = (slices - slices.mean()) / slices.std()
    np.testing.assert_allclose(held_out["thick"].image[0, :, 6, 6], expected, atol=0.12)  # not made thick once more


def test_a_fine_answer_about_a_thick_case_is_scored_on_its_own_slices(tmp_path: Path) -> None:
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0), patch_size=(6, 12, 12))
    store, thin, thick = Store(tmp_path), Grid((24, 12, 12), (2.0, 1.0, 1.0)), Grid((6, 12, 12), (8.0, 1.0, 1.0))
    for name, grid in (("thin", thin), ("thick", thick)):
        image = Image(np.random.default_rng(0).uniform(1, 2, (1, *grid.shape)), grid)
        case = preprocess_case(image, image.with_array(np.ones(grid.shape, np.uint8)), configuration.preprocessing, TWO)
        assert case.label is not None
        store.write(name, {"image": case.image, "label": case.label}, case.geometry, {})
    held_out = {name: held_out_case(store.entry(name), configuration, TWO) for name in ("thin", "thick")}
    assert held_out["thin"].scored == held_out["thin"].answered
    one = held_out["thick"]
    probability = torch.tensor([0.9, 0.4, 0.4, 0.9] * 6)  # of the structure; the mean over each thick slice is 0.65
    answer = torch.stack((1 - probability, probability, torch.full((24,), 1e-3))).log()
    logits = answer[:, :, None, None].expand(-1, -1, 12, 12)
    labels = export_labels(bring_logits(logits, one.answered, one.scored, regions=False), one.scored, TWO)
    assert labels.grid == thick and labels.array.all()  # the two thin slices in the middle say no


def test_the_plan_says_how_many_cases_are_too_thick_to_train_on() -> None:
    thin = fingerprint().cases
    thick = tuple(replace(case, identifier=f"thick_{i}", spacing=(4.0, 1.0, 1.0)) for i, case in enumerate(thin))
    found = replace(fingerprint(), cases=(*thin, *thick[:19]))
    (why,) = [d for d in planned(found, asked=Asked(scale=(3.0,))).decisions if d.name == "3d_sr.training_cases"]
    assert why.value == 20 and "19 of 39 cases" in why.because
    even = planned(fingerprint(), asked=Asked(scale=(3.0,)))
    assert not [d for d in even.decisions if d.name == "3d_sr.training_cases"]


def test_a_run_takes_the_grids_that_thin_images_need(images_alone: Make, tmp_path: Path) -> None:
    root = images_alone(cases=2, shape=(16, 16, 14), spacing=(1.0, 1.0, 1.0))
    asked = ("--steps", 2, "--gpu-memory", "1GB", "--workspace", tmp_path / "ws", "--workers", 0)
    refused = autoseg("run", root, *asked)
    assert refused.exit_code == 2 and "give --input-spacing, --output-spacing or --sr-scale" in refused.stderr
    said = done("run", root, "--sr-scale", 2, *asked)
    assert "3d_sr: of the mean PSNR over 2 held-out cases" in said


def test_the_answer_about_pictures_is_no_picture(tmp_path: Path) -> None:
    model = fine_threshold_model(labels=False)
    pictures = replace(model, plan=replace(model.plan, file_ending=".png"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    (task,) = find_tasks(tmp_path / "in", tmp_path / "out", model=pictures)
    assert task.output == tmp_path / "out" / "a.nii.gz"
    with pytest.raises(PredictionError, match="a.png: the super-resolved image has fractions"):
        find_tasks(tmp_path / "in" / "a.png", tmp_path / "a.png", model=pictures)


def test_a_spacing_that_cannot_be_is_refused_once_and_for_all_cases(tmp_path: Path) -> None:
    model = fine_threshold_model(labels=False, sr_range=(1.5, 6.0))
    for name in "ab":
        (tmp_path / f"{name}.nii.gz").touch()
    with pytest.raises(PredictionError, match=r"three positive numbers \(z, y, x\), got 1, -1, 1 mm"):
        predict_files(model, tmp_path, tmp_path / "out", options=PredictOptions(output_spacing=(1.0, -1.0, 1.0)))
    assert not (tmp_path / "out").exists()
