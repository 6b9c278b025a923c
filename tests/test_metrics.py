"""The scores agree with what can be worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import ndimage

from autoseg import metrics

SPACING = (3.0, 1.0, 0.5)
shapes = st.tuples(*[st.integers(1, 7)] * 3)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(shapes)
    return draw(npst.arrays(bool, shape)), draw(npst.arrays(bool, shape))


def cube(at: tuple[int, int, int], *, side: int = 4, shape: tuple[int, int, int] = (20, 20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(start, start + side) for start in at)] = True
    return mask


def ball(radius: float, *, centre: float = 20, size: int = 41) -> np.ndarray:
    z, y, x = np.ogrid[:size, :size, :size]
    return (z - centre) ** 2 + (y - centre) ** 2 + (x - centre) ** 2 <= radius**2


def test_overlap_of_two_shifted_cubes_is_known():
    first, second = cube((4, 4, 4)), cube((4, 4, 6))  # half of each in common
    assert metrics.dice(first, second) == pytest.approx(0.5)
    assert metrics.iou(first, second) == pytest.approx(1 / 3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_parallel_plates_are_as_far_apart_as_the_spacing_says(axis):
    first, second = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    np.moveaxis(first, axis, 0)[3] = True
    np.moveaxis(second, axis, 0)[8] = True
    distance = 5 * SPACING[axis]
    assert metrics.hd95(first, second, SPACING) == pytest.approx(distance)
    assert metrics.assd(first, second, SPACING) == pytest.approx(distance)
    assert metrics.nsd(first, second, SPACING, tolerance_mm=distance) == 1
    assert metrics.nsd(first, second, SPACING, tolerance_mm=0.99 * distance) == 0


def test_concentric_spheres_are_as_far_apart_as_their_radii_differ():
    small, large = ball(10), ball(15)
    assert metrics.assd(small, large, (1, 1, 1)) == pytest.approx(5, abs=0.25)  # the surface is made of voxels
    assert metrics.hd95(small, large, (2, 2, 2)) == pytest.approx(10, abs=1.0)
    assert metrics.nsd(small, large, (1, 1, 1), tolerance_mm=4) == 0
    assert metrics.nsd(small, large, (1, 1, 1), tolerance_mm=6) == 1


def test_hd95_is_the_larger_direction_and_forgives_five_percent():
    reference = cube((2, 2, 2), side=10)
    prediction = reference.copy()
    prediction[2, 2, 19] = True  # one far voxel among 489
    assert metrics.hd95(prediction, reference, (1, 1, 1)) == 0
    prediction[2:12, 2:12, 18:20] = True  # now about a quarter of the predicted surface is far
    distances = metrics.surface_distances(prediction, reference, (1, 1, 1))
    assert np.percentile(distances.from_reference, 95) == 0
    assert metrics.hd95(prediction, reference, (1, 1, 1)) == pytest.approx(8)


def test_the_outline_of_a_plane_is_its_surface():
    plane = np.zeros((1, 10, 10), bool)
    plane[0, 2:7, 2:7] = True
    assert metrics.surface(plane, plane=True).sum() == 16
    smaller = np.zeros_like(plane)
    smaller[0, 3:6, 3:6] = True
    # 12 voxels of the outer outline lie 1 mm off, its 4 corners sqrt(2); all 8 of the inner one 1 mm
    assert metrics.assd(plane, smaller, (9.0, 1.0, 1.0)) == pytest.approx((20 + 4 * math.sqrt(2)) / 24)


def test_one_slice_of_a_volume_is_all_surface():
    mask = np.zeros((3, 8, 8), bool)
    mask[1, 2:6, 2:6] = True
    assert metrics.surface_distances(mask, mask, SPACING).from_prediction.size == 16


def test_volume_error_is_signed_and_in_millilitres():
    small, large = cube((2, 2, 2), side=5), cube((2, 2, 2), side=10)
    assert metrics.volume_error(large, small, (2, 1, 1)) == pytest.approx((2 * 0.875, 7.0))
    assert metrics.volume_error(small, large, (2, 1, 1)) == pytest.approx((-2 * 0.875, -0.875))


def test_lesions_are_counted_by_component():
    reference = cube((0, 0, 0)) | cube((8, 8, 8)) | cube((16, 16, 16))
    prediction = cube((1, 1, 1)) | cube((8, 0, 0))  # one of three found, one of two true
    assert metrics.lesion_f1(prediction, reference) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    corners = np.zeros((4, 4, 4), bool)
    corners[0, 0, 0] = corners[1, 1, 1] = True  # touching by a corner: one component
    assert metrics.lesion_f1(cube((0, 0, 0), side=1, shape=(4, 4, 4)), corners) == 1


def test_empty_masks_follow_the_documented_table():
    empty, full = np.zeros((6, 6, 6), bool), cube((1, 1, 1), shape=(6, 6, 6))
    for name in ("dice", "iou", "nsd", "hd95", "assd", "volume_error_ratio", "lesion_f1"):
        assert math.isnan(metrics.score_masks(empty, empty, SPACING)[name])
    missed, invented = (metrics.score_masks(*pair, SPACING) for pair in ((empty, full), (full, empty)))
    for name in ("dice", "iou", "nsd", "lesion_f1"):
        assert missed[name] == invented[name] == 0
    for name in ("hd95", "assd"):
        assert missed[name] == invented[name] == math.inf
    assert (missed["volume_error_ratio"], invented["volume_error_ratio"]) == (-1, math.inf)
    assert missed["volume_error_ml"] == -invented["volume_error_ml"] == pytest.approx(-64 * 1.5 / 1000)
    assert metrics.score_masks(empty, empty, SPACING)["volume_error_ml"] == 0


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2, 2\) and \(2, 2, 3\)"):
        metrics.dice(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool))


@settings(max_examples=60, deadline=None)
@given(mask_pairs())
def test_every_score_is_symmetric_but_the_volume_which_changes_sign(pair):
    there, back = metrics.score_masks(*pair, SPACING), metrics.score_masks(*pair[::-1], SPACING)
    for name in ("dice", "iou", "nsd", "hd95", "assd", "lesion_f1"):
        assert there[name] == pytest.approx(back[name], nan_ok=True)
    assert there["volume_error_ml"] == pytest.approx(-back["volume_error_ml"])


@settings(max_examples=40, deadline=None)
@given(npst.arrays(bool, shapes))
def test_a_mask_compared_with_itself_is_perfect(mask):
    scores = metrics.score_masks(mask, mask, SPACING, tolerance_mm=0)
    if mask.any():
        assert [scores[name] for name in ("dice", "iou", "nsd", "lesion_f1")] == [1, 1, 1, 1]
        assert [scores[name] for name in ("hd95", "assd", "volume_error_ratio")] == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(mask_pairs())
def test_scores_stay_in_their_bounds_and_agree_with_each_other(pair):
    scores = metrics.score_masks(*pair, SPACING)
    if not (pair[0].any() or pair[1].any()):
        return
    for name in ("dice", "iou", "nsd", "lesion_f1"):
        assert 0 <= scores[name] <= 1
    assert scores["dice"] == pytest.approx(2 * scores["iou"] / (1 + scores["iou"]))
    assert scores["hd95"] >= 0 and scores["assd"] >= 0
    assert scores["dice"] == metrics.dice(*pair) and scores["iou"] == metrics.iou(*pair)
    assert scores["nsd"] == metrics.nsd(*pair, SPACING) and scores["hd95"] == metrics.hd95(*pair, SPACING)


@settings(max_examples=40, deadline=None)
@given(mask_pairs())
def test_surface_distances_agree_with_a_distance_transform_of_the_whole_image(pair):
    plane = pair[0].shape[0] == 1
    surfaces = []
    for mask in pair:
        eroded = mask & ndimage.binary_erosion(mask, structure=_faces(plane))
        surfaces.append(mask & ~eroded)
    if not surfaces[0].any() or not surfaces[1].any():
        return
    expected = ndimage.distance_transform_edt(~surfaces[1], sampling=SPACING)[surfaces[0]]
    np.testing.assert_allclose(metrics.surface_distances(*pair, SPACING).from_prediction, expected, atol=1e-9)


def _faces(plane: bool) -> np.ndarray:
    neighbours = ndimage.generate_binary_structure(3, 1)
    if plane:
        neighbours[[0, 2]] = False
    return neighbours


def noisy(image: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    return image + np.random.default_rng(seed).normal(0, sigma, image.shape)


def waves(shape: tuple[int, int, int] = (16, 20, 24)) -> np.ndarray:
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return 50 + 20 * np.sin(z / 2) * np.cos(y / 3) + 10 * np.sin(x / 2)


def test_the_psnr_of_a_known_error_is_known():
    reference = waves()
    assert metrics.psnr(reference, reference + 2, peak=100) == pytest.approx(20 * math.log10(50))
    assert metrics.psnr(reference, noisy(reference, 5), peak=100) == pytest.approx(20 * math.log10(20), abs=0.1)
    assert metrics.psnr(reference, reference, peak=100) == math.inf
    assert metrics.psnr(reference.astype(np.int16), reference.astype(np.int16) + 2, peak=100) > 33  # whole numbers too


def test_the_peak_is_the_references_and_ignores_a_few_bright_voxels():
    reference = np.linspace(0, 100, 8000).reshape(20, 20, 20)
    assert metrics.intensity_peak(reference) == pytest.approx(99)
    reference[0, 0, :10] = 1e6
    assert metrics.intensity_peak(reference) == pytest.approx(99, rel=0.01)
    expected = 20 * math.log10(metrics.intensity_peak(reference) / 3)
    assert metrics.psnr(reference, reference + 3) == pytest.approx(expected)


def test_only_the_region_counts_whether_box_or_mask():
    reference = waves()
    image = reference.copy()
    image[8:] += 5
    near, far = (slice(0, 8), slice(None), slice(None)), (slice(8, 16), slice(None), slice(None))
    mask = np.zeros(reference.shape, bool)
    mask[far] = True
    assert metrics.psnr(reference, image, region=near) == math.inf
    assert metrics.psnr(reference, image, peak=10, region=far) == pytest.approx(20 * math.log10(2))
    for score in (metrics.psnr, metrics.ssim):
        assert score(reference, image, region=far) == pytest.approx(score(reference, image, region=mask))
        assert score(reference, image, region=near) > score(reference, image) > score(reference, image, region=far)
    assert math.isnan(metrics.psnr(reference, image, region=np.zeros_like(mask)))
    assert math.isnan(metrics.ssim(reference, image, region=np.zeros_like(mask)))


def test_the_ssim_of_constant_images_is_their_luminance_term():
    first, second, peak = np.full((12, 12, 12), 30.0), np.full((12, 12, 12), 50.0), 100.0
    # the darkest voxel of the reference counts as zero, so 30 against 50 is 0 against 20
    expected = (0.01 * peak) ** 2 / (20**2 + (0.01 * peak) ** 2)
    assert metrics.ssim(first, second, peak=peak) == pytest.approx(expected)


def test_the_ssim_of_an_image_and_its_negative_is_the_structure_term():
    rng = np.random.default_rng(1)
    texture = rng.normal(0, 1, (24, 24, 24))
    assert metrics.ssim(texture, texture) == pytest.approx(1)
    assert metrics.ssim(texture, -texture) < -0.8  # equal means and variances, covariance of the opposite sign


def test_the_ssim_agrees_with_its_formula_voxel_by_voxel():
    rng = np.random.default_rng(2)
    first, second = rng.uniform(0, 100, (11, 11, 11)), rng.uniform(0, 100, (11, 11, 11))
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    line /= line.sum()
    window = line[:, None, None] * line[:, None] * line  # around the middle voxel it is the whole image
    peak, darkest = metrics.intensity_peak(first), np.percentile(first, 0.5)
    a, b = first - darkest, second - darkest
    means = [(window * image).sum() for image in (a, b)]
    variances = [(window * (image - mean) ** 2).sum() for image, mean in zip((a, b), means, strict=True)]
    covariance = (window * (a - means[0]) * (b - means[1])).sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    expected = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    expected /= (means[0] ** 2 + means[1] ** 2 + c1) * (sum(variances) + c2)
    middle = (slice(5, 6),) * 3
    assert metrics.ssim(first, second, region=middle) == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(
    factor=st.floats(0.01, 100),
    shift=st.floats(-1000, 1000),
    shape=st.tuples(*[st.integers(2, 12)] * 3),
    noise=st.floats(0.1, 30),
)
def test_the_unit_of_the_intensities_changes_no_image_score(factor, shift, shape, noise):
    reference = waves(shape)
    image = noisy(reference, noise)
    expected = metrics.score_images(reference, image)
    scores = metrics.score_images(reference * factor + shift, image * factor + shift)
    assert list(scores) == list(metrics.IMAGE_METRICS)
    assert scores["psnr"] == pytest.approx(expected["psnr"], rel=1e-4, abs=1e-4)
    assert scores["ssim"] == pytest.approx(expected["ssim"], rel=1e-4, abs=1e-4)
    assert -1 <= scores["ssim"] <= 1


def test_more_noise_scores_lower_and_a_plane_is_scored_in_two_dimensions():
    reference = waves()
    for score in (metrics.psnr, metrics.ssim):
        scores = [score(reference, noisy(reference, sigma)) for sigma in (1, 3, 10, 30)]
        assert scores == sorted(scores, reverse=True)
    plane, worse = reference[:1], noisy(reference, 5)[:1]
    repeated = metrics.ssim(np.repeat(plane, 30, 0), np.repeat(worse, 30, 0))
    assert metrics.ssim(plane, worse) == pytest.approx(repeated)


def test_images_that_cannot_be_compared_are_refused_and_constant_ones_have_no_score():
    with pytest.raises(ValueError, match=r"\(2, 2, 2\) and \(2, 2, 3\)"):
        metrics.psnr(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="Two images"):
        metrics.ssim(np.zeros((2, 2)), np.zeros((2, 2)))
    assert all(math.isnan(score) for score in metrics.score_images(np.ones((4, 4, 4)), waves((4, 4, 4))).values())
