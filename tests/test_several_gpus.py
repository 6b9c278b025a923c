"""A machine with several GPUs trains a fold on each; there are none here, so processors stand for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import two_candidates, two_folds, weights

import autoseg.experiment_planning.planner as planner
from autoseg.executor import LocalExecutor, Needs
from autoseg.pipeline import run
from autoseg.workspace import Workspace


def test_each_gpu_takes_a_fold_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert LocalExecutor().places("auto", Needs()) == ("cuda:0", "cuda:1")
    assert LocalExecutor().places("cuda:1", Needs()) == LocalExecutor().places("cpu", Needs()) == ()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert LocalExecutor().places("auto", Needs()) == ()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs
def test_folds_that_are_trained_at_the_same_time_become_what_they_become_one_after_another(
    tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tiny_dataset(cases=6)
    plan = two_candidates(root)
    monkeypatch.setattr(planner, "plan_experiment", lambda *_, **__: plan)
    parts: dict[str, list[str]] = {"one": [], "two": []}
    for name, places in (("one", ()), ("two", ("cpu", "cpu"))):
        two_folds(root, tmp_path / name)
        monkeypatch.setattr(LocalExecutor, "places", lambda self, device, needs, places=places: places)
        run(root, workspace=tmp_path / name, device="cpu", workers=2, on_part=parts[name].append)
    assert "3d_fullres, fold 0; 3d_fullres, fold 1" in parts["two"] and "3d_fullres, fold 0" in parts["one"]
    one, two = (weights(Workspace.of(root, tmp_path / name)) for name in ("one", "two"))
    assert one and one.keys() == two.keys()
    assert not [name for name in one if not np.array_equal(one[name], two[name])]
