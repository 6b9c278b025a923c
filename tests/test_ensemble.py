"""Ensembles average probabilities, whatever scale the logits of the members have."""

from __future__ import annotations

import pytest
import torch

from autoseg.image import Grid
from autoseg.inference import ensemble
from autoseg.inference.ensemble import average_logits, average_on_one_grid
from autoseg.preprocessing.case import CaseGeometry, fine_geometry


def members(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(scale + 1) * torch.randn((3, 4, 5, 6), generator=generator).to(dtype) for scale in range(count)]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("slab_bytes", [1, 2**20])
def test_probabilities_of_the_result_are_the_mean_of_the_members(regions, slab_bytes, monkeypatch):
    monkeypatch.setattr(ensemble, "PLANE_BYTES", slab_bytes)

    def probabilities(x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid() if regions else x.softmax(0)

    expected = torch.stack([probabilities(m) for m in members(3)]).mean(0)
    result = average_logits(iter(members(3)), regions=regions)
    assert torch.allclose(probabilities(result), expected, atol=2e-5)


def test_half_precision_members_keep_their_type_and_nearly_their_mean():
    result = average_logits(members(4, torch.float16), regions=False)
    expected = torch.stack([m.softmax(0) for m in members(4)]).mean(0)
    assert result.dtype == torch.float16 and torch.allclose(result.float().softmax(0), expected, atol=2e-3)


def test_a_certain_member_does_not_make_infinite_logits():
    sure = torch.full((2, 1, 1, 1), 100.0)
    sure[1] = -100
    assert torch.isfinite(average_logits([sure, sure.clone()], regions=True)).all()
    assert torch.isfinite(average_logits([sure, sure.clone()], regions=False)).all()


def test_one_member_is_returned_as_it_is():
    (only,) = members(1)
    assert average_logits([only], regions=False) is only


def test_members_are_predicted_one_after_the_other():
    alive = []

    def predict():
        for member in members(3):
            alive.append(len(alive))
            yield member

    average_logits(predict(), regions=False)
    assert alive == [0, 1, 2]
    with pytest.raises(ValueError, match="at least one"):
        average_logits([], regions=False)
    with pytest.raises(ValueError, match="shapes"):
        average_logits([torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 2)], regions=False)


NATIVE = CaseGeometry(
    Grid((4, 6, 5), (4.0, 1.0, 1.0)), (0, 1, 2), (False, True, False), ((0, 4), (1, 6), (0, 5)), (4, 5, 5)
)
FINE = fine_geometry(NATIVE, (4.0, 1.0, 1.0))


def test_a_native_and_a_super_resolving_member_are_averaged_on_the_grid_that_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    native = torch.randn((2, *NATIVE.network_shape), generator=generator)
    fine = torch.randn((2, *FINE.network_shape), generator=generator)
    members = [(native, NATIVE), (fine, FINE)]
    on_native, where = average_on_one_grid([(t.clone(), g) for t, g in members], regions=False)
    assert where is NATIVE and on_native.shape == native.shape
    expected = (native.softmax(0) + fine.softmax(0).unflatten(1, (4, 4)).mean(2)) / 2
    assert torch.allclose(on_native.softmax(0), expected, atol=1e-4)
    on_fine, where = average_on_one_grid([(t.clone(), g) for t, g in members], regions=False, target=FINE)
    assert where is FINE and on_fine.shape == fine.shape
    z = torch.nn.functional.interpolate(
        native.softmax(0)[None], size=FINE.network_shape, mode="trilinear", align_corners=False
    )[0]
    assert torch.allclose(on_fine.softmax(0), (z + fine.softmax(0)) / 2, atol=1e-4)


def test_members_on_one_grid_are_averaged_as_ever():
    first, second = members(2)
    geometry = CaseGeometry(Grid((4, 5, 6)), (0, 1, 2), (False,) * 3, ((0, 4), (0, 5), (0, 6)), (4, 5, 6))
    together, _ = average_on_one_grid([(first.clone(), geometry), (second, geometry)], regions=True)
    assert torch.equal(together, average_logits([first, second], regions=True))
    with pytest.raises(ValueError, match="at least one"):
        average_on_one_grid([], regions=True)
