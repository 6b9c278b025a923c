"""Heads that answer on a finer grid than their network reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import architecture
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from autoseg.errors import PlanError
from autoseg.networks import OutputGrid, UNet, build_network
from autoseg.networks.upsampling import HEADS, SubpixelHead, interpolate
from autoseg.plan import Architecture, Vector

heads = pytest.mark.parametrize("head", sorted(HEADS))


def fine_architecture(
    *,
    head: str = "subpixel",
    scale: Vector = (4.0, 1.0, 1.0),
    flat: bool = False,
    labels: int = 3,
    images: int = 1,
    inputs: int = 1,
) -> Architecture:
    """Four stages, so that deep supervision has something to score."""
    z = 1 if flat else 2
    return Architecture(
        input_channels=inputs,
        output_channels=labels,
        features=(4, 6, 8, 8),
        strides=((1, 1, 1), (1, 2, 2), (z, 2, 2), (1, 1, 2)),
        kernels=((1, 3, 3),) * 4 if flat else ((3, 3, 3),) * 4,
        encoder_convs=(1, 1, 1, 1),
        decoder_convs=(1, 1, 1),
        head=head,
        head_scale=scale,
        image_channels=images,
    )


def after_a_step(network: UNet, image: Tensor, grid: OutputGrid | None = None) -> UNet:
    """The network, no longer at its start: the last layer of its head has left zero."""
    assert network.up_head is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in network.up_head.last.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return network


@heads
@pytest.mark.parametrize(
    ("flat", "scale", "inputs", "outputs"),
    [
        (False, (4.0, 1.0, 1.0), (4, 8, 16), (16, 8, 16)),
        (False, (1.0, 2.5, 1.0), (2, 8, 8), (2, 20, 8)),
        (False, (2.0, 2.0, 3.0), (2, 8, 8), (4, 16, 24)),
        (True, (1.0, 1.5, 5.0), (1, 8, 8), (1, 12, 40)),
        (True, (2.0, 1.0, 1.0), (3, 8, 8), (6, 8, 8)),
    ],
)
def test_the_answer_starts_as_interpolation_and_covers_the_grid(head, flat, scale, inputs, outputs) -> None:
    network = build_network(fine_architecture(head=head, scale=scale, flat=flat))
    image = torch.randn(2, 1, *inputs)
    answers = network(image)
    assert [tuple(answer.shape[1:]) for answer in answers] == [
        (4, *outputs),
        (3, *inputs),
        (3, inputs[0], inputs[1] // 2, inputs[2] // 2),
    ]
    expected = F.interpolate(torch.cat((answers[1], image), 1), size=outputs, mode="trilinear", align_corners=False)
    torch.testing.assert_close(answers[0], expected, rtol=1e-4, atol=1e-5)
    finest = after_a_step(network, image)(image)[0]
    assert finest.shape == (2, 4, *outputs) and not torch.allclose(finest, expected, atol=1e-3)
    assert len(network.eval()(image)) == 1


@heads
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 17)] * 3),
    scale=st.tuples(*[st.floats(1.0, 3.0)] * 3),
    start=st.tuples(*[st.floats(-4.0, 8.0)] * 3),
)
def test_any_grid_is_answered_exactly(head, shape, scale, start) -> None:
    network = build_network(fine_architecture(head=head, scale=(3.0, 3.0, 3.0))).eval()
    image = torch.randn(1, 1, 4, 4, 8)
    with torch.inference_mode():
        (answer,) = after_a_step(network, image)(image, OutputGrid(shape, scale, start))
    assert answer.shape == (1, 4, *shape)
    assert torch.isfinite(answer).all()


@heads
@pytest.mark.parametrize("flat", [False, True])
def test_a_part_of_the_grid_is_answered_as_in_the_whole(head: str, flat: bool) -> None:
    scale = (1.0, 2.5, 1.7) if flat else (2.5, 1.0, 1.7)
    network = build_network(fine_architecture(head=head, scale=scale, flat=flat)).eval()
    image = torch.randn(1, 1, 4, 8, 8)
    after_a_step(network, image)
    whole = OutputGrid((4, 20, 13) if flat else (10, 8, 13), scale)
    with torch.inference_mode():
        (everything,) = network(image, whole)
        (part,) = network(image, OutputGrid((3, 5, 6), scale, (1.0, 2.0, 4.0)))
    torch.testing.assert_close(part, everything[:, :, 1:4, 2:7, 4:10], rtol=1e-4, atol=1e-5)


def test_a_grid_that_starts_before_the_input_repeats_its_edge() -> None:
    network = build_network(fine_architecture()).eval()
    image = torch.randn(1, 1, 4, 4, 8)
    with torch.inference_mode():
        (answer,) = network(image, OutputGrid((19, 4, 8), (4.0, 1.0, 1.0), (-1.5, 0.0, 0.0)))
        (inside,) = network(image, OutputGrid((16, 4, 8), (4.0, 1.0, 1.0)))
    torch.testing.assert_close(answer[:, 3, 0], image[:, 0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer[:, 3, -1], image[:, 0, -1], rtol=1e-4, atol=1e-5)
    # a grid that is shifted by half a voxel lies between the voxels of the other (here: between two of the input)
    middle = (inside[:, :, 6:9] + inside[:, :, 7:10]) / 2
    torch.testing.assert_close(answer[:, :, 8:11], middle, rtol=1e-4, atol=1e-4)


def test_subpixels_of_a_voxel_lie_within_it() -> None:
    head = SubpixelHead(2, 1, scale=(2.0, 1.0, 3.0), dimensions=3)
    head.last.zero()
    with torch.no_grad():
        head.last.conv.bias[:] = torch.arange(6.0)  # channel = position among the 2 x 1 x 3 subpixels
    answer = head(torch.zeros(1, 2, 2, 1, 2), OutputGrid.of((2, 1, 2), (2.0, 1.0, 3.0)))
    assert answer[0, 0, :, 0].tolist() == [[0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5]] * 2


@pytest.mark.parametrize("head", ["implicit", "filters"])
def test_a_head_for_any_scale_knows_where_in_a_voxel_it_is_asked_and_at_which_scale(head: str) -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 4, 4, 8)  # what is added to the residual is the same everywhere
    network = after_a_step(build_network(fine_architecture(head=head)), image).eval()
    with torch.inference_mode():
        (answer,) = network(image)
        (coarser,) = network(image, OutputGrid((12, 4, 8), (3.0, 1.0, 1.0)))
    column = answer[0, :, 4:8, 2, 4]  # the four subpixels of one voxel
    assert column.std(dim=1).max() > 1e-3
    # the middle one of three subpixels lies between the two middle ones of four
    assert (coarser[0, :, 4, 2, 4] - column[:, 1:3].mean(1)).abs().max() > 1e-3


@heads
def test_predicted_and_implicit_residuals_move_with_the_image(head: str) -> None:
    layer = HEADS[head](3, 2, scale=(2.5, 1.0, 2.0), dimensions=3)
    for parameter in layer.last.parameters():
        torch.nn.init.normal_(parameter)
    features = torch.randn(1, 3, 12, 4, 12)
    moved = features.roll((2, 1), (2, 4))  # 2 voxels are 5 of the output along z, 1 is 2 along x
    grid = OutputGrid.of((12, 4, 12), (2.5, 1.0, 2.0))
    with torch.no_grad():
        before, after = layer(features, grid), layer(moved, grid)
    torch.testing.assert_close(after[:, :, 10:-10, :, 6:-6], before.roll((5, 2), (2, 4))[:, :, 10:-10, :, 6:-6])


def test_predicted_filters_are_what_filtering_voxel_by_voxel_gives() -> None:
    head = HEADS["filters"](2, 1, scale=(2.0, 1.0, 3.0), dimensions=3)
    for parameter in head.last.parameters():
        torch.nn.init.normal_(parameter)
    features = torch.randn(1, 2, 3, 3, 3)
    grid = OutputGrid((5, 3, 7), (1.8, 1.0, 2.4))
    with torch.no_grad():
        answer = head(features, grid)
        padded = F.pad(features, (1,) * 6)
        for j in ((0, 0, 0), (2, 1, 3), (4, 2, 6)):
            mixture, nearest = torch.ones(head.filters), list(j)
            for axis, predictor in zip((0, 2), head.predictors, strict=True):
                exact = min(max((j[axis] + 0.5) / grid.scale[axis] - 0.5, 0), 2)
                nearest[axis] = round(exact)
                mixture = mixture * predictor(torch.tensor([exact - nearest[axis], 1 / grid.scale[axis]]))
            kernel = (head.last.conv.weight * mixture[:, None, None, None, None]).sum(0)
            bias = (head.last.conv.bias * mixture).sum()
            z, y, x = nearest
            around = padded[0, :, z : z + 3, y : y + 3, x : x + 3]
            assert float(answer[0, 0, j[0], j[1], j[2]]) == pytest.approx(
                float((kernel * around).sum() + bias), abs=1e-4
            )


@heads
def test_at_scale_one_the_answer_is_the_plain_networks(head: str) -> None:
    described = fine_architecture(head=head)
    network = build_network(described).eval()
    image = torch.randn(1, 1, 4, 8, 8)
    after_a_step(network, image)
    plain = build_network(replace(described, head="plain", head_scale=(1.0, 1.0, 1.0), image_channels=0)).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("up_head")})
    with torch.inference_mode():
        (answer,) = network(image, OutputGrid((4, 8, 8), (1.0, 1.0, 1.0)))
        (expected,) = plain(image)
        (heedless,) = plain(image, OutputGrid((16, 8, 8), (4.0, 1.0, 1.0)))
    assert (
        torch.equal(answer[:, :3], expected) and torch.equal(answer[:, 3:], image) and torch.equal(heedless, expected)
    )


def test_labels_and_image_are_each_left_out_where_they_are_not_wanted() -> None:
    image = torch.randn(1, 2, 4, 8, 8)
    only_image = build_network(fine_architecture(labels=0, images=2, inputs=2))
    assert [tuple(answer.shape) for answer in only_image(image)] == [(1, 2, 16, 8, 8)]
    assert not only_image.heads
    only_labels = build_network(fine_architecture(labels=3, images=0, inputs=2))
    assert [tuple(answer.shape) for answer in only_labels(image)][:2] == [(1, 3, 16, 8, 8), (1, 3, 4, 8, 8)]


@pytest.mark.parametrize("context", ["stack", "reduce"])
def test_of_a_window_of_slices_the_middle_ones_are_refined(context: str) -> None:
    described = fine_architecture(scale=(1.0, 2.0, 1.0), flat=True, inputs=2)
    network = build_network(replace(described, context=context, context_slices=5)).eval()
    volume = torch.randn(1, 2, 3 + 4, 8, 8)
    with torch.inference_mode():
        (answer,) = network(volume)
    assert answer.shape == (1, 4, 3, 16, 8)
    middle = interpolate(volume[:, :1, 2:5], OutputGrid.of((3, 8, 8), (1.0, 2.0, 1.0)))
    torch.testing.assert_close(answer[:, 3:], middle)


@heads
@pytest.mark.parametrize("flat", [False, True])
def test_every_parameter_of_a_super_resolving_network_gets_a_gradient(head: str, flat: bool) -> None:
    network = build_network(fine_architecture(head=head, flat=flat, scale=(1.0, 2.0, 1.5)))
    image = torch.randn(2, 1, 2, 8, 8)
    after_a_step(network, image)
    sum(answer.square().mean() for answer in network(image)).backward()
    lacking = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in lacking if not name.endswith("bias")]  # a bias before a normalisation moves nothing
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@heads
def test_a_residual_leaves_zero_with_the_first_step(head: str) -> None:
    network = build_network(fine_architecture(head=head))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    image, truth = torch.randn(1, 1, 4, 8, 8), torch.randn(1, 4, 16, 8, 8)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = (network(image)[0] - truth).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert network.up_head.last.conv.weight.abs().max() > 0


@heads
@pytest.mark.parametrize("flat", [False, True])
def test_fake_tensors_and_autocast_pass_through(head: str, flat: bool) -> None:
    described = fine_architecture(head=head, flat=flat, scale=(1.0, 2.5, 1.0))
    real = after_a_step(build_network(described), torch.empty(0))
    image = torch.randn(2, 1, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = real(image)
    exact = real(image)
    assert rough[0].dtype == torch.float32 and torch.isfinite(rough[0]).all()
    assert (rough[0] - exact[0]).abs().mean() < 0.05 * exact[0].abs().mean()
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        fake = build_network(described)(torch.randn(2, 1, 2, 8, 8))
        sum(answer.float().sum() for answer in fake).backward()
    assert [answer.shape for answer in fake] == [answer.shape for answer in rough]
    # nothing fake is left behind
    torch.testing.assert_close(real(image)[0], exact[0])


def test_what_is_interpolated_stays_exact_under_autocast() -> None:
    network = build_network(fine_architecture())
    image = 100 + torch.rand(1, 1, 4, 8, 8)  # bfloat16 has steps of 0.5 here
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer, logits, *_ = network(image)
    assert logits.dtype == torch.bfloat16
    for own, part in ((answer[:, :3], logits.float()), (answer[:, 3:], image)):
        expected = F.interpolate(part, size=(16, 8, 8), mode="trilinear", align_corners=False)
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-4)


def test_the_same_seed_builds_the_same_body_with_and_without_a_head() -> None:
    torch.manual_seed(3)
    plain = build_network(architecture()).state_dict()
    torch.manual_seed(3)
    again = build_network(replace(architecture(), context="none", head="plain")).state_dict()
    assert list(plain) == list(again) and all(torch.equal(plain[name], again[name]) for name in plain)


def test_an_unknown_head_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match="'subpixl' is not known; choose one of filters, implicit, .*plain, subpixel"):
        build_network(fine_architecture(head="subpixl"))
