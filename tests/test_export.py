"""Export: exactly the dense interpolation's answer, on the original grid, without holding classes x full resolution."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.errors import PredictionError
from autoseg.image import Grid, Image
from autoseg.inference import export
from autoseg.inference.export import (
    decide,
    decision_values,
    export_labels,
    export_probabilities,
    resampled_decisions,
    resampled_probabilities,
)
from autoseg.labels import Labels
from autoseg.plan import Normalization, PreprocessingSettings
from autoseg.preprocessing.case import CaseGeometry, preprocess_case

CLASSES = Labels(("a", "b", "c"), ((1,), (4,), (2,)))
REGIONS = Labels(("whole", "core"), ((1, 2), (2,)), region_order=(1, 2))

small = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
large = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))


def blobs(channels: int, shape: tuple[int, ...], seed: int, roughness: float = 0.3) -> torch.Tensor:
    """Logits with smooth structures and some noise (K, Z, Y, X)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((1, channels, 3, 3, 3), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=tuple(shape), mode="trilinear")[0]
    return smooth * 4 + roughness * torch.randn(smooth.shape, generator=generator)


def dense(logits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        logits[None].double(), size=tuple(shape), mode="trilinear", align_corners=False
    )[0]


@given(
    shape=small, output=large, channels=st.integers(2, 7), seed=st.integers(0, 99), rough=st.sampled_from([0, 0.3, 9])
)
@settings(deadline=None, max_examples=80)
def test_classes_are_those_of_dense_interpolation(shape, output, channels, seed, rough):
    logits = blobs(channels, shape, seed, rough)
    found = np.stack(list(resampled_decisions(logits, output, regions=False)))
    interpolated = dense(logits, output)
    best = interpolated.amax(0)
    chosen = interpolated.gather(0, torch.from_numpy(found).long()[None])[0]
    assert found.shape == output and found.min() >= 0
    assert torch.all(best - chosen < 1e-4)  # the same class, or one that ties in float32


@given(
    shape=small, output=large, regions=st.integers(1, 5), seed=st.integers(0, 99), rough=st.sampled_from([0, 0.3, 9])
)
@settings(deadline=None, max_examples=80)
def test_regions_are_those_of_dense_interpolation(shape, output, regions, seed, rough):
    logits = blobs(regions, shape, seed, rough)
    found = np.stack(list(resampled_decisions(logits, output, regions=True)))
    interpolated = dense(logits, output)
    sure = interpolated.abs().amin(0) > 1e-4
    expected = torch.zeros(output, dtype=torch.long)
    for number, region in enumerate(interpolated, start=1):
        expected[region > 0] = number
    assert torch.equal(torch.from_numpy(found).long()[sure], expected[sure])


def test_voxels_whose_neighbours_agree_are_never_interpolated(monkeypatch):
    logits = torch.zeros(2, 8, 8, 8)
    logits[1, :, :, 4:] = 1
    logits[0, :, :, :4] = 1
    interpolated = []
    original = export._interpolated
    monkeypatch.setattr(export, "_interpolated", lambda *a, **k: interpolated.append(len(a[3][0])) or original(*a, **k))
    list(resampled_decisions(logits, (16, 16, 16), regions=False))
    assert sum(interpolated) == 16 * 16 * 2  # two columns of output voxels lie between the classes


def test_a_class_that_wins_at_no_corner_can_win_between_them():
    logits = torch.tensor([[10.0, 0.0], [9.0, 9.0], [0.0, 10.0]])[:, None, None]
    (plane,) = resampled_decisions(logits, (1, 1, 6), regions=False)
    assert plane[0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_float_type_of_logits_is_exported(dtype):
    logits = blobs(4, (5, 6, 7), 0).to(dtype)
    found = np.stack(list(resampled_decisions(logits, (9, 9, 9), regions=False, row_bytes=64)))
    assert np.mean(found == dense(logits, (9, 9, 9)).argmax(0).numpy()) > 0.99


def test_probabilities_are_the_softmax_of_interpolated_logits():
    logits = blobs(4, (5, 6, 7), 0)
    found = np.stack(list(resampled_probabilities(logits, (11, 6, 3), regions=False)), axis=1)
    assert np.allclose(found, dense(logits, (11, 6, 3)).softmax(0), atol=1e-5)
    found = np.stack(list(resampled_probabilities(logits, (11, 6, 3), regions=True)), axis=1)
    assert np.allclose(found, dense(logits, (11, 6, 3)).sigmoid(), atol=1e-5)


def test_decisions_become_the_values_of_the_dataset_in_the_smallest_type():
    assert decision_values(CLASSES).tolist() == [0, 1, 4, 2] and decision_values(CLASSES).dtype == np.uint8
    assert decision_values(REGIONS).tolist() == [0, 1, 2]
    assert decision_values(Labels(("a",), ((300,),))).dtype == np.uint16
    assert decide(torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]]), regions=True).tolist() == [
        1,
        2,
        0,
        2,
    ]


def oblique_case() -> tuple[Image, CaseGeometry]:
    """An image in a turned, flipped orientation with a border of zeros, and the way to its network grid."""
    array = np.zeros((1, 9, 14, 11), dtype=np.float32)
    array[0, 2:8, 1:12, 3:10] = np.random.default_rng(0).uniform(1, 2, (6, 11, 7))
    direction = ((0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (0.0, -1.0, 0.0))
    image = Image(array, Grid((9, 14, 11), (1.5, 1.0, 2.0), (5.0, -3.0, 7.0), direction))
    settings = PreprocessingSettings((1.3, 1.1, 1.7), (2, 0, 1), (Normalization("zscore"),))
    return image, preprocess_case(image, None, settings, None).geometry


def test_labels_lie_on_the_grid_and_in_the_orientation_of_the_image():
    image, geometry = oblique_case()
    # the network answers with the first array axis of the file: the result must grow along it and nowhere else
    axis = geometry.permutation.index(0)
    ramp = torch.arange(geometry.network_shape[axis], dtype=torch.float32) - geometry.network_shape[axis] / 2 + 0.5
    view = [1, 1, 1]
    view[axis] = -1
    foreground = (-ramp if geometry.flips[axis] else ramp).view(view).expand(geometry.network_shape)
    result = export_labels(torch.stack((torch.zeros_like(foreground), foreground)), geometry, Labels(("a",), ((7,),)))
    assert result.grid == image.grid and result.array.shape == image.array.shape
    inside = result.array[0, 2:8, 1:12, 3:10]
    assert np.all(inside[:3] == 0) and np.all(inside[3:] == 7)
    outside = result.array.copy()
    outside[0, 2:8, 1:12, 3:10] = 0
    assert not outside.any()


def test_probabilities_lie_on_the_image_and_agree_with_the_labels(monkeypatch):
    image, geometry = oblique_case()
    logits = blobs(4, geometry.network_shape, 1)
    labels = export_labels(logits, geometry, CLASSES)
    for max_ram in (2**30, 1):  # in memory, on disk
        probabilities = export_probabilities(logits, geometry, CLASSES, max_ram_bytes=max_ram)
        assert probabilities.array.shape == (4, *image.shape) and probabilities.array.dtype == np.float32
        assert np.allclose(probabilities.array.sum(0), 1, atol=1e-5)
        assert np.all(probabilities.array[0, 0] == 1)  # outside of the crop
        assert np.array_equal(decision_values(CLASSES)[probabilities.array.argmax(0)], labels.array[0])


def test_logits_of_another_case_are_refused():
    _, geometry = oblique_case()
    with pytest.raises(PredictionError, match="expected"):
        export_labels(torch.zeros(4, 3, 3, 3), geometry, CLASSES)


def test_memory_does_not_grow_with_classes_times_full_resolution():
    code = """
import resource, torch
from autoseg.inference.export import resampled_decisions
torch.set_num_threads(1)
logits = torch.zeros(40, 16, 64, 64, dtype=torch.float16)
logits[1:, :, ::9, ::7] = 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for plane in resampled_decisions(logits, (64, 512, 512), regions=False):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 150e6  # dense logits would take 2.7 GB
