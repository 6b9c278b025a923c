"""One contract for every normaliser, then what each of them says about its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.errors import PlanError
from autoseg.plan import Normalization
from autoseg.plan_values import BIAS_CORRECTION
from autoseg.preprocessing.normalize import NORMALIZERS, normalize

SPACING = (2.0, 1.0, 1.0)
SCHEMES = [*NORMALIZERS, BIAS_CORRECTION + "zscore"]  # the correction stands before any scheme alike


def apply(volume: np.ndarray, scheme: str, **numbers: float) -> np.ndarray:
    how = Normalization(scheme, **numbers)
    return normalize(volume, how, nonzero=lambda: volume != 0, spacing=SPACING)


def volumes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    brain = rng.normal(100, 20, (8, 12, 12))
    brain[:, :3] = 0
    return {
        "int16": rng.integers(-1000, 2000, (6, 10, 10)).astype(np.int16),
        "uint8": rng.integers(0, 255, (6, 10, 10)).astype(np.uint8),
        "float64": rng.normal(1e4, 10, (6, 10, 10)),
        "brain": brain.astype(np.float32),
        "flat": np.full((4, 5, 6), 7, dtype=np.float32),
        "zero": np.zeros((4, 5, 6), dtype=np.float32),
        "plane": rng.integers(0, 255, (1, 20, 20)).astype(np.uint8),
        "one voxel": np.ones((1, 1, 1), dtype=np.float32),
        "view": rng.normal(size=(6, 7, 8)).astype(np.float32).transpose(2, 0, 1)[::-1],
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", volumes())
def test_every_normaliser_keeps_the_contract(scheme, kind):
    volume = volumes()[kind]
    before = volume.copy()
    result = apply(volume, scheme, mean=50, std=0 if kind == "flat" else 30, lower=-100, upper=300)
    assert result.shape == volume.shape and result.dtype == np.float32
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(volume, before)
    assert not np.shares_memory(result, volume)
    if kind in ("flat", "zero"):
        assert np.ptp(result) == 0
    again = apply(volume, scheme, mean=50, std=0 if kind == "flat" else 30, lower=-100, upper=300)
    np.testing.assert_array_equal(again, result)


def test_ct_is_clipped_and_scored_by_the_dataset():
    result = apply(np.array([[[-2000.0, 0, 100, 5000]]]), "ct", mean=50, std=25, lower=-100, upper=300)
    np.testing.assert_allclose(result, [[[-6, -2, 2, 10]]])


def test_zscore_has_mean_0_and_deviation_1():
    result = apply(volumes()["float64"], "zscore")
    assert abs(result.mean()) < 1e-3 and abs(result.std() - 1) < 1e-3


def test_zscore_of_large_intensities_loses_no_digits():
    volume = np.float32(1e6) + np.random.default_rng(0).normal(0, 50, (40, 100, 100)).astype(np.float32)
    exact = (volume.astype(np.float64) - volume.mean(dtype=np.float64)) / volume.std(dtype=np.float64)
    np.testing.assert_allclose(apply(volume, "zscore"), exact, atol=5e-3)


def test_masked_zscore_scores_inside_and_leaves_zero_outside():
    volume = volumes()["brain"]
    result = apply(volume, "masked_zscore")
    inside = volume != 0
    assert (result[~inside] == 0).all()
    assert abs(result[inside].mean()) < 1e-4 and abs(result[inside].std() - 1) < 1e-4


def test_rescale_goes_from_0_to_1():
    result = apply(volumes()["int16"], "rescale")
    assert result.min() == 0 and result.max() == 1


def test_rgb_divides_by_255():
    np.testing.assert_allclose(apply(np.array([[[0, 51, 255]]], dtype=np.uint8), "rgb"), [[[0, 0.2, 1]]])


def test_none_changes_nothing():
    np.testing.assert_array_equal(apply(volumes()["int16"], "none"), volumes()["int16"])


def test_n4_evens_out_a_bias_field():
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (10, 20, 20)), indexing="ij")
    truth = np.where((z**2 + y**2 + x**2) < 0.5, 200.0, 100.0) + rng.normal(0, 2, z.shape)
    biased = (truth * np.exp(0.5 * x + 0.3 * y)).astype(np.float32)
    corrected = apply(biased, "n4+none")

    def unevenness(volume: np.ndarray) -> float:
        outer = volume[truth < 150]
        return float(outer.std() / outer.mean())

    assert unevenness(corrected) < 0.4 * unevenness(biased)


def test_an_unknown_scheme_is_refused_with_the_nearest_one():
    with pytest.raises(PlanError, match="'zscor' is not known.*Did you mean 'zscore'"):
        apply(np.zeros((1, 1, 1)), "zscor")
