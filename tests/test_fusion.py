"""A reference image on a grid of its own joins a network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_upsampling import fine_architecture
from torch._subclasses.fake_tensor import FakeTensorMode

from autoseg.networks import OutputGrid, UNet, build_network
from autoseg.networks.fusion import covering, resample


def opened(network: UNet) -> UNet:
    """The network, its fusion no longer at zero."""
    assert network.fusion is not None
    for parameter in network.fusion.last.parameters():
        torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("head", ["plain", "subpixel"])
def test_a_reference_changes_nothing_at_first_and_is_seen_once_the_gate_has_learned(head: str, flat: bool) -> None:
    scale = (1.0, 2.5, 1.0) if head == "subpixel" else (1.0, 1.0, 1.0)
    described = fine_architecture(head=head, scale=scale, flat=flat, images=int(head == "subpixel"))
    network = build_network(replace(described, reference_channels=2))
    image, reference = torch.randn(2, 1, 2, 8, 8), torch.randn(2, 2, 2, 24, 16)
    answers = network(image, reference=reference)
    without = build_network(described)
    body = {k: v for k, v in network.state_dict().items() if not k.startswith("fusion")}
    without.load_state_dict(body)
    for own, expected in zip(answers, without(image), strict=True):
        torch.testing.assert_close(own, expected)
    opened(network).eval()
    with torch.inference_mode():
        (first,) = network(image, reference=reference)
        moved = reference.clone()
        moved[:, :, :, 20] += 3  # of 24 rows of the reference; the answer has 20 or 8
        (third,) = network(image, reference=moved)
    assert first.shape == answers[0].shape
    changes = (third - first).abs().amax(dim=(0, 1, 2, 4))
    assert int(changes.argmax()) == pytest.approx((20 + 0.5) / 24 * len(changes) - 0.5, abs=2)


def test_every_parameter_of_the_fusion_gets_a_gradient() -> None:
    network = opened(build_network(replace(fine_architecture(), reference_channels=1)))
    answers = network(torch.randn(1, 1, 4, 8, 8), reference=torch.randn(1, 1, 16, 4, 4))
    sum(answer.square().mean() for answer in answers).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_a_reference_on_any_grid_lies_where_its_grid_says() -> None:
    # a ramp along z in the input's voxels is the same ramp on any grid over it
    reference_grid = OutputGrid((10, 4, 4), (2.0, 1.0, 1.0), (-1.0, 0.0, 0.0))
    ramp = ((torch.arange(10.0) - 1 + 0.5) / 2 - 0.5)[None, None, :, None, None].expand(1, 1, 10, 4, 4)
    wanted = OutputGrid((9, 4, 4), (3.0, 1.0, 1.0), (2.0, 0.0, 0.0))
    there = resample(ramp, reference_grid, wanted)[0, 0, :, 0, 0]
    torch.testing.assert_close(there, (torch.arange(9.0) + 2 + 0.5) / 3 - 0.5)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 12),
    outputs=st.integers(1, 12),
    own=st.floats(0.5, 4.0),
    asked=st.floats(0.5, 4.0),
    start=st.floats(-3.0, 3.0),
)
def test_resampling_keeps_a_constant_and_its_own_grid(
    size: int, outputs: int, own: float, asked: float, start: float
) -> None:
    grid = OutputGrid((size, 3, 2), (own, 1.0, 1.0), (start, 0.0, 0.0))
    x = torch.randn(1, 2, size, 3, 2)
    assert resample(x, grid, grid) is x
    wanted = OutputGrid((outputs, 3, 2), (asked, 1.0, 1.0))
    constant = resample(torch.full_like(x, 2.0), grid, wanted)
    torch.testing.assert_close(constant, torch.full((1, 2, outputs, 3, 2), 2.0))


def test_a_finer_reference_is_averaged_and_by_default_covers_the_input() -> None:
    reference = torch.arange(8.0)[None, None, :, None, None]
    grid = covering(reference, torch.zeros(1, 3, 2, 1, 1))
    assert grid == OutputGrid((8, 1, 1), (4.0, 1.0, 1.0))
    coarse = resample(reference, grid, OutputGrid((2, 1, 1), (1.0, 1.0, 1.0)))
    assert coarse.flatten().tolist() == pytest.approx([1.5, 5.5])


def test_fake_tensors_pass_through_the_fusion() -> None:
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        network = build_network(replace(fine_architecture(), reference_channels=1))
        answers = network(torch.randn(1, 1, 4, 8, 8), reference=torch.randn(1, 1, 16, 4, 4))
        sum(answer.float().sum() for answer in answers).backward()
    assert answers[0].shape == (1, 4, 16, 8, 8) and answers[0].dtype == torch.float32


def test_a_missing_reference_is_said() -> None:
    network = build_network(replace(fine_architecture(), reference_channels=1))
    with pytest.raises(ValueError, match="needs a reference image"):
        network(torch.randn(1, 1, 4, 8, 8))
