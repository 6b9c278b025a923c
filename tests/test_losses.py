"""Losses against their closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import IGNORING, REGIONS, TWO_CLASSES, architecture, sr_configuration, stack_configuration
from torch import Tensor
from torch.nn import functional as F

from autoseg import plan_values
from autoseg.acquisition import degrade
from autoseg.errors import PlanError
from autoseg.labels import Labels
from autoseg.networks import build_network
from autoseg.networks.upsampling import OutputGrid
from autoseg.plan import Acquisition, TrainingSettings
from autoseg.training.losses import (
    IMAGE_LOSSES,
    DeepSupervision,
    DiceCrossEntropy,
    Restoration,
    SuperResolutionLoss,
    build_loss,
    first_filters,
)
from autoseg.training.shapes import Batch, fine_patch, paired_grid

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


# ---- super-resolution

SCALE = (2.0, 1.0, 1.0)
GRID = OutputGrid((16, 6, 5), SCALE)


def restoration(predicted: Tensor, truth: Tensor | None, *, image: Tensor | None = None) -> Restoration:
    thick = torch.zeros(1, 1, 8, 6, 5) if image is None else image
    return Restoration(predicted, truth, thick, GRID, Acquisition(), filters=torch.randn(4, 1, 3, 3, 3))


def fine_image(seed: int) -> Tensor:
    return torch.randn(1, 1, 16, 6, 5, generator=torch.Generator().manual_seed(seed))


def wave(component: int) -> Tensor:
    """A cosine of `component` periods along the refined axis, which is its own discrete Fourier component."""
    line = torch.cos(2 * math.pi * component * torch.arange(16) / 16)
    return line.reshape(1, 1, 16, 1, 1).expand(1, 1, 16, 6, 5)


def test_the_terms_of_the_image_are_those_that_a_plan_may_name() -> None:
    assert tuple(IMAGE_LOSSES) == plan_values.IMAGE_LOSSES


@pytest.mark.parametrize("name", ["l1", "high_frequency", "perceptual"])
def test_every_term_is_zero_for_the_truth_and_grows_with_the_error(name: str) -> None:
    truth, error = fine_image(0), fine_image(1)
    term = IMAGE_LOSSES[name]
    assert term(restoration(truth, truth)).item() == 0
    torch.manual_seed(0)
    small, large = (term(restoration(truth + size * error, truth)).item() for size in (0.1, 0.5))
    assert 0 < small < large


def test_l1_is_the_mean_error() -> None:
    truth = fine_image(0)
    assert IMAGE_LOSSES["l1"](restoration(truth + 0.25, truth)).item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(("component", "seen"), [(0, False), (1, False), (2, False), (3, True), (5, True), (8, True)])
def test_high_frequencies_are_those_above_half_the_inputs_nyquist(component: int, seen: bool) -> None:
    # at scale 2 the input's Nyquist frequency is component 4 of 16; half of it is component 2
    truth = fine_image(0)
    found = IMAGE_LOSSES["high_frequency"](restoration(truth + wave(component), truth)).item()
    # one component of six above: amplitude 16 / 2, at Nyquist 16, divided by 4 (orthonormal)
    expected = (4.0 if component == 8 else 2.0) / 6 if seen else 0.0
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_answer_that_the_forward_model_brings_back_to_the_input_is_consistent() -> None:
    predicted = fine_image(0)
    thick = degrade(predicted, SCALE, Acquisition())
    term = IMAGE_LOSSES["consistency"]
    assert term(restoration(predicted, None, image=thick)).item() == pytest.approx(0, abs=1e-6)
    assert term(restoration(predicted, None, image=thick + 0.5)).item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("scale", [1.3, 1.5, 1.8, 2.0, 2.5, 4.0])
@pytest.mark.parametrize(("patch", "halo"), [(1, 1), (1, 2), (3, 0), (4, 0)])
def test_an_answer_is_made_thick_where_its_slices_lie(scale: float, patch: int, halo: int) -> None:
    grids = {"degraded": fine_patch((patch, 1, 1), (scale, 1.0, 1.0), halo=halo).grid}
    grids["paired"] = paired_grid((patch, 1, 1), (scale, 1.0, 1.0))
    for source, grid in grids.items():
        # both images hold their place in the world, which linear interpolation at a slice's centre keeps
        fine = (grid.start[0] + torch.arange(grid.shape[0]) + 0.5).reshape(1, 1, -1, 1, 1)
        thick = ((torch.arange(patch) + 0.5) * scale).reshape(1, 1, -1, 1, 1)
        given = Restoration(fine, None, thick, grid, Acquisition("dirac"))
        assert IMAGE_LOSSES["consistency"](given).item() == pytest.approx(0, abs=1e-5), source


def test_what_the_filters_see_is_measured_in_units_of_the_truth() -> None:
    truth = fine_image(0)
    first = restoration(truth * 1.1, truth)
    scaled = replace(first, filters=None if first.filters is None else first.filters * 50)
    term = IMAGE_LOSSES["perceptual"]
    assert term(scaled).item() == pytest.approx(term(first).item(), rel=1e-4)
    predicted = (truth * 1.1).requires_grad_()
    term(replace(first, predicted=predicted)).backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None and predicted.grad.any()


@pytest.mark.parametrize("context", ["none", "stack", "reduce"])
def test_the_filters_are_the_networks_own_and_detached(context: str) -> None:
    described = architecture(inputs=2) if context == "none" else stack_configuration(context=context).architecture
    described = replace(described, input_channels=2, image_channels=2)
    network = build_network(described)
    filters = first_filters(network, described)
    assert filters.shape == (4, 2, 1 if context == "stack" else 3, 3, 3) and not filters.requires_grad
    if context == "stack":  # channel c of slice k is channel 3 c + k
        first = next(p for name, p in network.named_parameters() if name.startswith("encoder") and p.ndim == 4)
        assert torch.equal(filters[:, 1, 0], first[:, 4])


def joint_outputs(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    finest = torch.randn(2, 4, 8, 6, 6, generator=generator)
    coarse = [torch.randn(2, 3, 4, 6, 6, generator=generator), torch.randn(2, 3, 4, 3, 3, generator=generator)]
    label = torch.randint(0, 3, (2, 1, 8, 6, 6), generator=generator).short()
    truth, image = torch.randn(2, 1, 8, 6, 6, generator=generator), torch.randn(2, 1, 4, 6, 6, generator=generator)
    return [finest, *coarse], label, truth, image


def joint_loss(**changes: object) -> SuperResolutionLoss:
    configuration = sr_configuration(training=TrainingSettings(**changes))  # type: ignore[arg-type]
    loss = build_loss(TWO_CLASSES, configuration.architecture, configuration=configuration)
    assert isinstance(loss, SuperResolutionLoss)
    return loss


def test_segmentation_and_image_are_weighted_by_what_is_learned() -> None:
    outputs, label, truth, image = joint_outputs()
    loss = joint_loss()
    segmentation = DeepSupervision(DiceCrossEntropy(TWO_CLASSES))([outputs[0][:, :3], *outputs[1:]], label) + 1
    error = F.l1_loss(outputs[0][:, 3:], truth)
    torch.testing.assert_close(loss(outputs, label, truth, image), segmentation + error)
    assert loss.weights is not None
    with torch.no_grad():
        loss.weights.copy_(torch.tensor([0.5, -1.0]))
    value = loss(outputs, label, truth, image)
    expected = math.exp(-0.5) * segmentation + 0.5 + math.e * error - 1.0
    torch.testing.assert_close(value, expected)
    value.backward()  # type: ignore[no-untyped-call]
    assert loss.weights.grad is not None
    torch.testing.assert_close(loss.weights.grad[0], 1 - math.exp(-0.5) * segmentation)


def test_a_perfect_answer_leaves_only_the_weights() -> None:
    _, label, truth, image = joint_outputs()
    finest = torch.cat((sure(label, TWO_CLASSES.values, background=True), truth), dim=1)
    assert joint_loss()([finest], label, truth, image).item() == pytest.approx(0, abs=1e-4)


def test_terms_of_the_image_add_up() -> None:
    outputs, label, truth, image = joint_outputs()
    alone = [joint_loss(image_losses=(name,))(outputs, label, truth, image) for name in ("l1", "high_frequency")]
    both = joint_loss(image_losses=("l1", "high_frequency"))(outputs, label, truth, image)
    without = joint_loss(image_losses=("l1",))([outputs[0], *outputs[1:]], label, outputs[0][:, 3:], image)
    torch.testing.assert_close(both, alone[0] + alone[1] - without)


def test_one_task_alone_is_not_weighted() -> None:
    outputs, label, truth, image = joint_outputs()
    only = sr_configuration(segments=False)
    loss = build_loss(TWO_CLASSES, only.architecture, configuration=only)
    assert not list(loss.parameters())
    torch.testing.assert_close(loss([outputs[0][:, 3:]], label, truth, image), F.l1_loss(outputs[0][:, 3:], truth))
    labels = sr_configuration(image=False)
    loss = build_loss(TWO_CLASSES, labels.architecture, configuration=labels)
    assert not list(loss.parameters())
    expected = DeepSupervision(DiceCrossEntropy(TWO_CLASSES))([outputs[0][:, :3], *outputs[1:]], label) + 1
    torch.testing.assert_close(loss([outputs[0][:, :3], *outputs[1:]], label, None, image), expected)


def test_a_stack_compares_its_middle_slice() -> None:
    consistent = TrainingSettings(image_losses=("consistency",))
    configuration = sr_configuration(
        scale=(4.0, 1.0, 1.0), patch_size=(1, 12, 12), slices=3, segments=False, training=consistent
    )
    loss = build_loss(TWO_CLASSES, configuration.architecture, configuration=configuration)
    predicted = torch.randn(1, 1, 4, 12, 12)
    stack = torch.randn(1, 1, 3, 12, 12)
    stack[:, :, 1:2] = degrade(predicted, (4.0, 1.0, 1.0), Acquisition())
    assert loss([predicted], torch.zeros(1, 1, 4, 12, 12), None, stack).item() == pytest.approx(0, abs=1e-6)


def test_without_fine_images_only_consistency_is_left() -> None:
    settings = TrainingSettings(image_losses=("l1", "consistency"))
    paired = sr_configuration(source="paired", training=settings)
    loss = build_loss(TWO_CLASSES, paired.architecture, configuration=paired)
    assert isinstance(loss, SuperResolutionLoss) and loss.terms == ("consistency",)
    with pytest.raises(PlanError, match="Nothing says what the super-resolved image should be.*consistency"):
        build_loss(TWO_CLASSES, paired.architecture, configuration=sr_configuration(source="paired"))
    nothing = sr_configuration(training=TrainingSettings(image_losses=()))
    with pytest.raises(PlanError, match="image_losses names nothing, and there is an image head; give l1 or"):
        build_loss(TWO_CLASSES, nothing.architecture, configuration=nothing)
    unknown = sr_configuration(training=TrainingSettings(image_losses=("l2",)))
    with pytest.raises(PlanError, match="Image loss 'l2' is not known; choose one of"):
        build_loss(TWO_CLASSES, unknown.architecture, configuration=unknown)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1.2, 4), names=st.sets(st.sampled_from(plan_values.IMAGE_LOSSES), min_size=1))
def test_every_choice_of_terms_has_a_gradient_at_any_scale(scale: float, names: set[str]) -> None:
    fine = math.ceil(5 * scale - 1e-6)
    grid = OutputGrid((fine, 4, 4), (scale, 1.0, 1.0), (-(fine - 5 * scale) / 2, 0.0, 0.0))
    loss = SuperResolutionLoss(
        build_loss(TWO_CLASSES),
        classes=0,
        image_channels=1,
        terms=sorted(names),
        scale=(4.0, 1.0, 1.0),
        acquisition=Acquisition(),
        filters=lambda: torch.ones(2, 1, 3, 3, 3),
    )
    random = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 1, 1, fine, 4, 4))).float()
    predicted = random[0].requires_grad_()
    value = loss([predicted], torch.zeros(1, 1, fine, 4, 4), random[1], random[2][:, :, :5], grid)
    value.backward()
    assert torch.isfinite(value) and predicted.grad is not None and predicted.grad.isfinite().all()
    assert predicted.grad.any()


# ---- thick labels


@pytest.mark.parametrize("labels", [TWO_CLASSES, REGIONS])
def test_a_label_of_thick_slices_says_where_the_larger_part_lies_and_no_more(labels: Labels) -> None:
    configuration = sr_configuration(
        scale=(1.0, 4.0, 1.0), source="self", patch_size=(1, 4, 8), image=False, labels=labels
    )
    loss = build_loss(labels, configuration.architecture, configuration=configuration)
    grid = fine_patch((1, 4, 8), configuration.sr_scale).grid
    thick = torch.zeros(1, 1, 1, 4, 8, dtype=torch.int16)
    thick[:, :, :, :2] = 1
    groups = labels.values

    def answer(first: int) -> float:
        """The loss of an edge before fine voxel `first`, of 16."""
        fine = torch.zeros(1, 1, 1, 16, 8)
        fine[:, :, :, :first] = 1
        logits = sure(fine, groups, background=not labels.has_regions) / 5
        image = torch.zeros(1, 1, 1, 4, 8)
        return float(loss([logits], thick, None, image, grid))

    assert answer(8) < 0.02  # just between the second slice and the third
    assert answer(7) < answer(8) + 0.1 and answer(9) < answer(8) + 0.1  # most of each slice is still on its side
    assert answer(5) > answer(7) + 0.2 and answer(11) > answer(9) + 0.2  # a slice is mostly on the other side
    assert answer(0) > answer(5) and answer(16) > answer(11)


def test_each_task_is_learned_alone_where_the_answer_or_the_label_of_the_other_is_missing() -> None:
    configuration = sr_configuration(source="self", patch_size=(4, 8, 12))
    network = build_network(configuration.architecture)
    loss = build_loss(TWO_CLASSES, configuration.architecture, configuration=configuration)
    image, grid = torch.randn(2, 1, 4, 8, 12), fine_patch((4, 8, 12), configuration.sr_scale).grid

    def reached(part: Batch, outputs: list[Tensor]) -> tuple[bool, bool]:
        """Whether labels' and image's network learn."""
        network.zero_grad()
        loss(outputs, part.label, part.truth, part.image, part.grid).backward()  # type: ignore[no-untyped-call]
        assert network.image_body is not None
        learned = [any(p.grad is not None for p in body.parameters()) for body in (network.encoder, network.image_body)]
        return learned[0], learned[1]

    thick = Batch(image, torch.randint(0, 3, (2, 1, 4, 8, 12)).short(), None, grid)
    assert reached(thick, network(image, grid)) == (True, False)
    plane = Batch(image, torch.zeros((2, 1, 0, 0, 0)).short(), torch.randn(2, 1, *grid.shape), grid)
    assert reached(plane, [network.restore(image, grid, across=1)]) == (False, True)


def test_a_step_of_thick_slices_teaches_the_fine_answer_through_the_forward_model() -> None:
    configuration = sr_configuration(scale=(1.0, 2.0, 1.0), source="self", patch_size=(1, 8, 12))
    network = build_network(configuration.architecture)
    loss = build_loss(TWO_CLASSES, configuration.architecture, configuration=configuration)
    grid = fine_patch((1, 8, 12), configuration.sr_scale).grid
    image = torch.randn(2, 1, 1, 8, 12)
    label = torch.randint(0, 3, (2, 1, 1, 8, 12)).short()
    outputs = network(image, grid)
    outputs[0].retain_grad()
    loss(outputs, label, None, image, grid).backward()  # type: ignore[no-untyped-call]
    assert outputs[0].grad is not None and (outputs[0].grad.abs().amax((0, 2, 3, 4)) > 0).all()  # classes and image
