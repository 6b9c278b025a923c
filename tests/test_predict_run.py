"""Predicting files: names of cases, bad cases, existing output, shares, and nothing half written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_models import fine_threshold_model, threshold_model

from autoseg.errors import PredictionError, StorageError
from autoseg.image import Grid, Image, read_image, write_image
from autoseg.inference import run
from autoseg.inference.run import PredictOptions, image_file, predict_files, probability_files


def write_scan(path: Path, seed: int = 0) -> Image:
    array = np.random.default_rng(seed).normal(size=(1, 6, 12, 10)).astype(np.float32)
    image = Image(array, Grid((6, 12, 10), (2.0, 1.0, 1.0), (1.0, 2.0, 3.0)))
    write_image(image, path)
    return image


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_is_predicted_case_by_case(tmp_path, workers):
    for seed, name in enumerate(("b_0000", "a_0000", "c")):
        write_scan(tmp_path / "in" / f"{name}.nii.gz", seed)
    model, finished = threshold_model(), []
    outcome = predict_files(
        model,
        tmp_path / "in",
        tmp_path / "out",
        options=PredictOptions(workers=workers),
        progress=lambda *state: finished.append(state),
    )
    assert outcome.done == ("a", "b", "c") and not outcome.failed and not outcome.skipped
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert finished == [("a", 1, 3), ("b", 2, 3), ("c", 3, 3)]
    written = read_image(tmp_path / "out" / "b.nii.gz")
    assert np.array_equal(written.array, model.predict(tmp_path / "in" / "b_0000.nii.gz").array)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", ["a", "b", "c"])
def test_a_bad_case_never_costs_the_others(tmp_path, workers, bad):
    for name in "abc":
        write_scan(tmp_path / "in" / f"{name}_0000.nii.gz")
    damaged = tmp_path / "in" / f"{bad}_0000.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:300])
    outcome = predict_files(
        threshold_model(), tmp_path / "in", tmp_path / "out", options=PredictOptions(workers=workers)
    )
    assert set(outcome.done) == set("abc") - {bad}
    assert list(outcome.failed) == [bad] and outcome.failed[bad].startswith(f"Case {bad}: ")
    assert str(damaged) in outcome.failed[bad]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.nii.gz" for name in set("abc") - {bad}
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_nobody_foresaw_costs_one_case(tmp_path, workers):
    for name in "abc":
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    model = threshold_model()
    calls = []

    class Failing(type(model.networks[0])):
        def forward(self, x):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory\nwith a long story")
            return super().forward(x)

    outcome = predict_files(
        replace(model, networks=(Failing(),)),
        tmp_path / "in",
        tmp_path / "out",
        options=PredictOptions(workers=workers, mirroring=False),
    )
    assert outcome.done == ("a", "c") and "out of memory" in outcome.failed["b"] and "long" not in outcome.failed["b"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_cannot_be_written_leaves_nothing_half_done(tmp_path, workers, monkeypatch):
    for name in "ab":
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    original = run.write_image

    def full_disk(image, path):
        if path.name.startswith("a"):
            raise StorageError(f"{path}: the disk is full; free some space.")
        original(image, path)

    monkeypatch.setattr(run, "write_image", full_disk)
    outcome = predict_files(
        threshold_model(), tmp_path / "in", tmp_path / "out", options=PredictOptions(workers=workers)
    )
    assert outcome.done == ("b",) and "disk is full" in outcome.failed["a"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


def test_one_file_goes_to_a_file_or_a_folder(tmp_path):
    write_scan(tmp_path / "scan_0000.nii.gz")
    model = threshold_model()
    predict_files(model, tmp_path / "scan_0000.nii.gz", tmp_path / "labels.mha")
    predict_files(model, tmp_path / "scan_0000.nii.gz", tmp_path / "out")
    assert np.array_equal(read_image(tmp_path / "labels.mha").array, read_image(tmp_path / "out" / "scan.nii.gz").array)


def test_channels_are_found_by_number_and_missing_ones_are_named(tmp_path):
    model = threshold_model(channels=("T1", "T2"))
    for name in ("a_0000", "a_0001", "b_0000", "c_0000", "c_0001", "c_0002"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    outcome = predict_files(model, tmp_path / "in", tmp_path / "out")
    assert outcome.done == ("a",) and set(outcome.failed) == {"b", "c"}
    assert "[0]" in outcome.failed["b"] and "b_0001" in outcome.failed["b"]
    outcome = predict_files(model, tmp_path / "in" / "a_0000.nii.gz", tmp_path / "one.nii.gz")
    assert outcome.done == ("a",)
    assert predict_files(model, tmp_path / "in" / "b_0000.nii.gz", tmp_path / "one").failed.keys() == {"b"}


def test_digits_at_the_end_of_a_name_are_no_channel_unless_there_is_a_first_one(tmp_path):
    write_scan(tmp_path / "in" / "scan_2019.nii.gz")
    write_scan(tmp_path / "in" / "scan_2020.nii.gz")
    assert predict_files(threshold_model(), tmp_path / "in", tmp_path / "out").done == ("scan_2019", "scan_2020")
    write_scan(tmp_path / "in" / "scan_0000.nii.gz")
    outcome = predict_files(threshold_model(), tmp_path / "in", tmp_path / "out")
    assert "[0, 2019, 2020]" in outcome.failed["scan"]


def test_two_files_of_one_name_are_refused_by_name(tmp_path):
    write_scan(tmp_path / "in" / "a.nii.gz")
    write_scan(tmp_path / "in" / "a.mha")
    assert "several files" in predict_files(threshold_model(), tmp_path / "in", tmp_path / "out").failed["a"]


def test_existing_output_is_skipped_only_when_it_is_complete(tmp_path):
    for name in "ab":
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    model, options = threshold_model(), PredictOptions(skip_existing=True)
    predict_files(model, tmp_path / "in" / "a.nii.gz", tmp_path / "out")
    outcome = predict_files(model, tmp_path / "in", tmp_path / "out", options=options)
    assert outcome.skipped == ("a",) and outcome.done == ("b",)
    with_probabilities = replace(options, probabilities=True)
    assert predict_files(model, tmp_path / "in", tmp_path / "out", options=with_probabilities).done == ("a", "b")
    assert predict_files(model, tmp_path / "in", tmp_path / "out", options=with_probabilities).skipped == ("a", "b")


def test_probabilities_are_one_file_a_class_in_image_geometry(tmp_path):
    image = write_scan(tmp_path / "in" / "a.nii.gz")
    model = threshold_model()
    predict_files(model, tmp_path / "in", tmp_path / "out", options=PredictOptions(probabilities=True))
    files = probability_files(tmp_path / "out" / "a.nii.gz", model.plan.labels)
    assert [path.name for path in files] == ["0_background.nii.gz", "1_bright.nii.gz"]
    background, bright = (read_image(path) for path in files)
    assert bright.shape == image.shape and bright.array.dtype == np.float32
    assert np.allclose(bright.grid.spacing, image.grid.spacing)
    assert np.allclose(background.array + bright.array, 1, atol=1e-5)
    assert np.array_equal(bright.array > 0.5, read_image(tmp_path / "out" / "a.nii.gz").array == 3)


def test_shares_are_disjoint_and_complete(tmp_path):
    for number in range(5):
        write_scan(tmp_path / "in" / f"case{number}.nii.gz")
    shares = [
        predict_files(threshold_model(), tmp_path / "in", tmp_path / "out", options=PredictOptions(part=(k, 2))).done
        for k in (1, 2)
    ]
    assert sorted(shares[0] + shares[1]) == [f"case{number}" for number in range(5)]
    assert not set(shares[0]) & set(shares[1])
    with pytest.raises(PredictionError, match="3/2"):
        PredictOptions(part=(3, 2))


def test_input_that_cannot_be_predicted_at_all_is_refused(tmp_path):
    model = threshold_model()
    with pytest.raises(PredictionError, match="no such file"):
        predict_files(model, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PredictionError, match="nothing to predict"):
        predict_files(model, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(PredictionError, match="not a known image format"):
        predict_files(model, tmp_path / "notes.txt", tmp_path / "out")
    write_scan(tmp_path / "in" / "a.nii.gz")
    write_scan(tmp_path / "in" / "b.nii.gz")
    with pytest.raises(PredictionError, match="holds 2 cases"):
        predict_files(model, tmp_path / "in", tmp_path / "out.nii.gz")
    with pytest.raises(PredictionError, match="out.jpg: not a known image format"):
        predict_files(model, tmp_path / "in" / "a.nii.gz", tmp_path / "out.jpg")
    with pytest.raises(PredictionError, match="overwrite"):
        predict_files(model, tmp_path / "in" / "a.nii.gz", tmp_path / "in")
    write_scan(tmp_path / "raw" / "a_0000.nii.gz")
    with pytest.raises(PredictionError, match="taken for images"):
        predict_files(model, tmp_path / "raw", tmp_path / "raw")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        predict_files(model, tmp_path / "in", tmp_path / "file" / "out")


def test_a_dicom_series_is_predicted_to_nifti(shared_data, tmp_path):
    series = shared_data / "ct_example" / "dicom"
    model = threshold_model(file_ending=".mha")
    outcome = predict_files(model, series, tmp_path / "out", options=PredictOptions(mirroring=False, step_size=1.0))
    assert outcome.done == ("dicom",)
    labels, image = read_image(tmp_path / "out" / "dicom.nii.gz"), read_image(series)
    assert labels.shape == image.shape and np.allclose(labels.grid.spacing, image.grid.spacing, rtol=1e-4)
    shutil.copytree(series, tmp_path / "patients" / "first")
    shutil.copytree(series, tmp_path / "patients" / "second")
    outcome = predict_files(
        model, tmp_path / "patients", tmp_path / "out", options=PredictOptions(mirroring=False, step_size=1.0)
    )
    assert outcome.done == ("first", "second")


def write_thick_scan(path: Path) -> Image:
    array = np.random.default_rng(0).uniform(50, 150, (1, 5, 12, 10)).astype(np.float32)
    image = Image(array, Grid((5, 12, 10), (4.0, 1.0, 1.0), (1.0, 2.0, 3.0)))
    write_image(image, path)
    return image


@pytest.mark.parametrize("workers", [0, 1])
def test_the_super_resolved_image_is_written_beside_the_labels_and_on_their_grid(tmp_path, workers):
    write_thick_scan(tmp_path / "in" / "a_0000.nii.gz")
    model = fine_threshold_model()
    options = PredictOptions(image=True, skip_existing=True, workers=workers)
    assert predict_files(model, tmp_path / "in", tmp_path / "out", options=options).done == ("a",)
    labels, image = read_image(tmp_path / "out" / "a.nii.gz"), read_image(tmp_path / "out" / "a_image.nii.gz")
    assert labels.shape == image.shape == (20, 12, 10) and labels.grid == image.grid
    expected = model.predict_image(tmp_path / "in" / "a_0000.nii.gz")
    assert image.array.dtype == np.float32 and np.array_equal(image.array, expected.array)
    assert predict_files(model, tmp_path / "in", tmp_path / "out", options=options).skipped == ("a",)
    image_file(tmp_path / "out" / "a.nii.gz").unlink()
    assert predict_files(model, tmp_path / "in", tmp_path / "out", options=options).done == ("a",)
    assert image_file(Path("out/picture.png")) == Path("out/picture_image.nii.gz")


def test_labels_on_the_native_grid_beside_an_image_on_the_fine_one(tmp_path):
    thick = write_thick_scan(tmp_path / "in" / "a.nii.gz")
    options = PredictOptions(image=True, native=True, probabilities=True)
    predict_files(fine_threshold_model(), tmp_path / "in", tmp_path / "out", options=options)
    assert read_image(tmp_path / "out" / "a.nii.gz").shape == thick.shape
    assert read_image(tmp_path / "out" / "a_probabilities" / "1_bright.nii.gz").shape == thick.shape
    assert read_image(tmp_path / "out" / "a_image.nii.gz").shape == (20, 12, 10)


def test_the_output_spacing_is_that_of_the_written_labels(tmp_path):
    write_thick_scan(tmp_path / "in" / "a.nii.gz")
    model = fine_threshold_model(sr_range=(1.5, 6.0))
    predict_files(model, tmp_path / "in", tmp_path / "out", options=PredictOptions(output_spacing=(1.6, 1.0, 1.0)))
    labels = read_image(tmp_path / "out" / "a.nii.gz")
    assert labels.shape == (13, 12, 10) and np.allclose(labels.grid.spacing, (1.6, 1.0, 1.0))  # 12.5 slices
    outcome = predict_files(
        model, tmp_path / "in", tmp_path / "other", options=PredictOptions(output_spacing=(5.0, 1.0, 1.0))
    )
    assert outcome.failed["a"].startswith("Case a: The output spacing is 5 mm along z, coarser")
    assert not list((tmp_path / "other").iterdir())


def test_a_model_without_labels_writes_its_image_as_the_output(tmp_path):
    write_thick_scan(tmp_path / "in" / "a.nii.gz")
    model = fine_threshold_model(labels=False)
    predict_files(model, tmp_path / "in" / "a.nii.gz", tmp_path / "fine.nii.gz", options=PredictOptions(image=True))
    assert read_image(tmp_path / "fine.nii.gz").array.dtype == np.float32
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["fine.nii.gz"]


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (threshold_model, {"image": True}, "no image head"),
        (threshold_model, {"output_spacing": (1.0, 1.0, 1.0)}, "no output spacing can be asked for"),
        (fine_threshold_model, {"output_spacing": (1.0, 1.0, 1.0)}, "no output spacing can be asked for"),
        (lambda: fine_threshold_model(labels=False), {"native": True}, "writes the super-resolved image alone"),
        (threshold_model, {"native": True, "output_spacing": (1.0, 1.0, 1.0)}, "choose one of"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_anything_is_written(tmp_path, model, options, sentence):
    write_thick_scan(tmp_path / "in" / "a.nii.gz")
    with pytest.raises(PredictionError, match=sentence):
        predict_files(model(), tmp_path / "in", tmp_path / "out", options=PredictOptions(**options))
    assert not (tmp_path / "out").exists()
