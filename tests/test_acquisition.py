"""The forward model agrees with what can be worked out on paper, and never leaves its geometry."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from autoseg.acquisition import (
    PROFILES,
    adjoint_along,
    apply_along,
    degrade,
    interpolation_matrix,
    offset,
    resampling_matrix,
    slice_matrix,
    slice_weights,
    slices,
)
from autoseg.errors import PlanError
from autoseg.plan import Acquisition

GAUSS, RECT, SINC, DIRAC = (Acquisition(profile) for profile in ("gauss", "rect", "sinc", "dirac"))
scales = st.floats(1.0, 8.0)
profiles = st.sampled_from(sorted(PROFILES))


def centres(fine: int, scale: float) -> np.ndarray:
    """Fine positions of the middles of the thick slices."""
    return offset(fine, scale) + (np.arange(slices(fine, scale)) + 0.5) * scale - 0.5


def along_first(line: np.ndarray, matrix: torch.Tensor) -> np.ndarray:
    """A line (fine,) -> its thick slices."""
    return apply_along(torch.tensor(line, dtype=torch.float64)[:, None, None], matrix.double(), 0).flatten().numpy()


@pytest.mark.parametrize("scale", [2.0, 2.5, 4.0])
@pytest.mark.parametrize("thickness", [0.7, 1.0])
def test_a_step_edge_through_a_gaussian_is_an_error_function(scale: float, thickness: float) -> None:
    fine, edge = 60, 31
    step = (np.arange(fine) >= edge).astype(float)  # its face lies at edge - 0.5
    sigma = thickness * scale / (2 * math.sqrt(2 * math.log(2)))  # in voxels: FWHM = thickness * scale
    expected = 0.5 * (1 + erf((centres(fine, scale) - (edge - 0.5)) / (sigma * math.sqrt(2))))
    seen = along_first(step, slice_matrix(fine, scale, GAUSS, thickness=thickness))
    # sampled at voxels and not integrated: 1 % of a step where sigma is not much more than half a voxel
    np.testing.assert_allclose(seen, expected, atol=0.012)


@pytest.mark.parametrize("scale", [2.0, 3.3, 4.0])
@pytest.mark.parametrize("frequency", [0.02, 0.07, 0.11])
def test_a_sinusoid_through_a_gaussian_is_damped_as_its_transform_says(scale: float, frequency: float) -> None:
    fine = 240
    sigma = scale / (2 * math.sqrt(2 * math.log(2)))
    wave = np.cos(2 * math.pi * frequency * np.arange(fine) + 0.4)
    where = centres(fine, scale)
    damping = math.exp(-2 * math.pi**2 * sigma**2 * frequency**2)
    seen = along_first(wave, slice_matrix(fine, scale, GAUSS))
    inside = (where > 20) & (where < fine - 20)
    expected = damping * np.cos(2 * math.pi * frequency * where + 0.4)
    np.testing.assert_allclose(seen[inside], expected[inside], atol=2e-3)


@pytest.mark.parametrize("scale", [2.0, 2.5, 4.0])
def test_cropping_k_space_keeps_what_is_below_the_new_nyquist_frequency_and_removes_what_is_above(scale: float) -> None:
    fine = 400
    where = centres(fine, scale)
    inside = (where > 80) & (where < fine - 80)
    matrix = slice_matrix(fine, scale, SINC)
    for share, gain in ((0.2, 1.0), (0.8, 1.0), (1.2, 0.0), (1.7, 0.0)):
        frequency = share * 0.5 / scale
        if frequency > 0.45:
            continue
        seen = along_first(np.cos(2 * math.pi * frequency * np.arange(fine)), matrix)
        np.testing.assert_allclose(seen[inside], gain * np.cos(2 * math.pi * frequency * where[inside]), atol=5e-3)


def test_a_point_shows_the_profile() -> None:
    point = np.zeros(41)
    point[20] = 1.0
    # of 41 voxels ten slices of 4 cover the middle 40, so that the point lies on the face between slices 4 and 5
    assert offset(41, 4.0) == 0.5
    np.testing.assert_allclose(
        along_first(point, slice_matrix(41, 4.0, RECT))[3:7], [0.0, 1 / 8, 1 / 8, 0.0], atol=1e-7
    )
    thick = along_first(point, slice_matrix(41, 4.0, GAUSS))
    assert thick[4] == pytest.approx(thick[5])
    sigma = 4 / 2.354820045
    assert thick[3] / thick[4] == pytest.approx(math.exp((2**2 - 6**2) / (2 * sigma**2)), rel=1e-4)
    # slices as wide as their spacing see a voxel between two of them a little less: the first term of Poisson's sum
    assert thick.sum() * 4 == pytest.approx(1 - 2 * math.exp(-2 * math.pi**2 * (sigma / 4) ** 2), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(scale=st.integers(2, 6), count=st.integers(1, 6))
def test_a_box_at_a_whole_scale_is_plain_slab_averaging(scale: int, count: int) -> None:
    volume = torch.randn(2, 3, count * scale, 4, 5)
    thick = degrade(volume, (float(scale), 1.0, 1.0), RECT)
    slabs = volume.unflatten(2, (count, scale)).mean(3)
    torch.testing.assert_close(thick, slabs, rtol=1e-5, atol=1e-6)


def test_a_gap_leaves_voxels_out_of_every_slice() -> None:
    matrix = slice_matrix(16, 4.0, Acquisition("rect", gap=0.5))
    expected = torch.zeros(4, 16)
    for row in range(4):
        expected[row, 4 * row + 1 : 4 * row + 3] = 0.5
    torch.testing.assert_close(matrix, expected)


def test_infinitely_thin_slices_are_interpolated_at_their_centre() -> None:
    ramp = np.arange(20.0)
    np.testing.assert_allclose(along_first(ramp, slice_matrix(20, 3.0, DIRAC)), centres(20, 3.0), atol=1e-5)
    assert (slice_matrix(21, 3.0, DIRAC) == 1).sum() == 7  # the centre of three voxels is the middle one


def test_widths_are_voxels_and_not_millimetres() -> None:
    # the matrix knows no spacing: the variance of a slice's weights is (scale / 2.355) squared, in voxels
    for scale in (2.0, 4.0, 6.5):
        matrix = slice_matrix(120, scale, GAUSS).double()
        row, centre = matrix[len(matrix) // 2], centres(120, scale)[len(matrix) // 2]
        variance = float((row * (torch.arange(120.0).double() - centre) ** 2).sum())
        assert variance == pytest.approx((scale / 2.354820045) ** 2, rel=0.01)


@settings(max_examples=80, deadline=None)
@given(profile=profiles, scale=scales, size=st.integers(8, 60), thickness=st.floats(0.05, 1.5))
def test_every_slice_is_a_mean_centred_on_its_place(profile: str, scale: float, size: int, thickness: float) -> None:
    matrix = slice_matrix(size, scale, Acquisition(profile), thickness=thickness)
    count = slices(size, scale)
    assert matrix.shape == (count, size) and count * scale <= size + 1e-4 and (count + 1) * scale > size - 1e-4
    torch.testing.assert_close(matrix.sum(1), torch.ones(count), rtol=1e-5, atol=1e-5)
    # an image that is the same from both ends stays so
    torch.testing.assert_close(matrix, matrix.flip(0, 1), rtol=1e-4, atol=1e-5)
    constant = along_first(np.full(size, 3.0), matrix)
    np.testing.assert_allclose(constant, 3.0, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(profile=profiles, scale=scales, axis=st.integers(0, 2), shape=st.tuples(*[st.integers(8, 14)] * 3))
def test_the_adjoint_is_the_adjoint(profile: str, scale: float, axis: int, shape: tuple[int, int, int]) -> None:
    matrix = slice_matrix(shape[axis], scale, Acquisition(profile)).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    thick = apply_along(x, matrix, axis)
    y = torch.randn_like(thick)
    assert float((thick * y).sum()) == pytest.approx(float((x * adjoint_along(y, matrix, axis)).sum()), rel=1e-9)


def test_the_gradient_of_degrading_is_the_adjoint() -> None:
    x = torch.randn(1, 2, 9, 8, 10, dtype=torch.float64, requires_grad=True)
    thick = degrade(x, (2.5, 1.0, 2.0), GAUSS)
    assert thick.shape == (1, 2, 3, 8, 5)
    y = torch.randn_like(thick)
    (thick * y).sum().backward()
    back = adjoint_along(y, slice_matrix(10, 2.0, GAUSS), 2)
    back = adjoint_along(back, slice_matrix(9, 2.5, GAUSS), 0)
    torch.testing.assert_close(x.grad, back)


def test_every_axis_is_degraded_alike() -> None:
    volume = torch.randn(1, 8, 8, 8)
    along = [
        degrade(volume.transpose(1, axis + 1), (1.0,) * axis + (2.0,) + (1.0,) * (2 - axis), SINC) for axis in range(3)
    ]
    for axis in (1, 2):
        torch.testing.assert_close(along[0], along[axis].transpose(1, axis + 1), rtol=1e-5, atol=1e-6)


def test_scale_one_leaves_the_image_alone_and_labels_become_partial_volumes() -> None:
    volume = torch.randn(1, 4, 5, 6)
    assert degrade(volume, (1.0, 1.0, 1.0), GAUSS) is volume
    labels = torch.nn.functional.one_hot(torch.randint(0, 3, (12, 5, 6))).movedim(-1, 0).float()
    soft = degrade(labels, (3.0, 1.0, 1.0), RECT)
    torch.testing.assert_close(soft.sum(0), torch.ones(4, 5, 6))
    assert set((soft * 3).round(decimals=4).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_under_autocast_the_slices_are_as_exact_as_without() -> None:
    volume = torch.randn(1, 1, 12, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        thick = degrade(volume, (4.0, 2.0, 1.0), GAUSS)
    assert thick.dtype == torch.float32
    torch.testing.assert_close(thick, degrade(volume, (4.0, 2.0, 1.0), GAUSS))


def test_what_is_drawn_hangs_on_the_generator_alone() -> None:
    volume = torch.randn(2, 1, 24, 6, 6)
    model = Acquisition("gauss", (0.5, 1.1), noise=0.1)

    def drawn(seed: int) -> torch.Tensor:
        return degrade(volume, (4.0, 1.0, 1.0), model, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    quiet = degrade(volume, (4.0, 1.0, 1.0), model)  # no generator: the middle thickness and no noise
    torch.testing.assert_close(quiet, apply_along(volume, slice_matrix(24, 4.0, GAUSS, thickness=0.8), 0))
    fixed = degrade(
        volume, (4.0, 1.0, 1.0), Acquisition("gauss", noise=0.1), generator=torch.Generator().manual_seed(1)
    )
    clean = degrade(volume, (4.0, 1.0, 1.0), GAUSS)
    assert float((fixed - clean).std() / clean.std()) == pytest.approx(0.1, rel=0.2)


@settings(max_examples=60, deadline=None)
@given(inputs=st.integers(1, 20), outputs=st.integers(1, 40), scale=st.floats(0.3, 8.0), start=st.floats(-6.0, 6.0))
def test_interpolation_hits_its_positions_and_repeats_the_edge(
    inputs: int, outputs: int, scale: float, start: float
) -> None:
    ramp = np.arange(float(inputs))
    expected = np.clip((start + np.arange(outputs) + 0.5) / scale - 0.5, 0, inputs - 1)
    matrix = interpolation_matrix(inputs, outputs, scale, start)
    assert matrix.shape == (outputs, inputs) and bool((matrix >= 0).all())
    np.testing.assert_allclose(along_first(ramp, matrix), expected, atol=1e-5)
    averaging = resampling_matrix(inputs, outputs, scale, start)
    torch.testing.assert_close(averaging.sum(1), torch.ones(outputs), rtol=1e-5, atol=1e-5)
    if scale >= 1:
        assert torch.equal(averaging, matrix)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_interpolation_by_a_whole_factor_is_that_of_torch(factor: int) -> None:
    volume = torch.randn(1, 2, 5, 4, 6)
    matrices = [interpolation_matrix(size, size * factor, factor) for size in (5, 4, 6)]
    ours = volume
    for axis, matrix in enumerate(matrices):
        ours = apply_along(ours, matrix, axis)
    theirs = torch.nn.functional.interpolate(volume, scale_factor=factor, mode="trilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_coarser_grid_is_reached_by_averages() -> None:
    line = torch.arange(12.0)[:, None, None] ** 2
    coarse = apply_along(line, resampling_matrix(12, 3, 0.25), 0).flatten()
    torch.testing.assert_close(coarse, torch.tensor([3.5, 31.5, 91.5]))


def test_interpolating_what_was_degraded_puts_voxels_back_where_they_were() -> None:
    # centre-aligned: eleven voxels are two slices of four and a margin of 1.5 voxels at each end
    fine, scale = 11, 4.0
    ramp = torch.arange(float(fine))[:, None, None]
    thick = degrade(ramp, (scale, 1.0, 1.0), RECT)
    back = apply_along(thick, interpolation_matrix(2, fine, scale, -offset(fine, scale)), 0)
    inside = slice(3, 8)  # between the two slices' centres, 3 and 7
    torch.testing.assert_close(back[inside], ramp[inside], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(PlanError, match="axis of 3 voxels holds no slice of 4 voxels"):
        slice_matrix(3, 4.0, GAUSS)
    for scale in (0.5, math.nan):
        with pytest.raises(PlanError, match=f"at least one voxel thick, got scale {scale:g}"):
            degrade(torch.zeros(8, 8, 8), (scale, 1.0, 1.0), GAUSS)
    with pytest.raises(PlanError, match="'gaus' is not known; .* Did you mean 'gauss'"):
        slice_matrix(8, 2.0, Acquisition("gaus"))
    with pytest.raises(ValueError, match="0, 1 or 2, got 3"):
        apply_along(torch.zeros(4, 4, 4), torch.eye(4), 3)


def test_a_matrix_that_is_written_to_does_not_spoil_the_next_one() -> None:
    first = slice_matrix(12, 3.0, GAUSS)
    kept = first.clone()
    first.zero_()
    assert torch.equal(slice_matrix(12, 3.0, GAUSS), kept)
    with pytest.raises(ValueError, match="read-only"):
        slice_weights(12, 3.0, GAUSS)[0] = 0


def test_slices_are_weighed_without_torch() -> None:
    code = (
        "import sys; from autoseg.acquisition import slice_weights; from autoseg.plan import Acquisition; "
        "slice_weights(12, 2.0, Acquisition()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
