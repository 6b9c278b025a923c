"""Losses against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import IGNORING, REGIONS, TWO_CLASSES
from torch import Tensor
from torch.nn import functional as F

from autoseg.labels import Labels
from autoseg.training.losses import DeepSupervision, DiceCrossEntropy, build_loss

IGNORED_REGIONS = Labels.from_json({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
SPARSE_VALUES = Labels.from_json({"background": 0, "liver": 7, "tumour": 3})
SHAPE = (4, 6, 5)


def random_label(seed: int, values: tuple[int, ...], *, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(values)[torch.randint(len(values), (batch, 1, *SHAPE), generator=generator)].short()


def random_logits(seed: int, channels: int, *, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 3


def sure(label: Tensor, groups: tuple[tuple[int, ...], ...], *, background: bool) -> Tensor:
    """Logits that leave no doubt about the label."""
    masks = [torch.isin(label[:, 0], torch.tensor(group)) for group in groups]
    channels = [label[:, 0] == 0, *masks] if background else masks
    return (torch.stack(channels, 1).float() * 2 - 1) * 50


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_classes_score_cross_entropy_minus_the_dice_of_the_whole_batch(seed: int) -> None:
    logits, label = random_logits(seed, 3), random_label(seed, (0, 1, 2))
    p, target = logits.softmax(1), label[:, 0].long()
    dice = [2 * p[:, k][target == k].sum() / (p[:, k].sum() + (target == k).sum()) for k in (1, 2)]
    expected = F.cross_entropy(logits, target) - sum(dice) / 2
    torch.testing.assert_close(DiceCrossEntropy(TWO_CLASSES)(logits, label), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_regions_score_binary_cross_entropy_minus_the_dice_of_each_region(seed: int) -> None:
    logits, label = random_logits(seed, 2), random_label(seed, (0, 1, 2))
    p = logits.sigmoid()
    whole, core = label[:, 0] > 0, label[:, 0] == 2
    dice = [2 * p[:, i][mask].sum() / (p[:, i].sum() + mask.sum()) for i, mask in enumerate((whole, core))]
    entropy = F.binary_cross_entropy_with_logits(logits, torch.stack((whole, core), 1).float())
    torch.testing.assert_close(DiceCrossEntropy(REGIONS)(logits, label), entropy - sum(dice) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [TWO_CLASSES, REGIONS, SPARSE_VALUES, IGNORING, IGNORED_REGIONS])
def test_a_sure_and_right_answer_scores_minus_one_and_a_wrong_one_far_more(labels: Labels) -> None:
    label = random_label(1, (0, *labels.foreground_values))
    logits = sure(label, labels.values, background=not labels.has_regions)
    loss = DiceCrossEntropy(labels)
    assert loss(logits, label).item() == pytest.approx(-1, abs=1e-4)
    assert loss(-logits, label).item() > 1


def test_label_values_with_gaps_find_their_channel() -> None:
    logits = random_logits(2, 3)
    label = random_label(2, (0, 1, 2))
    renamed = torch.tensor([0, 7, 3])[label.long()].short()
    assert torch.equal(DiceCrossEntropy(SPARSE_VALUES)(logits, renamed), DiceCrossEntropy(TWO_CLASSES)(logits, label))


@pytest.mark.parametrize(("labels", "channels"), [(IGNORING, 3), (IGNORED_REGIONS, 2)])
def test_logits_on_ignored_voxels_change_nothing(labels: Labels, channels: int) -> None:
    loss = build_loss(labels)
    label = random_label(3, (0, 1, 2, 3))
    logits = random_logits(3, channels).requires_grad_()
    value = loss([logits], label)
    value.backward()  # type: ignore[no-untyped-call]
    ignored = (label == 3).expand_as(logits)
    assert logits.grad is not None
    assert not logits.grad[ignored].any() and logits.grad[~ignored].all()
    elsewhere = torch.where(ignored, logits.detach() * -7 + 3, logits.detach())
    assert torch.equal(loss([elsewhere], label), value.detach())


@pytest.mark.parametrize(("labels", "plain", "channels"), [(IGNORING, TWO_CLASSES, 3), (IGNORED_REGIONS, REGIONS, 2)])
def test_the_loss_is_that_of_the_annotated_part_alone(labels: Labels, plain: Labels, channels: int) -> None:
    logits, label = random_logits(4, channels), random_label(4, (0, 1, 2))
    expected = DiceCrossEntropy(plain)(logits[:, :, :2], label[:, :, :2])
    label[:, :, 2:] = 3
    torch.testing.assert_close(DiceCrossEntropy(labels)(logits, label), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("labels", "channels"), [(IGNORING, 3), (IGNORED_REGIONS, 2)])
def test_a_batch_without_any_annotation_teaches_nothing(labels: Labels, channels: int) -> None:
    logits = random_logits(5, channels).requires_grad_()
    value = DiceCrossEntropy(labels)(logits, torch.full((2, 1, *SHAPE), 3, dtype=torch.int16))
    value.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(value) and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("labels", [TWO_CLASSES, REGIONS])
def test_a_batch_without_foreground_has_a_finite_loss_and_gradient(labels: Labels) -> None:
    logits = random_logits(6, labels.output_channels).requires_grad_()
    value = DiceCrossEntropy(labels)(logits, torch.zeros((2, 1, *SHAPE), dtype=torch.int16))
    value.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(value) and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_extreme_logits_stay_finite_in_half_precision() -> None:
    logits = (random_logits(7, 3) * 1e4).bfloat16()
    assert torch.isfinite(DiceCrossEntropy(TWO_CLASSES)(logits, random_label(7, (0, 1, 2))))


def test_deep_supervision_halves_the_weight_with_each_coarser_scale() -> None:
    label = torch.zeros((1, 1, 4, 8, 8), dtype=torch.int16)
    label[..., 4:] = 1
    scales = [torch.randn(1, 3, 4, 8, 8), torch.randn(1, 3, 2, 4, 4), torch.randn(1, 3, 2, 2, 2)]
    loss = DiceCrossEntropy(TWO_CLASSES)
    singles = [
        loss(scale, label[:, :, :: 4 // scale.shape[2], :: 8 // scale.shape[3], :: 8 // scale.shape[4]])
        for scale in scales
    ]
    expected = (4 * singles[0] + 2 * singles[1] + singles[2]) / 7
    torch.testing.assert_close(DeepSupervision(loss)(scales, label), expected)
    assert math.isclose(DeepSupervision(loss)(scales[:1], label).item(), singles[0].item(), rel_tol=1e-6)


def test_deep_supervision_keeps_high_label_values_exact() -> None:
    labels = Labels.from_json({"background": 0, "organ": 32766})
    label = torch.zeros((1, 1, 4, 4, 4), dtype=torch.int16)
    label[..., 2:] = 32766
    coarse = sure(label[..., ::2, ::2, ::2], labels.values, background=True)
    fine = sure(label, labels.values, background=True)
    assert build_loss(labels)([fine, coarse], label).item() == pytest.approx(-1, abs=1e-4)
