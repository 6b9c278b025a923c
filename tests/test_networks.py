"""Networks built from an architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import architecture, sr_configuration

from autoseg.errors import PlanError
from autoseg.networks import build_network
from autoseg.networks.context import build_context
from autoseg.networks.upsampling import OutputGrid, interpolate
from autoseg.plan import Architecture


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("flat", [False, True])
def test_logits_have_the_shape_of_the_input_and_the_finest_comes_first(block: str, flat: bool) -> None:
    network = build_network(replace(architecture(flat=flat), block=block, features=(4, 6, 8)))
    z = 3 if flat else 4
    logits = network(torch.randn(2, 1, z, 8, 12))
    assert [tuple(scale.shape) for scale in logits] == [(2, 3, z, 8, 12)]
    deep = build_network(
        replace(
            architecture(flat=flat),
            block=block,
            features=(4, 6, 8, 8),
            strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 1, 2)),
            kernels=((1, 3, 3),) * 4 if flat else ((3, 3, 3),) * 4,
            encoder_convs=(1, 2, 1, 1),
            decoder_convs=(1, 1, 2),
        )
    )
    logits = deep(torch.randn(2, 1, z, 8, 16))
    assert [tuple(scale.shape) for scale in logits] == [(2, 3, z, 8, 16), (2, 3, z, 4, 8)]


@settings(max_examples=20, deadline=None)
@given(
    strides=st.lists(st.tuples(*[st.sampled_from([1, 2, 3])] * 3), min_size=0, max_size=3),
    kernel=st.tuples(*[st.sampled_from([1, 3])] * 3),
    deep_supervision=st.booleans(),
)
def test_any_sound_architecture_answers_on_the_grid_of_its_input(
    strides: list[tuple[int, int, int]], kernel: tuple[int, int, int], deep_supervision: bool
) -> None:
    stages = len(strides) + 1
    described = Architecture(
        input_channels=2,
        output_channels=3,
        features=tuple(2 + i for i in range(stages)),
        strides=((1, 1, 1), *strides),
        kernels=(kernel,) * stages,
        encoder_convs=(1,) * stages,
        decoder_convs=(1,) * (stages - 1),
        deep_supervision=deep_supervision,
    )
    network = build_network(described).eval()
    z, y, x = (max(2 * d, 4) // d * d for d in described.divisor)
    with torch.inference_mode():
        (logits,) = network(torch.randn(1, 2, z, y, x))
    assert logits.shape == (1, 3, z, y, x)
    assert torch.isfinite(logits).all()


def test_in_eval_mode_only_the_finest_scale_is_answered() -> None:
    described = replace(
        architecture(),
        features=(4, 4, 4, 4),
        strides=((1, 1, 1), (2, 2, 2), (1, 2, 2), (1, 1, 1)),
        kernels=((3, 3, 3),) * 4,
        encoder_convs=(1,) * 4,
        decoder_convs=(1,) * 3,
    )
    network = build_network(described)
    image = torch.randn(1, 1, 4, 8, 8)
    assert len(network(image)) == 2
    assert len(build_network(replace(described, deep_supervision=False))(image)) == 1
    network.eval()
    assert len(network(image)) == 1


def test_a_2d_network_sees_each_slice_alone() -> None:
    network = build_network(architecture(inputs=2, flat=True)).eval()
    volume = torch.randn(2, 2, 5, 8, 8)
    with torch.inference_mode():
        together = network(volume)[0]
        alone = torch.cat([network(volume[:, :, z : z + 1])[0] for z in range(5)], dim=2)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, torch.nn.Conv3d) for module in network.modules())


@pytest.mark.parametrize("context", ["stack", "reduce"])
@pytest.mark.parametrize("slices", [3, 5])
def test_a_slice_is_answered_from_its_window_alone(context: str, slices: int) -> None:
    described = replace(architecture(inputs=2, flat=True), context=context, context_slices=slices)
    network = build_network(described).eval()
    halo = described.halo
    assert halo == slices // 2
    volume = torch.randn(2, 2, 4 + 2 * halo, 8, 8)
    with torch.inference_mode():
        (together,) = network(volume)
        alone = [network(volume[:, :, z : z + slices])[0] for z in range(4)]
        far = volume.clone()
        far[:, :, 0] += 1
        (changed,) = network(far)
    assert together.shape == (2, 3, 4, 8, 8)
    torch.testing.assert_close(together, torch.cat(alone, dim=2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[:, :, 0], changed[:, :, 0])  # its first slice is in the window of the first
    torch.testing.assert_close(together[:, :, 1:], changed[:, :, 1:], rtol=1e-4, atol=1e-5)


def test_a_stack_holds_the_slices_of_a_channel_next_to_each_other() -> None:
    stack = build_context(replace(architecture(inputs=2, flat=True), context="stack", context_slices=3))
    volume = torch.arange(2.0 * 5).reshape(1, 2, 5, 1, 1)
    assert stack.outputs == 6
    assert stack(volume)[0, :, 0].flatten().tolist() == [0, 1, 2, 5, 6, 7]
    assert stack(volume)[0, :, 2].flatten().tolist() == [2, 3, 4, 7, 8, 9]


def test_reduction_mixes_slices_without_padding_them() -> None:
    described = replace(architecture(flat=True), context="reduce", context_slices=5)
    kernels = [tuple(m.kernel_size) for m in build_context(described).modules() if isinstance(m, torch.nn.Conv3d)]
    padding = [tuple(m.padding) for m in build_context(described).modules() if isinstance(m, torch.nn.Conv3d)]
    assert kernels == [(3, 3, 3)] * 2 and padding == [(0, 1, 1)] * 2


@pytest.mark.parametrize(
    "described",
    [
        architecture(),
        replace(architecture(flat=True), context="stack", context_slices=3),
        replace(architecture(flat=True), context="reduce", context_slices=3),
    ],
    ids=["none", "stack", "reduce"],
)
def test_every_parameter_gets_a_gradient(described: Architecture) -> None:
    network = build_network(described)
    image = torch.randn(1, 1, 8 + 2 * described.halo, 8, 8)
    sum(scale.square().mean() for scale in network(image)).backward()
    lacking = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not lacking


def test_the_same_seed_builds_the_same_weights() -> None:
    torch.manual_seed(3)
    first = build_network(architecture()).state_dict()
    torch.manual_seed(3)
    second = build_network(architecture()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unknown_block_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        PlanError, match="'residul' is not known; choose one of plain, residual. Did you mean 'residual'"
    ):
        build_network(replace(architecture(), block="residul"))


def test_an_unknown_context_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match="'stak' is not known; choose one of none, reduce, stack. Did you mean 'stack'"):
        build_network(replace(architecture(), context="stak"))


# ---- an image body of its own


def test_an_image_of_slices_begins_as_interpolation_and_treats_both_axes_of_the_plane_alike() -> None:
    network = build_network(sr_configuration(source="self", patch_size=(4, 8, 12)).architecture).eval()
    image, grid = torch.randn(2, 1, 4, 8, 12), OutputGrid.of((4, 8, 12), (2.0, 1.0, 1.0))
    classes = 3
    torch.testing.assert_close(network(image, grid)[0][:, classes:], interpolate(image, grid))
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fine, turned = network(image, grid)[0][:, classes:], grid.turned((0, 2, 1))
    torch.testing.assert_close(network(image.mT, turned)[0][:, classes:], fine.mT, rtol=1e-4, atol=1e-4)
    assert (fine - interpolate(image, grid)).abs().max() > 0.01
    network.train()
    assert network(image, grid)[0].shape == (2, classes, *grid.shape), "in training it is learned apart"


def test_an_image_of_slices_does_not_see_beyond_its_slice() -> None:
    network = build_network(sr_configuration(source="self", patch_size=(4, 8, 12)).architecture).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    image, grid = torch.randn(1, 1, 4, 8, 12), OutputGrid.of((4, 8, 12), (2.0, 1.0, 1.0))
    other = image.clone()
    other[:, :, :, 3] += 1
    changed = (network.restore(image, grid, across=1) != network.restore(other, grid, across=1)).any(4).any(2)[0, 0]
    assert changed.tolist() == [row == 3 for row in range(8)]
