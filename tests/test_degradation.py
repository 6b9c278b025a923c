"""A stored fine image as thick slices: normalised as they would have been."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import TWO_CLASSES, sr_configuration, store_of

from autoseg.acquisition import degrade, offset
from autoseg.image import Grid, Image
from autoseg.inference.held_out import held_out_case
from autoseg.plan import Acquisition, Normalization
from autoseg.preprocessing import degradation
from autoseg.preprocessing.case import preprocess_case
from autoseg.preprocessing.degradation import Moments, degrade_entry, input_moments
from autoseg.preprocessing.normalize import normalize
from autoseg.preprocessing.store import Store, StoreEntry
from autoseg.training.batches import Samples

SCALE = (3.0, 1.0, 1.0)
SHAPE = (22, 12, 14)


def entry_of(folder: Path, image: np.ndarray) -> StoreEntry:
    return store_of(folder, {"a": np.zeros(image.shape[1:], np.int16)}, images={"a": image}).entry("a")


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.2, (1, *SHAPE)).astype(np.float32)


def thick(image: np.ndarray) -> np.ndarray:
    return degrade(torch.from_numpy(image.astype(np.float64)), SCALE, Acquisition()).numpy()


def moments_of(entry: StoreEntry, scheme: str) -> Moments:
    return input_moments(entry, sr_configuration(scale=SCALE, normalization=Normalization(scheme)), SCALE)


CT = Normalization("ct_unclipped", mean=50, std=60, lower=-100, upper=250)


def test_thick_ct_is_averaged_before_it_is_clipped(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).choice([-1000.0, 40.0, 1200.0], (1, 24, 1, 1)).repeat(12, 2).repeat(12, 3)
    model = Acquisition("rect", (1.0, 1.0))
    configuration = sr_configuration(scale=(4.0, 1.0, 1.0), normalization=CT, acquisition=model)
    case = preprocess_case(Image(raw, Grid((24, 12, 12), (2.0, 1.0, 1.0))), None, configuration.preprocessing, None)
    store = Store(tmp_path)
    store.write("a", {"image": case.image, "label": np.zeros(case.image.shape, np.int16)}, case.geometry, {})
    scanned = raw.reshape(6, 4, 12, 12).mean(1)  # what a scanner would have given of it
    expected = normalize(scanned, replace(CT, scheme="ct"), nonzero=lambda: scanned > 0, spacing=(8.0, 1.0, 1.0))
    held_out = held_out_case(store.entry("a"), configuration, TWO_CLASSES)
    np.testing.assert_allclose(held_out.image[0], expected, atol=1e-5)
    clipped = np.clip(raw, -100, 250)
    np.testing.assert_allclose(held_out.truth, (clipped - 50) / 60, atol=1e-5)
    made_of_clipped = (clipped.reshape(6, 4, 12, 12).mean(1) - 50) / 60
    assert np.abs(made_of_clipped - expected).max() > 1  # standard deviations of the foreground

    samples = Samples(store, ["a"], configuration, TWO_CLASSES, seed=0, augment=False)
    sample = samples[0, 0]
    np.testing.assert_allclose(sample.image[0, :, 6, 6], expected[:, 6, 6], atol=1e-5)
    assert sample.truth is not None
    np.testing.assert_allclose(sample.truth[0, :, 6, 6], (clipped[0, :, 6, 6] - 50) / 60, atol=1e-5)
    assert configuration.input_preprocessing.normalization == (replace(CT, scheme="ct"),)


def test_moments_are_those_of_the_whole_degraded_image(tmp_path: Path) -> None:
    image = volume()
    mean, std = moments_of(entry_of(tmp_path, image), "zscore")
    assert mean[0] == pytest.approx(thick(image).mean(), rel=1e-5)
    assert std[0] == pytest.approx(thick(image).std(), rel=1e-5)
    assert std[0] < 0.8 * image.std()


def test_masked_moments_are_those_of_the_inside_and_rescaling_takes_the_range(tmp_path: Path) -> None:
    image = volume() + 5
    image[:, :6] = 0
    entry = entry_of(tmp_path, image)
    inside = thick((image != 0).astype(np.float64)) > 0.5
    mean, std = moments_of(entry, "masked_zscore")
    assert mean[0] == pytest.approx(thick(image)[inside].mean(), rel=1e-5)
    assert std[0] == pytest.approx(thick(image)[inside].std(), rel=1e-5)
    lowest, spread = moments_of(entry, "n4+rescale")
    assert lowest[0] == pytest.approx(thick(image).min(), abs=1e-5)
    assert spread[0] == pytest.approx(np.ptp(thick(image)), rel=1e-5)


@pytest.mark.parametrize("scheme", ["ct", "none", "rgb"])
def test_schemes_that_do_not_depend_on_the_image_have_no_moments(tmp_path: Path, scheme: str) -> None:
    mean, std = moments_of(entry_of(tmp_path, volume()), scheme)
    assert mean.tolist() == [0] and std.tolist() == [1]


def test_a_constant_image_is_not_divided_by_nothing(tmp_path: Path) -> None:
    image = np.full((1, *SHAPE), 2.0, np.float32)
    whole = degrade_entry(entry_of(tmp_path, image), sr_configuration(scale=SCALE))
    assert np.abs(whole.image).max() < 1e-5


def test_a_degraded_case_is_centred_normalised_and_asked_for_at_every_fine_voxel(tmp_path: Path) -> None:
    whole = degrade_entry(entry_of(tmp_path, volume()), sr_configuration(scale=SCALE))
    assert whole.image.shape == (1, 7, 12, 14) and whole.image.dtype == np.float32
    assert abs(whole.image.mean()) < 1e-5 and whole.image.std() == pytest.approx(1, abs=1e-5)
    assert whole.grid.shape == SHAPE and whole.grid.scale == SCALE
    assert whole.grid.start == (-offset(22, 3.0), 0, 0) == (-0.5, 0, 0)


def test_a_ramp_is_found_again_where_the_grid_says(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(22, dtype=np.float32)[:, None, None], (1, *SHAPE))
    configuration = sr_configuration(scale=SCALE, normalization=Normalization("none"))
    whole = degrade_entry(entry_of(tmp_path, ramp), configuration)
    positions = (whole.grid.start[0] + np.arange(22) + 0.5) / 3 - 0.5
    found = np.interp(positions, np.arange(7), whole.image[0, :, 0, 0])
    np.testing.assert_allclose(found[4:-4], np.arange(22)[4:-4], atol=0.02)  # edges reach in


def test_the_outside_of_a_masked_image_stays_zero(tmp_path: Path) -> None:
    image = volume() + 5
    image[:, :, :5] = 0
    configuration = sr_configuration(scale=SCALE, normalization=Normalization("masked_zscore"))
    whole = degrade_entry(entry_of(tmp_path, image), configuration)
    assert not whole.image[:, :, :5].any() and abs(whole.image[:, :, 5:].mean()) < 1e-4


def test_big_images_are_measured_in_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).normal(2, 1, (1, 40, 60, 60)).astype(np.float32)
    exact = moments_of(entry_of(tmp_path / "exact", image), "zscore")
    monkeypatch.setattr(degradation, "MOMENT_VOXELS", 1000)
    monkeypatch.setattr(degradation, "MOMENT_BOX", 16)
    estimated = moments_of(entry_of(tmp_path / "boxes", image), "zscore")
    assert estimated.mean[0] == pytest.approx(exact.mean[0], rel=0.01) and estimated.mean[0] != exact.mean[0]
    assert estimated.std[0] == pytest.approx(exact.std[0], rel=0.05)


def test_moments_are_measured_once_and_follow_a_rewritten_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = moments_of(entry_of(tmp_path, volume()), "zscore")
    reads = []
    original = StoreEntry.read
    monkeypatch.setattr(StoreEntry, "read", lambda self, *a: reads.append(1) or original(self, *a))
    assert moments_of(entry_of(tmp_path, volume()), "zscore") is first and not reads
    other = moments_of(entry_of(tmp_path, volume(1) * 2), "zscore")
    assert other.std[0] > 1.5 * first.std[0]


def test_any_scale_moments_are_shared_by_scales_close_by(tmp_path: Path) -> None:
    entry = entry_of(tmp_path, volume())
    configuration = sr_configuration(scale=SCALE, sr_range=(2.0, 4.0))
    near, same, far = (input_moments(entry, configuration, (s, 1.0, 1.0)) for s in (3.01, 3.0, 3.5))
    assert near is same and far is not same


def test_moments_of_another_frame_are_those_of_the_axis_that_is_degraded(tmp_path: Path) -> None:
    image = np.broadcast_to((-1.0) ** np.arange(12)[:, None], (1, *SHAPE)).astype(np.float32)  # alternates along y
    configuration = sr_configuration(scale=(1.0, 2.0, 1.0), source="self", patch_size=(1, 8, 12))
    entry = entry_of(tmp_path, image)
    along, across = (
        input_moments(entry, configuration, (1.0, 2.0, 1.0), frame=frame) for frame in ((0, 1, 2), (0, 2, 1))
    )
    assert along.std[0] < 0.3 and across.std[0] == pytest.approx(1, abs=1e-5)


def test_the_module_costs_workers_no_torch() -> None:
    script = "import sys, autoseg.preprocessing.degradation; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
